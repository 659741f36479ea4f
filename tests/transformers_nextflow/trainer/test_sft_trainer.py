"""Supervised fine-tuning: the model's own loss, LoRA, resuming as if unbroken, TRL's parser."""

import contextlib
from unittest import mock

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback
from trl import SFTConfig, TrlParser

from transformers_nextflow import NextFlowConfig, NextFlowForCausalLM, NextFlowProcessor, NextFlowTextToImagePipeline
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
        kwargs = {name: changes.pop(name) for name in ("peft_config", "eval_dataset") if name in changes}
        rows = changes.pop("samples", samples)
        return NextFlowSFTTrainer(
            changes.pop("model", str(tiny_random_checkpoint)),
            NextFlowSFTConfig(str(tmp_path / "run"), **{**SETTINGS, "save_strategy": "no", **changes}),
            train_dataset=datasets.Dataset.from_list(rows),
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


def test_lora_trains_new_parts_and_rows_too(make_trainer, tiny_random_checkpoint):
    config = NextFlowConfig.from_pretrained(tiny_random_checkpoint)
    before = dict(NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint).named_parameters())
    rows = [config.boi_token_id, config.eoi_token_id]
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        modules_to_save=["connector", "scale_embedding"],
        trainable_token_indices={"embed_tokens": rows},
        task_type="CAUSAL_LM",
    )
    trainer = make_trainer(peft_config=lora, condition_dropout=0, completion_only_loss=False)
    trainer.train()
    after = dict(trainer.model.merge_and_unload().named_parameters())
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    embeddings = "model.embed_tokens.weight"
    assert (after[embeddings] != before[embeddings]).any(-1).nonzero()[:, 0].tolist() == sorted(rows)
    assert {name.split(".")[1] for name in changed} == {"connector", "scale_embedding", "embed_tokens", "layers"}


def test_lora_without_targets_takes_the_usual_ones(make_trainer):
    trainer = make_trainer(peft_config=LoraConfig(task_type="CAUSAL_LM"))
    assert {"q_proj", "v_proj"} == set(trainer.model.peft_config["default"].target_modules)


def test_trl_parser_reads_it_from_yaml(tmp_path):
    (tmp_path / "sft.yaml").write_text("output_dir: out\nscale_reweight_alpha: 0.9\ncondition_dropout: 0.2\n")
    (config,) = TrlParser(NextFlowSFTConfig).parse_args_and_config(
        ["--config", str(tmp_path / "sft.yaml"), "--use_cpu", "true", "--bf16", "false", "--learning_rate", "0.5"]
    )
    assert (config.scale_reweight_alpha, config.condition_dropout, config.learning_rate) == (0.9, 0.2, 0.5)
    assert config.completion_only_loss and config.max_length is None


def test_bad_input(tiny_random_checkpoint, tmp_path):
    common = dict(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="use `packing` for coded samples"):
        NextFlowSFTConfig(padding_free=True, **common)
    with pytest.raises(ValueError, match="`packing_strategy` must be one of compute, length, but got 'bfd'"):
        NextFlowSFTConfig(packing_strategy="bfd", **common)
    with pytest.raises(ValueError, match=r"need a `datasets.Dataset`.* but `train_dataset` is a list"):
        settings = NextFlowSFTConfig(packing=True, **common)
        NextFlowSFTTrainer(str(tiny_random_checkpoint), settings, train_dataset=[{}])
    with pytest.raises(ValueError, match="must be at least 0, but got -1"):
        NextFlowSFTConfig(scale_reweight_alpha=-1, **common)
    with pytest.raises(TypeError, match="must be a `NextFlowSFTConfig`, but got SFTConfig"):
        NextFlowSFTTrainer(str(tiny_random_checkpoint), SFTConfig(**common))


# --- Packing ---


