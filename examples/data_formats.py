"""Public data sets as they are published: rows of their files, and the conversation that a row is.

Tars of pairs (LAION, CC12M: `.jpg`, `.txt`, `.json`) and of clips, parquet with pictures in bytes, conversations of
LLaVA's kind, pairs of edits (InstructPix2Pix, MagicBrush), documents of OBELICS's and OmniCorpus's kind (`texts` and
`images` side by side) and of MMC4's (`text_list` and `image_info`). Files are read in order, local or through fsspec.
"""

import glob
import io
import json
import os
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow.parquet as pq
from PIL import Image

from transformers_nextflow import picture_sources
from transformers_nextflow.trainer.data_list import FILE_FORMATS, KINDS, DataSource
from video_clips import choose_frames

Row = dict[str, Any]
Message = dict[str, Any]

BROKEN = "__broken__"  # what a row has in place of columns if it can't be read
PEEK = 16  # rows that columns are looked for in
PICTURES = {"jpg", "jpeg", "png", "webp", "avif", "bmp", "gif", "tif", "tiff", "jp2", "ppm"}  # ends of names
CLIPS = {"mp4", "webm", "mkv", "avi", "mov"}
# Where the parts of a kind usually are; what comes first wins.
USUAL = {
    "text": ("text", "caption", "txt", "json.caption"),
    "source": ("source", "source_image", "source_img", "original_image", "input_image"),
    "instruction": ("instruction", "edit_prompt", "edit_instruction", "edit"),
    "target": ("target", "target_image", "target_img", "edited_image", "edited_img", "output_image"),
    "texts": ("texts", "text_list"),
    "images": ("images", "image_info", "image"),
    "messages": ("messages", "conversations"),
}
ROLES = {"human": "user", "gpt": "assistant"}  # of LLaVA's conversations


# Files


def is_local(path: str) -> bool:
    """Whether it is on this machine, where looking at it costs nothing."""
    return "://" not in path


def list_units(source: DataSource) -> list[str]:
    """What a source is read by: its files, or the shards that `datasets` has of it."""
    if source.format not in FILE_FORMATS:
        rows = load_with_datasets(source.format, source.data, source.split, source.streaming)
        return [str(index) for index in range(rows.num_shards if source.streaming else 1)]
    system, pattern = fsspec.url_to_fs(source.data)
    if system.isdir(pattern):
        pattern = pattern.rstrip("/") + "/**"
    found = sorted(path for path in system.glob(pattern) if not system.isdir(path))
    if not found:
        raise ValueError(f"There are no files {source.data}.")
    return found if is_local(source.data) else [system.unstrip_protocol(path) for path in found]


def describe_files(source: DataSource) -> list[tuple[Any, ...]]:
    """What tells the files of a source from others of the same names, without reading them."""
    if source.format in FILE_FORMATS:
        paths = list_units(source)
    else:
        data = source.data or ""
        paths = [str(path) for path in Path(data).rglob("*")] if data and Path(data).is_dir() else glob.glob(data)
        if not paths and not source.streaming:  # of the Hub
            return [(load_with_datasets(source.format, source.data, source.split, False)._fingerprint,)]
    if source.pictures:
        paths += [str(path) for path in Path(source.pictures).rglob("*")]
    described: list[tuple[Any, ...]] = []
    for path in sorted(paths):
        if is_local(path):
            stat = os.stat(path)
            described += [(path, stat.st_size, stat.st_mtime_ns)] if os.path.isfile(path) else []
        else:
            system, inner = fsspec.url_to_fs(path)
            info = system.info(inner)
            described.append((path, *(str(info.get(name)) for name in ("size", "ETag", "blob_id", "mtime", "created"))))
    return described


def read_rows(source: DataSource, unit: str, start: int = 0) -> Iterator[Row]:
    """Rows of a file, from one on; the rows before are passed over and not decoded.

    A file that breaks off ends with a row that says so.

    Raises:
        `ValueError`: if what is not on this machine breaks off: another try may do better.
    """
    try:
        if source.format in FILE_FORMATS:
            yield from {"webdataset": read_tar, "parquet": read_parquet, "json": read_json}[source.format](unit, start)
        else:
            rows = load_with_datasets(source.format, source.data, source.split, source.streaming)
            if not source.streaming:
                yield from (rows[index] for index in range(start, len(rows)))
                return
            shard = rows.shard(num_shards=rows.num_shards, index=int(unit))
            yield from shard.skip(start) if start else shard
    except Exception as error:  # whatever a reader throws at a broken file
        if source.streaming or not is_local(unit):
            raise ValueError(f"{unit} of {source.data or source.format} broke off: {error}. Run it again.") from error
        yield {BROKEN: f"{unit} can't be read on: {error}"}


