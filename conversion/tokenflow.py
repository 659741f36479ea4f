"""Makes a NextFlow image tokenizer of a public TokenFlow tokenizer (arXiv 2412.03069): same codes, same pictures.

    python conversion/tokenflow.py --source tokenflow_clipb_32k_enhanced.pt --output image_tokenizer
    python conversion/tokenflow.py --source tokenflow_clipb_32k_enhanced.pt --t2i TokenFlow-t2i --output tokenflow-t2i

The second one makes the whole text-to-image model, `TokenFlowForCausalLM` with this image tokenizer.

All three of TokenFlow's layouts are known, each with the normal and the enhanced pixel decoder: clipb_224 (images of
224 or 256 pixels), vitamin_xlarge_256 (needs timm) and siglip_384. Layout and decoder are read off the weights.

The published files are pickles. They are opened with torch's safe reader (`weights_only=True`), which loads tensors
and plain values and refuses everything else; a safetensors file is taken as well. Weights are copied bit for bit, a
block at a time, and a killed run goes on where it stopped when it is started again.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int

from transformers_nextflow import NextFlowImageTokenizer, NextFlowImageTokenizerConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from conversion.command import make_parser, one_line_errors, report
from conversion.streaming import (
    KeyTable,
    PlannedTensor,
    StoredTensor,
    map_keys,
    new_checkpoint,
    plan_tensors,
    read_checkpoint,
    read_header,
    read_pickle,
    refuse_to_overwrite,
)

BEIT, CLIP = "semantic_decoder.transformer", "semantic_encoder.encoder.layers.{n}"
TOKENFLOW_KEYS: KeyTable = {
    "quantize.embedding_vqkd.weight": "quantizer.semantic_codebook.weight",
    "quantize.embedding_vqgan.weight": "quantizer.pixel_codebook.weight",
    "quantize.codebook_used": None,
    "scaling_layer.{part}": None,
    "quant_conv.{part}": "pixel_proj.{part}",
    "post_quant_conv.{part}": "post_pixel_proj.{part}",
    "encode_task_layer.{part}": "semantic_proj.{part}",
    "decode_task_layer.{part}": "semantic_decoder.proj_out.{part}",
    "encoder.{encoder_block}.nin_shortcut.{part}": "pixel_encoder.blocks.{encoder_block}.shortcut.{part}",
    "encoder.{encoder_block}.{qkv}.{part}": "pixel_encoder.blocks.{encoder_block}.{qkv}_proj.{part}",
    "encoder.{encoder_block}.proj_out.{part}": "pixel_encoder.blocks.{encoder_block}.out_proj.{part}",
    "encoder.{encoder_block}.{part}": "pixel_encoder.blocks.{encoder_block}.{part}",
    "encoder.{part}": "pixel_encoder.{part}",
    "decoder.{decoder_block}.nin_shortcut.{part}": "pixel_decoder.blocks.{decoder_block}.shortcut.{part}",
    "decoder.{decoder_block}.{qkv}.{part}": "pixel_decoder.blocks.{decoder_block}.{qkv}_proj.{part}",
    "decoder.{decoder_block}.proj_out.{part}": "pixel_decoder.blocks.{decoder_block}.out_proj.{part}",
    "decoder.{decoder_block}.{part}": "pixel_decoder.blocks.{decoder_block}.{part}",
    "decoder.{part}": "pixel_decoder.{part}",
    "decoder_vqkd.cls_token": f"{BEIT}.embeddings.cls_token",
    "decoder_vqkd.pos_embed": f"{BEIT}.embeddings.position_embeddings",
    "decoder_vqkd.patch_embed.proj.{part}": f"{BEIT}.embeddings.patch_embeddings.projection.{{part}}",
    "decoder_vqkd.blocks.{n}.attn.qkv.weight[{qkv}]": f"{BEIT}.layers.{{n}}.attention.{{qkv}}_proj.weight",
    "decoder_vqkd.blocks.{n}.attn.{qkv}_bias": f"{BEIT}.layers.{{n}}.attention.{{qkv}}_proj.bias",
    "decoder_vqkd.blocks.{n}.attn.proj.{part}": f"{BEIT}.layers.{{n}}.attention.o_proj.{{part}}",
    "decoder_vqkd.blocks.{n}.norm1.{part}": f"{BEIT}.layers.{{n}}.layernorm_before.{{part}}",
    "decoder_vqkd.blocks.{n}.norm2.{part}": f"{BEIT}.layers.{{n}}.layernorm_after.{{part}}",
    "decoder_vqkd.blocks.{n}.mlp.{part}": f"{BEIT}.layers.{{n}}.mlp.{{part}}",
    "decoder_vqkd.fc_norm.{part}": "semantic_decoder.norm_out.{part}",
    # clipb_224
    "encoder_vqkd.class_embedding": "semantic_encoder.embeddings.class_embedding",
    "encoder_vqkd.positional_embedding": "semantic_encoder.embeddings.position_embedding.weight",
    "encoder_vqkd.conv1.weight": "semantic_encoder.embeddings.patch_embedding.weight",
    "encoder_vqkd.ln_pre.{part}": "semantic_encoder.pre_layrnorm.{part}",
    "encoder_vqkd.transformer.resblocks.{n}.attn.in_proj_weight[{qkv}]": f"{CLIP}.self_attn.{{qkv}}_proj.weight",
    "encoder_vqkd.transformer.resblocks.{n}.attn.in_proj_bias[{qkv}]": f"{CLIP}.self_attn.{{qkv}}_proj.bias",
    "encoder_vqkd.transformer.resblocks.{n}.attn.out_proj.{part}": f"{CLIP}.self_attn.out_proj.{{part}}",
    "encoder_vqkd.transformer.resblocks.{n}.ln_1.{part}": f"{CLIP}.layer_norm1.{{part}}",
    "encoder_vqkd.transformer.resblocks.{n}.ln_2.{part}": f"{CLIP}.layer_norm2.{{part}}",
    "encoder_vqkd.transformer.resblocks.{n}.mlp.c_fc.{part}": f"{CLIP}.mlp.fc1.{{part}}",
    "encoder_vqkd.transformer.resblocks.{n}.mlp.c_proj.{part}": f"{CLIP}.mlp.fc2.{{part}}",
    "encoder_vqkd.ln_post.{part}": "semantic_encoder.post_layernorm.{part}",
    # siglip_384
    "encoder_vqkd.vision_model.{part}": "semantic_encoder.{part}",
    # vitamin_xlarge_256
    "encoder_vqkd.patch_embed.{part}": "semantic_encoder.timm_model.patch_embed.{part}",
    "encoder_vqkd.blocks.{part}": "semantic_encoder.timm_model.blocks.{part}",
}
# Fused projections, which the models here hold as three.
FUSED = (
    "encoder_vqkd.transformer.resblocks.{n}.attn.in_proj_weight",
    "encoder_vqkd.transformer.resblocks.{n}.attn.in_proj_bias",
    "decoder_vqkd.blocks.{n}.attn.qkv.weight",
)
ENTRIES = ("ema", "model", "state_dict")

# What the weights do not tell. The numbers are TokenFlow's.
LAYOUTS: dict[str, dict[str, Any]] = {
    "clipb_224": {
        "scale_sides": [1, 2, 4, 6, 8, 10, 12, 14, 16],  # 8 scales are 224 pixels, 9 are 256
        "num_scales": 9,
        "semantic_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 16,
            "hidden_act": "quick_gelu",
        },
        "vision_feature_layer": None,
        "semantic_feature_dim": 512,
        "semantic_decoder_grid_size": 14,
    },
    "vitamin_xlarge_256": {
        "scale_sides": [1, 2, 4, 6, 8, 10, 12, 14, 16],
        "num_scales": 9,
        "image_size": 256,
        "semantic_config": {
            "model_type": "timm_wrapper",
            "architecture": "vitamin_xlarge_256",
            "model_args": {"final_norm": False, "fc_norm": False, "dynamic_img_size": True},
            "hidden_size": 1152,
            "patch_size": 16,
        },
        "semantic_image_mean": [0.48145466, 0.4578275, 0.40821073],
        "semantic_image_std": [0.26862954, 0.26130258, 0.27577711],
        "vision_feature_layer": None,
        "semantic_decoder_grid_size": 16,
    },
    "siglip_384": {
        "scale_sides": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27],
        "num_scales": 15,
        "image_size": 384,
        "semantic_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
        "semantic_image_mean": [0.5, 0.5, 0.5],
        "semantic_image_std": [0.5, 0.5, 0.5],
        "vision_feature_layer": -2,
        "semantic_decoder_grid_size": 27,
    },
}
SIGNS = {  # a key that only this layout has
    "clipb_224": "encoder_vqkd.class_embedding",
    "vitamin_xlarge_256": "encoder_vqkd.patch_embed.backbone.stem.conv1.weight",
    "siglip_384": "encoder_vqkd.vision_model.embeddings.patch_embedding.weight",
}
# Settings that make a TokenFlow tokenizer the start of a NextFlow one: its weights on the paper's grids.
PAPER_SCHEDULES: dict[str, Any] = {"scale_sides": None, "image_size": None, "num_scales": 18}
ENHANCED_DECODER = {"decoder_hidden_sizes": [256, 256, 512, 512, 1024], "decoder_num_res_blocks": 4}
SIGN_OF_ENHANCED = "decoder.conv_blocks.0.res.4.conv1.weight"  # a level of the normal decoder has three blocks

MODEL_CARD = """---
library_name: transformers
tags: [nextflow, image-tokenizer, tokenflow]
---

