"""The table of options in docs/text_to_image.md says what `generate` does with each, in every mode."""

import re
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache
from transformers.generation import CompileConfig

from transformers_nextflow import NextFlowForCausalLM
from transformers_nextflow.generation_config_nextflow import OWN_OPTIONS
from transformers_nextflow.regional_prompts import Region

PAGE = Path(__file__).parents[2] / "docs" / "text_to_image.md"
MODES = {
    "text": {"generation_mode": "text", "max_new_tokens": 2},
    "image": {"generation_mode": "image"},
    "thinking": {"generation_mode": "image", "thinking": True, "max_new_tokens": 2},
    "frames": {"generation_mode": "image", "num_frames": 2},
    "interleaved": {"generation_mode": "interleaved", "max_new_tokens": 2, "max_new_images": 1},
}
SMALL = {"height": 48, "width": 48}


class Streamer:
    def put(self, value):
        pass

    def end(self):
        pass


KEPT = {"keep_codes": torch.zeros(1, 14, dtype=torch.long), "keep_mask": torch.ones(1, 48, 48), "keep_repair": False}

# A legal value of each, and what goes with it.
VALUES = {
    "height": SMALL,
    "width": SMALL,
    "num_scales": {"num_scales": 2},
    "guidance_scale": {"guidance_scale": 2.0},
    "image_guidance_scale": {"image_guidance_scale": 2.0},
    "guidance_schedule": {"guidance_schedule": "linear"},
    "image_temperature": {"image_temperature": 0.5},
    "image_top_k": {"image_top_k": 3},
    "image_top_p": {"image_top_p": 0.5},
    "negative_ids": {"negative_ids": [97], "guidance_scale": 2.0},
    "num_passes": {"num_passes": 2},
    "pass_candidates": {"pass_candidates": [[[3, 0.5]]]},
    "thinking": {"thinking": True},
    "num_frames": {"num_frames": 2},
    "max_new_images": {"max_new_images": 1},
    "prefix_scales": {"prefix_scales": 1, "images_per_prefix": 2, "num_return_sequences": 2},
    "images_per_prefix": {"prefix_scales": 1, "images_per_prefix": 2, "num_return_sequences": 2},
    "return_cache": {"return_cache": False},
    "prompt_styles": {"prompt_styles": {"image": "chat"}},
    "generator": {"generator": torch.Generator()},
    "on_scale_end": {"on_scale_end": lambda *_: None},
    "negative_prompt_ids": {"negative_prompt_ids": torch.tensor([[97, 98]]), "guidance_scale": 2.0},
    **dict.fromkeys(("keep_codes", "keep_mask", "keep_repair"), KEPT),
    "regions": {"regions": [Region(torch.tensor([[97, 98]]), torch.ones(1, 48, 48))]},
    "do_sample": {"do_sample": True},
    "num_return_sequences": {"num_return_sequences": 2, "do_sample": True},
    "stopping_criteria": {"stopping_criteria": [lambda ids, scores: torch.zeros(len(ids), dtype=torch.bool)]},
    "streamer": {"streamer": Streamer()},
    "logits_processor": {"logits_processor": [lambda ids, scores: scores]},
    "temperature": {"temperature": 0.5, "do_sample": True},
    "top_k": {"top_k": 3, "do_sample": True},
    "top_p": {"top_p": 0.5, "do_sample": True},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "suppress_tokens": {"suppress_tokens": [97]},
    "max_new_tokens": {"max_new_tokens": 3},
    "min_new_tokens": {"min_new_tokens": 1},
    "max_time": {"max_time": 100.0},
    "eos_token_id": {"eos_token_id": 97},
    "cache": {"cache": None},
    "cache_implementation": {"cache_implementation": "static"},
    "compile_config": {
        "compile_config": CompileConfig(backend="eager", fullgraph=False),
        "cache_implementation": "preallocated",
    },
    "num_beams": {"num_beams": 2},
    "use_cache": {"use_cache": False},
    "output_scores": {"output_scores": True, "return_dict_in_generate": True},
    "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "prefill_chunk_size": {"prefill_chunk_size": 2},
}


def table() -> list[tuple[str, str, str]]:
    """Option, mode and verdict of every cell."""
    text = PAGE.read_text(encoding="utf-8").partition("<!-- options -->")[2].partition("<!-- /options -->")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.strip().splitlines()]
    assert rows[0][1:] == list(MODES)
    cells = []
    for option, *verdicts in rows[2:]:
        options = re.findall(r"`(\w+)`", re.sub(r"\(.*?\)|with a `.*", "", option))
        cells += [(name, mode, verdict) for name in options for mode, verdict in zip(MODES, verdicts, strict=True)]
    return cells


def test_every_option_of_ours_has_a_row():
    options = {name for name, *_ in table()}
    assert options == set(VALUES)
    assert options >= set(OWN_OPTIONS) - {"generation_mode"}


@pytest.fixture(scope="module")
def model(tiny_random_checkpoint):
    return NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint, attn_implementation="eager").eval()


@pytest.mark.parametrize(("option", "mode", "verdict"), table())
def test_the_table_is_right(model, option, mode, verdict):
    settings = {**({} if mode == "text" else SMALL), **MODES[mode], **VALUES[option]}
    if option == "num_scales":
        settings = {name: value for name, value in settings.items() if name not in SMALL}
    if option == "compile_config" and mode == "text":
        del settings["cache_implementation"]
    if option == "cache":
        settings["cache"] = DynamicCache(config=model.config)
    inputs = {"input_ids": torch.tensor([[97, 98, 99]])}
    if option == "image_guidance_scale":  # after a picture of one code
        inputs["input_ids"] = torch.tensor([[97, model.config.boi_token_id, model.config.text_vocab_size + 1, 98]])
        inputs["image_grid_shw"] = torch.tensor([[1, 16, 16]])
    if verdict == "refused":
        with pytest.raises(ValueError, match=f"`({'|'.join(VALUES[option])})"):
            model.generate(**inputs, **settings)
    else:
        assert verdict in ("yes", "no effect")
        model.generate(**inputs, **settings)
