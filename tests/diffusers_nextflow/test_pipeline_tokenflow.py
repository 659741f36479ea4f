"""TokenFlow in the pipelines, on the command line and quantised: the doors that NextFlow has."""

import logging

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from diffusers_nextflow import NextFlowPipeline
from diffusers_nextflow.__main__ import main
from transformers_nextflow import NextFlowTextToImagePipeline, TokenFlowForCausalLM, TokenFlowProcessor

PROMPTS = ["a bad cat", "a bed"]


@pytest.fixture(scope="module")
def pipe(tiny_tokenflow_checkpoint) -> NextFlowPipeline:
    pipe = NextFlowPipeline.from_pretrained(tiny_tokenflow_checkpoint, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["tiny_random_checkpoint", "tiny_tokenflow_checkpoint"])
def test_both_pipelines_draw_a_seed_alike(request, kind, dtype):
    """To the bit, in half precision too: pixels become levels in float32, by TokenFlow's rule."""
    path = str(request.getfixturevalue(kind))
    pipe, draw = (
        NextFlowPipeline.from_pretrained(path, dtype=dtype),
        transformers.pipeline("text-to-image", model=path, dtype=dtype),
    )
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe(PROMPTS[0], generator=seeds(3)).images
    assert np.array_equal(pixels(pictures), pixels(draw(PROMPTS[0], seed=3)))
    array = pipe(PROMPTS[0], generator=seeds(3), output_type="np").images
    assert np.abs(255 * array - pixels(pictures)).max() < 0.501


LONG = "a bad cat " * 40


@pytest.mark.parametrize("prompts", [PROMPTS[0], PROMPTS])
def test_what_is_cut_of_a_prompt_is_named(pipe, caplog, prompts):
    draw = NextFlowTextToImagePipeline(pipe.model, processor=pipe._processor)
    logging.getLogger("transformers").addHandler(caplog.handler)  # whose warning of errors to come must not be there
    try:
        told = []
        for door in (pipe, draw):
            for given, options in ((LONG, {}), (prompts, {"negative_prompt": LONG})):
                given = [PROMPTS[0], given] if isinstance(prompts, list) and not options else given
                caplog.clear()
                door(given, **options)
                told.append({record.getMessage().split(" has ")[0] for record in caplog.records})
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    first = "Prompt 1" if isinstance(prompts, list) else "The prompt"
    assert told == [{first}, {"The negative prompt"}, {"The prompt"}, {"The negative prompt"}]


def test_all_doors_draw_the_same_pictures(pipe, tiny_tokenflow_checkpoint, tmp_path):
    path = str(tiny_tokenflow_checkpoint)
    pictures = pipe(PROMPTS, num_passes=2, generator=seeds(3, 3)).images
    assert {picture.size for picture in pictures} == {(64, 64)}
    draw = transformers.pipeline("text-to-image", model=path, dtype=torch.float32)
    assert type(draw.model) is TokenFlowForCausalLM
    assert np.abs(pixels(row[0] for row in draw(PROMPTS, num_passes=2, seed=3)) - pixels(pictures)).max() <= 1
    options = ["--num-passes", "2", "--seed", "3", "--output", str(tmp_path / "out.png"), "--quiet", "--device", "cpu"]
    assert main([PROMPTS[0], "--model", path, *options]) == 0
    assert np.abs(pixels([Image.open(tmp_path / "out.png")]) - pixels(pictures[:1])).max() <= 1
    model, processor = pipe.model, TokenFlowProcessor.from_pretrained(path, dtype=torch.float32)
    batch = processor(PROMPTS, padding=True, return_tensors="pt")
    output = model.generate(**batch, num_passes=2, generator=seeds(3, 3), return_dict_in_generate=True)
    assert (
        np.abs(pixels(processor.decode_codes(output.image_codes, output.image_grid_shw)) - pixels(pictures)).max() <= 1
    )


def test_the_negative_prompt_is_tokenflows_by_default(pipe):
    (default,) = pipe(PROMPTS[0], generator=seeds(3)).images
    ids = pipe.model.generation_config.negative_ids
    text = pipe.tokenizer.decode(ids, skip_special_tokens=True)
    (own,) = pipe(PROMPTS[0], negative_prompt="a bed", generator=seeds(3)).images
    (empty,) = pipe(PROMPTS[0], negative_prompt="", generator=seeds(3)).images
    (plain,) = pipe(PROMPTS[0], guidance_scale=1.0, generator=seeds(3)).images
    assert text and len({picture.tobytes() for picture in (default, own, empty, plain)}) == 4


def test_a_saved_pipeline_loads(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = NextFlowPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.model) is TokenFlowForCausalLM
    one, other = (p(PROMPTS[0], generator=seeds(1)).images[0] for p in (pipe, loaded))
    assert np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 128, "width": 128}, "draws images of 64 x 64 pixels in 4 scales and no others"),
        ({"image": Image.new("RGB", (64, 64))}, "It never reads images"),
        ({"thinking": True}, "reads plain texts"),
        ({"num_frames": 2}, "never draws several images in sequence"),
        ({"prompt_style": "chat"}, "reads plain texts"),
        ({"num_passes": 4}, "`num_passes` may be from 1 to 3, for which `pass_candidates` says what is drawn from"),
    ],
)
def test_what_tokenflow_does_not_do_is_refused(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        pipe(PROMPTS[0], **settings)


@pytest.mark.parametrize("width", ["int8", "int4"])
def test_quantised(tiny_tokenflow_checkpoint, width):
    pytest.importorskip("torchao", reason="torchao is in the extra [quantization]")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    config = TorchAoConfig(Int8WeightOnlyConfig() if width == "int8" else int4)
    plain = TokenFlowForCausalLM.from_pretrained(tiny_tokenflow_checkpoint, dtype=torch.float32).eval()
    model = TokenFlowForCausalLM.from_pretrained(
        tiny_tokenflow_checkpoint, dtype=torch.float32, quantization_config=config
    ).eval()
    layer = model.model.layers[0]
    assert type(layer.self_attn.q_proj.weight) is not torch.nn.Parameter
    assert type(model.model.connector[0].weight) is torch.nn.Parameter
    ids = torch.tensor([[1, 17, 23, 5, 6, 7, *range(40, 70)]])
    grids = torch.tensor([[4, 16, 16]])
    with torch.no_grad():
        expected, found = (m(ids, image_grid_shw=grids, visual_logits=True).logits for m in (plain, model))
    error = (found - expected).std() / expected.std()
    assert error < {"int8": 0.05, "int4": 0.5}[width]
    output = model.generate(ids[:, :6], do_sample=False, return_dict_in_generate=True)
    assert output.image_codes.shape == (1, 30)
