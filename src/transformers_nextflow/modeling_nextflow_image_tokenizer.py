"""NextFlow's image tokenizer: two encoder branches, one multi-scale dual-codebook quantizer, two decoders.

Axes: B images, H x W pixels, (h, w) = (H, W) / stride the last grid, N codes, D channels of a code vector.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from .configuration_nextflow import NextFlowImageTokenizerConfig
from .multi_scale_quantizer import MultiScaleQuantizer, SelfCorrection, upsample
from .scale_schedule import ScaleSchedule
from .semantic_branch import (
    NextFlowSemanticDecoder,
    TokenFlowSemanticDecoder,
    build_semantic_encoder,
    mlp,
    semantic_tokens,
)
from .strict_loading import StrictPreTrainedModel
from .strip_decoding import decode_in_strips
from .token_layout import read_grids


@dataclass
class NextFlowImageTokenizerOutput(ModelOutput):
    """
    What [`NextFlowImageTokenizer`] makes of images. A list of images gives lists (one entry per image, without
    the batch axis) in `codes`, `target_codes` and `quantized`.

    Args:
        codes (`torch.LongTensor` of shape `(B, N)`): Codes, scale by scale, row-major within a scale.
        target_codes (`torch.LongTensor` of shape `(B, N)`):
            Nearest codes. They differ from `codes` only under self-correction, and then are what is to be predicted.
        quantized (`torch.FloatTensor` of shape `(B, D, h, w)`): Sum of the upsampled code vectors, fp32.
        image_grid_shw (`torch.LongTensor` of shape `(B, 3)`):
            Number of scales, bucket height, bucket width of each image.
        pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`, *optional*): Reconstruction (`forward` only).
        semantic_features (`torch.FloatTensor` of shape `(B, h * w, C)`, *optional*):
            Prediction of the teacher's features (`forward` only).
        residual (`torch.FloatTensor` of shape `(B, D, h, w)`, *optional*):
            What the codes leave of the features, with gradients (`forward` only). Penalise its square in training: the
            codes hold directions only, and features that outgrow them cannot be told apart.
        codebook_loss (`torch.FloatTensor`, *optional*): Only in training mode.
        commitment_loss (`torch.FloatTensor`, *optional*): Only in training mode.
    """

    codes: torch.Tensor | list[torch.Tensor] | None = None
    target_codes: torch.Tensor | list[torch.Tensor] | None = None
    quantized: torch.Tensor | list[torch.Tensor] | None = None
    image_grid_shw: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None
    semantic_features: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    codebook_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None


class NextFlowResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice; a 1x1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(num_groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.conv1(F.silu(self.norm1(hidden_states)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        return self.shortcut(hidden_states) + residual


class NextFlowAttentionBlock(nn.Module):
    """Single-head attention over all places of a feature map."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, channels, eps=1e-6)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden_states)
        query, key, value = (
            projection(normed).flatten(2).transpose(1, 2).unsqueeze(1)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(query, key, value)[:, 0]
        return hidden_states + self.out_proj(attended.transpose(1, 2).reshape(hidden_states.shape))


class NextFlowDownsample(nn.Module):
    """Halves the resolution; padded at the right and bottom only, as VQGAN does."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(hidden_states, (0, 1, 0, 1)))


class NextFlowUpsample(nn.Module):
    """Doubles the resolution: nearest neighbours, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


def _middle(channels: int, num_groups: int) -> list[nn.Module]:
    return [
        NextFlowResBlock(channels, channels, num_groups),
        NextFlowAttentionBlock(channels, num_groups),
        NextFlowResBlock(channels, channels, num_groups),
    ]


class NextFlowPixelEncoder(nn.Module):
    """VQGAN-style CNN: pixels `(B, 3, H, W)` to a feature map `(B, latent_channels, h, w)`."""

    def __init__(self, config: NextFlowImageTokenizerConfig):
        super().__init__()
        widths, groups = list(config.encoder_hidden_sizes), config.cnn_norm_groups
        self.patch_size = config.pixel_patch_size
        self.conv_in = nn.Conv2d(3 * self.patch_size**2, widths[0], 3, padding=1)
        blocks: list[nn.Module] = []
        channels = widths[0]
        for level, width in enumerate(widths):
            lowest = level == len(widths) - 1
            for _ in range(config.encoder_num_res_blocks):
                blocks.append(NextFlowResBlock(channels, width, groups))
                if lowest:
                    blocks.append(NextFlowAttentionBlock(width, groups))
                channels = width
            if not lowest:
                blocks.append(NextFlowDownsample(channels))
        self.blocks = nn.ModuleList([*blocks, *_middle(channels, groups)])
        self.norm_out = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, config.latent_channels, 3, padding=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(F.pixel_unshuffle(pixel_values, self.patch_size))
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class NextFlowPixelDecoder(nn.Module):
    """VQGAN-style CNN: a feature map `(B, latent_channels, h, w)` to pixels `(B, 3, H, W)`."""

    def __init__(self, config: NextFlowImageTokenizerConfig):
        super().__init__()
        widths, groups = list(config.decoder_hidden_sizes), config.cnn_norm_groups
        self.patch_size = config.pixel_patch_size
        channels = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        blocks = _middle(channels, groups)
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.decoder_num_res_blocks + 1):
                blocks.append(NextFlowResBlock(channels, width, groups))
                if level == len(widths) - 1:
                    blocks.append(NextFlowAttentionBlock(width, groups))
                channels = width
            if level > 0:
                blocks.append(NextFlowUpsample(channels))
        self.blocks = nn.ModuleList(blocks)
        self.norm_out = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 3 * self.patch_size**2, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(hidden_states))), self.patch_size)


class NextFlowImageTokenizer(StrictPreTrainedModel):
    """
    Turns images into codes on many scales and back (dual codebook, TokenFlow arXiv 2412.03069; NextFlow section 3).

    Images of one size are encoded as a batch, a list of images of different sizes one after the other. Encoding
    and decoding are deterministic; look-ups run in fp32 whatever the weights' dtype.

    Example:

    ```python
    >>> import torch
    >>> from transformers_nextflow import NextFlowImageTokenizer, tiny_checkpoint

    >>> tokenizer = NextFlowImageTokenizer.from_pretrained(tiny_checkpoint(), subfolder="image_tokenizer")
    >>> encoded = tokenizer.encode(torch.zeros(1, 3, 128, 128))
    >>> encoded.codes.shape, encoded.image_grid_shw.tolist()
    (torch.Size([1, 204]), [[8, 16, 16]])
    >>> tokenizer.decode(encoded.codes, encoded.image_grid_shw).shape
    torch.Size([1, 3, 128, 128])
    ```
    """

    config_class = NextFlowImageTokenizerConfig
    config: NextFlowImageTokenizerConfig
    size_fields = ("codebook_size",)
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]  # a tuple, as in transformers' own models
    base_model_prefix = ""
    _no_split_modules = [
        "NextFlowResBlock",
        "Siglip2EncoderLayer",
        "SiglipEncoderLayer",
        "CLIPEncoderLayer",
        "BeitLayer",
    ]
    _keep_in_fp32_modules_strict = ["quantizer"]
    _supports_sdpa = True

    def __init__(self, config: NextFlowImageTokenizerConfig):
        super().__init__(config)
        width = config.semantic_config.hidden_size
        self.semantic_encoder = build_semantic_encoder(config.semantic_config)
        self.semantic_proj = mlp(width, width, config.semantic_code_dim)
        self.pixel_encoder = NextFlowPixelEncoder(config)
        self.pixel_proj = nn.Conv2d(config.latent_channels, config.pixel_code_dim, 1)
        self.quantizer = MultiScaleQuantizer(
            config.codebook_size,
            config.semantic_code_dim,
            config.pixel_code_dim,
            config.semantic_distance_weight,
            config.commitment_cost,
        )
        of_tokenflow = config.semantic_decoder_grid_size is not None
        self.semantic_decoder = TokenFlowSemanticDecoder(config) if of_tokenflow else NextFlowSemanticDecoder(config)
        self.post_pixel_proj = nn.Conv2d(config.pixel_code_dim, config.latent_channels, 1)
        self.pixel_decoder = NextFlowPixelDecoder(config)
        self.strip_rows: int | None = None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, MultiScaleQuantizer):
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d):
            module.reset_parameters()  # torch's own fan-in rule suits a CNN better than a fixed deviation
        elif not isinstance(module, nn.Embedding):  # the codebooks are drawn with their quantizer
            super()._init_weights(module)

    # Encoding

    def _schedule_of_size(self, height: int, width: int) -> ScaleSchedule:
        config = self.config
        if config.image_size is None:
            return ScaleSchedule.from_size(height, width, stride=config.stride, sides=config.sides)
        schedule = ScaleSchedule(num_scales=config.num_scales, stride=config.stride, sides=config.sides)
        if (height, width) != self._image_size(schedule):
            raise ValueError(
                f"This tokenizer takes images of {config.image_size} x {config.image_size} pixels only, but got "
                f"{height} x {width}. Resize them, or set `image_size` to None in its configuration."
            )
        return schedule

    def _image_size(self, schedule: ScaleSchedule) -> tuple[int, int]:
        """Height and width in pixels of the images that a schedule stands for."""
        if self.config.image_size is None:
            return schedule.height, schedule.width
        return self.config.image_size, self.config.image_size

    def _grid_of(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        height, width = pixel_values.shape[-2:]
        if self.config.image_size is not None:
            return self._schedule_of_size(height, width).grids[-1]
        return height // self.config.stride, width // self.config.stride

    def encode_semantic(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features `(B, C, h, w)` of the semantic encoder, for pixels `(B, 3, H, W)` in [-1, 1]."""
        config, grid = self.config, self._grid_of(pixel_values)
        patch = config.semantic_config.patch_size
        if config.image_size is None and patch != config.stride:
            size = tuple(cells * patch for cells in grid)
            # In float32: CPUs have no antialiased resize of bfloat16.
            pixel_values = F.interpolate(pixel_values.float(), size=size, mode="bicubic", antialias=True)
            pixel_values = pixel_values.to(self.dtype)
        if config.semantic_image_mean is not None:
            mean, std = (
                pixel_values.new_tensor(values).view(3, 1, 1)
                for values in (config.semantic_image_mean, config.semantic_image_std)
            )
            pixel_values = (((pixel_values + 1) / 2).clamp(0, 1) - mean) / std
        tokens = semantic_tokens(self.semantic_encoder, pixel_values, grid, config.vision_feature_layer)
        return tokens.transpose(1, 2).unflatten(2, grid)

    def encode_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixel half `(B, D_pix, h, w)` of the joint feature map, for pixels `(B, 3, H, W)` in [-1, 1]."""
        size = [cells * self.config.stride for cells in self._grid_of(pixel_values)]
        return self.pixel_proj(self.pixel_encoder(upsample(pixel_values, size)))

    def encode_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Joint feature map `(B, D, h, w)`, `[semantic | pixel]`, before quantization."""
        pixel_values = pixel_values.to(self.dtype)
        semantic = self.semantic_proj(self.encode_semantic(pixel_values).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return torch.cat([semantic, self.encode_pixels(pixel_values)], dim=1)

    @torch.no_grad()
    def encode(
        self,
        pixel_values: torch.Tensor | Sequence[torch.Tensor],
        image_grid_shw: torch.Tensor | None = None,
        self_correction: bool = False,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> NextFlowImageTokenizerOutput:
        """Encodes images to codes.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)` or a list of tensors `(3, H, W)`):
                Images in [-1, 1]. `H` and `W` must be a schedule's size (see [`ScaleSchedule`]), or the
                configuration's `image_size`.
            image_grid_shw (`torch.LongTensor` of shape `(B, 3)`, *optional*):
                The schedules to use; by default those of the images' sizes.
            self_correction (`bool`, *optional*, defaults to `False`):
                Draw some codes among the nearest few (the config's `self_correction_*`).
            generator (`torch.Generator` or a list of B, *optional*):
                Source of those draws, on the model's device. With one for each image, what an image draws does not
                depend on the others.

        Returns:
            [`NextFlowImageTokenizerOutput`]; lists in, lists out.

        Raises:
            `ValueError`: for a size that no schedule has, or a shape that is not that of RGB images.
        """
        if not isinstance(pixel_values, torch.Tensor):
            images = [] if pixel_values is None else list(pixel_values)
            return self._encode_list(images, image_grid_shw, self_correction, generator)
        schedule = self._check_images(pixel_values, image_grid_shw)
        if not pixel_values.is_floating_point() or not pixel_values.abs().max() <= 2:  # resizing overshoots
            raise ValueError("`pixel_values` must be floats in [-1, 1]; NextFlow's image processor makes them.")
        features = self.encode_features(pixel_values.to(self.device))
        return self.quantize(features, schedule, self_correction, generator)

    @torch.no_grad()
    def quantize(
        self,
        features: torch.Tensor,
        schedule: ScaleSchedule | None = None,
        self_correction: bool = False,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> NextFlowImageTokenizerOutput:
        """The second half of [`~NextFlowImageTokenizer.encode`]: codes of a joint feature map `(B, D, h, w)`."""
        if schedule is None:
            height, width = (side * self.config.stride for side in features.shape[-2:])
            schedule = ScaleSchedule.from_size(height, width, stride=self.config.stride, sides=self.config.sides)
        config, correction = self.config, None
        if self_correction:
            correction = SelfCorrection(
                config.self_correction_top_k, config.self_correction_token_fraction, config.self_correction_temperature
            )
        return self._output(self.quantizer(features, schedule.grids, correction, generator), schedule)

    def _output(self, result: Any, schedule: ScaleSchedule, **more) -> NextFlowImageTokenizerOutput:
        grids = torch.tensor([schedule.grid_shw] * len(result.codes), device=result.codes.device)
        common = {name: getattr(result, name) for name in ("codes", "target_codes", "quantized")}
        return NextFlowImageTokenizerOutput(**common, image_grid_shw=grids, **more)

    def _encode_list(self, images, image_grid_shw, self_correction, generator) -> NextFlowImageTokenizerOutput:
        if not images:
            raise ValueError("`pixel_values` is an empty list; give at least one image.")
        if not all(isinstance(image, torch.Tensor) and image.ndim == 3 for image in images):
            raise ValueError(
                "A list of images must hold tensors of shape (3, height, width); a batch must be a tensor."
            )
        rows: Any = [None] * len(images)
        if image_grid_shw is not None:
            rows = read_grids(image_grid_shw, len(images), "Got").split(1)
        own = generator if isinstance(generator, Sequence) else [generator] * len(images)
        encoded: list[Any] = [
            self.encode(image[None], row, self_correction, source)
            for image, row, source in zip(images, rows, own, strict=True)
        ]
        lists: Any = {name: [output[name][0] for output in encoded] for name in ("codes", "target_codes", "quantized")}
        return NextFlowImageTokenizerOutput(
            **lists, image_grid_shw=torch.cat([output.image_grid_shw for output in encoded])
        )

    def _check_images(self, pixel_values: torch.Tensor, image_grid_shw: torch.Tensor | None) -> ScaleSchedule:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or not len(pixel_values):
            raise ValueError(
                f"`pixel_values` must have the shape (batch, 3, height, width), but has {tuple(pixel_values.shape)}."
            )
        if image_grid_shw is None:
            schedule = self._schedule_of_size(*pixel_values.shape[-2:])
        else:
            schedule = self._shared_schedule(image_grid_shw, len(pixel_values))
        height, width = self._image_size(schedule)
        if (height, width) != tuple(pixel_values.shape[-2:]):
            raise ValueError(
                f"`image_grid_shw` {schedule.grid_shw} stands for {height} x {width} pixels, "
                f"but the images have {pixel_values.shape[-2]} x {pixel_values.shape[-1]}."
            )
        if schedule.num_scales > self.config.num_scales:
            raise ValueError(
                f"Images of {height} x {width} take {schedule.num_scales} scales, "
                f"but this tokenizer has {self.config.num_scales}. Resize the images."
            )
        return schedule

    # Decoding

    def _shared_schedule(self, image_grid_shw: torch.Tensor, num_images: int) -> ScaleSchedule:
        """The schedule of a batch, from one row for all or one an image."""
        rows = read_grids(image_grid_shw).tolist()
        if len(rows) not in (1, num_images):
            raise ValueError(f"Got {num_images} images but {len(rows)} rows of `image_grid_shw`; give one or one each.")
        if any(row != rows[0] for row in rows):
            raise ValueError(f"Images of one batch must share one grid, but got {rows}. Pass lists instead.")
        schedule = ScaleSchedule.from_grid_shw(rows[0], self.config.stride, self.config.sides)
        if self.config.image_size is not None and schedule != self._schedule_of_size(*self._image_size(schedule)):
            raise ValueError(
                f"This tokenizer has one size of images, all {self.config.num_scales} scales of a square, but "
                f"`image_grid_shw` is {schedule.grid_shw}. A preview takes the first codes and the whole grid's row."
            )
        return schedule

    def codes_to_latents(self, codes: torch.Tensor, image_grid_shw: torch.Tensor) -> torch.Tensor:
        """The accumulated quantized map `(B, D, h, w)` of codes `(B, n)` that fill the first whole scales, fp32.

        Raises:
            `ValueError`: for codes outside the codebook, codes that stop inside a scale, or mixed grids.
        """
        if codes.ndim != 2 or codes.is_floating_point():
            raise ValueError(
                "Codes must be integers of shape (batch, number of codes), but got "
                f"{codes.dtype} of shape {tuple(codes.shape)}."
            )
        schedule = self._shared_schedule(image_grid_shw, len(codes))
        codes = codes.to(self.device)
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.codebook_size:
            raise ValueError(
                f"Codes must lie in [0, {self.config.codebook_size}), but range from {int(codes.min())} to "
                f"{int(codes.max())}. Were they made by another image tokenizer, or is the visual offset still on them?"
            )
        return self.quantizer.decode(codes, schedule.grids, schedule.grids[-1])

    def decode_latents(self, latents: torch.Tensor, clamp: bool = True) -> torch.Tensor:
        """Pixels `(B, 3, H, W)` of an accumulated quantized map `(B, D, h, w)`; `clamp` keeps them in [-1, 1]."""
        pixel = self.post_pixel_proj(latents[:, self.config.semantic_code_dim :].to(self.dtype))
        if self.strip_rows is None or torch.is_grad_enabled():
            pixel_values = self.pixel_decoder(pixel)
        else:
            pixel_values = decode_in_strips(self.pixel_decoder, pixel, self.strip_rows)
        if self.config.image_size is not None:
            pixel_values = upsample(pixel_values, (self.config.image_size, self.config.image_size))
        return pixel_values.clamp(-1, 1) if clamp else pixel_values

    def enable_tiling(self, rows: int = 64) -> None:
        """Decodes images in strips of `rows` rows from now on: less memory, the same pixels, no seams.

        It applies without gradients only, as in [`~NextFlowImageTokenizer.decode`].
        """
        if rows < 1:
            raise ValueError(f"A strip has at least 1 row, but got {rows}.")
        self.strip_rows = rows

    def disable_tiling(self) -> None:
        """Decodes images whole again."""
        self.strip_rows = None

    @torch.no_grad()
    def decode(
        self, codes: torch.Tensor | Sequence[torch.Tensor], image_grid_shw: torch.Tensor
    ) -> torch.Tensor | list[torch.Tensor]:
        """Decodes codes to images.

        Args:
            codes (`torch.LongTensor` of shape `(B, n)` or a list of tensors `(n,)`):
                Codes of all scales or of the first few: a prefix gives a preview at full size.
            image_grid_shw (`torch.LongTensor` of shape `(B, 3)` or `(1, 3)`):
                Schedules of the whole images: one row per image, or one for a whole batch.

        Returns:
            `torch.Tensor` of shape `(B, 3, H, W)` in [-1, 1], or a list of tensors `(3, H, W)` for a list.
        """
        return self._decode_with(self.decode_latents, codes, image_grid_shw)

    @torch.no_grad()
    def decode_semantic(
        self, codes: torch.Tensor | Sequence[torch.Tensor], image_grid_shw: torch.Tensor
    ) -> torch.Tensor | list[torch.Tensor]:
        """The semantic decoder's features `(B, h * w, C)`; arguments as in [`~NextFlowImageTokenizer.decode`]."""
        return self._decode_with(self.decode_semantic_latents, codes, image_grid_shw)

    def decode_semantic_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The semantic decoder's features `(B, h * w, C)` of an accumulated quantized map `(B, D, h, w)`."""
        return self.semantic_decoder(latents[:, : self.config.semantic_code_dim].to(self.dtype))

    def _decode_with(self, decoder: Callable[[torch.Tensor], torch.Tensor], codes, image_grid_shw):
        if isinstance(codes, torch.Tensor):
            return decoder(self.codes_to_latents(codes, image_grid_shw))
        rows = read_grids(image_grid_shw, len(codes), "Got codes of").split(1)
        return [decoder(self.codes_to_latents(image[None], row))[0] for image, row in zip(codes, rows, strict=True)]

    # Training

    def forward(
        self,
        pixel_values: torch.Tensor,
        image_grid_shw: torch.Tensor | None = None,
        kept_scales: Sequence[int] | None = None,
        semantic: bool = True,
        decoder_only: bool = False,
    ) -> NextFlowImageTokenizerOutput:
        """Encodes, quantizes and decodes, with gradients.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Images of one size, in [-1, 1].
            image_grid_shw (`torch.LongTensor` of shape `(B, 3)`, *optional*):
                Their schedule; by default that of their size.
            kept_scales (`Sequence[int]`, *optional*):
                Indices of the scales to quantize on; the others are skipped (scale drop). By default all.
            semantic (`bool`, *optional*, defaults to `True`):
                `False` leaves the semantic branch out (the first training stage): pixels alone choose the codes.
            decoder_only (`bool`, *optional*, defaults to `False`):
                Encode without gradients, and learn to decode only (the last training stage): no losses are returned.

        Returns:
            [`NextFlowImageTokenizerOutput`] with `pixel_values` (not clamped), `semantic_features` and the losses.
        """
        if decoder_only:
            encoded: Any = self.encode(pixel_values, image_grid_shw)
            encoded.pixel_values = self.decode_latents(encoded.quantized, clamp=False)
            return encoded
        schedule = self._check_images(pixel_values, image_grid_shw)
        grids = schedule.grids if kept_scales is None else [schedule.grids[index] for index in kept_scales]
        if semantic:
            features = self.encode_features(pixel_values)
        else:
            pixel = self.encode_pixels(pixel_values.to(self.dtype))
            nothing = pixel.new_zeros(len(pixel), self.config.semantic_code_dim, *pixel.shape[-2:])
            features = torch.cat([nothing, pixel], dim=1)
        result = self.quantizer(features, grids, pixel_only=not semantic)
        return self._output(
            result,
            schedule,
            pixel_values=self.decode_latents(result.quantized, clamp=False),
            semantic_features=self.decode_semantic_latents(result.quantized) if semantic else None,
            residual=result.residual,
            codebook_loss=result.codebook_loss,
            commitment_loss=result.commitment_loss,
        )

    def enlarge_pixel_decoder(self, widen: float = 2, deepen: int = 1) -> None:
        """Replaces the pixel decoder by a new, larger one, which the last training stage trains alone.

        Args:
            widen (`float`, *optional*, defaults to 2): Factor of the widths; the paper doubles the decoder's capacity.
            deepen (`int`, *optional*, defaults to 1): Factor of the residual blocks per level (TokenFlow: 2).
        """
        self.config.decoder_hidden_sizes = [round(widen * width) for width in self.config.decoder_hidden_sizes]
        self.config.decoder_num_res_blocks = deepen * self.config.decoder_num_res_blocks
        decoder = NextFlowPixelDecoder(self.config)
        self.pixel_decoder = decoder.to(device=self.device, dtype=self.dtype)


__all__ = ["NextFlowImageTokenizer", "NextFlowImageTokenizerOutput"]