@pytest.mark.parametrize("strategy, max_length", [("compute", 600), ("length", 260)])
def test_packed_training_sees_every_sample_once_an_epoch_and_resumes(
    make_trainer, samples, tmp_path, strategy, max_length
):
    settings = dict(packing=True, packing_strategy=strategy, max_length=max_length, condition_dropout=0.5)
    settings |= dict(max_steps=7, save_strategy="steps", save_steps=4)
    many = [{**sample, "id": f"{number}-{index}"} for number in range(4) for index, sample in enumerate(samples)]
    unbroken, resumed = (make_trainer(samples=many, **settings) for _ in range(2))
    packs = [batch["sample_ids"] for batch in unbroken.get_train_dataloader()]
    assert sorted(name for pack in packs for name in pack) == sorted(sample["id"] for sample in many)
    assert 2 <= len(packs) <= 5  # so that the run has several epochs, and goes on within one
    unbroken.train()
    assert unbroken.model.config._attn_implementation == "sdpa_varlen"
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert losses(resumed) == pytest.approx(losses(unbroken), rel=1e-5)
    assert NextFlowForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4").config._attn_implementation == "sdpa"
    other = make_trainer(samples=many, **{**settings, "max_length": 700})
    with pytest.raises(ValueError, match=f"`max_length` was {max_length}, now 700"):
        other.train(resume_from_checkpoint=True)


def test_packed_loss_is_the_padded_one(make_trainer):
    padded = make_trainer(condition_dropout=0, max_steps=1)
    packed = make_trainer(condition_dropout=0, max_steps=1, packing=True, max_length=2000)
    padded.train()
    packed.train()
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-5)


def test_overlong_samples_stop_or_are_skipped(make_trainer, caplog):
    told = r"\d of 3 samples are over `max_length` \(60\): the longest, \d, takes \d+ .*`overlong_samples=\"skip\"`"
    for packing in (False, True):
        with pytest.raises(ValueError, match=told):
            make_trainer(packing=packing, max_length=60)
    for packing in (False, True):
        trainer = make_trainer(
            packing=packing, packing_strategy="length", max_length=60, overlong_samples="skip", max_steps=1
        )
        assert trainer.num_skipped_samples == 2 and len(trainer.train_dataset) == 1
        assert "2 of 3 samples are skipped" in caplog.text
        trainer.train()
    with pytest.raises(ValueError, match=r"3 of 3 samples are over `max_length` \(10\)"):
        make_trainer(max_length=10, overlong_samples="skip")


def test_a_sample_must_fit_both_ways_round(make_trainer, samples):
    """Described instead of drawn it may be longer; that must not come out in the middle of a run."""
    words = samples[0]["inverse_token_ids"]
    longer = {
        **samples[0],
        "inverse_token_ids": words + [5] * 40,
        "inverse_completion_mask": [*samples[0]["inverse_completion_mask"], *[1] * 40],
    }
    length = len(samples[0]["token_ids"]) + 55
    for settings in ({}, {"packing": True, "packing_strategy": "length"}):
        settings |= {"samples": [longer, samples[2]], "max_length": length + 10, "max_steps": 1}
        make_trainer(**settings).train()
        with pytest.raises(ValueError, match=r"1 of 2 samples are over `max_length`"):
            make_trainer(task_inversion=0.5, **settings)
        assert make_trainer(task_inversion=0.5, overlong_samples="skip", **settings).num_skipped_samples == 1


# --- Evaluation ---


@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_is_not_drawn(make_trainer, samples, packing):
    held_out = datasets.Dataset.from_list(samples)
    trainer = make_trainer(condition_dropout=1.0, task_inversion=0.5, eval_dataset=held_out, packing=packing)
    batch = NextFlowDataCollator(trainer.model.config, condition_dropout=0)(samples)
    with torch.no_grad():
        expected = float(trainer.model.eval()(**batch).loss)
    assert [trainer.evaluate()["eval_loss"] for _ in range(2)] == pytest.approx([expected] * 2, rel=1e-4)
    drawn = trainer.data_collator
    assert (drawn.condition_dropout, drawn.task_inversion) == (1.0, 0.5)


def test_what_is_evaluated_on_is_checked_at_once(make_trainer, samples):
    foreign = datasets.Dataset.from_list([{**sample, "image_tokenizer_hash": "0123456789abcdef"} for sample in samples])
    for held_out in (foreign, {"a": foreign}):
        with pytest.raises(ValueError, match="come from the image tokenizer 0123456789abcdef"):
            make_trainer(eval_dataset=held_out)


def test_what_is_evaluated_on_must_fit(make_trainer, samples):
    for held_out in (
        datasets.Dataset.from_list(samples),
        datasets.Dataset.from_list(samples).add_column("id", [*"abc"]),
    ):
        with pytest.raises(ValueError, match=r"\d of 3 samples to evaluate on are over `max_length` \(60\)"):
            make_trainer(max_length=60, overlong_samples="skip", eval_dataset=held_out)


