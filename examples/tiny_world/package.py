"""Puts the trained parts together: one folder that transformers and diffusers both load."""

import json
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from transformers_nextflow import NextFlowForCausalLM, NextFlowImageProcessor, NextFlowImageTokenizer, NextFlowProcessor
from transformers_nextflow.remote_code import add_remote_code

# Found on training prompts; `image_top_k` bounds the work that top-p has to sort.
GENERATION = {"guidance_scale": 3.0, "image_top_k": 200, "image_top_p": 0.8, "image_temperature": 1.0}
MODEL_INDEX = {
    "_class_name": "NextFlowPipeline",
    "_diffusers_version": "0.42.0",
    "diffusion_decoder": [None, None],
    "image_processor": ["transformers_nextflow", "NextFlowImageProcessor"],
    "image_tokenizer": ["transformers_nextflow", "NextFlowImageTokenizer"],
    "model": ["transformers_nextflow", "NextFlowForCausalLM"],
    "scheduler": [None, None],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
}


def package(
    model: NextFlowForCausalLM,
    image_tokenizer: NextFlowImageTokenizer,
    text_tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Writes the checkpoint in bfloat16, with everything that `from_pretrained` of either library asks for."""
    model.generation_config = GenerationConfig(
        eos_token_id=text_tokenizer.eos_token_id, pad_token_id=text_tokenizer.pad_token_id, **GENERATION
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    image_processor = NextFlowImageProcessor(num_scales=model.config.num_scales)
    NextFlowProcessor(
        image_processor=image_processor,
        tokenizer=text_tokenizer,
        image_tokenizer=image_tokenizer.to(torch.bfloat16),
        visual_token_offset=model.config.text_vocab_size,
    ).save_pretrained(folder)
    add_remote_code(folder)
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
