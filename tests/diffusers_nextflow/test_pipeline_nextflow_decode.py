"""Both ways to the diffusion decoder's pictures: the decode pipeline, and `decoder="diffusion"` of the other one."""

import copy
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection

from diffusers_nextflow import NextFlowDecodePipeline, NextFlowPipeline
from diffusion_parts import build_decoder, build_vae, random_codes
from transformers_nextflow import NextFlowProcessor, ScaleSchedule
from transformers_nextflow.pipeline_index import write_pipeline_index

PROMPT = "a red circle"
GRID = torch.tensor([[5, 16, 16]])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def plain(tiny_random_checkpoint):
    return quiet(NextFlowPipeline.from_pretrained(tiny_random_checkpoint))


@pytest.fixture(scope="module")
def pipe(plain):
    """The drawing pipeline with a diffusion decoder of pixels."""
    decoder = build_decoder("UNet2DModel", plain.image_tokenizer)
    parts = {"diffusion_decoder": decoder, "scheduler": FlowMatchEulerDiscreteScheduler()}
    return quiet(NextFlowPipeline(**{**plain.components, **parts}))


@pytest.fixture(scope="module")
def decode(pipe):
    names = ("diffusion_decoder", "scheduler", "image_tokenizer")
    return quiet(NextFlowDecodePipeline(**{name: pipe.components[name] for name in names}))


def draw(pipe, prompt=PROMPT, **settings):
    settings = {"decoder": "diffusion", "generator": seeded(), "output_type": "pt", **settings}
    return pipe(prompt, **settings).images


# The drawing pipeline


def test_the_default_decoder_is_the_image_tokenizers(pipe, plain):
    settings = {"generator": seeded(), "output_type": "pt"}
    expected = plain(PROMPT, **settings).images
    assert torch.equal(pipe(PROMPT, generator=seeded(), output_type="pt").images, expected)
    assert torch.equal(draw(pipe, decoder="vq"), expected)
    assert not torch.equal(draw(pipe), expected)
    latents = draw(pipe, output_type="latent", decoder_scale=2)
    assert torch.equal(latents, plain(PROMPT, generator=seeded(), output_type="latent").images)


def test_both_pipelines_chain(pipe, decode):
    """Latents of the one are pictures of the other; what is left of the first one's generator draws the noise."""
    generators = [seeded(0), seeded(1)]
    latents = pipe(PROMPT, num_images_per_prompt=2, generator=generators, output_type="latent").images
    chained = decode(
        latents=latents, generator=generators, num_inference_steps=2, scale_factor=2, output_type="pt"
    ).images
    generators = [seeded(0), seeded(1)]
    settings = {"num_images_per_prompt": 2, "generator": generators, "decoder_steps": 2, "decoder_scale": 2}
    at_once = draw(pipe, **settings)
    assert at_once.shape == (2, 3, 160, 160)
    torch.testing.assert_close(at_once, chained, atol=1e-5, rtol=0)


def test_the_same_seed_is_the_same_picture_in_any_batch(pipe):
    prompts = [PROMPT, "a", "three blue squares left of a star"]
    together = draw(pipe, prompts, generator=[seeded(seed) for seed in range(3)], guidance_scale=2.0)
    for index, prompt in enumerate(prompts):
        [alone] = draw(pipe, prompt, generator=seeded(index), guidance_scale=2.0)
        torch.testing.assert_close(together[index], alone, atol=1e-3, rtol=0)
    [first] = draw(pipe, prompts[0], generator=seeded(5))
    torch.testing.assert_close(draw(pipe, prompts[:2], generator=seeded(5))[0], first, atol=1e-3, rtol=0)


