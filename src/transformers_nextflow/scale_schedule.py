"""Scale schedules: which grids an image is predicted on, coarse to fine (NextFlow, arXiv 2601.02204, Table 14).

Pure Python on purpose: a data loader, a server's router or a notebook can plan images without importing torch.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise
from operator import index
from typing import Any

# Sides of the square schedule, one per scale; the 12th is 16, the side that names a bucket.
BASE_SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)
BUCKET_SIDE = 16
MIN_AREA_RATIO = 0.9
MAX_ASPECT_RATIO = 4.0
MAX_STRIDE = 256


def _whole(name: str, values: Iterable[Any]) -> tuple[int, ...]:
    try:
        return tuple(map(index, values))
    except TypeError as error:
        raise TypeError(f"`{name}` must be whole numbers, but got {values!r}.") from error


@lru_cache
def aspect_buckets() -> tuple[tuple[int, int], ...]:
    """All legal buckets `(h, w)`, from the widest (1:4) to the tallest (4:1): the 41 rows of the paper's Table 14.

    A bucket is the grid of the 12th scale. It holds between 90 % and 100 % of 16 x 16 cells and is at most 4:1.
    """
    area = BUCKET_SIDE**2
    sides = range(1, area + 1)
    legal = [
        (h, w)
        for h in sides
        for w in sides
        if MIN_AREA_RATIO * area <= h * w <= area and 1 / MAX_ASPECT_RATIO <= h / w <= MAX_ASPECT_RATIO
    ]
    return tuple(sorted(legal, key=lambda bucket: bucket[0] / bucket[1]))


def nearest_bucket(height: float, width: float) -> tuple[int, int]:
    """The bucket whose aspect ratio is nearest to `height / width` on a log scale; of equals, the larger one."""
    if height <= 0 or width <= 0:
        raise ValueError(f"An image needs a positive height and width, but got {height} x {width}.")
    log_aspect = math.log(height / width)
    return min(aspect_buckets(), key=lambda b: (abs(math.log(b[0] / b[1]) - log_aspect), -b[0] * b[1]))


@dataclass(frozen=True)
class ScaleSchedule:
    """The grids of one image, coarse to fine.

    Args:
        bucket (`tuple[int, int]`, *optional*, defaults to `(16, 16)`):
            One of [`aspect_buckets`]: height and width of the 12th grid, in cells.
        num_scales (`int`, *optional*, defaults to 18):
            How many scales, 1 to 18. The paper uses 12 for 256-level images, 16 for 512 and 18 for 1024.
        stride (`int`, *optional*, defaults to 16):
            Pixels per cell of the last grid.
        sides (`tuple[int, ...]`, *optional*, defaults to the paper's 18):
            Sides of the square grids, one per scale, from 1 upwards; other tokenizers have others. A bucket's grids are
            these, stretched to its aspect.

    Raises:
        `ValueError`: if the bucket, the number of scales or the sides are not legal.
        `TypeError`: if they are not whole numbers.

    Example:

    ```python
    >>> from transformers_nextflow import ScaleSchedule

    >>> schedule = ScaleSchedule.from_size(1024, 1024)
    >>> schedule.num_scales, schedule.num_tokens, schedule.grids[:4]
    (18, 10084, ((1, 1), (2, 2), (3, 3), (4, 4)))
    ```
    """

    bucket: tuple[int, int] = (BUCKET_SIDE, BUCKET_SIDE)
    num_scales: int = len(BASE_SIDES)
    stride: int = 16
    sides: tuple[int, ...] = BASE_SIDES
    # Made once: `torch.compile` reads these as constants, and would trace a property's loops.
    grids: tuple[tuple[int, int], ...] = field(init=False, compare=False)
    """`(h_s, w_s)` of every scale, in cells."""
    scale_lengths: tuple[int, ...] = field(init=False, compare=False)
    """Number of codes of each scale, `n_s = h_s * w_s`."""
    offsets: tuple[int, ...] = field(init=False, compare=False)
    """Where each scale starts in the flat codes; one entry more than scales, the last is `num_tokens`."""

    def __post_init__(self):
        bucket, sides = _whole("bucket", self.bucket), _whole("sides", self.sides)
        (num_scales,), (stride,) = _whole("num_scales", [self.num_scales]), _whole("stride", [self.stride])
        # A list or a tensor row is welcome, but the fields must hash.
        for name, value in {"bucket": bucket, "num_scales": num_scales, "stride": stride, "sides": sides}.items():
            object.__setattr__(self, name, value)
        if bucket not in aspect_buckets():
            nearest = nearest_bucket(*bucket) if len(bucket) == 2 and min(bucket) > 0 else (BUCKET_SIDE, BUCKET_SIDE)
            raise ValueError(
                f"`bucket` {bucket} is not one of the {len(aspect_buckets())} aspect buckets; the nearest is {nearest}."
                " See `transformers_nextflow.aspect_buckets()`."
            )
        if not 1 <= stride <= MAX_STRIDE:
            raise ValueError(f"`stride` must be between 1 and {MAX_STRIDE}, but got {stride}.")
        if sides[:1] != (1,) or any(b <= a for a, b in pairwise(sides)):
            raise ValueError(f"`sides` must begin with 1 and grow from scale to scale, but got {list(sides)}.")
        if not 1 <= num_scales <= len(sides):
            raise ValueError(f"`num_scales` must be between 1 and {len(sides)}, but got {num_scales}.")
        # Python's `round` rounds half to even, which is what reproduces the paper's table.
        h, w = (tuple(max(1, round(s * side / BUCKET_SIDE)) for s in sides[1:num_scales]) for side in bucket)
        grids = ((1, 1), *zip(h, w, strict=True))
        lengths = tuple(height * width for height, width in grids)
        object.__setattr__(self, "grids", grids)
        object.__setattr__(self, "scale_lengths", lengths)
        object.__setattr__(self, "offsets", (0, *accumulate(lengths)))

    def __repr__(self):
        own_sides = "" if self.sides == BASE_SIDES else f", sides={self.sides}"
        return f"ScaleSchedule(bucket={self.bucket}, num_scales={self.num_scales}, stride={self.stride}{own_sides})"

    @property
    def num_tokens(self) -> int:
        """Number of codes of the whole image, `N`."""
        return self.offsets[-1]

    @property
    def height(self) -> int:
        """Height of the decoded image, in pixels."""
        return self.stride * self.grids[-1][0]

    @property
    def width(self) -> int:
        """Width of the decoded image, in pixels."""
        return self.stride * self.grids[-1][1]

    @property
    def grid_shw(self) -> tuple[int, int, int]:
        """This schedule as a row of `image_grid_shw`: `(num_scales, bucket height, bucket width)`."""
        return (self.num_scales, *self.bucket)

    @classmethod
    def from_grid_shw(cls, row: Iterable[int], stride: int = 16, sides: Sequence[int] = BASE_SIDES) -> "ScaleSchedule":
        """The schedule of one row `(num_scales, h, w)` of `image_grid_shw`."""
        numbers = tuple(row)
        if len(numbers) != 3:
            raise ValueError(f"A row of `image_grid_shw` is (number of scales, height, width), but got {numbers}.")
        return cls(numbers[1:], numbers[0], stride, tuple(sides))

    @classmethod
    def from_size(
        cls,
        height: int,
        width: int,
        num_scales: int | None = None,
        stride: int = 16,
        sides: Sequence[int] = BASE_SIDES,
    ) -> "ScaleSchedule":
        """The schedule of an image of `height` x `width` pixels.

        Args:
            height (`int`): Height in pixels.
            width (`int`): Width in pixels.
            num_scales (`int`, *optional*):
                Forces the number of scales: then only the aspect ratio of `height` and `width` counts, and
                the nearest bucket is taken. Without it the size must be exactly that of a schedule.
            stride (`int`, *optional*, defaults to 16): Pixels per cell of the last grid.
            sides (`Sequence[int]`, *optional*, defaults to the paper's 18): See [`ScaleSchedule`].

        Raises:
            `ValueError`: if no schedule ends at this size; the message names the nearest sizes.
        """
        (height, width), (stride,) = _whole("height` and `width", [height, width]), _whole("stride", [stride])
        if min(height, width, stride) < 1:
            raise ValueError(f"`height`, `width` and `stride` must be positive, but got {height}, {width}, {stride}.")
        sides = tuple(sides)
        if num_scales is not None:
            if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
                raise ValueError(f"{height} x {width} is beyond the aspect ratios 1:4 to 4:1.")
            return cls(nearest_bucket(height, width), num_scales, stride, sides)
        on_grid = height % stride == 0 and width % stride == 0
        match = _schedules_by_grid(sides).get((height // stride, width // stride)) if on_grid else None
        if match is None:
            nearest = ", ".join(f"{h} x {w}" for h, w in nearest_sizes(height, width, stride, sides=sides))
            raise ValueError(
                f"No scale schedule ends at height {height} x width {width}. The nearest legal sizes (height x width) "
                f"are {nearest}. Pick one of them, or pass `num_scales` to choose by aspect ratio alone."
            )
        return cls(match.bucket, match.num_scales, stride, sides)

    def prefix(self, num_scales: int) -> "ScaleSchedule":
        """The schedule of the first `num_scales` scales (the same bucket)."""
        if not 1 <= num_scales <= self.num_scales:
            raise ValueError(
                f"A prefix of {self.num_scales} scales has 1 to {self.num_scales} scales, not {num_scales}."
            )
        return ScaleSchedule(self.bucket, num_scales, self.stride, self.sides)

    def flops(self, hidden_size: int, num_text_tokens: int, num_layers: int = 1) -> int:
        """Forward FLOPs of a prompt's prefill and all scales, by the paper's cost model (appendix A.2).

        The text is one dense step; the 1x1 scale counts as a step.
        """
        return sequence_flops((num_text_tokens, *self.scale_lengths), hidden_size, num_layers)


def sequence_flops(steps: Iterable[int], hidden_size: int, num_layers: int = 1) -> int:
    """Forward FLOPs of a sequence that is run in steps of these numbers of tokens (the paper's appendix A.2).

    A layer costs `12 * q * hidden_size**2 + 4 * q * kv * hidden_size` for `q` new tokens that attend to `kv`
    (themselves among them).
    """
    total = kv = 0
    for q in steps:
        kv += q
        total += 12 * q * hidden_size**2 + 4 * q * kv * hidden_size
    return num_layers * total


@lru_cache
def _schedules_by_grid(sides: tuple[int, ...] = BASE_SIDES) -> dict[tuple[int, int], ScaleSchedule]:
    """Last grid -> schedule. Of the buckets that share a grid, the nearest in aspect wins, then the fewest scales."""
    best: dict[tuple[int, int], tuple[tuple[float, int, int], ScaleSchedule]] = {}
    for bucket in aspect_buckets():
        for num_scales in range(1, len(sides) + 1):
            schedule = ScaleSchedule(bucket, num_scales, sides=sides)
            grid = schedule.grids[-1]
            distance = abs(math.log(bucket[0] / bucket[1]) - math.log(grid[0] / grid[1]))
            key = (distance, num_scales, -bucket[0] * bucket[1])
            if grid not in best or key < best[grid][0]:
                best[grid] = (key, schedule)
    return {grid: schedule for grid, (_, schedule) in best.items()}


def nearest_sizes(
    height: int, width: int, stride: int = 16, count: int = 3, sides: Sequence[int] = BASE_SIDES
) -> list[tuple[int, int]]:
    """The `count` legal sizes (height, width in pixels) nearest to the given one, nearest first.

    Aspect and area are compared on a log scale, aspect counting more: a user who misses a size by a few pixels
    wants the same shape.
    """

    def distance(size: tuple[int, int]) -> float:
        tall, wide = math.log(size[0] / height), math.log(size[1] / width)
        return 4 * (tall - wide) ** 2 + (tall + wide) ** 2

    sizes = [(h * stride, w * stride) for h, w in _schedules_by_grid(tuple(sides))]
    return sorted(sizes, key=distance)[:count]


__all__ = ["ScaleSchedule", "aspect_buckets", "nearest_bucket", "nearest_sizes"]
