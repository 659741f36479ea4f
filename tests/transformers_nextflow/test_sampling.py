"""Guidance, candidates and seeded sampling against VAR's golden tensors and slow doubles."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from transformers_nextflow import ScaleSchedule
from transformers_nextflow import sampling as sampling_module
from transformers_nextflow.sampling import (
    ScaleSampling,
    draw_codes,
    draw_seeds,
    find_candidates,
    guide,
    gumbel_noise,
    make_generators,
    nucleus_floor,
    sample_codes,
    sampling_plan,
)

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden" / "var_sampling"
TOKENFLOW = GOLDEN.parent / "tokenflow_t2i"


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
    for row in TIED_ROWS:
        if top_k:
            assert kept[row].sum() == expected[row].sum()
        else:  # all that tie with one that stays
            logits = TOP_K_TOP_P["logits"][row]
            assert torch.equal(kept[row], logits >= logits[expected[row]].min())
        kept[row] = expected[row]
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("cfg", [1.5, 4.0])
def test_linear_guidance_is_vars_ramp(cfg):
    golden = load_file(GOLDEN / "cfg_gumbel.safetensors")
    plan = sampling_plan(4, 32, guidance_scale=1 + cfg, guidance_schedule="linear")
    for step, sampling in enumerate(plan):
        logits = guide([golden["cond"], golden["uncond"]], sampling)
        torch.testing.assert_close(logits, golden[f"cfg{cfg}.scale{step}.logits"], atol=1e-5, rtol=0)


# --- TokenFlow's sampling (golden) ---


def tokenflow_logits(weights: dict[str, torch.Tensor], hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """TokenFlow's language model, a Llama with norms after its branches and on queries and keys, as plain as can be."""

    def norm(x, name, eps=1e-5):
        return weights[f"sd.model.{name}.weight"] * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    def linear(x, name):
        return x @ weights[f"sd.{name}.weight"].T

    angles = torch.arange(hidden.shape[1])[:, None] * 1e4 ** (-torch.arange(0, 8, 2) / 8)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    for n in range(2):
        layer = f"layers.{n}"
        query, key, value = (
            linear(hidden, f"model.{layer}.self_attn.{name}_proj").unflatten(-1, (4, 8)).transpose(1, 2)
            for name in "qkv"
        )
        query = norm(query, f"{layer}.self_attn.qknorm.query_norm", 1e-6)
        key = norm(key, f"{layer}.self_attn.qknorm.key_norm", 1e-6)
        query, key = (x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin for x in (query, key))
        scores = (query @ key.mT / 8**0.5).masked_fill(~mask[:, None], -torch.inf)
        attended = linear((scores.softmax(-1) @ value).transpose(1, 2).flatten(2), f"model.{layer}.self_attn.o_proj")
        hidden = hidden + norm(attended, f"{layer}.input_layernorm")
        gate, up = (linear(hidden, f"model.{layer}.mlp.{name}_proj") for name in ("gate", "up"))
        down = linear(torch.nn.functional.silu(gate) * up, f"model.{layer}.mlp.down_proj")
        hidden = hidden + norm(down, f"{layer}.post_attention_layernorm")
    return linear(norm(hidden, "norm"), "lm_head")


