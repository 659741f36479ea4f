"""Compares a diffusion decoder with the image tokenizer's own on held-out pictures of the tiny world; prints one table.

    python examples/evaluate_diffusion_decoder.py runs/tiny/diffusion_decoder_2x
    python examples/evaluate_diffusion_decoder.py runs/tiny/diffusion_decoder_2x --checkpoint runs/tiny/nextflow-tiny \\
        --number 200 --json decoder.json --markdown decoder.md --samples decoder.png

FOLDER holds what `train_diffusion_decoder.py` wrote, `--checkpoint` the language model (by default nextflow-tiny). Both
decoders get the same codes: the true ones of emoji and shapes, and those that the model draws from the captions. The
network behind Frechet distance and retrieval, EfficientNet-Lite1, is in no loss (the teacher and the perceptual loss
are Lite0). *Gradient energy* is over that of the originals: 1 is as sharp as they are. Times are of one run, as ratios.
The sheet shows the first samples, never chosen ones: original, image tokenizer, diffusion decoder at both sizes.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from diffusers_nextflow import NextFlowDecodePipeline, NextFlowPipeline
from tiny_world.emoji import compose, load_emoji, sample_emoji
from tiny_world.judge import judge_scene
from tiny_world.shapes import render, sample_scene
from tiny_world.tasks import sample_edit
from tiny_world.teacher import EfficientNetTeacher
from transformers_nextflow import tiny_checkpoint

BATCH = 10
TIMED = 4  # pictures, one at a time


@dataclass(frozen=True)
class Sample:
    """A caption, its picture at both sizes, and a judge of pictures (for emoji there is a gallery instead)."""

    family: str
    caption: str
    truth: np.ndarray
    large: np.ndarray
    name: str = ""
    judge: Callable[[np.ndarray], bool] | None = None


@dataclass(frozen=True)
class Row:
    """A figure of both decoders."""

    name: str
    n: int
    vq: float | None
    diffusion: float


def make_samples(number: int, seed: int, cache: Path | None) -> list[Sample]:
    """Held-out emoji and shapes in turn: each picture is drawn twice from one state of the generator."""
    samples = []
    for index in range(number):
        small, large = (np.random.default_rng([seed, 20, index]) for _ in range(2))
        caption, picture, name = sample_emoji(small, load_emoji(cache), "test")
        _, twice, _ = sample_emoji(large, load_emoji(cache, 2), "test", zoom=2)
        samples.append(Sample("emoji", caption, picture, twice, name))
        scene = sample_scene(np.random.default_rng([seed, 21, index]), "test")
        right = lambda image, scene=scene: judge_scene(image, scene).correct  # noqa: E731
        samples.append(Sample("shapes", scene.caption, render(scene), render(scene, 2), judge=right))
    return samples


def to_pixels(images: Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 pictures `(H, W, 3)` to fp32 `(B, 3, H, W)` in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: torch.Tensor) -> list[np.ndarray]:
    """Pixels in [0, 1] to uint8 pictures."""
    return list((pixels.float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())


def gradient_energy(images: Sequence[np.ndarray]) -> float:
    """The mean squared difference of neighbouring pixels."""
    pixels = to_pixels(images)
    return float(pixels.diff(dim=-1).square().mean() + pixels.diff(dim=-2).square().mean())


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Between normal distributions with the moments of features `(n, d)`."""
    means, covariances = zip(*((x.mean(0), np.cov(x, rowvar=False)) for x in (one, other)), strict=True)
    values, vectors = np.linalg.eigh(covariances[0])
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariances[1] @ root).clip(0)).sum()
    return float(np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1]) - 2 * cross)


class Eye:
    """EfficientNet-Lite1: mean features for distances, unit vectors for retrieval."""

    def __init__(self):
        self.network = EfficientNetTeacher(lite=1)

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """`(n, 320)`; pictures of 256 pixels are seen as they are."""
        return self.network.features(to_pixels(images)).mean((2, 3)).double().numpy()

    def vectors(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        return self.network.embed(to_pixels(images))


class Decoders:
    """Latents to pictures by both decoders; a picture's noise has the seed of its place."""

    def __init__(self, pipe: NextFlowPipeline, decode: NextFlowDecodePipeline, steps: int | None):
        self.pipe, self.decode, self.steps = pipe, decode, steps

    def vq(self, latents: torch.Tensor) -> list[np.ndarray]:
        return [image for part in latents.split(BATCH) for image in to_images(self.pipe.decode_latents(part, "pt"))]

    def diffusion(self, latents: torch.Tensor, factor: int = 1) -> list[np.ndarray]:
        images = []
        for start in range(0, len(latents), BATCH):
            part = latents[start : start + BATCH]
            generators = [torch.Generator().manual_seed(start + index) for index in range(len(part))]
            settings = {"generator": generators, "num_inference_steps": self.steps, "output_type": "pt"}
            images += to_images(self.decode(latents=part, scale_factor=factor, **settings).images)
        return images


def draw(pipe: NextFlowPipeline, captions: Sequence[str], seed: int, **settings) -> torch.Tensor:
    """Latents that the language model draws from captions."""
    latents = []
    for start in range(0, len(captions), BATCH):
        part = list(captions[start : start + BATCH])
        generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(part))]
        images = settings.get("image")
        more = {"image": images[start : start + BATCH]} if images else {}
        latents.append(pipe(part, generator=generators, output_type="latent", **more).images)
    return torch.cat(latents)


