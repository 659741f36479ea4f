"""Random diffusion decoders on every backbone, small enough for tests of 80 x 80 pixels (grids of 5 x 5 cells)."""

from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel

from diffusers_nextflow import NextFlowDiffusionDecoder

BLOCKS = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
TRANSFORMER = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12}


def build_backbone(name: str) -> Any:
    """A stock denoiser of random weights, as `from_pretrained` would give it."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if name == "UNet2DModel":  # pixels, 4 x 4 of them a place
            down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
            settings = {"down_block_types": down, "up_block_types": up, "attention_head_dim": 4, "num_class_embeds": 2}
            return UNet2DModel(in_channels=48, out_channels=48, **settings, **BLOCKS)
        if name == "UNet2DConditionModel":
            down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
            settings = {"down_block_types": down, "up_block_types": up, "attention_head_dim": 4}
            added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
            added["projection_class_embeddings_input_dim"] = 24 + 6
            return UNet2DConditionModel(cross_attention_dim=12, **settings, **added, **BLOCKS)
        if name == "SD3Transformer2DModel":
            settings = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "caption_projection_dim": 16}
            return SD3Transformer2DModel(pooled_projection_dim=6, pos_embed_max_size=16, **settings, **TRANSFORMER)
        settings = {"in_channels": 16, "num_single_layers": 1, "axes_dims_rope": (4, 2, 2), "guidance_embeds": True}
        return FluxTransformer2DModel(pooled_projection_dim=6, **settings, **TRANSFORMER)


BACKBONE_NAMES = ("UNet2DModel", "UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel")


def build_vae() -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        widths = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2}
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        return AutoencoderKL(scaling_factor=0.5, shift_factor=0.1, **widths, **blocks).eval()


def build_decoder(name: str, image_tokenizer: Any, trained: bool = True, **config: Any) -> NextFlowDiffusionDecoder:
    """A decoder around it, as if it had been `trained`: its condition has weights."""
    latent = name != "UNet2DModel"
    config = {"condition_dim": 8, "patch_size": 2 if name.startswith("Flux") else 1 if latent else 4, **config}
    config = {"scale_factors": [1, 2], "num_inference_steps": 3, "uses_text": latent, **config}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        vae = build_vae() if latent else None
        decoder = NextFlowDiffusionDecoder.from_backbone(build_backbone(name), image_tokenizer, vae, **config).eval()
        if trained:
            with torch.no_grad():
                for parameter in decoder.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def random_codes(number: int, seed: int = 0, num_scales: int = 5, codebook_size: int = 64) -> torch.Tensor:
    num_codes = sum(side**2 for side in range(1, num_scales + 1))
    return torch.randint(codebook_size, (number, num_codes), generator=torch.Generator().manual_seed(seed))
