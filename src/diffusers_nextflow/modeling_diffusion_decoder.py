"""The paper's optional decoder (arXiv 2601.02204, sections 2.3 and 3.3): pictures of codes by diffusion.

Axes: B images, D channels of a code vector, (h, w) the last grid, H x W pixels, C channels of a sample, (H', W') its
places. A sample is a picture, or an autoencoder's latents.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn

from transformers_nextflow import NextFlowImageTokenizer
from transformers_nextflow.codebook import STRIDE, check_schedules, hash_image_tokenizer
from transformers_nextflow.sampling import make_generators

from .diffusion_backbones import (
    BACKBONES,
    add_condition,
    call_backbone,
    decode_with_vae,
    size_step,
    text_widths,
    vae_stride,
)

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


def prediction_type_of(scheduler: Any) -> str:
    """What a scheduler takes a model's output for; flow matching has no setting of its own for it."""
    return getattr(scheduler.config, "prediction_type", "flow_prediction")


@torch.no_grad()
def condition_of(image_tokenizer: NextFlowImageTokenizer, latents: torch.Tensor) -> torch.Tensor:
    """What a decoder sees of codes: their vectors, semantic and pixel half, and the semantic decoder's features.

    Args:
        image_tokenizer ([`NextFlowImageTokenizer`]): Of which the codes are.
        latents (`torch.Tensor` of shape `(B, D, h, w)`): The accumulated map of the codes.

    Returns:
        `torch.Tensor` of shape `(B, D + semantic_feature_dim, h, w)`, fp32.
    """
    semantic = image_tokenizer.decode_semantic_latents(latents)
    return torch.cat([latents.float(), semantic.float().transpose(1, 2).unflatten(2, latents.shape[-2:])], dim=1)


def condition_channels(image_tokenizer: NextFlowImageTokenizer) -> int:
    """Channels of [`condition_of`]."""
    config: Any = image_tokenizer.config
    return config.semantic_code_dim + config.pixel_code_dim + config.semantic_feature_dim


