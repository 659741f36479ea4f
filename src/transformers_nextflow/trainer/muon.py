"""Muon for the matrices of the layers, AdamW for everything else, as one optimizer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """
    torch's [`~torch.optim.Muon`] for the matrices of the layers and [`~torch.optim.AdamW`] for embeddings, head,
    connector and vectors, behind one face for trainers and schedulers.

    Args:
        named_parameters (iterable of `(str, nn.Parameter)`): Those to train; frozen ones are left out.
        lr (`float`): AdamW's learning rate.
        muon_lr (`float`): Muon's.
        weight_decay (`float`): Of the matrices, Muon's and AdamW's; vectors don't decay.
        betas, eps: AdamW's.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        muon_lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        groups: dict[str, list[nn.Parameter]] = {"muon": [], "matrices": [], "vectors": []}
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                kind = "vectors" if parameter.ndim < 2 else "muon" if ".layers." in name else "matrices"
                groups[kind].append(parameter)
        if not groups["muon"]:
            raise ValueError("Muon is for the matrices of the layers, but none of them is trained. Leave it out.")
        adam = [
            {"params": groups["matrices"], "weight_decay": weight_decay},
            {"params": groups["vectors"], "weight_decay": 0.0},
        ]
        self.parts: list[torch.optim.Optimizer] = [torch.optim.Muon(groups["muon"], muon_lr, weight_decay)]
        self.parts.append(torch.optim.AdamW([g for g in adam if g["params"]], lr, betas, eps))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.share_groups()

    def share_groups(self) -> None:
        """Schedulers write into the groups that the parts read."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Of both, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What [`state_dict`] gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.share_groups()
