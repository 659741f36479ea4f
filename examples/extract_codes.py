"""Turns pictures and conversations into coded samples, once: Arrow data sets that the language model trains on.

    python examples/extract_codes.py --data-list data.yaml --output runs/codes --device cuda:0 cuda:1 --processes 4
    python examples/extract_codes.py --source imagefolder --data FOLDER --output runs/codes --processes 4
    python examples/extract_codes.py --source parquet --data "DATA/*.parquet" --messages-column messages \\
        --output runs/codes
    python examples/extract_codes.py --source webdataset --data "DATA/*.tar" --text-column txt --output runs/codes --ray

A data list (docs/training.md) names several sources with their kinds; the codes of each go into a folder of its name.
Without one, `--source` is "webdataset", "parquet", "json", a builder of the library datasets (imagefolder) or a data
set of the Hub (`--stream` reads it without a copy on disk). A row is a picture and its text (drawn from it, or with
`--task describe` the other way round), a text alone, or a conversation: messages in transformers' chat format whose
image parts (or `<image>` marks) take the pictures of `--images-column` in order. `--prompt-style bare` leaves the chat
format out: the text, then the picture.

The rows of each file are cut into shards, which processes (or Ray, for clusters: `pip install -e ".[ray]"`) take in
turn; each process has one of the devices. Pictures of one shape are encoded together. A shard is written when it is
whole, so run the same command again after a kill; a worker that dies is replaced. Codes are drawn with self-correction
from the seed and the row's place: how many processes there are changes nothing. A row that can't be encoded is left out
and listed in `bad.jsonl`. `extraction.json` says what all shards were made of: with other pictures, tokenizers or
settings the run is refused. With `--max-bytes` the run ends before its output is larger, and goes on from there when
there is more room; sources are read in turn, a file of each. `transformers_nextflow.trainer.load_coded_dataset(OUTPUT)`
opens the result.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock
from tqdm import tqdm

from data_formats import (
    Row,
    count_rows,
    describe_files,
    find_columns,
    is_local,
    list_units,
    make_messages,
    picture_size,
    read_rows,
)
from transformers_nextflow import NextFlowProcessor, ScaleSchedule, tiny_checkpoint
from transformers_nextflow.scale_schedule import nearest_bucket
from transformers_nextflow.trainer import (
    DataSource,
    coded_features,
    encode_conversations,
    load_coded_dataset,
    read_data_list,
)
from transformers_nextflow.trainer.coded_dataset import open_shard
from video_clips import check_flow

MANIFEST, BAD = "extraction.json", "bad.jsonl"
START_METHOD = "spawn"  # of worker processes: a fork would take CUDA and threads along
ENCODED_TOGETHER = 64  # rows
MAX_DEATHS = 3  # of workers, with no shard finished in between
FRAMES_OF_512, FRAMES_OF_1024 = 5, 3  # at most, of a clip (arXiv 2601.02204); with up to 16 scales, and with more


@dataclass(frozen=True)
class Extraction:
    """All that the codes of a source depend on, but for the tokenizers."""

    source: DataSource
    columns: dict[str, tuple[str, ...]]  # of the parts of its kind
    checkpoint: str
    prompt_style: str
    caption_prompt: str
    num_scales: int
    self_correction: bool
    seed: int
    shard_size: int


@dataclass(frozen=True)
class Job:
    """Shards of one file of a source: one of them, or all (None). The folder `bounded` may grow to `max_bytes`."""

    extraction: Extraction
    output: str  # of the source
    file: int
    unit: str
    block: int | None = None
    max_bytes: int | None = None
    bounded: str = ""

    @property
    def end(self) -> Path:
        """Says how many rows the file has, once all of them are there."""
        return Path(self.output, f"{self.file:05d}.end")

    def shard(self, block: int) -> Path:
        """Where the rows from `block * shard_size` on are put."""
        return Path(self.output, f"{self.file:05d}-{block:05d}.arrow")

    @property
    def is_finished(self) -> bool:
        """Whether all its shards are there and whole."""
        if self.block is not None:
            return self.is_whole(self.block)
        if not self.end.exists():
            return False
        blocks = -(-int(self.end.read_text()) // self.extraction.shard_size)
        return all(map(self.is_whole, range(blocks)))

    def fingerprint(self, block: int) -> str:
        """What a shard says that it was made of: source, settings and both tokenizers, and which rows."""
        return f"{hashlib.sha256(Path(self.output, MANIFEST).read_bytes()).hexdigest()[:16]}-{self.file}-{block}"

    def is_whole(self, block: int) -> bool:
        """Whether a shard is there and whole.

        Raises:
            `ValueError`: if it is another extraction's.
        """
        path = self.shard(block)
        try:
            shard = open_shard(path)
        except ValueError:  # not there or damaged: it is made again
            return False
        if shard._fingerprint != self.fingerprint(block):
            raise ValueError(f"{path} belongs to another extraction. Remove it, or choose another `--output`.")
        return True


@lru_cache(maxsize=1)
def load_processor(checkpoint: str, device: str) -> NextFlowProcessor:
    processor = NextFlowProcessor.from_pretrained(checkpoint)
    if processor.image_tokenizer is not None:
        processor.image_tokenizer.to(device)
    return processor


def row_name(row: Row, file: int, number: int) -> str:
    """What a row is called: by its own `id` or `__key__`, or its number (in another file than the first one `1:0`)."""
    return str(row.get("id") or row.get("__key__") or (f"{file}:{number}" if file else number))


def encode_rows(job: Job, rows: Sequence[Row], start: int, device: str) -> list[tuple[dict[str, Any], str | None]]:
    """`(sample, None)` for each row, or `(id, error)` for one that can't be encoded; pictures of one shape together."""
    extraction = job.extraction
    max_frames = FRAMES_OF_512 if extraction.num_scales <= 16 else FRAMES_OF_1024
    encoded: dict[int, tuple[dict[str, Any], str | None]] = {}
    order = sorted(range(len(rows)), key=lambda index: _shape(rows[index], extraction))
    for first in range(0, len(order), ENCODED_TOGETHER):
        talks = {}
        for index in order[first : first + ENCODED_TOGETHER]:
            try:
                prompt = extraction.caption_prompt
                talks[index] = make_messages(rows[index], extraction.source, extraction.columns, prompt, max_frames)
            except Exception as error:  # it is listed, the others go on
                encoded[index] = _bad(start + index, error)
        try:
            encoded |= {index: (sample, None) for index, sample in _encode(job, talks, start, device).items()}
        except Exception:  # one of them can't be encoded: which one?
            for index, talk in talks.items():
                try:
                    encoded[index] = _encode(job, {index: talk}, start, device)[index], None
                except Exception as error:
                    encoded[index] = _bad(start + index, error)
    named = [(encoded[index], row_name(row, job.file, start + index)) for index, row in enumerate(rows)]
    return [({**sample, "id": name}, error) for (sample, error), name in named]


