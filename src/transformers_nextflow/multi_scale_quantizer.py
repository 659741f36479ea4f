"""Multi-scale residual quantization with two codebooks behind one index (TokenFlow, arXiv 2412.03069; NextFlow 3).

Axes: B images, D = semantic + pixel channels of a code vector, K codes, (h, w) the last grid, N cells of all grids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

Grid = tuple[int, int]

# The last scale of one 1024 x 1024 image against 32768 codes is 512 MB of distances: look up in slices of 128 MB.
_MAX_DISTANCES = 2**25


def lookup_slices(vectors: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows of vectors `(M, D)`, so many at once as may be compared with all codes `(K, D)`."""
    return vectors.split(max(1, _MAX_DISTANCES // len(codebook)))


@dataclass
class QuantizedResult:
    """What the quantizer makes of a batch of feature maps: fields of [`NextFlowImageTokenizerOutput`], and in training
    mode the losses that pull code vectors to features and features to code vectors."""

    codes: torch.Tensor
    target_codes: torch.Tensor
    quantized: torch.Tensor
    residual: torch.Tensor
    codebook_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None


@dataclass(frozen=True)
class SelfCorrection:
    """How self-correction encoding draws codes: for `token_fraction` of a scale's tokens, one of the `top_k` nearest.

    The draw is multinomial over `softmax(-distance / temperature)`; the residual continues from the drawn code.
    """

    top_k: int
    token_fraction: float
    temperature: float


def upsample(feature_map: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Bicubic resize of `(B, D, h, w)` to `size`; the identity where the size is right already."""
    if tuple(feature_map.shape[-2:]) == tuple(size):
        return feature_map
    return F.interpolate(feature_map, size=size, mode="bicubic", align_corners=False)


def downsample(feature_map: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Area resize of `(B, D, h, w)` to `size`; the identity where the size is right already."""
    if tuple(feature_map.shape[-2:]) == tuple(size):
        return feature_map
    return F.interpolate(feature_map, size=size, mode="area")


class MultiScaleQuantizer(nn.Module):
    """Quantizes a joint feature map `[semantic | pixel]` on a list of grids, coarse to fine.

    Each half is l2-normalised by itself, so a code stands for directions only. All of it is computed in fp32, and the
    codebooks stay in fp32 whatever the module around them is cast to.

    Args:
        codebook_size (`int`): Number of codes, K.
        semantic_dim (`int`): Width of the semantic half of a code vector.
        pixel_dim (`int`): Width of the pixel half of a code vector.
        semantic_distance_weight (`float`): Weight of the semantic distance against the pixel distance.
        commitment_cost (`float`): Factor of the commitment loss.
    """

    def __init__(
        self,
        codebook_size: int,
        semantic_dim: int,
        pixel_dim: int,
        semantic_distance_weight: float = 1.0,
        commitment_cost: float = 0.25,
    ):
        super().__init__()
        self.split = [semantic_dim, pixel_dim]
        self.semantic_distance_weight = semantic_distance_weight
        self.commitment_cost = commitment_cost
        self.semantic_codebook = nn.Embedding(codebook_size, semantic_dim, dtype=torch.float32)
        self.pixel_codebook = nn.Embedding(codebook_size, pixel_dim, dtype=torch.float32)

    def _apply(self, fn, recurse=True):
        # `.to(torch.bfloat16)` moves the codebooks to the device but leaves their numbers alone.
        def move(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def reset_parameters(self):
        """Draws new code vectors; their direction is all that counts."""
        init.normal_(self.semantic_codebook.weight)
        init.normal_(self.pixel_codebook.weight)

    def normalize(self, vectors: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """l2-normalises the semantic and the pixel half of `vectors`, each by itself, along `dim`."""
        return torch.cat([F.normalize(half, dim=dim) for half in vectors.split(self.split, dim=dim)], dim=dim)

    def codebook(self) -> torch.Tensor:
        """All code vectors `[semantic | pixel]`, normalised, `(K, D)` fp32."""
        return self.normalize(torch.cat([self.semantic_codebook.weight, self.pixel_codebook.weight], dim=-1).float())

    def distances(self, vectors: torch.Tensor, codebook: torch.Tensor, semantic_weight: float | None = None):
        """`w * |z_sem - E_sem|^2 + |z_pix - E_pix|^2` of normalised `vectors` `(M, D)` to every code, `(M, K)`.

        `w` is `semantic_weight`, by default the module's own.
        """
        if semantic_weight is None:
            semantic_weight = self.semantic_distance_weight
        weight = torch.cat([vectors.new_full((self.split[0],), semantic_weight), vectors.new_ones(self.split[1])])
        squares = (vectors.square() * weight).sum(-1, keepdim=True) + (codebook.square() * weight).sum(-1)
        return squares - 2 * (vectors * weight) @ codebook.T

    @torch.no_grad()
    def _look_up(
        self,
        vectors: torch.Tensor,
        codebook: torch.Tensor,
        self_correction: SelfCorrection | None,
        generators: Sequence[torch.Generator | None],
        semantic_weight: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes taken and nearest codes, both `(M,)`, of normalised `vectors` `(M, D)`.

        The rows are dealt out to the generators in runs of equal length.
        """
        slices = lookup_slices(vectors, codebook)
        distances = (self.distances(rows, codebook, semantic_weight) for rows in slices)
        if self_correction is None:
            nearest = torch.cat([part.argmin(-1) for part in distances])
            return nearest, nearest
        tops, found = zip(*(part.topk(self_correction.top_k, largest=False) for part in distances), strict=True)
        candidates, probabilities = torch.cat(found), (-torch.cat(tops) / self_correction.temperature).softmax(-1)
        drawn, coins = [], []
        for part, generator in zip(probabilities.chunk(len(generators)), generators, strict=True):
            drawn.append(torch.multinomial(part, 1, generator=generator))
            coins.append(torch.rand(len(part), 1, device=part.device, generator=generator))
        places = torch.where(torch.cat(coins) < self_correction.token_fraction, torch.cat(drawn), 0)
        return candidates.gather(-1, places)[:, 0], candidates[:, 0]

    def forward(
        self,
        features: torch.Tensor,
        grids: Sequence[Grid],
        self_correction: SelfCorrection | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        pixel_only: bool = False,
    ) -> QuantizedResult:
        """Quantizes `features` scale by scale.

        Args:
            features (`torch.Tensor` of shape `(B, D, h, w)`): Joint feature map `[semantic | pixel]`.
            grids (`Sequence[tuple[int, int]]`):
                Grids, coarse to fine. Code vectors are upsampled to `(h, w)`, also when the last grid is a smaller
                one (a scale was dropped).
            self_correction ([`SelfCorrection`], *optional*): Draw some codes instead of taking the nearest.
            generator (`torch.Generator` or a list of B, *optional*):
                Source of the draws, on the features' device; of a list, each image draws from its own.
            pixel_only (`bool`, *optional*, defaults to `False`):
                Choose codes by the pixel half alone, and leave the semantic half out of the losses.
        """
        semantic_weight = 0.0 if pixel_only else None
        generators = generator if isinstance(generator, Sequence) else [generator]
        trained = slice(self.split[0] if pixel_only else 0, None)
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            codebook = self.codebook()
            residual, quantized = features, torch.zeros_like(features)
            taken, nearest, codebook_losses, commitment_losses = [], [], [], []
            for grid in grids:
                vectors = self.normalize(downsample(residual, grid), dim=1)  # (B, D, h_s, w_s)
                rows = vectors.permute(0, 2, 3, 1).flatten(0, 2)
                codes, targets = self._look_up(
                    rows.detach(), codebook.detach(), self_correction, generators, semantic_weight
                )
                found = F.embedding(codes, codebook).reshape(len(features), *grid, -1).permute(0, 3, 1, 2)
                # Straight through before upsampling: the gradient reaches the features by way of every scale.
                step = upsample(vectors + (found - vectors).detach(), features.shape[-2:])
                quantized = quantized + step
                residual = residual - step.detach()
                taken.append(codes.reshape(len(features), -1))
                nearest.append(targets.reshape(len(features), -1))
                if self.training:
                    ours, theirs = vectors[:, trained], found[:, trained]
                    codebook_losses.append(F.mse_loss(theirs, ours.detach()))
                    commitment_losses.append(self.commitment_cost * F.mse_loss(ours, theirs.detach()))
        return QuantizedResult(
            codes=torch.cat(taken, dim=1),
            target_codes=torch.cat(nearest, dim=1),
            quantized=quantized,
            residual=residual,
            codebook_loss=torch.stack(codebook_losses).mean() if self.training else None,
            commitment_loss=torch.stack(commitment_losses).mean() if self.training else None,
        )

    def decode(self, codes: torch.Tensor, grids: Sequence[Grid], size: Grid) -> torch.Tensor:
        """Sum of the upsampled code vectors.

        Args:
            codes (`torch.LongTensor` of shape `(B, n)`): Codes of the first whole scales.
            grids (`Sequence[tuple[int, int]]`): All grids; as many are used as `codes` fills.
            size (`tuple[int, int]`): The grid that every scale is upsampled to.

        Returns:
            `torch.FloatTensor` of shape `(B, D, *size)`, fp32.

        Raises:
            `ValueError`: if `codes` stop inside a scale or go beyond the last one.
        """
        ends = list(accumulate(h * w for h, w in grids))
        if codes.shape[1] not in (0, *ends):
            raise ValueError(
                f"{codes.shape[1]} codes per image do not fill whole scales of the grids {list(grids)}; "
                f"legal numbers of codes are {ends}."
            )
        codebook = self.codebook()
        quantized = codebook.new_zeros(len(codes), sum(self.split), *size)
        for (h, w), end in zip(grids, ends, strict=True):
            if end <= codes.shape[1]:
                scale = F.embedding(codes[:, end - h * w : end], codebook)
                quantized = quantized + upsample(scale.reshape(len(codes), h, w, -1).permute(0, 3, 1, 2), size)
        return quantized
