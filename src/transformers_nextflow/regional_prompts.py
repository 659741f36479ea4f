"""Prompts for parts of an image: each runs as a branch of its own, and they are mixed where the head reads.

Letters: B prompts, A regions, M tokens of a region's prompt, H x W pixels, N codes of an image, n_s codes of a scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .kept_regions import pixel_shares
from .padding import Prompts, end_with_boi, read_prompts
from .scale_schedule import ScaleSchedule


class Region(NamedTuple):
    """A part of the image with a prompt of its own.

    Args:
        prompt_ids (`torch.LongTensor` of shape `(B, M)` or `(1, M)`): Text, padded on the left.
        mask (`torch.Tensor` of shape `(B, H, W)` or `(1, H, W)`): How much each pixel belongs to it, from 0 to 1.
        attention_mask (`torch.Tensor` of the prompt's shape, *optional*): 0 where the prompt is padding.
        negative (`bool`, *optional*, defaults to `False`):
            Guidance leads away from the prompt there, instead of drawing it.
    """

    prompt_ids: torch.Tensor
    mask: torch.Tensor
    attention_mask: torch.Tensor | None = None
    negative: bool = False


@dataclass(frozen=True)
class Regions:
    """The regions of a call.

    Args:
        prompts (list of ids and mask, `(B, M)` or `(1, M)`): They end with `<boi>`.
        shares (`torch.FloatTensor` of shape `(A, B, N)`): Of each cell, how much belongs to each region.
        negative (`list[bool]`): Which of them guidance leads away from.
        copies (`int`): Rows for each prompt.
    """

    prompts: list[Prompts]
    shares: torch.Tensor
    negative: list[bool]
    copies: int = 1

    def select(self, rows: torch.Tensor) -> "Regions":
        """With an entry for each of the given rows, in place of one for each prompt."""
        numbers = rows // self.copies
        prompts = [(ids[numbers], mask[numbers]) if len(ids) > 1 else (ids, mask) for ids, mask in self.prompts]
        return Regions(prompts, self.shares[:, numbers], self.negative)

    def mix(self, hidden_states: torch.Tensor, scale: slice, num_branches: int) -> torch.Tensor:
        """What the head reads of a scale, `((num_branches + A) * R, n_s, ...)` to `(num_branches * R, n_s, ...)`.

        A cell has the states of its regions by their shares of it, and the prompt's own (of a negative region: those
        without text) for the rest. The head is affine and the weights sum to 1: so these are the mixed logits.
        """
        branches = list(hidden_states.chunk(num_branches + len(self.prompts)))
        shares = self.shares[:, :, scale, None].to(hidden_states.device)
        if copies := len(branches[0]) // shares.shape[1] - 1:  # images no longer share a prefix
            shares = shares.repeat_interleave(copies + 1, dim=1)
        for negative in (False, True):
            chosen = [number for number, is_negative in enumerate(self.negative) if is_negative is negative]
            if not chosen or (negative and num_branches == 1):
                continue
            weights = shares[chosen]
            weights = weights / weights.sum(0).clamp(min=1)
            mixed = (1 - weights.sum(0)) * branches[negative].float()
            for weight, number in zip(weights, chosen, strict=True):
                mixed = mixed + weight * branches[num_branches + number].float()
            branches[negative] = mixed.to(hidden_states.dtype)
        return torch.cat(branches[:num_branches])


def read_regions(
    regions: Sequence[Region | Sequence[Any]] | None,
    prompts: Prompts,
    copies: int,
    schedule: ScaleSchedule,
    config: Any,
    pad: int,
) -> Regions | None:
    """`regions` of a call, in which each prompt has `copies` rows, checked.

    Raises:
        `ValueError`: if a prompt is no text, or prompts and masks don't fit the call or the image.
    """
    if regions is None:
        return None
    num_prompts, device = prompts[0].shape[0], prompts[0].device
    if not isinstance(regions, list | tuple) or not regions or not all(isinstance(r, list | tuple) for r in regions):
        raise ValueError(f"`regions` is a list of one `Region` at least, but got {regions!r:.200}.")
    read: list[Prompts] = []
    shares, negative = [], []
    for number, entry in enumerate(regions):
        name = f"`regions[{number}]`"
        try:
            region = Region(*entry)
            ids, mask = read_prompts(region.prompt_ids, region.attention_mask, pad)
            of_cells = pixel_shares(region.mask, schedule)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
        if (ids >= config.text_vocab_size).any():
            raise ValueError(f"{name}: its prompt must be text; the prompt's own images are kept anyway.")
        for what, rows in {"prompts": len(ids), "masks": len(of_cells)}.items():
            if rows not in (1, num_prompts):
                raise ValueError(f"{name} has {rows} {what} for {num_prompts} prompts. Pass one, or one per prompt.")
        if not isinstance(region.negative, bool):
            raise ValueError(f"{name}: `negative` must be True or False, but got {region.negative!r}.")
        read.append(end_with_boi(ids.to(device), mask.to(device), config.image_start_ids, pad))
        shares.append(of_cells.to(device).expand(num_prompts, -1))
        negative.append(region.negative)
    return Regions(read, torch.stack(shares), negative, copies)


__all__ = ["Region", "Regions", "read_regions"]