@pytest.mark.parametrize("step", range(4))
def test_linear_guidance_is_tokenflows_ramp(step):
    """TokenFlow's cfg of 7.5 is a `guidance_scale` of 8.5: from the inputs of its own run to its codes."""
    golden, schedule = load_file(TOKENFLOW / "generation.safetensors"), ScaleSchedule(num_scales=4)
    inputs = golden[f"gen1.step{step}.inputs_embeds"]  # two prompts, then twice the negative prompt
    first, length = 8, inputs.shape[1]  # the slot that predicts the first code, and all slots
    level = torch.tensor([s for s, count in enumerate(schedule.scale_lengths) for _ in range(count)])
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[first:, first:] = level[:, None] >= level
    is_text = torch.stack([golden[f"gen1.prefix{row}"] != 32 for row in range(4)])
    seen = torch.cat([is_text, torch.ones(4, length - is_text.shape[1], dtype=torch.bool)], dim=1)
    mask = mask & seen[:, None] | torch.eye(length, dtype=torch.bool)  # padding sees itself, so that it has a softmax

    slots = slice(first + schedule.offsets[step], first + schedule.offsets[step + 1])
    logits = tokenflow_logits(golden, inputs, mask)[:, slots, 33:]
    sampling = sampling_plan(4, 64, guidance_scale=8.5, guidance_schedule="linear")[step]
    guided = guide([logits[:2], logits[2:]], sampling)
    torch.testing.assert_close(guided, golden[f"gen1.step{step}.cfg_logits"], atol=1e-4, rtol=0)
    assert torch.equal(
        sample_codes(guided.flatten(0, 1), ScaleSampling(top_k=1), None),
        golden[f"gen1.step{step}.tokens"].flatten(),
    )


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
        ({"temperature": float("inf")}, "must be positive and finite"),
        ({"temperature": "0.9"}, "must be a number, or a list with one per scale, but got '0.9'"),
        ({"top_k": [5, None, 5]}, r"must be a number, or a list with one per scale, but got \[5, None, 5\]"),
        ({"top_k": float("nan")}, "whole number from 1 to 64"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        sampling_plan(3, 64, **settings)


def test_top_k_keeps_ties_and_is_a_threshold():
    logits = torch.randint(-20, 20, (200, 64), generator=seeded(0)).float()
    for top_k in (1, 2, 5, 64):
        last = logits.sort(descending=True).values[:, top_k - 1 : top_k]
        assert torch.equal(kept_codes(logits, top_k, 1.0), logits >= last)


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
def test_top_p_without_top_k_equals_a_sort(top_p):
    probabilities = (4 * torch.randn(50, 300, generator=seeded(0))).softmax(-1)
    in_order = probabilities.sort(descending=True).values
    kept = in_order.double().cumsum(-1) - in_order < top_p
    expected = in_order.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    floor = nucleus_floor(probabilities, top_p)
    assert torch.equal(floor, torch.where(floor == expected, expected, floor.clamp(max=expected)))
    assert torch.equal((probabilities >= floor).sum(-1), kept.sum(-1))


# --- Drawing ---


def seeds_of(seed: int, number: int) -> torch.Tensor:
    return draw_seeds([seeded(seed)], [number], torch.device("cpu"))[0][0]


def slow_noise(seed: list[int], code: int) -> float:
    """Gumbel noise in Python's integers."""
    number = (code * 0x9E3779B1 + seed[0]) % 2**32
    for add in (seed[1], 0):
        number = ((number ^ number >> 16) * 0x85EBCA6B) % 2**32
        number = ((number ^ number >> 13) * 0xC2B2AE35) % 2**32
        number = ((number ^ number >> 16) + add) % 2**32
    return -math.log(-math.log1p(-(number % 2**31 + 0.5) / 2**31))


def test_noise_equals_a_slow_hash():
    seeds, codes = seeds_of(0, 20), torch.randint(32768, (20, 7), generator=seeded(1))
    expected = [
        [slow_noise(seed, code) for code in row] for seed, row in zip(seeds.tolist(), codes.tolist(), strict=True)
    ]
    torch.testing.assert_close(gumbel_noise(seeds, codes), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_noise_is_gumbel_and_independent_between_positions_and_codes():
    noise = gumbel_noise(seeds_of(0, 400), torch.arange(1000).expand(400, -1))
    assert noise.isfinite().all()
    levels = torch.linspace(0.05, 0.95, 19)
    reached = noise.flatten().quantile(levels)
    torch.testing.assert_close((-(-reached).exp()).exp(), levels, atol=0.01, rtol=0)
    uniform = (-(-noise).exp()).exp() - 0.5
    for other in (uniform.roll(1, 0), uniform.roll(1, 1), uniform.roll(7, 0), uniform.roll(256, 1)):
        assert abs((uniform * other).mean() * 12) < 0.01
    assert uniform.mean(0).abs().max() < 5 / math.sqrt(12 * 400)
    assert uniform.mean(1).abs().max() < 5 / math.sqrt(12 * 1000)


def test_seeds_are_those_of_each_generator_alone():
    together = draw_seeds([seeded(0), seeded(1)], [3, 0, 4], torch.device("cpu"))
    assert [tuple(scale.shape) for scale in together] == [(2, 3, 2), (2, 0, 2), (2, 4, 2)]
    alone = draw_seeds([seeded(1)], [7], torch.device("cpu"))[0]
    assert torch.equal(torch.cat(together, dim=1)[1:], alone)
    assert alone.dtype == torch.int32
    assert len(alone.unique()) == alone.numel()


@pytest.mark.parametrize(
    "sampling",
    [
        ScaleSampling(),
        ScaleSampling(temperature=0.7, top_k=5),
        ScaleSampling(top_k=6, top_p=0.8),
        ScaleSampling(top_p=0.8),
    ],
)
def test_drawn_codes_have_the_right_frequencies(sampling):
    logits = torch.randn(8, generator=seeded(0)) * 2
    scaled = logits / sampling.temperature
    kept = kept_codes(scaled, sampling.top_k, sampling.top_p)
    expected = scaled.masked_fill(~kept, -torch.inf).softmax(-1)
    drawn = sample_codes(logits.expand(40_000, -1), sampling, seeds_of(1, 40_000))
    frequencies = torch.bincount(drawn, minlength=8) / len(drawn)
    torch.testing.assert_close(frequencies, expected, atol=0.01, rtol=0)
    assert (frequencies[~kept] == 0).all()


def test_greedy_takes_the_likeliest():
    logits = torch.randn(5, 16, generator=seeded(0))
    assert torch.equal(sample_codes(logits, ScaleSampling(top_k=1), None), logits.argmax(-1))


def test_noise_belongs_to_codes_so_settings_that_cut_nothing_change_nothing():
    logits, seeds = torch.randn(50, 16, generator=seeded(0)), seeds_of(1, 50)
    plain = sample_codes(logits, ScaleSampling(), seeds)
    assert torch.equal(sample_codes(logits, ScaleSampling(top_k=16), seeds), plain)
    assert torch.equal(sample_codes(logits + 1e-6 * torch.randn_like(logits), ScaleSampling(), seeds), plain)


def test_low_precision_logits_are_drawn_in_float32():
    logits, seeds = torch.randn(50, 16, generator=seeded(0)).bfloat16(), seeds_of(1, 50)
    drawn = sample_codes(logits, ScaleSampling(top_p=0.9), seeds)
    assert torch.equal(drawn, sample_codes(logits.float(), ScaleSampling(top_p=0.9), seeds))


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.9}, {"top_k": 1}])
def test_guided_drawing_in_slices_is_drawing_both_branches_at_once(monkeypatch, settings):
    head = torch.nn.Linear(12, 16)
    hidden_states = torch.randn(4, 25, 12, generator=seeded(0))
    sampling, seeds = ScaleSampling(guidance_scale=3.0, **settings), seeds_of(1, 50)
    conditional, unconditional = head(hidden_states).chunk(2)
    at_once = sample_codes(guide([conditional, unconditional], sampling).flatten(0, 1), sampling, seeds)
    monkeypatch.setattr(sampling_module, "_MAX_LOGITS", 7 * 16)
    sizes = []
    head.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    drawn = draw_codes(head, hidden_states, sampling, seeds.view(2, 25, 2), num_codes=16, num_branches=2)
    assert torch.equal(drawn.flatten(), at_once)
    assert max(sizes) == 7
    unguided = draw_codes(head, hidden_states[:2], sampling, seeds.view(2, 25, 2), num_codes=16)
    assert torch.equal(unguided.flatten(), sample_codes(conditional.flatten(0, 1), sampling, seeds))


