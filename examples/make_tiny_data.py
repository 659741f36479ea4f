"""Draws nextflow-tiny's world into parquet files, which the package's own scripts extract and train on.

    python examples/make_tiny_data.py --kind pictures --number 40000 --output runs/tiny/data/pictures
    python examples/make_tiny_data.py --kind captions --number 40000 --output runs/tiny/data/captions
    python examples/make_tiny_data.py --kind tasks --number 60000 --output runs/tiny/data/tasks
    python examples/make_tiny_data.py --kind sources --data-list examples/recipes/0.5b-256px/pretraining_data.yaml \\
        --number 300 --output runs/little

`pictures` are for the image tokenizer (with `--zoom 2` for the diffusion decoder: the same at twice the size, without
those of tasks), `captions` and `tasks` (conversations, 4 of 10 in words alone) for the language model. `sources` stand
in for those of data lists, name by name and kind by kind, in a world that minutes are enough for
(tiny_world/little.py): OUTPUT/LIST.yaml is such a list with the same weights, OUTPUT/prompts.txt what can be drawn.

Every file is made of a seed and its number alone, and written when it is whole: run the same command again after a
kill. Needs `pip install -e ".[tiny]"`, and once the network for emoji (npm) and photographs (Debian).
"""

import argparse
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PillowImage

from tiny_world.dataset import mixed_sample
from tiny_world.little import NAMES, draw_row
from tiny_world.shapes import article
from tiny_world.tasks import TASKS
from transformers_nextflow.trainer import read_data_list

ROWS_OF_A_FILE = 2000
# Of the image tokenizer's diet. "tasks" are pictures of edits and stories, in which things stand anywhere.
PICTURES = {"shapes": 0.25, "tasks": 0.1, "emoji": 0.33, "words": 0.14, "photographs": 0.18}

CAPTIONS = {"shapes": 0.5, "emoji": 0.3, "words": 0.2}
# Of 100 conversations 40 have no picture ("text" and "reading"); with the captions that is a quarter of all samples.
TASK_SHARES = {
    "text": 0.26, "reading": 0.14, "look": 0.2, "editing": 0.16, "plan": 0.06, "looking first": 0.04, "turns": 0.06,
    "thought": 0.02, "story": 0.04, "example": 0.02,
}  # fmt: skip


def only(weights: dict[str, float], families: Sequence[str] | None) -> dict[str, float]:
    """The weights of some families, of all by default; they add up to one."""
    kept = {name: weight for name, weight in weights.items() if families is None or name in families}
    if not kept:
        raise ValueError(f"None of {', '.join(families or [])} is one of {', '.join(weights)}.")
    return {name: weight / sum(kept.values()) for name, weight in kept.items()}


