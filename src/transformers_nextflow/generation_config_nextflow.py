"""The options of `generate`: one list, typed, checked, and saved as `generation_config.json`."""

import copy
import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from .sampling import GUIDANCE_SCHEDULES, check_candidates

GENERATION_MODES = ("text", "image", "interleaved")
PROMPT_TASKS = ("image", "edit", "thinking", "frames")
PROMPT_STYLES = ("bare", "chat")
SIZE = ("height", "width", "num_scales")
PAPER_SAMPLING = {"guidance_scale": 6.0, "guidance_schedule": "linear", "image_top_k": 2, "image_top_p": 0.9}

# What the modes that draw can't do; None and these values ask for nothing of it.
_REFUSED_WHERE_IMAGES_ARE_DRAWN: dict[str, tuple[Any, str]] = {
    "num_beams": (1, "images can't be searched with beams (`num_return_sequences` draws more)"),
    "use_cache": (True, "images are decoded with a cache"),
    "assistant_early_exit": (None, "drafts are for text mode"),
    "prompt_lookup_num_tokens": (None, "drafts are for text mode"),
    "use_mtp": (False, "drafts are for text mode"),
    "token_healing": (False, "it is for text mode"),
    "output_scores": (False, "scores of a scale are never held at once; use `on_scale_end` or a `logits_processor`"),
    "output_logits": (False, "logits of a scale are never held at once; use `on_scale_end` or a `logits_processor`"),
    "output_attentions": (False, "call the model on `sequences` instead"),
    "output_hidden_states": (False, "call the model on `sequences` instead"),
    "prefill_chunk_size": (None, "prompts are run whole, for an image must not be cut"),
    "encoder_repetition_penalty": (1.0, "use `repetition_penalty`"),
    "encoder_no_repeat_ngram_size": (0, "use `no_repeat_ngram_size`"),
    "forced_eos_token_id": (None, "text ends by itself or at `max_new_tokens`"),
    "exponential_decay_length_penalty": (None, "text ends by itself or at `max_new_tokens`"),
}

# What callers, above all pipelines, pass to any `generate`. Where no text is written it has no meaning.
_TEXT_OPTIONS_OF_ALL_CALLERS = frozenset(
    {
        *("max_new_tokens", "max_length", "min_new_tokens", "min_length"),
        *("bos_token_id", "eos_token_id", "stop_strings", "decoder_start_token_id"),
    }
)
_INSTEAD = {"temperature": "image_temperature", "top_k": "image_top_k", "top_p": "image_top_p"}


