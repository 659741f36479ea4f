"""Trains every stage of every trainer, on each of two ranks, or on one with batches of twice the size.

Each rank writes its weights after the last step.
"""

import json
import os
from pathlib import Path

import datasets
import numpy as np
import torch
from peft import LoraConfig

from forks import fork_ranks
from transformers_nextflow import NextFlowImageTokenizer
from transformers_nextflow.trainer import (
    NextFlowGRPOConfig,
    NextFlowGRPOTrainer,
    NextFlowImageTokenizerTrainer,
    NextFlowImageTokenizerTrainingConfig,
    NextFlowSFTConfig,
    NextFlowSFTTrainer,
)

KINDS = ["full", "alignment", "lora", "grpo", "grpo-lora", "pixel", "joint", "decoder"]


def brightness(images, **kwargs):
    return [float(np.asarray(image, np.float64).mean()) for image in images]


def make_trainer(kind: str, folder: Path, num_processes: int):
    common = dict(max_steps=3, learning_rate=1e-2, lr_scheduler_type="constant", save_strategy="no", report_to=[])
    common |= dict(use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential", optim="sgd")
    common |= dict(max_grad_norm=0.0, per_device_train_batch_size=4 // num_processes)
    path = str(folder / "model")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="gaussian")
    torch.manual_seed(0)  # of the adapters
    if kind in ("full", "alignment", "lora"):
        samples = datasets.Dataset.from_list(json.loads((folder / "samples.json").read_text()))
        stage = "alignment" if kind == "alignment" else "full"
        args = NextFlowSFTConfig(str(folder / kind), stage=stage, condition_dropout=0, bf16=False, **common)
        return NextFlowSFTTrainer(path, args, train_dataset=samples, peft_config=config if kind == "lora" else None)
    if kind.startswith("grpo"):
        rows = datasets.Dataset.from_list([{"prompt": word} for word in ("a", "b", "c", "d")])
        settings = dict(num_generations=4, num_trained_scales=2, beta=0.1, bf16=False, shuffle_dataset=False)
        args = NextFlowGRPOConfig(str(folder / kind), **common, **settings)
        config = config if kind == "grpo-lora" else None
        return NextFlowGRPOTrainer(path, brightness, args, train_dataset=rows, peft_config=config)
    pictures = torch.rand(8, 3, 80, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokenizer = NextFlowImageTokenizer.from_pretrained(path, subfolder="image_tokenizer")
    width = tokenizer.config.semantic_feature_dim
    torch.manual_seed(int(os.environ.get("RANK", 0)))  # a discriminator of its own on each rank
    discriminator = torch.nn.Conv2d(3, 1, 16, stride=16)
    torch.manual_seed(0)
    return NextFlowImageTokenizerTrainer(
        tokenizer,
        NextFlowImageTokenizerTrainingConfig(str(folder / kind), stage=kind, revive_steps=2, revive_until=1, **common),
        teacher=lambda pixels: pixels[:, :1, ::16, ::16].repeat(1, width, 1, 1),
        discriminator=discriminator,
        train_dataset=[{"pixel_values": picture} for picture in pictures],
    )


def main(folder: Path):
    num_processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    for kind in KINDS:
        trainer = make_trainer(kind, folder, num_processes)
        start = {
            name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad
        }
        trainer.train()
        state = {name: value for name, value in trainer.model.named_parameters() if name in start}
        result = {"start": start, "weights": {name: value.detach().clone() for name, value in state.items()}}
        if hasattr(trainer, "discriminator"):
            result["counts"] = trainer._counts
            result["discriminator"] = {name: value.detach() for name, value in trainer.discriminator.named_parameters()}
        torch.save(result, folder / f"{kind}-{num_processes}-{rank}.pt")


def on_two_ranks(folder: str) -> None:
    fork_ranks(lambda: main(Path(folder)), Path(folder))
