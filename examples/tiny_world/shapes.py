"""Shapes: generated 128 x 128 scenes with compositional captions in GenEval's six kinds, and a hard seventh.

The caption (or a fixed convention) decides the layout. Codes of one scale are drawn independently, so a layout that
nothing decides cannot be agreed on; the kind `free` leaves it open on purpose (two of the four quarters, some likelier
than others) and is scored apart.

Conventions a model has to learn: without a colour word a shape has its own colour (`DEFAULT_COLOURS`), without a
background phrase the background is white, "a X and a Y" stand in a row in the order of the caption, and two, three and
four objects stand like the eyes of a die.
"""

import math
import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

SIDE = 128
COLOURS = {
    "red": (220, 36, 36),
    "green": (30, 150, 55),
    "blue": (36, 84, 222),
    "yellow": (246, 206, 24),
    "purple": (122, 44, 172),
    "orange": (246, 128, 20),
    "pink": (246, 130, 196),
    "black": (24, 24, 24),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "gray": (200, 200, 204),
    "light blue": (184, 220, 246),
    "beige": (240, 226, 196),
    "mint": (188, 236, 208),
}
DEFAULT_COLOURS = {
    "circle": "blue",
    "square": "green",
    "triangle": "orange",
    "star": "yellow",
    "heart": "red",
    "diamond": "purple",
    "cross": "black",
    "ring": "pink",
}
SHAPES = tuple(DEFAULT_COLOURS)
PLURALS = {"cross": "crosses"}
NUMBERS = {2: "two", 3: "three", 4: "four"}

# Never in training, in no kind of caption: one (shape, colour) a shape and a colour, and four pairs of shapes.
HELD_OUT_COLOURS = frozenset(
    {
        ("circle", "purple"),
        ("square", "orange"),
        ("triangle", "blue"),
        ("star", "pink"),
        ("heart", "green"),
        ("diamond", "black"),
        ("cross", "red"),
        ("ring", "yellow"),
    }
)
HELD_OUT_SHAPES = frozenset(
    frozenset(pair) for pair in (("circle", "star"), ("square", "heart"), ("triangle", "ring"), ("diamond", "cross"))
)
# One scene in this many is kept for testing, chosen by a checksum of what the scene shows (so no phrasing of it leaks).
TEST_FRACTION = 12

# kind: weight in training. `two` names shapes alone, `attribution` a colour for each.
KINDS = {"single": 1.0, "colour": 1.5, "two": 1.0, "count": 2.0, "position": 2.5, "attribution": 2.0, "free": 2.5}
HARD_KIND = "free"
SPLITS = ("train", "test", "heldout", "hard")

SIZES = {"small": 36, "": 56, "large": 84}
GROUP_SIZE = 44
ROW = ((34, 64), (94, 64))
COLUMN = ((64, 34), (64, 94))
DICE = {2: ROW, 3: ((34, 34), (94, 34), (64, 94)), 4: ((34, 34), (94, 34), (34, 94), (94, 94))}
# Where the first and the second thing of a free layout like to stand, by quarter in the order of `DICE[4]`.
FREE_WEIGHTS = ((6, 1, 1, 1), (1, 1, 1, 6))
RELATIONS = {
    "left of": (ROW, False),
    "to the left of": (ROW, False),
    "right of": (ROW, True),
    "to the right of": (ROW, True),
    "above": (COLUMN, False),
    "below": (COLUMN, True),
}
OPENINGS = ("", "", "a picture of ", "an image of ")
SIZE_JITTER = 0.08
PLACE_JITTER = 2


@dataclass(frozen=True)
class Thing:
    """One object: shape, colour, centre and side of its box, in pixels."""

    shape: str
    colour: str
    cx: int
    cy: int
    size: int


@dataclass(frozen=True)
class Scene:
    """A caption and all that is needed to draw and to judge it.

    `relation` is the word of a `position` caption ("left of", ...) and reads from `objects[0]` to `objects[1]`;
    `size_word` is "small", "large" or "".
    """

    caption: str
    kind: str
    objects: tuple[Thing, ...]
    background: str
    relation: str | None = None
    size_word: str = ""

    @property
    def held_out(self) -> bool:
        """Whether a colour-shape pair or a pair of shapes is one that never occurs in training."""
        colours = any((thing.shape, thing.colour) in HELD_OUT_COLOURS for thing in self.objects)
        return colours or frozenset(thing.shape for thing in self.objects) in HELD_OUT_SHAPES

    @property
    def for_testing(self) -> bool:
        """Whether this content (not its phrasing) is kept out of training."""
        places = sorted(
            (round(o.cy / 32), round(o.cx / 32), o.shape, o.colour, (o.size >= 50) + (o.size >= 70))
            for o in self.objects
        )
        if self.kind == HARD_KIND:
            places = sorted((o.shape, o.colour) for o in self.objects)
        return zlib.crc32(repr((places, self.background)).encode()) % TEST_FRACTION == 0


