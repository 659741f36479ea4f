"""Checkpoints that load with `trust_remote_code=True` where this package is installed but not imported."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

SHIM = Path(__file__).with_name("nextflow_remote_code.py")

MODEL_CLASSES = {
    "AutoConfig": "NextFlowConfig",
    "AutoModel": "NextFlowModel",
    "AutoModelForCausalLM": "NextFlowForCausalLM",
    "AutoModelForImageTextToText": "NextFlowForCausalLM",
    "AutoModelForMultimodalLM": "NextFlowForCausalLM",
}
PROCESSOR_CLASSES = {"AutoProcessor": "NextFlowProcessor"}
IMAGE_PROCESSOR_CLASSES = {"torchvision": "NextFlowImageProcessor", "pil": "NextFlowImageProcessorPil"}


def add_remote_code(folder: str | os.PathLike) -> None:
    """Adds to a saved checkpoint what `trust_remote_code=True` needs: entries, and a file that imports this package.

    Args:
        folder (`str` or `os.PathLike`):
            A folder with `config.json` and, if a processor was saved, `processor_config.json`.

    Raises:
        `ValueError`: if there is no `config.json`.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f'"{folder}" has no config.json; save the model there first.')
    config = json.loads((folder / "config.json").read_text())
    if (model_type := config.get("model_type")) != "nextflow":
        raise ValueError(
            f'"{folder}" holds a {model_type}, which has no remote code: import this package before it loads.'
        )
    write_shim(folder)
    config["auto_map"] = _references(MODEL_CLASSES)
    _write_json(folder / "config.json", config)
    if (folder / "processor_config.json").is_file():
        processor = json.loads((folder / "processor_config.json").read_text())
        processor["auto_map"] = _references(PROCESSOR_CLASSES)
        processor["image_processor"]["auto_map"] = {"AutoImageProcessor": _references(IMAGE_PROCESSOR_CLASSES)}
        _write_json(folder / "processor_config.json", processor)


def write_shim(folder: str | os.PathLike) -> None:
    """Writes the file that the entries of [`add_remote_code`] name, where such entries are saved again."""
    shutil.copyfile(SHIM, Path(folder) / SHIM.name)


def _references(classes: dict[str, str]) -> dict[str, str]:
    return {key: f"{SHIM.stem}.{name}" for key, name in classes.items()}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


__all__ = ["add_remote_code"]
