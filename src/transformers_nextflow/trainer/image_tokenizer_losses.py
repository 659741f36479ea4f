"""The optional terms of the image tokenizer's training: a perceptual loss over any features, and a PatchGAN critic."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

# The weights of TokenFlow's training (arXiv 2412.03069): squared error, distillation and perceptual distance alike,
# and a PatchGAN that joins in after its warm-up. Codes have no penalty on what they leave there.
TOKENFLOW_WEIGHTS = {
    "l1_weight": 0.0,
    "l2_weight": 1.0,
    "residual_weight": 0.0,
    "semantic_weight": 1.0,
    "perceptual_weight": 1.0,
    "adversarial_weight": 0.5,
    "adversarial_start_steps": 20_000,
}


class FeatureLoss(nn.Module):
    """
    Perceptual distance over the features of any frozen network, as LPIPS (arXiv 1801.03924) without learned weights:
    features are normalised over their channels, and their squared differences are averaged over cells and maps.

    Args:
        features (callable):
            From images `(B, 3, H, W)` in [-1, 1] to a sequence of feature maps `(B, C, h, w)`. It must let gradients
            through; its own weights should be frozen.

    Example:

    ```python
    >>> import torch
    >>> from transformers_nextflow.trainer import FeatureLoss

    >>> loss = FeatureLoss(lambda images: [torch.nn.functional.avg_pool2d(images, size) for size in (2, 4)])
    >>> loss(torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)).shape
    torch.Size([])
    ```
    """

    def __init__(self, features: Callable[[torch.Tensor], Sequence[torch.Tensor]]):
        super().__init__()
        self.features = features

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The distance of two batches of images `(B, 3, H, W)` in [-1, 1], a scalar."""
        with torch.no_grad():
            wanted = self.features(target)
        pairs = zip(self.features(prediction), wanted, strict=True)
        distances = [(F.normalize(ours, dim=1) - F.normalize(theirs, dim=1)).square().sum(1) for ours, theirs in pairs]
        return torch.stack([distance.mean() for distance in distances]).mean()


class PatchDiscriminator(nn.Sequential):
    """
    PatchGAN's critic (arXiv 1611.07004): strided 4 x 4 convolutions, each score judging a patch of the image. Group
    norms stand in place of batch norms, so that no rank and no accumulated batch sees other statistics.

    Args:
        hidden_size (`int`, *optional*, defaults to 64): Channels after the first convolution; they double twice.
        num_layers (`int`, *optional*, defaults to 3): Strided convolutions: scores are `2 ** num_layers` pixels apart.
    """

    def __init__(self, hidden_size: int = 64, num_layers: int = 3):
        widths = [hidden_size * 2 ** min(layer, 2) for layer in range(num_layers)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for before, width in pairwise(widths):
            layers += [nn.Conv2d(before, width, 4, stride=2, padding=1), nn.GroupNorm(8, width), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))
