"""The same run on one, two and four ranks, and handed from two to one to four."""

import json
import os
from pathlib import Path

import datasets
import torch

from forks import fork_ranks
from transformers_nextflow.trainer import NextFlowSFTConfig, NextFlowSFTTrainer

STEPS = 10


def train(folder: Path, name: str, packing: bool, resume: str | None = None) -> None:
    """Four samples or packs a step, whatever the number of ranks; the first rank writes its losses and weights."""
    number = int(os.environ["WORLD_SIZE"])
    settings = dict(per_device_train_batch_size=4 // number)
    if packing:
        settings = dict(
            packing=True, packing_strategy="length", max_length=320, gradient_accumulation_steps=4 // number
        )
    args = NextFlowSFTConfig(
        str(folder / name),
        **settings,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        adam_epsilon=1e-3,
        condition_dropout=0.5,
        task_inversion=0.3,
        new_weights_learning_rate=3e-2,
        ema_decay=0.8,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no" if name in ("four", "all") else "steps",
        save_steps=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    rows = datasets.Dataset.from_list(json.loads((folder / "samples.json").read_text()))
    trainer = NextFlowSFTTrainer(str(folder / "model"), args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume and str(folder / resume))
    if trainer.args.process_index == 0:
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        weights = dict(trainer.model.named_parameters())
        result = {"losses": losses, "weights": weights, "average": trainer.ema.shadow_params}
        torch.save({"facts": trainer._run_facts(), **result}, folder / f"{name}.pt")


def run_all(path: str) -> None:
    folder = Path(path)
    for packing, kind in ((False, "padded"), (True, "packed")):
        for number, name, resume in (
            (2, "two", None),
            (1, "one", f"{kind}-two/checkpoint-2"),
            (4, "four", f"{kind}-one/checkpoint-6"),
            *([] if packing else [(4, "all", None)]),
        ):
            ranks = folder / f"ranks-{kind}-{name}"
            ranks.mkdir()
            fork_ranks(lambda n=name, p=packing, r=resume, k=kind: train(folder, f"{k}-{n}", p, r), ranks, number)
