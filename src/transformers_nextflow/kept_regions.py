"""Parts of an image that are kept while the rest is drawn: which places, and which codes stand there.

Letters: B prompts, R images that are drawn together, H x W pixels, N codes of an image, n_s codes of a scale, (h, w)
the last grid, K codes in the codebook, D channels of a code vector.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .multi_scale_quantizer import downsample, lookup_slices, upsample
from .scale_schedule import ScaleSchedule

LEAST_SHARE = 0.5  # of a cell's pixels that makes it a kept one


@dataclass(frozen=True)
class KeptCodes:
    """What a drawing keeps.

    Args:
        codes (`torch.LongTensor` of shape `(B, N)`): Codes of the whole source.
        places (`torch.BoolTensor` of shape `(B, N)`): Which of them are kept.
        repair (`bool`): Whether kept codes make up for what was drawn otherwise on coarser scales; see [`Keeper`].
    """

    codes: torch.Tensor
    places: torch.Tensor
    repair: bool = True

    def select(self, rows: torch.Tensor) -> "KeptCodes":
        """Those of the given rows."""
        return KeptCodes(self.codes[rows], self.places[rows], self.repair)


def kept_places(mask: torch.Tensor, schedule: ScaleSchedule) -> torch.Tensor:
    """The kept places of every scale, bool `(B, N)`: cells of whose pixels at least half are kept.

    Arguments and errors are those of [`pixel_shares`].
    """
    return pixel_shares(mask, schedule) >= LEAST_SHARE


def pixel_shares(mask: torch.Tensor, schedule: ScaleSchedule) -> torch.Tensor:
    """How much of each cell a mask covers, on every scale.

    Args:
        mask (`torch.Tensor` of shape `(B, H, W)`): From 0 to 1 for each pixel.
        schedule (`ScaleSchedule`): Of an image of this size.

    Returns:
        `torch.FloatTensor` of shape `(B, N)`, from 0 to 1.

    Raises:
        `ValueError`: for a mask of another size or with other values.
    """
    if not isinstance(mask, torch.Tensor) or mask.ndim != 3 or mask.shape[1:] != (schedule.height, schedule.width):
        raise ValueError(
            f"A mask of pixels has the image's size, (batch, {schedule.height}, {schedule.width}), but got "
            f"{_describe(mask)}."
        )
    check_shares(mask)
    return torch.cat([downsample(mask[:, None].float(), grid).flatten(1) for grid in schedule.grids], dim=1)


def check_shares(mask: torch.Tensor) -> None:
    """A `ValueError` unless all values are from 0 to 1."""
    if not ((mask >= 0) & (mask <= 1)).all():
        raise ValueError(
            f"A mask has values from 0 to 1, but these are from {float(mask.min())} to {float(mask.max())}. Divide one "
            "of 8 bits by 255."
        )


def read_kept(
    codes: torch.Tensor | None,
    mask: torch.Tensor | None,
    repair: bool | None,
    num_prompts: int,
    schedule: ScaleSchedule,
    num_codes: int,
    device: torch.device,
) -> KeptCodes | None:
    """`keep_codes`, `keep_mask` and `keep_repair` of a call, checked; each prompt has its own row.

    Raises:
        `ValueError`: if one is missing, or they don't fit the images that are drawn.
    """
    if codes is None and mask is None:
        if repair is not None:
            raise ValueError("`keep_repair` says how `keep_codes` are kept, and there are none. Leave it out.")
        return None
    if codes is None or mask is None:
        raise ValueError("Pass `keep_codes` and `keep_mask` together: what is kept, and where.")
    if not isinstance(repair, bool | None):
        raise ValueError(f"`keep_repair` must be True or False, but got {repair!r}.")
    total, rows = schedule.num_tokens, " or ".join(str(number) for number in sorted({1, num_prompts}))
    if not isinstance(codes, torch.Tensor) or codes.is_floating_point() or codes.shape[1:] != (total,):
        raise ValueError(
            f"`keep_codes` must be whole numbers of shape ({rows}, {total}): the codes of an image of "
            f"{schedule.height} x {schedule.width} pixels (height x width), the size that is drawn, but got "
            f"{_describe(codes)}. Encode the source at this size, or pass its `height` and `width`."
        )
    if not ((codes >= 0) & (codes < num_codes)).all():
        raise ValueError(
            f"`keep_codes` must be from 0 to {num_codes - 1}, but are from {int(codes.min())} to {int(codes.max())}. "
            "They are codes and not ids."
        )
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"`keep_mask` must be a tensor, but got {_describe(mask)}.")
    try:
        places = kept_places(mask, schedule) if mask.ndim == 3 else mask
        check_shares(places)
    except ValueError as error:
        raise ValueError(f"`keep_mask`: {error}") from error
    if places.shape[1:] != (total,) or not ((places == 0) | (places == 1)).all():
        raise ValueError(
            f"`keep_mask` must have a yes or no for each code, shape ({rows}, {total}), or values from 0 to 1 for each "
            f"pixel, ({rows}, {schedule.height}, {schedule.width}), but got {_describe(mask)}."
        )
    for name, part in {"keep_codes": codes, "keep_mask": places}.items():
        if len(part) not in (1, num_prompts):
            raise ValueError(f"`{name}` has {len(part)} rows for {num_prompts} prompts. Pass one, or one per prompt.")
    codes, places = (part.to(device).expand(num_prompts, -1) for part in (codes.long(), places.bool()))
    return KeptCodes(codes, places, repair is not False)


def _describe(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


class Keeper:
    """Puts kept codes into images while they are drawn.

    Codes are residual: a code of the source is right on top of the source's own coarser codes. Where a coarser one was
    drawn, or a neighbour reaches over, the kept code would leave the difference. So with `repair` a place gets the code
    nearest to the source's code vector and what is missing so far, which later scales go on to make up for. Where
    nothing is missing that is the source's code itself.

    Args:
        kept ([`KeptCodes`] of R rows): Of the images that are drawn.
        schedule (`ScaleSchedule`): The images'.
        codebook (`torch.FloatTensor` of shape `(K, D)`): The code vectors.
    """

    def __init__(self, kept: KeptCodes, schedule: ScaleSchedule, codebook: torch.Tensor):
        self.kept, self.schedule, self.codebook = kept, schedule, codebook.float()
        self.missing: torch.Tensor | None = None  # `(R, D, h, w)`: code vectors of the source less those drawn

    def place(self, index: int, codes: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Codes `(R, n_s)` of a scale with the kept ones among those drawn, after all `codes` `(R, n)` before it.

        Scales come one after the other. Once images no longer share a prefix, there are more rows.
        """
        if (copies := len(drawn) // len(self.kept.codes)) > 1:
            rows = torch.arange(len(self.kept.codes), device=drawn.device).repeat_interleave(copies)
            self.kept = self.kept.select(rows)
            self.missing = None if self.missing is None else self.missing[rows]
        scale = slice(*self.schedule.offsets[index : index + 2])
        source, places = self.kept.codes[:, scale], self.kept.places[:, scale]
        if self.kept.repair and index > 0:
            missing = self._missing_after(index - 1, codes)
            if places.any():
                source = self._repaired(index, source, places, missing)
        return torch.where(places, source.to(drawn), drawn)

    def _vectors(self, codes: torch.Tensor, index: int) -> torch.Tensor:
        """Code vectors `(R, D, h_s, w_s)` of a scale."""
        return F.embedding(codes.to(self.codebook.device), self.codebook).mT.unflatten(2, self.schedule.grids[index])

    def _missing_after(self, index: int, codes: torch.Tensor) -> torch.Tensor:
        """What is missing once a scale has been drawn."""
        scale = slice(*self.schedule.offsets[index : index + 2])
        left = self._vectors(self.kept.codes[:, scale], index) - self._vectors(codes[:, scale], index)
        left = upsample(left, self.schedule.grids[-1])
        self.missing = left if self.missing is None else self.missing + left
        return self.missing

    def _repaired(self, index: int, source: torch.Tensor, places: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
        missing = downsample(missing, self.schedule.grids[index]).flatten(2).mT  # `(R, n_s, D)`
        wrong = places.to(missing.device) & missing.ne(0).any(-1)
        wanted = self._vectors(source, index).flatten(2).mT[wrong] + missing[wrong]
        repaired = source.clone()
        repaired[wrong.to(source.device)] = nearest_codes(wanted, self.codebook).to(source)
        return repaired


def nearest_codes(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The codes `(m,)` whose vectors are nearest to those given, `(m, D)`, float32."""
    half_squares = codebook.square().sum(-1) / 2
    slices = lookup_slices(vectors, codebook)
    return torch.cat([(half_squares - rows @ codebook.T).argmin(-1) for rows in slices])


__all__ = ["Keeper", "KeptCodes", "kept_places", "nearest_codes", "pixel_shares", "read_kept"]
