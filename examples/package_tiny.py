"""Puts nextflow-tiny's trained parts into one checkpoint, measures it, and writes the figures into its model card.

    python examples/package_tiny.py --model runs/tiny/language_128 \\
        --image-tokenizer runs/tiny/image_tokenizer_decoder \\
        --diffusion-decoder runs/tiny/diffusion_decoder_2x --output runs/tiny/nextflow-tiny
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import evaluate_tiny
from tiny_world.package import add_diffusion_decoder, package, write_model_card
from transformers_nextflow import NextFlowForCausalLM, NextFlowImageTokenizer, NextFlowProcessor


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the language model")
    parser.add_argument("--image-tokenizer", type=Path, required=True, help="folder of the last stage")
    parser.add_argument("--diffusion-decoder", type=Path, help="folder of its last stage; none by default")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="where fetched packages are kept (default: the user's cache)")
    parser.add_argument("--no-evaluation", action="store_true", help="leave the figures of the model card out")
    options = parser.parse_args(arguments)
    model = NextFlowForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    image_tokenizer = NextFlowImageTokenizer.from_pretrained(options.image_tokenizer)
    package(model, image_tokenizer, NextFlowProcessor.from_pretrained(options.model).tokenizer, options.output)
    if options.diffusion_decoder:
        add_diffusion_decoder(options.output, options.diffusion_decoder)
    figures = "Not measured."
    if not options.no_evaluation:
        table = options.output.parent / "figures.md"
        words = [str(options.output), "--markdown", str(table), "--samples", str(table.with_name("samples.png"))]
        evaluate_tiny.main(words + (["--cache", str(options.cache)] if options.cache else []))
        figures = table.read_text(encoding="utf-8")
    write_model_card(options.output, figures)


if __name__ == "__main__":
    main()
