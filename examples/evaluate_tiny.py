"""Evaluates a checkpoint of the tiny world and prints one table.

    python examples/evaluate_tiny.py                                   # the checkpoint that ships with the package
    python examples/evaluate_tiny.py FOLDER --json metrics.json --markdown metrics.md --samples sheet.png
    python examples/evaluate_tiny.py FOLDER/image_tokenizer --ceiling-only

Every accuracy stands beside two others on the same prompts: the judge's on the image tokenizer's reconstructions (the
ceiling of any language model over these codes) and on the pictures as they were drawn (the judge's own reliability).
Prompts are held out: what they describe was never trained on, except for emoji, whose names must have been seen, and
"words, trained". Pictures are drawn with the checkpoint's own settings; shapes once more as the papers draw
(`NextFlowGenerationConfig.paper_sampling`). The sheet shows the first samples of the evaluation, never chosen ones.
"""

import argparse
import json
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tiny_world import ocr, second_judge
from tiny_world.dataset import load_photos
from tiny_world.emoji import compose, load_emoji, sample_emoji
from tiny_world.evaluate_tasks import TaskEvaluation
from tiny_world.judge import judge_scene
from tiny_world.shapes import HARD_KIND, KINDS, render, sample_scene
from tiny_world.teacher import EfficientNetTeacher
from tiny_world.words import render_word, sample_word
from transformers_nextflow import (
    NextFlowForCausalLM,
    NextFlowGenerationConfig,
    NextFlowImageTokenizer,
    NextFlowProcessor,
    tiny_checkpoint,
)

TEST_KINDS = tuple(kind for kind in KINDS if kind != HARD_KIND)
NUM_EMOJI_NAMES = 100
NUM_TIMED = 5
FAMILIES = ("shapes", "emoji", "words")
TASKS = "tasks"
SAMPLING_SETTINGS = {"guidance_scale": float, "image_top_k": int, "image_top_p": float, "image_temperature": float}


@dataclass(frozen=True)
class Sizes:
    """How many prompts: a kind of shapes, of held-out pairs a kind, of the hard set, of emoji, of words a list,
    and of samples a task."""

    test: int = 60
    heldout: int = 40
    hard: int = 120
    emoji: int = NUM_EMOJI_NAMES
    words: int = 100
    tasks: int = 200


QUICK = Sizes(test=6, heldout=4, hard=12, emoji=12, words=8, tasks=6)


@dataclass(frozen=True)
class Sample:
    """A prompt, the picture that was drawn for it, and a judge: picture -> {figure: right or wrong}."""

    group: str
    prompt: str
    truth: np.ndarray
    judge: Callable[[np.ndarray], dict[str, bool]]


@dataclass(frozen=True)
class Figure:
    """A row of the table. `value` is on generated pictures, `ceiling` on reconstructions, `drawn` on the originals."""

    group: str
    name: str
    n: int
    value: float | None
    ceiling: float | None = None
    drawn: float | None = None


# The prompts


def shapes_samples(sizes: Sizes, seed: int) -> list[Sample]:
    """The test set kind by kind in turn, then the held-out pairs, then the hard set."""
    rng = np.random.default_rng([seed, 1])
    test = [[scene_sample(rng, "test", kind) for _ in range(sizes.test)] for kind in TEST_KINDS]
    heldout = [scene_sample(rng, "heldout", k) for k in TEST_KINDS if k != "single" for _ in range(sizes.heldout)]
    hard = [scene_sample(rng, "hard", HARD_KIND) for _ in range(sizes.hard)]
    return [*chain.from_iterable(zip(*test, strict=True)), *heldout, *hard]


def scene_sample(rng: np.random.Generator, split: str, kind: str) -> Sample:
    scene = sample_scene(rng, split, kind)
    group = {"test": f"shapes: {kind}", "heldout": "shapes, held-out pairs", "hard": "shapes, hard set"}[split]

    def judge(image: np.ndarray) -> dict[str, bool]:
        verdict = judge_scene(image, scene)
        second = judge_scene(image, scene, second_judge.detect).correct
        return {"accuracy": verdict.correct, "accuracy, second judge": second, "strict": verdict.strict}

    return Sample(group, scene.caption, render(scene), judge)


