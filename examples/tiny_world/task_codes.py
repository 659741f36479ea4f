"""Conversations of the tasks with their pictures as codes, made once; batches of them for training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transformers_nextflow import NextFlowConfig, NextFlowProcessor
from transformers_nextflow.trainer import drop_condition, expand_sample

from .codes import encode_pictures, missing_chunks, save_chunk
from .tasks import TASKS
from .train_language_model import SCHEDULE, Batch

CHUNK = 1000
# How many samples of each task; what a sample costs differs, see `TaskBatches.draw`.
MIXTURE = {
    "look": 0.34, "editing": 0.18, "plan": 0.13, "looking first": 0.08, "reading": 0.08, "turns": 0.11, "thought": 0.02,
    "story": 0.04, "example": 0.02,
}  # fmt: skip
# How often a batch is of a task: telling things apart is learned by reading, and takes longest.
DRAWN = {
    "look": 0.24, "edit": 0.3, "plan": 0.08, "looking first": 0.1, "reading": 0.05, "turns": 0.13, "thought": 0.01,
    "story": 0.05, "example": 0.04,
}  # fmt: skip
USE_CORRECTED, DROP_TEXT, USE_PLAIN = 0.6, 0.1, 0.4
PLAIN_TASKS = ("edit",)  # prompts that also come without chat marks, as `"<image>make the star red"`
MAX_SLOTS = 2560  # of a batch


def extract_task_codes(
    processor: NextFlowProcessor, folder: Path, num_samples: int, seed: int, shard: tuple[int, int] = (0, 1)
) -> None:
    """Encodes the pictures of `num_samples` conversations into `folder`, a chunk a file; chunks that exist are kept.

    `shard=(i, n)` does every n-th chunk only, for n processes side by side.
    """
    for path, count, rng, generator in missing_chunks(folder, num_samples, CHUNK, seed, shard):
        conversations, pictures = [], []
        tasks = rng.choice(list(MIXTURE), count, p=list(MIXTURE.values()))
        tasks[0] = "look"  # a chunk has a picture at least
        for task in tasks:
            sample = TASKS[str(task)](rng, "train")
            for message in sample.messages:
                pictures += [part.pop("image") for part in message["content"] if part["type"] == "image"]
            conversations.append(json.dumps([sample.task, sample.messages]))
        arrays = encode_pictures(processor.image_tokenizer, np.stack(pictures), generator)
        save_chunk(path, conversations=np.array(conversations), **arrays)


class TaskBatches:
    """Draws batches of one task at a time, so that its rows are of similar length."""

    def __init__(self, folder: Path, processor: NextFlowProcessor, config: NextFlowConfig):
        self.config = config
        parts: dict[str, list[np.ndarray]] = {"clean": [], "corrected": [], "targets": []}
        self.members: dict[str, list[dict[str, Any]]] = {}
        num_images = 0
        for path in sorted(folder.glob("[0-9]*.npz")):
            chunk = np.load(path)
            for name, arrays in parts.items():
                arrays.append(chunk[name])
            for text in chunk["conversations"]:
                task, messages = json.loads(str(text))
                entry = {"chat": _tokenize(messages, processor, True), "first": num_images}
                if task.split(":")[0] in PLAIN_TASKS:
                    entry["plain"] = _tokenize(messages, processor, False)
                num_images += entry["chat"]["token_ids"].count(config.image_token_id)
                self.members.setdefault(task.split(":")[0], []).append(entry)
        if not num_images:
            raise ValueError(f"{folder} holds no codes; run `extract_task_codes` first.")
        self.codes = {name: np.concatenate(arrays).astype(np.int64) for name, arrays in parts.items()}
        weights = np.array([DRAWN[task] for task in self.members])
        self.shares = weights / weights.sum()

    def draw(self, rng: np.random.Generator, num_scales: int) -> Batch:
        """One batch with the first `num_scales` scales of every image and at most `MAX_SLOTS` slots."""
        task = str(rng.choice(list(self.members), p=self.shares))
        entries = self.members[task]
        rows: list[dict[str, Any]] = []
        longest = 0
        while True:
            row = self._row(rng, entries[int(rng.integers(len(entries)))], num_scales)
            longest = max(longest, len(row["input_ids"]))
            if rows and longest * (len(rows) + 1) > MAX_SLOTS:
                break
            rows.append(row)
        length = max(len(row["input_ids"]) for row in rows)
        pad = self.config.pad_token_id

        def stack(name: str, filler: int) -> torch.Tensor:
            return torch.tensor([row[name] + [filler] * (length - len(row[name])) for row in rows])

        sizes = torch.tensor([len(row["input_ids"]) for row in rows])
        every_grid = [grid for row in rows for grid in row["image_grid_shw"]]
        mask = (torch.arange(length) < sizes[:, None]).long()
        grids = torch.tensor(every_grid, dtype=torch.long).view(-1, 3)  # none in a batch of texts
        return Batch(stack("input_ids", pad), mask, stack("labels", -100), grids, task)

    def _row(self, rng: np.random.Generator, entry: dict[str, Any], num_scales: int) -> dict[str, Any]:
        text = entry["plain"] if "plain" in entry and rng.random() < USE_PLAIN else entry["chat"]
        marks = zip(text["token_ids"], text["completion_mask"], strict=True)
        answers = [answer for token, answer in marks if token == self.config.image_token_id]
        images = range(entry["first"], entry["first"] + len(answers))
        # What a prompt shows was encoded as it is; an answer is drawn with mistakes in it.
        corrected = [bool(answer) and rng.random() < USE_CORRECTED for answer in answers]
        seen, wanted = ("clean", "corrected"), ("clean", "targets")
        cut = SCHEDULE.prefix(num_scales)
        sample = {
            **text,
            "codes": [
                self.codes[seen[c]][i, : cut.num_tokens].tolist() for i, c in zip(images, corrected, strict=True)
            ],
            "target_codes": [
                self.codes[wanted[c]][i, : cut.num_tokens].tolist() for i, c in zip(images, corrected, strict=True)
            ],
            "image_grid_shw": [cut.grid_shw] * len(answers),
            "codebook_size": self.config.visual_codebook_size,
        }
        if any(answers) and rng.random() < DROP_TEXT:
            sample = drop_condition(sample, self.config.image_token_id)
        # The grid says how many scales the image would have: a prefix of them must not look like a smaller image.
        return {**expand_sample(sample, self.config), "image_grid_shw": [SCHEDULE.grid_shw] * len(answers)}


def _tokenize(messages: list[dict[str, Any]], processor: NextFlowProcessor, chat: bool) -> dict[str, list[int]]:
    """`token_ids` and `completion_mask` of a conversation whose pictures are marks."""
    tokenizer = processor.tokenizer
    if chat:
        encoded = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, chat_template=processor.chat_template
        )
        return {"token_ids": list(encoded["input_ids"]), "completion_mask": list(encoded["assistant_masks"])}
    ids: list[int] = []
    mask: list[int] = []
    for message in messages:
        text = "".join(part.get("text", processor.image_token) for part in message["content"])
        new = tokenizer.encode(text, add_special_tokens=False)
        ids += new
        mask += [int(message["role"] == "assistant")] * len(new)
    return {"token_ids": ids, "completion_mask": mask}
