"""What the rows of `speed.py` share: models, clocks, the rate of bare operations, and the peak of a process."""

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from transformers_nextflow import NextFlowConfig, NextFlowForCausalLM

# Set by `speed.py --clock`. CPU time, with one thread, is fair on a machine that others use; a GPU needs wall time.
clock = time.perf_counter

PROMPT_LENGTH = 100  # as in the paper's cost model
TEXT_VOCAB = 1024  # the text rows of the head are never multiplied in image mode, so a small vocabulary changes nothing


def make_config(hidden_size: int = 1024, num_layers: int = 8, codebook_size: int = 32768, **kwargs) -> NextFlowConfig:
    """Random model with heads of 128 whose linear layers cost `12 * hidden_size**2` multiplications a token."""
    heads = hidden_size // 128
    settings = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": round(hidden_size * 8 / 3 / 128) * 128,
        "vocab_size": TEXT_VOCAB + codebook_size,
        "text_vocab_size": TEXT_VOCAB,
        "visual_codebook_size": codebook_size,
        "boi_token_id": 1,
        "eoi_token_id": 2,
        "image_token_id": 3,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 4,
    }
    return NextFlowConfig(**{**settings, **kwargs})


def make_model(config: NextFlowConfig, device: str, dtype: torch.dtype) -> NextFlowForCausalLM:
    torch.manual_seed(0)
    with torch.device(device):
        return NextFlowForCausalLM(config).to(dtype).eval()


def make_prompt(batch_size: int, device: str, length: int = PROMPT_LENGTH) -> torch.Tensor:
    """Token ids `(batch_size, length)` that end with `<boi>`."""
    ids = torch.randint(8, TEXT_VOCAB, (batch_size, length), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 1
    return ids.to(device)


def use_clock(name: str):
    """`"wall"`, or `"cpu"` for the time that this process gets."""
    global clock
    clock = time.process_time if name == "cpu" else time.perf_counter


def synchronize(device: str):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: str) -> float:
    """Wall time of one call."""
    synchronize(device)
    start = clock()
    run()
    synchronize(device)
    return clock() - start


class Spread(NamedTuple):
    """Median and range of a few runs; of one run, its value alone."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self):
        if self.low == self.high:
            return f"{self.median:.3g}"
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def alternate(runs: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of every run, each `repeats` times, by turns: what else the machine does hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return times


class Call(NamedTuple):
    """Arguments' shapes of one linear layer (input, weight) or attention (query, key; no mask)."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def flops(self) -> int:
        first, second = self.shapes
        rows = 1
        for size in first[:-1]:
            rows *= size
        if self.kind == "linear":
            return 2 * rows * second[0] * second[1]
        return 4 * rows * second[-2] * second[-1]


class Breakdown(TorchFunctionMode):
    """Times every torch function of a run: linear layers, attention, and all else, in seconds by name.

    `calls` are the linear layers and attentions in their order, to be repeated bare.
    """

    KINDS = {F.linear: "linear", F.scaled_dot_product_attention: "attention"}

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: list[Call] = []
        self.masked = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        synchronize(self.device)
        start = clock()
        result = func(*args, **kwargs)
        synchronize(self.device)
        kind = self.KINDS.get(func)
        self.seconds[kind or f"other: {getattr(func, '__name__', func)}"] += clock() - start
        if kind is not None:
            self.calls.append(Call(kind, (tuple(args[0].shape), tuple(args[1].shape))))
            self.masked += kwargs.get("attn_mask") is not None
        return result


# Functions by the part of the code that they do, each as its owner and its name there.
Functions = dict[str, list[tuple[Any, str]]]


