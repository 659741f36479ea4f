"""The flat training loop: it learns, goes on after a kill as if unbroken, and what it saves loads."""

import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor
from transformers_nextflow.trainer import encode_messages

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import train_loop


@pytest.fixture(scope="module")
def codes(tiny_random_checkpoint, tmp_path_factory) -> Path:
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    samples = []
    for index in range(6):
        picture = np.random.default_rng(index % 2).integers(0, 256, (80, 80, 3), dtype=np.uint8)
        image = [{"type": "image", "image": picture}]
        drawing = [{"role": "user", "content": f"picture {index % 2}"}, {"role": "assistant", "content": image}]
        samples.append(encode_messages(drawing, processor))
    folder = tmp_path_factory.mktemp("codes")
    Dataset.from_list(samples).save_to_disk(folder / "saved")
    (folder / "saved" / "data-00000-of-00001.arrow").rename(folder / "000000.arrow")
    return folder


@pytest.fixture
def run(codes, tiny_random_checkpoint, tmp_path):
    def run(output: str, steps: int, *options: str) -> list[dict[str, float]]:
        common = [
            "--codes",
            str(codes),
            "--checkpoint",
            str(tiny_random_checkpoint),
            "--output",
            str(tmp_path / output),
        ]
        settings = ["--learning-rate", "0.01", "--budget", "500", "--log-every", "1", "--warmup", "1"]
        return train_loop.main([*common, *settings, "--steps", str(steps), *options])

    return run


def test_it_learns_and_saves_a_checkpoint(run, tmp_path):
    history = run("out", 12, "--task-inversion", "0.3")
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert {"text", "codes", "scale 1", "scale 5", "tokens/s"} <= set(history[0])
    NextFlowForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint")
    NextFlowProcessor.from_pretrained(tmp_path / "out" / "checkpoint")


def test_a_killed_run_goes_on_as_if_unbroken(run, monkeypatch):
    whole = run("whole", 6, "--condition-dropout", "0.5")
    saves = []
    real_save = train_loop.torch.save

    def save_and_die(state, path):
        real_save(state, path)
        saves.append(path)
        path.rename(path.with_suffix(".pt"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_loop.torch, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            run("killed", 6, "--condition-dropout", "0.5", "--save-every", "4")
    resumed = run("killed", 6, "--condition-dropout", "0.5")
    assert [entry["step"] for entry in resumed] == [5, 6]
    assert [e["loss"] for e in resumed] == pytest.approx([e["loss"] for e in whole[4:]], rel=1e-5)


def test_another_plan_does_not_resume(run):
    run("out", 1)
    with pytest.raises(ValueError, match=r"had 1 processes and \d packs, this one has 1 and \d"):
        run("out", 2, "--budget", "1000")
