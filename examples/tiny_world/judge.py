"""A judge that sees pixels only: finds the shapes of a picture and applies GenEval's rule to a scene's caption.

`detect` separates what differs from the background, splits it by colour, and compares every piece with drawn templates;
it knows the palette and the outlines, and nothing of the scene. `judge_scene` then asks what GenEval (arXiv 2310.11513)
asks, by the package's own rule (`condition_shares`): are all named objects there in their colours, is a count exact,
does a relation hold. A "small" or "large" in the caption is checked as well, which GenEval does not.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from transformers_nextflow.trainer import DetectedObject
from transformers_nextflow.trainer.rewards import condition_shares

from .shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, shape_mask

FRAME = 4  # pixels of the border that show the background
MIN_CONTRAST = 34  # Euclidean RGB distance from the background
MIN_CORE = 40  # pixels of plain colour that make an object
MIN_IOU = 0.75  # with the best template
MAX_COLOUR_DISTANCE = 90
_PALETTE = np.array(list(COLOURS.values()), np.float32)
_PAPERS = np.array(list(BACKGROUNDS.values()), np.float32)


@dataclass(frozen=True)
class Detection:
    """One object: `shape` is "unknown" below `MIN_IOU`; `box` is (left, top, right, bottom); `size` as in `Thing`."""

    shape: str
    colour: str
    box: tuple[int, int, int, int]
    size: float
    iou: float

    @property
    def centre(self) -> np.ndarray:
        return np.array([self.box[0] + self.box[2], self.box[1] + self.box[3]]) / 2


@dataclass(frozen=True)
class Verdict:
    """`correct` is GenEval's rule; `strict` also wants nothing superfluous and the named (or white) background."""

    correct: bool
    strict: bool
    background: bool
    detections: tuple[Detection, ...]


def find_background(image: np.ndarray) -> np.ndarray:
    """The median colour of a picture's frame: float32 `(3,)`."""
    frame = np.ones(image.shape[:2], bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    return np.median(image[frame], axis=0).astype(np.float32)


def detect(image: np.ndarray, shapes: Sequence[str] = SHAPES) -> list[Detection]:
    """Finds the objects of a picture, uint8 `(H, W, 3)`, each as the shape that fits best."""
    pixels = ndimage.gaussian_filter(image.astype(np.float32), (0.7, 0.7, 0))
    paper = find_background(image)
    ink = np.linalg.norm(pixels - paper, axis=-1) > MIN_CONTRAST
    cores, colours = _find_cores(pixels, ink)
    if not colours:
        return []
    nearest = ndimage.distance_transform_edt(cores == 0, return_distances=False, return_indices=True)
    owner = np.where(ink, cores[tuple(nearest)], 0)
    found = []
    for index, colour in enumerate(colours, start=1):
        direction = colour - paper
        coverage = (pixels - paper) @ direction / (direction @ direction)
        mask = (owner == index) & (coverage >= 0.5) | (cores == index)
        found.append(_describe(mask, colour, shapes))
    return found


def judge_scene(image: np.ndarray, scene: Scene, detector: Callable[[np.ndarray], list[Detection]] = detect) -> Verdict:
    """Whether a picture, uint8 `(H, W, 3)`, shows what the scene's caption says, by what a detector finds in it."""
    detections = sorted(detector(image), key=lambda found: -found.iou)  # the surest first, as GenEval wants them
    objects = [DetectedObject(found.shape, found.box, found.colour) for found in detections]
    correct = min(condition_shares(objects, geneval_metadata(scene))) >= 1
    if correct and scene.size_word:
        thing = scene.objects[0]
        sizes = [d.size for d in detections if (d.shape, d.colour) == (thing.shape, thing.colour)]
        correct = any(_size_word(size) == scene.size_word for size in sizes)
    wanted = Counter((thing.shape, thing.colour) for thing in scene.objects)
    seen = Counter((found.shape, found.colour) for found in detections)
    paper = find_background(image)
    background = list(BACKGROUNDS)[int(np.linalg.norm(_PAPERS - paper, axis=1).argmin())] == scene.background
    return Verdict(correct, correct and background and seen == wanted, background, tuple(detections))


def geneval_metadata(scene: Scene) -> dict:
    """What a scene's caption asks for, as a line of GenEval's prompt file says it."""
    counts = Counter((thing.shape, thing.colour) for thing in scene.objects)
    include: list[dict] = [{"class": shape, "count": n, "color": colour} for (shape, colour), n in counts.items()]
    if scene.relation:  # what the other stands beside comes first
        include.reverse()
        include[1]["position"] = [scene.relation.removeprefix("to the "), 0]
    exact = counts if scene.kind == "count" else {}
    return {"include": include, "exclude": [{"class": shape, "count": n + 1} for (shape, _), n in exact.items()]}


def _find_cores(pixels: np.ndarray, ink: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Labels the insides of objects, where no edge mixes the colours: int map `(H, W)` and the objects' own colours."""
    inside = ndimage.binary_erosion(ink, np.ones((3, 3)), iterations=2)
    distances = np.linalg.norm(pixels[:, :, None] - _PALETTE, axis=-1)
    nearest = np.where(inside, distances.argmin(-1), -1)
    cores, colours = np.zeros(ink.shape, int), []
    for index in range(len(_PALETTE)):
        pieces, number = ndimage.label(ndimage.binary_opening(nearest == index, np.ones((3, 3))))
        for piece in range(1, number + 1):
            core = pieces == piece
            if core.sum() >= MIN_CORE:
                colours.append(np.median(pixels[core], axis=0))
                cores[core] = len(colours)
    return cores, colours


def _describe(mask: np.ndarray, colour: np.ndarray, shapes: Sequence[str]) -> Detection:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    fits = {shape: _fit(mask, shape) for shape in shapes}
    shape = max(fits, key=lambda name: fits[name][0])
    iou, size = fits[shape]
    distances = np.linalg.norm(_PALETTE - colour, axis=1)
    name = list(COLOURS)[int(distances.argmin())] if distances.min() <= MAX_COLOUR_DISTANCE else "unknown"
    return Detection(shape if iou >= MIN_IOU else "unknown", name, box, size, iou)


def _fit(mask: np.ndarray, shape: str) -> tuple[float, int]:
    """The best overlap of a mask with drawings of a shape near its area and centre: `(iou, size)`."""
    area = int(mask.sum())
    guess = (area / unit_area(shape)) ** 0.5
    y, x = ndimage.center_of_mass(mask)
    best = (0.0, 0)
    for size in {max(round(guess * scale), 8) for scale in (0.94, 1.0, 1.06)}:
        template, (ty, tx) = shape_template(shape, size)
        side = len(template)
        padded = np.pad(mask, side)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                top, left = round(y - ty) + side + dy, round(x - tx) + side + dx
                both = int((padded[top : top + side, left : left + side] & template).sum())
                best = max(best, (both / (area + int(template.sum()) - both), size))
    return best


@lru_cache(maxsize=2048)
def shape_template(shape: str, size: int) -> tuple[np.ndarray, tuple[float, float]]:
    template = shape_mask(shape, size) >= 0.5
    return template, ndimage.center_of_mass(template)


@lru_cache
def unit_area(shape: str) -> float:
    """Area of a shape in units of its squared size."""
    return float(shape_mask(shape, 64).sum()) / 64**2


def _size_word(size: float) -> str:
    return min(SIZES, key=lambda word: abs(SIZES[word] - size))
