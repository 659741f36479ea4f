"""Memory: the peak of a generation beside weights, cache and the activations of one scale."""

import argparse
import json
from collections.abc import Iterator

import torch
from measure import (
    PROMPT_LENGTH,
    Row,
    Spread,
    in_a_process,
    make_config,
    make_model,
    make_prompt,
    peak_bytes,
    resident_bytes,
)
from roofline import draw

from transformers_nextflow import ScaleSchedule

CACHES = ("preallocated", "quantized", "dynamic")
# glibc keeps freed memory, tens of megabytes of it and other ones in every run, which nobody holds. With this it gives
# large pieces back at once, and the peak is what was in use.
TIDY = {"MALLOC_MMAP_THRESHOLD_": str(4 * 2**20)}


def cache_bytes(config, schedule: ScaleSchedule, itemsize: int, rows: int = 2) -> int:
    """Keys and values of all scales but the last, which are kept, and one layer's of all, which attention reads."""
    vector = 2 * rows * config.num_key_value_heads * 128 * itemsize
    kept = PROMPT_LENGTH + schedule.offsets[-2]
    return vector * (config.num_hidden_layers * kept) + vector // rows * (PROMPT_LENGTH + schedule.num_tokens)


def activation_bytes(config, schedule: ScaleSchedule, itemsize: int, rows: int = 2) -> int:
    """The last scale: input and output of all rows, and the widest place of a layer for the rows that run together."""
    length, hidden, inter = schedule.scale_lengths[-1], config.hidden_size, config.intermediate_size
    at_once = max(1, min(rows, 4096 // length)) * length
    states = 2 * rows * length * hidden
    layer = at_once * (2 * hidden + 3 * inter)
    return (states + layer) * itemsize


def measure(
    schedule: ScaleSchedule, hidden_size: int, num_layers: int, device: str, dtype: torch.dtype, repeats: int
) -> Iterator[Row]:
    """Peak over the formula, for our cache; peak over that of our cache for others, and for glibc left to itself."""
    if device != "cpu":
        return
    sizes = ["--size", str(schedule.height), "--hidden-size", str(hidden_size), "--num-layers", str(num_layers)]
    sizes += ["--dtype", str(dtype).removeprefix("torch.")]

    def peak(cache: str, environment: dict[str, str]) -> tuple[Spread, dict[str, float]]:
        runs = [in_a_process("memory.py", *sizes, "--cache", cache, **environment) for _ in range(repeats)]
        return Spread.of([run.pop("peak") / 1e6 for run in runs]), {key: value / 1e6 for key, value in runs[0].items()}

    name = f"{schedule.height} x {schedule.width}, {num_layers} layers of {hidden_size}, {dtype}".replace("torch.", "")
    ours, parts = peak("preallocated", TIDY)
    beside = ", ".join(f"{key} {size:.0f}" for key, size in parts.items())
    yield Row(f"peak memory, {name}", f"{ours} MB", beside, ours.median / sum(parts.values()), "<= 1.15")
    others = {f"peak with the {cache} cache": (cache, TIDY) for cache in CACHES[1:]}
    others["peak with what glibc keeps by default"] = ("preallocated", {})
    for name, settings in others.items():
        found, _ = peak(*settings)
        yield Row(name, f"{found} MB", f"{ours.median:.0f} MB", found.median / max(ours.median, 1e-6))


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--hidden-size", type=int, required=True)
    parser.add_argument("--num-layers", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--cache", choices=CACHES, required=True)
    options = parser.parse_args()
    dtype, schedule = getattr(torch, options.dtype), ScaleSchedule.from_size(options.size, options.size)
    # What the libraries take, with everything that a first picture loads, is not counted.
    draw(make_model(make_config(256, 1), "cpu", dtype), make_prompt(1, "cpu"), ScaleSchedule(num_scales=4))
    before = resident_bytes()
    config = make_config(options.hidden_size, options.num_layers)
    model = make_model(config, "cpu", dtype)
    draw(model, make_prompt(1, "cpu"), schedule, cache_implementation=options.cache)
    result = {
        "peak": peak_bytes() - before,
        "weights": sum(p.nbytes for p in model.parameters()),
        "cache": cache_bytes(config, schedule, dtype.itemsize),
        "activations": activation_bytes(config, schedule, dtype.itemsize),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
