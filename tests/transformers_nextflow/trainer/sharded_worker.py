"""What four ranks of test_distributed.py do: HSDP, and tensor parallelism with FSDP2, in the trainer."""

import copy
import json
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor
from transformers import DistributedConfig

from accelerate import ParallelismConfig
from forks import fork_ranks
from transformers_nextflow import NextFlowProcessor
from transformers_nextflow.trainer import NextFlowSFTConfig, NextFlowSFTTrainer

# Ranks that take batches of their own, and how weights are cut. Four samples a step each time.
LAYOUTS: dict[str, tuple[int, dict | None]] = {
    "ddp": (4, None),
    "hsdp": (4, {"dp_replicate_size": 2, "fsdp_size": 2}),
    "tp+fsdp": (2, {"tp_size": 2, "fsdp_size": 2}),
}


def whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def train(folder: Path, layout: str) -> NextFlowSFTTrainer:
    ranks, sizes = LAYOUTS[layout]
    settings = NextFlowSFTConfig(
        str(folder / layout),
        model_init_kwargs={} if sizes is None else {"distributed_config": DistributedConfig(**sizes)},
        per_device_train_batch_size=4 // ranks,
        max_steps=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="sgd",
        logging_steps=1,
        condition_dropout=0.5,
        activation_checkpointing=True,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    rows = datasets.Dataset.from_list(json.loads((folder / "samples.json").read_text()))
    words = NextFlowProcessor.from_pretrained(folder / "model").tokenizer
    trainer = NextFlowSFTTrainer(str(folder / "split"), settings, train_dataset=rows, processing_class=words)
    trainer.train()
    return trainer


def main(folder: Path) -> None:
    ParallelismConfig._validate_accelerator = lambda *_: None  # accelerate has TP on GPUs only, for no reason of gloo's
    results, sharded = {}, {}
    for layout in LAYOUTS:
        trainer = train(folder, layout)
        trainer.save_model(str(folder / f"{layout}-saved"))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        sharded[layout] = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
        weights = {name: whole(value) for name, value in sharded[layout].items()}
        cut = sum(isinstance(value, DTensor) for value in sharded[layout].values())
        results[layout] = {"losses": losses, "weights": weights, "cut": cut}
    # Written by HSDP while the ranks go on, read by another layout.
    dcp.async_save({"model": sharded["hsdp"]}, checkpoint_id=str(folder / "dcp")).result()
    read = {name: torch.zeros_like(value) for name, value in copy.copy(sharded["tp+fsdp"]).items()}
    dcp.load({"model": read}, checkpoint_id=str(folder / "dcp"))
    results["dcp"] = {"weights": {name: whole(value) for name, value in read.items()}}
    if dist.get_rank() == 0:
        torch.save(results, folder / "sharded.pt")


def on_four_ranks(folder: str) -> None:
    ranks = Path(folder) / "four"
    ranks.mkdir()
    fork_ranks(lambda: main(Path(folder)), ranks, 4)