@pytest.mark.parametrize("scales", [(1.0, 1.0), (2.0, 2.0), (2.0, 1.0), (1.0, 2.0), (0.0, 0.0)])
def test_drawing_guides_by_both_scales(scales):
    """Branches are left out where both scales are 1, and nowhere else."""
    sampling, head = ScaleSampling(guidance_scale=scales[0], image_guidance_scale=scales[1]), torch.nn.Linear(12, 16)
    hidden_states, seeds = torch.randn(6, 25, 12, generator=seeded(0)), seeds_of(1, 50)
    guided = guide(head(hidden_states).chunk(3), sampling).flatten(0, 1)
    sizes = []
    head.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    drawn = draw_codes(head, hidden_states, sampling, seeds.view(2, 25, 2), num_codes=16, num_branches=3)
    assert torch.equal(drawn.flatten(), sample_codes(guided, sampling, seeds)) and sizes == [50]


def test_text_and_images_guided_apart():
    everything, images, neither = torch.randn(3, 5, 16, generator=seeded(0))
    guided = guide([everything, images, neither], ScaleSampling(guidance_scale=3.0, image_guidance_scale=1.5))
    torch.testing.assert_close(guided, neither + 1.5 * (images - neither) + 3.0 * (everything - images))
    as_two = guide([everything, images, neither], ScaleSampling(guidance_scale=3.0))
    assert torch.equal(as_two, guide([everything, images], ScaleSampling(guidance_scale=3.0)))


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


def test_seeds_go_to_the_head_wherever_it_is():
    """Pretended devices: fake tensors refuse what mixes them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weight = torch.zeros(16, 8, device="cuda:1")
        seeds = torch.zeros(2, 3, 2, dtype=torch.int, device="cuda:0")
        hidden_states = torch.zeros(4, 3, 8, device="cuda:1")
        for sampling in (ScaleSampling(guidance_scale=2.0), ScaleSampling(top_k=4, top_p=0.9, temperature=0.5)):
            codes = draw_codes(lambda rows: rows @ weight.T, hidden_states, sampling, seeds, 16, num_branches=2)
            assert codes.device == weight.device and codes.shape == (2, 3)


@pytest.mark.parametrize("most", [1, 16, 40, 2**20])
def test_how_positions_are_sliced_changes_nothing(monkeypatch, most):
    generator = torch.Generator().manual_seed(0)
    weight, hidden_states = (torch.randn(shape, generator=generator) for shape in [(16, 8), (4, 5, 8)])
    seeds = draw_seeds([torch.Generator().manual_seed(seed) for seed in (1, 2)], [5], torch.device("cpu"))[0]
    settings = (hidden_states, ScaleSampling(guidance_scale=2.0, image_guidance_scale=2.0), seeds, 16, 2)
    expected = draw_codes(lambda rows: rows @ weight.T, *settings)
    monkeypatch.setattr(sampling_module, "_MAX_LOGITS", most)
    assert torch.equal(draw_codes(lambda rows: rows @ weight.T, *settings), expected)
    guided = guide(hidden_states.chunk(2), settings[1]) @ weight.T  # 2 on both is guidance, not none
    assert torch.equal(sample_codes(guided.flatten(0, 1), settings[1], seeds.flatten(0, 1)), expected.flatten())
