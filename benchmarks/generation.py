"""Times text to image and prints one table: seconds an image, by batch size, with and without guidance.

    python benchmarks/generation.py                                    # nextflow-tiny on the best device there is
    python benchmarks/generation.py --model FOLDER --device cuda --dtype bfloat16 --batch-sizes 1 8 32

Times are the median of several runs after one that does not count, from ids to codes ("codes") and from codes to pixels
("decoding").
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, tiny_checkpoint

PROMPT = "a red circle left of a blue square"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="folder of a checkpoint (default: nextflow-tiny)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--runs", type=int, default=5)
    return parser.parse_args()


def median_seconds(run: Callable[[], object], runs: int, device: str) -> float:
    """Median time of `run()` after a first call that is not counted."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        run()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main():
    options = parse_options()
    path, dtype = options.model or tiny_checkpoint(), getattr(torch, options.dtype)
    model = NextFlowForCausalLM.from_pretrained(path, dtype=dtype).to(options.device).eval()
    processor = NextFlowProcessor.from_pretrained(path)
    tokenizer = processor.image_tokenizer.to(options.device, dtype)
    ids = processor(PROMPT, return_tensors="pt").input_ids.to(options.device)
    settings = {"generation_mode": "image", "return_dict_in_generate": True}

    print(f"torch {torch.__version__}, {platform.machine()}, {options.device}, {options.dtype}", end=", ")
    print(f"{torch.get_num_threads()} threads, median of {options.runs}\n")
    print("| images at once | codes, guided, s an image | codes, not guided, s an image | decoding, s an image |")
    print("|---:|---:|---:|---:|")
    for number in options.batch_sizes:
        batch = {"input_ids": ids, "num_return_sequences": number, **settings}
        output = model.generate(**batch)
        guided, plain, decoding = (
            median_seconds(run, options.runs, options.device) / number
            for run in (
                lambda batch=batch: model.generate(**batch, guidance_scale=3.0),
                lambda batch=batch: model.generate(**batch, guidance_scale=1.0),
                lambda output=output: tokenizer.decode(output.image_codes, output.image_grid_shw),
            )
        )
        print(f"| {number} | {guided:.4f} | {plain:.4f} | {decoding:.4f} |")


if __name__ == "__main__":
    main()
