"""Every stage of every trainer on two ranks: both have the same weights, those of one rank over both batches."""

import json
import sys
from pathlib import Path

import pytest
import torch

from forks import call_fresh

sys.path.insert(0, str(Path(__file__).parent))
import rank_equality_worker as worker


@pytest.fixture(scope="module")
def folder(tmp_path_factory, samples, tiny_random_checkpoint) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "model").symlink_to(tiny_random_checkpoint)
    # A picture in each: a rank without any is the model's affair.
    rows = [{**samples[index % 2], "id": str(index)} for index in range(8)]
    (folder / "samples.json").write_text(json.dumps(rows))
    call_fresh(worker.on_two_ranks, str(folder))
    worker.main(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", worker.KINDS)
def test_two_ranks_train_what_one_does(folder, kind):
    one, first, second = (torch.load(folder / f"{kind}-{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert first["weights"].keys() == one["weights"].keys() and first["weights"]
    moved = sum(float((one["weights"][name] - start).abs().max()) > 1e-5 for name, start in one["start"].items())
    assert moved > 0
    for part in ("weights", "discriminator", "counts"):
        if part in one:
            torch.testing.assert_close(first[part], second[part], rtol=0, atol=0)
            torch.testing.assert_close(first[part], one[part], rtol=1e-4, atol=1e-5)