def compare(samples: Sequence[Sample], latents: torch.Tensor, source: str, decoders: Decoders, eye: Eye) -> list[Row]:
    """Rows of one source of codes, at the codes' size."""
    made = {"vq": decoders.vq(latents), "diffusion": decoders.diffusion(latents)}
    truth = [sample.truth for sample in samples]
    rows = []

    def row(name: str, n: int, figure: Callable[[list[np.ndarray]], float]) -> None:
        rows.append(Row(f"{source}: {name}", n, figure(made["vq"]), figure(made["diffusion"])))

    if source == "true codes":
        for family in ("emoji", "shapes"):
            places = [i for i, sample in enumerate(samples) if sample.family == family]
            row(
                f"{family}, PSNR, dB",
                len(places),
                lambda images, places=places: np.mean(
                    [peak_signal_noise_ratio(truth[i], images[i], data_range=255) for i in places]
                ),
            )
            row(
                f"{family}, SSIM",
                len(places),
                lambda images, places=places: np.mean(
                    [structural_similarity(truth[i], images[i], channel_axis=2, data_range=255) for i in places]
                ),
            )
    for family in ("emoji", "shapes"):
        places = [i for i, sample in enumerate(samples) if sample.family == family]
        energy = gradient_energy([truth[i] for i in places])
        row(
            f"{family}, gradient energy",
            len(places),
            lambda images, places=places, energy=energy: gradient_energy([images[i] for i in places]) / energy,
        )
    features = eye.features(truth)
    row("Frechet distance", len(samples), lambda images: frechet_distance(features, eye.features(images)))
    emoji = load_emoji(None)
    gallery = eye.vectors([compose(picture, "white") for picture in emoji.pictures])
    places = [i for i, sample in enumerate(samples) if sample.family == "emoji"]

    def retrieval(images: list[np.ndarray]) -> float:
        found = (eye.vectors([images[i] for i in places]) @ gallery.T).argmax(1).tolist()
        return float(np.mean([emoji.names[k] == samples[i].name for i, k in zip(places, found, strict=True)]))

    row(f"emoji, R@1 of {len(emoji.names)} names", len(places), retrieval)
    row(
        "shapes, accuracy",
        len(samples) - len(places),
        lambda images: float(np.mean([s.judge(image) for s, image in zip(samples, images, strict=True) if s.judge])),
    )
    return rows


def compare_large(samples: Sequence[Sample], latents: torch.Tensor, source: str, decoders: Decoders, eye: Eye) -> Row:
    """Frechet distance at twice the size; the image tokenizer's pictures are enlarged."""
    small = decoders.vq(latents)
    enlarged = [np.asarray(Image.fromarray(image).resize((256, 256), Image.Resampling.BICUBIC)) for image in small]
    features = eye.features([sample.large for sample in samples])
    distances = [
        frechet_distance(features, eye.features(images)) for images in (enlarged, decoders.diffusion(latents, 2))
    ]
    return Row(f"{source}: 256 x 256, Frechet distance", len(samples), *distances)


def compare_edits(number: int, seed: int, decoders: Decoders) -> Row:
    """How alike the untouched region of edits is to that of the picture that was given."""
    edits = [sample_edit(np.random.default_rng([seed, 22, index]), "test") for index in range(number)]
    parts = [[part for message in edit.messages[:-1] for part in message["content"]] for edit in edits]
    given = [next(part["image"] for part in of_one if part["type"] == "image") for of_one in parts]
    texts = ["".join(part["text"] for part in of_one if part["type"] == "text") for of_one in parts]
    images = [Image.fromarray(image) for image in given]
    latents = draw(decoders.pipe, texts, seed, image=images)

    def likeness(made: list[np.ndarray]) -> float:
        triples = zip(given, made, edits, strict=True)
        psnrs = [peak_signal_noise_ratio(a[e.untouched], b[e.untouched], data_range=255) for a, b, e in triples]
        return float(np.mean(psnrs))

    both = (likeness(images) for images in (decoders.vq(latents), decoders.diffusion(latents)))
    return Row("edits: untouched region, PSNR, dB", number, *both)


