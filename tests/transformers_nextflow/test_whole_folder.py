"""A save that is killed leaves the old checkpoint, the new one, or none that loads; never some of both."""

import json
import os
import shutil

import pytest

from transformers_nextflow.whole_folder import PARTIAL, whole_folder

# Saves over a checkpoint again and again, and dies at another file operation each time. Weights, a field of the config
# and the chat template tell which save a part comes from.
KILLED_SAVES = """
import json, os, shutil, sys
import torch, transformers
from transformers_nextflow import *
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

source, work, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
folder = work + "/folder"
model, processor = NextFlowForCausalLM.from_pretrained(source), NextFlowProcessor.from_pretrained(source)

def save(version, folder, shards):
    for part in (model, processor.image_tokenizer):
        for weight in part.parameters():
            with torch.no_grad():
                weight.fill_(version)
    reseat_codebook(model, processor.image_tokenizer)
    model.config.scale_reweight_alpha = processor.image_tokenizer.config.commitment_cost = float(version)
    processor.chat_template = str(version)
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
    processor.save_pretrained(folder)

def versions():
    found = {}
    def tell(door, load):
        try:
            found[door] = sorted(set(map(float, load())))
        except (ValueError, OSError) as error:
            found[door] = type(error).__name__
    def of_model():
        model = NextFlowForCausalLM.from_pretrained(folder)
        weights = {name: w for name, w in model.named_parameters() if "visual_codebook" not in name}
        return [model.config.scale_reweight_alpha, *{w.flatten()[0].item() for w in weights.values()}]
    def of_tokenizer(tokenizer):
        return [tokenizer.config.commitment_cost, *{w.flatten()[0].item() for w in tokenizer.parameters()}]
    def of_processor():
        processor = NextFlowProcessor.from_pretrained(folder)
        return [processor.chat_template, *of_tokenizer(processor.image_tokenizer)]
    tell("model", of_model)
    tell("image tokenizer", lambda: of_tokenizer(NextFlowImageTokenizer.from_pretrained(folder + "/image_tokenizer")))
    tell("processor", of_processor)
    return found

results = []
save(1, work + "/old", shards=False)
save(2, work + "/old_in_shards", shards=True)
last = 0
while not results or results[-1][1]:
    old = ("/old", "/old_in_shards")[len(results) % 2]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(work + old, folder)
    last += step
    if (child := os.fork()) == 0:
        events = 0
        def count(event, arguments):
            global events
            if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod"):
                events += any(isinstance(name, str) and name.startswith(folder) for name in map(str, arguments))
                if events == last:
                    os._exit(9)
        sys.addaudithook(count)
        save(3, folder, shards=old == "/old")
        os._exit(0)
    died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert died in (0, 9), died
    results.append((old, died, versions()))
print(json.dumps(results))
"""


def check_killed_saves(forked_process, source, folder, step):
    results = json.loads(forked_process(KILLED_SAVES, str(source), str(folder), str(step)))
    for old, died, found in results:
        before = 1.0 if old == "/old" else 2.0
        for door, versions in found.items():
            assert versions in ([before], [3.0], "ValueError", "OSError"), (door, found)
        # The processor reads the model's hash: both are of one save, or it does not load.
        if isinstance(found["processor"], list) and isinstance(found["model"], list):
            assert found["processor"] == found["model"], found
        if not died:
            assert all(versions == [3.0] for versions in found.values()), found
    return results


def test_a_killed_save_leaves_no_mixture(forked_process, tiny_random_checkpoint, tmp_path):
    assert len(check_killed_saves(forked_process, tiny_random_checkpoint, tmp_path, step=9)) > 5


@pytest.mark.slow
def test_a_save_killed_anywhere_leaves_no_mixture(forked_process, tiny_random_checkpoint, tmp_path):
    assert len(check_killed_saves(forked_process, tiny_random_checkpoint, tmp_path, step=1)) > 60


def test_files_come_at_the_end_and_their_marker_last(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("old")
    (tmp_path / "mine.txt").write_text("mine")
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(os.path.relpath(b, tmp_path)), replace(a, b)))
    with whole_folder(tmp_path) as partial:
        os.mkdir(f"{partial}/part")
        for name in ("config.json", "part/config.json", "weights.txt", "part/weights.txt"):
            with open(f"{partial}/{name}", "w") as file:
                file.write("new")
        assert (tmp_path / "config.json").read_text() == "old"
    assert set(moved[:2]) == {"weights.txt", "part/weights.txt"} and moved[2:] == ["part/config.json", "config.json"]
    assert (tmp_path / "config.json").read_text() == "new" and (tmp_path / "mine.txt").read_text() == "mine"
    assert not (tmp_path / PARTIAL).exists()


def test_what_a_killed_save_left_is_cleared(tmp_path):
    (tmp_path / PARTIAL).mkdir()
    (tmp_path / PARTIAL / "half.safetensors").touch()
    with whole_folder(tmp_path) as partial:
        shutil.copy(__file__, f"{partial}/file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_weights_of_another_variant_stay(tmp_path):
    kept = ["model.safetensors", "model.fp8-00001-of-00002.safetensors", "model.safetensors.index.fp8.json", "a.json"]
    old = ["model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"]
    for name in (*kept, *old):
        (tmp_path / name).write_text("old")
    with whole_folder(tmp_path) as partial, open(f"{partial}/model.fp16.safetensors", "w") as file:
        file.write("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "model.fp16.safetensors"])
