"""Events as answers of OpenAI's API, whole or in pieces."""

import copy
import json
import time
import uuid
from typing import Any

from .jobs import Event, Outcome
from .pictures import write_picture
from .protocol import PictureOptions

Piece = dict[str, Any]


def new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def sse(piece: Piece, named: bool = True) -> str:
    """A server-sent event."""
    name = f"event: {piece['type']}\n" if named else ""
    return f"{name}data: {json.dumps(piece, separators=(',', ':'))}\n\n"


def image_usage(outcomes: list[Outcome]) -> Piece:
    text, images = sum(o.text_in for o in outcomes), sum(o.images_in for o in outcomes)
    written, drawn = sum(o.text_out for o in outcomes), sum(o.images_out for o in outcomes)
    return {
        "input_tokens": text + images,
        "input_tokens_details": {"text_tokens": text, "image_tokens": images},
        "output_tokens": written + drawn,
        "output_tokens_details": {"text_tokens": written, "image_tokens": drawn},
        "total_tokens": text + images + written + drawn,
    }


def _look(options: PictureOptions, picture: Any) -> Piece:
    """What is said of a picture besides itself."""
    return {
        "size": f"{picture.width}x{picture.height}",
        "quality": "auto",
        "background": "opaque",
        "output_format": options.kind,
    }


class ImageAnswer:
    """Pictures of one request, `kind` being "image_generation" or "image_edit"."""

    def __init__(self, kind: str, options: PictureOptions, seeds: list[int]):
        self.kind, self.options, self.seeds, self.created = kind, options, seeds, int(time.time())

    def _write(self, picture: Any) -> str:
        return write_picture(picture, self.options.kind, self.options.output_compression)

    def whole(self, pictures: list[Any], outcomes: list[Outcome]) -> Piece:
        """`seed` in `data`, which OpenAI does not have, draws that picture again."""
        data = [{"b64_json": self._write(p), "seed": seed} for p, seed in zip(pictures, self.seeds, strict=True)]
        look = _look(self.options, pictures[0])
        del look["quality"]
        return {"created": self.created, "data": data, **look, "usage": image_usage(outcomes)}

    def pieces(self, events: list[Event]) -> list[Piece]:
        """What is sent after these events of a single picture, all so far."""
        event = events[-1]
        if event.kind == "preview":
            index = sum(known.kind == "preview" for known in events) - 1
            return [self._piece("partial_image", event.value) | {"partial_image_index": index}]
        if event.kind == "done":
            picture = next(known.value for known in events if known.kind == "image")
            return [self._piece("completed", picture) | {"usage": image_usage([event.value]), "seed": self.seeds[0]}]
        return []

    def _piece(self, name: str, picture: Any) -> Piece:
        look = {"created_at": self.created, **_look(self.options, picture)}
        return {"type": f"{self.kind}.{name}", "b64_json": self._write(picture), **look}


def data_uri(picture: Any) -> str:
    return f"data:image/png;base64,{write_picture(picture)}"


class ChatAnswer:
    """A chat completion. Its content is a text, or a list of parts where there are pictures."""

    def __init__(self, model: str, include_usage: bool = False):
        self.id, self.created = new_id("chatcmpl"), int(time.time())
        self.model, self.include_usage = model, include_usage

    def _of(self, kind: str, **fields: Any) -> Piece:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, **fields}

    @staticmethod
    def _usage(outcome: Outcome) -> Piece:
        read, written = outcome.text_in + outcome.images_in, outcome.text_out + outcome.images_out
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def whole(self, events: list[Event]) -> Piece:
        parts: list[Piece] = []
        thought, outcome = "", Outcome()
        for event in events:
            if event.kind == "text" and parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += event.value
            elif event.kind == "text":
                parts.append({"type": "text", "text": event.value})
            elif event.kind == "image":
                parts.append({"type": "image_url", "image_url": {"url": data_uri(event.value)}})
            elif event.kind == "thought":
                thought += event.value
            elif event.kind == "done":
                outcome = event.value
        content: Any = parts
        if all(part["type"] == "text" for part in parts):
            content = "".join(part["text"] for part in parts).strip()
        message = {"role": "assistant", "content": content, "refusal": None}
        if thought:
            message["reasoning_content"] = thought.strip()
        choice = {"index": 0, "message": message, "finish_reason": outcome.finish_reason, "logprobs": None}
        return self._of("chat.completion", choices=[choice], usage=self._usage(outcome))

    def pieces(self, events: list[Event]) -> list[Piece]:
        event = events[-1]
        if event.kind == "done":
            last = [self._chunk({}, event.value.finish_reason)]
            if self.include_usage:
                last.append(self._of("chat.completion.chunk", choices=[], usage=self._usage(event.value)))
            return last
        deltas: dict[str, Any] = {
            "accepted": lambda value: {"role": "assistant", "content": ""},
            "text": lambda value: {"content": value},
            "thought": lambda value: {"reasoning_content": value},
            "image": lambda value: {"content": [{"type": "image_url", "image_url": {"url": data_uri(value)}}]},
        }
        return [self._chunk(deltas[event.kind](event.value))] if event.kind in deltas else []

    def _chunk(self, delta: Piece, finish_reason: str | None = None) -> Piece:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return self._of("chat.completion.chunk", choices=[choice])


