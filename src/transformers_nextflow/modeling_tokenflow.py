"""TokenFlow's text-to-image model (arXiv 2412.03069), on NextFlow's token view, generation and loss.

What differs from NextFlow: Llama's layers with norms behind them and on queries and keys, one position per slot,
accumulated features, a learned embedding for every place in an image, zeros in the slot of its last code. What the
original pads a prompt with counts in its positions; rotary positions are relative, so here nothing is padded.

Letters: B rows, L slots per row, H hidden size, N codes of an image.
"""

from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from .configuration_tokenflow import TokenFlowConfig
from .modeling_nextflow import NextFlowForCausalLM, NextFlowModel, NextFlowPreTrainedModel
from .scale_schedule import ScaleSchedule
from .token_layout import opens_image


class TokenFlowDecoderLayer(LlamaDecoderLayer):
    """Llama's layer, but each branch is normed behind it and not before, and queries and keys are normed per head."""

    def __init__(self, config: TokenFlowConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn: Any = Qwen3Attention(config, layer_idx)  # type: ignore[arg-type]  # it reads Llama's fields
        for norm in (self.self_attn.q_norm, self.self_attn.k_norm):
            norm.variance_epsilon = config.qk_norm_eps

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:  # type: ignore[override]
        attended, _ = self.self_attn(hidden_states, **kwargs)
        hidden_states = hidden_states + self.input_layernorm(attended)
        return hidden_states + self.post_attention_layernorm(self.mlp(hidden_states))


class TokenFlowRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's, of coordinates `(3, B, L)` that are all equal."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(x, position_ids[0])


class TokenFlowPreTrainedModel(NextFlowPreTrainedModel):
    """Loading, and the flags that transformers reads."""

    config_class = TokenFlowConfig  # type: ignore[assignment]  # it has the fields that are read
    _no_split_modules = ["TokenFlowDecoderLayer"]
    _can_record_outputs = {"hidden_states": TokenFlowDecoderLayer, "attentions": Qwen3Attention}


class TokenFlowModel(TokenFlowPreTrainedModel, NextFlowModel):
    """Llama's layers on TokenFlow's input view. Row 0 of `scale_embedding` is that of text."""

    layer_class = TokenFlowDecoderLayer
    norm_class = LlamaRMSNorm
    rotary_class = TokenFlowRotaryEmbedding

    def __init__(self, config: TokenFlowConfig):
        super().__init__(config)  # type: ignore[arg-type]
        self.position_embedding = nn.Embedding(config.schedule().num_tokens, config.hidden_size)
        self.post_init()

    def _embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Slots of text, and of an image's last code, which carries zeros; what opens an image has the first place."""
        is_code, first = input_ids >= self.config.text_vocab_size, input_ids.new_zeros(1)
        embeds = self.embed_tokens(input_ids.masked_fill(is_code, 0))
        embeds = embeds.masked_fill(is_code[..., None].to(embeds.device), 0) + self.scale_embedding(first).to(embeds)
        opens = opens_image(input_ids, self.config.image_start_ids)[..., None].to(embeds)
        return embeds + opens * self.position_embedding(first).to(embeds)

    def _image_embedding(self, schedule: ScaleSchedule, scales: range, device: torch.device) -> torch.Tensor:
        """The embedding `(n, H)` of the places of some scales."""
        places = (schedule.offsets[scale] for scale in (scales.start, scales.stop))
        return self.position_embedding(torch.arange(*places, device=device))


class TokenFlowForCausalLM(TokenFlowPreTrainedModel, NextFlowForCausalLM):  # type: ignore[misc]  # both name `config`
    """TokenFlow with its one output head over text and visual ids."""

    model_class = TokenFlowModel


__all__ = ["TokenFlowForCausalLM", "TokenFlowModel", "TokenFlowPreTrainedModel"]
