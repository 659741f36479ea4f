"""Teaches a checkpoint of the tiny world something it never saw, with LoRA on 64 pictures, and measures both sides.

    python examples/lora_concept.py --output runs/arrow
    python examples/lora_concept.py --output runs/arrow --steps 300 --rank 16

The concept is an arrow, in eight colours on five backgrounds; a fifth of the pairs is kept for testing. A detector that
knows the tiny world's eight shapes and the arrow scores pictures of both before and after: was the arrow learned, and
were the shapes kept? So that they are, half of what is trained on are pictures that the model drew itself from prompts
of shapes before training (DreamBooth's prior preservation, arXiv 2208.12242). Runs on a CPU in minutes. The adapter is
saved to `--output`; load it with `PeftModel.from_pretrained(model, folder)`.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig

from evaluate_tiny import TEST_KINDS, Sample, generate, reconstruct, scene_sample
from tiny_world.judge import detect
from tiny_world.shapes import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, article, render, sample_scene
from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, tiny_checkpoint
from transformers_nextflow.trainer import NextFlowSFTConfig, NextFlowSFTTrainer, encode_messages

CONCEPT = "arrow"
NUM_PICTURES = 64
PAIRS = tuple(product(COLOURS, BACKGROUNDS))
TEST_PAIRS = tuple(PAIRS[5 * i + i % 5] for i in range(len(COLOURS)))  # each colour on one background
TRAIN_PAIRS = tuple(pair for pair in PAIRS if pair not in TEST_PAIRS)
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def arrow_sample(rng: np.random.Generator, colour: str, background: str) -> Sample:
    """A prompt, a picture and a judge: one arrow in its colour, on its background, and nothing else."""
    thing = Thing(CONCEPT, colour, *(64 + rng.integers(-2, 3, 2)).tolist(), round(64 * rng.uniform(0.9, 1.1)))
    caption = article(f"{colour} {CONCEPT}") + (
        "" if background == "white" else f" on {article(background)} background"
    )

    def judge(picture: np.ndarray) -> dict[str, bool]:
        found = [(seen.shape, seen.colour) for seen in detect(picture, (*SHAPES, CONCEPT))]
        return {"accuracy": (CONCEPT, colour) in found, "strict": found == [(CONCEPT, colour)]}

    return Sample(CONCEPT, caption, render(Scene(caption, CONCEPT, (thing,), background)), judge)


def score(samples: Sequence[Sample], pictures: Sequence[np.ndarray]) -> dict[str, float]:
    """Shares of pictures that the judge accepts."""
    verdicts = [sample.judge(picture) for sample, picture in zip(samples, pictures, strict=True)]
    return {name: float(np.mean([verdict[name] for verdict in verdicts])) for name in ("accuracy", "strict")}


def drawing(prompt: str, picture: np.ndarray, processor: NextFlowProcessor, seed: int) -> dict:
    """A picture for a prompt as a coded sample.

    nextflow-tiny was trained on bare captions and not on conversations, so the sample is written out by hand.
    """
    image = [{"type": "image", "image": picture}]
    generator = torch.Generator().manual_seed(seed)
    sample = encode_messages([{"role": "assistant", "content": image}], processor, True, generator)
    words = processor.tokenizer(prompt)["input_ids"]
    sample["token_ids"] = [*words, processor.image_token_id]
    sample["completion_mask"] = [0] * len(words) + [1]
    return sample


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", type=Path, help="nextflow-tiny by default")
    parser.add_argument("--output", type=Path, default=Path("runs/arrow"), help="where the adapter goes")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--prior", type=int, default=NUM_PICTURES, help="pictures of shapes that the model draws first")
    parser.add_argument(
        "--prompts", type=int, default=30, help="test prompts a kind of shapes; twice as many of arrows"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    path = options.checkpoint or tiny_checkpoint()
    processor = NextFlowProcessor.from_pretrained(path)
    processor.image_tokenizer.float()
    model = NextFlowForCausalLM.from_pretrained(path, dtype=torch.float32)
    rng = np.random.default_rng([options.seed, 4])
    tests = {
        "arrows, pairs trained on": [arrow_sample(rng, *TRAIN_PAIRS[i % 32]) for i in range(options.prompts)],
        "arrows, held-out pairs": [arrow_sample(rng, *TEST_PAIRS[i % 8]) for i in range(options.prompts)],
        "shapes": [scene_sample(rng, "test", kind) for _ in range(options.prompts) for kind in TEST_KINDS],
    }

    def draw(samples: Sequence[Sample]) -> list[np.ndarray]:
        return generate(model.eval(), processor, [sample.prompt for sample in samples], options.seed, 16, {})

    ceiling = {
        name: score(samples, reconstruct(processor.image_tokenizer, [sample.truth for sample in samples])[0])
        for name, samples in tests.items()
    }
    before = {name: score(samples, draw(samples)) for name, samples in tests.items()}

    concept = [arrow_sample(rng, *TRAIN_PAIRS[index % len(TRAIN_PAIRS)]) for index in range(NUM_PICTURES)]
    prompts = [sample_scene(rng).caption for _ in range(options.prior)]
    drawn = generate(model, processor, prompts, options.seed + 10_000, 16, {})
    pictures = [(sample.prompt, sample.truth) for sample in concept] + list(zip(prompts, drawn, strict=True))
    rows = [drawing(*pair, processor, options.seed + index) for index, pair in enumerate(pictures)]
    settings = NextFlowSFTConfig(
        str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 20,
        logging_steps=max(1, options.steps // 10),
        save_strategy="no",
        report_to=[],
        seed=options.seed,
        activation_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    )
    trainer = NextFlowSFTTrainer(
        model,
        settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        peft_config=LoraConfig(r=options.rank, target_modules=TARGET_MODULES, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()
    trainer.save_merged(str(options.output / "merged"))
    model = trainer.model
    after = {name: score(samples, draw(samples)) for name, samples in tests.items()}

    print("| prompts | n | accuracy before | after | strict before | after | ceiling (reconstructions) |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, samples in tests.items():
        figures = [before[name]["accuracy"], after[name]["accuracy"], before[name]["strict"], after[name]["strict"]]
        numbers = " | ".join(f"{figure:.3f}" for figure in (*figures, ceiling[name]["accuracy"]))
        print(f"| {name} | {len(samples)} | {numbers} |")
    result = {"before": before, "after": after, "ceiling": ceiling}
    (options.output / "scores.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
