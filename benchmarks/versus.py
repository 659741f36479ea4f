"""Two versions of the package side by side, by turns in one run: is a change slower?

    git worktree add ../before v0.1.0
    python benchmarks/versus.py ../before .                                  # nextflow-tiny, image and text
    python benchmarks/versus.py ../before . --pythons old/bin/python new/bin/python --hidden-size 512 --num-layers 8

Each version lives in a process of its own (with its own Python, for other versions of torch or transformers), makes the
same model from the same seed and runs the same calls. Rows are seconds of the first, of the second, and the median of
the ratios of neighbouring runs, first over second: 1 is as fast, below 1 is slower.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

WAYS = ("image", "batch", "no guidance", "text", "decoding")


def make_runs(hidden_size: int | None, num_layers: int) -> dict[str, Callable[[], object]]:
    """What is timed: in a worker, with the version of the package that it finds."""
    import torch

    from transformers_nextflow import NextFlowConfig, NextFlowForCausalLM, NextFlowProcessor, tiny_checkpoint

    processor = NextFlowProcessor.from_pretrained(tiny_checkpoint())
    model = NextFlowForCausalLM.from_pretrained(tiny_checkpoint(), dtype=torch.float32)
    if hidden_size is not None:
        config = model.config.to_dict() | {
            "hidden_size": hidden_size,
            "intermediate_size": 4 * hidden_size,
            "num_attention_heads": hidden_size // 64,
            "num_key_value_heads": max(1, hidden_size // 256),
            "num_hidden_layers": num_layers,
            "layer_types": None,
            "num_scales": 12,
        }
        torch.manual_seed(0)
        model = NextFlowForCausalLM(NextFlowConfig(**config))
    model.eval()
    one = processor("a red circle left of a blue square", return_tensors="pt")
    four = processor(["a red circle", "two green stars", "a cat", "a blue heart"], padding=True, return_tensors="pt")
    image = {"generation_mode": "image", "return_dict_in_generate": True}

    def draw(batch, **settings):
        return model.generate(**batch, **image, generator=torch.Generator().manual_seed(0), **settings)

    codes = draw(one, num_scales=8)
    return {
        "image": lambda: draw(one, guidance_scale=3.0),
        "batch": lambda: draw(four, guidance_scale=3.0),
        "no guidance": lambda: draw(one, guidance_scale=1.0),
        "text": lambda: model.generate(**one, max_new_tokens=24, eos_token_id=None),
        "decoding": lambda: processor.image_tokenizer.decode(codes.image_codes, codes.image_grid_shw),
    }


def work(hidden_size: int | None, num_layers: int, clock: str) -> None:
    """A worker: a line with the name of a way in, a line with seconds out."""
    runs = make_runs(hidden_size, num_layers)
    now = time.process_time if clock == "cpu" else time.perf_counter
    for line in sys.stdin:
        start = now()
        runs[line.strip()]()
        print(json.dumps(now() - start), flush=True)


def start(tree: Path, python: str, options: argparse.Namespace) -> subprocess.Popen:
    command = [python, __file__, "--worker", "--clock", options.clock, "--num-layers", str(options.num_layers)]
    if options.hidden_size is not None:
        command += ["--hidden-size", str(options.hidden_size)]
    environment = {**os.environ, "PYTHONPATH": str(tree.resolve() / "src")}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    )


def seconds(worker: subprocess.Popen, way: str) -> float:
    assert worker.stdin and worker.stdout
    worker.stdin.write(way + "\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("trees", nargs="*", type=Path, help="two checkouts")
    parser.add_argument("--pythons", nargs=2, default=[sys.executable] * 2, help="the interpreter of each")
    parser.add_argument(
        "--hidden-size", type=int, help="a random model of this width and 12 scales; else nextflow-tiny"
    )
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", default="cpu", choices=["cpu", "wall"])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.hidden_size, options.num_layers, options.clock)
    if len(options.trees) != 2:
        parser.error("give two checkouts: the one before and the one after a change")
    workers = [start(tree, python, options) for tree, python in zip(options.trees, options.pythons, strict=True)]
    print(f"{options.clock} seconds, medians of {options.repeats} runs by turns\n")
    print("| | before | after | before / after (min to max) |\n|---|---:|---:|---:|")
    for way in WAYS:
        for worker in workers:
            seconds(worker, way)  # one that does not count
        pairs = [[seconds(worker, way) for worker in workers] for _ in range(options.repeats)]
        ratios = [before / after for before, after in pairs]
        before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"| {way} | {before:.4f} | {after:.4f} | {spread} |", flush=True)
    for worker in workers:
        worker.terminate()


if __name__ == "__main__":
    main()
