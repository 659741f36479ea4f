"""The options of `generate` as a configuration: saved and read back, layered, checked."""

import json

import pytest
import torch
from transformers import GenerationConfig

from transformers_nextflow import NextFlowForCausalLM, NextFlowGenerationConfig
from transformers_nextflow.generation_config_nextflow import OWN_OPTIONS
from transformers_nextflow.sampling import guide, sampling_plan

VALUES = {
    "generation_mode": "image",
    "height": 80,
    "width": 80,
    "num_scales": 5,
    "image_guidance_scale": 1.5,
    "guidance_schedule": "linear",
    "image_temperature": [1.0, 0.9, 0.8, 0.7, 0.6],
    "image_top_k": 4,
    "image_top_p": 0.9,
    "thinking": False,
    "num_frames": 2,
    "max_new_images": 3,
    "prefix_scales": 2,
    "images_per_prefix": 2,
    "return_cache": False,
    "prompt_styles": {"image": "chat"},
    "negative_ids": [1, 2],
    "num_passes": 1,
    "pass_candidates": [[[10, 0.9]]],
}


def test_every_option_is_saved_and_read_back(tmp_path):
    assert VALUES.keys() == set(OWN_OPTIONS)
    NextFlowGenerationConfig(**VALUES, do_sample=True, top_k=7).save_pretrained(tmp_path)
    loaded = NextFlowGenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in OWN_OPTIONS} == VALUES and loaded.top_k == 7


def test_what_is_not_given_is_not_written(tmp_path):
    NextFlowGenerationConfig(guidance_scale=3.0).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "generation_config.json").read_text())
    assert stored.keys() == {"guidance_scale", "transformers_version"}


def test_files_of_earlier_versions_are_read(tmp_path):
    """They were plain `GenerationConfig`s with entries of their own."""
    GenerationConfig(guidance_scale=3.0, image_top_k=200, image_top_p=0.8, eos_token_id=5).save_pretrained(tmp_path)
    loaded = NextFlowGenerationConfig.from_pretrained(tmp_path)
    assert (loaded.guidance_scale, loaded.image_top_k, loaded.image_top_p, loaded.eos_token_id) == (3.0, 200, 0.8, 5)


def test_a_model_has_one_which_survives_saving(tiny_random_checkpoint, tmp_path):
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint)
    assert type(model.generation_config) is NextFlowGenerationConfig
    assert model.generation_config.num_scales is None  # the model's own number is a limit and not a choice
    model.generation_config.image_top_k = 3
    model.generation_config.prompt_styles = {"edit": "chat"}
    model.save_pretrained(tmp_path)
    again = NextFlowForCausalLM.from_pretrained(tmp_path).generation_config
    assert (again.image_top_k, again.prompt_styles) == (3, {"edit": "chat"})


def test_the_papers_sampling_is_vars(tiny_random_checkpoint):
    """`t = 5 * s / (S - 1)`, and of `(1 + t) * conditional - t * unconditional` two codes within 0.9."""
    preset = NextFlowGenerationConfig.paper_sampling(generation_mode="image")
    guidance = (preset.guidance_scale, preset.guidance_schedule)
    plan = sampling_plan(5, 64, *guidance, top_k=preset.image_top_k, top_p=preset.image_top_p)
    for step, sampling in enumerate(plan):
        t = 5 * step / 4
        conditional, unconditional = torch.randn(2, 1, 3, 9, generator=torch.Generator().manual_seed(step))
        expected = (1 + t) * conditional - t * unconditional
        torch.testing.assert_close(guide([conditional, unconditional], sampling), expected)
        assert (sampling.top_k, sampling.top_p, sampling.temperature) == (2, 0.9, 1.0)
    model, ids = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint).eval(), torch.tensor([[5, 6, 7]])
    by_keyword = {"guidance_scale": 6.0, "guidance_schedule": "linear", "image_top_k": 2, "image_top_p": 0.9}
    assert torch.equal(
        model.generate(ids, preset, generator=seeded({"generation_mode": "image"})),
        model.generate(ids, generation_mode="image", **by_keyword, generator=seeded({"generation_mode": "image"})),
    )
    assert NextFlowGenerationConfig.paper_sampling(image_top_k=7, num_scales=3).to_diff_dict() == {
        **{name: value for name, value in preset.to_diff_dict().items() if name != "generation_mode"},
        "image_top_k": 7,
        "num_scales": 3,
    }


