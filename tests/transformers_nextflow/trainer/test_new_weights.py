"""New weights have a learning rate of their own, whatever steps them; where they can't, it is refused by name."""

import copy
import re

import datasets
import pytest
import torch
from peft import LoraConfig
from transformers.training_args import OptimizerNames

from transformers_nextflow import NextFlowProcessor
from transformers_nextflow.trainer import NextFlowSFTConfig, NextFlowSFTTrainer

RATE, NEW_RATE = 1e-2, 3e-2


@pytest.fixture(scope="module")
def make_trainer(samples, tiny_random_checkpoint, tmp_path_factory):
    words = NextFlowProcessor.from_pretrained(tiny_random_checkpoint).tokenizer
    rows = datasets.Dataset.from_list(samples)

    def make(folder=None, peft_config=None, **changes) -> NextFlowSFTTrainer:
        settings = dict(max_steps=4, learning_rate=RATE, lr_scheduler_type="linear", report_to=[], save_strategy="no")
        settings |= dict(use_cpu=True, bf16=False, condition_dropout=0, weight_decay=0.1, disable_tqdm=True)
        folder = folder or tmp_path_factory.mktemp("new_weights")
        args = NextFlowSFTConfig(str(folder), **{**settings, "new_weights_learning_rate": NEW_RATE, **changes})
        torch.manual_seed(0)
        options = {"train_dataset": rows, "processing_class": words, "peft_config": peft_config}
        return NextFlowSFTTrainer(str(tiny_random_checkpoint), args, **options)

    return make


@pytest.fixture(scope="module")
def trio(make_trainer) -> list[NextFlowSFTTrainer]:
    """With the option, and without it at either rate."""
    plain = {"new_weights_learning_rate": None}
    return [make_trainer(), make_trainer(**plain), make_trainer(learning_rate=NEW_RATE, **plain)]


def is_new(name: str, parameter: torch.Tensor, config) -> torch.Tensor:
    """Of each row."""
    rows = {
        "model.embed_tokens.weight": [config.boi_token_id, config.eoi_token_id],
        "lm_head.weight": [config.boi_token_id, *range(config.text_vocab_size, config.vocab_size)],
    }
    whole = slice(None) if re.search(r"connector|scale_embedding", name) else []
    new = torch.zeros(len(parameter), dtype=torch.bool)
    new[rows.get(name, whole)] = True
    return new


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "rmsprop", "adagrad", "muon"])
def test_new_weights_step_as_at_their_rate_and_others_as_at_theirs(trio, optim):
    """Over a schedule, by the same gradients, which no rate has a part in."""
    starts = [copy.deepcopy(trainer.model.state_dict()) for trainer in trio]
    for trainer in trio:
        trainer.args.muon_learning_rate = 0.02 if optim == "muon" else None
        trainer.args.optim = OptimizerNames("adamw_torch" if optim == "muon" else optim)
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.create_optimizer_and_scheduler(4)
    for step in range(3):
        for trainer in trio:
            generator = torch.Generator().manual_seed(step)
            for parameter in trainer.model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
    ours, slow, fast = (dict(trainer.model.named_parameters()) for trainer in trio)
    for name, value in ours.items():
        new = is_new(name, value, trio[0].model.config)
        expected = torch.where(new.view(-1, *[1] * (value.ndim - 1)), fast[name], slow[name])
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(fast[name], slow[name]) or optim == "muon"
    for trainer, start in zip(trio, starts, strict=True):
        trainer.model.load_state_dict(start)


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_with_its_rates_resumes(make_trainer, tmp_path, lora):
    config = {"modules_to_save": ["connector"], "target_modules": ["q_proj"], "r": 2, "task_type": "CAUSAL_LM"}
    settings = {"peft_config": LoraConfig(**config)} if lora else {}
    whole = make_trainer(tmp_path, save_strategy="steps", save_steps=2, **settings)
    whole.train()
    assert {group["initial_lr"] for group in whole.optimizer.param_groups} == {RATE, NEW_RATE}
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, value), other in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(value, other), name
    other_rate = make_trainer(tmp_path, new_weights_learning_rate=0.5, **settings)
    with pytest.raises(ValueError, match=r"`new_weights_learning_rate` was 0.03, now 0.5"):
        other_rate.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_where_it_has_no_meaning_it_is_refused(make_trainer, trio):
    with pytest.raises(ValueError, match=r"trains new weights only: their rate is `learning_rate`"):
        make_trainer(stage="alignment")
    adapters = make_trainer(peft_config=LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="but none of them is trained"):
        adapters.create_optimizer()
    trainer = trio[0]
    trainer.optimizer, trainer.args.muon_learning_rate = None, None
    trainer.args.optim = OptimizerNames("sgd")
    for name, other in (("optim", OptimizerNames("schedule_free_sgd")), ("optim", OptimizerNames("lomo"))):
        trainer.optimizer = None
        trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": RATE})
        setattr(trainer.args, name, other)
        with pytest.raises(ValueError, match=f"learning rates by group, which `optim={other.value}` has not"):
            trainer.create_optimizer()
    for sharded in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        setattr(trainer, sharded, True)
        with pytest.raises(ValueError, match="step pieces of weights: use DDP"):
            trainer._refuse_sharded_weights()
        setattr(trainer, sharded, False)
