"""What GRPO computes, as pure functions of tensors: advantages, scale weights, middle returns, masks and the loss.

The loss over the codes of the trained scales (arXiv 2601.02204; extensions of arXiv 2601.02256):

    - mean over samples of  sum over codes of  k * mask * (min(r A, clip(r) A) - beta KL) / sum over codes of  k * mask

with the ratio r of new to old probability of a code, the advantage A of its image in its group, and the weight k of its
scale. A mask gates the reward and the KL alike, and the sum is divided by what it keeps: an image whose reward a small
box decides teaches as much as one without a mask.

Thoughts before the images are part of the sum, each token with weight 1.

Letters: B samples, n codes of the trained scales, T tokens of the longest thought, V text ids, K codes of the codebook,
H x W pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..scale_schedule import ScaleSchedule


class PolicyLoss(NamedTuple):
    """What [`policy_loss`] returns.

    Args:
        loss (`torch.FloatTensor`): A scalar.
        ratios (`torch.FloatTensor` of shape `(B, n)`): New to old probability, not clipped; no gradient.
        is_clipped (`torch.BoolTensor` of shape `(B, n)`): Where clipping cuts the gradient off.
        kl (`torch.FloatTensor` of shape `(B, n)`): Estimate of KL(policy || reference); zeros without a reference.
    """

    loss: torch.Tensor
    ratios: torch.Tensor
    is_clipped: torch.Tensor
    kl: torch.Tensor


def code_log_probs(
    logits: torch.Tensor, codes: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of codes and the entropy of what they were drawn from.

    Args:
        logits (`torch.Tensor` of shape `(B, n, K)`): Over the codebook.
        codes (`torch.LongTensor` of shape `(B, n)`): In `[0, K)`.
        temperature (`float`, *optional*, defaults to 1.0): Divides the logits.

    Returns:
        Two `torch.FloatTensor` of shape `(B, n)`, float32: log-probabilities, and entropies in nats (no gradient).
    """
    logits = logits.float() / temperature
    normalisers = logits.logsumexp(-1)
    log_probs = logits.gather(-1, codes[..., None]).squeeze(-1) - normalisers
    with torch.no_grad():
        entropies = normalisers - (logits.softmax(-1) * logits).sum(-1)
    return log_probs, entropies


