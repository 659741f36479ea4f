"""Checkpoints with `trust_remote_code=True`, in processes that have not imported the package."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoProcessor

from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, add_remote_code

DRAW = """
import sys
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoProcessor, pipeline

source, target = sys.argv[1:]
trust = {"trust_remote_code": True}
image_processor = AutoImageProcessor.from_pretrained(source, **trust)
model = AutoModelForCausalLM.from_pretrained(source, **trust)
processor = AutoProcessor.from_pretrained(source, **trust)
draw = pipeline("any-to-any", model=source, **trust)
(result,) = draw(text="a cat", generation_mode="image")
model.save_pretrained(target)
processor.save_pretrained(target)
print(type(image_processor).__name__, type(model).__name__, type(processor).__name__, result["generated_image"].size)
"""


@pytest.fixture(scope="module")
def checkpoint(tiny_random_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote_code") / "checkpoint"
    shutil.copytree(tiny_random_checkpoint, folder)
    add_remote_code(folder)
    return folder


def test_fresh_process_loads_draws_and_saves(fresh_process, checkpoint, tmp_path):
    expected = "NextFlowImageProcessor NextFlowForCausalLM NextFlowProcessor (80, 80)"
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    assert fresh_process(DRAW, str(checkpoint), str(tmp_path / "saved"), **cache) == expected
    # What was saved can be loaded in the same way.
    assert (tmp_path / "saved" / "nextflow_remote_code.py").is_file()
    for file in ("config.json", "processor_config.json"):
        saved, original = (json.loads((folder / file).read_text()) for folder in (tmp_path / "saved", checkpoint))
        assert saved["auto_map"] == original["auto_map"]


def test_installed_classes_are_preferred_once_imported(checkpoint):
    assert type(AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)) is NextFlowForCausalLM
    assert type(AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)) is NextFlowProcessor


def test_entries_name_the_shim(checkpoint):
    assert (checkpoint / "nextflow_remote_code.py").is_file()
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["auto_map"]["AutoModelForMultimodalLM"] == "nextflow_remote_code.NextFlowForCausalLM"
    assert config["model_type"] == "nextflow"
    processor = json.loads((checkpoint / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": "nextflow_remote_code.NextFlowProcessor"}


def test_processor_saves_its_entry_with_the_shim(checkpoint, tmp_path):
    NextFlowProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path)
    assert (tmp_path / "nextflow_remote_code.py").is_file()
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["auto_map"] == {"AutoProcessor": "nextflow_remote_code.NextFlowProcessor"}


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json; save the model there first"):
        add_remote_code(tmp_path)
