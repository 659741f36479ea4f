"""The LoRA example at its smallest: it scores before and after and leaves an adapter that loads."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from peft import PeftModel

from transformers_nextflow import NextFlowForCausalLM, tiny_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
lora_concept = pytest.importorskip("lora_concept", reason="needs scipy and scikit-image")


def test_the_judge_knows_arrows():
    rng = np.random.default_rng(0)
    for colour, background in lora_concept.PAIRS:
        sample = lora_concept.arrow_sample(rng, colour, background)
        assert sample.judge(sample.truth) == {"accuracy": True, "strict": True}
    shape = lora_concept.scene_sample(rng, "test", "colour")
    assert not lora_concept.arrow_sample(rng, "red", "white").judge(shape.truth)["accuracy"]
    assert not set(lora_concept.TRAIN_PAIRS) & set(lora_concept.TEST_PAIRS)
    assert (len(lora_concept.TRAIN_PAIRS), len(lora_concept.TEST_PAIRS)) == (32, 8)


@pytest.mark.slow
def test_it_runs(tmp_path, capsys):
    options = ["--output", str(tmp_path), "--steps", "2", "--batch-size", "2", "--prior", "2", "--prompts", "1"]
    result = lora_concept.main(options)
    assert json.loads((tmp_path / "scores.json").read_text()) == result
    assert "| arrows, held-out pairs | 1 |" in capsys.readouterr().out
    PeftModel.from_pretrained(NextFlowForCausalLM.from_pretrained(tiny_checkpoint()), str(tmp_path))
