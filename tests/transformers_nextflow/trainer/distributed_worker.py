"""What both ranks of test_distributed.py do."""

import json
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from forks import fork_ranks
from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor
from transformers_nextflow.trainer import NextFlowDataCollator, NextFlowSFTConfig, NextFlowSFTTrainer


def make_trainer(folder: Path, samples: list[dict], packing: bool) -> NextFlowSFTTrainer:
    settings = NextFlowSFTConfig(
        str(folder / f"ddp-{packing}"),
        per_device_train_batch_size=1,
        max_steps=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        condition_dropout=0,
        packing=packing,
        packing_strategy="length",
        max_length=400,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    dataset = datasets.Dataset.from_list(samples)
    tokenizer = NextFlowProcessor.from_pretrained(folder / "model").tokenizer
    return NextFlowSFTTrainer(str(folder / "model"), settings, train_dataset=dataset, processing_class=tokenizer)


def train_on_two_ranks(folder: Path, samples: list[dict], packing: bool) -> list[float]:
    """DDP: each rank takes one sample (or pack) a step."""
    trainer = make_trainer(folder, samples, packing)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_on_other_data(folder: Path, samples: list[dict], change: str) -> str:
    """What is said on this rank where the second one has other samples, or fewer."""
    if dist.get_rank():
        samples = samples[:-1] if change == "fewer" else [{**samples[0], "prompt_style": "bare"}, *samples[1:]]
    try:
        make_trainer(folder, samples, False).train()
    except ValueError as error:
        return str(error)
    return "nothing"


def shard_fully(folder: Path, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """FSDP2: the same loss and gradients as whole, layer by layer, also when activations are computed twice."""
    mesh = init_device_mesh("cpu", (2,))
    whole, sharded = (NextFlowForCausalLM.from_pretrained(folder / "model").train() for _ in range(2))
    sharded.activation_checkpointing_enable()
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    losses = []
    for model in (whole, sharded):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
    difference = max(
        float((ours.grad.full_tensor() - theirs.grad).abs().max())
        for ours, theirs in zip(sharded.parameters(), whole.parameters(), strict=True)
        if theirs.grad is not None
    )
    return {"whole": losses[0], "sharded": losses[1], "difference": difference}


def split_tensors(folder: Path, batch: dict[str, torch.Tensor]) -> dict[str, object]:
    """TP=2: forward, backward and generation as on one process."""
    from transformers import DistributedConfig

    whole = NextFlowForCausalLM.from_pretrained(folder / "split").train()
    split = NextFlowForCausalLM.from_pretrained(
        folder / "split", distributed_config=DistributedConfig(tp_size=2)
    ).train()
    losses, norms, codes = [], [], []
    for model in (whole, split):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(model.model.connector[0].weight.grad.norm()))
        prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
        options = {
            "generation_mode": "image",
            "image_top_k": 1,
            "guidance_scale": None,
            "return_dict_in_generate": True,
        }
        codes.append(model.eval().generate(**prompt, **options).sequences.tolist())
    return {"losses": losses, "norms": norms, "same_codes": codes[0] == codes[1]}


def main(folder: Path):
    samples = json.loads((folder / "samples.json").read_text())
    results: dict[str, object] = {
        f"ddp-{packing}": train_on_two_ranks(folder, samples, packing) for packing in (False, True)
    }
    for change in ("fewer", "others"):
        said = [""] * dist.get_world_size()
        dist.all_gather_object(said, train_on_other_data(folder, samples, change))
        results[change] = said
    config = NextFlowForCausalLM.from_pretrained(folder / "model").config
    batch = NextFlowDataCollator(config, condition_dropout=0)(samples)
    results["fsdp"] = shard_fully(folder, batch)
    results["tp"] = split_tensors(folder, batch)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))


def on_two_ranks(folder: str) -> None:
    fork_ranks(lambda: main(Path(folder)), Path(folder))
