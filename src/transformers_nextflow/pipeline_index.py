"""`model_index.json`, which makes a folder with a model and a processor one that diffusers loads."""

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .strict_loading import read_json


def pipeline_index(
    folder: str | os.PathLike, model_name: str | None = None, decoder_in: str | os.PathLike | None = None
) -> dict[str, Any]:
    """What `model_index.json` says to diffusers of a folder with a model and a processor: all flat but the images'.

    `decoder_in` is where a diffusion decoder would be: the same folder by default.
    """
    tokenizer_config, config = (read_json(folder, f"{name}config.json") or {} for name in ("tokenizer_", ""))
    index: dict[str, Any] = {
        "_class_name": "NextFlowPipeline",
        "_diffusers_version": version("diffusers"),
        "model": ["transformers_nextflow", model_name or (config.get("architectures") or ["NextFlowForCausalLM"])[0]],
        "image_tokenizer": ["transformers_nextflow", "NextFlowImageTokenizer"],
        "tokenizer": ["transformers", tokenizer_config["tokenizer_class"]],
        "image_processor": ["transformers_nextflow", "NextFlowImageProcessor"],
    }
    for name in ("diffusion_decoder", "scheduler", "vae"):
        for file in Path(decoder_in or folder, name).glob("*config.json"):
            kind = json.loads(file.read_text(encoding="utf-8"))["_class_name"]
            index[name] = ["diffusers_nextflow" if kind.startswith("NextFlow") else "diffusers", kind]
    return index


def write_pipeline_index(folder: str | os.PathLike, *args, **kwargs) -> None:
    """Makes a folder with a processor, and the model that joins it, one that `DiffusionPipeline` loads."""
    index = json.dumps(pipeline_index(folder, *args, **kwargs), indent=2)
    Path(folder, "model_index.json").write_text(index + "\n", encoding="utf-8")


__all__ = ["pipeline_index", "write_pipeline_index"]
