"""What a picture keeps: sources, masks, places on a larger canvas, and how strongly a picture is varied.

Axes: B prompts, H x W pixels of the picture that is drawn, S scales, N codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .generation_config_nextflow import SIZE, NextFlowGenerationConfig
from .image_processing_pil_nextflow import open_eight_bits, to_rgb
from .kept_regions import kept_places
from .picture_sources import SourceLimits
from .scale_schedule import ScaleSchedule, nearest_bucket

PRESERVE = ("latents", "codes", "pixels")
FEATHER = 8  # pixels from the edge of what is kept over which it is blended
_SHARES = {"left": 0.0, "right": 1.0, "top": 0.0, "bottom": 1.0, "center": 0.5}


@dataclass(frozen=True)
class Source:
    """What a call starts from.

    Args:
        pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): In [-1, 1].
        keep (`torch.FloatTensor` of shape `(B, H, W)`): 1 where pixels are kept, 0 where they are drawn.
        schedule (`ScaleSchedule`): That of the drawing.
        places (`torch.BoolTensor` of shape `(B, N)`): Which codes are kept.
    """

    pixel_values: torch.Tensor
    keep: torch.Tensor
    schedule: ScaleSchedule
    places: torch.Tensor

    def options(self, image_tokenizer: Any, preserve: str | None = None) -> dict[str, Any]:
        """Of [`~NextFlowGenerationMixin.generate`]: the size, and what is kept."""
        return {
            "height": self.schedule.height,
            "width": self.schedule.width,
            "num_scales": None,
            "keep_codes": image_tokenizer.encode(self.pixel_values, torch.tensor([self.schedule.grid_shw])).codes,
            "keep_mask": self.places,
            **({"keep_repair": False} if preserve == "codes" else {}),
        }

    def paste(self, images: torch.Tensor) -> torch.Tensor:
        """The kept pixels over images `(n * B, 3, H, W)` in [0, 1], blended where what is kept begins."""
        copies = len(images) // len(self.keep)
        keep, pixels = (
            part.to(images).repeat_interleave(copies, dim=0) for part in (self.keep[:, None], self.pixel_values)
        )
        half = FEATHER // 2
        keep = 1 - F.max_pool2d(1 - keep, FEATHER + 1, stride=1, padding=half)  # so that the blur ends at the edge
        for _ in range(2):  # two boxes are nearly a bell
            keep = F.avg_pool2d(F.pad(keep, [half // 2] * 4, mode="replicate"), half + 1, stride=1)
        return torch.lerp(images, (pixels + 1) / 2, keep)


def read_source(
    model: Any,
    image_processor: Any,
    pictures: Sequence[Sequence[Any]],
    mask_image: Any,
    strength: float | None = None,
    position: Any = None,
    preserve: str | None = None,
    image_in_prompt: bool | None = None,
    size: NextFlowGenerationConfig | None = None,
    num_frames: int | None = None,
) -> Source | None:
    """The last pictures of the prompts with what they keep, at the size that is drawn; None if they keep nothing.

    Args:
        model ([`NextFlowForCausalLM`]), image_processor ([`NextFlowImageProcessor`]): What draws, and what reads.
        pictures (a list of pictures for each prompt): Anything that the image processor takes.
        size ([`NextFlowGenerationConfig`], *optional*): The size that is asked for.

    The other arguments are the pipeline's.

    Raises:
        `ValueError`: for what makes no sense, or leaves nothing to draw or nothing to keep.
    """
    _check_options(pictures, mask_image, strength, position, preserve, image_in_prompt)
    if mask_image is strength is position is None:
        return None
    if num_frames is not None:
        raise ValueError("`mask_image`, `strength` and `position` are for single images, without `num_frames`.")
    if not model.config.writes_text:
        raise ValueError("`mask_image`, `strength` and `position` are for NextFlow; this model only draws texts anew.")
    sources = [of_prompt[-1] for of_prompt in pictures]
    masks = _mask_list(mask_image, sources)
    limits = SourceLimits.of(vars(image_processor))
    arrays = [read_picture(picture, limits) for picture in sources]
    drawn: list[Any] = [np.zeros(array.shape[:2], np.float32) for array in arrays]
    if masks is not None:
        drawn = [read_mask(mask, limits).numpy() for mask in masks]
        for mask, array in zip(drawn, arrays, strict=True):
            if mask.shape != array.shape[:2]:
                raise ValueError(
                    f"`mask_image` has {mask.shape[1]} x {mask.shape[0]} pixels (width x height), but its `image` has "
                    f"{array.shape[1]} x {array.shape[0]}. Resize it to that."
                )
    size = size or NextFlowGenerationConfig()
    asked = any(getattr(size, name) is not None for name in SIZE)
    if position is not None or asked:
        chosen = size if asked else size.over(model.generation_config)
        schedule = model.config.schedule(*(getattr(chosen, name) for name in SIZE))
    if position is not None:
        placed = [_place(array, mask, position, schedule) for array, mask in zip(arrays, drawn, strict=True)]
        arrays, drawn = [array for array, _ in placed], [mask for _, mask in placed]
    elif not asked:
        schedules = {ScaleSchedule(nearest_bucket(*array.shape[:2]), image_processor.num_scales) for array in arrays}
        if len(schedules) > 1:
            sizes = sorted({(array.shape[1], array.shape[0]) for array in arrays})
            raise ValueError(
                f"The pictures have the sizes {sizes} (width, height), but those of a call are drawn at one size. Pass "
                "`height` and `width`, or one at a time."
            )
        schedule = schedules.pop()
    # As `generate` reads a size: several schedules end at the same one.
    schedule = ScaleSchedule.from_size(schedule.height, schedule.width)
    sized = {"height": schedule.height, "width": schedule.width, "return_tensors": "pt"}
    pixel_values = image_processor(arrays, **sized)["pixel_values"]
    shades = [np.rint(mask[..., None].repeat(3, -1) * 255).astype(np.uint8) for mask in drawn]
    keep = ((1 - image_processor(shades, **sized)["pixel_values"].mean(1)) / 2).clamp(0, 1)
    places = kept_places(keep, schedule)
    if strength is not None:  # those of no scale from this one on, but for a mask
        first = schedule.offsets[int((1 - strength) * schedule.num_scales + 1e-6)]
        before = (torch.arange(schedule.num_tokens) < first).expand_as(places)
        places = before if masks is position is None else places | before
    for row in places:
        if row.all():
            raise ValueError(
                "`mask_image` leaves nothing to draw: it must be white where the picture is to change, in the most of "
                f"a cell of {schedule.stride} x {schedule.stride} pixels at least."
            )
        if not row.any() and strength is None:
            raise ValueError(
                "`mask_image` keeps nothing: it must be black where the picture is to stay. For a new picture leave "
                "out `image` and `mask_image`."
            )
    return Source(pixel_values, keep, schedule, places)


def _check_options(pictures, mask_image, strength, position, preserve, image_in_prompt) -> None:
    given = {
        **{"mask_image": mask_image, "strength": strength, "position": position},
        **{"preserve": preserve, "image_in_prompt": image_in_prompt},
    }
    given = {name: value for name, value in given.items() if value is not None}
    if given and not all(pictures):
        raise ValueError(f"`{next(iter(given))}` is about an `image`, and there is none.")
    if not isinstance(image_in_prompt, bool | None):
        raise ValueError(f"`image_in_prompt` must be True or False, but got {image_in_prompt!r}.")
    if preserve is not None and preserve not in PRESERVE:
        raise ValueError(f'`preserve` must be one of {", ".join(PRESERVE)}, but got "{preserve}".')
    if preserve is not None and mask_image is position is None:
        raise ValueError("`preserve` says how a part is kept: pass `mask_image` or `position`, or leave it out.")
    if strength is not None and not (_is_number(strength) and 0 < float(strength) <= 1):
        raise ValueError(f"`strength` must be above 0 (hardly a change) and at most 1, but got {strength!r}.")
    keeps = given.keys() & {"mask_image", "strength", "position"}
    if image_in_prompt is False and not keeps:
        raise ValueError(
            "`image_in_prompt=False` leaves no use for `image` but with `mask_image`, `strength` or `position`."
        )
    if keeps and not image_in_prompt and (several := max(map(len, pictures))) > 1:
        raise ValueError(
            f"Parts of one `image` are kept, but a prompt has {several}. Pass one, or `image_in_prompt=True`: then it "
            "is the last."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def read_picture(source: Any, limits: SourceLimits) -> np.ndarray:
    """A picture of any source, upright, as `uint8` `(H, W, 3)`."""
    image, turn = open_eight_bits(source, limits)
    return to_rgb(image if turn is None else image.transpose(turn))


def read_mask(source: Any, limits: SourceLimits) -> torch.Tensor:
    """The brightness of a picture, `(H, W)` float32 from 0 to 1."""
    if isinstance(source, torch.Tensor) and source.dtype == torch.bool:
        source = source.float()
    try:
        return torch.from_numpy(read_picture(source, limits)).float().mean(-1) / 255
    except (TypeError, ValueError) as error:
        raise ValueError(f"A mask is a picture, white where it counts: {error}") from error


def _place(
    array: np.ndarray, mask: np.ndarray, position: Any, schedule: ScaleSchedule
) -> tuple[np.ndarray, np.ndarray]:
    """A picture and its mask on a canvas, which goes on from the picture's edges and is drawn around it."""
    free = schedule.width - array.shape[1], schedule.height - array.shape[0]
    if min(free) < 0 or max(free) == 0:
        raise ValueError(
            f"With `position`, the `image` stands on a larger canvas, but it has {array.shape[1]} x {array.shape[0]} "
            f"pixels (width x height) and the canvas {schedule.width} x {schedule.height}. Pass a larger `height` and "
            "`width`, or make the image smaller."
        )
    left, top = _offset(position, free)
    around = (top, free[1] - top), (left, free[0] - left)
    return np.pad(array, (*around, (0, 0)), mode="edge"), np.pad(mask, around, constant_values=1)


