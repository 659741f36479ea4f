"""Samples to train on."""

import numpy as np
import pytest

from transformers_nextflow import NextFlowProcessor
from transformers_nextflow.trainer import encode_messages


@pytest.fixture(scope="module")
def samples(tiny_random_checkpoint) -> list[dict]:
    """Drawing, describing and talking, of different lengths."""
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    picture = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    image, text = [{"type": "image", "image": picture}], "a long description of the picture"
    return [
        encode_messages([{"role": "user", "content": a}, {"role": "assistant", "content": b}], processor)
        for a, b in (("a picture", image), (image, text), ("How are you?", "Fine."))
    ]
