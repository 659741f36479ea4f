"""The image tokenizer's script: pictures as data sets have them, teachers as the Hub has them."""

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, Siglip2VisionConfig, Siglip2VisionModel

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from train_image_tokenizer import load_pictures, load_teacher

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_pictures_of_tars(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    colours = [(255, 0, 0), (0, 0, 255)]
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for index, colour in enumerate(colours):
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), colour).save(buffer, "png")
            for end, content in (("png", buffer.getvalue()), ("txt", b"a picture")):
                info = tarfile.TarInfo(f"{index}.{end}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    pictures = load_pictures(str(tmp_path))
    assert pictures.column_names == ["image"]
    assert [tuple(np.asarray(row["image"])[0, 0]) for row in pictures] == colours


@pytest.mark.parametrize("family", ["clip", "siglip2"])
def test_teachers_give_features_on_the_last_grid(family, tmp_path):
    """CLIP's are those that it compares with texts, of which TokenFlow's semantic codes were made."""
    if family == "clip":
        text = {**VISION, "vocab_size": 16, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 1}
        vision = {**VISION, "patch_size": 16, "image_size": 32}
        model, channels = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)), 20
    else:
        config = Siglip2VisionConfig(**VISION, patch_size=16, num_patches=4, vision_use_head=False)
        model, channels = Siglip2VisionModel(config), 32
    model.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    features = teacher(pixels)
    assert features.shape == (2, channels, 2, 2) and not features.requires_grad
    if family == "clip":
        states = model.vision_model(pixels).last_hidden_state[:, 1:]
        expected = model.visual_projection(model.vision_model.post_layernorm(states))
        torch.testing.assert_close(features.flatten(2).transpose(1, 2), expected)
