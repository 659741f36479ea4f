"""Configuration of TokenFlow's text-to-image model (arXiv 2412.03069), NextFlow's predecessor with public weights."""

from collections.abc import Iterable
from typing import ClassVar

from transformers import LlamaConfig

from .configuration_nextflow import strict_numbers
from .scale_schedule import ScaleSchedule
from .strict_loading import StrictConfigMixin


@strict_numbers
class TokenFlowConfig(StrictConfigMixin, LlamaConfig):
    r"""
    Configuration of [`TokenFlowModel`] and [`TokenFlowForCausalLM`]. It is a Llama configuration plus the visual
    fields, named as [`NextFlowConfig`]'s are; the defaults are TokenFlow-t2i's (7B, 256 x 256 pixels).

    Args:
        vocab_size (`int`, *optional*, defaults to 64769):
            Rows of the output head: `text_vocab_size + visual_codebook_size`.
        text_vocab_size (`int`, *optional*, defaults to 32001): Llama's ids and `[PAD]`; the first visual id.
        visual_codebook_size (`int`, *optional*, defaults to 32768): Number of codes of the image tokenizer.
        visual_code_dim (`int`, *optional*, defaults to 40): Width of a code vector, semantic and pixel parts together.
        scale_sides (`list[int]`, *optional*, defaults to `[1, 2, 4, 6, 8, 10, 12, 14, 16]`):
            Sides of the (square) grids, one per scale. The model draws these grids, all of them, and no others.
        image_start_ids (`list[int]`, *optional*, defaults to `[529, 2492, 29958]`):
            The text `<img>`, which opens an image: its last token predicts the first code, as NextFlow's `<boi>`.
        image_end_ids (`list[int]`, *optional*, defaults to `[1533, 2492, 29958]`): The text `</img>`, which closes it.
        image_token_id (`int`, *optional*, defaults to 0):
            The mark in text that the processor replaces with an image: an id that no text has, Llama's `<unk>`.
        max_text_tokens (`int`, *optional*, defaults to 128): Tokens of a prompt before the image, `<s>` included.
        qk_norm_eps (`float`, *optional*, defaults to 1e-6): Of the norms of queries and keys.
        scale_reweight_alpha (`float`, *optional*, defaults to 0.0):
            A code of scale s weighs `1 / (h_s * w_s) ** alpha` in the loss. TokenFlow weighs all alike.
        image_tokenizer_hash (`str`, *optional*):
            [`hash_image_tokenizer`] of the image tokenizer whose codes the model was trained on; any other is refused.
    """

    model_type = "tokenflow_t2i"
    base_config_key = ""
    visual_feature_mode: ClassVar[str] = "accumulated"
    rope_spatial_range: ClassVar[None] = None  # every slot has a position of its own, as in any language model
    eoi_token_id: ClassVar[None] = None  # the slot of an image's last code carries zeros
    writes_text: ClassVar[bool] = False

    vocab_size: int = 64769
    rms_norm_eps: float = 1e-5
    pad_token_id: int | None = 32000

    text_vocab_size: int = 32001
    visual_codebook_size: int = 32768
    visual_code_dim: int = 40
    scale_sides: list[int] | tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14, 16)
    image_start_ids: list[int] | tuple[int, ...] = (529, 2492, 29958)
    image_end_ids: list[int] | tuple[int, ...] = (1533, 2492, 29958)
    image_token_id: int = 0
    max_text_tokens: int = 128
    qk_norm_eps: float = 1e-6
    scale_reweight_alpha: float | int = 0.0
    image_tokenizer_hash: str | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.vocab_size != self.text_vocab_size + self.visual_codebook_size:
            raise ValueError(
                f"`vocab_size` ({self.vocab_size}) must be `text_vocab_size` + `visual_codebook_size`, "
                f"{self.text_vocab_size} + {self.visual_codebook_size}."
            )
        self.schedule()  # raises if there is none
        ids = {"image_start_ids": self.image_start_ids, "image_end_ids": self.image_end_ids}
        for name, numbers in {**ids, "image_token_id": [self.image_token_id]}.items():
            if not numbers or max(numbers) >= self.text_vocab_size:
                raise ValueError(f"`{name}` must be text ids, below {self.text_vocab_size}, but got {numbers}.")
        if self.tie_word_embeddings:
            raise ValueError(
                "`tie_word_embeddings` must be False: the head has visual rows, the input embeddings do not."
            )

    @property
    def boi_token_id(self) -> int:
        """The last of the ids that open an image."""
        return self.image_start_ids[-1]

    @property
    def num_scales(self) -> int:
        """How many scales an image has."""
        return len(self.scale_sides)

    def schedule(
        self, height: int | None = None, width: int | None = None, num_scales: int | None = None
    ) -> ScaleSchedule:
        """The one schedule that there is.

        Raises:
            `ValueError`: if another size or number of scales is asked for.
        """
        schedule = ScaleSchedule(num_scales=self.num_scales, sides=tuple(self.scale_sides))
        asked, own = (height, width, num_scales), (schedule.height, schedule.width, schedule.num_scales)
        if any(number not in (None, fixed) for number, fixed in zip(asked, own, strict=True)):
            raise ValueError(
                f"TokenFlow draws images of {own[0]} x {own[1]} pixels in {own[2]} scales and no others, but was asked "
                f"for height {height}, width {width}, num_scales {num_scales}. Leave them out."
            )
        return schedule

    def schedule_of(self, grid_shw: Iterable[int]) -> ScaleSchedule:
        """The schedule of a row of `image_grid_shw`, which has only one value.

        Raises:
            `ValueError`: if it is another.
        """
        schedule = self.schedule()
        if (found := tuple(grid_shw)) != schedule.grid_shw:
            raise ValueError(
                f"TokenFlow's images have the grid {schedule.grid_shw} in `image_grid_shw`, but got {found}."
            )
        return schedule


__all__ = ["TokenFlowConfig"]
