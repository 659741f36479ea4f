"""Generation: text token by token, as every language model does it, and images scale by scale.

Letters: B prompts, n images a prompt, L tokens of a prompt, S scales of an image, N codes of an image, K codes in the
codebook.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation import CompileConfig, LogitsProcessor, LogitsProcessorList
from transformers.utils import ModelOutput, logging
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_nextflow import NextFlowConfig
from .decoding_state import DecodingState
from .interleaved_decoding import GenerationEvent, InterleavedDecoding, InterleavedSettings, StopCheck, draw_scales
from .prompts import (
    Prompts,
    check_left_padded,
    count_images,
    end_with_boi,
    read_prompts,
    split_grids,
    stack_rows,
    unconditional_prompts,
)
from .sampling import ScaleSampling, make_generators, sampling_plan
from .scale_cache import ScaleCache
from .scale_schedule import ScaleSchedule
from .token_layout import TokenLayout

logger = logging.get_logger(__name__)

OnScaleEnd = Callable[[int, ScaleSchedule, torch.Tensor], Any]

GENERATION_MODES = ("text", "image", "interleaved")

# What callers, above all pipelines, pass to any `generate`; an image has no use for it: its schedule says when it ends.
IGNORED_IN_IMAGE_MODE = frozenset(
    {
        "max_new_tokens",
        "max_length",
        "min_new_tokens",
        "min_length",
        "bos_token_id",
        "eos_token_id",
        "stop_strings",
        "tokenizer",
        "synced_gpus",
        "disable_compile",
    }
)

# Interleaved text has an end of its own: settings that would move it must not be passed over.
IGNORED_IN_INTERLEAVED_MODE = frozenset({"bos_token_id", "tokenizer", "synced_gpus", "disable_compile"})

# What to use for an argument that a mode does not take.
INSTEAD = {
    "temperature": "image_temperature",
    "top_k": "image_top_k",
    "top_p": "image_top_p",
    "max_length": "max_new_tokens",
    "stop_strings": "stopping_criteria",
}


@dataclass
class NextFlowGenerateOutput(ModelOutput):
    """What image generation returns with `return_dict_in_generate=True`.

    Args:
        sequences (`torch.LongTensor` of shape `(B * n, L + 1 + N)`):
            Token view: the prompts, `<boi>` (none is added where a prompt ends with it), and the codes' ids.
        image_grid_shw (`torch.LongTensor` of shape `(num_images, 3)`):
            One row for each image in `sequences`, in reading order; without images in the prompts, one a sequence.
        image_codes (`torch.LongTensor` of shape `(B * n, N)`, with `num_frames` `(B * n, frames, N)`, *optional*):
            The new images alone, as codes in `[0, K)`, -1 where a stopping criterion left some off; not interleaved.
        attention_mask (`torch.LongTensor` of shape `(B * n, L + 1 + N)`, *optional*):
            0 where a sequence is padded; only where lengths may differ: after thoughts, and interleaved.
        thought_ids (`torch.LongTensor` of shape `(B * n, T)`, *optional*):
            What was thought before the image, padded on the right; only with `thinking`.
        cache (`Cache`, *optional*):
            Keys and values of `sequences[:, :-1]`. The slot of the last code, which carries `<eoi>`, was not run: pass
            `sequences`, `image_grid_shw` and the cache to `generate` and text goes on from there. None if a negative
            prompt longer than the prompts has moved them, and for several rows of frames, thoughts or interleaving.
    """

    sequences: torch.Tensor | None = None
    image_grid_shw: torch.Tensor | None = None
    image_codes: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    thought_ids: torch.Tensor | None = None
    cache: Cache | None = None


class TextOnlyLogitsProcessor(LogitsProcessor):
    """Forbids what can't be written: visual ids, and the ids that mark images (`<boi>` may be allowed)."""

    def __init__(self, config: NextFlowConfig, with_images: bool = False):
        self.text_vocab_size = config.text_vocab_size
        self.image_marks = [config.eoi_token_id, config.image_token_id]
        if not with_images:
            self.image_marks.append(config.boi_token_id)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = scores.clone()  # the caller keeps the raw ones for `output_logits`
        allowed[:, self.text_vocab_size :] = -torch.inf
        allowed[:, self.image_marks] = -torch.inf
        return allowed


def _stack(rows: Sequence[torch.Tensor], value: int, side: str = "right") -> torch.Tensor:
    """Rows of different lengths as one tensor."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


def _check_sharing(
    prefix_scales: int | None, images_per_prefix: int | None, num_scales: int, num_images: int
) -> tuple[int, int]:
    """How many scales are shared, and by how many images: (0, 1) if none are."""
    if prefix_scales is None and images_per_prefix is None:
        return 0, 1
    if prefix_scales is None or images_per_prefix is None:
        raise ValueError(
            "Pass `prefix_scales` and `images_per_prefix` together, but got "
            f"prefix_scales={prefix_scales} and images_per_prefix={images_per_prefix}."
        )
    if not 1 <= prefix_scales < num_scales:
        raise ValueError(
            f"`prefix_scales` must be between 1 and {num_scales - 1} for an image of {num_scales} scales, but got "
            f"{prefix_scales}."
        )
    if images_per_prefix < 1 or num_images % images_per_prefix:
        raise ValueError(
            f"`images_per_prefix` must divide the {num_images} images a prompt (`num_return_sequences`), but got "
            f"{images_per_prefix}."
        )
    return prefix_scales, images_per_prefix


def _stop_check(criteria: Any) -> StopCheck | None:
    """One question from transformers' stopping criteria: whether all rows of ids `(rows, L)` should stop."""
    if criteria is None:
        return None
    listed = list(criteria) if isinstance(criteria, list | tuple) else [criteria]
    if not listed:
        return None

    def should_stop(ids: torch.Tensor) -> bool:
        verdicts = [torch.as_tensor(criterion(ids, None)).expand(len(ids)) for criterion in listed]
        return bool(torch.stack([verdict.to(ids.device) for verdict in verdicts]).any(0).all())

    return should_stop


