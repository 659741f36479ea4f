"""Do the tests see mistakes? Random ones are made in the code, one at a time, and the mirrored test files run on each.

    python tests/mutations/run.py --seed 0 --count 40 --jobs 2

The files are those of modeling, layout, decoding, sampling and losses, found by their names (`HOLDS`), so a renamed or
new one is found too. A mistake (mutate.py: another comparison, arithmetic, constant, condition, function, order of
arguments, a dropped statement) is written into a copy of the tree, never into the tree itself. Then
`test_golden.py` runs, and if that sees nothing, the file that mirrors the changed one; a failed test, an error of
import, or more CPU time than `--cpu-seconds` is a mistake that was caught. What survives is printed with its diff.
The three mistakes of `CASES` come first: they once went unseen. `--only 3` repeats one number of the list alone.

Every run is a fork of one process that has imported the libraries, so it costs what its tests cost. Not in CI: 40
mistakes take about half an hour on two quiet cores. Ends with 1 if fewer than nine tenths are caught.
"""

import argparse
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from mutate import Mutation, mutations_of
from places import PACKAGE, ROOT, cases, mirror_of, modules

GOLDEN = "tests/transformers_nextflow/test_golden.py"
WALL_SECONDS = 3600.0  # for what waits and computes nothing
MEMORY = 12 * 2**30


class Copy:
    """A copy of the tree in which one mutation at a time is tried."""

    def __init__(self, folder: Path):
        self.folder = folder
        ignored = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "runs", "site")
        shutil.copytree(ROOT, folder, ignore=ignored, symlinks=True)
        self.mutation: Mutation | None = None
        self.number, self.start = 0, 0.0

    def begin(self, number: int, mutation: Mutation | None, tests: list[str], cpu_seconds: int) -> int:
        """Forks a run of the tests; returns its process id."""
        self.number, self.mutation, self.start = number, mutation, time.monotonic()
        if mutation is not None:
            (self.folder / mutation.path.relative_to(ROOT)).write_text(mutation.applied(), encoding="utf-8")
        process = os.fork()
        if process == 0:
            self._test(tests, cpu_seconds)
        return process

    def end(self) -> str:
        """Takes the mutation back; returns what the run printed."""
        if self.mutation is not None:
            path = self.mutation.path
            shutil.copyfile(path, self.folder / path.relative_to(ROOT))
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")

    def _test(self, tests: list[str], cpu_seconds: int) -> None:
        code = 70
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(self.folder)
            os.environ["PYTHONPATH"] = str(self.folder / "src")
            sys.dont_write_bytecode = True
            sys.path[:] = [str(self.folder / "src"), *(p for p in sys.path if p != str(Path(__file__).parent))]
            import pytest

            options = ["-o", "addopts=", "-p", "no:cacheprovider", "-x", "-q", "--tb=line", "-W", "ignore"]
            code = int(pytest.main([*options, f"--basetemp={self.folder / 'tmp'}", *tests]))
        finally:
            sys.stdout.flush()
            os._exit(code)


def verdict(status: int, log: str) -> tuple[bool, str]:
    """Whether a run failed, and by what."""
    if os.WIFSIGNALED(status):
        return True, f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    if os.WEXITSTATUS(status) == 0:
        return False, ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", log, re.M)
    return True, failed[1].rpartition("/")[2] if failed else log.strip().splitlines()[-1] if log.strip() else "no log"


def preload() -> None:
    """What the tests import, but for the package: forks have it already."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    import datasets  # noqa: F401
    import diffusers  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import trl  # noqa: F401
    from transformers.models import qwen2_5_vl, siglip2

    # Lazy modules: naming a class imports it.
    qwen2_5_vl.Qwen2_5_VLForConditionalGeneration, siglip2.Siglip2VisionModel  # noqa: B018

    torch.set_num_threads(1)
    ours = [name for name in sys.modules if name.partition(".")[0] in ("transformers_nextflow", "diffusers_nextflow")]
    if ours:
        raise SystemExit(f"The libraries have imported {ours} already: a fork would test that and not its copy.")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=40, help="random mistakes (default 40)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--cpu-seconds", type=int, default=600, help="more is a hang (default 600)")
    parser.add_argument("--list", action="store_true", help="show the mistakes and run nothing")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the list to run")
    parser.add_argument("--no-baseline", action="store_true", help="trust that the tests pass on the tree as it is")
    options = parser.parse_args(arguments)

    every = [mutation for module in modules() for mutation in mutations_of(ROOT / module)]
    chosen = cases() + random.Random(options.seed).sample(every, options.count)
    todo = [(i, m) for i, m in enumerate(chosen) if options.only is None or i in options.only]
    print(f"{len(every)} mistakes fit into {len(modules())} files", flush=True)
    if options.list:
        for i, mutation in todo:
            print(f"\n#{i} {mutation.path.relative_to(ROOT)}:{mutation.line} {mutation.kind}\n{mutation.diff()}")
        return 0
    preload()
    touched = sorted({name for _, m in todo for name in mirror_of(m.path.relative_to(ROOT))})
    caught = 0
    with tempfile.TemporaryDirectory() as scratch:
        idle = [Copy(Path(scratch) / str(i)) for i in range(options.jobs)]
        busy: dict[int, Copy] = {}
        if not options.no_baseline:
            copy = idle[0]
            _, status = os.waitpid(copy.begin(-1, None, [GOLDEN, *touched], 10 * options.cpu_seconds), 0)
            log = copy.end()
            if verdict(status, log)[0]:
                print(log[-3000:])
                raise SystemExit("The tests fail on the tree as it is: mend that first.")
            print(f"the tests pass on the tree as it is ({time.monotonic() - copy.start:.0f} s)", flush=True)
        while todo or busy:
            while idle and todo:
                number, mutation = todo.pop(0)
                copy = idle.pop()
                tests = [GOLDEN, *mirror_of(mutation.path.relative_to(ROOT))]
                busy[copy.begin(number, mutation, tests, options.cpu_seconds)] = copy
            process, status = wait_for_any(busy)
            copy = busy.pop(process)
            failed, by = verdict(status, copy.end())
            mutation = copy.mutation
            assert mutation is not None
            caught += failed
            where = f"{mutation.path.relative_to(ROOT / PACKAGE)}:{mutation.line}"
            took = f"{time.monotonic() - copy.start:.0f} s"
            print(f"#{copy.number} {where} {mutation.kind}: {f'caught by {by}' if failed else 'SURVIVED'} ({took})")
            print("" if failed else f"{mutation.diff()}\n", end="", flush=True)
            idle.append(copy)
    total = len(cases()) + options.count if options.only is None else len(options.only)
    print(f"{caught} of {total} caught")
    return int(caught < 0.9 * total)


def wait_for_any(busy: dict[int, Copy]) -> tuple[int, int]:
    """The next run that ends; one that hangs is ended."""
    while True:
        for process, copy in busy.items():
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                return done, status
            if time.monotonic() - copy.start > WALL_SECONDS:
                os.killpg(process, signal.SIGKILL)
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
