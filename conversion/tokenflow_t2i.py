"""Makes a [`TokenFlowForCausalLM`] folder of TokenFlow-t2i; run it as `conversion/tokenflow.py --t2i`."""

import json
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from torch import nn
from transformers import LlamaTokenizer

from transformers_nextflow import (
    NextFlowGenerationConfig,
    NextFlowImageProcessor,
    NextFlowImageTokenizer,
    TokenFlowConfig,
    TokenFlowForCausalLM,
    TokenFlowProcessor,
    hash_image_tokenizer,
)
from transformers_nextflow.pipeline_index import write_pipeline_index
from transformers_nextflow.processing_nextflow import IMAGE_TOKENIZER_FOLDER

sys.path.insert(0, str(Path(__file__).parents[1]))
from conversion.streaming import (
    KeyTable,
    PlannedTensor,
    StoredTensor,
    check_shape,
    map_keys,
    new_checkpoint,
    plan_tensor,
    plan_tensors,
    read_checkpoint,
    read_json,
    refuse_to_overwrite,
)
from conversion.tokenflow import convert_tokenflow, find_layout, read_tokenflow, tokenflow_config

LEVELS = "model.lvl_embed.weight"
T2I_KEYS: KeyTable = {
    "model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.{n}.self_attn.qknorm.query_norm.weight": "model.layers.{n}.self_attn.q_norm.weight",
    "model.layers.{n}.self_attn.qknorm.key_norm.weight": "model.layers.{n}.self_attn.k_norm.weight",
    "model.layers.{n}.self_attn.rotary_emb.inv_freq": None,
    "model.layers.{n}.{part}": "model.layers.{n}.{part}",
    "model.norm.weight": "model.norm.weight",
    "model.mm_projector.{n}.{part}": "model.connector.{n}.{part}",
    LEVELS: "model.scale_embedding.weight",
    "model.pos_1LC": "model.position_embedding.weight",
    "model.vision_tower.{part}": None,
    "model.image_token_start": None,
    "model.image_token_end": None,
    "image_token_start": None,
    "image_token_end": None,
    "lm_head.weight": "lm_head.weight",
}
EMBEDDING, SCALES, CODEBOOK = (
    f"model.{name}.weight" for name in ("embed_tokens", "scale_embedding", "visual_codebook")
)
SOURCE_TYPE = "llava_llama"
TEXT_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
)
MAX_TEXT_TOKENS = 128
# TokenFlow's own settings: guidance 1 + 7.5 at the last scale, and top-k and top-p for 1, 2 and 3 passes.
DRAWING: dict[str, Any] = {
    "guidance_scale": 8.5,
    "guidance_schedule": "linear",
    "pass_candidates": [[[600, 0.6]], [[1200, 0.8], [1, 1.0]], [[1200, 0.8], [100, 0.8], [1, 1.0]]],
}
NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)

MODEL_CARD = """---
library_name: transformers
pipeline_tag: text-to-image
tags: [tokenflow, nextflow, autoregressive, next-scale-prediction]
---

# {name}

TokenFlow-t2i (arXiv 2412.03069) as a `TokenFlowForCausalLM`, made by `conversion/tokenflow.py --t2i` of
transformers-nextflow from *{source}* and the image tokenizer *{image_tokenizer}*. The weights are the sources'; their
licences apply, Llama 2's among them, which the language model was made of.
"""


def t2i_config(source: dict[str, Any], where: str, **visual) -> TokenFlowConfig:
    """Our configuration, of the source's `config.json`; `visual` are fields that it does not tell.

    Raises:
        `ValueError`: if it is another model's.
    """
    if (model_type := source.get("model_type")) != SOURCE_TYPE:
        raise ValueError(
            f'"{where}" states the model type "{model_type}"; expected "{SOURCE_TYPE}", which TokenFlow-t2i has. '
            "(TokenFlow's i2t models read pictures, they can't draw.)"
        )
    fields = {name: source[name] for name in TEXT_FIELDS if source.get(name) is not None}
    rope = {"rope_type": "default", "rope_theta": source.get("rope_theta") or 10000.0}
    return TokenFlowConfig(**fields, rope_parameters=source.get("rope_parameters") or rope, **visual)