class Parts:
    """Times parts of the code by wrapping their functions, each without the parts inside it: in seconds by name."""

    def __init__(self, functions: Functions, device: str):
        self.functions, self.device = functions, device
        self.seconds: dict[str, float] = dict.fromkeys(functions, 0.0)
        self.inside: list[float] = []  # of each part that is open: what the parts inside it took
        self.patches = ExitStack()

    def timed(self, function: Callable, part: str) -> Callable:
        @functools.wraps(function)
        def run(*args, **kwargs):
            synchronize(self.device)
            start = clock()
            self.inside.append(0.0)
            result = function(*args, **kwargs)
            synchronize(self.device)
            spent = clock() - start
            self.seconds[part] += spent - self.inside.pop()
            if self.inside:
                self.inside[-1] += spent
            return result

        return run

    def __enter__(self):
        for part, places in self.functions.items():
            for owner, name in places:
                self.patches.enter_context(patch.object(owner, name, self.timed(getattr(owner, name), part)))
        return self

    def __exit__(self, *error):
        self.patches.close()


class Bare:
    """The linear layers and attentions of a run, and nothing else: what the rates are measured with.

    Weights are as many as the model has, so that caches are as cold as in the run.
    """

    def __init__(self, calls: list[Call], num_layers: int, device: str, dtype: torch.dtype):
        self.calls = calls
        self.weights: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for call in calls:
            if call.kind == "linear" and call.shapes[1] not in self.weights:
                count = sum(call.shapes == other.shapes for other in calls)
                made = [torch.randn(call.shapes[1], device=device) for _ in range(min(count, num_layers))]
                self.weights[call.shapes[1]] = [weight.to(dtype) for weight in made]
        largest = max(max(torch.Size(shape).numel() for shape in call.shapes) for call in calls)
        self.pool = torch.randn(largest, device=device).to(dtype)

    def of_pool(self, shape: tuple[int, ...]) -> torch.Tensor:
        return self.pool[: torch.Size(shape).numel()].view(shape)

    @torch.no_grad()
    def run(self, kind: str):
        turn = 0
        for call in self.calls:
            if call.kind != kind:
                continue
            if kind == "linear":
                weights = self.weights[call.shapes[1]]
                F.linear(self.of_pool(call.shapes[0]), weights[turn % len(weights)])
                turn += 1
            else:
                batch, heads, length, width = call.shapes[0]
                # Queries come out of a linear layer: (batch, length, heads, width) in memory.
                query = self.of_pool((batch, length, heads, width)).transpose(1, 2)
                key = self.of_pool(call.shapes[1])
                F.scaled_dot_product_attention(query, key, key, enable_gqa=heads != key.shape[1])


class Row(NamedTuple):
    """A line of the table: something measured beside what it is compared with."""

    name: str
    measured: str
    beside: str
    ratio: float
    target: str = ""

    def markdown(self) -> str:
        return f"| {self.name} | {self.measured} | {self.beside} | {self.ratio:.3g} | {self.target} |"


class Rates(NamedTuple):
    """What this machine does with bare operations of one dtype: FLOP/s."""

    linear: float
    attention: float


def measure_rates(hidden_size: int, device: str, dtype: torch.dtype, repeats: int) -> Rates:
    """Rates at large shapes: 1024 rows, 1024 queries on 4096 keys."""
    inter = round(hidden_size * 8 / 3 / 128) * 128
    rows = torch.randn(1024, hidden_size, device=device).to(dtype)
    up = torch.randn(inter, hidden_size, device=device).to(dtype)
    query = torch.randn(1, 1024, hidden_size // 128, 128, device=device).to(dtype).transpose(1, 2)
    key = torch.randn(1, hidden_size // 128, 4096, 128, device=device).to(dtype)
    runs = {
        "linear": lambda: F.linear(rows, up),
        "attention": lambda: F.scaled_dot_product_attention(query, key, key),
    }
    with torch.no_grad():
        alternate(runs, 1, device)
        times = {name: min(values) for name, values in alternate(runs, repeats, device).items()}
    return Rates(
        2 * rows.numel() * inter / times["linear"],
        4 * query.numel() * key.shape[2] / times["attention"],
    )


def peak_bytes() -> int:
    """Largest resident size of this process so far (Linux)."""
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def resident_bytes() -> int:
    """Resident size of this process now (Linux)."""
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


def in_a_process(script: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """What a script of this folder prints as JSON: memory and cold starts need a process of their own."""
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
