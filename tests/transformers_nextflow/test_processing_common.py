"""What transformers checks of every processor, and what a processor must survive: other processes, bad arguments."""

import copy
import json
import multiprocessing
import pickle
import shutil

import pytest
import torch
from datasets.fingerprint import Hasher
from PIL import Image

from transformers_nextflow import NextFlowProcessor, processing_nextflow

PICTURE = Image.new("RGB", (80, 80), "teal")
CHAT = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What is it?"}]}]


@pytest.fixture
def processor(tiny_random_checkpoint) -> NextFlowProcessor:
    return NextFlowProcessor.from_pretrained(tiny_random_checkpoint)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def read_in_worker(pickled: bytes) -> list[list[int]]:
    return pickle.loads(pickled)("<image>", images=PICTURE).input_ids


def test_by_position_in_either_order(processor):
    named = processor(text="<image>", images=PICTURE, return_tensors="pt")
    assert same(processor("<image>", PICTURE, return_tensors="pt"), named)
    assert same(processor(PICTURE, "<image>", return_tensors="pt"), named)
    assert same(processor([PICTURE], ["<image>"], return_tensors="pt"), named)
    with pytest.raises(ValueError, match="has 0 `<image>` marks, but there are 1 images"):
        processor("picture.png", "<image>")  # which is which? text comes first
    with pytest.raises(ValueError, match="`text` must be"):
        processor(None, "a cat")


def test_options_flat_and_in_groups(processor):
    flat = processor("<image>", PICTURE, num_scales=4, padding="max_length", max_length=60, return_tensors="pt")
    groups = {
        "text_kwargs": {"padding": "max_length", "max_length": 60},
        "images_kwargs": {"num_scales": 4},
        "common_kwargs": {"return_tensors": "pt"},
    }
    assert same(processor("<image>", PICTURE, **groups), flat) and flat.input_ids.shape == (1, 60)
    with pytest.raises(ValueError, match="passed two times"):
        processor("<image>", PICTURE, num_scales=4, images_kwargs={"num_scales": 4})
    with pytest.raises(ValueError, match=r"Neither the tokenizer nor the image processor takes num_scale\."):
        processor("<image>", PICTURE, num_scale=4)


def test_the_parts_own_defaults_hold(tiny_random_checkpoint, processor, tmp_path):
    parts = processor.tokenizer, processor.image_processor
    other = NextFlowProcessor.from_pretrained(tiny_random_checkpoint, padding_side="right", num_scales=4)
    assert other.tokenizer.padding_side == "right" and other.image_processor.num_scales == 4
    other.save_pretrained(tmp_path)
    loaded = NextFlowProcessor.from_pretrained(tmp_path)
    assert (
        loaded.tokenizer.padding_side == "right" and loaded.image_processor.to_dict() == other.image_processor.to_dict()
    )
    batch = loaded(["<image>", "a"], PICTURE, padding=True, return_tensors="pt")
    assert batch.attention_mask[1].tolist()[:2] == [1, 0] and batch.image_grid_shw.tolist() == [[4, 16, 16]]
    assert parts[0].padding_side == "left"


def test_chats_in_batches(processor):
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    one = processor.apply_chat_template(CHAT, **options)
    two = processor.apply_chat_template([CHAT, CHAT], **options)
    assert torch.equal(two.input_ids, one.input_ids.repeat(2, 1)) and set(two) == set(processor.model_input_names)
    ids = processor.apply_chat_template(CHAT, tokenize=True, return_dict=False, add_generation_prompt=True)
    assert ids == one.input_ids.tolist()


def test_it_goes_to_spawned_workers_after_it_has_encoded(processor):
    before, ids = Hasher.hash(processor), processor("<image>", images=PICTURE).input_ids
    assert Hasher.hash(processor) == before
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_in_worker, (pickle.dumps(processor),)) == ids
    assert processor("<image>", images=PICTURE).input_ids == ids
    assert copy.deepcopy(processor)("<image>", images=PICTURE).input_ids == ids


def test_equal_processors_have_one_hash(processor, tiny_random_checkpoint):
    assert Hasher.hash(NextFlowProcessor.from_pretrained(tiny_random_checkpoint)) == Hasher.hash(processor)


def test_many_pictures_are_encoded_in_bounded_batches(processor, monkeypatch):
    pictures = [Image.new("RGB", size, "teal") for size in ((80, 80), (80, 80), (120, 60), (60, 90), (80, 80))]
    whole = processor("<image>" * 5, images=pictures, return_tensors="pt")
    sizes = []
    encode = type(processor.image_tokenizer).encode

    def watch(self, pixel_values, *args, **kwargs):
        sizes.append(len(pixel_values))
        return encode(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(type(processor.image_tokenizer), "encode", watch)
    monkeypatch.setattr(processing_nextflow, "ENCODED_TOGETHER", 2 * 80 * 80)
    assert same(processor("<image>" * 5, images=pictures, return_tensors="pt"), whole)
    assert max(sizes) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p("a\ud800b"), "text holds a lone surrogate"),
        (lambda p: p.apply_chat_template([{"role": "user", "content": "\udfff"}], tokenize=True), "lone surrogate"),
        (lambda p: p.decode([-100, 5]), "Ids must not be negative"),
        (lambda p: p("<image>", images=PICTURE, height="128", width=128), "height"),
        (lambda p: p.image_processor(PICTURE, num_scales="4"), "num_scales"),
        (
            lambda p: p("<video>", videos=[[PICTURE]], num_frames=float("nan")),
            "`num_frames` must be at least 1, a whole",
        ),
        (lambda p: p("<video>", videos=[[PICTURE]], num_frames=2.5), "`num_frames` must be at least 1, a whole number"),
        (lambda p: p.image_processor(PICTURE, do_rescale=False), "would normalize values from 0 to 255"),
        (lambda p: p.image_processor(PICTURE, image_mean=[float("nan")] * 3), "must be finite"),
        (lambda p: p.image_processor(PICTURE, image_std=[0.5, 0.5, 0.0]), "`image_std` not 0"),
        (lambda p: p.image_processor(PICTURE, rescale_factor=float("inf")), "must be finite"),
        (lambda p: p.image_processor(torch.full((3, 80, 80), float("nan"))), "from nan to nan"),
        (lambda p: p.image_tokenizer.encode(torch.full((1, 3, 80, 80), float("nan"))), r"floats in \[-1, 1\]"),
        (lambda p: p.decode_codes(torch.zeros(1, 55).long(), [[5.0, 16, 16]]), "whole numbers"),
        (lambda p: p.decode_codes(torch.zeros(1, 55).long(), [5, 16]), r"have shape \(num_images, 3\)"),
    ],
)
def test_mistakes_are_told(processor, call, message):
    with pytest.raises(ValueError, match=message):
        call(processor)


def test_values_as_they_are(processor):
    raw = processor.image_processor(PICTURE, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
    assert raw[0, :, 0, 0].tolist() == [0, 128, 128]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"half"])
@pytest.mark.parametrize(
    "name", ["processor_config.json", "tokenizer.json", "tokenizer_config.json", "image_tokenizer/config.json"]
)
def test_damaged_files_are_named(tiny_random_checkpoint, tmp_path, name, damage):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_random_checkpoint, folder)
    whole = (folder / name).read_bytes()
    assert isinstance(json.loads(whole), dict)
    (folder / name).write_bytes(whole[: len(whole) // 2] if damage == b"half" else damage)
    with pytest.raises((ValueError, OSError), match=name):
        NextFlowProcessor.from_pretrained(folder)
