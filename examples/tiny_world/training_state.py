"""Saving and loading what a training run needs to go on after a kill, and the clock that its budget is read from."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

SAVE_EVERY = 120.0  # seconds
clock = time.time  # tests count steps instead


def save_state(
    path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int, spent: float
) -> None:
    """Writes weights, optimizer states, the step and the seconds spent; a kill while writing loses nothing."""
    temporary = path.with_suffix(".part")
    state = {
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "step": step,
        "spent": spent,
    }
    torch.save(state, temporary)
    temporary.rename(path)


def load_state(path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[int, float]:
    """Restores what [`save_state`] wrote; returns the step and the seconds spent, zeros where there is no file."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["spent"]
