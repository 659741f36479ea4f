"""`python -m diffusers_nextflow`: from a prompt to files, and one clear line for what goes wrong."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_nextflow import NextFlowPipeline
from diffusers_nextflow.__main__ import main

PROMPT = "a red circle left of a blue square"


@pytest.fixture
def command(tiny_random_checkpoint, tmp_path, monkeypatch):
    """Runs the command in this process and in an empty folder, with the random checkpoint."""
    monkeypatch.chdir(tmp_path)
    return lambda *options: main([PROMPT, "--model", str(tiny_random_checkpoint), "--device", "cpu", *options])


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_one_image(command, tmp_path, capsys, tiny_random_checkpoint):
    assert command("--output", "pictures/circle.png", "--seed", "3") == 0
    said = capsys.readouterr().out
    assert re.fullmatch(r"pictures/circle\.png: 80 x 80 pixels \(height x width\), seed 3, \d+\.\d s\n", said)
    pipe = NextFlowPipeline.from_pretrained(tiny_random_checkpoint, dtype=torch.float32)
    [expected] = pipe(PROMPT, generator=torch.Generator().manual_seed(3)).images
    assert np.array_equal(read(tmp_path / "pictures" / "circle.png"), np.asarray(expected))


def test_several_images_are_those_of_the_next_seeds(command, tmp_path, capsys):
    assert command("--num-images", "2", "--seed", "7") == 0
    assert capsys.readouterr().out.count("out_") == 2
    assert not (tmp_path / "out.png").exists()
    assert command("--seed", "8", "--output", "eight.png", "--quiet") == 0
    assert capsys.readouterr().out == ""
    first, second, alone = (read(tmp_path / name) for name in ("out_0.png", "out_1.png", "eight.png"))
    assert abs(second - alone).max() <= 1  # decoded in a batch, so rounding may differ
    assert abs(second - first).max() > 1


def test_the_checkpoint_in_the_package_is_the_default(tiny_random_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers_nextflow.tiny_checkpoint", lambda: tiny_random_checkpoint)
    assert main([PROMPT, "--output", str(tmp_path / "out.png"), "--device", "cpu"]) == 0
    assert (tmp_path / "out.png").is_file()


def test_without_a_seed_the_line_tells_which_it_was(command, tmp_path, capsys):
    assert command("--output", "first.png") == 0
    [seed] = re.findall(r"seed (\d+)", capsys.readouterr().out)
    assert command("--output", "again.png", "--seed", seed) == 0
    assert np.array_equal(read(tmp_path / "first.png"), read(tmp_path / "again.png"))


def test_a_preview_of_every_scale(command, tmp_path):
    assert command("--steps-dir", "steps", "--num-scales", "3", "--height", "1", "--width", "1", "--seed", "0") == 0
    names = [path.name for path in sorted((tmp_path / "steps").iterdir())]
    assert names == ["scale_01_1x1.png", "scale_02_2x2.png", "scale_03_3x3.png"]
    previews = [read(tmp_path / "steps" / name) for name in names]
    assert {preview.shape for preview in previews} == {(48, 48, 3)}
    assert np.array_equal(previews[-1], read(tmp_path / "out.png"))


def test_previews_of_several_images(command, tmp_path):
    assert command("--steps-dir", "steps", "--num-scales", "2", "--num-images", "2") == 0
    names = [path.name for path in sorted((tmp_path / "steps").iterdir())]
    assert names == [f"scale_{scale}_{index}.png" for scale in ("01_1x1", "02_2x2") for index in range(2)]


def test_sampling_options_reach_the_model(command, tmp_path):
    for index, options in enumerate((["--seed", "0"], ["--seed", "1"])):
        greedy = ["--top-k", "1", "--guidance-scale", "2", "--negative-prompt", "blue", "--output", f"{index}.png"]
        assert command(*options, *greedy) == 0
    assert np.array_equal(read(tmp_path / "0.png"), read(tmp_path / "1.png"))
    assert command("--seed", "0", "--temperature", "2", "--top-p", "0.9", "--dtype", "bfloat16") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--height", "100", "--width", "100"], "The nearest legal sizes (height x width) are 96 x 96"),
        (["--height", "1024", "--width", "1024"], "this model has 5"),
        (["--output", "picture"], '--output "picture": has no file extension; name it like "picture.png"'),
        (["--output", "picture.doc"], '".doc" is no image format'),
        (["--output", "a-file/out.png"], '--output: "a-file" is to be a folder, but a file is in its place'),
        (["--output", "a-file/more/out.png"], '--output: "a-file/more" is to be a folder'),
        (["--output", "a-folder.png"], '--output "a-folder.png" is a folder'),
        (["--output", ""], '--output "." is a folder'),
        (["--steps-dir", "a-file"], '--steps-dir: "a-file" is to be a folder, but a file is in its place'),
        (["--num-images", "0"], "--num-images must be between 1 and 1000, not 0"),
        (["--seed", "-1"], "--seed must be between 0"),
        (
            ["--model", "no/such/folder"],
            '--model "no/such/folder" is neither a folder nor the name of a Hub repository',
        ),
        (["--model", "a-folder.png"], '"a-folder.png" has no `config.json`'),
        (["--decoder", "diffusion"], 'has no `diffusion_decoder`, which `decoder="diffusion"` asks for'),
        (["--decoder-scale", "2"], "are the diffusion decoder's: leave them out"),
        (["--device", "cuda:99"], '--device "cuda:99" cannot be used here'),
        (["--device", "toaster"], '--device "toaster" cannot be used here'),
        (["--device", "meta"], '--device "meta" cannot be used here'),
        (["--temperature", "0"], "--temperature must be above 0, not 0.0; for the best codes: --top-k 1"),
        (["--temperature", "inf"], "`image_temperature` must be positive"),
        (["--top-p", "1.5"], "`image_top_p` must be above 0"),
        (["--guidance-scale", "-1"], "`guidance_scale` must be at least 0"),
        (["--guidance-scale", "nan"], "`guidance_scale` must be at least 0"),
        (["--num-images", "1000000000000"], "--num-images must be between 1 and 1000"),
        (["--num-images", "2", "--output", "several.png"], '--output "several_1.png" is a folder'),
        (["--output", "x" * 300 + ".png"], "File name too long"),
        (["--height", "80"], "`height` and `width`"),
        (["--num-scales", "0"], "--num-scales must be between 1 and 18, not 0"),
        (["--num-scales", "99"], "--num-scales must be between 1 and 18, not 99"),
        (["--top-k", "-1"], "`image_top_k`"),
    ],
)
def test_misuse_is_one_line(options, message, command, tmp_path, capsys):
    (tmp_path / "a-file").touch()
    (tmp_path / "a-folder.png").mkdir()
    (tmp_path / "several_1.png").mkdir()
    assert command(*options) == 2
    output = capsys.readouterr()
    [line] = output.err.splitlines()
    assert line.startswith("python -m diffusers_nextflow: error: ") and message in line
    assert output.out == "" and not list(tmp_path.glob("*out*"))


def test_an_empty_prompt_is_misuse(capsys):
    assert main([" "]) == 2
    assert "the prompt is empty; say what to draw" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: prompt"),
        ([PROMPT, "--sede", "1"], "--sede"),
        ([PROMPT, "--num-i", "2"], "--num-i"),  # no abbreviations: a new option could change what they mean
        ([PROMPT, "--out", "a.png"], "--out"),
        ([PROMPT, "--seed", "1.5"], "--seed: invalid int value"),
        ([PROMPT, "--seed"], "--seed: expected one argument"),
        ([PROMPT, "another prompt"], "another prompt"),
        ([PROMPT, "--dtype", "int8"], "--dtype: invalid choice"),
        ([PROMPT, "--prompt-style", "haiku"], "--prompt-style: invalid choice"),
    ],
)
def test_wrong_options_are_one_line_too(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line and line.endswith("(--help lists all options)")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("options", [[], ["--steps-dir", "steps"]])
def test_a_full_disk_leaves_no_part_of_a_picture(error, options, command, tmp_path, monkeypatch, capsys):
    assert command("--seed", "1", "--quiet") == 0
    before = (tmp_path / "out.png").read_bytes()

    def save(image, path):
        path.write_bytes(b"half a picture")
        raise error

    monkeypatch.setattr(Image.Image, "save", save)
    assert command("--seed", "2", *options) == (2 if isinstance(error, OSError) else 130)
    assert ("No space left" in capsys.readouterr().err) is isinstance(error, OSError)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["out.png"]
    assert (tmp_path / "out.png").read_bytes() == before


def test_a_link_is_followed_and_modes_are_the_umasks(command, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out.png").symlink_to(tmp_path / "real" / "picture.png")
    old = os.umask(0o027)
    try:
        assert command("--num-scales", "2") == 0
    finally:
        os.umask(old)
    assert (tmp_path / "out.png").is_symlink()
    assert (tmp_path / "real" / "picture.png").stat().st_mode & 0o777 == 0o640


def test_a_file_that_may_not_be_written_is_named_before_anything_runs(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "out.png").touch()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and str(path) != "out.png")
    assert command() == 2
    assert '--output "out.png" is there and may not be written to' in capsys.readouterr().err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no memory")])
def test_out_of_memory_is_one_line(error, command, monkeypatch, capsys):
    def run(*args, **kwargs):
        raise error

    monkeypatch.setattr(NextFlowPipeline, "__call__", run)
    assert command() == 2
    assert capsys.readouterr().err.endswith("memory\n")


MAIN = """
import atexit, json, runpy, sys
from pathlib import Path
atexit.register(lambda: Path("modules.json").write_text(json.dumps(sorted(sys.modules))))
runpy.run_module("diffusers_nextflow", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_fresh_process_says_one_line_and_imports_what_drawing_needs(tiny_random_checkpoint, tmp_path):
    options = ["--model", str(tiny_random_checkpoint), "--seed", "0", "--steps-dir", "steps"]
    command = [sys.executable, "-c", MAIN, PROMPT, *options]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""  # nothing of the libraries' chatter, and no progress bar outside a terminal
    assert process.stdout.count("\n") == 1
    assert Image.open(tmp_path / "out.png").size == (80, 80)
    assert len(list((tmp_path / "steps").iterdir())) == 5
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert "transformers_nextflow.decoding" in modules
    not_for_drawing = {"trl", "datasets", "pandas", "matplotlib", "transformers_nextflow.trainer"}
    assert not not_for_drawing.intersection(modules)