def emoji_samples(sizes: Sizes, seed: int, cache: Path | None) -> list[Sample]:
    """Prompts for 100 names drawn by the seed, judged by the nearest of the 100 true pictures.

    "R@1" compares pooled features, which a tokenizer's soft texture misleads; "R@1, feature map" compares cell by cell.
    """
    rng = np.random.default_rng([seed, 2])
    emoji, teacher = load_emoji(cache), EfficientNetTeacher()
    chosen = sorted(rng.choice(len(emoji.names), NUM_EMOJI_NAMES, replace=False))

    def embed(images: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        features = teacher.features(to_pixels(images))
        return {"R@1": teacher.pool(features), "R@1, feature map": F.normalize(features.flatten(1), dim=-1)}

    gallery = embed([compose(emoji.pictures[index], "white") for index in chosen])

    def judge(image: np.ndarray, position: int) -> dict[str, bool]:
        return {name: int((vector @ gallery[name].T).argmax()) == position for name, vector in embed([image]).items()}

    samples = []
    for position in rng.permutation(NUM_EMOJI_NAMES)[: sizes.emoji].tolist():
        caption, picture, _ = sample_emoji(rng, emoji, "test", emoji.names[chosen[position]])
        group = f"emoji, of {NUM_EMOJI_NAMES} names"
        samples.append(Sample(group, caption, picture, partial(judge, position=position)))
    return samples


def words_samples(sizes: Sizes, seed: int) -> list[Sample]:
    """Words of the training list and words that were held out, read by one or two OCR systems."""
    rng = np.random.default_rng([seed, 3])
    readers = {"rapidocr": ocr.read_with_rapidocr}
    if ocr.has_tesseract():
        readers["tesseract"] = ocr.read_with_tesseract

    def judge(word: str) -> Callable[[np.ndarray], dict[str, bool]]:
        return lambda image: {name: read(image) == word for name, read in readers.items()}

    lists = []
    for split, group in (("test", "words, trained"), ("heldout", "words, held out")):
        drawn = [sample_word(rng, split) for _ in range(sizes.words)]
        lists.append([Sample(group, item.caption, render_word(item), judge(item.word)) for item in drawn])
    return [*chain.from_iterable(zip(*lists, strict=True))]


# The pictures


def to_pixels(images: Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 pictures `(H, W, 3)` to fp32 `(B, 3, H, W)` in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def reconstruct(
    tokenizer: NextFlowImageTokenizer, images: Sequence[np.ndarray], batch_size: int = 16
) -> tuple[list[np.ndarray], torch.Tensor]:
    """Pictures after the image tokenizer's round trip, and how often each code was used `(K,)`."""
    pictures, counts = [], torch.zeros(tokenizer.config.codebook_size, dtype=torch.long)
    for start in range(0, len(images), batch_size):
        encoded = tokenizer.encode(to_pixels(images[start : start + batch_size]))
        counts += torch.bincount(encoded.codes.flatten(), minlength=len(counts))
        pixels = tokenizer.decode(encoded.codes, encoded.image_grid_shw).float()
        pictures += list(((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())
    return pictures, counts


def generate(
    model: NextFlowForCausalLM,
    processor: NextFlowProcessor,
    prompts: Sequence[str],
    seed: int,
    batch_size: int,
    settings: dict[str, Any],
) -> list[np.ndarray]:
    """One picture a prompt. Each has its own seed, so none depends on the batch it is made in."""
    pictures = []
    for start in range(0, len(prompts), batch_size):
        batch = processor(text=list(prompts[start : start + batch_size]), padding=True, return_tensors="pt")
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch["input_ids"]))]
        out = model.generate(
            **batch, generation_mode="image", generator=generators, return_dict_in_generate=True, **settings
        )
        for images in processor.decode_images(out.sequences, out.image_grid_shw):
            pictures.append(np.asarray(images[0].convert("RGB")))
    return pictures


def save_sheet(samples: Sequence[Sample], pictures: Sequence[np.ndarray], path: Path, columns: int = 4):
    """Writes the pictures in rows with their prompts below them."""
    zoom, margin, text_height = 176, 12, 46
    width, height = zoom + margin, zoom + text_height + margin
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * width + margin, rows * height + margin), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for index, (sample, picture) in enumerate(zip(samples, pictures, strict=True)):
        x, y = margin + index % columns * width, margin + index // columns * height
        sheet.paste(Image.fromarray(picture).resize((zoom, zoom), Image.Resampling.LANCZOS), (x, y))
        draw.rectangle([x - 1, y - 1, x + zoom, y + zoom], outline=(170, 170, 170))
        draw.multiline_text((x, y + zoom + 3), "\n".join(textwrap.wrap(sample.prompt, 30)), fill="black", font=font)
    sheet.save(path)


# The figures