# {name}

The image tokenizer TokenFlow ({layout}, arXiv 2412.03069) as a `NextFlowImageTokenizer`, made by
`conversion/tokenflow.py` of transformers-nextflow from *{source}*. The weights are the source's; its licence applies.
"""


def tokenflow_config(layout: str, enhanced: bool, **settings) -> NextFlowImageTokenizerConfig:
    """The configuration of a public layout; `settings` change fields of it.

    Raises:
        `ValueError`: for an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f'There is no layout "{layout}"; TokenFlow has {", ".join(LAYOUTS)}.')
    decoder = ENHANCED_DECODER if enhanced else {}
    return NextFlowImageTokenizerConfig(**{**LAYOUTS[layout], **decoder, **settings})


def read_tokenflow(source: Path) -> dict[str, StoredTensor]:
    """The tensors of a published file, or of a folder with safetensors.

    Raises:
        `ValueError`: if there are none, or if the file is damaged or unsafe.
    """
    if source.is_dir():
        return read_checkpoint(source)
    if not source.is_file():
        raise ValueError(f'There is no file "{source}".')
    return read_header(source) if source.suffix == ".safetensors" else read_pickle(source, ENTRIES)


def find_layout(names: Sequence[str], where: str) -> str:
    """The layout that keys belong to.

    Raises:
        `ValueError`: if they belong to none.
    """
    for layout, sign in SIGNS.items():
        if sign in names:
            return layout
    signs = ", ".join(f'"{sign}" ({layout})' for layout, sign in SIGNS.items())
    raise ValueError(f'"{where}" is not a TokenFlow tokenizer: expected one of {signs}, but found none of them.')


