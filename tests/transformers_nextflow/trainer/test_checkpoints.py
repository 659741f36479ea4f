"""Every trainer goes on as if unbroken, from any step and after any kill; what it saves loads in every door."""

import json
import logging
import os
import shutil
import signal
import sys
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor, Trainer, TrainerCallback, TrainingArguments

from diffusers_nextflow import NextFlowPipeline
from forks import call_fresh
from transformers_nextflow import NextFlowForCausalLM, NextFlowImageTokenizer, NextFlowProcessor
from transformers_nextflow.trainer import (
    NextFlowGRPOConfig,
    NextFlowGRPOTrainer,
    NextFlowImageTokenizerTrainer,
    NextFlowImageTokenizerTrainingConfig,
    NextFlowSFTConfig,
    NextFlowSFTTrainer,
    encode_messages,
    find_last_checkpoint,
)
from transformers_nextflow.trainer.checkpoints import RUN_FILE, EpochSampler, what_is_missing
from transformers_nextflow.trainer.sft_trainer import prompt_style

COMMON = dict(
    max_steps=5,
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    logging_steps=1,
    save_strategy="steps",
    save_steps=1,
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
)
KINDS = ["padded", "packed", "lora", "grpo", "tokenizer"]


def brightness(images, **kwargs):
    return [float(np.asarray(image, np.float64).mean()) for image in images]


@pytest.fixture(scope="module")
def make_trainer(tiny_random_checkpoint, samples):
    return maker_of_trainers(tiny_random_checkpoint, samples)


def maker_of_trainers(tiny_random_checkpoint, samples):
    """Trainers of every kind whose runs have several epochs, draws, dropout and generations of several steps."""
    dataset = datasets.Dataset.from_list([samples[index % 3] for index in range(7)])
    pictures = torch.rand(3, 3, 80, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def make(kind: str, folder, **changes):
        torch.manual_seed(0)
        kwargs = {name: changes.pop(name) for name in ("processing_class", "eval_dataset") if name in changes}
        model = changes.pop("model", str(tiny_random_checkpoint))
        if kind in ("padded", "packed", "lora"):
            settings = dict(per_device_train_batch_size=3, condition_dropout=0.5, task_inversion=0.5, bf16=False)
            settings |= dict(packing=True, max_length=260) if kind == "packed" else {}
            lora = dict(r=2, lora_dropout=0.5, target_modules=["q_proj"], task_type="CAUSAL_LM")
            rows, peft_config = changes.pop("rows", dataset), LoraConfig(**lora) if kind == "lora" else None
            config = NextFlowSFTConfig(str(folder), **{**COMMON, **settings, **changes})
            return NextFlowSFTTrainer(model, config, train_dataset=rows, peft_config=peft_config, **kwargs)
        if kind == "grpo":
            settings = dict(per_device_train_batch_size=2, num_generations=2, steps_per_generation=2, bf16=False)
            settings |= dict(num_trained_scales=2, guidance_scale=None, num_iterations=1)
            rows = changes.pop("rows", datasets.Dataset.from_list([{"prompt": word} for word in ("a", "b", "c", "d")]))
            config = NextFlowGRPOConfig(str(folder), **{**COMMON, **settings, **changes})
            return NextFlowGRPOTrainer(model, brightness, config, train_dataset=rows, **kwargs)
        settings = dict(stage="pixel", per_device_train_batch_size=2, revive_steps=2)
        return NextFlowImageTokenizerTrainer(
            NextFlowImageTokenizer.from_pretrained(tiny_random_checkpoint, subfolder="image_tokenizer"),
            NextFlowImageTokenizerTrainingConfig(str(folder), **{**COMMON, **settings, **changes}),
            discriminator=torch.nn.Conv2d(3, 1, 16, stride=16),
            train_dataset=[{"pixel_values": picture} for picture in pictures],
            **kwargs,
        )

    return make


@pytest.fixture(scope="module")
def unbroken(make_trainer, tmp_path_factory):
    """Runs that nothing stopped, one of a kind."""
    runs: dict = {}

    def run(kind: str):
        if kind not in runs:
            folder = tmp_path_factory.mktemp(kind)
            trainer = make_trainer(kind, folder)
            trainer.train()
            runs[kind] = (folder, weights(trainer))
        return runs[kind]

    return run


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, msg=name)


# --- Resuming ---


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_anywhere_is_the_unbroken_run(make_trainer, unbroken, tmp_path, kind):
    folder, expected = unbroken(kind)
    for step in (1, 2, 4):
        trainer = make_trainer(kind, tmp_path, save_strategy="no")
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert_equal(weights(trainer), expected)