def accuracy_figures(
    samples: Sequence[Sample], generated: Sequence[np.ndarray] | None, reconstructed: Sequence[np.ndarray] | None
) -> list[Figure]:
    """Mean verdicts a group, in the samples' order, and the mean over GenEval's kinds of shapes."""
    sources = {"value": generated, "ceiling": reconstructed, "drawn": [sample.truth for sample in samples]}
    verdicts: dict[tuple[str, str], dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for source, pictures in sources.items():
        for sample, picture in zip(samples, pictures or (), strict=pictures is not None):
            for name, right in sample.judge(picture).items():
                verdicts[sample.group, name][source].append(right)

    def mean(lists: dict[str, list[bool]], source: str) -> float | None:
        return float(np.mean(lists[source])) if source in lists else None

    figures = [
        Figure(group, name, len(lists["drawn"]), *(mean(lists, source) for source in sources))
        for (group, name), lists in sorted(verdicts.items(), key=lambda item: item[0][1] == "strict")
    ]
    for name in ("strict", "accuracy, second judge", "accuracy"):
        kinds = [figure for figure in figures if figure.group.startswith("shapes: ") and figure.name == name]
        if not kinds:
            continue
        values = [_mean_or_none([getattr(figure, source) for figure in kinds]) for source in sources]
        figures.insert(0, Figure("shapes, overall", name, sum(figure.n for figure in kinds), *values))
    return figures


def _mean_or_none(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def reconstruction_figures(
    tokenizer: NextFlowImageTokenizer, samples: Sequence[Sample], reconstructed: Sequence[np.ndarray], counts
) -> list[Figure]:
    """PSNR and SSIM a family and on photographs, and how much of the codebook the samples use."""
    pairs = defaultdict(list)
    for sample, picture in zip(samples, reconstructed, strict=True):
        pairs[sample.group.split(",")[0].split(":")[0]].append((sample.truth, picture))
    photos = list(load_photos().values())
    pairs["photographs"] = list(zip(photos, reconstruct(tokenizer, photos)[0], strict=True))
    figures = []
    for family, items in pairs.items():
        psnr = float(np.mean([peak_signal_noise_ratio(a, b, data_range=255) for a, b in items]))
        ssim = float(np.mean([structural_similarity(a, b, channel_axis=2, data_range=255) for a, b in items]))
        figures += [
            Figure(f"reconstruction, {family}", "PSNR, dB", len(items), psnr),
            Figure(f"reconstruction, {family}", "SSIM", len(items), ssim),
        ]
    share = counts.double() / counts.sum()
    perplexity = float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))
    codes = int(counts.sum())
    figures.append(Figure(f"codebook of {len(counts)}", "used", codes, float((counts > 0).double().mean())))
    figures.append(Figure(f"codebook of {len(counts)}", "perplexity", codes, perplexity))
    return figures


def format_table(figures: Sequence[Figure], seed: int) -> str:
    """The figures as a markdown table."""
    lines = [
        "| figure | | value | ceiling (reconstructions) | judge on the originals | n |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for figure in figures:
        numbers = " | ".join(_number(value) for value in (figure.value, figure.ceiling, figure.drawn))
        lines.append(f"| {figure.group} | {figure.name} | {numbers} | {figure.n} |")
    return "\n".join([*lines, "", f"Seed {seed}."])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def first_samples(samples: Sequence[Sample], number: int = 16) -> list[int]:
    """Indices of the first samples of each family: half shapes, a quarter emoji, a quarter words."""
    shares = {"shapes": number // 2, "emoji": number // 4, "words": number // 4}
    return [
        index
        for family, share in shares.items()
        for index in [i for i, sample in enumerate(samples) if sample.group.startswith(family)][:share]
    ]


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `settings` holds the sampling settings that were given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, help="folder (default: the shipped nextflow-tiny)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few prompts of each kind")
    everything = (*FAMILIES, TASKS)
    parser.add_argument("--families", nargs="+", choices=everything, default=everything)
    parser.add_argument("--ceiling-only", action="store_true", help="image tokenizer only; the folder may be just that")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--cache", type=Path, help="where the emoji packages are kept")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--samples", type=Path, help="write a sheet of the first 16 samples here")
    for setting, number in SAMPLING_SETTINGS.items():
        parser.add_argument(f"--{setting.replace('_', '-')}", type=number, help="default: the checkpoint's")
    options = parser.parse_args(arguments)
    if options.checkpoint and not options.checkpoint.is_dir():
        parser.error(f"there is no folder {options.checkpoint}; give a checkpoint's folder, or none for nextflow-tiny")
    given = {setting: getattr(options, setting) for setting in SAMPLING_SETTINGS}
    options.settings = {setting: value for setting, value in given.items() if value is not None}
    return options


