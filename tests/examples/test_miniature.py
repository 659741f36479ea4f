"""The 0.5B recipe's miniature in two steps a stage: killed twice, resumed, judged; the little world and its judge."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from test_run_recipe import Killed, in_this_process

import run_recipe
from tiny_world.little import COLOURS, NAMES, SHAPES, change, draw_row, draw_thing, name_thing
from transformers_nextflow import NextFlowForCausalLM
from transformers_nextflow.trainer import find_last_checkpoint, load_coded_dataset, read_data_list
from transformers_nextflow.trainer.data_list import KINDS
from transformers_nextflow.trainer.plan import read_recipe, stage_cost

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "recipes" / "0.5b-256px"
FEW = {
    "make_tiny_data": ["--number", "8"],
    "sft": ["--max_steps", "2", "--save_steps", "1", "--logging_steps", "1"],
    "grpo_prompts": ["--max_steps", "2", "--save_steps", "1", "--per_device_train_batch_size", "4"],
}
KILLED = ("alignment", "continued")  # in their second step


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """The miniature by its command, in this process, ended twice in the middle of a stage."""
    folder = tmp_path_factory.mktemp("miniature")
    arguments = ["--recipe", str(RECIPE), "--work", str(folder), "--miniature"]
    commands, kills = [], list(KILLED)

    def execute(command):
        commands.append(list(command))
        name = Path(command[command.index("--output_dir") + 1]).name if "--output_dir" in command else ""
        resumed = command[-2:] if command[-2] == "--resume_from_checkpoint" else []
        in_this_process([*command, *FEW.get(Path(command[1]).stem, []), *resumed])
        if name in kills:  # as if the end had not come, and the second checkpoint were half written
            kills.remove(name)
            (folder / name / "model.safetensors").unlink()
            (folder / name / "checkpoint-2" / "trainer_state.json").unlink()
            raise Killed
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", sys.argv)
        patch.chdir(ROOT)
        patch.setattr(run_recipe, "execute", execute)
        for _ in KILLED:
            with pytest.raises(Killed):
                run_recipe.main(arguments)
        run_recipe.main(arguments)
    (folder / "commands.json").write_text(json.dumps(commands))
    return folder


def test_every_stage_starts_from_what_the_one_before_wrote(work):
    commands = json.loads((work / "commands.json").read_text())
    started = {}
    for command in commands:
        if "--model_name_or_path" in command:
            before, here = (command[command.index(f"--{name}") + 1] for name in ("model_name_or_path", "output_dir"))
            started[Path(here).name] = Path(before).name
    order = ["start", "alignment", "pretraining", "continued", "sft", "grpo"]
    assert started == dict(zip(order[1:], order, strict=False))
    hashes = {NextFlowForCausalLM.from_pretrained(work / name).config.image_tokenizer_hash for name in order[1:]}
    assert len(hashes) == 1 and hashes == set(load_coded_dataset(work / "sft_codes" / "edits")["image_tokenizer_hash"])


def test_it_went_on_where_it_was_ended(work):
    for name in KILLED:
        assert find_last_checkpoint(work / name).endswith("checkpoint-2")
        state = json.loads((work / name / "checkpoint-2" / "trainer_state.json").read_text())
        assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2]
    commands = json.loads((work / "commands.json").read_text())
    assert sum("--resume_from_checkpoint" in command for command in commands) == len(KILLED)


def test_it_is_judged_through_every_door(work):
    rows = (work / "judged" / "figures.md").read_text().splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert {task for task, *_ in cells} == {"drawing", "reading", "editing"} and len(cells) == 9
    assert all(0 <= float(right) <= 1 and int(n) in (3, 12) for _, _, right, n in cells)
    assert all((work / "judged" / f"{name}.png").is_file() for name in ("drawn", "edited"))


@pytest.mark.parametrize("path", sorted(RECIPE.glob("*_data.yaml")), ids=lambda path: path.stem)
def test_stand_ins_have_the_names_kinds_and_weights_of_the_sources(work, path):
    real, little = read_data_list(path), read_data_list(work / "little" / path.name)
    assert list(real) == list(little)
    for name, source in real.items():
        other = little[name]
        assert (source.kind, source.weight, source.prompt_style) == (other.kind, other.weight, other.prompt_style)
        assert len(load_coded_dataset(work / path.name.replace("_data.yaml", "_codes") / name)) == 8


def test_the_judge_names_what_is_drawn_and_nothing_else():
    rng = np.random.default_rng(0)
    assert [name_thing(draw_thing(name, rng).resize((80, 80))) for name in NAMES] == list(NAMES)
    two = np.concatenate([np.asarray(draw_thing(name).resize((64, 128))) for name in NAMES[:2]], axis=1)
    noise = rng.integers(0, 256, (80, 80, 3), dtype=np.uint8)
    for pixels in (two, noise, np.full((80, 80, 3), 255, np.uint8)):
        assert name_thing(Image.fromarray(pixels)) is None


def test_a_change_changes_one_thing():
    rng = np.random.default_rng(0)
    for _ in range(50):
        name = str(rng.choice(NAMES))
        instruction, changed = change(name, rng)
        old, new = name.split(), changed.split()
        assert changed in NAMES and (old[0] == new[0]) != (old[1] == new[1])
        assert next(iter(set(new) - set(old))) in instruction and {new[0], new[1]} <= {*COLOURS, *SHAPES}


def test_kinds_that_the_little_world_has_not():
    assert all(draw_row(kind, np.random.default_rng(0)) for kind in KINDS if kind != "video")
    with pytest.raises(ValueError, match="no rows of the kind video"):
        draw_row("video", np.random.default_rng(0))


def test_steps_are_what_the_plan_says():
    """8 GPUs with packs of `max_length`: the settings' `max_steps` are the samples of the budget."""
    config, budgets = read_recipe(RECIPE)
    for name in ("alignment", "pretraining", "continued", "sft"):
        settings = yaml.safe_load((RECIPE / f"{name}.yaml").read_text())
        planned = stage_cost(config, budgets[name]).tokens / (8 * settings["max_length"])
        assert settings["max_steps"] == pytest.approx(planned, rel=0.03)
    grpo = yaml.safe_load((RECIPE / "grpo.yaml").read_text())
    drawn = grpo["per_device_train_batch_size"] * grpo["gradient_accumulation_steps"] * 8 * grpo["max_steps"]
    assert drawn == float(budgets["grpo"]["samples"]["text_to_image"])
    joint, budget = (
        yaml.safe_load((RECIPE / "image_tokenizer_joint.yaml").read_text()),
        budgets["image_tokenizer_joint"],
    )
    shown = joint["per_device_train_batch_size"] * joint["gradient_accumulation_steps"] * 8 * joint["max_steps"]
    assert shown == float(budget["pictures"]) and joint["per_device_train_batch_size"] == budget["batch"]
