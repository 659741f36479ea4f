"""Goes on with a trained nextflow-tiny: reading, editing, stories, thoughts and turns, beside drawing from captions."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from transformers_nextflow import NextFlowForCausalLM

from . import training_state
from .task_codes import TaskBatches
from .train_language_model import FULL_VOCABULARY_FROM, TEXT_WEIGHT, Batches, batch_loss, make_optimizers
from .training_state import load_state, save_state

PEAKS = (0.012, 1.2e-3)  # Muon, AdamW
WARM_UP_STEPS, DECAY_FROM = 40, 0.3
# Until this share of the time tasks show their first scales only, which decide most and cost a quarter.
CURRICULUM = ((0.25, 5), (0.35, 7), (1.0, 8))
PICTURES = 10  # captions a step and process
TASK_BATCHES = 2  # of different tasks, a step and process
TASK_ALPHA = 1.0  # of the scale weights: each scale of an edit counts alike
PICTURE_MIXTURE = {"shapes": 0.5, "emoji": 0.38, "words": 0.12}


def train(
    model: NextFlowForCausalLM,
    pictures: Batches,
    tasks: TaskBatches,
    folder: Path,
    seconds: float,
    seed: int = 0,
) -> NextFlowForCausalLM:
    """Trains within a wall-clock budget; picks up where a killed run stopped. `folder / "final"` is the result.

    Under `torchrun` the processes average their gradients.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "final" / "model.safetensors").exists():
        print("[tasks] are done already", flush=True)
        return NextFlowForCausalLM.from_pretrained(folder / "final").eval()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model.train()
    model.set_attn_implementation("eager")  # for rows this short with a mask faster than CPU's SDPA, as measured
    parameters = list(model.parameters())
    optimizers = make_optimizers(model)
    state_file = folder / "state.pt"
    step, spent = load_state(state_file, model, optimizers)
    rng = np.random.default_rng((seed, step, rank))
    last = saved = training_state.clock()
    log: dict[str, list[tuple[float, float]]] = {}
    while spent < seconds:
        progress = spent / seconds
        factor = min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, max(0.01, (1 - progress) / (1 - DECAY_FROM)))
        for optimizer, peak in zip(optimizers, PEAKS, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        num_scales = next(scales for until, scales in CURRICULUM if progress < until)
        whole = progress > FULL_VOCABULARY_FROM
        batches = [pictures.draw(rng, PICTURES, pictures.config.num_scales, PICTURE_MIXTURE)]
        batches += [tasks.draw(rng, num_scales) for _ in range(TASK_BATCHES)]
        for index, batch in enumerate(batches):
            # The texts of tasks are answers, not captions; what tells things apart is in their coarse scales.
            text_weight, alpha = (1.0, TASK_ALPHA) if index else (TEXT_WEIGHT, None)
            loss, text_loss, code_loss = batch_loss(model, batch, whole, text_weight, alpha)
            loss.backward()
            log.setdefault(batch.task, []).append((text_loss, code_loss))
        spent += training_state.clock() - last
        flat = torch.cat([p.grad.flatten() for p in parameters] + [torch.tensor([spent])])
        if world > 1:
            dist.all_reduce(flat)
            flat /= world
        spent, last = float(flat[-1]), training_state.clock()
        for parameter, gradient in zip(parameters, flat[:-1].split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 25 == 0 and rank == 0:
            means = ", ".join(
                f"{task} {text:.3f} {codes:.3f}"
                for task, (text, codes) in ((task, np.mean(log[task], 0)) for task in sorted(log))
            )
            print(f"[tasks] step {step} {spent:.0f}/{seconds:.0f} s scales {num_scales}: {means}", flush=True)
            log.clear()
        if rank == 0 and training_state.clock() - saved > training_state.SAVE_EVERY:
            saved = training_state.clock()
            save_state(state_file, model, optimizers, step, spent)
    if rank == 0:
        model.set_attn_implementation("sdpa")
        model.save_pretrained(folder / "final")
        state_file.unlink(missing_ok=True)
    return model.eval()
