"""Batches of coded samples: padding changes no loss, and the condition is dropped as often as asked."""

from dataclasses import replace

import pytest
import torch

from transformers_nextflow import NextFlowConfig, NextFlowForCausalLM
from transformers_nextflow.trainer import NextFlowDataCollator


@pytest.fixture
def model(tiny_random_checkpoint) -> NextFlowForCausalLM:
    return NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint)


def test_padding_changes_no_loss(samples, model):
    collate = NextFlowDataCollator(model.config, condition_dropout=0)
    batch = collate(samples)
    assert batch["image_grid_shw"].tolist() == [[5, 16, 16]] * 2
    together = model(**batch, num_items_in_batch=1).loss
    apart = sum(model(**collate([sample]), num_items_in_batch=1).loss for sample in samples)
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("probability, shortest", [(0.0, 0), (0.5, 150), (1.0, 300)])
def test_conditions_are_dropped_as_often_as_asked(samples, model, probability, shortest):
    torch.manual_seed(0)
    collate = NextFlowDataCollator(model.config, condition_dropout=probability)
    lengths = [int(collate([samples[0]])["attention_mask"].sum()) for _ in range(300)]
    dropped = lengths.count(56 + 1)  # <boi>, 55 codes and <|im_end|>
    assert abs(dropped - shortest) < 30 and (probability == 0.5 or dropped == shortest)


def test_answers_in_words_keep_their_questions(samples, model):
    kept, dropping = (NextFlowDataCollator(model.config, condition_dropout=p) for p in (0.0, 1.0))
    for sample in samples[1:]:
        assert torch.equal(dropping([sample])["input_ids"], kept([sample])["input_ids"])


@pytest.mark.parametrize("probability, least, most", [(0.0, 0, 0), (0.5, 120, 180), (1.0, 300, 300)])
def test_tasks_are_inverted_as_often_as_asked(samples, model, probability, least, most):
    torch.manual_seed(0)
    collate = NextFlowDataCollator(model.config, condition_dropout=0, task_inversion=probability)
    drawn = [bool((collate([samples[0]])["labels"] >= model.config.text_vocab_size).any()) for _ in range(300)]
    assert least <= drawn.count(False) <= most
    for sample in samples[1:]:
        assert torch.equal(collate([sample])["labels"], NextFlowDataCollator(model.config)([sample])["labels"])


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "sdpa_varlen"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("chosen", [slice(None), slice(2, 3), slice(1, 3), slice(0, 1)])
def test_a_layout_made_on_the_cpu_changes_no_bit(samples, model, implementation, packing, chosen):
    """`chosen`: all kinds, an unpadded text, two of unequal lengths, one picture."""
    model.config.scale_reweight_alpha = 0.9
    model.train().set_attn_implementation(implementation)
    results = []
    for with_layout in (False, True):
        collate = NextFlowDataCollator(model.config, condition_dropout=0, packing=packing, with_layout=with_layout)
        batch = collate(samples[chosen])
        assert ("layout" in batch, "image_grid_shw" in batch) == (with_layout, not with_layout and chosen.start != 2)
        outputs = model(**batch)
        model.zero_grad()
        outputs.loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append([outputs.loss, outputs.token_losses, *gradients])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_layout_that_contradicts_its_batch_is_refused(samples, model):
    collate = NextFlowDataCollator(model.config, condition_dropout=0, with_layout=True)
    batch, first = collate(samples), model.config.text_vocab_size
    packed = NextFlowDataCollator(model.config, condition_dropout=0, with_layout=True, packing=True)(samples)
    ids, labels, seq_idx = batch["input_ids"], batch["labels"], packed["seq_idx"]
    doubled = batch["layout"].learned_slots.clone()
    doubled[1] = doubled[0]
    elsewhere = "is not that of these `input_ids`: image codes, packed sequences or padding stand elsewhere"
    wrong = [
        ({"input_ids": ids.roll(1, 1)}, elsewhere),
        ({"input_ids": ids.index_fill(1, torch.tensor([0]), first)}, elsewhere),
        ({"input_ids": ids.masked_fill(ids >= first, model.config.vocab_size)}, elsewhere),
        ({"layout": replace(batch["layout"], images=[])}, elsewhere),
        ({"layout": replace(batch["layout"], is_padded=False)}, elsewhere),
        ({"layout": collate(samples[1:])["layout"]}, "`layout` is of ids of shape"),
        ({"layout": batch["layout"].to("meta")}, "on meta, but `input_ids` have .* on cpu: make it anew, or move it"),
        ({"image_grid_shw": torch.tensor([[5, 16, 16]] * 2)}, "takes the place of `image_grid_shw`"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(*ids.shape, 1)}, "`layout` goes with `input_ids`"),
        ({"layout": {}, "labels": None}, "must be a `TokenLayout`, but is a dict"),
        ({"layout": replace(batch["layout"], learned_slots=doubled)}, "are not the slots that predict `labels`"),
        ({"labels": labels.float()}, "`labels` must be ids"),
        ({"labels": labels.roll(1, 1)}, "are not the slots that predict `labels`"),
        ({"labels": labels.masked_fill(labels != -100, model.config.vocab_size)}, "are not the slots that predict"),
        ({"seq_idx": torch.zeros_like(ids), "attention_mask": None}, "`layout` and `seq_idx` belong together"),
        ({**packed, "attention_mask": None, "seq_idx": seq_idx.clamp(max=1)}, elsewhere),
    ]
    for changes, message in wrong:
        with pytest.raises(ValueError, match=message):
            model(**{**batch, **changes})
    assert torch.isfinite(model(**batch).loss)


