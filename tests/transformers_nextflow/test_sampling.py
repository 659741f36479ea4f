"""Guidance, candidates and seeded sampling against VAR's golden tensors and slow doubles."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from transformers_nextflow import sampling as sampling_module
from transformers_nextflow.sampling import (
    ScaleSampling,
    draw_codes,
    find_candidates,
    guide,
    make_generators,
    sample_codes,
    sampling_plan,
)

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden" / "var_sampling"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- VAR's sampling (golden) ---


TOP_K_TOP_P = load_file(GOLDEN / "topk_topp.safetensors")
CASES = sorted(name.removesuffix(".kept") for name in TOP_K_TOP_P if name.endswith(".kept"))
TIED_ROWS = [(0, 1), (1, 2)]  # there only the number of kept codes is defined


def kept_codes(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    candidates, codes = find_candidates(logits, top_k, top_p)
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, codes, candidates > -torch.inf)


@pytest.mark.parametrize("case", CASES)
def test_candidates_are_those_of_var(case):
    top_k, top_p = (float(part[1:]) for part in case.split("_"))
    expected = TOP_K_TOP_P[f"{case}.kept"]
    kept = kept_codes(TOP_K_TOP_P["logits"], int(top_k), top_p or 1.0)  # VAR writes "no top-p" as 0
    assert torch.equal(kept.sum(-1), expected.sum(-1))
    for row in TIED_ROWS:
        kept[row] = expected[row]
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("cfg", [1.5, 4.0])
def test_linear_guidance_is_vars_ramp(cfg):
    golden = load_file(GOLDEN / "cfg_gumbel.safetensors")
    plan = sampling_plan(4, 32, guidance_scale=1 + cfg, guidance_schedule="linear")
    for step, sampling in enumerate(plan):
        logits = guide(golden["cond"], golden["uncond"], sampling.guidance_scale)
        torch.testing.assert_close(logits, golden[f"cfg{cfg}.scale{step}.logits"], atol=1e-5, rtol=0)


# --- The plan ---


def test_plan_spreads_numbers_and_takes_lists():
    plan = sampling_plan(3, 64, guidance_scale=5, temperature=[1.0, 0.9, 0.8], top_k=[0, 4, 2], top_p=0.9)
    assert plan == [
        ScaleSampling(5.0, 1.0, 0, 0.9),
        ScaleSampling(5.0, 0.9, 4, 0.9),
        ScaleSampling(5.0, 0.8, 2, 0.9),
    ]
    assert [sampling.top_k for sampling in sampling_plan(3, 64, top_k=7, do_sample=False)] == [1, 1, 1]
    assert sampling_plan(2, 64) == [ScaleSampling(), ScaleSampling()]


def test_arrays_and_tensors_are_lists_too():
    plan = sampling_plan(2, 64, temperature=np.float32(0.5), top_k=np.array([3, 4]), top_p=torch.tensor([0.5, 1.0]))
    assert plan == [ScaleSampling(1.0, 0.5, 3, 0.5), ScaleSampling(1.0, 0.5, 4, 1.0)]


def test_linear_guidance_grows_from_one_to_the_scale():
    plan = sampling_plan(5, 64, guidance_scale=3.0, guidance_schedule="linear")
    assert [sampling.guidance_scale for sampling in plan] == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0])
    assert sampling_plan(1, 64, guidance_scale=3.0, guidance_schedule="linear")[0].guidance_scale == 3.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": [1, 2]}, "`image_top_k` has 2 entries, but the image has 3 scales"),
        ({"temperature": [1.0] * 4}, "`image_temperature` has 4 entries, but the image has 3 scales"),
        ({"top_k": 65}, "whole number from 1 to 64"),
        ({"top_k": 2.5}, "whole number from 1 to 64"),
        ({"top_k": -1}, "whole number from 1 to 64"),
        ({"top_p": 0.0}, "above 0 and at most 1"),
        ({"top_p": [0.5, 1.5, 0.5]}, "above 0 and at most 1"),
        ({"temperature": 0}, "must be positive and finite, but got 0. For the likeliest codes pass `do_sample=False`"),
        ({"guidance_scale": -1.0}, "must be at least 0"),
        ({"guidance_scale": float("nan")}, "must be at least 0"),
        ({"guidance_scale": float("inf")}, "must be at least 0 and finite"),
        ({"temperature": float("inf")}, "must be positive and finite"),
        ({"temperature": "0.9"}, "must be a number, or a list of one number a scale, but got '0.9'"),
        ({"top_k": [5, None, 5]}, r"must be a number, or a list of one number a scale, but got \[5, None, 5\]"),
        ({"top_k": float("nan")}, "whole number from 1 to 64"),
        ({"guidance_schedule": "cosine"}, '"constant" or "linear", but got "cosine"'),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        sampling_plan(3, 64, **settings)


# --- Drawing ---


@pytest.mark.parametrize(
    "sampling", [ScaleSampling(), ScaleSampling(temperature=0.7, top_k=5), ScaleSampling(top_k=6, top_p=0.8)]
)
def test_drawn_codes_have_the_right_frequencies(sampling):
    logits = torch.randn(8, generator=seeded(0)) * 2
    scaled = logits / sampling.temperature
    kept = kept_codes(scaled, sampling.top_k, sampling.top_p)
    expected = scaled.masked_fill(~kept, -torch.inf).softmax(-1)
    drawn = sample_codes(logits.expand(40_000, -1), sampling, seeded(1))
    frequencies = torch.bincount(drawn, minlength=8) / len(drawn)
    torch.testing.assert_close(frequencies, expected, atol=0.01, rtol=0)
    assert (frequencies[~kept] == 0).all()


def test_greedy_takes_the_likeliest_and_leaves_the_generator_alone():
    logits = torch.randn(5, 16, generator=seeded(0))
    generator = seeded(1)
    state = generator.get_state()
    assert torch.equal(sample_codes(logits, ScaleSampling(top_k=1), generator), logits.argmax(-1))
    assert torch.equal(generator.get_state(), state)


def test_noise_belongs_to_codes_so_settings_that_cut_nothing_change_nothing():
    logits = torch.randn(50, 16, generator=seeded(0))
    plain = sample_codes(logits, ScaleSampling(), seeded(1))
    assert torch.equal(sample_codes(logits, ScaleSampling(top_k=16), seeded(1)), plain)
    assert torch.equal(sample_codes(logits + 1e-6 * torch.randn_like(logits), ScaleSampling(), seeded(1)), plain)


def test_low_precision_logits_are_drawn_in_float32():
    logits = torch.randn(50, 16, generator=seeded(0)).bfloat16()
    drawn = sample_codes(logits, ScaleSampling(top_p=0.9), seeded(1))
    assert torch.equal(drawn, sample_codes(logits.float(), ScaleSampling(top_p=0.9), seeded(1)))


@pytest.mark.parametrize("settings", [{}, {"top_k": 5, "top_p": 0.9}, {"top_k": 1}])
def test_guided_drawing_in_slices_is_drawing_at_once(monkeypatch, settings):
    conditional, unconditional = torch.randn(2, 50, 16, generator=seeded(0))
    sampling = ScaleSampling(guidance_scale=3.0, **settings)
    at_once = sample_codes(guide(conditional, unconditional, 3.0), sampling, seeded(1))
    monkeypatch.setattr(sampling_module, "_MAX_LOGITS", 7 * 16)
    assert torch.equal(draw_codes(conditional, unconditional, sampling, seeded(1)), at_once)
    unguided = draw_codes(conditional, None, sampling, seeded(1))
    assert torch.equal(unguided, sample_codes(conditional, sampling, seeded(1)))


# --- Generators ---


def draws(generators: list[torch.Generator]) -> list[float]:
    return [float(torch.rand((), generator=generator)) for generator in generators]


def test_a_single_generator_gives_sample_i_the_same_stream_in_every_batch():
    alone = draws(make_generators(seeded(3), 1, torch.device("cpu")))
    three = draws(make_generators(seeded(3), 3, torch.device("cpu")))
    five = draws(make_generators(seeded(3), 5, torch.device("cpu")))
    assert alone == three[:1]
    assert three == five[:3]
    assert len(set(five)) == 5


def test_a_generator_goes_on_in_the_next_call():
    generator = seeded(3)
    first = draws(make_generators(generator, 2, torch.device("cpu")))
    second = draws(make_generators(generator, 2, torch.device("cpu")))
    assert not set(first) & set(second)


def test_without_a_generator_seeds_are_fresh_and_global_state_untouched():
    state = torch.get_rng_state()
    first, second = (draws(make_generators(None, 2, torch.device("cpu"))) for _ in range(2))
    assert not set(first) & set(second)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_wrong_number_of_generators_is_named():
    with pytest.raises(ValueError, match="Got 2 generators for 3 images"):
        make_generators([seeded(0), seeded(1)], 3, torch.device("cpu"))


def test_what_is_no_generator_is_named():
    with pytest.raises(TypeError, match=r"`generator` must be a `torch\.Generator` or a list of them, but got int"):
        make_generators(0, 1, torch.device("cpu"))
