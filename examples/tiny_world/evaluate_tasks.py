"""How well a checkpoint does the tasks on samples that training never shows: edits, texts, stories, thoughts."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio

from transformers_nextflow import NextFlowForCausalLM, NextFlowImageTokenizer, NextFlowProcessor

from . import second_judge
from .tasks import (
    EDITS,
    NUM_FRAMES,
    QUESTIONS,
    THOUGHTS,
    TaskSample,
    sample_caption,
    sample_edit,
    sample_example,
    sample_question,
    sample_story,
    sample_thought,
)

Pictures = Sequence[np.ndarray]


class Row(NamedTuple):
    """A row of the table: on what was generated, on reconstructions of the truth, and on the truth itself."""

    group: str
    name: str
    n: int
    value: float
    ceiling: float | None = None
    drawn: float | None = None


class TaskEvaluation:
    """Runs the tasks in batches, each sample with a seed of its own.

    Args:
        model, processor: The checkpoint.
        reconstruct (callable): The image tokenizer and pictures to their reconstructions.
        number (`int`): Samples a task, at least; kinds share them evenly.
        seed (`int`): Of the samples and the draws.
        batch_size (`int`): Samples a batch.
        settings (`dict`): For drawing, as `generate` takes them.
    """

    def __init__(
        self,
        model: NextFlowForCausalLM,
        processor: NextFlowProcessor,
        reconstruct: Callable[[NextFlowImageTokenizer, Pictures], list[np.ndarray]],
        number: int,
        seed: int,
        batch_size: int,
        settings: dict[str, Any],
    ):
        self.model, self.processor, self.number, self.seed = model, processor, number, seed
        self.batch_size, self.settings = batch_size, settings
        self.reconstruct = lambda pictures: reconstruct(processor.image_tokenizer, pictures)

    def rows(self) -> list[Row]:
        return [*self.edits(), *self.examples(), *self.texts(), *self.stories(), *self.thoughts()]

    # Tasks

    def edits(self) -> list[Row]:
        samples = self._samples(sample_edit, EDITS, 4)
        made = [pictures[0] for pictures in self._draw(samples)]
        sources, targets = ([_pictures(sample, role)[0] for sample in samples] for role in ("user", "assistant"))
        shown, best = self.reconstruct(sources), self.reconstruct(targets)
        rows = self._by_kind(samples, made, best, targets, "accuracy")
        kept = [sample.untouched for sample in samples]
        pairs = [[_psnr(a, b, where) for a, b, where in zip(shown, new, kept, strict=True)] for new in (made, best)]
        value, ceiling = (float(np.mean(psnrs)) for psnrs in pairs)
        return [
            *rows,
            Row("edit, untouched region", "PSNR to the source's reconstruction, dB", len(kept), value, ceiling),
        ]

    def examples(self) -> list[Row]:
        samples = self._samples(sample_example, (None,), 5)
        made = [pictures[0] for pictures in self._draw(samples)]
        targets = [_pictures(sample, "assistant")[0] for sample in samples]
        return self._by_kind(samples, made, self.reconstruct(targets), targets, "accuracy")

    def texts(self) -> list[Row]:
        rows = []
        for sampler, kinds, name, index in (
            (sample_caption, (None,), "exact attributes", 6),
            (sample_question, QUESTIONS, "right", 7),
            (partial(sample_question, look_first=True), QUESTIONS, "right", 7),
        ):
            samples = self._samples(sampler, kinds, index)
            rows += self._by_kind(samples, self._write(samples), None, [_text(sample) for sample in samples], name)
        return rows

    def stories(self) -> list[Row]:
        samples = self._samples(sample_story, (None,), 8)
        told = self._draw(samples, num_frames=NUM_FRAMES)
        truth = [_pictures(sample, "assistant") for sample in samples]
        best = _regroup(self.reconstruct([frame for frames in truth for frame in frames]), NUM_FRAMES)
        return [
            row for name in ("identity in pairs", "moves") for row in self._by_kind(samples, told, best, truth, name)
        ]

    def thoughts(self) -> list[Row]:
        samples = self._samples(sample_thought, THOUGHTS, 9)
        truth = [_pictures(sample, "assistant")[0] for sample in samples]
        best = self.reconstruct(truth)
        rows: dict[bool, list[Row]] = {}
        for thinking in (True, False):
            made = [pictures[0] for pictures in self._draw(samples, thinking=thinking)]
            named = [
                row._replace(name=row.name.replace("accuracy", ("with" if thinking else "without") + " thinking"))
                for row in self._by_kind(samples, made, best, truth, "accuracy")
            ]
            rows[thinking] = named
        gain = rows[True][0].value - rows[False][0].value
        return [*rows[True], *rows[False], Row("thought, overall", "gain by thinking", len(samples), gain)]

    # Generation

    def _samples(self, sampler: Callable[..., TaskSample], kinds: Sequence[str | None], index: int) -> list[TaskSample]:
        rng = np.random.default_rng([self.seed, index])
        each = -(-self.number // len(kinds))
        return [sampler(rng, "test", *([kind] if kind else [])) for kind in kinds for _ in range(each)]

    def _batches(self, samples: Sequence[TaskSample]):
        for start in range(0, len(samples), self.batch_size):
            batch = samples[start : start + self.batch_size]
            texts = [
                self.processor.apply_chat_template(
                    _without_pixels(sample.prompt), add_generation_prompt=True, tokenize=False
                )
                for sample in batch
            ]
            pictures = [picture for sample in batch for picture in _pictures(sample, "user")]
            inputs = self.processor(text=texts, images=pictures or None, padding=True, return_tensors="pt")
            yield inputs, [torch.Generator().manual_seed(self.seed + start + i) for i in range(len(batch))]

    def _draw(self, samples: Sequence[TaskSample], **how) -> list[list[np.ndarray]]:
        """The pictures of each sample."""
        made = []
        for inputs, generators in self._batches(samples):
            output = self.model.generate(
                **inputs,
                generation_mode="image",
                generator=generators,
                return_dict_in_generate=True,
                **{**self.settings, **how},
            )
            codes = output.image_codes
            codes = codes if codes.ndim == 3 else codes[:, None]
            grid = output.image_grid_shw[-1:].tolist()
            flat = self.processor.decode_codes(list(codes.flatten(0, 1)), grid * len(codes.flatten(0, 1)))
            made += _regroup([np.asarray(picture.convert("RGB")) for picture in flat], codes.shape[1])
        return made

    def _write(self, samples: Sequence[TaskSample]) -> list[str]:
        answers = []
        for inputs, _ in self._batches(samples):
            ids = self.model.generate(**inputs, max_new_tokens=40, do_sample=False)
            answers += self.processor.decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answers

    def _by_kind(
        self,
        samples: Sequence[TaskSample],
        made: Sequence[Any],
        best: Sequence[Any] | None,
        truth: Sequence[Any],
        name: str,
    ) -> list[Row]:
        """Means over all samples, and over each kind where there are several; of pictures by both judges."""
        groups: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            groups.setdefault(sample.task, []).append(index)
        task = samples[0].task.split(":")[0]
        if len(groups) > 1:
            groups = {f"{task}, overall": list(range(len(samples))), **groups}

        def mean(answers: Sequence[Any] | None, indices: list[int], **judge) -> float | None:
            if answers is None:
                return None
            return float(np.mean([samples[i].judge(answers[i], **judge)[name] for i in indices]))

        judges: dict[str, dict[str, Any]] = {name: {}}
        if best is not None:
            judges[f"{name}, second judge"] = {"detector": second_judge.detect}
        return [
            Row(
                *(group, title, len(indices), mean(made, indices, **judge) or 0.0),
                *(mean(answers, indices, **judge) for answers in (best, truth)),
            )
            for title, judge in judges.items()
            for group, indices in groups.items()
        ]


def _pictures(sample: TaskSample, role: str) -> list[np.ndarray]:
    """The pictures of the answer, or of what comes before it."""
    messages = sample.messages[-1:] if role == "assistant" else sample.messages[:-1]
    return [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]


def _text(sample: TaskSample) -> str:
    return sample.messages[-1]["content"][0]["text"]


def _without_pixels(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**message, "content": [{k: v for k, v in part.items() if k != "image"} for part in message["content"]]}
        for message in messages
    ]


def _regroup(items: Sequence[Any], size: int) -> list[list[Any]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _psnr(one: np.ndarray, other: np.ndarray, where: np.ndarray) -> float:
    return float(peak_signal_noise_ratio(one[where], other[where], data_range=255))
