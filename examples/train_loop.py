"""Supervised training of NextFlow as one flat loop: everything that `NextFlowSFTTrainer` does, to read and to change.

    python examples/train_loop.py --codes runs/codes --output runs/loop --steps 1000
    torchrun --nproc_per_node 8 examples/train_loop.py --codes runs/codes --output runs/loop --steps 1000

`--codes` is what examples/extract_codes.py wrote. Packs of a fixed compute budget, AdamW with warm-up and cosine decay,
gradient clipping, bf16 autocast on GPUs, DDP under torchrun, losses of text and of each scale, checkpoints that a
killed run goes on from. What is the model's own is marked "NextFlow:"; the rest is any transformer's.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, tiny_checkpoint
from transformers_nextflow.token_layout import TokenLayout
from transformers_nextflow.trainer import (
    NextFlowDataCollator,
    PackSampler,
    load_coded_dataset,
    make_packs,
    sample_costs,
)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--codes", type=Path, required=True, help="coded samples, from examples/extract_codes.py")
    parser.add_argument("--checkpoint", default=str(tiny_checkpoint()), help="where to start from")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--budget", type=int, help="cost of a pack in tokens of linear work; the model's context")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--alpha", type=float, help="of the scale weights; the model's own by default")
    parser.add_argument("--condition-dropout", type=float, default=0.1)
    parser.add_argument("--task-inversion", type=float, default=0.0)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    options = parse_options(arguments)

    # Processes. Under torchrun each has a rank and, if there are GPUs, one of them.
    num_ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    if num_ranks > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    autocast = torch.autocast("cuda", torch.bfloat16) if torch.cuda.is_available() else nullcontext()

    # The model, in fp32: AdamW wants its master weights so.
    model = NextFlowForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32).to(device).train()
    config = model.config
    if options.alpha is not None:
        config.scale_reweight_alpha = options.alpha  # NextFlow: the model's loss reads it
    # NextFlow: each packed sequence gets an attention matrix of its own; on GPUs take "flex_attention".
    model.set_attn_implementation("sdpa_varlen")

    # NextFlow: samples are codes already, packed to equal compute, not to equal length; all ranks make the same plan.
    dataset = load_coded_dataset(options.codes)
    costs = sample_costs(
        dataset.select_columns(["token_ids", "image_grid_shw"]), config.image_token_id, config.hidden_size
    )
    budget = options.budget or config.max_position_embeddings
    sampler = PackSampler(make_packs(costs, budget, num_ranks, options.seed), num_ranks, options.seed)
    steps_an_epoch = len(sampler) // num_ranks
    collate = NextFlowDataCollator(
        config,
        condition_dropout=options.condition_dropout,
        max_length=budget,
        packing=True,
        task_inversion=options.task_inversion,
    )

    # The optimizer: matrices decay, norms and biases don't.
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95))

    # Going on where a killed run stopped. Steps, and not time, decide what comes next, so the run is the unbroken one.
    state_file, first_step = options.output / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        if state["num_ranks"] != num_ranks or state["num_packs"] != len(sampler):
            raise ValueError(
                f"The run in {options.output} had {state['num_ranks']} processes and {state['num_packs']} packs, this "
                f"one has {num_ranks} and {len(sampler)}. Resume it as it was, or choose another `--output`."
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]

    network = DistributedDataParallel(model, find_unused_parameters=True) if num_ranks > 1 else model
    history: list[dict[str, float]] = []
    sums = torch.zeros(2, config.num_scales + 1, device=device)
    started = time.perf_counter()
    order: list[list[int]] = []
    for step in range(first_step, options.steps):
        # This step's pack for this rank.
        epoch, place = divmod(step, steps_an_epoch)
        if place == 0 or not order:
            sampler.set_epoch(epoch)
            order = list(sampler)
        pack = order[place * num_ranks + rank]
        torch.manual_seed(1_000_003 * options.seed + step * num_ranks + rank)  # for the collator's draws
        batch = collate([dataset[index] for index in pack])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}

        # Every prediction counts the same, whichever rank's pack it is in.
        num_items = (batch["labels"] != -100).sum()
        if num_ranks > 1:
            dist.all_reduce(num_items)

        # Learning rate: warm-up, then half a cosine down to a tenth.
        progress = step / options.steps
        factor = min(1.0, (step + 1) / options.warmup) * (0.55 + 0.45 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = factor * options.learning_rate

        # NextFlow: the loss is computed in chunks, its scales reweighted; DDP averages gradients, hence the factor.
        with autocast:
            outputs = network(**batch, use_cache=False, num_items_in_batch=num_items)
        if not torch.isfinite(outputs.loss):
            raise ValueError(f"The loss is {float(outputs.loss)} at step {step}, rank {rank}, on the samples {pack}.")
        (outputs.loss * num_ranks).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # NextFlow: cross-entropies of text (0) and of each scale (1, ...), which the reweighted loss doesn't show.
        layout = TokenLayout.of(batch["input_ids"], batch.get("image_grid_shw"), config)
        kinds = layout.scale_of_tokens() + 1
        predicted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
        kinds = F.pad(kinds[:, 1:], (0, 1))[predicted]
        sums[0].index_add_(0, kinds, outputs.token_losses[predicted])
        sums[1] += torch.bincount(kinds, minlength=sums.shape[1])

        if (step + 1) % options.log_every == 0:
            loss = outputs.loss.detach().clone()
            if num_ranks > 1:
                dist.all_reduce(loss)
                dist.all_reduce(sums)
            totals, counts = sums.tolist()
            entry = {"step": step + 1, "loss": float(loss), "grad_norm": float(norm)}
            entry |= {"text": totals[0] / max(counts[0], 1), "codes": sum(totals[1:]) / max(sum(counts[1:]), 1)}
            entry |= {f"scale {s}": totals[s] / counts[s] for s in range(1, len(counts)) if counts[s]}
            entry["tokens/s"] = sum(counts) / (time.perf_counter() - started)
            sums.zero_()
            started = time.perf_counter()
            history.append(entry)
            if rank == 0:
                print(json.dumps({name: round(value, 4) for name, value in entry.items()}), flush=True)

        if rank == 0 and ((step + 1) % options.save_every == 0 or step + 1 == options.steps):
            options.output.mkdir(parents=True, exist_ok=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save({**state, "num_ranks": num_ranks, "num_packs": len(sampler)}, state_file.with_suffix(".part"))
            state_file.with_suffix(".part").rename(state_file)

    # The result, a checkpoint like any other.
    if rank == 0:
        model.save_pretrained(options.output / "checkpoint")
        NextFlowProcessor.from_pretrained(options.checkpoint).save_pretrained(options.output / "checkpoint")
    if num_ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    return history


if __name__ == "__main__":
    main()