def test_samples_that_do_not_fit_together_are_named_at_once(make_trainer, samples):
    wrong = {**samples[0], "image_grid_shw": [*samples[0]["image_grid_shw"], [1, 16, 16]]}
    rows = [{**sample, "id": name} for name, sample in zip("ab", (samples[1], wrong), strict=True)]
    for task_inversion in (0.0, 0.5):
        with pytest.raises(ValueError, match="Sample b: "):
            make_trainer(samples=rows, task_inversion=task_inversion)


# --- What is logged, what is trained ---


def test_losses_are_logged_by_kind(make_trainer, samples, tiny_random_checkpoint):
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint)
    batch = NextFlowDataCollator(model.config, condition_dropout=0)(samples)
    trainer = make_trainer(condition_dropout=0, max_steps=1, logging_first_step=True)
    trainer.train()
    log = trainer.state.log_history[0]

    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
    targets, losses_of = batch["labels"][:, 1:], {}
    plain = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    boundaries = torch.tensor([0, 1, 5, 14, 30, 55])
    for row, column in (targets != -100).nonzero().tolist():
        code = targets[row, column] >= model.config.text_vocab_size
        kinds = ["loss_text"]
        if code:  # the only image that is learned: its codes are counted from the first one on
            place = column - int((targets[row] >= model.config.text_vocab_size).nonzero()[0])
            kinds = ["loss_image", f"loss_scale_{int((boundaries <= place).sum())}"]
        for kind in kinds:
            losses_of.setdefault(kind, []).append(float(plain[row, column]))
    expected = {kind: sum(values) / len(values) for kind, values in losses_of.items()}
    assert len(expected) == 7
    assert {kind: log[kind] for kind in expected} == pytest.approx(expected, rel=1e-4)


def test_alignment_trains_what_is_new(make_trainer, tiny_random_checkpoint):
    before = dict(NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint).named_parameters())
    trainer = make_trainer(stage="alignment", weight_decay=0.5, condition_dropout=0, completion_only_loss=False)
    trainer.train()
    config = trainer.model.config
    changed = {
        name: (parameter != before[name]).view(len(parameter), -1).any(-1).nonzero()[:, 0].tolist()
        for name, parameter in trainer.model.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    assert changed.pop("model.embed_tokens.weight") == sorted([config.boi_token_id, config.eoi_token_id])
    head = set(changed.pop("lm_head.weight"))
    assert head == {config.boi_token_id, *range(config.text_vocab_size, config.vocab_size)}
    assert {name.split(".")[1] for name in changed} == {"connector", "scale_embedding"}
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="FSDP, TP and ZeRO-3 cut into pieces"):
        trainer._refuse_sharded_weights()
    with pytest.raises(ValueError, match="leave `peft_config` out"):
        make_trainer(stage="alignment", peft_config=LoraConfig(task_type="CAUSAL_LM"))


def test_activation_checkpointing_changes_nothing(make_trainer):
    plain, saving = (
        make_trainer(condition_dropout=0, max_steps=2, activation_checkpointing=on) for on in (False, True)
    )
    plain.train()
    saving.train()
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_compiled_layers_learn_the_same_and_serve_every_batch(make_trainer, packing):
    settings = dict(
        condition_dropout=0, max_steps=5, activation_checkpointing=not packing, packing=packing, max_length=80
    )
    settings |= {"packing_strategy": "length", "overlong_samples": "skip"}
    plain = make_trainer(**settings)
    plain.train()
    torch._dynamo.reset()
    counters.clear()
    compiled = make_trainer(**settings, torch_compile=True, torch_compile_backend="aot_eager")
    assert compiled.accelerator.state.dynamo_plugin.backend == "NO"  # the layers, not the whole model
    graphs = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            graphs.append(counters["stats"]["unique_graphs"])

    compiled.add_callback(Count())
    compiled.train()
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    for name, weight in plain.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], weight, rtol=0, atol=1e-4)  # steps are 1e-2
    assert 0 < graphs[1] == graphs[-1]  # one for the first length, one for all
    assert not any(layer._compiled_call_impl for layer in compiled.model.model.layers)
    assert type(compiled.model_wrapped) is type(plain.model_wrapped)


# --- What is refused ---


def test_a_loss_that_is_not_finite_names_the_samples(make_trainer, samples):
    named = [{**sample, "id": f"sample-{index}"} for index, sample in enumerate(samples)]
    trainer = make_trainer(samples=named, per_device_train_batch_size=1)
    with torch.no_grad():
        trainer.model.lm_head.weight[:] = float("nan")
    with pytest.raises(ValueError, match=r"The loss is nan at step 0 on the samples \['sample-\d'\]"):
        trainer.train()


