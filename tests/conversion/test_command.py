"""The options that every converter has, and the upload of a result."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from conversion import command, qwen2_5, siglip2, tokenflow

REQUIRED = ["--source", "a", "--output", "b"]


class FakeApi:
    """Keeps what the Hub would have been told."""

    def __init__(self):
        self.calls = []

    def create_repo(self, repo_id, **settings):
        self.calls.append(("create_repo", repo_id, settings))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, **settings):
        self.calls.append(("upload_folder", settings))


@pytest.fixture
def hub(monkeypatch) -> FakeApi:
    api = FakeApi()
    monkeypatch.setattr(command, "HfApi", lambda: api)
    return api


@pytest.mark.parametrize(
    ("module", "convert", "more"),
    [
        (qwen2_5, "convert_to_nextflow", ["--image-tokenizer", "c"]),
        (qwen2_5, "convert_to_qwen", ["--back"]),
        (siglip2, "convert_to_image_tokenizer", []),
        (tokenflow, "convert_tokenflow", []),
    ],
)
def test_every_converter_uploads_what_it_wrote(module, convert, more, hub, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(module, convert, lambda *arguments, **settings: given.extend([*arguments, *settings.values()]))
    module.main([*REQUIRED, *more, "--dtype", "bfloat16", "--max-shard-size", "2GB"])
    assert hub.calls == [] and {torch.bfloat16, "2GB"} < set(given)
    module.main([*REQUIRED, *more, "--push-to-hub", "nextflow-7b"])
    created, uploaded = hub.calls
    assert created == ("create_repo", "nextflow-7b", {"exist_ok": True})
    assert uploaded[1]["folder_path"] == Path("b") and uploaded[1]["repo_id"] == "me/nextflow-7b"
    assert capsys.readouterr().out.splitlines()[-2:] == ["Written: b", "Uploaded: me/nextflow-7b"]


@pytest.mark.parametrize("module", [qwen2_5, siglip2, tokenflow])
def test_nothing_is_made_or_uploaded_when_the_conversion_fails(module, hub, tmp_path, capsys):
    arguments = ["--source", str(tmp_path / "nowhere"), "--output", str(tmp_path / "new" / "out")]
    with pytest.raises(SystemExit) as stop:
        module.main([*arguments, *(["--back"] if module is qwen2_5 else []), "--push-to-hub", "x"])
    assert stop.value.code == 1 and "nowhere" in capsys.readouterr().err
    assert hub.calls == [] and not list(tmp_path.iterdir())


def test_an_unknown_dtype(capsys):
    with pytest.raises(SystemExit):
        tokenflow.main([*REQUIRED, "--dtype", "int8"])
    assert '"int8" is not bfloat16, float16 or float32' in capsys.readouterr().err
