"""Every field of TRL's, transformers' and PEFT's settings is in the table of docs/training.md; what it refuses, is."""

import dataclasses
import re
from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import TrainingArguments
from trl import DPOConfig, GRPOConfig, SFTConfig

from transformers_nextflow.trainer import (
    NextFlowDPOConfig,
    NextFlowGRPOConfig,
    NextFlowImageTokenizerTrainingConfig,
    NextFlowSFTConfig,
    grpo_config,
    sft_config,
)

PAGE = Path(__file__).parents[3] / "docs" / "training.md"
OTHER = {
    "padding_free": True, "eval_packing": True, "assistant_only_loss": True, "chat_template_path": "x",
    "use_liger_kernel": True, "label_smoothing_factor": 0.1, "pad_to_multiple_of": 8, "cast_lm_head_to_fp32": True,
    "chat_template_kwargs": {"a": 1}, "use_vllm": True, "use_transformers_continuous_batching": True,
    "loss_type": "dapo", "importance_sampling_level": "sequence", "use_bias_correction_kl": True, "delta": 2.0,
    "multi_objective_aggregation": "normalize_then_sum", "off_policy_mask_threshold": 0.5, "min_p": 0.1,
    "top_entropy_quantile": 0.5, "entropy_coef": 0.1, "use_adaptive_entropy": True, "repetition_penalty": 1.1,
    "mask_truncated_completions": True, "torch_compile": True, "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
}  # fmt: skip


def table() -> dict[str, dict[str, str]]:
    """Of each class: what the page says of each field."""
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (.+) \|$", text.split("### Every setting")[1], flags=re.M)
    said: dict[str, dict[str, str]] = {}
    for name, verdict, fields in rows:
        said.setdefault(name, {}).update(dict.fromkeys(re.findall(r"`(\w+)`", fields), verdict.strip()))
    return said


def test_the_table_has_every_field():
    said = table()
    for config in (TrainingArguments, SFTConfig, GRPOConfig, LoraConfig):
        own = {field.name for field in dataclasses.fields(config) if field.init}
        if config in (SFTConfig, GRPOConfig):
            own -= {field.name for field in dataclasses.fields(TrainingArguments)}
        assert said[config.__name__].keys() >= own, sorted(own - said[config.__name__].keys())
    for config, parent in (
        (NextFlowSFTConfig, SFTConfig),
        (NextFlowDPOConfig, DPOConfig),
        (NextFlowGRPOConfig, GRPOConfig),
        (NextFlowImageTokenizerTrainingConfig, TrainingArguments),
    ):
        own = {field.name for field in dataclasses.fields(config)} - {
            field.name for field in dataclasses.fields(parent)
        }
        assert said[config.__name__].keys() == own
        assert not [name for name in own if not re.search(rf"^ .*\b{name}\b.* \(`", config.__doc__, flags=re.M)]


@pytest.mark.parametrize(
    ("config", "name"),
    [(NextFlowSFTConfig, name) for name, *_ in sft_config.FIXED]
    + [(NextFlowGRPOConfig, name) for name, *_ in grpo_config.FIXED],
)
def test_what_is_refused_is_named_and_in_the_table(config, name, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}` must be "):
        config(str(tmp_path), use_cpu=True, bf16=False, **{name: OTHER[name]})
    parent = "SFTConfig" if config is NextFlowSFTConfig else "GRPOConfig"
    said = table()
    assert "refused" in (said[parent].get(name) or said["TrainingArguments"][name])


def test_lengths_are_grouped_by_packing(tmp_path):
    with pytest.raises(ValueError, match="use `packing` for samples of different lengths"):
        NextFlowSFTConfig(str(tmp_path), use_cpu=True, bf16=False, train_sampling_strategy="group_by_length")
