"""What Qwen did not have: connector, scale embeddings, the rows of `<boi>`, `<eoi>` and of the codes."""

import re
from typing import Any

import torch

from ..modeling_nextflow import NextFlowForCausalLM
from .muon import MuonWithAdamW

_MODULES = re.compile(r"(^|\.)(connector|scale_embedding|trainable_tokens_delta)\b(?!.*\.lora_)")
_TABLES = re.compile(r"(?:^|\.)(embed_tokens|lm_head)\.(?:modules_to_save\.\w+\.)?weight$")
# Optimizers whose steps are not in proportion to a group's rate, or that have no groups.
_WITHOUT_GROUPS = ("lomo", "schedule_free", "layerwise")


def new_rows(config: Any, option: str) -> dict[str, list[int]]:
    """Rows of `embed_tokens` and `lm_head` that a text model lacks; `option` is what is refused if there are none."""
    if config.eoi_token_id is None:
        raise ValueError(f"`{option}` is for what a text model lacks; this one was trained whole. Leave it out.")
    return {
        "embed_tokens": [config.boi_token_id, config.eoi_token_id],
        "lm_head": [config.boi_token_id, *range(config.text_vocab_size, config.vocab_size)],
    }


def train_new_weights_only(model: NextFlowForCausalLM) -> None:
    """Freezes all else. Rows are frozen by a mask on the gradient, so the optimizer must not decay their tables."""
    rows = new_rows(model.config, 'stage="alignment"')
    model.requires_grad_(False)
    for module in (model.model.connector, model.model.scale_embedding):
        module.requires_grad_(True)
    for table, name in ((model.model.embed_tokens, "embed_tokens"), (model.lm_head, "lm_head")):
        table.weight.requires_grad_(True)
        mask = torch.zeros(len(table.weight), 1)
        mask[rows[name]] = 1
        table.weight.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient))


def set_new_weights_rate(optimizer: Any, model: Any, config: Any, rate: float, optim: str) -> None:
    """Gives new weights a learning rate of their own, in groups of a fresh optimizer.

    A table is stepped at its group's rate, and what its new rows moved by is scaled to theirs. That is a step at their
    rate, for a step is in proportion to it.

    Raises:
        `ValueError`: if no new weight is trained, or the optimizer has no rates by group.
    """
    rows_of = new_rows(config, "new_weights_learning_rate")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = {id(parameter) for name, parameter in trained.items() if _MODULES.search(name)}
    tables = {p: rows_of[found[1]] for name, p in trained.items() if (found := _TABLES.search(name))}
    if not whole and not tables:
        raise ValueError(
            "`new_weights_learning_rate` is for connector, scale embeddings and new rows, but none of them is trained: "
            'leave it out, or name them in `modules_to_save=["connector", "scale_embedding"]` of the adapters.'
        )
    parts = optimizer.parts if isinstance(optimizer, MuonWithAdamW) else [optimizer]
    grouped = {id(parameter) for part in parts for group in part.param_groups for parameter in group["params"]}
    if any(word in optim for word in _WITHOUT_GROUPS) or not grouped >= whole | set(map(id, tables)):
        raise ValueError(f"`new_weights_learning_rate` needs learning rates by group, which `optim={optim}` has not.")
    shares: dict[torch.nn.Parameter, float] = {}
    for part in parts:
        for group in list(part.param_groups):
            shares |= {parameter: rate / group["lr"] for parameter in group["params"] if parameter in tables}
            if new := [parameter for parameter in group["params"] if id(parameter) in whole]:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in whole]
                part.param_groups.append({**group, "params": new, "lr": rate})
    if isinstance(optimizer, MuonWithAdamW):
        optimizer.share_groups()
    before: dict[torch.nn.Parameter, torch.Tensor] = {}

    @torch.no_grad()
    def keep(*_: Any) -> None:
        before.update({table: table[rows].clone() for table, rows in tables.items()})

    @torch.no_grad()
    def scale(*_: Any) -> None:
        for table, rows in tables.items():
            table[rows] = torch.lerp(before.pop(table), table[rows], shares[table])

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(scale)
