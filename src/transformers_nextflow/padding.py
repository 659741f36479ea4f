"""Padded batches of prompts, as pure functions of tensors.

A batch is token-view ids `(B, L)` and a mask of the same shape, 0 where there is padding (on the left).
Letters: B rows, L slots per row.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

from .model_inputs import check_tensors
from .token_layout import opens_image

Prompts = tuple[torch.Tensor, torch.Tensor]


def check_left_padded(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, pad_token_id: int | None):
    """Generation goes on after the last column, so padding must stand on the left."""
    check_tensors(input_ids=input_ids, attention_mask=attention_mask)
    if input_ids.ndim != 2:
        raise ValueError(f"Prompts must have shape (batch, length), but got shape {tuple(input_ids.shape)}.")
    if input_ids.numel() and input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"Prompts are ids and must be integers, but got {input_ids.dtype}.")
    if attention_mask is not None:
        if ((attention_mask != 0) & (attention_mask != 1)).any():
            raise ValueError("`attention_mask` must be 1 for what is read and 0 for padding, but has other values.")
        padded_right = attention_mask[:, 1:] < attention_mask[:, :-1]
    elif pad_token_id is not None and len(input_ids) > 1:
        padded_right = input_ids[:, -1:].eq(pad_token_id)
    else:
        return
    if padded_right.any():
        raise ValueError(
            "The prompts are padded on the right, but generation goes on after the last column. Pad on the left: "
            '`tokenizer.padding_side = "left"`.'
        )


def check_mask_shape(attention_mask: torch.Tensor, input_ids: torch.Tensor, hint: str = "") -> None:
    """A mask has the shape of the prompts; `hint` is what else a message says."""
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"The attention mask has shape {tuple(attention_mask.shape)}, but the prompts have "
            f"{tuple(input_ids.shape)}.{hint}"
        )


def check_not_empty(attention_mask: torch.Tensor) -> None:
    """Text goes on from a token: only images may be drawn of nothing."""
    if not attention_mask.any(-1).all():
        raise ValueError("A prompt is empty: `input_ids` must have one token at least that `attention_mask` keeps.")


def read_prompts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, pad_token_id: int, name: str = "attention_mask"
) -> Prompts:
    """Ids and mask, checked; without a mask, leading padding is found by its id."""
    check_left_padded(input_ids, attention_mask, pad_token_id)
    ids = input_ids.long()  # of an empty text tokenizers make floats
    if attention_mask is None:
        return ids, (ids != pad_token_id).cumsum(-1).clamp(max=1)
    check_mask_shape(attention_mask, ids, f" It is `{name}`.")
    return ids, attention_mask.to(ids.device).long()


def move_right(ids: torch.Tensor, keep: torch.Tensor, pad_token_id: int) -> Prompts:
    """Moves chosen tokens to the right: ids `(B, L)` and bool `keep` `(B, L)` to ids and mask, `(B, L)` int64."""
    order = keep.long().argsort(dim=-1, stable=True)
    keep = keep.gather(-1, order)
    return ids.gather(-1, order).masked_fill(~keep, pad_token_id), keep.long()


def end_with_boi(ids: torch.Tensor, mask: torch.Tensor, start_ids: Sequence[int], pad_token_id: int) -> Prompts:
    """Prompts that all end with the ids that open an image (`<boi>`), which are added where they are missing."""
    ends_with_boi = opens_image(ids, start_ids)[:, -1:].any(-1, keepdim=True)
    if ends_with_boi.all():
        return ids, mask
    boi = torch.tensor(start_ids, device=ids.device).expand(len(ids), -1)
    added = ~ends_with_boi.expand_as(boi)
    return move_right(torch.cat([ids, boi], dim=1), torch.cat([mask.bool(), added], dim=1), pad_token_id)


def unconditional_prompts(
    prompts: Prompts, negative: Prompts, text_vocab_size: int, pad_token_id: int, with_images: bool = True
) -> Prompts:
    """The prompts of guidance's other branches: the prompts' images, then the negative prompts with their `<boi>`.

    Args:
        prompts (ids and mask, `(B, L)` both): They end with the `<boi>` of the image to be drawn.
        negative (ids and mask, `(B, M)` or `(1, M)` both): Text that ends with `<boi>`, or `<boi>` alone.
        text_vocab_size (`int`): The first visual id.
        pad_token_id (`int`): What to pad with.
        with_images (`bool`, *optional*, defaults to `True`): False leaves out the images, too.

    Raises:
        `ValueError`: if there are neither one nor B negative prompts, or if they hold images.
    """
    (ids, mask), (negative_ids, negative_mask) = prompts, negative
    if len(negative_ids) not in (1, len(ids)):
        raise ValueError(f"Got {len(negative_ids)} negative prompts for {len(ids)} prompts. Pass one, or one each.")
    if (negative_ids >= text_vocab_size).any():
        raise ValueError("`negative_prompt_ids` must be text: the prompt's own images are kept anyway.")
    negative_ids, negative_mask = (rows.expand(len(ids), -1) for rows in negative)
    if not with_images:
        return negative_ids, negative_mask
    is_code = ids >= text_vocab_size
    # An image is its codes and the <boi> before them; the last <boi>, of the image to be drawn, opens none yet.
    opens_image = F.pad(is_code[:, 1:], (0, 1))
    kept = (is_code | opens_image) & mask.bool()
    ids, mask = move_right(
        torch.cat([ids, negative_ids], dim=1), torch.cat([kept, negative_mask.bool()], dim=1), pad_token_id
    )
    longest = int(mask.sum(-1).max())
    return ids[:, -longest:], mask[:, -longest:]


def stack_rows(batches: Sequence[Prompts], pad_token_id: int) -> Prompts:
    """Left-padded batches as one, padded to the longest."""
    length = max(ids.shape[1] for ids, _ in batches)

    def stack(parts: Iterable[torch.Tensor], value: int) -> torch.Tensor:
        return torch.cat([F.pad(part, (length - part.shape[1], 0), value=value) for part in parts])

    return stack((ids for ids, _ in batches), pad_token_id), stack((mask for _, mask in batches), 0)
