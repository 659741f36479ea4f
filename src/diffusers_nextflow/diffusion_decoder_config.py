"""Settings of [`NextFlowDiffusionDecoderTrainer`]."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from transformers_nextflow.trainer.settings import AT_LEAST_0, POSITIVE, SHARE, one_of, refuse

TIMESTEP_SAMPLINGS = ("uniform", "logit_normal")


@dataclass
class NextFlowDiffusionDecoderTrainingConfig(TrainingArguments):
    """
    transformers' [`~transformers.TrainingArguments`], and what is of the diffusion decoder.

    Args:
        scale_factors (`list[int]`, *optional*, defaults to `[1]`):
            What is drawn: `[1]` is the paper's first stage, `[2]` its second, `[1, 2]` keeps both, a batch at either.
        timestep_sampling (`str`, *optional*, defaults to `"uniform"`):
            How timesteps are drawn; `"logit_normal"` prefers the middle, as SD3 does.
        min_snr_gamma (`float`, *optional*):
            Bounds the weight of timesteps with little noise (arXiv 2303.09556; 5 is usual). Not for flow matching.
        condition_dropout (`float`, *optional*, defaults to 0.1):
            Share of samples that see neither codes nor caption, which guidance needs.
        ema_decay (`float`, *optional*):
            Of the moving average of the weights, which is what is saved; none by default.
        num_logged_images (`int`, *optional*, defaults to 4):
            Pictures that are written at every save to `pictures/` of `output_dir`: original, image tokenizer's decoder
            and diffusion decoder side by side, of the first samples of the evaluation's data, else of the training's.
    """

    scale_factors: list[int] = field(default_factory=lambda: [1], metadata={"help": "1, 2 or both."})
    timestep_sampling: str = field(
        default="uniform", metadata={"help": "How timesteps are drawn.", "choices": list(TIMESTEP_SAMPLINGS)}
    )
    min_snr_gamma: float | None = field(default=None, metadata={"help": "Bound of the weight of little noise."})
    condition_dropout: float = field(default=0.1, metadata={"help": "Share of samples without codes."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of the weights' moving average."})
    num_logged_images: int = field(default=4, metadata={"help": "Pictures that are written at every save."})

    def __post_init__(self):
        refuse(
            self,
            timestep_sampling=one_of(*TIMESTEP_SAMPLINGS),
            min_snr_gamma=POSITIVE,
            condition_dropout=SHARE,
            ema_decay=SHARE,
            num_logged_images=AT_LEAST_0,
        )
        self.remove_unused_columns = False  # the signature of the decoder says nothing of `pixel_values`
        super().__post_init__()
