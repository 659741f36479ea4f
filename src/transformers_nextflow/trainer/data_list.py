"""Data lists: a YAML file that says what a model is trained on, which the extraction of codes and the training read.

    sources:
      photos: {kind: text_to_image, format: webdataset, data: "cc12m/*.tar", weight: 0.7}
      talk: {kind: image_to_text, format: json, data: llava.json, pictures: coco, weight: 0.3}

The extraction writes the codes of each source into a folder of its name and never looks at weights; the training mixes
the folders by weight ([`mix_coded_datasets`]). So another weight, or one source more, encodes nothing again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import Dataset, concatenate_datasets

# The kinds of samples, each with the parts that make one up. Every kind may be conversations instead (`messages`).
KINDS = {
    "text": ("text",),
    "text_to_image": ("image", "text"),
    "image_to_text": ("image", "text"),
    "editing": ("source", "instruction", "target"),
    "interleaved": ("texts", "images"),
    "video": ("video", "text"),
}
# Read file by file without a copy on disk; all others by `datasets`.
FILE_FORMATS = ("webdataset", "parquet", "json")


@dataclass(frozen=True)
class DataSource:
    """
    One source of a data list.

    Args:
        kind (`str`): What a sample is: one of `KINDS`.
        format (`str`):
            How it is stored: "webdataset" (tars), "parquet" or "json" (a list, or a document a line), each read file by
            file without a copy on disk; or what `datasets` loads: a builder ("imagefolder") or a data set of the Hub.
        data (`str`, *optional*):
            A pattern of files, or a folder; local, or a URL that fsspec knows. Of a data set of the Hub,
            which needs none, a pattern of its own files.
        columns (`dict`, *optional*):
            In which column each part of the kind is, where it is not found by its usual name. `json.caption` is the
            field `caption` of the column `json`. A picture may be in one of several columns, in a list.
        pictures (`str`, *optional*): Folder of pictures or clips that rows name.
        split (`str`, *optional*, defaults to `"train"`): Of a data set of the Hub.
        streaming (`bool`, *optional*, defaults to `False`): Read a data set of the Hub without a copy on disk.
        weight (`float`, *optional*): Its share of the samples that are trained on; all sources have one, or none.
        prompt_style (`str`, *optional*): "chat" or "bare" (see [`encode_messages`]).
        caption_prompt (`str`, *optional*): What stands after a picture that is to be described.
        num_scales (`int`, *optional*): Scales of its pictures.
        skip_missing (`bool`, *optional*, defaults to `False`):
            Leave pictures out of interleaved documents that can't be opened, instead of the document.
        lone_texts (`bool`, *optional*, defaults to `False`): Rows of pairs without a picture are texts, and not faulty.
        raft (`str`, *optional*): Weights of torchvision's RAFT (small), for the optical flow of clips.
    """

    kind: str
    format: str
    data: str | None = None
    columns: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    pictures: str | None = None
    split: str = "train"
    streaming: bool = False
    weight: float | None = None
    prompt_style: str | None = None
    caption_prompt: str | None = None
    num_scales: int | None = None
    skip_missing: bool = False
    lone_texts: bool = False
    raft: str | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, but got {self.kind!r}.")
        if self.format in FILE_FORMATS and not self.data:
            raise ValueError(f"`data` must name the files of the format {self.format}.")
        if unknown := sorted(set(self.columns) - {*KINDS[self.kind], "messages", "images"}):
            raise ValueError(
                f"`columns` of the kind {self.kind} are {', '.join(KINDS[self.kind])}, or messages and images, but got "
                f"{', '.join(unknown)}."
            )
        if self.prompt_style not in (None, "chat", "bare"):
            raise ValueError(f'`prompt_style` must be "chat" or "bare", but got {self.prompt_style!r}.')
        if self.streaming and self.format in FILE_FORMATS:
            raise ValueError(f"`streaming` is for what `datasets` loads; {self.format} is never copied to disk anyway.")
        if self.raft is not None and self.kind != "video":
            raise ValueError(f"`raft` is for the kind video, but this source is of the kind {self.kind}.")
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if self.weight is not None and not (number and 0 < self.weight <= 1):
            raise ValueError(f"`weight` must be a share, above 0 and at most 1, but got {self.weight!r}.")


def read_data_list(path: str | Path) -> dict[str, DataSource]:
    """The sources of a data list by name, checked; their local paths are taken from the list's own folder.

    Raises:
        `ValueError`: for what is no data list, sources with fields that are unknown, missing or not legal (the source
            is named), weights that only some have, or that don't sum to 1.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    entries = content.get("sources") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{path} has no `sources`: a name and its fields for each.")
    sources = {}
    for name, entry in entries.items():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise ValueError(f"{path}: a source's name is that of its folder of codes, which {name!r} can't be.")
        try:
            sources[name] = _read_source(entry, path.parent)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: source {name}: {error}") from error
    weights = {name: source.weight for name, source in sources.items() if source.weight is not None}
    if weights and (missing := sources.keys() - weights):
        raise ValueError(f"{path}: {', '.join(sorted(missing))} have no `weight`. Give one to all sources, or to none.")
    if weights and not math.isclose(total := sum(weights.values()), 1, abs_tol=1e-6):
        listed = ", ".join(f"{name} {weight}" for name, weight in weights.items())
        raise ValueError(f"{path}: the weights sum to {total:g} and not to 1 ({listed}).")
    return sources


