"""The web application: OpenAI's API over whatever runs jobs, an engine in this process or replicas elsewhere."""

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from ..session import Transcript
from .answers import ChatAnswer, ImageAnswer, Piece, ResponseAnswer, new_id, sse
from .errors import ApiError
from .guard import Guard
from .jobs import Event, Job
from .pictures import fetch_picture, read_mask, read_picture
from .protocol import (
    ChatRequest,
    EditRequest,
    ImageRequest,
    PictureOptions,
    ResponseRequest,
    TextRequest,
    ToolChoice,
    parse,
)
from .protocol import Request as AnyBody
from .settings import ServingSettings

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """What runs jobs and keeps conversations."""

    def run(self, job: Job) -> AsyncIterator[Event]: ...
    async def status(self) -> dict[str, Any]: ...
    async def metrics(self) -> str: ...
    async def put(self, name: str, transcript: Transcript) -> None: ...
    async def get(self, name: str) -> Transcript: ...


def build_app(settings: ServingSettings, backend: Backend) -> FastAPI:
    """The application of a server."""
    app = FastAPI(title="transformers-nextflow", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, settings=settings)
    api = _Api(settings, backend)
    routes: dict[str, Callable[..., Any]] = {
        "/v1/images/generations": api.generate_images,
        "/v1/images/edits": api.edit_images,
        "/v1/chat/completions": api.complete_chat,
        "/v1/responses": api.respond,
    }
    for path, endpoint in routes.items():
        app.add_api_route(path, endpoint, methods=["POST"], response_model=None)
    routes = {
        "/v1/models": api.list_models,
        "/v1/models/{name:path}": api.show_model,
        "/health": api.show_health,
        "/metrics": api.show_metrics,
    }
    for path, endpoint in routes.items():
        app.add_api_route(path, endpoint, methods=["GET"], response_model=None)

    @app.exception_handler(ApiError)
    async def tell(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def tell_http(request: Request, error: HTTPException) -> JSONResponse:
        message = {404: f"There is no {request.url.path:.200}.", 405: f"{request.method} is not for this path."}
        return await tell(request, ApiError(message.get(error.status_code, str(error.detail)), error.status_code))

    @app.exception_handler(Exception)
    async def tell_bug(request: Request, error: Exception) -> JSONResponse:
        return await tell(request, ApiError("The server failed at this request; its log says how.", 500))

    return app


class _Api:
    """The endpoints."""

    def __init__(self, settings: ServingSettings, backend: Backend):
        self.settings, self.backend, self.started = settings, backend, int(time.time())
        self.model_name = settings.model_name

    # Models, health

    async def list_models(self) -> Piece:
        names = [self.model_name, *(f"{self.model_name}:{adapter}" for adapter in self.settings.adapter_folders)]
        return {"object": "list", "data": [self._model(name) for name in names]}

    async def show_model(self, name: str) -> Piece:
        self._adapter(name)
        return self._model(name)

    def _model(self, name: str) -> Piece:
        return {"id": name, "object": "model", "created": self.started, "owned_by": "transformers-nextflow"}

    async def show_health(self) -> Piece:
        """Says no more than that, since it needs no key."""
        await self.backend.status()
        return {"status": "ok"}

    async def show_metrics(self) -> PlainTextResponse:
        return PlainTextResponse(await self.backend.metrics(), media_type="text/plain; version=0.0.4")

    # Pictures

    async def generate_images(self, request: Request) -> Any:
        body = parse(ImageRequest, await _json(request))
        return await self._images(body, (), "image_generation")

    async def edit_images(self, request: Request) -> Any:
        if "multipart/form-data" not in request.headers.get("content-type", ""):
            raise ApiError("This request must be a form: `Content-Type: multipart/form-data`.")
        limit = self.settings.max_images
        async with request.form(max_files=limit + 2, max_fields=64, max_part_size=2**20) as form:
            fields: dict[str, str] = {}
            files: dict[str, list[bytes]] = {"image": [], "mask": []}
            for name, value in form.multi_items():
                if (kind := name.removesuffix("[]")) in files and name != "mask[]":
                    if not isinstance(value, UploadFile):
                        raise ApiError(f"`{kind}` must be a file.", param=kind)
                    files[kind].append(await value.read())
                elif not isinstance(value, str) or name in fields:
                    raise ApiError(f"`{name:.80}` must be one field of text.", param=name[:80])
                else:
                    fields[name] = value
        body = parse(EditRequest, fields, from_form=True)
        images, masks = files.values()
        if not 1 <= len(images) <= limit:
            raise ApiError(f"An edit takes 1 to {limit} files `image`, but got {len(images)}.", param="image")
        if masks and max(len(masks), len(images)) > 1:
            raise ApiError(
                f"`mask` is one file for one `image`, but got {len(masks)} for {len(images)}: leave it out, or send "
                "one of each.",
                param="mask",
            )
        if body.image_in_prompt is not None and not masks:
            raise ApiError("`image_in_prompt` is for edits with a `mask`.", param="image_in_prompt")
        pictures = [await run_in_threadpool(read_picture, data, self.settings, "image") for data in images]
        kept = {}
        if masks:
            mask = await run_in_threadpool(read_mask, masks[0], self.settings)
            kept = {"mask": mask, "image_in_prompt": bool(body.image_in_prompt)}
        return await self._images(body, pictures, "image_edit", **kept)

    async def _images(self, body: ImageRequest, pictures: Sequence[Any], kind: str, **kept: Any) -> Any:
        number = body.n or 1
        if number > self.settings.max_images:
            raise ApiError(f"`n` can be at most {self.settings.max_images}, but got {number}.", param="n")
        if body.stream and number > 1:
            raise ApiError("A stream shows one picture: leave `n` or `stream` out.", param="n")
        if body.partial_images is not None and not body.stream:
            raise ApiError("`partial_images` are for streams: set `stream`, or leave them out.", param="partial_images")
        self._check_texts([body.prompt, body.negative_prompt or ""], "prompt")
        first = _seed(body)
        jobs = [
            Job(
                prompt=body.prompt,
                pictures=tuple(pictures),
                options=body.image_options | _size(body.size),
                negative_prompt=body.negative_prompt,
                seed=(first + number) % 2**63,
                previews=body.partial_images or 0,
                adapter=self._adapter(body.model),
                **kept,
            )
            for number in range(number)
        ]
        answer = ImageAnswer(kind, body, [job.seed for job in jobs])
        if body.stream:
            return await self._stream(jobs[0], answer.pieces)
        rows = await _together([self._events(job) for job in jobs])
        drawn = [next(event.value for event in events if event.kind == "image") for events in rows]
        return await run_in_threadpool(answer.whole, drawn, [events[-1].value for events in rows])

    # Chats

    async def complete_chat(self, request: Request) -> Any:
        body = parse(ChatRequest, await _json(request))
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise ApiError("Pass `max_completion_tokens` or `max_tokens`, not both.", param="max_tokens")
        if body.stream_options is not None and not body.stream:
            raise ApiError("`stream_options` are for streams.", param="stream_options")
        messages, texts, urls = [], [], 0
        for place, message in enumerate(body.messages):
            parts: Any = message.content
            if not isinstance(message.content, str):
                parts = []
                for number, part in enumerate(message.content):
                    param = f"messages.{place}.content.{number}"
                    url = part.image_url.url if part.image_url else None
                    urls += url is not None
                    parts.append(await self._part(part.type == "text", part.text, url, param, urls))
            texts += [parts] if isinstance(parts, str) else [part.get("text", "") for part in parts]
            messages.append({"role": {"developer": "system"}.get(message.role, message.role), "content": parts})
        if body.messages[-1].role == "assistant":
            raise ApiError("The last message is the assistant's already: end with one of the user.", param="messages")
        self._check_texts(texts, "messages")
        kinds = set(body.modalities or ("text", "image"))
        mode = "image" if kinds == {"image"} else "interleaved"
        max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        options = body.image_options | _size(body.size) | body.text_options(max_tokens)
        if body.stop:
            options["stop_strings"] = [body.stop] if isinstance(body.stop, str) else body.stop
        if body.thinking and mode != "image":
            raise ApiError('`thinking` comes before a picture: pass `modalities=["image"]` with it.', param="thinking")
        if body.thinking:
            options["thinking"] = True
        self._limit_images(options, mode, body, "image" in kinds)
        job = Job(
            mode=mode,
            messages=tuple(messages),
            options=options,
            seed=_seed(body),
            adapter=self._adapter(body.model),
        )
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        answer = ChatAnswer(body.model or self.model_name, include_usage)
        if body.stream:
            return await self._stream(job, answer.pieces, named=False)
        return await run_in_threadpool(answer.whole, await self._events(job))

    async def respond(self, request: Request) -> Any:
        body = parse(ResponseRequest, await _json(request))
        parts: Any = [{"type": "text", "text": body.input}]
        if not isinstance(body.input, str):
            content = body.input[0].content
            if isinstance(content, str):
                parts = [{"type": "text", "text": content}]
            else:
                parts = [
                    await self._part(
                        part.type == "input_text", part.text, part.image_url, f"input.0.content.{place}", place + 1
                    )
                    for place, part in enumerate(content)
                ]
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        self._check_texts([text], "input")
        tool = body.tools[0] if body.tools else None
        must = isinstance(body.tool_choice, ToolChoice) or body.tool_choice == "required"
        if must and tool is None:
            raise ApiError("`tool_choice` asks for a picture: add the tool `image_generation`.", param="tool_choice")
        if tool is not None and tool.partial_images is not None and not body.stream:
            raise ApiError("`partial_images` are for streams: set `stream`, or leave them out.", param="tools")
        may = tool is not None and body.tool_choice != "none"
        mode = "image" if must else "interleaved"
        options = body.image_options | _size(tool.size if tool else None)
        options |= body.text_options(body.max_output_tokens)
        self._limit_images(options, mode, body, may)
        name, previous = new_id("resp"), body.previous_response_id
        answer = ResponseAnswer(name, body.model or self.model_name, previous, tool or PictureOptions())
        job = Job(
            mode=mode,
            prompt=text,
            pictures=tuple(part["image"] for part in parts if part["type"] == "image"),
            in_conversation=True,
            previous=previous,
            transcript=None if previous is None else await self.backend.get(previous),
            answer="" if body.store is False else name,
            options=options,
            seed=_seed(body),
            previews=(tool.partial_images or 0) if tool else 0,
            adapter=self._adapter(body.model),
        )
        if body.stream:
            return await self._stream(job, answer.pieces)
        return await run_in_threadpool(answer.whole, await self._events(job))

    async def _part(self, is_text: bool, text: str | None, url: str | None, param: str, count: int) -> Piece:
        """A part of a message, its picture opened."""
        if is_text and text is not None and url is None:
            return {"type": "text", "text": text}
        if is_text or text is not None or url is None:
            raise ApiError(f"`{param}` must have what its `type` says, a text or an `image_url`.", param=param)
        if count > self.settings.max_images:
            raise ApiError(f"A request can have at most {self.settings.max_images} pictures.", param=param)
        return {"type": "image", "image": await run_in_threadpool(fetch_picture, url, self.settings, param)}

    def _limit_images(self, options: Piece, mode: str, body: TextRequest, may_draw: bool) -> None:
        """How many pictures an answer may have."""
        limit, asked = self.settings.max_images, body.max_new_images
        if mode == "image" and asked is not None:
            raise ApiError("`max_new_images` is for answers of text and pictures.", param="max_new_images")
        if asked is not None and asked > limit:
            raise ApiError(f"`max_new_images` can be at most {limit}, but got {asked}.", param="max_new_images")
        if asked and not may_draw:
            raise ApiError("`max_new_images` needs an answer that may draw.", param="max_new_images")
        if mode == "interleaved" and not may_draw:
            options["max_new_images"] = 0
        elif asked is not None:
            options["max_new_images"] = asked

    # What they have in common

    def _adapter(self, model: str | None) -> str | None:
        """The adapter in the name of a model."""
        if model in (None, self.model_name):
            return None
        adapter = (model or "").removeprefix(f"{self.model_name}:")
        if adapter == model or adapter not in self.settings.adapter_folders:
            raise ApiError(
                f'There is no model "{model:.80}"; GET /v1/models lists them.', 404, "model", "model_not_found"
            )
        return adapter

    def _check_texts(self, texts: Sequence[str], param: str) -> None:
        total, limit = sum(map(len, texts)), self.settings.max_prompt_chars
        if total > limit:
            raise ApiError(f"The text has {total} characters; at most {limit} are read.", param=param)

    async def _run(self, job: Job) -> AsyncIterator[Event]:
        """The events of a job, within the time that a request may take."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.settings.request_seconds
        events = self.backend.run(job)
        try:
            while True:
                try:
                    event = await asyncio.wait_for(anext(events), max(0, deadline - clock()))
                except StopAsyncIteration:
                    return
                except asyncio.TimeoutError as error:
                    seconds = self.settings.request_seconds
                    raise ApiError(f"It took longer than {seconds:g} seconds.", 504, code="timeout") from error
                if event.kind == "done" and job.answer:
                    await self.backend.put(job.answer, event.value.transcript)
                yield event
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    async def _events(self, job: Job) -> list[Event]:
        return [event async for event in self._run(job)]

    async def _stream(
        self, job: Job, pieces: Callable[[list[Event]], list[Piece]], named: bool = True
    ) -> StreamingResponse:
        """Server-sent events. A request that is wrong has a status of its own: they begin when it is accepted."""
        events = self._run(job)
        known = [await anext(events)]

        async def send() -> AsyncIterator[str]:
            try:
                for piece in await run_in_threadpool(pieces, known):
                    yield sse(piece, named)
                async for event in events:
                    known.append(event)
                    for piece in await run_in_threadpool(pieces, known):
                        yield sse(piece, named)
                if not named:
                    yield "data: [DONE]\n\n"
            except Exception as error:
                if not isinstance(error, ApiError):
                    logger.exception("A stream failed")
                    error = ApiError("The server failed at this request; its log says how.", 500)
                yield sse({**error.body["error"], **error.body, "type": "error"})
            finally:
                await events.aclose()  # type: ignore[attr-defined]

        return StreamingResponse(send(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _json(request: Request) -> Any:
    """The body of a request."""
    if "application/json" not in request.headers.get("content-type", ""):
        raise ApiError("The body must be JSON: `Content-Type: application/json`.")
    try:
        return json.loads(await request.body(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"The body of the request is no JSON: {str(error)[:200]}.") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _size(size: str | None) -> dict[str, int]:
    """Options of `generate` for "WIDTHxHEIGHT"."""
    if size in (None, "auto"):
        return {}
    width, _, height = str(size).partition("x")
    return {"height": int(height), "width": int(width)}


def _seed(body: AnyBody) -> int:
    return random.randrange(2**31) if body.seed is None else body.seed


async def _together(work: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """The results of all; if one fails, the others end."""
    tasks = [asyncio.ensure_future(part) for part in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


__all__ = ["Backend", "build_app"]
