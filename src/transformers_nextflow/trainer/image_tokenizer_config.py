"""Settings of the image tokenizer's training."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .settings import AT_LEAST_1, SHARE, one_of, refuse

STAGES = ("pixel", "joint", "decoder")


@dataclass
class NextFlowImageTokenizerTrainingConfig(TrainingArguments):
    r"""
    [`~transformers.TrainingArguments`] for [`NextFlowImageTokenizerTrainer`], one stage per run.

    Args:
        stage (`str`, *optional*, defaults to `"joint"`):
            The paper's three: `"pixel"`, the pixel branch alone; `"joint"`, both branches; `"decoder"`, the pixel
            decoder alone, with all else frozen (enlarge it before: `model.enlarge_pixel_decoder()`).
        scale_dropout (`float`, *optional*, defaults to 0.5):
            Probability that a step drops scales: each but the first and the last one with probability one half.
        l1_weight, l2_weight (`float`, *optional*, default to 1.0 and 2.0): Of the reconstruction's two terms.
        residual_weight (`float`, *optional*, defaults to 0.25): Of what all scales together leave unexplained.
        semantic_weight (`float`, *optional*, defaults to 0.3): Of the cosine distance to the teacher's features.
        perceptual_weight (`float`, *optional*, defaults to 1.0): Of `perceptual_loss`, if one is given.
        adversarial_weight (`float`, *optional*, defaults to 0.1): Of the discriminator's term, if one is given.
        teacher_batch_size (`int`, *optional*): How many images of a batch the teacher sees; all by default.
        revive_steps (`int`, *optional*, defaults to 25): Steps between moving dead codes next to busy ones.
        revive_until (`float`, *optional*, defaults to 0.7): Share of the training after which they are left alone.
        num_logged_images (`int`, *optional*, defaults to 4):
            Reconstructions beside originals, written at every save to `reconstructions/` of `output_dir`.
    """

    stage: str = field(default="joint", metadata={"help": "What is trained.", "choices": list(STAGES)})
    scale_dropout: float = field(default=0.5, metadata={"help": "Probability that a step drops scales."})
    l1_weight: float = field(default=1.0, metadata={"help": "Weight of the absolute error."})
    l2_weight: float = field(default=2.0, metadata={"help": "Weight of the squared error."})
    residual_weight: float = field(default=0.25, metadata={"help": "Weight of what no scale explains."})
    semantic_weight: float = field(default=0.3, metadata={"help": "Weight of the semantic distillation."})
    perceptual_weight: float = field(default=1.0, metadata={"help": "Weight of the perceptual loss."})
    adversarial_weight: float = field(default=0.1, metadata={"help": "Weight of the discriminator's term."})
    teacher_batch_size: int | None = field(default=None, metadata={"help": "Images a batch that the teacher sees."})
    revive_steps: int = field(default=25, metadata={"help": "Steps between revivals of dead codes."})
    revive_until: float = field(default=0.7, metadata={"help": "Share of the training with revivals."})
    num_logged_images: int = field(default=4, metadata={"help": "Reconstructions that are written at every save."})

    def __post_init__(self):
        refuse(self, stage=one_of(*STAGES), scale_dropout=SHARE, revive_until=SHARE, revive_steps=AT_LEAST_1)
        self.remove_unused_columns = False  # the signature of the tokenizer says nothing of `pixel_values`' source
        super().__post_init__()