def test_bad_input(samples, tiny_random_checkpoint):
    config = NextFlowConfig.from_pretrained(tiny_random_checkpoint)
    with pytest.raises(ValueError, match="must be between 0 and 1, but got 2"):
        NextFlowDataCollator(config, condition_dropout=2)
    with pytest.raises(ValueError, match=r"takes \d+ tokens with its images, more than `max_length` \(60\)"):
        NextFlowDataCollator(config, condition_dropout=0, max_length=60)(samples)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"token_ids": [], "completion_mask": [], "codes": [], "target_codes": [], "image_grid_shw": []},
            "0 `token_ids`",
        ),
        ({"completion_mask": [1]}, r"\d+ `token_ids` and a `completion_mask` of 1"),
        ({"codes": [[]], "target_codes": [[]]}, "has 55 codes, but the sample has 0 and 0 targets"),
        ({"codes": []}, "1 image marks, codes of 0 images, targets of 1, grids of 1"),
        ({"codes": [[64] * 55]}, "`codes` must be whole numbers from 0 to 63, but hold 64"),
        ({"target_codes": [[-1] * 55]}, "`target_codes` must be whole numbers from 0 to 63, but hold -1"),
        ({"codes": [[0.5] * 55]}, "`codes` must be whole numbers .* hold 0.5"),
        ({"codes": [[]], "target_codes": [[]], "image_grid_shw": [[1, 16, 16]]}, "has 1 codes, but the sample has 0"),
        (
            {"image_grid_shw": [[6, 16, 16]]},
            "An image of 6 scales was given, but the model has 5",
        ),
        ({"image_grid_shw": [[5, 1, 99]]}, "99"),
        ({"codebook_size": 4096}, "codebook of 4096 codes"),
        ({"image_grid_shw": [[]]}, r"is \(number of scales, height, width\), but got \(\)"),
    ],
)
@pytest.mark.parametrize("condition_dropout", [0.0, 1.0])
def test_samples_that_do_not_fit_are_named(samples, tiny_random_checkpoint, change, message, condition_dropout):
    collate = NextFlowDataCollator(NextFlowConfig.from_pretrained(tiny_random_checkpoint), True, condition_dropout)
    with pytest.raises(ValueError, match=f"Sample picture-7: .*{message}"):
        collate([samples[2], {**samples[0], **change, "id": "picture-7"}])
