"""Teaches nextflow-tiny a taste by preferences (DPO): where a caption names no background, mint rather than white.

    python examples/dpo_shapes.py --output runs/mint

Pairs are two pictures of one scene, on mint and on white; of scenes whose caption names a background, on that one and
on mint, so that the taste stays where it belongs. Measured before and after, on captions that training never shows: how
often the background is mint where none is named, how often it is the one that is named, and how often a detector finds
the right shapes. Runs on a CPU in minutes, with LoRA.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig

from evaluate_tiny import generate
from tiny_world.judge import find_background, judge_scene
from tiny_world.shapes import BACKGROUNDS, Scene, render, sample_scene
from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, tiny_checkpoint
from transformers_nextflow.trainer import NextFlowDPOConfig, NextFlowDPOTrainer, encode_preference

LIKED, DISLIKED = "mint", "white"
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def scenes(rng: np.random.Generator, split: str, named: bool, number: int) -> list[Scene]:
    """Scenes whose captions name a background, or don't."""
    found: list[Scene] = []
    while len(found) < number:
        scene = sample_scene(rng, split, str(rng.choice(["colour", "two", "count", "position", "attribution"])))
        if ("background" in scene.caption) == named:
            found.append(scene)
    return found


def paper_of(picture: np.ndarray) -> str:
    """The name of the background that is nearest to a picture's frame."""
    distances = np.linalg.norm(np.array(list(BACKGROUNDS.values())) - find_background(picture), axis=1)
    return list(BACKGROUNDS)[int(distances.argmin())]


def measure(model: NextFlowForCausalLM, processor: NextFlowProcessor, tests: dict[bool, list[Scene]], seed: int):
    """The three figures of a model."""
    drawn = {
        named: generate(model.eval(), processor, [scene.caption for scene in group], seed, 16, {})
        for named, group in tests.items()
    }
    every = [pair for named, group in tests.items() for pair in zip(drawn[named], group, strict=True)]
    return {
        f"{LIKED} where none is named": np.mean([paper_of(picture) == LIKED for picture in drawn[False]]).item(),
        "the background that is named": np.mean(
            [paper_of(p) == scene.background for p, scene in zip(drawn[True], tests[True], strict=True)]
        ).item(),
        "the right shapes": np.mean([judge_scene(picture, scene).correct for picture, scene in every]).item(),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", type=Path, help="nextflow-tiny by default")
    parser.add_argument("--output", type=Path, default=Path("runs/mint"), help="where the adapter goes")
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--anchors", type=int, default=144, help="more pairs, whose captions name their background")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4, help="pairs")
    parser.add_argument("--beta", type=float, default=0.05)
    parser.add_argument("--sft-weight", type=float, default=1.0, help="of learning the better picture itself")
    parser.add_argument("--scales", type=int, help="compare the first scales only; all by default")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--prompts", type=int, default=100, help="test prompts with and without a background")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    path = options.checkpoint or tiny_checkpoint()
    processor = NextFlowProcessor.from_pretrained(path)
    processor.image_tokenizer.float()
    model = NextFlowForCausalLM.from_pretrained(path, dtype=torch.float32)
    rng = np.random.default_rng([options.seed, 5])
    tests = {named: scenes(rng, "test", named, options.prompts) for named in (False, True)}
    before = measure(model, processor, tests, options.seed)

    rows = []
    named = scenes(rng, "train", True, options.anchors)
    for scene in [*scenes(rng, "train", False, options.pairs), *named]:
        papers = (LIKED, DISLIKED)
        if "background" in scene.caption:  # what must not change: the one that is named, rather than the liked one
            papers = (scene.background, DISLIKED if scene.background == LIKED else LIKED)
        answers = (
            {"role": "assistant", "content": [{"type": "image", "image": render(replace(scene, background=paper))}]}
            for paper in papers
        )
        prompt = [{"role": "user", "content": scene.caption}]
        rows.append(encode_preference(prompt, *answers, processor, prompt_style="bare"))
    settings = NextFlowDPOConfig(
        str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        beta=options.beta,
        # Of pictures that the model never draws, DPO alone makes both sides unlikely: the better one must be learned.
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, options.sft_weight],
        num_trained_scales=options.scales,
        logging_steps=max(1, options.steps // 10),
        save_strategy="no",
        report_to=[],
        seed=options.seed,
        activation_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    )
    trainer = NextFlowDPOTrainer(
        model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        peft_config=LoraConfig(r=8, target_modules=TARGET_MODULES, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()
    after = measure(trainer.model, processor, tests, options.seed)
    print("| | before | after |\n|---|---:|---:|")
    for name in before:
        print(f"| {name} | {before[name]:.3f} | {after[name]:.3f} |")
    result = {"before": before, "after": after}
    (options.output / "scores.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
