"""`torch.compile` for the layers of a scale step: one graph per length of a scale, for all layers and all calls."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.generation import CompileConfig

from .scale_cache import CacheRows

# One a length of a scale (18 at one aspect) and number of rows; torch would give up after 8.
_MAX_GRAPHS = 4096

# Layers are arguments, so what is compiled serves every model; a config may hold callables, so it can't be a key.
_COMPILED: list[tuple[CompileConfig, Callable[..., torch.Tensor]]] = []


def compiled_layer(config: CompileConfig) -> Callable[..., torch.Tensor]:
    """A function that runs a decoder layer on a [`CacheRows`]; all calls with equal settings share what they compiled.

    A graph holds a whole layer. Its sizes are fixed but for the number of keys, so that prompts of another length
    compile nothing anew; the cache is opened and closed outside of it.
    """
    compiled = next((function for known, function in _COMPILED if known == config), None)
    if compiled is None:
        settings = config.to_dict()
        if settings["dynamic"] is None:
            settings["dynamic"] = False
        compiled = torch.compile(call_layer, **settings)
        _COMPILED.append((copy.copy(config), compiled))

    def run(layer: Any, hidden_states: torch.Tensor, cache: CacheRows, **kwargs) -> torch.Tensor:
        index, number = layer.self_attn.layer_idx, hidden_states.shape[1]
        opened = cache.open(index, number)
        for tensor in opened:
            torch._dynamo.mark_dynamic(tensor, 2)
        if (mask := kwargs["attention_mask"]) is not None:
            torch._dynamo.mark_dynamic(mask, mask.ndim - 1)
        with torch._dynamo.config.patch(
            recompile_limit=_MAX_GRAPHS, accumulated_recompile_limit=_MAX_GRAPHS, automatic_dynamic_shapes=False
        ):
            result = compiled(layer, hidden_states, cache=opened, **kwargs)
        cache.close(index, number, opened)
        return result

    return run


def call_layer(layer: nn.Module, *args, **kwargs) -> torch.Tensor:
    """Runs a layer; this is what is compiled, or runs uncompiled."""
    return layer(*args, **kwargs)
