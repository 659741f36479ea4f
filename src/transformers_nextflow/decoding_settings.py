"""How a decoding proceeds and when it ends: read from options, model and prompts, once, before anything runs.

Letters: B prompts, L tokens of a prompt, M of a negative prompt, N codes of an image.
"""

import copy
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.utils import logging

from .configuration_nextflow import NextFlowConfig
from .generation_config_nextflow import SIZE, NextFlowGenerationConfig, refuse_unknown
from .kept_regions import KeptCodes, read_kept
from .padding import Prompts, end_with_boi, read_prompts
from .regional_prompts import Region, Regions, read_regions
from .sampling import ScaleSampling, make_generators, sampling_plan
from .scale_schedule import ScaleSchedule
from .token_layout import opens_image

logger = logging.get_logger(__name__)

# What a call that draws takes besides options that a configuration can store.
INPUTS = (
    *("input_ids", "attention_mask", "image_grid_shw", "cache"),
    *("generator", "negative_prompt_ids", "negative_prompt_attention_mask", "on_scale_end"),
    *("keep_codes", "keep_mask", "keep_repair", "regions"),
    *("stopping_criteria", "logits_processor", "streamer", "tokenizer", "synced_gpus"),
)

StopCheck = Callable[[torch.Tensor], torch.Tensor]  # ids `(rows, L)`, left-padded, to bool `(rows,)`


@dataclass(frozen=True)
class DecodingSettings:
    """How a generation proceeds, and when it ends.

    Args:
        schedule (`ScaleSchedule`): The new images'.
        plan (`list[ScaleSampling]`): How their codes are drawn, one entry per scale.
        generators (`list[torch.Generator]`): For codes and sampled text, one per row.
        num_branches (`int`): 1; 2 with guidance; 3 with guidance by images apart.
        negative (ids and mask, `(B, M)` or `(1, M)`): Text that guidance leads away from, ending with `<boi>`.
        max_new_images (`int`): Images per row. A row that wants one more ends there.
        opening (`str`): `"now"`, images follow one another without text; `"free"`, the model writes `<boi>` where it
            wants an image; `"must"`, an image follows where the text ends or reaches its limit.
        text_after_images (`bool`): Whether a row that has all its images goes on with text.
        prefix_scales, images_per_prefix (`int`), later_passes: See [`draw_scales`].
        kept ([`KeptCodes`], *optional*): What is kept of other images, one row per row.
        regions ([`Regions`], *optional*): Parts of the image with prompts of their own.
        cache (`Cache`, *optional*), cache_implementation (`str`): What keys and values are kept in.
        keeps_cache (`bool`): Whether anything goes on from the cache.
        compile_config (`CompileConfig`, *optional*): Compiles the layers of scale steps; needs a [`ScaleCache`].
        num_new_slots (`int`): At most this many slots are added to the rows.
        max_new_tokens, min_new_tokens (`int`): Text tokens per row.
        eos_token_ids (`tuple[int, ...]`): Ids that end the text of a row.
        processors (`LogitsProcessorList`): For the scores of text.
        sample_text (`bool`): Draw text tokens instead of taking the likeliest.
        ends_text (callable, *optional*): Asked after every token: the text of a row ends where it says yes.
        should_stop (callable, *optional*): Asked after every token and every scale: a row ends where it says yes. Rows
            that draw together end when it says yes for all of them.
    """

    schedule: ScaleSchedule
    plan: list[ScaleSampling]
    generators: list[torch.Generator]
    num_branches: int
    negative: Prompts
    max_new_images: int
    opening: str = "free"
    text_after_images: bool = True
    prefix_scales: int = 0
    images_per_prefix: int = 1
    kept: KeptCodes | None = None
    regions: Regions | None = None
    later_passes: Sequence[tuple[int, float]] = ()
    cache: Cache | None = None
    cache_implementation: str = "dynamic"
    keeps_cache: bool = True
    compile_config: Any = None
    max_new_tokens: int = 0
    num_new_slots: int = 0
    min_new_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    sample_text: bool = False
    ends_text: StopCheck | None = None
    should_stop: StopCheck | None = None

    @property
    def one_image_now(self) -> bool:
        """Whether all that comes is one image: then the branches of guidance run side by side, in one batch."""
        return self.opening == "now" and self.max_new_images == 1 and not self.text_after_images


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


