"""The semantic branch of the image tokenizer: vision encoders of several families, and the decoders of their features.

Axes: B images, (h, w) the last grid, n = h * w its cells, C channels of the encoder, D_sem of the semantic codes.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, BeitConfig, CLIPVisionConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.beit.modeling_beit import BeitEmbeddings, BeitModel
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.siglip2.configuration_siglip2 import Siglip2VisionConfig
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionModel

from .configuration_nextflow import NextFlowImageTokenizerConfig


def resize_positions(positions: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Learned positions `(1, 1 + side * side, C)` of a class token and a square grid, for `grid`: `(1, 1 + h * w, C)`.

    Bicubic, as TokenFlow does it (and DINO before): it asks for a tenth of a cell more than the grid has, and that
    factor, not the ratio of the sides, says where the old grid is read. `size=grid` would put its features off by 0.2.
    """
    side = math.isqrt(positions.shape[1] - 1)
    if grid == (side, side):
        return positions
    class_position, places = positions[:, :1], positions[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    factors = tuple((cells + 0.1) / side for cells in grid)
    places = F.interpolate(places, scale_factor=factors, mode="bicubic", align_corners=False)
    return torch.cat([class_position, places.flatten(2).transpose(1, 2)], dim=1)


class NextFlowClipEmbeddings(CLIPVisionEmbeddings):
    """CLIP's, with TokenFlow's way of resizing positions."""

    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        patch = self.patch_embedding.kernel_size
        return resize_positions(self.position_embedding.weight[None], (height // patch[0], width // patch[1]))


class NextFlowBeitEmbeddings(BeitEmbeddings):
    """BEiT's, with TokenFlow's way of resizing positions."""

    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        assert self.position_embeddings is not None  # the decoder's configuration asks for them
        return resize_positions(self.position_embeddings, (height, width))  # a patch is one cell


def _embed_patches(encoder: Any, pixel_values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    patch = encoder.config.patch_size
    patches = F.unfold(pixel_values, patch, stride=patch)  # (B, 3 * patch * patch, n), channels first
    patches = patches.unflatten(1, (3, -1)).permute(0, 3, 2, 1).flatten(2)  # naflex wants channels last
    return encoder.embeddings(patches, torch.tensor([grid] * len(patches)))


# What the blocks of each family of encoders start from, for pixels (B, 3, H, W) that hold `grid` patches.
FIRST_STATES: dict[str, Callable[..., torch.Tensor]] = {
    "siglip2_vision_model": _embed_patches,
    "siglip_vision_model": lambda encoder, pixels, grid: encoder.embeddings(pixels, interpolate_pos_encoding=True),
    "clip_vision_model": lambda encoder, pixels, grid: encoder.pre_layrnorm(
        encoder.embeddings(pixels, interpolate_pos_encoding=True)
    ),
}


def build_semantic_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """A new vision encoder of any supported family; a `ValueError` for another one."""
    families = (*FIRST_STATES, "timm_wrapper")
    if config.model_type not in families:
        legal = ", ".join(f'"{name}"' for name in families)
        raise ValueError(f'The semantic encoder "{config.model_type}" is not supported; use one of {legal}.')
    encoder = AutoModel.from_config(config)
    if isinstance(config, CLIPVisionConfig):
        encoder.embeddings = NextFlowClipEmbeddings(config)
    return encoder


def semantic_tokens(encoder: Any, pixel_values: torch.Tensor, grid: tuple[int, int], layer: int | None) -> torch.Tensor:
    """Features `(B, n, C)` of a vision encoder, row-major.

    `pixel_values` `(B, 3, H, W)` are sized and normalised as the encoder wants them and hold `grid` (h, w) patches;
    `layer` says which of its hidden states is used, None its normalised output.
    """
    family = encoder.config.model_type
    if family == "timm_wrapper":
        if layer is not None:
            raise ValueError(f"`vision_feature_layer` must be None for an encoder from timm, but is {layer}.")
        tokens = encoder(pixel_values, do_pooling=False).last_hidden_state[:, encoder.timm_model.num_prefix_tokens :]
    else:
        # Block by block: `output_hidden_states` keeps them all, and leaves hooks behind that can't be pickled.
        blocks = encoder.encoder.layers
        tokens = FIRST_STATES[family](encoder, pixel_values, grid)
        for block in blocks if layer is None else blocks[: range(len(blocks) + 1)[layer]]:
            tokens = block(tokens, None)
        if layer is None:
            tokens = encoder.post_layernorm(tokens)
        if family == "clip_vision_model":
            tokens = tokens[:, 1:]  # without the class token
    if tokens.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"The semantic encoder gives {tokens.shape[1]} tokens for {pixel_values.shape[-2]} x "
            f"{pixel_values.shape[-1]} pixels, but the last grid has {grid[0]} x {grid[1]} cells. Check `image_size`, "
            "`scale_sides` and the encoder's patch size."
        )
    return tokens


def mlp(in_features: int, hidden_features: int, out_features: Any) -> nn.Sequential:
    """Linear, Tanh, Linear: between a vision transformer's features and codes, both ways."""
    return nn.Sequential(nn.Linear(in_features, hidden_features), nn.Tanh(), nn.Linear(hidden_features, out_features))


def _transformer_settings(config: NextFlowImageTokenizerConfig) -> dict[str, Any]:
    """Settings of a semantic decoder's ViT; its "patches" are single code vectors."""
    width: Any = config.semantic_decoder_hidden_size  # the configuration has filled it in
    return {
        "hidden_size": width,
        "intermediate_size": config.semantic_decoder_intermediate_size or 4 * width,
        "num_hidden_layers": config.semantic_decoder_layers,
        "num_attention_heads": config.semantic_decoder_num_heads,
        "num_channels": config.semantic_code_dim,
        "patch_size": 1,
        "hidden_act": "gelu",
    }


class NextFlowSemanticDecoder(nn.Module):
    """A small naflex ViT, for any grid: semantic half `(B, D_sem, h, w)` of a quantized map to features `(B, n, C)`."""

    def __init__(self, config: NextFlowImageTokenizerConfig):
        super().__init__()
        settings = Siglip2VisionConfig(**_transformer_settings(config), vision_use_head=False)
        self.transformer = Siglip2VisionModel(settings)
        self.proj_out = mlp(settings.hidden_size, settings.hidden_size, config.semantic_feature_dim)

    def forward(self, semantic: torch.Tensor) -> torch.Tensor:
        patches = semantic.flatten(2).transpose(1, 2)
        shapes = torch.tensor([semantic.shape[-2:]] * len(semantic))
        mask = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
        return self.proj_out(self.transformer(patches, mask, shapes).last_hidden_state)


class TokenFlowSemanticDecoder(nn.Module):
    """TokenFlow's: as [`NextFlowSemanticDecoder`], but with a class token and learned positions of one grid."""

    def __init__(self, config: NextFlowImageTokenizerConfig):
        super().__init__()
        settings = BeitConfig(
            **_transformer_settings(config),
            image_size=config.semantic_decoder_grid_size,  # type: ignore[arg-type]  # whoever builds it has set it
            layer_norm_eps=1e-6,
            layer_scale_init_value=0.0,
            drop_path_rate=0.0,
            use_absolute_position_embeddings=True,
            use_mean_pooling=True,  # the last norm comes after the class token is dropped: `norm_out`
        )
        self.transformer = BeitModel(settings, add_pooling_layer=False)
        self.transformer.embeddings = NextFlowBeitEmbeddings(settings)
        self.norm_out = nn.LayerNorm(settings.hidden_size, eps=1e-6)
        self.proj_out = mlp(settings.hidden_size, settings.hidden_size, config.semantic_feature_dim)

    def forward(self, semantic: torch.Tensor) -> torch.Tensor:
        tokens = self.transformer(semantic).last_hidden_state[:, 1:]
        return self.proj_out(self.norm_out(tokens))
