"""Tokens a second for padded batches, packs of fixed length and packs of a fixed compute budget, on a mix of tasks.

    python benchmarks/packing.py
    python benchmarks/packing.py --timed 32 --runs 1 --batch-size 16 --ranks 32

The mix is of the paper's kind (arXiv 2601.02204, sections 3 and 4; the shares are ours): a quarter text, drawing and
describing at 256, 512 and 1024 pixels, editing, interleaved stories, with codes and words drawn at random.

*tokens/s* is measured here: a small model trains on the same samples in all three ways, forward and backward, step by
step in turn, so that a machine that slows down slows all of them; of `--runs` such runs it is the median, with the
least and the greatest beside *x padded*. Padded batches are what a collator gets from shuffled data; padding counts for
nothing. Images are made a few scales smaller and the model narrow, so that by the cost model padding wastes as large a
share of the work as with the 7B at the paper's sizes. Few samples are a matter of luck: of `--draws` draws the one is
timed whose padding is closest to that of `--samples` samples. The line above the table gives all these numbers.
*imbalance* is predicted by the paper's cost
model for the 7B, the paper's sizes and `--ranks` ranks: the costliest rank of a step over the mean, all steps together.
Ranks wait for each other, so a rank of many gets *tokens/s* divided by it. The paper's figures are beside ours: its
hardware, model and mix are other ones.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from transformers_nextflow import NextFlowConfig, NextFlowForCausalLM, ScaleSchedule, aspect_buckets
from transformers_nextflow.trainer import NextFlowDataCollator, make_packs, rank_imbalance, sample_costs

PAPER = {"padded": 620, "length": 2110, "compute": 2517}  # tokens a second and GPU
HIDDEN_SIZE_7B = 3584
CODES, TEXT, BOI, EOI, MARK = 1024, 2048, 2045, 2046, 2047
LEVELS = {256: 12, 512: 16, 1024: 18}  # pixels: scales
# name: share, words before and after, images (median number of words; a tenth are three times as long)
TASKS = {
    "text": (0.25, 300, 0),
    "drawing": (0.40, 60, 1),
    "describing": (0.15, 120, 1),
    "editing": (0.12, 30, 2),
    "story": (0.08, 150, 3),
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LEVEL_SHARES = {256: 0.6, 512: 0.3, 1024: 0.1}


def draw_samples(rng: np.random.Generator, number: int, num_scales: dict[int, int]) -> list[dict[str, Any]]:
    """Coded samples of the mix; `num_scales` says how many scales a level has."""
    names, buckets = list(TASKS), aspect_buckets()
    samples = []
    for name in rng.choice(names, number, p=[TASKS[name][0] for name in names]):
        _, words, num_images = TASKS[name]
        scales = num_scales[int(rng.choice(list(LEVEL_SHARES), p=list(LEVEL_SHARES.values())))]
        ids = rng.integers(1, BOI, max(4, int(words * rng.lognormal(0, 0.7)))).tolist()
        places = np.sort(rng.integers(1, len(ids), num_images))[::-1]
        for place in places:
            ids.insert(place, MARK)
        schedules = [ScaleSchedule(buckets[rng.integers(len(buckets))], scales) for _ in range(num_images)]
        codes = [rng.integers(0, CODES, schedule.num_tokens).tolist() for schedule in schedules]
        samples.append(
            {
                "token_ids": ids,
                "completion_mask": [1] * len(ids),
                "codes": codes,
                "target_codes": codes,
                "image_grid_shw": [schedule.grid_shw for schedule in schedules],
                "codebook_size": CODES,
            }
        )
    return samples


def small_model(hidden_size: int, num_layers: int) -> NextFlowForCausalLM:
    """A model that trains on a CPU."""
    torch.manual_seed(0)
    config = NextFlowConfig(
        text_vocab_size=TEXT,
        visual_codebook_size=CODES,
        vocab_size=TEXT + CODES,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=65_536,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        boi_token_id=BOI,
        eoi_token_id=EOI,
        image_token_id=MARK,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return NextFlowForCausalLM(config).train()


def train_step(model: NextFlowForCausalLM, batch: dict[str, torch.Tensor], clock: str) -> float:
    """Seconds of a forward and backward pass."""
    now = CLOCKS[clock]
    start = now()
    model(**batch, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=False)
    return now() - start


def predict_imbalances(samples: list[dict[str, Any]], num_ranks: int, batch_size: int, seed: int) -> dict[str, float]:
    """How much longer the costliest rank of a step takes than the mean, for the 7B."""
    lengths, costs = (sample_costs(samples, MARK, size) for size in (None, HIDDEN_SIZE_7B))
    # A padded rank computes on the longest sample's length, for each of its samples.
    step = batch_size * num_ranks
    batches = np.random.default_rng(seed).permutation(len(samples))[: len(samples) // step * step]
    imbalances = {"padded": rank_imbalance(costs[batches.reshape(-1, batch_size)].max(1), num_ranks)}
    for name, measure in (("length", lengths), ("compute", costs)):
        packs = make_packs(measure, 2 * measure.max(), num_ranks, seed)
        imbalances[name] = rank_imbalance([costs[pack].sum() for pack in packs], num_ranks)
    return imbalances


def padding(measure: np.ndarray, batch_size: int) -> float:
    """What shuffled samples cost in padded batches over what they cost alone; of lengths, slots a token."""
    batches = measure[: len(measure) // batch_size * batch_size].reshape(-1, batch_size)
    return float(batch_size * batches.max(1).sum() / batches.sum())


def draw_typical(
    options: argparse.Namespace, num_scales: dict[int, int]
) -> tuple[list[dict[str, Any]], tuple[float, float]]:
    """Samples to be timed: of several draws the one that padding makes as much longer as it does many samples.

    Also returns how many times the work padding makes of it, there and in the many, by the small model's costs.
    """

    def padded(samples: list[dict[str, Any]]) -> float:
        return padding(sample_costs(samples, MARK, options.hidden_size), options.batch_size)

    many = padded(draw_samples(np.random.default_rng(options.seed), options.samples, num_scales))
    draws = [
        draw_samples(np.random.default_rng([options.seed, index]), options.timed, num_scales)
        for index in range(options.draws)
    ]
    chosen = min(draws, key=lambda samples: abs(padded(samples) - many))
    return chosen, (padded(chosen), many)


def main(arguments: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--samples", type=int, default=4000, help="samples of the prediction")
    parser.add_argument("--timed", type=int, default=128, help="samples that are trained on")
    parser.add_argument("--draws", type=int, default=50, help="that the most typical samples are chosen from")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of a padded batch")
    parser.add_argument("--hidden-size", type=int, default=128, help="of the model that is timed")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=8, help="ranks of the prediction")
    parser.add_argument("--drop-scales", type=int, default=4, help="make timed images this many scales smaller")
    parser.add_argument("--runs", type=int, default=5, help="times that every way is timed, by turns")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu bears a busy machine")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.runs < 1 or options.draws < 1:
        parser.error("--runs and --draws must be at least 1")
    if options.samples < options.batch_size * options.ranks or options.timed < options.batch_size:
        parser.error("--samples must be at least --batch-size times --ranks, and --timed at least --batch-size")

    samples = draw_samples(np.random.default_rng(options.seed), options.samples, LEVELS)
    imbalances = predict_imbalances(samples, options.ranks, options.batch_size, options.seed)

    papers = [padding(sample_costs(samples, MARK, size), options.batch_size) for size in (None, HIDDEN_SIZE_7B)]
    smaller = {level: scales - options.drop_scales for level, scales in LEVELS.items()}
    samples, ours = draw_typical(options, smaller)
    lengths, costs = (sample_costs(samples, MARK, size) for size in (None, options.hidden_size))
    model = small_model(options.hidden_size, options.layers)
    order = np.arange(options.timed)
    steps = {
        "padded": [order[i : i + options.batch_size].tolist() for i in range(0, options.timed, options.batch_size)],
        "length": make_packs(lengths, 2 * lengths.max(), seed=options.seed),
        "compute": make_packs(costs, 2 * costs.max(), seed=options.seed),
    }
    collates = {name: NextFlowDataCollator(model.config, False, 0, packing=name != "padded") for name in steps}
    train_step(model, collates["padded"](samples[:1]), options.clock)  # warms up
    runs: list[dict[str, float]] = []  # seconds of every way
    for _ in range(options.runs):
        runs.append(dict.fromkeys(steps, 0.0))
        for number in range(max(map(len, steps.values()))):
            for name, batches in steps.items():
                if number < len(batches):
                    model.set_attn_implementation("sdpa" if name == "padded" else "sdpa_varlen")
                    batch = collates[name]([samples[index] for index in batches[number]])
                    runs[-1][name] += train_step(model, batch, options.clock)

    print(
        f"{options.timed} samples, mean {lengths.mean():.0f} and longest {lengths.max():.0f} tokens; model of "
        f"{options.layers} layers, width {options.hidden_size}; padded in batches of {options.batch_size}; "
        f"{options.ranks} ranks; {options.clock} seconds, median of {options.runs} runs\n"
    )
    print(
        f"Padded, a token takes {padding(lengths, options.batch_size):.2f} slots and {ours[0]:.2f} times the work by "
        f"the cost model; in {options.samples} samples of these sizes {ours[1]:.2f} times, and at the paper's sizes "
        f"{papers[0]:.2f} slots and {papers[1]:.2f} times the work of the 7B.\n"
    )
    tokens = {name: lengths.sum() / statistics.median(run[name] for run in runs) for name in steps}
    ratios = {name: sorted(run["padded"] / run[name] for run in runs) for name in steps}
    many = {name: tokens[name] / imbalances[name] for name in tokens}
    print("| way | steps | tokens/s | x padded | imbalance | tokens/s, a rank of many | x padded | paper | x padded |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name in steps:
        print(
            f"| {name} | {len(steps[name])} | {tokens[name]:.0f} | {statistics.median(ratios[name]):.2f} "
            f"({ratios[name][0]:.2f} to {ratios[name][-1]:.2f}) "
            f"| {imbalances[name]:.3f} | {many[name]:.0f} | {many[name] / many['padded']:.2f} | {PAPER[name]} "
            f"| {PAPER[name] / PAPER['padded']:.1f} |"
        )


if __name__ == "__main__":
    main()
