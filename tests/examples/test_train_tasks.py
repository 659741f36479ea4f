"""The tasks' codes, batches, training and evaluation, a few steps long."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
pytest.importorskip("scipy", reason="the judge needs the [tiny] extra")

from test_train_tiny import Killed, a_step_takes_a_second, kill_after  # noqa: F401

import evaluate_tiny
from tiny_world import task_codes, training_state
from tiny_world import train_tasks as task_training
from tiny_world.codes import extract_codes
from tiny_world.evaluate_tasks import TaskEvaluation
from tiny_world.train_language_model import SCHEDULE, Batches, batch_loss
from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, tiny_checkpoint
from transformers_nextflow.token_layout import TokenLayout


@pytest.fixture(scope="module")
def parts():
    model = NextFlowForCausalLM.from_pretrained(tiny_checkpoint(), dtype=torch.float32)
    processor = NextFlowProcessor.from_pretrained(tiny_checkpoint())
    processor.image_tokenizer.float()
    return model, processor


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("task_codes")
    task_codes.extract_task_codes(parts[1], folder, 40, seed=0)
    return folder


def test_codes_are_those_of_the_processor(parts, folder):
    chunk = np.load(folder / "00000.npz")
    assert len(chunk["conversations"]) == 40
    assert chunk["clean"].shape == chunk["corrected"].shape == (len(chunk["targets"]), SCHEDULE.num_tokens)
    assert (chunk["corrected"] != chunk["targets"]).any()


@pytest.mark.parametrize("num_scales", [5, 8])
def test_batches_hold_whole_conversations(parts, folder, num_scales, monkeypatch):
    model, processor = parts
    monkeypatch.setattr(task_codes, "DRAWN", dict.fromkeys(task_codes.DRAWN, 1.0))
    batches = task_codes.TaskBatches(folder, processor, model.config)
    rng = np.random.default_rng(0)
    for _ in range(8):
        batch = batches.draw(rng, num_scales)
        assert batch.input_ids.numel() <= task_codes.MAX_SLOTS
        is_code = batch.input_ids >= model.config.text_vocab_size
        assert int(is_code.sum()) == len(batch.image_grid_shw) * SCHEDULE.offsets[num_scales]
        learned = batch.labels != -100
        assert learned.any(-1).all() and not learned[batch.attention_mask == 0].any()
        TokenLayout.of(batch.input_ids, batch.image_grid_shw, model.config, batch.attention_mask)  # nothing is cut


def test_a_batch_of_texts_has_no_images_and_trains(parts, tmp_path, monkeypatch):
    model, processor = parts
    monkeypatch.setattr(task_codes, "MIXTURE", {"reading": 1.0})
    task_codes.extract_task_codes(processor, tmp_path, 8, seed=0)
    batches = task_codes.TaskBatches(tmp_path, processor, model.config)
    assert {task: len(entries) for task, entries in batches.members.items()} == {"look": 1, "reading": 7}
    batches.shares = np.array([float(task == "reading") for task in batches.members])
    batch = batches.draw(np.random.default_rng(0), 8)
    assert batch.image_grid_shw.shape == (0, 3)
    loss, text_loss, code_loss = batch_loss(model, batch, True, 1.0, 1.0)
    assert loss.item() == pytest.approx(text_loss) and text_loss > 0 and code_loss == 0


def test_a_kill_loses_nothing(parts, folder, tmp_path, monkeypatch):
    model, processor = parts
    codes = extract_codes(processor.image_tokenizer, tmp_path / "codes", 8, 0, weights={"shapes": 1.0})
    pictures = Batches(codes, processor.tokenizer, model.config)
    tasks = task_codes.TaskBatches(folder, processor, model.config)
    monkeypatch.setattr(task_codes, "MAX_SLOTS", 256)
    monkeypatch.setattr(task_training, "PICTURES", 1)
    monkeypatch.setattr(task_training, "PICTURE_MIXTURE", {"shapes": 1.0})
    monkeypatch.setattr(training_state, "SAVE_EVERY", 0.0)

    def train(seconds):
        fresh = NextFlowForCausalLM.from_pretrained(tiny_checkpoint(), dtype=torch.float32)
        return task_training.train(fresh, pictures, tasks, tmp_path / "run", seconds=seconds)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, task_training, "batch_loss", 2 * (1 + task_training.TASK_BATCHES) + 1)
        train(60.0)
    saved = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert saved["step"] == 2
    trained = train(saved["spent"] + 1)
    assert not torch.equal(trained.lm_head.weight, model.lm_head.weight)
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_every_task_is_evaluated(parts):
    model, processor = parts

    def reconstruct(tokenizer, images):
        return evaluate_tiny.reconstruct(tokenizer, images)[0]

    rows = TaskEvaluation(model, processor, reconstruct, 2, 0, 8, {}).rows()
    names = {(row.group, row.name) for row in rows}
    assert {
        ("edit, overall", "accuracy"),
        ("edit, untouched region", "PSNR to the source's reconstruction, dB"),
        ("captioning", "exact attributes"),
        ("question, overall", "right"),
        ("looking first, overall", "right"),
        ("story", "identity in pairs"),
        ("story", "moves"),
        ("thought, overall", "gain by thinking"),
    } <= names
    assert all(row.drawn == 1 for row in rows if row.drawn is not None and row.group != "story")