class _LastSchedules(threading.local):
    """The schedule that each model drew last, a table for each thread: servers share a model between threads."""

    def __init__(self):
        self.of_model: WeakKeyDictionary[Any, ScaleSchedule] = WeakKeyDictionary()


_LAST_SCHEDULES = _LastSchedules()

# Its methods name a protocol as the type of `self`, which mypy can't bind.
_GenerationMixin: Any = GenerationMixin


class NextFlowGenerationMixin(_GenerationMixin):
    """`generate` for models over text ids and visual codes."""

    config: NextFlowConfig

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    @deprecate_kwarg("return_past_key_values", "6.0.0", new_name="return_cache")
    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        generation_mode: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_scales: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        negative_prompt_ids: torch.LongTensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        image_temperature: float | Sequence[float] | None = None,
        image_top_k: int | Sequence[int] | None = None,
        image_top_p: float | Sequence[float] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        prefix_scales: int | None = None,
        images_per_prefix: int | None = None,
        on_scale_end: OnScaleEnd | None = None,
        thinking: bool | None = None,
        num_frames: int | None = None,
        max_new_images: int | None = None,
        **kwargs,
    ):
        r"""
        Generates text (the default), one image a sequence, or text and images in turn.

        Settings that are not given, or None, come from `generation_config`, then from the model's own
        `generation_config.json`; all but tensors, generators and callables can be stored there.

        Args:
            inputs (`torch.LongTensor` of shape `(B, L)`, *optional*):
                Prompts in the token view, padded on the left; the same as `input_ids=`.
            generation_config (`GenerationConfig`, *optional*): Stands between the arguments and the model's own.
            generation_mode (`str`, *optional*, defaults to `"text"`):
                `"text"` is [`~transformers.GenerationMixin.generate`] over text ids. `"image"` draws an image after
                each prompt; with images in the prompts that is an edit. `"interleaved"` lets the model write text and
                draw an image wherever it writes `<boi>`, all from one cache.
            height, width (`int`, *optional*):
                Size of the images in pixels, one that a [`ScaleSchedule`] ends at. By default an edit has the size of
                the prompt's last image.
            num_scales (`int`, *optional*):
                Forces the number of scales; of `height` and `width` only the aspect then counts. Without all three, and
                without an image in the prompts: a square image of `config.num_scales` scales.
            guidance_scale (`float`, *optional*):
                Classifier-free guidance: `unconditional + guidance_scale * (conditional - unconditional)`. 1 runs the
                conditional branch alone, and so does None if no default is stored. Text is never guided.
            image_guidance_scale (`float`, *optional*):
                Guides by the prompt's images apart from the text (InstructPix2Pix): `neither + image_guidance_scale *
                (images - neither) + guidance_scale * (all - images)`; a third branch. Needs images in every prompt.
            guidance_schedule (`str`, *optional*, defaults to `"constant"`):
                `"constant"`, or `"linear"`: from 1 at the first scale to the full strength at the last.
            negative_prompt_ids (`torch.LongTensor` of shape `(B, M)` or `(1, M)`, *optional*):
                Text of the unconditional branch, padded on the left. By default it has none: the prompt's images, if
                any, and `<boi>`. Image mode without `thinking` and `num_frames` only.
            negative_prompt_attention_mask (`torch.Tensor` of the same shape, *optional*): 0 where it is padding.
            image_temperature, image_top_k, image_top_p (a number, or a list of one a scale, *optional*):
                What the codes are drawn from. `image_top_k=0` and `image_top_p=1.0`, the defaults, cut nothing off.
            generator (`torch.Generator` or a list of one a row, *optional*):
                Randomness of the images, and of text that is sampled in their modes: the same seed gives the same image
                in any batch. A single one serves row 0 and seeds the others'. Without it a fresh seed is taken; the
                global random state is never touched.
            prefix_scales, images_per_prefix (`int`, *optional*):
                Image mode: of the `num_return_sequences` images of a prompt, each `images_per_prefix` in a row share
                their first `prefix_scales` scales, which are drawn and cached once (by the generator of the first).
            on_scale_end (`Callable`, *optional*):
                Called as `on_scale_end(step, schedule, codes)` after each scale, `step` from 0 to S - 1, `codes`
                `(rows that draw, codes so far)` int64 (one row a prefix as long as images share it). What it raises
                ends the generation.
            thinking (`bool`, *optional*):
                Image mode: the model first writes what it thinks (at most `max_new_tokens`, 128 by default), then
                draws; the output's `thought_ids` hold the text.
            num_frames (`int`, *optional*):
                Image mode: so many images one after the other, each conditioned on those before: a story, a video.
            max_new_images (`int`, *optional*, defaults to 4):
                Interleaved mode: images a row; a row that wants one more ends there.
            kwargs:
                Image mode takes `attention_mask` `(B, L)`, `image_grid_shw` `(num_images, 3)` (for images in the
                prompts), `do_sample` (*defaults to `True`* for images), `num_return_sequences` (images a prompt),
                `cache` (an empty cache), `cache_implementation` (`"preallocated"`, the default,
                `"quantized"` for 8 bits, `"dynamic"`, `"static"` or an offloaded one), `compile_config` (a
                `CompileConfig` compiles the layers once for each scale; `disable_compile` overrules it),
                `pad_token_id`, `stopping_criteria` (asked after each scale; when all rows say so the images end with
                that scale), `return_dict_in_generate`, `return_cache` (False saves memory if nothing goes on
                from the image) and `streamer` (which gets nothing but its `end()`); it ignores lengths and
                other stopping. Interleaved mode and `thinking` take those but for the cache and `compile_config`, and
                what shapes text: `max_new_tokens` (text tokens a row, 256 by default), `do_sample` (text is greedy by
                default, images sampled), `temperature`, `top_k`, `top_p`, `repetition_penalty`, `logits_processor`,
                `eos_token_id`; a `streamer` gets the text's tokens. Text mode takes `image_grid_shw` and all that
                transformers takes.

        Returns:
            Image mode: [`NextFlowGenerateOutput`] if `return_dict_in_generate`, else its `sequences`, after exactly S
            forward calls (more with `thinking` and `num_frames`). Interleaved mode: the same; what is new stands behind
            column L, padded on the right.
            Text mode: what transformers returns.

        Raises:
            `ValueError`: for arguments that don't fit the mode, the model or each other.
        """
        image_arguments: dict[str, Any] = {
            "height": height,
            "width": width,
            "num_scales": num_scales,
            "image_guidance_scale": image_guidance_scale,
            "guidance_schedule": guidance_schedule,
            "negative_prompt_ids": negative_prompt_ids,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
            "image_temperature": image_temperature,
            "image_top_k": image_top_k,
            "image_top_p": image_top_p,
            "generator": generator,
            "prefix_scales": prefix_scales,
            "images_per_prefix": images_per_prefix,
            "on_scale_end": on_scale_end,
            "thinking": thinking or None,
            "num_frames": num_frames,
            "max_new_images": max_new_images,
        }
        mode = self._setting("generation_mode", generation_mode, generation_config, default="text")
        if mode in ("image", "interleaved"):
            arguments = {**image_arguments, **kwargs, "guidance_scale": guidance_scale}
            del arguments["thinking"], arguments["num_frames"]
            if mode == "image":
                thinking = self._setting("thinking", thinking, generation_config)
                num_frames = self._setting("num_frames", num_frames, generation_config)
            if mode == "interleaved" or thinking or num_frames is not None:
                return self._generate_interleaved(inputs, generation_config, mode, thinking, num_frames, **arguments)
            if arguments.pop("max_new_images") is not None:
                raise ValueError(
                    "Image mode draws one image a row, so it does not take `max_new_images`. Use `num_frames`, "
                    '`num_return_sequences` or `generation_mode="interleaved"`.'
                )
            return self._generate_image(inputs, generation_config, **arguments)
        if mode != "text":
            raise ValueError(f'`generation_mode` must be one of {", ".join(GENERATION_MODES)}, but got "{mode}".')
        if unused := [name for name, value in image_arguments.items() if value is not None]:
            raise ValueError(
                f"Text mode does not take {', '.join(f'`{name}`' for name in unused)}. For an image pass "
                '`generation_mode="image"`.'
            )
        return self._generate_text(inputs, generation_config, **kwargs)

    @torch.no_grad()
    def stream(self, inputs: torch.Tensor | None = None, **kwargs) -> Iterator[GenerationEvent]:
        """Interleaved generation (or image mode with `thinking` or `num_frames`), event by event as it happens.

        The call itself checks the arguments and runs the prompts; what follows runs as the iterator is asked.

        Args:
            inputs (`torch.LongTensor` of shape `(B, L)`, *optional*): As for [`~NextFlowGenerationMixin.generate`].
            kwargs: What `generate` takes in these modes; `generation_mode` is `"interleaved"` by default.

        Returns:
            An iterator over [`GenerationEvent`]: every token, every scale and every image, of all rows.
        """
        mode, thinking, num_frames = (kwargs.pop(name, None) for name in ("generation_mode", "thinking", "num_frames"))
        mode = mode or "interleaved"
        if mode != "interleaved" and not (mode == "image" and (thinking or num_frames is not None)):
            raise ValueError(
                'Only `generation_mode="interleaved"`, and "image" with `thinking` or `num_frames`, can be streamed. '
                "For the scales of one image pass `on_scale_end` to `generate`."
            )
        decoding, settings, _ = self._start_interleaved(
            inputs, kwargs.pop("generation_config", None), mode, thinking, num_frames, kwargs
        )
        return decoding.run(settings)

    def _setting(self, name: str, value: Any, generation_config: GenerationConfig | None, default: Any = None) -> Any:
        """The value of a setting: the argument, or `generation_config`'s, or the model's own, or the default."""
        stored = (getattr(config, name, None) for config in (generation_config, self.generation_config))
        return next((v for v in (value, *stored) if v is not None), default)

    def _read_plan(
        self,
        settings: dict[str, Any],
        generation_config: GenerationConfig | None,
        prompts: Prompts,
        grids: torch.Tensor | None,
    ) -> tuple[ScaleSchedule, list[ScaleSampling], int]:
        """The schedule, how its codes are drawn, and the number of branches; takes what it reads out of `settings`."""

        def setting(name, default=None):
            return self._setting(name, settings.pop(name, None), generation_config, default)

        size = {name: settings.pop(name, None) for name in ("height", "width", "num_scales")}
        counts = count_images(prompts[0].masked_fill(prompts[1] == 0, 0), self.config.text_vocab_size)
        if grids is not None and all(counts) and all(value is None for value in size.values()):
            schedule = self._schedule_of_sources(prompts, grids)
        else:
            schedule = self._image_schedule(size, generation_config)
        # A stored one is for edits alone; one that is given must make sense.
        image_guidance_scale = settings.pop("image_guidance_scale", None)
        if all(counts):
            image_guidance_scale = self._setting("image_guidance_scale", image_guidance_scale, generation_config)
        elif image_guidance_scale is not None:
            raise ValueError(
                "`image_guidance_scale` guides by the images of the prompts, but "
                f"{counts.count(0)} of {len(counts)} prompts have none. Leave it out, or use `guidance_scale`."
            )
        plan = sampling_plan(
            schedule.num_scales,
            self.config.visual_codebook_size,
            guidance_scale=setting("guidance_scale"),
            guidance_schedule=setting("guidance_schedule", "constant"),
            image_guidance_scale=image_guidance_scale,
            temperature=setting("image_temperature", 1.0),
            top_k=setting("image_top_k"),
            top_p=setting("image_top_p", 1.0),
            do_sample=setting("do_sample", True),
        )
        if any(sampling.image_guidance_scale != 1 for sampling in plan):
            return schedule, plan, 3
        return schedule, plan, 2 if any(sampling.guidance_scale != 1 for sampling in plan) else 1

    def _schedule_of_sources(self, prompts: Prompts, grids: torch.Tensor) -> ScaleSchedule:
        """An edit keeps the size of the image that it edits: the last one of its prompt."""
        rows = split_grids(prompts[0] * prompts[1], grids, self.config.text_vocab_size)
        last = {tuple(of_row[-1].tolist()) for of_row in rows}
        if len(last) > 1:
            sizes = sorted({(s.height, s.width) for s in map(ScaleSchedule.from_grid_shw, last)})
            raise ValueError(
                f"The last images of the prompts have the sizes {sizes} (height, width), but the images of a batch are "
                "drawn at one size. Pass `height` and `width`, or one prompt at a time."
            )
        return ScaleSchedule.from_grid_shw(last.pop())

    def _read_image_prompts(
        self, inputs: torch.Tensor | None, arguments: dict[str, Any], pad_token_id: int
    ) -> tuple[Prompts, torch.Tensor | None]:
        """Prompts and grids, on one device; takes what it reads out of `arguments`."""
        input_ids, attention_mask, grids = (
            arguments.pop(name, None) for name in ("input_ids", "attention_mask", "image_grid_shw")
        )
        if inputs is not None and input_ids is not None:
            raise ValueError("Pass the prompts as `inputs` or as `input_ids`, not both.")
        # Everything stays on the prompts' device: with offloading, `self.device` says little about where layers run.
        ids = inputs if inputs is not None else input_ids
        if ids is None:
            ids = torch.empty(1, 0, dtype=torch.long, device=self.device)
        prompts = read_prompts(ids, attention_mask, pad_token_id)
        if grids is None and (prompts[0] >= self.config.text_vocab_size).any():
            raise ValueError(
                f"The prompts hold image codes (ids from {self.config.text_vocab_size} on), but `image_grid_shw` is "
                "missing: pass one row (number of scales, bucket height, bucket width) for each image."
            )
        return prompts, None if grids is None else grids.to(prompts[0].device)

    def _refuse(self, settings: dict[str, Any], mode: str) -> None:
        if unknown := {name for name, value in settings.items() if value is not None}:
            hints = [f"`{INSTEAD[name]}` for `{name}`" for name in sorted(unknown) if name in INSTEAD]
            raise ValueError(
                f"{mode} does not take {', '.join(f'`{name}`' for name in sorted(unknown))}."
                + (f" Use {', '.join(hints)}." if hints else "")
            )

    def _generate_image(
        self,
        inputs: torch.Tensor | None,
        generation_config: GenerationConfig | None,
        *,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        prefix_scales: int | None = None,
        images_per_prefix: int | None = None,
        on_scale_end: OnScaleEnd | None = None,
        stopping_criteria: Any = None,
        streamer: Any = None,
        **settings,
    ) -> NextFlowGenerateOutput | torch.Tensor:
        def setting(name, default=None):
            return self._setting(name, settings.pop(name, None), generation_config, default)

        pad_token_id = setting("pad_token_id", self.config.eoi_token_id)  # masked: any id would do
        prompts, prompt_grids = self._read_image_prompts(inputs, settings, pad_token_id)
        schedule, plan, num_branches = self._read_plan(settings, generation_config, prompts, prompt_grids)
        num_images = setting("num_return_sequences", 1)
        if num_images < 1:
            raise ValueError(f"`num_return_sequences` must be at least 1, but got {num_images}.")
        sharing = _check_sharing(prefix_scales, images_per_prefix, schedule.num_scales, num_images)
        return_dict = setting("return_dict_in_generate", False)
        return_cache = setting("return_cache", True)
        keeps_cache = cache is not None or (return_dict and return_cache)
        cache_implementation = setting("cache_implementation", "preallocated")
        compile_config = setting("compile_config")
        if setting("disable_compile", False):
            compile_config = None
        if not isinstance(compile_config, CompileConfig | None):
            raise TypeError(
                f"`compile_config` must be a `transformers.CompileConfig`, but got {type(compile_config).__name__}."
            )
        if setting("num_beams", 1) > 1:
            raise ValueError(
                "Image mode can't search with beams: leave `num_beams` at 1 (`num_return_sequences` draws more)."
            )
        if not setting("use_cache", True):
            raise ValueError("Image mode decodes with a cache: `use_cache` must not be False.")
        self._refuse({k: v for k, v in settings.items() if k not in IGNORED_IN_IMAGE_MODE}, "Image mode")

        boi_token_id, text_vocab_size = self.config.boi_token_id, self.config.text_vocab_size
        prompt_ids, mask = end_with_boi(*prompts, boi_token_id, pad_token_id)
        ids, grids = prompt_ids, prompt_grids
        if num_branches > 1:
            negative_ids = ids.new_empty(1, 0) if negative_prompt_ids is None else negative_prompt_ids.to(ids.device)
            negative = read_prompts(negative_ids, negative_prompt_attention_mask, pad_token_id)
            negative = end_with_boi(*negative, boi_token_id, pad_token_id)
            conditional = ids, mask
            for with_images in (True, False)[: num_branches - 1]:
                branch = unconditional_prompts(conditional, negative, text_vocab_size, pad_token_id, with_images)
                ids, mask = stack_rows((ids, mask), branch, pad_token_id)
            grids = None if grids is None else torch.cat([grids, grids])
        elif negative_prompt_ids is not None:
            logger.warning_once("`negative_prompt_ids` has no effect without a `guidance_scale`.")
        self._check_context(ids.shape[1], schedule.num_tokens, prompt_grids)

        # The keys of the last scale serve its own step only, if nothing follows the image.
        num_unstored = 0 if keeps_cache or schedule.num_scales == 1 else schedule.scale_lengths[-1]
        length = ids.shape[1] + schedule.num_tokens - 1
        cache = self._image_cache(cache, cache_implementation, length, num_unstored)
        if isinstance(cache, ScaleCache):
            cache.set_padding(None if mask.all() else mask)
        elif compile_config is not None:
            raise ValueError(
                'Only steps on a `ScaleCache` are compiled: use `cache_implementation="preallocated"` (the default) or '
                '"quantized", or turn `compile_config` off with `disable_compile=True`.'
            )
        generators = make_generators(generator, len(prompt_ids) * num_images, ids.device)
        should_stop = _stop_check(stopping_criteria)
        state = DecodingState(self, len(ids), cache, ids.device, compile_config)
        logits = state.run(ids, None if mask.all() else mask, grids, visual_logits=True)
        # The prompts were run once; from here on every image (or shared prefix) has its row in each branch.
        rows = torch.arange(len(ids), device=ids.device).repeat_interleave(num_images // sharing[1])
        state.select(rows)
        codes = ids.new_empty(len(generators), 0)
        for step, codes in draw_scales([state], logits[rows], schedule, plan, generators, *sharing):
            if on_scale_end is not None:
                on_scale_end(step, schedule, codes)
            if should_stop is not None:
                shown = prompt_ids.repeat_interleave(len(codes) // len(prompt_ids), dim=0)
                if should_stop(torch.cat([shown, codes + text_vocab_size], dim=1)):
                    break
        codes = codes.repeat_interleave(len(generators) // len(codes), dim=0)  # if it stopped while they share
        prompt_rows = prompt_ids.repeat_interleave(num_images, dim=0)
        if streamer is not None:
            streamer.end()
        _LAST_SCHEDULES.of_model[self] = schedule

        sequences = torch.cat([prompt_rows, codes + text_vocab_size], dim=1)
        if num_branches > 1 and keeps_cache:
            conditional_rows = torch.arange(len(codes), device=codes.device)
            cache.reorder_cache(conditional_rows)  # type: ignore[arg-type]
        if not return_dict:
            return sequences
        new_grid = torch.tensor([schedule.grid_shw], device=codes.device)
        if prompt_grids is None:
            grids = new_grid.repeat(len(codes), 1)
        else:
            grids_of_prompts = split_grids(prompt_ids, prompt_grids, text_vocab_size)
            grids = torch.cat([torch.cat([rows, new_grid]).repeat(num_images, 1) for rows in grids_of_prompts])
        return NextFlowGenerateOutput(
            sequences=sequences,
            image_grid_shw=grids,
            image_codes=codes,
            cache=cache if keeps_cache and ids.shape[1] == prompt_ids.shape[1] else None,
        )

    # Text and images in turn

    def _generate_interleaved(
        self,
        inputs: torch.Tensor | None,
        generation_config: GenerationConfig | None,
        mode: str,
        thinking: bool | None,
        num_frames: int | None,
        *,
        on_scale_end: OnScaleEnd | None = None,
        streamer: Any = None,
        return_dict_in_generate: bool | None = None,
        **arguments,
    ) -> NextFlowGenerateOutput | torch.Tensor:
        decoding, settings, prompts = self._start_interleaved(
            inputs, generation_config, mode, thinking, num_frames, arguments
        )
        num_rows = len(decoding.rows)
        if streamer is not None:
            if num_rows > 1:
                raise ValueError(f"A `streamer` takes the text of one row, but there are {num_rows}. Use `stream`.")
            streamer.put(prompts[0].cpu())  # first, as transformers does: streamers may skip it
        thoughts: list[list[torch.Tensor]] = [[] for _ in range(num_rows)]
        codes: list[list[torch.Tensor]] = [[] for _ in range(num_rows)]
        scale: list[torch.Tensor] = []
        for event in decoding.run(settings):
            if event.kind == "token":
                thoughts[event.row].append(event.ids)
                if streamer is not None:
                    streamer.put(event.ids.cpu())
            elif event.kind == "image":
                codes[event.row].append(event.ids)
            elif on_scale_end is not None:
                scale.append(event.ids)
                if len(scale) == len(decoding.rows):
                    on_scale_end(int(event.step or 0), event.schedule, torch.stack(scale))
                    scale = []
        if streamer is not None:
            streamer.end()
        _LAST_SCHEDULES.of_model[self] = settings.schedule

        sequences = decoding.sequences()
        pad = decoding.pad_token_id
        if mode == "image":  # it ends with the image in every row, as without thoughts
            padded = _stack(sequences, pad, "left")
            mask = _stack([torch.ones_like(row) for row in sequences], 0, "left")
        else:  # the prompts as they were, and behind them what is new
            copies = num_rows // len(prompts[0])
            ids, mask = (rows.repeat_interleave(copies, dim=0) for rows in prompts)
            new = [row[int(length) :] for row, length in zip(sequences, mask.sum(-1), strict=True)]
            padded = torch.cat([ids, _stack(new, pad)], dim=1)
            mask = torch.cat([mask, _stack([torch.ones_like(row) for row in new], 0)], dim=1)
        if not self._setting("return_dict_in_generate", return_dict_in_generate, generation_config, False):
            return padded
        grids = [grid for row in decoding.grids for grid in row]
        image_codes = None
        if mode == "image":
            # Rows have as many images each; a stopping criterion may have cut the last ones, or left none.
            images = [image for row in codes for image in row]
            image_codes = _stack(images, -1) if images else padded.new_empty(num_rows, 0)
            if num_frames is not None:
                image_codes = image_codes.unflatten(0, (num_rows, -1))
        return NextFlowGenerateOutput(
            sequences=padded,
            image_grid_shw=torch.tensor(grids, dtype=torch.long, device=padded.device).view(-1, 3),
            image_codes=image_codes,
            attention_mask=mask,
            thought_ids=_stack([torch.cat([padded[0, :0], *row]) for row in thoughts], pad) if thinking else None,
            cache=decoding.cache_before_last() if num_rows == 1 else None,
        )

    def _start_interleaved(
        self,
        inputs: torch.Tensor | None,
        generation_config: GenerationConfig | None,
        mode: str,
        thinking: bool | None,
        num_frames: int | None,
        arguments: dict[str, Any],
    ) -> tuple[InterleavedDecoding, InterleavedSettings, Prompts]:
        """A decoding that has run the prompts, how it goes on, and the prompts."""
        pad_token_id = self._setting(
            "pad_token_id", arguments.pop("pad_token_id", None), generation_config, self.config.eoi_token_id
        )
        prompts, grids = self._read_image_prompts(inputs, arguments, pad_token_id)
        num_copies = self._setting(
            "num_return_sequences", arguments.pop("num_return_sequences", None), generation_config, 1
        )
        if num_copies < 1:
            raise ValueError(f"`num_return_sequences` must be at least 1, but got {num_copies}.")
        if not prompts[0].shape[1]:
            raise ValueError("There is no prompt: pass `input_ids` of at least one token.")
        rows: list[Any] = [[] for _ in prompts[0]]
        if grids is not None:
            rows = [
                [tuple(grid) for grid in of_row.tolist()]
                for of_row in split_grids(prompts[0] * prompts[1], grids, self.config.text_vocab_size)
            ]
        settings = self.interleaved_settings(
            generation_config, mode, thinking, num_frames, prompts, grids, len(rows) * num_copies, arguments
        )
        decoding = InterleavedDecoding(self, len(rows), pad_token_id, prompts[0].device)
        decoding.extend(*prompts, rows)
        decoding.repeat(num_copies)
        return decoding, settings, prompts

    def interleaved_settings(
        self,
        generation_config: GenerationConfig | None,
        mode: str,
        thinking: bool | None,
        num_frames: int | None,
        prompts: Prompts,
        grids: torch.Tensor | None,
        num_rows: int,
        arguments: dict[str, Any],
    ) -> InterleavedSettings:
        """Reads the arguments of an interleaved generation; see [`~NextFlowGenerationMixin.generate`]."""

        def setting(name, default=None):
            return self._setting(name, arguments.pop(name, None), generation_config, default)

        if mode == "interleaved" and (thinking or num_frames is not None):
            raise ValueError('`thinking` and `num_frames` are for `generation_mode="image"`; leave them out here.')
        sample_text = bool(self._setting("do_sample", arguments.get("do_sample"), generation_config))
        schedule, plan, num_branches = self._read_plan(arguments, generation_config, prompts, grids)
        generators = make_generators(arguments.pop("generator", None), num_rows, prompts[0].device)
        should_stop = _stop_check(arguments.pop("stopping_criteria", None))
        plain = ("negative_prompt_ids", "negative_prompt_attention_mask", "cache", "prefix_scales")
        for name in (*plain, "images_per_prefix"):
            if arguments.pop(name, None) is not None:
                raise ValueError(f"`{name}` is for image mode without `thinking` and `num_frames`; leave it out here.")
        opening, limit, text_limit = "free", arguments.pop("max_new_images", None), setting("max_new_tokens")
        if mode == "interleaved":
            limit = self._setting("max_new_images", limit, generation_config)
        else:
            if limit is not None:
                raise ValueError("Image mode does not take `max_new_images`; use `num_frames`.")
            opening, limit = ("must", 1) if num_frames is None else ("now", num_frames)
            if thinking and num_frames is not None:
                raise ValueError("`thinking` comes before one image: pass it or `num_frames`, not both.")
            if limit < 1:
                raise ValueError(f"`num_frames` must be at least 1, but got {limit}.")
        if (limit or 0) < 0 or (text_limit or 0) < 0:
            raise ValueError(
                f"`max_new_images` and `max_new_tokens` must not be negative, but got {limit} and {text_limit}."
            )
        self._check_context(prompts[0].shape[1], text_limit if text_limit and opening != "now" else 1, grids)
        limit, text_limit = self._share_context(
            self.config.max_position_embeddings - prompts[0].shape[1],
            schedule,
            limit,
            0 if opening == "now" else text_limit,
            128 if mode == "image" else 256,
        )
        if not limit and (prompts[0][:, -1] == self.config.boi_token_id).any():
            raise ValueError(
                "A prompt ends with `<boi>`, so an image must follow, but `max_new_images` is 0, or none fits into the "
                "context. Leave `<boi>` out, or make room for an image."
            )
        eos_token_id = setting("eos_token_id", self.config.eos_token_id)
        eos = eos_token_id if isinstance(eos_token_id, list | tuple) else [eos_token_id]
        text = {name: setting(name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")}
        processors = arguments.pop("logits_processor", None) or []
        if setting("num_beams", 1) > 1:
            raise ValueError("Images can't be searched with beams: leave `num_beams` at 1.")
        if not setting("use_cache", True):
            raise ValueError("Images are decoded with a cache: `use_cache` must not be False.")
        allowed = TextOnlyLogitsProcessor(self.config, with_images=limit > 0 and opening != "now")
        text_config = GenerationConfig(
            do_sample=sample_text, **{name: value for name, value in text.items() if value is not None}
        )
        text_processors = self._get_logits_processor(
            text_config, logits_processor=LogitsProcessorList([*processors, allowed]), device=str(prompts[0].device)
        )
        ignored = IGNORED_IN_IMAGE_MODE if mode == "image" else IGNORED_IN_INTERLEAVED_MODE
        self._refuse({k: v for k, v in arguments.items() if k not in ignored}, "Interleaved generation")
        return InterleavedSettings(
            schedule=schedule,
            plan=plan,
            generators=generators,
            guided=num_branches > 1,
            images_guided=num_branches > 2,
            eos_token_ids=tuple(int(token) for token in eos if token is not None),
            max_new_tokens=text_limit,
            max_new_images=limit,
            opening=opening,
            text_after_images=mode != "image",
            processors=text_processors,
            sample_text=sample_text,
            should_stop=should_stop,
        )

    @staticmethod
    def _share_context(
        free: int, schedule: ScaleSchedule, num_images: int | None, num_text: int | None, default_num_text: int
    ) -> tuple[int, int]:
        """How many images and text tokens may follow in `free` slots: what was asked for must fit, the rest shrinks."""
        size = schedule.num_tokens + 1
        wanted = 4 if num_images is None else num_images
        if num_text is None:
            # Where images are not asked for, text has a quarter of the room at least.
            num_text = min(default_num_text, max(free - wanted * size, 0 if num_images is not None else free // 4))
        fitting = (free - num_text) // size
        if num_images is not None and wanted > fitting:
            raise ValueError(
                f"{free} slots of the context are free behind the prompt. Beside {num_text} tokens of text, {fitting} "
                f"images of {schedule.height} x {schedule.width} pixels fit ({size} slots each), but {num_images} were "
                "asked for. Ask for fewer or smaller ones, or for less text."
            )
        return min(wanted, fitting), num_text

    def _image_schedule(
        self, given: dict[str, int | None], generation_config: GenerationConfig | None
    ) -> ScaleSchedule:
        height = width = num_scales = None
        stored = [vars(config) for config in (generation_config, self.generation_config) if config is not None]
        for settings in (given, *stored):
            num_scales = settings.get("num_scales") if num_scales is None else num_scales
            height, width = settings.get("height"), settings.get("width")
            if height is not None or width is not None:
                break  # a size asked for must not meet a number of scales stored for another
        limit = self.config.num_scales
        if (height is None) != (width is None):
            raise ValueError(f"Pass `height` and `width` together, but got height {height} and width {width}.")
        if height is None or width is None:
            schedule = ScaleSchedule(num_scales=limit if num_scales is None else num_scales)
        else:
            schedule = ScaleSchedule.from_size(height, width, num_scales)
        if schedule.num_scales > limit:
            largest = ScaleSchedule(schedule.bucket, limit)
            raise ValueError(
                f"An image of {schedule.height} x {schedule.width} pixels takes {schedule.num_scales} scales, but this "
                f"model has {limit} (`config.num_scales`): at this aspect it draws up to {largest.height} x "
                f"{largest.width} (height x width)."
            )
        return schedule

    def _image_cache(self, cache: Cache | None, implementation: str, length: int, num_unstored: int) -> Cache:
        if cache is not None:
            if num_cached := int(cache.get_seq_length()):
                raise ValueError(
                    f"Image mode takes an empty cache, but `cache` holds {num_cached} tokens. Pass the whole "
                    "prompt and a new cache."
                )
            if isinstance(cache, StaticCache) and cache.get_max_length() < length:
                raise ValueError(
                    f"The cache has room for {cache.get_max_length()} tokens, but prompt and image take "
                    f"{length}. Pass one with `max_cache_len={length}`, or none."
                )
            return cache
        if implementation in ("preallocated", "quantized"):
            storage = "int8" if implementation == "quantized" else None
            return ScaleCache(self.config, length, storage, num_unstored)
        if implementation in ("static", "offloaded_static"):
            return StaticCache(self.config, max_cache_len=length, offloading=implementation.startswith("offloaded"))
        if implementation in ("dynamic", "offloaded"):
            return DynamicCache(config=self.config, offloading=implementation == "offloaded")
        raise ValueError(
            f'Image mode has no cache_implementation "{implementation}": use "preallocated", "quantized", "dynamic", '
            '"static", "offloaded" or "offloaded_static".'
        )

    def _check_context(self, num_prompt_tokens: int, num_new_tokens: int, grids: torch.Tensor | None = None):
        limit = self.config.max_position_embeddings
        if num_prompt_tokens + num_new_tokens <= limit:
            return
        hint = "Shorten the prompt or ask for less."
        if grids is not None and len(grids):
            largest = max((ScaleSchedule.from_grid_shw(grid) for grid in grids.tolist()), key=lambda s: s.num_tokens)
            fitting = max(0, limit - num_new_tokens) // (largest.num_tokens + 1)
            hint = (
                f"At most {fitting} images of {largest.height} x {largest.width} pixels fit ({largest.num_tokens + 1} "
                "tokens each). Show fewer or smaller ones, shorten the prompt or ask for less."
            )
        raise ValueError(
            f"The prompt has {num_prompt_tokens} tokens, which with {num_new_tokens} new ones is more than the "
            f"model's context of {limit} (`config.max_position_embeddings`). {hint}"
        )

    def _token_position_ids(
        self,
        ids: torch.Tensor,
        grids: torch.Tensor | None,
        mask: torch.Tensor | None,
        start: int | torch.Tensor = 0,
    ) -> torch.Tensor:
        """Positions `(3, B, L)` of token-view ids; `start` as in [`TokenLayout.of`]."""
        return TokenLayout.of(ids, grids, self.config, mask, start).position_ids

    def decode_image_tokens(
        self, tokens: torch.LongTensor, image_grid_shw: torch.LongTensor | None = None
    ) -> NextFlowGenerateOutput:
        """Cut the image that each sequence ends with out of it, for `processor.post_process_multimodal_output`.

        The language model holds no image tokenizer, so this stops at codes; the processor makes pictures of them.
        `pipeline("any-to-any")` calls it with the sequences alone, by position. Ids don't tell a grid from its
        transpose, so the grid is then that of this model's last image generation in this thread.

        Args:
            tokens (`torch.LongTensor` of shape `(B, L + 1 + N)`): Sequences as image mode returns them.
            image_grid_shw (`torch.LongTensor` of shape `(B, 3)` or `(1, 3)`, *optional*): The grid of the images.

        Returns:
            [`NextFlowGenerateOutput`] with `sequences`, `image_grid_shw` `(B, 3)` and `image_codes` `(B, N)`; with
            `image_grid_shw`, fewer where a stopping criterion ended the images.

        Raises:
            `ValueError`: if the sequences don't end with images of the grid.
        """
        schedule = _LAST_SCHEDULES.of_model.get(self)
        if image_grid_shw is not None:
            grids = {tuple(row) for row in image_grid_shw.tolist()}
            if len(grids) != 1:
                raise ValueError(f"The images of a batch must share one grid, but got {sorted(grids)}.")
            schedule = ScaleSchedule.from_grid_shw(grids.pop())
        if schedule is None:
            raise ValueError(
                "The grid of the images is not known: this model has not generated any yet (in this thread). Pass "
                "`image_grid_shw`."
            )
        codes = tokens - self.config.text_vocab_size
        found = (codes >= 0).long().flip(-1).cumprod(-1).sum(-1).tolist()
        # With a grid that is merely remembered, fewer codes would rather be another grid's.
        legal = (schedule.num_tokens,) if image_grid_shw is None else schedule.offsets[1:]
        if len(set(found)) != 1 or found[0] not in legal:
            raise ValueError(
                f"The sequences end with {found} image codes, but an image with grid {schedule.grid_shw} has "
                f"{schedule.num_tokens}. For images that stop after an earlier scale, all the same one, pass "
                "`image_grid_shw`."
            )
        return NextFlowGenerateOutput(
            sequences=tokens,
            image_grid_shw=torch.tensor([schedule.grid_shw], device=tokens.device).repeat(len(tokens), 1),
            image_codes=codes[:, -found[0] :],
        )

    def _generate_text(self, inputs: torch.Tensor | None, generation_config: GenerationConfig | None, **kwargs):
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if ids is not None:
            pad_token_id, eos_token_id = (
                self._setting(name, kwargs.get(name), generation_config) for name in ("pad_token_id", "eos_token_id")
            )
            if pad_token_id == eos_token_id:
                pad_token_id = None  # a prompt may end with it
            check_left_padded(ids, kwargs.get("attention_mask"), pad_token_id)
            self._check_context(ids.shape[-1], 1, kwargs.get("image_grid_shw"))
        # A stored `guidance_scale` is for images; transformers would guide the text with it.
        if generation_config is None:
            kwargs["guidance_scale"] = None
        else:
            generation_config = copy.deepcopy(generation_config)
            generation_config.guidance_scale = 1.0
        logits_processor = [*(kwargs.pop("logits_processor", None) or []), TextOnlyLogitsProcessor(self.config)]
        return super().generate(
            inputs, generation_config, logits_processor=LogitsProcessorList(logits_processor), **kwargs
        )

    # What transformers' text loop needs to know about images in a prompt.

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor | None:
        """Leaves masks to the model, which alone knows the blocks of an image."""
        return attention_mask

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        grids, mask = model_kwargs.get("image_grid_shw"), model_kwargs.get("attention_mask")
        if grids is None:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        if mask is not None and mask.shape != inputs_tensor.shape:
            raise ValueError(
                f"The attention mask has shape {tuple(mask.shape)}, but the prompts have {tuple(inputs_tensor.shape)}. "
                "To go on from a cache, pass whole sequences: positions depend on the images in them."
            )
        return self._token_position_ids(inputs_tensor, grids, mask)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        image_grid_shw: torch.Tensor | None = None,
        **model_kwargs,
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        if image_grid_shw is not None and input_ids is not None:
            grids = split_grids(input_ids, image_grid_shw, self.config.text_vocab_size)
            image_grid_shw = torch.cat([rows.repeat(expand_size, 1) for rows in grids])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, "image_grid_shw": image_grid_shw}

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        cache: Cache | None = None,
        image_grid_shw: torch.LongTensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict[str, Any]:
        """Model inputs of a text step; the grids go along only with the images that are (still) among its ids."""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            cache=cache,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        step_ids = model_inputs.get("input_ids")
        if image_grid_shw is None or step_ids is None:
            return model_inputs
        if step_ids.shape[1] == input_ids.shape[1]:
            return {**model_inputs, "image_grid_shw": image_grid_shw}
        if is_first_iteration:
            # The cache holds a beginning of the ids. If it ends with an image, the slot of its last code is still to
            # be run, as the <eoi> that it carries.
            is_code = step_ids >= self.config.text_vocab_size
            if (is_code[:, :2].sum(-1) == 2).any():
                raise ValueError("`cache` end inside an image; they may end after a whole image, or in text.")
            step_ids[:, 0] = step_ids[:, 0].masked_fill(is_code[:, 0], self.config.eoi_token_id)
            all_grids = split_grids(input_ids, image_grid_shw, self.config.text_vocab_size)
            counts = count_images(step_ids, self.config.text_vocab_size)
            grids = [rows[len(rows) - count :] for rows, count in zip(all_grids, counts, strict=True)]
            model_inputs["image_grid_shw"] = torch.cat(grids) if sum(counts) else None
        return model_inputs
