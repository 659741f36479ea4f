"""TokenFlow in the trainers, which see nothing but the token view: LoRA on captions, GRPO on drawn pictures."""

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

from transformers_nextflow import TokenFlowForCausalLM, TokenFlowProcessor
from transformers_nextflow.trainer import (
    NextFlowDataCollator,
    NextFlowGRPOConfig,
    NextFlowGRPOTrainer,
    NextFlowSFTConfig,
    NextFlowSFTTrainer,
    encode_messages,
)

COMMON = dict(report_to=[], use_cpu=True, bf16=False, save_strategy="no", logging_steps=1, learning_rate=1e-2)


@pytest.fixture(scope="module")
def processor(tiny_tokenflow_checkpoint) -> TokenFlowProcessor:
    return TokenFlowProcessor.from_pretrained(tiny_tokenflow_checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def samples(processor) -> list[dict]:
    pictures = [Image.new("RGB", (80, 64), color) for color in ("red", "blue")]
    return [
        encode_messages(
            [
                {"role": "user", "content": text},
                {"role": "assistant", "content": [{"type": "image", "image": picture}]},
            ],
            processor,
            prompt_style="bare",
        )
        for text, picture in zip(["a bed", "a cat"], pictures, strict=True)
    ]


def test_what_is_learned_is_the_codes_and_what_closes_the_image(samples, processor, tiny_tokenflow_checkpoint):
    config = TokenFlowForCausalLM.from_pretrained(tiny_tokenflow_checkpoint).config
    batch = NextFlowDataCollator(config, condition_dropout=0)(samples[:1])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert ids[0] == 1 and ids.count(1) == 1 and ids[-36:-33] == [5, 6, 7] and ids[-3:] == [9, 10, 2]
    assert labels[-33:] == ids[-33:] and set(labels[:-33]) == {-100}
    dropped = NextFlowDataCollator(config, condition_dropout=1.0)(samples[:1])["input_ids"][0].tolist()
    assert dropped == [1, *ids[-36:]]
    with pytest.raises(ValueError, match='no chat template: pass `prompt_style="bare"`'):
        encode_messages([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], processor)


def test_lora(samples, tiny_tokenflow_checkpoint, tmp_path):
    trainer = NextFlowSFTTrainer(
        str(tiny_tokenflow_checkpoint),
        NextFlowSFTConfig(str(tmp_path), per_device_train_batch_size=2, max_steps=8, condition_dropout=0, **COMMON),
        train_dataset=datasets.Dataset.from_list(samples),
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"),
    )
    assert set(trainer.model.peft_config["default"].target_modules) == {"q_proj", "v_proj"}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    assert "loss_scale_4" in trainer.state.log_history[0]
    trainer.save_merged(str(tmp_path / "merged"))
    merged = TokenFlowForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.generation_config.prompt_styles == {"image": "bare"}
    assert type(TokenFlowProcessor.from_pretrained(tmp_path / "merged")) is TokenFlowProcessor


def test_grpo(tiny_tokenflow_checkpoint, tmp_path):
    seen = []

    def redness(images, **kwargs):
        seen.extend(images)
        return [float(np.asarray(image)[..., 0].mean()) for image in images]

    trainer = NextFlowGRPOTrainer(
        str(tiny_tokenflow_checkpoint),
        redness,
        NextFlowGRPOConfig(
            str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_steps=2, num_trained_scales=3, **COMMON
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a bed"}, {"prompt": "a bad cat"}]),
    )
    before = trainer.model.lm_head.weight.clone()
    trainer.train()
    assert len(seen) == 8 and {image.size for image in seen} == {(64, 64)}
    # What a rollout drew is as likely to the trainer as it was when it was drawn.
    ratios = [entry["ratio/max"] for entry in trainer.state.log_history if "ratio/max" in entry]
    assert ratios == pytest.approx([1.0, 1.0], abs=1e-4)
    assert not torch.equal(trainer.model.lm_head.weight, before)
