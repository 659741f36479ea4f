"""A tiny TokenFlow-t2i as its authors publish it: golden weights in shards, image tokenizer, Llama's tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
IMAGES = GOLDEN / "tokenflow_full" / "clipb_tiny_enhanced.state_dict.safetensors"
# As SMALL in tests/conversion/test_tokenflow.py, at the four scales that the golden model draws.
IMAGE_SETTINGS: dict[str, Any] = dict(
    codebook_size=64,
    semantic_code_dim=8,
    pixel_code_dim=4,
    latent_channels=32,
    encoder_hidden_sizes=[32, 32, 32, 32, 64],
    encoder_num_res_blocks=1,
    decoder_hidden_sizes=[64, 64, 64, 64, 128],
    decoder_num_res_blocks=2,
    scale_sides=[1, 2, 3, 4],
    num_scales=4,
    semantic_decoder_layers=2,
    semantic_decoder_num_heads=4,
    semantic_decoder_intermediate_size=64,
    semantic_feature_dim=24,
    semantic_decoder_grid_size=4,
    semantic_config={
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 16,
        "hidden_act": "quick_gelu",
    },
)
CONFIG = {
    "model_type": "llava_llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 97,
}
# "<img>" is 5, 6, 7 and "</img>" is 9, 10, as in the golden file.
TOKENS = ["<unk>", "<s>", "</s>", "▁", "<", "▁<", "img", ">", "a", "▁</i", "mg>", "i", "m", "g", "/", "im", "/i"]
TOKENS += ["b", "mg", *"cdefhlnorstu", "▁a"]
MERGES = [("/", "i"), ("i", "m"), ("im", "g"), ("▁", "<"), ("▁<", "/i"), ("m", "g"), ("mg", ">"), ("▁", "a")]


def golden() -> dict[str, torch.Tensor]:
    """All tensors of the golden model: weights (`sd.*`), a forward pass (`tf.*`), pictures (`gen1.*` to `gen3.*`)."""
    names = ("generation", "features", "t2i")
    return {k: v for name in names for k, v in load_file(GOLDEN / "tokenflow_t2i" / f"{name}.safetensors").items()}


def save_source(folder: Path) -> Path:
    """The published folder, in three shards."""
    from transformers import LlamaTokenizer

    weights = {name[3:]: tensor for name, tensor in golden().items() if name.startswith("sd.")}
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for shard in range(3):
        file = f"model-{shard + 1:05d}-of-00003.safetensors"
        names = sorted(weights)[shard::3]
        own = {name: weights[name] for name in names}
        if shard == 0:
            own["image_token_start"] = torch.tensor([5, 6, 7])
        save_file(own, folder / file)
        weight_map |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    vocab = {token: number for number, token in enumerate(TOKENS)}
    LlamaTokenizer(vocab=vocab, merges=MERGES, unk_token="<unk>").save_pretrained(folder)
    return folder


def save_checkpoint(folder: Path) -> Path:
    """The converted model."""
    from conversion.tokenflow_t2i import convert_t2i

    return convert_t2i(save_source(folder / "source"), folder / "tokenflow", IMAGES, **IMAGE_SETTINGS)
