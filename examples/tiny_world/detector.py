"""A quick detector of shapes for rewards: rougher than the judge, ten times as fast, and another rule.

Rewards look at every rollout, so they must be cheap; and what is trained must be judged by something else (`judge`).
"""

from collections import Counter

import numpy as np
from PIL import Image
from scipy import ndimage

from transformers_nextflow.trainer import DetectedObject

from .judge import geneval_metadata, shape_template, unit_area
from .shapes import COLOURS, SHAPES, Scene

REDUCTION = 2
MIN_CONTRAST = 60  # Euclidean RGB distance from the background
MIN_AREA = 40  # reduced pixels: half of the smallest object
MIN_IOU = 0.7
_PALETTE = np.array(list(COLOURS.values()), np.float32)


def detect_objects(image: Image.Image | np.ndarray) -> list[DetectedObject]:
    """The objects of a picture, the surest first: shape, box in pixels and colour; one like no shape is an "unknown".

    Every piece is listed as an "object" and as a "red object" (in its colour), too, so that conditions may count what
    is there whatever its shape.
    """
    pixels = np.asarray(Image.fromarray(np.asarray(image)).reduce(REDUCTION), np.float32)
    frame = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    ink = np.linalg.norm(pixels - np.median(frame, axis=0), axis=-1) > MIN_CONTRAST
    nearest = np.where(ink, np.linalg.norm(pixels[:, :, None] - _PALETTE, axis=-1).argmin(-1), -1)
    found: list[tuple[float, list[DetectedObject]]] = []
    for index, colour in enumerate(COLOURS):
        pieces, _ = ndimage.label(ndimage.binary_opening(nearest == index) if (nearest == index).any() else ink & False)
        for piece, window in enumerate(ndimage.find_objects(pieces), start=1):
            mask = pieces[window] == piece
            if mask.sum() >= MIN_AREA:
                rows, columns = ((side.start * REDUCTION, side.stop * REDUCTION) for side in window)
                box = (columns[0], rows[0], columns[1], rows[1])
                shape, iou = _shape_of(mask)
                names = (shape, "object", f"{colour} object")
                found.append((iou, [DetectedObject(name, box, colour) for name in names]))
    return [thing for _, things in sorted(found, key=lambda pair: -pair[0]) for thing in things]


def scene_metadata(scene: Scene) -> dict:
    """What a scene's caption asks for, in GenEval's form: its objects and colours, and not too many of them.

    With partial credit each piece that is too many costs something, up to three.
    """
    metadata = geneval_metadata(scene)
    colours = Counter(thing.colour for thing in scene.objects)
    metadata["include"] += [{"class": f"{colour} object", "count": n} for colour, n in colours.items()]
    total = len(scene.objects)
    metadata["exclude"] += [{"class": "object", "count": total + extra} for extra in (1, 2, 3)]
    return metadata


def _shape_of(mask: np.ndarray) -> tuple[str, float]:
    """The shape whose drawing of the same area overlaps best, and how well."""
    area = int(mask.sum())
    ious = {}
    y, x = ndimage.center_of_mass(mask)
    for shape in SHAPES:
        template, (ty, tx) = shape_template(shape, max(round((area / unit_area(shape)) ** 0.5), 4))
        side = len(template)
        padded = np.pad(mask, side)
        top, left = round(y - ty) + side, round(x - tx) + side
        both = int((padded[top : top + side, left : left + side] & template).sum())
        ious[shape] = both / (area + int(template.sum()) - both)
    best = max(ious, key=ious.__getitem__)
    return best if ious[best] >= MIN_IOU else "unknown", ious[best]
