"""Growth: seconds over image sizes and batches, beside what the cost model says."""

import statistics
from collections import defaultdict
from collections.abc import Iterator

import torch
from floor import Size
from measure import PROMPT_LENGTH, Row, make_config, make_model, make_prompt, seconds
from predict import Machine
from roofline import draw

from transformers_nextflow import ScaleSchedule


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


def measure(
    schedule: ScaleSchedule, hidden_size: int, num_layers: int, device: str, dtype: torch.dtype, repeats: int
) -> Iterator[Row]:
    """Seconds over those of the smallest case, measured and predicted."""
    config = make_config(hidden_size, num_layers)
    model = make_model(config, device, dtype)
    machine = Machine(size_of(config), device, dtype, repeats=min(repeats, 3))
    small = schedule.prefix(min(12, schedule.num_scales))
    cases = [(small, 1), (schedule.prefix(min(16, schedule.num_scales)), 1), (schedule, 1)]
    cases += [(small, batch) for batch in (2, 4, 8)]
    first, *others = dict.fromkeys(cases)
    draw(model, make_prompt(1, device), small)  # warms up
    measured, counted = defaultdict(list), defaultdict(list)
    for _ in range(repeats):  # pictures and bare operations by turns
        machine.forget()
        for drawn, batch in (first, *others):
            counted[drawn, batch].append(machine.image(drawn, PROMPT_LENGTH, batch))
            measured[drawn, batch].append(seconds(lambda: draw(model, make_prompt(batch, device), drawn), device))  # noqa: B023
    times, predicted = ({case: statistics.median(v) for case, v in d.items()} for d in (measured, counted))
    for drawn, batch in others:
        growth = times[drawn, batch] / times[first]
        expected = predicted[drawn, batch] / predicted[first]
        name = f"growth to {drawn.height} x {drawn.width}, batch {batch}, {num_layers} layers, {dtype}"
        yield Row(
            f"{name}: {times[drawn, batch]:.3g} s, {predicted[drawn, batch]:.3g} predicted".replace("torch.", ""),
            f"{growth:.3g} times",
            f"{expected:.3g} by FLOPs",
            growth / expected,
            "0.9 to 1.1",
        )