def t2i_tokenizer(folder: Path) -> LlamaTokenizer:
    """Llama's tokenizer in the folder of a checkpoint, with `[PAD]` behind its own tokens and none of the codes'.

    Its `<unk>` becomes the mark `<image>`: bytes stand for what Llama has no token for, so no text holds it.

    Raises:
        `ValueError`: if there is none that loads.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(
            f'"{folder}" has no tokenizer: neither tokenizer.json nor tokenizer.model is there. TokenFlow-t2i comes '
            "with Llama 2's; put one of these files beside the weights."
        )
    try:
        model = json.loads(LlamaTokenizer.from_pretrained(folder).backend_tokenizer.to_str())["model"]
    except Exception as error:  # the tokenizers library raises just that
        raise ValueError(
            f'"{folder}" has no tokenizer that loads ({error}). Put Llama 2\'s tokenizer.json beside the weights, or '
            "its tokenizer.model, which takes `pip install sentencepiece`."
        ) from error
    vocab, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    mark = next(token for token, number in vocab.items() if number == 0)
    return LlamaTokenizer(
        vocab={"<image>" if token == mark else token: number for token, number in vocab.items()},
        merges=merges,
        unk_token="<image>",
        pad_token="[PAD]",
        add_bos_token=True,
        padding_side="left",
        model_max_length=MAX_TEXT_TOKENS,
    )


def plan_t2i(
    source: dict[str, StoredTensor],
    config: TokenFlowConfig,
    codebook: torch.Tensor,
    dtype: torch.dtype | None = None,
    where: str = "the source",
) -> list[PlannedTensor]:
    """Every tensor of the model, in its order. Rows that are never read are left out: those of codes in the input
    embeddings, and that of scale 1 in the embeddings of scales.

    Raises:
        `ValueError`: if a key is missing, unknown or of another shape.
    """
    kept = {ours: source[theirs] for theirs, ours in map_keys(source, T2I_KEYS, where).items()}
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in TokenFlowForCausalLM(config).state_dict().items()}
    made: dict[str, PlannedTensor] = {}
    for name, number in ((EMBEDDING, config.vocab_size), (SCALES, config.num_scales + 1)):
        if (tensor := kept.pop(name, None)) is not None:
            check_shape(tensor, (number, config.hidden_size))
            rows = range(1, 2) if name == SCALES else range(config.text_vocab_size, number)
            made[name] = PlannedTensor(name, expected[name], dtype or tensor.dtype, _without(tensor, rows))
            made.setdefault(CODEBOOK, plan_tensor(CODEBOOK, codebook, dtype or tensor.dtype))
    return plan_tensors(expected, kept, made, where, dtype)


def _without(tensor: StoredTensor, rows: range) -> Any:
    """Blocks of a tensor without some of its rows."""

    def blocks() -> Iterator[torch.Tensor]:
        start, width = 0, prod(tensor.shape[1:])
        for block in tensor.blocks():
            part = block.view(-1, width)
            before, after = (max(0, place - start) for place in (rows.start, rows.stop))
            yield part[:before]
            yield part[after:]
            start += len(part)

    return blocks


def read_codebook(tensors: dict[str, StoredTensor], settings: dict[str, Any]) -> NextFlowImageTokenizer:
    """An image tokenizer that has its codebooks alone."""
    with torch.device("meta"):
        images = NextFlowImageTokenizer(tokenflow_config(find_layout(list(tensors), "the source"), True, **settings))
    for name, module in (("vqkd", images.quantizer.semantic_codebook), ("vqgan", images.quantizer.pixel_codebook)):
        if (stored := tensors.get(f"quantize.embedding_{name}.weight")) is None:
            raise ValueError(f'The image tokenizer lacks "quantize.embedding_{name}.weight".')
        if stored.shape[0] != (number := images.config.codebook_size):
            raise ValueError(
                f'The codebook in "{stored.file}" has {stored.shape[0]} codes, but {number} are expected '
                "(`codebook_size`). Take tokenflow_clipb_32k_enhanced.pt, with its 32,768, or give the right number."
            )
        check_shape(stored, tuple(module.weight.shape))
        table = torch.cat(list(stored.blocks())).view(stored.shape).float()
        module.weight = nn.Parameter(table, requires_grad=False)
    return images


def convert_t2i(
    source: str | Path,
    output: str | Path,
    image_tokenizer: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    **settings,
) -> Path:
    """TokenFlow-t2i to a folder that `TokenFlowForCausalLM`, `TokenFlowProcessor` and the pipelines load.

    Args:
        source (path): The published folder: `config.json`, the safetensors shards with their index, the tokenizer.
        output (path): The new folder; it must not be there. Until all is done the work is in `<output>.partial`.
        image_tokenizer (path): `tokenflow_clipb_32k_enhanced.pt`.
        dtype (`torch.dtype`, *optional*): Of all but the image tokenizer's codebooks; the sources' own by default.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Of one file.
        settings: Fields of [`NextFlowImageTokenizerConfig`] in which the image tokenizer differs from its layout.

    Returns:
        `Path`: `output`.

    Raises:
        `ValueError`: if anything is missing, too much or of another shape; `output` stays as it was.
    """
    source, output, image_tokenizer = Path(source), Path(output), Path(image_tokenizer)
    refuse_to_overwrite(output)
    stated, weights, tensors = (
        read_json(source / "config.json"),
        read_checkpoint(source),
        read_tokenflow(image_tokenizer),
    )
    if (levels := weights.get(LEVELS)) is None:
        raise ValueError(
            f'"{source}" is not TokenFlow-t2i: it has no "{LEVELS}". (TokenFlow\'s i2t models read pictures, they '
            "can't draw.)"
        )
    images = read_codebook(tensors, settings)
    if (head := weights.get("lm_head.weight")) is None:
        raise ValueError(f'"{source}" lacks "lm_head.weight".')
    tokenizer = t2i_tokenizer(source)
    num_text, num_codes, num_scales = tokenizer.pad_token_id + 1, images.config.codebook_size, images.config.num_scales
    for kind, own, given in (
        ("codes", head.shape[0] - num_text, num_codes),
        ("scales", levels.shape[0] - 1, num_scales),
    ):
        if own != given:
            raise ValueError(
                f'The weights in "{source}" are for {own} {kind}, but the image tokenizer "{image_tokenizer}" has '
                f"{given}. Take tokenflow_clipb_32k_enhanced.pt as it is. (Codes are what the {num_text} tokens of the "
                f"text tokenizer with [PAD] leave of the head's {head.shape[0]} rows: was that tokenizer exchanged?)"
            )
    start_ids, end_ids = tokenizer(["<img>", "</img>"], add_special_tokens=False).input_ids
    config = t2i_config(
        stated,
        str(source / "config.json"),
        vocab_size=head.shape[0],
        text_vocab_size=num_text,
        visual_codebook_size=num_codes,
        visual_code_dim=images.config.code_dim,
        scale_sides=list(images.config.sides[:num_scales]),
        image_start_ids=start_ids,
        image_end_ids=end_ids,
        image_token_id=tokenizer.unk_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_text_tokens=MAX_TEXT_TOKENS,
        image_tokenizer_hash=hash_image_tokenizer(images),
        architectures=[TokenFlowForCausalLM.__name__],
    )
    plan = plan_t2i(weights, config, images.quantizer.codebook(), dtype, str(source))
    config.dtype = next(tensor.dtype for tensor in plan if tensor.name == EMBEDDING)
    generation_config = NextFlowGenerationConfig(
        generation_mode="image",
        negative_ids=tokenizer(NEGATIVE_PROMPT, truncation=True).input_ids,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **DRAWING,
    )
    image_processor = NextFlowImageProcessor(num_scales=config.num_scales)
    processor = TokenFlowProcessor(image_processor, tokenizer, visual_token_offset=num_text)
    card = MODEL_CARD.format(name=output.name, source=source.name, image_tokenizer=image_tokenizer.name)
    files = {tensor.file for tensor in [*weights.values(), *tensors.values()]} | {source / "config.json"}
    with new_checkpoint(output, plan, files, convert_file_size_to_int(max_shard_size)) as partial:
        config.save_pretrained(partial)
        generation_config.save_pretrained(partial)
        processor.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        convert_tokenflow(image_tokenizer, partial / IMAGE_TOKENIZER_FOLDER, dtype, max_shard_size, **settings)
        write_pipeline_index(partial)
    return output
