"""Public data sets in the layouts in which they are published, each written here: what conversation a row becomes."""

import gzip
import io
import json
import sys
import tarfile
from pathlib import Path

import datasets
import fsspec
import pytest
from PIL import Image

from transformers_nextflow.trainer import DataSource

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import data_formats
from data_formats import count_rows, find_columns, list_units, make_messages, read_rows

RED, GREEN, BLUE = (200, 30, 30), (30, 160, 30), (30, 30, 200)


def encode(color: tuple[int, int, int], file_type: str = "png") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (24, 16), color).save(content, file_type)
    return content.getvalue()


def write_tar(path: Path | str, members: dict[str, bytes]) -> None:
    with fsspec.open(str(path), "wb") as file, tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def shorten(messages) -> list[tuple[str, list]]:
    """Roles, and texts and colours in turn."""
    short = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        said = [part["text"] if part["type"] == "text" else nearest(part["image"]) for part in parts]
        short.append((message["role"], said))
    return short


def nearest(picture: Image.Image) -> tuple[int, int, int]:
    pixel = picture.convert("RGB").getpixel((12, 8))
    return min((RED, GREEN, BLUE), key=lambda color: sum(abs(a - b) for a, b in zip(color, pixel, strict=True)))


def read(source: DataSource) -> list:
    """All rows as conversations, errors as their messages."""
    columns, found = find_columns(source), []
    for unit in list_units(source):
        for row in read_rows(source, unit):
            try:
                found.append(shorten(make_messages(row, source, columns)))
            except ValueError as error:
                found.append(str(error))
    return found


def draw(text: str, color) -> list:
    return [("user", [text]), ("assistant", [color])]


@pytest.fixture(autouse=True)
def fresh():
    yield
    data_formats.load_with_datasets.cache_clear()
    data_formats.read_documents.cache_clear()


@pytest.fixture
def laion(tmp_path) -> Path:
    """What img2dataset writes: key.jpg, key.json, key.txt; a picture that was not downloaded has no .jpg."""
    for tar, keys in (("00000", 3), ("00001", 2)):
        members = {}
        for index in range(keys):
            key, color = f"{tar}{index:04d}", (RED, GREEN, BLUE)[index]
            facts = {
                "caption": f"long {key}",
                "url": "https://example.com/x",
                "key": key,
                "width": 24 if index else None,
            }
            members |= {f"{key}.jpg": encode(color, "jpeg"), f"{key}.json": json.dumps(facts).encode()}
            members[f"{key}.txt"] = f"words {key}".encode()
        write_tar(tmp_path / f"{tar}.tar", members)
        (tmp_path / f"{tar}_stats.json").write_text("{}")
    return tmp_path


def test_tars_of_laion(laion):
    source = DataSource("text_to_image", "webdataset", f"{laion}/*.tar")
    assert read(source)[1] == draw("words 000000001", GREEN) and len(read(source)) == 5
    long = DataSource("image_to_text", "webdataset", f"{laion}/*.tar", {"text": "json.caption"})
    assert read(long)[3] == [("user", [RED]), ("assistant", ["long 000010000"])]


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_reading_starts_anywhere_and_counts(laion, tmp_path, start):
    source = DataSource("text_to_image", "webdataset", f"{laion}/00000.tar")
    (unit,) = list_units(source)
    rows = list(read_rows(source, unit))
    assert count_rows(source, unit) == 3 and list(read_rows(source, unit, start)) == rows[start:]
    table = datasets.Dataset.from_dict({"text": list("abcdefg")})
    table.to_parquet(tmp_path / "a.parquet", batch_size=2)  # several row groups
    table.to_json(tmp_path / "a.jsonl")
    for source in (
        DataSource("text", form, f"{tmp_path}/a.{end}") for form, end in (("parquet", "parquet"), ("json", "jsonl"))
    ):
        (unit,) = list_units(source)
        assert count_rows(source, unit) == 7
        assert [row["text"] for row in read_rows(source, unit, 2 * start)] == list("abcdefg")[2 * start :]


