"""Learning from preferences (DPO) on TRL: of two answers to a prompt, pictures or texts, one is better."""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from trl import DPOTrainer

from ..configuration_nextflow import NextFlowConfig
from ..modeling_nextflow import NextFlowForCausalLM
from ..processing_nextflow import NextFlowProcessor
from ..token_layout import TokenLayout
from .checkpoints import NextFlowTrainerMixin, copy_settings, load_model
from .coded_dataset import CodedSample, encode_conversations
from .data_collator import NextFlowDataCollator
from .dpo_config import NextFlowDPOConfig

SIDES = ("chosen", "rejected")


def encode_preference(
    prompt: Sequence[dict[str, Any]],
    chosen: dict[str, Any],
    rejected: dict[str, Any],
    processor: NextFlowProcessor,
    **options,
) -> dict[str, CodedSample]:
    """A row of a data set of preferences.

    Args:
        prompt (list of `dict`): Messages in transformers' chat format.
        chosen, rejected (`dict`): The better and the worse answer, each a message of the assistant.
        processor ([`NextFlowProcessor`]): With its image tokenizer.
        options: Of [`encode_messages`], but for self-correction: what is compared are the pictures' own codes.

    Returns:
        `dict` with `chosen` and `rejected`, two coded samples.
    """
    pair = encode_conversations([[*prompt, chosen], [*prompt, rejected]], processor, **options)
    return dict(zip(SIDES, pair, strict=True))


@dataclass
class PreferenceCollator:
    """Pairs as one batch: all chosen samples, then all rejected ones.

    Returns `input_ids`, `attention_mask`, `completion_mask` `(2 * B, L)`, `token_weights` of the same shape in float32,
    and `image_grid_shw`. The mask is 1 on what is compared: answers, of images the first `num_trained_scales` scales.
    """

    config: NextFlowConfig
    num_trained_scales: int | None = None
    scale_reweight_alpha: float = 0.7
    max_length: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        samples = [row[side] for side in SIDES for row in rows]
        batch = NextFlowDataCollator(self.config, condition_dropout=0.0, max_length=self.max_length)(samples)
        labels, mask = batch.pop("labels"), batch["attention_mask"]
        layout = TokenLayout.of(batch["input_ids"], batch.get("image_grid_shw"), self.config, mask)
        compared = labels != -100
        if self.num_trained_scales is not None:
            compared &= layout.scale_of_tokens() < self.num_trained_scales  # text is -1
        weights = layout.loss_weights(self.scale_reweight_alpha)
        return {**batch, "completion_mask": compared.long(), "token_weights": weights}


class NextFlowDPOTrainer(NextFlowTrainerMixin, DPOTrainer):
    """
    TRL's [`~trl.DPOTrainer`] on pairs of coded samples (see [`encode_preference`]). Pictures are compared like texts,
    by the log-probabilities of their tokens, those of an image weighed by scale and, with `num_trained_scales`, of its
    first scales only. Classifier-free guidance has no part in it.

    Args:
        model ([`NextFlowForCausalLM`], `PeftModel` or `str`): The model, or its folder (loaded in float32).
        ref_model ([`NextFlowForCausalLM`], *optional*):
            What the model must not drift away from; by default a copy of the model as it is, with LoRA the model
            without its adapters.
        args ([`NextFlowDPOConfig`], *optional*): Settings.
        processing_class ([`NextFlowProcessor`], *optional*): By default that of the model's folder. It is saved along.
        kwargs: Everything else that `DPOTrainer` takes: `train_dataset` and `eval_dataset` of rows of
            [`encode_preference`], `peft_config`, `callbacks`, ...

    Example:

    ```python
    >>> from transformers_nextflow.trainer import NextFlowDPOConfig, NextFlowDPOTrainer

    >>> trainer = NextFlowDPOTrainer(model, args=NextFlowDPOConfig("runs/dpo"), train_dataset=dataset)
    >>> trainer.train()
    ```
    """

    args: NextFlowDPOConfig

    def __init__(
        self,
        model: Any,
        ref_model: NextFlowForCausalLM | None = None,
        args: NextFlowDPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **kwargs,
    ):
        args = copy_settings(args, NextFlowDPOConfig, "nextflow-dpo")
        network, self.processor = load_model(model, args, processing_class, peft_config)
        args.max_length = args.max_length or network.config.max_position_embeddings
        for dataset in [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]:
            _check_pairs(dataset)
        if ref_model is None and peft_config is None and not isinstance(network, PeftModel):
            ref_model = copy.deepcopy(network).requires_grad_(False)
        options = (args.num_trained_scales, args.scale_reweight_alpha, args.max_length)
        super().__init__(
            network,
            ref_model,
            args,
            data_collator=data_collator or PreferenceCollator(network.config, *options),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.processor.tokenizer if self.processor else processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        for patched in (self.model, self.ref_model):
            if patched is not None:
                base = self.accelerator.unwrap_model(patched)
                _weigh_log_probs(base.get_base_model() if isinstance(base, PeftModel) else base)

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset  # coded pairs are ready


def _check_pairs(dataset: Any) -> None:
    if dataset is None or not (names := getattr(dataset, "column_names", None)):
        return
    if missing := [side for side in SIDES if side not in names]:
        raise ValueError(
            f"The data set has the columns {', '.join(names)}, but not {', '.join(missing)}: its rows must be made by "
            "`encode_preference`."
        )
    for side in SIDES:
        row = dataset[0][side]
        if not isinstance(row, dict) or "token_ids" not in row:
            raise ValueError(f"`{side}` must be a coded sample; `encode_preference` makes rows of two.")


def _weigh_log_probs(model: Any) -> None:
    """TRL's head gives log-probabilities of tokens; `token_weights` (B, L) among the inputs weigh them."""
    fused = model.forward

    @functools.wraps(fused)
    def forward(*args, token_weights: torch.Tensor | None = None, **kwargs):
        outputs = fused(*args, **kwargs)
        if token_weights is not None:
            outputs.log_probs = outputs.log_probs * token_weights[:, 1:]
        return outputs

    model.forward = forward
