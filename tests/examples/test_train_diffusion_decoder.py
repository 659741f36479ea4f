"""The script that trains a diffusion decoder: from pictures to codes, both stages, and what they wrote draws."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("trl")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import extract_codes
import train_diffusion_decoder
from diffusers_nextflow import NextFlowDecodePipeline
from diffusion_parts import build_backbone

CPU = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--max_steps", "2", "--num_logged_images", "1"]


@pytest.fixture
def codes(tiny_random_checkpoint, tmp_path):
    """Codes of five pictures."""
    (tmp_path / "pictures").mkdir()
    lines = []
    for index in range(5):
        pixels = np.random.default_rng(index).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((200, 180)).save(tmp_path / "pictures" / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": "noise"}))
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    words = ["--data", str(tmp_path / "pictures"), "--checkpoint", str(tiny_random_checkpoint), "--no-self-correction"]
    extract_codes.main([*words, "--output", str(tmp_path / "codes")])
    return str(tmp_path / "codes")


def test_both_stages(codes, tmp_path):
    build_backbone("UNet2DModel").save_config(tmp_path / "unet")
    (tmp_path / "unet.json").write_text((tmp_path / "unet" / "config.json").read_text())
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    common = ["--codes", codes, "--per_device_train_batch_size", "2", *CPU]
    new = ["--backbone", str(tmp_path / "unet.json"), "--patch_size", "4", "--condition_dim", "8"]
    trainer = train_diffusion_decoder.main([*common, *new, "--num_eval_samples", "1", "--output_dir", first])
    assert len(trainer.train_dataset) == 4 and len(trainer.eval_dataset) == 1
    # The pictures are those that the codes were made of.
    batch = trainer.data_collator([trainer.train_dataset[1]])
    encoded = trainer.image_tokenizer.encode(batch["pixel_values"], batch["image_grid_shw"])
    assert (encoded.codes == batch["codes"]).float().mean() > 0.9
    words = ["--decoder", first, "--scale_factors", "1", "2", "--output_dir", second]
    assert train_diffusion_decoder.main([*common, *words]).state.global_step == 2
    pipe = NextFlowDecodePipeline.from_pretrained(second)
    pipe.set_progress_bar_config(disable=True)
    size = np.array(trainer.data_collator([trainer.train_dataset[0]])["pixel_values"].shape[-2:])
    images = pipe(
        batch["codes"], batch["image_grid_shw"], num_inference_steps=1, scale_factor=2, output_type="pt"
    ).images
    assert tuple(images.shape[-2:]) == tuple(2 * size) and images.isfinite().all()
    with pytest.raises(ValueError, match=r"Give either `--backbone`, .* or `--decoder`"):
        train_diffusion_decoder.main([*common, *words, "--backbone", "x"])


def test_captions_are_joined_by_id(codes, tmp_path):
    from datasets import Dataset

    rows = [
        {"id": str(index), "prompt_embeds": [[float(index)] * 3], "pooled_prompt_embeds": [0.0]} for index in range(5)
    ]
    Dataset.from_list(rows[::-1]).save_to_disk(tmp_path / "texts")
    extraction, _ = train_diffusion_decoder.read_extraction(codes)
    samples = train_diffusion_decoder.load_samples(codes, extraction, str(tmp_path / "texts"))
    assert [sample["prompt_embeds"][0][0] for sample in samples] == [sample["row"] for sample in samples]
    batch = train_diffusion_decoder.collate([samples[2], samples[3]], extraction, 1)
    assert batch["prompt_embeds"].shape == (2, 1, 3) and batch["pooled_prompt_embeds"].dtype == torch.float32
    Dataset.from_list(rows[:2]).save_to_disk(tmp_path / "few")
    with pytest.raises(ValueError, match="has no row for 3 samples"):
        train_diffusion_decoder.load_samples(codes, extraction, str(tmp_path / "few"))
