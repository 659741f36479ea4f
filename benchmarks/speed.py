"""Speed and memory: one command, one table of ratios, markdown and JSON. README.md says what each row means.

python benchmarks/speed.py                                       # everything, at sizes for two CPU cores
python benchmarks/speed.py roofline --num-layers 8 --dtype float32 bfloat16
python benchmarks/speed.py --device cuda --dtype bfloat16 --hidden-size 3584 --num-layers 28
"""

import argparse
import json
from collections.abc import Callable

import floor
import growth
import measure
import memory
import peers
import roofline
import start
import tokenizer
import torch
import training

from transformers_nextflow import ScaleSchedule

PARTS = ("floor", "roofline", "growth", "peers", "memory", "tokenizer", "start", "training")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)}; all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--size", type=int, default=1024, help="pixels a side of the largest image")
    parser.add_argument("--repeats", type=int, default=5, help="runs that medians are taken of")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: for a machine that others use")
    parser.add_argument("--json", help="file for the rows, too")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.clock == "cpu" and options.device != "cpu":
        parser.error("--clock cpu counts this process's time and says nothing about a GPU")
    return options


def rows_of(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Callable[[], list[measure.Row]]]:
    schedule = ScaleSchedule.from_size(options.size, options.size)
    model = (options.hidden_size, options.num_layers, options.device, dtype)
    timed = (*model, options.repeats)
    return {
        "floor": floor.measure,
        "roofline": lambda: roofline.measure(schedule, *timed),
        "growth": lambda: growth.measure(schedule, *timed),
        "peers": lambda: peers.measure(schedule, *timed),
        "memory": lambda: memory.measure(schedule, *model),
        "tokenizer": lambda: tokenizer.measure(options.size, options.device, dtype, options.repeats),
        "start": lambda: start.measure(options.repeats),
        "training": lambda: training.measure(*timed),
    }


def main():
    options = parse_options()
    measure.use_clock(options.clock)
    print(
        f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, {options.clock} time, ",
        end="",
    )
    print(f"median of {options.repeats}\n\n| row | measured | beside | ratio | target |\n|---|---|---|---:|---|")
    rows = []
    for part in options.parts or PARTS:
        dtypes = options.dtype if part not in ("floor", "start") else options.dtype[:1]
        for dtype in dtypes:
            for row in rows_of(options, getattr(torch, dtype))[part]():
                print(row.markdown(), flush=True)
                rows.append({"part": part, **row._asdict()})
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"torch": torch.__version__, **vars(options), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
