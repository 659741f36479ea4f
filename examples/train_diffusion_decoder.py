"""Trains a diffusion decoder on codes and the pictures that they were made of, one of the paper's two stages a run.

    python examples/extract_codes.py --source imagefolder --data FOLDER --no-self-correction --output runs/codes
    python examples/train_diffusion_decoder.py --config examples/configs/diffusion_decoder.yaml --codes runs/codes \\
        --backbone SDXL/unet --vae SDXL/vae --scheduler SDXL/scheduler --output_dir runs/decoder
    python examples/train_diffusion_decoder.py --config examples/configs/diffusion_decoder.yaml --codes runs/codes \\
        --decoder runs/decoder --scale_factors 1 2 --output_dir runs/decoder_2x

The first stage draws at the codes' size: `--backbone` is a folder or a Hub repository with a denoiser of diffusers
(`UNet2DModel`, `UNet2DConditionModel`, `SD3Transformer2DModel`, `FluxTransformer2DModel`), or a `*.json` file with the
configuration of a new one. The second, 2 x 2 upsampling, goes on from a `--decoder` of the first. Pictures are found
again by what `extract_codes.py` wrote beside the codes; rows with one picture each are used, the others left out. With
`--lora_r` a transformer is trained by LoRA. A run that was killed goes on with `--resume_from_checkpoint true`.
Every field of `NextFlowDiffusionDecoderTrainingConfig` is an option. On a CPU add `--use_cpu true`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from datasets import Dataset, Features, Value, load_from_disk
from datasets import Image as Picture
from PIL import Image, ImageOps
from trl import TrlParser

from data_formats import find_picture, list_units, open_picture, read_rows
from diffusers_nextflow import (
    NextFlowDecodePipeline,
    NextFlowDiffusionDecoder,
    NextFlowDiffusionDecoderTrainer,
    NextFlowDiffusionDecoderTrainingConfig,
)
from extract_codes import MANIFEST, hash_of, row_name
from transformers_nextflow import NextFlowImageTokenizer, ScaleSchedule
from transformers_nextflow.trainer import DataSource, load_coded_dataset

TEXT_COLUMNS = ("prompt_embeds", "pooled_prompt_embeds")


@dataclass
class Parts:
    """What is trained, on what."""

    codes: str = field(metadata={"help": "Coded samples, from examples/extract_codes.py."})
    decoder: str | None = field(default=None, metadata={"help": "A folder that this script wrote, to go on from."})
    backbone: str | None = field(default=None, metadata={"help": "A denoiser of diffusers, or a *.json for a new one."})
    backbone_class: str = field(default="UNet2DModel", metadata={"help": "Of a *.json."})
    vae: str | None = field(default=None, metadata={"help": "The autoencoder, where the backbone denoises latents."})
    scheduler: str | None = field(default=None, metadata={"help": "A folder; by default flow matching."})
    condition_dim: int = field(default=64, metadata={"help": "Channels that codes are projected to."})
    patch_size: int | None = field(default=None, metadata={"help": "Side of what is one place to the backbone."})
    num_inference_steps: int = field(default=12, metadata={"help": "Of drawing, by default."})
    lora_r: int | None = field(default=None, metadata={"help": "Rank of LoRA; by default every weight is trained."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"], metadata={"help": "Matrices with LoRA."}
    )
    text_embeds: str | None = field(
        default=None,
        metadata={"help": "A data set on disk with the columns id and prompt_embeds; see the docs."},
    )
    num_eval_samples: int = field(default=0, metadata={"help": "Rows kept from training, the last ones."})


def read_extraction(codes: str) -> tuple[Dataset, str]:
    """The pictures that the codes were made of, and the checkpoint whose image tokenizer made them."""
    path = Path(codes, MANIFEST)
    if not path.is_file():
        raise ValueError(f'"{codes}" has no `{MANIFEST}`: make it with examples/extract_codes.py.')
    facts = json.loads(path.read_text(encoding="utf-8"))
    source = DataSource(**{item.name: facts[item.name] for item in fields(DataSource) if item.name in facts})
    features = Features({"id": Value("string"), "picture": Picture(decode=False)})
    options = {"gen_kwargs": {"source": source}, "fingerprint": hash_of(source, facts["source_files"])}
    pictures = Dataset.from_generator(read_pictures, features, **options)  # keeps them, so that any can be read
    return pictures, facts["checkpoint"]


def read_pictures(source: DataSource) -> Iterator[dict[str, Any]]:
    """The picture of each row, None if it has none, by the name that the coded sample has."""
    for file, unit in enumerate(list_units(source)):
        for number, row in enumerate(read_rows(source, unit)):
            try:
                picture = find_picture(row, source)
            except ValueError:  # left out of the codes, too
                picture = None
            if isinstance(picture, str):
                picture = str(Path(source.pictures or "", picture))
            yield {"id": row_name(row, file, number), "picture": picture}


def collate(samples: list[dict[str, Any]], pictures: Dataset, factor: int) -> dict[str, torch.Tensor]:
    """Codes, grids, and the pictures cut to the codes' size times `factor`, in [-1, 1]."""
    pixels = []
    for sample in samples:
        picture = ImageOps.exif_transpose(open_picture(pictures[sample["row"]]["picture"]))
        picture = picture.convert("RGBA")
        opaque = Image.new("RGB", picture.size, "white")  # as the image processor does it
        opaque.paste(picture, mask=picture.getchannel("A"))
        schedule = ScaleSchedule.from_grid_shw(sample["image_grid_shw"][0])
        size = schedule.width * factor, schedule.height * factor
        pixels.append(np.asarray(ImageOps.fit(opaque, size, Image.Resampling.BICUBIC)))
    batch = {
        "codes": torch.tensor([sample["codes"][0] for sample in samples]),
        "image_grid_shw": torch.tensor([sample["image_grid_shw"][0] for sample in samples]),
        "pixel_values": torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1,
    }
    names = [name for name in TEXT_COLUMNS if name in samples[0]]
    return batch | {name: torch.tensor([sample[name] for sample in samples]) for name in names}


