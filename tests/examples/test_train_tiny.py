"""The training of nextflow-tiny, a few steps long: every stage, a kill in the middle, the finished checkpoint."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from diffusers_nextflow import NextFlowPipeline
from tiny_world import train_image_tokenizer as tokenizer_training
from tiny_world import train_language_model as language_training
from tiny_world import training_state
from tiny_world.codes import extract_codes
from tiny_world.dataset import sample_images
from tiny_world.package import package, write_model_card
from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor
from transformers_nextflow.trainer import NextFlowSFTConfig, NextFlowSFTTrainer, hash_image_tokenizer
from transformers_nextflow.trainer.coded_dataset import COLUMNS

SHAPES_ONLY = {"shapes": 1.0}


class Killed(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def a_step_takes_a_second():
    """Budgets count looks at the clock, of which a step takes one, so they hold on a busy machine too."""
    ticks = itertools.count()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(training_state, "clock", lambda: float(next(ticks)))
        yield


def kill_after(monkeypatch, module, name: str, calls: int):
    """The `calls`-th call of a step function raises, as a kill would strike."""
    step, count = getattr(module, name), 0

    def counting(*args, **kwargs):
        nonlocal count
        count += 1
        if count > calls:
            raise Killed
        return step(*args, **kwargs)

    monkeypatch.setattr(module, name, counting)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def image_tokenizer(work):
    """Trained for 9 steps, killed once."""
    images = sample_images(np.random.default_rng(0), 12, SHAPES_ONLY)

    def train(seconds):
        return tokenizer_training.train(
            images,
            lambda: lambda pixels: torch.nn.functional.avg_pool2d(pixels, 16).repeat(1, 4, 1, 1),
            work / "image_tokenizer",
            seconds=seconds,
            batch_size=2,
            semantic_feature_dim=12,
        )

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(training_state, "SAVE_EVERY", 0.0)
        kill_after(monkeypatch, tokenizer_training, "step_losses", calls=2)
        with pytest.raises(Killed):
            train(seconds=60)
    assert (work / "image_tokenizer" / "pixel.state.pt").exists()
    return train(seconds=9)


def test_image_tokenizer_goes_through_all_stages(work, image_tokenizer):
    stages = [stage.name for stage in tokenizer_training.STAGES]
    assert stages == ["pixel", "joint", "decoder"]
    assert all((work / "image_tokenizer" / stage / "model.safetensors").exists() for stage in stages)
    assert not list((work / "image_tokenizer").glob("*.state.pt"))
    assert image_tokenizer.config.decoder_hidden_sizes == [64, 96, 96]  # twice the joint stage's


def test_codes_are_extracted_once_and_in_shards(work, image_tokenizer, monkeypatch):
    monkeypatch.setattr("tiny_world.codes.CHUNK", 3)
    whole = extract_codes(image_tokenizer, work / "codes", 8, seed=1, weights=SHAPES_ONLY)
    assert whole.clean.shape == whole.corrected.shape == whole.targets.shape == (8, 204)
    for shard in (0, 1):
        apart = extract_codes(image_tokenizer, work / "shards", 8, seed=1, weights=SHAPES_ONLY, shard=(shard, 2))
    assert apart.captions == whole.captions and np.array_equal(apart.corrected, whole.corrected)
    monkeypatch.setattr("tiny_world.codes.mixed_sample", None)  # a second run draws nothing
    assert np.array_equal(extract_codes(image_tokenizer, work / "codes", 8, seed=1).clean, whole.clean)


def test_language_model_learns_resumes_and_is_packaged(work, image_tokenizer, tiny_random_checkpoint, monkeypatch):
    text_tokenizer = AutoTokenizer.from_pretrained(tiny_random_checkpoint)
    codes = extract_codes(image_tokenizer, work / "few_codes", 6, seed=2, weights=SHAPES_ONLY)
    config = language_training.tiny_config(text_tokenizer, image_tokenizer)
    batches = language_training.Batches(codes, text_tokenizer, config)
    monkeypatch.setattr(language_training, "WARM_UP_STEPS", 2)
    monkeypatch.setattr(language_training, "CURRICULUM", ((0.5, 3, 4), (1.0, 8, 4)))

    def train(seconds):
        torch.manual_seed(0)
        model = language_training.new_model(config, image_tokenizer)
        return language_training.train(model, batches, work / "language_model", seconds)

    with pytest.MonkeyPatch.context() as killer:
        killer.setattr(training_state, "SAVE_EVERY", 0.0)
        kill_after(killer, language_training, "batch_loss", calls=3)
        with pytest.raises(Killed):
            train(8)
    state = torch.load(work / "language_model" / "state.pt", weights_only=True)
    assert state["step"] == 3
    rng = np.random.default_rng(0)
    batch = batches.draw(rng, 4, 8)
    torch.manual_seed(0)
    fresh = language_training.new_model(config, image_tokenizer)
    model = train(8)
    with torch.no_grad():
        before, after = (language_training.batch_loss(m, batch, whole_vocabulary=False)[0] for m in (fresh, model))
    assert after < before - 0.2

    package(model, image_tokenizer, text_tokenizer, work / "checkpoint")
    write_model_card(work / "checkpoint", "| figure | value |")
    card = (work / "checkpoint" / "README.md").read_text()
    assert "| figure | value |" in card and "no official weights exist" in card
    pipe = NextFlowPipeline.from_pretrained(work / "checkpoint")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", generator=torch.Generator().manual_seed(0)).images[0].size == (128, 128)


def test_a_packaged_checkpoint_tells_its_image_tokenizer(tmp_path, tiny_random_checkpoint):
    """So that codes of another one are refused, whatever dtype either was in."""
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint)
    package(model, processor.image_tokenizer.float(), processor.tokenizer, tmp_path)
    loaded = NextFlowForCausalLM.from_pretrained(tmp_path).config.image_tokenizer_hash
    assert loaded == hash_image_tokenizer(NextFlowProcessor.from_pretrained(tmp_path).image_tokenizer)
    others = {**{name: [] for name in COLUMNS}, "codebook_size": 0, "image_tokenizer_hash": "another"}
    settings = NextFlowSFTConfig(str(tmp_path / "run"), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=f"but the model was trained on codes of {loaded}"):
        NextFlowSFTTrainer(str(tmp_path), settings, train_dataset=Dataset.from_list([others]))


def test_loss_over_the_whole_vocabulary_is_the_models_own(image_tokenizer, work, tiny_random_checkpoint):
    """The training's loss differs from `NextFlowForCausalLM`'s in how text is weighed, and in nothing else."""
    text_tokenizer = AutoTokenizer.from_pretrained(tiny_random_checkpoint)
    codes = extract_codes(image_tokenizer, work / "loss_codes", 4, seed=3, weights=SHAPES_ONLY)
    config = language_training.tiny_config(text_tokenizer, image_tokenizer)
    torch.manual_seed(0)
    model = language_training.new_model(config, image_tokenizer)
    batch = language_training.Batches(codes, text_tokenizer, config).draw(np.random.default_rng(0), 3, 4)
    labels = batch.labels.masked_fill(batch.labels < config.text_vocab_size, -100)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            image_grid_shw=batch.image_grid_shw,
            labels=labels,
        ).loss
    loss, text_loss, _ = language_training.batch_loss(model, batch, whole_vocabulary=True)
    assert loss.item() - language_training.TEXT_WEIGHT * text_loss == pytest.approx(expected.item(), rel=1e-2)
