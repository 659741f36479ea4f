"""Pictures and captions to a file of codes, once: the language model trains on codes and never sees a pixel."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from transformers_nextflow import NextFlowImageTokenizer

from .dataset import mixed_sample

CHUNK = 2000


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 `(B, H, W, 3)` to fp32 `(B, 3, H, W)` in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


@dataclass(frozen=True)
class Codes:
    """M samples of N codes, int16.

    `clean` are the nearest codes; `corrected` are drawn among the nearest for some places (self-correction), and
    `targets` are what should be predicted when `corrected` were seen.
    """

    captions: list[str]
    families: list[str]
    clean: np.ndarray
    corrected: np.ndarray
    targets: np.ndarray


def extract_codes(
    tokenizer: NextFlowImageTokenizer,
    folder: Path,
    num_samples: int,
    seed: int,
    cache: Path | None = None,
    weights: dict[str, float] | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Codes:
    """Encodes `num_samples` pictures of the mixture into `folder`, a chunk a file; chunks that exist are kept.

    `shard=(i, n)` does every n-th chunk only, for n processes side by side.
    """
    for path, count, rng, generator in missing_chunks(folder, num_samples, CHUNK, seed, shard):
        captions, pictures, families = zip(*(mixed_sample(rng, weights, cache) for _ in range(count)), strict=True)
        arrays = encode_pictures(tokenizer, np.stack(pictures), generator)
        save_chunk(path, captions=np.array(captions), families=np.array(families), **arrays)
    return load_codes(folder)


def missing_chunks(
    folder: Path, num_samples: int, chunk: int, seed: int, shard: tuple[int, int]
) -> Iterator[tuple[Path, int, np.random.Generator, torch.Generator]]:
    """The chunks of a folder that are still to be made: file, number of samples, and both sources of randomness."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(shard[0], -(-num_samples // chunk), shard[1]):
        path = folder / f"{number:05d}.npz"
        if not path.exists():
            generator = torch.Generator().manual_seed(seed * 100_003 + number)
            yield path, min(chunk, num_samples - number * chunk), np.random.default_rng((seed, number)), generator


def save_chunk(path: Path, **arrays: np.ndarray) -> None:
    """Writes a chunk; a kill while writing leaves none."""
    temporary = path.with_suffix(".part.npz")
    np.savez(temporary, **arrays)  # type: ignore[arg-type]
    temporary.rename(path)
    print(f"[codes] {path}", flush=True)


@torch.no_grad()
def encode_pictures(
    tokenizer: NextFlowImageTokenizer, pictures: np.ndarray, generator: torch.Generator
) -> dict[str, np.ndarray]:
    """Codes of pictures `(M, H, W, 3)` uint8 as int16 `(M, N)`: `clean`, `corrected` and `targets` of [`Codes`]."""
    arrays: dict[str, list[np.ndarray]] = {"clean": [], "corrected": [], "targets": []}
    for start in range(0, len(pictures), 50):
        pixels = to_pixels(pictures[start : start + 50]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            features = tokenizer.encode_features(pixels)
            clean = tokenizer.quantize(features)
            drawn = tokenizer.quantize(features, self_correction=True, generator=generator)
        for name, codes in zip(arrays, (clean.codes, drawn.codes, drawn.target_codes), strict=True):
            arrays[name].append(codes.numpy().astype(np.int16))
    return {name: np.concatenate(parts) for name, parts in arrays.items()}


def load_codes(folder: Path) -> Codes:
    """All chunks of a folder, in order."""
    chunks = [np.load(path) for path in sorted(folder.glob("[0-9]*.npz"))]
    if not chunks:
        raise ValueError(f"{folder} holds no codes; run `extract_codes` first.")
    return Codes(
        captions=[str(caption) for chunk in chunks for caption in chunk["captions"]],
        families=[str(family) for chunk in chunks for family in chunk["families"]],
        **{name: np.concatenate([chunk[name] for chunk in chunks]) for name in ("clean", "corrected", "targets")},
    )