class NextFlowDiffusionDecoder(ModelMixin, ConfigMixin):
    """
    Draws pictures of codes by diffusion, at the codes' size or at twice it.

    The denoiser (`backbone`) is a stock one of diffusers. Codes reach it through one linear projection of what their
    image tokenizer makes of them, and then by its input convolution (UNets), or by an MLP that is added to the patch
    states (transformers). Captions, if there are any, go through the backbone's own text branch.

    Args:
        backbone_class (`str`, *optional*, defaults to `"UNet2DModel"`):
            Its class: `UNet2DModel`, `UNet2DConditionModel`, `SD3Transformer2DModel` or `FluxTransformer2DModel`.
        backbone_config (`dict`, *optional*): Its configuration, as if there were no condition.
        condition_channels (`int`, *optional*, defaults to 1192): Of the condition: code vectors and features.
        condition_dim (`int`, *optional*, defaults to 64): Channels that the condition is projected to.
        patch_size (`int`, *optional*, defaults to 1):
            A square of so many places a side is one place to the backbone, which then has `patch_size**2` as many
            channels; 2 for Flux, whose latents are packed so.
        sample_stride (`int`, *optional*, defaults to 1): Pixels per place of a sample; 1 without an autoencoder.
        prediction_type (`str`, *optional*, defaults to `"flow_prediction"`):
            `"epsilon"`, `"v_prediction"`, `"sample"` or `"flow_prediction"`. The scheduler's must be the same.
        scale_factors (`list[int]`, *optional*, defaults to `[1]`):
            What it was trained to draw: 1 is the codes' size, 2 twice height and width.
        num_inference_steps (`int`, *optional*, defaults to 12): Steps, where a call says nothing.
        uses_text (`bool`, *optional*, defaults to `False`): Whether it was trained with captions.
        image_tokenizer_hash (`str`, *optional*): Of the image tokenizer whose codes it was trained on.

    Example:

    ```python
    >>> import torch
    >>> from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
    >>> from diffusers_nextflow import NextFlowDiffusionDecoder
    >>> from transformers_nextflow import NextFlowImageTokenizer, tiny_checkpoint

    >>> image_tokenizer = NextFlowImageTokenizer.from_pretrained(tiny_checkpoint(), subfolder="image_tokenizer")
    >>> unet = UNet2DModel(in_channels=48, out_channels=48, block_out_channels=(32, 32), norm_num_groups=8,
    ...     down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"))
    >>> decoder = NextFlowDiffusionDecoder.from_backbone(unet, image_tokenizer, patch_size=4)  # to be trained
    >>> codes = image_tokenizer.encode(torch.zeros(1, 3, 128, 128))
    >>> scheduler = FlowMatchEulerDiscreteScheduler()
    >>> decoder.decode(codes.codes, codes.image_grid_shw, image_tokenizer=image_tokenizer, scheduler=scheduler,
    ...     num_inference_steps=2).sample.shape
    torch.Size([1, 3, 128, 128])
    ```
    """

    config: Any

    _supports_gradient_checkpointing = True
    _no_split_modules = ["JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        backbone_class: str = "UNet2DModel",
        backbone_config: dict[str, Any] | None = None,
        condition_channels: int = 1192,
        condition_dim: int = 64,
        patch_size: int = 1,
        sample_stride: int = 1,
        prediction_type: str = "flow_prediction",
        scale_factors: Sequence[int] = (1,),
        num_inference_steps: int = 12,
        uses_text: bool = False,
        image_tokenizer_hash: str | None = None,
    ):
        super().__init__()
        if backbone_class not in BACKBONES:
            raise ValueError(f"`backbone_class` must be one of {', '.join(BACKBONES)}, but got {backbone_class!r}.")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"`prediction_type` must be one of {', '.join(PREDICTION_TYPES)}, but got {prediction_type!r}."
            )
        self.condition_proj = nn.Conv2d(condition_channels, condition_dim, 1)
        self.backbone: Any = BACKBONES[backbone_class].from_config(backbone_config or {})
        self._check_backbone()
        self.set_scale_factors(scale_factors)
        add_condition(self.backbone, condition_dim)

    @classmethod
    def from_backbone(
        cls,
        backbone: nn.Module,
        image_tokenizer: NextFlowImageTokenizer,
        vae: nn.Module | None = None,
        **config,
    ) -> "NextFlowDiffusionDecoder":
        """A decoder around a denoiser, pretrained or new, that predicts what it did before until it is trained.

        Args:
            backbone (`nn.Module`): One of diffusers' classes above. It becomes part of the decoder and is changed.
            image_tokenizer ([`NextFlowImageTokenizer`]): Whose codes are to be drawn.
            vae (`nn.Module`, *optional*): The autoencoder whose latents the backbone denoises; none for pixels.
            config: Fields of the decoder's configuration.

        Raises:
            `ValueError`: if the backbone is of another class, or its channels fit neither pixels nor the `vae`.
        """
        if (name := type(backbone).__name__) not in BACKBONES:
            raise ValueError(f"`backbone` must be one of {', '.join(BACKBONES)}, but got {name}.")
        settings = {
            "backbone_class": name,
            "backbone_config": {key: value for key, value in backbone.config.items() if not key.startswith("_")},  # type: ignore[union-attr,operator]
            "condition_channels": condition_channels(image_tokenizer),
            "patch_size": 2 if name == "FluxTransformer2DModel" else 1,
            "sample_stride": 1 if vae is None else vae_stride(vae),
            "image_tokenizer_hash": hash_image_tokenizer(image_tokenizer),
            **config,
        }
        with torch.device("meta"):
            decoder = cls(**settings)
        add_condition(backbone, decoder.config.condition_dim)
        decoder.backbone = backbone
        decoder.condition_proj.to_empty(device=next(backbone.parameters()).device).to(next(backbone.parameters()).dtype)
        decoder.condition_proj.reset_parameters()
        check_parts(decoder, None, image_tokenizer, vae)
        return decoder

    @property
    def sample_channels(self) -> int:
        """Channels of a sample: 3 of pixels, or those of latents."""
        return self.backbone.config.in_channels // self.config.patch_size**2

    def _check_backbone(self) -> None:
        config, settings = self.config, self.backbone.config
        out_channels = getattr(settings, "out_channels", None) or settings.in_channels
        if settings.in_channels != out_channels or settings.in_channels % config.patch_size**2:
            raise ValueError(
                f"The backbone takes {settings.in_channels} channels and gives {out_channels}; both must be the "
                f"sample's channels times `patch_size`**2 = {config.patch_size**2}."
            )
        if config.uses_text and not text_widths(self.backbone)[0]:
            raise ValueError(f"{config.backbone_class} has no text branch: set `uses_text=False`.")

    def set_scale_factors(self, scale_factors: Sequence[int]) -> None:
        """What it will have been trained to draw: 1, 2 or both."""
        factors = sorted(set(scale_factors))
        if not factors or any(factor not in (1, 2) for factor in factors):
            raise ValueError(f"`scale_factors` may hold 1 and 2, but is {list(scale_factors)}.")
        classes = getattr(self.backbone.config, "num_class_embeds", None)
        if classes is not None and classes < max(factors):
            raise ValueError(
                f"The backbone's class embeddings say at which of `scale_factors` {factors} it draws, but there are "
                f"only {classes}."
            )
        self.register_to_config(scale_factors=factors)

    def check_scale(self, scale_factor: int) -> None:
        """Refuses a scale factor that it was not trained for."""
        if scale_factor not in self.config.scale_factors:
            trained = ", ".join(map(str, self.config.scale_factors))
            raise ValueError(
                f"This diffusion decoder was trained for the scale factor {trained}, but {scale_factor} was asked for. "
                "Ask for that, or train it further with `scale_factors`."
            )

    def sample_size(self, grid: Sequence[int], scale_factor: int = 1) -> tuple[int, int]:
        """Height and width in places of the sample for a last grid (h, w).

        Raises:
            `ValueError`: if it was not trained for the factor, or cannot halve such a sample as often as it does.
        """
        self.check_scale(scale_factor)
        height, width = (cells * STRIDE * scale_factor // self.config.sample_stride for cells in grid)
        step = size_step(self.backbone) * self.config.patch_size
        if height % step or width % step:
            raise ValueError(
                f"A sample of {height} x {width} places does not fit the backbone, which takes multiples of {step}. "
                "Choose another size of pictures, fewer levels or a smaller `patch_size`."
            )
        return height, width

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        condition: torch.Tensor,
        keep_condition: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """One prediction of the denoiser.

        Args:
            sample (`torch.Tensor` of shape `(B, C, H', W')`): Noisy pixels in [-1, 1], or latents.
            timestep (`torch.Tensor` of shape `(B,)` or a scalar): On the scheduler's scale, 0 to 1000.
            condition (`torch.Tensor` of shape `(B, condition_channels, h, w)`): From [`condition_of`].
            keep_condition (`torch.BoolTensor` of shape `(B,)`, *optional*):
                False where the condition and the caption are left out, as guidance's other branch sees it.
            prompt_embeds (`torch.Tensor` of shape `(B, L, width)`, *optional*): Captions; zeros by default.
            pooled_prompt_embeds (`torch.Tensor` of shape `(B, width)`, *optional*): Where the backbone has such.
            return_dict (`bool`, *optional*, defaults to `True`): `False` returns a plain tuple.

        Returns:
            `UNet2DOutput` with a `sample` `(B, C, H', W')`, or `(sample,)`.
        """
        patch, batch = self.config.patch_size, len(sample)
        projected = self.condition_proj(condition.to(self.condition_proj.weight.dtype))
        width, pooled_width = text_widths(self.backbone)
        text = projected.new_zeros(batch, 1, width) if prompt_embeds is None else prompt_embeds.to(projected)
        pooled = projected.new_zeros(batch, pooled_width)
        pooled = pooled if pooled_prompt_embeds is None else pooled_prompt_embeds.to(projected)
        if keep_condition is not None:
            kept = keep_condition.to(projected)[:, None]
            projected, text, pooled = projected * kept[..., None, None], text * kept[..., None], pooled * kept
        inputs = F.pixel_unshuffle(sample.to(projected), patch)
        projected = F.interpolate(projected, inputs.shape[-2:], mode="bilinear")
        height, width = (side * self.config.sample_stride for side in sample.shape[-2:])
        predicted = call_backbone(
            self.backbone,
            torch.cat([inputs, projected], dim=1),
            torch.as_tensor(timestep, device=sample.device).expand(batch),
            text,
            pooled,
            (height, width),
            height // (condition.shape[-2] * STRIDE),
        )
        predicted = F.pixel_shuffle(predicted, patch)
        return UNet2DOutput(sample=predicted) if return_dict else (predicted,)

    @torch.no_grad()
    def decode(
        self,
        codes: torch.Tensor | None = None,
        image_grid_shw: torch.Tensor | None = None,
        *,
        latents: torch.Tensor | None = None,
        image_tokenizer: NextFlowImageTokenizer,
        scheduler: Any,
        vae: Any = None,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        scale_factor: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        on_step_end: Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor | None] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Draws pictures of one size from codes, or from the latents that codes add up to.

        Nothing is kept between calls: the scheduler is copied, so threads may share all parts.

        Args:
            codes (`torch.LongTensor` of shape `(B, n)`, *optional*): Of all scales, or of the first whole ones.
            image_grid_shw (`torch.LongTensor` of shape `(B, 3)` or `(1, 3)`, *optional*): Their schedule, one for all.
            latents (`torch.Tensor` of shape `(B, D, h, w)`, *optional*): Instead of both; see
                [`~transformers_nextflow.NextFlowImageTokenizer.codes_to_latents`].
            image_tokenizer ([`NextFlowImageTokenizer`]): Makes the condition of them.
            scheduler: One of diffusers', of the decoder's `prediction_type`.
            vae (*optional*): The autoencoder, for a decoder that draws latents.
            prompt_embeds (`torch.Tensor` of shape `(B, L, width)`, *optional*): Captions, as the backbone takes them.
            pooled_prompt_embeds (`torch.Tensor` of shape `(B, width)`, *optional*): The same in one vector each.
            num_inference_steps (`int`, *optional*): Steps of denoising; by default the configuration's.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                Strength of guidance away from a picture of no codes and no caption; at most 1 turns it off.
            scale_factor (`int`, *optional*, defaults to 1): 2 draws twice the codes' height and width.
            generator (`torch.Generator` or a sequence of them, *optional*):
                One, or one per image: an image does not depend on the others of its batch.
            on_step_end (`Callable`, *optional*):
                Called as `on_step_end(step, num_steps, timestep, sample)`; a tensor that it returns is gone on with.
            return_dict (`bool`, *optional*, defaults to `True`): `False` returns a plain tuple.

        Returns:
            `DecoderOutput` with a `sample` `(B, 3, H, W)` in [-1, 1], fp32, or `(sample,)`.

        Raises:
            `ValueError`: if parts don't belong together, or for a size or a number that it can't draw.
        """
        check_parts(self, scheduler, image_tokenizer, vae)
        steps = check_steps(self.config.num_inference_steps if num_inference_steps is None else num_inference_steps)
        self.check_text(prompt_embeds, pooled_prompt_embeds)
        if (codes is None) == (latents is None) or (codes is None) != (image_grid_shw is None):
            raise ValueError("Give either `codes` with their `image_grid_shw`, or `latents` alone.")
        if codes is not None:
            latents = image_tokenizer.codes_to_latents(codes, image_grid_shw)  # type: ignore[arg-type]
        width = image_tokenizer.config.semantic_code_dim + image_tokenizer.config.pixel_code_dim
        if latents.ndim != 4 or latents.shape[1] != width:  # type: ignore[union-attr]
            raise ValueError(f"`latents` must be (batch, {width}, h, w), but have the shape {tuple(latents.shape)}.")  # type: ignore[union-attr]
        size = self.sample_size(latents.shape[-2:], scale_factor)  # type: ignore[union-attr]
        condition = condition_of(image_tokenizer, latents)  # type: ignore[arg-type]
        batch, device = len(condition), condition.device
        generators = make_generators(generator, batch, device)

        scheduler = copy.deepcopy(scheduler)
        sigmas = {}
        if scheduler.config.get("use_dynamic_shifting"):
            places = size[0] * size[1] // (self.config.patch_size * size_step(self.backbone)) ** 2
            names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            sigmas = {"mu": calculate_shift(places, *(scheduler.config[name] for name in names))}
        scheduler.set_timesteps(steps, device=device, **sigmas)
        options: Any = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            options = {"generator": generators}
        shape = (1, self.sample_channels, *size)
        noise = [torch.randn(shape, generator=own, device=own.device).to(device) for own in generators]
        sample = torch.cat(noise) * getattr(scheduler, "init_noise_sigma", 1.0)

        denoise: Any = self
        guided = guidance_scale > 1
        if guided:
            keep = torch.arange(2 * batch, device=device) < batch
            condition = torch.cat([condition, condition])
            prompt_embeds, pooled_prompt_embeds = (
                None if given is None else torch.cat([given, given]) for given in (prompt_embeds, pooled_prompt_embeds)
            )
        text = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds, "return_dict": False}
        for step, timestep in enumerate(scheduler.timesteps):
            inputs = sample
            if hasattr(scheduler, "scale_model_input"):
                inputs = scheduler.scale_model_input(sample, timestep)
            if guided:
                both = denoise(torch.cat([inputs, inputs]), timestep, condition, keep, **text)[0].float()
                of_codes, of_nothing = both.chunk(2)
                predicted = of_nothing + guidance_scale * (of_codes - of_nothing)
            else:
                predicted = denoise(inputs, timestep, condition, **text)[0].float()
            sample = scheduler.step(predicted, timestep, sample, **options, return_dict=False)[0]
            if on_step_end is not None:
                changed = on_step_end(step, len(scheduler.timesteps), timestep, sample)
                sample = sample if changed is None else changed
        pixels = (sample if vae is None else decode_with_vae(vae, sample)).float().clamp(-1, 1)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def check_text(
        self, prompt_embeds: torch.Tensor | None = None, pooled_prompt_embeds: torch.Tensor | None = None
    ) -> None:
        """Refuses captions that the decoder was not trained with, or none where it was."""
        given = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}
        for (name, embeds), width in zip(given.items(), text_widths(self.backbone), strict=True):
            if embeds is None and self.config.uses_text and width:
                raise ValueError(
                    f"This diffusion decoder was trained with captions and needs `{name}`: call "
                    "`NextFlowDecodePipeline` with a `prompt` and the text encoder, or make them with the backbone's "
                    "own pipeline."
                )
            if embeds is not None and not self.config.uses_text:
                raise ValueError(f"This diffusion decoder was trained without captions: leave out `{name}`.")
            if embeds is not None and embeds.shape[-1] != width:
                raise ValueError(f"`{name}` must be {width} wide, but has the shape {tuple(embeds.shape)}.")


def check_steps(steps: int) -> int:
    """Refuses what is no number of steps."""
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"A picture takes at least 1 step of denoising, but got {steps}.")
    return steps


def check_parts(
    decoder: NextFlowDiffusionDecoder,
    scheduler: Any,
    image_tokenizer: NextFlowImageTokenizer,
    vae: Any = None,
) -> None:
    """Refuses parts that are not of one diffusion decoder; `scheduler` None is not looked at.

    Raises:
        `ValueError`: with the part, what it should be, and what to do.
    """
    config = decoder.config
    if scheduler is not None:
        if (theirs := prediction_type_of(scheduler)) != config.prediction_type:
            raise ValueError(
                f'{type(scheduler).__name__} takes predictions for "{theirs}", but the diffusion decoder predicts '
                f'"{config.prediction_type}". Load the scheduler that it was saved with, or set `prediction_type` in '
                "the scheduler's configuration."
            )
        if scheduler.config.get("stochastic_sampling"):
            raise ValueError(
                f"{type(scheduler).__name__} with `stochastic_sampling` draws from the global random state: the same "
                "seed would give another picture. Set it to False."
            )
    check_schedules(image_tokenizer)
    if (width := condition_channels(image_tokenizer)) != config.condition_channels:
        raise ValueError(
            f"The image tokenizer gives {width} channels of codes and features, but the diffusion decoder takes "
            f"{config.condition_channels}. Load the image tokenizer that it was trained on."
        )
    table = image_tokenizer.quantizer.pixel_codebook.weight
    # A codebook that was cast to fewer bits has another hash.
    ours = config.image_tokenizer_hash if table.dtype == torch.float32 else None
    if ours and (theirs := hash_image_tokenizer(image_tokenizer)) != ours:
        raise ValueError(
            f"The diffusion decoder was trained on codes of the image tokenizer {ours}, but this one's codebook is "
            f"{theirs}: the same code means another picture. Load its own image tokenizer, or train it on these codes."
        )
    if (vae is None) != (config.sample_stride == 1):
        raise ValueError(
            f"The diffusion decoder draws {'pixels' if config.sample_stride == 1 else 'latents of an autoencoder'}: "
            + ("leave out `vae`." if config.sample_stride == 1 else "pass that one as `vae`.")
        )
    if vae is not None:
        stride = vae_stride(vae)
        if (vae.config.latent_channels, stride) != (decoder.sample_channels, config.sample_stride):
            raise ValueError(
                f"The `vae` has {vae.config.latent_channels} channels at a stride of {stride} pixels, but the "
                f"diffusion decoder draws {decoder.sample_channels} at {config.sample_stride}. Pass its own `vae`."
            )
        if getattr(vae.config, "latents_mean", None) is not None:
            raise ValueError("A `vae` with statistics of its own (`latents_mean`) is not supported; use one without.")
    elif decoder.sample_channels != 3:
        raise ValueError(
            f"A decoder of pixels has 3 channels, but the backbone takes {decoder.sample_channels} after `patch_size` "
            f"{config.patch_size}. Pass the `vae` of its latents, or another `patch_size`."
        )


__all__ = ["NextFlowDiffusionDecoder"]
