"""A world that minutes are enough for: one thing in the middle of a white picture, four colours and three shapes.

`draw_row` makes a row of each kind of data list, in columns that `extract_codes.py` finds by itself, so a recipe's
miniature trains on the kinds of its real sources. `name_thing` is the judge, which sees pixels only.
"""

from typing import Any

import numpy as np
from PIL import Image

from .judge import detect
from .shapes import SIDE, Scene, Thing, article, render

COLOURS = ("red", "green", "blue", "black")
SHAPES = ("circle", "square", "cross")
NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
QUESTION = "What is in the picture?"
SIZE = 76  # of 128 pixels
JITTER = 2  # pixels


def draw_thing(name: str, rng: np.random.Generator | None = None) -> Image.Image:
    """A thing such as "red circle", 128 x 128; with `rng` not quite in its place."""
    dx, dy, grown = rng.integers(-JITTER, JITTER + 1, 3) if rng is not None else (0, 0, 0)
    colour, shape = name.split()
    thing = Thing(shape, colour, SIDE // 2 + int(dx), SIDE // 2 + int(dy), SIZE + int(grown))
    return Image.fromarray(render(Scene("", "single", (thing,), "white")))


def name_thing(picture: Image.Image) -> str | None:
    """What a picture shows: one of `NAMES`, or None if it is none of them or not alone."""
    pixels = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    found = [f"{thing.colour} {thing.shape}" for thing in detect(pixels, SHAPES)]
    return found[0] if len(found) == 1 and found[0] in NAMES else None


def change(name: str, rng: np.random.Generator) -> tuple[str, str]:
    """An instruction that changes a thing, and what it then is."""
    colour, shape = name.split()
    if rng.random() < 0.5:
        new = str(rng.choice([other for other in COLOURS if other != colour]))
        return f"make it {new}", f"{new} {shape}"
    new = str(rng.choice([other for other in SHAPES if other != shape]))
    return f"make it {article(new)}", f"{colour} {new}"


def draw_row(kind: str, rng: np.random.Generator) -> dict[str, Any]:
    """A row of a data list's kind; its pictures are PIL's."""
    name = str(rng.choice(NAMES))
    instruction, changed = change(name, rng)
    if kind == "text":
        return {"text": f"{article(name)}, {instruction}: {article(changed)}"}
    if kind == "text_to_image":
        return {"image": draw_thing(name, rng), "text": article(name)}
    if kind == "image_to_text":
        asked = {"role": "user", "content": f"<image>{QUESTION}"}
        return {
            "messages": [asked, {"role": "assistant", "content": article(name)}],
            "images": [draw_thing(name, rng)],
        }
    pictures = [draw_thing(name, rng), draw_thing(changed, rng)]
    if kind == "editing":
        return {"source": pictures[0], "instruction": instruction, "target": pictures[1]}
    if kind == "interleaved":
        return {
            "texts": [article(name), None, instruction, None],
            "images": [None, pictures[0], None, pictures[1]],
        }
    raise ValueError(f"The little world has no rows of the kind {kind}.")
