"""OpenAI's API as its own client sees it: pictures, edits, chats, answers that follow answers, and errors."""

import asyncio
import io
import json
import re

import httpx2 as httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image
from server_pictures import mask_of, picture_of, png_of, uri_of

from diffusers_nextflow import NextFlowPipeline
from transformers_nextflow.serving import ApiError, Event
from transformers_nextflow.serving.application import build_app

RED, BLUE = (Image.new("RGB", (80, 80), colour) for colour in ("red", "blue"))
MASK = Image.new("L", (80, 80), 0)
MASK.paste(255, (20, 30, 70, 80))


@pytest.fixture(scope="module")
def pipe(parts):
    pipeline = NextFlowPipeline(parts[0], parts[1].image_tokenizer, parts[1].tokenizer, parts[1].image_processor)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipe, *args, seed, **kwargs):
    return pipe(*args, generator=torch.Generator().manual_seed(seed), **kwargs).images[0].tobytes()


def test_generations_are_the_pipelines_pictures(talk, pipe):
    async def ask(client, http):
        extra = {"seed": 5, "guidance_scale": 2.0, "negative_prompt": "b"}
        return await client.images.generate(prompt="a", n=3, size="80x80", extra_body=extra)

    answer = talk(ask)
    wanted = [drawn(pipe, "a", seed=seed, guidance_scale=2.0, negative_prompt="b") for seed in (5, 6, 7)]
    assert [picture_of(image.b64_json).tobytes() for image in answer.data] == wanted
    assert [image.seed for image in answer.data] == [5, 6, 7] and answer.size == "80x80"
    usage = answer.usage
    codes = usage.output_tokens // 3
    assert usage.output_tokens == 3 * codes == usage.output_tokens_details.image_tokens
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_a_stream_shows_previews_and_then_the_picture(talk, pipe, form):
    async def ask(client, http):
        options = {"output_format": form, "output_compression": 90, "extra_body": {"seed": 5}}
        stream = await client.images.generate(prompt="a", stream=True, partial_images=3, **options)
        return [event async for event in stream]

    *previews, last = talk(ask)
    assert [(event.type, event.partial_image_index) for event in previews] == [
        ("image_generation.partial_image", index) for index in range(3)
    ]
    assert last.type == "image_generation.completed" and last.usage.output_tokens > 0
    pictures = [picture_of(event.b64_json) for event in (*previews, last)]
    assert {(picture.format.lower(), picture.size) for picture in pictures} == {(form, (80, 80))}
    if form == "png":
        assert pictures[-1].tobytes() == drawn(pipe, "a", seed=5)
        # The nearer the end, the nearer the picture.
        far = [np.abs(np.subtract(picture, pictures[-1], dtype=float)).mean() for picture in pictures]
        assert far[0] > far[2] > far[3] == 0


def test_edits_take_one_picture_and_several(talk, pipe):
    async def ask(client, http):
        one, two = (("a.png", png_of(picture)) for picture in (RED, BLUE))
        extra = {"extra_body": {"seed": 1, "image_guidance_scale": 1.5}}
        first = await client.images.edit(image=one, prompt="b", **extra)
        both = await client.images.edit(image=[one, two], prompt="b", **extra)
        stream = await client.images.edit(image=one, prompt="b", stream=True, partial_images=1, **extra)
        return first, both, [event async for event in stream]

    first, both, events = talk(ask)
    alone = drawn(pipe, "b", image=RED, seed=1, image_guidance_scale=1.5)
    assert picture_of(first.data[0].b64_json).tobytes() == alone
    together = drawn(pipe, "b", image=[RED, BLUE], seed=1, image_guidance_scale=1.5)
    assert picture_of(both.data[0].b64_json).tobytes() == together
    assert both.usage.input_tokens_details.image_tokens == 2 * first.usage.input_tokens_details.image_tokens > 0
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert picture_of(events[-1].b64_json).tobytes() == alone


def test_an_edit_with_a_mask_is_the_pipelines(talk, pipe):
    red, mask = ("a.png", png_of(RED)), ("m.png", png_of(mask_of(MASK)))

    async def ask(client, http):
        call = {"image": red, "mask": mask, "prompt": "b"}
        seed = {"seed": 1, "guidance_scale": 2.0, "negative_prompt": "c"}
        plain = await client.images.edit(**call, n=2, extra_body=seed)
        stream = await client.images.edit(**call, stream=True, partial_images=2, extra_body=seed)
        read = await client.images.edit(**call, extra_body={**seed, "image_in_prompt": True})
        sized = await client.images.edit(**call, size="64x112", extra_body=seed)
        return plain, [event async for event in stream], read, sized

    plain, events, read, sized = talk(ask)
    given = {"image": RED, "mask_image": MASK, "guidance_scale": 2.0, "negative_prompt": "c"}
    pictures = [picture_of(image.b64_json).tobytes() for answer in (plain, read, sized) for image in answer.data]
    assert pictures == [
        drawn(pipe, "b", seed=1, **given),
        drawn(pipe, "b", seed=2, **given),
        drawn(pipe, "b", seed=1, image_in_prompt=True, **given),
        drawn(pipe, "b", seed=1, width=64, height=112, **given),
    ]
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    assert picture_of(events[-1].b64_json).tobytes() == pictures[0]
    assert plain.usage.input_tokens_details.image_tokens == 0 < read.usage.input_tokens_details.image_tokens


