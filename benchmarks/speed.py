"""Speed and memory: one command, one table of ratios, markdown and JSON. README.md says what each row means.

python benchmarks/speed.py                                       # everything, at sizes for two CPU cores
python benchmarks/speed.py roofline --num-layers 8 --dtype float32 bfloat16 --json rows.json --markdown rows.md
python benchmarks/speed.py --device cuda --dtype bfloat16 --hidden-size 3584 --num-layers 28
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable

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

# What two CPU cores measure five times in half an hour; options overrule it. Peers need layers enough that the head,
# which only ours has, is a small part.
NUM_LAYERS = {"roofline": 8, "growth": 2, "peers": 4, "memory": 4, "training": 2}
DTYPES = {"roofline": ["float32", "bfloat16"], "peers": ["bfloat16"]}
SIZES = {"memory": 512}
PARTS = ("floor", "roofline", "growth", "peers", "memory", "tokenizer", "start", "training")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)}; all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], help="a part's own by default"
    )
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--num-layers", type=int, help="a part's own by default, 2 to 8")
    parser.add_argument("--size", type=int, help="pixels a side of the largest image; 1024, and 512 for memory")
    parser.add_argument("--repeats", type=int, default=5, help="runs that medians are taken of")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: for a machine that others use")
    parser.add_argument("--json", help="file for the rows, written anew after each")
    parser.add_argument("--markdown", help="file for the table, written row by row")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.clock == "cpu" and options.device != "cpu":
        parser.error("--clock cpu counts this process's time and says nothing about a GPU")
    return options


def rows_of(options: argparse.Namespace, part: str, dtype: torch.dtype) -> Iterable[measure.Row]:
    size = options.size or SIZES.get(part, 1024)
    schedule = ScaleSchedule.from_size(size, size)
    model = (options.hidden_size, options.num_layers or NUM_LAYERS.get(part, 8), options.device, dtype)
    timed = (*model, options.repeats)
    parts: dict[str, Callable[[], Iterable[measure.Row]]] = {
        "floor": floor.measure,
        "roofline": lambda: roofline.measure(schedule, *timed),
        "growth": lambda: growth.measure(schedule, *timed),
        "peers": lambda: peers.measure(schedule, *timed),
        "memory": lambda: memory.measure(schedule, *timed),
        "tokenizer": lambda: tokenizer.measure(size, options.device, dtype, options.repeats),
        "start": lambda: start.measure(options.repeats),
        "training": lambda: training.measure(*timed),
    }
    return parts[part]()


def main():
    options = parse_options()
    measure.use_clock(options.clock)
    machine = f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, {options.clock} time"
    rows: list[dict] = []

    def write(text: str, mode: str = "a"):
        print(text, flush=True)
        if options.markdown:
            with open(options.markdown, mode) as file:
                file.write(text + "\n")

    write(f"{machine}, median of {options.repeats}\n", "w")
    write("| row | measured | beside | ratio | target |\n|---|---|---|---:|---|")
    for part in options.parts or PARTS:
        dtypes = options.dtype or DTYPES.get(part, ["float32"])
        for dtype in dtypes if part not in ("floor", "start") else dtypes[:1]:
            begin = time.perf_counter()
            for row in rows_of(options, part, getattr(torch, dtype)):
                write(row.markdown())
                rows.append({"part": part, "dtype": dtype, **row._asdict()})
                if options.json:  # after each row: a run that is cut short loses nothing
                    with open(options.json, "w") as file:
                        json.dump({"machine": machine, **vars(options), "rows": rows}, file, indent=1)
            print(f"{part}, {dtype}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
