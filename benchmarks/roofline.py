"""Roofline: how much of an image's time is the linear layers' and attentions' own, and at what rate they run.

And where in the code the time goes, part by part.
"""

from collections.abc import Callable
from functools import partial

import torch
from measure import Bare, Breakdown, Functions, Parts, Row, Spread, make_config, make_model, make_prompt, seconds

from transformers_nextflow import NextFlowImageTokenizer, ScaleSchedule, decoding, tiny_checkpoint
from transformers_nextflow.scale_cache import ScaleCacheLayer

SETTINGS = {"guidance_scale": 5.0, "image_top_k": 2, "image_top_p": 0.9}


def draw(model, prompt: torch.Tensor, schedule: ScaleSchedule, **settings):
    model.generate(
        prompt,
        generation_mode="image",
        # Below 12 scales several buckets end at one grid, so a size alone would not tell them apart.
        height=schedule.bucket[0],
        width=schedule.bucket[1],
        num_scales=schedule.num_scales,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompt))],
        **{**SETTINGS, **settings},
    )


def parts_of(model) -> Functions:
    """What does the parts of image generation."""
    inner = model.model
    return {
        "transformer (layers, last norm, rotary embedding)": [
            (module, "forward") for module in (*inner.layers, inner.norm, inner.rotary_emb)
        ],
        "head and sampling": [
            (model, "_visual_head"),
            (decoding, "draw_codes"),
            (decoding, "draw_seeds"),
        ],
        "upsampling and connector": [(inner, "_features")],
        "cache writes": [(ScaleCacheLayer, "update"), (ScaleCacheLayer, "update_rows")],
    }


def make_decoding(schedule: ScaleSchedule, device: str, dtype: torch.dtype) -> Callable[[], object]:
    """Codes to pixels, by nextflow-tiny's image tokenizer with as many scales as the schedule has."""
    tokenizer = NextFlowImageTokenizer.from_pretrained(tiny_checkpoint(), subfolder="image_tokenizer", dtype=dtype)
    tokenizer.config.num_scales = schedule.num_scales
    tokenizer = tokenizer.to(device).eval()
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(tokenizer.config.codebook_size, (1, schedule.num_tokens), generator=generator).to(device)
    return lambda: tokenizer.decode(codes, torch.tensor([schedule.grid_shw]))


def rows_of_parts(name: str, runs: list[tuple[float, Parts]], decoding: list[float]) -> list[Row]:
    """Seconds and shares of the parts: of `generate` and of the decoding after it, together."""
    spent = [dict(parts.seconds) for _, parts in runs]
    for (whole, _), of_run, decoded in zip(runs, spent, decoding, strict=True):
        of_run["Python and all else"] = whole - sum(of_run.values())
        of_run["image decoding (image tokenizer of nextflow-tiny)"] = decoded
    totals = [sum(of_run.values()) for of_run in spent]
    rows = []
    for part in spent[0]:
        share = Spread.of([of_run[part] / total for of_run, total in zip(spent, totals, strict=True)])
        of_part = Spread.of([of_run[part] for of_run in spent])
        beside = f"{Spread.of(totals).median:.3g} s with image decoding"
        rows.append(Row(f"{name}: part: {part}", f"{of_part} s", beside, share.median))
    return rows


def measure(
    schedule: ScaleSchedule, hidden_size: int, num_layers: int, device: str, dtype: torch.dtype, repeats: int
) -> list[Row]:
    """Rates and shares of one schedule, with guidance."""
    model = make_model(make_config(hidden_size, num_layers), device, dtype)
    prompt = make_prompt(1, device)
    decode = make_decoding(schedule, device, dtype)
    draw(model, prompt, ScaleSchedule(num_scales=8))  # warms up
    decode()
    runs: list[tuple[float, Breakdown]] = []
    by_part: list[tuple[float, Parts]] = []
    decoding: list[float] = []
    alone: dict[str, list[float]] = {"linear": [], "attention": []}
    for _ in range(repeats):  # by turns: the whole, and its linear layers and attentions alone
        with Breakdown(device) as parts, Parts(parts_of(model), device) as code:
            whole = seconds(lambda: draw(model, prompt, schedule), device)
        runs.append((whole, parts))
        by_part.append((whole, code))
        decoding.append(seconds(decode, device))
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
    rows += rows_of_parts(name, by_part, decoding)
    whole, parts = runs[-1]
    others = {key: spent for key, spent in parts.seconds.items() if key.startswith("other")}
    others["Python"] = whole - sum(parts.seconds.values())
    for key, spent in sorted(others.items(), key=lambda item: -item[1])[:8]:
        rows.append(Row(f"{name}: {key}", f"{spent:.3g} s", f"{whole:.3g} s in all", spent / whole))
    if parts.masked:
        attentions = sum(call.kind == "attention" for call in parts.calls)
        share = parts.masked / attentions
        rows.append(Row(f"{name}: attentions with a mask", str(parts.masked), f"{attentions} attentions", share))
    return rows