def test_codes_of_another_image_tokenizer_are_refused(make_trainer, samples, tmp_path):
    foreign = [{**sample, "image_tokenizer_hash": "0123456789abcdef"} for sample in samples]
    with pytest.raises(ValueError, match="come from the image tokenizer 0123456789abcdef, "):
        make_trainer(samples=[*foreign, *samples])
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    assert trainer.model.config.image_tokenizer_hash == samples[0]["image_tokenizer_hash"]
    with pytest.raises(ValueError, match=f"but the model was trained on codes of {samples[0]['image_tokenizer_hash']}"):
        make_trainer(samples=foreign, model=str(tmp_path / "trained"))


def test_a_missing_column_is_named_at_once(make_trainer, samples):
    with pytest.raises(ValueError, match=r"without target_codes\. Texts"):
        make_trainer(samples=[{name: sample[name] for name in sample if name != "target_codes"} for sample in samples])


def test_codebooks_of_other_sizes_are_named_at_once(make_trainer, samples):
    mixed = [{**samples[0], "codebook_size": 77, "image_tokenizer_hash": ""}, *samples]
    size = samples[0]["codebook_size"]
    with pytest.raises(ValueError, match=f"codebooks of {min(77, size)}, {max(77, size)} codes, but the model's has"):
        make_trainer(samples=mixed)
    make_trainer(samples=[samples[0], {**samples[2], "codebook_size": 0}])  # text, coded without an image tokenizer


def test_no_samples(tiny_random_checkpoint, make_trainer, samples):
    trainer = make_trainer()
    empty = trainer.train_dataset.select([])
    with pytest.raises(ValueError, match="has no samples"):
        NextFlowSFTTrainer(str(tiny_random_checkpoint), trainer.args, train_dataset=empty)


def test_another_size_of_a_step_does_not_resume(make_trainer):
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    other = make_trainer(max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"`samples_per_step` was 3, now 2.* times `gradient_accumulation_steps`"):
        other.train(resume_from_checkpoint=True)
    make_trainer(max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=3).train(True)
    make_trainer(max_steps=1, packing=True, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="`packs_per_step` was 1, now 2"):
        make_trainer(packing=True, gradient_accumulation_steps=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("packing", [False, True])
def test_the_last_step_of_an_epoch_is_filled_with_nothing(make_trainer, samples, packing):
    """Four batches a step and three samples: the fourth batch must neither count nor break."""
    settings = dict(condition_dropout=0, max_steps=3, packing=packing, completion_only_loss=False, max_length=300)
    filled = make_trainer(per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings)
    settings |= dict(packing=False)
    whole = make_trainer(per_device_train_batch_size=3, **settings)
    whole.train()
    filled.train()
    assert losses(filled) == pytest.approx(losses(whole), rel=1e-4)
    dropped = make_trainer(per_device_train_batch_size=1, gradient_accumulation_steps=2, dataloader_drop_last=True)
    assert len(dropped.get_train_dataloader()) == 2


# --- Evaluation ---


def test_evaluation_has_losses_by_kind_and_no_logits(make_trainer, samples, tiny_random_checkpoint):
    trainer = make_trainer(eval_dataset=datasets.Dataset.from_list(samples), per_device_eval_batch_size=2, max_steps=1)
    seen = []
    hook = trainer.model.register_forward_hook(lambda module, args, output: seen.append(output.get("logits")))
    metrics = trainer.evaluate()
    hook.remove()
    assert seen == [None, None]
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint)
    batch = NextFlowDataCollator(model.config, condition_dropout=0)(samples)
    outputs = model(**batch)
    predicted = batch["labels"][:, 1:] != -100
    codes = predicted & (batch["labels"][:, 1:] >= model.config.text_vocab_size)
    losses_of = outputs.token_losses[:, :-1]
    assert metrics["eval_loss_image"] == pytest.approx(float(losses_of[codes].mean()), rel=1e-4)
    assert metrics["eval_loss_text"] == pytest.approx(float(losses_of[predicted & ~codes].mean()), rel=1e-4)
    assert {f"eval_loss_scale_{scale}" for scale in range(1, 6)} < metrics.keys() and metrics["eval_loss"] > 0
    trainer.train()
    assert "loss_image" in trainer.state.log_history[-2]
    parts = {"a": trainer.eval_dataset, "b": trainer.eval_dataset.select([0])}
    assert {"eval_a_loss_text", "eval_b_loss_image"} < trainer.evaluate(parts).keys()


