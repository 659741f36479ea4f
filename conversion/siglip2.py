"""Starts an image tokenizer from SigLIP2: its vision encoder becomes the semantic encoder, all else is new.

    python conversion/siglip2.py --source siglip2-so400m-patch16-naflex --output image_tokenizer

The result is what the paper's tokenizer training starts from: the encoder's weights are kept bit for bit, the pixel
branch, the codebooks and both decoders start as in a fresh model and must be trained. SigLIP2's text tower is dropped.
Only the NaFlex models fit (any grid, patches as vectors). Weights are streamed, and a killed run goes on where it
stopped when it is started again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import convert_file_size_to_int

from transformers_nextflow import NextFlowImageTokenizer, NextFlowImageTokenizerConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from conversion.command import make_parser, one_line_errors, report
from conversion.streaming import (
    KeyTable,
    PlannedTensor,
    StoredTensor,
    load_config,
    map_keys,
    new_checkpoint,
    plan_tensor,
    plan_tensors,
    read_checkpoint,
    refuse_to_overwrite,
)

SIGLIP2_KEYS: KeyTable = {
    "text_model.{part}": None,
    "logit_scale": None,
    "logit_bias": None,
    "vision_model.{part}": "semantic_encoder.{part}",
    "embeddings.{part}": "semantic_encoder.embeddings.{part}",
    "encoder.{part}": "semantic_encoder.encoder.{part}",
    "post_layernorm.{part}": "semantic_encoder.post_layernorm.{part}",
    "head.{part}": "semantic_encoder.head.{part}",
}
SOURCE_TYPES = ("siglip2", "siglip2_vision_model")
ENCODER = "semantic_encoder."


def new_weights(config: NextFlowImageTokenizerConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """All weights of a fresh image tokenizer but the semantic encoder's."""
    settings = config.to_dict()
    settings["semantic_config"] |= {"num_hidden_layers": 1}  # no part but the encoder itself depends on its depth
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = NextFlowImageTokenizer(NextFlowImageTokenizerConfig(**settings))
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(ENCODER)}


def plan_image_tokenizer(
    source: dict[str, StoredTensor],
    config: NextFlowImageTokenizerConfig,
    new: dict[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    where: str = "the source",
) -> list[PlannedTensor]:
    """Every tensor of the image tokenizer, in the model's order; the codebooks stay in float32 whatever the dtype.

    Raises:
        `ValueError`: if a key is missing, unknown or of another shape.
    """
    kept = {ours: source[theirs] for theirs, ours in map_keys(source, SIGLIP2_KEYS, where).items()}
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in NextFlowImageTokenizer(config).state_dict().items()}
    made = {
        name: plan_tensor(name, tensor, tensor.dtype if name.startswith("quantizer.") else dtype or tensor.dtype)
        for name, tensor in new.items()
    }
    return plan_tensors(expected, kept, made, where, dtype)


def convert_to_image_tokenizer(
    source: str | Path,
    output: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    **settings,
) -> Path:
    """A SigLIP2 NaFlex checkpoint to a folder that `NextFlowImageTokenizer.from_pretrained` loads, ready to be trained.

    Args:
        source (path): The checkpoint, the whole model or its vision tower.
        output (path): The new folder; it must not be there. Until all is done the work is in `<output>.partial`.
        dtype (`torch.dtype`, *optional*):
            Of all but the codebooks. By default the encoder keeps the source's, and new weights are in float32.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Of one file.
        settings: Fields of [`NextFlowImageTokenizerConfig`] other than `semantic_config`.

    Returns:
        `Path`: `output`.

    Raises:
        `ValueError`: if anything is missing, too much or of another shape; `output` stays as it was.
    """
    source, output = Path(source), Path(output)
    refuse_to_overwrite(output)
    whole, weights = load_config(source, SOURCE_TYPES), read_checkpoint(source)
    vision = getattr(whole, "vision_config", whole)
    config = NextFlowImageTokenizerConfig(semantic_config=vision.to_dict(), **settings)
    config.architectures = [NextFlowImageTokenizer.__name__]
    plan = plan_image_tokenizer(weights, config, new_weights(config), dtype, str(source))
    files = {tensor.file for tensor in weights.values()} | {source / "config.json"}
    with new_checkpoint(output, plan, files, convert_file_size_to_int(max_shard_size)) as partial:
        config.save_pretrained(partial)
    return output


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, "folder of a SigLIP2 NaFlex checkpoint")
    options = parser.parse_args(arguments)
    with one_line_errors(parser):
        convert_to_image_tokenizer(options.source, options.output, options.dtype, options.max_shard_size)
        report(options)


if __name__ == "__main__":
    main()
