"""Output head and cross-entropy in one, a chunk of rows at a time: the full logits are never held.

With 10k tokens and 185k ids the logits alone would take 7 GB in fp32, and their gradient as much again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def chunk_rows(vocab_size: int) -> int:
    """Rows of a chunk: few enough that the logits stay in a CPU's cache, enough for full-speed matrix products."""
    return max(256, 2**23 // vocab_size)


def is_plain_linear(head: nn.Module) -> bool:
    """Whether a head is its weight and nothing else: no LoRA, quantisation, sharding, offloading or hooks."""
    return (
        type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and head.bias is None
        and not head.weight.is_meta
        and not (head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head))
    )


def head_cross_entropy(
    head: nn.Module,
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the cross-entropies of `head(hidden_states)` against `targets`, in fp32.

    Args:
        head (`nn.Module`): The output head, hidden size -> vocabulary.
        hidden_states (`torch.Tensor` of shape `(T, H)`): One row per prediction.
        targets (`torch.LongTensor` of shape `(T,)`): Ids to predict.
        vocab_size (`int`): Rows of the head.
        weights (`torch.FloatTensor` of shape `(T,)`, *optional*): One factor per prediction; ones when absent.

    Returns:
        The sum, a scalar `torch.FloatTensor`, and the unweighted cross-entropies `(T,)`, which carry no gradient.
        The sum's gradients are made once, with it: a second backward pass through it raises an error.
    """
    if weights is None:
        weights = torch.ones_like(targets, dtype=torch.float32)
    if is_plain_linear(head):
        device_type = hidden_states.device.type
        weight: Any = head.weight
        if not torch.is_grad_enabled():  # autograd asks for gradients by `requires_grad` alone
            hidden_states, weight = hidden_states.detach(), weight.detach()
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        with torch.autocast(device_type, enabled=False):
            return _LinearCrossEntropy.apply(hidden_states, weight, targets, weights)
    losses = [hidden_states.new_zeros(0, dtype=torch.float32)]
    for chunk in zip(*(tensor.split(chunk_rows(vocab_size)) for tensor in (hidden_states, targets)), strict=True):
        losses.append(checkpoint(_chunk_cross_entropy, head, *chunk, use_reentrant=False))
    token_losses = torch.cat(losses)
    return token_losses @ weights, token_losses.detach()


def _chunk_cross_entropy(head, hidden_states, targets):
    return F.cross_entropy(head(hidden_states).float(), targets, reduction="none")


def _softmax_(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities `(T, V)`, in the logits' memory if they are fp32, and the normaliser's logarithm `(T, 1)`, fp32."""
    maximum = logits.amax(-1, keepdim=True).float()
    if logits.dtype == torch.float32:
        total = logits.sub_(maximum).exp_().sum(-1, keepdim=True)
        return logits.div_(total), maximum + total.log()
    # Low-precision probabilities are summed in fp32 inside; of them only the largest is taken, to find the normaliser,
    # which costs less than bf16 logits themselves: 0.2 % of a probability.
    probabilities = logits.softmax(-1)
    return probabilities, maximum - probabilities.amax(-1, keepdim=True).float().log()


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradients in the forward pass, while a chunk's logits exist: nothing is computed twice.

    What it holds besides the gradients is one chunk of logits (two in low precision), whatever the number of rows.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, targets, weights):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_states) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        token_losses = hidden_states.new_empty(targets.shape, dtype=torch.float32)
        num_rows = chunk_rows(weight.shape[0])
        for start in range(0, hidden_states.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            hidden, target, factor = hidden_states[rows], targets[rows, None], weights[rows, None]
            logits = F.linear(hidden, weight)
            target_logits = logits.gather(-1, target).float()
            probabilities, normaliser = _softmax_(logits)
            log_likelihood = target_logits - normaliser
            token_losses[rows] = -log_likelihood[:, 0]
            if not (need_hidden or need_weight):
                continue
            # From here on the gradient of the logits, but for the factor: p - 1 at the target, p elsewhere.
            grad = probabilities.scatter_(-1, target, log_likelihood.expm1().to(weight.dtype))
            if need_hidden:
                grad_hidden[rows] = (grad @ weight) * factor
            if need_weight:
                _add_product_(grad_weight, grad, (hidden * factor).to(weight.dtype))
            del logits, probabilities, grad  # before the next chunk's are made
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(token_losses)
        return token_losses @ weights.to(token_losses), token_losses

    @staticmethod
    def backward(ctx, grad_loss, _):
        # In place, for the head's gradient is as large as the head. Autograd notices if they are asked for again.
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden.mul_(grad_loss),
            None if grad_weight is None else grad_weight.mul_(grad_loss),
            None,
            None,
        )


def _add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`total += left.T @ right` without a temporary of its size: `(V, H)` fp32, `(T, V)`, `(T, H)`."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
        return
    for rows, columns in zip(total.split(8192), left.split(8192, dim=-1), strict=True):
        rows += columns.T @ right
