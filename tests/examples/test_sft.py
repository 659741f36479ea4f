"""The fine-tuning script on a folder of pictures: whole and with LoRA, and what comes out draws."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from datasets import Dataset
from peft import PeftModel
from PIL import Image

from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor
from transformers_nextflow.trainer import encode_messages

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import sft

CPU = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--logging_steps", "1", "--save_strategy", "no"]


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    with open(folder / "metadata.jsonl", "w") as file:
        for index in range(4):
            pixels = np.random.default_rng(index).integers(0, 256, (80, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
            file.write(json.dumps({"file_name": f"{index}.png", "text": f"picture {index}"}) + "\n")
    return folder


@pytest.fixture
def run(pictures, tmp_path, tiny_random_checkpoint):
    def run(*options: str):
        common = ["--pictures", str(pictures), "--output_dir", str(tmp_path / "out"), "--max_steps", "8", *CPU]
        model = ["--model_name_or_path", str(tiny_random_checkpoint), "--learning_rate", "0.01"]
        return sft.main([*common, *model, *options])

    return run


def test_whole_model(run, tmp_path):
    trainer = run()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    model = NextFlowForCausalLM.from_pretrained(tmp_path / "out")
    processor = NextFlowProcessor.from_pretrained(tmp_path / "out")
    batch = processor("picture 1", return_tensors="pt")
    output = model.generate(**batch, generation_mode="image", return_dict_in_generate=True)
    assert processor.decode_images(output.sequences, output.image_grid_shw)[0][0].size == (80, 80)


def test_lora(run, tmp_path, tiny_random_checkpoint):
    run("--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj")
    base = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint)
    tuned = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    adapters = [parameter for name, parameter in tuned.named_parameters() if "lora_B" in name]
    assert adapters and all(torch.any(adapter != 0) for adapter in adapters)


def test_lora_on_four_bits(run):
    """The layers' matrices are quantised and frozen; head and connector are not."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional")
    config = Path(sft.__file__).parent / "configs" / "lora.yaml"
    trainer = run("--config", str(config), "--load_in_4bit", "true", "--max_length", "2000", "--max_steps", "4")
    quantised = {
        name.split(".base_layer")[0].split(".")[-1]
        for name, module in trainer.model.named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    assert quantised == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert {"connector", "scale_embedding"} == {name.split(".")[3] for name in trained if "lora_" not in name}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_four_bits_without_the_library_are_refused(run, monkeypatch):
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda *_: False)
    with pytest.raises(ImportError, match="requires bitsandbytes"):
        run("--use_peft", "true", "--load_in_4bit", "true")


def test_true_resumes_the_last_checkpoint(run, tmp_path):
    saved = ["--save_strategy", "steps", "--save_steps", "2"]
    run("--max_steps", "2", *saved)
    trainer = run("--max_steps", "3", *saved, "--resume_from_checkpoint", "true")
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]


def test_codes_of_another_image_tokenizer_are_refused(tmp_path, tiny_random_checkpoint):
    """Of the same size, and by a model that has never been trained on codes of any."""
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    with torch.no_grad():
        processor.image_tokenizer.quantizer.pixel_codebook.weight[0] += 1
    image = [{"type": "image", "image": Image.new("RGB", (80, 80))}]
    sample = encode_messages([{"role": "assistant", "content": image}], processor)
    Dataset.from_list([sample]).save_to_disk(tmp_path / "codes")
    options = ["--model_name_or_path", str(tiny_random_checkpoint), "--output_dir", str(tmp_path / "out"), *CPU]
    with pytest.raises(ValueError, match=f"come from the image tokenizer {sample['image_tokenizer_hash']}, but"):
        sft.main(["--codes", str(tmp_path / "codes"), *options])


def test_a_checkpoint_without_an_image_tokenizer_trains_on_codes(tmp_path, tiny_random_checkpoint):
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    image = [{"type": "image", "image": Image.new("RGB", (80, 80))}]
    sample = encode_messages([{"role": "assistant", "content": image}], processor)
    Dataset.from_list([sample]).save_to_disk(tmp_path / "codes")
    NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint).save_pretrained(tmp_path / "model")
    processor.image_tokenizer = None
    processor.save_pretrained(tmp_path / "model")
    options = ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), *CPU]
    trainer = sft.main(["--codes", str(tmp_path / "codes"), "--max_steps", "1", *options])
    assert trainer.model.config.image_tokenizer_hash == sample["image_tokenizer_hash"]


def test_the_main_process_encodes_first(run, monkeypatch):
    """The other ranks find the codes that it made; at once all of them would encode every picture."""
    order = []

    @contextmanager
    def main_process_first(*args, **kwargs):
        order.append("wait")
        yield
        order.append("go on")

    load = sft.load_samples
    monkeypatch.setattr(sft.NextFlowSFTConfig, "main_process_first", main_process_first)
    monkeypatch.setattr(sft, "load_samples", lambda *args: order.append("encode") or load(*args))
    run("--max_steps", "1")
    assert order == ["wait", "encode", "go on"]