class Call(NamedTuple):
    """A call that draws: the options given, the same over the model's own, and prompts with the grids of each."""

    model: Any
    given: NextFlowGenerationConfig
    config: NextFlowGenerationConfig
    prompts: Prompts
    grids: Sequence[Sequence[Sequence[int]]]


def read_options(
    model: Any, kwargs: dict[str, Any], generation_config: GenerationConfig | None = None
) -> tuple[NextFlowGenerationConfig, NextFlowGenerationConfig, dict[str, Any]]:
    """Of a call that draws: the options given, the same over the model's own, and the arguments that are no options."""
    given, others = NextFlowGenerationConfig.merge(kwargs, generation_config)
    keywords = {name for name, value in kwargs.items() if value is not None}
    stored = vars(model.generation_config)
    for name, value in vars(given).items():  # what a configuration repeats of the model's own is not asked for
        if name not in keywords and value == stored.get(name):
            setattr(given, name, None)
    if extra := sorted(
        vars(generation_config or given).keys() - vars(NextFlowGenerationConfig()).keys() - stored.keys()
    ):
        raise ValueError(
            f"`generation_config` has {', '.join(f'`{name}`' for name in extra)}, which no option is called. See "
            "`NextFlowGenerationConfig`."
        )
    config = given.over(model.generation_config)
    config.check_drawing(keywords, {name for name, value in vars(given).items() if value is not None})
    if config.generation_mode == "image" and not config.thinking and others.get("logits_processor") is not None:
        raise ValueError("Image mode writes no text, so it does not take `logits_processor`. Use `on_scale_end`.")
    refuse_unknown("`generate`", [name for name, value in others.items() if value is not None], INPUTS)
    return given, config, others


def read_settings(
    call: Call,
    copies: int = 1,
    *,
    generator: Any = None,
    negative_prompt_ids: torch.Tensor | None = None,
    negative_prompt_attention_mask: torch.Tensor | None = None,
    keep_codes: torch.Tensor | None = None,
    keep_mask: torch.Tensor | None = None,
    keep_repair: bool | None = None,
    regions: Sequence[Region] | None = None,
    stopping_criteria: Any = None,
    logits_processor: Any = None,
    tokenizer: Any = None,
    cache: Cache | None = None,
    **unread,
) -> DecodingSettings:
    """How a decoding proceeds after the prompts of a call, each of which has `copies` rows.

    The other arguments are [`~NextFlowGenerationMixin.generate`]'s.
    """
    model, config, ids = call.model, call.config, call.prompts[0]
    _refuse_prompt_learning(model)
    check_abilities(model.config, call)
    if config.generation_mode == "interleaved":
        opening, images, text, default_text = "free", config.max_new_images, config.max_new_tokens, 256
    elif config.thinking:
        opening, images, text, default_text = "must", 1, config.max_new_tokens, 128
    else:
        opening, images, text, default_text = "now", config.num_frames or 1, 0, 0
    schedule, num_codes = _schedule(call), model.config.visual_codebook_size
    kept = read_kept(keep_codes, keep_mask, keep_repair, len(ids), schedule, num_codes, ids.device)
    is_single = opening != "free" and images == 1
    for name, given in {"keep_codes": kept, "regions": regions}.items():
        if given is not None and not is_single:
            raise ValueError(f"`{name}` are of one image: they are for single images. Leave them out.")
    candidates = _pass_candidates(call)
    plan, num_branches = _plan(call, schedule.num_scales, candidates[0])
    if not is_single and (negative_prompt_ids is not None or call.given.negative_ids is not None):
        raise ValueError(
            f"`{'negative_ids' if negative_prompt_ids is None else 'negative_prompt_ids'}` would stand between the "
            "images of a sequence: they are for single images. Leave them out."
        )
    if negative_prompt_ids is not None and num_branches == 1:
        logger.warning_once("`negative_prompt_ids` has no effect without a `guidance_scale` other than 1.")
    if negative_prompt_ids is None and is_single and call.config.negative_ids:
        negative_prompt_ids = torch.tensor([call.config.negative_ids])
    negative = _negative(call, negative_prompt_ids, negative_prompt_attention_mask)
    ends_with_boi = opens_image(ids, model.config.image_start_ids)[:, -1:].any(-1)
    length = max(ids.shape[1] - int(len(ids) > 0 and bool(ends_with_boi.all())), negative[0].shape[1] - 1)
    if text is None and config.max_length is not None:
        text = max(0, config.max_length - ids.shape[1])
    images, text = _share_context(
        model.config.max_position_embeddings, length, call.grids, schedule, images, text, default_text
    )
    if (opening == "must" or not images) and ends_with_boi.any():
        reason = "`thinking` comes before it" if images else "`max_new_images` is 0, or none fits into the context"
        raise ValueError(
            f"A prompt ends with `<boi>`, so an image must follow at once, but {reason}. Leave `<boi>` out."
        )
    num_rows, one_image = len(ids) * copies, opening == "now" and images == 1
    compile_config = None if config.disable_compile else config.compile_config
    implementation = config.cache_implementation or ("preallocated" if one_image or compile_config else "dynamic")
    # A static cache of our own is full at the end, so nothing could go on from it.
    keeps_own = config.return_dict_in_generate and config.return_cache is not False and "static" not in implementation
    # Rows that write at different times share columns: one phase of text for each image, and one behind them.
    new_slots = text * min(num_rows, images + 1) + images * (schedule.num_tokens + 1)
    areas = _regions(call, regions, copies, schedule, num_branches)
    num_areas = len(areas.prompts) if areas else 0
    _check_memory(model, implementation, num_rows * (num_branches + num_areas), ids.shape[1] + new_slots)
    if not one_image and len(negative[0]) > 1:
        negative = negative[0].repeat_interleave(copies, dim=0), negative[1].repeat_interleave(copies, dim=0)
    sharing = _sharing(call, schedule.num_scales, copies) if one_image else (0, 1)
    return DecodingSettings(
        schedule=schedule,
        plan=plan,
        generators=make_generators(generator, num_rows, ids.device),
        num_branches=num_branches,
        negative=negative,
        max_new_images=images,
        opening=opening,
        text_after_images=opening == "free",
        prefix_scales=sharing[0],
        images_per_prefix=sharing[1],
        regions=areas,
        kept=kept and kept.select(torch.arange(len(ids), device=ids.device).repeat_interleave(copies)),
        later_passes=candidates[1:],
        cache=cache,
        cache_implementation=implementation,
        keeps_cache=cache is not None or bool(keeps_own),
        compile_config=compile_config,
        max_new_tokens=text,
        num_new_slots=new_slots,
        should_stop=_stop_check(stopping_criteria),
        **({} if opening == "now" else _text_settings(call, images, logits_processor, tokenizer)),
    )


