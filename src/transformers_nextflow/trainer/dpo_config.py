"""Settings of learning from preferences."""

from dataclasses import dataclass, field

from trl import DPOConfig

from .settings import AT_LEAST_0, AT_LEAST_1, NOT_COMPILED, name_activation_checkpointing, refuse
from .sft_config import FIXED_IN_ALL

FIXED = (
    *FIXED_IN_ALL,
    *NOT_COMPILED,
    ("padding_free", False, "an image can't be cut"),
    ("truncation_mode", "keep_start", "nothing is cut: a pair that is too long is an error"),
    ("use_weighting", False, "its weights are of text; scales have theirs"),
    ("ld_alpha", None, "the lengths of images are the schedule's"),
)


@dataclass
class NextFlowDPOConfig(DPOConfig):
    r"""
    [`~trl.DPOConfig`] for [`NextFlowDPOTrainer`]. `beta`, `loss_type`, `f_divergence_type`, references and logging are
    TRL's; what concerns the preparation of text has no effect, for coded pairs are ready.

    Args:
        num_trained_scales (`int`, *optional*):
            Compare pictures by their first scales only, as prefix-tuning does in GRPO. None, the default, takes all.
        scale_reweight_alpha (`float`, *optional*, defaults to 0.7):
            The log-probability of a code of scale s weighs `1 / (h_s * w_s) ** alpha`, normalised within its image;
            text weighs 1. With 0 all codes weigh alike, and an image is its plain log-probability.
        max_length (`int`, *optional*): Longest prompt with an answer, images included; the model's context by default.
    """

    num_trained_scales: int | None = field(default=None, metadata={"help": "Scales in the loss, from the first on."})
    scale_reweight_alpha: float = field(default=0.7, metadata={"help": "Exponent of the scale weights."})
    max_length: int | None = field(default=None, metadata={"help": "Longest prompt with an answer."})

    def __post_init__(self):
        refuse(self, FIXED, num_trained_scales=AT_LEAST_1, scale_reweight_alpha=AT_LEAST_0)
        name_activation_checkpointing(self)
        self.remove_unused_columns = False
        super().__post_init__()
