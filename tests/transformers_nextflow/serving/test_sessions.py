"""Conversations that are held, moved away, dropped and made again; nothing of them is lost."""

import asyncio

import pytest

from transformers_nextflow import NextFlowSession
from transformers_nextflow.serving import ApiError, Job
from transformers_nextflow.serving.sessions import Sessions, Transcripts


def turn(text, answer, previous=None, transcript=None, mode="image"):
    options = {"guidance_scale": 2.0} if mode == "image" else {"max_new_tokens": 4, "max_new_images": 0}
    names = {"answer": answer, "previous": previous, "transcript": transcript}
    return Job(mode=mode, prompt=text, in_conversation=True, seed=3, options=options, **names)


def answers(engine, *jobs):
    """What turns, one after the other, are answered with, and the last transcript."""

    async def run():
        said, transcript = [], None
        for job in jobs:
            async for event in engine.run(job):
                if event.kind in ("text", "image"):
                    said.append(event.value if event.kind == "text" else event.value.tobytes())
                elif event.kind == "done":
                    transcript = event.value.transcript
        return said, transcript

    return asyncio.run(run())


def test_a_turn_goes_on_the_same_from_what_is_held_and_from_its_transcript(engine, parts):
    held, elsewhere = engine(), engine()
    (first,), transcript = answers(held, turn("a", "A"))
    later = turn("b", "B", "A", transcript), turn("c", "C", "B", mode="interleaved")
    said, whole = answers(held, *later)
    assert len(held.sessions._held) == 3

    rebuilt, again = answers(elsewhere, later[0])
    assert rebuilt == said[:1]
    assert answers(elsewhere, turn("c", "C", "other", again, mode="interleaved")) == (said[1:], whole)

    session = NextFlowSession(*parts)  # what all of it stands for
    import torch

    picture = session.draw("a", generator=torch.Generator().manual_seed(3), guidance_scale=2.0)
    assert picture.tobytes() == first


def test_two_answers_to_one_turn_do_not_disturb_each_other(engine):
    served = engine()
    _, transcript = answers(served, turn("a", "A"))
    once = answers(served, turn("b", "B", "A", transcript))
    other = answers(served, turn("something else", "C", "A", transcript))
    assert answers(served, turn("b", "D", "A", transcript)) == once != other


def test_sessions_are_moved_away_before_they_are_dropped(parts, settings, monkeypatch):
    moved: list[NextFlowSession] = []
    monkeypatch.setattr(NextFlowSession, "offload", lambda session: moved.append(session))
    size = _session(parts).memory.num_bytes
    sessions = Sessions(*parts, settings(session_bytes=size, session_host_bytes=2 * size))
    made = {name: _session(parts) for name in "abc"}
    sessions.keep("a", made["a"])
    assert not moved
    sessions.keep("b", made["b"])
    assert moved == [made["a"]]
    sessions.open(turn("x", "X", previous="a"))  # used again
    sessions.keep("c", made["c"])
    assert list(sessions._held) == ["a", "c"] and sessions.memory == (2, 2 * size)


def _session(parts):
    session = NextFlowSession(*parts)
    session.draw("a", image_top_k=1)
    return session


def test_old_transcripts_are_forgotten_with_an_error_that_says_so():
    transcripts = Transcripts(2)
    for name in "abc":
        transcripts.put(name, name)
    assert transcripts.get("b") == "b"
    transcripts.put("d", "d")
    for gone in "ac":
        with pytest.raises(ApiError, match="no answer") as error:
            transcripts.get(gone)
        assert error.value.status == 404 and error.value.param == "previous_response_id"
