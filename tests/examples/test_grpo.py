"""The GRPO scripts: a step each, and the detector that rewards shapes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import grpo_shapes
import grpo_text_rendering
from tiny_world.detector import detect_objects, scene_metadata
from tiny_world.shapes import KINDS, render, sample_scene
from transformers_nextflow.trainer import detector_reward

EXAMPLES = Path(__file__).parents[2] / "examples"
STEP = ["--max_steps", "1", "--num_generations", "2", "--per_device_train_batch_size", "4", "--use_cpu", "true"]
STEP += ["--bf16", "false", "--report_to", "none", "--logging_steps", "1", "--save_strategy", "no"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_detector_agrees_with_what_was_drawn(kind):
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, kind=kind) for _ in range(20)]
    pictures, metadata = [render(scene) for scene in scenes], [scene_metadata(scene) for scene in scenes]
    assert np.mean(detector_reward(pictures, metadata, detector=detect_objects)) >= 0.95
    others = metadata[1:] + metadata[:1]
    assert np.mean(detector_reward(pictures, others, detector=detect_objects)) <= 0.2
    empty = [np.full_like(pictures[0], 255)] * len(scenes)
    shares = detector_reward(empty, metadata, detector=detect_objects, partial_credit=True)
    assert 0 < max(shares) < 0.6  # nothing is superfluous, and nothing there


def test_shapes(tmp_path):
    trainer = grpo_shapes.main(
        ["--config", str(EXAMPLES / "grpo_shapes.yaml"), "--output_dir", str(tmp_path), "--kinds", "two", *STEP]
    )
    (entry,) = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert entry["reward"] > 0.5 and (tmp_path / "image_tokenizer").is_dir()
    with pytest.raises(ValueError, match="`kinds` must be some of"):
        grpo_shapes.main(["--output_dir", str(tmp_path), "--kinds", "emoji", *STEP])


def test_words_with_lora(tmp_path):
    pytest.importorskip("rapidocr")
    pytest.importorskip("matplotlib")
    trainer = grpo_text_rendering.main(
        ["--output_dir", str(tmp_path), "--use_peft", "true", "--lora_target_modules", "q_proj", "v_proj", *STEP]
    )
    (entry,) = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert -0.6 <= entry["reward"] <= 2 and (tmp_path / "adapter_model.safetensors").exists()


def test_the_flat_loop(tmp_path):
    options = ["--updates", "1", "--prompts", "2", "--group", "2", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "grpo_loop.py"), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("update   0  reward 0.") and (tmp_path / "model.safetensors").exists()


def test_true_goes_on_from_the_last_whole_checkpoint(tmp_path):
    options = ["--output_dir", str(tmp_path), "--kinds", "two", *STEP]
    options[options.index("--save_strategy") + 1] = "steps"
    options += ["--save_steps", "1", "--num_prompts", "4", "--num_trained_scales", "2"]
    grpo_shapes.main(options)
    (tmp_path / "checkpoint-7").mkdir()  # a kill left it so
    options[options.index("--max_steps") + 1] = "2"
    trainer = grpo_shapes.main([*options, "--resume_from_checkpoint", "true"])
    assert [entry["step"] for entry in trainer.state.log_history if "reward" in entry] == [1, 2]
