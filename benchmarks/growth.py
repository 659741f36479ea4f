"""Growth: seconds over image sizes and batches, beside what the cost model says."""

import statistics

import torch
from floor import Cost, Size, image_costs
from measure import Rates, Row, alternate, make_config, make_model, make_prompt, measure_rates
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


def predict(costs: list[Cost], rates: Rates) -> float:
    """Seconds of some steps at a machine's own rates: as long as their FLOPs or their bytes take."""
    return sum(
        max((cost.linear + cost.head) / rates.linear + cost.attention / rates.attention, cost.bytes / rates.bandwidth)
        for cost in costs
    )


def measure(
    schedule: ScaleSchedule, hidden_size: int, num_layers: int, device: str, dtype: torch.dtype, repeats: int
) -> list[Row]:
    """Seconds over those of the smallest case, measured and predicted."""
    config = make_config(hidden_size, num_layers)
    model, rates = make_model(config, device, dtype), measure_rates(hidden_size, device, dtype, repeats)
    small = schedule.prefix(min(12, schedule.num_scales))
    cases = {(small, 1): "", (schedule.prefix(min(16, schedule.num_scales)), 1): "", (schedule, 1): ""}
    cases |= {(small, batch): "" for batch in (2, 4, 8)}
    runs = {case: lambda case=case: draw(model, make_prompt(case[1], device), case[0]) for case in cases}
    runs[small, 1]()
    times = {case: statistics.median(values) for case, values in alternate(runs, repeats, device).items()}
    predicted = {
        (drawn, batch): predict(image_costs(size_of(config), drawn, True, batch, dtype.itemsize), rates)
        for drawn, batch in cases
    }
    first = (small, 1)
    rows = []
    for drawn, batch in cases:
        if (drawn, batch) == first:
            continue
        growth = times[drawn, batch] / times[first]
        expected = predicted[drawn, batch] / predicted[first]
        name = f"growth to {drawn.height} x {drawn.width}, batch {batch}, {dtype}".replace("torch.", "")
        rows.append(Row(name, f"{growth:.3g} times", f"{expected:.3g} by FLOPs", growth / expected, "0.9 to 1.1"))
    return rows
