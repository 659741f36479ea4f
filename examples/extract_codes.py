"""Turns pictures and conversations into coded samples, once: an Arrow data set that the language model trains on.

    python examples/extract_codes.py --source imagefolder --data FOLDER --output runs/codes --processes 4
    python examples/extract_codes.py --source parquet --data "DATA/*.parquet" --messages-column messages \\
        --output runs/codes
    python examples/extract_codes.py --source webdataset --data "DATA/*.tar" --image-column png --text-column txt \\
        --output runs/codes --ray

`--source` is a builder of the library datasets (imagefolder, parquet, json, webdataset) or a data set of the Hub. A
row is a picture and its text (drawn from it, or with `--task describe` the other way round), a text alone, or a
conversation: messages in transformers' chat format whose image parts (or `<image>` marks) take the pictures of
`--images-column` in order.

Rows are cut into shards, which processes (or Ray, for clusters: `pip install -e ".[ray]"`) take in turn. A shard is
written when it is whole, so run the same command again after a kill. Codes are drawn with self-correction from the seed
and the row's number: how many processes there are changes nothing. A row that can't be encoded is left out and listed
in `bad.jsonl`. `transformers_nextflow.trainer.load_coded_dataset(OUTPUT)` opens the result.
"""

import argparse
import glob
import io
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets.arrow_writer import ArrowWriter
from PIL import Image
from tqdm import tqdm

from transformers_nextflow import NextFlowProcessor, tiny_checkpoint
from transformers_nextflow.trainer import (
    coded_features,
    encode_messages,
    hash_image_tokenizer,
    load_coded_dataset,
)

MANIFEST, BAD = "extraction.json", "bad.jsonl"


@dataclass(frozen=True)
class Extraction:
    """All that the result depends on, but for the number of processes."""

    source: str
    data: str | None
    split: str
    checkpoint: str
    image_column: str
    text_column: str
    images_column: str
    messages_column: str | None
    task: str
    self_correction: bool
    num_scales: int | None
    caption_prompt: str
    seed: int
    shard_size: int


@lru_cache(maxsize=1)
def load_source(extraction: Extraction) -> datasets.Dataset:
    """The rows, with their pictures still in bytes: one that is broken must not stop the others."""
    options: dict[str, Any] = {}
    if extraction.data and Path(extraction.data).is_dir():
        options["data_dir"] = extraction.data
    elif extraction.data:
        options["data_files"] = sorted(glob.glob(extraction.data)) or extraction.data
    rows = datasets.load_dataset(extraction.source, split=extraction.split, **options)
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            rows = rows.cast_column(name, datasets.List(datasets.Image(decode=False)))
    needed = [extraction.messages_column] if extraction.messages_column else [extraction.text_column]
    if missing := [name for name in needed if name not in rows.column_names]:
        raise ValueError(
            f"The data set has the columns {', '.join(rows.column_names)}, but not {', '.join(missing)}. Name its "
            "columns with `--text-column` and `--image-column`, or `--messages-column` and `--images-column`."
        )
    return rows


@lru_cache(maxsize=1)
def load_processor(checkpoint: str, device: str) -> NextFlowProcessor:
    processor = NextFlowProcessor.from_pretrained(checkpoint)
    processor.image_tokenizer.to(device)
    return processor


def open_picture(picture: Any) -> Image.Image:
    """A picture of a data set: bytes or a path as datasets keeps them, or a picture already."""
    if isinstance(picture, dict):
        picture = Image.open(io.BytesIO(picture["bytes"]) if picture.get("bytes") else picture["path"])
    elif isinstance(picture, bytes):
        picture = Image.open(io.BytesIO(picture))
    picture.load()
    return picture.convert("RGB")


def make_messages(row: dict[str, Any], extraction: Extraction) -> list[dict[str, Any]]:
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
    if text is None:
        raise ValueError("The row has no text.")
    if row.get(extraction.image_column) is None:
        return [{"role": "assistant", "content": text}]
    image = [{"type": "image", "image": open_picture(row[extraction.image_column])}]
    if extraction.task == "describe":
        prompt = [{"type": "text", "text": extraction.caption_prompt}] if extraction.caption_prompt else []
        return [{"role": "user", "content": [*image, *prompt]}, {"role": "assistant", "content": text}]
    return [{"role": "user", "content": text}, {"role": "assistant", "content": image}]


def encode_rows(extraction: Extraction, indices: range, device: str) -> Iterator[tuple[dict[str, Any], str | None]]:
    """`(sample, None)`, or `(id, error)` for a row that can't be encoded."""
    rows, processor = load_source(extraction), load_processor(extraction.checkpoint, device)
    options = {"num_scales": extraction.num_scales} if extraction.num_scales else {}
    for index in indices:
        name = str(index)
        try:
            row = rows[index]
            name = str(row.get("id") or row.get("__key__") or index)
            generator = torch.Generator(device).manual_seed(extraction.seed * 1_000_003 + index)
            messages = make_messages(row, extraction)
            sample = encode_messages(
                messages, processor, extraction.self_correction, generator, extraction.caption_prompt, **options
            )
        except Exception as error:  # whatever a decoder throws at a broken file: it is listed, the others go on
            yield {"id": name, "row": index}, f"{type(error).__name__}: {error}"
        else:
            yield {**sample, "id": name}, None


