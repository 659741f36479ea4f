"""Extraction of codes: every source, any number of processes, a kill, broken pictures."""

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from transformers_nextflow import NextFlowConfig
from transformers_nextflow.trainer import NextFlowDataCollator, load_coded_dataset

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import extract_codes

NUM = 5


@pytest.fixture(autouse=True)
def fresh():
    yield
    extract_codes.load_source.cache_clear()
    extract_codes.load_processor.cache_clear()


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
    assert [entry["row"] for entry in bad] == [1, 3] and all(entry["error"] for entry in bad)
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


def test_webdataset(run, pictures, tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for index in range(2):
            (tmp_path / f"{index}.txt").write_text(f"picture {index}")
            archive.add(pictures / f"{index}.png", f"{index}.png")
            archive.add(tmp_path / f"{index}.txt", f"{index}.txt")
    columns = ("--image-column", "png", "--text-column", "txt")
    dataset = run("--source", "webdataset", "--data", str(tmp_path / "shard.tar"), *columns)
    assert dataset["id"] == ["0", "1"] and all(len(codes) == 1 for codes in dataset["codes"])


def test_the_picture_described(run, pictures, tiny_random_checkpoint):
    dataset = run("--data", str(pictures), "--task", "describe", "--caption-prompt", "What?")
    config = NextFlowConfig.from_pretrained(tiny_random_checkpoint)
    labels = NextFlowDataCollator(config)([dataset[0]])["labels"]
    assert not (labels >= config.text_vocab_size).any() and (labels != -100).any()


def test_bad_input(run, pictures, tmp_path):
    with pytest.raises(ValueError, match="has the columns image, text, but not caption"):
        run("--data", str(pictures), "--text-column", "caption")
    extract_codes.load_source.cache_clear()
    run("--data", str(pictures), output="other")
    with pytest.raises(ValueError, match=r"other settings or data \(seed was 0, now 1\)"):
        run("--data", str(pictures), "--seed", "1", output="other")
    with pytest.raises(ValueError, match="has no shards"):
        load_coded_dataset(tmp_path / "nothing")


def test_rows_that_came_since_are_not_passed_over(run, pictures, tmp_path):
    run("--data", str(_copy(pictures, tmp_path / "growing", 3)))
    extract_codes.load_source.cache_clear()
    with pytest.raises(ValueError, match="num_rows was 3, now 5"):
        run("--data", str(_copy(pictures, tmp_path / "growing", 5)))


def _copy(pictures: Path, folder: Path, number: int) -> Path:
    folder.mkdir(exist_ok=True)
    for index in range(number):
        (folder / f"{index}.png").write_bytes((pictures / f"{index}.png").read_bytes())
    lines = (pictures / "metadata.jsonl").read_text().splitlines(keepends=True)
    (folder / "metadata.jsonl").write_text("".join(lines[:number]))
    return folder


def test_rows_without_text_or_picture(run, tmp_path, pictures):
    """No caption is listed, and not learned as the word None; no picture is a text."""
    file = {"bytes": (pictures / "0.png").read_bytes(), "path": None}
    rows = [{"image": file, "text": None}, {"image": None, "text": "words"}, {"image": {"bytes": b""}, "text": "words"}]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    dataset = run("--source", "parquet", "--data", str(tmp_path / "rows.parquet"))
    assert dataset["id"] == ["1"] and dataset[0]["codes"] == []
    bad = [json.loads(line) for line in (tmp_path / "codes" / "bad.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in bad] == [0, 2] and "has no text" in bad[0]["error"]


def test_on_ray(run, pictures):
    ray = pytest.importorskip("ray", reason="Ray is optional")
    try:
        assert run("--data", str(pictures), "--ray", output="ray")[:] == run("--data", str(pictures))[:]
    finally:
        ray.shutdown()
