"""Puts the trained parts together: one folder that transformers and diffusers both load."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from diffusers_nextflow import NextFlowDecodePipeline
from transformers_nextflow import (
    NextFlowForCausalLM,
    NextFlowGenerationConfig,
    NextFlowImageProcessor,
    NextFlowImageTokenizer,
    NextFlowProcessor,
)
from transformers_nextflow.processing_nextflow import write_pipeline_index
from transformers_nextflow.remote_code import add_remote_code
from transformers_nextflow.trainer import hash_image_tokenizer

# Found on training prompts; `image_top_k` bounds the work that top-p has to sort.
GENERATION = {"guidance_scale": 3.0, "image_top_k": 200, "image_top_p": 0.8, "image_temperature": 1.0}
MODEL_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-to-image
tags: [nextflow, autoregressive, next-scale-prediction, diffusers]
---

# nextflow-tiny

A small NextFlow (arXiv 2601.02204), trained from nothing on a CPU with the scripts of transformers-nextflow.
One decoder-only transformer of {language_parameters:.1f} M parameters over text and image codes, and an image
tokenizer of {tokenizer_parameters:.1f} M. It draws 128 x 128 pixels in 8 steps (204 codes). It is the package's default
checkpoint and test fixture, and shows that the recipe works. It is not the paper's model: no official weights exist.

```python
from diffusers_nextflow import NextFlowPipeline
from transformers_nextflow import tiny_checkpoint

picture = NextFlowPipeline.from_pretrained(tiny_checkpoint())("a red circle left of a blue square").images[0]
```

## What it knows

- **Shapes**: circle, square, triangle, star, heart, diamond, cross, ring in eight colours on five plain backgrounds;
  one object, two, counts to four, left of, right of, above, below.
- **Emoji**: Microsoft's Fluent 3D emoji (MIT; npm `@lobehub/fluent-emoji-3d` 1.1.0) by their Unicode names.
- **Words** of two to six capital letters in DejaVu fonts.
- **Tasks** with shapes: it describes pictures and answers questions on numbers, colours and places; it edits (recolour,
  move, add, remove, replace), follows an example, tells stories in three pictures, and thinks before it draws.

Text tokenizer: the first 8,192 ranks of Qwen's vocabulary (Apache-2.0). Semantic teacher in training:
EfficientNet-Lite0 with ImageNet weights (Apache-2.0), not shipped. English only, and only what stands above: it is no
general chat model.

## Figures

Made by `python examples/evaluate_tiny.py` on held-out prompts. The *ceiling* is the same judge on the image tokenizer's
reconstructions of the true pictures.

{figures}

{notes}

Sampling: {sampling}.
"""


def write_model_card(folder: Path, figures: str, notes: str = "") -> None:
    """Writes `README.md` into a packaged checkpoint: the table of `evaluate_tiny.py` and what there is to say of it."""
    card = MODEL_CARD.format(
        language_parameters=_millions(folder / "model.safetensors"),
        tokenizer_parameters=_millions(folder / "image_tokenizer" / "model.safetensors"),
        figures=figures,
        notes=notes,
        sampling=", ".join(f"`{name}={value}`" for name, value in GENERATION.items()),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _millions(weights: Path) -> float:
    return sum(tensor.numel() for tensor in load_file(weights).values()) / 1e6


def package(
    model: NextFlowForCausalLM,
    image_tokenizer: NextFlowImageTokenizer,
    text_tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Writes the checkpoint in bfloat16, with everything that `from_pretrained` of either library asks for."""
    model.generation_config = NextFlowGenerationConfig(
        eos_token_id=text_tokenizer.eos_token_id,
        pad_token_id=text_tokenizer.pad_token_id,
        prompt_styles=model.generation_config.prompt_styles,  # as the trainer saw them
        **GENERATION,
    )
    model.config.image_tokenizer_hash = hash_image_tokenizer(image_tokenizer)  # trainers refuse codes of others
    model.config.use_cache = True  # which transformers' Trainer turns off
    model.to(torch.bfloat16).save_pretrained(folder)
    image_processor = NextFlowImageProcessor(num_scales=model.config.num_scales)
    NextFlowProcessor(
        image_processor=image_processor,
        tokenizer=text_tokenizer,
        image_tokenizer=image_tokenizer.to(torch.bfloat16),
        visual_token_offset=model.config.text_vocab_size,
    ).save_pretrained(folder)
    add_remote_code(folder)


def add_diffusion_decoder(folder: Path, trained: Path) -> None:
    """Puts a diffusion decoder that `train_diffusion_decoder.py` wrote into the checkpoint, in bfloat16."""
    pipe = NextFlowDecodePipeline.from_pretrained(trained, dtype=torch.bfloat16)
    pipe.diffusion_decoder.save_pretrained(folder / "diffusion_decoder")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    write_pipeline_index(folder)