@pytest.mark.parametrize("kind", ["padded", "grpo", "tokenizer"])
def test_a_finished_run_does_not_go_on(make_trainer, unbroken, tmp_path, kind):
    folder, expected = unbroken(kind)
    trainer = make_trainer(kind, tmp_path, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    assert trainer.state.global_step == 5
    assert_equal(weights(trainer), expected)


def test_evaluation_between_generations_does_not_hinder(make_trainer, tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": "e"}])
    more = dict(eval_dataset=rows, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=2)
    whole, resumed = (make_trainer("grpo", tmp_path, num_generations_eval=2, **more) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(weights(resumed), weights(whole))


def test_the_last_whole_checkpoint_is_found(make_trainer, unbroken, tmp_path, caplog, monkeypatch):
    run = tmp_path / "run"
    for step in (2, 10, 9):
        os.makedirs(run / f"checkpoint-{step}")
        for path in (unbroken("tokenizer")[0] / "checkpoint-2").iterdir():
            (run / f"checkpoint-{step}" / path.name).write_bytes(path.read_bytes())
    assert find_last_checkpoint(run) == str(run / "checkpoint-10")
    state = run / "checkpoint-10" / "trainer_state.json"
    state.write_text(state.read_text()[:-3])
    (run / "checkpoint-9" / "image_tokenizer_trainer.pt").unlink()
    assert find_last_checkpoint(run) == str(run / "checkpoint-2") and "checkpoint-10 is passed over" in caplog.text
    trainer = make_trainer("tokenizer", run, max_steps=3)
    with pytest.raises(
        ValueError, match=r"is not a whole checkpoint .image_tokenizer_trainer.pt is missing or cut off"
    ):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-9"))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", lambda *args, **kwargs: None)
        trainer.train()
    assert "checkpoint-2 is of an earlier run, and this one starts over" in caplog.text
    trainer.train(resume_from_checkpoint="true")  # as a command line says it
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]
    with pytest.raises(ValueError, match="no whole checkpoint to go on from"):
        make_trainer("tokenizer", tmp_path / "new").train(resume_from_checkpoint=True)


def test_every_file_counts(unbroken, tmp_path):
    whole = unbroken("padded")[0] / "checkpoint-2"
    assert what_is_missing(whole) is None
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json", "nextflow_run.json", "rng_state.pth"):
        copied = tmp_path / name
        copied.mkdir()
        for path in whole.iterdir():
            if path.is_file():
                (copied / path.name).write_bytes(path.read_bytes()[: None if path.name != name else -1])
        assert what_is_missing(copied) is not None, name


def train_until_killed(make, kind, folder, event: int, result):
    """Trains on; dies at the n-th file that is opened for writing, removed or renamed in the folder of the run."""
    left = [event]

    def watch(name: str, arguments):
        if name == "open":
            path, mode = arguments[:2]
            relevant = isinstance(mode, str) and mode.strip("bt") not in ("", "r")
        else:
            relevant, path = name in ("os.remove", "os.rename", "os.mkdir", "os.rmdir"), arguments and arguments[0]
        if relevant and isinstance(path, str) and path.startswith(str(folder)):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    trainer = make(kind, folder, save_total_limit=2)
    trainer.train(resume_from_checkpoint=find_last_checkpoint(folder))
    torch.save(weights(trainer), result)


def kill_and_go_on(checkpoint: str, samples: str, folder: str) -> None:
    make, context = maker_of_trainers(checkpoint, json.loads(Path(samples).read_text())), get_context("fork")
    for kind in KILLED:
        expected, result = torch.load(f"{folder}/{kind}.pt"), Path(folder, "result.pt")
        rng = np.random.default_rng(KINDS.index(kind))
        for number in range(int(os.environ.get("NEXTFLOW_KILLS", "1"))):
            run, deaths = Path(folder, f"{kind}-{number}"), 0
            while not result.exists():
                event = int(rng.integers(1, 60)) if deaths < 2 else 0
                child = context.Process(target=train_until_killed, args=(make, kind, run, event, result))
                child.start()
                child.join()
                assert child.exitcode in (0, -signal.SIGKILL)
                deaths += child.exitcode != 0
            assert_equal(torch.load(result), expected)
            result.unlink()


KILLED = ("packed", "grpo", "tokenizer")


def test_killed_anywhere_it_ends_as_unbroken(unbroken, samples, tiny_random_checkpoint, tmp_path):
    """`NEXTFLOW_KILLS=100` tries many moments."""
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    for kind in KILLED:
        torch.save(unbroken(kind)[1], tmp_path / f"{kind}.pt")
    call_fresh(kill_and_go_on, str(tiny_random_checkpoint), str(tmp_path / "samples.json"), str(tmp_path))


@pytest.mark.parametrize("kind", ["grpo", "tokenizer"])
def test_a_run_of_another_number_of_ranks_is_refused(make_trainer, unbroken, tmp_path, kind):
    """Where SFT goes on (test_rank_numbers.py), these don't, for their draws are those of a rank."""
    shutil.copytree(unbroken(kind)[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    facts = tmp_path / "checkpoint-2" / RUN_FILE
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "num_processes": 4}))
    with pytest.raises(ValueError, match="`num_processes` was 4, now 1"):
        make_trainer(kind, tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", ["packed", "grpo", "tokenizer"])
def test_one_process_for_many_gpus_is_refused(make_trainer, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"`nn.DataParallel`.*`torchrun`.*CUDA_VISIBLE_DEVICES"):
        make_trainer(kind, tmp_path)


def test_an_order_is_a_function_of_seed_and_epoch():
    sampler = EpochSampler(10, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    assert sorted(first) == sorted(sampler) == list(range(10)) and list(sampler) != first
    numbered = EpochSampler(10, seed=3, numbered=True)
    numbered.set_epoch(1)
    assert [number - 10 for number in numbered] == list(sampler)
    assert list(EpochSampler(4, shuffle=False)) == [0, 1, 2, 3]


# --- The average of the weights ---


class Recorder(TrainerCallback):
    """The trained weights after every step."""

    def __init__(self, trainer):
        self.trainer, self.weights = trainer, [self.copy(trainer)]

    @staticmethod
    def copy(trainer):
        return {name: value.detach().clone() for name, value in trainer._trained().items()}

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.append(self.copy(self.trainer))


@pytest.mark.parametrize("kind", ["padded", "lora", "tokenizer"])
def test_the_average_is_one_by_hand_and_is_what_is_saved_and_evaluated(make_trainer, tmp_path, kind):
    rows = {} if kind == "tokenizer" else {"eval_dataset": make_trainer(kind, tmp_path / "rows").train_dataset}
    trainer = make_trainer(kind, tmp_path / "run", ema_decay=0.7, **rows)
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()

    expected = recorder.weights[0]
    for number, weights_then in enumerate(recorder.weights[1:]):
        decay = min(0.7, 1 - (1 + number) ** (-2 / 3)) if number else 0.0
        expected = {name: decay * value + (1 - decay) * weights_then[name] for name, value in expected.items()}
    with trainer.averaged():
        average, whole = recorder.copy(trainer), weights(trainer)
    for name, value in expected.items():
        torch.testing.assert_close(average[name], value, rtol=1e-6, atol=1e-6)
    assert_equal(recorder.copy(trainer), recorder.weights[-1])  # what is trained on is back
    assert max(float((average[name] - value).abs().max()) for name, value in recorder.weights[-1].items()) > 1e-3

    resumed = make_trainer(kind, tmp_path / "run", ema_decay=0.7, save_strategy="no", **rows)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_equal(weights(resumed), weights(trainer))
    with resumed.averaged():
        assert_equal(weights(resumed), whole)

    if kind == "tokenizer":
        saved = NextFlowImageTokenizer.from_pretrained(tmp_path / "run" / "checkpoint-5")
    else:
        loss = trainer.evaluate()["eval_loss"]
        if kind == "lora":
            trainer.save_merged(str(tmp_path / "merged"))
            base = NextFlowForCausalLM.from_pretrained(trainer.model.config._name_or_path)
            saved = PeftModel.from_pretrained(base, tmp_path / "run" / "checkpoint-5")
            merged = NextFlowForCausalLM.from_pretrained(tmp_path / "merged")
            ids = torch.tensor([[5, 6, 7]])
            torch.testing.assert_close(merged.eval()(ids).logits, saved.eval()(ids).logits, atol=1e-4, rtol=1e-4)
        else:
            saved = NextFlowForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-5")
            plain = make_trainer(kind, tmp_path / "plain", model=saved, **rows)
            assert plain.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)
    if kind != "lora":
        assert_equal({name: value for name, value in saved.state_dict().items() if name in whole}, whole)


@pytest.mark.parametrize("kind", ["padded", "lora"])
def test_the_best_model_is_the_average_that_was_evaluated(make_trainer, tmp_path, kind):
    """ "Best" is the highest loss here, which is not the last one."""
    settings = dict(ema_decay=0.7, max_steps=4, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    settings |= dict(metric_for_best_model="eval_loss", greater_is_better=True)
    rows = make_trainer(kind, tmp_path / "rows").train_dataset
    trainer, averages = make_trainer(kind, tmp_path / "run", eval_dataset=rows, **settings), []

    class Averages(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with trainer.averaged():
                averages.append(Recorder.copy(trainer))

    trainer.add_callback(Averages())
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = int(np.argmax(evaluated))
    assert best != 3 and trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best + 1}")
    assert_equal(Recorder.copy(trainer), averages[best])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[best], rel=1e-6)
    trainer.save_model(str(tmp_path / "saved"))
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    of_checkpoint = load_file(Path(trainer.state.best_model_checkpoint, name))
    assert_equal(load_file(tmp_path / "saved" / name), of_checkpoint)


def test_the_average_is_refused_where_it_would_not_be_one(make_trainer, unbroken, tiny_random_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="`ema` was False, now True"):
        folder = unbroken("padded")[0]
        make_trainer("padded", tmp_path, ema_decay=0.9).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    coarse = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"`ema_decay` needs float32, but .* is torch.bfloat16"):
        make_trainer("padded", tmp_path, model=coarse, ema_decay=0.9).train()
    sharded = make_trainer("padded", tmp_path, ema_decay=0.9)
    sharded.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="FSDP, TP and ZeRO-3 cut into pieces"):
        sharded._start_average(0.9, None)


