"""One model that serves many: jobs wait, those that are alike are drawn together, and each client gets its own events.

Batches are made here and not by `@serve.batch`, which has one queue for all: only rows of one schedule and one setting
can share a batch. Letters: L tokens of a prompt.
"""

import asyncio
import itertools
import json
import logging
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Generator, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from queue import SimpleQueue
from typing import Any

import torch

from ..decoding import GenerationEvent
from ..decoding_settings import Call, DecodingSettings, read_options, read_settings
from ..generation_config_nextflow import SIZE, NextFlowGenerationConfig, prompt_task
from ..kept_pictures import read_source
from ..modeling_nextflow import NextFlowForCausalLM
from ..padding import Prompts, stack_rows
from ..processing_nextflow import NextFlowProcessor
from ..scale_schedule import ScaleSchedule, nearest_sizes
from ..session import NextFlowSession, Transcript
from .adapters import Adapters
from .errors import ApiError
from .jobs import Event, Job, Outcome
from .sessions import Sessions
from .settings import ServingSettings

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Row:
    """A job that is ready to be drawn.

    Args:
        job ([`Job`]): The job.
        ids (`torch.LongTensor` of shape `(L,)`): Its prompt in the token view.
        grids (`list[list[int]]`): Of the pictures in it.
        options (`dict`): Of `generate`, with nothing left open that other rows could change.
        negative (`torch.LongTensor` of shape `(1, M)`, *optional*): The negative prompt.
        kept (`dict`): Of `generate`, with a row each: what stays of a picture with a mask.
        key (hashable): Rows with the same one can share a batch.
    """

    job: Job
    ids: torch.Tensor
    grids: list[list[int]]
    options: dict[str, Any]
    negative: torch.Tensor | None
    key: Hashable
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    gone: bool = False  # the client is no longer there
    outcome: Outcome = field(default_factory=Outcome)


