"""The families in one stream, and the photographs that only the evaluation may see."""

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .emoji import load_emoji, sample_emoji
from .photographs import load_photographs, sample_photograph
from .shapes import SIDE, render, sample_scene
from .words import render_word, sample_word

FAMILIES = {"shapes": 0.5, "emoji": 0.35, "words": 0.15}
# Photographs that come with scikit-image. Never train on them: they measure how general the tokenizer is.
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "cat", "hubble_deep_field", "immunohistochemistry", "camera")


def mixed_sample(
    rng: np.random.Generator,
    weights: dict[str, float] | None = None,
    cache: str | Path | None = None,
    split: str = "train",
    zoom: int = 1,
) -> tuple[str, np.ndarray, str]:
    """Draws one picture of the mixture.

    Args:
        rng (`np.random.Generator`): the only source of randomness.
        weights (`dict[str, float]`, *optional*): how often each family comes, `FAMILIES` by default.
        cache (*optional*): where the emoji packages are kept, see `fetch.py`.
        split (`str`): `"train"` or `"test"`.
        zoom (`int`): 2 draws the same pictures at twice the size.

    Returns:
        `(caption, image, family)`, the image uint8 `(128 * zoom, 128 * zoom, 3)`.
    """
    weights = weights or FAMILIES
    shares = np.array(list(weights.values()), float)
    family = str(rng.choice(list(weights), p=shares / shares.sum()))
    return *_SAMPLERS[family](rng, split, cache, zoom), family


def sample_images(
    rng: np.random.Generator, n: int, weights: dict[str, float] | None = None, cache: str | Path | None = None
) -> np.ndarray:
    """`n` pictures of the training mixture, uint8 `(n, 128, 128, 3)`."""
    return np.stack([mixed_sample(rng, weights, cache)[1] for _ in range(n)])


@lru_cache
def load_photos() -> dict[str, np.ndarray]:
    """Photographs for evaluation, centre-cropped to a square and resized: name -> uint8 `(128, 128, 3)`."""
    import skimage.data

    photos = {}
    for name in PHOTOGRAPHS:
        try:
            pixels = getattr(skimage.data, name)()
        except (AttributeError, OSError, ModuleNotFoundError):  # some are downloaded by scikit-image, not shipped
            continue
        picture = Image.fromarray(pixels).convert("RGB")
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        photos[name] = np.asarray(square)
    return photos


def _sample_shapes(rng, split, cache, zoom):
    scene = sample_scene(rng, split)
    return scene.caption, render(scene, zoom)


def _sample_emoji(rng, split, cache, zoom):
    return sample_emoji(rng, load_emoji(cache, zoom), split, zoom=zoom)[:2]


def _sample_photographs(rng, split, cache, zoom):
    if split != "train":
        raise ValueError("Photographs are for training; `load_photos` has those of the evaluation.")
    return "", sample_photograph(rng, load_photographs(cache), zoom)


def _sample_words(rng, split, cache, zoom):
    lettering = sample_word(rng, split)
    return lettering.caption, render_word(lettering, zoom)


_SAMPLERS = {
    "shapes": _sample_shapes,
    "emoji": _sample_emoji,
    "words": _sample_words,
    "photographs": _sample_photographs,
}
