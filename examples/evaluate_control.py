"""Measures what nextflow-tiny keeps and draws with masks, places and strengths, and prints one table.

    python examples/evaluate_control.py                                 # 200 of each, a quarter of an hour on a core
    python examples/evaluate_control.py --number 20 --pictures docs/assets/control

Scenes are those of the tiny world that training never shows, and its judge looks at pixels alone. Pixels are compared
with the source's own reconstruction, the best that codes can do. The pictures are the first samples, not chosen ones.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusers_nextflow import NextFlowPipeline
from tiny_world.judge import detect, judge_scene
from tiny_world.shapes import COLOURS, SHAPES, SIDE, Scene, Thing, article, render, sample_scene
from tiny_world.tasks import EDITS, sample_edit
from transformers_nextflow import attention_maps, tiny_checkpoint

HOLE = 64  # pixels, the side of a hole
IN_PLACE = 8  # pixels
LOW, HIGH, ALL = slice(0, SIDE // 2), slice(SIDE // 2, SIDE), slice(None)
HALVES = {"left": (ALL, LOW), "right": (ALL, HIGH), "top": (LOW, ALL), "bottom": (HIGH, ALL)}
STRENGTHS = [step / 8 for step in range(1, 9)]
PARTS = ("cost", "inpainting", "edits", "variations", "outpainting", "regions", "maps")
MOST_VARIED = 100  # pictures, at each strength
MOST_MAPPED = 100
MAP_SCALE = 3  # of 4 x 4 cells, in which most is decided
SHOWN = 6  # samples on a sheet

Row = tuple[str, str, int, float, float]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default=str(tiny_checkpoint()), help="folder of a checkpoint")
    parser.add_argument(
        "--parts", nargs="+", default=list(PARTS), choices=PARTS, help="what is measured (default: all)"
    )
    parser.add_argument("--number", type=int, default=200, help="samples of each")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=Path, help="folder for sheets of samples")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args()


class Run:
    """A pipeline, and how many pictures are drawn with which seeds."""

    def __init__(self, options: argparse.Namespace):
        self.pipe = NextFlowPipeline.from_pretrained(options.model, dtype=torch.float32)
        self.pipe.set_progress_bar_config(disable=True)
        self.number, self.batch_size, self.seed = options.number, options.batch_size, options.seed
        self.folder = options.pictures
        self.rows: list[Row] = []

    def rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, index])

    def draw(self, prompts: Sequence[str], **settings: Any) -> np.ndarray:
        """Pictures `(n, H, W, 3)` uint8, sample i with a seed of its own; settings that are lists have one for each."""
        made = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            chosen = {name: value[part] if isinstance(value, list) else value for name, value in settings.items()}
            generators = [torch.Generator().manual_seed(self.seed + start + i) for i in range(len(prompts[part]))]
            made += self.pipe(list(prompts[part]), generator=generators, **chosen).images
        return np.stack([np.asarray(image) for image in made])

    def reconstruct(self, pictures: np.ndarray) -> np.ndarray:
        tokenizer, made = self.pipe.image_tokenizer, []
        for part in np.split(pictures, range(self.batch_size, len(pictures), self.batch_size)):
            encoded = tokenizer.encode(self.pipe.image_processor(list(part), return_tensors="pt").pixel_values)
            pixels = tokenizer.decode(encoded.codes, encoded.image_grid_shw)
            made += self.pipe.image_processor.postprocess(pixels)
        return np.stack([np.asarray(image) for image in made])

    def add(self, group: str, name: str, values: Sequence[float]) -> None:
        """A row of the table: the mean, and its standard error."""
        error = float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
        self.rows.append((group, name, len(values), float(np.mean(values)), error))
        print(f"| {group} | {name} | {len(values)} | {self.rows[-1][3]:.3f} | {error:.3f} |", flush=True)

    def show(self, name: str, *columns: np.ndarray) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            rows = [np.concatenate(list(pictures), axis=1) for pictures in zip(*columns, strict=True)][:SHOWN]
            halves = [np.concatenate(rows[i : i + len(rows) // 2]) for i in (0, len(rows) // 2)]
            sheet = np.concatenate(halves, axis=1)
            Image.fromarray(sheet).quantize(128).save(self.folder / f"{name}.png", optimize=True)


def psnr(one: np.ndarray, other: np.ndarray, where: np.ndarray) -> list[float]:
    """Of each picture, in the chosen pixels, in dB; at most 60."""
    squares = ((one.astype(np.float32) - other) ** 2).mean(-1)
    errors = [max(of_picture[chosen].mean(), 255**2 / 1e6) for of_picture, chosen in zip(squares, where, strict=True)]
    return [10 * float(np.log10(255**2 / error)) for error in errors]


def masks_of(drawn: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray((mask * 255).astype(np.uint8)) for mask in drawn]


def shaded(pictures: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """What is drawn anew, dark."""
    return np.where(drawn[..., None], pictures // 2, pictures)


# Inpainting


def change_a_thing(rng: np.random.Generator) -> tuple[Scene, Scene, np.ndarray]:
    """A scene, the same with another thing in place of one, and a hole around it, bool `(H, W)`."""
    while True:
        source = sample_scene(rng, "test", str(rng.choice(["position", "attribution"])))
        index = int(rng.integers(2))
        old, other = source.objects[index], source.objects[1 - index]
        shapes = [shape for shape in SHAPES if shape not in (old.shape, other.shape)]
        colours = [colour for colour in COLOURS if colour not in (old.colour, other.colour)]
        new = replace(old, shape=str(rng.choice(shapes)), colour=str(rng.choice(colours)))
        caption = source.caption
        for form in ("{colour} {shape}", "{shape} in {colour}"):
            said, says = (article(form.format(**vars(thing))) for thing in (old, new))
            caption = caption.replace(said, says)
        objects = tuple(new if thing is old else thing for thing in source.objects)
        target = replace(source, caption=caption, objects=objects)
        if not target.held_out:
            return source, target, square_around(old)


def square_around(thing: Thing) -> np.ndarray:
    inside = np.zeros((SIDE, SIDE), bool)
    rows, columns = (slice(max(c - HOLE // 2, 0), c + HOLE // 2) for c in (thing.cy, thing.cx))
    inside[rows, columns] = True
    return inside


def inpainting(run: Run) -> None:
    rng = run.rng(1)
    sources, targets, holes = zip(*(change_a_thing(rng) for _ in range(run.number)), strict=True)
    pictures, drawn = np.stack([render(scene) for scene in sources]), np.stack(holes)
    shown, prompts = run.reconstruct(pictures), [scene.caption for scene in targets]
    ceiling = run.reconstruct(np.stack([render(scene) for scene in targets]))
    run.add("inpainting, ceiling", "right", [judge_scene(p, s).correct for p, s in zip(ceiling, targets, strict=True)])
    given = {"image": list(pictures), "mask_image": masks_of(drawn)}
    made = {}
    for preserve in ("latents", "codes", "pixels"):
        made[preserve] = run.draw(prompts, **given, preserve=preserve)
        verdicts = [judge_scene(p, s) for p, s in zip(made[preserve], targets, strict=True)]
        run.add(f"inpainting, {preserve}", "right", [verdict.correct for verdict in verdicts])
        run.add(f"inpainting, {preserve}", "strict", [verdict.strict for verdict in verdicts])
        truth, name = (pictures, "source") if preserve == "pixels" else (shown, "source's reconstruction")
        kept = psnr(made[preserve], truth, ~drawn)
        run.add(f"inpainting, {preserve}", f"kept part, dB to the {name}", kept)
        run.add(f"inpainting, {preserve}", "of them at least 35 dB", [value >= 35 for value in kept])
    run.show("inpainting", shaded(pictures, drawn), made["latents"], made["codes"], made["pixels"])
    without = run.draw(prompts)
    run.add("no mask, the same prompts", "kept part, dB to the source's reconstruction", psnr(without, shown, ~drawn))


# Outpainting


def outpainting(run: Run) -> None:
    """Of two things in a row or a column, one is in the half that is given; the prompt names both."""
    rng = run.rng(2)
    scenes = [sample_scene(rng, "test", str(rng.choice(["position", "attribution"]))) for _ in range(run.number)]
    things = [scene.objects[int(rng.integers(2))] for scene in scenes]
    places = np.array([place_of(thing) for thing in things])
    pictures = np.stack([render(scene) for scene in scenes])
    inside, made = np.zeros(pictures.shape[:3], bool), np.zeros_like(pictures)
    for place, (rows, columns) in HALVES.items():
        chosen = np.flatnonzero(places == place)
        inside[chosen, rows, columns] = True
        if len(chosen):
            halves = [Image.fromarray(pictures[i, rows, columns]) for i in chosen]
            made[chosen] = run.draw([scenes[i].caption for i in chosen], image=halves, position=place)
    run.add("outpainting", "the thing stays", list(map(stays, made, things)))
    verdicts = [judge_scene(picture, scene) for picture, scene in zip(made, scenes, strict=True)]
    run.add("outpainting", "the ground goes on", [verdict.background for verdict in verdicts])
    run.add("outpainting", "all of the caption", [verdict.correct for verdict in verdicts])
    run.add("outpainting", "all of it and nothing else", [verdict.strict for verdict in verdicts])
    run.show("outpainting", np.where(inside[..., None], pictures, 160).astype(np.uint8), made)


def place_of(thing: Thing) -> str:
    """The half that holds the thing."""
    across, down = thing.cx - SIDE // 2, thing.cy - SIDE // 2
    if abs(across) > abs(down):
        return "left" if across < 0 else "right"
    return "top" if down < 0 else "bottom"


def stays(picture: np.ndarray, thing: Thing) -> bool:
    return any(
        (found.shape, found.colour) == (thing.shape, thing.colour)
        and np.abs(found.centre - (thing.cx, thing.cy)).max() < IN_PLACE
        for found in detect(picture)
    )


# Variations


def variations(run: Run) -> None:
    """Of scenes that the caption decides, and of the hard set's, where it leaves the places open."""
    for split, name in (("test", "places in the caption"), ("hard", "places left open")):
        rng = run.rng(3)
        scenes = [sample_scene(rng, split) for _ in range(min(run.number, MOST_VARIED))]
        pictures, prompts = np.stack([render(scene) for scene in scenes]), [scene.caption for scene in scenes]
        shown, made = run.reconstruct(pictures), []
        before = np.zeros(len(pictures))
        for strength in STRENGTHS:
            made.append(run.draw(prompts, image=list(pictures), strength=strength))
            distances = np.sqrt(((made[-1].astype(np.float32) - shown) ** 2).mean((1, 2, 3)))
            group = f"strength {strength:g}, {name}"
            run.add(group, "distance to the reconstruction, of 255", distances.tolist())
            run.add(group, "more than at the strength before", (distances - before).tolist())
            before = distances
        run.show(f"variations_{split}", pictures, *made[1::2])


