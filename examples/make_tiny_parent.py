"""Makes the parent of nextflow-tiny: a Qwen2.5 language model with new weights, small in width, depth and vocabulary.

    python examples/make_tiny_parent.py --ranks qwen.tiktoken --output runs/tiny/parent
    python conversion/qwen2_5.py --source runs/tiny/parent --image-tokenizer runs/tiny/image_tokenizer_joint \\
        --output runs/tiny/start

Heads of 64 and a theta of 1e6 are Qwen2.5-0.5B's. What the converter makes of it differs from a converted 0.5B in size
and in nothing else.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from conversion.qwen_tokenizer import build_qwen_tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=Path, required=True, help="qwen.tiktoken, from PyPI's dashscope 2.0.2")
    parser.add_argument("--num-ranks", type=int, default=8192, help="of the text vocabulary, the first ones")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    tokenizer = build_qwen_tokenizer(options.ranks, options.num_ranks)
    torch.manual_seed(options.seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=448,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
