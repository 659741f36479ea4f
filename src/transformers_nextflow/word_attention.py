"""Which words made which cells: attention from an image's cells to the tokens before it, for looking at.

Letters: B rows, L slots of a row, P slots up to an image's `<boi>`, (h, w) the grid of a scale.
"""

from typing import Any

import torch

from .scale_schedule import ScaleSchedule
from .token_layout import find_images


@torch.no_grad()
def attention_maps(
    model: Any,
    sequences: torch.Tensor,
    image_grid_shw: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scale: int = -1,
) -> torch.Tensor:
    """How much each cell of the last image of every row attends to each token before it, over all layers and heads.

    Args:
        model ([`NextFlowForCausalLM`]): With `attn_implementation="eager"`: no other has weights to show.
        sequences (`torch.LongTensor` of shape `(B, L)`): As image mode returns them, each ending with a whole image.
        image_grid_shw (`torch.LongTensor` of shape `(num_images, 3)`): Of all images in them.
        attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 0 where a row is padded, on the left.
        scale (`int`, *optional*, defaults to -1): Which scale's cells; negative ones count from the finest.

    Returns:
        `torch.FloatTensor` of shape `(B, P, h, w)`: the share of a cell's attention that a token has, on average. What
        a cell gives to coarser scales and to its own is not in it, so the shares of a cell sum to less than 1.

    Raises:
        `ValueError`: for another attention implementation, or sequences that don't all end with an image of one size.
    """
    if model.config._attn_implementation != "eager":
        raise ValueError(
            'Only eager attention has weights to show, but the model has attn_implementation="'
            f'{model.config._attn_implementation}". Load it with "eager", or call `set_attn_implementation("eager")`.'
        )
    schedule = ScaleSchedule.from_grid_shw(image_grid_shw[-1].tolist())
    rows, starts, lengths = find_images(sequences, model.config.text_vocab_size, attention_mask)
    ends = torch.full((len(sequences),), -1).scatter_reduce(0, rows.cpu(), (starts + lengths).cpu(), "amax")
    first = sequences.shape[1] - schedule.num_tokens
    last = starts.cpu()[starts.cpu() == first]
    if len(last) != len(sequences) or not (ends == sequences.shape[1]).all():
        raise ValueError(
            f"Every row must end with a whole image of {schedule.num_tokens} codes (`image_grid_shw[-1]`)."
        )
    if not -schedule.num_scales <= scale < schedule.num_scales:
        raise ValueError(f"`scale` must be below {schedule.num_scales}, the image's number of scales, but got {scale}.")
    index = scale % schedule.num_scales
    outputs = model(
        sequences,
        image_grid_shw=image_grid_shw,
        attention_mask=attention_mask,
        output_attentions=True,
        logits_to_keep=1,
    )
    # The slot before a code predicts it.
    cells = slice(first - 1 + schedule.offsets[index], first - 1 + schedule.offsets[index + 1])
    shares = torch.stack([layer[:, :, cells, :first].float().mean(1) for layer in outputs.attentions]).mean(0)
    return shares.mT.unflatten(2, schedule.grids[index])


__all__ = ["attention_maps"]