# --- Weights that move ---


def test_a_path_is_trained_in_fp32_and_small_steps_move_it(make_trainer, tiny_random_checkpoint, tmp_path, caplog):
    coarse = tmp_path / "bf16"
    NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint, dtype=torch.bfloat16).save_pretrained(coarse)
    NextFlowProcessor.from_pretrained(tiny_random_checkpoint).save_pretrained(coarse)
    trainer = make_trainer("padded", tmp_path / "run", model=str(coarse), learning_rate=1e-5, max_steps=2)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    before = weights(trainer)
    trainer.train()
    moved = [(weights(trainer)[name] != value).float().mean() for name, value in before.items() if "layers" in name]
    assert min(moved) > 0.9 and "round to nothing" not in caplog.text
    asked = make_trainer("padded", tmp_path / "run", model=str(coarse), model_init_kwargs={"dtype": torch.bfloat16})
    assert asked.model.dtype == torch.bfloat16 and "The weights to train are bfloat16" in caplog.text
    for kind in ("padded", "grpo"):
        caplog.clear()
        make_trainer(kind, tmp_path / "run", model=NextFlowForCausalLM.from_pretrained(coarse))
        assert "The weights to train are bfloat16" in caplog.text


# --- Folders ---


def assert_draws(folder):
    """The doors, as far as this file knows them."""
    assert AutoModelForCausalLM.from_pretrained(folder) and AutoProcessor.from_pretrained(folder).image_tokenizer
    (image,) = NextFlowPipeline.from_pretrained(folder)("a ring").images
    assert image.size == (80, 80)