def test_stories_have_frames(pipe):
    settings = {"num_frames": 2, "decoder": "diffusion", "decoder_scale": 2, "decoder_steps": 1}
    together = pipe([PROMPT, "a"], generator=[seeded(0), seeded(1)], **settings)
    assert [[frame.size for frame in story] for story in together.frames] == [[(160, 160)] * 2] * 2
    alone = pipe("a", generator=seeded(1), **settings)
    for one, other in zip(together.frames[1], alone.frames[0], strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_a_stopped_drawing_is_decoded_as_far_as_it_is(pipe):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 2

    assert draw(pipe, callback_on_step_end=stop, decoder_steps=1).shape == (1, 3, 80, 80)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder": "gan"}, '`decoder` must be one of vq, diffusion, but got "gan"'),
        ({"decoder": "vq", "decoder_steps": 4}, "`decoder_steps` and `decoder_scale` are the diffusion decoder's"),
        ({"decoder": "vq", "decoder_scale": 2}, "`decoder_steps` and `decoder_scale` are the diffusion decoder's"),
        ({"decoder_steps": 0}, "at least 1 step of denoising, but got 0"),
        ({"decoder_scale": 4}, "trained for the scale factor 1, 2, but 4 was asked for"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_drawn(settings, message, pipe, monkeypatch):
    monkeypatch.setattr(pipe.model, "generate", None)
    with pytest.raises(ValueError, match=message):
        draw(pipe, **settings)


def test_parts_that_do_not_fit(pipe, plain):
    with pytest.raises(ValueError, match='has no `diffusion_decoder`, which `decoder="diffusion"` asks for'):
        draw(plain)
    without = {**pipe.components, "scheduler": None}
    with pytest.raises(ValueError, match="`diffusion_decoder` and `scheduler` belong together"):
        NextFlowPipeline(**without)
    with pytest.raises(ValueError, match='takes predictions for "epsilon"'):
        NextFlowPipeline(**{**without, "scheduler": DDIMScheduler()})
    with pytest.raises(ValueError, match="draws pixels: leave out `vae`"):
        NextFlowPipeline(**{**pipe.components, "vae": build_vae()})
    captioned = build_decoder("SD3Transformer2DModel", plain.image_tokenizer)
    parts = {**pipe.components, "diffusion_decoder": captioned, "vae": build_vae()}
    with pytest.raises(ValueError, match="trained with captions and needs `prompt_embeds`: call `NextFlowDecodeP"):
        draw(NextFlowPipeline(**parts))


# The decode pipeline


def test_pictures_of_codes_of_several_sizes(decode):
    wide = ScaleSchedule((12, 20), num_scales=4)
    small = torch.randint(64, (wide.num_tokens,), generator=seeded())
    codes = [random_codes(1)[0], small.tolist(), random_codes(1, 1)[0]]
    grids = [[5, 16, 16], list(wide.grid_shw), [5, 16, 16]]
    generators = [seeded(seed) for seed in range(3)]
    images = decode(codes, grids, generator=generators, output_type="pt").images
    assert [tuple(image.shape[1:]) for image in images] == [(80, 80), (wide.height, wide.width), (80, 80)]
    for index in range(3):
        alone = decode([codes[index]], [grids[index]], generator=seeded(index), output_type="pt").images
        torch.testing.assert_close(alone[0], images[index], atol=1e-3, rtol=0)


def test_output_types_are_one_picture(decode):
    settings = {"codes": random_codes(2), "image_grid_shw": GRID}
    tensor, array, pictures, [of_tuple] = (
        decode(**settings, generator=seeded(), output_type=kind, return_dict=kind != "tuple").images
        if kind != "tuple"
        else decode(**settings, generator=seeded(), output_type="pt", return_dict=False)
        for kind in ("pt", "np", "pil", "tuple")
    )
    assert torch.equal(tensor, of_tuple) and np.allclose(array, tensor.permute(0, 2, 3, 1))
    assert np.abs(np.asarray(pictures[1]) / 255 - array[1]).max() <= 1 / 255


def test_a_callback_sees_and_changes_samples(decode):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((pipe is decode, step, *tensors["latents"].shape))
        return {"latents": torch.ones_like(tensors["latents"])} if step == 1 else None

    settings = {"callback_on_step_end": callback, "num_inference_steps": 2, "output_type": "pt"}
    assert decode(random_codes(1), GRID, **settings).images.eq(1).all()
    assert seen == [(True, 0, 1, 3, 80, 80), (True, 1, 1, 3, 80, 80)]


def test_captions_go_through_the_text_encoder(plain, tiny_random_checkpoint):
    config = CLIPTextConfig(
        hidden_size=12, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, projection_dim=6
    )
    torch.manual_seed(0)
    encoder, tokenizer = (
        CLIPTextModelWithProjection(config).eval(),
        AutoTokenizer.from_pretrained(tiny_random_checkpoint),
    )
    tokenizer.model_max_length = 20
    parts = {
        "image_tokenizer": plain.image_tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": build_vae(),
    }
    decoder = build_decoder("SD3Transformer2DModel", plain.image_tokenizer)
    pipe = quiet(NextFlowDecodePipeline(decoder, text_encoder=encoder, tokenizer=tokenizer, **parts))
    settings = {"image_grid_shw": GRID, "output_type": "pt", "num_inference_steps": 1, "scale_factor": 2}
    red, blue = (pipe(random_codes(1), prompt=p, generator=seeded(), **settings).images for p in ("red", "blue"))
    assert red.shape == (1, 3, 160, 160) and not torch.equal(red, blue)
    embeds, pooled = pipe.encode_prompt(["red"], 1)
    text = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    assert torch.equal(pipe(random_codes(1), generator=seeded(), **text, **settings).images, red)
    with pytest.raises(ValueError, match="Give either `prompt`, or `prompt_embeds`"):
        pipe(random_codes(1), prompt="red", **text, **settings)
    with pytest.raises(ValueError, match="`prompt` must be a string, or 1, one per image"):
        pipe(random_codes(1), prompt=["red", "blue"], **settings)
    with pytest.raises(ValueError, match="needs `prompt_embeds`"):
        pipe(random_codes(1), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_type": "latent"}, '`output_type` must be one of pil, np, pt, but got "latent"'),
        ({"prompt": "red"}, "has no `text_encoder`: leave out `prompt`"),
        ({"scale_factor": 3}, "trained for the scale factor 1, 2, but 3"),
        ({"num_inference_steps": 0}, "at least 1 step"),
        ({"codes": None}, "Give either `codes` with their `image_grid_shw`"),
        ({"codes": []}, "Got codes of 0 images"),
        ({"codes": [[1]] * 3, "image_grid_shw": GRID.expand(2, -1)}, "Got codes of 3 images and 2 rows"),
        (
            {"codes": None, "image_grid_shw": None, "latents": torch.zeros(1, 5, 5)},
            r"`latents` must be \(batch, 12, h, w\)",
        ),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"\['noise'\], but may hold"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(1)}}, "must not change shapes"),
    ],
)
def test_bad_calls(settings, message, decode):
    with pytest.raises(ValueError, match=message):
        decode(**{"codes": random_codes(1), "image_grid_shw": GRID, **settings})