WHOLE, NONE = (Image.new("L", (80, 80), shade) for shade in (0, 255))
DOT = WHOLE.copy()
DOT.paste(255, (0, 0, 5, 5))


@pytest.mark.parametrize(
    "masks, images, extra, param, message",
    [
        ([MASK.convert("RGB")], 1, {}, "mask", "alpha channel"),
        ([b"no picture"], 1, {}, "mask", "can't be opened"),
        ([b"GIF"], 1, {}, "mask", r"can't be opened as a picture \(PNG\)"),
        ([mask_of(MASK).resize((40, 80))], 1, {}, "mask", "`mask` has 40 x 80 pixels .* its `image` has 80 x 80"),
        ([mask_of(WHOLE)], 1, {}, "mask", "`mask` leaves nothing to draw: it must be fully transparent where"),
        ([mask_of(DOT)], 1, {}, "mask", "`mask` leaves nothing to draw"),
        ([mask_of(NONE)], 1, {}, "mask", "`mask` keeps nothing: it must be opaque where"),
        ([mask_of(MASK)], 2, {}, "mask", "one file for one `image`, but got 1 for 2"),
        ([mask_of(MASK)] * 2, 1, {}, "mask", "one file for one `image`, but got 2 for 1"),
        ([mask_of(MASK)], 0, {}, "image", "1 to 10 files `image`, but got 0"),
        ([], 1, {"image_in_prompt": "true"}, "image_in_prompt", "with a `mask`"),
        ([mask_of(MASK)], 1, {"image_guidance_scale": "2"}, None, "`image_guidance_scale` guides by the images"),
    ],
)
def test_masks_that_are_wrong(talk, masks, images, extra, param, message):
    def data(mask):
        if not isinstance(mask, bytes):
            return png_of(mask)
        buffer = io.BytesIO()
        MASK.save(buffer, "GIF", transparency=0)
        return buffer.getvalue() if mask == b"GIF" else mask

    async def ask(client, http):
        files = [("image[]", ("a.png", png_of(RED)))] * images + [("mask", ("m.png", data(mask))) for mask in masks]
        return await http.post("/v1/images/edits", data={"prompt": "b", **extra}, files=files)

    answer = talk(ask)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and re.search(message, error["message"])


def content_of(chunks):
    """What a stream of a chat says: its text, and its pictures."""
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    text = "".join(delta.content for delta in deltas if isinstance(delta.content, str))
    parts = [part for delta in deltas if isinstance(delta.content, list) for part in delta.content]
    return text.strip(), [part["image_url"]["url"] for part in parts]


