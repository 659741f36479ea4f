"""A step learns the same from the same samples on any number of ranks, and a run goes on with another number."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from forks import call_fresh
from transformers_nextflow import NextFlowProcessor
from transformers_nextflow.trainer import encode_messages

sys.path.insert(0, str(Path(__file__).parent))
import rank_numbers_worker as worker


def conversations(rng: np.random.Generator) -> list[list[list[dict]]]:
    """Four of each kind of data, then texts beside pictures, then one that is left over."""

    def picture() -> dict:
        return {"type": "image", "image": rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)}

    def text(words: str) -> dict:
        return {"type": "text", "text": words}

    def turns(*said: list[dict]) -> list[dict]:
        return [{"role": ("user", "assistant")[index % 2], "content": part} for index, part in enumerate(said)]

    words = [f"number {'very ' * index}{index}" for index in range(4)]
    kinds = {
        "text": [turns([text("How?")], [text(word)]) for word in words],
        "text_to_image": [turns([text(word)], [picture()]) for word in words],
        "image_to_text": [turns([picture()], [text(word)]) for word in words],
        "editing": [turns([picture(), text(word)], [picture()]) for word in words],
        "interleaved": [turns([text(word)], [text(word), picture(), text("then"), picture()]) for word in words],
        "video": [turns([text(word)], [picture() for _ in range(2 + index)]) for index, word in enumerate(words)],
    }
    mixed = [*kinds["text"][:2], *kinds["text_to_image"][:2]]
    return [*kinds.values(), mixed, kinds["editing"][:1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_random_checkpoint) -> Path:
    folder = tmp_path_factory.mktemp("numbers")
    (folder / "model").symlink_to(tiny_random_checkpoint)
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    groups = conversations(np.random.default_rng(0))
    rows = [encode_messages(messages, processor, num_scales=3) for group in groups for messages in group]
    (folder / "samples.json").write_text(json.dumps([{**row, "id": str(i)} for i, row in enumerate(rows)]))
    call_fresh(worker.run_all, str(folder))
    return folder


def load(folder: Path, name: str) -> dict:
    return torch.load(folder / f"{name}.pt")


def assert_the_same(ours: dict, theirs: dict) -> None:
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    for part in ("weights", "average"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_four_ranks_learn_every_kind_of_data_as_two_do(folder):
    assert_the_same(load(folder, "padded-all"), load(folder, "padded-two"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_a_run_goes_from_two_ranks_to_one_to_four(folder, kind):
    """One rank sees every kind of data in the steps that are left."""
    whole = load(folder, f"{kind}-two")
    assert len(whole["losses"]) == worker.STEPS
    for name, first in (("one", 3), ("four", 7)):
        ours = load(folder, f"{kind}-{name}")
        assert {first, worker.STEPS} <= ours["losses"].keys()
        assert_the_same(ours, whole)