def make_samples(families: Sequence[str], sizes: Sizes, seed: int, cache: Path | None) -> list[Sample]:
    """The prompts of some families, in the order of `FAMILIES`."""
    makers = (
        lambda: shapes_samples(sizes, seed),
        lambda: emoji_samples(sizes, seed, cache),
        lambda: words_samples(sizes, seed),
    )
    return [sample for family, make in zip(FAMILIES, makers, strict=True) if family in families for sample in make()]


def draw_and_time(
    checkpoint: Path, samples: Sequence[Sample], options: argparse.Namespace
) -> tuple[NextFlowImageTokenizer, list[np.ndarray], list[Figure]]:
    """The checkpoint's image tokenizer, its pictures for all prompts, and the time a picture takes."""
    processor = NextFlowProcessor.from_pretrained(checkpoint)
    model = NextFlowForCausalLM.from_pretrained(checkpoint).eval()
    prompts, batch = [sample.prompt for sample in samples], options.batch_size
    start = time.perf_counter()
    generated = generate(model, processor, prompts, options.seed, batch, options.settings)
    batched = (time.perf_counter() - start) / len(prompts)
    start = time.perf_counter()
    generate(model, processor, prompts[:NUM_TIMED], options.seed, 1, options.settings)
    alone = (time.perf_counter() - start) / NUM_TIMED
    figures = [
        *paper_sampling_figures(model, processor, samples, options),
        Figure("seconds an image", f"batches of {batch}", len(prompts), batched),
        Figure("seconds an image", "one at a time", NUM_TIMED, alone),
    ]
    return processor.image_tokenizer, generated, figures


def paper_sampling_figures(
    model: NextFlowForCausalLM, processor: NextFlowProcessor, samples: Sequence[Sample], options: argparse.Namespace
) -> list[Figure]:
    """Accuracy on shapes with the papers' sampling instead of the checkpoint's."""
    shapes = [sample for sample in samples if sample.group.startswith("shapes: ")]
    settings = {"generation_config": NextFlowGenerationConfig.paper_sampling()}
    pictures = generate(model, processor, [s.prompt for s in shapes], options.seed, options.batch_size, settings)
    overall = [f for f in accuracy_figures(shapes, pictures, None) if f.group == "shapes, overall"]
    return [replace(figure, group="shapes, overall, the papers' sampling", drawn=None) for figure in overall]


def main(arguments: Sequence[str] | None = None):
    options = parse_options(arguments)
    checkpoint = options.checkpoint or Path(tiny_checkpoint())
    sizes = QUICK if options.quick else Sizes()
    samples = make_samples(options.families, sizes, options.seed, options.cache)
    figures = [] if options.ceiling_only else task_figures(checkpoint, sizes, options)
    if not samples:
        return write_report(figures, options)
    if options.ceiling_only:
        folder = checkpoint / "image_tokenizer"
        tokenizer = NextFlowImageTokenizer.from_pretrained(folder if folder.exists() else checkpoint).eval()
        generated, speed = None, []
    else:
        tokenizer, generated, speed = draw_and_time(checkpoint, samples, options)
    reconstructed, counts = reconstruct(tokenizer, [sample.truth for sample in samples])
    figures = [
        *accuracy_figures(samples, generated, reconstructed),
        *figures,
        *reconstruction_figures(tokenizer, samples, reconstructed, counts),
        *speed,
    ]
    write_report(figures, options)
    if options.samples:
        first, shown = first_samples(samples), reconstructed if generated is None else generated
        save_sheet([samples[i] for i in first], [shown[i] for i in first], options.samples)


def task_figures(checkpoint: Path, sizes: Sizes, options: argparse.Namespace) -> list[Figure]:
    """The rows of the tasks, if they are asked for."""
    if TASKS not in options.families:
        return []
    evaluation = TaskEvaluation(
        NextFlowForCausalLM.from_pretrained(checkpoint).eval(),
        NextFlowProcessor.from_pretrained(checkpoint),
        lambda tokenizer, images: reconstruct(tokenizer, images)[0],
        sizes.tasks,
        options.seed,
        options.batch_size,
        options.settings,
    )
    return [Figure(*row) for row in evaluation.rows()]


def write_report(figures: Sequence[Figure], options: argparse.Namespace):
    """Prints the table, and writes it where it is wanted."""
    table = format_table(figures, options.seed)
    print(table)
    if options.markdown:
        options.markdown.write_text(table + "\n", encoding="utf-8")
    if options.json:
        report = {"seed": options.seed, "settings": options.settings, "figures": [asdict(figure) for figure in figures]}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
