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
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

BLOCK_BYTES = 2**24
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
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
                file.readinto(block)
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


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file.

    Raises:
        `ValueError`: if it is not a safetensors file, is truncated, or holds a dtype that is no floating-point one.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if header_size > size - 8:
            raise ValueError(f'"{path}" is not a whole safetensors file ({size} bytes). Download it again.')
        try:
            header = json.loads(file.read(header_size))
        except ValueError as error:
            raise ValueError(f'"{path}" is not a safetensors file: its header is not JSON.') from error
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f'"{name}" in "{path}" has the dtype {entry["dtype"]}; expected one of {", ".join(DTYPES)}. '
                "Quantised checkpoints can't be converted."
            )
        start, stop = entry["data_offsets"]
        end = max(end, stop)
        tensors[name] = StoredTensor(path, name, tuple(entry["shape"]), DTYPES[entry["dtype"]], 8 + header_size + start)
    if size != 8 + header_size + end:
        raise ValueError(
            f'"{path}" is truncated or damaged: its header promises {8 + header_size + end} bytes, but it has {size}. '
            "Download it again."
        )
    return tensors


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint of one or many safetensors files, by name.

    Raises:
        `ValueError`: if there are none, only pickled ones, a shard is missing, or the index and the shards disagree.
    """
    if (index := folder / INDEX).is_file():
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
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
    if absent := sorted(set(weight_map) - set(tensors)):
        raise ValueError(f'"{folder / INDEX}" names {", ".join(absent)}, but no shard holds them.')
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
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in zipfile.ZipFile(path).infolist())
    except pickle.UnpicklingError as error:
        raise ValueError(
            f'"{path}" is not read: it holds objects other than tensors and plain values, and unpickling them could '
            "run code. Load it where you trust it and write its weights with `safetensors.torch.save_file`."
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile) as error:
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
    names: Sequence[str], table: KeyTable, where: str, fields: Mapping[str, Mapping[str, str]] | None = None
) -> dict[str, str]:
    """Source key -> our key, without the dropped ones.

    Args:
        names (`Sequence[str]`): The source's keys.
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
            raise ValueError(f'"{where}" holds the key "{name}", which no rule expects. Expected: {", ".join(table)}.')
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


def check_model_type(folder: Path, expected: Sequence[str]) -> None:
    """Makes sure that a folder is a checkpoint of an expected model type, by its config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f'"{folder}" has no config.json; pass the folder of a downloaded checkpoint.')
    model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    if model_type not in expected:
        raise ValueError(f'"{path}" states the model type "{model_type}"; expected {" or ".join(expected)}.')


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
            plan.append(PlannedTensor(name, shape, dtype or kept[name].dtype, kept[name].blocks))
    return plan


def write_file(path: Path, tensors: Sequence[PlannedTensor]) -> None:
    """Writes a safetensors file block by block, and under its name only when it is whole."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        file.write(_header(tensors))
        for tensor in tensors:
            written = 0
            for block in tensor.blocks():
                block = block.detach().to(tensor.dtype).contiguous().flatten()
                file.write(memoryview(block.view(torch.uint8).numpy()))
                written += block.numel()
            assert written == prod(tensor.shape), tensor.name  # a plan that does not keep to its shape is a bug
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
    return struct.pack("<Q", len(header)) + header


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


def write_checkpoint(
    folder: Path, tensors: Sequence[PlannedTensor], sources: Iterable[Path], max_shard_size: int
) -> None:
    """Writes all shards and their index into a folder; shards that an earlier, killed run has finished are kept.

    Args:
        folder (`Path`): Made if it is not there.
        tensors (sequence of `PlannedTensor`): In the order in which they are to be stored.
        sources (iterable of `Path`): The files that the tensors are made of; a run may only go on with the same ones.
        max_shard_size (`int`): In bytes.

    Raises:
        `ValueError`: if the folder was begun with other sources or settings, or if the disk is too small.
    """
    shards = split_into_shards(tensors, max_shard_size)
    stamps = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sources)
    plan = hashlib.sha256(repr(stamps).encode() + b"".join(_header(shard) for shard in shards.values())).hexdigest()
    note = folder / "conversion.plan"
    if note.exists() and note.read_text() != plan:
        raise ValueError(
            f'"{folder}" was begun by a conversion with another source or other settings. Remove it to start anew.'
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(t.num_bytes for name, shard in shards.items() if not (folder / name).exists() for t in shard)
    if needed > (free := shutil.disk_usage(folder.parent).free):
        raise ValueError(
            f'{needed / 1e9:.1f} GB are still to be written, but the disk of "{folder.parent}" has only '
            f"{free / 1e9:.1f} GB free. Make room or choose another output."
        )
    folder.mkdir(exist_ok=True)
    note.write_text(plan)
    for name, shard in shards.items():
        if not (folder / name).exists():
            write_file(folder / name, shard)
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensor in tensors)
        weight_map = {tensor.name: name for name, shard in shards.items() for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    note.unlink()


def refuse_to_overwrite(output: Path) -> None:
    """Makes sure that the new folder is not there yet."""
    if output.exists():
        raise ValueError(f'"{output}" is there already and is not overwritten. Choose another output, or remove it.')


def partial_folder(output: Path) -> Path:
    """Where the work on `output` is kept until all of it is done."""
    return output.with_name(output.name + ".partial")
