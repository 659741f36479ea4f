"""Supervised fine-tuning: the model's own loss, LoRA, resuming as if unbroken, TRL's parser."""

import datasets
import pytest
import torch
from peft import LoraConfig
from trl import SFTConfig, TrlParser

from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor
from transformers_nextflow.trainer import NextFlowDataCollator, NextFlowSFTConfig, NextFlowSFTTrainer

SETTINGS = dict(
    per_device_train_batch_size=3,
    max_steps=6,
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    logging_steps=1,
    report_to=[],
    use_cpu=True,
    bf16=False,
)


@pytest.fixture
def make_trainer(samples, tiny_random_checkpoint, tmp_path):
    def make(**changes) -> NextFlowSFTTrainer:
        kwargs = {name: changes.pop(name) for name in ("peft_config",) if name in changes}
        return NextFlowSFTTrainer(
            str(tiny_random_checkpoint),
            NextFlowSFTConfig(str(tmp_path / "run"), **{**SETTINGS, "save_strategy": "no", **changes}),
            train_dataset=datasets.Dataset.from_list(samples),
            processing_class=NextFlowProcessor.from_pretrained(tiny_random_checkpoint).tokenizer,
            **kwargs,
        )

    return make


def losses(trainer: NextFlowSFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("alpha", [0.0, 0.9])
def test_the_loss_is_the_models_own_and_falls(make_trainer, samples, tiny_random_checkpoint, alpha):
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint)
    model.config.scale_reweight_alpha = alpha
    expected = float(model(**NextFlowDataCollator(model.config, condition_dropout=0)(samples)).loss)
    trainer = make_trainer(scale_reweight_alpha=alpha, condition_dropout=0, max_steps=20)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-4)
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]


def test_gradient_accumulation_is_one_large_batch(make_trainer):
    large, small = (
        make_trainer(condition_dropout=0, max_steps=2),
        make_trainer(condition_dropout=0, max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=3),
    )
    large.train()
    small.train()
    assert losses(small) == pytest.approx(losses(large), rel=1e-4)


def test_a_resumed_run_is_an_unbroken_one(make_trainer, tmp_path):
    settings = dict(condition_dropout=0.5, save_strategy="steps", save_steps=3, per_device_train_batch_size=1)
    unbroken = make_trainer(**settings)
    unbroken.train()
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert losses(resumed) == pytest.approx(losses(unbroken), rel=1e-5)
    for ours, theirs in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_lora_learns_saves_and_merges(make_trainer, samples, tiny_random_checkpoint, tmp_path):
    from peft import PeftModel

    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(peft_config=lora, condition_dropout=0, max_steps=20)
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert all(torch.equal(dict(trainer.model.named_parameters())[name], value) for name, value in frozen.items())

    trainer.save_model(str(tmp_path / "lora"))
    base = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint)
    batch = NextFlowDataCollator(base.config, condition_dropout=0)(samples)
    trained = trainer.model.eval()(**batch).logits
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval()
    torch.testing.assert_close(loaded(**batch).logits, trained, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.merge_and_unload()(**batch).logits, trained, atol=1e-4, rtol=1e-4)


def test_trl_parser_reads_it_from_yaml(tmp_path):
    (tmp_path / "sft.yaml").write_text("output_dir: out\nscale_reweight_alpha: 0.9\ncondition_dropout: 0.2\n")
    (config,) = TrlParser(NextFlowSFTConfig).parse_args_and_config(
        ["--config", str(tmp_path / "sft.yaml"), "--use_cpu", "true", "--bf16", "false", "--learning_rate", "0.5"]
    )
    assert (config.scale_reweight_alpha, config.condition_dropout, config.learning_rate) == (0.9, 0.2, 0.5)
    assert config.completion_only_loss and config.max_length is None


def test_bad_input(tiny_random_checkpoint, tmp_path):
    common = dict(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="can't be packed yet"):
        NextFlowSFTConfig(packing=True, **common)
    with pytest.raises(ValueError, match="must be at least 0, but got -1"):
        NextFlowSFTConfig(scale_reweight_alpha=-1, **common)
    with pytest.raises(TypeError, match="must be a `NextFlowSFTConfig`, but got SFTConfig"):
        NextFlowSFTTrainer(str(tiny_random_checkpoint), SFTConfig(**common))