def _refuse_prompt_learning(model: Any) -> None:
    # PEFT hangs its own method on the model for the time of a call.
    peft_model = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)
    if getattr(getattr(peft_model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "Adapters of PEFT's prompt learning (prompt, prefix and p-tuning) can't draw: their virtual tokens have no "
            "place in the token view. Use LoRA."
        )


def _negative(call: Call, negative_ids: torch.Tensor | None, mask: torch.Tensor | None) -> Prompts:
    """What guidance leads away from, ending with `<boi>`: by default that alone."""
    config, ids = call.model.config, call.prompts[0]
    pad = config.eoi_token_id if call.config.pad_token_id is None else call.config.pad_token_id
    negative_ids = ids.new_empty(1, 0) if negative_ids is None else negative_ids.to(ids.device)
    negative = read_prompts(negative_ids, mask, pad, "negative_prompt_attention_mask")
    if len(negative_ids) not in (1, len(ids)):
        raise ValueError(
            f"Got {len(negative_ids)} negative prompts for {len(ids)} prompts. Pass one, or one per prompt."
        )
    return end_with_boi(*negative, config.image_start_ids, pad)


def _regions(call: Call, regions: Any, copies: int, schedule: ScaleSchedule, num_branches: int) -> Regions | None:
    model_config = call.model.config
    pad = model_config.eoi_token_id if call.config.pad_token_id is None else call.config.pad_token_id
    areas = read_regions(regions, call.prompts, copies, schedule, model_config, pad)
    if areas is not None and any(areas.negative) and num_branches != 2:
        raise ValueError(
            "Negative `regions` are what guidance leads away from: pass a `guidance_scale` other than 1, and no "
            "`image_guidance_scale`."
        )
    return areas


def _text_settings(call: Call, num_images: int, processors: Any, tokenizer: Any) -> dict[str, Any]:
    """The settings of text between images: all that transformers reads from a configuration."""
    model, length, device = call.model, call.prompts[0].shape[1], call.prompts[0].device
    text = copy.deepcopy(call.config)
    # In tokens of text: columns count codes, too.
    least = max(text.min_new_tokens or 0, (text.min_length or 0) - length)
    text.update(**text._get_default_generation_params(), defaults_only=True)
    text.do_sample, text.guidance_scale = bool(call.config.do_sample), None
    text.min_length = text.min_new_tokens = text.max_length = None
    text.eos_token_id = model.config.eos_token_id if text.eos_token_id is None else text.eos_token_id
    model._prepare_special_tokens(text, True, device=device)
    processors = [*(processors or []), TextOnlyLogitsProcessor(model.config, with_images=num_images > 0)]
    criteria = None
    if text.stop_strings or text.max_time:
        criteria = model._get_stopping_criteria(text, StoppingCriteriaList(), tokenizer=tokenizer)
    return {
        "min_new_tokens": least,
        "eos_token_ids": () if text._eos_token_tensor is None else tuple(text._eos_token_tensor.tolist()),
        "processors": model._get_logits_processor(
            text, length, logits_processor=LogitsProcessorList(processors), device=str(device)
        ),
        "sample_text": text.do_sample,
        "ends_text": _stop_check(criteria),
    }


def check_abilities(config: Any, call: Call | None = None) -> None:
    """Refuses what a model that only draws pictures of texts was never trained for; without a call: to write."""
    if config.writes_text:
        return
    options = call.config if call is not None else None
    asked = {
        "writes text": options is None or options.generation_mode == "interleaved" or bool(options.thinking),
        "draws several images in sequence": options is not None and options.num_frames is not None,
        "reads images": call is not None and any(map(len, call.grids)),
    }
    if unable := [name for name, is_asked in asked.items() if is_asked]:
        raise ValueError(
            f"This model ({config.model_type}) draws single images of texts. It never {unable[0]}: pass a text alone, "
            'and `generation_mode="image"` without `thinking` and `num_frames`.'
        )
    lengths = call.prompts[1].sum(-1) if call is not None else torch.zeros(1)
    limit = config.max_text_tokens + len(config.image_start_ids)
    if (longest := int(lengths.max())) > limit:
        raise ValueError(
            f"A prompt has {longest} tokens, but the model reads {config.max_text_tokens} and those that open an image "
            "(`config.max_text_tokens`). Make prompts with its processor, which cuts them, or shorten it."
        )


def _pass_candidates(call: Call) -> list[tuple[Any, Any]]:
    """Top-k and top-p of each pass; the first one's may be lists, with one for each scale."""
    config, number = call.config, call.config.num_passes or 1
    if number > 1 and call.model.config.visual_feature_mode != "accumulated":
        raise ValueError(
            f"`num_passes={number}` feeds a scale its own codes, which this model has no input for "
            '(`config.visual_feature_mode` is not "accumulated"). Leave it out.'
        )
    greedy = (1, 1.0)
    passes = config.pass_candidates[number - 1] if config.pass_candidates else [(0, 1.0), *[greedy] * (number - 1)]
    # More candidates than there are codes are all of them.
    first, *later = ((min(int(k), call.model.config.visual_codebook_size), p) for k, p in passes)
    given = (config.image_top_k, config.image_top_p)
    top_k, top_p = (own if value is None else value for value, own in zip(given, first, strict=True))
    return [(top_k, top_p), *([greedy] * len(later) if config.do_sample is False else later)]


def _plan(call: Call, num_scales: int, candidates: tuple[Any, Any]) -> tuple[list[ScaleSampling], int]:
    """How the codes of each scale are drawn, and the number of branches."""
    config, have_images = call.config, all(map(len, call.grids))
    # A stored one is for edits alone; one that is given must make sense.
    if not have_images and call.given.image_guidance_scale is not None:
        raise ValueError(
            "`image_guidance_scale` guides by the images of the prompts, but "
            f"{sum(not grids for grids in call.grids)} of {len(call.grids)} prompts have none. Leave it out, or use "
            "`guidance_scale`."
        )
    plan = sampling_plan(
        num_scales,
        call.model.config.visual_codebook_size,
        guidance_scale=config.guidance_scale,
        guidance_schedule=config.guidance_schedule or "constant",
        image_guidance_scale=config.image_guidance_scale if have_images else None,
        temperature=1.0 if config.image_temperature is None else config.image_temperature,
        top_k=candidates[0],
        top_p=candidates[1],
        do_sample=config.do_sample is not False,
    )
    if any(sampling.image_guidance_scale != 1 for sampling in plan):
        return plan, 3
    return plan, 2 if any(sampling.guidance_scale != 1 for sampling in plan) else 1


def _schedule(call: Call) -> ScaleSchedule:
    """The schedule that is asked for; an edit keeps the size of the image that it edits, the last of its prompt."""
    if not all(map(len, call.grids)) or any(getattr(call.given, name) is not None for name in SIZE):
        return call.model.config.schedule(*(getattr(call.config, name) for name in SIZE))
    last = {tuple(grids[-1]) for grids in call.grids}
    if len(last) > 1:
        sizes = sorted({(s.height, s.width) for s in map(ScaleSchedule.from_grid_shw, last)})
        raise ValueError(
            f"The last images of the prompts have the sizes {sizes} (height, width), but the images of a batch are "
            "drawn at one size. Pass `height` and `width`, or one prompt at a time."
        )
    return ScaleSchedule.from_grid_shw(last.pop())


def _share_context(
    limit: int,
    num_prompt_tokens: int,
    grids: Any,
    schedule: ScaleSchedule,
    num_images: int | None,
    num_text: int | None,
    default_num_text: int,
) -> tuple[int, int]:
    """How many images and text tokens fit into `limit` slots: what was asked for must fit, defaults shrink."""
    size, free = schedule.num_tokens + 1, limit - num_prompt_tokens
    check_context(num_prompt_tokens, max(num_text or 0, 1), limit, grids)
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


def check_context(num_prompt_tokens: int, num_new: int, limit: int, grids: Any) -> None:
    """A `ValueError` unless prompts, with images of these grids (of each prompt), leave room for `num_new` tokens."""
    if num_prompt_tokens + num_new <= limit:
        return
    hint = "Shorten the prompt or ask for less."
    if schedules := [ScaleSchedule.from_grid_shw(grid) for of_prompt in grids for grid in of_prompt]:
        largest = max(schedules, key=lambda schedule: schedule.num_tokens)
        hint = (
            f"At most {max(0, limit - num_new) // (largest.num_tokens + 1)} images of {largest.height} x "
            f"{largest.width} pixels fit ({largest.num_tokens + 1} tokens each). Show fewer or smaller ones, shorten "
            "the prompt or ask for less."
        )
    raise ValueError(
        f"The prompt has {num_prompt_tokens} tokens, which with {num_new} new ones is more than the model's context of "
        f"{limit} (`config.max_position_embeddings`). {hint}"
    )


def _check_memory(model: Any, implementation: str, num_rows: int, num_slots: int) -> None:
    """Refuses calls whose cache the device could never hold, before anything is allocated."""
    config, total, device = model.config, math.inf, model.device
    if implementation.startswith("offloaded") or getattr(model, "hf_device_map", None):
        return  # there is more than this device
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "cpu" and hasattr(os, "sysconf"):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    width = config.hidden_size // config.num_attention_heads * (config.num_key_value_heads or 1)
    itemsize = 1 if implementation == "quantized" else model.dtype.itemsize
    needed = num_rows * num_slots * 2 * config.num_hidden_layers * width * itemsize
    if needed > total:
        raise ValueError(
            f"{num_rows} rows of {num_slots} slots take {needed / 1e9:.0f} GB of keys and values, but the device has "
            f"{total / 1e9:.0f} GB. Lower `num_return_sequences`, the number of prompts or of images, or their size."
        )


def _sharing(call: Call, num_scales: int, num_images: int) -> tuple[int, int]:
    """How many scales are shared, and by how many images: (0, 1) if none are."""
    prefix_scales, images_per_prefix = call.config.prefix_scales, call.config.images_per_prefix
    if prefix_scales is None and images_per_prefix is None:
        return 0, 1
    if call.given.prefix_scales is call.given.images_per_prefix is None and num_images % (images_per_prefix or 1):
        return 0, 1  # stored for calls that draw more images
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
    if num_images % images_per_prefix:
        raise ValueError(
            f"`images_per_prefix` must divide the {num_images} images of a prompt (`num_return_sequences`), but got "
            f"{images_per_prefix}."
        )
    return prefix_scales, images_per_prefix


def _stop_check(criteria: Any) -> StopCheck | None:
    """transformers' stopping criteria as one function: which rows of ids `(rows, L)` should stop."""
    listed = list(criteria) if isinstance(criteria, list | tuple) else [] if criteria is None else [criteria]
    if not listed:
        return None

    def should_stop(ids: torch.Tensor) -> torch.Tensor:
        verdicts = [torch.as_tensor(criterion(ids, None)).expand(len(ids)) for criterion in listed]
        return torch.stack([verdict.to(ids.device) for verdict in verdicts]).any(0)

    return should_stop
