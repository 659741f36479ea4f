"""The denoisers of diffusers that a diffusion decoder can stand on, and how each takes a condition.

None is written again. A UNet gets an input convolution that is wider by the condition's channels; a transformer gets an
MLP beside its patch embedder. Both add nothing before they are trained.

Axes: B images, C channels of a sample, (H', W') its places, K channels of the projected condition, n patches.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import nn

UNETS = (UNet2DModel, UNet2DConditionModel)
# Both transformers have a visual stream apart from the text's; SD3's takes maps, Flux's (12B, as the paper's) patches.
BACKBONES: dict[str, Any] = {kind.__name__: kind for kind in (*UNETS, SD3Transformer2DModel, FluxTransformer2DModel)}


class ConditionedEmbedder(nn.Module):
    """A transformer's patch embedder; an MLP of the last K channels of its input is added to its states."""

    def __init__(self, embedder: nn.Module, condition_dim: int, hidden_size: int, patch_size: int):
        super().__init__()
        self.embedder, self.condition_dim, self.patch_size = embedder, condition_dim, patch_size
        self.mlp = nn.Sequential(nn.Linear(condition_dim, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """States `(B, n, hidden_size)` of a map `(B, C + K, H', W')` or of patches `(B, n, C + K)`."""
        channels = 1 if inputs.ndim == 4 else 2
        sample, condition = inputs.split((inputs.shape[channels] - self.condition_dim, self.condition_dim), channels)
        if inputs.ndim == 4:
            condition = F.avg_pool2d(condition, self.patch_size).flatten(2).transpose(1, 2)
        return self.embedder(sample) + self.mlp(condition)


@torch.no_grad()
def add_condition(backbone: Any, condition_dim: int) -> None:
    """Makes room for `condition_dim` channels behind those of the sample, in place, with weights of zero."""
    if issubclass(type(backbone), UNETS):
        old: Any = backbone.conv_in
        new = nn.Conv2d(old.in_channels + condition_dim, old.out_channels, old.kernel_size, padding=old.padding)
        new = new.to(old.weight)
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        if old.bias is not None:
            new.bias.copy_(old.bias)  # type: ignore[union-attr]
        backbone.conv_in = new
        return
    name = "pos_embed" if isinstance(backbone, SD3Transformer2DModel) else "x_embedder"
    patch_size = backbone.config.patch_size
    embedder = ConditionedEmbedder(getattr(backbone, name), condition_dim, backbone.inner_dim, patch_size)
    last: Any = embedder.mlp[-1]
    last.weight.zero_()
    last.bias.zero_()
    embedder.mlp.to(next(backbone.parameters()))
    setattr(backbone, name, embedder)


def condition_parameters(backbone: nn.Module) -> list[nn.Parameter]:
    """What [`add_condition`] made: trained whole where the rest is frozen under LoRA."""
    parts = [module.mlp for module in backbone.modules() if isinstance(module, ConditionedEmbedder)]
    return [parameter for part in parts for parameter in part.parameters()]


def text_widths(backbone: Any) -> tuple[int, int]:
    """Channels of the text embeddings and of the pooled one that a backbone takes; 0 where it takes none."""
    config = backbone.config
    if issubclass(type(backbone), UNet2DModel):
        return 0, 0
    if issubclass(type(backbone), UNet2DConditionModel):
        width = config.cross_attention_dim
        pooled = 0
        if config.addition_embed_type == "text_time":  # SDXL
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return width if isinstance(width, int) else width[0], pooled
    return config.joint_attention_dim, config.pooled_projection_dim


def size_step(backbone: Any) -> int:
    """Places of a sample that the backbone halves away or takes as one: height and width must be multiples of it."""
    if issubclass(type(backbone), UNet2DConditionModel):
        return 1  # it pads by itself
    if issubclass(type(backbone), UNet2DModel):
        return 2 ** (len(backbone.config.block_out_channels) - 1)
    return backbone.config.patch_size


def call_backbone(
    backbone: Any,
    inputs: torch.Tensor,
    timestep: torch.Tensor,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    size: tuple[int, int],
    scale_factor: int,
) -> torch.Tensor:
    """The backbone's prediction `(B, C, H', W')`.

    Args:
        backbone: One of [`BACKBONES`], widened by [`add_condition`].
        inputs (`torch.Tensor` of shape `(B, C + K, H', W')`): Sample and condition.
        timestep (`torch.Tensor` of shape `(B,)`): On the scheduler's scale, 0 to 1000.
        prompt_embeds (`torch.Tensor` of shape `(B, L, width)`): Text; zeros for none.
        pooled_prompt_embeds (`torch.Tensor` of shape `(B, width)`): The same in one vector.
        size (`tuple[int, int]`): Height and width in pixels, which SDXL is told.
        scale_factor (`int`): 1 or 2, which class embeddings tell, where a UNet has them.
    """
    labels = None
    if issubclass(type(backbone), UNETS) and backbone.config.num_class_embeds is not None:
        labels = torch.full_like(timestep, scale_factor - 1, dtype=torch.long)
    if issubclass(type(backbone), UNet2DModel):
        return backbone(inputs, timestep, class_labels=labels, return_dict=False)[0]
    if issubclass(type(backbone), UNet2DConditionModel):
        added = None
        if backbone.config.addition_embed_type == "text_time":
            sizes = inputs.new_tensor([*size, 0, 0, *size]).expand(len(inputs), -1)
            added = {"text_embeds": pooled_prompt_embeds, "time_ids": sizes}
        options = {"class_labels": labels, "added_cond_kwargs": added, "return_dict": False}
        return backbone(inputs, timestep, prompt_embeds, **options)[0]
    if issubclass(type(backbone), SD3Transformer2DModel):
        return backbone(inputs, prompt_embeds, pooled_prompt_embeds, timestep, return_dict=False)[0]
    height, width = inputs.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).to(inputs.device).float()
    guidance = places.new_ones(len(inputs)) if backbone.config.guidance_embeds else None
    patches = backbone(
        inputs.flatten(2).transpose(1, 2),
        prompt_embeds,
        pooled_prompt_embeds,
        timestep / 1000,
        img_ids=places,
        txt_ids=places.new_zeros(prompt_embeds.shape[1], 3),
        guidance=guidance,
        return_dict=False,
    )[0]
    return patches.transpose(1, 2).unflatten(2, (height, width))


def vae_stride(vae: Any) -> int:
    """Pixels per place of an autoencoder's latents, in height and in width."""
    config = vae.config
    if (stride := getattr(config, "spatial_compression_ratio", None)) is not None:
        return stride
    widths = getattr(config, "block_out_channels", None) or config.encoder_block_out_channels
    return 2 ** (len(widths) - 1)


def encode_with_vae(vae: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Scaled latents of pixels `(B, 3, H, W)` in [-1, 1]; of a distribution, a draw with the global random state."""
    encoded = vae.encode(pixel_values.to(vae.dtype))
    if hasattr(encoded, "latent_dist"):
        latents = encoded.latent_dist.sample()
    else:
        latents = encoded.latent if hasattr(encoded, "latent") else encoded.latents
    return (latents - _shift(vae)) * vae.config.scaling_factor


def decode_with_vae(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Pixels `(B, 3, H, W)` of scaled latents."""
    latents = latents / vae.config.scaling_factor + _shift(vae)
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0]


def _shift(vae: Any) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0
