"""Teaches a trained nextflow-tiny all the tasks: reading, editing, stories, thoughts, turns. Resumable.

    python examples/train_tasks.py --hours 1.5 --work runs/tasks --output runs/tasks/nextflow-tiny
    torchrun --nproc_per_node 2 examples/train_tasks.py --hours 1.5 --work runs/tasks    # a process a core

Every part writes its state as it goes. Run the same command again after a kill: it goes on where it stopped.
Needs `pip install -e ".[tiny]"`, and once the network for the emoji (npm).
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

from tiny_world.codes import extract_codes
from tiny_world.package import package
from tiny_world.task_codes import TaskBatches, extract_task_codes
from tiny_world.train_language_model import Batches
from tiny_world.train_tasks import train
from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, tiny_checkpoint

PICTURE_MIXTURE = {"shapes": 0.4, "emoji": 0.4, "words": 0.2}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", type=Path, default=tiny_checkpoint(), help="where to start (default: shipped)")
    parser.add_argument("--hours", type=float, default=1.5, help="wall-clock budget of the training (default 1.5)")
    parser.add_argument("--work", type=Path, default=Path("runs/tasks"), help="where states and codes are kept")
    parser.add_argument("--output", type=Path, default=Path("runs/tasks/nextflow-tiny"), help="the new checkpoint")
    parser.add_argument("--cache", type=Path, help="where the emoji packages are kept (default: the user's cache)")
    parser.add_argument("--num-pictures", type=int, default=26_000, help="pictures with captions")
    parser.add_argument("--num-tasks", type=int, default=30_000, help="conversations")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.hours <= 0:
        parser.error(f"--hours must be positive, not {options.hours}")
    return options


def main(arguments: list[str] | None = None):
    options = parse_options(arguments)
    shard = (0, 1)
    if "LOCAL_RANK" in os.environ:
        dist.init_process_group("gloo")
        shard = (dist.get_rank(), dist.get_world_size())
        torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    processor = NextFlowProcessor.from_pretrained(options.checkpoint)
    image_tokenizer = processor.image_tokenizer.float().eval().to(memory_format=torch.channels_last)
    codes, task_codes = options.work / "codes", options.work / "task_codes"
    pictures = (options.num_pictures, options.seed + 11, options.cache, PICTURE_MIXTURE)
    extract_codes(image_tokenizer, codes, *pictures, shard=shard)
    extract_task_codes(processor, task_codes, options.num_tasks, options.seed + 12, shard)
    if dist.is_initialized():
        dist.barrier()
    model = NextFlowForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32)
    captions = Batches(extract_codes(image_tokenizer, codes, *pictures), processor.tokenizer, model.config)
    tasks = TaskBatches(task_codes, processor, model.config)
    model = train(model, captions, tasks, options.work / "language_model", options.hours * 3600, options.seed)
    if shard[0] == 0:
        package(model, processor.image_tokenizer, processor.tokenizer, options.output)
        print(f"Done: {options.output}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
