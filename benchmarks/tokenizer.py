"""Image tokenizer: encoding and decoding a picture, whole and in strips, a megapixel."""

import statistics

import torch
from measure import Row, alternate

from transformers_nextflow import NextFlowImageTokenizer, ScaleSchedule, tiny_checkpoint


def measure(size: int, device: str, dtype: torch.dtype, repeats: int) -> list[Row]:
    """nextflow-tiny's tokenizer, with as many scales as the size takes."""
    tokenizer = NextFlowImageTokenizer.from_pretrained(tiny_checkpoint(), subfolder="image_tokenizer", dtype=dtype)
    schedule = ScaleSchedule.from_size(size, size)
    tokenizer.config.num_scales = schedule.num_scales
    tokenizer = tokenizer.to(device).eval()
    pixels = (torch.rand(1, 3, size, size) * 2 - 1).to(device)
    encoded = tokenizer.encode(pixels)
    features = encoded.quantized

    def decode_in_strips():
        tokenizer.enable_tiling()
        tokenizer.decode(encoded.codes, encoded.image_grid_shw)
        tokenizer.disable_tiling()

    runs = {
        "encode": lambda: tokenizer.encode(pixels),
        "quantize": lambda: tokenizer.quantize(features, schedule),
        "decode": lambda: tokenizer.decode(encoded.codes, encoded.image_grid_shw),
        "strips": decode_in_strips,
    }
    times = {name: statistics.median(values) for name, values in alternate(runs, repeats, device).items()}
    megapixels = size * size / 1e6
    name = f"image tokenizer of nextflow-tiny, {size} x {size}, {dtype}".replace("torch.", "")
    return [
        Row(f"{name}: encode", f"{times['encode'] / megapixels:.3g} s a megapixel", "", 0.0),
        Row(
            f"{name}: quantizer in it",
            f"{times['quantize']:.3g} s",
            f"{times['encode']:.3g} s",
            times["quantize"] / times["encode"],
        ),
        Row(f"{name}: decode", f"{times['decode'] / megapixels:.3g} s a megapixel", "", 0.0),
        Row(
            f"{name}: decode in strips",
            f"{times['strips']:.3g} s",
            f"{times['decode']:.3g} s whole",
            times["strips"] / times["decode"],
        ),
    ]