@pytest.mark.parametrize("lora", [False, True])
def test_drawing_while_training_changes_no_weight(make_trainer, tmp_path, lora):
    """Pictures are those of the weights at that step, and the same noise whenever they are drawn."""
    options = {"peft_config": LoraConfig(target_modules=["q_proj"], r=2)} if lora else {}
    plain = make_trainer(max_steps=2, **options)
    plain.train()
    drawing = make_trainer(max_steps=2, sample_prompts=["a ring", "a star"], sample_steps=1, **options)
    drawing.train()
    for (name, value), other in zip(plain.model.named_parameters(), drawing.model.parameters(), strict=True):
        assert torch.equal(value, other), name
    sheets = sorted((tmp_path / "run" / "samples").iterdir())
    assert [path.name for path in sheets] == ["000001.png", "000002.png"]
    with Image.open(sheets[1]) as sheet:
        width, height = sheet.size
        assert width == 2 * height
        left = np.asarray(sheet)[:, :height]
    if not lora:
        pipe = NextFlowTextToImagePipeline(model=drawing.model.eval(), processor=drawing.processor)
        assert np.array_equal(np.asarray(pipe("a ring", seed=0)[0]), left)


def test_packs_are_not_compiled_where_layers_are_computed_twice(make_trainer):
    with pytest.raises(ValueError, match="compiles nothing where packs meet activation checkpointing"):
        make_trainer(torch_compile=True, packing=True, activation_checkpointing=True)


def test_prompts_without_steps_are_refused(make_trainer):
    with pytest.raises(ValueError, match="give both or neither"):
        make_trainer(sample_prompts=["a ring"])


# --- What the host waits for ---


class HostWaits(TorchDispatchMode):
    """Records the operations for which the host would wait if their tensors were on a GPU."""

    SCALARS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")
    METHODS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")  # a CPU's are not dispatched

    def __init__(self):
        super().__init__()
        self.found, self.calls, self.patches = [], 0, contextlib.ExitStack()

    def __enter__(self):
        for name in self.METHODS:
            own = getattr(torch.Tensor, name)

            def method(tensor, *args, own=own, name=name):
                self.found.append(name)
                with torch._C._DisableTorchDispatch():  # it is one wait, and is seen
                    return own(tensor, *args)

            self.patches.enter_context(mock.patch.object(torch.Tensor, name, method))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patches.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[-1].split(".")[0].strip("_")
        self.calls += 1
        by_mask = name.startswith("index") and isinstance(args[1], list | tuple)
        by_mask = by_mask and any(index is not None and index.dtype == torch.bool for index in args[1])
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if by_mask or unsized or func.name().split("::")[-1].split(".")[0] in self.SCALARS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class CountWaits(TrainerCallback):
    """Waits of every step, from its first forward pass to its optimizer's step; logging comes later."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, *args, **kwargs):
        self.steps.append(HostWaits())
        self.steps[-1].__enter__()

    def on_step_end(self, *args, **kwargs):
        self.steps[-1].__exit__(None, None, None)


def test_the_recorder_sees_waiting():
    with HostWaits() as waits:
        numbers = torch.arange(3)
        assert numbers.max().item() == 2 and bool(numbers.any()) and numbers.tolist() == [0, 1, 2]
        numbers[numbers > 1].clone()
        numbers[numbers > 1] = 0
        numbers.nonzero()
        numbers.repeat_interleave(numbers)
    found = ["item", "__bool__", "tolist", "index", "index_put", "nonzero", "repeat_interleave"]
    assert waits.found == found


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["mixed", "texts"])
def test_a_step_waits_for_the_device_once(make_trainer, samples, packing, kind):
    """For whether the loss is finite; texts of unequal lengths are padded, too."""
    texts = [{**samples[2], "token_ids": [*samples[2]["token_ids"], *[5] * n]} for n in (0, 2, 4)]
    texts = [{**text, "completion_mask": [1] * len(text["token_ids"])} for text in texts]
    rows, counter = texts if kind == "texts" else samples, CountWaits()
    trainer = make_trainer(samples=rows, packing=packing, max_length=2000, max_steps=2, scale_reweight_alpha=0.9)
    trainer.add_callback(counter)
    trainer.train()
    assert [waits.found for waits in counter.steps] == [["__bool__"]] * 2
    assert min(waits.calls for waits in counter.steps) > 100