class NextFlowGenerationConfig(GenerationConfig):
    r"""
    The options of [`~NextFlowGenerationMixin.generate`], which a checkpoint can store: those of transformers, which
    shape text, and these. None, the default of all, means "not given": then the model's own configuration decides, and
    after it the default named here.

    Args:
        generation_mode (`str`, *optional*, defaults to `"text"`):
            `"text"` is [`~transformers.GenerationMixin.generate`] over text ids. `"image"` draws an image after each
            prompt; with images in the prompts that is an edit. `"interleaved"` lets the model write text and draw an
            image wherever it writes `<boi>`, all from one cache.
        height, width (`int`, *optional*):
            Size of the images in pixels, one that a [`ScaleSchedule`] ends at. By default an edit has the size of the
            prompt's last image.
        num_scales (`int`, *optional*):
            Forces the number of scales; of `height` and `width` only the aspect ratio then counts. Without all three
            and without images in the prompts, images are square and have the model's `config.num_scales` scales.
        guidance_scale (`float`, *optional*):
            Classifier-free guidance of images: `unconditional + guidance_scale * (conditional - unconditional)`. None
            and 1 run the conditional branch alone. Text is never guided.
        image_guidance_scale (`float`, *optional*):
            Guides by the prompt's images apart from the text (InstructPix2Pix): `neither + image_guidance_scale *
            (images - neither) + guidance_scale * (all - images)`; a third branch. A stored value is for edits alone.
        negative_ids (`list[int]`, *optional*):
            Text that guidance leads away from where a call has no negative prompt; by default none.
        guidance_schedule (`str`, *optional*, defaults to `"constant"`):
            `"constant"`, or `"linear"`: from 1 at the first scale to the full strength at the last. That is VAR's ramp,
            `(1 + t) * conditional - t * unconditional` with `t = cfg * s / (S - 1)`, whose `cfg` is `guidance_scale -
            1`: the papers' 5 is a `guidance_scale` of 6 here, and no constant. See [`paper_sampling`].
        image_temperature, image_top_k, image_top_p (a number, or a list with one for each scale, *optional*):
            What codes are drawn from; by default (1, 0 and 1) nothing is cut off.
        num_passes (`int`, *optional*, defaults to 1):
            How many times each scale but the first is drawn, each time in sight of what was drawn before; the last
            drawing counts. Only for models with accumulated features.
        pass_candidates (`list[list[list]]`, *optional*):
            `[top_k, top_p]` of each pass, for 1, 2, ... passes, and more passes than it has are refused. `image_top_k`
            and `image_top_p` overrule those of the first pass. By default passes after the first, however many, take
            the likeliest codes.
        thinking (`bool`, *optional*):
            Image mode: the model first writes a thought (at most `max_new_tokens`, 128 by default), then draws.
        num_frames (`int`, *optional*):
            Image mode: this many images one after the other, each conditioned on those before (a story, a video).
        max_new_images (`int`, *optional*, defaults to 4):
            Interleaved mode: images per row. A row that wants one more ends there.
        prefix_scales, images_per_prefix (`int`, *optional*):
            Image mode: of the `num_return_sequences` images of a prompt, each group of `images_per_prefix` shares its
            first `prefix_scales` scales, which are drawn and cached once (with the generator of the first).
        return_cache (`bool`, *optional*, defaults to `True`):
            Whether an output object holds the cache. False saves memory if nothing goes on from the images.
        prompt_styles (`dict[str, str]`, *optional*):
            How the model was trained to be prompted, `"bare"` (the text alone) or `"chat"` (a turn of the chat
            template), for each task: `"image"`, `"edit"`, `"thinking"`, `"frames"`. Trainers write it, pipelines read
            it; `generate` takes prompts as they are.
        kwargs: transformers' own options. `do_sample` is True by default where images are drawn, and False for text;
            `cache_implementation` may also be `"preallocated"`, and `"quantized"` stores 8 bits.

    Raises:
        `ValueError`: for a value that no mode can use.
    """

    generation_mode: str | None = None
    height: int | None = None
    width: int | None = None
    num_scales: int | None = None
    image_guidance_scale: float | None = None
    negative_ids: list[int] | None = None
    guidance_schedule: str | None = None
    image_temperature: float | list[float] | None = None
    image_top_k: int | list[int] | None = None
    image_top_p: float | list[float] | None = None
    num_passes: int | None = None
    pass_candidates: list[list[list[float]]] | None = None
    thinking: bool | None = None
    num_frames: int | None = None
    max_new_images: int | None = None
    prefix_scales: int | None = None
    images_per_prefix: int | None = None
    return_cache: bool | None = None
    prompt_styles: dict[str, str] | None = None

    def __init__(self, **kwargs):
        for name in OWN_OPTIONS:
            setattr(self, name, kwargs.pop(name, None))
        super().__init__(**kwargs)

    @classmethod
    def paper_sampling(cls, **options) -> "NextFlowGenerationConfig":
        """How both papers draw in evaluations and rollouts (arXiv 2601.02204, 2601.02256): "the original sampling
        strategy of VAR", CFG 5 on its ramp, top-k 2, top-p 0.9.

        Args:
            options: More options, or others in place of these.

        Example:

        ```python
        >>> model.generate(**inputs, generation_config=NextFlowGenerationConfig.paper_sampling(generation_mode="image"))
        ```
        """
        return cls(**{**PAPER_SAMPLING, **options})

    @classmethod
    def from_model_config(cls, model_config: PreTrainedConfig | dict) -> "NextFlowGenerationConfig":
        """As in transformers. The model's own `num_scales` is a limit, not a choice, so it stays out."""
        config = cls()
        vars(config).update(vars(GenerationConfig.from_model_config(model_config)))
        return config

    def to_diff_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_diff_dict().items() if v is not None or k not in OWN_OPTIONS}

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Checks every option by itself; what depends on a model or a prompt is checked by `generate`."""
        choices = {"generation_mode": GENERATION_MODES, "guidance_schedule": GUIDANCE_SCHEDULES}
        for name, legal in choices.items():
            if (value := getattr(self, name)) is not None and value not in legal:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, legal))}, but got {value!r}.")
        counts = (
            *SIZE,
            "num_passes",
            "num_frames",
            "prefix_scales",
            "images_per_prefix",
            "max_new_tokens",
            "num_return_sequences",
        )
        for name, least in {**dict.fromkeys(counts, 1), "num_beams": 1, "max_new_images": 0, "top_k": 0}.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < least):
                raise ValueError(f"`{name}` must be a whole number of at least {least}, but got {value!r}.")
        for name in ("guidance_scale", "image_guidance_scale"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and 0 <= float(value) < math.inf):
                raise ValueError(f"`{name}` must be a number of at least 0 (1 turns guidance off), but got {value!r}.")
        temperature, top_p = (1.0 if v is None else v for v in (self.image_temperature, self.image_top_p))
        check_candidates(None, None, temperature, self.image_top_k, top_p)
        for number, passes in enumerate(self.pass_candidates or (), start=1):
            if len(passes) != number or any(len(candidates) != 2 for candidates in passes):
                raise ValueError(
                    "`pass_candidates` has for 1, 2, ... passes a pair [top_k, top_p] a pass, but got "
                    f"{passes!r} for {number}."
                )
            check_candidates(None, None, 1.0, [k for k, _ in passes], [p for _, p in passes])
        if self.pass_candidates and (self.num_passes or 1) > (most := len(self.pass_candidates)):
            raise ValueError(
                f"`num_passes` may be from 1 to {most}, for which `pass_candidates` says what is drawn from, but got "
                f"{self.num_passes}. For more, give `pass_candidates` that have them."
            )
        styles = {} if self.prompt_styles is None else self.prompt_styles
        if not isinstance(styles, dict) or set(styles) - set(PROMPT_TASKS) or set(styles.values()) - set(PROMPT_STYLES):
            raise ValueError(
                f"`prompt_styles` maps tasks ({', '.join(PROMPT_TASKS)}) to one of {', '.join(PROMPT_STYLES)}, but got "
                f"{styles!r}."
            )
        # Not for transformers' eyes: a cache of ours, and several greedy images of a prompt.
        hidden: dict[str, Any] = {}
        if self.cache_implementation == "preallocated":
            hidden["cache_implementation"] = self.cache_implementation
        if self.generation_mode != "text":
            hidden["num_return_sequences"] = self.num_return_sequences
        vars(self).update(dict.fromkeys(hidden))
        try:
            super().validate(strict=strict, user_set_attributes=user_set_attributes)
        except TypeError as error:  # a text where a number belongs, as in a damaged file
            raise ValueError(
                f"An option of the generation configuration has a value of a wrong type: {error}."
            ) from error
        finally:
            vars(self).update(hidden)

    def over(self, defaults: GenerationConfig) -> "NextFlowGenerationConfig":
        """A copy in which `defaults` fill in what is not given. If a size is given, theirs is left out altogether."""
        merged = copy.deepcopy(self)
        stored = defaults.to_dict()
        if self.height is not None or self.width is not None:
            stored = {name: value for name, value in stored.items() if name not in SIZE}
        merged.update(**stored, defaults_only=True, allow_custom_entries=True)
        return merged

    @classmethod
    def merge(
        cls, given: dict[str, Any], generation_config: GenerationConfig | None
    ) -> tuple["NextFlowGenerationConfig", dict[str, Any]]:
        """The options among keyword arguments, over those of a configuration; and the arguments that are no options."""
        config = cls()
        options = {name: value for name, value in given.items() if value is not None and name in vars(config)}
        config.update(**options)
        others = {name: value for name, value in given.items() if name not in vars(config)}
        return config if generation_config is None else config.over(generation_config), others

    def check_drawing(self, keywords: set[str], given: set[str]) -> None:
        """Refuses options of a call that its mode can't serve; stored ones are for other calls, and dropped.

        Args:
            keywords (`set[str]`): Names of keyword arguments.
            given (`set[str]`): These, and what a configuration that was passed says.
        """
        mode = "Interleaved mode" if self.generation_mode == "interleaved" else "Image mode"
        for name, (harmless, reason) in _REFUSED_WHERE_IMAGES_ARE_DRAWN.items():
            if (value := getattr(self, name, None)) is not None and value != harmless:
                if name in given:
                    raise ValueError(f"{mode} does not take `{name}={value!r}`: {reason}.")
                setattr(self, name, None)
        if "prompt_styles" in keywords:
            raise ValueError(
                "`prompt_styles` is for pipelines (see `prompt_style`); `generate` takes prompts as they are."
            )
        if {"thinking", "num_frames"} <= given and self.thinking:
            raise ValueError("`thinking` comes before one image: pass it or `num_frames`, not both.")
        unfit: dict[str, str] = {}
        if self.generation_mode == "interleaved":
            names = ("thinking", "num_frames", "prefix_scales", "images_per_prefix")
            unfit = dict.fromkeys(names, 'it is for `generation_mode="image"`')
        else:
            unfit["max_new_images"] = "image mode draws one image per row (see `num_frames`, `num_return_sequences`)"
            if self.num_frames is not None and self.thinking:  # at most one of them is given
                unfit["num_frames" if "thinking" in given else "thinking"] = "it is for another call"
            if self.thinking or self.num_frames is not None:
                reason = "it is for single images without `thinking`"
                unfit |= dict.fromkeys(("prefix_scales", "images_per_prefix"), reason)
        for name, reason in unfit.items():
            if name in given and getattr(self, name) is not False:
                raise ValueError(f"`{name}` does not fit here: {reason}. Leave it out.")
            setattr(self, name, None)
        if self.generation_mode == "image" and not self.thinking and (unused := sorted(keywords & _TEXT_ONLY_OPTIONS)):
            hints = [f"`{_INSTEAD[name]}` for `{name}`" for name in unused if name in _INSTEAD]
            raise ValueError(
                f"Image mode without `thinking` writes no text, so it does not take "
                f"{', '.join(f'`{name}`' for name in unused)}."
                + (f" Use {', '.join(hints)}." if hints else "")
                + ' (`pipeline("text-generation")` passes some by itself: draw with "text-to-image" or "any-to-any".)'
            )


def prompt_task(thinking: bool | None = None, num_frames: int | None = None, with_pictures: bool = False) -> str:
    """Which of `PROMPT_TASKS` a call that draws is."""
    return "thinking" if thinking else "frames" if num_frames is not None else "edit" if with_pictures else "image"


def trained_style(styles: dict[str, str] | None, task: str) -> str:
    """Which of `PROMPT_STYLES` a task has by a checkpoint's `prompt_styles`: else chat for thoughts, and bare."""
    return (styles or {}).get(task) or ("chat" if task == "thinking" else "bare")


def refuse_unknown(caller: str, names: Iterable[str], others: Iterable[str]) -> None:
    """Refuses arguments of a caller that are neither options nor among the `others`, and tells of similar ones."""
    legal = [*vars(NextFlowGenerationConfig()), *others]
    if unknown := sorted(set(names).difference(legal)):
        near = sorted({match for name in unknown for match in difflib.get_close_matches(name, legal)})
        raise ValueError(
            f"{caller} does not take {', '.join(f'`{name}`' for name in unknown)}."
            + (f" Similar names are {', '.join(f'`{name}`' for name in near)}." if near else "")
            + f" It takes the options of `NextFlowGenerationConfig` and {', '.join(others)}."
        )


OWN_OPTIONS = tuple(NextFlowGenerationConfig.__annotations__)
_TEXT_ONLY_OPTIONS = frozenset(vars(GenerationConfig())) - {
    *("do_sample", "guidance_scale", "num_return_sequences", "return_dict_in_generate", "pad_token_id"),
    *("cache_implementation", "compile_config", "disable_compile"),
    *(_REFUSED_WHERE_IMAGES_ARE_DRAWN.keys() | _TEXT_OPTIONS_OF_ALL_CALLERS),
}

__all__ = ["NextFlowGenerationConfig"]
