"""A model and an image tokenizer that are not of one checkpoint are refused wherever they meet."""

import copy
import json
import shutil

import pytest
import torch
from transformers import AddedToken, pipeline

from diffusers_nextflow import NextFlowPipeline
from transformers_nextflow import (
    NextFlowForCausalLM,
    NextFlowImageTokenizer,
    NextFlowImageTokenizerConfig,
    NextFlowProcessor,
    NextFlowSession,
    NextFlowTextToImagePipeline,
    check_same_codebook,
    hash_image_tokenizer,
    reseat_codebook,
    tiny_checkpoint,
)


@pytest.fixture(scope="module")
def parts(tiny_random_checkpoint):
    """A model with a hash, its processor, and an image tokenizer with one code vector changed."""
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint)
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    model.config.image_tokenizer_hash = hash_image_tokenizer(processor.image_tokenizer)
    other = NextFlowImageTokenizer.from_pretrained(tiny_random_checkpoint, subfolder="image_tokenizer")
    with torch.no_grad():
        other.quantizer.pixel_codebook.weight[3] += 1
    swapped = NextFlowProcessor(processor.image_processor, processor.tokenizer, other, processor.visual_token_offset)
    return model, processor, swapped


def grpo(model, processor):
    trainer = pytest.importorskip("transformers_nextflow.trainer")
    settings = trainer.NextFlowGRPOConfig("unused", use_cpu=True, report_to="none")
    return trainer.NextFlowGRPOTrainer(
        model, lambda images, **_: [0.0] * len(images), settings, processing_class=processor
    )


def sft(model, processor):
    trainer = pytest.importorskip("transformers_nextflow.trainer")
    settings = trainer.NextFlowSFTConfig("unused", use_cpu=True, report_to="none")
    return trainer.NextFlowSFTTrainer(model, settings, processing_class=processor)


def diffusers_pipeline(model, processor):
    return NextFlowPipeline(model, processor.image_tokenizer, processor.tokenizer, processor.image_processor)


def transformers_pipeline(model, processor):
    return NextFlowTextToImagePipeline(model, processor=processor)


def folder(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return NextFlowProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("door", [NextFlowSession, diffusers_pipeline, transformers_pipeline, grpo, sft, folder])
def test_every_door_refuses_a_swapped_image_tokenizer(parts, door, tmp_path):
    model, processor, swapped = parts
    arguments = (tmp_path,) if door is folder else ()
    if door not in (grpo, sft):
        door(model, processor, *arguments)
    with pytest.raises(ValueError, match=r"but this one's codebook is .* the same code means another picture"):
        door(model, swapped, *arguments)


@pytest.mark.parametrize("door", [NextFlowSession, diffusers_pipeline, transformers_pipeline])
def test_every_door_refuses_another_text_tokenizer(parts, door):
    model, processor, _ = parts
    other = copy.deepcopy(processor.tokenizer)
    other.add_tokens([AddedToken("<other>", special=True)])
    other.boi_token = "<other>"
    rest = processor.image_tokenizer, processor.visual_token_offset
    with pytest.raises(
        ValueError, match=r"text tokenizer is not the model's: its `boi_token_id` is .* and the model's"
    ):
        door(model, NextFlowProcessor(processor.image_processor, other, *rest))


@pytest.mark.parametrize("load", [NextFlowProcessor.from_pretrained, pipeline, NextFlowPipeline.from_pretrained])
@pytest.mark.parametrize("kind", ["tiny_random_checkpoint", "tiny_tokenflow_checkpoint"])
def test_every_door_refuses_a_folder_without_a_vocabulary(load, kind, request, tmp_path):
    """transformers makes a tokenizer of a handful of tokens for it."""
    shutil.copytree(request.getfixturevalue(kind), tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no .*tokenizer\.json"):
        load("text-to-image", str(tmp_path)) if load is pipeline else load(tmp_path)


def test_the_shipped_checkpoint_states_its_hash(tmp_path):
    shutil.copytree(tiny_checkpoint(), tmp_path, dirs_exist_ok=True)
    processor = NextFlowProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        processor.image_tokenizer.quantizer.semantic_codebook.weight[1:] += 0.5
    processor.image_tokenizer.save_pretrained(tmp_path / "image_tokenizer")
    with pytest.raises(ValueError, match="trained on codes of the image tokenizer"):
        NextFlowProcessor.from_pretrained(tmp_path)


def test_reseated_it_is_accepted(parts, tiny_random_checkpoint, tmp_path):
    _, _, swapped = parts
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint)
    reseat_codebook(model, swapped.image_tokenizer)
    torch.testing.assert_close(model.model.visual_codebook.weight, swapped.image_tokenizer.quantizer.codebook())
    assert folder(model, swapped, tmp_path).image_tokenizer is not None
    assert json.loads((tmp_path / "config.json").read_text())["image_tokenizer_hash"] == hash_image_tokenizer(
        swapped.image_tokenizer
    )


def test_other_sizes_and_strides(parts):
    model, processor, _ = parts
    settings = {**processor.image_tokenizer.config.to_dict(), "codebook_size": 32}
    smaller = NextFlowImageTokenizer(NextFlowImageTokenizerConfig.from_dict(settings))
    with pytest.raises(ValueError, match="draws 64 codes but the image tokenizer has 32"):
        check_same_codebook(model.config, smaller)
    with pytest.raises(ValueError, match=r"codebook of \(32, 12\), but the model's is \(64, 12\)"):
        reseat_codebook(model, smaller)
    settings = {**processor.image_tokenizer.config.to_dict(), "stride": 8, "pixel_patch_size": 2}
    finer = NextFlowImageTokenizer(NextFlowImageTokenizerConfig.from_dict(settings))
    for meet in (
        check_same_codebook,
        lambda _, finer: NextFlowProcessor(processor.image_processor, processor.tokenizer, finer),
    ):
        with pytest.raises(ValueError, match="a `stride` of 8 pixels, but a NextFlow model plans its images with 16"):
            meet(model.config, finer)
    check_same_codebook(model.config, None)
