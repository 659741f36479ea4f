"""Every option and argument of `generate` through its doors: keyword, configuration, stream, session.

A new one without a row in its table fails the first test.
"""

import inspect

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, TextStreamer

from random_weights import sharpen
from transformers_nextflow import NextFlowForCausalLM, NextFlowGenerationConfig, NextFlowProcessor, NextFlowSession
from transformers_nextflow.decoding_settings import INPUTS
from transformers_nextflow.generation_config_nextflow import OWN_OPTIONS
from transformers_nextflow.regional_prompts import Region

MODES = ("text", "image", "interleaved")
OUTCOMES = {"c": "changed", "s": "same", "r": "refused"}
SAMPLED = {"do_sample": True}
GUIDED = {"guidance_scale": 50.0}
WRITTEN = "the last token that is written without the option"

# A value, and what it does in the three modes: c changes the result, s leaves it the same, r is refused by name ("-":
# not tried, it needs another model); and what has to be given with it.
OPTIONS = {
    "max_length": (99, "sss", {}),
    "max_new_tokens": (2, "csc", {}),
    "min_length": (9, "sss", {}),
    "min_new_tokens": (4, "sss", {}),
    "early_stopping": (True, "srs", {}),
    "max_time": (60.0, "srs", {}),
    "do_sample": (True, "csc", {}),
    "num_beams": (2, "crr", {}),
    "use_mtp": (True, "-rr", {}),
    "use_cache": (False, "srr", {}),
    "cache_implementation": ("static", "sss", {}),
    "cache_config": ({}, "srs", {}),
    "max_cache_len": (99, "srs", {}),
    "temperature": (0.1, "crc", SAMPLED),
    "top_k": (2, "crc", SAMPLED),
    "top_p": (0.1, "crc", SAMPLED),
    "min_p": (0.9, "crc", SAMPLED),
    "top_h": (0.1, "crc", SAMPLED),
    "typical_p": (0.1, "crc", SAMPLED),
    "epsilon_cutoff": (0.5, "crc", SAMPLED),
    "eta_cutoff": (0.5, "srs", SAMPLED),
    "repetition_penalty": (9.0, "crc", {}),
    "encoder_repetition_penalty": (0.1, "srr", {}),
    "length_penalty": (2.0, "srs", {}),
    "no_repeat_ngram_size": (1, "crc", {}),
    "bad_words_ids": ([[WRITTEN]], "crc", {}),
    "renormalize_logits": (True, "srs", {}),
    "forced_bos_token_id": (70, "srs", {}),
    "forced_eos_token_id": (70, "crr", {}),
    "remove_invalid_values": (True, "srs", {}),
    "exponential_decay_length_penalty": ((1, 9.0), "crr", {}),
    "suppress_tokens": ([WRITTEN], "crc", {}),
    "begin_suppress_tokens": ([WRITTEN], "crs", {}),
    "sequence_bias": ([[[WRITTEN], -99.0]], "crc", {}),
    "token_healing": (True, "-rr", {}),
    "watermarking_config": ({"bias": 9.0}, "crc", {}),
    "num_return_sequences": (2, "rcc", {}),
    "output_attentions": (True, "srr", {}),
    "output_hidden_states": (True, "srr", {}),
    "output_scores": (True, "srr", {}),
    "output_logits": (True, "srr", {}),
    "return_dict_in_generate": (True, "sss", {}),
    "pad_token_id": (1, "sss", {}),
    "bos_token_id": (1, "sss", {}),
    "eos_token_id": (WRITTEN, "csc", {}),
    "encoder_no_repeat_ngram_size": (1, "srr", {}),
    "decoder_start_token_id": (1, "sss", {}),
    "prompt_lookup_num_tokens": (2, "srr", {}),
    "assistant_early_exit": (1, "-rr", {}),
    "disable_compile": (True, "sss", {}),
    "prefill_chunk_size": (2, "srr", {}),
    "guidance_scale": (50.0, "rcc", {}),
    "generation_mode": ("sculpture", "rrr", {}),
    "height": (48, "rrr", {}),
    "width": (48, "rrr", {}),
    "num_scales": (2, "rcc", {}),
    "image_guidance_scale": (2.0, "rrr", {}),
    "negative_ids": ([90], "rcr", GUIDED),
    "guidance_schedule": ("linear", "rcc", GUIDED),
    "image_temperature": (9.0, "rcc", {}),
    "image_top_k": (1, "rcc", SAMPLED),
    "image_top_p": (0.01, "rcc", SAMPLED),
    "num_passes": (2, "rrr", {}),  # for accumulated features; see test_modeling_tokenflow.py
    "pass_candidates": ([[[1, 1.0]]], "rcc", SAMPLED),
    "thinking": (True, "rcr", {}),
    "num_frames": (2, "rcr", {}),
    "max_new_images": (2, "rrs", {}),
    "prefix_scales": (1, "rrr", {}),
    "images_per_prefix": (1, "rrr", {}),
    "return_cache": (False, "sss", {}),
    "prompt_styles": ({"image": "chat"}, "rrr", {}),
}
# Of transformers' assisted and beam decoding, which text mode hands on and image mode refuses all alike.
HANDED_ON = {
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
    *("speculation_type", "continuous_batching_config", "compile_config", "low_memory", "penalty_alpha"),
    *("dola_layers", "diversity_penalty", "num_beam_groups", "constraints", "force_words_ids", "stop_strings"),
}
KEPT = {"keep_codes": 4 * torch.arange(14)[None], "keep_mask": torch.arange(14)[None] >= 5}
# A value, what it does to an image by `generate`, by `stream` and in a session; and what has to be given with it.
ARGUMENTS = {
    "inputs": (torch.tensor([[80, 81]]), "rrr"),  # beside `input_ids`
    "input_ids": (torch.tensor([[80, 81]]), "ccr"),
    "attention_mask": (torch.tensor([[0, 0, 1]]), "ccr"),
    "image_grid_shw": (torch.tensor([[3, 16, 16]]), "rrr"),
    "generation_config": (NextFlowGenerationConfig(image_top_k=1), "ccr"),
    "generator": (torch.Generator().manual_seed(7), "ccc"),
    "negative_prompt_ids": (torch.tensor([[90]]), "ccr"),
    "negative_prompt_attention_mask": (torch.ones(1, 9), "rrr"),  # of another shape
    "keep_codes": (torch.ones(1, 14, dtype=torch.long), "ccc", KEPT),
    "keep_mask": (torch.ones(1, 48, 48), "ccc", KEPT),
    "keep_repair": (False, "ccc", KEPT),
    "regions": ([Region(torch.tensor([[80, 81]]), torch.ones(1, 48, 48))], "ccc"),
    "on_scale_end": (lambda index, schedule, codes: codes * 0, "crr"),
    "cache": (DynamicCache, "ssr"),  # a new one each time
    "stopping_criteria": (
        [lambda ids, scores: ids.new_ones(len(ids), dtype=torch.bool)],
        "ccc",
    ),
    "logits_processor": ([], "rrr"),
    "streamer": (TextStreamer(None), "srr"),
    "tokenizer": ("of no use without `stop_strings`", "sss"),
    "synced_gpus": (False, "sss"),
}

