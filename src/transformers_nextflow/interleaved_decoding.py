"""Text and images in turn, from one cache: what `generation_mode="interleaved"`, thinking and conversations run on.

Letters: B rows, L slots, S scales of an image, N codes of an image.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessorList

from .decoding_state import DecodingState
from .prompts import move_right
from .sampling import ScaleSampling, draw_codes, draw_seeds, sample_codes
from .scale_schedule import ScaleSchedule

# Whether rows that are given all say so, after what has been drawn of them `(rows, L)`.
StopCheck = Callable[[torch.Tensor], bool]


class GenerationEvent(NamedTuple):
    """A step of an interleaved generation.

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


@dataclass(frozen=True)
class InterleavedSettings:
    """How a generation goes on, and when it ends.

    Args:
        schedule (`ScaleSchedule`): Of new images.
        plan (`list[ScaleSampling]`): How their codes are drawn.
        generators (`list[torch.Generator]`): Of codes and of sampled text, one a row.
        guided (`bool`): Whether the plan needs the branch without text.
        images_guided (`bool`): Whether it needs the branch without text and images, too.
        eos_token_ids (`tuple[int, ...]`): Ids that end a row.
        max_new_tokens (`int`): Text tokens a row.
        max_new_images (`int`): Images a row. A row that wants one more ends there.
        opening (`str`): `"free"`, the model writes `<boi>` where it wants an image; `"now"`, images follow one another
            without text; `"must"`, where the text ends or its limit is reached, the image comes.
        text_after_images (`bool`): Whether a row that has all its images goes on with text.
        processors (`LogitsProcessorList`): For the scores of text.
        sample_text (`bool`): Draw text tokens instead of taking the likeliest.
        should_stop (callable, *optional*): Asked after every token and every scale.
    """

    schedule: ScaleSchedule
    plan: list[ScaleSampling]
    generators: list[torch.Generator]
    guided: bool
    images_guided: bool
    eos_token_ids: tuple[int, ...]
    max_new_tokens: int
    max_new_images: int
    opening: str = "free"
    text_after_images: bool = True
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    sample_text: bool = False
    should_stop: StopCheck | None = None


