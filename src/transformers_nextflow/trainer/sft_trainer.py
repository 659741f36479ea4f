"""Supervised fine-tuning on TRL."""

from typing import Any

from transformers import Trainer
from trl import SFTTrainer

from ..modeling_nextflow import NextFlowForCausalLM
from .data_collator import NextFlowDataCollator
from .sft_config import NextFlowSFTConfig


class NextFlowSFTTrainer(SFTTrainer):
    """
    TRL's [`~trl.SFTTrainer`] on coded samples (see `coded_dataset`) with the model's own loss.

    The loss is what makes the difference to the stock trainer, which computes log-probabilities with a fused head of
    its own and so weighs all codes alike: here the scales of an image are reweighted. (TRL's entropy and token accuracy
    come from its own head and are not logged.)

    Args:
        model ([`NextFlowForCausalLM`] or `str`): The model, or its folder.
        args ([`NextFlowSFTConfig`], *optional*): Settings.
        kwargs: Everything else that `SFTTrainer` takes: `train_dataset` and `eval_dataset` of coded samples,
            `peft_config`, `callbacks`, ...

    Example:

    ```python
    >>> from transformers_nextflow.trainer import NextFlowSFTConfig, NextFlowSFTTrainer

    >>> trainer = NextFlowSFTTrainer(model, NextFlowSFTConfig("runs/sft"), train_dataset=dataset)
    >>> trainer.train()
    ```
    """

    def __init__(
        self, model: NextFlowForCausalLM | str, args: NextFlowSFTConfig | None = None, data_collator=None, **kwargs
    ):
        args = args or NextFlowSFTConfig("nextflow-sft")
        if not isinstance(args, NextFlowSFTConfig):
            raise TypeError(f"`args` must be a `NextFlowSFTConfig`, but got {type(args).__name__}.")
        network: Any = model
        if isinstance(model, str):
            settings: Any = args.model_init_kwargs or {}
            network = NextFlowForCausalLM.from_pretrained(model, **settings)
            args.model_init_kwargs = None
        if args.scale_reweight_alpha is not None:
            network.config.scale_reweight_alpha = args.scale_reweight_alpha
        if data_collator is None:
            data_collator = NextFlowDataCollator(
                network.config, bool(args.completion_only_loss), args.condition_dropout, args.max_length
            )
        super().__init__(network, args, data_collator=data_collator, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's own loss, as `transformers.Trainer` takes it."""
        return Trainer.compute_loss(self, model, {**inputs, "use_cache": False}, return_outputs, num_items_in_batch)


__all__ = ["NextFlowSFTTrainer"]
