"""Two processes give what one gives: DDP padded and packed, FSDP2, tensor parallelism; on the CPU, with gloo."""

import json
import sys
from pathlib import Path

import datasets
import pytest
import torch

from forks import call_fresh
from transformers_nextflow import NextFlowConfig, NextFlowForCausalLM, NextFlowProcessor
from transformers_nextflow.trainer import NextFlowSFTConfig, NextFlowSFTTrainer

sys.path.insert(0, str(Path(__file__).parent))
import distributed_worker
import sharded_worker


@pytest.fixture(scope="module")
def folder(tmp_path_factory, samples, tiny_random_checkpoint) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "model").symlink_to(tiny_random_checkpoint)
    config = NextFlowConfig.from_pretrained(tiny_random_checkpoint, num_key_value_heads=2)  # one a process
    NextFlowForCausalLM(config).save_pretrained(folder / "split")
    samples = [{**samples[index % 2], "id": str(index)} for index in range(4)]
    (folder / "samples.json").write_text(json.dumps(samples))
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict:
    call_fresh(distributed_worker.on_two_ranks, str(folder))
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_two_ranks_are_one(results, folder, packing):
    samples = json.loads((folder / "samples.json").read_text())
    settings = NextFlowSFTConfig(
        str(folder / "one"),
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        condition_dropout=0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    if packing:  # two packs of two samples are one step
        settings.per_device_train_batch_size = 4
    dataset = datasets.Dataset.from_list(samples)
    tokenizer = NextFlowProcessor.from_pretrained(folder / "model").tokenizer
    trainer = NextFlowSFTTrainer(str(folder / "model"), settings, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert results[f"ddp-{packing}"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_fully_sharded_is_whole(results):
    fsdp = results["fsdp"]
    assert fsdp["sharded"] == pytest.approx(fsdp["whole"], rel=1e-5) and fsdp["difference"] < 1e-5


@pytest.mark.slow
def test_split_tensors_are_whole(results):
    tp = results["tp"]
    assert tp["losses"][1] == pytest.approx(tp["losses"][0], rel=1e-5)
    assert tp["norms"][1] == pytest.approx(tp["norms"][0], rel=1e-4)
    assert tp["same_codes"]


@pytest.mark.slow
@pytest.mark.parametrize(("change", "ranks"), [("fewer", ("4 samples", "3 samples")), ("others", ("4 samples",) * 2)])
def test_ranks_with_other_data_are_told_apart_on_every_rank(results, change, ranks):
    one, other = results[change]
    assert one == other and one.startswith("The ranks have different data")
    assert all(f"rank {rank}: {data}" in one for rank, data in enumerate(ranks))


@pytest.mark.slow
def test_four_ranks_train_alike_however_weights_are_cut(folder):
    """HSDP, TP with FSDP2, layers computed twice; what is saved is whole; an asynchronous DCP checkpoint moves over."""
    call_fresh(sharded_worker.on_four_ranks, str(folder))
    results = torch.load(folder / "sharded.pt")
    plain = results["ddp"]
    assert plain["cut"] == 0 and len(plain["losses"]) == 3
    for layout in ("hsdp", "tp+fsdp"):
        ours = results[layout]
        assert ours["cut"] > 20 and ours["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        saved = NextFlowForCausalLM.from_pretrained(folder / f"{layout}-saved").state_dict()
        for name, value in plain["weights"].items():
            for other in (ours["weights"][name], saved[name], results["dcp"]["weights"][name]):
                torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-5)
