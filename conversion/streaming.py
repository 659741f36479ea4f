"""Checkpoints read and written a block of rows at a time, so that no model, shard or large tensor is ever held whole.

safetensors files are a JSON header and raw bytes. Memory-mapped readers keep every page that they touched in memory;
reading plain blocks does not, and a file can be written in place the same way.
"""

import argparse
import hashlib
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

BLOCK_BYTES = 2**24
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
READABLE = {**DTYPES, "I64": torch.int64}  # counters beside the weights, which are dropped
INDEX, PLAN = "model.safetensors.index.json", "conversion.plan"
MAX_HEADER = 100_000_000  # bytes, as the safetensors library has it
# Source key -> our key, None for what is dropped; the first that matches counts. A field stands for what FIELDS says.
KeyTable = dict[str, str | None]
CNN_BLOCK = r"conv_blocks\.\d+\.(?:(?:res|attn)\.\d+|(?:down|up)sample)|mid\.\d+"
FIELDS = {"n": r"\d+", "part": ".+", "qkv": "[qkv]", "encoder_block": CNN_BLOCK, "decoder_block": CNN_BLOCK}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file; `start` is the byte in the file that it begins at."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    def blocks(self) -> Iterator[torch.Tensor]:
        """The tensor in consecutive flat pieces of whole rows, of about `BLOCK_BYTES` each."""
        left = prod(self.shape) * self.dtype.itemsize
        row = prod(self.shape[1:]) * self.dtype.itemsize
        size = max(1, BLOCK_BYTES // row) * row if row else 0
        with open(self.file, "rb") as file:
            file.seek(self.start)
            while left:
                block = bytearray(min(left, size))
                if file.readinto(block) != len(block):
                    raise ValueError(f'"{self.file}" ends inside "{self.name}": it was cut while it was being read.')
                left -= len(block)
                yield torch.frombuffer(block, dtype=self.dtype)

    def thirds(self) -> "list[StoredTensor]":
        """The first, second and last third of its rows: query, key and value of a fused projection."""
        rows, *rest = self.shape
        if rows % 3:
            raise ValueError(
                f'"{self.name}" in "{self.file}" has {rows} rows; expected a multiple of 3 (query, key and value).'
            )
        size = prod([rows // 3, *rest]) * self.dtype.itemsize
        return [replace(self, shape=(rows // 3, *rest), start=self.start + third * size) for third in range(3)]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written; `blocks()` makes it in consecutive flat pieces, anew at every call."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterable[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        `ValueError`: if it is not there, or holds anything else.
    """
    if not path.is_file():
        raise ValueError(f'"{path.parent}" has no {path.name}; pass the folder of a downloaded checkpoint.')
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f'"{path}" is damaged: it is not JSON ({error}). Download it again.') from error
    if not isinstance(content, dict):
        raise ValueError(f'"{path}" is damaged: it holds a {type(content).__name__}, not an object. Download it again.')
    return content


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file. All that the header says is held against itself and against the file.

    Raises:
        `ValueError`: if it is not a whole safetensors file, if places, shapes and dtypes contradict each other, if
            they leave a gap or overlap, or if a dtype is no floating-point one.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        start = 8 + int.from_bytes(prefix, "little")
        if len(prefix) < 8 or start > min(size, 8 + MAX_HEADER):
            raise ValueError(f'"{path}" is not a whole safetensors file ({size} bytes). Download it again.')
        try:
            header = json.loads(file.read(start - 8))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f'"{path}" is not a safetensors file: its header is not JSON. Download it again.'
            ) from error
    if not isinstance(header, dict):
        raise ValueError(f'"{path}" is not a safetensors file: its header is not an object. Download it again.')
    header.pop("__metadata__", None)
    places = [(*_check_entry(path, name, entry), name) for name, entry in header.items()]
    end = 0
    for begin, stop, name in sorted(places):
        if begin != end:
            fault = "overlaps the tensor before it" if begin < end else "leaves a gap before it"
            raise ValueError(f'"{name}" in "{path}" {fault}: the header is damaged. Download the file again.')
        end = stop
    if size != start + end:
        raise ValueError(
            f'"{path}" is truncated or damaged: its header promises {start + end} bytes, but it has {size}. '
            "Download it again."
        )
    if {"F16", "BF16"} <= {entry["dtype"] for entry in header.values()}:  # as wide as each other: no size tells
        raise ValueError(f'"{path}" holds both F16 and BF16 tensors: its header is damaged. Download it again.')
    return {
        name: StoredTensor(
            path, name, tuple(entry["shape"]), READABLE[entry["dtype"]], start + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    }


def _check_entry(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor begins and ends after the header, if its entry is one and agrees with itself."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(field) for field in ("dtype", "shape", "data_offsets"))
    whole = [isinstance(part, list) and all(type(n) is int and n >= 0 for n in part) for part in (shape, offsets)]
    if not all(whole) or len(offsets) != 2 or not isinstance(dtype, str):
        raise ValueError(f'"{name}" in "{path}" has no whole entry in the header. Download the file again.')
    if dtype not in READABLE:
        raise ValueError(
            f'"{name}" in "{path}" has the dtype {dtype}; expected one of {", ".join(DTYPES)}. '
            "Quantised checkpoints can't be converted."
        )
    num_bytes = prod(shape) * READABLE[dtype].itemsize
    if offsets[1] - offsets[0] != num_bytes:
        raise ValueError(
            f'"{name}" in "{path}" takes the bytes {offsets[0]} to {offsets[1]}, but {num_bytes} bytes by its shape '
            f"{tuple(shape)} and dtype {dtype}: the header is damaged. Download the file again."
        )
    return offsets[0], offsets[1]


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint of one or many safetensors files, by name.

    Raises:
        `ValueError`: if there are none, only pickled ones, a shard is missing, or the index and the shards disagree.
    """
    if (index := folder / INDEX).is_file():
        weight_map = read_json(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(
            isinstance(name, str) and re.fullmatch(r"[^/\\]+\.safetensors", name) for name in names
        ):
            raise ValueError(f'"{index}" is damaged: its "weight_map" must name *.safetensors files of its own folder.')
        files = [folder / name for name in sorted(set(names))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(f'"{folder}" lacks {", ".join(missing)}, which "{INDEX}" names. Download them.')
    else:
        weight_map, files = {}, sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        found = f"only pickled weights ({', '.join(pickles)}), which can run code" if pickles else "no weights"
        raise ValueError(f'"{folder}" holds {found}; expected *.safetensors files.')
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise ValueError(f'"{name}" is in "{tensors[name].file}" and in "{file}"; expected it once.')
            tensors[name] = tensor
    if absent := sorted(k for k, file in weight_map.items() if k not in tensors or tensors[k].file.name != file):
        raise ValueError(f'"{folder / INDEX}" names {", ".join(absent)}, but the shards don\'t hold them there.')
    return tensors


def read_pickle(path: Path, entries: Sequence[str] = ()) -> dict[str, StoredTensor]:
    """The tensors of a file of `torch.save`, without running what it may hold besides tensors and plain values.

    torch's safe reader says where each tensor begins; the tensors themselves are not read.

    Args:
        path (`Path`): The file.
        entries (`Sequence[str]`, *optional*):
            Where the weights are if the file holds more than them; the first that is there counts.

    Raises:
        `ValueError`: if it is no such file, is truncated, or holds anything that torch's safe reader refuses.
    """
    damaged = f'"{path}" is not a whole file of `torch.save` (of torch 1.6 or later). Download it again.'
    if not zipfile.is_zipfile(path):
        raise ValueError(damaged)
    try:
        # Training scripts like to store their options; a `Namespace` is a bag of values and can't run anything.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="meta", weights_only=True)
        with zipfile.ZipFile(path) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
            if archive.testzip():
                raise ValueError("a checksum is wrong")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f'"{path}" is not read: it holds objects other than tensors and plain values, and unpickling them could '
            "run code. Load it where you trust it and write its weights with `safetensors.torch.save_file`."
        ) from error
    except Exception as error:  # a damaged pickle fails in any way
        raise ValueError(damaged) from error
    if packed or not isinstance(content, dict):
        found = "compressed tensors" if packed else f"a {type(content).__name__}"
        raise ValueError(f'"{path}" holds {found}; expected a dict of tensors, as `torch.save` writes it.')
    content = next((content[name] for name in entries if name in content), content)
    tensors: dict[str, StoredTensor] = {}
    for name, value in content.items():
        if not isinstance(value, torch.Tensor) or value.dtype not in NAMES or not value.is_contiguous():
            found = f"a {type(value).__name__}"
            if isinstance(value, torch.Tensor):
                found = f"a tensor of {value.dtype} with strides {value.stride()}"
            raise ValueError(
                f'"{name}" in "{path}" is {found}; expected a contiguous tensor of floating-point numbers.'
            )
        start = value.untyped_storage()._checkpoint_offset + value.storage_offset() * value.itemsize
        tensors[name] = StoredTensor(path, name, tuple(value.shape), value.dtype, start)
    return tensors


def map_keys(
    names: Mapping[str, StoredTensor] | Sequence[str],
    table: KeyTable,
    where: str,
    fields: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, str]:
    """Source key -> our key, without the dropped ones.

    Args:
        names (`Mapping[str, StoredTensor]` or `Sequence[str]`): The source's keys.
        table (`KeyTable`): What becomes of them.
        where (`str`): Names the source in errors.
        fields (`Mapping[str, Mapping[str, str]]`, *optional*):
            Field of the table -> what it says in the source -> what it says in our key. Other fields stay as they are.

    Raises:
        `ValueError`: for a key that the table does not know, and for two that would become one.
    """
    rules = [(re.compile(_expression(theirs)), ours) for theirs, ours in table.items()]
    mapped: dict[str, str] = {}
    for name in names:
        for rule, ours in rules:
            if match := rule.fullmatch(name):
                if ours is not None:
                    mapped[name] = ours.format(**_translate(match.groupdict(), fields or {}, name, where))
                break
        else:
            file = names[name].file if isinstance(names, Mapping) else where
            raise ValueError(f'"{file}" holds the key "{name}", which no rule expects. Expected: {", ".join(table)}.')
    targets = list(mapped.values())
    if twice := sorted({target for target in targets if targets.count(target) > 1}):
        raise ValueError(f'"{where}" holds {", ".join(twice)} under two names.')
    return mapped


def _translate(groups: dict[str, str], fields: Mapping[str, Mapping[str, str]], name: str, where: str):
    for key in groups.keys() & fields.keys():
        if groups[key] not in fields[key]:
            raise ValueError(
                f'"{where}" holds the key "{name}", but the model has no {groups[key]}; '
                f"it has {', '.join(fields[key])}."
            )
        groups[key] = fields[key][groups[key]]
    return groups


def _expression(template: str) -> str:
    """The regular expression of a source key in a table."""
    return re.sub(r"\\{(\w+)\\}", lambda field: f"(?P<{field[1]}>{FIELDS[field[1]]})", re.escape(template))


def markdown_table(table: KeyTable) -> str:
    """A table of keys for the documentation."""
    rows = [f"| `{theirs}` | {'dropped' if ours is None else f'`{ours}`'} |" for theirs, ours in table.items()]
    return "\n".join(["| key in the source | key in the result |", "|---|---|", *rows])


def check_shape(stored: StoredTensor, expected: tuple[int, ...]) -> None:
    """Names file, key, what was found and what was expected, if a tensor has another shape."""
    if stored.shape != expected:
        raise ValueError(
            f'"{stored.name}" in "{stored.file}" has the shape {stored.shape}; its configuration makes it {expected}.'
        )


def load_config(folder: Path, expected: Sequence[str]) -> PreTrainedConfig:
    """The configuration of a checkpoint of an expected model type.

    Raises:
        `ValueError`: if there is no config.json, or if it is damaged or another model's.
    """
    path = folder / "config.json"
    model_type = read_json(path).get("model_type")
    if model_type not in expected:
        raise ValueError(f'"{path}" states the model type "{model_type}"; expected {" or ".join(expected)}.')
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # each field has its own way to fail
        raise ValueError(f'"{path}" is damaged: {error}. Download it again.') from error


def plan_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> PlannedTensor:
    """A tensor in memory, to be written in `dtype`."""
    return PlannedTensor(name, tuple(tensor.shape), dtype, lambda: iter([tensor]))


def plan_tensors(
    expected: dict[str, tuple[int, ...]],
    kept: dict[str, StoredTensor],
    made: dict[str, PlannedTensor],
    where: str,
    dtype: torch.dtype | None = None,
) -> list[PlannedTensor]:
    """Every tensor of a new checkpoint, in its model's order.

    Args:
        expected (`dict[str, tuple[int, ...]]`): Key -> shape, of everything that the new model has.
        kept (`dict[str, StoredTensor]`): New key -> what is taken over as it is.
        made (`dict[str, PlannedTensor]`): New key -> what is not.
        where (`str`): Names the source in errors.
        dtype (`torch.dtype`, *optional*): Of what is kept; its own by default.

    Raises:
        `ValueError`: if a key is missing, has no place, or has another shape.
    """
    if missing := [f'"{name}" (expected shape {expected[name]})' for name in expected if name not in {**kept, **made}]:
        raise ValueError(f'"{where}" lacks the weights of {", ".join(missing)}.')
    if extra := [f'"{tensor.name}" in "{tensor.file}"' for name, tensor in kept.items() if name not in expected]:
        raise ValueError(f"config.json has no place for {', '.join(extra)}. Do the weights belong to it?")
    plan = []
    for name, shape in expected.items():
        if name in made:
            plan.append(made[name])
        else:
            check_shape(kept[name], shape)
            if kept[name].dtype not in NAMES:
                raise ValueError(f'"{kept[name].name}" in "{kept[name].file}" holds {kept[name].dtype}, not weights.')
            plan.append(PlannedTensor(name, shape, dtype or kept[name].dtype, kept[name].blocks))
    return plan


def _write_whole(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Writes a file that has its name only when it is whole."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _file_content(tensors: Sequence[PlannedTensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file, block by block."""
    yield _header(tensors)
    for tensor in tensors:
        written = 0
        for block in tensor.blocks():
            block = block.detach().to(tensor.dtype).contiguous().flatten()
            yield memoryview(block.view(torch.uint8).numpy())
            written += block.numel()
        assert written == prod(tensor.shape), tensor.name  # a plan that does not keep to its shape is a bug


def _header(tensors: Sequence[PlannedTensor]) -> bytes:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        stop = start + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # the data starts at a multiple of 8, as safetensors wants it
    return len(header).to_bytes(8, "little") + header


def split_into_shards(tensors: Sequence[PlannedTensor], max_shard_size: int) -> dict[str, list[PlannedTensor]]:
    """File name -> its tensors, in order; a tensor larger than `max_shard_size` bytes gets a file of its own."""
    shards: list[list[PlannedTensor]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor.num_bytes > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


@contextmanager
def new_checkpoint(
    output: Path, tensors: Sequence[PlannedTensor], sources: Iterable[Path], max_shard_size: int
) -> Iterator[Path]:
    """Writes all shards and their index into `<output>.partial`; what else there is to write is the caller's.

    The folder gets its name when the `with` block is done. Shards that an earlier, killed run has finished are kept,
    everything else that it left is removed. The note on what they are made of goes last, so that no moment is without.

    Args:
        output (`Path`): The new folder.
        tensors (sequence of `PlannedTensor`): In the order in which they are to be stored.
        sources (iterable of `Path`): The files that the tensors are made of; a run may only go on with the same ones.
        max_shard_size (`int`): In bytes.

    Raises:
        `ValueError`: if the folder was begun with other sources or settings, or if the disk is too small.
    """
    partial = output.with_name(output.name + ".partial")
    if (output / PLAN).exists():  # killed between the last two lines of this function
        output.rename(partial)
    shards = split_into_shards(tensors, max_shard_size)
    stamps = sorted((str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in sources)
    plan = hashlib.sha256(repr(stamps).encode() + b"".join(_header(shard) for shard in shards.values())).hexdigest()
    left = list(partial.iterdir()) if partial.exists() else []
    begun = (partial / PLAN).read_text(errors="replace") if partial / PLAN in left else ""
    if begun != plan and any(not path.name.startswith(PLAN) for path in left):
        fault = "was begun by a conversion with another source or other settings"
        if len(begun) != len(plan):
            fault = f"has no whole {PLAN}, so nothing tells what its files were made of"
        raise ValueError(f'"{partial}" {fault}. Remove it to start anew.')
    output.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(t.num_bytes for name, shard in shards.items() if not (partial / name).exists() for t in shard)
    if needed > (free := shutil.disk_usage(output.parent).free):
        raise ValueError(
            f'{needed / 1e9:.1f} GB are still to be written, but the disk of "{output.parent}" has only '
            f"{free / 1e9:.1f} GB free. Make room or choose another output."
        )
    for path in left:
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != PLAN and path.name not in shards:
            path.unlink()
    partial.mkdir(exist_ok=True)
    _write_whole(partial / PLAN, [plan.encode()])
    for name, shard in shards.items():
        if not (partial / name).exists():
            _write_whole(partial / name, _file_content(shard))
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensor in tensors)
        weight_map = {tensor.name: name for name, shard in shards.items() for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    yield partial
    partial.rename(output)
    (output / PLAN).unlink()


def refuse_to_overwrite(output: Path) -> None:
    """Makes sure that the new folder is not there yet, or that only its note is left to be removed."""
    if output.exists() and not (output / PLAN).exists():
        raise ValueError(f'"{output}" is there already and is not overwritten. Choose another output, or remove it.')