@pytest.mark.parametrize("name", ["alignment", "pretraining", "sft", "lora"])
def test_settings_of_every_stage_train(run, name):
    config = Path(sft.__file__).parent / "configs" / f"{name}.yaml"
    trainer = run("--config", str(config), "--max_length", "2000", "--max_steps", "2")
    assert trainer.args.packing and trainer.args.condition_dropout == 0.1
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 2


@pytest.fixture
def launched(monkeypatch):
    """What `accelerate launch --config_file` tells the processes that it starts, told to this one."""

    def launch(name: str) -> argparse.Namespace:
        path = Path(sft.__file__).parent / "accelerate" / f"{name}.yaml"
        parser = launch_command_parser()
        args, config, _ = _validate_launch_command(parser.parse_args(["--config_file", str(path), "sft.py"]))
        if args.use_deepspeed:
            args.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
            _, environment = prepare_deepspeed_cmd_env(args)
        else:
            environment = prepare_multi_gpu_env(args)
        for variable in set(environment) - set(os.environ):
            monkeypatch.setenv(variable, environment[variable])
        return args

    return launch


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_accelerate_launches_what_a_file_says(launched, name):
    args = launched(name)
    assert (args.mixed_precision, args.num_processes) == ("bf16", 8)
    assert [args.multi_gpu, args.use_fsdp, args.use_deepspeed] == [name == "ddp", name == "fsdp2", "deep" in name]


def test_one_gpu_is_one_process(launched):
    args = launched("one_gpu")
    assert (args.mixed_precision, args.num_processes, args.multi_gpu, args.use_fsdp) == ("bf16", 1, False, False)


def test_slurm_gives_each_node_its_number_and_every_training_all_gpus(tmp_path):
    """With doubles of the cluster's commands that say how they were called."""
    doubles = {"scontrol": "echo one; echo two", "python": 'printf "%s\\n" "$@"'}
    for name, code in doubles.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{code}\n")
        (tmp_path / name).chmod(0o755)
    script = Path(sft.__file__).parent / "accelerate" / "slurm.sh"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "x", "SLURM_NNODES": "2"}
    command = ["bash", str(script), "fsdp2", "--recipe", "r", "--work", "w w"]
    called = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert called[:6] == ["examples/run_recipe.py", "--recipe", "r", "--work", "w w", "--launcher"]
    *srun, shell, option, launch, _ = shlex.split(called[6])
    assert (srun[0], shell, option) == ("srun", "bash", "-c")
    launch = launch.replace("accelerate launch", 'printf "%s\\n"')
    (tmp_path / "node").write_text(f"{launch}\n")
    node = subprocess.run(
        ["bash", str(tmp_path / "node"), "sft.py", "--codes", "a b"],
        env={**environment, "SLURM_NODEID": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    options, given = node[:-3], node[-3:]
    assert given == ["sft.py", "--codes", "a b"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*options, *given]))
    assert (args.num_machines, args.num_processes, args.machine_rank) == (2, 16, 1)
    assert (args.main_process_ip, args.use_fsdp) == ("one", True)


def test_fsdp_wraps_the_layers(launched, tiny_random_checkpoint):
    launched("fsdp2")
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward
    plugin.set_auto_wrap_policy(model := NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint))
    wrapped = [
        module for module in model.modules() if plugin.auto_wrap_policy(module, recurse=False, nonwrapped_numel=0)
    ]
    assert wrapped == list(model.model.layers)
    plugin.set_state_dict_type("FULL_STATE_DICT")  # what sft.py does before it saves the result


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_gets_its_settings(launched, stage, monkeypatch):
    launched(f"deepspeed_zero{stage}")
    settings = DeepSpeedPlugin().deepspeed_config
    assert settings["zero_optimization"]["stage"] == stage and settings["gradient_clipping"] == 1.0
    assert settings["gradient_accumulation_steps"] == "auto"  # the trainer's
    assert settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] == (stage == 3)


def test_a_sharded_model_is_saved_whole(run, monkeypatch):
    """With checkpoints in shards transformers' `save_model` writes nothing at all."""
    chosen = []

    class Plugin:
        set_state_dict_type = staticmethod(chosen.append)

    def train(trainer, **_):
        trainer.is_fsdp_enabled = True
        trainer.accelerator.state.fsdp_plugin = Plugin()

    monkeypatch.setattr(sft.NextFlowSFTTrainer, "train", train)
    monkeypatch.setattr(sft.NextFlowSFTTrainer, "save_model", lambda self: chosen.append("saved"))
    run()
    assert chosen == ["FULL_STATE_DICT", "saved"]


def test_one_source_of_samples(run):
    with pytest.raises(ValueError, match="Give either `--pictures`"):
        run("--codes", "somewhere")


def test_captions_must_be_there(run):
    with pytest.raises(ValueError, match='have the columns image, text, but captions were expected in "label"'):
        run("--caption_column", "label")


def test_a_tracker_that_is_not_installed_is_named_before_a_step(run, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_trackio_available", lambda: False)
    with pytest.raises(RuntimeError, match="trackio to be installed"):
        run("--report_to", "trackio")
    assert not list((tmp_path / "out").glob("*.safetensors"))
