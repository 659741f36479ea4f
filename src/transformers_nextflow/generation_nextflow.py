"""Generation: text token by token, as every language model does it, and images scale by scale.

Letters: B prompts, n images per prompt, L tokens of a prompt, S scales of an image, N codes of an image, K codes in the
codebook.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessorList
from transformers.utils import ModelOutput
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_nextflow import NextFlowConfig
from .decoding import Decoding, GenerationEvent, events_of
from .decoding_settings import (
    Call,
    DecodingSettings,
    TextOnlyLogitsProcessor,
    check_abilities,
    check_context,
    read_options,
    read_settings,
)
from .generation_config_nextflow import OWN_OPTIONS, NextFlowGenerationConfig
from .padding import Prompts, check_left_padded, check_mask_shape, check_not_empty, read_prompts
from .regional_prompts import Region
from .scale_schedule import ScaleSchedule
from .token_layout import TokenLayout, count_images, split_grids

OnScaleEnd = Callable[[int, ScaleSchedule, torch.Tensor], Any]


@dataclass
class NextFlowGenerateOutput(ModelOutput):
    """What drawing returns with `return_dict_in_generate=True`.

    Args:
        sequences (`torch.LongTensor` of shape `(B * n, L + 1 + N)`):
            Token view: the prompts, `<boi>` (none is added where a prompt ends with it), and the codes' ids.
        image_grid_shw (`torch.LongTensor` of shape `(num_images, 3)`):
            One row for each image in `sequences`, in reading order; without images in the prompts, one per sequence.
        image_codes (`torch.LongTensor` of shape `(B * n, N)`, with `num_frames` `(B * n, frames, N)`, *optional*):
            The new images alone, as codes in `[0, K)`, -1 where a stopping criterion left some out; not interleaved.
        attention_mask (`torch.LongTensor` of shape `(B * n, L + 1 + N)`, *optional*):
            0 where a sequence is padded; only where lengths may differ: after thoughts, with frames, and interleaved.
        thought_ids (`torch.LongTensor` of shape `(B * n, T)`, *optional*):
            What was thought before the image, padded on the right; only with `thinking`.
        cache (`Cache`, *optional*):
            Keys and values of `sequences[:, :-1]`. The slot of the last code, which carries `<eoi>`, was not run: pass
            `sequences`, `image_grid_shw` and the cache to `generate` and text goes on from there. None where a negative
            prompt longer than the prompts has moved the slots, or rows have ended at different places.
    """

    sequences: torch.Tensor | None = None
    image_grid_shw: torch.Tensor | None = None
    image_codes: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    thought_ids: torch.Tensor | None = None
    cache: Cache | None = None


class ImageSequences(torch.Tensor):
    """Ids of image mode that know the grid of their images, `(S, bucket height, bucket width)`, wherever they go.

    Ids alone don't tell a grid from its transpose, and `pipeline("any-to-any")` hands on nothing but them.
    """

    grid_shw: tuple[int, int, int]

    @classmethod
    def of(cls, sequences: torch.Tensor, grid_shw: tuple[int, int, int]) -> "ImageSequences":
        result = sequences.as_subclass(cls)
        result.grid_shw = grid_shw
        return result

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, cls) and result.is_floating_point():
            return result.as_subclass(torch.Tensor)
        source = next((a for a in args if isinstance(a, cls) and hasattr(a, "grid_shw")), None)
        for part in result if isinstance(result, tuple | list) else [result]:  # moved, reshaped, cut into rows
            if isinstance(part, cls) and source is not None:
                part.grid_shw = source.grid_shw
        return result


def _stack(rows: Sequence[torch.Tensor], value: int, side: str = "right") -> torch.Tensor:
    """Rows of different lengths as one tensor."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


# Its methods name a protocol as the type of `self`, which mypy can't bind.
_GenerationMixin: Any = GenerationMixin


