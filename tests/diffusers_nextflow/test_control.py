"""Masks, places, strengths and regions of the pipeline against the engine's own arguments, and bad input."""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting
from PIL import Image

from diffusers_nextflow import NextFlowPipeline
from transformers_nextflow import Region, ScaleSchedule
from transformers_nextflow.kept_pictures import read_source
from transformers_nextflow.kept_regions import kept_places

SCHEDULE = ScaleSchedule(num_scales=5)
SIDE = SCHEDULE.height
PROMPT = "a red circle"
NOISE = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
SOURCE, OTHER = (Image.fromarray(array) for array in NOISE)
HOLE = np.zeros((SIDE, SIDE), np.uint8)
HOLE[20:70, 30:] = 255
MASK = Image.fromarray(HOLE)


@pytest.fixture(scope="module")
def pipe(tiny_random_checkpoint):
    pipe = NextFlowPipeline.from_pretrained(tiny_random_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def codes_of(pipe, prompt=PROMPT, **settings) -> torch.Tensor:
    """The codes that a call draws."""
    seen = {}
    settings = {"generator": torch.Generator().manual_seed(0), "output_type": "latent", **settings}
    pipe(
        prompt,
        callback_on_step_end=lambda pipe, step, _, tensors: seen.update(tensors),
        callback_on_step_end_tensor_inputs=["codes"],
        **settings,
    )
    return seen["codes"]


def engine(pipe, prompt=PROMPT, images=None, **settings) -> torch.Tensor:
    inputs = pipe._processor(text=prompt, images=images, return_tensors="pt")
    settings = {"generator": torch.Generator().manual_seed(0), **settings}
    drawn = pipe.model.generate(**inputs, generation_mode="image", return_dict_in_generate=True, **settings)
    return drawn.image_codes


def encode(pipe, picture) -> torch.Tensor:
    pixel_values = pipe.image_processor(picture, return_tensors="pt").pixel_values
    return pipe.image_tokenizer.encode(pixel_values).codes


@pytest.mark.parametrize("preserve", [None, "latents", "codes"])
def test_a_mask_keeps_what_is_black(pipe, preserve):
    drawn = codes_of(pipe, image=SOURCE, mask_image=MASK, preserve=preserve)
    keep = 1 - torch.from_numpy(HOLE)[None] / 255
    kept = {"keep_codes": encode(pipe, SOURCE), "keep_mask": keep, "keep_repair": preserve != "codes"}
    assert torch.equal(drawn, engine(pipe, **kept))
    assert not torch.equal(drawn, engine(pipe))


def test_a_strength_draws_the_finest_scales_anew(pipe):
    source, distances = encode(pipe, SOURCE), []
    for scales in range(1, 6):
        drawn = codes_of(pipe, image=SOURCE, strength=scales / 5)
        kept = SCHEDULE.offsets[5 - scales]
        assert torch.equal(drawn[:, :kept], source[:, :kept])
        distances.append(int((drawn != source).sum()))
    assert distances == sorted(distances)
    assert torch.equal(drawn, engine(pipe))  # 1 keeps nothing
    least = codes_of(pipe, image=SOURCE, strength=1e-3)
    assert torch.equal(least[:, : SCHEDULE.offsets[4]], source[:, : SCHEDULE.offsets[4]])


def test_a_strength_inside_of_a_mask(pipe):
    drawn = codes_of(pipe, image=SOURCE, mask_image=MASK, strength=0.4, preserve="codes")
    places = kept_places(1 - torch.from_numpy(HOLE)[None] / 255, SCHEDULE)
    places[:, : SCHEDULE.offsets[3]] = True
    assert torch.equal(drawn[places], encode(pipe, SOURCE)[places])
    assert torch.equal(drawn, engine(pipe, keep_codes=encode(pipe, SOURCE), keep_mask=places, keep_repair=False))


@pytest.mark.parametrize(
    ("position", "left", "top"),
    [("center", 16, 16), ("left", 0, 16), ("top right", 32, 0), ("bottom-left", 0, 32), ((5, 7), 5, 7)],
)
def test_a_position_draws_around_the_image(pipe, position, left, top):
    small = SOURCE.crop((0, 0, 48, 48))
    source = read_source(pipe.model, pipe.image_processor, [[small]], None, position=position)
    inside = torch.zeros(1, SIDE, SIDE)
    inside[:, top : top + 48, left : left + 48] = 1
    assert torch.equal(source.keep, inside)
    pixels = np.rint((source.pixel_values[0].permute(1, 2, 0) + 1).numpy() * 127.5)
    assert np.array_equal(pixels[inside[0].bool().numpy()].reshape(48, 48, 3), np.asarray(small))
    canvas = Image.fromarray(pixels.astype(np.uint8))
    drawn = codes_of(pipe, image=small, position=position)
    assert torch.equal(drawn, engine(pipe, keep_codes=encode(pipe, canvas), keep_mask=inside))


def test_a_canvas_of_another_size(pipe):
    image = pipe(PROMPT, image=SOURCE.crop((0, 0, 48, 48)), position="left", height=64, width=112).images[0]
    assert image.size == (112, 64)


def test_pixels_are_pasted_with_a_soft_edge(pipe):
    given = {"image": SOURCE, "mask_image": MASK, "output_type": "pt"}
    plain, pasted = (
        pipe(PROMPT, generator=torch.Generator().manual_seed(0), preserve=preserve, **given).images[0]
        for preserve in ("latents", "pixels")
    )
    hole, source = torch.from_numpy(HOLE) > 0, torch.from_numpy(NOISE[0]).permute(2, 0, 1) / 255
    assert (pasted - plain).abs()[:, hole].max() < 1e-5
    assert (pasted - source).abs()[:, :, :20].max() < 1e-5
    share = ((pasted - plain) / (source - plain))[0, 40, 20:30]  # towards the hole
    assert share.diff().max() < 1e-3 and share[0] > 0.9 and share[-1] < 0.2
    assert pipe(PROMPT, image=SOURCE, mask_image=MASK, preserve="pixels").images[0].size == (SIDE, SIDE)


def test_a_picture_alone_is_read_as_before_and_a_mask_makes_it_an_edit_of_a_part(pipe):
    edit = f"<image>{PROMPT}"
    assert torch.equal(codes_of(pipe, image=SOURCE), engine(pipe, edit, [SOURCE]))
    assert torch.equal(codes_of(pipe, image=SOURCE, image_in_prompt=True), engine(pipe, edit, [SOURCE]))
    kept = {"keep_codes": encode(pipe, SOURCE), "keep_mask": 1 - torch.from_numpy(HOLE)[None] / 255}
    masked = codes_of(pipe, image=SOURCE, mask_image=MASK, image_in_prompt=True)
    assert torch.equal(masked, engine(pipe, edit, [SOURCE], **kept))
    two = codes_of(pipe, image=[OTHER, SOURCE], mask_image=MASK, image_in_prompt=True)
    assert torch.equal(two, engine(pipe, f"<image><image>{PROMPT}", [OTHER, SOURCE], **kept))


def test_prompts_with_a_picture_and_a_mask_each(pipe):
    masks = [MASK, MASK.transpose(Image.Transpose.ROTATE_90)]
    prompts, pictures = [PROMPT, "two blue squares"], [SOURCE, OTHER]
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    call = partial(codes_of, pipe, num_images_per_prompt=2)
    together = call(prompt=prompts, image=pictures, mask_image=masks, generator=generators)
    for i in range(2):
        own = [torch.Generator().manual_seed(seed) for seed in (2 * i, 2 * i + 1)]
        alone = call(prompt=prompts[i], image=pictures[i], mask_image=masks[i], generator=own)
        assert torch.equal(alone, together[2 * i : 2 * i + 2])
    shared = codes_of(pipe, prompt=prompts, image=SOURCE, mask_image=MASK)
    assert len(shared) == 2
    arrays = torch.from_numpy(HOLE)[None, None].repeat(2, 1, 1, 1) / 255  # a batch of masks
    assert torch.equal(codes_of(pipe, prompt=prompts, image=SOURCE, mask_image=arrays), shared)


def test_a_mask_of_a_picture_that_is_cropped(pipe):
    """Picture and mask go the same way."""
    wide = Image.fromarray(np.pad(NOISE[0], ((0, 0), (10, 10), (0, 0))))
    mask = Image.fromarray(np.pad(HOLE, ((0, 0), (10, 10)), constant_values=255))
    given = {"height": SIDE, "width": SIDE}
    assert torch.equal(
        codes_of(pipe, image=wide, mask_image=mask, **given), codes_of(pipe, image=SOURCE, mask_image=MASK, **given)
    )


def test_regions_have_prompts_of_their_own(pipe):
    text, away = "two blue squares", "green"
    drawn = codes_of(pipe, regions=[(text, MASK)], negative_regions=[(away, MASK)], guidance_scale=4.0)
    ids = [pipe._processor(text=words, return_tensors="pt").input_ids for words in (text, away)]
    share = torch.from_numpy(HOLE)[None] / 255
    regions = [Region(ids[0], share), Region(ids[1], share, negative=True)]
    assert torch.equal(drawn, engine(pipe, regions=regions, guidance_scale=4.0))


@pytest.mark.parametrize("auto", [AutoPipelineForInpainting, AutoPipelineForImage2Image])
def test_auto_pipelines(auto, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert isinstance(loaded, NextFlowPipeline)
    loaded.set_progress_bar_config(disable=True)
    masked = {"mask_image": MASK} if auto is AutoPipelineForInpainting else {}
    assert loaded(PROMPT, image=SOURCE, strength=0.6, **masked).images[0].size == (SIDE, SIDE)


WHITE, BLACK = (Image.new("L", (SIDE, SIDE), shade) for shade in (255, 0))
GIVEN = {"image": SOURCE, "mask_image": MASK}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_image": MASK}, "`mask_image` is about an `image`, and there is none"),
        ({"strength": 0.5}, "`strength` is about an `image`"),
        ({"position": "left"}, "`position` is about an `image`"),
        ({"image_in_prompt": True}, "`image_in_prompt` is about an `image`"),
        ({**GIVEN, "mask_image": MASK.resize((40, 40))}, r"`mask_image` has 40 x 40 pixels .* its `image` has 80 x 80"),
        ({**GIVEN, "mask_image": WHITE}, "`mask_image` keeps nothing"),
        ({**GIVEN, "mask_image": BLACK}, "`mask_image` leaves nothing to draw"),
        ({**GIVEN, "mask_image": HOLE / 100}, "A mask is a picture, white where it counts: .* floats from 0 to 1"),
        ({**GIVEN, "mask_image": 7}, "A mask is a picture, white where it counts"),
        ({**GIVEN, "mask_image": [MASK, MASK]}, "Got 2 masks for 1 images of 1 prompts"),
        ({**GIVEN, "prompt": ["a", "b"], "image": [SOURCE, OTHER]}, "Got 1 masks for 2 images of 2 prompts"),
        ({**GIVEN, "image": [SOURCE, OTHER]}, "Parts of one `image` are kept, but a prompt has 2"),
        ({**GIVEN, "strength": 0}, "`strength` must be above 0 .* but got 0"),
        ({**GIVEN, "strength": 1.5}, "`strength` must be above 0"),
        ({**GIVEN, "strength": "0.5"}, "`strength` must be above 0"),
        ({**GIVEN, "strength": float("nan")}, "`strength` must be above 0"),
        ({**GIVEN, "num_frames": 2}, "are for single images, without `num_frames`"),
        ({**GIVEN, "preserve": "all"}, '`preserve` must be one of latents, codes, pixels, but got "all"'),
        ({**GIVEN, "preserve": "pixels", "output_type": "latent"}, "pastes pixels, at their size"),
        ({"image": SOURCE, "strength": 0.5, "preserve": "codes"}, "`preserve` says how a part is kept"),
        ({"image": SOURCE, "image_in_prompt": False}, "`image_in_prompt=False` leaves no use for `image`"),
        ({**GIVEN, "image_in_prompt": "no"}, "`image_in_prompt` must be True or False"),
        ({"image": SOURCE, "position": "left"}, "stands on a larger canvas, but it has 80 x 80 pixels"),
        ({"image": SOURCE, "position": "left", "height": 64, "width": 64}, "stands on a larger canvas"),
        ({"image": SOURCE.crop((0, 0, 48, 48)), "position": "middle"}, "`position` must be .* but got 'middle'"),
        ({"image": SOURCE.crop((0, 0, 48, 48)), "position": "left right"}, "`position` must be"),
        ({"image": SOURCE.crop((0, 0, 48, 48)), "position": (40, 0)}, r"must be from \(0, 0\) to \(32, 32\)"),
        ({"image": SOURCE.crop((0, 0, 48, 48)), "position": (0.5, 0)}, "`position` must be"),
        ({"prompt": ["a", "b"], "image": [SOURCE, SOURCE.resize((64, 112))], "strength": 0.5}, "have the sizes"),
        ({"regions": []}, r"`regions` is a list of \(prompt, mask\)"),
        ({"negative_regions": [MASK]}, r"`negative_regions` is a list of \(prompt, mask\)"),
        ({"regions": [("a", MASK.resize((40, 40)))]}, r"has the image's size, \(batch, 80, 80\)"),
        ({"negative_regions": [("a", MASK)], "guidance_scale": 1.0}, "pass a `guidance_scale` other than 1"),
    ],
)
def test_misuse_is_explained(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": PROMPT, **settings})
