"""Makes a NextFlow checkpoint of Qwen2.5-VL's or Qwen2.5's weights, the start of the paper's training, and back.

    python conversion/qwen2_5.py --source Qwen2.5-VL-7B-Instruct --image-tokenizer TOKENIZER --output nextflow-7b
    python conversion/qwen2_5.py --source nextflow-7b --output qwen --back

Text weights are kept bit for bit, and text comes out as the source model writes it. The vision tower is dropped; the
visual features and the visual rows of the head are new and must be trained ("alignment" comes first). Weights are
streamed: memory stays far below one shard, and a killed run goes on where it stopped when it is started again.

What is new: the table of visual codes is the image tokenizer's codebook. Every visual row of the head is the mean of
the text rows: a visual id then starts as likely as an average text id, so the text distribution hardly changes, while
random rows of a larger norm would win against it. The connector and the embedding of scales start as in a fresh model.
"""

import sys
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import torch
from accelerate.utils import convert_file_size_to_int
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase, Qwen2Config

from transformers_nextflow import (
    NextFlowConfig,
    NextFlowForCausalLM,
    NextFlowImageProcessor,
    NextFlowImageTokenizer,
    NextFlowImageTokenizerConfig,
    NextFlowProcessor,
    hash_image_tokenizer,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from conversion.command import make_parser, one_line_errors, report
from conversion.qwen_tokenizer import load_text_tokenizer
from conversion.streaming import (
    KeyTable,
    PlannedTensor,
    StoredTensor,
    check_shape,
    load_config,
    map_keys,
    new_checkpoint,
    plan_tensor,
    plan_tensors,
    read_checkpoint,
    read_json,
    refuse_to_overwrite,
)

QWEN_KEYS: KeyTable = {
    "model.language_model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.language_model.layers.{n}.{part}": "model.layers.{n}.{part}",
    "model.language_model.norm.weight": "model.norm.weight",
    "model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.{n}.{part}": "model.layers.{n}.{part}",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "model.visual.{part}": None,
    "visual.{part}": None,
}
NEXTFLOW_KEYS: KeyTable = {
    "model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.{n}.{part}": "model.layers.{n}.{part}",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "model.visual_codebook.weight": None,
    "model.connector.{n}.{part}": None,
    "model.scale_embedding.weight": None,
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SOURCE_TYPES = ("qwen2_5_vl", "qwen2")
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
    "attention_dropout",
)

MODEL_CARD = """---
library_name: transformers
pipeline_tag: any-to-any
tags: [nextflow, autoregressive, next-scale-prediction]
---

# {name}

A start for training NextFlow (arXiv 2601.02204), made by `conversion/qwen2_5.py` of transformers-nextflow from the
language model of *{source}* and the image tokenizer *{image_tokenizer}*. It writes text as its source does. It has not
learned to draw or to read pictures: its visual parts are new. The licences of both sources apply.
"""


def nextflow_config(
    text: PreTrainedConfig, image_tokenizer: PreTrainedConfig, num_scales: int | None = None, **token_ids
) -> NextFlowConfig:
    """The configuration of a converted model, from those of Qwen's text model and of the image tokenizer.

    Raises:
        `ValueError`: for sliding windows, and for more scales (`num_scales`) than the image tokenizer has.
    """
    if num_scales is not None and not 1 <= num_scales <= image_tokenizer.num_scales:
        raise ValueError(
            f"`num_scales` must be from 1 to {image_tokenizer.num_scales}, which the image tokenizer has, but got "
            f"{num_scales}."
        )
    if getattr(text, "use_sliding_window", False):
        raise ValueError("`use_sliding_window` is True in the source, but NextFlow attends to whole images.")
    rope = dict(text.rope_parameters)
    num_pairs = text.hidden_size // text.num_attention_heads // 2
    # Qwen2.5-VL's proportions (16, 24, 24 of 64). Text has equal positions on all three, so any split gives its RoPE.
    temporal, height = num_pairs // 4, (num_pairs - num_pairs // 4) // 2
    rope.setdefault("mrope_section", [temporal, height, num_pairs - temporal - height])
    return NextFlowConfig(
        **{name: getattr(text, name) for name in TEXT_FIELDS},
        rope_parameters={**rope, "rope_type": "default" if rope.get("rope_type") == "mrope" else rope["rope_type"]},
        vocab_size=text.vocab_size + image_tokenizer.codebook_size,
        text_vocab_size=text.vocab_size,
        visual_codebook_size=image_tokenizer.codebook_size,
        visual_code_dim=image_tokenizer.code_dim,
        num_scales=image_tokenizer.num_scales if num_scales is None else num_scales,
        **token_ids,
    )


def special_token_ids(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> dict[str, int | None]:
    """The configuration's ids of special tokens, for a vocabulary of `num_rows` rows."""
    if len(tokenizer) > num_rows:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens with <boi>, <eoi> and <image>, but the source's vocabulary has "
            f"{num_rows} rows. Take the tokenizer that belongs to the source."
        )
    visual = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("boi", "eoi", "image")}
    text = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {**visual, **text, "bos_token_id": None}