def _shape(row: Row, extraction: Extraction) -> tuple[int, int]:
    """The bucket of a row's first picture."""
    width, height = picture_size(row, extraction.columns, extraction.source.pictures)
    return nearest_bucket(height, width) if width and height else (0, 0)


def _bad(number: int, error: Exception) -> tuple[dict[str, Any], str]:
    return {"row": number}, f"{type(error).__name__}: {error}"


def _encode(job: Job, talks: dict[int, Any], start: int, device: str) -> dict[int, dict[str, Any]]:
    extraction = job.extraction
    names = ("self_correction", "caption_prompt", "prompt_style", "num_scales")
    options = {name: getattr(extraction, name) for name in names}
    seeds = [np.random.SeedSequence([extraction.seed, job.file, start + index]) for index in talks]
    generators = [torch.Generator(device).manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1)) for seed in seeds]
    processor = load_processor(extraction.checkpoint, device)
    samples = encode_conversations(list(talks.values()), processor, generators=generators, **options)
    return dict(zip(talks, samples, strict=True))


def extract(job: Job, device: str | None = None) -> bool:
    """Writes the shards of a job that are not there; False if there was no room for one."""
    size, device = job.extraction.shard_size, device or _device
    if job.is_finished:
        return True
    block = job.block or 0
    while job.block is None and job.is_whole(block):  # of a run that was killed
        block += 1
    rows = read_rows(job.extraction.source, job.unit, block * size)
    while chunk := list(islice(rows, size)):
        if not job.is_whole(block) and not write_shard(job, block, encode_rows(job, chunk, block * size, device)):
            return False
        if job.block is not None:
            return True
        if len(chunk) < size:
            break
        block += 1
    temporary = job.end.with_suffix(f".{os.getpid()}.part")
    temporary.write_text(str(block * size + len(chunk)))
    temporary.rename(job.end)
    return True