def _offset(position: Any, free: tuple[int, int]) -> tuple[int, int]:
    """Left and top of a picture, of as many pixels as are free beside it."""
    legal = '"center", "left", "top right" and the like, or (left, top) in pixels'
    if isinstance(position, str):
        words = position.replace("-", " ").split()
        across = [word for word in words if word in ("left", "right")]
        down = [word for word in words if word in ("top", "bottom")]
        if not words or max(len(across), len(down)) > 1 or set(words) - _SHARES.keys() or len(words) > 2:
            raise ValueError(f"`position` must be {legal}, but got {position!r}.")
        shares = (_SHARES[part[0] if part else "center"] for part in (across, down))
        left, top = (round(share * side) for share, side in zip(shares, free, strict=True))
        return left, top
    numbers = list(position) if isinstance(position, list | tuple) else []
    if len(numbers) != 2 or not all(isinstance(n, Integral) and not isinstance(n, bool) for n in numbers):
        raise ValueError(f"`position` must be {legal}, but got {position!r}.")
    if not all(0 <= number <= side for number, side in zip(numbers, free, strict=True)):
        raise ValueError(f"`position` {tuple(numbers)} must be from (0, 0) to {free}, or the image leaves the canvas.")
    return int(numbers[0]), int(numbers[1])


def _mask_list(mask_image: Any, pictures: Sequence[Any]) -> list[Any] | None:
    """A mask for each prompt's picture."""
    if mask_image is None:
        return None
    if getattr(mask_image, "ndim", 0) == 4:  # a batch of them
        mask_image = list(mask_image)
    one = not isinstance(mask_image, list | tuple)
    masks = [mask_image] * len(pictures) if one else list(mask_image)
    several = len({id(picture) for picture in pictures})
    if len(masks) != len(pictures) or (one and several > 1):
        raise ValueError(
            f"Got {1 if one else len(masks)} masks for {several} images of {len(pictures)} prompts. `mask_image` is "
            "one mask for one image, or a list with one for each prompt."
        )
    return masks


__all__ = ["Source", "read_mask", "read_picture", "read_source"]
