"""Conversations with a cache against one forward over the whole; streams; undo, fork and memory."""

import random
import sys

import pytest
import torch
from PIL import Image
from transformers.generation import CompileConfig

from random_weights import sharpen
from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, NextFlowSession

PICTURE = Image.new("RGB", (80, 80), "skyblue")


@pytest.fixture(scope="module")
def parts(tiny_random_checkpoint):
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint).eval()
    sharpen(model)
    model.config.max_position_embeddings = 2048
    return model, NextFlowProcessor.from_pretrained(tiny_random_checkpoint)


@pytest.fixture
def session(parts):
    return NextFlowSession(*parts, max_new_tokens=6, guidance_scale=2.0)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def logits_of_next_turn(session):
    """Those behind one more turn of the user, by the cache and by one forward over the whole."""
    inputs = session._read_turn([{"type": "text", "text": "and now?"}])
    ids = inputs["input_ids"]
    cached = session._decoding.extend(ids, torch.ones_like(ids), [[]])
    with torch.no_grad():
        whole = session.model(session.input_ids, image_grid_shw=session.image_grid_shw).logits[:, -1]
    return cached, whole


def test_three_turns_equal_one_forward_over_the_whole(session):
    assert isinstance(session.ask("what is it?", PICTURE), str)
    picture = session.draw("a red circle", generator=seeded(0))
    assert picture.size == (80, 80)
    session.draw("make it blue", generator=seeded(1))
    session.ask("what colour?")
    assert session.num_turns == 4 and session.memory.num_images == 3
    torch.testing.assert_close(*logits_of_next_turn(session), atol=1e-4, rtol=1e-4)


def test_nothing_is_encoded_twice(parts, session):
    slots = []
    hook = parts[0].register_forward_pre_hook(
        lambda module, args, kwargs: slots.append(kwargs["position_ids"].shape[-1]), with_kwargs=True
    )
    session.settings["guidance_scale"] = 1.0
    session.ask("one", PICTURE)
    session.draw("two", generator=seeded(0))
    session.ask("three")
    hook.remove()
    assert sum(slots) in (session.input_ids.shape[1] - 1, session.input_ids.shape[1])  # the last token needn't run


def test_a_fork_does_not_touch_its_sibling_and_undo_comes_back(session):
    session.ask("what is it?", PICTURE)
    session.draw("a circle", generator=seeded(0))
    before = session.input_ids.clone()
    twin = session.fork()
    left, right = session.draw("edit", generator=seeded(1)), twin.draw("edit", generator=seeded(1))
    assert left.tobytes() == right.tobytes()
    twin.draw("other", generator=seeded(2))
    torch.testing.assert_close(*logits_of_next_turn(session.fork()), atol=1e-4, rtol=1e-4)
    session.undo()
    assert torch.equal(session.input_ids, before) and session.num_turns == 2
    assert session.draw("edit", generator=seeded(1)).tobytes() == left.tobytes()
    session.undo(3)
    assert session.num_turns == 0 and session.input_ids.shape[1] == 0
    assert session.memory.num_bytes == 0 or session.memory.num_tokens == 0
    with pytest.raises(ValueError, match="There are 0 turns, so 1 can't be undone"):
        session.undo()


def test_memory_counts_what_the_cache_holds(session):
    session.ask("hello")
    memory = session.memory
    config = session.model.config
    slots = session._decoding.state.num_slots
    head = config.hidden_size // config.num_attention_heads
    assert memory.num_bytes == 2 * config.num_hidden_layers * config.num_key_value_heads * head * slots * 4
    assert memory.num_tokens_left == config.max_position_embeddings - memory.num_tokens
    session.offload()
    session.ask("still there?")


def test_chat_and_stream_give_the_same(session):
    always = [lambda ids, scores: scores.index_fill(1, torch.tensor([session.model.config.boi_token_id]), 1e4)]
    settings = dict(max_new_images=1, max_new_tokens=4, logits_processor=always, do_sample=False)
    twin = session.fork()
    segments = session.chat("a story", **settings)
    chunks = list(twin.stream("a story", **settings))
    assert [chunk.kind for chunk in chunks] == ["preview"] * 4 + ["image"]
    assert [chunk.step for chunk in chunks[:-1]] == [0, 1, 2, 3]
    pictures = [segment for segment in segments if not isinstance(segment, str)]
    assert len(pictures) == 1 and pictures[0].tobytes() == chunks[-1].value.tobytes()
    assert torch.equal(session.input_ids, twin.input_ids)
    user, answer = session.messages
    assert user == {"role": "user", "content": [{"type": "text", "text": "a story"}]}
    assert answer["role"] == "assistant"
    assert [part["type"] for part in answer["content"]] == ["image" if s in pictures else "text" for s in segments]