# Edits


def edits(run: Run) -> None:
    rng = run.rng(4)
    samples = [sample_edit(rng, "test", kind) for kind in EDITS for _ in range(-(-run.number // len(EDITS)))]
    samples = [samples[i] for i in rng.permutation(len(samples))]
    parts = [sample.messages[0]["content"] for sample in samples]
    pictures, prompts = np.stack([p["image"] for p, _ in parts]), [text["text"] for _, text in parts]
    untouched, shown = np.stack([sample.untouched for sample in samples]), run.reconstruct(pictures)
    masks = {"mask_image": masks_of(~untouched), "image_in_prompt": True}
    made = []
    for name, given in {"without a mask": {}, "with a mask": masks}.items():
        made.append(run.draw(prompts, image=list(pictures), prompt_style="chat", **given))
        accurate = [sample.judge(picture)["accuracy"] for sample, picture in zip(samples, made[-1], strict=True)]
        run.add(f"edits {name}", "right", accurate)
        run.add(f"edits {name}", "untouched part, dB to the source's reconstruction", psnr(made[-1], shown, untouched))
    run.show("edits", shaded(pictures, ~untouched), *made)


# Regions and maps


def pairs(run: Run, number: int) -> list[tuple[Scene, Scene]]:
    """Captions of two things side by side, two and two on one ground, and different."""
    rng, made = run.rng(6), []
    while len(made) < number:
        one, other = (sample_scene(rng, "test", "attribution") for _ in range(2))
        shapes = {thing.shape for scene in (one, other) for thing in scene.objects}
        if one.background == other.background and len(shapes) == 4:
            made.append((one, other))
    return made


def regions(run: Run) -> None:
    """The right half has a caption of its own: the thing on the left is the one's, that on the right the other's."""
    right = np.zeros((SIDE, SIDE), bool)
    right[HALVES["right"]] = True
    (mask,) = masks_of(right[None])
    scenes = pairs(run, run.number)
    plain = run.draw([one.caption for one, _ in scenes])
    made = []
    for i, (one, other) in enumerate(scenes):
        generator = torch.Generator().manual_seed(run.seed + i)
        drawn = run.pipe(one.caption, regions=[(other.caption, mask)], generator=generator).images[0]
        made.append(np.asarray(drawn))
    targets = [replace(one, objects=(one.objects[0], other.objects[1])) for one, other in scenes]
    for name, pictures in {"regions": made, "the same without regions": plain}.items():
        verdicts = [judge_scene(picture, target) for picture, target in zip(pictures, targets, strict=True)]
        run.add(name, "both things", [verdict.correct for verdict in verdicts])
        run.add(name, "both and nothing else", [verdict.strict for verdict in verdicts])
    run.show("regions", plain, np.stack(made))


def maps(run: Run) -> None:
    """Where the words of the left thing are looked at, and those of the right one."""
    number = min(run.number, MOST_MAPPED)
    processor, model, shown, found = run.pipe._processor, run.pipe.model, [], {MAP_SCALE: [], -1: []}
    attention = model.config._attn_implementation
    for i, (scene, _) in enumerate(pairs(run, number)):
        generator = torch.Generator().manual_seed(run.seed + i)
        inputs = processor([scene.caption], return_tensors="pt", return_offsets_mapping=True)
        spans = inputs.pop("offset_mapping")[0].tolist()
        words = [tokens_of(scene.caption, thing, spans) for thing in scene.objects]
        drawn = model.generate(**inputs, generation_mode="image", generator=generator, return_dict_in_generate=True)
        picture = processor.decode_codes(drawn.image_codes, drawn.image_grid_shw)[0]
        model.set_attn_implementation("eager")
        for scale, correct in found.items():
            whole = attention_maps(model, drawn.sequences, drawn.image_grid_shw, scale=scale)[0]
            left, right = (whole[tokens].sum(0) for tokens in words)
            correct.append(float(share_of_left(left) > share_of_left(right)))
            if scale == MAP_SCALE:
                shown.append([np.asarray(picture), heat(left), heat(right)])
        model.set_attn_implementation(attention)
    for scale, correct in found.items():
        name = "4 x 4 cells" if scale == MAP_SCALE else "finest scale"
        run.add(f"attention, {name}", "the left thing's words are looked at more to the left", correct)
    run.show("maps", *(np.stack(column) for column in zip(*shown, strict=True)))


def tokens_of(caption: str, thing: Thing, spans: Sequence[Sequence[int]]) -> list[int]:
    """The tokens of a thing's words, by the characters that each stands for."""
    forms = (form.format(**vars(thing)) for form in ("{colour} {shape}", "{shape} in {colour}"))
    phrase = next(form for form in forms if form in caption)
    start = caption.index(phrase)
    return [i for i, (low, high) in enumerate(spans) if low < start + len(phrase) and high > start]


def share_of_left(cells: torch.Tensor) -> float:
    return float(cells[:, : cells.shape[1] // 2].sum() / cells.sum())


def heat(cells: torch.Tensor) -> np.ndarray:
    """A map as a picture: white for the cell that is looked at most."""
    shades = Image.fromarray((255 * cells / cells.max()).numpy().astype(np.uint8))
    return np.asarray(shades.resize((SIDE, SIDE), Image.Resampling.NEAREST).convert("RGB"))


# Cost


def cost(run: Run, rounds: int = 15) -> None:
    """Processor seconds of a plain drawing, of one with a mask, and of encoding its source, taken in turns."""
    pipe = run.pipe
    scene, target, hole = change_a_thing(run.rng(5))
    for number in (1, 8):
        ids = pipe._processor([target.caption] * number, return_tensors="pt").input_ids
        pixels = pipe.image_processor([render(scene)] * number, return_tensors="pt").pixel_values
        codes = pipe.image_tokenizer.encode(pixels).codes
        keep = {"keep_codes": codes, "keep_mask": torch.from_numpy(~hole)[None].float()}
        actions: dict[str, Callable[[], object]] = {
            "plain": lambda ids=ids: pipe.model.generate(ids, generation_mode="image"),
            "masked": lambda ids=ids, keep=keep: pipe.model.generate(ids, generation_mode="image", **keep),
            "encoding": lambda pixels=pixels: pipe.image_tokenizer.encode(pixels),
        }
        times: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(rounds + 1):
            for name, action in actions.items():
                start = time.process_time()
                action()
                times[name].append(time.process_time() - start)
        plain, masked, encoding = (statistics.median(of_action[1:]) for of_action in times.values())
        run.add(f"cost, {number} at once", "a masked drawing, of a plain one", [masked / plain])
        run.add(f"cost, {number} at once", "encoding a source, of a plain drawing", [encoding / plain])


MEASURES = dict(zip(PARTS, (cost, inpainting, edits, variations, outpainting, regions, maps), strict=True))


def main() -> None:
    options = parse_options()
    run = Run(options)
    print("| | | n | | standard error |\n|---|---|---:|---:|---:|")
    for part in options.parts:
        MEASURES[part](run)
    if options.json is not None:
        options.json.write_text(json.dumps(run.rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
