"""Generation: text token by token, as every language model does it, and images scale by scale.

Letters: B prompts, n images a prompt, L tokens of a prompt, S scales of an image, N codes of an image, K codes in the
codebook.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.utils import ModelOutput, logging

from .configuration_nextflow import NextFlowConfig
from .prompts import (
    check_left_padded,
    count_images,
    end_with_boi,
    read_prompts,
    split_grids,
    stack_rows,
    unconditional_prompts,
)
from .sampling import ScaleSampling, draw_codes, draw_seeds, make_generators, sampling_plan
from .scale_schedule import ScaleSchedule
from .token_layout import find_image_groups, get_token_layout, scale_position_ids

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


@dataclass
class NextFlowGenerateOutput(ModelOutput):
    """What image generation returns with `return_dict_in_generate=True`.

    Args:
        sequences (`torch.LongTensor` of shape `(B * n, L + 1 + N)`):
            Token view: the prompts, `<boi>` (none is added where a prompt ends with it), and the codes' ids.
        image_grid_shw (`torch.LongTensor` of shape `(num_images, 3)`):
            One row for each image in `sequences`, in reading order; without images in the prompts, one a sequence.
        image_codes (`torch.LongTensor` of shape `(B * n, N)`):
            The new images alone, as codes in `[0, K)`.
        past_key_values (`Cache`, *optional*):
            Keys and values of `sequences[:, :-1]`. The slot of the last code, which carries `<eoi>`, was not run: pass
            `sequences`, `image_grid_shw` and the cache to `generate` and text goes on from there. None if a negative
            prompt longer than the prompts has moved them.
    """

    sequences: torch.Tensor | None = None
    image_grid_shw: torch.Tensor | None = None
    image_codes: torch.Tensor | None = None
    past_key_values: Cache | None = None


class TextOnlyLogitsProcessor(LogitsProcessor):
    """Forbids what must not be drawn as text: visual ids, and the ids that mark images."""

    def __init__(self, config: NextFlowConfig):
        self.text_vocab_size = config.text_vocab_size
        self.image_marks = [config.boi_token_id, config.eoi_token_id, config.image_token_id]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = scores.clone()  # the caller keeps the raw ones for `output_logits`
        allowed[:, self.text_vocab_size :] = -torch.inf
        allowed[:, self.image_marks] = -torch.inf
        return allowed


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
        **kwargs,
    ):
        r"""
        Generates text (the default) or one image a sequence.

        Settings that are not given, or None, come from `generation_config`, then from the model's own
        `generation_config.json`; all but tensors, generators and callables can be stored there.

        Args:
            inputs (`torch.LongTensor` of shape `(B, L)`, *optional*):
                Prompts in the token view, padded on the left; the same as `input_ids=`.
            generation_config (`GenerationConfig`, *optional*): Stands between the arguments and the model's own.
            generation_mode (`str`, *optional*, defaults to `"text"`):
                `"text"` is [`~transformers.GenerationMixin.generate`] over text ids. `"image"` draws an image after
                each prompt. (`"interleaved"`, which switches by itself, is not there yet.)
            height, width (`int`, *optional*):
                Size of the image in pixels, one that a [`ScaleSchedule`] ends at.
            num_scales (`int`, *optional*):
                Forces the number of scales; of `height` and `width` only the aspect then counts. Without all three: a
                square image of `config.num_scales` scales.
            guidance_scale (`float`, *optional*):
                Classifier-free guidance: `unconditional + guidance_scale * (conditional - unconditional)`. 1 runs the
                conditional branch alone, and so does None if no default is stored. Text mode never uses it.
            guidance_schedule (`str`, *optional*, defaults to `"constant"`):
                `"constant"`, or `"linear"`: from 1 at the first scale to `guidance_scale` at the last.
            negative_prompt_ids (`torch.LongTensor` of shape `(B, M)` or `(1, M)`, *optional*):
                Text of the unconditional branch, padded on the left. By default it has none: the prompt's images, if
                any, and `<boi>`.
            negative_prompt_attention_mask (`torch.Tensor` of the same shape, *optional*): 0 where it is padding.
            image_temperature, image_top_k, image_top_p (a number, or a list of one a scale, *optional*):
                What the codes are drawn from. `image_top_k=0` and `image_top_p=1.0`, the defaults, cut nothing off.
            generator (`torch.Generator` or a list of one an image, *optional*):
                Randomness of the images: the same seed gives the same image in any batch. A single one serves image 0
                and seeds the others'. Without it a fresh seed is taken; the global random state is never touched.
            prefix_scales, images_per_prefix (`int`, *optional*):
                Of the `num_return_sequences` images of a prompt, each `images_per_prefix` in a row share their first
                `prefix_scales` scales, which are drawn and cached once (by the generator of the first of them).
            on_scale_end (`Callable`, *optional*):
                Called as `on_scale_end(step, schedule, codes)` after each scale, `step` from 0 to S - 1, `codes`
                `(B * n, codes so far)` int64 (one row a prefix as long as images share it). What it raises ends the
                generation.
            kwargs:
                Image mode takes `attention_mask` `(B, L)`, `image_grid_shw` `(num_images, 3)` (for images in the
                prompts), `do_sample` (*defaults to `True`* for images), `num_return_sequences` (images a prompt),
                `past_key_values` (an empty cache), `cache_implementation` (`"dynamic"` or `"static"`), `pad_token_id`,
                `return_dict_in_generate` and `streamer` (which gets nothing but its `end()`); it ignores lengths and
                stopping. Text mode takes `image_grid_shw` and all that transformers takes.

        Returns:
            Image mode: [`NextFlowGenerateOutput`] if `return_dict_in_generate`, else its `sequences`, after exactly S
            forward calls. Text mode: what transformers returns.

        Raises:
            `ValueError`: for arguments that don't fit the mode, the model or each other.
        """
        image_arguments: dict[str, Any] = {
            "height": height,
            "width": width,
            "num_scales": num_scales,
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
        }
        mode = self._setting("generation_mode", generation_mode, generation_config, default="text")
        if mode == "image":
            return self._generate_image(
                inputs, generation_config, guidance_scale=guidance_scale, **image_arguments, **kwargs
            )
        if mode == "interleaved":
            raise ValueError(
                '`generation_mode="interleaved"` is not available yet. Generate an image with "image" and go on with '
                '"text" from its `sequences`, `image_grid_shw` and `past_key_values`.'
            )
        if mode != "text":
            raise ValueError(f'`generation_mode` must be one of {", ".join(GENERATION_MODES)}, but got "{mode}".')
        if unused := [name for name, value in image_arguments.items() if value is not None]:
            raise ValueError(
                f"Text mode does not take {', '.join(f'`{name}`' for name in unused)}. For an image pass "
                '`generation_mode="image"`.'
            )
        return self._generate_text(inputs, generation_config, **kwargs)

    def _setting(self, name: str, value: Any, generation_config: GenerationConfig | None, default: Any = None) -> Any:
        """The value of a setting: the argument, or `generation_config`'s, or the model's own, or the default."""
        stored = (getattr(config, name, None) for config in (generation_config, self.generation_config))
        return next((v for v in (value, *stored) if v is not None), default)

    def _generate_image(
        self,
        inputs: torch.Tensor | None,
        generation_config: GenerationConfig | None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_grid_shw: torch.Tensor | None = None,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        prefix_scales: int | None = None,
        images_per_prefix: int | None = None,
        on_scale_end: OnScaleEnd | None = None,
        streamer: Any = None,
        **settings,
    ) -> NextFlowGenerateOutput | torch.Tensor:
        def setting(name, default=None):
            return self._setting(name, settings.pop(name, None), generation_config, default)

        size = {name: settings.pop(name, None) for name in ("height", "width", "num_scales")}
        schedule = self._image_schedule(size, generation_config)
        plan = sampling_plan(
            schedule.num_scales,
            self.config.visual_codebook_size,
            guidance_scale=setting("guidance_scale"),
            guidance_schedule=setting("guidance_schedule", "constant"),
            temperature=setting("image_temperature", 1.0),
            top_k=setting("image_top_k"),
            top_p=setting("image_top_p", 1.0),
            do_sample=setting("do_sample", True),
        )
        guided = any(sampling.guidance_scale != 1 for sampling in plan)
        num_images = setting("num_return_sequences", 1)
        if num_images < 1:
            raise ValueError(f"`num_return_sequences` must be at least 1, but got {num_images}.")
        sharing = _check_sharing(prefix_scales, images_per_prefix, schedule.num_scales, num_images)
        return_dict = setting("return_dict_in_generate", False)
        pad_token_id = setting("pad_token_id", self.config.eoi_token_id)  # masked: any id would do
        cache_implementation = setting("cache_implementation", "dynamic")
        if setting("num_beams", 1) > 1:
            raise ValueError(
                "Image mode can't search with beams: leave `num_beams` at 1 (`num_return_sequences` draws more)."
            )
        if not setting("use_cache", True):
            raise ValueError("Image mode decodes with a cache: `use_cache` must not be False.")
        if unknown := {name for name, value in settings.items() if value is not None} - IGNORED_IN_IMAGE_MODE:
            hints = [f"`image_{name}` for `{name}`" for name in ("temperature", "top_k", "top_p") if name in unknown]
            raise ValueError(
                f"Image mode does not take {', '.join(f'`{name}`' for name in sorted(unknown))}."
                + (f" Use {', '.join(hints)}." if hints else "")
            )

        if inputs is not None and input_ids is not None:
            raise ValueError("Pass the prompts as `inputs` or as `input_ids`, not both.")
        # Everything stays on the prompts' device: with offloading, `self.device` says little about where layers run.
        boi_token_id, text_vocab_size = self.config.boi_token_id, self.config.text_vocab_size
        ids = inputs if inputs is not None else input_ids
        if ids is None:
            ids = torch.empty(1, 0, dtype=torch.long, device=self.device)
        prompt = read_prompts(ids, attention_mask, pad_token_id)
        prompt_ids, mask = end_with_boi(*prompt, boi_token_id, pad_token_id)
        prompt_grids = None if image_grid_shw is None else image_grid_shw.to(prompt_ids.device)
        ids, grids = prompt_ids, prompt_grids
        if guided:
            negative_ids = ids.new_empty(1, 0) if negative_prompt_ids is None else negative_prompt_ids.to(ids.device)
            negative = read_prompts(negative_ids, negative_prompt_attention_mask, pad_token_id)
            negative = end_with_boi(*negative, boi_token_id, pad_token_id)
            unconditional = unconditional_prompts((ids, mask), negative, text_vocab_size, pad_token_id)
            ids, mask = stack_rows((ids, mask), unconditional, pad_token_id)
            grids = None if grids is None else torch.cat([grids, grids])
        elif negative_prompt_ids is not None:
            logger.warning_once("`negative_prompt_ids` has no effect without a `guidance_scale`.")
        self._check_context(ids.shape[1], schedule.num_tokens)

        cache = self._image_cache(past_key_values, cache_implementation, ids.shape[1] + schedule.num_tokens - 1)
        generators = make_generators(generator, len(prompt_ids) * num_images, ids.device)
        codes = self._draw_codes(ids, mask, grids, cache, schedule, plan, generators, guided, sharing, on_scale_end)
        if streamer is not None:
            streamer.end()
        _LAST_SCHEDULES.of_model[self] = schedule

        sequences = torch.cat([prompt_ids.repeat_interleave(num_images, dim=0), codes + text_vocab_size], dim=1)
        if guided and (return_dict or past_key_values is not None):
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
            past_key_values=cache if ids.shape[1] == prompt_ids.shape[1] else None,
        )

    def _draw_codes(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        grids: torch.Tensor | None,
        cache: Cache,
        schedule: ScaleSchedule,
        plan: list[ScaleSampling],
        generators: list[torch.Generator],
        guided: bool,
        sharing: tuple[int, int],
        on_scale_end: OnScaleEnd | None,
    ) -> torch.Tensor:
        """One pass over the prompts, whose `<boi>` predicts scale 0, and one a scale after it: codes `(B * n, N)`.

        With guidance the second half of the rows are the unconditional branch. Up to the scale `sharing[0]` there is
        one row for `sharing[1]` images.
        """
        position_ids = self._token_position_ids(ids, grids, mask)
        # Without padding no mask is made at all, and scale steps run on fused attention kernels.
        step_mask = None if mask.all() else mask
        logits = self(
            input_ids=ids,
            image_grid_shw=grids,
            attention_mask=step_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            visual_logits=True,
        ).logits

        def repeat(rows: torch.Tensor, times: int) -> torch.Tensor:
            return rows.repeat_interleave(times, dim=0)

        # The prompts were run once; from here on every image (or shared prefix) has its row.
        prefix_scales, images_per_prefix = sharing
        sources = generators[::images_per_prefix]
        times = len(sources) * (2 if guided else 1) // len(ids)
        boi_positions = repeat(position_ids[0, :, -1], times)
        if times != 1:
            cache.reorder_cache(repeat(torch.arange(len(ids), device=ids.device), times))  # type: ignore[arg-type]
            logits = repeat(logits, times)
            step_mask = None if step_mask is None else repeat(step_mask, times)

        lengths = [0 if sampling.top_k == 1 else n for sampling, n in zip(plan, schedule.scale_lengths, strict=True)]
        shared = prefix_scales if images_per_prefix != 1 else len(plan)
        seeds = draw_seeds(sources, lengths[:shared], ids.device)
        step_grids = torch.tensor([schedule.grid_shw])  # on the CPU, where it is read
        codes = ids.new_empty(len(sources), 0)
        for step, sampling in enumerate(plan):
            if step == shared:
                rows = torch.arange(len(boi_positions), device=ids.device)
                cache.reorder_cache(repeat(rows, images_per_prefix))  # type: ignore[arg-type]
                boi_positions, codes = repeat(boi_positions, images_per_prefix), repeat(codes, images_per_prefix)
                step_mask = None if step_mask is None else repeat(step_mask, images_per_prefix)
                seeds += draw_seeds(generators, lengths[shared:], ids.device)
            sampler = partial(
                draw_codes,
                sampling=sampling,
                seeds=seeds[step] if lengths[step] else None,
                num_codes=self.config.visual_codebook_size,
                guided=guided,
            )
            if step == 0:
                drawn = sampler(lambda logits: logits, logits.float())
            else:
                first = 0 if self.config.visual_feature_mode == "accumulated" else schedule.offsets[step - 1]
                inputs = codes[:, first:] + self.config.text_vocab_size
                if step_mask is not None:
                    step_mask = F.pad(step_mask, (0, schedule.scale_lengths[step]), value=1)
                drawn = self(
                    input_ids=inputs.repeat(2, 1) if guided else inputs,
                    image_grid_shw=step_grids.expand(len(boi_positions), -1),
                    attention_mask=step_mask,
                    position_ids=scale_position_ids(boi_positions, schedule, step, self.config.rope_spatial_range),
                    past_key_values=cache,
                    use_cache=True,
                    scale_index=step,
                    code_sampler=sampler,
                ).image_codes
            codes = torch.cat([codes, drawn.to(codes.device)], dim=1)
            if on_scale_end is not None:
                on_scale_end(step, schedule, codes)
        return codes

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

    def _image_cache(self, past_key_values: Cache | None, implementation: str, length: int) -> Cache:
        if past_key_values is not None:
            if num_cached := int(past_key_values.get_seq_length()):
                raise ValueError(
                    f"Image mode takes an empty cache, but `past_key_values` holds {num_cached} tokens. Pass the whole "
                    "prompt and a new cache."
                )
            if isinstance(past_key_values, StaticCache) and past_key_values.get_max_length() < length:
                raise ValueError(
                    f"The cache has room for {past_key_values.get_max_length()} tokens, but prompt and image take "
                    f"{length}. Pass one with `max_cache_len={length}`, or none."
                )
            return past_key_values
        if implementation in ("static", "offloaded_static"):
            return StaticCache(self.config, max_cache_len=length, offloading=implementation.startswith("offloaded"))
        if implementation in ("dynamic", "offloaded"):
            return DynamicCache(config=self.config, offloading=implementation == "offloaded")
        raise ValueError(
            f'Image mode has no cache_implementation "{implementation}": use "dynamic", "static", "offloaded" or '
            '"offloaded_static".'
        )

    def _check_context(self, num_prompt_tokens: int, num_new_tokens: int):
        limit = self.config.max_position_embeddings
        if num_prompt_tokens + num_new_tokens > limit:
            raise ValueError(
                f"The prompt has {num_prompt_tokens} tokens, which with {num_new_tokens} new ones is more than the "
                f"model's context of {limit} (`config.max_position_embeddings`). Shorten the prompt or ask for less."
            )

    def _token_position_ids(
        self, ids: torch.Tensor, grids: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Positions `(3, B, L)` of token-view ids."""
        config, groups = self.config, []
        if grids is not None:
            groups = find_image_groups(
                ids, grids, mask, config.text_vocab_size, config.boi_token_id, max_num_scales=config.num_scales
            )
        return get_token_layout(ids, groups, mask, config.rope_spatial_range).position_ids

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
            [`NextFlowGenerateOutput`] with `sequences`, `image_grid_shw` `(B, 3)` and `image_codes` `(B, N)`.

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
        num_codes = (codes >= 0).long().flip(-1).cumprod(-1).sum(-1)
        if (num_codes != schedule.num_tokens).any():
            raise ValueError(
                f"The sequences end with {num_codes.tolist()} image codes, but an image with grid {schedule.grid_shw} "
                f"has {schedule.num_tokens}."
            )
        return NextFlowGenerateOutput(
            sequences=tokens,
            image_grid_shw=torch.tensor([schedule.grid_shw], device=tokens.device).repeat(len(tokens), 1),
            image_codes=codes[:, -schedule.num_tokens :],
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
            self._check_context(ids.shape[-1], 1)
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
        past_key_values: Cache | None = None,
        image_grid_shw: torch.LongTensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict[str, Any]:
        """Model inputs of a text step; the grids go along only with the images that are (still) among its ids."""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
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
                raise ValueError("`past_key_values` end inside an image; they may end after a whole image, or in text.")
            step_ids[:, 0] = step_ids[:, 0].masked_fill(is_code[:, 0], self.config.eoi_token_id)
            all_grids = split_grids(input_ids, image_grid_shw, self.config.text_vocab_size)
            counts = count_images(step_ids, self.config.text_vocab_size)
            grids = [rows[len(rows) - count :] for rows, count in zip(all_grids, counts, strict=True)]
            model_inputs["image_grid_shw"] = torch.cat(grids) if sum(counts) else None
        return model_inputs
