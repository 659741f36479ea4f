"""From rows of a coded data set to the model's inputs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..configuration_nextflow import NextFlowConfig
from ..token_layout import TokenLayout, find_sequences, targets_of_slots
from .coded_dataset import CodedSample, check_sample, drop_condition, expand_sample, invert_task
from .settings import SHARE, refuse


@dataclass
class NextFlowDataCollator:
    """
    Pads coded samples (see `coded_dataset`) to a batch for [`NextFlowForCausalLM`], with any trainer: transformers'
    `Trainer`, TRL's `SFTTrainer` (with `dataset_kwargs={"skip_prepare_dataset": True}`), or a loop of your own.

    Args:
        config ([`NextFlowConfig`]): The model's.
        completion_only (`bool`, *optional*, defaults to `True`): Learn answers only.
        condition_dropout (`float`, *optional*, defaults to 0.1):
            Probability that a sample whose answer has an image loses the text of its prompt, so that guidance has an
            unconditional branch. Drawn by the sample's `draw_seed` if it has one, as `NextFlowSFTTrainer` gives it to
            them (so a resumed run draws the same), or else from torch's global generator.
        max_length (`int`, *optional*): Longest sample; by default the model's context.
        packing (`bool`, *optional*, defaults to `False`):
            One row for all samples, one after the other and unseen by each other, instead of a padded row each.
        task_inversion (`float`, *optional*, defaults to 0.0):
            Probability that a sample which draws from a text is turned into one that describes its picture.
        return_ids (`bool`, *optional*, defaults to `False`):
            Add `sample_ids`, the samples' column `id`, for trainers that report which samples went wrong.
        with_layout (`bool`, *optional*, defaults to `False`):
            Give `layout`, the batch's [`TokenLayout`], in place of `image_grid_shw`. It is made on the CPU and moves
            with `.to(device)`; a model that gets it looks at no values of tensors, for which the host would wait.
    """

    config: NextFlowConfig
    completion_only: bool = True
    condition_dropout: float = 0.1
    max_length: int | None = None
    packing: bool = False
    task_inversion: float = 0.0
    return_ids: bool = False
    with_layout: bool = False

    def __post_init__(self):
        refuse(self, condition_dropout=SHARE, task_inversion=SHARE)

    def _expand(self, sample: CodedSample) -> dict[str, Any]:
        """The token view of a sample after the draws."""
        check_sample(sample, self.config)
        generator = torch.Generator().manual_seed(sample["draw_seed"]) if "draw_seed" in sample else None
        if self.task_inversion and torch.rand((), generator=generator) < self.task_inversion:
            sample = invert_task(sample)
        marks, mark = zip(sample["token_ids"], sample["completion_mask"], strict=True), self.config.image_token_id
        # Questions are never dropped from answers in words.
        draws = any(answer and token == mark for token, answer in marks)
        if draws and torch.rand((), generator=generator) < self.condition_dropout:
            sample = drop_condition(sample, mark, self.config.bos_token_id)
        row = expand_sample(sample, self.config, self.completion_only)
        length, limit = len(row["input_ids"]), self.max_length or self.config.max_position_embeddings
        if length > limit:
            raise ValueError(
                f"It takes {length} tokens with its images, more than `max_length` ({limit}). Leave it out, raise "
                "`max_length`, or encode its images with fewer scales."
            )
        return row

    def __call__(self, samples: Sequence[CodedSample]) -> dict[str, Any]:
        """
        Returns:
            `dict` with `input_ids`, `attention_mask` and `labels`, int64 `(B, L)`, padded on the right, and with
            `image_grid_shw` `(num_images, 3)` if there are images (or `layout`). With `packing` B is 1, and `seq_idx`
            (the sample of each slot) stands in place of `attention_mask`.

        Raises:
            `ValueError`: for a sample that is longer than `max_length` (an image can't be cut) or doesn't fit together;
                it is named by its `id`.
        """
        rows = []
        for sample in samples:
            try:
                rows.append(self._expand(sample))
            except ValueError as error:
                raise ValueError(f"Sample {sample.get('id', '(no id)')}: {error}") from error
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])

        grids = [grid for row in rows for grid in row["image_grid_shw"]]
        extras: dict[str, Any] = {"image_grid_shw": torch.tensor(grids)} if grids else {}
        if self.return_ids:
            extras["sample_ids"] = [str(sample.get("id", "(no id)")) for sample in samples]
        if self.packing:
            packed = {name: [token for row in rows for token in row[name]] for name in ("input_ids", "labels")}
            seq_idx = torch.arange(len(rows)).repeat_interleave(lengths)
            batch = {**{name: torch.tensor([ids]) for name, ids in packed.items()}, "seq_idx": seq_idx[None], **extras}
            return self._lay_out(batch) if self.with_layout else batch

        def pad(name: str, value: int) -> torch.Tensor:
            sequences = [torch.tensor(row[name], dtype=torch.long) for row in rows]
            return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)

        pad_token_id = self.config.eoi_token_id if self.config.pad_token_id is None else self.config.pad_token_id
        batch = {
            "input_ids": pad("input_ids", pad_token_id),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "labels": pad("labels", -100),
            **extras,
        }
        return self._lay_out(batch) if self.with_layout else batch

    def _lay_out(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Puts the layout in the place of the grids."""
        mask, seq_idx = batch.get("attention_mask"), batch.get("seq_idx")
        layout = TokenLayout.of(
            batch["input_ids"], batch.pop("image_grid_shw", None), self.config, mask, seq_idx=seq_idx
        )
        layout = replace(
            layout,
            sequences=None if seq_idx is None else find_sequences(seq_idx, layout.block_ids),
            learned_slots=(targets_of_slots(batch["labels"], seq_idx) != -100).nonzero()[:, 0],
            is_padded=mask is not None and not mask.all(),
        )
        return {**batch, "layout": layout}