def count_rows(source: DataSource, unit: str) -> int:
    """How many rows a local file has."""
    if source.format == "parquet":
        return pq.ParquetFile(unit).metadata.num_rows
    if source.format == "json":
        return len(read_documents(unit))
    if source.format == "webdataset":
        return sum(1 for _ in read_tar(unit, None))
    return len(load_with_datasets(source.format, source.data, source.split, False))


def read_tar(path: str, start: int | None = 0) -> Iterator[Row]:
    """Members that share a name up to its first dot, by the rest of it, in bytes; with None the keys alone."""
    index, row = -1, Row()
    with fsspec.open(path) as file, tarfile.open(fileobj=file) as archive:
        for member in archive:
            if not member.isfile():
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, end = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if key != row.get("__key__"):
                if index >= (start or 0):
                    yield row
                index, row = index + 1, {"__key__": key}
            if start is not None and index >= start:
                row[end.lower()] = archive.extractfile(member).read()
        if index >= (start or 0):
            yield row


def read_parquet(path: str, start: int = 0) -> Iterator[Row]:
    """Rows as Python has them; row groups before `start` are not read."""
    with fsspec.open(path) as file:
        table = pq.ParquetFile(file)
        for group in range(table.num_row_groups):
            number = table.metadata.row_group(group).num_rows
            if start < number:
                for batch in table.iter_batches(64, row_groups=[group]):
                    yield from batch.slice(min(start, len(batch))).to_pylist()
                    start = max(0, start - len(batch))
            else:
                start -= number


def read_json(path: str, start: int = 0) -> Iterator[Row]:
    """Documents of a list, or of lines; a line that is none is a row that says so."""
    for document in read_documents(path)[start:]:
        try:
            row = json.loads(document) if isinstance(document, str) else document
            yield row if isinstance(row, dict) else {BROKEN: "The document is no object."}
        except ValueError as error:
            yield {BROKEN: f"The line is no JSON: {error}"}


@lru_cache(maxsize=1)
def read_documents(path: str) -> list[Any]:
    """The documents of a JSON file, unpacked if it is packed; lines are not parsed yet."""
    with fsspec.open(path, "rt", encoding="utf-8", compression="infer") as file:
        text = file.read()
    return json.loads(text) if text.lstrip()[:1] == "[" else [line for line in text.split("\n") if line.strip()]