def to_png(pixels: np.ndarray) -> dict[str, Any]:
    """uint8 `(H, W, 3)` as datasets keeps pictures."""
    buffer = io.BytesIO()
    PillowImage.fromarray(pixels).save(buffer, "png", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def draw_picture(
    rng: np.random.Generator, cache: Path | None = None, families: Sequence[str] | None = None, zoom: int = 1
) -> dict[str, Any]:
    """A picture and its caption, for the image tokenizer or the diffusion decoder."""
    if zoom > 1:
        families = [family for family in families or PICTURES if family != "tasks"]
    weights = only(PICTURES, families)
    family = str(rng.choice(list(weights), p=list(weights.values())))
    if family == "tasks":
        messages = TASKS[str(rng.choice(["editing", "story", "look"]))](rng, "train").messages
        pictures = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        caption, picture = "", pictures[rng.integers(len(pictures))]
    else:
        caption, picture, _ = mixed_sample(rng, {family: 1.0}, cache, zoom=zoom)
    return {"image": to_png(picture), "text": caption, "family": family}


PICTURE_FEATURES = Features({"image": Image(), "text": Value("string"), "family": Value("string")})


def draw_caption(
    rng: np.random.Generator, cache: Path | None = None, families: Sequence[str] | None = None
) -> dict[str, Any]:
    """A picture to draw from its caption."""
    caption, picture, _ = mixed_sample(rng, only(CAPTIONS, families), cache)
    return {"image": to_png(picture), "text": caption}


CAPTION_FEATURES = Features({"image": Image(), "text": Value("string")})


def draw_task(rng: np.random.Generator) -> dict[str, Any]:
    """A conversation with its pictures, in the form that `extract_codes.py --messages-column messages` reads."""
    sample = TASKS[str(rng.choice(list(TASK_SHARES), p=list(TASK_SHARES.values())))](rng, "train")
    messages, pictures = [], []
    for message in sample.messages:
        pictures += [to_png(part["image"]) for part in message["content"] if part["type"] == "image"]
        texts = ["<image>" if part["type"] == "image" else part["text"] for part in message["content"]]
        messages.append({"role": message["role"], "content": "".join(texts)})
    return {"messages": messages, "images": pictures, "task": sample.task}


TASK_FEATURES = Features(
    {
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "images": List(Image()),
        "task": Value("string"),
    }
)


WORDS, PICTURE = Value("string"), Image()
SOURCE_FEATURES = {  # of the rows of each kind
    "text": Features({"text": WORDS}),
    "text_to_image": Features({"image": PICTURE, "text": WORDS}),
    "image_to_text": Features({"messages": List({"role": WORDS, "content": WORDS}), "images": List(PICTURE)}),
    "editing": Features({"source": PICTURE, "instruction": WORDS, "target": PICTURE}),
    "interleaved": Features({"texts": List(WORDS), "images": List(PICTURE)}),
}


def write_sources(data_list: Path, number: int, seed: int, to: Path) -> None:
    """Little stand-ins for the sources of a data list, and a list that names them."""
    stand_ins = {}
    for index, (name, source) in enumerate(read_data_list(data_list).items()):
        folder = to / data_list.stem / name
        draw = partial(draw_row, source.kind)
        write(draw, SOURCE_FEATURES[source.kind], number, seed + index, folder)
        stand_ins[name] = {"kind": source.kind, "format": "parquet", "data": f"{data_list.stem}/{name}/*.parquet"}
        kept = {"weight": source.weight, "prompt_style": source.prompt_style}
        stand_ins[name] |= {field: value for field, value in kept.items() if value is not None}
    prompts = "".join(f"{article(name)}\n" for name in NAMES)
    (to / "prompts.txt").write_text(prompts, encoding="utf-8")
    (to / data_list.name).write_text(yaml.safe_dump({"sources": stand_ins}, sort_keys=False), encoding="utf-8")


def write(draw: Callable[[np.random.Generator], dict[str, Any]], features: Features, number: int, seed: int, to: Path):
    """`number` rows in files of [`ROWS_OF_A_FILE`]; those that are there are kept."""
    to.mkdir(parents=True, exist_ok=True)
    for index in range(-(-number // ROWS_OF_A_FILE)):
        path = to / f"{index:05d}.parquet"
        if not path.exists():
            rng = np.random.default_rng((seed, index))
            rows = [draw(rng) for _ in range(min(ROWS_OF_A_FILE, number - index * ROWS_OF_A_FILE))]
            temporary = path.with_suffix(".part")
            Dataset.from_list(rows, features=features).to_parquet(temporary)
            temporary.rename(path)
            print(path, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kind", required=True, help="pictures, captions, tasks or sources")
    parser.add_argument("--data-list", type=Path, nargs="+", help="whose sources `sources` stand in for")
    parser.add_argument("--number", type=int, required=True, help="rows (of each source)")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="where fetched packages are kept (default: the user's cache)")
    parser.add_argument("--families", nargs="+", help="of pictures and captions; by default all")
    parser.add_argument("--zoom", type=int, choices=[1, 2], default=1, help="2: pictures of 256 pixels")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    common = {"cache": options.cache, "families": options.families}
    kinds: dict[str, tuple[Callable[..., dict[str, Any]], Features]] = {
        "pictures": (partial(draw_picture, zoom=options.zoom, **common), PICTURE_FEATURES),
        "captions": (partial(draw_caption, **common), CAPTION_FEATURES),
        "tasks": (draw_task, TASK_FEATURES),
    }
    if options.kind not in (*kinds, "sources"):
        parser.error(f"--kind must be one of {', '.join(kinds)} or sources, not {options.kind}")
    if (options.kind == "sources") != bool(options.data_list):
        parser.error("--kind sources needs a --data-list, and no other kind has one")
    if options.zoom > 1 and options.kind != "pictures":
        parser.error("--zoom is for --kind pictures")
    if options.kind == "sources":
        for data_list in options.data_list:
            write_sources(data_list, options.number, options.seed, options.output)
        return
    write(*kinds[options.kind], options.number, options.seed, options.output)


if __name__ == "__main__":
    main()
