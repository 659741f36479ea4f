"""Memory and time of output head and cross-entropy at the 7B's vocabulary: three ways, forward and backward.

    python benchmarks/fused_loss.py
    python benchmarks/fused_loss.py --rows 2048 --dtype bfloat16 --runs 5

*naive* holds all logits; *chunked* recomputes a chunk's logits in the backward pass (what `head_cross_entropy` does
with heads that are more than a matrix: LoRA, quantised, sharded); *fused* makes the gradients of a chunk while its
logits are there (what it does otherwise). Each run is a process of its own, and they alternate: memory is the growth of
the process's peak, time the median of the runs. That losses and gradients agree is tested in
tests/transformers_nextflow/test_linear_cross_entropy.py.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from transformers_nextflow.linear_cross_entropy import head_cross_entropy

WAYS = ("naive", "chunked", "fused")


class WrappedLinear(torch.nn.Module):
    """A head that `head_cross_entropy` can't take for a bare matrix."""

    def __init__(self, head: torch.nn.Linear):
        super().__init__()
        self.head = head

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.head(hidden_states)


def peak_bytes() -> int:
    """Largest resident size of this process so far (Linux)."""
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def measure(way: str, rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> dict[str, float]:
    """Seconds, bytes and loss of one forward and backward pass."""
    torch.manual_seed(0)
    head = torch.nn.Linear(hidden_size, vocab_size, bias=False, dtype=dtype)
    hidden_states = torch.randn(rows, hidden_size, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocab_size, (rows,))
    before, start, work = peak_bytes(), time.perf_counter(), time.process_time()
    if way == "naive":
        loss = F.cross_entropy(head(hidden_states).float(), targets, reduction="sum")
    else:
        loss, _ = head_cross_entropy(
            head if way == "fused" else WrappedLinear(head), hidden_states, targets, vocab_size
        )
    loss.backward()
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - work,
        "bytes": peak_bytes() - before,
        "loss": float(loss.detach()) / rows,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rows", type=int, default=4096, help="predictions in the batch")
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=184_832)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help="measure this one here and print JSON")
    options = parser.parse_args()
    if options.way:
        sizes = (options.rows, options.hidden_size, options.vocab_size)
        measure(options.way, 8, 8, 8, torch.float32)  # imports and allocators, once
        print(json.dumps(measure(options.way, *sizes, getattr(torch, options.dtype))))
        return

    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.runs):
        for way in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results[way].append(json.loads(done.stdout))
    medians = {
        way: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for way, runs in results.items()
    }
    naive = medians["naive"]
    weight = options.vocab_size * options.hidden_size * getattr(torch, options.dtype).itemsize
    print(
        f"{options.rows} rows, width {options.hidden_size}, {options.vocab_size} ids, {options.dtype}; median of",
        end="",
    )
    print(f" {options.runs}; the gradient of the head alone takes {weight / 1e6:.0f} MB\n")
    print("| way | MB above the weights | naive / it | of them not the head's gradient |", end="")
    print(" seconds | it / naive | CPU s | it / naive | mean loss |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for way, median in medians.items():
        print(
            f"| {way} | {median['bytes'] / 1e6:.0f} | {naive['bytes'] / median['bytes']:.1f} "
            f"| {(median['bytes'] - weight) / 1e6:.0f} | {median['seconds']:.2f} "
            f"| {median['seconds'] / naive['seconds']:.2f} | {median['cpu_seconds']:.1f} "
            f"| {median['cpu_seconds'] / naive['cpu_seconds']:.2f} | {median['loss']:.4f} |"
        )


if __name__ == "__main__":
    main()
