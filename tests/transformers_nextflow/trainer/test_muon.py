"""Muon and AdamW behind one face: torch's own steps, schedulers that reach both, states that load."""

import copy

import pytest
import torch
from torch import nn

from transformers_nextflow.trainer.muon import MuonWithAdamW


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.RMSNorm(6)) for _ in range(2))
    return nn.ModuleDict({"embed": nn.Linear(3, 6), "layers": layers, "frozen": nn.Linear(2, 2).requires_grad_(False)})


def step(model: nn.Module, optimizers, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) if parameter.requires_grad else None
    for optimizer in optimizers:
        optimizer.step()


def make(model: nn.Module) -> MuonWithAdamW:
    named = ((f"model.{name}", parameter) for name, parameter in model.named_parameters())
    return MuonWithAdamW(named, lr=1e-2, muon_lr=2e-2, weight_decay=0.1, betas=(0.9, 0.95))


def test_it_is_torchs_two(model):
    twin = copy.deepcopy(model)
    layers = twin["layers"]
    matrices = [layer[0].weight for layer in layers]
    vectors = [twin["embed"].bias, *(p for layer in layers for p in (layer[0].bias, layer[1].weight))]
    groups = [{"params": [twin["embed"].weight], "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    plain = [torch.optim.Muon(matrices, 2e-2, 0.1), torch.optim.AdamW(groups, 1e-2, (0.9, 0.95))]
    ours = make(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(ours, lambda number: 1 / (1 + number))
    for number in range(3):
        for optimizer, peak in zip(plain, (2e-2, 1e-2), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak / (1 + number)
        step(model, [ours], number)
        step(twin, plain, number)
        schedule.step()
    for (name, value), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_a_loaded_state_goes_on(model):
    whole, resumed = model, copy.deepcopy(model)
    first = make(whole)
    step(whole, [first], 0)
    resumed.load_state_dict(whole.state_dict())
    second = make(resumed)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer in (first, second):
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
    step(whole, [first], 1)
    step(resumed, [second], 1)
    for value, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(value, other)


def test_it_is_refused_without_layers(model):
    with pytest.raises(ValueError, match="none of them is trained"):
        make(model["embed"])
