"""Photographs: random crops of about forty free ones, so that the image tokenizer has seen more than drawings.

They come with scikit-image and scikit-learn and in two source packages of Debian's archive (CC-BY, CC-BY-SA, CC0 and
GPL-2+; each package's `copyright` file names the photographers). None of them is shipped. The eight of scikit-image
that the evaluation looks at (`dataset.PHOTOGRAPHS`) are not among them.
"""

import importlib.util
import io
import subprocess
import tarfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .fetch import PHOTOGRAPH_PACKAGES, fetch_debian
from .shapes import SIDE

SCIKIT_IMAGE = ("brick", "coins", "grass", "gravel", "moon", "motorcycle_left", "motorcycle_right", "retina")
SCIKIT_LEARN = ("china.jpg", "flower.jpg")
FOLDERS = (Path("usr/share/backgrounds"), Path("usr/share/backgrounds/mate/nature"))
LARGEST = 1280  # pixels of the longer side, for memory


@lru_cache(maxsize=1)
def load_photographs(cache: str | Path | None = None) -> tuple[Image.Image, ...]:
    """All photographs, RGB, in a fixed order."""
    pictures = {}
    for name in SCIKIT_IMAGE:
        [file] = _folder("skimage").glob(f"data/{name}.*")
        pictures[name] = Image.open(file)
    for name in SCIKIT_LEARN:
        pictures[name] = Image.open(_folder("sklearn") / "datasets" / "images" / name)
    for package in PHOTOGRAPH_PACKAGES:
        command = ["dpkg-deb", "--fsys-tarfile", str(fetch_debian(package, cache))]
        with tarfile.open(fileobj=io.BytesIO(subprocess.run(command, capture_output=True, check=True).stdout)) as files:
            for member in files:
                path = Path(member.name)
                if member.isfile() and path.suffix == ".jpg" and path.parent in FOLDERS:
                    pictures[path.name] = Image.open(io.BytesIO(files.extractfile(member).read()))
    for picture in pictures.values():
        picture.draft("RGB", (LARGEST, LARGEST))  # JPEGs are read at half or a quarter of their size
    shrunken = {}
    for name, picture in sorted(pictures.items()):
        shrunken[name] = picture.convert("RGB")
        shrunken[name].thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return tuple(shrunken.values())


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(f'{package}, whose photographs are needed, is not installed; run `pip install -e ".[tiny]"`.')
    return Path(spec.origin).parent


def sample_photograph(rng: np.random.Generator, photographs: tuple[Image.Image, ...], zoom: int = 1) -> np.ndarray:
    """A random square of a random photograph, sometimes mirrored: uint8 `(128 * zoom, 128 * zoom, 3)`."""
    picture = photographs[rng.integers(len(photographs))]
    longest = min(picture.size)
    side = round(float(np.exp(rng.uniform(np.log(min(SIDE, longest)), np.log(longest)))))
    left, top = (int(rng.integers(0, length - side + 1)) for length in picture.size)
    box = (left, top, left + side, top + side)
    crop = picture.resize((SIDE * zoom, SIDE * zoom), Image.Resampling.LANCZOS, box=box)
    pixels = np.asarray(crop)
    return pixels[:, ::-1].copy() if rng.random() < 0.5 else pixels