def block_places(config: NextFlowImageTokenizerConfig) -> dict[str, dict[str, str]]:
    """TokenFlow's names of the CNNs' blocks -> our numbers, which count them in the order of computation."""
    lowest = len(config.encoder_hidden_sizes) - 1
    middle = [f"mid.{n}" for n in range(3)]
    encoder, decoder = [], list(middle)
    for level in range(lowest + 1):
        encoder += _level(level, config.encoder_num_res_blocks, level == lowest)
        encoder += [f"conv_blocks.{level}.downsample"] if level < lowest else []
        decoder += _level(level, config.decoder_num_res_blocks + 1, level == 0)  # the decoder's begin with the lowest
        decoder += [f"conv_blocks.{level}.upsample"] if level < lowest else []
    numbered = {"encoder_block": encoder + middle, "decoder_block": decoder}
    return {field: {name: str(number) for number, name in enumerate(names)} for field, names in numbered.items()}


def _level(level: int, num_res_blocks: int, has_attention: bool) -> list[str]:
    kinds = ("res", "attn") if has_attention else ("res",)
    return [f"conv_blocks.{level}.{kind}.{n}" for n in range(num_res_blocks) for kind in kinds]


def split_fused(source: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The source with every fused projection as three tensors, `name[q]`, `name[k]` and `name[v]`."""
    fused = map_keys(source, {**{name: name for name in FUSED}, "{part}": None}, "")
    split: dict[str, StoredTensor] = {}
    for name, tensor in source.items():
        if name in fused:
            split |= {f"{name}[{part}]": third for part, third in zip("qkv", tensor.thirds(), strict=True)}
        else:
            split[name] = tensor
    return split


def plan_image_tokenizer(
    source: dict[str, StoredTensor],
    config: NextFlowImageTokenizerConfig,
    dtype: torch.dtype | None = None,
    where: str = "the source",
) -> list[PlannedTensor]:
    """Every tensor of the image tokenizer, in the model's order.

    Raises:
        `ValueError`: if a key is missing, unknown or of another shape.
    """
    tensors = split_fused(source)
    names = map_keys(tensors, TOKENFLOW_KEYS, where, block_places(config))
    kept = {ours: tensors[theirs] for theirs, ours in names.items()}
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in NextFlowImageTokenizer(config).state_dict().items()}
    plan = plan_tensors(expected, kept, {}, where, dtype)
    # Nearest codes are looked up in float32; a change of dtype must not move the codebooks.
    return [replace(t, dtype=kept[t.name].dtype) if t.name.startswith("quantizer.") else t for t in plan]


def convert_tokenflow(
    source: str | Path,
    output: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    **settings,
) -> Path:
    """A public TokenFlow tokenizer to a folder that `NextFlowImageTokenizer.from_pretrained` loads.

    Args:
        source (path): The published `.pt` file, its weights as `.safetensors`, or a folder with such files.
        output (path): The new folder; it must not be there. Until all is done the work is in `<output>.partial`.
        dtype (`torch.dtype`, *optional*): Of all but the codebooks; the source's own by default.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Of one file.
        settings: Fields of [`NextFlowImageTokenizerConfig`] in which the source differs from its layout.

    Returns:
        `Path`: `output`.

    Raises:
        `ValueError`: if anything is missing, too much or of another shape; `output` stays as it was.
        `ImportError`: for vitamin_xlarge_256 without timm.
    """
    source, output = Path(source), Path(output)
    refuse_to_overwrite(output)
    tensors = read_tokenflow(source)
    layout = find_layout(list(tensors), str(source))
    config = tokenflow_config(layout, enhanced=SIGN_OF_ENHANCED in tensors, **settings)
    config.architectures = [NextFlowImageTokenizer.__name__]
    plan = plan_image_tokenizer(tensors, config, dtype, str(source))
    config.dtype = plan[0].dtype
    card = MODEL_CARD.format(name=output.name, layout=layout, source=source.name)
    files = {tensor.file for tensor in tensors.values()}
    with new_checkpoint(output, plan, files, convert_file_size_to_int(max_shard_size)) as partial:
        config.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return output


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, "published .pt file, or its weights as .safetensors")
    parser.add_argument(
        "--paper-schedules", action="store_true", help="NextFlow's grids and aspects instead of TokenFlow's squares"
    )
    parser.add_argument("--t2i", type=Path, help="folder of TokenFlow-t2i: make the text-to-image model")
    options = parser.parse_args(arguments)
    if options.t2i and options.paper_schedules:
        parser.error("--t2i draws on TokenFlow's own grids: leave --paper-schedules out")
    settings = PAPER_SCHEDULES if options.paper_schedules else {}
    common = (options.dtype, options.max_shard_size)
    with one_line_errors(parser):
        if options.t2i:
            from conversion.tokenflow_t2i import convert_t2i

            convert_t2i(options.t2i, options.output, options.source, *common)
        else:
            convert_tokenflow(options.source, options.output, *common, **settings)
        report(options)


if __name__ == "__main__":
    main()
