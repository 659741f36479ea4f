"""Many jobs on one model: everybody gets what it would get alone, and those who leave make room."""

import asyncio
import threading
from concurrent.futures import Future

import pytest
import torch
from PIL import Image

from diffusers_nextflow import NextFlowPipeline
from transformers_nextflow.serving import ApiError, Job
from transformers_nextflow.serving.engine import preview_scales

RED, BLUE = (Image.new("RGB", (80, 80), colour) for colour in ("red", "blue"))
MASK = Image.new("L", (80, 80), 0)
MASK.paste(255, (20, 30, 70, 80))


async def events_of(engine, job):
    return [event async for event in engine.run(job)]


def run(engine, *jobs):
    """The events of jobs that arrive together."""

    async def together():
        return await asyncio.gather(*(events_of(engine, job) for job in jobs))

    return asyncio.run(together())


def pictures(events):
    return [event.value.tobytes() for event in events if event.kind == "image"]


def wait_for(engine, number):
    """The engine begins when so many jobs wait, so they are batched as if they had come at once."""
    take = engine._next_batch

    def take_when_all_are_there():
        if len(engine._waiting) < number:
            return []
        engine._next_batch = take
        return take()

    engine._next_batch = take_when_all_are_there


@pytest.fixture
def held(engine):
    """An engine whose thread waits until it is let go, so that jobs meet in its queue."""

    def make(**values):
        waiting, gate = engine(**values), threading.Event()
        waiting._drawer.submit(gate.wait)
        return waiting, gate

    return make


def test_a_seed_gives_the_picture_of_the_pipeline_in_any_batch(parts, engine):
    engine = engine(max_batch=16)
    pipe = NextFlowPipeline(parts[0], parts[1].image_tokenizer, parts[1].tokenizer, parts[1].image_processor)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a", "a much longer prompt", "two words"] * 2
    jobs = [Job(prompt=prompt, seed=seed, options={"guidance_scale": 2.0}) for seed, prompt in enumerate(prompts)]
    edits = [Job(prompt="b", pictures=(RED, BLUE)[: 1 + seed], seed=seed) for seed in range(2)]
    masks = [MASK, MASK.transpose(Image.Transpose.ROTATE_90)]
    kept = {"pictures": (RED,), "options": {"guidance_scale": 2.0}, "image_in_prompt": False}
    masked = [Job(prompt="c", mask=mask, seed=seed, **kept) for seed, mask in enumerate(masks)]
    # Of another setting, so not in that batch.
    other = Job(prompt="a", seed=0, options={"guidance_scale": 2.0, "image_top_k": 1})
    wait_for(engine, 11)
    drawn = run(engine, *jobs, *edits, *masked, other)
    assert engine.counts["batches"] == 4 and engine.counts["rows"] == 11

    def alone(job, **options):
        generator = torch.Generator().manual_seed(job.seed)
        given = {"image": list(job.pictures) or None, "mask_image": job.mask, **job.options}
        return pipe(job.prompt, generator=generator, **given).images[0].tobytes()

    assert [pictures(events) for events in drawn] == [[alone(job)] for job in (*jobs, *edits, *masked, other)]
    assert [event.kind for event in drawn[0]] == ["accepted", "image", "done"]


def test_chats_in_a_batch_are_those_alone(engine):
    jobs = [
        Job(
            mode="interleaved",
            messages=({"role": "user", "content": text},),
            seed=seed,
            options={"max_new_tokens": 5, "max_new_images": 1, "do_sample": True},
        )
        for seed, text in enumerate(["hello", "a longer question", "x"])
    ]
    together, alone = engine(), engine()
    wait_for(together, len(jobs))
    batch = run(together, *jobs)
    single = [run(alone, job)[0] for job in jobs]

    def said(events):
        return "".join(event.value for event in events if event.kind == "text"), pictures(events), events[-1]

    assert [said(events) for events in batch] == [said(events) for events in single]
    assert all(events[-1].value.text_out <= 5 for events in batch)


def test_previews_are_decoded_and_spread(engine):
    (events,) = run(engine(), Job(prompt="a", previews=3))
    assert [(event.kind, event.step) for event in events[1:4]] == [("preview", scale) for scale in (0, 1, 2)]
    assert all(event.value.size == (80, 80) for event in events[1:5])
    assert preview_scales(18, 3) == (3, 8, 12) and preview_scales(8, 0) == () and preview_scales(1, 3) == (0,)