def expected_shapes(config: NextFlowConfig) -> dict[str, tuple[int, ...]]:
    """Every key of a NextFlow checkpoint and its shape."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in NextFlowForCausalLM(config).state_dict().items()}


def new_weights(config: NextFlowConfig, codebook: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a text model lacks, but for the head's rows: codebook, connector, embedding of scales."""
    with torch.device("meta"):
        model = NextFlowForCausalLM(config).model
    weights = {"model.visual_codebook.weight": codebook}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name in ("connector", "scale_embedding"):
            module = getattr(model, name).to_empty(device="cpu")
            for part in module.modules():
                model._init_weights(part)
            weights |= {f"model.{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    return weights


def plan_nextflow(
    source: dict[str, StoredTensor],
    config: NextFlowConfig,
    new: dict[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    where: str = "the source",
) -> list[PlannedTensor]:
    """Every tensor of the NextFlow checkpoint, in the model's order.

    Args:
        source (`dict[str, StoredTensor]`): Qwen's tensors, from `read_checkpoint`.
        config (`NextFlowConfig`): The new model's.
        new (`dict[str, torch.Tensor]`): From [`new_weights`].
        dtype (`torch.dtype`, *optional*): The source's own by default.
        where (`str`, *optional*): Names the source in errors.

    Raises:
        `ValueError`: if a key is missing, unknown or of another shape.
    """
    kept = {ours: source[theirs] for theirs, ours in map_keys(source, QWEN_KEYS, where).items()}
    expected = expected_shapes(config)
    if EMBEDDING in kept:
        kept.setdefault(HEAD, kept[EMBEDDING])  # tied: the small models have no head of their own
        dtype_of_new = dtype or kept[EMBEDDING].dtype
        made = {name: plan_tensor(name, tensor, dtype_of_new) for name, tensor in new.items()}
        head = kept.pop(HEAD)
        check_shape(head, (config.text_vocab_size, config.hidden_size))
        made[HEAD] = _plan_head(head, expected[HEAD], dtype or head.dtype)
    else:
        made = {}  # the embedding is named as missing
    return plan_tensors(expected, kept, made, where, dtype)


def plan_qwen(
    source: dict[str, StoredTensor], config: NextFlowConfig, dtype: torch.dtype | None = None, where: str = "the source"
) -> list[PlannedTensor]:
    """Every tensor of the Qwen2-style text model in a NextFlow checkpoint: what is visual is dropped."""
    expected = expected_shapes(config)
    kept = {ours: source[theirs] for theirs, ours in map_keys(source, NEXTFLOW_KEYS, where).items()}
    made = {}
    if head := kept.pop(HEAD, None):
        check_shape(head, expected[HEAD])
        shape = (config.text_vocab_size, config.hidden_size)
        made[HEAD] = PlannedTensor(HEAD, shape, dtype or head.dtype, lambda: _first(head.blocks(), prod(shape)))
    text = map_keys(list(expected), NEXTFLOW_KEYS, where)
    return plan_tensors({name: expected[name] for name in text}, kept, made, where, dtype)


def _plan_head(stored: StoredTensor, shape: tuple[int, ...], dtype: torch.dtype) -> PlannedTensor:
    """The text rows as they are, and below them their mean for every visual code."""
    num_text, width = stored.shape

    def blocks() -> Iterator[torch.Tensor]:
        total = torch.zeros(width, dtype=torch.float64)
        for block in stored.blocks():
            total += block.view(-1, width).sum(0, dtype=torch.float64)
            yield block
        mean = (total / num_text).to(dtype)
        rows = max(1, 2**22 // width)
        for start in range(num_text, shape[0], rows):
            yield mean.expand(min(rows, shape[0] - start), -1)

    return PlannedTensor(HEAD, shape, dtype, blocks)


def _first(blocks: Iterator[torch.Tensor], count: int) -> Iterator[torch.Tensor]:
    """The first `count` numbers of consecutive flat pieces."""
    for block in blocks:
        yield block[:count]
        count -= min(count, block.numel())
        if count == 0:
            return


def convert_to_nextflow(
    source: str | Path,
    output: str | Path,
    image_tokenizer: str | Path,
    text_tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    num_scales: int | None = None,
) -> Path:
    """Qwen2.5-VL or Qwen2.5 (a folder with safetensors) to a folder that `NextFlowForCausalLM` and the processor load.

    Args:
        source (path): The checkpoint.
        output (path): The new folder; it must not be there. Until all is done the work is in `<output>.partial`.
        image_tokenizer (path): A [`NextFlowImageTokenizer`] checkpoint; its codebook is the table of visual codes.
        text_tokenizer (path, *optional*): See `load_text_tokenizer`; the source's own by default.
        dtype (`torch.dtype`, *optional*): The source's own by default.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Of one file.
        num_scales (`int`, *optional*): The largest number of scales that it draws, the image tokenizer's by default.

    Returns:
        `Path`: `output`.

    Raises:
        `ValueError`: if anything is missing, too much or of another shape; `output` stays as it was.
    """
    source, output = Path(source), Path(output)
    refuse_to_overwrite(output)
    text_config, weights = load_config(source, SOURCE_TYPES).get_text_config(), read_checkpoint(source)
    tokenizer = load_text_tokenizer(text_tokenizer or source)
    load_config(Path(image_tokenizer), (NextFlowImageTokenizerConfig.model_type,))
    files = {tensor.file for tensor in [*weights.values(), *read_checkpoint(Path(image_tokenizer)).values()]}
    files |= {source / "config.json", Path(image_tokenizer) / "config.json"}
    images = NextFlowImageTokenizer.from_pretrained(image_tokenizer)
    token_ids = special_token_ids(tokenizer, text_config.vocab_size)
    config = nextflow_config(text_config, images.config, num_scales, **token_ids)
    new = new_weights(config, images.quantizer.codebook().detach().float())
    plan = plan_nextflow(weights, config, new, dtype, str(source))
    config.dtype = next(tensor.dtype for tensor in plan if tensor.name == EMBEDDING)
    config.architectures = [NextFlowForCausalLM.__name__]
    config.image_tokenizer_hash = hash_image_tokenizer(images)

    processor = NextFlowProcessor(
        image_processor=NextFlowImageProcessor(num_scales=config.num_scales),
        tokenizer=tokenizer,
        image_tokenizer=images,
        visual_token_offset=config.text_vocab_size,
    )
    generation_config = _generation_config(source, tokenizer)
    card = MODEL_CARD.format(name=output.name, source=source.name, image_tokenizer=Path(image_tokenizer).name)
    with new_checkpoint(output, plan, files, convert_file_size_to_int(max_shard_size)) as partial:
        config.save_pretrained(partial)
        generation_config.save_pretrained(partial)
        processor.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return output


def convert_to_qwen(
    source: str | Path, output: str | Path, dtype: torch.dtype | None = None, max_shard_size: int | str = "5GB"
) -> Path:
    """The text model in a NextFlow checkpoint as a `Qwen2ForCausalLM` folder, for tools that know text models only.

    The arguments are [`convert_to_nextflow`]'s.
    """
    source, output = Path(source), Path(output)
    refuse_to_overwrite(output)
    config, weights = load_config(source, (NextFlowConfig.model_type,)), read_checkpoint(source)
    plan = plan_qwen(weights, config, dtype, str(source))
    rope = {name: value for name, value in config.rope_parameters.items() if not name.startswith("mrope_")}
    text_config = Qwen2Config(
        **{name: getattr(config, name) for name in TEXT_FIELDS},
        rope_parameters=rope,
        vocab_size=config.text_vocab_size,
        tie_word_embeddings=False,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        architectures=["Qwen2ForCausalLM"],
    )
    text_config.dtype = plan[0].dtype
    tokenizer = load_text_tokenizer(source)
    generation_config = _generation_config(source, tokenizer)
    files = {tensor.file for tensor in weights.values()} | {source / "config.json"}
    with new_checkpoint(output, plan, files, convert_file_size_to_int(max_shard_size)) as partial:
        text_config.save_pretrained(partial)
        generation_config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return output


def _generation_config(source: Path, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The source's text settings where there are any; the ids that end and pad, always."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    path = source / "generation_config.json"
    stored = read_json(path) if path.is_file() else {}
    kept = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "eos_token_id")
    return GenerationConfig(**{**ids, **{name: stored[name] for name in kept if name in stored}})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, "folder of the checkpoint")
    parser.add_argument("--image-tokenizer", type=Path, help="folder of a NextFlowImageTokenizer")
    parser.add_argument("--text-tokenizer", type=Path, help="folder, tokenizer.json or .tiktoken file (source's own)")
    parser.add_argument(
        "--num-scales", type=int, help="that the model draws at most: 12 are 256 pixels (tokenizer's own)"
    )
    parser.add_argument("--back", action="store_true", help="NextFlow to a Qwen2 text model")
    options = parser.parse_args(arguments)
    common = {"dtype": options.dtype, "max_shard_size": options.max_shard_size}
    if options.back and options.num_scales is not None:
        parser.error("--num-scales is for a model that draws, and --back makes none")
    if not options.back and options.image_tokenizer is None:
        parser.error("--image-tokenizer is needed: its codebook becomes the table of visual codes")
    with one_line_errors(parser):
        if options.back:
            convert_to_qwen(options.source, options.output, **common)
        else:
            tokenizers = {"image_tokenizer": options.image_tokenizer, "text_tokenizer": options.text_tokenizer}
            common |= {"num_scales": options.num_scales}
            convert_to_nextflow(options.source, options.output, **tokenizers, **common)
        report(options)


if __name__ == "__main__":
    main()
