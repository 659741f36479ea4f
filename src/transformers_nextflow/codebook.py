"""What ties a language model to its image tokenizer: the same codes must mean the same picture to both."""

import hashlib
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .modeling_nextflow_image_tokenizer import NextFlowImageTokenizer

STRIDE = 16  # pixels per cell, on which the language model's schedules rest

_hashes: WeakKeyDictionary[NextFlowImageTokenizer, tuple[Any, str]] = WeakKeyDictionary()  # by the tables' versions


def hash_image_tokenizer(image_tokenizer: NextFlowImageTokenizer) -> str:
    """The first 16 digits of the SHA-256 of both codebooks in fp32, which identify what codes mean."""
    tables = [image_tokenizer.quantizer.semantic_codebook.weight, image_tokenizer.quantizer.pixel_codebook.weight]
    versions = tuple((table._version, table.data_ptr()) for table in tables)
    known = _hashes.get(image_tokenizer)
    if known is None or known[0] != versions:
        digest = hashlib.sha256()
        for table in tables:
            digest.update(table.detach().float().cpu().numpy().tobytes())
        known = _hashes[image_tokenizer] = (versions, digest.hexdigest()[:16])
    return known[1]


def check_schedules(image_tokenizer: Any, scale_sides: Sequence[int] | None = None) -> None:
    """Refuses an image tokenizer whose images have other sizes than a language model plans with."""
    config = getattr(image_tokenizer, "config", None)
    if scale_sides is not None:
        if (sides := list(getattr(config, "sides", scale_sides))) != list(scale_sides):
            raise ValueError(
                f"The image tokenizer has grids of the sides {sides}, but the model draws on {list(scale_sides)}: they "
                "are not of one checkpoint."
            )
        return
    foreign = [name for name in ("scale_sides", "image_size") if getattr(config, name, None) is not None]
    if foreign:
        raise ValueError(
            f"The image tokenizer has schedules of its own ({' and '.join(f'`{name}`' for name in foreign)} in its "
            "configuration), but a NextFlow model draws on the paper's. Load it with `NextFlowImageTokenizer."
            "from_pretrained(path, scale_sides=None, image_size=None)`, or use it without a processor."
        )
    if (stride := getattr(config, "stride", STRIDE)) != STRIDE:
        raise ValueError(
            f"The image tokenizer has a `stride` of {stride} pixels, but a NextFlow model plans its images with "
            f"{STRIDE}. Use it without a processor, or train one with levels that give {STRIDE}."
        )


def check_same_codebook(config: Any, image_tokenizer: NextFlowImageTokenizer | None) -> None:
    """Refuses an image tokenizer for which the model's codes mean other pictures.

    It is called wherever a model and an image tokenizer meet. [`reseat_codebook`] is the way out where another image
    tokenizer is wanted.

    Args:
        config ([`NextFlowConfig`]): The model's.
        image_tokenizer ([`NextFlowImageTokenizer`], *optional*): The processor's.

    Raises:
        `ValueError`: if sizes, stride or the hash of the codebooks (where the model's configuration has one) differ.
    """
    if image_tokenizer is None:
        return
    check_schedules(image_tokenizer, config.scale_sides)
    if config.visual_codebook_size != image_tokenizer.config.codebook_size:
        raise ValueError(
            f"The model draws {config.visual_codebook_size} codes but the image tokenizer has "
            f"{image_tokenizer.config.codebook_size}; they are not of one checkpoint."
        )
    ours, theirs = getattr(config, "image_tokenizer_hash", None), hash_image_tokenizer(image_tokenizer)
    if ours and ours != theirs:
        raise ValueError(
            f"The model was trained on codes of the image tokenizer {ours}, but this one's codebook is {theirs}: the "
            "same code means another picture. Load the image tokenizer of the model's own checkpoint, or train the "
            "model on the new codes after `reseat_codebook(model, image_tokenizer)`."
        )


def check_same_checkpoint(config: Any, processor: Any) -> None:
    """Refuses a processor of another model than this: see [`check_same_codebook`], and its marks have the model's ids.

    Raises:
        `ValueError`: if they differ.
    """
    check_same_codebook(config, processor.image_tokenizer)
    for name in ("image_token_id", "boi_token_id"):
        if (own := getattr(processor, name)) != (expected := getattr(config, name)):
            raise ValueError(
                f"The text tokenizer is not the model's: its `{name}` is {own}, and the model's {expected}. Load it "
                "from the model's own folder; if it was, a file such as tokenizer.json is missing there."
            )


@torch.no_grad()
def reseat_codebook(model: Any, image_tokenizer: NextFlowImageTokenizer) -> None:
    """Puts another image tokenizer's code vectors into a model, in place, and its hash into the model's configuration.

    Use it before the model is trained on codes of that image tokenizer: nothing else of the model knows the new codes,
    so until then it draws noise. Use it also where the codes are the same and only their vectors have changed a little
    (the image tokenizer was trained further): then the model draws at once, as well as the vectors agree.

    Args:
        model ([`NextFlowForCausalLM`]): The model.
        image_tokenizer ([`NextFlowImageTokenizer`]): It must have as many codes as the model, of the same width.

    Raises:
        `ValueError`: if the codebooks differ in size, or its schedules or stride differ from the paper's.
    """
    check_schedules(image_tokenizer, model.config.scale_sides)
    codebook, weight = image_tokenizer.quantizer.codebook(), model.base_model.visual_codebook.weight
    if codebook.shape != weight.shape:
        raise ValueError(
            f"The image tokenizer has a codebook of {tuple(codebook.shape)}, but the model's is {tuple(weight.shape)} "
            "(codes, width). Make a new model with `visual_codebook_size` and `visual_code_dim` of the image tokenizer."
        )
    weight.copy_(codebook)
    model.config.image_tokenizer_hash = hash_image_tokenizer(image_tokenizer)


__all__ = ["check_same_codebook", "hash_image_tokenizer", "reseat_codebook"]