class ResponseAnswer:
    """An answer of the responses API: texts are messages, pictures are calls of the tool `image_generation`."""

    def __init__(self, id: str, model: str, previous: str | None, options: PictureOptions):
        self.options = options
        self.output: list[Piece] = []
        self.response = {
            "id": id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "model": model,
            "output": self.output,
            "previous_response_id": previous,
            "parallel_tool_calls": False,
            "tool_choice": "auto",
            "tools": [],
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "usage": None,
        }
        self._number = 0

    def whole(self, events: list[Event]) -> Piece:
        for count in range(1, len(events) + 1):
            self.pieces(events[:count])
        return self.response

    def pieces(self, events: list[Event]) -> list[Piece]:
        event = events[-1]
        told: list[tuple[str, Piece]] = []
        if event.kind == "accepted":
            told = [(f"response.{name}", {"response": dict(self.response)}) for name in ("created", "in_progress")]
        elif event.kind == "text":
            told = self._text(event.value)
        elif event.kind in ("preview", "image"):
            told = [*self._close(), *self._picture(event)]
        elif event.kind == "done":
            told = self._close()
            self._complete(event.value)
            name = "completed" if self.response["status"] == "completed" else "incomplete"
            told.append((f"response.{name}", {"response": self.response}))
        pieces = []
        for kind, fields in told:
            pieces.append({"type": kind, "sequence_number": self._number, **fields})
            self._number += 1
        return pieces

    def _open(self, kind: str) -> Piece | None:
        """The item that is being written, if it is of a kind."""
        item = self.output[-1] if self.output else None
        return item if item is not None and item["type"] == kind and item["status"] != "completed" else None

    def _add(self, item: Piece) -> tuple[str, Piece]:
        self.output.append(item)
        return "response.output_item.added", {
            "output_index": len(self.output) - 1,
            "item": copy.deepcopy(item),
        }

    def _text(self, text: str) -> list[tuple[str, Piece]]:
        told: list[tuple[str, Piece]] = []
        item = self._open("message")
        if item is None:
            part = {"type": "output_text", "text": "", "annotations": []}
            item = {"type": "message", "id": new_id("msg"), "status": "in_progress", "role": "assistant"}
            told.append(self._add(item | {"content": []}))
            item = self.output[-1]
            told.append(("response.content_part.added", {**self._place(item), "part": dict(part)}))
            item["content"].append(part)
        item["content"][0]["text"] += text
        return [*told, ("response.output_text.delta", {**self._place(item), "delta": text, "logprobs": []})]

    def _place(self, item: Piece) -> Piece:
        return {"item_id": item["id"], "output_index": len(self.output) - 1, "content_index": 0}

    def _close(self) -> list[tuple[str, Piece]]:
        """Ends a message that is being written."""
        item = self._open("message")
        if item is None:
            return []
        item["status"] = "completed"
        part = item["content"][0]
        place = self._place(item)
        return [
            ("response.output_text.done", {**place, "text": part["text"], "logprobs": []}),
            ("response.content_part.done", {**place, "part": part}),
            ("response.output_item.done", {"output_index": place["output_index"], "item": item}),
        ]

    def _picture(self, event: Event) -> list[tuple[str, Piece]]:
        told: list[tuple[str, Piece]] = []
        call = "response.image_generation_call"
        item = self._open("image_generation_call")
        if item is None:
            item = {"type": "image_generation_call", "id": new_id("ig"), "status": "in_progress", "result": None}
            told.append(self._add(item))
            item["previews"] = 0
            place = {"item_id": item["id"], "output_index": len(self.output) - 1}
            told += [(f"{call}.in_progress", place), (f"{call}.generating", place)]
        place = {"item_id": item["id"], "output_index": len(self.output) - 1}
        picture = write_picture(event.value, self.options.kind, self.options.output_compression)
        look = _look(self.options, event.value)
        if event.kind == "preview":
            index = item["previews"]
            item["previews"] += 1
            piece = {**place, "partial_image_index": index, "partial_image_b64": picture, **look}
            return [*told, (f"{call}.partial_image", piece)]
        del item["previews"]
        item |= {"status": "completed", "result": picture, **look}
        done = ("response.output_item.done", {"output_index": place["output_index"], "item": item})
        return [*told, (f"{call}.completed", place), done]

    def _complete(self, outcome: Outcome) -> None:
        read, written = outcome.text_in + outcome.images_in, outcome.text_out + outcome.images_out
        self.response["status"] = "completed" if outcome.finish_reason == "stop" else "incomplete"
        if outcome.finish_reason != "stop":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self.response["usage"] = {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read + written,
        }


__all__ = ["ChatAnswer", "ImageAnswer", "ResponseAnswer", "image_usage", "new_id", "sse"]
