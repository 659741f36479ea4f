"""Batches of prompts: their padding, and the images in them, as pure functions of tensors.

Letters: B rows, L slots a row.
"""

import torch
import torch.nn.functional as F


def check_left_padded(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, pad_token_id: int | None):
    """Generation goes on after the last column, so padding must stand on the left."""
    if attention_mask is not None:
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


def move_right(ids: torch.Tensor, keep: torch.Tensor, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left padding from any choice of tokens: ids `(B, L)` and bool `keep` `(B, L)` to ids and mask, `(B, L)` int64."""
    order = keep.long().argsort(dim=-1, stable=True)
    keep = keep.gather(-1, order)
    return ids.gather(-1, order).masked_fill(~keep, pad_token_id), keep.long()


def stack_rows(
    upper: tuple[torch.Tensor, torch.Tensor], lower: tuple[torch.Tensor, torch.Tensor], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two left-padded batches `(ids, mask)` as one, padded to the longer."""
    length = max(upper[0].shape[1], lower[0].shape[1])

    def widen(rows: torch.Tensor, value: int) -> torch.Tensor:
        return F.pad(rows, (length - rows.shape[1], 0), value=value)

    ids = torch.cat([widen(upper[0], pad_token_id), widen(lower[0], pad_token_id)])
    return ids, torch.cat([widen(upper[1], 0), widen(lower[1], 0)])


def count_images(input_ids: torch.Tensor, text_vocab_size: int) -> list[int]:
    """Number of images in each row of token-view ids `(B, L)`."""
    is_code = F.pad(input_ids >= text_vocab_size, (1, 0))
    return (is_code[:, 1:] & ~is_code[:, :-1]).sum(-1).tolist()


def split_grids(
    input_ids: torch.Tensor, image_grid_shw: torch.Tensor, text_vocab_size: int
) -> tuple[torch.Tensor, ...]:
    """The rows of `image_grid_shw` `(num_images, 3)` that belong to each row of token-view ids `(B, L)`."""
    return image_grid_shw.split(count_images(input_ids, text_vocab_size))