def costs(captions: Sequence[str], decoders: Decoders, factors: Sequence[int]) -> list[Row]:
    """Seconds a picture, one at a time, over the image tokenizer's decoder and over the drawing of the codes."""

    def seconds(call: Callable[[int], object]) -> float:
        call(0)
        start = time.perf_counter()
        for index in range(TIMED):
            call(index)
        return (time.perf_counter() - start) / TIMED

    latents = [draw(decoders.pipe, [caption], 0) for caption in captions[:TIMED]]
    of_vq = seconds(lambda index: decoders.vq(latents[index]))
    of_codes = seconds(lambda index: draw(decoders.pipe, [captions[index]], 0))
    rows = []
    for factor in factors:
        of_diffusion = seconds(lambda index, factor=factor: decoders.diffusion(latents[index], factor))
        side = 128 * factor
        for over, unit in (("the image tokenizer's decoder", of_vq), ("drawing the codes", of_codes)):
            rows.append(Row(f"{side} x {side}: time over {over}", TIMED, of_vq / unit, of_diffusion / unit))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 2**20
    return [*rows, Row("peak memory of it all, MiB", 1, None, memory)]


def save_sheet(samples: Sequence[Sample], latents: torch.Tensor, decoders: Decoders, large: bool, path: Path) -> None:
    """A row for each of the first samples, all at 256 pixels."""
    number = min(12, len(samples))
    columns = [[sample.large for sample in samples[:number]], decoders.vq(latents[:number])]
    columns.append(decoders.diffusion(latents[:number]))
    columns += [decoders.diffusion(latents[:number], 2)] if large else []
    rows = []
    for pictures in zip(*columns, strict=True):
        sides = [np.asarray(Image.fromarray(p).resize((256, 256), Image.Resampling.NEAREST)) for p in pictures]
        rows.append(np.concatenate(sides, axis=1))
    Image.fromarray(np.concatenate(rows)).save(path)


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a markdown table."""

    def words(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"

    lines = ["| figure | image tokenizer | diffusion decoder | n |", "|---|---:|---:|---:|"]
    return "\n".join([*lines, *(f"| {r.name} | {words(r.vq)} | {words(r.diffusion)} | {r.n} |" for r in rows)])


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("decoder", type=Path, help="folder of a NextFlowDecodePipeline")
    parser.add_argument("--checkpoint", type=Path, default=Path(tiny_checkpoint()), help="folder of the language model")
    parser.add_argument("--number", type=int, default=200, help="pictures a family, and edits")
    parser.add_argument("--steps", type=int, help="of the diffusion decoder (default: its own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--true-codes-only", action="store_true", help="without the language model's codes and edits")
    parser.add_argument("--cache", type=Path, help="where the emoji packages are kept")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--samples", type=Path, help="write a sheet of the first samples here")
    options = parser.parse_args(arguments)
    if not options.decoder.is_dir():
        parser.error(f"there is no folder {options.decoder}; give what train_diffusion_decoder.py wrote")
    if options.number < 2:
        parser.error(f"--number must be at least 2, not {options.number}")

    pipe = NextFlowPipeline.from_pretrained(options.checkpoint, dtype=torch.float32)
    decode = NextFlowDecodePipeline.from_pretrained(
        options.decoder, image_tokenizer=pipe.image_tokenizer, dtype=torch.float32
    )
    for part in (pipe, decode):
        part.set_progress_bar_config(disable=True)
    decoders, eye = Decoders(pipe, decode, options.steps), Eye()
    factors = list(decode.diffusion_decoder.config.scale_factors)
    samples = make_samples(options.number, options.seed, options.cache)
    pixels = to_pixels([sample.truth for sample in samples])
    tokenizer = pipe.image_tokenizer
    true = torch.cat([tokenizer.encode(part).quantized for part in pixels.split(BATCH)])
    sources = {"true codes": true}
    if not options.true_codes_only:
        sources["drawn codes"] = draw(pipe, [sample.caption for sample in samples], options.seed)
    rows = []
    for source, latents in sources.items():
        if 1 in factors:
            rows += compare(samples, latents, source, decoders, eye)
        if 2 in factors:
            rows.append(compare_large(samples, latents, source, decoders, eye))
    if not options.true_codes_only and 1 in factors:
        rows.append(compare_edits(options.number, options.seed, decoders))
    rows += costs([sample.caption for sample in samples], decoders, factors)
    table = format_table(rows)
    print(table)
    if options.markdown:
        options.markdown.write_text(table + "\n", encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps([vars(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    if options.samples:
        save_sheet(samples, true, decoders, 2 in factors, options.samples)
    return rows


if __name__ == "__main__":
    main()
