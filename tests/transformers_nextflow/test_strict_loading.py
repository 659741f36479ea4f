"""Only whole, sound checkpoints of safetensors load, and every error says which file is wrong."""

import json
import os
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoProcessor

from transformers_nextflow import (
    NextFlowConfig,
    NextFlowForCausalLM,
    NextFlowImageProcessor,
    NextFlowImageTokenizer,
    NextFlowProcessor,
)

INDEX = "model.safetensors.index.json"


def load_model(folder, **kwargs):
    return NextFlowForCausalLM.from_pretrained(folder, **kwargs)


def load_by_auto_class(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def load_image_tokenizer(folder, **kwargs):
    return NextFlowImageTokenizer.from_pretrained(folder, **kwargs)


def load_by_processor(folder):
    return NextFlowProcessor.from_pretrained(folder.parent)


DOORS = [load_model, load_by_auto_class, load_image_tokenizer, load_by_processor]


@pytest.fixture
def copy(tiny_random_checkpoint, tmp_path):
    """A copy of the checkpoint, whole or in shards; `copy(door)` is the folder that the door loads weights from."""

    def make(door, shards=False):
        folder = tmp_path / "checkpoint"
        shutil.copytree(tiny_random_checkpoint, folder)
        if door in (load_image_tokenizer, load_by_processor):
            folder = folder / "image_tokenizer"
        if shards:
            kind = NextFlowForCausalLM if folder.name == "checkpoint" else NextFlowImageTokenizer
            kind.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
            assert (folder / INDEX).is_file() and not (folder / "model.safetensors").exists()
        return folder

    return make


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "name", ["shard.bin", "../shard.safetensors", "/absolute/shard.safetensors", "a/b.safetensors"]
)
def test_shards_are_safetensors_of_the_folder(copy, door, name, monkeypatch):
    folder = copy(door, shards=True)
    index = json.loads((folder / INDEX).read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    outside = (folder.parent / "elsewhere.safetensors") if name.startswith("/") else folder / name
    outside.parent.mkdir(exist_ok=True)
    shutil.copy(folder / first, outside)
    name = str(outside) if name.startswith("/") else name
    index["weight_map"] = {key: name if file == first else file for key, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was reached"))
    with pytest.raises(ValueError, match=r"loads only safetensors files .* of the checkpoint's own folder"):
        door(folder)


def test_a_config_names_no_other_weights(copy):
    folder = copy(load_model)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "x.safetensors.index.json"}))
    with pytest.raises(ValueError, match="loads only safetensors"):
        load_model(folder)


@pytest.mark.parametrize("door", [load_model, load_image_tokenizer, load_by_processor])
@pytest.mark.parametrize("content", [None, "{}", '{"model_type": "llama"}'])
def test_no_configuration(copy, door, content):
    folder = copy(door)
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    if door is load_by_processor and content is None:
        return  # a processor without an image tokenizer
    with pytest.raises(ValueError, match="has no configuration of a nextflow"):
        door(folder)