@pytest.mark.parametrize("kind", ["padded", "grpo"])
def test_what_is_saved_loads_in_every_door(make_trainer, unbroken, tmp_path, kind):
    folder = unbroken(kind)[0]
    for step in (1, 5):
        assert_draws(folder / f"checkpoint-{step}")
    card = (folder / "checkpoint-5" / "README.md").read_text()
    assert "TRL" not in card and "5 steps" in card and "`learning_rate`: 0.01" in card
    # The image tokenizer is frozen: checkpoints share one copy on disk.
    copies = [(folder / f"checkpoint-{step}" / "image_tokenizer" / "model.safetensors").stat() for step in (1, 5)]
    assert copies[0].st_ino == copies[1].st_ino


def test_the_documented_way_and_merged_adapters_load(make_trainer, tiny_random_checkpoint, tmp_path):
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    for words in (processor.tokenizer, processor, None):
        make_trainer("padded", tmp_path / "run", processing_class=words).save_model(str(tmp_path / "saved"))
        assert_draws(tmp_path / "saved")
    trainer = make_trainer("lora", tmp_path / "run", max_steps=1)
    trainer.train()
    adapter = PeftModel.from_pretrained(
        NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint), tmp_path / "run" / "checkpoint-1"
    )
    assert not (tmp_path / "run" / "checkpoint-1" / "image_tokenizer").exists()
    loaded = NextFlowForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1")
    styles = trainer.model.generation_config.prompt_styles
    assert styles and loaded.generation_config.prompt_styles == styles
    ids = torch.tensor([[5, 6, 7]])
    expected = adapter.eval()(ids).logits
    trainer.save_merged(str(tmp_path / "merged"))
    assert_draws(tmp_path / "merged")
    merged = NextFlowForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_model_without_a_folder_is_told(make_trainer, tiny_random_checkpoint, tmp_path, caplog):
    model = NextFlowForCausalLM(NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint).config)
    model.config._name_or_path = ""
    words = NextFlowProcessor.from_pretrained(tiny_random_checkpoint).tokenizer
    make_trainer("padded", tmp_path, model=model, processing_class=words)
    assert "what is saved will not draw by itself" in caplog.text


