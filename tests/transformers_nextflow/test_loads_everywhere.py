"""What the package saves loads through every door, in one folder and as a pipeline's."""

import pytest

from diffusers_nextflow import NextFlowPipeline
from loads_everywhere import assert_loads_everywhere
from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor


def save_both(folder, source):
    NextFlowForCausalLM.from_pretrained(source).save_pretrained(folder, max_shard_size="30KB")
    NextFlowProcessor.from_pretrained(source).save_pretrained(folder)


def save_pipeline(folder, source):
    NextFlowPipeline.from_pretrained(source).save_pretrained(folder)


@pytest.mark.parametrize("save", [save_both, save_pipeline])
def test_it_loads_everywhere(save, tiny_random_checkpoint, tmp_path):
    for _ in range(2):  # the second time over itself
        save(tmp_path, tiny_random_checkpoint)
    assert_loads_everywhere(tmp_path)
