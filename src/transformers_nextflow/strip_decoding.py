"""The pixel decoder in strips of rows: large images in less memory, and without seams.

A tile that knows nothing of its neighbours has borders that show. Here each layer runs on all strips before the next
one: convolutions see the rows next to a strip, and norms the mean and variance of the whole map, so the result is that
of the decoder on the whole map, up to rounding. Axes: B images, C channels, H x W cells.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def split_rows(height: int, rows: int) -> Iterator[tuple[int, int]]:
    """First row and end of each strip."""
    for start in range(0, height, rows):
        yield start, min(start + rows, height)


def norm_as_scale_and_shift(norm: nn.GroupNorm, maps: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a group norm multiplies the channels of `maps` `(B, C, H, W)` by, and adds to them: `(B, C, 1, 1)` fp32."""
    batch, channels, height, _ = maps.shape
    counts, variances, means = [], [], []
    for start, stop in split_rows(height, rows):
        strip = maps[:, :, start:stop].float().reshape(batch, norm.num_groups, -1)
        variance, mean = torch.var_mean(strip, dim=-1, correction=0)
        counts.append((stop - start) / height)
        variances.append(variance)
        means.append(mean)
    weights = torch.tensor(counts, device=maps.device)[:, None, None]
    strip_means = torch.stack(means)
    mean = (weights * strip_means).sum(0)
    variance = (weights * (torch.stack(variances) + (strip_means - mean).square())).sum(0)
    factor = (variance + norm.eps).rsqrt()
    factor, mean = (group.repeat_interleave(channels // norm.num_groups, dim=1) for group in (factor, mean))
    scale = factor * norm.weight.float()
    return scale[:, :, None, None], (norm.bias.float() - mean * scale)[:, :, None, None]


def convolve_strip(conv: nn.Conv2d, strip: torch.Tensor, is_first: bool, is_last: bool) -> torch.Tensor:
    """A 3x3 convolution of a strip that has one more row at each side, but at the edges of the map."""
    padded = F.pad(strip, (1, 1, int(is_first), int(is_last)))
    return F.conv2d(padded, conv.weight, conv.bias)


def norm_and_convolve(
    norm: nn.GroupNorm, conv: nn.Conv2d, maps: torch.Tensor, rows: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Norm, SiLU and 3x3 convolution of `maps`: the rows of each strip, and what comes out there."""
    scale, shift = norm_as_scale_and_shift(norm, maps, rows)
    height = maps.shape[2]
    for start, stop in split_rows(height, rows):
        wide = maps[:, :, max(0, start - 1) : stop + 1]
        activated = F.silu(torch.addcmul(shift, wide.float(), scale).to(maps.dtype))
        yield slice(start, stop), convolve_strip(conv, activated, start == 0, stop == height)


def run_res_block(block: Any, maps: torch.Tensor, rows: int) -> torch.Tensor:
    """A residual block; `maps` are overwritten where the width stays the same."""
    batch, _, height, width = maps.shape
    inner = maps.new_empty(batch, block.conv1.out_channels, height, width)
    for strip, values in norm_and_convolve(block.norm1, block.conv1, maps, rows):
        inner[:, :, strip] = values
    same = isinstance(block.shortcut, nn.Identity)
    result = maps if same else torch.empty_like(inner)
    for strip, values in norm_and_convolve(block.norm2, block.conv2, inner, rows):
        result[:, :, strip] = block.shortcut(maps[:, :, strip]) + values
    return result


def run_upsample(block: Any, maps: torch.Tensor, rows: int) -> torch.Tensor:
    """Nearest neighbours twice as large, and a 3x3 convolution."""
    batch, _, height, width = maps.shape
    result = maps.new_empty(batch, block.conv.out_channels, 2 * height, 2 * width)
    for start, stop in split_rows(height, rows):
        low, high = max(0, start - 1), min(height, stop + 1)
        larger = F.interpolate(maps[:, :, low:high], scale_factor=2.0, mode="nearest")
        # Of the neighbours' rows one each is needed, not two.
        larger = larger[:, :, int(low < start) : larger.shape[2] - int(high > stop)]
        result[:, :, 2 * start : 2 * stop] = convolve_strip(block.conv, larger, start == 0, stop == height)
    return result


@torch.no_grad()
def decode_in_strips(decoder: Any, maps: torch.Tensor, rows: int) -> torch.Tensor:
    """Pixels `(B, 3, H, W)` of a feature map `(B, latent_channels, h, w)`, as [`NextFlowPixelDecoder`] makes them.

    Args:
        decoder ([`NextFlowPixelDecoder`]): The decoder.
        maps (`torch.Tensor` of shape `(B, latent_channels, h, w)`): What it decodes.
        rows (`int`): Rows of a strip, at every resolution.
    """
    maps = decoder.conv_in(maps)
    for block in decoder.blocks:
        if hasattr(block, "shortcut"):
            maps = run_res_block(block, maps, rows)
        elif hasattr(block, "q_proj"):  # attention, at the lowest resolution only
            maps = block(maps)
        else:
            maps = run_upsample(block, maps, rows)
    pixels = [
        F.pixel_shuffle(values, decoder.patch_size)
        for _, values in norm_and_convolve(decoder.norm_out, decoder.conv_out, maps, rows)
    ]
    return torch.cat(pixels, dim=2)
