"""Packing: which samples share a row, to a fixed length or to a fixed compute budget, evenly over ranks.

A long image costs more than its length says, for attention grows with the square; packs of equal length leave ranks
waiting for one that holds such an image. So the paper packs to a fixed compute budget (arXiv 2601.02204). Both are made
here in one unit, *tokens of linear work*: a layer costs `12 * q * H**2 + 4 * q * kv * H` FLOPs for q new tokens that
attend to kv (the paper's appendix A.2), so a token costs `1 + kv / (3 * H)` tokens without attention.

Samples are never cut. Everything is a function of the costs, the budget, the number of ranks and a seed.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from ..configuration_nextflow import NextFlowConfig
from ..scale_schedule import sequence_flops
from .coded_dataset import CodedSample

_NEXTFLOW = NextFlowConfig()
PACKING_STRATEGIES = ("compute", "length")
FILLER = -1  # the number of a sample from which nothing is learned


def block_lengths(sample: CodedSample, image_token_id: int, config: Any = _NEXTFLOW) -> list[int]:
    """Lengths of what a coded sample's sequence is made of, in order: runs of text (with `<boi>`) and scales.

    `config` is the model's; any [`NextFlowConfig`] gives the same.
    """
    start, end = len(config.image_start_ids), len(config.image_end_ids)
    blocks, previous = [], 0
    marks = np.flatnonzero(np.asarray(sample["token_ids"]) == image_token_id).tolist()
    if len(marks) != len(sample["image_grid_shw"]):
        raise ValueError(
            f"The sample has {len(marks)} image marks, but grids of {len(sample['image_grid_shw'])} images."
        )
    for mark, grid in zip(marks, sample["image_grid_shw"], strict=True):
        blocks += [mark + start - previous, *config.schedule_of(grid).scale_lengths]
        previous = mark + 1 - end
    tail = len(sample["token_ids"]) - previous
    return [*blocks, tail] if tail else blocks


def sample_costs(
    samples: Iterable[CodedSample], image_token_id: int, hidden_size: int | None, config: Any = _NEXTFLOW
) -> np.ndarray:
    """Cost of each sample in tokens of linear work, float64; plain lengths if `hidden_size` is None.

    Raises:
        `ValueError`: for a sample whose marks and grids don't fit together, which it names.
    """
    per_token = 12 * hidden_size**2 if hidden_size is not None else 0
    costs = []
    for index, sample in enumerate(samples):
        try:
            blocks = block_lengths(sample, image_token_id, config)
        except ValueError as error:
            raise ValueError(f"Sample {sample.get('id', index)}: {error}") from error
        costs.append(sum(blocks) if hidden_size is None else sequence_flops(blocks, hidden_size) / per_token)
    return np.array(costs, dtype=np.float64)


def make_packs(
    costs: Sequence[float] | np.ndarray, budget: float, num_ranks: int = 1, seed: int = 0
) -> list[list[int]]:
    """Fewest equal packs within a budget: costly samples first, each into the pack that is cheapest so far.

    Args:
        costs (sequence of `float`): One per sample.
        budget (`float`): What a pack may cost at most.
        num_ranks (`int`, *optional*, defaults to 1): Packs of a step; consecutive packs are those that cost most alike.
        seed (`int`, *optional*, defaults to 0): Of the order of equals.

    Returns:
        `list[list[int]]`: indices of samples; each sample is in one pack, and the number of packs is a multiple of
        `num_ranks`.

    Raises:
        `ValueError`: for a sample that costs more than the budget, or if there are fewer samples than ranks.
    """
    costs = np.asarray(costs, dtype=np.float64)
    if len(costs) < max(1, num_ranks):
        raise ValueError(f"{len(costs)} samples can't be packed for {num_ranks} ranks: each needs a pack of its own.")
    if costs.max() > budget:
        raise ValueError(
            f"A sample costs {costs.max():.0f} tokens, more than the budget of a pack ({budget:.0f}). Leave it out, "
            "raise the budget, or encode its images with fewer scales."
        )
    shuffled = np.random.default_rng(seed).permutation(len(costs))
    order = shuffled[np.argsort(-costs[shuffled], kind="stable")]
    num_steps = max(1, int(np.ceil(costs.sum() / budget / num_ranks)))
    while (packs := _fill(costs, order, budget, num_steps * num_ranks)) is None:
        num_steps += max(1, num_steps // 100)
    by_cost = sorted(range(len(packs)), key=lambda pack: -costs[packs[pack]].sum())
    return [packs[pack] for pack in by_cost]


def _fill(costs: np.ndarray, order: np.ndarray, budget: float, num_packs: int) -> list[list[int]] | None:
    """`num_packs` packs of even cost, or None if one goes over the budget."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    heap = [(0.0, pack) for pack in range(num_packs)]
    for index in order.tolist():
        cost, pack = heap[0]
        if cost + costs[index] > budget * (1 + 1e-9):
            return None
        packs[pack].append(index)
        heapq.heapreplace(heap, (cost + costs[index], pack))
    return packs


class EpochSampler(Sampler):
    """Indices in an order that is a function of seed and epoch alone; `run_length` of them in a row stay together.

    With `numbered`, `epoch * num_samples + index` stands in place of the index. Their number becomes a multiple of
    `multiple` by `FILLER` at the end, or by leaving some out with `drop_last`.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int = 0,
        shuffle: bool = True,
        numbered: bool = False,
        run_length: int = 1,
        multiple: int = 1,
        drop_last: bool = False,
    ):
        self.num_samples, self.seed, self.shuffle, self.epoch = num_samples, seed, shuffle, 0
        self.numbered, self.run_length = numbered, run_length
        self.num_filled = -(num_samples % multiple) if drop_last else -num_samples % multiple

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples + self.num_filled

    def __iter__(self) -> Iterator[Any]:
        runs = np.arange(self.num_samples).reshape(-1, self.run_length)
        if self.shuffle:
            runs = runs[np.random.default_rng((self.seed, self.epoch)).permutation(len(runs))]
        numbers = (runs.flatten() + self.numbered * self.epoch * self.num_samples).tolist()
        yield from [*numbers, *[FILLER] * self.num_filled][: len(self)]


class PackSampler(EpochSampler):
    """
    A batch sampler whose batches are packs, in another order each epoch. Packs of one step stand together, one per
    rank, as accelerate deals them out.

    Args:
        packs (`list[list[int]]`): From [`make_packs`].
        num_ranks (`int`, *optional*, defaults to 1): Packs of a step.
        seed (`int`, *optional*, defaults to 0): Of the order.
    """

    batch_size = None  # it varies; what accelerate reads

    def __init__(self, packs: list[list[int]], num_ranks: int = 1, seed: int = 0):
        if len(packs) % num_ranks:
            raise ValueError(f"{len(packs)} packs can't be dealt out evenly to {num_ranks} ranks.")
        super().__init__(len(packs), seed, run_length=num_ranks)
        self.packs = packs

    def __iter__(self) -> Iterator[list[int]]:
        return (self.packs[index] for index in super().__iter__())


def rank_imbalance(flops: Sequence[float] | np.ndarray, num_ranks: int) -> float:
    """How much longer the costliest pack of a step takes than the mean one, over all steps: 1 if no rank ever waits.

    `flops` has one entry per pack, those of a step together.
    """
    steps = np.asarray(flops, dtype=np.float64).reshape(-1, num_ranks)
    return float((steps.max(1) / steps.mean(1)).mean())