def test_streamed_text_is_the_text(session):
    twin = session.fork()
    never = dict(max_new_images=0, max_new_tokens=20)
    pieces = [chunk.value for chunk in twin.stream("hm?", **never)]
    assert "".join(pieces).strip() == session.ask("hm?", max_new_tokens=20).strip()


def test_thinking_is_kept_apart(session):
    session.draw("two more than one", thinking=True, generator=seeded(0))
    assert isinstance(session.last_thought, str)
    assert session.memory.num_images == 1


def test_a_stream_that_is_left_ends_after_a_scale(session):
    always = [lambda ids, scores: scores.index_fill(1, torch.tensor([session.model.config.boi_token_id]), 1e4)]
    settings = dict(max_new_images=1, max_new_tokens=4, logits_processor=always, generator=seeded(0))
    stream = session.stream("a story", **settings)
    assert [next(stream).step for _ in range(3)] == [0, 1, 2]
    session.ask("what is it?")  # the turn before ends here
    assert list(stream) == []
    assert session.memory.num_images == 1 and session.num_turns == 2
    torch.testing.assert_close(*logits_of_next_turn(session), atol=1e-4, rtol=1e-4)


def test_messages_read_as_the_conversation(parts, session):
    session.ask("what is it?", PICTURE)
    picture = session.draw("a circle", generator=seeded(0))
    session.ask("and now?")
    messages = session.messages
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3
    assert messages[0]["content"][0]["image"] is PICTURE
    assert messages[3]["content"][0]["image"].tobytes() == picture.tobytes()
    text = parts[1].apply_chat_template(messages, tokenize=False)
    assert text.count("<image>") == session.memory.num_images == 2


def test_defaults_serve_the_turns_that_they_fit(parts):
    session = NextFlowSession(*parts, thinking=True, image_guidance_scale=2.0, max_new_images=1, max_new_tokens=4)
    session.ask("hello")  # neither thinks nor has images
    session.draw("a circle", generator=seeded(0))
    assert session.draw("a square", thinking=False, generator=seeded(0)).size == (80, 80)
    assert session.last_thought == ""


