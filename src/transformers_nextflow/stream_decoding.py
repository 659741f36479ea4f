"""Streams of a model's output as text and pictures."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from PIL import Image

from .decoding import GenerationEvent


class StreamChunk(NamedTuple):
    """A piece of a stream.

    Args:
        kind (`str`): `"text"`, `"preview"` or `"image"`.
        value (`str` or `PIL.Image.Image`): The piece.
        row (`int`): Which row of the batch.
        step (`int`, *optional*): The scale of a preview, from 0.
    """

    kind: str
    value: str | Image.Image
    row: int = 0
    step: int | None = None


def decode_stream(processor: Any, events: Iterable[GenerationEvent], previews: bool = True) -> Iterator[StreamChunk]:
    """See [`~NextFlowProcessor.decode_stream`]."""
    written: dict[int, list[int]] = {}
    shown: dict[int, str] = {}

    def new_text(row: int, whole: bool) -> Iterator[StreamChunk]:
        text = processor.tokenizer.decode(written.get(row, []), skip_special_tokens=True)
        known = shown.get(row, "")
        # A character may take several tokens.
        if len(text) > len(known) and (whole or not text.endswith("\ufffd")):
            shown[row] = text
            yield StreamChunk("text", text[len(known) :], row)

    for event in events:
        row = event.row
        if event.kind == "token":
            written.setdefault(row, []).append(int(event.ids))
            yield from new_text(row, whole=False)
            continue
        yield from new_text(row, whole=True)
        written.pop(row, None)
        shown.pop(row, None)
        last = event.kind == "scale" and event.step == event.schedule.num_scales - 1
        if event.kind == "image" or (previews and not last):
            picture = processor.decode_codes([event.ids], [event.schedule.grid_shw])[0]
            yield StreamChunk("image" if event.kind == "image" else "preview", picture, row, event.step)
    for row in list(written):
        yield from new_text(row, whole=True)
