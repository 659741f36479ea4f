"""The mathematics of GRPO against loops that write it out."""

import math

import pytest
import torch

from transformers_nextflow import ScaleSchedule
from transformers_nextflow.trainer import (
    code_log_probs,
    group_advantages,
    middle_returns,
    policy_loss,
    propagate_mask,
    scale_weights,
)

SCHEDULE = ScaleSchedule(num_scales=5)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_log_probs_and_entropies_are_those_of_the_softmax():
    logits, codes = drawn(2, 3, 7), torch.tensor([[0, 1, 2], [3, 4, 6]])
    log_probs, entropies = code_log_probs(logits, codes, temperature=0.5)
    for row in range(2):
        for slot in range(3):
            distribution = torch.distributions.Categorical(logits=logits[row, slot] / 0.5)
            assert float(log_probs[row, slot]) == pytest.approx(
                float(distribution.log_prob(codes[row, slot])), abs=1e-5
            )
            assert float(entropies[row, slot]) == pytest.approx(float(distribution.entropy()), abs=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("scales", [range(5), range(3), range(2, 5)])
def test_scale_weights(alpha, scales):
    raw = [1 / (h * w) ** alpha for h, w in SCHEDULE.grids[scales.start : scales.stop] for _ in range(h * w)]
    expected = torch.tensor([value * len(raw) / sum(raw) for value in raw])
    torch.testing.assert_close(scale_weights(SCHEDULE, scales, alpha), expected)
    assert alpha or (scale_weights(SCHEDULE, scales, alpha) == 1).all()


@pytest.mark.parametrize("scaling", ["group", "batch", "none"])
def test_advantages_are_written_out_and_constants_change_nothing(scaling):
    rewards = drawn(8).float()
    advantages = group_advantages(rewards, 4, scaling)
    for group in (range(4), range(4, 8)):
        values = [float(rewards[i]) for i in group]
        mean = sum(values) / 4
        deviation = {
            "group": math.sqrt(sum((value - mean) ** 2 for value in values) / 3),
            "batch": float(rewards.std()),
            "none": 1.0,
        }[scaling]
        for i, value in zip(group, values, strict=True):
            assert float(advantages[i]) == pytest.approx((value - mean) / (deviation + 1e-4), abs=1e-5)
    torch.testing.assert_close(group_advantages(rewards + 3, 4, scaling), advantages, atol=1e-5, rtol=1e-4)


def test_groups_without_variance_or_rewards_have_no_advantages():
    nan = math.nan
    rewards = torch.tensor([0.1, 0.1, 0.1, nan, nan, nan, 2.0, nan, nan, 1.0, 2.0, 3.0])
    advantages = group_advantages(rewards, 3)
    assert (advantages[:9] == 0).all()
    assert advantages[9:].tolist() == pytest.approx([-1, 0, 1], abs=1e-3)
    # One without a reward takes no part: the others' are as if it were not there.
    torch.testing.assert_close(
        group_advantages(torch.tensor([1.0, nan, 3.0]), 3)[[0, 2]], group_advantages(torch.tensor([1.0, 3.0]), 2)
    )


def test_advantages_of_nonsense_are_refused():
    with pytest.raises(ValueError, match="at least 2 samples"):
        group_advantages(torch.ones(4), 1)
    with pytest.raises(ValueError, match="5 rewards don't make whole groups of 2"):
        group_advantages(torch.ones(5), 2)
    with pytest.raises(ValueError, match='must be "group", "batch" or "none"'):
        group_advantages(torch.ones(4), 2, "median")


def test_the_value_of_a_prefix_is_its_formula():
    rewards = drawn(6, 2).float()
    for eta in (0.1, 1.0, 10.0):
        expected = [eta * math.log(sum(math.exp(r / eta) for r in row) / 2) for row in rewards.tolist()]
        assert middle_returns(rewards, eta).tolist() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(middle_returns(rewards, 1e-3), rewards.amax(1), atol=1e-3, rtol=0)
    torch.testing.assert_close(middle_returns(rewards, 1e3), rewards.mean(1), atol=1e-2, rtol=0)
    some = middle_returns(torch.tensor([[0.5, math.nan], [math.nan, math.nan]]))
    assert float(some[0]) == pytest.approx(0.5) and some[1].isnan()


@pytest.mark.parametrize("schedule", [SCHEDULE, ScaleSchedule((10, 24), 6)])
def test_masks_are_carried_from_fine_to_coarse(schedule):
    h, w = schedule.height, schedule.width
    masks = torch.rand(4, h, w, generator=torch.Generator().manual_seed(0)) > 0.9995
    masks[3] = False

    def overlaps(cells, grid, i, j):
        """Whether a cell of `grid` overlaps one that is in, in a slow and exact way."""
        rows, columns = len(cells), len(cells[0])
        return any(
            cells[a][b]
            for a in range(rows)
            for b in range(columns)
            if a * grid[0] < (i + 1) * rows
            and (a + 1) * grid[0] > i * rows
            and b * grid[1] < (j + 1) * columns
            and (b + 1) * grid[1] > j * columns
        )

    result = propagate_mask(masks, schedule)
    for mask, row in zip(masks, result, strict=True):
        inside = mask.nonzero().tolist()
        grid = schedule.grids[-1]
        cells = [[False] * grid[1] for _ in range(grid[0])]
        for y, x in inside:  # 16 x 16 pixels a cell
            cells[y // 16][x // 16] = True
        expected = [cells]
        for grid in schedule.grids[-2::-1]:
            previous = expected[-1]
            cells = [[overlaps(previous, grid, i, j) for j in range(grid[1])] for i in range(grid[0])]
            expected.append(cells)
        flat = [float(cell) for cells in expected[::-1] for line in cells for cell in line]
        assert row.tolist() == flat
    assert 0 < result[0].mean() < 1 and (result[3] == 0).all()
    torch.testing.assert_close(
        propagate_mask(masks, schedule, range(1, 3)), result[:, schedule.offsets[1] : schedule.offsets[3]]
    )
    assert (propagate_mask(torch.ones(1, h, w), schedule) == 1).all()
    assert (propagate_mask(torch.ones(1, 3, 2), schedule) == 1).all()  # coarser than the last scale


def test_the_loss_and_its_gradient_are_a_loop_written_out():
    schedule, m, alpha, (low, high), beta = SCHEDULE, 3, 0.7, (0.1, 0.3), 0.05
    n = schedule.offsets[m]
    old, reference = drawn(4, n, seed=1), drawn(4, n, seed=2)
    advantages = drawn(4, seed=3)
    mask = (drawn(4, n, seed=4) > 0).double()
    weights = scale_weights(schedule, range(m), alpha).double() * mask

    new = (old + 0.3 * drawn(4, n, seed=5)).requires_grad_()
    result = policy_loss(new, old, advantages, weights, (low, high), reference, beta)
    result.loss.backward()

    again = new.detach().clone().requires_grad_()
    total = 0
    norm = sum(1 / (h * w) ** alpha * h * w for h, w in schedule.grids[:m])
    kept = [float(row.sum()) for row in weights]
    for i in range(4):
        slot = 0
        for h, w in schedule.grids[:m]:
            for _ in range(h * w):
                k = n / norm / (h * w) ** alpha
                ratio = torch.exp(again[i, slot] - old[i, slot])
                clipped = min(max(ratio, torch.tensor(1 - low)), torch.tensor(1 + high))
                gain = min(ratio * advantages[i], clipped * advantages[i])
                d = reference[i, slot] - again[i, slot]
                total = total - k * mask[i, slot] * (gain - beta * (torch.exp(d) - d - 1)) / kept[i] / 4
                slot += 1
    total.backward()
    assert float(result.loss) == pytest.approx(float(total), abs=1e-6)
    torch.testing.assert_close(new.grad, again.grad, atol=1e-6, rtol=1e-5)
    assert result.is_clipped.any() and not result.is_clipped.all()
    assert (new.grad[result.is_clipped & (mask == 0)] == 0).all()


def test_a_policy_is_as_far_from_itself_as_zero():
    log_probs = drawn(2, 5)
    result = policy_loss(log_probs, log_probs, torch.tensor([1.0, -1.0]), torch.ones(5), (0.2, 0.2), log_probs, 1.0)
    assert (result.kl == 0).all() and (result.ratios == 1).all() and not result.is_clipped.any()
    assert float(result.loss) == pytest.approx(0, abs=1e-12)


def test_a_mask_of_ones_changes_nothing():
    log_probs, old, advantages = drawn(2, 30), drawn(2, 30, seed=1), drawn(2, seed=2)
    weights = scale_weights(SCHEDULE, range(4), 0.7)
    ones = propagate_mask(torch.ones(2, 80, 80, dtype=torch.bool), SCHEDULE, range(4))
    assert torch.equal(
        policy_loss(log_probs, old, advantages, weights * ones).loss,
        policy_loss(log_probs, old, advantages, weights).loss,
    )


def test_the_loss_is_divided_by_what_a_mask_keeps():
    """A small box teaches as much as the whole picture, reward and KL alike; one that keeps nothing, nothing."""
    n = SCHEDULE.offsets[4]
    weights = scale_weights(SCHEDULE, range(4), 0.7)
    corner = torch.zeros(1, 80, 80, dtype=torch.bool)
    corner[:, :16, :16] = True
    mask = propagate_mask(corner, SCHEDULE, range(4))
    assert (weights * mask).sum() < 0.5 * weights.sum()
    same = torch.full((1, n), -1.0, dtype=torch.float64)  # every code alike: only the weights' sum could differ
    for options in ({}, {"reference_log_probs": same - 0.5, "beta": 0.3}):
        whole, gated = (
            policy_loss(same, same - 0.1, torch.ones(1), w, **options).loss for w in (weights, weights * mask)
        )
        torch.testing.assert_close(whole, gated)
    log_probs = same.clone().requires_grad_()
    nothing = policy_loss(log_probs, same, torch.ones(1), weights * 0).loss
    nothing.backward()
    assert float(nothing.detach()) == 0 and (log_probs.grad == 0).all()