def test_misuse_is_explained_and_leaves_the_session_alone(session):
    session.ask("hello")
    before = session.input_ids.clone()
    for call, message in [
        (lambda: session.draw("x", num_frames=2), "does not take `num_frames`"),
        (lambda: session.chat("x", thinking=True), "for `generation_mode=.image.`"),
        (lambda: session.ask("x", nonsense=1), "does not take `nonsense`"),
        (lambda: session.ask(3), "must be a string, but got int"),
        (lambda: session.ask("<image>"), "but there are 0 images"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert torch.equal(session.input_ids, before) and session.num_turns == 1
    with pytest.raises(ValueError, match="before the picture began"):
        session.draw("x", thinking=True, stopping_criteria=[lambda ids, scores: True])
    assert torch.equal(session.input_ids, before)


def test_a_turn_that_fails_leaves_the_session_as_it_was(parts, session):
    session.draw("a circle", generator=seeded(0))
    twin, before = session.fork(), session.input_ids.clone()
    calls = []

    def fail(*_):
        calls.append(None)
        if len(calls) == 6:  # inside the image; the first layer has its keys already
            raise KeyboardInterrupt

    hook = parts[0].model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        session.draw("edit", generator=seeded(1))
    hook.remove()
    assert torch.equal(session.input_ids, before) and session.num_turns == 1
    assert session.draw("edit", generator=seeded(1)).tobytes() == twin.draw("edit", generator=seeded(1)).tobytes()


def test_layers_come_back_to_their_own_devices(session):
    session.ask("hello")
    for layer in session._decoding.state.cache.layers[1:]:
        layer.device = torch.device("meta")
    session.offload()
    assert {layer.keys.device.type for layer in session._decoding.state.cache.layers} == {"cpu"}
    session.onload()
    assert [layer.keys.device.type for layer in session._decoding.state.cache.layers] == ["cpu", "meta"]


class Interrupt:
    """Ctrl-C, or a device that is out of memory, before the n-th line of this package that is run; counts the lines."""

    def __init__(self, line: int | None = None):
        self.line, self.count = line, 0

    def trace(self, frame, event, argument):
        if "transformers_nextflow" not in frame.f_code.co_filename or "tests" in frame.f_code.co_filename:
            return None
        if event == "line":
            self.count += 1
            if self.count == self.line:
                raise KeyboardInterrupt
        return self.trace

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *error):
        sys.settrace(None)


@pytest.mark.parametrize("action", ["ask", "draw", "undo"])
def test_whatever_interrupts_it_a_session_is_as_it_was(parts, action):
    session = NextFlowSession(*parts, max_new_tokens=2, num_scales=2, guidance_scale=2.0)
    session.ask("one", PICTURE)
    session.draw("two", generator=seeded(0))
    before = session.input_ids.clone(), session.image_grid_shw, session.num_turns, session.memory
    keys = [layer.keys for state in session._states for layer in state.cache.layers]
    actions = {
        "ask": lambda of: of.ask("three"),
        "draw": lambda of: of.draw("three", generator=seeded(1)),
        "undo": lambda of: of.undo(),
    }
    twin = session.fork()
    with Interrupt() as lines:
        actions[action](twin)
    after = twin.input_ids
    places = random.Random(0).sample(range(1, lines.count), min(25, lines.count - 1))
    for place in places:
        with pytest.raises(KeyboardInterrupt), Interrupt(place):
            actions[action](session)
        assert torch.equal(session.input_ids, before[0]) and torch.equal(session.image_grid_shw, before[1])
        assert (session.num_turns, session.memory) == before[2:]
        now = [layer.keys for state in session._states for layer in state.cache.layers]
        assert all(torch.equal(a, b) for a, b in zip(keys, now, strict=True))
    actions[action](session)
    assert torch.equal(session.input_ids, after)


@pytest.mark.parametrize("name", ["cache", "num_return_sequences", "image_grid_shw", "on_scale_end"])
def test_what_a_session_gives_itself_is_refused(session, name):
    for call in (session.ask, lambda _, **settings: NextFlowSession(session.model, session.processor, **settings)):
        with pytest.raises(ValueError, match=f"A session sees to `{name}` itself"):
            call("one", **{name: 1})
    assert session.num_turns == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scal": 2}, "does not take `guidance_scal`. Similar names are .*`guidance_scale`"),
        ({"num_scales": 0}, "`num_scales` must be a whole number"),
    ],
)
def test_settings_are_checked_at_once(parts, settings, message):
    with pytest.raises(ValueError, match=message):
        NextFlowSession(*parts, **settings)


def test_a_stream_that_is_closed_late_leaves_the_next_one_alone(parts):
    session = NextFlowSession(*parts, max_new_tokens=8, min_new_tokens=8, max_new_images=0)
    first = session.stream("one")
    next(first)
    second = session.stream("two")
    begun = [next(second)]
    first.close()
    rest = "".join(chunk.value for chunk in [*begun, *second])
    alone = NextFlowSession(*parts, max_new_tokens=8, min_new_tokens=8, max_new_images=0)
    alone._now = session._now
    alone.undo()
    assert session.num_turns == 2 and rest.strip() == alone.chat("two")[0].strip()


def test_undo_counts_the_turn_that_is_open(session):
    stream = session.stream("one", max_new_images=0)
    next(stream)
    session.undo()
    assert session.num_turns == 0 and session.input_ids.shape[1] == 0


@pytest.mark.parametrize("stored", [{"thinking": True}, {"num_frames": 2}, {"compile_config": CompileConfig()}])
def test_what_a_model_stores_for_other_calls_disturbs_no_turn(parts, stored):
    model, processor = parts
    kept = dict(vars(model.generation_config))
    vars(model.generation_config).update(stored)
    try:
        session = NextFlowSession(model, processor, max_new_tokens=2, guidance_scale=2.0)
        session.ask("one")
        assert session.draw("two", generator=seeded(0)).size == (80, 80) and session.last_thought == ""
        session.chat("three", max_new_images=0)
    finally:
        vars(model.generation_config).clear()
        vars(model.generation_config).update(kept)
