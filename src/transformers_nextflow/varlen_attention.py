"""Attention over packed rows, one sequence after the other: what sequences don't see of each other costs nothing.

With `attn_implementation="sdpa"` a packed row is one masked square of L x L, whatever it holds. `"sdpa_varlen"` gives
each sequence a square of its own: the sum of their squared lengths, with the fused causal kernel where there is no
image. Rows that aren't packed go to "sdpa". (Flex attention skips what is masked by itself, but has no backward pass on
CPUs; flash attention can't let the slots of one scale see each other.)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .token_layout import PackedSequence

SDPA_VARLEN = "sdpa_varlen"


class MaskedSequences:
    """Packed sequences, and who sees whom in each. An object, into which `torch.compile` doesn't look: bounds and
    masks differ from batch to batch, and each would be a graph of its own.

    Args:
        sequences (sequence of [`PackedSequence`]): The sequences.
        block_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): Those of the [`TokenLayout`].
    """

    def __init__(self, sequences: Sequence[PackedSequence], block_ids: torch.Tensor | None):
        self._parts: list[tuple[int, slice, torch.Tensor | None]] = []  # row, slots, mask `(n, n)` or None for causal
        for row, slots, has_images in sequences:
            mask = None
            if has_images and block_ids is not None:
                blocks = block_ids[row, slots]
                mask = (blocks[:, None] == blocks) & (blocks >= 0)
                mask |= torch.ones_like(mask).tril()
            self._parts.append((row, slots, mask))

    @torch.compiler.disable
    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scale: float | None
    ) -> torch.Tensor:
        """Attention within each sequence, `(B, heads, L, head_dim)` -> `(B, L, heads, head_dim)`."""
        outputs = [
            F.scaled_dot_product_attention(
                query[row : row + 1, :, slots],
                key[row : row + 1, :, slots],
                value[row : row + 1, :, slots],
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=True,
            )
            for row, slots, mask in self._parts
        ]
        flat = torch.cat([output[0].transpose(0, 1) for output in outputs])
        return flat.view(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])


def sdpa_varlen_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    packed_sequences: MaskedSequences | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `(B, heads, L, head_dim)` -> `(B, L, heads, head_dim)`."""
    if packed_sequences is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    return packed_sequences.attend(query, key, value, dropout, scaling), None


AttentionInterface.register(SDPA_VARLEN, sdpa_varlen_attention_forward)
AttentionMaskInterface.register(SDPA_VARLEN, sdpa_mask)
