"""Extraction of codes: every source, any number of processes, a kill, broken pictures."""

import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from transformers_nextflow import NextFlowConfig, NextFlowProcessor
from transformers_nextflow.trainer import NextFlowDataCollator, load_coded_dataset

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import data_formats
import extract_codes
import sft

sys.path.insert(0, str(Path(__file__).parents[1] / "conversion"))
from killing import num_kills, run_and_kill

NUM = 5


@pytest.fixture(autouse=True)
def fresh():
    yield
    forget()


def forget() -> None:
    """What a new process would not know."""
    for cached in (data_formats.load_with_datasets, data_formats.read_documents, extract_codes.load_processor):
        cached.cache_clear()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    with open(folder / "metadata.jsonl", "w") as file:
        for index in range(NUM):
            pixels = np.random.default_rng(index).integers(0, 256, (80, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
            file.write(json.dumps({"file_name": f"{index}.png", "text": f"picture {index}"}) + "\n")
    return folder


@pytest.fixture
def run(tiny_random_checkpoint, tmp_path):
    def run(*options: str, output: str = "codes") -> datasets.Dataset:
        common = ["--checkpoint", str(tiny_random_checkpoint), "--output", str(tmp_path / output), "--shard-size", "2"]
        return extract_codes.main([*common, *options])

    return run


def test_a_folder_becomes_samples_to_train_on(run, pictures, tiny_random_checkpoint):
    dataset = run("--data", str(pictures))
    assert len(dataset) == NUM and dataset["id"] == [str(index) for index in range(NUM)]
    assert dataset[0]["codes"] != dataset[0]["target_codes"]
    config = NextFlowConfig.from_pretrained(tiny_random_checkpoint)
    batch = NextFlowDataCollator(config, condition_dropout=0, task_inversion=0.5)(list(dataset))
    assert batch["image_grid_shw"].tolist() == [[5, 16, 16]] * NUM
    clean = run("--data", str(pictures), "--no-self-correction", output="clean")
    assert clean[0]["codes"] == clean[0]["target_codes"]


def test_processes_and_kills_change_nothing(run, pictures, tmp_path):
    whole = run("--data", str(pictures))
    assert run("--data", str(pictures), "--processes", "2", output="many")[:] == whole[:]
    shards = sorted((tmp_path / "codes").glob("*.arrow"))
    before = shards[0].stat().st_mtime_ns
    shards[1].unlink()
    shards[2].with_suffix(".part").write_bytes(b"half a sha")
    assert run("--data", str(pictures))[:] == whole[:]
    assert shards[0].stat().st_mtime_ns == before


def test_what_datasets_keeps_beside_the_shards_is_not_read_as_samples(run, pictures, tmp_path):
    dataset = run("--data", str(pictures))
    dataset.map(lambda sample: {"codebook_size": 1})
    assert list((tmp_path / "codes").glob("cache-*.arrow"))
    assert load_coded_dataset(tmp_path / "codes")[:] == dataset[:]


def test_broken_pictures_are_left_out_and_listed(run, pictures, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in pictures.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "1.png").write_bytes((pictures / "1.png").read_bytes()[:300])  # cut short
    (folder / "3.png").write_bytes(b"")
    dataset = run("--data", str(folder))
    assert dataset["id"] == ["0", "2", "4"]
    bad = [json.loads(line) for line in (tmp_path / "codes" / "bad.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in bad] == [1, 3]
    assert all(f"/{entry['row']}.png\" can't be read" in entry["error"] for entry in bad)
    assert "3 samples" in capsys.readouterr().out


def test_conversations_and_texts_of_parquet(run, pictures, tmp_path):
    files = [{"bytes": (pictures / f"{index}.png").read_bytes(), "path": None} for index in range(2)]
    edit = [{"role": "user", "content": "<image>Make it red."}, {"role": "assistant", "content": "Here: <image>"}]
    talk = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    rows = [
        {"messages": edit, "images": files},
        {"messages": talk, "images": []},
        {"messages": edit, "images": files[:1]},
    ]
    features = datasets.Features(
        {
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "images": datasets.List(datasets.Image()),
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    dataset = run("--source", "parquet", "--data", str(tmp_path / "*.parquet"), "--messages-column", "messages")
    assert [len(codes) for codes in dataset["codes"]] == [2, 0]
    assert json.loads((tmp_path / "codes" / "bad.jsonl").read_text())["row"] == 2

    datasets.Dataset.from_dict({"text": ["some words", "more words"]}).to_json(tmp_path / "texts.jsonl")
    assert len(run("--source", "json", "--data", str(tmp_path / "texts.jsonl"), output="texts")) == 2


def write_tar(path: Path, pictures: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as archive:
        for index, name in enumerate(names):
            key = f"{path.stem}{index}"
            content = io.BytesIO()
            if name:
                Image.open(pictures / f"{index % NUM}.png").save(content, {"jpg": "jpeg"}.get(name, name))
            for ending, data in ((name, content.getvalue()), ("txt", f"picture {index}".encode())):
                if ending:
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("column", [[], ["--image-column", "png"]])
def test_webdataset(run, pictures, tmp_path, column):
    write_tar(tmp_path / "a.tar", pictures, ["png"] * 2)
    dataset = run("--source", "webdataset", "--data", str(tmp_path / "a.tar"), "--text-column", "txt", *column)
    assert dataset["id"] == ["a0", "a1"] and all(len(codes) == 1 for codes in dataset["codes"])


def test_tars_of_several_types_of_pictures(run, pictures, tmp_path):
    """Beyond the five rows that datasets looks at, in another tar, or from the first row on: none is lost."""
    write_tar(tmp_path / "a.tar", pictures, ["png"] * 6 + ["jpg"])
    write_tar(tmp_path / "b.tar", pictures, ["jpg", "png", "webp"])
    options = ("--source", "webdataset", "--data", str(tmp_path / "*.tar"), "--text-column", "txt")
    dataset = run(*options)
    assert len(dataset) == 10 and all(len(codes) == 1 for codes in dataset["codes"])
    forget()
    some = run(*options, "--image-column", "png", "webp", output="some")
    assert len(some) == 8 and all(len(codes) == 1 for codes in some["codes"])
    bad = [json.loads(line) for line in (tmp_path / "some" / "bad.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in bad] == ["a6", "b0"]
    assert all("no picture in png, webp, but in jpg. Name that, too" in entry["error"] for entry in bad)


def test_a_row_of_a_tar_without_picture_is_listed(run, pictures, tmp_path):
    write_tar(tmp_path / "a.tar", pictures, ["png"] * 5 + [""])
    assert len(run("--source", "webdataset", "--data", str(tmp_path / "a.tar"), "--text-column", "txt")) == 5
    assert "The row has no picture in png" in (tmp_path / "codes" / "bad.jsonl").read_text()


def test_two_columns_of_pictures(run, pictures, tmp_path):
    file = {"bytes": (pictures / "0.png").read_bytes(), "path": None}
    features = datasets.Features(
        {"before": datasets.Image(), "after": datasets.Image(), "text": datasets.Value("string")}
    )
    rows = [{"before": file, "after": file, "text": "words"}, {"before": file, "after": None, "text": "words"}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    options = ("--source", "parquet", "--data", str(tmp_path / "rows.parquet"))
    assert run(*options)["id"] == ["1"]
    assert "pictures in before, after. Name one column" in (tmp_path / "codes" / "bad.jsonl").read_text()
    forget()
    assert run(*options, "--image-column", "after", output="after")["id"] == ["0"]
    assert "no picture in after, but in before" in (tmp_path / "after" / "bad.jsonl").read_text()
    forget()
    with pytest.raises(ValueError, match="columns before, after, text, but not picture"):
        run(*options, "--image-column", "picture", output="none")


def test_sixteen_bits_and_transparency_are_what_the_processor_makes_of_them(run, tmp_path, tiny_random_checkpoint):
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    ramp = np.linspace(0, 65535, 80 * 80).reshape(80, 80).astype(np.uint16)
    Image.fromarray(ramp).save(folder / "0.png")
    pixels = rng.integers(0, 256, (80, 80, 4), dtype=np.uint8)
    pixels[:40, :, 3] = 0
    Image.fromarray(pixels, "RGBA").save(folder / "1.png")
    lines = [json.dumps({"file_name": f"{index}.png", "text": "words"}) for index in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    dataset = run("--data", str(folder), "--no-self-correction")
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    for index in range(2):
        expected = processor("<image>", images=[Image.open(folder / f"{index}.png")])["input_ids"][0][1:]
        assert [code + processor.visual_token_offset for code in dataset[index]["codes"][0]] == expected


def test_bare_prompts(run, pictures, tiny_random_checkpoint, tmp_path):
    dataset = run("--data", str(pictures), "--prompt-style", "bare")
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    assert processor.decode(dataset[0]["token_ids"]) == "picture 0<image><|im_end|>"
    assert dataset["prompt_style"] == ["bare"] * NUM
    assert json.loads((tmp_path / "codes" / "extraction.json").read_text())["prompt_style"] == "bare"


class TestAnotherExtraction:
    """What shards are made of is written down; a run with anything else is refused, and says what has changed."""

    @pytest.fixture
    def again(self, run, pictures, tmp_path, tiny_random_checkpoint):
        """Extracts from copies that a test may change."""
        folder = _copy(pictures, tmp_path / "pictures", NUM)
        checkpoint = shutil.copytree(tiny_random_checkpoint, tmp_path / "checkpoint")

        def again() -> datasets.Dataset:
            forget()
            return run("--data", str(folder), "--checkpoint", str(checkpoint))

        again()
        return again

    def test_another_picture_under_the_same_name(self, again, tmp_path):
        Image.new("RGB", (80, 80), "red").save(tmp_path / "pictures" / "3.png")
        with pytest.raises(ValueError, match=r"other settings or data \(source_files was "):
            again()

    def test_another_image_tokenizer_with_the_same_codebooks(self, again, tmp_path):
        file = tmp_path / "checkpoint" / "image_tokenizer" / "model.safetensors"
        weights = load_file(file)
        name = next(name for name in weights if name.startswith("pixel_encoder") and name.endswith("weight"))
        save_file({**weights, name: weights[name] * 1.01}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=r"other settings or data \(image_tokenizer was "):
            again()

    def test_another_text_tokenizer(self, again, tmp_path):
        processor = NextFlowProcessor.from_pretrained(tmp_path / "checkpoint")
        processor.tokenizer.add_tokens(["<think>"])
        processor.tokenizer.save_pretrained(tmp_path / "checkpoint")
        with pytest.raises(ValueError, match=r"other settings or data \(text_tokenizer was "):
            again()

    def test_a_shard_of_another_extraction(self, again, run, pictures, tmp_path):
        forget()
        run("--data", str(pictures), "--seed", "7", output="other")
        shutil.copy(tmp_path / "other" / "00000-00001.arrow", tmp_path / "codes" / "00000-00001.arrow")
        with pytest.raises(ValueError, match=r"00000-00001\.arrow belongs to another extraction"):
            again()

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
    def test_a_damaged_plan(self, again, tmp_path, content):
        (tmp_path / "codes" / "extraction.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"extraction\.json is damaged: .* choose another `--output`"):
            again()

    def test_a_damaged_shard_is_named_and_made_again(self, again, tmp_path):
        shard = tmp_path / "codes" / "00000-00001.arrow"
        whole = shard.read_bytes()
        for content in (b"", whole[: len(whole) // 2], b"no arrow"):
            shard.write_bytes(content)
            with pytest.raises(ValueError, match=r"00000-00001\.arrow is damaged"):
                load_coded_dataset(tmp_path / "codes")
            assert len(again()) == NUM and shard.read_bytes() == whole


class TestKilled:
    def test_at_any_moment(self, run, pictures, tmp_path):
        whole = run("--data", str(pictures), output="whole")[:]
        moments = run_and_kill(lambda: run("--data", str(pictures)), str(tmp_path / "codes"))
        rng = random.Random(0)
        for moment in [1, 2, 3, moments, *(rng.randint(1, moments) for _ in range(num_kills(8)))]:
            shutil.rmtree(tmp_path / "codes", ignore_errors=True)
            assert run_and_kill(lambda: run("--data", str(pictures)), str(tmp_path / "codes"), moment) == -1
            assert run("--data", str(pictures))[:] == whole, moment
            assert not list((tmp_path / "codes").glob("*.part"))

    def test_a_worker_that_is_killed_is_replaced(self, tmp_path, monkeypatch):
        done = tmp_path / "done"
        done.mkdir()
        monkeypatch.setattr(extract_codes, "extract", die_once)
        monkeypatch.setattr(extract_codes, "START_METHOD", "fork")  # sees the one above
        assert extract_codes.extract_in_processes([FakeJob(str(done), number) for number in range(6)], 2)
        assert sorted(path.name for path in done.iterdir()) == [*"012345", "died"]

    def test_workers_that_always_die_end_the_run(self, tmp_path, monkeypatch):
        monkeypatch.setattr(extract_codes, "extract", die)
        monkeypatch.setattr(extract_codes, "START_METHOD", "fork")
        with pytest.raises(ValueError, match=r"A worker died 3 times and no shard got finished \(4 jobs are left\)"):
            extract_codes.extract_in_processes([FakeJob(str(tmp_path), number) for number in range(4)], 2)


@dataclass
class FakeJob:
    output: str
    number: int

    @property
    def is_finished(self) -> bool:
        return Path(self.output, str(self.number)).exists()


def die_once(job: FakeJob) -> bool:
    """Stands for a job: the third one kills its process at the first try."""
    died = Path(job.output) / "died"
    if job.number == 2 and not died.exists():
        died.touch()
        die()
    Path(job.output, str(job.number)).touch()
    return True


def die(*job) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_picture_described(run, pictures, tiny_random_checkpoint):
    dataset = run("--data", str(pictures), "--task", "describe", "--caption-prompt", "What?")
    config = NextFlowConfig.from_pretrained(tiny_random_checkpoint)
    labels = NextFlowDataCollator(config)([dataset[0]])["labels"]
    assert not (labels >= config.text_vocab_size).any() and (labels != -100).any()


def test_bad_input(run, pictures, tmp_path):
    with pytest.raises(ValueError, match="has the columns image, text, but not caption"):
        run("--data", str(pictures), "--text-column", "caption")
    forget()
    run("--data", str(pictures), output="other")
    with pytest.raises(ValueError, match=r"other settings or data \(seed was 0, now 1\)"):
        run("--data", str(pictures), "--seed", "1", output="other")
    with pytest.raises(ValueError, match="has no shards"):
        load_coded_dataset(tmp_path / "nothing")


def test_rows_that_came_since_are_not_passed_over(run, pictures, tmp_path):
    run("--data", str(_copy(pictures, tmp_path / "growing", 3)))
    forget()
    with pytest.raises(ValueError, match="source_files was"):
        run("--data", str(_copy(pictures, tmp_path / "growing", 5)))


def _copy(pictures: Path, folder: Path, number: int) -> Path:
    folder.mkdir(exist_ok=True)
    for index in range(number):
        (folder / f"{index}.png").write_bytes((pictures / f"{index}.png").read_bytes())
    lines = (pictures / "metadata.jsonl").read_text().splitlines(keepends=True)
    (folder / "metadata.jsonl").write_text("".join(lines[:number]))
    return folder


def test_rows_without_text_or_picture(run, tmp_path, pictures):
    """No caption and an empty one are listed, and not learned; no picture is a text."""
    file = {"bytes": (pictures / "0.png").read_bytes(), "path": None}
    rows = [{"image": file, "text": None}, {"image": None, "text": "words"}, {"image": {"bytes": b""}, "text": "words"}]
    rows.append({"image": file, "text": " "})
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    dataset = run("--source", "parquet", "--data", str(tmp_path / "rows.parquet"))
    assert dataset["id"] == ["1"] and dataset[0]["codes"] == []
    bad = [json.loads(line) for line in (tmp_path / "codes" / "bad.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in bad] == [0, 2, 3]
    assert all('has no text in "text"' in bad[entry]["error"] for entry in (0, 2))


def test_on_ray(run, pictures):
    ray = pytest.importorskip("ray", reason="Ray is optional")
    try:
        assert run("--data", str(pictures), "--ray", output="ray")[:] == run("--data", str(pictures))[:]
    finally:
        ray.shutdown()


class TestDataList:
    """Several sources: each has a folder of its own, and weights are the training's."""

    @pytest.fixture
    def write(self, pictures, tmp_path):
        write_tar(tmp_path / "a.tar", pictures, ["png"] * 3)
        datasets.Dataset.from_dict({"text": ["some words", "more words"]}).to_json(tmp_path / "words.jsonl")

        def write(first: str = "kind: text_to_image", weights=(0.75, 0.25), more: str = "") -> tuple[str, str]:
            (tmp_path / "data.yaml").write_text(
                f"sources:\n  drawn: {{{first}, format: webdataset, data: a.tar, weight: {weights[0]}}}\n"
                f"  said: {{kind: text, format: json, data: words.jsonl, prompt_style: bare, weight: {weights[1]}}}\n"
                f"{more}"
            )
            return "--data-list", str(tmp_path / "data.yaml")

        return write

    def test_another_weight_and_another_source_encode_nothing_again(self, run, write, tmp_path):
        found = run(*write())
        assert {name: len(dataset) for name, dataset in found.items()} == {"drawn": 3, "said": 2}
        assert found["said"]["prompt_style"] == ["bare"] * 2 and found["drawn"]["prompt_style"] == ["chat"] * 3
        written = {path: path.stat().st_mtime_ns for path in (tmp_path / "codes").rglob("*.arrow")}
        more = "  shown: {kind: image_to_text, format: webdataset, data: a.tar, weight: 0.2}\n"
        assert len(run(*write(weights=(0.4, 0.4), more=more))) == 3
        assert {path: path.stat().st_mtime_ns for path in written} == written
        with pytest.raises(ValueError, match=r"codes/drawn holds .* \(kind was 'text_to_image', now 'image_to_text'"):
            run(*write("kind: image_to_text"))

    def test_a_list_is_trained_on_by_weight(self, run, write, tmp_path, tiny_random_checkpoint):
        run(*write())
        data = sft.Data(codes=[str(tmp_path / "codes")], data_list=str(tmp_path / "data.yaml"))
        samples = sft.load_samples(data, None)
        assert sum(map(bool, samples["codes"])) == 6 and len(samples) == 8

    @pytest.mark.parametrize(
        ("first", "message"),
        [
            ("kind: editing", "source drawn: The data set has the columns .* but not source, instruction, target"),
            ("kind: text_to_image, num_scales: 40", "source drawn: `num_scales` must be between 1 and"),
            ("kind: text_to_image, num_scales: 6", "source drawn: `num_scales` is 6, but .* has 5"),
            ("kind: text_to_image, pictures: none", "source drawn: `pictures` must be a folder"),
            ("kind: video, raft: none.pth", "source drawn: .*none.pth has no weights"),
        ],
    )
    def test_what_can_not_be_done_is_said_before_the_first_row(self, run, write, tmp_path, first, message):
        if "video" in first:
            pytest.importorskip("cv2")
        with pytest.raises(ValueError, match=message):
            run(*write(first))
        assert not (tmp_path / "codes").exists()

    def test_kinds_that_the_tokenizers_can_not_do(self, run, write, tmp_path, tiny_random_checkpoint):
        checkpoint = shutil.copytree(tiny_random_checkpoint, tmp_path / "checkpoint")
        processor = NextFlowProcessor.from_pretrained(checkpoint)
        processor.image_tokenizer = None
        processor.save_pretrained(tmp_path / "words")
        with pytest.raises(ValueError, match="source drawn: its kind text_to_image needs an image tokenizer"):
            run(*write(), "--checkpoint", str(tmp_path / "words"))
        words = ("--source", "json", "--data", str(tmp_path / "words.jsonl"))
        assert len(run(*words, "--checkpoint", str(tmp_path / "words"), output="texts")) == 2


def test_the_disk_is_bounded_and_streams_leave_no_copy(run, pictures, tmp_path, monkeypatch):
    """Never more than so many bytes, by several runs with more room each; the codes are those of a run without."""
    for tar in "ab":
        write_tar(tmp_path / f"{tar}.tar", pictures, ["png"] * 5)
    options = ("--source", "webdataset", "--data", str(tmp_path / "*.tar"), "--text-column", "txt")
    whole = run(*options, output="whole")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    size, lengths = extract_codes.folder_size(tmp_path / "whole"), []
    for share in (0.4, 0.7, 1.5):
        lengths.append(len(run(*options, "--max-bytes", str(share * size), output="bounded")))
        assert extract_codes.folder_size(tmp_path / "bounded") <= share * size
    assert 0 < lengths[0] < lengths[1] < lengths[2] == len(whole)
    assert load_coded_dataset(tmp_path / "bounded")[:] == whole[:]
    assert run(*options, "--processes", "3", output="many")[:] == whole[:]  # more than files: by shards
    assert not (tmp_path / "cache").exists()


def test_processes_take_devices_in_turn(monkeypatch):
    started = multiprocessing.get_context("spawn").Value("i", 0)
    monkeypatch.setattr(extract_codes.threading.Thread, "start", lambda thread: None)
    monkeypatch.setattr(extract_codes, "_device", "cpu")
    found = []
    for _ in range(3):
        extract_codes._start_worker(["cuda:0", "cuda:1"], started)
        found.append(extract_codes._device)
    assert found == ["cuda:0", "cuda:1", "cuda:0"]


def test_fewer_processes_than_devices_are_refused(run, pictures, capsys):
    with pytest.raises(SystemExit):
        run("--data", str(pictures), "--device", "cpu", "cuda:1", "--processes", "1")
    assert "more devices than there are --processes" in capsys.readouterr().err
