"""Supervised fine-tuning on TRL."""

import logging
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer
from trl import SFTTrainer

from ..configuration_nextflow import NextFlowConfig
from ..modeling_nextflow import NextFlowForCausalLM, NextFlowModel
from ..token_layout import TokenLayout
from ..varlen_attention import SDPA_VARLEN
from .checkpoints import NextFlowTrainerMixin, copy_settings, load_model
from .coded_dataset import check_codes, check_columns, hash_image_tokenizer, invert_task
from .data_collator import NextFlowDataCollator
from .muon import MuonWithAdamW
from .new_weights import set_new_weights_rate, train_new_weights_only
from .packing import FILLER, make_packs, sample_costs
from .samples import DrawSamples
from .sft_config import NextFlowSFTConfig

logger = logging.getLogger(__name__)

# What PEFT takes where no `target_modules` are named.
for _model_type in ("nextflow", "tokenflow_t2i"):
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(_model_type, ["q_proj", "v_proj"])


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
        args = copy_settings(args, NextFlowSFTConfig, "nextflow-sft")
        network, self.processor = load_model(model, args, processing_class, peft_config)
        config = network.config
        if self.processor is not None and self.processor.image_tokenizer is not None:
            config.image_tokenizer_hash = hash_image_tokenizer(self.processor.image_tokenizer)
        if args.scale_reweight_alpha is not None:
            config.scale_reweight_alpha = args.scale_reweight_alpha
        if args.packing and config._attn_implementation == "sdpa":
            network.set_attn_implementation(SDPA_VARLEN)
        if args.stage == "alignment":
            if peft_config is not None:
                raise ValueError('`stage="alignment"` trains weights of the model itself: leave `peft_config` out.')
            train_new_weights_only(network)
        args.max_length = args.max_length or config.max_position_embeddings
        args.logging_nan_inf_filter = False  # a loss that is not finite stops the run; this would make the host wait
        self.num_skipped_samples = 0
        if isinstance(train_dataset, datasets.Dataset):
            if "id" not in train_dataset.column_names:
                train_dataset = train_dataset.add_column("id", [str(index) for index in range(len(train_dataset))])
            fitting, self._packing_costs = fit_samples(train_dataset, config, args)
            self.num_skipped_samples = len(train_dataset) - len(fitting)
            train_dataset = fitting
        elif args.packing or args.overlong_samples == "skip":
            raise ValueError(
                "`packing` and `overlong_samples` need a `datasets.Dataset`, whose samples can be measured, but "
                f"`train_dataset` is a {type(train_dataset).__name__}."
            )
        for held_out in eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]:
            if isinstance(held_out, datasets.Dataset):
                fit_samples(held_out, config, args, held_out=True)
        if data_collator is None:
            data_collator = NextFlowDataCollator(
                config,
                bool(args.completion_only_loss),
                args.condition_dropout,
                args.max_length,
                args.packing,
                args.task_inversion,
                return_ids=True,
                with_layout=True,
            )
        super().__init__(
            network,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.processor.tokenizer if self.processor else processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        self._model_config, self._packs = config, None
        self._refuse_sharded_weights()
        if args.sample_steps is not None:
            if self.processor is None or self.processor.image_tokenizer is None:
                raise ValueError("`sample_prompts` need a processor with an image tokenizer: pass `processing_class`.")
            self.add_callback(DrawSamples(self))
        if args.packing:
            costs, number = self._packing_costs, self._batches_per_step
            self._packs = make_packs(costs, args.max_length, min(number, len(costs)), self._data_seed)
            self._packs += [[FILLER]] * (-len(self._packs) % number)
        if isinstance(train_dataset, datasets.Dataset):
            self._note_how_it_was_prompted(network, train_dataset)

    def train(self, *args, **kwargs):
        """See [`NextFlowTrainerMixin.train`]; with `args.torch_compile` the layers are compiled while it lasts."""
        if not self.args.torch_compile:
            return super().train(*args, **kwargs)
        stacks = [module for module in self.model.modules() if isinstance(module, NextFlowModel)]
        layers = [layer for stack in stacks for layer in stack.layers]
        try:
            for layer in layers:
                layer.compile(backend=self.args.torch_compile_backend or "inductor", mode=self.args.torch_compile_mode)
            # Padded or not, one row or several, training or evaluation: more than torch's eight graphs a place.
            with torch._dynamo.config.patch(recompile_limit=64):
                return super().train(*args, **kwargs)
        finally:
            for layer in layers:
                layer._compiled_call_impl = None  # drawing has graphs of its own

    def _build_accelerator_args(self, **kwargs) -> dict[str, Any]:
        settings = super()._build_accelerator_args(**kwargs)
        settings.pop("dynamo_plugin", None)  # it would compile the whole model
        return settings

    def _refuse_sharded_weights(self) -> None:
        args = self.args
        if args.new_weights_learning_rate is not None and (self._cuts_weights or self.is_deepspeed_enabled):
            raise ValueError(
                "`new_weights_learning_rate` steps single rows at a rate of their own, but FSDP, TP and DeepSpeed step "
                "pieces of weights: use DDP."
            )
        if not self._cuts_weights:
            return
        if args.stage == "alignment":
            raise ValueError(
                '`stage="alignment"` trains single rows of `embed_tokens` and `lm_head`, which FSDP, TP and ZeRO-3 cut '
                "into pieces. What it trains is small: use DDP or ZeRO-2."
            )
        if args.muon_learning_rate is not None:
            raise ValueError("Muon needs whole matrices, which FSDP, TP and ZeRO-3 cut into pieces: use DDP.")
        if args.sample_steps is not None:
            raise ValueError(
                "`sample_steps` draws on one rank alone, which FSDP, TP and ZeRO-3 cut weights for: use DDP."
            )

    # Data: what a step learns from does not depend on how many ranks share it.

    @property
    def _batches_per_step(self) -> int:
        ranks = self.accelerator.num_processes // self.get_tp_size()  # those of TP share their batches
        return ranks * self.args.gradient_accumulation_steps

    def get_train_dataloader(self) -> DataLoader:
        """A loader of packs or of batches; what is drawn for a sample follows from seed, epoch and its number."""
        if not isinstance(self.train_dataset, datasets.Dataset):
            return super().get_train_dataloader()
        drawn = _DrawnSamples(self.train_dataset, self._data_seed, self._packs)
        batch_size, number = self._train_batch_size, self._batches_per_step
        options: dict[str, Any] = {"numbered": True, "drop_last": self.args.dataloader_drop_last}
        options["multiple"] = batch_size * number if number > 1 else 1
        if self._packs is not None:  # a batch is a pack; those of a step stand together
            batch_size, options = 1, {"numbered": True, "shuffle": True, "run_length": number}
        sampler = partial(self._get_train_sampler, **options)
        return self._get_dataloader(drawn, "Training", batch_size, sampler, is_training=True)

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
        self._count_losses(model.training, inputs, outputs["token_losses"].detach())
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss alone; logits are never held."""
        return super().prediction_step(model, inputs, True, ignore_keys)

    def _count_losses(self, training: bool, inputs: dict[str, Any], token_losses: torch.Tensor) -> None:
        """Counts cross-entropies of text, of codes and of each scale."""
        config, ids, grids = self._model_config, inputs["input_ids"], inputs.get("image_grid_shw")
        layout = inputs.get("layout") or TokenLayout.of(ids, grids, config, inputs.get("attention_mask"))
        kinds = layout.scale_of_tokens()[:, 1:] + 1
        predicted = inputs["labels"][:, 1:] != -100  # where nothing is, the loss is 0
        entries = torch.stack([token_losses[:, :-1], predicted.to(token_losses)], dim=-1)
        sums = token_losses.new_zeros(config.num_scales + 1, 2).index_add_(0, kinds.flatten(), entries.flatten(0, 1))
        self._count(training, "loss_text", sums[0])
        self._count(training, "loss_image", sums[1:].sum(0))
        for scale in range(1, len(sums)):
            self._count(training, f"loss_scale_{scale}", sums[scale])

    # Optimizer and checkpoints

    def create_optimizer(self, model=None):
        """The stock one, or Muon with AdamW; new weights have a rate of their own if one is given."""
        args, is_fresh = self.args, self.optimizer is None
        if args.muon_learning_rate is not None and self.optimizer is None:
            parameters = (self.model if model is None else model).named_parameters()
            betas = (args.adam_beta1, args.adam_beta2)
            options = {"weight_decay": args.weight_decay, "betas": betas, "eps": args.adam_epsilon}
            self.optimizer = MuonWithAdamW(parameters, args.learning_rate, args.muon_learning_rate, **options)
        super().create_optimizer(model)
        if args.new_weights_learning_rate is not None and is_fresh:
            options = (self._model_config, args.new_weights_learning_rate, args.optim.value)
            set_new_weights_rate(self.optimizer, self.model if model is None else model, *options)
        return self.optimizer

    def get_decay_parameter_names(self, model) -> list[str]:
        """Rows that are frozen by a mask must not decay either."""
        names = super().get_decay_parameter_names(model)
        if self.args.stage == "alignment":
            names = [name for name in names if not name.endswith(("embed_tokens.weight", "lm_head.weight"))]
        return names

    def _run_facts(self) -> dict[str, Any]:
        facts = super()._run_facts() | {"new_weights_learning_rate": self.args.new_weights_learning_rate}
        facts |= {"packs_per_step": None, "samples_per_step": None, "num_packs": None, "max_length": None}
        is_planned = isinstance(self.train_dataset, datasets.Dataset)
        if is_planned and not (self._cuts_weights or self.is_deepspeed_enabled):
            del facts["num_processes"]
        if self._packs is not None:
            facts |= {"num_packs": len(self._packs), "max_length": self.args.max_length}
            facts["packs_per_step"] = self._batches_per_step
        elif is_planned:
            facts["samples_per_step"] = self._train_batch_size * self._batches_per_step
        return facts

    def _note_how_it_was_prompted(self, model: Any, dataset: datasets.Dataset) -> None:
        """Writes into the generation config, for every task of the data, whether its prompts are chat turns."""
        every = max(1, len(dataset) // 10_000)
        samples = dataset.select_columns(["token_ids", "completion_mask"]).select(range(0, len(dataset), every))
        found = (prompt_style(sample, model.config.image_token_id, self.processing_class) for sample in samples)
        counts = Counter(style for style in found if style is not None)
        styles = dict(getattr(model.generation_config, "prompt_styles", None) or {})
        for task in sorted({task for task, _ in counts}):
            bare, chat = counts[task, "bare"], counts[task, "chat"]
            styles[task] = "bare" if bare >= chat else "chat"
            if bare and chat:
                logger.warning(
                    'Of the samples of the task "%s" %d have bare prompts and %d chat turns; pipelines will prompt '
                    'the model by the majority, "%s".',
                    *(task, bare, chat, styles[task]),
                )
        model.generation_config.prompt_styles = styles
        kinds = "".join(f", {number * every} {style} {task}" for (task, style), number in counts.items())
        self._card_facts = (f"Samples: {len(dataset)}{kinds}", f"Prompt styles: {styles}")


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
    """Samples (or packs of them) by `epoch * len(self) + index`, each with a seed for what the collator draws.

    `FILLER` is one token, which nothing predicts.
    """

    def __init__(self, dataset: datasets.Dataset, seed: int, packs: list[list[int]] | None):
        self.dataset, self.seed, self.packs = dataset, seed, packs
        empty = {name: [] if isinstance(value, list) else value for name, value in dataset[0].items()}
        self.filler = {**empty, "id": "", "token_ids": [0], "completion_mask": [0], "draw_seed": 0}

    def __len__(self) -> int:
        return len(self.packs or self.dataset)

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        samples = []
        for epoch, place in (divmod(number, len(self)) if number != FILLER else (0, FILLER) for number in numbers):
            for index in self.packs[place] if self.packs else [place]:
                if index == FILLER:
                    samples.append(self.filler)
                    continue
                source = np.random.SeedSequence([self.seed, epoch, index])
                draw_seed = int(source.generate_state(1, np.uint64)[0] >> 1)
                samples.append({**self.dataset[index], "draw_seed": draw_seed})
        return samples


def fit_samples(
    dataset: datasets.Dataset, config: NextFlowConfig, args: NextFlowSFTConfig, held_out: bool = False
) -> tuple[datasets.Dataset, np.ndarray]:
    """The samples that are not too long, and what each costs; refuses those that can't be trained or evaluated on."""
    check_columns(dataset.column_names)
    if not len(dataset):
        raise ValueError("The data set has no samples.")
    hashes = dataset.unique("image_tokenizer_hash") if "image_tokenizer_hash" in dataset.column_names else []
    sizes = [size for size in dataset.unique("codebook_size") if size]  # 0: text, without an image tokenizer
    if (found := check_codes(sizes, hashes, config)) is not None:
        config.image_tokenizer_hash = found  # saved with the model, for the next training
    by_compute = args.packing and args.packing_strategy == "compute" and not held_out
    options = (config.image_token_id, config.hidden_size if by_compute else None, config)
    samples = dataset.remove_columns(["codes", "target_codes"])
    costs = sample_costs(samples, *options)
    if args.task_inversion and not held_out:
        costs = np.maximum(costs, sample_costs(map(invert_task, samples), *options))
    overlong = costs > args.max_length
    if not overlong.any():
        return dataset, costs
    if held_out or args.overlong_samples == "error" or overlong.all():
        longest = int(costs.argmax())
        task = " to evaluate on" if held_out else ""
        unit = "of linear work" if by_compute else "with its images"
        way_out = "" if held_out else ' with `overlong_samples="skip"`'
        raise ValueError(
            f"{overlong.sum()} of {len(dataset)} samples{task} are over `max_length` ({args.max_length}): the longest, "
            f"{dataset[longest].get('id', longest)}, takes {costs[longest]:.0f} tokens {unit}. Raise `max_length`, "
            f"encode their images with fewer scales, or leave them out{way_out}."
        )
    logger.warning("%d of %d samples are skipped: too long.", overlong.sum(), len(dataset))
    return dataset.select((~overlong).nonzero()[0]), costs[~overlong]