def load_samples(codes: str, pictures: Dataset, text_embeds: str | None) -> Dataset:
    """Coded samples with one picture, each with its `row` in the source and what stands for its caption."""
    samples, places = load_coded_dataset(codes), {name: row for row, name in enumerate(pictures["id"])}
    samples = samples.add_column("row", [places[name] for name in samples["id"]])
    kept = [index for index, images in enumerate(samples["codes"]) if len(images) == 1]
    if not kept:
        raise ValueError(f'"{codes}" has no row with one picture.')
    samples = samples.select(kept)
    texts = load_from_disk(text_embeds) if text_embeds else None
    if texts is not None:
        places = {str(name): row for row, name in enumerate(texts["id"])}
        if missing := [name for name in samples["id"] if name not in places]:
            raise ValueError(f'"{text_embeds}" has no row for {len(missing)} samples, first of all {missing[0]}.')
        texts = texts.select([places[name] for name in samples["id"]])
    samples = samples.select_columns(["codes", "image_grid_shw", "image_tokenizer_hash", "row"])
    for name in TEXT_COLUMNS if texts is not None else ():
        if name in texts.column_names:
            samples = samples.add_column(name, texts[name])
    return samples


def load_parts(parts: Parts, image_tokenizer: NextFlowImageTokenizer) -> tuple[NextFlowDiffusionDecoder, Any, Any]:
    """The decoder in float32, its scheduler and its autoencoder (None for pixels)."""
    if (parts.decoder is None) == (parts.backbone is None):
        raise ValueError("Give either `--backbone`, a denoiser to start from, or `--decoder`, to go on from one.")
    if parts.decoder is not None:
        pipe = NextFlowDecodePipeline.from_pretrained(parts.decoder, dtype=torch.float32)
        return pipe.diffusion_decoder, pipe.scheduler, pipe.vae
    if parts.backbone.endswith(".json"):
        config = json.loads(Path(parts.backbone).read_text(encoding="utf-8"))
        backbone = getattr(diffusers, parts.backbone_class).from_config(config)
    else:
        backbone = diffusers.AutoModel.from_pretrained(parts.backbone, torch_dtype=torch.float32)
    vae = diffusers.AutoModel.from_pretrained(parts.vae, torch_dtype=torch.float32) if parts.vae else None
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
    if parts.scheduler:
        settings = json.loads(Path(parts.scheduler, "scheduler_config.json").read_text(encoding="utf-8"))
        scheduler = getattr(diffusers, settings["_class_name"]).from_config(settings)
    config = {"condition_dim": parts.condition_dim, "num_inference_steps": parts.num_inference_steps}
    config["prediction_type"] = getattr(scheduler.config, "prediction_type", "flow_prediction")
    config["uses_text"] = parts.text_embeds is not None
    if parts.patch_size is not None:
        config["patch_size"] = parts.patch_size
    return NextFlowDiffusionDecoder.from_backbone(backbone, image_tokenizer, vae, **config), scheduler, vae


def main(arguments: list[str] | None = None) -> NextFlowDiffusionDecoderTrainer:
    parts, settings = TrlParser(
        (Parts, NextFlowDiffusionDecoderTrainingConfig), allow_abbrev=False
    ).parse_args_and_config(arguments)
    pictures, checkpoint = read_extraction(parts.codes)
    folder = {"subfolder": "image_tokenizer"}
    image_tokenizer = NextFlowImageTokenizer.from_pretrained(checkpoint, dtype=torch.float32, **folder)
    torch.manual_seed(settings.seed)
    decoder, scheduler, vae = load_parts(parts, image_tokenizer)
    peft_config = None
    if parts.lora_r:
        from peft import LoraConfig

        peft_config = LoraConfig(r=parts.lora_r, lora_alpha=parts.lora_r, target_modules=parts.lora_target_modules)
    samples = load_samples(parts.codes, pictures, parts.text_embeds)
    number = len(samples) - parts.num_eval_samples
    trainer = NextFlowDiffusionDecoderTrainer(
        decoder,
        settings,
        image_tokenizer=image_tokenizer,
        scheduler=scheduler,
        vae=vae,
        peft_config=peft_config,
        train_dataset=samples.select(range(number)),
        eval_dataset=samples.select(range(number, len(samples))) if parts.num_eval_samples else None,
        data_collator=partial(collate, pictures=pictures, factor=max(settings.scale_factors)),
    )
    trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