def thought_log_probs(
    logits: torch.Tensor,
    ids: torch.Tensor,
    forbidden: Sequence[int],
    ends: Sequence[int],
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of a text that ends where an image opens.

    Args:
        logits (`torch.Tensor` of shape `(B, T + 1, V)`): Over the text ids.
        ids (`torch.LongTensor` of shape `(B, T + 1)`): The text; the last column, `<boi>`, stands for all `ends`.
        forbidden (sequence of `int`): Ids that a text can't hold.
        ends (sequence of `int`): Ids any of which ends it.
        temperature (`float`, *optional*, defaults to 1.0): Divides the logits.

    Returns:
        Two `torch.FloatTensor` of shape `(B, T + 1)`, float32: log-probabilities, and entropies in nats (no gradient).
    """
    logits = logits.float().index_fill(-1, torch.tensor(forbidden, device=logits.device), -1e9)
    log_probs, entropies = code_log_probs(logits, ids.clamp(max=logits.shape[-1] - 1), temperature)
    last = logits[:, -1] / temperature
    end = last[:, list(ends)].logsumexp(-1) - last.logsumexp(-1)
    return torch.cat([log_probs[:, :-1], end[:, None]], dim=1), entropies


def group_advantages(rewards: torch.Tensor, group_size: int, scaling: str = "group") -> torch.Tensor:
    """How much better than its group each sample is.

    Args:
        rewards (`torch.FloatTensor` of shape `(B,)`): Groups in a row. NaN: no reward.
        group_size (`int`): G, at least 2.
        scaling (`str`, *optional*, defaults to `"group"`):
            Divide by the standard deviation of the `"group"`, of the `"batch"`, or by `"none"`.

    Returns:
        `torch.FloatTensor` of shape `(B,)`: 0 for a sample without a reward, and for all of a group without variance.
    """
    if group_size < 2:
        raise ValueError(f"A group needs at least 2 samples to be compared, but `group_size` is {group_size}.")
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards don't make whole groups of {group_size}.")
    groups = rewards.view(-1, group_size)
    centred = groups - groups.nanmean(1, keepdim=True)
    if scaling == "group":
        deviation = _deviation(groups, dim=1)
    elif scaling == "batch":
        deviation = _deviation(rewards, dim=0)
    elif scaling == "none":
        deviation = torch.ones_like(centred)
    else:
        raise ValueError(f'`scaling` must be "group", "batch" or "none", but got "{scaling}".')
    # Rounding of the mean must not become an advantage in a group whose rewards are all equal.
    equal = (groups.nan_to_num(-torch.inf).amax(1) <= groups.nan_to_num(torch.inf).amin(1))[:, None]
    return (centred / (deviation + 1e-4)).masked_fill(equal | groups.isnan(), 0).flatten()


def _deviation(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Standard deviation (unbiased) of what is not NaN; 0 for a single value."""
    count = (~values.isnan()).sum(dim, keepdim=True)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def middle_returns(rewards: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Value of a prefix of scales from the rewards of the images that go on from it (VMR, arXiv 2601.02256).

    `temperature * log(mean over K of exp(reward / temperature))`: between their mean (high temperature) and their
    maximum (low).

    Args:
        rewards (`torch.FloatTensor` of shape `(P, K)`): K rollouts of P prefixes. NaN: no reward.
        temperature (`float`, *optional*, defaults to 1.0): Eta, above 0.

    Returns:
        `torch.FloatTensor` of shape `(P,)`; NaN where no rollout has a reward.
    """
    counts = (~rewards.isnan()).sum(1)
    scaled = (rewards / temperature).nan_to_num(nan=-torch.inf)
    values = temperature * (scaled.logsumexp(1) - counts.clamp(min=1).log())
    return values.masked_fill(counts == 0, torch.nan)


def propagate_mask(mask: torch.Tensor, schedule: ScaleSchedule, scales: range | None = None) -> torch.Tensor:
    """Which codes matter for the pixels that decide a reward (mask propagation, arXiv 2601.02256).

    From fine to coarse: a cell of the last scale is in if any of its pixels is, and a cell of another scale if it
    overlaps a cell of the next finer scale that is in.

    Args:
        mask (`torch.BoolTensor` of shape `(B, H, W)`): The pixels, at any resolution.
        schedule (`ScaleSchedule`): The images' schedule.
        scales (`range`, *optional*): Which scales to return; all by default.

    Returns:
        `torch.FloatTensor` of shape `(B, n)`: 1 for a code that matters, else 0.
    """
    cells, rows = mask[:, None].float(), []
    for grid in reversed(schedule.grids):
        if cells.shape[-2] < grid[0] or cells.shape[-1] < grid[1]:
            cells = F.interpolate(cells, grid, mode="nearest-exact")  # a mask coarser than the last scale
        cells = F.adaptive_max_pool2d(cells, grid)
        rows.append(cells.flatten(1))
    rows = rows[::-1]
    return torch.cat(rows if scales is None else rows[scales.start : scales.stop], dim=1)


def policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    epsilon: tuple[float, float] = (0.2, 0.2),
    reference_log_probs: torch.Tensor | None = None,
    beta: float = 0.0,
) -> PolicyLoss:
    """The loss of the module's head.

    Args:
        log_probs (`torch.FloatTensor` of shape `(B, n)`): Of the policy, with gradient.
        old_log_probs (`torch.FloatTensor` of shape `(B, n)`): Of the policy that drew the codes.
        advantages (`torch.FloatTensor` of shape `(B,)`): Of the images.
        weights (`torch.FloatTensor` of shape `(B, n)` or `(n,)`):
            Scale weights, times the mask where there is one. Only their proportions within an image count.
        epsilon (`tuple[float, float]`, *optional*, defaults to (0.2, 0.2)):
            Ratios count between `1 - epsilon[0]` and `1 + epsilon[1]`.
        reference_log_probs (`torch.FloatTensor` of shape `(B, n)`, *optional*): Of the reference.
        beta (`float`, *optional*, defaults to 0.0): Weight of the KL to the reference.

    Returns:
        [`PolicyLoss`].
    """
    ratios, advantage = (log_probs - old_log_probs).exp(), advantages[:, None]
    clipped = ratios.clamp(1 - epsilon[0], 1 + epsilon[1])
    losses = -torch.minimum(ratios * advantage, clipped * advantage)
    kl = torch.zeros_like(log_probs)
    if reference_log_probs is not None:
        difference = reference_log_probs - log_probs
        kl = difference.exp() - difference - 1
        losses = losses + beta * kl
    kept = weights.expand_as(losses).sum(1).clamp(min=torch.finfo(weights.dtype).tiny)  # a mask may keep nothing
    loss = ((weights * losses).sum(1) / kept).mean()
    is_clipped = (ratios < 1 - epsilon[0]) & (advantage < 0) | (ratios > 1 + epsilon[1]) & (advantage > 0)
    return PolicyLoss(loss, ratios.detach(), is_clipped, kl.detach())
