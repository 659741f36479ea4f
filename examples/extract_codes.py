"""Turns pictures and conversations into coded samples, once: an Arrow data set that the language model trains on.

    python examples/extract_codes.py --source imagefolder --data FOLDER --output runs/codes --processes 4
    python examples/extract_codes.py --source parquet --data "DATA/*.parquet" --messages-column messages \\
        --output runs/codes
    python examples/extract_codes.py --source webdataset --data "DATA/*.tar" --text-column txt --output runs/codes --ray

`--source` is a builder of the library datasets (imagefolder, parquet, json, webdataset) or a data set of the Hub. A
row is a picture and its text (drawn from it, or with `--task describe` the other way round), a text alone, or a
conversation: messages in transformers' chat format whose image parts (or `<image>` marks) take the pictures of
`--images-column` in order. `--prompt-style bare` leaves the chat format out: the text, then the picture.

Rows are cut into shards, which processes (or Ray, for clusters: `pip install -e ".[ray]"`) take in turn. A shard is
written when it is whole, so run the same command again after a kill; a worker that dies is replaced. Codes are drawn
with self-correction from the seed and the row's number: how many processes there are changes nothing. A row that can't
be encoded is left out and listed in `bad.jsonl`. `extraction.json` says what all shards were made of: with other
pictures, tokenizers or settings the run is refused. `transformers_nextflow.trainer.load_coded_dataset(OUTPUT)` opens
the result.
"""

import argparse
import glob
import hashlib
import io
import json
import multiprocessing
import os
import tarfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets.arrow_writer import ArrowWriter
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from PIL import Image
from tqdm import tqdm

from transformers_nextflow import NextFlowProcessor, tiny_checkpoint
from transformers_nextflow.trainer import (
    coded_features,
    encode_conversations,
    load_coded_dataset,
)
from transformers_nextflow.trainer.coded_dataset import open_shard

MANIFEST, BAD = "extraction.json", "bad.jsonl"
START_METHOD = "spawn"  # of worker processes: a fork would take CUDA and threads along
ENCODED_TOGETHER = 32  # rows
MAX_DEATHS = 3  # of workers, with no shard finished in between


@dataclass(frozen=True)
class Extraction:
    """All that the result depends on, but for the number of processes."""

    source: str
    data: str | None
    split: str
    checkpoint: str
    image_column: tuple[str, ...]  # none: all that hold pictures
    text_column: str
    images_column: str
    messages_column: str | None
    task: str
    prompt_style: str
    self_correction: bool
    num_scales: int | None
    caption_prompt: str
    seed: int
    shard_size: int


def local_files(extraction: Extraction) -> list[Path]:
    """The files that `--data` names; none for a data set of the Hub."""
    data = extraction.data or ""
    found = Path(data).rglob("*") if Path(data).is_dir() and data else map(Path, glob.glob(data))
    return sorted(path for path in found if path.is_file())


def features_of_tars(files: Sequence[Path], text_column: str) -> datasets.Features | None:
    """Columns of tars whose pictures have several types; datasets would see those of the first rows alone."""
    names = set()
    for file in files:
        with tarfile.open(file) as archive:
            names |= {Path(member.name).name.partition(".")[2] for member in archive if member.isfile()}
    pictures = sorted(name for name in names if name.rpartition(".")[2].lower() in WebDataset.IMAGE_EXTENSIONS)
    if len(pictures) < 2:
        return None
    texts = [*({text_column} & names), "__key__", "__url__"]
    return datasets.Features(
        {name: datasets.Image() for name in pictures} | dict.fromkeys(texts, datasets.Value("string"))
    )


@lru_cache(maxsize=1)
def load_source(extraction: Extraction) -> tuple[datasets.Dataset, list[str]]:
    """The rows, with their pictures still in bytes (one that is broken must not stop the others), and the columns
    that hold them."""
    options: dict[str, Any] = {}
    if extraction.data and Path(extraction.data).is_dir():
        options["data_dir"] = extraction.data
    elif extraction.data:
        options["data_files"] = sorted(glob.glob(extraction.data)) or extraction.data
        if extraction.source == "webdataset":
            options["features"] = features_of_tars(local_files(extraction), extraction.text_column)
    rows = datasets.load_dataset(extraction.source, split=extraction.split, **options)
    found = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            rows = rows.cast_column(name, datasets.List(datasets.Image(decode=False)))
    if "image" in rows.column_names and "image" not in found:
        found.append("image")  # plain bytes, or pictures as dictionaries
    needed = [extraction.text_column, *extraction.image_column]
    needed = [extraction.messages_column] if extraction.messages_column else needed
    if missing := [name for name in needed if name not in rows.column_names]:
        raise ValueError(
            f"The data set has the columns {', '.join(rows.column_names)}, but not {', '.join(missing)}. Name its "
            "columns with `--text-column` and `--image-column`, or `--messages-column` and `--images-column`."
        )
    if not len(rows):
        raise ValueError(f'The split "{extraction.split}" of {extraction.data or extraction.source} has no rows.')
    return rows, found