# --- Prompts ---


def test_the_way_of_prompting_is_written_down(make_trainer, tiny_random_checkpoint, samples, tmp_path, caplog):
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    image = {"type": "image", "image": Image.new("RGB", (80, 80))}
    word = {"type": "text", "text": "red"}

    def turn(asked, answer):
        return encode_messages(
            [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}], processor
        )

    def bare(sample):
        words = processor.tokenizer("a ring")["input_ids"]
        return {**sample, "token_ids": [*words, processor.image_token_id], "completion_mask": [0] * len(words) + [1]}

    rows = [turn("red", [image]), turn([image, word], [image]), turn("red", [word, image]), turn("red", "text")]
    rows += [bare(samples[0]), bare(samples[0])]
    styles = [prompt_style(row, processor.image_token_id, processor.tokenizer) for row in rows]
    chats = [("image", "chat"), ("edit", "chat"), ("thinking", "chat"), None]
    assert styles == [*chats, ("image", "bare"), ("image", "bare")]
    trainer = make_trainer("padded", tmp_path / "run", rows=datasets.Dataset.from_list(rows), max_steps=1)
    assert '"image" 2 have bare prompts and 1 chat turns' in caplog.text
    trainer.save_model(str(tmp_path / "saved"))
    stored = json.loads((tmp_path / "saved" / "generation_config.json").read_text())["prompt_styles"]
    assert stored == {"image": "bare", "edit": "chat", "thinking": "chat"}
    reads = make_trainer("grpo", tmp_path / "run", model=str(tmp_path / "saved"))
    assert reads._read_prompt({"prompt": "a"})[0] == "a"
    asked = reads._read_prompt({"prompt": "<image>a", "image": np.zeros((8, 8, 3), np.uint8)})[0]
    assert asked.startswith("<|im_start|>") and asked.rstrip().endswith("assistant") and "<image>a" in asked


# --- What is left alone, what is refused ---


def test_settings_and_configs_of_the_caller_stay_as_they_are(tiny_random_checkpoint, samples, tmp_path):
    rows = datasets.Dataset.from_list([{name: samples[0][name] for name in samples[0]}] * 2)
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint)
    config, kwargs = model.config, {"dtype": torch.float32}
    args = NextFlowSFTConfig(
        str(tmp_path), scale_reweight_alpha=0.123, packing=True, model_init_kwargs=kwargs, use_cpu=True, bf16=False
    )
    before, settings = config.to_dict(), {**vars(args)}
    trainer = NextFlowSFTTrainer(model, args, train_dataset=rows)
    assert trainer.model.config.scale_reweight_alpha == 0.123
    NextFlowSFTTrainer(str(tiny_random_checkpoint), args, train_dataset=rows)
    assert config.to_dict() == before and vars(args) == settings and kwargs == {"dtype": torch.float32}
    args = NextFlowGRPOConfig(
        str(tmp_path), model_init_kwargs=kwargs, use_cpu=True, bf16=False, num_trained_scales=2, num_generations=2
    )
    settings = {**vars(args)}
    words = datasets.Dataset.from_list([{"prompt": "a"}])
    NextFlowGRPOTrainer(str(tiny_random_checkpoint), brightness, args, train_dataset=words)
    assert vars(args) == settings


def test_added_tokens_and_prompt_tuning_are_refused(make_trainer, tiny_random_checkpoint, samples, tmp_path):
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    processor.tokenizer.add_tokens([f"<new{index}>" for index in range(8)])
    for kind in ("padded", "grpo"):
        with pytest.raises(ValueError, match="`add_tokens` took the first of them"):
            make_trainer(kind, tmp_path, processing_class=processor)
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    rows = datasets.Dataset.from_list(samples)
    args = NextFlowSFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=r"PEFT's prompt learning .* For few weights use LoRA"):
        NextFlowSFTTrainer(str(tiny_random_checkpoint), args, train_dataset=rows, peft_config=tuning)


@pytest.fixture(autouse=True)
def log_everything(caplog):
    caplog.set_level(logging.WARNING)