def _read_source(entry: Any, folder: Path) -> DataSource:
    known = [known.name for known in fields(DataSource)]
    if not isinstance(entry, dict):
        raise ValueError(f"it must have the fields kind and format, but is {entry!r}.")
    if unknown := sorted(map(str, entry.keys() - known)):
        raise ValueError(f"unknown fields {', '.join(unknown)}; there are {', '.join(known)}.")
    if missing := [name for name in known[:2] if not isinstance(entry.get(name), str)]:
        raise ValueError(f"it needs {', '.join(missing)}, in words.")
    columns = entry.get("columns", {})
    if not isinstance(columns, dict):
        raise ValueError(f"`columns` must have a column for each part, but is {columns!r}.")
    listed = {part: tuple(names) if isinstance(names, list) else str(names) for part, names in columns.items()}
    source = DataSource(**{**entry, "columns": listed})
    inside = "/" in source.format  # `data` is a pattern of files in a data set of the Hub
    paths = {name: getattr(source, name) for name in ("pictures", "raft", *(() if inside else ("data",)))}
    found = {name: path for name, path in paths.items() if path is not None and "://" not in path}
    local: dict[str, Any] = {name: str(folder / path) for name, path in found.items()}
    return replace(source, **local)


def mix_coded_datasets(datasets: Mapping[str, Dataset], weights: Mapping[str, float] | None = None) -> Dataset:
    """One data set in which each source has its share of the samples.

    It is the shortest in which every sample comes at least once: the source that is most in demand is repeated least.
    Samples are repeated by reference, and no random number is drawn.

    Args:
        datasets (`dict`): Coded samples ([`load_coded_dataset`]) of each source.
        weights (`dict`, *optional*): Share of each source; without them each sample comes once.

    Raises:
        `ValueError`: if a source is empty, or weights are other sources' or don't sum to 1.
    """
    if empty := [name for name, dataset in datasets.items() if not len(dataset)]:
        raise ValueError(f"{', '.join(empty)} have no samples.")
    if weights is None:
        return concatenate_datasets(list(datasets.values()))
    if weights.keys() != datasets.keys() or not math.isclose(sum(weights.values()), 1, abs_tol=1e-6):
        raise ValueError(f"`weights` must sum to 1 over {', '.join(datasets)}, but got {dict(weights)}.")
    total = max(len(dataset) / weights[name] for name, dataset in datasets.items())
    chosen = [
        dataset.select(np.arange(round(total * weights[name])) % len(dataset)) for name, dataset in datasets.items()
    ]
    return concatenate_datasets(chosen)
