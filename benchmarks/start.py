"""Start: importing the package, and the first picture of a cold process."""

import json
import subprocess
import sys
import time
from pathlib import Path

from measure import Row, Spread, in_a_process

TORCH_AND_TRANSFORMERS = "import torch, transformers.modeling_utils, transformers.generation"
OURS = f"{TORCH_AND_TRANSFORMERS}; import transformers_nextflow; transformers_nextflow.NextFlowForCausalLM"


def run_seconds(code: str) -> float:
    """Wall time of a Python process."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - begin


def measure(repeats: int) -> list[Row]:
    """Imports beside torch's and transformers' own; the first picture beside those that follow."""
    times: dict[str, list[float]] = {"theirs": [], "package": [], "ours": []}
    package = "import transformers_nextflow"
    for _ in range(repeats):
        for name, code in (("theirs", TORCH_AND_TRANSFORMERS), ("package", package), ("ours", OURS)):
            times[name].append(run_seconds(code))
    spread = {name: Spread.of(values) for name, values in times.items()}
    first = in_a_process(Path(__file__).name)
    beside = f"{spread['theirs']} s: torch and transformers' model and generation code"
    return [
        Row(
            "`import transformers_nextflow`",
            f"{spread['package']} s",
            beside,
            spread["package"].median / spread["theirs"].median,
        ),
        Row(
            "the same with the model class",
            f"{spread['ours']} s",
            beside,
            spread["ours"].median / spread["theirs"].median,
        ),
        Row(
            "nextflow-tiny: from a cold process to the first picture",
            f"{first['first']:.3g} s after {first['loading']:.3g} s of loading",
            f"{first['next']:.3g} s the next",
            first["first"] / first["next"],
        ),
    ]


def main():
    begin = time.perf_counter()
    import torch

    from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, tiny_checkpoint

    model = NextFlowForCausalLM.from_pretrained(tiny_checkpoint(), dtype=torch.float32)
    processor = NextFlowProcessor.from_pretrained(tiny_checkpoint())
    times = [time.perf_counter()]
    for seed in range(2):
        batch = processor("a red circle", return_tensors="pt")
        output = model.generate(
            **batch,
            generation_mode="image",
            return_dict_in_generate=True,
            generator=torch.Generator().manual_seed(seed),
        )
        processor.decode_images(output.sequences, output.image_grid_shw)
        times.append(time.perf_counter())
    loading, first, following = times[0] - begin, times[1] - times[0], times[2] - times[1]
    print(json.dumps({"loading": loading, "first": first, "next": following}))


if __name__ == "__main__":
    main()
