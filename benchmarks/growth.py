"""Growth: seconds over image sizes and batches, beside what the cost model says."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from floor import Size, image_costs
from measure import PROMPT_LENGTH, Row, Spread, make_config, make_model, make_prompt, seconds
from predict import Machine
from roofline import draw

from transformers_nextflow import ScaleSchedule, aspect_buckets

BUCKET_ROUNDS = 3
SQUARE_EVERY = 10  # buckets, after which the square is drawn again


def size_of(config) -> Size:
    """A model's numbers."""
    return Size(
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.visual_codebook_size,
    )


def growth_of_buckets(
    buckets: list[ScaleSchedule], square: int, drawing: Callable[[ScaleSchedule, int], float], machine: Machine
) -> tuple[list[float], list[float]]:
    """Seconds of every bucket over those of the square, measured and predicted; the square is drawn in between."""
    times, predicted, squares = [], [], []
    for i, bucket in enumerate(buckets):
        if i % SQUARE_EVERY == 0:
            squares.append(drawing(buckets[square], 1))
        predicted.append(machine.image(bucket, PROMPT_LENGTH))
        times.append(drawing(bucket, 1))
    of_square = statistics.median([*squares, times[square]])
    return [spent / of_square for spent in times], [spent / predicted[square] for spent in predicted]


def measure(
    schedule: ScaleSchedule, hidden_size: int, num_layers: int, device: str, dtype: torch.dtype, repeats: int
) -> Iterator[Row]:
    """Seconds over those of the smallest case, measured and predicted, round by round; then over the aspects."""
    config = make_config(hidden_size, num_layers)
    model, size = make_model(config, device, dtype), size_of(config)
    machine = Machine(size, device, dtype, repeats=min(repeats, 3))
    small = schedule.prefix(min(12, schedule.num_scales))
    cases = [(small, 1), (schedule.prefix(min(16, schedule.num_scales)), 1), (schedule, 1)]
    cases += [(small, batch) for batch in (2, 4, 8)]
    first, *others = dict.fromkeys(cases)
    middle = len(others) // 2
    # All is divided by the smallest case, so each round has it three times.
    turns = [first, *others[:middle], first, *others[middle:], first]
    buckets = [ScaleSchedule(bucket, small.num_scales) for bucket in aspect_buckets()]

    def drawing(drawn: ScaleSchedule, batch: int) -> float:
        prompt = make_prompt(batch, device)
        return seconds(lambda: draw(model, prompt, drawn), device)

    def flops(drawn: ScaleSchedule, batch: int = 1) -> float:
        return sum(cost.flops for cost in image_costs(size, drawn, True, batch, dtype.itemsize))

    draw(model, make_prompt(1, device), small)  # warms up
    rounds: list[tuple[dict, dict]] = []
    bucket_rounds: list[tuple[list[float], list[float]]] = []
    for turn in range(repeats):  # pictures and bare operations by turns
        machine.forget()
        measured, counted = defaultdict(list), {}
        for case in turns:
            counted[case] = machine.image(case[0], PROMPT_LENGTH, case[1])
            measured[case].append(drawing(*case))
        rounds.append(({case: statistics.median(times) for case, times in measured.items()}, counted))
        if turn < BUCKET_ROUNDS:
            bucket_rounds.append(growth_of_buckets(buckets, buckets.index(small), drawing, machine))

    model_name = f"{num_layers} layers, {dtype}".replace("torch.", "")
    for case in others:
        drawn, batch = case
        spent, by_count = (statistics.median(of_round[i][case] for of_round in rounds) for i in range(2))
        growth = Spread.of([measured[case] / measured[first] for measured, _ in rounds])
        expected = statistics.median(counted[case] / counted[first] for _, counted in rounds)
        ratio = statistics.median(
            measured[case] / measured[first] / (counted[case] / counted[first]) for measured, counted in rounds
        )
        yield Row(
            f"growth to {drawn.height} x {drawn.width}, batch {batch}, {model_name}: {spent:.3g} s, {by_count:.3g} "
            "predicted",
            f"{growth} times",
            f"{expected:.3g} predicted, {flops(*case) / flops(*first):.3g} by FLOPs",
            ratio,
            "0.9 to 1.1",
        )
    measured, counted = (
        [statistics.median(values) for values in zip(*of_rounds, strict=True)]
        for of_rounds in zip(*bucket_rounds, strict=True)
    )
    ratios = Spread.of([ours / expected for ours, expected in zip(measured, counted, strict=True)])
    by_flops = Spread.of([flops(bucket) / flops(small) for bucket in buckets])
    yield Row(
        f"growth from the square to the {len(buckets)} aspect buckets, {small.num_scales} scales, batch 1, "
        f"{model_name}: ratios {ratios.low:.3g} to {ratios.high:.3g}",
        f"{Spread.of(measured)} times",
        f"{Spread.of(counted)} predicted, {by_flops} by FLOPs",
        ratios.median,
        "0.9 to 1.1",
    )
