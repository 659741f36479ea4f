"""Data lists: what is refused by name, and that mixing gives each source its share."""

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_nextflow.trainer import mix_coded_datasets, plan, read_data_list
from transformers_nextflow.trainer.data_list import KINDS


@pytest.fixture
def read(tmp_path):
    def read(text: str):
        (tmp_path / "data.yaml").write_text(text)
        return read_data_list(tmp_path / "data.yaml")

    return read


def test_sources_and_their_paths(read, tmp_path):
    sources = read(
        """
        sources:
          photos: {kind: text_to_image, format: webdataset, data: "a/*.tar", columns: {image: [jpg, png]}, weight: 0.7}
          talk: {kind: image_to_text, format: json, data: "hf://datasets/a/b/x.json", pictures: /coco, weight: 0.2}
          edits: {kind: editing, format: timbrooks/instructpix2pix-clip-filtered, streaming: true, weight: 0.1}
        """
    )
    assert sources["photos"].data == f"{tmp_path}/a/*.tar" and sources["photos"].columns == {"image": ("jpg", "png")}
    assert sources["talk"].data == "hf://datasets/a/b/x.json" and sources["talk"].pictures == "/coco"
    assert sources["edits"].streaming and sources["edits"].data is None
    assert set(plan.KINDS) <= set(KINDS)


A, B = "a: {kind: text, format: json, data: a.json", "b: {kind: text, format: json, data: b.json"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("", "has no `sources`"),
        ("a: {kind: song, format: json, data: a}", "source a: `kind` must be one of text, .*, but got 'song'"),
        ("a: {kind: text}", "source a: it needs format, in words"),
        ("a: {kind: text, format: json}", "source a: `data` must name the files of the format json"),
        (f"{A}, colour: red}}", "source a: unknown fields colour; there are kind, "),
        (f"{A}, columns: {{image: x}}}}", "source a: `columns` of the kind text are text, or .*, but got image"),
        (f"{A}, columns: x}}", "source a: `columns` must have a column for each part"),
        (f"{A}, streaming: true}}", "source a: `streaming` is for what `datasets` loads"),
        (f"{A}, raft: x}}", "source a: `raft` is for the kind video"),
        (f"{A}, prompt_style: loud}}", "source a: `prompt_style` must be"),
        (f"{A}, weight: -1}}", "source a: `weight` must be a share"),
        (f"{A}, weight: yes}}", "source a: `weight` must be a share"),
        (f"{A}, weight: 0.5}}\n  {B}}}", "b have no `weight`. Give one to all sources, or to none"),
        (f"{A}, weight: 0.5}}\n  {B}, weight: 0.4}}", r"the weights sum to 0.9 and not to 1 \(a 0.5, b 0.4\)"),
        ("a/b: {kind: text, format: json, data: a}", "a source's name is that of its folder of codes"),
        ("a: 3", "source a: it must have the fields kind and format"),
        ("a: {", "is no YAML"),
    ],
)
def test_what_is_refused(read, entries, message):
    with pytest.raises(ValueError, match=message):
        read(f"sources:\n  {entries}\n")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=4))
def test_each_source_has_its_share_and_none_of_its_samples_is_left_out(drawn):
    rows = {
        str(index): datasets.Dataset.from_dict({"id": [f"{index} {row}" for row in range(length)]})
        for index, (length, _) in enumerate(drawn)
    }
    total = sum(weight for _, weight in drawn)
    weights = {str(index): weight / total for index, (_, weight) in enumerate(drawn)}
    mixed = mix_coded_datasets(rows, weights)["id"]
    owners = np.array([name.split()[0] for name in mixed])
    for name, dataset in rows.items():
        assert abs((owners == name).mean() - weights[name]) <= len(drawn) / len(mixed)
        counts = [mixed.count(row) for row in dataset["id"]]
        assert min(counts) >= 1 and max(counts) - min(counts) <= 1
    assert any(sorted(row for row in mixed if row.split()[0] == name) == sorted(rows[name]["id"]) for name in rows)
    assert sorted(mix_coded_datasets(rows)["id"]) == sorted(row for dataset in rows.values() for row in dataset["id"])


def test_mixing_refuses_what_it_can_not_mix():
    full, empty = (datasets.Dataset.from_dict({"id": ids}) for ids in (["a"], []))
    with pytest.raises(ValueError, match="b have no samples"):
        mix_coded_datasets({"a": full, "b": empty})
    for weights in ({"a": 0.5}, {"a": 0.5, "c": 0.5}, {"a": 0.5, "b": 0.4}):
        with pytest.raises(ValueError, match="`weights` must sum to 1 over a, b"):
            mix_coded_datasets({"a": full, "b": full}, weights)