@lru_cache(maxsize=8)
def load_with_datasets(name: str, data: str | None, split: str, streaming: bool) -> Any:
    """A builder's or the Hub's data set with its pictures still in bytes: a broken one must not stop the others."""
    options: dict[str, Any] = {}
    if data and Path(data).is_dir():
        options["data_dir"] = data
    elif data:
        options["data_files"] = sorted(glob.glob(data)) or data
    rows = datasets.load_dataset(name, split=split, streaming=streaming, **options)
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image | datasets.Video):
            rows = rows.cast_column(column, type(feature)(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            rows = rows.cast_column(column, datasets.List(datasets.Image(decode=False)))
    if not streaming and not len(rows):
        raise ValueError(f'The split "{split}" of {data or name} has no rows.')
    return rows


# Columns


def lookup(row: Row, column: str) -> Any:
    """The value of a column, None if there is none; `json.caption` is a field of the column `json`."""
    if column in row or "." not in column:
        return row.get(column)
    outer, _, inner = column.partition(".")
    value = row.get(outer)
    if isinstance(value, bytes | str):
        value = json.loads(value)
    return lookup(value, inner) if isinstance(value, dict) else None


def holds(value: Any, name: str, ends: set[str]) -> bool:
    """Whether a column holds pictures (or clips), by the end of its name or by what it holds."""
    named = name.rpartition(".")[2].lower() in {*ends, "image" if ends is PICTURES else "video"}
    return named or isinstance(value, Image.Image) or (isinstance(value, dict) and value.keys() == {"bytes", "path"})


def find_columns(source: DataSource) -> dict[str, tuple[str, ...]]:
    """In which columns each part of the source's kind is, by its first rows.

    Raises:
        `ValueError`: for parts that no column has, and for files without rows.
    """
    rows = list(islice((row for unit in list_units(source) for row in read_rows(source, unit)), PEEK))
    whole = [row for row in rows if BROKEN not in row]
    if not whole:
        raise ValueError(rows[0][BROKEN] if rows else f"{source.data or source.format} has no rows.")
    names = list(dict.fromkeys(name for row in whole for name in row))

    def is_there(column: str) -> bool:
        return column in names or any(lookup(row, column) is not None for row in whole)

    def among(part: str) -> tuple[str, ...]:
        if part in source.columns:
            named = source.columns[part]
            return (named,) if isinstance(named, str) else named
        if part in USUAL:
            return next(((name,) for name in USUAL[part] if is_there(name)), ())
        ends = CLIPS if part == "video" else PICTURES
        return tuple(name for name in names if any(holds(row.get(name), name, ends) for row in whole))

    own = KINDS[source.kind]
    whole_kind = source.kind == "video" or all(any(map(is_there, among(part))) for part in own)
    talks = "messages" in source.columns or not (whole_kind or source.columns.keys() & {*own} or not among("messages"))
    parts = ("messages", "images") if talks else own
    columns = {part: among(part) for part in parts}
    optional = {"images"} if talks else {"image"} if source.lone_texts else set()
    missing = [
        ", ".join(found) or part
        for part, found in columns.items()
        if not any(map(is_there, found)) and (part not in optional or part in source.columns)
    ]
    if missing:
        raise ValueError(
            f"The data set has the columns {', '.join(names)}, but not {', '.join(missing)}. Name the columns of its "
            "parts: `columns` in a data list, or `--text-column`, `--image-column`, `--messages-column` and "
            "`--images-column`."
        )
    return columns


# Conversations


def open_picture(picture: Any, folder: str | None = None) -> Image.Image:
    """A picture of a data set: bytes, a name in a folder, a URL, a dictionary of these, or a picture already."""
    name = picture.get("path") if isinstance(picture, dict) else picture if isinstance(picture, str) else None
    try:
        if isinstance(picture, dict):
            picture = picture["path"] if picture.get("bytes") is None else picture["bytes"]
        if isinstance(picture, str):
            if not is_local(picture):
                return picture_sources.open_picture(picture)
            picture = os.path.join(folder or "", picture)
        if not isinstance(picture, Image.Image):
            picture = Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)
        picture.load()
        return picture  # as it is: the image processor knows what to do with transparency and 16 bits
    except Exception as error:  # whatever a decoder throws at a broken file
        raise ValueError(f'The picture "{name or "(no name)"}" can\'t be read: {error}') from error


def find_picture(row: Row, source: DataSource) -> Any:
    """The picture of a row, None if it has none."""
    named = source.columns.get("image", ())
    named = (named,) if isinstance(named, str) else named
    full = [
        name for name, value in row.items() if value is not None and (name in named or holds(value, name, PICTURES))
    ]
    ours = [name for name in full if name in named or not named]
    if len(ours) > 1:
        raise ValueError(f"The row has pictures in {', '.join(ours)}. Name one column with `--image-column`.")
    if full and not ours:
        raise ValueError(f"The row has no picture in {', '.join(named)}, but in {', '.join(full)}. Name that, too.")
    return row[ours[0]] if ours else None


def read_text(row: Row, column: str) -> str:
    text = lookup(row, column)
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'The row has no text in "{column}".')
    return text


def image_part(picture: Any, source: DataSource) -> dict[str, Any]:
    return {"type": "image", "image": open_picture(picture, source.pictures)}


