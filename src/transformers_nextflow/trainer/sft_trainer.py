"""Supervised fine-tuning on TRL."""

import copy
import logging
from collections import Counter
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTTrainer

from ..codebook import check_same_codebook
from ..modeling_nextflow import NextFlowForCausalLM
from ..token_layout import TokenLayout
from ..varlen_attention import SDPA_VARLEN
from .checkpoints import EpochSampler, NextFlowTrainerMixin, check_start, find_processor, own_config
from .coded_dataset import COLUMNS, hash_image_tokenizer, invert_task
from .data_collator import NextFlowDataCollator
from .packing import PackSampler, make_packs, sample_costs
from .sft_config import NextFlowSFTConfig

logger = logging.getLogger(__name__)

# What PEFT takes where no `target_modules` are named.
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault("nextflow", ["q_proj", "v_proj"])


class NextFlowSFTTrainer(NextFlowTrainerMixin, SFTTrainer):
    """
    TRL's [`~trl.SFTTrainer`] on coded samples (see `coded_dataset`) with the model's own loss.

    The loss is what makes the difference to the stock trainer, which computes log-probabilities with a fused head of
    its own and so weighs all codes alike: here the scales of an image are reweighted. Logged beside it are the
    unweighted cross-entropies of text (`loss_text`), codes (`loss_image`) and the codes of each scale
    (`loss_scale_1`, ...). (TRL's entropy and token accuracy come from its own head and are not logged.)

    Args:
        model ([`NextFlowForCausalLM`] or `str`):
            The model, or its folder, which is loaded in float32 unless `args.model_init_kwargs` has another `dtype`.
        args ([`NextFlowSFTConfig`], *optional*): Settings.
        processing_class ([`NextFlowProcessor`] or a tokenizer, *optional*):
            By default that of the model's folder. The processor and its image tokenizer are saved with the model.
        kwargs: Everything else that `SFTTrainer` takes: `train_dataset` and `eval_dataset` of coded samples,
            `peft_config`, `callbacks`, ...

    Raises:
        `ValueError`: while training, if a loss is not finite (with the batch's ids), and where a run is resumed with
            another number of processes or other packs.

    Example:

    ```python
    >>> from transformers_nextflow.trainer import NextFlowSFTConfig, NextFlowSFTTrainer

    >>> trainer = NextFlowSFTTrainer(model, NextFlowSFTConfig("runs/sft"), train_dataset=dataset)
    >>> trainer.train()
    ```
    """

    args: NextFlowSFTConfig

    def __init__(
        self,
        model: NextFlowForCausalLM | str,
        args: NextFlowSFTConfig | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        **kwargs,
    ):
        args = args or NextFlowSFTConfig("nextflow-sft")
        if not isinstance(args, NextFlowSFTConfig):
            raise TypeError(f"`args` must be a `NextFlowSFTConfig`, but got {type(args).__name__}.")
        args = copy.copy(args)  # what is filled in below is not the caller's
        network: Any = model
        if isinstance(model, str):
            settings: Any = args.model_init_kwargs or {}
            network = NextFlowForCausalLM.from_pretrained(model, **{"dtype": torch.float32, **settings})
            args.model_init_kwargs = None
        self.processor = find_processor(network, processing_class)
        tokenizer = self.processor.tokenizer if self.processor else processing_class
        check_start(network, tokenizer, peft_config)
        own_config(network)
        if self.processor is not None and self.processor.image_tokenizer is not None:
            check_same_codebook(network.config, self.processor.image_tokenizer)
            network.config.image_tokenizer_hash = hash_image_tokenizer(self.processor.image_tokenizer)
        if args.scale_reweight_alpha is not None:
            network.config.scale_reweight_alpha = args.scale_reweight_alpha
        if args.packing and network.config._attn_implementation == "sdpa":
            network.set_attn_implementation(SDPA_VARLEN)
        if args.stage == "alignment":
            if peft_config is not None:
                raise ValueError('`stage="alignment"` trains weights of the model itself: leave `peft_config` out.')
            train_new_weights_only(network)
        self._pack_sampler: PackSampler | None = None
        self._loss_sums: torch.Tensor | None = None
        train_dataset, self._packing_costs = self._prepare_samples(train_dataset, network.config, args)
        held_out = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        for dataset in held_out.values():
            if isinstance(dataset, datasets.Dataset):
                _check_samples(dataset, network.config)
                _check_lengths(dataset, network.config, args.max_length or network.config.max_position_embeddings)
        if data_collator is None:
            data_collator = NextFlowDataCollator(
                network.config,
                bool(args.completion_only_loss),
                args.condition_dropout,
                args.max_length,
                args.packing,
                args.task_inversion,
                return_ids=True,
            )
        super().__init__(
            network,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            **kwargs,
        )
        self._model_config = network.config
        self._refuse_sharded_rows()
        if args.packing:
            self._pack_sampler = self._make_pack_sampler()
        if isinstance(train_dataset, datasets.Dataset):
            self._note_how_it_was_prompted(network, train_dataset)

    def _refuse_sharded_rows(self) -> None:
        if self.args.stage == "alignment" and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            raise ValueError(
                '`stage="alignment"` trains single rows of `embed_tokens` and `lm_head`, which FSDP and ZeRO-3 cut '
                "into pieces. What it trains is small: use DDP or ZeRO-2."
            )

    # Data

    def _prepare_samples(self, dataset, config, args: NextFlowSFTConfig):
        """The samples to train on, each with an id, without what is to be skipped; and their costs, for packing."""
        self.num_skipped_samples = 0
        if not isinstance(dataset, datasets.Dataset):
            if args.packing or args.overlong_samples == "skip":
                raise ValueError(
                    f"`packing` and `overlong_samples` need a `datasets.Dataset`, whose samples can be measured, but "
                    f"`train_dataset` is a {type(dataset).__name__}."
                )
            return dataset, None
        _check_samples(dataset, config)
        if "id" not in dataset.column_names:
            dataset = dataset.add_column("id", [str(index) for index in range(len(dataset))])
        args.max_length = args.max_length or config.max_position_embeddings
        costs = self._measure(dataset, config, args)
        overlong = (costs > args.max_length).nonzero()[0]
        if not len(overlong):
            return dataset, costs
        longest = int(costs.argmax())
        if args.overlong_samples == "error" or len(overlong) == len(dataset):
            unit = "of linear work" if args.packing and args.packing_strategy == "compute" else "with its images"
            raise ValueError(
                f"{len(overlong)} of {len(dataset)} samples are over `max_length` ({args.max_length}): the longest, "
                f"{dataset[longest]['id']}, takes {costs[longest]:.0f} tokens {unit}. Raise `max_length`, encode their "
                'images with fewer scales, or leave them out with `overlong_samples="skip"`.'
            )
        self.num_skipped_samples = len(overlong)
        logger.warning("%d of %d samples are skipped: too long.", len(overlong), len(dataset))
        fits = (costs <= args.max_length).nonzero()[0]
        return dataset.select(fits), costs[fits]

    @staticmethod
    def _measure(dataset, config, args: NextFlowSFTConfig) -> np.ndarray:
        """What each sample costs, whichever way round it is drawn."""
        hidden_size = config.hidden_size if args.packing and args.packing_strategy == "compute" else None
        columns = ["id", "token_ids", "image_grid_shw"]
        if not args.task_inversion:
            return sample_costs(dataset.select_columns(columns), config.image_token_id, hidden_size)
        columns += ["completion_mask", "inverse_token_ids", "inverse_completion_mask"]
        samples = dataset.select_columns([name for name in columns if name in dataset.column_names])
        both = (sample_costs(rows, config.image_token_id, hidden_size) for rows in (samples, map(invert_task, samples)))
        return np.maximum(*both)

    def _make_pack_sampler(self) -> PackSampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        num_ranks, budget = self.accelerator.num_processes, self.args.max_length or 0  # set above
        packs = make_packs(self._packing_costs, budget, num_ranks, seed)
        return PackSampler(packs, num_ranks, seed, numbered=len(self._packing_costs))

    def get_train_dataloader(self) -> DataLoader:
        """A loader of packs or of batches; what is drawn for a sample follows from seed, epoch and its number."""
        args, dataset = self.args, self.train_dataset
        if not isinstance(dataset, datasets.Dataset):
            return super().get_train_dataloader()
        seed = args.seed if args.data_seed is None else args.data_seed
        if self._pack_sampler is not None:
            batches: dict[str, Any] = {"batch_sampler": self._pack_sampler}
            self._epoch_sampler = self._pack_sampler
        else:
            shuffle = args.train_sampling_strategy == "random"
            self._epoch_sampler = EpochSampler(len(dataset), seed, shuffle, numbered=True)
            batches = {"batch_size": self._train_batch_size, "sampler": self._epoch_sampler}
            batches["drop_last"] = args.dataloader_drop_last
        loader = DataLoader(
            _DrawnSamples(dataset, seed),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
            **batches,
        )
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """The stock loader, of samples as they are: what is measured must not depend on draws."""
        collate = self.data_collator
        if isinstance(collate, NextFlowDataCollator):
            self.data_collator = replace(collate, condition_dropout=0.0, task_inversion=0.0)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collate

    # Loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's own loss, as `transformers.Trainer` takes it."""
        sample_ids = inputs.pop("sample_ids", None)
        # Logits of all tokens are gigabytes that nothing here reads, in training or evaluation.
        inputs = {**inputs, "use_cache": False, "skip_logits": True}
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        if model.training and not torch.isfinite(loss):
            raise ValueError(
                f"The loss is {float(loss)} at step {self.state.global_step} on the samples {sample_ids}. Look at "
                "them, or lower the learning rate; the last checkpoint is from before."
            )
        self._count_losses(inputs, outputs["token_losses"])
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss alone; logits are never held."""
        return super().prediction_step(model, inputs, True, ignore_keys)

    def evaluate(self, *args, **kwargs):
        """As in transformers, with the cross-entropies by kind (`eval_loss_text`, ...) beside the loss."""
        # What was counted in training since the last log is logged with it.
        training, self._loss_sums = self._loss_sums, None
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._loss_sums = training

    def _count_losses(self, inputs: dict[str, torch.Tensor], token_losses: torch.Tensor) -> None:
        """Adds up cross-entropies and numbers of text (first) and of each scale."""
        config, ids, grids = self._model_config, inputs["input_ids"], inputs.get("image_grid_shw")
        kinds = TokenLayout.of(ids, grids, config, inputs.get("attention_mask")).scale_of_tokens() + 1
        predicted = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100) != -100
        kinds = F.pad(kinds[:, 1:], (0, 1))[predicted]
        sums = token_losses.new_zeros(2, config.num_scales + 1)
        sums[0].index_add_(0, kinds, token_losses[predicted])
        sums[1] += torch.bincount(kinds, minlength=sums.shape[1])
        self._loss_sums = sums if self._loss_sums is None else self._loss_sums + sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the cross-entropies of text, codes and each scale since the last time."""
        names = [name for name in logs if name == "loss" or name.endswith("_loss")]  # "eval_loss", "eval_NAME_loss"
        if self._loss_sums is not None and names:
            totals, counts = self.accelerator.reduce(self._loss_sums, reduction="sum").cpu()
            kinds = {"text": slice(1), "image": slice(1, None)}
            kinds |= {f"scale_{scale}": slice(scale, scale + 1) for scale in range(1, len(counts))}
            for kind, part in kinds.items():
                if counts[part].sum():
                    logs[f"{names[0]}_{kind}"] = round(float(totals[part].sum() / counts[part].sum()), 6)
            self._loss_sums = None
        super().log(logs, start_time)

    # Optimizer and checkpoints

    def get_decay_parameter_names(self, model) -> list[str]:
        """Rows that are frozen by a mask must not decay either."""
        names = super().get_decay_parameter_names(model)
        if self.args.stage == "alignment":
            names = [name for name in names if not name.endswith(("embed_tokens.weight", "lm_head.weight"))]
        return names

    def _run_facts(self) -> dict[str, Any]:
        facts = super()._run_facts()
        if self._pack_sampler is not None:
            facts |= {"num_packs": len(self._pack_sampler), "max_length": self.args.max_length}
        return facts

    def _note_how_it_was_prompted(self, model: Any, dataset: datasets.Dataset) -> None:
        """Writes into the generation config, for every task of the data, whether its prompts are chat turns."""
        every = max(1, len(dataset) // 10_000)
        samples = dataset.select_columns(["token_ids", "completion_mask"])
        samples = samples if every == 1 else samples.select(range(0, len(dataset), every))
        found = (prompt_style(sample, model.config.image_token_id, self.processing_class) for sample in samples)
        kinds = Counter(style for style in found if style is not None)
        styles = dict(getattr(model.generation_config, "prompt_styles", None) or {})
        for task in sorted({task for task, _ in kinds}):
            counts = {style: kinds[task, style] for style in ("bare", "chat")}
            styles[task] = max(counts, key=counts.__getitem__)
            if min(counts.values()):
                logger.warning(
                    'Of the samples of the task "%s" %d have bare prompts and %d chat turns; pipelines will prompt '
                    'the model by the majority, "%s".',
                    *(task, counts["bare"], counts["chat"], styles[task]),
                )
        model.generation_config.prompt_styles = styles
        self._card_facts = (
            f"Samples: {len(dataset)}" + "".join(f", {n * every} {style} {task}" for (task, style), n in kinds.items()),
            f"Prompt styles: {styles}",
        )


def prompt_style(sample: dict[str, Any], image_token_id: int, tokenizer: Any) -> tuple[str, str] | None:
    """Task of a coded sample and how it is prompted, such as `("edit", "chat")`; None if it draws nothing."""
    ids, answers = sample["token_ids"], sample["completion_mask"]
    marks = [index for index, token in enumerate(ids) if token == image_token_id]
    drawn = [index for index in marks if answers[index]]
    if not drawn:
        return None
    task = "image"
    if marks[0] < drawn[0]:
        task = "edit"
    elif any(answers[: drawn[0]]):
        task = "thinking"
    elif len(drawn) > 1:
        task = "frames"
    return task, "chat" if "<|im_start|>" in tokenizer.decode(ids[: drawn[0]]) else "bare"


class _DrawnSamples(Dataset):
    """Samples by `epoch * len(self) + index`, each with a seed for what the collator draws, in any worker."""

    def __init__(self, dataset: datasets.Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict[str, Any]:
        epoch, index = divmod(number, len(self.dataset))
        source = np.random.SeedSequence([self.seed, epoch, index])
        return {**self.dataset[index], "draw_seed": int(source.generate_state(1, np.uint64)[0] >> 1)}


def _check_samples(dataset: datasets.Dataset, config) -> None:
    """Refuses what is not a data set of coded samples, or holds codes of another image tokenizer than the model's."""
    if missing := [name for name in COLUMNS if name not in dataset.column_names]:
        raise ValueError(
            f"Coded samples need the columns {', '.join(COLUMNS)}, but the data set has "
            f"{', '.join(dataset.column_names)}: {', '.join(missing)} is missing. `encode_messages` makes them of "
            "conversations, examples/extract_codes.py of data sets."
        )
    if not len(dataset):
        raise ValueError("The data set has no samples.")
    sizes = {size for size in dataset.unique("codebook_size") if size}  # 0: text, without an image tokenizer
    if sizes - {config.visual_codebook_size}:
        raise ValueError(
            f"The codes of the data set come from codebooks of {', '.join(map(str, sorted(sizes)))} codes, but the "
            f"model's has {config.visual_codebook_size}. Extract all codes with the model's own image tokenizer."
        )
    if "image_tokenizer_hash" in dataset.column_names:
        hashes = {value for value in dataset.unique("image_tokenizer_hash") if value}
        ours = getattr(config, "image_tokenizer_hash", None)
        if len(hashes | ({ours} if ours else set())) > 1:
            raise ValueError(
                f"The codes of the data set come from the image tokenizer {', '.join(sorted(hashes))}"
                + (f", but the model was trained on codes of {ours}" if ours else "")
                + ". The same number means another picture: extract all codes with the model's own image tokenizer."
            )
        if hashes:
            config.image_tokenizer_hash = hashes.pop()  # saved with the model, for the next training


def _check_lengths(dataset: datasets.Dataset, config, max_length: int) -> None:
    """Refuses held-out samples that the collator would refuse when they are evaluated, hours later."""
    columns = [name for name in ("id", "token_ids", "image_grid_shw") if name in dataset.column_names]
    lengths = sample_costs(dataset.select_columns(columns), config.image_token_id, None)
    if num_overlong := int((lengths > max_length).sum()):
        longest = int(lengths.argmax())
        raise ValueError(
            f"{num_overlong} of {len(lengths)} samples to evaluate on are over `max_length` ({max_length}): the "
            f"longest, {dataset[longest].get('id', longest)}, takes {lengths[longest]:.0f} tokens with its images. "
            "Raise `max_length`, encode their images with fewer scales, or leave them out."
        )


def train_new_weights_only(model: NextFlowForCausalLM) -> None:
    """Freezes all but what Qwen did not have: connector, scale embeddings, the rows of `<boi>`, `<eoi>` and the codes.

    Rows are frozen by a mask on the gradient, so the optimizer must not decay `embed_tokens` and `lm_head`.
    """
    config = model.config
    model.requires_grad_(False)
    for module in (model.model.connector, model.model.scale_embedding):
        module.requires_grad_(True)
    new_rows = {
        model.model.embed_tokens.weight: [config.boi_token_id, config.eoi_token_id],
        model.lm_head.weight: [config.boi_token_id, *range(config.text_vocab_size, config.vocab_size)],
    }
    for weight, rows in new_rows.items():
        weight.requires_grad_(True)
        mask = torch.zeros(len(weight), 1)
        mask[rows] = 1
        weight.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient))


__all__ = ["NextFlowSFTTrainer", "train_new_weights_only"]
