"""The NextFlow pipeline for diffusers: a prompt in, images out, one step per scale.

Axes: B images (prompts x images per prompt), D channels of a code vector, (h, w) the last grid, H x W pixels.
"""

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import ImageProcessingMixin, PreTrainedTokenizerBase

from transformers_nextflow import (
    NextFlowForCausalLM,
    NextFlowImageTokenizer,
    NextFlowProcessor,
    ScaleSchedule,
)
from transformers_nextflow.codebook import check_same_checkpoint
from transformers_nextflow.generation_config_nextflow import NextFlowGenerationConfig, prompt_task
from transformers_nextflow.image_processing_pil_nextflow import to_pil
from transformers_nextflow.kept_pictures import read_source
from transformers_nextflow.pipeline_index import pipeline_index
from transformers_nextflow.processing_tokenflow import PROCESSORS
from transformers_nextflow.sampling import make_generators
from transformers_nextflow.strict_loading import HUB_ARGUMENTS
from transformers_nextflow.whole_folder import whole_folder

from .control import read_regions
from .lora_loader import NextFlowLoraLoaderMixin
from .modeling_diffusion_decoder import NextFlowDiffusionDecoder, check_parts, check_steps

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DECODERS = ("vq", "diffusion")


@dataclass
class NextFlowPipelineOutput(BaseOutput):
    """
    What [`NextFlowPipeline`] returns.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            B images, the images of one prompt side by side: PIL images, an array `(B, H, W, 3)` in [0, 1], a tensor
            `(B, 3, H, W)` in [0, 1], or latents `(B, D, h, w)`, as `output_type` says.
        frames (`list[list[PIL.Image.Image]]`, *optional*):
            With `num_frames` and `output_type="pil"`: the frames of each story (fewer if it was interrupted);
            `images` holds them all in a row.
            `diffusers.utils.export_to_gif(output.frames[0], "story.gif")` saves one.
        thoughts (`list[str]`, *optional*): With `thinking`: what was written before each image.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    frames: list[list[PIL.Image.Image]] | None = None
    thoughts: list[str] | None = None


def _of_call(name: str, default: Any, doc: str) -> Any:
    """A property of which each call has its own, since threads may share a pipeline."""

    def read(pipe: Any) -> Any:
        return pipe._calls.get(threading.get_ident(), {}).get(name, default)

    def write(pipe: Any, value: Any) -> None:
        own = pipe._calls.get(threading.get_ident())
        if own is None and name != "interrupt":
            raise ValueError(f"`{name}` belongs to a call: set it in a callback, or pass it as an argument.")
        for call in list(pipe._calls.values()) if own is None else [own]:  # from outside: all calls are stopped
            call[name] = value

    return property(read, write, doc=doc)


class NextFlowPipeline(DiffusionPipeline, NextFlowLoraLoaderMixin):
    r"""
    Images from text and images by next-scale prediction (NextFlow, arXiv 2601.02204): drawing, editing, stories.

    There is no denoising: an autoregressive model draws an image scale by scale, from 1x1 up, and an image tokenizer
    decodes the codes. So a *step* is a scale, and *latents* are the sum of the upsampled code vectors so far.

    Threads may share a pipeline: `schedule`, `num_timesteps`, `guidance_scale` and `interrupt` are those of the call
    whose callback reads or sets them, and None (False) outside of calls.

    Args:
        model ([`~transformers_nextflow.NextFlowForCausalLM`]): The language model that draws (or TokenFlow's).
        image_tokenizer ([`~transformers_nextflow.NextFlowImageTokenizer`]): Decodes codes to pixels.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The text tokenizer.
        image_processor ([`~transformers_nextflow.NextFlowImageProcessor`]): For images that are given to the model.
        diffusion_decoder ([`NextFlowDiffusionDecoder`], *optional*): The paper's optional decoder.
        scheduler (*optional*): The diffusion decoder's: one of diffusers', of its `prediction_type`.
        vae (*optional*): The autoencoder of a diffusion decoder that draws latents.

    Example:

    ```python
    >>> import torch
    >>> from diffusers_nextflow import NextFlowPipeline
    >>> from transformers_nextflow import tiny_checkpoint

    >>> pipe = NextFlowPipeline.from_pretrained(tiny_checkpoint())
    >>> image = pipe("a red circle left of a blue square", generator=torch.Generator().manual_seed(0)).images[0]
    >>> image.size
    (128, 128)
    ```
    """

    model: NextFlowForCausalLM
    image_tokenizer: NextFlowImageTokenizer
    tokenizer: PreTrainedTokenizerBase
    image_processor: ImageProcessingMixin
    diffusion_decoder: Any
    scheduler: Any
    vae: Any

    model_cpu_offload_seq = "model->image_tokenizer->diffusion_decoder->vae"  # type: ignore[assignment]
    _exclude_from_cpu_offload = ["image_tokenizer"]  # small, and used by other methods than `forward`
    _optional_components = ["diffusion_decoder", "scheduler", "vae"]
    _callback_tensor_inputs = ("latents", "codes", "prompt_embeds")

    interrupt = _interrupt = _of_call("interrupt", False, "True in a callback stops; what there is so far is returned.")
    guidance_scale = _guidance_scale = _of_call("guidance_scale", None, "The strength of guidance from here on.")
    schedule = _of_call("schedule", None, "The scales of the images that are being drawn.")
    num_timesteps = property(lambda self: self.schedule and self.schedule.num_scales, doc="How many scales these are.")

    def __init__(
        self,
        model: NextFlowForCausalLM,
        image_tokenizer: NextFlowImageTokenizer,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: ImageProcessingMixin,
        diffusion_decoder: NextFlowDiffusionDecoder | None = None,
        scheduler: Any = None,
        vae: Any = None,
    ):
        super().__init__()
        if (diffusion_decoder is None) != (scheduler is None) or (diffusion_decoder is None and vae is not None):
            raise ValueError("`diffusion_decoder` and `scheduler` belong together (and `vae`): give both, or none.")
        if diffusion_decoder is not None:
            check_parts(diffusion_decoder, scheduler, image_tokenizer, vae)
        self.register_modules(
            model=model,
            image_tokenizer=image_tokenizer,
            tokenizer=tokenizer,
            image_processor=image_processor,
            diffusion_decoder=diffusion_decoder,
            scheduler=scheduler,
            vae=vae,
        )
        check_same_checkpoint(model.config, self._processor)
        self._calls: dict[int, dict[str, Any]] = {}  # what is of each call, by its thread

    # Loading and saving

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs):
        """As diffusers', but a plain transformers checkpoint without a `model_index.json` is welcome too."""
        path = Path(pretrained_model_name_or_path)
        folder = path.parent if path.name == cls.config_name else path  # `download` asks for the file in the cache
        if folder.is_dir() and not (folder / "model").is_dir():
            _check_transformers_checkpoint(folder)
            if not (folder / cls.config_name).is_file():
                return pipeline_index(folder)
        return super().load_config(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str | os.PathLike:
        """As diffusers', but a repository without `model_index.json` is fetched as a plain transformers checkpoint."""
        try:
            return super().download(pretrained_model_name, **kwargs)
        except EntryNotFoundError:
            known = {name: kwargs[name] for name in HUB_ARGUMENTS if name != "proxies" and kwargs.get(name) is not None}
            patterns = ["*.json", "*.jinja", "*.txt", "*.safetensors"]
            return snapshot_download(pretrained_model_name, allow_patterns=patterns, **known)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As diffusers'; a `ValueError` where an adapter would be lost or saved without its base."""
        for name, component in self.components.items():
            wrapped = type(component).__module__.split(".")[0] == "peft"
            if wrapped or getattr(component, "_hf_peft_config_loaded", False):
                merge = f"pipe.{name}.merge_and_unload()"
                if not wrapped:
                    merge = "PeftModel.from_pretrained(base, adapter_folder).merge_and_unload()"
                raise ValueError(
                    f"`{name}` carries a PEFT adapter, which a pipeline cannot save. Merge it first: `pipe.{name} = "
                    f"{merge}`; or save the adapter by itself."
                )
        if kwargs.get("push_to_hub"):
            return super().save_pretrained(save_directory, *args, **kwargs)
        with whole_folder(save_directory) as partial:
            super().save_pretrained(partial, *args, **kwargs)

    # Generating

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Any = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_scales: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        thinking: bool = False,
        num_frames: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        image_temperature: float | list[float] | None = None,
        image_top_k: int | list[int] | None = None,
        image_top_p: float | list[float] | None = None,
        num_passes: int | None = None,
        prompt_style: str | None = None,
        mask_image: Any = None,
        strength: float | None = None,
        position: str | tuple[int, int] | None = None,
        preserve: str | None = None,
        image_in_prompt: bool | None = None,
        regions: Sequence[tuple[str, Any]] | None = None,
        negative_regions: Sequence[tuple[str, Any]] | None = None,
        decoder: str = "vq",
        decoder_steps: int | None = None,
        decoder_scale: int = 1,
        output_type: str = "pil",
        callback_on_step_end: Callable[["NextFlowPipeline", int, int, dict[str, torch.Tensor]], Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> NextFlowPipelineOutput | tuple:
        r"""
        Draws images. What is left out comes from the model's generation config.

        Args:
            prompt (`str` or `list[str]`): What to draw.
            image (a picture or a list of pictures, *optional*):
                What the prompt is about: an edit of it, or a new scene with what it shows. One prompt takes one picture
                or several; a list of prompts takes a list with one picture, or one list, per prompt. A picture is
                anything that the image processor takes. The result has the size of the (last) picture, unless `height`
                and `width` say otherwise.
            negative_prompt (`str` or `list[str]`, *optional*):
                What guidance leads away from, in the style of the prompts; by default, and for an empty one, from no
                prompt at all. One for all prompts, or one per prompt.
            height, width (`int`, *optional*): Pixels; they choose the schedule (see `ScaleSchedule.from_size`).
            num_scales (`int`, *optional*):
                Forces the number of scales; then only the aspect ratio of `height` and `width` counts.
            num_inference_steps (`int`, *optional*): The number of scales; a `ValueError` if the size has another.
            guidance_scale (`float`, *optional*): Of classifier-free guidance; at most 1 turns it off, as in diffusers.
            image_guidance_scale (`float`, *optional*):
                Strength of the guidance by `image` apart from the prompt's; a third branch. By default the pictures are
                in both branches and only the text is guided.
            thinking (`bool`, *optional*, defaults to `False`):
                The model writes a thought before it draws; the output's `thoughts` hold it. Prompts become chat turns.
            num_frames (`int`, *optional*): So many images in sequence for each prompt, a story; see `frames`.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Images a prompt.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of all draws: one, or one per image. In float32 the same seed gives the same image in any batch.
            image_temperature, image_top_k, image_top_p (*optional*): A number for all scales, or a list with one each.
            num_passes (`int`, *optional*): How many times each scale is drawn; TokenFlow takes it.
            prompt_style (`str`, *optional*):
                `"bare"`, the prompt is given to the model as it is, or `"chat"`, as a user's turn. By default as the
                model was trained: `model.generation_config.prompt_styles` has it for each task.
            mask_image (a picture or a list of pictures, *optional*):
                White where `image` is drawn anew, black where it stays; of its size. One for one `image`, or a list
                with one for each prompt. The prompt then says what the whole picture shows.
            strength (`float`, *optional*):
                Above 0 and at most 1: which share of the scales, the finest ones, is drawn anew everywhere: a
                variation of `image`. With `mask_image` the rest of the mask's white part stays.
            position (`str` or `tuple[int, int]`, *optional*):
                Where `image` stands, in its own size, on a larger picture (of `height` and `width`) that is drawn
                around it: `"center"`, `"left"`, `"top right"`, ..., or its left and top in pixels.
            preserve (`str`, *optional*, defaults to `"latents"`):
                How what is left by `mask_image` or `position` is kept: `"latents"`, as near as codes can come;
                `"codes"`, the source's own, which finer scales then don't fit; `"pixels"`, as latents, and in the end
                the source's pixels are pasted with a soft edge.
            image_in_prompt (`bool`, *optional*):
                Whether the model reads `image` before the prompt, as for an edit; by default where `image` stands
                alone. True with a mask is an edit of a part (of a prompt's last picture).
            regions, negative_regions (list of prompts with masks, *optional*):
                `[("a red circle", mask), ...]`: what is drawn where a mask, of the drawn picture's size, is white; the
                prompt is for the rest. Guidance leads away from negative ones there.
            decoder (`str`, *optional*, defaults to `"vq"`):
                What makes pictures of the codes: `"vq"`, the image tokenizer, or `"diffusion"`, the
                `diffusion_decoder`, which is sharper and alters small structures.
            decoder_steps (`int`, *optional*): Steps of the diffusion decoder; by default its own.
            decoder_scale (`int`, *optional*, defaults to 1):
                2 lets the diffusion decoder draw twice the height and width, if it was trained for it.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`; see [`NextFlowPipelineOutput`].
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, step, tensors)` after each scale; scales count from 0. diffusers' own
                callbacks work if `tensors` has what they ask for. The drawing goes on from `tensors["codes"]`, or those
                in the `dict` that is returned. `pipe._guidance_scale` and `pipe._interrupt` may be set.
            callback_on_step_end_tensor_inputs (`Sequence[str]`, *optional*, defaults to `("latents",)`):
                Tensors the callback gets: `"latents"`, the accumulated map `(B, D, h, w)`, which
                [`~NextFlowPipeline.decode_latents`] turns into a preview; `"codes"`, all codes so far `(B, n)`;
                `"prompt_embeds"`, of the prompts `(prompts, L, hidden_size)`. All but the codes are to look at only.
            return_dict (`bool`, *optional*, defaults to `True`): `False` returns a plain tuple.

        Returns:
            [`NextFlowPipelineOutput`], or `(images,)`.

        Raises:
            `ValueError`: for arguments that don't fit; the message says what does.
        """
        prompts = _as_list("prompt", prompt)
        negative_prompts = None if negative_prompt is None else _as_list("negative_prompt", negative_prompt)
        if negative_prompts is not None and len(negative_prompts) not in (1, len(prompts)):
            raise ValueError(
                f"Got {len(negative_prompts)} negative prompts for {len(prompts)} prompts; give one, or one each."
            )
        pictures = self._pictures(image, prompts)
        if negative_prompts is not None and num_frames is not None:
            raise ValueError("`negative_prompt` is for single images: it can't be combined with `num_frames`.")
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` must be at least 1, but got {num_images_per_prompt}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f'`output_type` must be one of {", ".join(OUTPUT_TYPES)}, but got "{output_type}".')
        self._check_decoder(decoder, decoder_steps, decoder_scale)
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"`callback_on_step_end` must be callable, but got {callback_on_step_end!r}.")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}, but may only hold "
                f"{list(self._callback_tensor_inputs)}."
            )

        if preserve == "pixels" and (output_type == "latent" or decoder_scale != 1):
            raise ValueError('`preserve="pixels"` pastes pixels, at their size: not with "latent" or `decoder_scale`.')
        size = NextFlowGenerationConfig(height=height, width=width, num_scales=num_scales)
        controls = mask_image, strength, position, preserve, image_in_prompt
        source = read_source(self.model, self.image_processor, pictures, *controls, size, num_frames)
        if source is not None and not image_in_prompt:
            pictures = [[] for _ in prompts]

        guidance_scale = _strength(guidance_scale)
        task = prompt_task(thinking, num_frames, any(pictures))
        inputs = self._encode(prompts, pictures, task, prompt_style)
        generators = make_generators(generator, len(prompts) * num_images_per_prompt, self._execution_device)
        negative: Any = {}
        if negative_prompts is not None:
            negative = self._encode(negative_prompts, [[]] * len(negative_prompts), task, prompt_style, negative=True)
        sized: Any = {"height": height, "width": width, "num_scales": num_scales}
        if source is not None:
            _onload(self.image_tokenizer)
            sized = source.options(self.image_tokenizer, preserve)
        areas = read_regions(self, task, prompt_style, regions, negative_regions)
        drawn: list[tuple[torch.Tensor, ScaleSchedule]] = []  # an entry a frame; without `num_frames` there is one
        output = None

        def on_scale_end(step: int, schedule: ScaleSchedule, codes: torch.Tensor) -> Any:
            if num_inference_steps not in (None, schedule.num_scales):
                raise ValueError(
                    f"A step is a scale, and an image of {schedule.height} x {schedule.width} pixels has "
                    f"{schedule.num_scales}: leave out `num_inference_steps`, which is {num_inference_steps}."
                )
            if decoder == "diffusion":
                self.diffusion_decoder.sample_size(schedule.grids[-1], decoder_scale)  # it may not take all sizes
            h, w = schedule.grids[step]
            progress_bar.total = schedule.num_scales * (num_frames or 1)
            progress_bar.set_description(f"scale {step + 1}/{schedule.num_scales} · {h}x{w}", refresh=False)
            progress_bar.update()
            self.schedule, strength = schedule, self.guidance_scale
            changes: Any = None
            if callback_on_step_end is not None:
                text_ids = inputs["input_ids"].clamp(max=self.model.config.text_vocab_size - 1)  # codes have no row
                makers = {
                    "latents": lambda: self._codes_to_latents(codes, schedule),
                    "codes": codes.clone,
                    "prompt_embeds": lambda: self.model.get_input_embeddings()(text_ids),
                }
                tensors = {name: makers[name]() for name in callback_on_step_end_tensor_inputs}
                before = tensors["latents"].clone() if "latents" in tensors else None
                returned = callback_on_step_end(self, step, step, tensors)
                if not isinstance(returned, dict | None) or set(returned or ()) - set(makers):
                    raise ValueError(f"A callback returns None or a dict of {sorted(makers)}, not {returned!r:.80}.")
                after = tensors | (returned or {})
                if "latents" in after and (before is None or not torch.equal(before, after["latents"])):
                    raise ValueError("A callback can change `codes`, of which `latents` are a view; change those.")
                changed = after.get("codes", codes)
                if changed.shape != codes.shape:
                    raise ValueError(f"A callback must not change shapes: codes {tuple(codes.shape)}.")
                if changed.is_floating_point():
                    raise ValueError(f"A callback gives `codes` as whole numbers, but these are {changed.dtype}.")
                changed = changed.to(codes)
                changes = codes = changed
                if self.guidance_scale != strength:
                    changes = {"codes": codes, "guidance_scale": _strength(self.guidance_scale)}
            drawn[len(drawn) - (step > 0) :] = [(codes, schedule)]
            if self.interrupt:
                raise _Interrupted
            return changes

        thread = threading.get_ident()
        outer = self._calls.get(thread)  # a callback may call the pipeline, too
        stored = self.model.generation_config.guidance_scale
        self._calls[thread] = {"guidance_scale": stored if guidance_scale is None else guidance_scale}
        try:
            with self.progress_bar(total=self.model.config.num_scales) as progress_bar, suppress(_Interrupted):
                output = self.model.generate(
                    **inputs,
                    generation_mode="image",
                    return_dict_in_generate=True,
                    guidance_scale=guidance_scale,
                    image_guidance_scale=image_guidance_scale,
                    thinking=thinking,
                    num_frames=num_frames,
                    negative_prompt_ids=negative.get("input_ids"),
                    negative_prompt_attention_mask=negative.get("attention_mask"),
                    num_return_sequences=num_images_per_prompt,
                    generator=generators,
                    image_temperature=image_temperature,
                    image_top_k=image_top_k,
                    image_top_p=image_top_p,
                    num_passes=num_passes,
                    on_scale_end=on_scale_end,
                    regions=areas,
                    **sized,
                )
        finally:
            del self._calls[thread]
            if outer is not None:
                self._calls[thread] = outer

        latents = torch.stack([self._codes_to_latents(*frame) for frame in drawn], dim=1).flatten(0, 1)
        pasted = source if preserve == "pixels" else None
        kind = output_type if pasted is None else "pt"
        if decoder == "vq" or output_type == "latent":
            images: Any = self.decode_latents(latents, kind)
        else:
            of_frames = [generator for generator in generators for _ in drawn]
            images = to_output(self._decode_by_diffusion(latents, of_frames, decoder_steps, decoder_scale), kind)
        if pasted is not None:
            images = to_output(2 * pasted.paste(images) - 1, output_type)
        frames = thoughts = None
        if num_frames is not None and output_type == "pil":
            frames = [images[start : start + len(drawn)] for start in range(0, len(images), len(drawn))]
        if output is not None and output.thought_ids is not None:  # it was not interrupted
            thoughts = [text.strip() for text in self.tokenizer.batch_decode(output.thought_ids, True)]
        self.maybe_free_model_hooks()
        return NextFlowPipelineOutput(images, frames, thoughts) if return_dict else (images,)

    @torch.no_grad()
    def decode_latents(
        self, latents: torch.Tensor, output_type: str = "pil"
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Images of accumulated latents `(B, D, h, w)`, whole or, in a callback, of the scales so far."""
        if output_type == "latent":
            return latents
        _onload(self.image_tokenizer)
        return to_output(self.image_tokenizer.decode_latents(latents), output_type)

    def _check_decoder(self, decoder: str, steps: int | None, scale: int) -> None:
        if decoder not in DECODERS:
            raise ValueError(f'`decoder` must be one of {", ".join(DECODERS)}, but got "{decoder}".')
        if decoder == "vq" and (steps is not None or scale != 1):
            raise ValueError(
                "`decoder_steps` and `decoder_scale` are the diffusion decoder's: leave them out, or ask for it with "
                '`decoder="diffusion"`.'
            )
        if decoder == "diffusion":
            if self.diffusion_decoder is None:
                raise ValueError(
                    'This pipeline has no `diffusion_decoder`, which `decoder="diffusion"` asks for: load one with its '
                    "`scheduler` as components, or leave out `decoder`."
                )
            check_parts(self.diffusion_decoder, self.scheduler, self.image_tokenizer, self.vae)
            check_steps(self.diffusion_decoder.config.num_inference_steps if steps is None else steps)
            self.diffusion_decoder.check_scale(scale)
            self.diffusion_decoder.check_text()

    def _decode_by_diffusion(
        self, latents: torch.Tensor, generators: list[torch.Generator], steps: int | None, scale: int
    ) -> torch.Tensor:
        """Pixels `(B, 3, H, W)` in [-1, 1]."""
        with self.progress_bar(total=steps or self.diffusion_decoder.config.num_inference_steps) as progress_bar:
            progress_bar.set_description("diffusion decoder", refresh=False)
            return self.diffusion_decoder.decode(
                latents=latents,
                image_tokenizer=self.image_tokenizer,
                scheduler=self.scheduler,
                vae=self.vae,
                num_inference_steps=steps,
                scale_factor=scale,
                generator=generators,
                on_step_end=lambda *_: progress_bar.update() and None,
            ).sample

    def _codes_to_latents(self, codes: torch.Tensor, schedule: ScaleSchedule) -> torch.Tensor:
        _onload(self.image_tokenizer)
        return self.image_tokenizer.codes_to_latents(codes, torch.tensor([schedule.grid_shw]))

    def _pictures(self, image: Any, prompts: list[str]) -> list[list[Any]]:
        """The pictures of each prompt."""
        if image is None:
            return [[] for _ in prompts]
        if getattr(image, "ndim", 0) == 4:  # a batch of pictures
            image = list(image)
        if not isinstance(image, list | tuple):
            image = [image] if len(prompts) == 1 else [[image]] * len(prompts)
        if len(prompts) == 1 and not (len(image) == 1 and isinstance(image[0], list | tuple)):
            image = [list(image)]
        if len(image) != len(prompts):
            raise ValueError(
                f"Got {len(image)} entries of `image` for {len(prompts)} prompts. Give one picture, or one list of "
                "pictures, a prompt."
            )
        return [list(entry) if isinstance(entry, list | tuple) else [entry] for entry in image]

    @property
    def _processor(self) -> NextFlowProcessor:
        parts = (self.image_processor, self.tokenizer, self.image_tokenizer)
        processor = PROCESSORS[self.model.config.model_type]
        return processor(*parts, self.model.config.text_vocab_size, self.tokenizer.chat_template)

    def _encode(
        self, prompts: list[str], pictures: list[list[Any]], task: str, style: str | None, negative: bool = False
    ) -> Any:
        """Prompts, as the model was trained to be prompted, behind their pictures; padded on the left."""
        processor = self._processor
        config, numbers = self.model.generation_config, [len(of_prompt) for of_prompt in pictures]
        texts = processor.style_prompts(prompts, task, config, style, numbers, negative)
        if flat := [picture for of_prompt in pictures for picture in of_prompt] or None:
            _onload(self.image_tokenizer)
        kind = "negative prompt" if negative else "prompt"
        # The processor pads by itself: a tokenizer that pads changes its own state, which other threads see.
        inputs = processor(texts, flat, padding=True, padding_side="left", return_tensors="pt", text_kind=kind)
        return inputs.to(self._execution_device)


def to_output(pixels: torch.Tensor, output_type: str) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
    """What pipelines return of pixels `(B, 3, H, W)` in [-1, 1]; a tensor keeps its dtype."""
    if output_type == "pil":  # in float32, as processors do: diffusers' own rounds bfloat16 twice
        return to_pil(pixels)
    return VaeImageProcessor().postprocess(pixels if output_type == "pt" else pixels.float(), output_type)


class _Interrupted(Exception):
    """Leaves `generate` after a scale."""


def _as_list(name: str, prompts: str | Sequence[str]) -> list[str]:
    listed = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(listed, list | tuple) or not listed or not all(isinstance(prompt, str) for prompt in listed):
        raise ValueError(f"`{name}` must be a string or a list of strings, but got {prompts!r}.")
    return list(listed)


def _strength(guidance_scale: float | None) -> float | None:
    """In diffusers guidance is off up to 1; to `generate`, less than 1 would be less of the prompt."""
    if guidance_scale is None:
        return None
    if not isinstance(guidance_scale, int | float) or not guidance_scale >= 0:
        raise ValueError(f"`guidance_scale` must be at least 0, but got {guidance_scale}.")
    return max(guidance_scale, 1.0)


def _onload(module: torch.nn.Module) -> None:
    """Offload hooks fire on `forward` alone; before another method of a component is called, they have to be told."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)


def _check_transformers_checkpoint(folder: Path) -> None:
    """Refuses a folder in which something is missing: all is flat but the image tokenizer's sub-folder."""
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ValueError(
            f'"{folder}" is an adapter, and a pipeline takes a whole model: write one by `trainer.save_merged`, or '
            "load its base and call `pipe.load_lora_weights(folder)`."
        )
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "image_tokenizer"):
        if not (folder / name).exists():
            raise ValueError(
                f'"{folder}" has no `{name}`. A NextFlow pipeline loads from a folder that '
                "`NextFlowPipeline.save_pretrained` wrote (it has a `model_index.json`), or from one that both a "
                "`NextFlowForCausalLM` and a `NextFlowProcessor` were saved to."
            )


# Where `DiffusionPipeline.from_pretrained` looks for a pipeline's class.
diffusers.NextFlowPipeline = NextFlowPipeline  # type: ignore[attr-defined]

__all__ = ["NextFlowPipeline", "NextFlowPipelineOutput"]