def make_messages(
    row: Row, source: DataSource, columns: dict[str, tuple[str, ...]], caption_prompt: str = "", max_frames: int = 5
) -> list[Message]:
    """A row as a conversation with its pictures in place.

    Raises:
        `ValueError`: if a part is missing or can't be read, or a clip has no motion of its own.
    """
    if BROKEN in row:
        raise ValueError(row[BROKEN])
    if "messages" in columns:
        return read_talk(row, source, columns)
    if source.kind == "interleaved":
        return [{"role": "assistant", "content": read_document(row, source, columns)}]
    if source.kind == "editing":
        before, after = (image_part(row.get(columns[part][0]), source) for part in ("source", "target"))
        instruction = {"type": "text", "text": read_text(row, columns["instruction"][0])}
        return [{"role": "user", "content": [before, instruction]}, {"role": "assistant", "content": [after]}]
    text = read_text(row, columns["text"][0])
    if source.kind == "text":
        return [{"role": "assistant", "content": text}]
    if source.kind == "video":
        clip = next((row[name] for name in columns["video"] if row.get(name) is not None), None)
        frames = choose_frames(clip, source.pictures, max_frames, source.raft)
        return [
            {"role": "user", "content": text},
            {"role": "assistant", "content": [{"type": "image", "image": frame} for frame in frames]},
        ]
    picture = find_picture(row, source)
    if picture is None:
        if not source.lone_texts or source.format == "webdataset":
            raise ValueError(f"The row has no picture in {', '.join(columns['image'])}.")
        return [{"role": "assistant", "content": text}]
    image = [image_part(picture, source)]
    if source.kind == "image_to_text":
        prompt = [{"type": "text", "text": caption_prompt}] if caption_prompt else []
        return [{"role": "user", "content": [*image, *prompt]}, {"role": "assistant", "content": text}]
    return [{"role": "user", "content": text}, {"role": "assistant", "content": image}]


def read_talk(row: Row, source: DataSource, columns: dict[str, tuple[str, ...]]) -> list[Message]:
    """Messages of transformers' chat format or of LLaVA's; its pictures take the image parts and marks in order."""
    given = next((value for name in columns["images"] if (value := row.get(name)) is not None), [])
    pictures = iter(given if isinstance(given, list) else [given])
    messages = []
    for message in lookup(row, columns["messages"][0]) or ():
        if "from" in message:  # LLaVA sets its marks apart by line breaks
            role, content = (
                ROLES.get(message["from"], message["from"]),
                message["value"].replace("<image>\n", "<image>"),
            )
            content = content.replace("\n<image>", "<image>")
        else:
            role, content = message["role"], message["content"]
        if isinstance(content, str):
            texts = content.split("<image>")
            content = [part for text in texts for part in ({"type": "image"}, {"type": "text", "text": text})][1:]
        parts = []
        for part in content:
            if part["type"] == "image":
                picture = part.get("image") or next(pictures, None)
                if picture is None:
                    raise ValueError("The row has more image parts in its messages than pictures.")
                parts.append(image_part(picture, source))
            elif part["text"]:
                parts.append({"type": "text", "text": part["text"]})
        messages.append({"role": role, "content": parts})
    if next(pictures, None) is not None:
        raise ValueError("The row has more pictures than its messages have image parts.")
    return messages


def read_document(row: Row, source: DataSource, columns: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """Texts and pictures in turn: side by side with gaps (OBELICS, OmniCorpus), or pictures with the number of their
    sentence (MMC4), before which they stand."""
    texts, images = (lookup(row, columns[part][0]) or [] for part in ("texts", "images"))
    sentences = any(isinstance(image, dict) and "matched_text_index" in image for image in images)
    if sentences:
        places = [
            [image["image_name"] for image in images if image["matched_text_index"] == at] for at in range(len(texts))
        ]
    elif len(texts) == len(images):
        places = [[] if image is None else [image] for image in images]
    else:
        raise ValueError(
            f"The document has {len(texts)} texts and {len(images)} pictures, which must stand side by side."
        )
    parts: list[dict[str, Any]] = []
    for text, pictures in zip(texts, places, strict=True):
        for picture in pictures:
            try:
                parts.append(image_part(picture, source))
            except ValueError:
                if not source.skip_missing:
                    raise
        if text and parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += (" " if sentences else "\n\n") + text
        elif text:
            parts.append({"type": "text", "text": text})
    if not any(part["type"] == "image" for part in parts):
        raise ValueError("The document has no pictures.")
    return parts


def picture_size(row: Row, columns: dict[str, tuple[str, ...]], folder: str | None) -> tuple[int, int]:
    """Width and height of a row's first picture as its header has it, without decoding; (0, 0) if that is not told."""
    for name in (name for part, found in columns.items() if part != "video" for name in found):
        value = row.get(name)
        value = value[0] if isinstance(value, list) and value else value
        value = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
        try:
            if isinstance(value, bytes | str) and value:
                file = io.BytesIO(value) if isinstance(value, bytes) else os.path.join(folder or "", value)
                with Image.open(file) as picture:
                    return picture.size
        except Exception:  # said when it is encoded
            continue
    return 0, 0
