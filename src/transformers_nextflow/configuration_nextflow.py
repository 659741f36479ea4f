"""Configurations of NextFlow's language model and of its image tokenizer."""

import logging
import math
from collections.abc import Iterable
from functools import wraps
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

from .remote_code import write_shim
from .scale_schedule import BASE_SIDES, ScaleSchedule
from .strict_loading import StrictConfigMixin

# Trainers read config.json as a `PreTrainedConfig`, which warns of the keys that it does not know.
logging.getLogger("transformers.modeling_rope_utils").addFilter(lambda record: "'mrope_" not in record.getMessage())

# The least and the most that numbers may be; without an entry 1 and 2**31, or 0 and any if they are no counts.
_LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("num_hidden_layers", "semantic_decoder_layers"), (1, 4096)),
    **dict.fromkeys(("encoder_num_res_blocks", "decoder_num_res_blocks"), (0, 4096)),
    **dict.fromkeys(("semantic_image_mean", "vision_feature_layer"), (-4096, 4096)),
    **dict.fromkeys(("semantic_image_std", "self_correction_temperature"), (1e-6, math.inf)),
    **dict.fromkeys(("boi_token_id", "eoi_token_id", "image_token_id", "max_window_layers"), (0, 2**31)),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), (-1, 2**31)),
    "self_correction_token_fraction": (0, 1),
}


def strict_numbers(cls):
    """`@strict` that holds numbers against their limits, and whose errors are ValueErrors that name the field."""

    def check(name: str, value: Any) -> None:
        least, most = _LIMITS.get(name, (0, math.inf) if "float" in str(annotations[name]) else (1, 2**31))
        for number in value if isinstance(value, list | tuple) else [value]:
            if type(number) in (int, float) and not (least <= number <= most and math.isfinite(number)):
                raise ValueError(f"`{name}` must be finite and between {least} and {most}, but got {value!r}.")

    def plain(method):
        @wraps(method)
        def call(self, *args):
            if args and args[0] in annotations:
                check(*args)
            try:
                return method(self, *args)
            except StrictDataclassError as error:
                raise ValueError(str(error.__cause__)) from error

        return call

    cls, annotations = strict(cls), cls.__annotations__
    cls.__setattr__, cls.validate = plain(cls.__setattr__), plain(cls.validate)
    return cls