@lru_cache(maxsize=1)
def load_processor(checkpoint: str, device: str) -> NextFlowProcessor:
    processor = NextFlowProcessor.from_pretrained(checkpoint)
    processor.image_tokenizer.to(device)
    return processor


def open_picture(picture: Any) -> Image.Image:
    """A picture of a data set: bytes or a path as datasets keeps them, or a picture already."""
    name = picture.get("path") if isinstance(picture, dict) else None
    try:
        if isinstance(picture, dict):
            picture = picture["path"] if picture.get("bytes") is None else picture["bytes"]
        if not isinstance(picture, Image.Image):
            picture = Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)
        picture.load()
        return picture  # as it is: the image processor knows what to do with transparency and 16 bits
    except Exception as error:  # whatever a decoder throws at a broken file
        raise ValueError(f'The picture "{name or "(no name)"}" can\'t be read: {error}') from error


def find_picture(row: dict[str, Any], extraction: Extraction, columns: Sequence[str]) -> Any:
    """The picture of a row, None if it is a text alone; `columns` hold pictures, named or not."""
    named = extraction.image_column or columns
    full = [name for name in dict.fromkeys([*columns, *named]) if row.get(name) is not None]
    ours = [name for name in full if name in named]
    if len(ours) > 1:
        raise ValueError(f"The row has pictures in {', '.join(ours)}. Name one column with `--image-column`.")
    if full and not ours:
        raise ValueError(f"The row has no picture in {', '.join(named)}, but in {', '.join(full)}. Name that, too.")
    if not ours and named and extraction.source == "webdataset":  # a type of file that the first rows did not have
        raise ValueError(f"The row has no picture in {', '.join(named)}.")
    return row[ours[0]] if ours else None


def make_messages(row: dict[str, Any], extraction: Extraction, columns: Sequence[str]) -> list[dict[str, Any]]:
    """A row as a conversation with its pictures in place."""
    if extraction.messages_column:
        pictures = iter(row.get(extraction.images_column) or [])
        messages = []
        for message in row[extraction.messages_column]:
            content = message["content"]
            if isinstance(content, str):
                texts = content.split("<image>")
                content = [part for text in texts for part in ({"type": "image"}, {"type": "text", "text": text})][1:]
            parts = [
                {"type": "image", "image": open_picture(part.get("image") or next(pictures))}
                if part["type"] == "image"
                else {"type": "text", "text": part["text"]}
                for part in content
                if part["type"] == "image" or part["text"]
            ]
            messages.append({"role": message["role"], "content": parts})
        if next(pictures, None) is not None:
            raise ValueError("The row has more pictures than its messages have image parts.")
        return messages
    text = row[extraction.text_column]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'The row has no text in "{extraction.text_column}".')
    picture = find_picture(row, extraction, columns)
    if picture is None:
        return [{"role": "assistant", "content": text}]
    image = [{"type": "image", "image": open_picture(picture)}]
    if extraction.task == "describe":
        prompt = [{"type": "text", "text": extraction.caption_prompt}] if extraction.caption_prompt else []
        return [{"role": "user", "content": [*image, *prompt]}, {"role": "assistant", "content": text}]
    return [{"role": "user", "content": text}, {"role": "assistant", "content": image}]


def encode_rows(extraction: Extraction, indices: range, device: str) -> Iterator[tuple[dict[str, Any], str | None]]:
    """`(sample, None)`, or `(id, error)` for a row that can't be encoded."""
    for start in range(indices.start, indices.stop, ENCODED_TOGETHER):
        block = range(start, min(start + ENCODED_TOGETHER, indices.stop))
        try:
            yield from [(sample, None) for sample in _encode_block(extraction, block, device)]
        except Exception:  # one of them can't be encoded: which one?
            for index in block:
                try:
                    yield _encode_block(extraction, range(index, index + 1), device)[0], None
                except Exception as error:  # it is listed, the others go on
                    yield {"id": row_name(extraction, index), "row": index}, f"{type(error).__name__}: {error}"


