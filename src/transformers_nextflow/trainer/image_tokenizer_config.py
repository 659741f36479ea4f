"""Settings of the image tokenizer's training."""

from dataclasses import dataclass, field, fields

from transformers import TrainingArguments

from .image_tokenizer_losses import TOKENFLOW_WEIGHTS
from .settings import AT_LEAST_0, AT_LEAST_1, NOT_COMPILED, SHARE, one_of, refuse

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
            Probability that a step drops a scale, each but the first and the last one by a coin of its own.
        loss_preset (`str`, *optional*):
            `"tokenflow"` sets all weights below to those of TokenFlow's training: squared error 1.0, semantic 1.0,
            perceptual 1.0, adversarial 0.5 from step 20,000 on. By default each is what is given for it.
        l1_weight, l2_weight (`float`, *optional*, default to 1.0 and 2.0): Of the reconstruction's two terms.
        residual_weight (`float`, *optional*, defaults to 0.25): Of what all scales together leave unexplained.
        semantic_weight (`float`, *optional*, defaults to 0.3): Of the cosine distance to the teacher's features.
        perceptual_weight (`float`, *optional*, defaults to 1.0): Of `perceptual_loss`, if one is given.
        adversarial_weight (`float`, *optional*, defaults to 0.1): Of the discriminator's term, if one is given.
        adversarial_start_steps (`int`, *optional*, defaults to 0):
            Steps before the discriminator is trained and its term counts.
        teacher_batch_size (`int`, *optional*): How many images of a batch the teacher sees; all by default.
        revive_steps (`int`, *optional*, defaults to 25): Steps between moving dead codes next to busy ones.
        revive_until (`float`, *optional*, defaults to 0.7): Share of the training after which they are left alone.
        ema_decay (`float`, *optional*):
            Keep a moving average of the weights, which is what is evaluated and saved; none by default. A code that
            was moved is there only after about `1 / (1 - ema_decay)` steps.
        num_logged_images (`int`, *optional*, defaults to 4):
            Reconstructions beside originals, written at every save to `reconstructions/` of `output_dir`.
    """

    stage: str = field(default="joint", metadata={"help": "What is trained.", "choices": list(STAGES)})
    scale_dropout: float = field(default=0.5, metadata={"help": "Probability that a step drops a scale."})
    loss_preset: str | None = field(default=None, metadata={"help": 'Weights by name: "tokenflow".'})
    l1_weight: float = field(default=1.0, metadata={"help": "Weight of the absolute error."})
    l2_weight: float = field(default=2.0, metadata={"help": "Weight of the squared error."})
    residual_weight: float = field(default=0.25, metadata={"help": "Weight of what no scale explains."})
    semantic_weight: float = field(default=0.3, metadata={"help": "Weight of the semantic distillation."})
    perceptual_weight: float = field(default=1.0, metadata={"help": "Weight of the perceptual loss."})
    adversarial_weight: float = field(default=0.1, metadata={"help": "Weight of the discriminator's term."})
    adversarial_start_steps: int = field(default=0, metadata={"help": "Steps before the discriminator joins in."})
    teacher_batch_size: int | None = field(default=None, metadata={"help": "Images a batch that the teacher sees."})
    revive_steps: int = field(default=25, metadata={"help": "Steps between revivals of dead codes."})
    revive_until: float = field(default=0.7, metadata={"help": "Share of the training with revivals."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of the weights' moving average."})
    num_logged_images: int = field(default=4, metadata={"help": "Reconstructions that are written at every save."})

    def __post_init__(self):
        weights = {name: AT_LEAST_0 for name in TOKENFLOW_WEIGHTS}
        refuse(
            self,
            NOT_COMPILED,
            stage=one_of(*STAGES),
            loss_preset=one_of("tokenflow"),
            scale_dropout=SHARE,
            revive_until=SHARE,
            revive_steps=AT_LEAST_1,
            ema_decay=SHARE,
            **weights,
        )
        if self.loss_preset:
            self._take_preset()
        self.remove_unused_columns = False  # the signature of the tokenizer says nothing of `pixel_values`' source
        super().__post_init__()

    def _take_preset(self) -> None:
        defaults = {item.name: item.default for item in fields(self)}
        for name, value in TOKENFLOW_WEIGHTS.items():
            given = getattr(self, name)
            if given not in (defaults[name], value):
                raise ValueError(
                    f'`{name}` is {given}, but the preset "{self.loss_preset}" sets it to {value}: leave one of '
                    "them out."
                )
            setattr(self, name, value)