@strict_numbers
class NextFlowConfig(StrictConfigMixin, Qwen2_5_VLTextConfig):
    r"""
    Configuration of [`NextFlowModel`] and [`NextFlowForCausalLM`]. It is a Qwen2.5-VL text configuration plus the
    visual fields; the defaults are the 7B model's (arXiv 2601.02204).

    Args:
        vocab_size (`int`, *optional*, defaults to 184832):
            Rows of the output head: `text_vocab_size + visual_codebook_size`.
        text_vocab_size (`int`, *optional*, defaults to 152064):
            Rows of the text vocabulary, special tokens included; the first visual id.
        visual_codebook_size (`int`, *optional*, defaults to 32768):
            Number of codes of the image tokenizer. Visual ids are `text_vocab_size + code`.
        visual_code_dim (`int`, *optional*, defaults to 40): Width of a code vector, semantic and pixel parts together.
        num_scales (`int`, *optional*, defaults to 18): The largest number of scales an image may have.
        rope_parameters (`dict`, *optional*, defaults to Qwen2.5-VL's):
            As there, and `mrope_interleaved` (`True` in new configurations): the rotary pairs take the axes in turn, as
            in Qwen3-VL. With `False`, as in Qwen2.5-VL and in files without the key, each axis has a chunk of pairs.
        visual_feature_mode (`str`, *optional*, defaults to `"residual"`):
            How the input features of a scale are made: `"residual"` from the codes of the scale before alone (the
            paper's choice), `"accumulated"` from all scales before.
        rope_spatial_range (`float`, *optional*, defaults to 64.0):
            `C` of the multi-scale 3D RoPE: spatial coordinates of every scale span `[0, C]` for a square image.
        scale_reweight_alpha (`float`, *optional*, defaults to 0.9):
            A vision token of scale s weighs `1 / (h_s * w_s) ** alpha` in the loss. 0 turns it off.
        boi_token_id (`int`, *optional*, defaults to 151665): `<boi>`: an image starts.
        eoi_token_id (`int`, *optional*, defaults to 151666):
            `<eoi>`: only ever an input (its embedding stands in the slot of an image's last code).
        image_token_id (`int`, *optional*, defaults to 151667):
            `<image>`: the mark in text that the processor replaces with an image.
        image_tokenizer_hash (`str`, *optional*):
            [`hash_image_tokenizer`] of the image tokenizer whose codes the model was trained on; any other is refused.
    """

    model_type = "nextflow"
    base_config_key = ""
    scale_sides: ClassVar[None] = None  # of the grids, where they are not the paper's
    image_end_ids: ClassVar[tuple[int, ...]] = ()  # text that closes an image
    max_text_tokens: ClassVar[int | None] = None  # of a prompt
    writes_text: ClassVar[bool] = True  # or draws single images of texts, and nothing else
    ignore_keys_at_rope_validation = {"mrope_section", "mrope_interleaved"}
    auto_map: ClassVar[dict[str, Any]] = {}  # TRL reads it when a model is given as a path

    vocab_size: int = 184832
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 128000
    rms_norm_eps: float = 1e-06
    max_window_layers: int | None = 28
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151645
    pad_token_id: int | None = 151643
    tie_word_embeddings: bool = False

    text_vocab_size: int = 152064
    visual_codebook_size: int = 32768
    visual_code_dim: int = 40
    num_scales: int = 18
    visual_feature_mode: str = "residual"
    rope_spatial_range: float | int = 64.0
    scale_reweight_alpha: float | int = 0.9
    boi_token_id: int = 151665
    eoi_token_id: int = 151666
    image_token_id: int = 151667
    image_tokenizer_hash: str | None = None

    def __post_init__(self, **kwargs):
        rope = self.rope_parameters or {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        self.rope_parameters = {"mrope_interleaved": True, **rope}
        super().__post_init__(**kwargs)
        self._check_visual_fields()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if rope := config_dict.get("rope_parameters"):  # files from before the key have chunks
            config_dict = {**config_dict, "rope_parameters": {"mrope_interleaved": False, **rope}}
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        if self.auto_map:
            write_shim(save_directory)  # the entries of `auto_map` name that file

    @property
    def image_start_ids(self) -> tuple[int, ...]:
        """Text that opens an image: its last token predicts the first code."""
        return (self.boi_token_id,)

    def schedule(
        self, height: int | None = None, width: int | None = None, num_scales: int | None = None
    ) -> ScaleSchedule:
        """The schedule of an image of this size in pixels, or this number of scales; by default the largest square.

        Raises:
            `ValueError`: if no schedule has this size, or it has more scales than the model.
        """
        if (height is None) != (width is None):
            raise ValueError(f"Pass `height` and `width` together, but got height {height} and width {width}.")
        if height is None or width is None:
            schedule = ScaleSchedule(num_scales=self.num_scales if num_scales is None else num_scales)
        else:
            schedule = ScaleSchedule.from_size(height, width, num_scales)
        if schedule.num_scales > self.num_scales:
            largest = ScaleSchedule(schedule.bucket, self.num_scales)
            raise ValueError(
                f"An image of {schedule.height} x {schedule.width} pixels takes {schedule.num_scales} scales, but this "
                f"model has {self.num_scales} (`config.num_scales`): at this aspect it draws up to {largest.height} x "
                f"{largest.width} (height x width)."
            )
        return schedule

    def schedule_of(self, grid_shw: Iterable[int]) -> ScaleSchedule:
        """The schedule of a row of `image_grid_shw`.

        Raises:
            `ValueError`: if there is none, or it has more scales than the model.
        """
        schedule = ScaleSchedule.from_grid_shw(grid_shw)
        if schedule.num_scales > self.num_scales:
            raise ValueError(
                f"An image of {schedule.num_scales} scales was given, but the model has {self.num_scales} "
                "(`config.num_scales`). Encode the image with fewer scales."
            )
        return schedule

    def _check_visual_fields(self):
        if self.vocab_size != self.text_vocab_size + self.visual_codebook_size:
            raise ValueError(
                f"`vocab_size` ({self.vocab_size}) must be `text_vocab_size` + `visual_codebook_size`, "
                f"{self.text_vocab_size} + {self.visual_codebook_size}."
            )
        ScaleSchedule(num_scales=self.num_scales)  # raises if there is none
        if self.visual_feature_mode not in ("residual", "accumulated"):
            raise ValueError(
                f'`visual_feature_mode` must be "residual" or "accumulated", but got "{self.visual_feature_mode}".'
            )
        for name in ("boi_token_id", "eoi_token_id", "image_token_id"):
            if not 0 <= getattr(self, name) < self.text_vocab_size:
                raise ValueError(f"`{name}` ({getattr(self, name)}) must be a text id, below {self.text_vocab_size}.")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % (2 * heads) or heads % groups:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be an even multiple of `num_attention_heads` ({heads}), and "
                f"that a multiple of `num_key_value_heads` ({groups})."
            )
        num_pairs, section = self.hidden_size // heads // 2, self.rope_parameters.get("mrope_section", [])
        if not isinstance(section, list | tuple) or sum(section) != num_pairs:
            raise ValueError(
                f"`mrope_section` {section!r} must add up to {num_pairs}, half of the size of a head "
                "(`hidden_size / num_attention_heads`)."
            )
        if self.tie_word_embeddings:
            raise ValueError(
                "`tie_word_embeddings` must be False: the head has visual rows, the input embeddings do not."
            )