def write_shard(job: Job, block: int, encoded: Sequence[tuple[dict[str, Any], str | None]]) -> bool:
    """Writes a shard, unless the output would grow beyond its bound."""
    path, buffer = job.shard(block), pa.BufferOutputStream()
    with ArrowWriter(stream=buffer, features=coded_features(), fingerprint=job.fingerprint(block)) as writer:
        for sample, error in encoded:
            if error is None:
                writer.write(sample)
        writer.finalize()
    content = buffer.getvalue()
    bad = "".join(json.dumps({**sample, "error": error}) + "\n" for sample, error in encoded if error is not None)
    with FileLock(path.parent / ".lock"):
        if job.max_bytes is not None and folder_size(Path(job.bounded)) + len(content) + len(bad) > job.max_bytes:
            return False
        temporary = path.with_suffix(f".{os.getpid()}.part")
        temporary.write_bytes(content)
        path.with_suffix(".bad.jsonl").write_text(bad, encoding="utf-8")
        temporary.rename(path)
    return True


def folder_size(folder: Path) -> int:
    """Bytes of all its files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# Processes

_device = "cpu"  # of this worker


def _start_worker(devices: Sequence[str], started: Any) -> None:
    global _device
    with started.get_lock():
        _device = devices[started.value % len(devices)]
        started.value += 1
    torch.set_num_threads(1)

    def die_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()


def count_shards(jobs: Sequence[Job]) -> int:
    return sum(len(list(Path(output).glob("*.arrow"))) for output in {job.output for job in jobs})


def extract_in_processes(jobs: list[Job], processes: int, devices: Sequence[str] = ("cpu",)) -> bool:
    """Shards by several processes, each on one of the devices; False if there was no room for all.

    When a process dies its pool is given up, and a new one does what is not finished.

    Raises:
        `ValueError`: if workers keep dying.
    """
    context, deaths = multiprocessing.get_context(START_METHOD), 0
    with tqdm(total=len(jobs), desc="jobs") as progress:
        while jobs:
            shards = count_shards(jobs)
            with ProcessPoolExecutor(processes, context, _start_worker, (devices, context.Value("i", 0))) as pool:
                try:
                    for future in as_completed([pool.submit(extract, job) for job in jobs]):
                        if not future.result():
                            pool.shutdown(wait=True, cancel_futures=True)
                            return False
                        progress.update()
                except BrokenProcessPool as error:
                    left = [job for job in jobs if not job.is_finished]
                    deaths = deaths + 1 if len(left) == len(jobs) and count_shards(jobs) == shards else 0
                    if deaths == MAX_DEATHS:
                        raise ValueError(
                            f"A worker died {deaths} times and no shard got finished ({len(left)} jobs are left). Was "
                            "it killed for want of memory? Try fewer `--processes`; the same command goes on from here."
                        ) from error
                    jobs = left
                    progress.n = progress.total - len(jobs)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                else:
                    break
    return True


def _extract_on_ray(row: dict[str, Any], jobs: Sequence[dict[str, Any]], device: str) -> dict[str, Any]:
    settings = dict(jobs[int(row["item"])])
    extraction = dict(settings.pop("extraction"))
    source = DataSource(**extraction.pop("source"))
    return {"item": row["item"], "done": extract(Job(Extraction(source, **extraction), **settings), device)}


def extract_on_ray(jobs: Sequence[Job], device: str) -> bool:
    """Jobs as a Ray data set. Nodes share the output, and get this folder so that they find its modules."""
    import ray.data

    import extract_codes  # by its name, as the nodes know it, and not as `__main__`

    ray.init(ignore_reinit_error=True, runtime_env={"working_dir": str(Path(__file__).parent)})
    rows = ray.data.from_items(list(range(len(jobs))))
    settings = [asdict(job) for job in jobs]
    done = rows.map(extract_codes._extract_on_ray, fn_args=(settings, device)).take_all()
    return all(row["done"] for row in done)


# What is checked before the first row


def hash_of(*parts: Any) -> str:
    """SHA-256 of tensors' bytes and of what else prints the same when it is the same; the first 16 digits."""
    digest = hashlib.sha256()
    for part in parts:
        tensor = part.detach().cpu().contiguous().flatten().view(torch.uint8) if torch.is_tensor(part) else None
        digest.update(repr(part).encode() if tensor is None else tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def describe_processor(processor: NextFlowProcessor) -> dict[str, str]:
    """Hashes of all parts of it that samples are made with."""
    images = processor.image_tokenizer
    weights = [] if images is None else [images.config.to_json_string(), *images.state_dict().values()]
    return {
        "image_tokenizer": hash_of(*weights),
        "image_processor": hash_of(processor.image_processor.to_json_string()),
        "text_tokenizer": hash_of(processor.tokenizer.backend_tokenizer.to_str(), processor.chat_template),
    }


def describe(extraction: Extraction) -> dict[str, Any]:
    """All that the codes are made of, but for the tokenizers; not the weight, which codes don't depend on."""
    facts = asdict(extraction)
    source = facts.pop("source")
    del source["weight"], facts["columns"]
    return {**source, **facts, "source_files": hash_of(describe_files(extraction.source))}


def check_manifest(facts: dict[str, Any], output: Path) -> None:
    """An output folder belongs to one extraction: neither codes nor rows of two must mix."""
    facts, path = json.loads(json.dumps(facts)), output / MANIFEST
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
                + f"). Run it as it was, choose another `--output`, or remove {output} to encode it anew."
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    temporary.rename(path)


def plan_source(source: DataSource, processor: NextFlowProcessor, options: argparse.Namespace) -> Extraction:
    """A source with its settings, after all that can be told before a row is encoded.

    Raises:
        `ValueError`: for what the tokenizers can't do, and for files and columns that are missing.
    """
    prompt_style = source.prompt_style or options.prompt_style
    num_scales = source.num_scales or options.num_scales or processor.image_processor.num_scales
    if processor.image_tokenizer is None and source.kind != "text" and not source.lone_texts:
        raise ValueError(f"its kind {source.kind} needs an image tokenizer, but {options.checkpoint} has none.")
    if prompt_style == "chat" and not processor.chat_template:
        raise ValueError(f'{options.checkpoint} has no chat template: its prompts must be "bare".')
    ScaleSchedule(num_scales=num_scales)
    if processor.image_tokenizer is not None and num_scales > (most := processor.image_tokenizer.config.num_scales):
        raise ValueError(f"`num_scales` is {num_scales}, but the image tokenizer of {options.checkpoint} has {most}.")
    if source.pictures is not None and not Path(source.pictures).is_dir():
        raise ValueError(f"`pictures` must be a folder, but there is none {source.pictures}.")
    if source.kind == "video":
        check_flow(source.raft)
    return Extraction(
        source,
        find_columns(source),
        options.checkpoint,
        prompt_style,
        options.caption_prompt if source.caption_prompt is None else source.caption_prompt,
        num_scales,
        not options.no_self_correction,
        options.seed,
        options.shard_size,
    )


def plan_jobs(extraction: Extraction, output: Path, options: argparse.Namespace) -> Iterator[Job]:
    """A job for each file; for each shard if there are fewer local files than processes."""
    units = list_units(extraction.source)
    whole = extraction.source.streaming or len(units) >= options.processes or not all(map(is_local, units))
    bound = {"max_bytes": options.max_bytes, "bounded": str(options.output)}
    for file, unit in enumerate(units):
        blocks = range(-(-count_rows(extraction.source, unit) // options.shard_size)) if not whole else [None]
        yield from (Job(extraction, str(output), file, unit, block, **bound) for block in blocks)


def source_of(options: argparse.Namespace) -> DataSource:
    """The source that the command line describes."""
    if options.messages_column:
        columns = {"messages": options.messages_column, "images": options.images_column}
    else:
        columns = {"text": options.text_column, "image": tuple(options.image_column or ())}
    return DataSource(
        kind="image_to_text" if options.task == "describe" else "text_to_image",
        format=options.source,
        data=options.data,
        columns={part: names for part, names in columns.items() if names},
        split=options.split,
        streaming=options.stream,
        lone_texts=True,
    )


def finish(name: str, output: Path) -> datasets.Dataset:
    """The result of a source; lists what was left out."""
    bad = [line for path in sorted(output.glob("*.bad.jsonl")) for line in path.read_text("utf-8").splitlines()]
    (output / BAD).write_text("".join(line + "\n" for line in bad), encoding="utf-8")
    dataset = load_coded_dataset(output)
    print(f"{len(dataset)} samples in {output}; {len(bad)} rows left out" + (f", see {output / BAD}" if bad else ""))
    if not len(dataset):
        raise ValueError(f"No row of {name or output} could be encoded. The first one: {bad[0] if bad else 'none'}")
    return dataset


def main(arguments: Sequence[str] | None = None) -> datasets.Dataset | dict[str, datasets.Dataset]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data-list", type=Path, help="YAML of several sources, in place of the options up to --task")
    parser.add_argument("--source", default="imagefolder", help="a format, or a data set of the Hub")
    parser.add_argument("--data", help="a folder, or a pattern of files")
    parser.add_argument("--split", default="train")
    parser.add_argument("--stream", action="store_true", help="read a data set of the Hub without a copy on disk")
    parser.add_argument("--image-column", nargs="+", help="one or several; by default all that hold pictures")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--images-column", help="pictures of a conversation")
    parser.add_argument("--messages-column", help="rows are conversations, in this column")
    parser.add_argument("--task", choices=["draw", "describe"], default="draw", help="of a picture and its text")
    parser.add_argument("--checkpoint", default=str(tiny_checkpoint()), help="folder with the processor")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompt-style", choices=["chat", "bare"], default="chat", help="of prompts and answers")
    parser.add_argument("--caption-prompt", default="", help="what stands after a picture that is to be described")
    parser.add_argument("--num-scales", type=int, help="by default the image processor's own")
    parser.add_argument("--no-self-correction", action="store_true", help="codes that are seen are the true ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", type=int, default=512, help="rows of a shard")
    parser.add_argument("--max-bytes", type=float, help="how large the output may grow: 2e12 are two terabytes")
    parser.add_argument("--processes", type=int, help="by default one a device")
    parser.add_argument("--ray", action="store_true", help="run on Ray Data instead of own processes")
    parser.add_argument("--device", nargs="+", help="by default all GPUs (at most one a process), or the CPU")
    options = parser.parse_args(arguments)
    if options.device is None:
        gpus = min(torch.cuda.device_count(), options.processes or 2**31)
        options.device = [f"cuda:{index}" for index in range(1 if options.ray else gpus)] if gpus else ["cpu"]
    options.processes = len(options.device) if options.processes is None else options.processes
    if options.processes < 1 or options.shard_size < 1:
        parser.error("--processes and --shard-size must be at least 1")
    if options.processes < len(options.device) or (options.ray and len(options.device) > 1):
        parser.error("--device names more devices than there are --processes (with --ray, than one)")
    options.output = options.output.absolute()  # Ray's workers have folders of their own

    sources = read_data_list(options.data_list) if options.data_list else {"": source_of(options)}
    alone = options.processes == 1 and not options.ray
    processor = load_processor(options.checkpoint, options.device[0] if alone else "cpu")
    extractions = {}
    for name, source in sources.items():
        try:
            extractions[name] = plan_source(source, processor, options)
        except ValueError as error:
            raise ValueError(f"{options.data_list}: source {name}: {error}" if name else str(error)) from error
    tokenizers = describe_processor(processor)
    for name, extraction in extractions.items():
        check_manifest({**describe(extraction), **tokenizers}, options.output / name)
    for rest in options.output.rglob("*.part"):
        rest.unlink(missing_ok=True)  # of a run that was killed
    planned = [list(plan_jobs(extraction, options.output / name, options)) for name, extraction in extractions.items()]
    # Sources take turns, so that none is left without room by `--max-bytes`.
    jobs = [job for turn in zip_longest(*planned) for job in turn if job is not None]
    if options.ray:
        complete = extract_on_ray(jobs, options.device[0])
    elif alone:
        complete = all(extract(job, options.device[0]) for job in tqdm(jobs, desc="jobs"))
    else:
        complete = extract_in_processes(jobs, options.processes, options.device)
    if not complete:
        print("Stopped: more would not fit into --max-bytes. The same command with a larger one goes on from here.")
    results = {name: finish(name, options.output / name) for name in sources}
    return results if options.data_list else results[""]


if __name__ == "__main__":
    main()
