"""GRPO with prefix-tuning on prompts of yours, with a CLIP-like model's opinion as the reward.

    python examples/grpo_prompts.py --config examples/recipes/0.5b-256px/grpo.yaml --model_name_or_path runs/mine/sft \\
        --prompts examples/recipes/0.5b-256px/prompts.txt --output_dir runs/mine/grpo

PROMPTS has one prompt a line. `--reward` is a model of the Hub or a folder (CLIP, SigLIP, SigLIP2), or "little", the
judge of the world that miniatures of recipes learn. Every field of `NextFlowGRPOConfig` and of TRL's `ModelConfig` is
an option, on the command line or in the YAML file. On a CPU add `--use_cpu true`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModel, AutoProcessor
from trl import ModelConfig, TrlParser, get_peft_config

from tiny_world.little import name_thing
from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, tiny_checkpoint
from transformers_nextflow.trainer import NextFlowGRPOConfig, NextFlowGRPOTrainer, image_text_reward
from transformers_nextflow.trainer.rewards import prompt_text


@dataclass
class Task:
    """What is trained on."""

    prompts: str = field(metadata={"help": "File with a prompt a line."})
    reward: str = field(default="google/siglip2-base-patch16-256", metadata={"help": 'A CLIP-like model, or "little".'})


def little_reward(images: list[Image.Image], prompts: list[Any]) -> list[float]:
    """1 for a picture that shows what its prompt names, and nothing else."""
    names = [name_thing(image) for image in images]
    return [float(name is not None and name in prompt_text(p)) for name, p in zip(names, prompts, strict=True)]


def load_reward(name: str, device: torch.device) -> Callable[..., list[float]]:
    """The reward by its name."""
    if name == "little":
        return little_reward
    options = {"padding": "max_length", "truncation": True, "max_length": 64} if "siglip" in name.lower() else None
    model, processor = AutoModel.from_pretrained(name).to(device), AutoProcessor.from_pretrained(name)
    return partial(image_text_reward, model=model, processor=processor, processor_kwargs=options)


def main(arguments: list[str] | None = None) -> NextFlowGRPOTrainer:
    task, settings, model_config = TrlParser(
        (Task, NextFlowGRPOConfig, ModelConfig), allow_abbrev=False
    ).parse_args_and_config(arguments)
    prompts = [line.strip() for line in Path(task.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{task.prompts} has no prompts.")
    path = model_config.model_name_or_path or str(tiny_checkpoint())
    trainer = NextFlowGRPOTrainer(
        NextFlowForCausalLM.from_pretrained(path, dtype=torch.float32),
        load_reward(task.reward, settings.device),
        settings,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=NextFlowProcessor.from_pretrained(path),
        peft_config=get_peft_config(model_config),
    )
    trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
