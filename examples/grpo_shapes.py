"""GRPO with prefix-tuning on the tiny world's shapes, with GenEval's rule as the reward.

    python examples/grpo_shapes.py --output_dir runs/shapes --max_steps 50
    python examples/grpo_shapes.py --config examples/grpo_shapes.yaml --use_peft true --learning_rate 0.1
    python examples/grpo_shapes.py --output_dir runs/two --kinds two count --num_trained_scales 8

The captions are those of the hard set by default, whose places are left open. Every field of `NextFlowGRPOConfig` and
of TRL's `ModelConfig` is an option, on the command line or in the YAML file. On a CPU add `--use_cpu true`.
"""

import json
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from trl import ModelConfig, TrlParser, get_peft_config

from tiny_world.detector import detect_objects, scene_metadata
from tiny_world.shapes import HARD_KIND, KINDS, sample_scene
from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, tiny_checkpoint
from transformers_nextflow.trainer import NextFlowGRPOConfig, NextFlowGRPOTrainer, detector_reward


@dataclass
class Task:
    """What is trained on."""

    kinds: list[str] = field(default_factory=lambda: [HARD_KIND], metadata={"help": f"Kinds of scenes: {KINDS}"})
    num_prompts: int = field(default=1000, metadata={"help": "Captions to draw."})
    partial_credit: bool = field(default=True, metadata={"help": "Reward the share of the conditions that hold."})


def make_dataset(task: Task, seed: int, split: str = "train", num_prompts: int | None = None) -> Dataset:
    """Captions and what they ask for, in GenEval's form."""
    rng = np.random.default_rng(seed)
    number = task.num_prompts if num_prompts is None else num_prompts
    scenes = [sample_scene(rng, split, task.kinds[index % len(task.kinds)]) for index in range(number)]
    return Dataset.from_list(
        [{"prompt": scene.caption, "metadata": json.dumps(scene_metadata(scene))} for scene in scenes]
    )


def main(arguments: list[str] | None = None) -> NextFlowGRPOTrainer:
    task, settings, model_config = TrlParser(
        (Task, NextFlowGRPOConfig, ModelConfig), allow_abbrev=False
    ).parse_args_and_config(arguments)
    if unknown := set(task.kinds) - KINDS.keys():
        raise ValueError(f"`kinds` must be some of {', '.join(KINDS)}, but got {', '.join(sorted(unknown))}.")
    path = model_config.model_name_or_path or str(tiny_checkpoint())
    trainer = NextFlowGRPOTrainer(
        NextFlowForCausalLM.from_pretrained(path, dtype=torch.float32),
        partial(detector_reward, detector=detect_objects, partial_credit=task.partial_credit),
        settings,
        train_dataset=make_dataset(task, settings.seed),
        eval_dataset=make_dataset(task, settings.seed + 1, num_prompts=64) if settings.eval_strategy != "no" else None,
        processing_class=NextFlowProcessor.from_pretrained(path),
        peft_config=get_peft_config(model_config),
    )
    trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
