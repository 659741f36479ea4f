"""Packing: a packed row is its samples one by one, and packs are full, even and the same every time."""

import numpy as np
import pytest
import torch

from transformers_nextflow import NextFlowForCausalLM, ScaleSchedule
from transformers_nextflow.trainer import (
    NextFlowDataCollator,
    PackSampler,
    make_packs,
    rank_imbalance,
    sample_costs,
    sequence_flops,
)
from transformers_nextflow.trainer.packing import block_lengths


@pytest.fixture(params=["sdpa", "eager", "sdpa_varlen", "flex_attention"])
def model(request, tiny_random_checkpoint) -> NextFlowForCausalLM:
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint, dtype=torch.float32)
    model.config.scale_reweight_alpha = 0.6
    with torch.no_grad():  # far from uniform, so that a wrong mask or position shows
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.set_attn_implementation(request.param)
    with torch.compiler.set_stance("force_eager"):  # compiling flex attention takes a minute on CPU
        yield model


@pytest.mark.parametrize("names", [(0, 1, 2), (2, 2), (1, 0, 0, 2, 1)])
def test_packed_loss_and_gradients_are_those_of_each_sample_alone(model, samples, names):
    collate, pack = (NextFlowDataCollator(model.config, False, 0, packing=packing) for packing in (False, True))
    chosen = [samples[name] for name in names]
    trains = model.config._attn_implementation != "flex_attention"  # which has no backward pass on CPUs

    def run(batches):
        model.zero_grad()
        with torch.set_grad_enabled(trains):
            loss = sum(model(**batch, num_items_in_batch=100).loss for batch in batches)
        if trains:
            loss.backward()
        return float(loss), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    loss, gradients = run([pack(chosen)])
    expected, expected_gradients = run([collate([sample]) for sample in chosen])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert len(gradients) == len(expected_gradients)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", ["sdpa", "sdpa_varlen"], indirect=True)
def test_rows_of_packs_and_labels_that_are_ids(model, samples):
    """Two packed rows of different lengths, the shorter one padded; nothing predicts a sequence's first token."""
    pack, alone = (
        NextFlowDataCollator(model.config, False, 0, packing=True),
        NextFlowDataCollator(model.config, False, 0),
    )
    packs = [pack([samples[0], samples[1]]), pack([samples[1], samples[2]])]
    length = max(batch["input_ids"].shape[1] for batch in packs)

    def rows(name, value):
        return torch.cat(
            [torch.nn.functional.pad(batch[name], (0, length - batch[name].shape[1]), value=value) for batch in packs]
        )

    ids, seq_idx = rows("input_ids", 0), rows("seq_idx", 9)
    grids = torch.cat([batch["image_grid_shw"] for batch in packs])
    labels = ids.masked_fill(seq_idx == 9, -100)
    loss = model(ids, grids, seq_idx=seq_idx, labels=labels, num_items_in_batch=1).loss
    expected = sum(
        float(model(**{**batch, "labels": batch["input_ids"]}, num_items_in_batch=1).loss)
        for batch in (alone([samples[name]]) for name in (0, 1, 1, 2))
    )
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("model", ["sdpa_varlen"], indirect=True)
def test_a_model_set_to_packing_draws_as_ever(model, samples):
    def draw() -> list[int]:
        prompt = {
            "input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]),
            "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        }
        return model.eval().generate(**prompt, generation_mode="image", image_top_k=1, guidance_scale=2.0).tolist()

    drawn = draw()
    model.set_attn_implementation("sdpa")
    assert drawn == draw()


@pytest.mark.parametrize("model", ["sdpa"], indirect=True)
def test_packed_rows_take_no_padding_mask(model, samples):
    batch = NextFlowDataCollator(model.config, packing=True)(samples)
    with pytest.raises(ValueError, match="go without `attention_mask`"):
        model(**batch, attention_mask=torch.ones_like(batch["input_ids"]))


def test_costs_are_the_papers(samples):
    image = ScaleSchedule()
    sample = {"token_ids": [1] * 99 + [7], "image_grid_shw": [image.grid_shw]}
    blocks = block_lengths(sample, 7)
    assert sum(blocks) == 100 + image.num_tokens
    assert sequence_flops(blocks, 2048, 28) == image.flops(2048, 100, 28)
    (cost,) = sample_costs([sample], 7, 2048)
    assert cost == pytest.approx(image.flops(2048, 100) / (12 * 2048**2))
    assert sample_costs([sample], 7, None).tolist() == [sum(blocks)]
    assert block_lengths({"token_ids": [7, 1, 1, 7, 1], "image_grid_shw": [(2, 16, 16), (1, 16, 16)]}, 7) == [
        *(1, 1, 4),
        *(3, 1),
        1,
    ]


@pytest.mark.parametrize("num_ranks", [1, 8])
@pytest.mark.parametrize("seed", range(3))
def test_packs_are_full_even_and_complete(num_ranks, seed):
    rng = np.random.default_rng(seed)
    costs = np.concatenate([rng.integers(20, 200, 4000), rng.integers(1000, 10_000, 500)]).astype(float)
    packs = make_packs(costs, 16_000, num_ranks, seed)
    assert sorted(index for pack in packs for index in pack) == list(range(len(costs)))
    loads = np.array([costs[pack].sum() for pack in packs])
    assert len(packs) % num_ranks == 0 and loads.max() <= 16_000
    assert loads.mean() > 0.95 * 16_000 and rank_imbalance(loads, num_ranks) < 1.02
    assert packs == make_packs(costs, 16_000, num_ranks, seed) != make_packs(costs, 16_000, num_ranks, seed + 1)


def test_awkward_packs():
    assert (
        sorted(map(sorted, make_packs([6, 6, 6, 4], 10))) == [[0], [1], [2, 3]]
        or len(make_packs([6, 6, 6, 4], 10)) == 3
    )
    assert len(make_packs([1, 1, 1], 100, num_ranks=2)) == 2
    with pytest.raises(ValueError, match="costs 11 tokens, more than the budget of a pack"):
        make_packs([11, 1], 10)
    with pytest.raises(ValueError, match="1 samples can't be packed for 2 ranks"):
        make_packs([1], 10, num_ranks=2)


def test_steps_stay_together_and_epochs_differ():
    packs = [[index] for index in range(12)]
    sampler = PackSampler(packs, num_ranks=4, seed=1)
    first = list(sampler)
    assert first == list(sampler) and sorted(first) == packs
    assert all(first[i][0] // 4 == first[i - i % 4][0] // 4 for i in range(12))
    orders = set()
    for epoch in range(6):
        sampler.set_epoch(epoch)
        orders.add(str(list(sampler)))
    assert len(orders) > 1
    with pytest.raises(ValueError, match="12 packs can't be dealt out evenly to 5 ranks"):
        PackSampler(packs, num_ranks=5)
