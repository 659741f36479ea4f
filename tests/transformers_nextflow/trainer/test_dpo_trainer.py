"""DPO: the loss and its gradient by hand, what is compared, references, resuming, what is refused."""

import copy
import math

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig

from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, ScaleSchedule
from transformers_nextflow.trainer import (
    NextFlowDPOConfig,
    NextFlowDPOTrainer,
    encode_messages,
    encode_preference,
    expand_sample,
    scale_weights,
)

SETTINGS = dict(max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3, lr_scheduler_type="constant")
SETTINGS |= dict(logging_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no", beta=0.3)


@pytest.fixture(scope="module")
def processor(tiny_random_checkpoint) -> NextFlowProcessor:
    return NextFlowProcessor.from_pretrained(tiny_random_checkpoint)


@pytest.fixture(scope="module")
def pairs(processor) -> datasets.Dataset:
    """Pictures, an edit, and words alone."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (80, 80, 3), dtype=np.uint8) for _ in range(5)]

    def image(index: int) -> dict:
        return {"role": "assistant", "content": [{"type": "image", "image": pictures[index]}]}

    def say(role: str, text: str) -> dict:
        return {"role": role, "content": text}

    source = {"role": "user", "content": [{"type": "image", "image": pictures[4]}, {"type": "text", "text": "redder"}]}
    rows = [
        encode_preference([say("user", "a ring")], image(0), image(1), processor),
        encode_preference([source], image(2), image(3), processor),
        encode_preference([say("user", "Hello?")], say("assistant", "Hi."), say("assistant", "No, go away"), processor),
        encode_preference([say("user", "a star")], image(1), image(2), processor),
    ]
    return datasets.Dataset.from_list(rows)


@pytest.fixture
def make_trainer(pairs, processor, tiny_random_checkpoint, tmp_path):
    def make(**changes) -> NextFlowDPOTrainer:
        names = ("peft_config", "ref_model", "eval_dataset", "train_dataset")
        kwargs = {"train_dataset": pairs} | {name: changes.pop(name) for name in names if name in changes}
        return NextFlowDPOTrainer(
            changes.pop("model", str(tiny_random_checkpoint)),
            args=NextFlowDPOConfig(str(tmp_path / "run"), **{**SETTINGS, **changes}),
            processing_class=processor,
            **kwargs,
        )

    return make


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def log_prob(model: NextFlowForCausalLM, sample: dict, alpha: float, num_scales: int | None) -> torch.Tensor:
    """Of a sample's answer, token by token from plain logits."""
    row = expand_sample(sample, model.config)
    ids, grids = torch.tensor([row["input_ids"]]), row["image_grid_shw"]
    extras = {"image_grid_shw": torch.tensor(grids)} if grids else {}
    log_probs = model(input_ids=ids, use_cache=False, **extras).logits.log_softmax(-1)[0]
    total, remaining, place = torch.zeros(()), iter(grids), 0
    while place < len(row["input_ids"]):
        token = row["input_ids"][place]
        if row["labels"][place] != -100:
            total = total + log_probs[place - 1, token]
        place += 1
        if token == model.config.boi_token_id:
            schedule = ScaleSchedule.from_grid_shw(next(remaining))
            weights = scale_weights(schedule, range(schedule.num_scales), alpha)
            compared = sum(schedule.scale_lengths[:num_scales])
            for index in range(schedule.num_tokens):
                if row["labels"][place] != -100 and index < compared:
                    total = total + weights[index] * log_probs[place - 1, row["input_ids"][place]]
                place += 1
    return total


@pytest.mark.parametrize(("alpha", "num_scales"), [(0.0, None), (0.7, 2)])
def test_loss_and_gradient_are_those_by_hand(make_trainer, pairs, tiny_random_checkpoint, alpha, num_scales):
    reference = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint, dtype=torch.float32)
    model = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    # Log-probabilities of images are hundreds: with a larger beta the loss has less than six digits of them.
    options = {"scale_reweight_alpha": alpha, "num_trained_scales": num_scales, "beta": 0.02}
    trainer = make_trainer(model=copy.deepcopy(model), ref_model=reference, **options)
    batch = trainer.data_collator([pairs[index] for index in range(3)])
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()

    margins = []
    for row in (pairs[index] for index in range(3)):
        ratios = []
        for side in ("chosen", "rejected"):
            with torch.no_grad():
                before = log_prob(reference, row[side], alpha, num_scales)
            ratios.append(log_prob(model, row[side], alpha, num_scales) - before)
        margins.append(ratios[0] - ratios[1])
    expected = -F.logsigmoid(0.02 * torch.stack(margins)).mean()
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), atol=1e-6, rtol=1e-5)
    theirs = dict(trainer.model.named_parameters())
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        other = theirs[name].grad
        torch.testing.assert_close(torch.zeros_like(grad) if other is None else other, grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_it_begins_at_the_reference_and_learns(make_trainer, pairs, lora):
    options = {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4)} if lora else {}
    trainer = make_trainer(max_steps=12, learning_rate=1e-2 if lora else 3e-3, eval_dataset=pairs, **options)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5
    assert logged(trainer, "rewards/accuracies")[-1] == 1


def test_scales_beyond_the_prefix_and_the_prompt_are_not_compared(make_trainer, pairs):
    batch = make_trainer(num_trained_scales=2).data_collator([pairs[1]])  # an edit: a picture is in the prompt
    grids = ScaleSchedule.from_grid_shw(batch["image_grid_shw"][0].tolist())
    compared = batch["completion_mask"]
    images = batch["input_ids"] >= make_trainer().model.config.text_vocab_size
    assert images.sum(1).tolist() == [2 * grids.num_tokens] * 2
    assert (compared * images).sum(1).tolist() == [sum(grids.scale_lengths[:2])] * 2


def test_a_resumed_run_is_an_unbroken_one(make_trainer, tmp_path):
    settings = dict(save_strategy="steps", save_steps=3, max_steps=5, per_device_train_batch_size=1)
    whole, resumed = make_trainer(**settings), make_trainer(**settings)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for (name, value), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_bad_input(make_trainer, pairs, processor):
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    sample = encode_messages(conversation, processor)
    with pytest.raises(ValueError, match="not chosen, rejected: its rows must be made by `encode_preference`"):
        make_trainer(train_dataset=datasets.Dataset.from_list([sample]))
    with pytest.raises(ValueError, match="`chosen` must be a coded sample"):
        make_trainer(train_dataset=datasets.Dataset.from_list([{"chosen": "a", "rejected": "b"}]))
    with pytest.raises(ValueError, match="`use_weighting` must be False"):
        make_trainer(use_weighting=True)
    with pytest.raises(ValueError, match="more than `max_length` \\(20\\)"):
        make_trainer(max_length=20).train()