class Engine:
    """A model with its processor, behind a queue. It belongs to the event loop that first runs a job.

    Args:
        settings ([`ServingSettings`]): The settings.
        model ([`NextFlowForCausalLM`], *optional*), processor ([`NextFlowProcessor`], *optional*):
            By default those that the settings name.
    """

    def __init__(
        self,
        settings: ServingSettings,
        model: NextFlowForCausalLM | None = None,
        processor: NextFlowProcessor | None = None,
    ):
        self.settings = settings
        if settings.threads:
            torch.set_num_threads(settings.threads)
        if model is None or processor is None:
            model, processor = _load(settings)
        self.model, self.processor = model, processor
        self.adapters = Adapters(model, settings)
        self.sessions = Sessions(model, processor, settings)
        self.counts: Counter[str] = Counter()
        ends = model.generation_config.eos_token_id or model.config.eos_token_id
        self._ends = set(ends) if isinstance(ends, list | tuple) else {ends}
        self._waiting: deque[Row] = deque()
        self._batch: list[Row] = []  # what is drawn
        self._load = 0  # jobs that clients wait for
        self._seconds_per_row = 1.0
        self._reader = ThreadPoolExecutor(1, "reader")
        self._drawer = ThreadPoolExecutor(1, "drawer")
        self._painter = ThreadPoolExecutor(1, "painter")
        self._wake: asyncio.Event
        self._loop: asyncio.Task | None = None

    # Towards clients

    async def run(self, job: Job) -> AsyncIterator[Event]:
        """Does a job and yields what happens. Whoever stops listening frees the job's place at once.

        Raises:
            [`ApiError`]: 400 for a job that the model can't do, before it waits; 429 if too many wait.
        """
        if self._load >= self.settings.max_queue:
            self.counts["refused"] += 1
            raise ApiError(
                f"{self._load} pictures are waited for already. Try again later.",
                status=429,
                code="queue_full",
                retry_after=max(1, math.ceil(self._load * self._seconds_per_row)),
            )
        self._load += 1
        row = None
        try:
            row = await asyncio.get_running_loop().run_in_executor(self._reader, self._read, job)
            if self._loop is None or self._loop.done():  # another event loop has ended with it, or a mistake has
                self._wake = asyncio.Event()
                self._loop = asyncio.create_task(self._serve())
                self._loop.add_done_callback(self._tell_of_its_end)
            self._waiting.append(row)
            self._wake.set()
            yield Event("accepted", None)
            while True:
                event = await row.events.get()
                if event.kind == "error":
                    raise event.value
                yield event
                if event.kind == "done":
                    return
        except (asyncio.CancelledError, GeneratorExit):
            self.counts["left"] += 1
            raise
        finally:
            self._load -= 1
            if row is not None:
                row.gone = True

    async def status(self) -> dict[str, Any]:
        """Counts since the start, and what waits now."""
        number, num_bytes = self.sessions.memory
        return {**self.counts, "waiting": self._load, "sessions": number, "session_bytes": num_bytes}

    def check_health(self) -> None:
        """Raises a `RuntimeError` after a mistake in here, until a job starts the engine anew; Ray starts a new one."""
        if self._loop is not None and self._loop.done():
            raise RuntimeError("The engine has stopped.")

    # Reading

    @torch.no_grad()
    def _read(self, job: Job) -> Row:
        """The row of a job, with everything checked that can be wrong with it."""
        self.adapters.check(job.adapter)
        if {"height", "width"} <= job.options.keys():
            self._check_size(job.options["height"], job.options["width"])
        try:
            negative, kept = None, self._read_kept(job)
            if job.in_conversation:
                return self._read_turn(job)
            if job.messages is not None:
                inputs = self.processor.apply_chat_template(
                    list(job.messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
                )
            else:
                inputs = self._encode(job, job.prompt, job.read_pictures)
                if job.negative_prompt is not None:
                    negative = self._encode(job, job.negative_prompt, (), negative=True)["input_ids"]
            ids = inputs["input_ids"]
            grids = inputs.get("image_grid_shw", torch.empty(0, 3, dtype=torch.long)).tolist()
            options = {"generation_mode": job.mode, **job.options}
            options |= {name: kept.pop(name) for name in SIZE if name in kept}
            plan = self._plan(options, (ids, torch.ones_like(ids)), [grids], negative)
        except (ValueError, TypeError) as error:
            raise ApiError(str(error)) from error
        # Said outright, so that no other row of a batch has a say in it: the bucket's shape and the number of scales.
        schedule = plan.schedule
        stride = schedule.stride
        options |= {
            "height": schedule.bucket[0] * stride,
            "width": schedule.bucket[1] * stride,
            "num_scales": schedule.num_scales,
        }
        if job.mode == "interleaved":
            options["max_new_images"] = plan.max_new_images
        if job.mode == "interleaved" or options.get("thinking"):
            options["max_new_tokens"] = plan.max_new_tokens
        key = json.dumps([job.adapter, options, job.negative_prompt], sort_keys=True)
        images_in = sum(map(int, ids[0] >= self.model.config.text_vocab_size))
        return Row(
            job=job,
            ids=ids[0],
            grids=grids,
            options=options,
            negative=negative,
            key=(key, bool(grids), bool(kept)),
            kept=kept,
            outcome=Outcome(len(ids[0]) - images_in, images_in),
        )

    def _read_kept(self, job: Job) -> dict[str, Any]:
        """Of an edit with a mask: its size, and what stays. An [`ApiError`], in the API's words, if it is wrong."""
        if job.mask is None:
            return {}
        size = NextFlowGenerationConfig(**{name: job.options[name] for name in SIZE if name in job.options})
        how: dict[str, Any] = {"image_in_prompt": job.image_in_prompt, "size": size}
        try:
            source = read_source(self.model, self.processor.image_processor, [job.pictures], job.mask, **how)
        except ValueError as error:
            message = str(error)
            for ours, theirs in {"mask_image": "mask", "white": "fully transparent", "black": "opaque"}.items():
                message = message.replace(ours, theirs)
            raise ApiError(message, param="mask", code="invalid_mask") from error
        return source.options(self.processor.image_tokenizer) if source else {}

    def _check_size(self, height: int, width: int) -> None:
        """An [`ApiError`], in the words of the API, unless the model draws pictures of that size."""
        limit = self.model.config.num_scales
        try:
            if ScaleSchedule.from_size(height, width).num_scales <= limit:
                return
        except ValueError:
            pass
        sizes = nearest_sizes(max(1, height), max(1, width), count=1000)
        legal = [size for size in sizes if ScaleSchedule.from_size(*size).num_scales <= limit][:3]
        raise ApiError(
            f'`size` "{width}x{height}" is none that this model draws. The nearest are '
            f'{", ".join(f"{w}x{h}" for h, w in legal)}; "auto" leaves it to the model.',
            param="size",
            code="invalid_value",
        )

    def _read_turn(self, job: Job) -> Row:
        """A turn is checked by its session when it comes up; here only what can be known without it."""
        _, config, _ = read_options(self.model, {**job.options, "generation_mode": job.mode})
        self.model.config.schedule(*(getattr(config, name) for name in SIZE))
        return Row(job, torch.empty(0), [], dict(job.options), None, object())

    def _encode(self, job: Job, text: str, pictures: Sequence[Any], negative: bool = False) -> Any:
        """A prompt as pipelines word it."""
        task = prompt_task(job.options.get("thinking"), with_pictures=bool(job.read_pictures))
        config, numbers = self.model.generation_config, [len(pictures)]
        styled = self.processor.style_prompts([text], task, config, num_pictures=numbers, negative=negative)
        kind = "negative prompt" if negative else "prompt"
        return self.processor(text=styled, images=list(pictures) or None, return_tensors="pt", text_kind=kind)

    def _plan(
        self, options: dict[str, Any], prompts: Prompts, grids: Any, negative: torch.Tensor | None
    ) -> DecodingSettings:
        given, config, others = read_options(self.model, {**options, "tokenizer": self.processor.tokenizer})
        return read_settings(Call(self.model, given, config, prompts, grids), negative_prompt_ids=negative, **others)

    # Drawing

    async def _serve(self) -> None:
        """Takes the oldest job, and those that are like it, again and again. The pictures of a batch are decoded while
        its next scales are drawn, and the last ones while the next batch is."""
        loop = asyncio.get_running_loop()
        painting = None
        while True:
            await self._wake.wait()
            self._batch = batch = self._next_batch()
            if not batch:
                self._wake.clear()
                continue
            start = time.perf_counter()
            events: SimpleQueue = SimpleQueue()
            # Shielded: if the event loop ends here, both run all the same, since the painter waits for the drawer.
            drawing = loop.run_in_executor(self._drawer, self._draw, batch, events)
            before, painting = painting, loop.run_in_executor(self._painter, self._paint, batch, events, loop)
            await asyncio.shield(drawing)
            if before is not None:
                await asyncio.shield(before)  # so that drawing is never further ahead than a batch
            seconds = (time.perf_counter() - start) / len(batch)
            self._seconds_per_row += 0.2 * (seconds - self._seconds_per_row)

    def _tell_of_its_end(self, loop: asyncio.Task) -> None:
        """Tells all who wait of an error in [`_serve`], since nobody draws for them now."""
        if loop.cancelled() or loop.exception() is None:
            return
        logger.error("The engine has stopped", exc_info=loop.exception())
        for row in (*self._batch, *self._waiting):
            row.gone = True
            row.events.put_nowait(Event("error", ApiError("The server failed; its log says how.", status=500)))

    def _next_batch(self) -> list[Row]:
        waiting = [row for row in self._waiting if not row.gone]
        alike = (row for row in waiting if row.key == waiting[0].key)
        batch = list(itertools.islice(alike, self.settings.max_batch))
        self._waiting = deque(row for row in waiting if row not in batch)
        batch.sort(key=lambda row: len(row.ids))  # neighbours of one length run together
        self.counts.update(batches=bool(batch), rows=len(batch))
        return batch

    def _draw(self, rows: list[Row], told: SimpleQueue) -> None:
        """Draws a batch, in a thread of its own, and tells its events, then None or the exception that ended it. It
        ends after the scale at which the last client has gone."""
        in_conversation = rows[0].job.in_conversation
        try:
            self.adapters.use(rows[0].job.adapter)
            session = self.sessions.open(rows[0].job) if in_conversation else None
            with closing(self._events(rows, session)) as events:
                for event in self._wanted(events, rows):
                    told.put(event)
            if session is not None and not rows[0].gone:
                self._count(rows[0].outcome, session.transcript)
                if rows[0].job.answer:
                    self.sessions.keep(rows[0].job.answer, session)
            told.put(None)
        except Exception as error:
            told.put(ApiError(str(error)) if isinstance(error, ValueError | TypeError) and in_conversation else error)
        except BaseException:
            told.put(RuntimeError("Drawing was ended."))
            raise

    def _paint(self, rows: list[Row], told: SimpleQueue, loop: asyncio.AbstractEventLoop) -> None:
        """Decodes what is drawn, in a thread of its own, and posts it to the clients."""

        def post(row: Row, kind: str, value: Any, step: int = 0) -> None:
            if not loop.is_closed():  # else nobody is there any more
                loop.call_soon_threadsafe(row.events.put_nowait, Event(kind, value, step))

        def events() -> Iterator[GenerationEvent]:
            while (event := told.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event

        pending = list(rows)
        try:
            for chunk in self.processor.decode_stream(events()):
                row = rows[chunk.row]
                kind = "thought" if chunk.kind == "text" and row.job.mode == "image" else chunk.kind
                post(row, kind, chunk.value, chunk.step or 0)
                if kind == "image" and row.job.mode == "image" and not row.job.in_conversation:
                    post(row, "done", row.outcome)
                    pending.remove(row)
            for row in pending:
                post(row, "done", row.outcome)
        except Exception as error:
            problem = error
            if not isinstance(error, ApiError):
                logger.exception("A batch of %d failed", len(rows))
                problem = ApiError("The server failed at this request; its log says how.", status=500)
            for row in pending:
                row.gone = True  # nobody draws on for them
                post(row, "error", problem)

    def _count(self, outcome: Outcome, transcript: Transcript) -> None:
        """Of a turn: all that the conversation held before the answer was read."""
        codes = sum(token >= self.model.config.text_vocab_size for token in transcript.input_ids)
        outcome.transcript, outcome.images_in = transcript, codes - outcome.images_out
        outcome.text_in = len(transcript.input_ids) - codes - outcome.text_out

    def _events(self, rows: list[Row], session: NextFlowSession | None) -> Generator[GenerationEvent, None, None]:
        """What happens to a batch."""
        job, device = rows[0].job, self.model.device
        generators = [torch.Generator().manual_seed(row.job.seed) for row in rows]
        if session is not None:
            yield from session.events(job.prompt, job.pictures, job.mode, generator=generators, **rows[0].options)
            return
        prompts = [(row.ids[None], torch.ones_like(row.ids[None])) for row in rows]
        ids, mask = stack_rows(prompts, self.model.config.eoi_token_id)  # masked: any would do
        grids = [grid for row in rows for grid in row.grids]
        kept: dict[str, Any] = {name: torch.cat([row.kept[name] for row in rows]) for name in rows[0].kept}
        yield from self.model.stream(
            ids.to(device),
            attention_mask=mask.to(device),
            image_grid_shw=torch.tensor(grids, device=device) if grids else None,
            negative_prompt_ids=None if rows[0].negative is None else rows[0].negative.to(device),
            generator=generators,
            tokenizer=self.processor.tokenizer,
            **kept,
            **rows[0].options,
        )

    def _wanted(self, events: Iterator[GenerationEvent], rows: list[Row]) -> Iterator[GenerationEvent]:
        """The events that somebody waits for; counts all."""
        for event in events:
            if all(row.gone for row in rows):
                return
            row = rows[event.row]
            if event.kind == "token":
                row.outcome.text_out += 1
                row.outcome.finish_reason = "length" if int(event.ids) not in self._ends else "stop"
            elif event.kind == "image":
                row.outcome.images_out += len(event.ids)
                row.outcome.finish_reason = "stop"
            shown = event.kind != "scale" or event.step in preview_scales(event.schedule.num_scales, row.job.previews)
            if shown and not row.gone:
                yield event


@lru_cache
def preview_scales(num_scales: int, previews: int) -> tuple[int, ...]:
    """The scales, from 0, after which previews are shown: evenly spread, and never the last, which is the picture."""
    return tuple(sorted({max(0, num_scales * i // (previews + 1) - 1) for i in range(1, previews + 1)}))


def _load(settings: ServingSettings) -> tuple[NextFlowForCausalLM, NextFlowProcessor]:
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, settings.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    model = NextFlowForCausalLM.from_pretrained(settings.folder, dtype=dtype).to(device).eval()
    processor = NextFlowProcessor.from_pretrained(settings.folder)
    processor.image_tokenizer.to(device, dtype)  # as a pipeline loads it
    return model, processor


__all__ = ["Engine", "preview_scales"]
