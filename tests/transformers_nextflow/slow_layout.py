"""The token view written out slot by slot: the brute-force double of `token_layout` and of the model's block mask."""

from dataclasses import dataclass

import torch

from transformers_nextflow.scale_schedule import ScaleSchedule


@dataclass
class Slot:
    """What one slot carries: `image` and `scale` (0-based) of a feature, both None for text, `<boi>`, `<eoi>`."""

    position: tuple[float, float, float]
    image: int | None = None
    scale: int | None = None


def walk(row: list[int], grids: list[tuple[int, int, int]], text_vocab: int, boi: int, spatial: float) -> list[Slot]:
    """The slots of one unpadded row of token-view ids."""
    slots: list[Slot] = []
    time, image, i = 0, 0, 0
    while i < len(row):
        slots.append(Slot((time, time, time)))
        codes = 0
        while row[i] == boi and i + codes + 1 < len(row) and row[i + codes + 1] >= text_vocab:
            codes += 1
        if codes == 0:
            time, i = time + 1, i + 1
            continue
        carried, scale = 1, 0  # flat index of the code whose feature the next slot carries
        for scale, (h, w) in enumerate(ScaleSchedule.from_grid_shw(grids[image]).grids):
            if scale == 0:
                continue
            if carried == codes:
                scale -= 1
                break
            side = (h * w) ** 0.5
            for cell in range(h * w):
                x, y = (cell // w + 0.5) / side, (cell % w + 0.5) / side
                slots.append(Slot((time + scale, spatial * x, spatial * y), image, scale))
            carried += h * w
        assert carried == codes
        time += scale + 1
        slots.append(Slot((time, time, time)))  # <eoi>
        time, image, i = time + 1, image + 1, i + codes + 1
    return slots


def may_see(slots: list[Slot]) -> torch.Tensor:
    """`(L, L)` bool: the past, and all of the own scale."""
    return torch.tensor(
        [
            [k <= q or (a.image is not None and (a.image, a.scale) == (b.image, b.scale)) for k, b in enumerate(slots)]
            for q, a in enumerate(slots)
        ]
    )