def test_files_that_are_not_local():
    write_tar(
        "memory://remote/a.tar", {"0.png": encode(RED), "0.txt": b"words", "1.png": encode(BLUE), "1.txt": b"more"}
    )
    source = DataSource("text_to_image", "webdataset", "memory://remote/*.tar")
    assert read(source) == [draw("words", RED), draw("more", BLUE)]
    assert data_formats.describe_files(source)


def test_a_tar_that_breaks_off_gives_the_rows_before(laion):
    file = laion / "00000.tar"
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.index(b"words 000000001")])
    found = read(DataSource("text_to_image", "webdataset", str(file)))
    assert found[0] == draw("words 000000000", RED) and "00000.tar can't be read on" in found[-1]


def test_parquet_with_pictures_in_bytes(tmp_path):
    rows = {"image": [{"bytes": encode(RED), "path": None}], "caption": ["words"], "width": [24]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    assert read(DataSource("text_to_image", "parquet", str(tmp_path))) == [draw("words", RED)]
    datasets.Dataset.from_dict({"jpg": [encode(RED, "jpeg")], "txt": ["words"]}).to_parquet(tmp_path / "a.parquet")
    assert read(DataSource("text_to_image", "parquet", str(tmp_path))) == [draw("words", RED)]


@pytest.mark.parametrize("lines", [True, False])
def test_conversations_of_llava(tmp_path, lines):
    """A list, or a document a line (packed, too); pictures in a folder; some talks have none, some several."""
    (tmp_path / "coco").mkdir()
    for name, color in (("0", RED), ("1", GREEN)):
        (tmp_path / "coco" / f"{name}.jpg").write_bytes(encode(color, "jpeg"))
    ask = {"from": "human", "value": "<image>\nWhat is it?"}
    documents = [
        {"id": "a", "image": "coco/0.jpg", "conversations": [ask, {"from": "gpt", "value": "Red."}]},
        {"id": "b", "conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]},
        {
            "id": "c",
            "image": ["coco/0.jpg", "coco/1.jpg"],
            "conversations": [
                {"from": "human", "value": "Which?\n<image>\n<image>"},
                {"from": "gpt", "value": "Both."},
            ],
        },
        {"id": "d", "image": "coco/none.jpg", "conversations": [ask, {"from": "gpt", "value": "Red."}]},
        {"id": "e", "conversations": [ask, {"from": "gpt", "value": "Red."}]},
    ]
    if lines:
        text = "".join(json.dumps(document) + "\n" for document in documents) + "{no json\n"
        (tmp_path / "talk.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    else:
        (tmp_path / "talk.json").write_text(json.dumps(documents, indent=1))
    found = read(DataSource("image_to_text", "json", f"{tmp_path}/talk.*", pictures=str(tmp_path)))
    assert found[:3] == [
        [("user", [RED, "What is it?"]), ("assistant", ["Red."])],
        [("user", ["Hi."]), ("assistant", ["Hello."])],
        [("user", ["Which?", RED, GREEN]), ("assistant", ["Both."])],
    ]
    assert "coco/none.jpg\" can't be read" in found[3] and "more image parts in its messages than pictures" in found[4]
    assert not lines or "The line is no JSON" in found[5]


@pytest.mark.parametrize(
    "names",
    [
        ("original_image", "edit_prompt", "edited_image"),  # InstructPix2Pix
        ("source_img", "instruction", "target_img"),  # MagicBrush
        ("before", "wish", "after"),
    ],
)
def test_pairs_of_edits(tmp_path, names):
    before, wish, after = names
    features = {before: datasets.Image(), wish: datasets.Value("string"), after: datasets.Image()}
    row = {
        before: {"bytes": encode(RED), "path": None},
        wish: "make it blue",
        after: {"bytes": encode(BLUE), "path": None},
    }
    datasets.Dataset.from_list([row], datasets.Features(features)).to_parquet(tmp_path / "a.parquet")
    columns = dict(zip(("source", "instruction", "target"), names, strict=True)) if before == "before" else {}
    source = DataSource("editing", "parquet", str(tmp_path), columns)
    assert read(source) == [[("user", [RED, "make it blue"]), ("assistant", [BLUE])]]
    if columns:
        with pytest.raises(ValueError, match="columns before, wish, after, but not source, instruction, target"):
            find_columns(DataSource("editing", "parquet", str(tmp_path)))


def test_documents_of_omnicorpus(tmp_path):
    """OBELICS has the same: texts and pictures side by side, one of them None."""
    (tmp_path / "0.png").write_bytes(encode(RED))
    rows = [
        {"images": [None, "0.png", None, None], "texts": ["first", None, "second", "third"]},
        {"images": ["none.png", "0.png", None], "texts": [None, None, "words"]},
        {"images": [None], "texts": ["words"]},
        {"images": [None], "texts": ["words", "more"]},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    options = {"kind": "interleaved", "format": "parquet", "data": f"{tmp_path}/*.parquet", "pictures": str(tmp_path)}
    found = read(DataSource(**options))
    assert found[0] == [("assistant", ["first", RED, "second\n\nthird"])]
    assert "none.png\" can't be read" in found[1]
    assert "has no pictures" in found[2] and "2 texts and 1 pictures" in found[3]
    assert read(DataSource(**options, skip_missing=True))[1] == [("assistant", [RED, "words"])]


def test_documents_of_mmc4(tmp_path):
    for name, color in (("a", RED), ("b", BLUE)):
        (tmp_path / f"{name}.jpg").write_bytes(encode(color, "jpeg"))
    document = {
        "url": "https://example.com",
        "text_list": ["One.", "Two.", "Three."],
        "image_info": [
            {"image_name": "b.jpg", "raw_url": "https://example.com/b", "matched_text_index": 2, "matched_sim": 0.3},
            {"image_name": "a.jpg", "raw_url": "https://example.com/a", "matched_text_index": 0, "matched_sim": 0.2},
        ],
        "similarity_matrix": [[0.1, 0.2, 0.3], [0.2, 0.1, 0.1]],
        "could_have_url_duplicate": 0,
    }
    (tmp_path / "docs.jsonl").write_text(json.dumps(document) + "\n")
    source = DataSource("interleaved", "json", f"{tmp_path}/docs.jsonl", pictures=str(tmp_path))
    assert read(source) == [[("assistant", [RED, "One. Two.", BLUE, "Three."])]]


def test_streams_of_datasets(tmp_path):
    """What a data set of the Hub gives, shard by shard."""
    for index, color in enumerate((RED, GREEN)):
        rows = [{"image": {"bytes": encode(color), "path": None}, "text": f"{index}"}, {"image": None, "text": "none"}]
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        datasets.Dataset.from_list(rows, features).to_parquet(tmp_path / f"{index}.parquet")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: '*.parquet'\n---\n")
    source = DataSource("text_to_image", str(tmp_path), streaming=True)
    assert list_units(source) == ["0", "1"]
    assert [row["text"] for row in read_rows(source, "1", 1)] == ["none"]
    found = read(source)
    assert found[::2] == [draw("0", RED), draw("1", GREEN)] and "no picture in image" in found[1]


def test_columns_that_are_missing_are_named_before_a_row_is_read(laion, tmp_path):
    with pytest.raises(ValueError, match=r"columns __key__, jpg, json, txt, but not json\.title"):
        find_columns(DataSource("text_to_image", "webdataset", f"{laion}/*.tar", {"text": "json.title"}))
    with pytest.raises(ValueError, match="but not png"):
        find_columns(DataSource("text_to_image", "webdataset", f"{laion}/*.tar", {"image": "png"}))
    with pytest.raises(ValueError, match="but not video"):
        find_columns(DataSource("video", "webdataset", f"{laion}/*.tar"))
    with pytest.raises(ValueError, match=r"There are no files .*\*\.parquet"):
        find_columns(DataSource("text", "parquet", f"{tmp_path}/*.parquet"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no rows"):
        find_columns(DataSource("text", "json", f"{tmp_path}/empty.jsonl"))