def _encode_block(extraction: Extraction, indices: range, device: str) -> list[dict[str, Any]]:
    (rows, columns), processor = load_source(extraction), load_processor(extraction.checkpoint, device)
    options: dict[str, Any] = {"num_scales": extraction.num_scales} if extraction.num_scales else {}
    options |= {name: getattr(extraction, name) for name in ("self_correction", "caption_prompt", "prompt_style")}
    messages = [make_messages(rows[index], extraction, columns) for index in indices]
    generators = [torch.Generator(device).manual_seed(extraction.seed * 1_000_003 + index) for index in indices]
    samples = encode_conversations(messages, processor, generators=generators, **options)
    return [{**sample, "id": row_name(extraction, index)} for index, sample in zip(indices, samples, strict=True)]


def row_name(extraction: Extraction, index: int) -> str:
    """What a row is called: by its own `id` or `__key__`, or its number."""
    try:
        row = load_source(extraction)[0][index]
    except Exception:  # not even that can be read
        return str(index)
    return str(row.get("id") or row.get("__key__") or index)


def shard_fingerprint(output: Path, number: int) -> str:
    """What a shard says that it was made of: the extraction, and which rows of it."""
    return f"{hashlib.sha256((output / MANIFEST).read_bytes()).hexdigest()[:16]}-{number:06d}"


def is_finished(output: Path, number: int) -> bool:
    """Whether a shard is there and whole.

    Raises:
        `ValueError`: if it is another extraction's.
    """
    path = output / f"{number:06d}.arrow"
    try:
        shard = open_shard(path)
    except ValueError:  # not there or damaged: it is made again
        return False
    if shard._fingerprint != shard_fingerprint(output, number):
        raise ValueError(f"{path} belongs to another extraction. Remove it, or choose another `--output`.")
    return True