def draw_scales(
    states: Sequence[DecodingState],
    logits: torch.Tensor,
    schedule: ScaleSchedule,
    plan: Sequence[ScaleSampling],
    generators: Sequence[torch.Generator],
    prefix_scales: int = 0,
    images_per_prefix: int = 1,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Draws R images, scale by scale.

    Args:
        states (list of [`DecodingState`]):
            They have run the `<boi>` of every row: one state that holds all branches of guidance one below the other,
            or one a branch.
        logits (`torch.FloatTensor` of shape `(branches * rows, K)`): For scale 0.
        schedule (`ScaleSchedule`): The images'.
        plan (`list[ScaleSampling]`): How the codes of each scale are drawn.
        generators (`list[torch.Generator]`): One an image.
        prefix_scales, images_per_prefix (`int`, *optional*):
            Each `images_per_prefix` images in a row share their first `prefix_scales` scales: until then they are one
            row, drawn by the generator of the first.

    Yields:
        The scale and all codes so far, `(R, n)`, or one row a shared prefix. Nothing of a scale is run before its codes
        are asked for.
    """
    config, device = states[0].model.config, states[0].mask.device
    sources = generators[::images_per_prefix]
    num_branches = len(logits) // len(sources)
    lengths = [0 if sampling.top_k == 1 else n for sampling, n in zip(plan, schedule.scale_lengths, strict=True)]
    shared = prefix_scales if images_per_prefix > 1 else len(plan)
    seeds = draw_seeds(sources, lengths[:shared], device)
    codes = torch.empty(len(sources), 0, dtype=torch.long, device=device)
    for step, sampling in enumerate(plan):
        if step == shared:
            for state in states:
                state.select(torch.arange(len(state.mask), device=device).repeat_interleave(images_per_prefix))
            codes = codes.repeat_interleave(images_per_prefix, dim=0)
            seeds += draw_seeds(generators, lengths[shared:], device)
        sampler = partial(
            draw_codes,
            sampling=sampling,
            seeds=seeds[step] if lengths[step] else None,
            num_codes=config.visual_codebook_size,
            num_branches=num_branches,
        )
        if step == 0:
            drawn = sampler(lambda values: values, logits[:, None].float())
        else:
            first = 0 if config.visual_feature_mode == "accumulated" else schedule.offsets[step - 1]
            inputs = codes[:, first:] + config.text_vocab_size
            drawn = _run_branches(states, inputs, schedule, step, sampler)
        codes = torch.cat([codes, drawn.to(codes.device)], dim=1)
        yield step, codes


def _run_branches(
    states: Sequence[DecodingState],
    inputs: torch.Tensor,
    schedule: ScaleSchedule,
    step: int,
    sampler: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Codes `(R, n_s)` of a scale; the last state to run draws from the hidden states of all."""
    if len(states) == 1:
        return states[0].run_scale(inputs.repeat(len(states[0].mask) // len(inputs), 1), schedule, step, sampler)
    hidden_states = [
        state.run_scale(inputs, schedule, step, lambda head, hidden_states: hidden_states) for state in states[1:]
    ]
    return states[0].run_scale(
        inputs, schedule, step, lambda head, own: sampler(head, torch.cat([own, *hidden_states]))
    )


class InterleavedDecoding:
    """Rows of text and images that grow from one cache, none of it encoded twice.

    All rows write until each wants an image or has ended; then those that want one draw together. Guidance's branches
    without text, which see a row's images or nothing, have caches of their own.

    Args:
        model ([`NextFlowForCausalLM`]): The model.
        num_rows (`int`): B.
        pad_token_id (`int`): Stands where a row has no token.
        device (`torch.device`, *optional*): Of the ids.
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
        self._images: DecodingState | None = None  # guidance's branch without text
        self._num_run_images = torch.zeros_like(self.rows)  # slots of it, a row
        self._stopped = False

    # What comes in and what is there

    def extend(self, ids: torch.Tensor, mask: torch.Tensor, grids: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
        """Appends prompts, runs them, and returns the logits `(B, vocab_size)` of what comes next.

        Args:
            ids (`torch.LongTensor` of shape `(B, L)`):
                Token view, padded on the left. A `<boi>` at the end asks for an image and is not run yet.
            mask (`torch.LongTensor` of shape `(B, L)`): 0 where it is padding.
            grids (a list of grids a row): Of the images in `ids`.
        """
        self.waiting = ids[:, -1:].eq(self.config.boi_token_id).any(-1)
        real = mask.bool()
        if ids.shape[1] > 1 and self.waiting.all():  # no slot for what is not run
            ids, real = ids[:, :-1], real[:, :-1]
        else:
            real = torch.cat([real[:, :-1], real[:, -1:] & ~self.waiting[:, None]], dim=1)
        self.ids, self.real = torch.cat([self.ids, ids], dim=1), torch.cat([self.real, real], dim=1)
        for row, new in zip(self.rows.tolist(), grids, strict=True):
            self.grids[row] += [tuple(grid) for grid in new]
        self.logits = self._run_columns(ids.shape[1] + self._last_is_unrun, [list(map(tuple, new)) for new in grids])
        return self.logits

    def repeat(self, copies: int) -> None:
        """Each row `copies` times, one below the other; only before anything has been generated."""
        if copies == 1:
            return
        rows = torch.arange(len(self.rows), device=self.rows.device).repeat_interleave(copies)
        for name in ("ids", "real", "waiting", "_num_run_images"):
            setattr(self, name, getattr(self, name)[rows])
        self.logits = None if self.logits is None else self.logits[rows]
        self.grids = [list(self.grids[row]) for row in rows.tolist()]
        self.rows = torch.arange(len(rows), device=rows.device)
        self.state.select(rows)

    def sequences(self) -> list[torch.Tensor]:
        """Token-view ids of every row, `(L_row,)` each."""
        going = {row: self.ids[i][self.real[i]] for i, row in enumerate(self.rows.tolist())}
        return [(self._finished | going)[row] for row in range(len(self.grids))]

    # Going on

    @torch.no_grad()
    def run(self, settings: InterleavedSettings) -> Iterator[GenerationEvent]:
        """Goes on until every row has ended; yields what comes as it comes. Closed early, it ends after a scale."""
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

    def _write(self, settings: InterleavedSettings) -> Iterator[GenerationEvent]:
        """Writes until every row waits for an image or has ended."""
        must = settings.opening == "must"
        active = ~self.waiting
        if not must:
            active = active & (self.num_tokens < settings.max_new_tokens)
        end = torch.tensor(settings.eos_token_ids, dtype=torch.long, device=self.ids.device)
        numbers = self.rows.tolist()
        while active.any():
            if self.logits is None:
                self.logits = self._run_columns(1, active=active)
            tokens = self._next_tokens(self.logits, settings, active)
            opens, ended = tokens == self.config.boi_token_id, torch.isin(tokens, end)
            if must:
                opens = opens | ended | (self.num_tokens >= settings.max_new_tokens)
            self.waiting = self.waiting | (active & opens & (self.num_images < settings.max_new_images))
            taken = active & ~opens
            indices = taken.nonzero().flatten().tolist()
            if not indices:
                break
            self._append(tokens[:, None], taken[:, None])
            self.num_tokens = self.num_tokens + taken
            for i in indices:
                yield GenerationEvent("token", numbers[i], tokens[i : i + 1])
            active = taken & ~ended
            if not must:
                active = active & (self.num_tokens < settings.max_new_tokens)
            if settings.should_stop is not None and settings.should_stop(self.ids):
                self._stopped = True
                break

    def _draw(self, settings: InterleavedSettings) -> Iterator[GenerationEvent]:
        """Draws an image in every row."""
        # <boi>, and before it the slot of an image's last code where that is still to be run.
        num_columns = 1 + self._last_is_unrun
        self._append(torch.full_like(self.rows, self.config.boi_token_id)[:, None])
        states, logits = [self.state], [self._run_columns(num_columns, visual_logits=True)]
        if settings.guided:
            states.append(self._images_alone())
            logits.append(self._run_images())
        if settings.images_guided:
            states.append(DecodingState(self.model, len(self.rows), device=self.ids.device))
            logits.append(states[-1].run(self.ids[:, -1:], visual_logits=True))
        numbers = self.rows.tolist()
        generators = [settings.generators[row] for row in numbers]
        schedule, offset = settings.schedule, self.config.text_vocab_size
        codes = self.ids[:, :0]
        try:
            for step, codes in draw_scales(states, torch.cat(logits), schedule, settings.plan, generators):
                for i, row in enumerate(numbers):
                    yield GenerationEvent("scale", row, codes[i], schedule, step)
                should_stop = settings.should_stop
                if should_stop is not None and should_stop(torch.cat([self.ids, codes + offset], dim=1)):
                    self._stopped = True
                    break
        finally:  # also where the iterator is closed: ids and caches must agree
            self._append(codes + offset)
            for row in numbers:
                self.grids[row].append(schedule.grid_shw)
            self._num_run_images = self._num_run_images + settings.guided * (codes.shape[1] - 1)
            self.num_images = self.num_images + 1
            self.waiting = torch.zeros_like(self.waiting)
        for i, row in enumerate(numbers):
            yield GenerationEvent("image", row, codes[i], schedule, None)

    def _next_tokens(self, logits: torch.Tensor, settings: InterleavedSettings, active: torch.Tensor) -> torch.Tensor:
        scores = settings.processors(self.ids, logits.float())  # type: ignore[arg-type]
        if not settings.sample_text:
            return scores.argmax(-1)
        # Rows that wait leave their generators alone, as if there were no others.
        writing = active.nonzero().flatten()
        sources = [settings.generators[row] for row in self.rows[writing].tolist()]
        seeds = torch.zeros(len(scores), 2, dtype=torch.int, device=scores.device)
        seeds[writing] = draw_seeds(sources, [1], scores.device)[0][:, 0]
        return sample_codes(scores, ScaleSampling(), seeds)

    # The parts of a step

    def _append(self, ids: torch.Tensor, real: torch.Tensor | None = None) -> None:
        """Appends columns that are still to be run; the last one stays so until it is asked for."""
        real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
        self.ids = torch.cat([self.ids, ids.masked_fill(~real, self.pad_token_id)], dim=1)
        self.real = torch.cat([self.real, real], dim=1)
        self.logits, self._last_is_unrun = None, True

    def _run_columns(
        self,
        number: int,
        grids: Sequence[Sequence[Sequence[int]]] | None = None,
        active: torch.Tensor | None = None,
        visual_logits: bool = False,
    ) -> torch.Tensor:
        """Runs the last columns, of the active rows alone if they are given; `grids` of the images in them."""
        ids, real = self.ids[:, -number:], self.real[:, -number:]
        if active is not None:
            real = real & active[:, None]
        logits = self.state.run(
            self._with_eoi(ids), None if real.all() else real.long(), _grid_rows(grids), visual_logits
        )
        self._last_is_unrun = False
        return logits

    def _with_eoi(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids whose first column, where it is the last code of an image that has been run, carries `<eoi>`."""
        first = ids[:, :1]
        return torch.cat(
            [first.masked_fill(first >= self.config.text_vocab_size, self.config.eoi_token_id), ids[:, 1:]], dim=1
        )

    def _images_alone(self) -> DecodingState:
        if self._images is None:
            self._images = DecodingState(self.model, len(self.rows), device=self.ids.device)
        return self._images

    def _run_images(self) -> torch.Tensor:
        """Brings the branch without text up to the `<boi>` of the next image; its visual logits `(rows, K)`."""
        is_code = (self.ids >= self.config.text_vocab_size) & self.real
        opens = F.pad(is_code[:, 1:], (0, 1)) | (
            torch.arange(self.ids.shape[1], device=is_code.device) + 1 == self.ids.shape[1]
        )
        ids, real = move_right(self.ids, (is_code | opens) & self.real, self.pad_token_id)
        total = real.sum(-1)
        num_new = total - self._num_run_images
        length = int(num_new.max())
        ids, is_new = ids[:, -length:], torch.arange(length, device=ids.device) >= length - num_new[:, None]
        starts = is_new & ~F.pad(is_new, (1, 0))[:, :-1]  # the first new slot of a row may be an image's last code
        ids = ids.masked_fill(starts & (ids >= self.config.text_vocab_size), self.config.eoi_token_id)
        is_code = F.pad((ids >= self.config.text_vocab_size) & is_new, (1, 0))
        counts = (is_code[:, 1:] & ~is_code[:, :-1]).sum(-1).tolist()
        grids = [self.grids[row][len(self.grids[row]) - n :] for row, n in zip(self.rows.tolist(), counts, strict=True)]
        self._num_run_images = total
        mask = None if is_new.all() else is_new.long()
        return self._images_alone().run(ids, mask, _grid_rows(grids), visual_logits=True)

    def _keep(self, indices: torch.Tensor) -> None:
        """Goes on with some of the rows; the others have ended."""
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

    def cache_before_last(self) -> Cache:
        """The cache of all slots but the last, which whoever goes on from here runs first; for one row at the end."""
        if not self._last_is_unrun:
            self.state.cache.crop(-1)
        return self.state.cache

    def mark(self) -> dict[str, Any]:
        """What [`~InterleavedDecoding.rewind`] needs to come back to this point."""
        states = [state and (state.num_slots, state.position) for state in (self.state, self._images)]
        names = ("rows", "waiting", "logits", "_last_is_unrun", "_num_run_images")
        kept = {name: getattr(self, name) for name in names}
        return {"states": states, "length": self.ids.shape[1], "grids": [len(row) for row in self.grids], "kept": kept}

    def rewind(self, mark: dict[str, Any]) -> None:
        """Forgets what came after a mark, in ids and caches; no row may have ended since."""
        (slots, position), images = mark["states"]
        self.state.crop(slots, position)
        if images is None:
            self._images = None
        elif self._images is not None:
            self._images.crop(*images)
        self.ids, self.real = self.ids[:, : mark["length"]], self.real[:, : mark["length"]]
        self.grids = [row[:count] for row, count in zip(self.grids, mark["grids"], strict=True)]
        vars(self).update(mark["kept"])

    def fork(self) -> "InterleavedDecoding":
        """A decoding that goes on from here by itself."""
        twin = copy.copy(self)
        twin.state = self.state.fork()
        twin._images = None if self._images is None else self._images.fork()
        twin.grids, twin._finished = [list(row) for row in self.grids], dict(self._finished)
        return twin


def _grid_rows(grids: Sequence[Sequence[Sequence[int]]] | None) -> torch.Tensor | None:
    """On the CPU, where they are read."""
    rows = [list(grid) for row in grids or () for grid in row]
    return torch.tensor(rows) if rows else None


__all__ = ["GenerationEvent", "InterleavedDecoding", "InterleavedSettings", "draw_scales"]