@strict_numbers
class NextFlowImageTokenizerConfig(StrictConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`NextFlowImageTokenizer`]: a dual codebook (semantic and pixel) on a multi-scale residual
    quantizer, after TokenFlow (arXiv 2412.03069) with NextFlow's changes.

    Args:
        codebook_size (`int`, *optional*, defaults to 32768): Number of codes. One index addresses both codebooks.
        semantic_code_dim (`int`, *optional*, defaults to 32): Width of the semantic half of a code vector.
        pixel_code_dim (`int`, *optional*, defaults to 8): Width of the pixel half of a code vector.
        semantic_distance_weight (`float`, *optional*, defaults to 1.0):
            Weight of the semantic distance against the pixel distance when a code is looked up.
        commitment_cost (`float`, *optional*, defaults to 0.25): Weight of the commitment loss.
        num_scales (`int`, *optional*, defaults to 18): The largest number of scales that images are encoded to.
        stride (`int`, *optional*, defaults to 16): Pixels a cell of the last grid.
        scale_sides (`list[int]`, *optional*):
            Sides of the square schedule's grids, one per scale, where they differ from the paper's (as TokenFlow's do).
        image_size (`int`, *optional*):
            Side of the only (square) images that the tokenizer takes, where it is not `stride` times that of the last
            grid. The semantic encoder gets them as they are, the CNNs get them resized.
        semantic_config (`dict` or `PreTrainedConfig`, *optional*):
            The semantic encoder: a configuration of the model type `"siglip2_vision_model"`, `"siglip_vision_model"`,
            `"clip_vision_model"` or `"timm_wrapper"` (this one with `hidden_size` and `patch_size` added). Defaults to
            SigLIP2-so400m-patch16-naflex.
        semantic_image_mean (`list[float]`, *optional*), semantic_image_std (`list[float]`, *optional*):
            Mean and deviation that the semantic encoder's images are normalised with, by channel, for values clamped
            to [0, 1]. By default it gets images in [-1, 1] as they are.
        vision_feature_layer (`int`, *optional*, defaults to -2):
            Which of the semantic encoder's hidden states is used; None for its normalised output.
        semantic_feature_dim (`int`, *optional*):
            Width of the teacher's features that the semantic decoder predicts. Defaults to the encoder's width.
        semantic_decoder_layers (`int`, *optional*, defaults to 3): Depth of the semantic decoder (a ViT).
        semantic_decoder_hidden_size (`int`, *optional*): Its width. Defaults to the encoder's width.
        semantic_decoder_num_heads (`int`, *optional*, defaults to 12): Its number of heads.
        semantic_decoder_intermediate_size (`int`, *optional*): Width of its MLPs. Defaults to four times its width.
        semantic_decoder_grid_size (`int`, *optional*):
            Makes the semantic decoder TokenFlow's, with a class token and learned positions for a grid of this side
            (resized for others). By default it is a NaFlex ViT, which takes any grid as it is.
        pixel_patch_size (`int`, *optional*, defaults to 1):
            Pixels per side that the CNNs fold into channels at full resolution (space to depth); 1 folds none.
        encoder_hidden_sizes (`list[int]`, *optional*, defaults to `[128, 128, 256, 256, 512]`):
            CNN widths, from the highest resolution to the lowest; each level but the last halves the resolution.
        encoder_num_res_blocks (`int`, *optional*, defaults to 2): Residual blocks a level.
        decoder_hidden_sizes (`list[int]`, *optional*, defaults to `[128, 128, 256, 256, 512]`):
            As for the encoder, from the highest resolution to the lowest.
        decoder_num_res_blocks (`int`, *optional*, defaults to 2):
            Residual blocks per level; a decoder level has one more, as in VQGAN.
        latent_channels (`int`, *optional*, defaults to 256):
            Channels between the CNNs and the 1x1 convolutions to and from the codes.
        cnn_norm_groups (`int`, *optional*, defaults to 32): Groups of the CNNs' GroupNorm.
        self_correction_top_k (`int`, *optional*, defaults to 10):
            Self-correction encoding draws a code among this many nearest.
        self_correction_token_fraction (`float`, *optional*, defaults to 0.6):
            Fraction of the tokens of a scale for which a code is drawn.
        self_correction_temperature (`float`, *optional*, defaults to 1.0):
            Temperature of the softmax over negative distances.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of newly made linear weights.
    """

    model_type = "nextflow_image_tokenizer"
    sub_configs = {"semantic_config": AutoConfig}

    codebook_size: int = 32768
    semantic_code_dim: int = 32
    pixel_code_dim: int = 8
    semantic_distance_weight: float | int = 1.0
    commitment_cost: float | int = 0.25
    num_scales: int = 18
    stride: int = 16
    scale_sides: list[int] | tuple[int, ...] | None = None
    image_size: int | None = None
    semantic_config: Any = None  # a dict, a configuration or None; a configuration after `__post_init__`
    semantic_image_mean: list[float] | tuple[float, ...] | None = None
    semantic_image_std: list[float] | tuple[float, ...] | None = None
    vision_feature_layer: int | None = -2
    semantic_feature_dim: int | None = None
    semantic_decoder_layers: int = 3
    semantic_decoder_hidden_size: int | None = None
    semantic_decoder_num_heads: int = 12
    semantic_decoder_intermediate_size: int | None = None
    semantic_decoder_grid_size: int | None = None
    pixel_patch_size: int = 1
    encoder_hidden_sizes: list[int] | tuple[int, ...] = (128, 128, 256, 256, 512)
    encoder_num_res_blocks: int = 2
    decoder_hidden_sizes: list[int] | tuple[int, ...] = (128, 128, 256, 256, 512)
    decoder_num_res_blocks: int = 2
    latent_channels: int = 256
    cnn_norm_groups: int = 32
    self_correction_top_k: int = 10
    self_correction_token_fraction: float | int = 0.6
    self_correction_temperature: float | int = 1.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.semantic_config is None:
            self.semantic_config = {
                "model_type": "siglip2_vision_model",
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
            }
        if isinstance(self.semantic_config, dict):
            settings: dict[str, Any] = dict(self.semantic_config)
            model_type = settings.pop("model_type", "siglip2_vision_model")
            if model_type not in CONFIG_MAPPING:
                raise ValueError(f'`semantic_config` names the unknown model type "{model_type}".')
            self.semantic_config = CONFIG_MAPPING[model_type](**settings)
        if not isinstance(self.semantic_config, PreTrainedConfig):
            raise ValueError(f"`semantic_config` must be a dict or a config, but got {self.semantic_config!r}.")
        if self.semantic_feature_dim is None:
            self.semantic_feature_dim = self.semantic_config.hidden_size
        if self.semantic_decoder_hidden_size is None:
            self.semantic_decoder_hidden_size = self.semantic_config.hidden_size
        super().__post_init__(**kwargs)
        self._check_geometry()

    def _check_geometry(self):
        # Both CNNs must have the stride that the grids are made for.
        for name in ("encoder_hidden_sizes", "decoder_hidden_sizes"):
            stride = self.pixel_patch_size * 2 ** (len(getattr(self, name)) - 1)
            if stride != self.stride:
                raise ValueError(
                    f"`{name}` has {len(getattr(self, name))} levels, which with `pixel_patch_size` "
                    f"{self.pixel_patch_size} give a stride of {stride}, but `stride` is {self.stride}."
                )
        ScaleSchedule(num_scales=self.num_scales, stride=self.stride, sides=self.sides)  # raises if there is none
        if (self.semantic_image_mean is None) != (self.semantic_image_std is None):
            raise ValueError("Give both `semantic_image_mean` and `semantic_image_std`, or neither.")
        if self.self_correction_top_k > self.codebook_size:
            raise ValueError(
                f"`self_correction_top_k` ({self.self_correction_top_k}) must not be above `codebook_size` "
                f"({self.codebook_size})."
            )

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the square schedule's grids, the paper's or `scale_sides`."""
        return BASE_SIDES if self.scale_sides is None else tuple(self.scale_sides)

    @property
    def code_dim(self) -> int:
        """Width of a whole code vector."""
        return self.semantic_code_dim + self.pixel_code_dim


__all__ = ["NextFlowConfig", "NextFlowImageTokenizerConfig"]
