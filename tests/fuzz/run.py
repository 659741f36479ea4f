"""Thousands of calls through every door, and a table of what is wrong with them.

    python tests/fuzz/run.py --examples 100000 --jobs 2 [--doors generate processor] [--seed 0]

A call may return something sane or raise a clear ValueError or TypeError (judge.py). Everything else is counted by
kind, door and place, with one case of each: hangs, memory above the limit, wrong results, nonsense that was accepted,
unclear errors. Ends with 1 if any but unclear errors were found, or more than 0.5 % of those. The calls are shared out
so that each door gets about the same time. Every job is a fork; one that dies (a crash, or a hang inside C) is reported
with its door, and the next share goes on.
"""

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parents[1]))

from doors import DOORS, Door, World
from hypothesis import given, seed, settings
from judge import GENERATE, GRAVE, judge

from conftest import save_tiny_random_checkpoint
from forks import fork, limit_memory

SHARE = 500  # calls of a fork
MEMORY = 4 * 2**30


def try_door(door: Door, world: World, number: int, first: int, report: Path) -> None:
    """So many cases of a door; writes the findings."""
    limit_memory(MEMORY)
    resource.setrlimit(resource.RLIMIT_CPU, (3600, 3600))
    findings: dict[tuple[str, str], list] = {}
    calls = 0

    @seed(first)
    @settings(
        max_examples=number,
        **GENERATE,
    )
    @given(case=door.cases)
    def try_all(case):
        nonlocal calls
        calls += 1
        if finding := judge(door, world, case):
            entry = findings.setdefault((finding.kind, finding.what), [0, finding.case])
            entry[0] += 1

    try_all()
    report.write_text(json.dumps({"calls": calls, "findings": [[*key, *entry] for key, entry in findings.items()]}))


def shares(doors: list[Door], examples: int, first_seed: int) -> list[tuple[Door, int, int]]:
    """`(door, calls, seed)` of every fork. A cheap door gets more calls, up to ten times those of the dearest."""
    weights = {door.name: 1 / max(door.cost, 2.0) for door in doors}
    total = sum(weights.values())
    work = []
    for door in doors:
        left = round(examples * weights[door.name] / total)
        while left > 0:
            work.append((door, min(left, SHARE), first_seed + len(work)))
            left -= SHARE
    return work


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=int(os.environ.get("FUZZ_EXAMPLES", 10_000)))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--doors", nargs="+", choices=[door.name for door in DOORS], help="some only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3600, help="no fork begins after so long (default 3600)")
    options = parser.parse_args(arguments)
    doors = [door for door in DOORS if options.doors is None or door.name in options.doors]

    found: Counter[tuple[str, str, str]] = Counter()
    example: dict[tuple[str, str, str], str] = {}
    calls: Counter[str] = Counter()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "checkpoint").mkdir()
        world = World(save_tiny_random_checkpoint(scratch / "checkpoint"), scratch)
        work, busy = shares(doors, options.examples, options.seed), {}
        random.Random(options.seed).shuffle(work)  # a run that is cut short has seen all doors
        while work or busy:
            if time.monotonic() - begin > options.seconds:
                work = []
            while work and len(busy) < options.jobs:
                door, number, first = work.pop(0)
                own = scratch / f"job{first}"
                own.mkdir()

                def job(door=door, number=number, first=first, own=own):
                    world.scratch = own
                    try_door(door, world, number, first, own / "report.json")

                busy[fork(job, own / "log")] = (door, own)
            process, _ = os.wait()
            door, own = busy.pop(process)
            if (own / "report.json").exists():
                report = json.loads((own / "report.json").read_text())
            else:
                log = (own / "log").read_text(errors="replace").strip().splitlines() or [""]
                report = {"calls": 1, "findings": [["hang", f"the process died: {log[-1]}", 1, "\n".join(log[-40:])]]}
            calls[door.name] += report["calls"]
            for kind, what, count, case in report["findings"]:
                found[kind, door.name, what] += count
                example.setdefault((kind, door.name, what), case)
    total = calls.total()
    seconds = time.monotonic() - begin
    print(f"{total} calls in {seconds:.0f} s: " + ", ".join(f"{name} {number}" for name, number in calls.items()))
    kinds: Counter[str] = Counter()
    for (kind, door_name, what), count in sorted(found.items(), key=lambda item: (item[0][0], -item[1])):
        kinds[kind] += count
        print(f"{kind} | {door_name} | {count} | {what} | {example[kind, door_name, what][:300]}")
    print(", ".join(f"{kind}: {count}" for kind, count in kinds.items()) or "nothing found")
    return int(any(kinds[kind] for kind in GRAVE) or kinds["unclear"] > 0.005 * total)


if __name__ == "__main__":
    sys.exit(main())
