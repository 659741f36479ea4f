"""Output head and cross-entropy in one, a chunk of rows at a time: the full logits are never held.

With 10k tokens and 185k ids the logits alone would take 7 GB in fp32, and their gradient as much again.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# Elements of a chunk's logits: 128 MB in fp32, large enough for full-speed matrix products.
MAX_CHUNK_ELEMENTS = 2**25


def is_plain_linear(head: nn.Module) -> bool:
    """Whether a head is its weight and nothing else (no LoRA, quantisation, tensor parallelism or offloading)."""
    return (
        type(head) is nn.Linear and head.bias is None and type(head.weight) is nn.Parameter and not head.weight.is_meta
    )


def head_cross_entropy(
    head: nn.Module, hidden_states: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Weighted sum of the cross-entropies of `head(hidden_states)` against `targets`, in fp32.

    Args:
        head (`nn.Module`): The output head, hidden size -> vocabulary.
        hidden_states (`torch.Tensor` of shape `(T, H)`): One row a prediction.
        targets (`torch.LongTensor` of shape `(T,)`): Ids to predict.
        weights (`torch.FloatTensor` of shape `(T,)`, *optional*): One factor a prediction; ones when absent.

    Returns:
        `torch.FloatTensor`: a scalar.
    """
    if weights is None:
        weights = torch.ones_like(targets, dtype=torch.float32)
    if is_plain_linear(head):
        weight = head.weight
        if torch.is_autocast_enabled(hidden_states.device.type):
            dtype = torch.get_autocast_dtype(hidden_states.device.type)
            hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        return _LinearCrossEntropy.apply(hidden_states, weight, targets, weights)
    num_rows = max(1, MAX_CHUNK_ELEMENTS // head.out_features)
    chunks = zip(*(tensor.split(num_rows) for tensor in (hidden_states, targets, weights)), strict=True)
    return sum(
        (checkpoint(_chunk_cross_entropy, head, *chunk, use_reentrant=False) for chunk in chunks),
        start=hidden_states.new_zeros((), dtype=torch.float32),
    )


def _chunk_cross_entropy(head, hidden_states, targets, weights):
    return F.cross_entropy(head(hidden_states).float(), targets, reduction="none") @ weights


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradients in the forward pass, while a chunk's logits are there: nothing is computed twice."""

    @staticmethod
    def forward(ctx, hidden_states, weight, targets, weights):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_states) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        loss = hidden_states.new_zeros((), dtype=torch.float32)
        num_rows = max(1, MAX_CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden_states.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            target = targets[rows, None]
            logits = F.linear(hidden_states[rows], weight).float()
            log_normaliser = logits.logsumexp(-1, keepdim=True)
            loss += (log_normaliser - logits.gather(-1, target)).squeeze(-1) @ weights[rows]
            if not (need_hidden or need_weight):
                continue
            grad = logits.sub_(log_normaliser).exp_()
            grad.scatter_add_(-1, target, grad.new_full((1, 1), -1.0).expand_as(target))
            grad = grad.mul_(weights[rows, None]).to(weight.dtype)
            if need_hidden:
                grad_hidden[rows] = grad @ weight
            if need_weight:
                grad_weight += grad.T @ hidden_states[rows]
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_loss,
            None if grad_weight is None else grad_weight * grad_loss,
            None,
            None,
        )
