"""The decoder by itself: codes or latents from anywhere in, pictures out.

Axes: B images, D channels of a code vector, (h, w) the last grid, H x W pixels.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import logging
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transformers_nextflow import NextFlowImageTokenizer
from transformers_nextflow.sampling import make_generators

from .modeling_diffusion_decoder import NextFlowDiffusionDecoder, check_parts, check_steps
from .pipeline_nextflow import _onload, to_output

logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt")
MAX_TEXT_TOKENS = 256  # where a tokenizer states no bound of its own


class NextFlowDecodePipeline(DiffusionPipeline):
    r"""
    Draws pictures of codes with a diffusion decoder: codes of a session, of GRPO or a data set, or the latents that
    [`NextFlowPipeline`] returns with `output_type="latent"`. Threads may share it.

    Args:
        diffusion_decoder ([`NextFlowDiffusionDecoder`]): The decoder.
        scheduler: One of diffusers' schedulers, of the decoder's `prediction_type`.
        image_tokenizer ([`~transformers_nextflow.NextFlowImageTokenizer`]): Makes the decoder's condition of the codes.
        vae (*optional*): The autoencoder of a decoder that draws latents.
        text_encoder ([`~transformers.PreTrainedModel`], *optional*): For a decoder that was trained with captions.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The text encoder's.

    Example:

    ```python
    >>> from diffusers_nextflow import NextFlowDecodePipeline, NextFlowPipeline

    >>> decode = NextFlowDecodePipeline.from_pretrained("runs/diffusion_decoder")
    >>> latents = NextFlowPipeline.from_pretrained(tiny_checkpoint())("a rocket emoji", output_type="latent").images
    >>> decode(latents=latents, scale_factor=2).images[0].save("rocket.png")
    ```
    """

    diffusion_decoder: Any
    image_tokenizer: NextFlowImageTokenizer
    scheduler: Any
    vae: Any
    text_encoder: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None

    model_cpu_offload_seq = "text_encoder->diffusion_decoder->vae"  # type: ignore[assignment]
    _exclude_from_cpu_offload = ["image_tokenizer"]  # small, and used by other methods than `forward`
    _optional_components = ["vae", "text_encoder", "tokenizer"]
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        diffusion_decoder: NextFlowDiffusionDecoder,
        scheduler: Any,
        image_tokenizer: NextFlowImageTokenizer,
        vae: Any = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        if diffusion_decoder is None or scheduler is None or image_tokenizer is None:
            raise ValueError("A decode pipeline needs a `diffusion_decoder`, its `scheduler` and `image_tokenizer`.")
        if (text_encoder is None) != (tokenizer is None):
            raise ValueError("`text_encoder` and `tokenizer` belong together: give both, or none.")
        check_parts(diffusion_decoder, scheduler, image_tokenizer, vae)
        self.register_modules(
            diffusion_decoder=diffusion_decoder,
            scheduler=scheduler,
            image_tokenizer=image_tokenizer,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )

    @torch.no_grad()
    def __call__(
        self,
        codes: torch.Tensor | Sequence[Any] | None = None,
        image_grid_shw: torch.Tensor | Sequence[Sequence[int]] | None = None,
        latents: torch.Tensor | None = None,
        prompt: str | Sequence[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        scale_factor: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, Any, dict[str, torch.Tensor]], Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Draws one picture for the codes, or the latents, of each image.

        Args:
            codes (`torch.LongTensor` of shape `(B, n)` or a list of B codes `(n,)`, *optional*):
                Of all scales or of the first whole ones. Those in a list may be of different sizes.
            image_grid_shw (`torch.LongTensor` of shape `(B, 3)` or `(1, 3)`, *optional*): Their schedules.
            latents (`torch.Tensor` of shape `(B, D, h, w)`, *optional*): Accumulated maps, instead of both.
            prompt (`str` or `list[str]`, *optional*):
                Captions, for a decoder that was trained with them: one for all, or one per image; `""` is none.
            prompt_embeds, pooled_prompt_embeds (`torch.Tensor` with B rows, *optional*):
                Instead of `prompt`, what the backbone's own pipeline makes of captions.
            num_inference_steps (`int`, *optional*): Steps of denoising; by default the decoder's own.
            guidance_scale (`float`, *optional*, defaults to 1.0): Guidance by the codes; at most 1 turns it off.
            scale_factor (`int`, *optional*, defaults to 1): 2 draws twice the height and width.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One, or one per image. In float32 the same seed gives the same picture in any batch.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"`.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, tensors)`; the drawing goes on from `tensors["latents"]`, the
                noisy samples `(B, C, H', W')`, or those in the `dict` that is returned.
            callback_on_step_end_tensor_inputs (`Sequence[str]`, *optional*, defaults to `("latents",)`): Of these.
            return_dict (`bool`, *optional*, defaults to `True`): `False` returns a plain tuple.

        Returns:
            `ImagePipelineOutput` with `images`: PIL images, an array `(B, H, W, 3)` or a tensor `(B, 3, H, W)` in
            [0, 1], lists of them for codes of different sizes; or `(images,)`.

        Raises:
            `ValueError`: for arguments that don't fit; the message says what does.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f'`output_type` must be one of {", ".join(OUTPUT_TYPES)}, but got "{output_type}".')
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f'`callback_on_step_end_tensor_inputs` has {sorted(unknown)}, but may hold "latents".')
        decoder, device = self.diffusion_decoder, self._execution_device
        check_parts(decoder, self.scheduler, self.image_tokenizer, self.vae)
        steps = decoder.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        check_steps(steps)
        _onload(self.image_tokenizer)
        maps = self._read(codes, image_grid_shw, latents)
        number = len(maps)
        for of_one in maps:
            decoder.sample_size(of_one.shape[-2:], scale_factor)
        if prompt is not None:
            if prompt_embeds is not None or pooled_prompt_embeds is not None:
                raise ValueError("Give either `prompt`, or `prompt_embeds` and `pooled_prompt_embeds`.")
            prompt_embeds, pooled_prompt_embeds = self.encode_prompt(prompt, number)
        text = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}
        decoder.check_text(**text)
        for name, embeds in text.items():
            if embeds is not None and len(embeds) != number:
                raise ValueError(f"`{name}` has {len(embeds)} rows for {number} images; it needs one per image.")
        generators = make_generators(generator, number, device)

        alike = defaultdict(list)  # images of one size are drawn as a batch
        for index, of_one in enumerate(maps):
            alike[of_one.shape].append(index)
        images: list[Any] = [None] * number
        with self.progress_bar(total=steps * len(alike)) as progress_bar:

            def on_step_end(step: int, num_steps: int, timestep: torch.Tensor, sample: torch.Tensor) -> Any:
                progress_bar.total = num_steps * len(alike)  # some schedulers take more than they are asked for
                progress_bar.update()
                if callback_on_step_end is None:
                    return None
                tensors = {name: sample for name in callback_on_step_end_tensor_inputs}
                returned = callback_on_step_end(self, step, timestep, tensors) or {}
                changed = {**tensors, **returned}.get("latents", sample)
                if changed.shape != sample.shape:
                    raise ValueError(f"A callback must not change shapes: latents {tuple(sample.shape)}.")
                return changed

            for indices in alike.values():
                pixels = decoder.decode(
                    latents=torch.stack([maps[index] for index in indices]).to(device),
                    image_tokenizer=self.image_tokenizer,
                    scheduler=self.scheduler,
                    vae=self.vae,
                    **{name: embeds[indices].to(device) for name, embeds in text.items() if embeds is not None},
                    num_inference_steps=steps,
                    guidance_scale=guidance_scale,
                    scale_factor=scale_factor,
                    generator=[generators[index] for index in indices],
                    on_step_end=on_step_end,
                ).sample
                drawn: Any = to_output(pixels, output_type)
                for index, image in zip(indices, drawn, strict=True):
                    images[index] = image
        self.maybe_free_model_hooks()
        result: Any = images
        if len(alike) == 1 and output_type != "pil":
            result = torch.stack(images) if output_type == "pt" else np.stack(images)
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def _read(self, codes: Any, image_grid_shw: Any, latents: torch.Tensor | None) -> list[torch.Tensor]:
        """The accumulated map `(D, h, w)` of each image."""
        if (codes is None) == (latents is None) or (codes is None) != (image_grid_shw is None):
            raise ValueError("Give either `codes` with their `image_grid_shw`, or `latents` alone.")
        tokenizer = self.image_tokenizer
        width = tokenizer.config.semantic_code_dim + tokenizer.config.pixel_code_dim
        if latents is not None:
            if latents.ndim != 4 or latents.shape[1] != width or not len(latents):
                raise ValueError(f"`latents` must be (batch, {width}, h, w), but are {tuple(latents.shape)}.")
            return list(latents)
        grids = torch.as_tensor(image_grid_shw)
        if isinstance(codes, torch.Tensor) and codes.ndim == 2:
            return list(tokenizer.codes_to_latents(codes, grids))
        rows = [torch.as_tensor(of_one) for of_one in codes]
        if not rows or len(grids) not in (1, len(rows)):
            raise ValueError(
                f"Got codes of {len(rows)} images and {len(grids)} rows of `image_grid_shw`; give one each."
            )
        grids = grids.expand(len(rows), -1)
        return [tokenizer.codes_to_latents(row[None], grid[None])[0] for row, grid in zip(rows, grids, strict=True)]

    def encode_prompt(self, prompt: str | Sequence[str], num_images: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings of captions by the text encoder: its last hidden states, and its pooled state if it has one.

        Raises:
            `ValueError`: if there is no text encoder, or the captions don't match the images in number.
        """
        if self.text_encoder is None:
            raise ValueError(
                "This pipeline has no `text_encoder`: leave out `prompt`, load one with its `tokenizer`, or pass "
                "`prompt_embeds`."
            )
        prompts = [prompt] * num_images if isinstance(prompt, str) else list(prompt)
        if len(prompts) != num_images or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"`prompt` must be a string, or {num_images}, one per image, but got {prompt!r:.80}.")
        tokenizer: Any = self.tokenizer
        length = min(tokenizer.model_max_length, MAX_TEXT_TOKENS)
        if longer := [text for text in prompts if len(tokenizer(text)["input_ids"]) > length]:
            logger.warning("%d captions are cut off after %d tokens.", len(longer), length)
        settings = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        encoded = self.text_encoder(tokenizer(prompts, **settings).input_ids.to(self._execution_device))
        pooled = getattr(encoded, "text_embeds", None)
        return encoded.last_hidden_state, getattr(encoded, "pooler_output", None) if pooled is None else pooled


# Where `DiffusionPipeline.from_pretrained` looks for a pipeline's class.
diffusers.NextFlowDecodePipeline = NextFlowDecodePipeline  # type: ignore[attr-defined]

__all__ = ["NextFlowDecodePipeline"]
