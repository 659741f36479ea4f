"""GRPO with prefix-tuning on rendered words, with OCR as the reward and the words' boxes as masks.

    python examples/grpo_text_rendering.py --output_dir runs/words --max_steps 50
    python examples/grpo_text_rendering.py --output_dir runs/words --middle_return_scale 4 --use_peft true

It needs the extra `[ocr]` (rapidocr) and matplotlib, for its fonts. Every field of `NextFlowGRPOConfig` and of TRL's
`ModelConfig` is an option, on the command line or in a YAML file (`--config`). On a CPU add `--use_cpu true`.

The nextflow-tiny that ships draws words that no OCR can read yet: all rewards are then alike or nearly so, and there is
little to learn. Give a checkpoint that is read now and then: `--model_name_or_path`.
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from trl import ModelConfig, TrlParser, get_peft_config

from tiny_world.words import sample_word
from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, tiny_checkpoint
from transformers_nextflow.trainer import NextFlowGRPOConfig, NextFlowGRPOTrainer, ocr_reward


@dataclass
class Task:
    """What is trained on."""

    num_prompts: int = field(default=1000, metadata={"help": "Captions to draw."})
    masks: bool = field(default=True, metadata={"help": "Train the codes under the words only."})


def make_dataset(num_prompts: int, seed: int, split: str = "train") -> Dataset:
    """Captions and their words."""
    rng = np.random.default_rng(seed)
    words = [sample_word(rng, split) for _ in range(num_prompts)]
    return Dataset.from_list([{"prompt": word.caption, "text": word.word} for word in words])


def main(arguments: list[str] | None = None) -> NextFlowGRPOTrainer:
    task, settings, model_config = TrlParser(
        (Task, NextFlowGRPOConfig, ModelConfig), allow_abbrev=False
    ).parse_args_and_config(arguments)
    path = model_config.model_name_or_path or str(tiny_checkpoint())
    trainer = NextFlowGRPOTrainer(
        NextFlowForCausalLM.from_pretrained(path, dtype=torch.float32),
        partial(ocr_reward, return_masks=task.masks),
        settings,
        train_dataset=make_dataset(task.num_prompts, settings.seed),
        processing_class=NextFlowProcessor.from_pretrained(path),
        peft_config=get_peft_config(model_config),
    )
    trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
