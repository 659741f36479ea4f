"""Settings of GRPO."""

from dataclasses import dataclass, field

from trl import GRPOConfig

from .settings import AT_LEAST_0, AT_LEAST_1, NOT_COMPILED, POSITIVE, name_activation_checkpointing, refuse
from .sft_config import FIXED_IN_ALL

# What TRL's trainer can do and images have no use for: (name, legal value, why).
FIXED = (
    *FIXED_IN_ALL,
    *NOT_COMPILED,
    ("cast_lm_head_to_fp32", False, "log-probabilities are computed in fp32 already"),
    ("chat_template_kwargs", None, "pass conversations that need no template arguments"),
    ("use_vllm", False, "vLLM does not draw next-scale images"),
    ("use_transformers_continuous_batching", False, "images are drawn in whole batches already"),
    ("loss_type", "grpo", "the loss is GRPO's with scale weights"),
    ("importance_sampling_level", "token", "ratios are those of single codes"),
    ("multi_objective_aggregation", "sum_then_normalize", "rewards are summed with `reward_weights`"),
    ("use_bias_correction_kl", False, "the KL has no importance weights here"),
    ("off_policy_mask_threshold", None, "it is for vLLM"),
    ("delta", None, "ratios are clipped by `epsilon` and `epsilon_high`"),
    ("top_entropy_quantile", 1.0, "codes are chosen by `num_trained_scales` and masks"),
    ("entropy_coef", 0.0, "there is no entropy bonus"),
    ("use_adaptive_entropy", False, "there is no entropy bonus"),
    ("min_p", None, "use `top_p`"),
    ("repetition_penalty", 1.0, "codes of an image repeat by nature"),
    ("mask_truncated_completions", False, "the schedule says when an image ends"),
)

# Arguments of `generate` that the trainer gives itself.
_OWN_ARGUMENTS = {"generation_mode", "generator", "height", "width", "num_scales", "num_return_sequences"}
_OWN_ARGUMENTS |= {"prefix_scales", "images_per_prefix"}
_OWN_ARGUMENTS |= {"thinking", "max_new_tokens", "do_sample", "temperature", "stop_strings", "max_time"}


@dataclass
class NextFlowGRPOConfig(GRPOConfig):
    r"""
    [`~trl.GRPOConfig`] for [`NextFlowGRPOTrainer`]. Batches, groups (`num_generations`), `num_iterations`, `beta`,
    `epsilon`, `reward_weights`, `scale_rewards` and logging are TRL's; what only text needs is refused or has no
    effect. `max_completion_length` is the limit of a thought; the schedule says how long an image is.

    Args:
        num_trained_scales (`int`, *optional*, defaults to 8):
            Prefix-tuning (arXiv 2601.02204): the loss is taken over the first scales only; finer ones are drawn, but
            neither scored nor trained. None trains all.
        scale_reweight_alpha (`float`, *optional*, defaults to 0.7):
            A code of scale s weighs `1 / (h_s * w_s) ** alpha` in the loss, normalised over the trained scales
            (the papers: 0.6 to 0.8 is best for GRPO).
        thinking (`bool`, *optional*, defaults to `False`):
            A text is thought before each picture, and both are trained: the thought's tokens weigh 1 each, as a code
            does on average.
        guidance_scale (`float`, *optional*):
            Classifier-free guidance of the rollouts, the model's own by default; log-probabilities never have it.
        top_k (`int`, *optional*), top_p (`float`, *optional*):
            What rollouts draw from, the model's own by default (the papers: 2 and 0.9).
        height, width, num_scales (`int`, *optional*): Size of the images, as `generate` takes them.
        generation_kwargs (`dict`, *optional*): More arguments of `generate`, such as `guidance_schedule`.
        middle_return_scale (`int`, *optional*):
            VMR (arXiv 2601.02256): train the first `middle_return_scale` scales on the value of a prefix, and the
            others (up to `num_trained_scales`) on the reward of images that share one. None: no VMR.
        num_middle_rollouts (`int`, *optional*, defaults to 2): Images per prefix, whose rewards make its value.
        middle_return_temperature (`float`, *optional*, defaults to 1.0):
            Eta of the value `eta * log(mean(exp(reward / eta)))`.
        prefix_updates_per_suffix (`int`, *optional*, defaults to 3): Updates of the prefix before one of the suffix.
        reward_timeout (`float`, *optional*, defaults to 600.0): Seconds that a reward function may take; None: forever.
    """

    num_trained_scales: int | None = field(default=8, metadata={"help": "Scales in the loss, from the first on."})
    scale_reweight_alpha: float = field(default=0.7, metadata={"help": "Exponent of the scale weights."})
    thinking: bool = field(default=False, metadata={"help": "Train a thought before each picture, too."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Guidance of the rollouts."})
    # None is the model's own; TRL's defaults would cut nothing off.
    top_k: int | None = field(default=None, metadata={"help": "Likeliest codes that rollouts draw from."})  # type: ignore[assignment]
    top_p: float | None = field(default=None, metadata={"help": "Probability that rollouts draw from."})  # type: ignore[assignment]
    height: int | None = field(default=None, metadata={"help": "Height of the images in pixels."})
    width: int | None = field(default=None, metadata={"help": "Width of the images in pixels."})
    num_scales: int | None = field(default=None, metadata={"help": "Number of scales of the images."})
    middle_return_scale: int | None = field(default=None, metadata={"help": "Scales of VMR's prefix."})
    num_middle_rollouts: int = field(default=2, metadata={"help": "Images a prefix that make its value."})
    middle_return_temperature: float = field(default=1.0, metadata={"help": "Eta of the value of a prefix."})
    prefix_updates_per_suffix: int = field(default=3, metadata={"help": "Prefix updates to one suffix update."})
    reward_timeout: float | None = field(default=600.0, metadata={"help": "Seconds a reward function may take."})
    loss_type: str = field(default="grpo", metadata={"help": 'Only "grpo".'})
    use_bias_correction_kl: bool = field(default=False, metadata={"help": "Only False."})

    def __post_init__(self):
        refuse(
            self,
            FIXED,
            scale_reweight_alpha=AT_LEAST_0,
            temperature=POSITIVE,
            num_trained_scales=AT_LEAST_1,
            middle_return_scale=AT_LEAST_1,
            num_middle_rollouts=AT_LEAST_1,
            prefix_updates_per_suffix=AT_LEAST_1,
            middle_return_temperature=POSITIVE,
            reward_timeout=POSITIVE,
        )
        name_activation_checkpointing(self)
        super().__post_init__()
        if self.thinking and self.middle_return_scale is not None:
            raise ValueError(
                "With `middle_return_scale` pictures share a prefix, but with `thinking` each has a thought of its "
                "own: leave one of them out."
            )
        if taken := sorted(_OWN_ARGUMENTS & (self.generation_kwargs or {}).keys()):  # type: ignore[union-attr]
            raise ValueError(
                f"`generation_kwargs` can't hold {', '.join(f'`{name}`' for name in taken)}: sizes, `temperature` "
                "and `max_completion_length` are settings of their own, and the rest is the trainer's."
            )