class NextFlowGenerationMixin(_GenerationMixin):
    """`generate` for models over text ids and visual codes."""

    config: NextFlowConfig

    def adjust_generation_fn(
        self, generation_config, from_auto_class, from_pipeline, path, trust_remote_code=False, **kwargs
    ):
        """Part of `from_pretrained`: reads `generation_config.json`, where transformers knows its own class only."""
        if generation_config is not None:
            self.generation_config = NextFlowGenerationConfig.from_dict(generation_config.to_dict())
        elif path is not None:
            kwargs |= {"_from_auto": from_auto_class, "_from_pipeline": from_pipeline}
            with suppress(OSError):  # no such file: it stays what was made of the model's configuration
                self.generation_config = NextFlowGenerationConfig.from_pretrained(path, **kwargs)

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    @deprecate_kwarg("return_past_key_values", "6.0.0", new_name="return_cache")
    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        negative_prompt_ids: torch.LongTensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        keep_codes: torch.LongTensor | None = None,
        keep_mask: torch.Tensor | None = None,
        keep_repair: bool | None = None,
        regions: Sequence[Region] | None = None,
        on_scale_end: OnScaleEnd | None = None,
        **kwargs,
    ):
        r"""
        Generates text (the default), one image per sequence, or text and images in turn.

        Options, all those of [`NextFlowGenerationConfig`], may be keyword arguments. Those that are not given, or None,
        come from `generation_config`, then from the model's own `generation_config.json`.

        Args:
            inputs (`torch.LongTensor` of shape `(B, L)`, *optional*):
                Prompts in the token view, padded on the left; the same as `input_ids=`.
            generation_config (`GenerationConfig`, *optional*): Stands between the arguments and the model's own.
            generator (`torch.Generator` or a list with one for each row, *optional*):
                Randomness of the images, and of text that is sampled in their modes. In float32 the same seed gives the
                same image in any batch; lower precisions round by the shape of the batch, so there only in the same
                one. A single generator serves row 0 and seeds the others'. Without it a fresh seed is taken; the global
                random state is never touched.
            negative_prompt_ids (`torch.LongTensor` of shape `(B, M)` or `(1, M)`, *optional*):
                Text of the unconditional branch, padded on the left. By default it has none: the prompt's images, if
                any, and `<boi>`. For single images, with or without `thinking`.
            negative_prompt_attention_mask (`torch.Tensor` of the same shape, *optional*): 0 where it is padding.
            keep_codes (`torch.LongTensor` of shape `(B, N)` or `(1, N)`, *optional*):
                All codes of an image of the size that is drawn, of which parts are kept. For single images.
            keep_mask (`torch.Tensor` of shape `(B, N)` or `(B, H, W)`, *optional*):
                Which: a bool for each code, or for each pixel how much of it is kept, from 0 (drawn) to 1. A cell is
                kept on every scale on which at least half of its pixels are. One row may serve all prompts.
            keep_repair (`bool`, *optional*, defaults to `True`):
                Choose kept codes anew where coarser ones were drawn, so that the kept part looks as in the source:
                codes are residual. False takes them as they are.
            regions (list of [`Region`], *optional*):
                Parts of the image with prompts of their own, each a branch beside those of guidance. For single images.
            on_scale_end (`Callable`, *optional*):
                Called as `on_scale_end(index, schedule, codes)` after each scale, `index` from 0 to S - 1, `codes`
                `(rows that draw, codes so far)` int64 (one row for each prefix as long as images share it). It may
                return other codes for the scale that was just drawn, as a tensor of that shape, or a `dict` with any of
                `"codes"` and `"guidance_scale"` (of all scales that follow). What it raises ends the generation.
            kwargs:
                Options, and: `attention_mask` `(B, L)`, `image_grid_shw` `(num_images, 3)` (of images in the prompts),
                `cache` (an empty one where images are drawn), `stopping_criteria` (a row ends where they say so while
                text is written; rows that draw together end with a scale when they say so of all), `logits_processor`
                (for text), `tokenizer` (for `stop_strings`) and `streamer` (for the text of a single row). Text mode
                takes all that transformers takes.

        Returns:
            Image mode: [`NextFlowGenerateOutput`] if `return_dict_in_generate`, else its `sequences`, after exactly S
            forward calls (more with `thinking` and `num_frames`). Interleaved mode: the same; what is new starts at
            column L, padded on the right. Text mode: what transformers returns.

        Raises:
            `ValueError`: for arguments that don't fit the mode, the model or each other.
        """
        drawing_inputs = {
            "generator": generator,
            "negative_prompt_ids": negative_prompt_ids,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
            "keep_codes": keep_codes,
            "keep_mask": keep_mask,
            "keep_repair": keep_repair,
            "regions": regions,
            "on_scale_end": on_scale_end,
        }
        mode = kwargs["generation_mode"] = self._mode(generation_config, kwargs)
        if mode == "text":
            check_abilities(self.config)
            return self._generate_text(inputs, generation_config, drawing_inputs, kwargs)
        streamer = kwargs.pop("streamer", None)
        decoding, settings, config, prompts = self._begin(inputs, generation_config, {**drawing_inputs, **kwargs})
        thoughts: list[list[torch.Tensor]] = [[] for _ in decoding.grids]
        images: list[list[torch.Tensor]] = [[] for _ in decoding.grids]
        if streamer is not None and settings.opening != "now":
            if len(decoding.grids) > 1:
                raise ValueError(
                    f"A `streamer` takes the text of one row, but there are {len(decoding.grids)}. Use `stream`."
                )
            streamer.put(prompts[0].cpu())  # first, as transformers does: streamers may skip it
        for step in decoding.run(settings):
            if step.kind == "token":
                for row, token in zip(step.rows, step.ids, strict=True):
                    thoughts[row].append(token)
                if streamer is not None:
                    streamer.put(step.ids[0].cpu())
            elif step.kind == "image":
                for row, codes in zip(step.rows, step.ids, strict=True):
                    images[row].append(codes)
            elif on_scale_end is not None:
                answer = on_scale_end(step.index, settings.schedule, step.ids)
                if isinstance(answer, torch.Tensor):
                    answer = {"codes": answer}
                if isinstance(answer, dict) and not answer.keys() - {"codes", "guidance_scale"}:
                    step.change(**answer)
                elif not isinstance(answer, bool | None):  # progress bars say whether they moved
                    raise ValueError(
                        "`on_scale_end` may return None, codes, or a dict of `codes` and `guidance_scale`, but gave "
                        f"{answer!r:.200}."
                    )
        if streamer is not None:
            streamer.end()
        output = self._collect(decoding, settings, prompts, thoughts, images, config.num_frames)
        return output if config.return_dict_in_generate else output.sequences

    def _collect(
        self,
        decoding: Decoding,
        settings: DecodingSettings,
        prompts: Prompts,
        thoughts: list[list[torch.Tensor]],
        images: list[list[torch.Tensor]],
        num_frames: int | None,
    ) -> NextFlowGenerateOutput:
        """The results of a decoding that has ended, as tensors."""
        pad, rows = decoding.pad_token_id, decoding.sequences()
        mask: torch.Tensor | None
        if settings.one_image_now:
            sequences, mask = decoding.ids, decoding.real.long() if num_frames is not None else None
        elif not settings.text_after_images:  # every row ends with its image, as without thoughts
            sequences = _stack(rows, pad, "left")
            mask = _stack([torch.ones_like(row) for row in rows], 0, "left")
        else:  # the prompts as they were, and behind them what is new
            copies = len(rows) // len(prompts[0])
            ids, mask = (part.repeat_interleave(copies, dim=0) for part in prompts)
            new = [row[int(length) :] for row, length in zip(rows, mask.sum(-1), strict=True)]
            sequences = torch.cat([ids, _stack(new, pad)], dim=1)
            mask = torch.cat([mask, _stack([torch.ones_like(row) for row in new], 0)], dim=1)
        grids = [grid for row in decoding.grids for grid in row]
        image_codes = thought_ids = None
        if not settings.text_after_images:
            nothing = sequences[0, :0]
            frames = [_stack(row, -1) if row else nothing[None] for row in images]
            image_codes = _stack([codes.transpose(0, 1) for codes in frames], -1).transpose(1, 2)
            image_codes = image_codes[:, 0] if num_frames is None else image_codes
            sequences = ImageSequences.of(sequences, settings.schedule.grid_shw)
            if settings.opening == "must":
                thought_ids = _stack([torch.cat([nothing, *row]) for row in thoughts], pad)
        return NextFlowGenerateOutput(
            sequences=sequences,
            image_grid_shw=torch.tensor(grids, dtype=torch.long, device=sequences.device).view(-1, 3),
            image_codes=image_codes,
            attention_mask=mask,
            thought_ids=thought_ids,
            cache=decoding.cache_before_last() if settings.keeps_cache else None,
        )

    @torch.no_grad()
    def stream(
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs
    ) -> Iterator[GenerationEvent]:
        """Generates like `generate`, but yields every event as it happens; interleaved mode by default.

        The call itself checks the arguments and runs the prompts; the rest runs as the iterator is advanced.

        Args:
            inputs (`torch.LongTensor` of shape `(B, L)`, *optional*): As for [`~NextFlowGenerationMixin.generate`].
            generation_config (`GenerationConfig`, *optional*): As for `generate`.
            kwargs: As for `generate` in the modes that draw, except `streamer` and `on_scale_end`.

        Returns:
            An iterator over [`GenerationEvent`]: every token, every scale and every image, of all rows.
        """
        kwargs.setdefault("generation_mode", "interleaved" if self.config.writes_text else "image")
        if self._mode(generation_config, kwargs) == "text":
            raise ValueError("Text mode does not stream events: pass a `streamer` to `generate`.")
        if unfit := [name for name in ("streamer", "on_scale_end") if kwargs.pop(name, None) is not None]:
            raise ValueError(f"A stream tells of every token and scale itself: leave out `{unfit[0]}`.")
        decoding, settings, *_ = self._begin(inputs, generation_config, kwargs)
        return events_of(decoding.run(settings))

    def _mode(self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> str:
        stored = (getattr(config, "generation_mode", None) for config in (generation_config, self.generation_config))
        default = "text" if self.config.writes_text else "image"
        return next((mode for mode in (kwargs.get("generation_mode"), *stored) if mode is not None), default)

    def _begin(
        self, inputs: torch.Tensor | None, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> tuple[Decoding, DecodingSettings, NextFlowGenerationConfig, Prompts]:
        """A decoding that has run the prompts, its settings, all options, and the prompts."""
        given, config, others = read_options(self, kwargs, generation_config)
        pad = self.config.eoi_token_id if config.pad_token_id is None else config.pad_token_id  # masked: any would do
        prompts, grids = self._read_prompts(inputs, others, pad)
        rows: Any = [[] for _ in prompts[0]]
        if grids is not None:
            of_rows = split_grids(prompts[0] * prompts[1], grids, self.config.text_vocab_size)
            rows = [of_row.tolist() for of_row in of_rows]
        copies = config.num_return_sequences or 1
        settings = read_settings(Call(self, given, config, prompts, rows), copies, **others)
        if not settings.one_image_now:
            check_not_empty(prompts[1])
        decoding = Decoding(self, len(rows), pad, prompts[0].device)
        decoding.begin(prompts, rows, copies, settings)
        return decoding, settings, config, prompts

    def _read_prompts(
        self, inputs: torch.Tensor | None, others: dict[str, Any], pad_token_id: int
    ) -> tuple[Prompts, torch.Tensor | None]:
        """Prompts and grids, on one device; removes what it reads from `others`."""
        input_ids, attention_mask, grids = (
            others.pop(name, None) for name in ("input_ids", "attention_mask", "image_grid_shw")
        )
        if inputs is not None and input_ids is not None:
            raise ValueError("Pass the prompts as `inputs` or as `input_ids`, not both.")
        # Everything stays on the prompts' device: with offloading, `self.device` says little about where layers run.
        ids = inputs if inputs is not None else input_ids
        if ids is None:
            ids = torch.empty(1, 0, dtype=torch.long, device=self.device)
        prompts = read_prompts(ids, attention_mask, pad_token_id)
        return prompts, None if grids is None else grids.to(prompts[0].device)

    def decode_image_tokens(
        self, tokens: torch.LongTensor, image_grid_shw: torch.LongTensor | None = None
    ) -> NextFlowGenerateOutput:
        """Cuts out the image that each sequence ends with, for `processor.post_process_multimodal_output`.

        The language model holds no image tokenizer, so this stops at codes; the processor makes pictures of them.
        `pipeline("any-to-any")` calls it with the sequences of `generate` alone, by position: they know their grid.

        Args:
            tokens (`torch.LongTensor` of shape `(B, L + 1 + N)`): Sequences as image mode returns them.
            image_grid_shw (`torch.LongTensor` of shape `(B, 3)` or `(1, 3)`, *optional*): The grid of the images.

        Returns:
            [`NextFlowGenerateOutput`] with `sequences`, `image_grid_shw` `(B, 3)` and `image_codes` `(B, N)`; fewer
            codes where a stopping criterion ended the images.

        Raises:
            `ValueError`: if the sequences don't end with images of the grid.
        """
        if image_grid_shw is not None:
            grids = {tuple(row) for row in image_grid_shw.tolist()}
            if len(grids) != 1:
                raise ValueError(f"The images of a batch must share one grid, but got {sorted(grids)}.")
            schedule = self.config.schedule_of(grids.pop())
        elif isinstance(tokens, ImageSequences):
            schedule = self.config.schedule_of(tokens.grid_shw)
        else:
            raise ValueError(
                "The grid of the images is not known: these ids are not those that `generate` returned. Pass "
                "`image_grid_shw`."
            )
        tokens = tokens.as_subclass(torch.Tensor)  # type: ignore[assignment]
        codes = tokens - self.config.text_vocab_size
        found = (codes >= 0).long().flip(-1).cumprod(-1).sum(-1).tolist()
        if len(set(found)) != 1 or found[0] not in schedule.offsets[1:]:
            raise ValueError(
                f"The sequences end with {found} image codes, but an image with grid {schedule.grid_shw} has "
                f"{schedule.num_tokens}, and all of a batch must stop after the same whole scale."
            )
        return NextFlowGenerateOutput(
            sequences=tokens,
            image_grid_shw=torch.tensor([schedule.grid_shw], device=tokens.device).repeat(len(tokens), 1),
            image_codes=codes[:, -found[0] :],
        )

    # Text

    def _generate_text(
        self,
        inputs: torch.Tensor | None,
        generation_config: GenerationConfig | None,
        drawing_inputs: dict[str, Any],
        kwargs: dict[str, Any],
    ):
        given = {**drawing_inputs, **{name: kwargs.pop(name) for name in OWN_OPTIONS if name in kwargs}}
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        if kwargs.pop("guidance_scale", None) not in (None, 1):
            given["guidance_scale"] = True
        NextFlowGenerationConfig.merge(kwargs, None)  # raises if a value makes no sense
        if unused := given.keys() - {"generation_mode", "return_cache"}:
            raise ValueError(
                f"Text mode does not take {', '.join(f'`{name}`' for name in sorted(unused))}. For an image pass "
                '`generation_mode="image"`.'
            )
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if ids is not None:
            stored = (generation_config, self.generation_config)
            pad_token_id, eos_token_id = (
                next((v for v in (kwargs.get(name), *(getattr(c, name, None) for c in stored)) if v is not None), None)
                for name in ("pad_token_id", "eos_token_id")
            )
            if pad_token_id == eos_token_id:
                pad_token_id = None  # a prompt may end with it
            mask = kwargs.get("attention_mask")
            check_left_padded(ids, mask, pad_token_id)
            if mask is not None and kwargs.get("cache") is None:
                check_mask_shape(mask, ids)
            check_not_empty(ids + 1 if mask is None else mask)
            grids = kwargs.get("image_grid_shw")
            grids = [] if grids is None else [grids.tolist()]
            check_context(ids.shape[-1], 1, self.config.max_position_embeddings, grids)
        if kwargs.get("image_grid_shw") is not None and kwargs.get("prefill_chunk_size") is not None:
            raise ValueError("A prompt with images is run whole: leave `prefill_chunk_size` out.")
        logits_processor = [*(kwargs.pop("logits_processor", None) or []), TextOnlyLogitsProcessor(self.config)]
        return super().generate(
            inputs, generation_config, logits_processor=LogitsProcessorList(logits_processor), **kwargs
        )

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs):
        """transformers' merging of options, by our own rules; what is stored for images is not for its text loop."""
        given, others = NextFlowGenerationConfig.merge({**kwargs, "generation_mode": "text"}, generation_config)
        config = given.over(self.generation_config)
        config.guidance_scale = None  # or the text would be guided
        if config.cache_implementation == "preallocated":
            config.cache_implementation = None
        config.update(**config._get_default_generation_params(), defaults_only=True)
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(config, name):
                others[name] = True
        return config, others

    # What transformers' text loop needs to know about images in a prompt.

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor | None:
        """Leaves masks to the model: only it knows the blocks of an image."""
        return attention_mask

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        grids, mask = model_kwargs.get("image_grid_shw"), model_kwargs.get("attention_mask")
        if grids is None:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        if mask is not None:
            hint = " To go on from a cache, pass whole sequences: positions depend on the images in them."
            check_mask_shape(mask, inputs_tensor, hint)
        return TokenLayout.of(inputs_tensor, grids, self.config, mask).position_ids

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
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict[str, Any]:
        """Model inputs of a text step; grids are passed only for images that are still among its ids."""
        for name in ("tokenizer", "assistant_tokenizer"):  # transformers hands on what is for `generate` alone
            kwargs.pop(name, None)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            cache=cache,
            inputs_embeds=inputs_embeds,
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
                raise ValueError("`cache` ends inside an image; it may end after a whole image, or in text.")
            step_ids[:, 0] = step_ids[:, 0].masked_fill(is_code[:, 0], self.config.eoi_token_id)
            all_grids = split_grids(input_ids, image_grid_shw, self.config.text_vocab_size)
            counts = count_images(step_ids, self.config.text_vocab_size)
            grids = [rows[len(rows) - count :] for rows, count in zip(all_grids, counts, strict=True)]
            model_inputs["image_grid_shw"] = torch.cat(grids) if sum(counts) else None
        return model_inputs


__all__ = ["NextFlowGenerateOutput", "NextFlowGenerationMixin"]