def test_no_configuration_of_its_own(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing or empty"):
        NextFlowConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing shard"])
def test_damaged_weights_are_named(copy, door, damage):
    folder = copy(door, shards=damage == "missing shard")
    file = sorted(folder.glob("*.safetensors"))[0]
    whole = file.read_bytes()
    if damage == "missing shard":
        file.unlink()
    else:
        file.write_bytes({"cut": whole[:-100], "empty": b"", "text": b"not weights at all, but text"}[damage])
    for kwargs in {} if door is load_by_processor else ({}, {"dtype": "auto"}):
        with pytest.raises(ValueError, match=f"{file.name}.* is missing or damaged"):
            door(folder, **kwargs)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": {}}', b"\xff\xfe"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
def test_damaged_json_is_named(copy, name, content):
    folder = copy(load_model, shards=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if name == "generation_config.json" and content in ("{}", '{"weight_map": {}}'):
        return
    no_config = name == "config.json" and content in ("{}", '{"weight_map": {}}')
    with pytest.raises(ValueError, match="has no configuration" if no_config else f"{name}.* is damaged"):
        load_model(folder)


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("load", [NextFlowProcessor.from_pretrained, AutoProcessor.from_pretrained])
def test_damaged_files_of_a_processor_are_named(copy, name, load):
    folder = copy(load_model)
    whole = (folder / name).read_text()
    (folder / name).write_text(whole[: len(whole) // 2])
    with pytest.raises((ValueError, OSError), match=name):
        load(folder)


@pytest.mark.parametrize("load", [AutoImageProcessor.from_pretrained, NextFlowImageProcessor.from_pretrained])
def test_a_damaged_file_of_an_image_processor_is_named(copy, load):
    folder = copy(load_model)
    (folder / "processor_config.json").write_text("{")
    with pytest.raises((ValueError, OSError), match=r"processor_config\.json"):
        load(folder)


def test_a_folder_without_a_processor(copy):
    folder = copy(load_model)
    (folder / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="has no processor"):
        NextFlowProcessor.from_pretrained(folder)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.int64, torch.bool, torch.complex64])
def test_weights_are_finite_floats(copy, door, value):
    folder = copy(door)
    weights = load_file(folder / "model.safetensors")
    name = "model.norm.weight" if "model.norm.weight" in weights else "pixel_proj.bias"
    if isinstance(value, torch.dtype):
        weights[name] = weights[name].to(value)
        match = f"holds tensors that are no floating-point numbers.*{name}"
    else:
        weights[name][0] = value
        match = f"are NaN or infinite: {name}"
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=match):
        door(folder)


def test_large_half_precision_weights_are_no_infinite_ones(copy):
    folder = copy(load_model)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(60000.0)
    save_file({name: weight.half() for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    load_model(folder, dtype=torch.float16)


@pytest.mark.parametrize("door", [load_model, load_by_auto_class])
def test_missing_weights_are_reported_when_asked(copy, door):
    folder = copy(door)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"Missing weights: model.norm.weight.*strict=False"):
        door(folder)
    model, info = door(folder, strict=False, output_loading_info=True)
    assert info["missing_keys"] == {"model.norm.weight"} and model.model.norm.weight.isfinite().all()
    assert isinstance(door(folder, strict=False), NextFlowForCausalLM)


def test_saved_files_have_the_permissions_of_the_umask(copy, tmp_path):
    model, processor = load_model(copy(load_model)), NextFlowProcessor.from_pretrained(tmp_path / "checkpoint")
    before = os.umask(0o027)
    try:
        model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
        processor.save_pretrained(tmp_path / "saved")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_a_save_that_fails_leaves_what_was_there(copy, tmp_path, monkeypatch):
    folder = copy(load_model)
    model = load_model(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full_disk(tensors, file, metadata=None):
        with open(file, "wb") as half:
            half.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_weights_of_an_older_save_do_not_stay(copy):
    folder = copy(load_model)
    model = load_model(folder)
    for sizes in ("20KB", "40KB", "1GB", "20KB"):
        with torch.no_grad():
            model.model.norm.weight.add_(1)
        model.save_pretrained(folder, max_shard_size=sizes)
        torch.testing.assert_close(load_model(folder).model.norm.weight, model.model.norm.weight)
        number = len(list(folder.glob("*.safetensors")))
        assert (folder / INDEX).exists() == (number > 1)
    assert (folder / "processor_config.json").exists()


def test_a_processor_loads_in_the_dtype_that_is_asked_for(tiny_random_checkpoint, tmp_path):
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint, dtype=torch.bfloat16)
    assert processor.image_tokenizer.dtype == torch.bfloat16
    assert processor.image_tokenizer.quantizer.pixel_codebook.weight.dtype == torch.float32
    processor.save_pretrained(tmp_path)
    assert NextFlowProcessor.from_pretrained(tmp_path).image_tokenizer is not None
