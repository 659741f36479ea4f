"""Attention over packed rows, one sequence after the other: what sequences don't see of each other costs nothing.

With `attn_implementation="sdpa"` a packed row is one masked square of L x L, whatever it holds. `"sdpa_varlen"` gives
each sequence a square of its own: the sum of their squared lengths, with the fused causal kernel where there is no
image. Rows that aren't packed go to "sdpa". (Flex attention skips what is masked by itself, but has no backward pass on
CPUs; flash attention can't let the slots of one scale see each other.)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SDPA_VARLEN = "sdpa_varlen"


class PackedSequence(NamedTuple):
    """One sequence of a packed row.

    Args:
        row (`int`): The row of the batch.
        slots (`slice`): The sequence's place in the row.
        mask (`torch.BoolTensor` of shape `(n, n)`, *optional*): Who sees whom; None for plain causal.
    """

    row: int
    slots: slice
    mask: torch.Tensor | None


def find_sequences(seq_idx: torch.Tensor, block_ids: torch.Tensor | None) -> list[PackedSequence]:
    """The sequences of packed rows, in reading order.

    Args:
        seq_idx (`torch.LongTensor` of shape `(B, L)`): Number of the sequence of each slot.
        block_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): Those of the [`TokenLayout`].
    """
    length = seq_idx.shape[1]
    starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True).nonzero().tolist()
    ends = [start for _, start in starts[1:]] + [length]
    sequences = []
    for (row, start), end in zip(starts, ends, strict=True):
        slots = slice(start, end or length)  # the next row starts at 0
        mask = None
        if block_ids is not None:
            blocks = block_ids[row, slots]
            if (blocks >= 0).any():
                mask = (blocks[:, None] == blocks) & (blocks >= 0)
                mask |= torch.ones_like(mask).tril()
        sequences.append(PackedSequence(row, slots, mask))
    return sequences


def sdpa_varlen_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    packed_sequences: list[PackedSequence] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `(B, heads, L, head_dim)` -> `(B, L, heads, head_dim)`."""
    if packed_sequences is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    outputs = [
        F.scaled_dot_product_attention(
            query[row : row + 1, :, slots],
            key[row : row + 1, :, slots],
            value[row : row + 1, :, slots],
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=True,
        )
        for row, slots, mask in packed_sequences
    ]
    flat = torch.cat([output[0].transpose(0, 1) for output in outputs])
    return flat.view(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


AttentionInterface.register(SDPA_VARLEN, sdpa_varlen_attention_forward)
AttentionMaskInterface.register(SDPA_VARLEN, sdpa_mask)