def extract_shard(extraction: Extraction, output: str, number: int, device: str = "cpu") -> int:
    """Writes one shard, unless it is there; returns how many samples it has."""
    path = Path(output) / f"{number:06d}.arrow"
    if path.exists():
        return len(datasets.Dataset.from_file(str(path)))
    start = number * extraction.shard_size
    indices = range(start, min(start + extraction.shard_size, len(load_source(extraction))))
    temporary, bad = path.with_suffix(".part"), []
    with ArrowWriter(path=str(temporary), features=coded_features()) as writer:
        for sample, error in encode_rows(extraction, indices, device):
            if error is None:
                writer.write(sample)
            else:
                bad.append({**sample, "error": error})
        writer.finalize()
    path.with_suffix(".bad.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in bad), encoding="utf-8")
    temporary.rename(path)
    return len(indices) - len(bad)


def _extract_shard(job: tuple[Extraction, str, int, str]) -> int:
    torch.set_num_threads(1)
    return extract_shard(*job)


def _extract_shard_on_ray(row: dict[str, Any], settings: dict[str, Any], output: str, device: str) -> dict[str, Any]:
    return {"samples": extract_shard(Extraction(**settings), output, int(row["item"]), device)}


def extract_on_ray(extraction: Extraction, output: str, num_shards: int, device: str) -> None:
    """Shards as a Ray data set. Nodes share `output`, and get this folder so that they find this module."""
    import ray.data

    import extract_codes  # by its name, as the nodes know it, and not as `__main__`

    ray.init(ignore_reinit_error=True, runtime_env={"working_dir": str(Path(__file__).parent)})
    rows = ray.data.from_items(list(range(num_shards)))
    rows.map(extract_codes._extract_shard_on_ray, fn_args=(asdict(extraction), output, device)).take_all()


def check_manifest(extraction: Extraction, output: Path) -> None:
    """An output folder belongs to one extraction: codes of two image tokenizers must not mix."""
    processor = load_processor(extraction.checkpoint, "cpu")
    facts = {
        **asdict(extraction),
        "image_tokenizer_hash": hash_image_tokenizer(processor.image_tokenizer),
        "num_rows": len(load_source(extraction)),  # shards that are there would go without rows that came since
    }
    path = output / MANIFEST
    if path.exists():
        then = json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name in facts if then.get(name) != facts[name]]:
            raise ValueError(
                f"{output} holds an extraction with other settings or data ("
                + ", ".join(f"{name} was {then.get(name)!r}, now {facts[name]!r}" for name in changed)
                + "). Run it as it was, or choose another `--output`."
            )
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> datasets.Dataset:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="imagefolder", help="a builder of datasets, or a data set of the Hub")
    parser.add_argument("--data", help="a folder, or a pattern of files")
    parser.add_argument("--split", default="train")
    parser.add_argument("--checkpoint", default=str(tiny_checkpoint()), help="folder with the processor")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--images-column", default="images", help="pictures of a conversation")
    parser.add_argument("--messages-column", help="rows are conversations, in this column")
    parser.add_argument("--task", choices=["draw", "describe"], default="draw", help="of a picture and its text")
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

    extraction = Extraction(
        **{name: getattr(options, name) for name in Extraction.__annotations__ if name != "self_correction"},
        self_correction=not options.no_self_correction,
    )
    output = options.output.absolute()  # Ray's workers have folders of their own
    check_manifest(extraction, output)
    num_shards = -(-len(load_source(extraction)) // options.shard_size)
    jobs = [(extraction, str(output), number, options.device) for number in range(num_shards)]
    if options.ray:
        extract_on_ray(extraction, str(output), num_shards, options.device)
    elif options.processes == 1:
        for job in tqdm(jobs, desc="shards"):
            extract_shard(*job)
    else:
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            list(tqdm(pool.imap_unordered(_extract_shard, jobs), total=len(jobs), desc="shards"))

    bad = [line for path in sorted(output.glob("*.bad.jsonl")) for line in path.read_text("utf-8").splitlines()]
    (output / BAD).write_text("".join(line + "\n" for line in bad), encoding="utf-8")
    dataset = load_coded_dataset(output)
    print(f"{len(dataset)} samples in {output}; {len(bad)} rows left out" + (f", see {output / BAD}" if bad else ""))
    if not len(dataset):
        raise ValueError(f"No row could be encoded. The first one: {bad[0]}")
    return dataset


if __name__ == "__main__":
    main()
