"""Trains an image tokenizer, one of the paper's three stages a run, each a file of settings.

    python examples/train_image_tokenizer.py --config examples/recipes/tiny/image_tokenizer_pixel.yaml \\
        --model_name_or_path examples/recipes/tiny/image_tokenizer.json --pictures FOLDER --output_dir runs/pixel

`--model_name_or_path` is the folder that the stage before wrote, or a configuration (`*.json`) for new weights.
`--pictures` is a folder of pictures, of parquet files with a column `image`, or of WebDataset's tars; squares are cut
from their middle. A run that was killed goes on with `--resume_from_checkpoint true`. On a CPU add `--use_cpu true`.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from PIL import Image, ImageOps
from torch import nn
from transformers import AutoModel, PreTrainedModel
from trl import TrlParser

from transformers_nextflow import NextFlowImageTokenizer, NextFlowImageTokenizerConfig
from transformers_nextflow.semantic_branch import semantic_tokens
from transformers_nextflow.trainer import (
    FeatureLoss,
    NextFlowImageTokenizerTrainer,
    NextFlowImageTokenizerTrainingConfig,
    PatchDiscriminator,
)

EFFICIENTNET = "efficientnet-lite0"


@dataclass
class Parts:
    """What is trained, on what, and with which helpers."""

    pictures: str = field(metadata={"help": "Folder of pictures, of parquet files with a column `image`, or of tars."})
    model_name_or_path: str = field(metadata={"help": "Folder of the stage before, or a *.json for new weights."})
    image_sizes: list[int] = field(
        default_factory=lambda: [256], metadata={"help": "Sides in pixels; a batch has one, a repeated one more often."}
    )
    teacher: str | None = field(
        default=None, metadata={"help": f'"{EFFICIENTNET}", or a SigLIP2 or CLIP model. For the stage "joint".'}
    )
    perceptual: str | None = field(default=None, metadata={"help": f'Perceptual loss over "{EFFICIENTNET}".'})
    discriminator_hidden_size: int | None = field(
        default=None, metadata={"help": "Width of a PatchGAN critic; none by default."}
    )
    widen: float | None = field(default=None, metadata={"help": "A new pixel decoder, so many times as wide."})
    deepen: int = field(default=1, metadata={"help": "And with so many times as many blocks."})


def load_pictures(folder: str) -> Dataset:
    """The column `image` of a folder."""
    files = sorted(map(str, Path(folder).glob("*.parquet")))
    tars = sorted(map(str, Path(folder).glob("*.tar")))
    if files:
        pictures = load_dataset("parquet", data_files=files, split="train")
    elif tars:
        pictures = load_dataset("webdataset", data_files=tars, split="train")
        found = [name for name in ("jpg", "png", "webp") if name in pictures.column_names]
        pictures = pictures.rename_columns({name: "image" for name in found[:1]})
    else:
        pictures = load_dataset("imagefolder", data_dir=folder, split="train")
    if "image" not in pictures.column_names:
        raise ValueError(f'"{folder}" has the columns {", ".join(pictures.column_names)}, but no `image`.')
    return pictures.select_columns("image")


def collate(rows: list[dict[str, Any]], sizes: list[int]) -> dict[str, torch.Tensor]:
    """Squares of one size in [-1, 1], `(B, 3, side, side)`; the size follows from the first picture."""
    pictures = [row["image"].convert("RGB") for row in rows]
    side = sizes[zlib.crc32(pictures[0].tobytes()) % len(sizes)]
    arrays = [np.asarray(ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)) for picture in pictures]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return {"pixel_values": pixels.contiguous(memory_format=torch.channels_last)}


def load_model(parts: Parts) -> NextFlowImageTokenizer:
    """The weights to start from, with a new pixel decoder where one is asked for."""
    if parts.model_name_or_path.endswith(".json"):
        model = NextFlowImageTokenizer(NextFlowImageTokenizerConfig.from_json_file(parts.model_name_or_path))
    else:
        model = NextFlowImageTokenizer.from_pretrained(parts.model_name_or_path, dtype=torch.float32)
    if parts.widen is not None:
        model.enlarge_pixel_decoder(parts.widen, parts.deepen)
    return model.to(memory_format=torch.channels_last)


def load_efficientnet() -> Any:
    from tiny_world.teacher import EfficientNetTeacher

    return EfficientNetTeacher()


def load_teacher(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """From pixels `(B, 3, H, W)` in [-1, 1] to features `(B, C, H / 16, W / 16)`."""
    if name == EFFICIENTNET:
        return load_efficientnet().features
    model = AutoModel.from_pretrained(name).eval().requires_grad_(False)
    encoder: PreTrainedModel = getattr(model, "vision_model", model)
    project = getattr(model, "visual_projection", nn.Identity())  # CLIP's, to the space that it shares with texts

    @torch.no_grad()
    def features(pixels: torch.Tensor) -> torch.Tensor:
        model.to(pixels.device)
        grid = pixels.shape[-2] // encoder.config.patch_size, pixels.shape[-1] // encoder.config.patch_size
        return project(semantic_tokens(encoder, pixels, grid, None)).transpose(1, 2).unflatten(2, grid)

    return features


def main(arguments: list[str] | None = None) -> NextFlowImageTokenizerTrainer:
    parts, settings = TrlParser(
        (Parts, NextFlowImageTokenizerTrainingConfig), allow_abbrev=False
    ).parse_args_and_config(arguments)
    if parts.perceptual not in (None, EFFICIENTNET):
        raise ValueError(f'`--perceptual` must be "{EFFICIENTNET}", but got "{parts.perceptual}".')
    torch.manual_seed(settings.seed)
    trainer = NextFlowImageTokenizerTrainer(
        load_model(parts),
        settings,
        teacher=load_teacher(parts.teacher) if parts.teacher else None,
        perceptual_loss=FeatureLoss(load_efficientnet().maps).to(settings.device) if parts.perceptual else None,
        discriminator=PatchDiscriminator(parts.discriminator_hidden_size) if parts.discriminator_hidden_size else None,
        train_dataset=load_pictures(parts.pictures),
        data_collator=partial(collate, sizes=parts.image_sizes),
    )
    trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