def test_who_leaves_frees_the_place_and_ends_the_drawing(held):
    engine, gate = held(max_queue=2, max_batch=1)

    async def leave():
        first, second = engine.run(Job(prompt="a")), engine.run(Job(prompt="b"))
        for events in (first, second):
            assert (await anext(events)).kind == "accepted"
        with pytest.raises(ApiError) as refused:
            await anext(engine.run(Job(prompt="c")))
        assert refused.value.status == 429 and refused.value.retry_after >= 1
        await second.aclose()
        third = asyncio.create_task(events_of(engine, Job(prompt="c")))
        await asyncio.sleep(0.1)
        gate.set()
        drawn = [event.kind async for event in first]
        return drawn, [event.kind for event in await third]

    assert asyncio.run(leave()) == (["image", "done"], ["accepted", "image", "done"])
    assert engine.counts == {"left": 1, "refused": 1, "batches": 2, "rows": 2}


def test_a_drawing_that_nobody_waits_for_ends_with_its_scale(engine, parts, monkeypatch):
    scales: list[int] = []
    reached: Future = Future()
    gate = threading.Event()
    stream = parts[0].stream

    def slow(*args, **kwargs):
        for event in stream(*args, **kwargs):
            scales.append(event.step)
            if event.step == 1:
                reached.set_result(None)
                gate.wait()
            yield event

    monkeypatch.setattr(parts[0], "stream", slow)
    served = engine()

    async def leave():
        task = asyncio.create_task(events_of(served, Job(prompt="a")))
        await asyncio.wrap_future(reached)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        gate.set()
        monkeypatch.setattr(parts[0], "stream", stream)
        return await events_of(served, Job(prompt="b"))

    assert asyncio.run(leave())[-1].kind == "done" and scales == [0, 1]


def test_an_event_loop_that_ends_leaves_an_engine_that_goes_on(held):
    engine, gate = held()

    async def leave():
        events = engine.run(Job(prompt="a"))  # kept, so that its place is not free
        await anext(events)
        while not engine.counts["batches"]:  # until it waits for the drawer
            await asyncio.sleep(0.01)
        return events

    asyncio.run(leave())
    gate.set()
    assert run(engine, Job(prompt="b"))[0][-1].kind == "done"


@pytest.mark.parametrize("place", ["_next_batch", "_painter"])
def test_a_mistake_in_the_queue_is_told_to_all_who_wait(held, monkeypatch, place):
    """Those of the batch, those in the queue, and those that are still read then."""
    served, gate = held(max_batch=1)
    read = served._read

    def read_late(job):
        if job.prompt == "late":
            gate.wait()
        return read(job)

    async def together():
        jobs = [asyncio.create_task(events_of(served, Job(prompt=prompt))) for prompt in ("a", "b", "late")]
        told = await asyncio.gather(*jobs[:2], return_exceptions=True)
        with pytest.raises(RuntimeError, match="stopped"):
            served.check_health()
        broken.undo()
        gate.set()
        return told, await jobs[2]

    with monkeypatch.context() as broken:
        broken.setattr(served, "_read", read_late)
        broken.setattr(served, place, object())
        told, late = asyncio.run(together())
    assert [error.status for error in told] == [500, 500] and late[-1].kind == "done"


def test_a_failed_batch_is_told_and_the_engine_goes_on(engine, parts, monkeypatch):
    served = engine()
    with monkeypatch.context() as patch:
        patch.setattr(parts[0], "stream", lambda *args, **kwargs: iter([None]))
        with pytest.raises(ApiError) as failed:
            run(served, Job(prompt="a"))
    assert failed.value.status == 500 and "NoneType" not in failed.value.message
    assert run(served, Job(prompt="a"))[0][-1].kind == "done"


@pytest.mark.parametrize(
    "job, message",
    [
        (Job(prompt="a", options={"height": 70, "width": 80}), "80x80"),
        (Job(prompt="a", options={"height": 1024, "width": 1024}), "80x80"),
        (Job(prompt="<boi>"), "plain text"),
        (Job(prompt="a" * 3000), "context"),
        (Job(prompt="a", options={"image_top_p": 3.0}), "top_p"),
        (Job(prompt="a", options={"image_guidance_scale": 2.0}), "image_guidance_scale"),
        (Job(messages=({"role": "system", "content": [{"type": "image", "image": RED}]},)), "system"),
        (Job(prompt="a", adapter="none"), "adapter"),
        (Job(prompt="a", in_conversation=True, options={"image_top_k": -1}), "top_k"),
    ],
)
def test_what_is_wrong_is_told_before_it_waits(engine, job, message):
    served = engine()

    async def first():
        await anext(served.run(job))

    with pytest.raises(ApiError, match=message) as error:
        asyncio.run(first())
    assert error.value.status in (400, 404) and served._load == 0
