"""Every script's command line: help, wrong and shortened options, files that are missing, outputs that can't be."""

import argparse
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
SCRIPTS = sorted(
    path
    for folder in ("conversion", "examples", "examples/tiny_world")
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)


@pytest.fixture
def run(monkeypatch):
    """Runs a script with arguments; returns the parsers that it made."""
    parsers, make = [], argparse.ArgumentParser.__init__

    def recorded(self, *args, **settings):
        make(self, *args, **settings)
        parsers.append(self)

    def run(script: Path, *arguments: str) -> list[argparse.ArgumentParser]:
        name = script.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removeprefix("examples.")
        monkeypatch.setattr(argparse.ArgumentParser, "__init__", recorded)
        monkeypatch.setattr(sys, "argv", [script.name, *arguments])
        importlib.import_module(name).main()
        return parsers

    run.parsers = parsers
    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_and_options_that_there_are_not(script, run, capsys):
    with pytest.raises(SystemExit) as stop:
        run(script, "--help")
    assert stop.value.code == 0 and "usage: " in capsys.readouterr().out
    # One that is cut short must not be taken for another: a later option could change what it means.
    assert run.parsers and not any(parser.allow_abbrev for parser in run.parsers)
    required = [
        text
        for action in run.parsers[0]._actions
        if action.required and action.option_strings
        for text in (action.option_strings[0], "1")
    ]
    required += ["--use_cpu", "true", "--bf16", "false"] if "trl" in type(run.parsers[0]).__module__ else []
    with pytest.raises((SystemExit, ValueError)) as stop:
        run(script, *required, "--no-such-option", "1")
    assert "--no-such-option" in capsys.readouterr().err + str(stop.value)


# Arguments of which "nowhere" is not there, or of which "file/out" can't be made.
MISSING = {
    "qwen2_5": ["--source", "nowhere", "--output", "out", "--image-tokenizer", "nowhere"],
    "siglip2": ["--source", "nowhere", "--output", "out"],
    "tokenflow": ["--source", "nowhere", "--output", "out"],
    "qwen_tokenizer": ["--ranks", "nowhere", "--output", "out"],
    "extract_codes": ["--data", "nowhere", "--output", "out"],
    "train_loop": ["--codes", "nowhere", "--output", "out"],
    "sft": ["--codes", "nowhere", "--output_dir", "out", "--use_cpu", "true", "--bf16", "false"],
    "evaluate_tiny": ["nowhere"],
    "train_diffusion_decoder": ["--codes", "nowhere", "--output_dir", "out", "--use_cpu", "true", "--bf16", "false"],
    "modalities": ["nowhere"],
    "run_recipe": ["--recipe", "nowhere", "--work", "out"],
}
UNWRITABLE = {
    "qwen_tokenizer": ["--ranks", "RANKS", "--output", "file/out"],
    "siglip2": ["--source", "SIGLIP2", "--output", "file/out"],
    "extract_codes": ["--data", "PICTURES", "--checkpoint", "CHECKPOINT", "--output", "file/out"],
    "modalities": ["--output", "file/out"],
    "ablations": ["--work", "file/out"],
}


def test_the_sheets_of_the_modalities(run, tmp_path):
    run(ROOT / "examples" / "modalities.py", "--output", str(tmp_path), "--number", "2")
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".gif"}
    assert len(list(tmp_path.iterdir())) == 7


@pytest.mark.parametrize("stem", MISSING)
def test_a_file_that_is_missing(stem, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, ValueError, OSError)) as stop:
        run(next(path for path in SCRIPTS if path.stem == stem), *MISSING[stem])
    assert "nowhere" in capsys.readouterr().err + str(stop.value)
    assert getattr(stop.value, "code", 1)


@pytest.mark.parametrize("stem", UNWRITABLE)
def test_an_output_that_cannot_be_written(stem, run, tmp_path, monkeypatch, capsys, tiny_random_checkpoint):
    """The place is below a file, which root can't change either."""
    from PIL import Image
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    folders = {
        "RANKS": ROOT / "tests" / "fixtures" / "qwen" / "first_1024_ranks.tiktoken",
        "CHECKPOINT": tiny_random_checkpoint,
        "PICTURES": tmp_path / "pictures",
        "SIGLIP2": tmp_path / "siglip2",
    }
    if "PICTURES" in UNWRITABLE[stem]:
        folders["PICTURES"].mkdir()
        Image.new("RGB", (80, 80)).save("pictures/0.png")
        Path("pictures/metadata.jsonl").write_text('{"file_name": "0.png", "text": "black"}')
    if "SIGLIP2" in UNWRITABLE[stem]:
        sizes = dict(hidden_size=48, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
        Siglip2VisionModel(Siglip2VisionConfig(**sizes)).save_pretrained("siglip2")
    arguments = [str(folders.get(argument, argument)) for argument in UNWRITABLE[stem]]
    with pytest.raises((SystemExit, ValueError, OSError)) as stop:
        run(next(path for path in SCRIPTS if path.stem == stem), *arguments)
    assert "file" in capsys.readouterr().err + str(stop.value)
    assert getattr(stop.value, "code", 1)
