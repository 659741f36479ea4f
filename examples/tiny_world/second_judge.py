"""A second detector of shapes, for every figure that the first one gives: nothing of it is the first one's.

The first (`judge`) works in RGB and compares outlines pixel by pixel. This one separates things from the background in
CIE Lab, and tells shapes by what scikit-image measures of a piece (moments, solidity, extent, holes, how its edge runs
around the centre), as the nearest neighbours among drawn, blurred and noisy examples do.
"""

from functools import lru_cache

import numpy as np
from scipy import ndimage

from .judge import Detection
from .shapes import COLOURS, SHAPES, shape_mask

CONTRAST = 22  # Lab distance from the background
MIN_AREA = 120  # pixels
EDGE_POINTS = 32
NEIGHBOURS = 5
MAX_DISTANCE = 0.9  # of the nearest example, in standardised measures: further away is no shape
BEND = 0.07  # of a shape's size
_LEVELS = (0.35, 0.5, 0.65)  # of coverage: where blur may put an edge


def detect(image: np.ndarray) -> list[Detection]:
    """Finds the objects of a picture, uint8 `(H, W, 3)`; `iou` is 1 less the distance to the nearest example."""
    from skimage.color import rgb2lab
    from skimage.measure import label, regionprops

    lab = rgb2lab(ndimage.median_filter(image, (3, 3, 1)))
    edge = np.concatenate([lab[0], lab[-1], lab[:, 0], lab[:, -1]])
    ink = np.linalg.norm(lab - np.median(edge, axis=0), axis=-1) > CONTRAST
    names, palette = list(COLOURS), rgb2lab(np.array(list(COLOURS.values()), np.uint8)[None])[0]
    found = []
    for region in regionprops(label(ndimage.binary_opening(ink, iterations=1))):
        if region.area < MIN_AREA:
            continue
        mask = np.pad(region.image, 1)
        core = ndimage.binary_erosion(region.image, iterations=2)
        pixels = lab[region.slice][core if core.any() else region.image]
        colour = names[int(np.linalg.norm(palette - np.median(pixels, axis=0), axis=1).argmin())]
        shape, distance = classify(mask)
        top, left, bottom, right = region.bbox
        found.append(Detection(shape, colour, (left, top, right, bottom), float(max(mask.shape) - 2), 1 - distance))
    return found


def classify(mask: np.ndarray) -> tuple[str, float]:
    """The shape of a bool mask, padded by one, and the distance to the nearest example; "unknown" if that is large."""
    examples, names, mean, scale = _examples()
    distances = np.linalg.norm((measure(mask) - mean) / scale - examples, axis=1) / len(mean) ** 0.5
    nearest = np.argsort(distances)[:NEIGHBOURS]
    votes = [names[index] for index in nearest]
    best = max(dict.fromkeys(votes), key=votes.count)
    distance = float(distances[nearest[0]])
    return (best if distance <= MAX_DISTANCE else "unknown"), distance


def measure(mask: np.ndarray) -> np.ndarray:
    """What is measured of a piece, float64 `(11 + EDGE_POINTS / 2,)`."""
    from skimage.measure import regionprops

    (region,) = regionprops(mask.astype(np.uint8))
    hu = np.log10(np.abs(region.moments_hu[:4]) + 1e-7)
    height, width = region.image.shape
    plain = [region.solidity, region.extent, region.eccentricity, float(region.euler_number < 1), width / height]
    y, x = ndimage.center_of_mass(mask)
    offset = [(y - mask.shape[0] / 2) / mask.shape[0], (x - mask.shape[1] / 2) / mask.shape[1]]
    rays = np.arange(EDGE_POINTS) * 2 * np.pi / EDGE_POINTS
    steps = np.linspace(0, max(mask.shape), 2 * max(mask.shape))[:, None]
    lines = ndimage.map_coordinates(mask.astype(float), [y + steps * np.sin(rays), x + steps * np.cos(rays)], order=1)
    reach = np.where(lines > 0.5, steps, 0).max(0) / region.area**0.5
    spectrum = np.abs(np.fft.rfft(reach))[1 : EDGE_POINTS // 2 + 1] / EDGE_POINTS  # turned or not, the same
    return np.concatenate([hu, plain, offset, 6 * spectrum])


def _bend(drawn: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """A drawing whose points are moved a little, neighbours alike, as an image tokenizer's decoder moves them."""
    rows, columns = np.indices(drawn.shape).astype(float)
    for places in (rows, columns):
        moved = ndimage.gaussian_filter(rng.normal(size=drawn.shape), size / 10)
        places += rng.uniform(0, BEND) * size * moved / np.abs(moved).max()
    return ndimage.map_coordinates(drawn, [rows, columns], order=1)


@lru_cache(maxsize=1)
def _examples() -> tuple[np.ndarray, list[str], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    measures, names = [], []
    for shape in SHAPES:
        for size in range(26, 96, 3):
            drawn = np.pad(shape_mask(shape, size), 6)
            for level in _LEVELS:
                soft = _bend(ndimage.gaussian_filter(drawn, rng.uniform(0, 0.03 * size)), rng, size)
                soft += ndimage.gaussian_filter(rng.normal(0, 0.5, drawn.shape), 1.5) * rng.uniform(0, 1)
                pieces, number = ndimage.label(soft > level)
                if number:
                    largest = 1 + int(np.argmax(np.bincount(pieces.ravel())[1:]))
                    window = ndimage.find_objects(pieces)[largest - 1]
                    measures.append(measure(np.pad(pieces[window] == largest, 1)))
                    names.append(shape)
    table = np.stack(measures)
    mean, scale = table.mean(0), table.std(0) + 1e-6
    return (table - mean) / scale, names, mean, scale