PROMPTS = {"text": [70, 71, 72], "image": [70, 71, 72], "interleaved": [70, 71, "<boi>"]}
SETTINGS = {
    "text": {"max_new_tokens": 4},
    "image": {"num_scales": 3},
    "interleaved": {"max_new_tokens": 4, "max_new_images": 1, "num_scales": 3},
}


@pytest.fixture(scope="module")
def parts(tiny_random_checkpoint):
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint).eval()
    sharpen(model)
    return model, NextFlowProcessor.from_pretrained(tiny_random_checkpoint)


def arguments(model, mode):
    ids = [model.config.boi_token_id if token == "<boi>" else token for token in PROMPTS[mode]]
    torch.manual_seed(0)  # text mode samples by it
    seeded = {} if mode == "text" else {"generator": torch.Generator().manual_seed(0)}
    return {"input_ids": torch.tensor([ids]), **seeded}


def by_keyword(model, mode, **settings):
    output = model.generate(**{**arguments(model, mode), "generation_mode": mode, **SETTINGS[mode], **settings})
    return output if isinstance(output, torch.Tensor) else output["sequences"]


def by_configuration(model, mode, **settings):
    config = NextFlowGenerationConfig(**{"generation_mode": mode, **SETTINGS[mode], **settings})
    output = model.generate(**arguments(model, mode), generation_config=config)
    return output if isinstance(output, torch.Tensor) else output["sequences"]


def by_stream(model, mode, **settings):
    """The codes of the images, as `generate` has them."""
    given = {**arguments(model, mode), "generation_mode": mode, **SETTINGS[mode], **settings}
    images = [event.ids.flatten() for event in model.stream(**given) if event.kind == "image"]
    return torch.cat([torch.empty(0, dtype=torch.long), *images])


def codes_of(model, ids):
    return ids[ids >= model.config.text_vocab_size] - model.config.text_vocab_size


def outcome(name, plain, call, *args, **kwargs):
    """The result, and what became of it."""
    try:
        result = call(*args, **kwargs)
    except (ValueError, TypeError) as error:
        assert name in str(error), error
        return None, "refused"
    return result, "same" if result.shape == plain.shape and torch.equal(result, plain) else "changed"