def test_a_decode_pipeline_is_whole(decode, plain):
    with pytest.raises(ValueError, match="needs a `diffusion_decoder`, its `scheduler` and `image_tokenizer`"):
        NextFlowDecodePipeline(**{**decode.components, "scheduler": None})
    with pytest.raises(ValueError, match="`text_encoder` and `tokenizer` belong together"):
        NextFlowDecodePipeline(**{**decode.components, "tokenizer": plain.tokenizer})


# Loading, moving


def test_saved_pipelines_draw_the_same(pipe, decode, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe", max_shard_size="50KB")
    decode.save_pretrained(tmp_path / "decode")
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path / "pipe"))
    assert type(loaded) is NextFlowPipeline
    torch.testing.assert_close(draw(loaded), draw(pipe), atol=1e-4, rtol=0)
    of_decode = quiet(DiffusionPipeline.from_pretrained(tmp_path / "decode"))
    assert type(of_decode) is NextFlowDecodePipeline
    settings = {"codes": random_codes(1), "image_grid_shw": GRID, "output_type": "pt"}
    expected = decode(**settings, generator=seeded()).images
    torch.testing.assert_close(of_decode(**settings, generator=seeded()).images, expected, atol=1e-4, rtol=0)
    for dtype, atol in ((torch.bfloat16, 0.2), (torch.float16, 0.05)):
        half = quiet(NextFlowDecodePipeline.from_pretrained(tmp_path / "decode", dtype=dtype))
        assert half.diffusion_decoder.dtype == dtype
        torch.testing.assert_close(half(**settings, generator=seeded()).images, expected, atol=atol, rtol=0)


def test_a_transformers_checkpoint_may_hold_a_decoder(pipe, tiny_random_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_random_checkpoint, tmp_path / "checkpoint")
    pipe.diffusion_decoder.save_pretrained(folder / "diffusion_decoder")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    for write in (write_pipeline_index, NextFlowProcessor.from_pretrained(folder).save_pretrained):
        (folder / "model_index.json").unlink(missing_ok=True)
        write(folder)
        loaded = quiet(NextFlowPipeline.from_pretrained(folder))
        torch.testing.assert_close(draw(loaded), draw(pipe), atol=1e-4, rtol=0)


def test_offload(pipe, decode):
    settings = {"codes": random_codes(1), "image_grid_shw": GRID, "output_type": "pt"}
    for of, call in ((pipe, draw), (decode, lambda pipe: pipe(**settings, generator=seeded()).images)):
        offloaded = quiet(type(of)(**{name: copy.deepcopy(part) for name, part in of.components.items()}))
        offloaded.enable_model_cpu_offload(device="cpu")
        torch.testing.assert_close(call(offloaded), call(of), atol=1e-4, rtol=0)