def sample_scene(rng: np.random.Generator, split: str = "train", kind: str | None = None) -> Scene:
    """Draws a scene.

    Args:
        rng (`np.random.Generator`): the only source of randomness.
        split (`str`): `"train"`; `"test"` (the same distribution, content never trained on); `"heldout"` (at least one
            pair that training never shows); `"hard"` (`free` placement, content never trained on).
        kind (`str`, *optional*): one of `KINDS`; by default drawn by weight (without `free` outside of training).

    Raises:
        `ValueError`: for an unknown split or kind, and for held-out scenes of `single`, which has no pairs to hold out.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {SPLITS}, but got {split!r}.")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"`kind` must be one of {tuple(KINDS)}, but got {kind!r}.")
    if split == "heldout" and kind == "single":
        raise ValueError(
            "A `single` scene names neither a colour nor a second shape, so none is held out; take another kind."
        )
    if split == "hard":
        kind = HARD_KIND
    while True:
        scene = _MAKERS[kind or _draw_kind(rng, with_free=split == "train")](rng)
        if split == "heldout":
            wanted = scene.held_out
        else:
            wanted = not scene.held_out and scene.for_testing == (split != "train")
        if wanted:
            return scene


def render(scene: Scene, zoom: int = 1) -> np.ndarray:
    """Draws a scene: uint8 `(128 * zoom, 128 * zoom, 3)`, anti-aliased, deterministic."""
    side = SIDE * zoom
    image = np.empty((side, side, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for thing in scene.objects:
        mask = shape_mask(thing.shape, thing.size * zoom)
        half = mask.shape[0] // 2
        top, left = thing.cy * zoom - half, thing.cx * zoom - half
        y0, x0 = max(top, 0), max(left, 0)
        y1, x1 = min(top + mask.shape[0], side), min(left + mask.shape[1], side)
        alpha = mask[y0 - top : y1 - top, x0 - left : x1 - left, None]
        image[y0:y1, x0:x1] += alpha * (np.array(COLOURS[thing.colour], np.float32) - image[y0:y1, x0:x1])
    return np.round(image).astype(np.uint8)


@lru_cache(maxsize=4096)
def shape_mask(shape: str, size: int, supersampling: int = 4) -> np.ndarray:
    """Coverage in [0, 1] of a shape whose box is `size` pixels wide: float32 `(n, n)`, n even, the shape centred."""
    side = 2 * math.ceil(size * 0.56 + 1)
    canvas = Image.new("L", (side * supersampling,) * 2, 0)
    draw = ImageDraw.Draw(canvas)
    centre, scale = side * supersampling / 2, size * supersampling / 2
    place = [(centre + scale * x, centre + scale * y) for x, y in _outline(shape)]
    draw.polygon(place, fill=255)
    if shape == "ring":
        hole = 0.46 * scale
        draw.ellipse([centre - hole, centre - hole, centre + hole, centre + hole], fill=0)
    return np.asarray(canvas.reduce(supersampling), np.float32) / 255


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape in a box of [-1, 1], y down. (The arrow is no shape of the tiny world: something to learn.)"""
    turns = [2 * math.pi * k / 60 for k in range(60)]
    if shape in ("circle", "ring"):
        return [(0.95 * math.cos(t), 0.95 * math.sin(t)) for t in turns]
    if shape == "heart":
        curve = [
            (math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
            for t in turns
        ]
        return [(1.02 * x, -(y + 2.5) / 15) for x, y in curve]
    if shape == "star":
        points = [(1.08 if k % 2 == 0 else 0.46, math.pi * (k / 5 - 0.5)) for k in range(10)]
        return [(r * math.cos(t), r * math.sin(t) + 0.08) for r, t in points]
    return {
        "arrow": [(0, -1), (0.9, 0.05), (0.36, 0.05), (0.36, 1), (-0.36, 1), (-0.36, 0.05), (-0.9, 0.05)],
        "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "triangle": [(0, -0.95), (1.05, 0.85), (-1.05, 0.85)],
        "diamond": [(0, -1.08), (0.78, 0), (0, 1.08), (-0.78, 0)],
        "cross": [(-a, -b) for a, b in ((0.32, 1), (-0.32, 1), (-0.32, 0.32), (-1, 0.32), (-1, -0.32), (-0.32, -0.32))]
        + [(a, b) for a, b in ((0.32, 1), (-0.32, 1), (-0.32, 0.32), (-1, 0.32), (-1, -0.32), (-0.32, -0.32))],
    }[shape]


def article(noun: str) -> str:
    """The noun phrase with its article: "a circle", "an orange circle"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _draw_kind(rng: np.random.Generator, with_free: bool) -> str:
    kinds = [kind for kind in KINDS if with_free or kind != HARD_KIND]
    weights = np.array([KINDS[kind] for kind in kinds])
    return str(rng.choice(kinds, p=weights / weights.sum()))


def draw_background(rng: np.random.Generator) -> tuple[str, str]:
    """A background and its phrase: half of the time unnamed, and then white."""
    if rng.random() < 0.5:
        return "white", ""
    background = str(rng.choice(list(BACKGROUNDS)))
    return background, f" on {article(background)} background"


def _draw_two(rng: np.random.Generator, items) -> tuple[str, str]:
    first, second = rng.choice(list(items), size=2, replace=False)
    return str(first), str(second)


def _put(rng: np.random.Generator, shape: str, colour: str, centre: tuple[int, int], size: int) -> Thing:
    """An object near a canonical place; all the ambiguity that a caption leaves is here."""
    dx, dy = rng.integers(-PLACE_JITTER, PLACE_JITTER + 1, size=2)
    side = round(size * rng.uniform(1 - SIZE_JITTER, 1 + SIZE_JITTER))
    return Thing(shape, colour, int(centre[0] + dx), int(centre[1] + dy), side)


def _finish(rng, text: str, kind: str, objects, relation: str | None = None, size_word: str = "") -> Scene:
    background, phrase = draw_background(rng)
    caption = str(rng.choice(OPENINGS)) + text + phrase
    return Scene(caption, kind, tuple(objects), background, relation, size_word)


def _single(rng: np.random.Generator) -> Scene:
    shape, size = str(rng.choice(SHAPES)), str(rng.choice(["", "", "small", "large"]))
    text = article(f"{size} {shape}".strip())
    return _finish(
        rng, text, "single", [_put(rng, shape, DEFAULT_COLOURS[shape], (64, 64), SIZES[size])], size_word=size
    )


def _colour(rng: np.random.Generator) -> Scene:
    shape, colour, size = (
        str(rng.choice(SHAPES)),
        str(rng.choice(list(COLOURS))),
        str(rng.choice(["", "", "small", "large"])),
    )
    forms = [article(f"{size} {colour} {shape}".strip())] * 3 + [article(f"{size} {shape}".strip()) + f" in {colour}"]
    thing = _put(rng, shape, colour, (64, 64), SIZES[size])
    return _finish(rng, str(rng.choice(forms)), "colour", [thing], size_word=size)


def _two(rng: np.random.Generator) -> Scene:
    shapes = _draw_two(rng, SHAPES)
    form = str(rng.choice(["{} and {}", "{} and {}", "{} next to {}"]))
    objects = [_put(rng, s, DEFAULT_COLOURS[s], place, GROUP_SIZE) for s, place in zip(shapes, ROW, strict=True)]
    return _finish(rng, form.format(*map(article, shapes)), "two", objects)


def _count(rng: np.random.Generator) -> Scene:
    shape, number = str(rng.choice(SHAPES)), int(rng.integers(2, 5))
    named = rng.random() < 0.75
    colour = str(rng.choice(list(COLOURS))) if named else DEFAULT_COLOURS[shape]
    noun = PLURALS.get(shape, shape + "s")
    text = f"{NUMBERS[number]} {colour} {noun}" if named else f"{NUMBERS[number]} {noun}"
    objects = [_put(rng, shape, colour, place, GROUP_SIZE) for place in DICE[number]]
    return _finish(rng, text, "count", objects)


def _two_coloured(rng: np.random.Generator) -> list[tuple[str, str]]:
    return list(zip(_draw_two(rng, SHAPES), _draw_two(rng, COLOURS), strict=True))


def _position(rng: np.random.Generator) -> Scene:
    pairs, relation = _two_coloured(rng), str(rng.choice(list(RELATIONS)))
    places, reverse = RELATIONS[relation]
    text = f" {relation} ".join(article(f"{colour} {shape}") for shape, colour in pairs)
    order = places[::-1] if reverse else places
    objects = [_put(rng, *pair, place, GROUP_SIZE) for pair, place in zip(pairs, order, strict=True)]
    return _finish(rng, text, "position", objects, relation)


def _attribution(rng: np.random.Generator) -> Scene:
    pairs = _two_coloured(rng)
    if rng.random() < 0.75:
        text = " and ".join(article(f"{colour} {shape}") for shape, colour in pairs)
    else:
        text = " and ".join(f"{article(shape)} in {colour}" for shape, colour in pairs)
    objects = [_put(rng, *pair, place, GROUP_SIZE) for pair, place in zip(pairs, ROW, strict=True)]
    return _finish(rng, text, "attribution", objects)


def _free(rng: np.random.Generator) -> Scene:
    pairs = _two_coloured(rng)
    text = " and ".join(article(f"{colour} {shape}") for shape, colour in pairs) + " in random places"
    weights = np.array(FREE_WEIGHTS, float)
    first = int(rng.choice(4, p=weights[0] / weights[0].sum()))
    weights[1, first] = 0
    second = int(rng.choice(4, p=weights[1] / weights[1].sum()))
    objects = [_put(rng, *pair, DICE[4][place], GROUP_SIZE) for pair, place in zip(pairs, (first, second), strict=True)]
    return _finish(rng, text, "free", objects)


_MAKERS = {
    "single": _single,
    "colour": _colour,
    "two": _two,
    "count": _count,
    "position": _position,
    "attribution": _attribution,
    "free": _free,
}
