"""Settings: known, legal, and told before anything is loaded."""

import socket

import pytest

from transformers_nextflow.serving.__main__ import main, parse_arguments, read_settings
from transformers_nextflow.serving.settings import ServingSettings


@pytest.mark.parametrize(
    "values, message",
    [
        ({"max_bach": 1}, "max_bach.*max_batch"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_batch": "8"}, "max_batch"),
        ({"max_batch": 9, "max_queue": 8}, "max_queue"),
        ({"allow_urls": 1}, "allow_urls"),
        ({"dtype": "int8"}, "dtype"),
        ({"request_seconds": 0}, "request_seconds"),
        ({"adapters": "/no/such/folder"}, "adapters"),
        ([1], "mapping"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ServingSettings.of(values)


def test_a_file_and_the_command_line_agree_on_names(tmp_path, tiny_random_checkpoint):
    file = tmp_path / "serve.yaml"
    file.write_text(f"model: {tiny_random_checkpoint}\nmax_batch: 4\nallow_urls: true\n")
    arguments = ["--config", str(file), "--max-batch", "2", "--threads", "1", "--dtype", "float32", "--port", "18999"]
    settings = read_settings(parse_arguments(arguments))
    assert settings == ServingSettings(
        model=str(tiny_random_checkpoint), max_batch=2, allow_urls=True, threads=1, dtype="float32"
    )
    assert settings.model_name == tiny_random_checkpoint.name and settings.key is None
    with pytest.raises(SystemExit):  # others could read it in the list of processes
        parse_arguments(["--api-key", "secret"])


def test_what_is_wrong_is_one_line_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers_nextflow.serving.__main__.serve_forever", None)
    (tmp_path / "bad.yaml").write_text("colour: red\n")
    (tmp_path / "worse.yaml").write_text("{")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for arguments, message in {
            ("--model", str(tmp_path)): "config.json is missing",
            ("--model", str(tmp_path / "none")): "no folder",
            ("--config", str(tmp_path / "bad.yaml")): "colour",
            ("--config", str(tmp_path / "worse.yaml")): "YAML",
            ("--port", str(taken.getsockname()[1])): "Can't listen",
            ("--port", "70000"): "--port",
        }.items():
            assert main(list(arguments)) == 2
            error = capsys.readouterr().err
            assert message in error and error.count("\n") == 1