def extract_shard(extraction: Extraction, output: str, number: int, device: str = "cpu") -> None:
    """Writes one shard, unless it is there."""
    if is_finished(Path(output), number):
        return
    path = Path(output) / f"{number:06d}.arrow"
    start = number * extraction.shard_size
    indices = range(start, min(start + extraction.shard_size, len(load_source(extraction)[0])))
    temporary, bad = path.with_suffix(f".{os.getpid()}.part"), []
    fingerprint = shard_fingerprint(path.parent, number)
    with ArrowWriter(path=str(temporary), features=coded_features(), fingerprint=fingerprint) as writer:
        for sample, error in encode_rows(extraction, indices, device):
            if error is None:
                writer.write(sample)
            else:
                bad.append({**sample, "error": error})
        writer.finalize()
    path.with_suffix(".bad.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in bad), encoding="utf-8")
    temporary.rename(path)


def _start_worker() -> None:
    torch.set_num_threads(1)

    def die_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()


def extract_in_processes(jobs: list[tuple[Extraction, str, int, str]], processes: int) -> None:
    """Shards by several processes. When one dies its pool is given up, and a new one does what is not finished.

    Raises:
        `ValueError`: if workers keep dying.
    """
    context, deaths = multiprocessing.get_context(START_METHOD), 0
    with tqdm(total=len(jobs), desc="shards") as progress:
        while jobs:
            with ProcessPoolExecutor(processes, context, _start_worker) as pool:
                try:
                    for future in as_completed([pool.submit(extract_shard, *job) for job in jobs]):
                        future.result()
                        progress.update()
                except BrokenProcessPool as error:
                    left = [job for job in jobs if not is_finished(Path(job[1]), job[2])]
                    deaths = deaths + 1 if len(left) == len(jobs) else 0
                    if deaths == MAX_DEATHS:
                        raise ValueError(
                            f"A worker died {deaths} times and no shard got finished ({len(left)} are left). Was it "
                            "killed for want of memory? Try fewer `--processes`; the same command goes on from here."
                        ) from error
                    jobs = left
                    progress.n = progress.total - len(jobs)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                else:
                    return


def _extract_shard_on_ray(row: dict[str, Any], settings: dict[str, Any], output: str, device: str) -> dict[str, Any]:
    extract_shard(Extraction(**settings), output, int(row["item"]), device)
    return row


def extract_on_ray(extraction: Extraction, output: str, num_shards: int, device: str) -> None:
    """Shards as a Ray data set. Nodes share `output`, and get this folder so that they find this module."""
    import ray.data

    import extract_codes  # by its name, as the nodes know it, and not as `__main__`

    ray.init(ignore_reinit_error=True, runtime_env={"working_dir": str(Path(__file__).parent)})
    rows = ray.data.from_items(list(range(num_shards)))
    rows.map(extract_codes._extract_shard_on_ray, fn_args=(asdict(extraction), output, device)).take_all()


def hash_of(*parts: Any) -> str:
    """SHA-256 of tensors' bytes and of what else prints the same when it is the same; the first 16 digits."""
    digest = hashlib.sha256()
    for part in parts:
        tensor = part.detach().cpu().contiguous().flatten().view(torch.uint8) if torch.is_tensor(part) else None
        digest.update(repr(part).encode() if tensor is None else tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def describe(extraction: Extraction) -> dict[str, Any]:
    """All that the codes are made of."""
    processor, rows = load_processor(extraction.checkpoint, "cpu"), load_source(extraction)[0]
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in local_files(extraction)]
    images = processor.image_tokenizer
    return {
        **asdict(extraction),
        "image_tokenizer": hash_of(images.config.to_json_string(), *images.state_dict().values()),
        "image_processor": hash_of(processor.image_processor.to_json_string()),
        "text_tokenizer": hash_of(processor.tokenizer.backend_tokenizer.to_str(), processor.chat_template),
        "num_rows": len(rows),
        "source_files": hash_of(files) if files else rows._fingerprint,
    }


def check_manifest(extraction: Extraction, output: Path) -> None:
    """An output folder belongs to one extraction: neither codes nor rows of two must mix."""
    facts, path = json.loads(json.dumps(describe(extraction))), output / MANIFEST
    if path.exists():
        try:
            then = json.loads(path.read_bytes())
            changed = [name for name in facts if then.get(name) != facts[name]]
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} is damaged: it no longer says what the shards beside it were made of. Remove {output}, or "
                "choose another `--output`."
            ) from error
        if changed:
            raise ValueError(
                f"{output} holds an extraction with other settings or data ("
                + ", ".join(f"{name} was {then.get(name)!r}, now {facts[name]!r}" for name in changed)
                + "). Run it as it was, or choose another `--output`."
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    temporary.rename(path)


def main(arguments: Sequence[str] | None = None) -> datasets.Dataset:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--source", default="imagefolder", help="a builder of datasets, or a data set of the Hub")
    parser.add_argument("--data", help="a folder, or a pattern of files")
    parser.add_argument("--split", default="train")
    parser.add_argument("--checkpoint", default=str(tiny_checkpoint()), help="folder with the processor")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--image-column", nargs="+", help="one or several; by default all that hold pictures")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--images-column", default="images", help="pictures of a conversation")
    parser.add_argument("--messages-column", help="rows are conversations, in this column")
    parser.add_argument("--task", choices=["draw", "describe"], default="draw", help="of a picture and its text")
    parser.add_argument("--prompt-style", choices=["chat", "bare"], default="chat", help="of prompts and answers")
    parser.add_argument("--caption-prompt", default="", help="what stands after a picture that is to be described")
    parser.add_argument("--num-scales", type=int, help="by default the image processor's own")
    parser.add_argument("--no-self-correction", action="store_true", help="codes that are seen are the true ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", type=int, default=512, help="rows of a shard")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--ray", action="store_true", help="run on Ray Data instead of own processes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.processes < 1 or options.shard_size < 1:
        parser.error("--processes and --shard-size must be at least 1")
    options.image_column = tuple(options.image_column or ())

    extraction = Extraction(
        **{name: getattr(options, name) for name in Extraction.__annotations__.keys() & vars(options).keys()},
        self_correction=not options.no_self_correction,
    )
    output = options.output.absolute()  # Ray's workers have folders of their own
    check_manifest(extraction, output)
    for rest in output.glob("*.part"):
        rest.unlink(missing_ok=True)  # of a run that was killed
    num_shards = -(-len(load_source(extraction)[0]) // options.shard_size)
    jobs = [(extraction, str(output), number, options.device) for number in range(num_shards)]
    if options.ray:
        extract_on_ray(extraction, str(output), num_shards, options.device)
    elif options.processes == 1:
        for job in tqdm(jobs, desc="shards"):
            extract_shard(*job)
    else:
        extract_in_processes(jobs, options.processes)

    bad = [line for path in sorted(output.glob("*.bad.jsonl")) for line in path.read_text("utf-8").splitlines()]
    (output / BAD).write_text("".join(line + "\n" for line in bad), encoding="utf-8")
    dataset = load_coded_dataset(output)
    print(f"{len(dataset)} samples in {output}; {len(bad)} rows left out" + (f", see {output / BAD}" if bad else ""))
    if not len(dataset):
        raise ValueError(f"No row could be encoded. The first one: {bad[0]}")
    return dataset


if __name__ == "__main__":
    main()
