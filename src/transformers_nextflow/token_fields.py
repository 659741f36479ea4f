"""A tokenizer's fields (ids, mask, offsets) of texts: made, filled with pictures, cut and padded.

A field holds a list for each text, with an item for each token.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from .chat_template import BREAK


def name_text(kind: str, number: int, texts: Sequence[Any]) -> str:
    """What a message calls a text: "Prompt 3" of a few, "The prompt" where it is alone."""
    return f"{kind.capitalize()} {number}" if len(texts) > 1 else f"The {kind}"


def tokenize(tokenizer: Any, texts: Sequence[str], kind: str = "text", **options) -> dict[str, list[Any]]:
    """The tokenizer's fields of texts; what is broken up by [`BREAK`] is text."""
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name_text(kind, number, texts)} holds a lone surrogate ({text[error.start]!r} at {error.start}), "
                "which is no character. Decode it rightly, or replace what is broken."
            ) from None
    pieces = [text.split(BREAK) for text in texts]
    # Not verbose: it would warn of errors that long texts don't bring here.
    encoded = tokenizer(list(chain(*pieces)), **{"verbose": False, **options})
    if len(pieces) == sum(map(len, pieces)):
        return dict(encoded)
    fields: dict[str, list[Any]] = {name: [] for name in encoded}
    for name, values in fields.items():
        remaining = iter(encoded[name])
        for row in pieces:
            start, joined = 0, []
            for piece in row:
                items = next(remaining)
                if name == "offset_mapping":
                    items = [(start + first, start + last) for first, last in items]
                joined += items
                start += len(piece) + len(BREAK)
            values.append(joined)
    return fields


def expand_marks(
    encoded: Mapping[str, Any],
    codes: Iterable[list[int]],
    image_token_id: int,
    start_ids: Sequence[int],
    end_ids: Sequence[int] = (),
) -> dict[str, list[list[Any]]]:
    """The tokenizer's fields with every mark replaced by the ids of an image, between those that open and close it."""
    remaining = iter(codes)
    fields: dict[str, list[list[Any]]] = {name: [] for name in encoded}
    for row, ids in enumerate(encoded["input_ids"]):
        spans = [[*start_ids, *next(remaining), *end_ids] if token == image_token_id else [token] for token in ids]
        for name in fields:
            values = encoded[name][row]
            spread = ([value] * len(span) for value, span in zip(values, spans, strict=True))
            fields[name].append([item for span in (spans if name == "input_ids" else spread) for item in span])
    return fields


def truncate(fields: dict[str, list[list[Any]]], max_length: int | None, num_marks: list[int], side: str) -> None:
    """Cuts texts to a length on a side; a picture is never cut."""
    if max_length is None:
        return
    if not isinstance(max_length, int) or max_length < 1:
        raise ValueError(f"`max_length` must be a whole number of at least 1, but got {max_length!r}.")
    for row, ids in enumerate(fields["input_ids"]):
        if len(ids) <= max_length:
            continue
        if num_marks[row]:
            raise ValueError(
                f"Text {row} takes {len(ids)} tokens with its pictures, more than `max_length` ({max_length}), and "
                "a picture can't be cut. Raise `max_length`, turn `truncation` off or use fewer `num_scales`."
            )
        kept = slice(max_length) if side == "right" else slice(-max_length, None)
        for rows in fields.values():
            rows[row] = rows[row][kept]


def pad(tokenizer: Any, fields: dict[str, list[list[Any]]], **padding) -> dict[str, Any]:
    """Pads as the tokenizer does; it knows its own fields, the others follow."""
    own = ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask")
    batch = dict(tokenizer.pad({name: fields[name] for name in own if name in fields}, **padding))
    left = padding.get("padding_side", tokenizer.padding_side) == "left"
    for name in fields.keys() - batch.keys():
        filler = -100 if name == "labels" else (0, 0)
        batch[name] = []
        for values, padded in zip(fields[name], batch["input_ids"], strict=True):
            fill = [filler] * (len(padded) - len(values))
            batch[name].append(fill + values if left else values + fill)
    return batch


def to_rows(token_ids: Any) -> tuple[list[list[int]], bool]:
    """Ids as a list of lists, and whether they came as a batch."""
    if token_ids is None:
        raise ValueError("There are no ids to decode, but None.")
    rows = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
    if isinstance(rows, int):
        return [[rows]], False
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
    if any(token < 0 for ids in rows for token in (ids if isinstance(ids, list | tuple) else [ids])):
        raise ValueError("Ids must not be negative. (Labels have -100 where nothing is learned: leave those out.)")
    is_batch = bool(rows) and not isinstance(rows[0], int)
    return (rows if is_batch else [rows]), is_batch


def id_of(tokenizer: Any, token: str) -> int:
    """The id of a special token; a `ValueError` if the tokenizer does not know it."""
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id is None or token_id == tokenizer.unk_token_id:
        raise ValueError(
            f"The tokenizer does not know `{token}`. NextFlow's tokenizers have `<boi>`, `<eoi>` and `<image>` after "
            "Qwen's own tokens; `conversion/qwen_tokenizer.py` makes one."
        )
    return token_id
