"""Every option of the pipelines and of the command line does something, or is refused by name.

A table a door: a new parameter without a row in its table fails the first test.
"""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, pipeline

from diffusers_nextflow import NextFlowPipeline, NextFlowPipelineOutput
from diffusers_nextflow.__main__ import main, parse_arguments
from transformers_nextflow import NextFlowForCausalLM, NextFlowTextToImagePipeline
from transformers_nextflow.generation_config_nextflow import OWN_OPTIONS
from transformers_nextflow.regional_prompts import Region

PROMPT = "a red circle"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def red_picture() -> Image.Image:
    return Image.new("RGB", (64, 112), "red")


def half_white() -> Image.Image:
    mask = Image.new("L", (80, 80))
    mask.paste(255, (40, 0, 80, 80))
    return mask


@pytest.fixture(scope="module")
def pipe(tiny_random_checkpoint):
    pipe = NextFlowPipeline.from_pretrained(tiny_random_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def draw(tiny_random_checkpoint):
    return pipeline("text-to-image", model=tiny_random_checkpoint)


KEPT = {"keep_codes": torch.zeros(1, 55, dtype=torch.long), "keep_mask": torch.arange(55)[None] >= 30}

# Greedy, guided: what is asked for shows, and nothing else does.
PLAIN = {"image_top_k": 1, "guidance_scale": 5.0}
CHANGES = "changes the picture"
SIZE = "changes the size"

# Of `NextFlowPipeline.__call__`: the option (with what it needs), against the call without it, and what is seen.
PIPELINE = {
    "prompt": ({"prompt": "two blue squares"}, CHANGES),
    "image": ({"image": red_picture()}, SIZE),
    "negative_prompt": ({"negative_prompt": "red"}, CHANGES),
    "height": ({"height": 64, "width": 112}, SIZE),
    "width": ({"width": 64}, "`height` and `width` together"),
    "num_scales": ({"num_scales": 3}, SIZE),
    "num_inference_steps": ({"num_inference_steps": 50}, "leave out `num_inference_steps`"),
    "guidance_scale": ({"guidance_scale": 1.0}, CHANGES),
    "image_guidance_scale": ({"image_guidance_scale": 2.0}, "`image_guidance_scale` guides by the images"),
    "thinking": ({"thinking": True}, lambda output: output.thoughts is not None),
    "num_frames": ({"num_frames": 2}, lambda output: [len(frames) for frames in output.frames] == [2]),
    "num_images_per_prompt": ({"num_images_per_prompt": 2}, lambda output: len(output.images) == 2),
    "generator": ({"generator": seeded(1), "image_top_k": 0}, CHANGES),
    "image_temperature": ({"image_temperature": 0.0}, "`image_temperature` must be positive"),
    "image_top_k": ({"image_top_k": 0}, CHANGES),
    "image_top_p": ({"image_top_p": 2.0}, "`image_top_p` must be above 0"),
    "num_passes": ({"num_passes": 2}, "`num_passes=2` feeds a scale its own codes"),
    "prompt_style": ({"prompt_style": "chat"}, CHANGES),
    "decoder": ({"decoder": "diffusion"}, "has no `diffusion_decoder`"),
    "decoder_steps": ({"decoder_steps": 3}, "are the diffusion decoder's"),
    "decoder_scale": ({"decoder_scale": 2}, "are the diffusion decoder's"),
    "mask_image": ({"image": Image.new("RGB", (80, 80)), "mask_image": half_white()}, CHANGES),
    "strength": ({"image": Image.new("RGB", (80, 80)), "strength": 0.4}, CHANGES),
    "position": ({"image": Image.new("RGB", (48, 48)), "position": "left"}, CHANGES),
    "preserve": ({"preserve": "pixels"}, "`preserve` is about an `image`"),
    "image_in_prompt": ({"image_in_prompt": False, "image": red_picture()}, "`image_in_prompt=False`"),
    "regions": ({"regions": [("two blue squares", half_white())]}, CHANGES),
    "negative_regions": ({"negative_regions": [("two blue squares", half_white())]}, CHANGES),
    "output_type": ({"output_type": "np"}, lambda output: isinstance(output.images, np.ndarray)),
    "callback_on_step_end": (
        {"callback_on_step_end": lambda pipe, *_: setattr(pipe, "_interrupt", True)},
        CHANGES,
    ),
    "callback_on_step_end_tensor_inputs": ({"callback_on_step_end_tensor_inputs": ["x"]}, "but may only hold"),
    "return_dict": ({"return_dict": False}, lambda output: type(output) is tuple),
}

# Of `pipeline("text-to-image")`: its own options and those that it hands to `generate`.
TEXT_TO_IMAGE = {
    "inputs": ({"inputs": "two blue squares"}, CHANGES),
    "negative_prompt": ({"negative_prompt": "red"}, CHANGES),
    "num_images_per_prompt": ({"num_images_per_prompt": 2}, lambda images: len(images) == 2),
    "seed": ({"seed": 1, "image_top_k": 0, "generator": None}, CHANGES),
    "prompt_style": ({"prompt_style": "chat"}, CHANGES),
    "generation_config": ({"generation_config": GenerationConfig(num_scales=3)}, SIZE),
    "generation_mode": ({"generation_mode": "text"}, "generation_mode"),
    "height": ({"height": 64, "width": 112}, SIZE),
    "width": ({"width": 64}, "`height` and `width` together"),
    "num_scales": ({"num_scales": 3}, SIZE),
    "guidance_scale": ({"guidance_scale": 1.0}, CHANGES),
    "image_guidance_scale": ({"image_guidance_scale": 2.0}, "`image_guidance_scale` guides by the images"),
    "guidance_schedule": ({"guidance_schedule": "zigzag"}, "`guidance_schedule`"),
    "negative_prompt_ids": ({"negative_prompt_ids": torch.tensor([[97]])}, CHANGES),
    "negative_prompt_attention_mask": (
        {"negative_prompt_ids": torch.tensor([[97]]), "negative_prompt_attention_mask": torch.ones(1, 2)},
        "attention mask has shape",
    ),
    "keep_codes": (KEPT, CHANGES),
    "keep_mask": ({"keep_mask": KEPT["keep_mask"]}, "`keep_codes` and `keep_mask` together"),
    "regions": ({"regions": [Region(torch.tensor([[97]]), torch.ones(1, 80, 80))]}, CHANGES),
    "keep_repair": ({"keep_repair": False}, "`keep_repair` says how `keep_codes` are kept"),
    "image_temperature": ({"image_temperature": 0.0}, "`image_temperature` must be positive"),
    "image_top_k": ({"image_top_k": 0}, CHANGES),
    "image_top_p": ({"image_top_p": 2.0}, "`image_top_p` must be above 0"),
    "negative_ids": ({"negative_ids": [97]}, CHANGES),
    "num_passes": ({"num_passes": 2}, "`num_passes=2` feeds a scale its own codes"),
    "pass_candidates": ({"pass_candidates": [[]]}, "`pass_candidates` has for 1, 2"),
    "generator": ({"generator": seeded(1), "image_top_k": 0}, CHANGES),
    "prefix_scales": ({"prefix_scales": 2}, "`prefix_scales` and `images_per_prefix` together"),
    "images_per_prefix": ({"images_per_prefix": 2}, "`prefix_scales` and `images_per_prefix` together"),
    "on_scale_end": ({"on_scale_end": lambda *_: 1 / 0}, "division by zero"),
    "thinking": ({"thinking": True, "max_new_tokens": 2}, lambda images: "thought" in images[0].info),
    "num_frames": ({"num_frames": 2}, lambda images: len(images[0]) == 2),
    "max_new_images": ({"max_new_images": 2}, "`max_new_images`"),
    "return_cache": ({"return_cache": True}, "return_cache"),
    "prompt_styles": ({"prompt_styles": {"image": "chat"}}, "see `prompt_style`"),
}

COMMAND = {
    "prompt": (["two blue squares"], CHANGES),
    "output": (["--output", "picture.doc"], "is no image format"),
    "steps_dir": (["--steps-dir", "steps"], lambda folder: len(list((folder / "steps").iterdir())) == 5),
    "num_images": (["--num-images", "2"], lambda folder: (folder / "out_1.png").is_file()),
    "seed": (["--seed", "1", "--top-k", "0"], CHANGES),
    "model": (["--model", "nowhere"], "neither a folder nor the name"),
    "height": (["--height", "64", "--width", "112"], SIZE),
    "width": (["--width", "64"], "`height` and `width` together"),
    "num_scales": (["--num-scales", "3"], SIZE),
    "negative_prompt": (["--negative-prompt", "red"], CHANGES),
    "prompt_style": (["--prompt-style", "chat"], CHANGES),
    "guidance_scale": (["--guidance-scale", "1"], CHANGES),
    "temperature": (["--temperature", "0"], "--temperature must be above 0"),
    "top_k": (["--top-k", "0"], CHANGES),
    "top_p": (["--top-p", "2"], "`image_top_p` must be above 0"),
    "decoder": (["--decoder", "diffusion"], "has no `diffusion_decoder`"),
    "decoder_steps": (["--decoder-steps", "3"], "are the diffusion decoder's"),
    "decoder_scale": (["--decoder-scale", "2"], "are the diffusion decoder's"),
    "num_passes": (["--num-passes", "2"], "`num_passes=2` feeds a scale its own codes"),
    "device": (["--device", "toaster"], "cannot be used here"),
    "dtype": (["--dtype", "bfloat16"], CHANGES),
    "quiet": (["--quiet"], lambda folder: (folder / "said").read_text() == ""),
}


def parameters(function) -> set[str]:
    found = inspect.signature(function).parameters.values()
    return {p.name for p in found if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - {"self"}


def test_every_option_has_a_row():
    assert set(PIPELINE) == parameters(NextFlowPipeline.__call__)
    own = parameters(NextFlowTextToImagePipeline.__call__) | parameters(
        NextFlowTextToImagePipeline._sanitize_parameters
    )
    options = set(OWN_OPTIONS) | {"guidance_scale", *(parameters(NextFlowForCausalLM.generate) - {"inputs"})}
    assert set(TEXT_TO_IMAGE) == own | {"seed"} | options
    assert set(COMMAND) == set(vars(parse_arguments([PROMPT])))


def check(outcome, run, plain, arrays):
    """`run` does what a row says: it fails with a message, or differs from `plain` in the named way."""
    if isinstance(outcome, str) and outcome not in (CHANGES, SIZE):
        with pytest.raises((ValueError, TypeError, AttributeError, ZeroDivisionError)) as caught:
            run()
        assert outcome in str(caught.value)
        return
    output = run()
    if callable(outcome):
        assert outcome(output)
        return
    ours, theirs = arrays(output), arrays(plain)
    assert (ours.shape != theirs.shape) is (outcome == SIZE)
    assert outcome == SIZE or not np.array_equal(ours, theirs)


@pytest.mark.parametrize("name", PIPELINE)
def test_diffusers_pipeline(name, pipe):
    def run(**settings):
        return pipe(**{"prompt": PROMPT, "generator": seeded(), **PLAIN, **settings})

    settings, outcome = PIPELINE[name]
    free = {"image_top_k": 0} if name == "generator" else {}
    plain = run(**free)
    assert isinstance(plain, NextFlowPipelineOutput)
    check(outcome, lambda: run(**settings), plain, lambda output: np.asarray(output.images[0]))


@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_transformers_pipeline(name, draw):
    def run(**settings):
        return draw(**{"inputs": PROMPT, "generator": seeded(), **PLAIN, **settings})

    settings, outcome = TEXT_TO_IMAGE[name]
    free = {"image_top_k": 0} if name in ("generator", "seed") else {}
    check(outcome, lambda: run(**settings), run(**free), lambda images: np.asarray(images[0]))


@pytest.mark.parametrize("name", COMMAND)
def test_command(name, tiny_random_checkpoint, tmp_path, monkeypatch, capsys):
    def run(folder, *options):
        folder.mkdir()
        monkeypatch.chdir(folder)
        defaults = ["--model", str(tiny_random_checkpoint), "--seed", "0", "--top-k", "1", "--guidance-scale", "5"]
        prompt = [] if name == "prompt" and options else [PROMPT]
        code = main([*prompt, "--device", "cpu", *defaults, *options])
        said = capsys.readouterr()
        if code:
            raise ValueError(said.err)
        (folder / "said").write_text(said.out)
        return folder

    options, outcome = COMMAND[name]
    plain = run(tmp_path / "plain", *(["--top-k", "0"] if name == "seed" else []))
    assert (plain / "said").read_text()
    check(outcome, lambda: run(tmp_path / "option", *options), plain, lambda f: np.asarray(Image.open(f / "out.png")))
