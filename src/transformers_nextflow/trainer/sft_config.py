"""Settings of supervised fine-tuning."""

from dataclasses import dataclass, field

from trl import SFTConfig


@dataclass
class NextFlowSFTConfig(SFTConfig):
    r"""
    [`~trl.SFTConfig`] for [`NextFlowSFTTrainer`]. What concerns the preparation of text (`max_length` apart, `packing`,
    `dataset_text_field`, ...) has no effect: coded samples are ready.

    Args:
        scale_reweight_alpha (`float`, *optional*):
            A code of scale s weighs `1 / (h_s * w_s) ** alpha` in the loss, normalised within the image
            (arXiv 2601.02204: 0 at 256-level, 0.9 from 512 on). The model's own (`config.scale_reweight_alpha`) by
            default.
        condition_dropout (`float`, *optional*, defaults to 0.1):
            Probability that a sample whose answer has an image loses the text of its prompt, so that guidance has an
            unconditional branch.
        completion_only_loss (`bool`, *optional*, defaults to `True`): Learn answers only.
        max_length (`int`, *optional*): Longest sample, images included; the model's context by default.
    """

    scale_reweight_alpha: float | None = field(
        default=None, metadata={"help": "Exponent of the scale weights; the model's own by default."}
    )
    condition_dropout: float = field(
        default=0.1, metadata={"help": "Probability that a sample loses the text of its prompt."}
    )
    completion_only_loss: bool | None = field(default=True, metadata={"help": "Learn answers only."})
    max_length: int | None = field(default=None, metadata={"help": "Longest sample, images included."})

    def __post_init__(self):
        if self.packing or self.padding_free:
            raise ValueError("Coded samples can't be packed yet: leave `packing` and `padding_free` at False.")
        if self.scale_reweight_alpha is not None and self.scale_reweight_alpha < 0:
            raise ValueError(f"`scale_reweight_alpha` must be at least 0, but got {self.scale_reweight_alpha}.")
        self.remove_unused_columns = False  # the collator reads them all
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__post_init__()


__all__ = ["NextFlowSFTConfig"]