def test_every_option_and_argument_has_a_row():
    stored = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    assert set(OPTIONS) | HANDED_ON == stored | set(OWN_OPTIONS)
    named = set(inspect.signature(NextFlowForCausalLM.generate).parameters) - {"self", "kwargs"}
    assert set(ARGUMENTS) == named | set(INPUTS)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_by_keyword_in_a_configuration_and_in_a_stream(name, parts):
    model, (value, expected, needs) = parts[0], OPTIONS[name]
    for mode, letter in zip(MODES, expected, strict=True):
        if letter == "-":
            continue
        needed = {} if mode == "text" and needs is GUIDED else needs
        plain = by_keyword(model, mode, **needed)
        settings = {**needed, name: filled(value, int(plain[0, -1]) if mode != "image" else 70)}
        result, became = outcome(name, plain, by_keyword, model, mode, **settings)
        assert became == OUTCOMES[letter], (mode, became)
        stored, of_stored = outcome(name, plain, by_configuration, model, mode, **settings)
        # A configuration may hold options of the other modes.
        assert of_stored in ((became, "same") if became == "refused" else (became,)), (mode, of_stored)
        assert result is None or torch.equal(result, stored)
        if mode != "text":
            drawn, of_stream = outcome(name, codes_of(model, plain), by_stream, model, mode, **settings)
            assert (of_stream == "refused") is (became == "refused"), (mode, of_stream)
            assert result is None or torch.equal(drawn.sort().values, codes_of(model, result).sort().values)


def filled(value, written):
    """With the token in its place."""
    if isinstance(value, list):
        return [filled(item, written) for item in value]
    return written if value is WRITTEN else value


@pytest.mark.parametrize(
    "name", [*OWN_OPTIONS, "guidance_scale", "do_sample", "max_new_tokens", "num_return_sequences"]
)
def test_an_option_of_a_session_is_that_of_its_turns(name, parts):
    value, _, needs = OPTIONS[name]

    def turn(method, of_session, of_turn):
        session = NextFlowSession(*parts, **{"max_new_tokens": 3, "num_scales": 3, **needs, **of_session})
        getattr(session, method)("a ring", generator=torch.Generator().manual_seed(0), **of_turn)
        return session.input_ids

    for method in ("draw", "chat"):
        plain = turn(method, {}, {})
        result, became = outcome(name, plain, turn, method, {}, {name: value})
        stored, of_stored = outcome(name, plain, turn, method, {name: value}, {})
        # Defaults are for the turns that they can serve.
        assert of_stored in ((became, "same") if became == "refused" else (became,)), (method, became, of_stored)
        assert result is None or torch.equal(result, stored)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_is_used_or_refused(name, parts):
    model, (value, expected, *needed) = parts[0], ARGUMENTS[name]
    needs = needed[0] if needed else {}

    def draw(**settings):
        session = NextFlowSession(*parts)
        session.draw("a ring", **{"generator": torch.Generator().manual_seed(0), "num_scales": 3, **GUIDED, **settings})
        return codes_of(model, session.input_ids)

    doors = {by_keyword: (model, "image"), by_stream: (model, "image"), draw: ()}
    for (door, given), letter in zip(doors.items(), expected, strict=True):
        guided = needs if door is draw else {**GUIDED, **needs}
        new = value() if value is DynamicCache else value
        became = outcome(name, door(*given, **guided), door, *given, **{**guided, name: new})[1]
        assert became == OUTCOMES[letter], (door.__name__, became)


def test_stop_strings_end_a_text(tiny_random_checkpoint):
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint)
    tokenizer = NextFlowProcessor.from_pretrained(tiny_random_checkpoint).tokenizer
    ids = tokenizer("a ring", return_tensors="pt").input_ids
    whole = model.generate(ids, max_new_tokens=8, do_sample=False)
    third = tokenizer.decode(whole[0, ids.shape[1] + 2])
    text = model.generate(ids, max_new_tokens=8, do_sample=False, stop_strings=[third], tokenizer=tokenizer)
    assert text.shape[1] < whole.shape[1] and torch.equal(text, whole[:, : text.shape[1]])


def test_an_attention_mask_of_another_length(tiny_random_checkpoint):
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 3\), but the prompts have \(2, 1\)"):
        model.generate(torch.full((2, 1), 65), attention_mask=torch.ones(2, 3), max_new_tokens=2)


def test_a_configuration_with_a_misspelt_option(tiny_random_checkpoint):
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint)
    config = NextFlowGenerationConfig(generation_mode="image", image_topk=1)
    with pytest.raises(ValueError, match="`generation_config` has `image_topk`, which no option is called"):
        model.generate(torch.full((1, 3), 65), generation_config=config)
