"""Roofline: how much of an image's time is the linear layers' and attentions' own, and at what rate they run."""

from functools import partial

import torch
from measure import Bare, Breakdown, Row, Spread, make_config, make_model, make_prompt, seconds

from transformers_nextflow import ScaleSchedule

SETTINGS = {"guidance_scale": 5.0, "image_top_k": 2, "image_top_p": 0.9}


def draw(model, prompt: torch.Tensor, schedule: ScaleSchedule, **settings):
    model.generate(
        prompt,
        generation_mode="image",
        height=schedule.height,
        width=schedule.width,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompt))],
        **{**SETTINGS, **settings},
    )


def measure(
    schedule: ScaleSchedule, hidden_size: int, num_layers: int, device: str, dtype: torch.dtype, repeats: int
) -> list[Row]:
    """Rates and shares of one schedule, with guidance."""
    model = make_model(make_config(hidden_size, num_layers), device, dtype)
    prompt = make_prompt(1, device)
    draw(model, prompt, ScaleSchedule(num_scales=8))  # warms up
    runs: list[tuple[float, Breakdown]] = []
    alone: dict[str, list[float]] = {"linear": [], "attention": []}
    for _ in range(repeats):  # by turns: the whole, and its linear layers and attentions alone
        with Breakdown(device) as parts:
            whole = seconds(lambda: draw(model, prompt, schedule), device)
        runs.append((whole, parts))
        bare = Bare(parts.calls, num_layers, device, dtype)
        alone["linear"].append(seconds(partial(bare.run, "linear"), device))
        alone["attention"].append(seconds(partial(bare.run, "attention"), device))

    name = f"{schedule.height} x {schedule.width}, {num_layers} layers of {hidden_size}, {dtype}".replace("torch.", "")
    rows = []
    targets = {"linear": ">= 0.88", "attention": ">= 0.95"}
    for kind, times in alone.items():
        flops = sum(call.flops for call in runs[0][1].calls if call.kind == kind)
        ratio = Spread.of([bare_time / parts.seconds[kind] for bare_time, (_, parts) in zip(times, runs, strict=True)])
        own = Spread.of([parts.seconds[kind] for _, parts in runs])
        rows.append(
            Row(
                f"{name}: {kind}",
                f"{flops / own.median / 1e9:.0f} GFLOP/s",
                f"{flops / Spread.of(times).median / 1e9:.0f} GFLOP/s alone",
                ratio.median,
                targets[kind],
            )
        )
    rest = Spread.of([1 - (p.seconds["linear"] + p.seconds["attention"]) / whole for whole, p in runs])
    total = Spread.of([whole for whole, _ in runs])
    rows.append(Row(f"{name}: the rest", f"{rest} of the time", f"{total.median:.3g} s in all", rest.median, "<= 0.12"))
    whole, parts = runs[-1]
    others = {key: spent for key, spent in parts.seconds.items() if key.startswith("other")}
    others["Python"] = whole - sum(parts.seconds.values())
    for key, spent in sorted(others.items(), key=lambda item: -item[1])[:8]:
        rows.append(Row(f"{name}: {key}", f"{spent:.3g} s", f"{whole:.3g} s in all", spent / whole))
    if parts.masked:
        rows.append(Row(f"{name}: attentions with a mask", str(parts.masked), f"{len(parts.calls)} calls", 0.0, "0"))
    return rows