def test_chats_read_and_draw(talk):
    parts = [{"type": "image_url", "image_url": {"url": uri_of(RED)}}, {"type": "text", "text": "what?"}]
    chat = {"model": "tiny", "messages": [{"role": "user", "content": parts}], "max_tokens": 6, "seed": 2}

    async def ask(client, http):
        read = await client.chat.completions.create(**chat, modalities=["text"])
        draws = {"model": "tiny", "messages": chat["messages"], "modalities": ["image"], "seed": 2}
        picture = await client.chat.completions.create(**draws)
        both = await client.chat.completions.create(**chat, extra_body={"max_new_images": 1})
        options = {"stream": True, "stream_options": {"include_usage": True}}
        pieces = await client.chat.completions.create(**chat, **options, extra_body={"max_new_images": 1})
        thought = await client.chat.completions.create(**draws, extra_body={"thinking": True}, max_tokens=4)
        return read, picture, both, [piece async for piece in pieces], thought

    read, picture, both, pieces, thought = talk(ask)
    assert isinstance(read.choices[0].message.content, str) and read.choices[0].finish_reason in ("stop", "length")
    assert 0 < read.usage.completion_tokens <= 6 and read.usage.prompt_tokens > 50
    (part,) = picture.choices[0].message.content
    assert picture_of(part["image_url"]["url"].partition(",")[2]).size == (80, 80)
    text, urls = content_of(pieces)
    content = both.choices[0].message.content
    if isinstance(content, str):
        assert (text, urls) == (content, [])
    else:
        assert urls == [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    assert pieces[-1].usage == both.usage and pieces[0].choices[0].delta.role == "assistant"
    message = thought.choices[0].message
    assert [part["type"] for part in message.content] == ["image_url"]  # the thought is kept apart
    assert thought.usage.completion_tokens > picture.usage.completion_tokens or not message.model_extra


def test_answers_follow_answers(talk):
    async def ask(client, http):
        tool = {"tools": [{"type": "image_generation"}], "tool_choice": {"type": "image_generation"}}
        first = await client.responses.create(model="tiny", input="a", **tool, extra_body={"seed": 1})
        follow = {"model": "tiny", "input": "b", "previous_response_id": first.id, "extra_body": {"seed": 2}}
        second = await client.responses.create(**follow, **tool)
        again = await client.responses.create(**follow, **tool)
        tool["tools"] = [{"type": "image_generation", "partial_images": 2}]
        events = [event async for event in await client.responses.create(**follow, **tool, stream=True)]
        text = {"model": "tiny", "input": "what?", "previous_response_id": second.id, "max_output_tokens": 4}
        written = await client.responses.create(**text)
        told = [event async for event in await client.responses.create(**text, stream=True)]
        unstored = await client.responses.create(model="tiny", input="a", store=False, max_output_tokens=1)
        with pytest.raises(openai.NotFoundError) as gone:
            await client.responses.create(model="tiny", input="b", previous_response_id=unstored.id)
        return first, second, again, events, written, told, gone.value

    first, second, again, events, written, told, gone = talk(ask)
    results = [answer.output[0].result for answer in (first, second, again, events[-1].response)]
    assert [answer.output[0].type for answer in (first, second)] == ["image_generation_call"] * 2
    assert results[1] == results[2] == results[3] != results[0] and picture_of(results[1]).size == (80, 80)
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens - 1
    call = "response.image_generation_call"
    assert [event.type for event in events] == [
        *("response.created", "response.in_progress", "response.output_item.added"),
        *(f"{call}.in_progress", f"{call}.generating", f"{call}.partial_image", f"{call}.partial_image"),
        *(f"{call}.completed", "response.output_item.done", "response.completed"),
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[2].item.status == "in_progress" and events[0].response.status == "in_progress"
    deltas = "".join(event.delta for event in told if event.type == "response.output_text.delta")
    assert deltas == told[-1].response.output_text == written.output_text
    assert gone.code == "previous_response_not_found" and gone.param == "previous_response_id"


def test_models_health_and_metrics(talk):
    async def ask(client, http):
        models = [model.id async for model in client.models.list()]
        await client.images.generate(prompt="a")
        metrics = (await http.get("/metrics")).text
        one = await client.models.retrieve("tiny")
        return models, one.id, (await http.get("/health")).json(), metrics

    models, one, health, metrics = talk(ask)
    assert models == ["tiny"] == [one] and health == {"status": "ok"} and "nextflow_rows 1\n" in metrics


def test_a_key_is_asked_for_everywhere_but_for_health(talk):
    async def ask(client, http):
        with pytest.raises(openai.AuthenticationError):
            await client.images.generate(prompt="a")
        paths = ("/health", "/metrics", "/v1/models", "/nowhere")
        return [(await http.get(path, headers={"Authorization": "Bearer wrong"})).status_code for path in paths]

    assert talk(ask, key="guess", api_key="secret") == [200, 401, 401, 401]

    async def ask_with_the_key(client, http):
        return [model.id async for model in client.models.list()]

    assert talk(ask_with_the_key, key="secret", api_key="secret") == ["tiny"]


class Broken:
    """A backend that does what it is told to."""

    def __init__(self, *events, error=None):
        self.events, self.error = events, error

    async def run(self, job):
        for event in self.events:
            yield event
        if self.error is not None:
            raise self.error
        await asyncio.sleep(60)

    async def status(self):
        raise ApiError("No replica is there.", 503, code="unavailable", retry_after=5)


@pytest.mark.parametrize(
    "backend, kind, status",
    [
        (Broken(error=ApiError("full", 429, retry_after=7)), openai.RateLimitError, 429),
        (Broken(error=ApiError("gone", 503, retry_after=7)), openai.InternalServerError, 503),
        (Broken(error=RuntimeError("a secret of the server")), openai.InternalServerError, 500),
        (Broken(), openai.InternalServerError, 504),
    ],
)
def test_errors_have_their_classes(settings, backend, kind, status):
    async def ask(stream):
        app = build_app(settings(request_seconds=0.2), backend)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            client = openai.AsyncOpenAI(api_key="x", base_url="http://server/v1", max_retries=0, http_client=http)
            with pytest.raises(kind) as error:
                await client.images.generate(prompt="a", stream=stream)
            return error.value

    for stream in (False, True):
        error = asyncio.run(ask(stream))
        assert error.status_code == status and "secret" not in str(error)
        assert error.response.headers.get("Retry-After") == ("7" if status in (429, 503) else None)


def test_an_error_in_a_stream_is_an_event_of_it(settings):
    backend = Broken(Event("accepted", None), error=ApiError("gone", 503))

    async def ask():
        transport = httpx.ASGITransport(app=build_app(settings(), backend))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            client = openai.AsyncOpenAI(api_key="x", base_url="http://server/v1", max_retries=0, http_client=http)
            with pytest.raises(openai.APIError, match="gone"):
                async for _ in await client.images.generate(prompt="a", stream=True):
                    pass
            return (await http.post("/v1/images/generations", json={"prompt": "a", "stream": True})).text

    (event,) = asyncio.run(ask()).strip().split("\n\n")
    name, data = event.split("\n")
    assert name == "event: error" and json.loads(data.removeprefix("data: "))["error"]["type"] == "server_error"