@pytest.mark.parametrize("kind", [GenerationConfig, NextFlowGenerationConfig])
def test_a_configuration_and_keywords_give_the_same(tiny_random_checkpoint, kind):
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint).eval()
    ids = torch.tensor([[5, 6, 7]])
    for options in (
        {"generation_mode": "image", "image_top_k": 2, "guidance_scale": 2.0, "num_scales": 3},
        {"generation_mode": "image", "do_sample": False, "num_return_sequences": 2},
        {"generation_mode": "image", "num_frames": 2, "image_temperature": 0.5},
        {"generation_mode": "interleaved", "max_new_tokens": 3, "max_new_images": 1, "do_sample": True, "top_k": 9},
        {"generation_mode": "text", "max_new_tokens": 3},
    ):
        if kind is GenerationConfig and "num_return_sequences" in options:
            continue  # transformers refuses several greedy texts
        by_keyword = model.generate(ids, generator=seeded(options), **options)
        by_config = model.generate(ids, kind(**options), generator=seeded(options))
        assert torch.equal(by_keyword, by_config)


def seeded(options):
    return None if options["generation_mode"] == "text" else torch.Generator().manual_seed(0)


def test_layers():
    """What is given comes first; a size that is given leaves the one below it out altogether."""
    stored = NextFlowGenerationConfig(height=80, width=80, num_scales=5, image_top_k=9, image_top_p=0.5)
    given, others = NextFlowGenerationConfig.merge(
        {"image_top_k": 3, "width": 64, "height": 48, "input_ids": 1, "thinking": None},
        NextFlowGenerationConfig(image_top_k=4, guidance_scale=2.0, num_scales=4),
    )
    assert others == {"input_ids": 1}
    merged = given.over(stored)
    assert (merged.image_top_k, merged.guidance_scale, merged.image_top_p) == (3, 2.0, 0.5)
    assert (merged.height, merged.width, merged.num_scales) == (48, 64, None)
    assert stored.image_top_k == 9


@pytest.mark.parametrize(
    "options, message",
    [
        ({"generation_mode": "video"}, "`generation_mode` must be one of 'text', 'image', 'interleaved'"),
        ({"guidance_schedule": "cosine"}, "`guidance_schedule` must be one of 'constant', 'linear'"),
        ({"height": "128"}, "`height` must be a whole number of at least 1, but got '128'"),
        ({"num_frames": 2.5}, "`num_frames` must be a whole number"),
        ({"num_frames": float("nan")}, "`num_frames` must be a whole number"),
        ({"num_scales": True}, "`num_scales` must be a whole number"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be a number of at least 0"),
        ({"image_guidance_scale": float("inf")}, "`image_guidance_scale` must be a number"),
        ({"prompt_styles": {"picture": "chat"}}, "`prompt_styles` maps tasks"),
        ({"prompt_styles": {"image": "ask"}}, "`prompt_styles` maps tasks"),
        ({"top_k": "5"}, "`top_k` must be a whole number of at least 0"),
        ({"image_top_k": -5}, "`image_top_k` must be a whole number"),
        ({"image_temperature": "hot"}, "`image_temperature` must be a number, or a list"),
        ({"image_temperature": [1.0, 0.0]}, "`image_temperature` must be positive"),
        ({"pad_token_id": "0"}, "has a value of a wrong type"),
        ({"image_top_p": 7}, "`image_top_p` must be above 0 and at most 1"),
        ({"num_return_sequences": 0}, "`num_return_sequences` must be a whole number"),
        ({"pass_candidates": [[[9, 1.0]]], "num_passes": 2}, "`num_passes` may be from 1 to 1, for which .* but got 2"),
    ],
)
def test_values_that_no_mode_can_use_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NextFlowGenerationConfig(**options)
