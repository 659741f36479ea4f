"""That all ranks of a training have the same data: where they don't, some wait for ever for a batch of the others."""

import hashlib
from typing import Any

import datasets
import numpy as np
from accelerate.utils import gather_object

LOOKED_AT = 256  # samples, evenly spaced


def describe_data(dataset: datasets.Dataset) -> str:
    """Number of samples, and a hash of some of them as they are stored."""
    table = dataset.with_format("arrow")
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(LOOKED_AT, len(dataset))).astype(int))
    digest = hashlib.sha256(repr(dataset.column_names).encode())
    for index in chosen:
        digest.update(repr(table[int(index)].to_pydict()).encode())
    return f"{len(dataset)} samples ({digest.hexdigest()[:8]})"


def refuse_other_data(dataset: Any) -> None:
    """Compares the data of all ranks; called on every rank before the first step.

    Raises:
        `ValueError`: on every rank, if they are not the same; it says which rank has what.
    """
    if not isinstance(dataset, datasets.Dataset) or not len(dataset):
        return
    found = gather_object([describe_data(dataset)])
    if len(set(found)) > 1:
        told = "; ".join(
            f"rank{'s' * (found.count(data) > 1)} {', '.join(str(r) for r, d in enumerate(found) if d == data)}: {data}"
            for data in dict.fromkeys(found)
        )
        raise ValueError(
            f"The ranks have different data: {told}. Give every rank the same files, in the same order (a shared disk, "
            "or the same data list and the same folders of codes)."
        )
