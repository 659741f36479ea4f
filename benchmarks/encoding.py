"""Rows a second of the extraction of codes: all rows of a shard together, by shape, against one row at a time.

    python benchmarks/encoding.py --rows 64

Pictures of several shapes with short texts go through what `examples/extract_codes.py` calls (`encode_conversations`),
in one process by turns: *one at a time*; *in order*, as many rows together as a block has; *by shape*, the same after
sorting by bucket. Codes are compared, too. `--clock cpu` for a machine that others use.
"""

import argparse

import numpy as np
import torch
from measure import Spread, alternate, use_clock
from PIL import Image

from transformers_nextflow import NextFlowProcessor, tiny_checkpoint
from transformers_nextflow.scale_schedule import nearest_bucket
from transformers_nextflow.trainer import encode_conversations

SHAPES = ((512, 512), (512, 384), (384, 512), (640, 360), (360, 640), (480, 320))  # of the web's pictures


def make_rows(number: int) -> list[list[dict]]:
    """Conversations that draw a picture of noise, of shapes in no order."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(number):
        height, width = SHAPES[rng.integers(len(SHAPES))]
        pixels = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((width, height))
        answer = [{"type": "image", "image": picture}]
        rows.append([{"role": "user", "content": f"picture {index}"}, {"role": "assistant", "content": answer}])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(tiny_checkpoint()))
    parser.add_argument("--num-scales", type=int, help="by default the image processor's own")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    options = parser.parse_args()
    use_clock(options.clock)
    processor = NextFlowProcessor.from_pretrained(options.checkpoint)
    processor.image_tokenizer.to(options.device)
    num_scales = options.num_scales or processor.image_processor.num_scales
    rows = make_rows(options.rows)

    def bucket(index: int) -> tuple[int, int]:
        width, height = rows[index][1]["content"][0]["image"].size
        return nearest_bucket(height, width)

    by_shape = sorted(range(len(rows)), key=bucket)

    def encode(indices: list[int]) -> list[dict]:
        generators = [torch.Generator(options.device).manual_seed(index) for index in indices]
        chosen = [rows[index] for index in indices]
        return encode_conversations(chosen, processor, True, generators, num_scales=num_scales)

    ways = {
        "one at a time": lambda: [encode([index])[0] for index in range(len(rows))],
        "in order": lambda: encode(list(range(len(rows)))),
        "by shape": lambda: encode(by_shape),
    }
    alone, shaped = ways["one at a time"](), ways["by shape"]()  # the first calls warm up
    pairs = [(alone[index]["codes"][0], sample["codes"][0]) for index, sample in zip(by_shape, shaped, strict=True)]
    same = np.mean([a == b for first, second in pairs for a, b in zip(first, second, strict=True)])
    times = alternate(ways, options.repeats, options.device)
    print("| way | rows/s | x one at a time |\n|---|---:|---:|")
    for way, taken in times.items():
        ratios = [first / second for first, second in zip(times["one at a time"], taken, strict=True)]
        print(f"| {way} | {Spread.of([len(rows) / second for second in taken])} | {Spread.of(ratios)} |")
    print(f"\n{options.rows} rows, {num_scales} scales, {options.device}; {same:.2%} of the codes are the same.")


if __name__ == "__main__":
    main()
