"""The decoding engine: rows of text and images that grow from one cache, none of it encoded twice.

Every mode of `generate` that draws runs on it, and so do conversations. Image mode is its simplest use: an image, now,
once. Letters: B rows, L slots, R images that are drawn together, n codes, N codes of an image, K codes in the codebook.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache

from .decoding_settings import DecodingSettings
from .decoding_state import DecodingState
from .kept_regions import Keeper
from .padding import Prompts, end_with_boi, move_right, stack_rows, unconditional_prompts
from .regional_prompts import Regions
from .sampling import ScaleSampling, draw_codes, draw_seeds, passes_of_scales, sample_codes
from .scale_cache import ScaleCache, check_empty, make_cache
from .scale_schedule import ScaleSchedule
from .token_layout import count_images

Grids = Sequence[Sequence[Sequence[int]]]  # for each row the grids of its images


@dataclass
class DecodingStep:
    """Something that happened to some rows.

    Args:
        kind (`str`): `"token"`, `"scale"` (of an image that is being drawn) or `"image"` (it is whole).
        rows (`list[int]`): Which rows of the batch.
        ids (`torch.LongTensor`):
            Tokens `(rows, 1)`, or all codes so far `(rows, n)` (one row for each prefix as long as images share it).
        schedule (`ScaleSchedule`, *optional*): The images'.
        index (`int`, *optional*): The scale, from 0.
        guidance_scale (`float`, *optional*): Of this scale.
        num_codes (`int`, *optional*): K.
    """

    kind: str
    rows: list[int]
    ids: torch.Tensor
    schedule: ScaleSchedule | None = None
    index: int = 0
    guidance_scale: float | None = None
    num_codes: int = 0

    def change(self, codes: torch.Tensor | None = None, guidance_scale: float | None = None) -> None:
        """After a scale: other codes for it, in all codes so far, and the guidance of the scales that follow."""
        if codes is not None:
            start = self.schedule.offsets[self.index] if self.schedule is not None else 0
            legal = isinstance(codes, torch.Tensor) and codes.shape == self.ids.shape and not codes.is_floating_point()
            if not legal or not ((codes >= 0) & (codes < self.num_codes)).all():
                raise ValueError(
                    f"Changed codes must be whole numbers from 0 to {self.num_codes - 1}, a tensor of shape "
                    f"{tuple(self.ids.shape)}, but got {codes!r:.200}."
                )
            codes = codes.to(self.ids)
            if not torch.equal(codes[:, :start], self.ids[:, :start]):
                raise ValueError(
                    f"Only codes of the scale that was just drawn can be changed, those from place {start} on: what "
                    "follows has been conditioned on the others."
                )
            self.ids = codes
        if guidance_scale is not None:
            if not (isinstance(guidance_scale, Real) and 0 <= float(guidance_scale) < math.inf):
                raise ValueError(f"`guidance_scale` must be a number of at least 0, but got {guidance_scale!r}.")
            self.guidance_scale = float(guidance_scale)


class GenerationEvent(NamedTuple):
    """An event in one row of a stream.

    Args:
        kind (`str`): `"token"`, `"scale"` (of an image that is being drawn) or `"image"` (it is whole).
        row (`int`): Which row of the batch.
        ids (`torch.LongTensor`): The token `(1,)`, or the image's codes so far `(n,)`.
        schedule (`ScaleSchedule`, *optional*): The image's.
        step (`int`, *optional*): The scale, from 0.
    """

    kind: str
    row: int
    ids: torch.Tensor
    schedule: Any = None
    step: int | None = None


def events_of(steps: Any) -> Iterator[GenerationEvent]:
    """The steps of a decoding, row by row."""
    with closing(steps):  # so that it has ended when this has
        for step in steps:
            copies = len(step.rows) // len(step.ids)
            for i, row in enumerate(step.rows):
                yield GenerationEvent(step.kind, row, step.ids[i // copies], step.schedule, step.index)


def draw_scales(
    states: Sequence[DecodingState],
    logits: torch.Tensor,
    schedule: ScaleSchedule,
    plan: Sequence[ScaleSampling],
    generators: Sequence[torch.Generator],
    prefix_scales: int = 0,
    images_per_prefix: int = 1,
    rows: Sequence[int] = (),
    keeper: Keeper | None = None,
    regions: Regions | None = None,
    later_passes: Sequence[tuple[int, float]] = (),
) -> Iterator[DecodingStep]:
    """Draws R images, scale by scale.

    Args:
        states (list of [`DecodingState`]):
            States that have run the `<boi>` of every row: one that holds all branches of guidance one below the other,
            or one per branch.
        logits (`torch.FloatTensor` of shape `(branches * R, K)`): For scale 0.
        schedule (`ScaleSchedule`): The images'.
        plan (`list[ScaleSampling]`): How the codes of each scale are drawn.
        generators (`list[torch.Generator]`): One per image.
        prefix_scales, images_per_prefix (`int`, *optional*):
            Each group of `images_per_prefix` images shares its first `prefix_scales` scales: until then the group is
            one row, drawn by the generator of its first image.
        rows (`list[int]`, *optional*): The images' numbers in the steps.
        keeper ([`Keeper`], *optional*): What is kept of other images; a row for each that is drawn, or for each prefix.
        regions ([`Regions`], *optional*): Their branches are the last of all.
        later_passes (*optional*): `(top_k, top_p)` of each further pass over a scale; the first scale has none.

    Yields:
        [`DecodingStep`] of kind `"scale"`. Nothing of a scale is run before the next step is asked for.
    """
    config, device = states[0].model.config, states[0].mask.device
    sources = generators[::images_per_prefix]
    num_branches = len(logits) // len(sources) - len(regions.prompts if regions else ())
    passes = passes_of_scales(plan, later_passes)
    lengths = [[n * (p.top_k != 1) for p in own] for own, n in zip(passes, schedule.scale_lengths, strict=True)]
    totals = list(map(sum, lengths))
    shared = prefix_scales if images_per_prefix > 1 else len(plan)
    seeds = draw_seeds(sources, totals[:shared], device)
    codes = torch.empty(len(sources), 0, dtype=torch.long, device=device)
    guidance_scale: float | None = None  # that a reader has set
    for index, of_scale in enumerate(passes):
        if guidance_scale is not None:
            of_scale = [sampling._replace(guidance_scale=guidance_scale) for sampling in of_scale]
        if index == shared:
            for state in states:
                state.select(torch.arange(len(state.mask), device=device).repeat_interleave(images_per_prefix))
            codes = codes.repeat_interleave(images_per_prefix, dim=0)
            seeds += draw_seeds(generators, totals[shared:], device)
        known, seeds_of_passes = codes, seeds[index].split(lengths[index], dim=1)
        for number, (sampling, own_seeds) in enumerate(zip(of_scale, seeds_of_passes, strict=True)):
            sampler = partial(
                draw_codes,
                sampling=sampling,
                seeds=own_seeds if own_seeds.shape[1] else None,
                num_codes=config.visual_codebook_size,
                num_branches=num_branches,
            )
            if regions is not None:
                cells = slice(*schedule.offsets[index : index + 2])
                sampler = partial(_draw_mixed, sampler, regions, cells, num_branches)
            if index == 0:
                drawn = sampler(lambda values: values, logits[:, None].float())
            else:
                first = 0 if config.visual_feature_mode == "accumulated" else schedule.offsets[index - 1]
                inputs = codes[:, first:] + config.text_vocab_size
                drawn = _run_branches(states, inputs, schedule, index, sampler, own_map=number > 0)
            drawn = drawn.to(codes.device)
            codes = torch.cat([known, drawn if keeper is None else keeper.place(index, known, drawn)], dim=1)
        step = DecodingStep(
            "scale", list(rows), codes, schedule, index, sampling.guidance_scale, config.visual_codebook_size
        )
        yield step
        codes = step.ids
        if step.guidance_scale != sampling.guidance_scale:
            guidance_scale = step.guidance_scale
            if num_branches == 1 and guidance_scale != 1:
                raise ValueError(
                    f"The guidance scale can't become {guidance_scale} after scale {index}: this drawing began without "
                    "guidance, so there is no unconditional branch. Begin with a `guidance_scale` other than 1."
                )


def _draw_mixed(
    sampler: Callable[..., torch.Tensor], regions: Regions, scale: slice, num_branches: int, head: Any, states: Any
) -> torch.Tensor:
    return sampler(head, regions.mix(states, scale, num_branches))


def _run_branches(
    states: Sequence[DecodingState],
    inputs: torch.Tensor,
    schedule: ScaleSchedule,
    index: int,
    sampler: Callable[..., torch.Tensor],
    own_map: bool = False,
) -> torch.Tensor:
    """Codes `(R, n_s)` of a scale; the last state to run draws from the hidden states of all."""
    if len(states) == 1:
        inputs = inputs.repeat(len(states[0].mask) // len(inputs), 1)
        return states[0].run_scale(inputs, schedule, index, sampler, own_map)
    hidden_states = [
        state.run_scale(inputs, schedule, index, lambda head, hidden_states: hidden_states, own_map)
        for state in states[1:]
    ]
    return states[0].run_scale(
        inputs, schedule, index, lambda head, own: sampler(head, torch.cat([own, *hidden_states])), own_map
    )


class Decoding:
    """Rows that write until each wants an image or has ended; then those that want one draw together.

    The branches of guidance without text, which see a row's images or nothing, have caches of their own.

    Args:
        model ([`NextFlowForCausalLM`]): The model.
        num_rows (`int`): B.
        pad_token_id (`int`): The id where a row has no token.
        device (`torch.device`, *optional*): The ids' device.
    """

    def __init__(self, model: Any, num_rows: int, pad_token_id: int, device: torch.device | None = None):
        self.model, self.config, self.pad_token_id = model, model.config, pad_token_id
        self.state = DecodingState(model, num_rows, device=device)
        device = self.state.mask.device
        self.rows = torch.arange(num_rows, device=device)  # those of the batch that still go on
        self.ids = torch.empty(num_rows, 0, dtype=torch.long, device=device)
        self.real = self.ids.bool()
        self.waiting = torch.zeros(num_rows, dtype=torch.bool, device=device)  # for an image; no <boi> is there yet
        self.grids: list[list[tuple[int, ...]]] = [[] for _ in range(num_rows)]
        self.logits: torch.Tensor | None = None  # of the next token, if all tokens have been run
        self._last_is_unrun = False
        self._finished: dict[int, torch.Tensor] = {}
        self._opened: torch.Tensor | None = None  # logits of an image that opens with the prompts
        self._images: DecodingState | None = None  # guidance's branch without text
        self._num_run_images = torch.zeros_like(self.rows)  # slots of it, for each row
        self._stopped = False
        self._has_gaps = False  # columns in which some rows have nothing, behind columns in which they have

    # Prompts

    def begin(self, prompts: Prompts, grids: Grids, copies: int, settings: DecodingSettings) -> None:
        """Runs each prompt once; from then on it has `copies` rows, one below the other.

        Args:
            prompts (ids and mask, `(B, L)` both): Token view, padded on the left.
            grids (a list of grids for each prompt): The grids of the images in them.
            copies (`int`): Rows for each prompt.
            settings ([`DecodingSettings`]): The settings of all that follows.
        """
        if not settings.one_image_now:
            length = prompts[0].shape[1] + settings.num_new_slots
            self.state = self._new_state(len(prompts[0]), settings, length, settings.cache)
            self.extend(*prompts, grids)
            self._repeat(torch.arange(len(self.rows), device=self.rows.device).repeat_interleave(copies))
            return
        start, pad, first_code = self.config.image_start_ids, self.pad_token_id, self.config.text_vocab_size
        prompts = self.ids, self.real = end_with_boi(*prompts, start, pad)
        branches = [prompts]
        for with_images in (True, False)[: settings.num_branches - 1]:
            branches.append(unconditional_prompts(prompts, settings.negative, first_code, pad, with_images))
        regions = settings.regions.prompts if settings.regions else []
        for region in regions:  # in place of the prompt's text
            branches.append(unconditional_prompts(prompts, region, first_code, pad))
        ids, mask = stack_rows(branches, pad)
        self.real = self.real.bool()
        self.grids = [[tuple(grid) for grid in of_row] for of_row in grids]
        # The keys of the last scale serve its own step only, if nothing follows the image.
        last = settings.schedule.scale_lengths[-1] if settings.schedule.num_scales > 1 else 0
        length = ids.shape[1] + settings.schedule.num_tokens - 1
        self.state = self._new_state(len(ids), settings, length, settings.cache, 0 if settings.keeps_cache else last)
        if isinstance(self.state.cache, ScaleCache):
            self.state.cache.set_padding(None if mask.all() else mask)
        rows_with_images = list(self.grids) * (min(settings.num_branches, 2) + len(regions))
        logits = self.state.run(ids, None if mask.all() else mask, _grid_rows(rows_with_images), visual_logits=True)
        shared = torch.arange(len(ids), device=ids.device).repeat_interleave(copies // settings.images_per_prefix)
        self.state.select(shared)
        self._opened = logits[shared]
        self._repeat(torch.arange(len(self.rows), device=ids.device).repeat_interleave(copies), with_state=False)

    def extend(self, ids: torch.Tensor, mask: torch.Tensor, grids: Grids) -> torch.Tensor:
        """Appends prompts, runs them, and returns the logits `(B, vocab_size)` of what comes next.

        Args:
            ids (`torch.LongTensor` of shape `(B, L)`):
                Token view, padded on the left. A `<boi>` at the end asks for an image and is not run yet.
            mask (`torch.LongTensor` of shape `(B, L)`): 0 where it is padding.
            grids (a list of grids for each row): The grids of the images in `ids`.
        """
        self.waiting = ids[:, -1:].eq(self.config.boi_token_id).any(-1)
        real = mask.bool()
        if ids.shape[1] > 1 and self.waiting.all():  # no slot for what is not run
            ids, real = ids[:, :-1], real[:, :-1]
        else:
            real = torch.cat([real[:, :-1], real[:, -1:] & ~self.waiting[:, None]], dim=1)
            self._has_gaps = self._has_gaps or bool(self.waiting.any())
        self.ids, self.real = torch.cat([self.ids, ids], dim=1), torch.cat([self.real, real], dim=1)
        for row, new in zip(self.rows.tolist(), grids, strict=True):
            self.grids[row] += [tuple(grid) for grid in new]
        self.logits = self._run_columns(ids.shape[1] + self._last_is_unrun, grids)
        return self.logits

    def _repeat(self, rows: torch.Tensor, with_state: bool = True) -> None:
        """Takes the rows in the given order, some of them several times; before anything has been generated."""
        for name in ("ids", "real", "waiting", "_num_run_images"):
            setattr(self, name, getattr(self, name)[rows])
        self.logits = None if self.logits is None else self.logits[rows]
        self.grids = [list(self.grids[row]) for row in rows.tolist()]
        self.rows = torch.arange(len(rows), device=rows.device)
        if with_state:
            self.state.select(rows)

    # What it holds

    def sequences(self) -> list[torch.Tensor]:
        """Token-view ids of every row, `(L_row,)` each."""
        rows = self._finished | {row: self.ids[i][self.real[i]] for i, row in enumerate(self.rows.tolist())}
        return [rows[row] for row in range(len(self.grids))]

    def cache_before_last(self) -> Cache | None:
        """The cache of all slots of `ids` but the last, which is the first to run when the sequence goes on.

        None if rows have ended at different places, or if a longer negative prompt has moved the slots.
        """
        if len(self.state.mask) > len(self.rows):
            self.state.select(self.rows)  # not the branches of guidance
        if self._finished or self._has_gaps or self.state.num_slots != self.ids.shape[1] - self._last_is_unrun:
            return None
        if not self._last_is_unrun:
            self.state.crop(self.ids.shape[1] - 1, self.state.position)
        return self.state.cache

    # Running

    @torch.no_grad()
    def run(self, settings: DecodingSettings) -> Iterator[DecodingStep]:
        """Runs until every row has ended and yields each step as it happens. Closed early, it ends after a scale."""
        self.num_tokens, self.num_images = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
        self._stopped = False
        while len(self.rows):
            if settings.opening == "now":
                self.waiting = self.num_images < settings.max_new_images
            elif settings.text_after_images or not self.num_images.any():
                yield from self._write(settings)
            if self._stopped or not self.waiting.any():
                break
            self._keep(self.waiting.nonzero().flatten())
            yield from self._draw(settings)
            if self._stopped:
                break

    def _write(self, settings: DecodingSettings) -> Iterator[DecodingStep]:
        """Writes until every row waits for an image or has ended."""
        must = settings.opening == "must"
        active = ~self.waiting
        if not must:
            active = active & (self.num_tokens < settings.max_new_tokens)
        end = torch.tensor(settings.eos_token_ids, dtype=torch.long, device=self.ids.device)
        text_is_over = torch.zeros_like(active)
        while active.any():
            if self.logits is None:
                self.logits = self._run_columns(1, active=active)
            tokens = self._next_tokens(self.logits, settings, active)
            opens, ended = tokens == self.config.boi_token_id, torch.isin(tokens, end)
            if must:
                opens = opens | ended | text_is_over | (self.num_tokens >= settings.max_new_tokens)
            self.waiting = self.waiting | (active & opens & (self.num_images < settings.max_new_images))
            taken = active & ~opens
            places = taken.nonzero().flatten()
            if not len(places):
                break
            self._append(tokens[:, None], taken[:, None])
            self._has_gaps = self._has_gaps or len(places) < len(self.rows)
            self.num_tokens = self.num_tokens + taken
            yield DecodingStep("token", self.rows[places].tolist(), tokens[places, None])
            active = taken & ~ended
            if settings.ends_text is not None:
                text_is_over = text_is_over | settings.ends_text(self._without_gaps(self.ids, self.real))
            if not must:
                active = active & ~text_is_over & (self.num_tokens < settings.max_new_tokens)
            if settings.should_stop is not None:
                active = active & ~settings.should_stop(self._without_gaps(self.ids, self.real))

    def _draw(self, settings: DecodingSettings) -> Iterator[DecodingStep]:
        """Draws an image in every row."""
        states, logits = self._open_image(settings)
        numbers = self.rows.tolist()
        generators = [settings.generators[row] for row in numbers]
        schedule, offset = settings.schedule, self.config.text_vocab_size
        options: dict[str, Any] = {"rows": numbers, "later_passes": settings.later_passes}
        options |= {"prefix_scales": settings.prefix_scales, "images_per_prefix": settings.images_per_prefix}
        codes, drawn_rows, keeper = self.ids[:, :0], self.rows[:: settings.images_per_prefix], None
        regions = settings.regions and settings.regions.select(drawn_rows)
        if settings.kept is not None:
            kept = settings.kept.select(drawn_rows)
            every_code = torch.arange(self.config.visual_codebook_size, device=self.ids.device)
            keeper = Keeper(kept, schedule, self.model.model.visual_codebook(every_code))
        options |= {"keeper": keeper, "regions": regions}
        try:
            for step in draw_scales(states, logits, schedule, settings.plan, generators, **options):
                codes = step.ids
                yield step
                codes = step.ids
                if settings.should_stop is not None:
                    shown = codes.repeat_interleave(len(numbers) // len(codes), dim=0) + offset
                    real = torch.cat([self.real, torch.ones_like(shown, dtype=torch.bool)], dim=1)
                    if settings.should_stop(self._without_gaps(torch.cat([self.ids, shown], dim=1), real)).all():
                        self._stopped = True
                        break
        finally:  # also where the iterator is closed: ids and caches must agree
            copies = len(numbers) // len(codes)
            if copies > 1:  # it ends while images share a prefix
                codes = codes.repeat_interleave(copies, dim=0)
                states[0].select(torch.arange(len(states[0].mask), device=codes.device).repeat_interleave(copies))
            self._append(codes + offset)
            for row in numbers:
                self.grids[row].append(schedule.grid_shw)
            self._num_run_images = self._num_run_images + (settings.num_branches > 1) * (codes.shape[1] - 1)
            self.num_images = self.num_images + 1
            self.waiting = torch.zeros_like(self.waiting)
        yield DecodingStep("image", numbers, codes, schedule)

    def _next_tokens(self, logits: torch.Tensor, settings: DecodingSettings, active: torch.Tensor) -> torch.Tensor:
        scores = logits.float()
        if settings.min_new_tokens:
            ends = [*settings.eos_token_ids, *([self.config.boi_token_id] if settings.opening == "must" else [])]
            too_early = (self.num_tokens < settings.min_new_tokens)[:, None]
            scores = scores.clone()
            scores[:, ends] = scores[:, ends].masked_fill(too_early, -torch.inf)
        scores = settings.processors(self._without_gaps(self.ids, self.real), scores)  # type: ignore[arg-type]
        if not settings.sample_text:
            return scores.argmax(-1)
        # Rows that wait leave their generators alone, as if there were no others.
        writing = active.nonzero().flatten()
        sources = [settings.generators[row] for row in self.rows[writing].tolist()]
        seeds = torch.zeros(len(scores), 2, dtype=torch.int, device=scores.device)
        seeds[writing] = draw_seeds(sources, [1], scores.device)[0][:, 0]
        return sample_codes(scores, ScaleSampling(), seeds)

    # The parts of a step

    def _without_gaps(self, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Ids `(B, L)` with all that is not real on the left."""
        return move_right(ids, real, self.pad_token_id)[0] if self._has_gaps else ids

    def _new_state(
        self,
        num_rows: int,
        settings: DecodingSettings,
        length: int,
        cache: Cache | None = None,
        num_unstored: int = 0,
    ) -> DecodingState:
        if cache is None:
            cache = make_cache(self.config, settings.cache_implementation, length, num_unstored)
        else:
            check_empty(cache, length)
        if isinstance(cache, ScaleCache):
            cache.set_padding(None)  # of a call before
        if settings.compile_config is not None and not isinstance(cache, ScaleCache):
            raise ValueError(
                'Only steps on a `ScaleCache` are compiled: use `cache_implementation="preallocated"` or "quantized", '
                "or turn `compile_config` off with `disable_compile=True`."
            )
        return DecodingState(self.model, num_rows, cache, self.ids.device, settings.compile_config)

    def _append(self, ids: torch.Tensor, real: torch.Tensor | None = None) -> None:
        """Appends columns that are still to be run; the last one is run only when its logits are needed."""
        real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
        self.ids = torch.cat([self.ids, ids.masked_fill(~real, self.pad_token_id)], dim=1)
        self.real = torch.cat([self.real, real], dim=1)
        self.logits, self._last_is_unrun = None, True

    def _run_columns(
        self,
        number: int,
        grids: Grids | None = None,
        active: torch.Tensor | None = None,
        visual_logits: bool = False,
    ) -> torch.Tensor:
        """Runs the last columns, only of the active rows if given; `grids` are those of the images in them."""
        ids, real = self.ids[:, -number:], self.real[:, -number:]
        if active is not None:
            real = real & active[:, None]
        # A first column that holds the last code of an image that has been run carries <eoi>.
        first = ids[:, :1]
        first = first.masked_fill(first >= self.config.text_vocab_size, self.config.eoi_token_id)
        ids = torch.cat([first, ids[:, 1:]], dim=1)
        logits = self.state.run(ids, None if real.all() else real.long(), _grid_rows(grids), visual_logits)
        self._last_is_unrun = False
        return logits

    def _open_image(self, settings: DecodingSettings) -> tuple[list[DecodingState], torch.Tensor]:
        """Runs the `<boi>` of all branches; returns their states, and logits `(branches * rows, K)`."""
        if self._opened is not None:
            logits, self._opened = self._opened, None
            self._last_is_unrun = False
            return [self.state], logits
        # <boi>, and before it the slot of an image's last code where that is still to be run.
        num_columns = 1 + self._last_is_unrun
        self._append(torch.full_like(self.rows, self.config.boi_token_id)[:, None])
        states, logits_of_branches = [self.state], [self._run_columns(num_columns, visual_logits=True)]
        negative = settings.negative
        if len(negative[0]) > 1:
            negative = negative[0][self.rows], negative[1][self.rows]
        if settings.num_branches > 1:
            if self._images is None:
                images = settings.max_new_images * (settings.schedule.num_tokens + 1)
                length = int(self.real.sum(-1).max()) + images + negative[0].shape[1]
                self._images = self._new_state(len(self.rows), settings, length)
            states.append(self._images)
            logits_of_branches.append(self._run_images(self._images, negative))
        if settings.num_branches > 2:
            ids, mask = (part.expand(len(self.rows), -1) for part in negative)
            states.append(self._new_state(len(self.rows), settings, ids.shape[1] + settings.schedule.num_tokens))
            logits_of_branches.append(states[-1].run(ids, None if mask.all() else mask, visual_logits=True))
        for region in settings.regions.select(self.rows).prompts if settings.regions else ():
            own = (self.ids, self.real.long())
            ids, mask = unconditional_prompts(own, region, self.config.text_vocab_size, self.pad_token_id)
            states.append(self._new_state(len(self.rows), settings, ids.shape[1] + settings.schedule.num_tokens))
            grids = _grid_rows([self.grids[row] for row in self.rows.tolist()])
            logits_of_branches.append(states[-1].run(ids, None if mask.all() else mask, grids, visual_logits=True))
        return states, torch.cat(logits_of_branches)

    def _run_images(self, state: DecodingState, negative: Prompts) -> torch.Tensor:
        """Brings the branch without text up to the `<boi>` of the next image; returns visual logits `(rows, K)`."""
        first_code = self.config.text_vocab_size
        ids, mask = unconditional_prompts((self.ids, self.real.long()), negative, first_code, self.pad_token_id)
        total = mask.sum(-1)
        num_new = total - self._num_run_images
        length = int(num_new.max())
        ids, is_new = ids[:, -length:], torch.arange(length, device=ids.device) >= length - num_new[:, None]
        starts = is_new & (is_new.cumsum(-1) == 1)  # the first new slot of a row may be an image's last code
        ids = ids.masked_fill(starts & (ids >= first_code), self.config.eoi_token_id)
        counts = count_images(ids.masked_fill(~is_new, self.pad_token_id), first_code)
        grids = [self.grids[row][len(self.grids[row]) - n :] for row, n in zip(self.rows.tolist(), counts, strict=True)]
        self._num_run_images = total
        return state.run(ids, None if is_new.all() else is_new.long(), _grid_rows(grids), visual_logits=True)

    def _keep(self, indices: torch.Tensor) -> None:
        """Keeps some of the rows; the others have ended."""
        self._last_is_unrun = self._last_is_unrun and bool(self.real[indices, -1].any())
        kept = set(indices.tolist())
        for i, row in enumerate(self.rows.tolist()):
            if i not in kept:
                self._finished[row] = self.ids[i][self.real[i]]
        if len(kept) == len(self.rows):
            return
        for name in ("rows", "ids", "real", "waiting", "num_tokens", "num_images", "_num_run_images"):
            setattr(self, name, getattr(self, name)[indices])
        self.logits = None if self.logits is None else self.logits[indices]
        self.state.select(indices)
        if self._images is not None:
            self._images.select(indices)

    # Going back

    def mark(self) -> dict[str, Any]:
        """What [`~Decoding.rewind`] needs to return to this point."""
        states = [state and (state.num_slots, state.position) for state in (self.state, self._images)]
        names = ("rows", "waiting", "logits", "_last_is_unrun", "_num_run_images")
        kept = {name: getattr(self, name) for name in names}
        return {"states": states, "length": self.ids.shape[1], "grids": [len(row) for row in self.grids], "kept": kept}

    def rewind(self, mark: dict[str, Any]) -> None:
        """Drops what came after a mark, in ids and caches; no row may have ended since."""
        (slots, position), images = mark["states"]
        self.state.crop(slots, position)
        if images is None:
            self._images = None
        elif self._images is not None:
            self._images.crop(*images)
        self.ids, self.real = self.ids[:, : mark["length"]], self.real[:, : mark["length"]]
        self.grids = [row[:count] for row, count in zip(self.grids, mark["grids"], strict=True)]
        vars(self).update(mark["kept"])

    def fork(self) -> "Decoding":
        """An independent decoding that continues from here."""
        twin = copy.copy(self)
        twin.state = self.state.fork()
        twin._images = None if self._images is None else self._images.fork()
        twin.grids, twin._finished = [list(row) for row in self.grids], dict(self._finished)
        return twin


def _grid_rows(grids: Grids | None) -> torch.Tensor | None:
    """Grids as one tensor `(num_images, 3)` on the CPU, where they are read."""
    rows = [list(grid) for row in grids or () for grid in row]
    return torch.tensor(rows) if rows else None


__all__ = ["Decoding", "DecodingStep", "GenerationEvent", "draw_scales", "events_of"]
