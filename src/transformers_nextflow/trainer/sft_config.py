"""Settings of supervised fine-tuning."""

from dataclasses import dataclass, field

from trl import SFTConfig

from .packing import PACKING_STRATEGIES
from .settings import (
    AT_LEAST_0,
    AT_LEAST_1,
    COMPILATION,
    POSITIVE,
    SHARE,
    name_activation_checkpointing,
    one_of,
    refuse,
)

STAGES = ("full", "alignment")


# What has another meaning for text, or would have none here: (name, legal value, why).
FIXED_IN_ALL = (
    ("use_liger_kernel", False, "head and loss are computed in chunks already"),
    ("label_smoothing_factor", 0.0, "the loss is the model's own"),
    ("pad_to_multiple_of", "auto", "an image can't be padded inside its sequence"),
)
FIXED = (
    *FIXED_IN_ALL,
    ("padding_free", False, "it is TRL's for text: use `packing` for coded samples"),
    ("loss_type", "nll", "the loss is the model's own"),
    ("eval_packing", None, "held-out samples are collated as those of the training are"),
    ("assistant_only_loss", False, "`completion_only_loss` learns the answers of coded samples"),
    ("chat_template_path", None, "coded samples have been through the template: give it to the extraction"),
)


@dataclass
class NextFlowSFTConfig(SFTConfig):
    r"""
    [`~trl.SFTConfig`] for [`NextFlowSFTTrainer`]. What concerns the preparation of text (`dataset_text_field`, ...) has
    no effect: coded samples are ready.

    Args:
        stage (`str`, *optional*, defaults to `"full"`):
            `"full"` trains every weight (or the adapters of `peft_config`). `"alignment"` is the paper's first stage:
            it trains what Qwen did not have, that is connector, scale embeddings, the embeddings of `<boi>` and
            `<eoi>`, and the head's rows of `<boi>` and of the codes.
        packing (`bool`, *optional*, defaults to `False`):
            Fill rows with samples that don't see each other, instead of padding them. A batch is one pack;
            `per_device_train_batch_size` has no effect then.
        packing_strategy (`str`, *optional*, defaults to `"compute"`):
            What packs have in common: `"compute"`, the paper's cost in FLOPs, or `"length"`, their number of tokens.
        max_length (`int`, *optional*):
            Longest sample, images included; the model's context by default. With packing, what a pack may cost, in
            tokens of linear work: with `"compute"`, a token that attends to many others counts for more than one.
        overlong_samples (`str`, *optional*, defaults to `"error"`):
            What becomes of samples over `max_length`: `"error"`, or `"skip"` (they are counted in a warning).
        scale_reweight_alpha (`float`, *optional*):
            A code of scale s weighs `1 / (h_s * w_s) ** alpha` in the loss, normalised within the image
            (arXiv 2601.02204: 0 at 256-level, 0.9 from 512 on). The model's own (`config.scale_reweight_alpha`) by
            default.
        condition_dropout (`float`, *optional*, defaults to 0.1):
            Probability that a sample whose answer has an image loses the text of its prompt, so that guidance has an
            unconditional branch.
        task_inversion (`float`, *optional*, defaults to 0.0):
            Probability that a sample which draws from a text is turned into one that describes its picture.
        muon_learning_rate (`float`, *optional*):
            Train the matrices of the layers with torch's Muon at this learning rate, and the rest with AdamW at
            `learning_rate`. Not with FSDP or ZeRO, which cut matrices into pieces.
        new_weights_learning_rate (`float`, *optional*):
            Of what Qwen did not have (see `stage`): connector, scale embeddings, the rows of `<boi>`, `<eoi>` and the
            codes. It follows the same schedule as `learning_rate`, which the backbone or its adapters have.
        ema_decay (`float`, *optional*):
            Keep a moving average of the weights, which is what is evaluated, drawn with and saved; none by default.
            The decay rises to this with the number of steps t, as `1 - t ** (-2 / 3)`. Not with FSDP or ZeRO-3.
        sample_prompts (`list[str]`, *optional*), sample_steps (`int`, *optional*):
            Prompts that are drawn every so many steps, always with the same noise, to `samples/` of `output_dir` and to
            TensorBoard. Not with FSDP or ZeRO-3, whose ranks would all have to draw.
        completion_only_loss (`bool`, *optional*, defaults to `True`): Learn answers only.
    """

    stage: str = field(default="full", metadata={"help": "What is trained.", "choices": list(STAGES)})
    packing_strategy: str = field(default="compute", metadata={"help": 'What packs share: "compute" or "length".'})
    overlong_samples: str = field(default="error", metadata={"help": 'Samples over max_length: "error" or "skip".'})
    scale_reweight_alpha: float | None = field(default=None, metadata={"help": "Exponent of the scale weights."})
    condition_dropout: float = field(default=0.1, metadata={"help": "Share of samples that lose their prompt's text."})
    task_inversion: float = field(default=0.0, metadata={"help": "Share of drawn pictures that are described instead."})
    muon_learning_rate: float | None = field(default=None, metadata={"help": "Muon for the matrices of the layers."})
    new_weights_learning_rate: float | None = field(default=None, metadata={"help": "Of what Qwen did not have."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of the weights' moving average."})
    sample_prompts: list[str] | None = field(default=None, metadata={"help": "Prompts to draw while training."})
    sample_steps: int | None = field(default=None, metadata={"help": "Steps between drawing them."})
    completion_only_loss: bool | None = field(default=True, metadata={"help": "Learn answers only."})
    max_length: int | None = field(default=None, metadata={"help": "Longest sample, or cost of a pack."})

    def __post_init__(self):
        refuse(
            self,
            FIXED,
            stage=one_of(*STAGES),
            packing_strategy=one_of(*PACKING_STRATEGIES),
            overlong_samples=one_of("error", "skip"),
            scale_reweight_alpha=AT_LEAST_0,
            condition_dropout=SHARE,
            task_inversion=SHARE,
            muon_learning_rate=POSITIVE,
            new_weights_learning_rate=POSITIVE,
            ema_decay=SHARE,
            sample_steps=AT_LEAST_1,
        )
        if bool(self.sample_prompts) != bool(self.sample_steps):
            raise ValueError("`sample_prompts` says what is drawn and `sample_steps` how often: give both or neither.")
        compilation = {name: getattr(self, name) for name in COMPILATION}
        if self.sample_prompts and any(compilation.values()):
            raise ValueError(
                "`torch_compile` compiles layers as they train, not as they draw: leave `sample_prompts` out."
            )
        if self.new_weights_learning_rate is not None and self.stage == "alignment":
            raise ValueError('`stage="alignment"` trains new weights only: their rate is `learning_rate`.')
        if self.muon_learning_rate is not None and not str(self.optim).startswith("adamw_torch"):
            raise ValueError(f"`muon_learning_rate` goes with AdamW for the rest, but `optim` is {self.optim!s}.")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f'`train_sampling_strategy` must be "random" or "sequential", but got '
                f'"{self.train_sampling_strategy}": use `packing` for samples of different lengths.'
            )
        name_activation_checkpointing(self)
        if self.packing and self.activation_checkpointing and any(compilation.values()):
            raise ValueError(
                "`torch_compile` compiles nothing where packs meet activation checkpointing: set "
                "`activation_checkpointing=False` or `packing=False`."
            )
        self.remove_unused_columns = False  # the collator reads them all
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}
        vars(self).update(COMPILATION)  # accelerate would compile the whole model; the trainer compiles its layers
        super().__post_init__()
        vars(self).update(compilation, torch_compile=any(compilation.values()))
