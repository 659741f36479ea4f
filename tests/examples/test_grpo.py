"""The GRPO scripts: a step each, and the detector that rewards shapes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from trl import TrlParser

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import grpo_shapes
import grpo_text_rendering
from tiny_world.detector import detect_objects, scene_metadata
from tiny_world.shapes import KINDS, render, sample_scene
from transformers_nextflow.generation_config_nextflow import PAPER_SAMPLING
from transformers_nextflow.trainer import NextFlowGRPOConfig, detector_reward

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


def test_the_papers_run(tmp_path):
    """As it is written, and, with fewer scales and pictures, as it runs."""
    file = ["--config", str(EXAMPLES / "configs" / "grpo_paper.yaml"), "--output_dir", str(tmp_path)]
    on_a_cpu = ["--use_cpu", "true", "--bf16", "false"]
    (settings,) = TrlParser(NextFlowGRPOConfig).parse_args_and_config([*file, *on_a_cpu])
    prefixes = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    assert (prefixes, settings.num_generations, settings.num_middle_rollouts) == (16 * 16, 16, 2)
    assert settings.per_device_train_batch_size * settings.steps_per_generation == settings.num_generations
    assert (settings.num_trained_scales, settings.middle_return_scale, settings.max_steps) == (None, 12, 1200)
    assert (settings.adam_beta1, settings.adam_beta2, settings.weight_decay) == (0.9, 0.95, 0.05)
    drawn = {"guidance_scale": settings.guidance_scale, "image_top_k": settings.top_k, "image_top_p": settings.top_p}
    assert {**drawn, **settings.generation_kwargs} == PAPER_SAMPLING and settings.beta > 0

    small = ["--middle_return_scale", "4", "--steps_per_generation", "1", "--gradient_accumulation_steps", "1"]
    small += ["--activation_checkpointing", "false"]
    trainer = grpo_shapes.main([*file, *STEP, *small])
    (entry,) = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert abs(entry["kl"]) < 1e-6  # nothing was learned yet


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
