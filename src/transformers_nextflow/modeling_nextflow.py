"""NextFlow's language model: one decoder-only transformer over text ids and visual codes (arXiv 2601.02204).

Letters: B rows, L slots per row, H hidden size, D width of a code vector, G images of one schedule, n codes, S scales.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLAttention,
    Qwen2_5_VLDecoderLayer,
    Qwen2_5_VLRMSNorm,
    Qwen2_5_VLRotaryEmbedding,
)
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_nextflow import NextFlowConfig
from .generation_config_nextflow import NextFlowGenerationConfig
from .generation_nextflow import NextFlowGenerationMixin
from .layer_compilation import call_layer, compiled_layer
from .linear_cross_entropy import head_cross_entropy, is_plain_linear
from .model_inputs import (
    check_labels,
    check_learned_slots,
    check_names,
    check_scale_step,
    lay_out,
    mark_image,
    split_position_ids,
    text_positions,
)
from .scale_cache import CacheRows, RowGroup, ScaleCache, with_fixed_lengths
from .scale_schedule import ScaleSchedule
from .strict_loading import StrictPreTrainedModel
from .token_layout import ImageGroup, ScaleStep, TokenLayout, find_sequences, index_of_sequence_start, targets_of_slots
from .varlen_attention import SDPA_VARLEN, MaskedSequences


def scale_feature_maps(
    vectors: torch.Tensor, schedule: ScaleSchedule, scales: range, accumulated: bool = False, own_map: bool = False
) -> torch.Tensor:
    """Feature maps made of the codes before a scale, which the connector turns into input slots.

    Residual (NextFlow): the code vectors of scale s - 1, resized to the grid of s. Accumulated (TokenFlow): the map of
    scale s - 1 and its code vectors, summed and resized to the grid of s, from scale to scale.

    Args:
        vectors (`torch.FloatTensor` of shape `(G, n, D)`):
            Code vectors of consecutive scales: from scale 0 on if `accumulated`, else from `scales.start - 1` on.
        schedule (`ScaleSchedule`): The images' schedule.
        scales (`range`): The scales to make maps for, the first at least 1.
        accumulated (`bool`, *optional*, defaults to `False`): Accumulated instead of residual.
        own_map (`bool`, *optional*, defaults to `False`):
            Add the code vectors of the last scale, which `vectors` then hold, to its accumulated map.

    Returns:
        `torch.FloatTensor` of shape `(G, sum of n_s over scales, D)`.
    """
    first = 0 if accumulated else scales.start - 1
    maps = [vectors[:, :0]]
    resized = vectors.new_zeros(())
    for s in range(first + 1, scales.stop):
        start, stop = (offset - schedule.offsets[first] for offset in schedule.offsets[s - 1 : s + 1])
        previous = vectors[:, start:stop].transpose(1, 2).unflatten(-1, schedule.grids[s - 1])
        if accumulated:
            previous = previous + resized
        resized = F.interpolate(previous, schedule.grids[s], mode="bicubic", align_corners=False)
        if s in scales:
            maps.append(resized.flatten(2).transpose(1, 2))
    if own_map:
        maps[-1] = maps[-1] + vectors[:, schedule.offsets[scales.stop - 1] :]
    return torch.cat(maps, dim=1)


_ONE_SCALE = ScaleSchedule(num_scales=1)


class NextFlowPreTrainedModel(StrictPreTrainedModel):
    """Loading, and the flags that transformers reads."""

    config_class = NextFlowConfig
    size_fields = ("text_vocab_size", "visual_codebook_size")
    base_model_prefix = "model"
    input_modalities = ("text", "image")  # type: ignore[assignment]  # a tuple upstream, too
    output_modalities = ("text", "image")  # type: ignore[assignment]  # a tuple upstream, too
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2_5_VLDecoderLayer"]
    _skip_keys_device_placement = ["cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Not for the precision: quantizers leave these alone, and none can take rows of 40 numbers in groups of 32 or 64.
    _keep_in_fp32_modules = ["connector", "model.connector"]
    _can_record_outputs = {"hidden_states": Qwen2_5_VLDecoderLayer, "attentions": Qwen2_5_VLAttention}

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs):
        """Checks that this many text ids fit, and changes nothing: a vocabulary has unused ids for new tokens.

        Args:
            new_num_tokens (`int`, *optional*): `len(tokenizer)` after `tokenizer.add_tokens`.

        Returns:
            The input embeddings.

        Raises:
            `ValueError`: if they don't: visual ids follow the text ids, so new text rows would shift all of them.
        """
        size = self.config.text_vocab_size
        if new_num_tokens is not None and new_num_tokens > size and new_num_tokens != self.config.vocab_size:
            raise ValueError(
                f"{new_num_tokens} tokens don't fit into the {size} text ids (`config.text_vocab_size`), and the "
                "vocabulary can't be resized: visual ids follow the text ids. Add fewer tokens."
            )
        return self.get_input_embeddings()


class Connector(nn.Sequential):
    """Turns features into input slots, in its own dtype: fp32 beside fp16 or quantised weights; PEFT's copy differs."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        first: Any = self[0]
        return super().forward(input.to(first.weight.dtype))


class NextFlowRotaryEmbedding(Qwen2_5_VLRotaryEmbedding):
    """Multi-scale 3D RoPE: Qwen2.5-VL's, or with the axes in turn, so that columns don't get the lowest frequencies."""

    def recomposition_frequencies(self, freq: torch.Tensor) -> torch.Tensor:
        """Combines cosines or sines of each axis, `(3, B, L, pairs)`, into those of the head, `(B, L, 2 * pairs)`."""
        if not self.config.rope_parameters.get("mrope_interleaved", False):
            return super().recomposition_frequencies(freq)
        # As in Qwen3-VL: pair i belongs to axis i mod 3 while that axis' section lasts, and then to the first.
        chosen = freq[0].clone()
        for axis in (1, 2):
            pairs = slice(axis, 3 * self.mrope_section[axis], 3)
            chosen[..., pairs] = freq[axis][..., pairs]
        return torch.cat((chosen, chosen), dim=-1)


class LayerInputs(NamedTuple):
    """The inputs of the layers.

    Args:
        embeds (`torch.FloatTensor` of shape `(B, L, H)`): The slots.
        position_ids (`torch.FloatTensor` of shape `(3, B, L)`): Their coordinates.
        mask (`torch.Tensor` or `BlockMask`, *optional*): Who sees whom.
        kwargs (`dict`): Further arguments of the attention.
        groups (`list[RowGroup]`, *optional*): Groups of rows that run one after the other, without masks.
        run_layer (`Callable`): Calls a layer on a group.
    """

    embeds: torch.Tensor
    position_ids: torch.Tensor
    mask: Any
    kwargs: dict[str, Any]
    groups: list[RowGroup] | None = None
    run_layer: Callable[..., torch.Tensor] = call_layer


class NextFlowModel(NextFlowPreTrainedModel):
    """Qwen2.5-VL's text layers on NextFlow's input view: embeddings, positions and masks are all made here."""

    layer_class: type[nn.Module] = Qwen2_5_VLDecoderLayer
    norm_class: type[nn.Module] = Qwen2_5_VLRMSNorm
    rotary_class: type[nn.Module] = NextFlowRotaryEmbedding

    def __init__(self, config: NextFlowConfig):
        super().__init__(config)
        if getattr(config, "use_sliding_window", False):
            raise ValueError("NextFlow attends to whole images: `use_sliding_window` must be False.")
        # Visual ids have no row: they enter through the codebook and the connector.
        self.embed_tokens = nn.Embedding(config.text_vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_hidden_layers))
        self.norm = self.norm_class(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = self.rotary_class(config)
        self.visual_codebook = nn.Embedding(config.visual_codebook_size, config.visual_code_dim)
        self.connector = Connector(
            nn.Linear(config.visual_code_dim, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )
        self.scale_embedding = nn.Embedding(config.num_scales, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module):
        # A row of the codebook is two unit vectors; the connector's first layer keeps their spread.
        code_dim = self.config.visual_code_dim
        if module is self.visual_codebook:
            init.normal_(module.weight, std=math.sqrt(2 / code_dim))
        elif module is self.connector[0]:
            init.normal_(module.weight, std=1 / math.sqrt(code_dim))
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        image_grid_shw: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        scale_step: ScaleStep | None = None,
        seq_idx: torch.LongTensor | None = None,
        layout: TokenLayout | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`, *optional*):
                Token-view ids. In a step for scale s: the ids of the codes of scale s - 1, `(B, n_{s-1})` (with
                `visual_feature_mode="accumulated"`: of all scales before s).
            image_grid_shw (`torch.LongTensor` of shape `(num_images, 3)`, *optional*):
                Number of scales, bucket height and bucket width of each image, in reading order over the batch.
            attention_mask (`torch.Tensor` of shape `(B, past + L)`, *optional*):
                0 where a slot is padding (left or right). A 4D mask or a dict is used as it is.
            position_ids (`torch.Tensor` of shape `(3, B, L)`, *optional*):
                Scale, row and column coordinates. Made here when absent; required with `scale_step`, and with a cache
                that holds an image. Four rows carry text positions of packed sequences first, as in Qwen2.5-VL.
            scale_step ([`ScaleStep`], *optional*):
                A cached decoding step of one scale, whose slots see the whole cache and each other.
            seq_idx (`torch.LongTensor` of shape `(B, L)`, *optional*):
                Packed rows: the number of the sequence that each slot belongs to. Sequences don't see each other, and
                positions restart where it changes. Padding is a sequence of its own, so there is no `attention_mask`.
            layout ([`TokenLayout`], *optional*):
                That of `input_ids` made before, in place of `image_grid_shw`; the host then waits for no tensor.

        Raises:
            `ValueError`: if ids, grids and arguments don't fit each other, or for an argument that is not known.
        """
        check_names(NextFlowModel.forward, kwargs)
        if use_cache and cache is None and seq_idx is None:
            cache = DynamicCache(config=self.config)
        num_past = cache.get_seq_length() if cache is not None else 0

        if scale_step is not None:
            others = (image_grid_shw, seq_idx, layout)
            check_scale_step(self.config, scale_step, input_ids, attention_mask, position_ids, num_past, others)
            inputs = self._scale_step_inputs(scale_step, input_ids, attention_mask, position_ids, cache, num_past)
        else:
            given = (input_ids, inputs_embeds, image_grid_shw, attention_mask, position_ids, seq_idx, cache)
            layout = lay_out(self.config, *given, layout)
            if position_ids is None and layout is not None:
                position_ids = layout.position_ids
            embeds = self._embed(input_ids, inputs_embeds, layout)
            if seq_idx is not None:
                inputs = self._packed_inputs(embeds, layout, position_ids, seq_idx)
            else:
                inputs = self._whole_inputs(embeds, layout, attention_mask, position_ids, cache, num_past)
        if cache is not None and (scale_step is not None or (layout is not None and layout.images)):
            mark_image(cache, num_past)

        hidden_states = inputs.embeds
        position_embeddings = self.rotary_emb(hidden_states, inputs.position_ids)
        kwargs = {**kwargs, **inputs.kwargs, "attention_mask": inputs.mask}
        if inputs.groups is not None:
            hidden_states = self._run_groups(
                inputs.groups, hidden_states, position_embeddings, cache, inputs.run_layer, **kwargs
            )
        for layer in self.layers if inputs.groups is None else ():
            hidden_states = layer(
                hidden_states, position_embeddings=position_embeddings, cache=cache, use_cache=use_cache, **kwargs
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), cache=cache if use_cache else None)

    def _whole_inputs(self, embeds, layout, attention_mask, position_ids, cache, num_past) -> LayerInputs:
        """One sequence per row, padded or not, with or without a cache before it."""
        text_position_ids, position_ids = split_position_ids(position_ids)
        if position_ids is None:
            position_ids = text_positions(embeds, attention_mask, num_past)
        mask = self._causal_mask(embeds, attention_mask, cache, num_past, text_position_ids, layout)
        return LayerInputs(embeds, position_ids, mask, {"position_ids": text_position_ids})

    def _packed_inputs(self, embeds, layout, position_ids, seq_idx) -> LayerInputs:
        """Several sequences per row."""
        text_position_ids, position_ids = split_position_ids(position_ids)
        if text_position_ids is None:
            slots = torch.arange(seq_idx.shape[1], device=seq_idx.device)
            text_position_ids = slots - index_of_sequence_start(seq_idx)
        if position_ids is None:
            position_ids = text_position_ids.float().expand(3, -1, -1)
        kwargs = {"position_ids": text_position_ids}
        if self.config._attn_implementation == SDPA_VARLEN:
            block_ids, sequences = (None, None) if layout is None else (layout.block_ids, layout.sequences)
            masked = MaskedSequences(sequences or find_sequences(seq_idx, block_ids), block_ids)
            return LayerInputs(embeds, position_ids, None, {**kwargs, "packed_sequences": masked})
        mask = self._causal_mask(embeds, None, None, 0, text_position_ids, layout)
        return LayerInputs(embeds, position_ids, mask, kwargs)

    def _scale_step_inputs(self, step, input_ids, attention_mask, position_ids, cache, num_past) -> LayerInputs:
        """One scale of an image in every row; there is no mask where every slot of the cache is real."""
        try:
            # Out-of-range codes are left to the codebook: looking at them here would make the host wait.
            codes = input_ids - self.config.text_vocab_size
            embeds = self._features(codes, step.schedule, range(step.index, step.index + 1), step.own_map)
        except IndexError as error:
            raise ValueError(
                f"A scale step takes visual ids only, {self.config.text_vocab_size} to {self.config.vocab_size - 1}."
            ) from error
        groups = mask = None
        if isinstance(cache, ScaleCache) and (attention_mask is None or cache.padding is not None):
            groups = cache.row_groups(*embeds.shape[:2])
        if isinstance(attention_mask, dict):
            mask = attention_mask["full_attention"]
        elif groups is None:
            mask = self._scale_step_mask(embeds, attention_mask, cache, num_past)
        run_layer = call_layer
        # Flex attention compiles itself; its masks are new functions at each step, so a layer with one would not last.
        can_compile = isinstance(cache, ScaleCache) and (mask is None or isinstance(mask, torch.Tensor))
        if step.compile_config is not None and can_compile:
            run_layer = compiled_layer(step.compile_config)
            groups = ScaleCache.equal_groups(groups or [RowGroup(0, len(embeds), 0)])
        # Not causal, or SDPA would take "no mask" for "causal" and use the first n_s keys only.
        kwargs = {"is_causal": False} if groups is not None else {"is_causal": False, "position_ids": None}
        return LayerInputs(embeds, position_ids, mask, kwargs, groups, run_layer)

    def _run_groups(
        self,
        groups: list[RowGroup],
        hidden_states: torch.Tensor,
        position_embeddings,
        cache: Any,
        run_layer: Callable[..., torch.Tensor],
        **kwargs,
    ) -> torch.Tensor:
        """Runs the layers on a few rows at a time: no mask, and less memory. `(B, n, H)` to `(B, n, H)`."""
        rows = [slice(group.start, group.stop) for group in groups]
        states = [hidden_states[part] for part in rows]
        embeddings = [tuple(embedding[part] for embedding in position_embeddings) for part in rows]
        caches = [CacheRows(cache, group) for group in groups]
        for layer in self.layers:
            for i, cache_rows in enumerate(caches):
                states[i] = run_layer(
                    layer,
                    states[i],
                    position_embeddings=embeddings[i],
                    cache=cache_rows,
                    use_cache=True,
                    **kwargs,
                )
        cache.advance(hidden_states.shape[1])
        return torch.cat(states)

    def _embed(self, input_ids, inputs_embeds, layout: TokenLayout | None) -> torch.Tensor:
        """Input view of token-view ids: `(B, L)` -> `(B, L, H)`."""
        if inputs_embeds is None:
            inputs_embeds = self._embed_text(input_ids)
        images = [] if layout is None else layout.images
        if not images:
            if not (self.training and torch.is_grad_enabled()):
                return inputs_embeds
            # Every part takes part in every training batch, if with no slot: else ranks that do have images would wait
            # for its gradients for ever.
            none = torch.zeros(0, 1, dtype=torch.long, device=inputs_embeds.device)
            input_ids, images = none, [ImageGroup(_ONE_SCALE, 1, none)]
        features = []
        for group in images:
            seen = group.slots[:, : group.schedule.offsets[group.num_scales - 1]]  # the last scale is never an input
            codes = input_ids.flatten()[seen] - self.config.text_vocab_size
            features.append(self._features(codes, group.schedule, range(1, group.num_scales)).flatten(0, 1))
        slots = torch.cat([group.feature_slots.flatten() for group in images])
        placed = inputs_embeds.flatten(0, 1).index_copy(0, slots, torch.cat(features).to(inputs_embeds))
        return placed.view_as(inputs_embeds)

    def _embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Slots of text. That of an image's last code carries `<eoi>`; those of other codes are overwritten."""
        is_code = input_ids >= self.config.text_vocab_size
        return self.embed_tokens(input_ids.masked_fill(is_code, self.config.eoi_token_id))

    def _features(
        self, codes: torch.Tensor, schedule: ScaleSchedule, scales: range, own_map: bool = False
    ) -> torch.Tensor:
        """Input slots of `scales` from the codes before them: `(G, n)` -> `(G, sum of n_s over scales, H)`."""
        # In fp32: resizing in low precision would lose what the codes tell apart.
        vectors = self.visual_codebook(codes).float()
        accumulated = self.config.visual_feature_mode == "accumulated"
        maps = scale_feature_maps(vectors, schedule, scales, accumulated, own_map)
        of_scale = self.scale_embedding(torch.arange(scales.start, scales.stop, device=codes.device))
        lengths = schedule.scale_lengths[scales.start : scales.stop]
        of_slot = [row.expand(length, -1) for row, length in zip(of_scale, lengths, strict=True)] or [of_scale]
        # In the dtype of text, whatever dtypes these modules have.
        features = self.connector(maps).to(self.embed_tokens.weight.dtype)
        # These modules may be on several devices, and the ids on another (`device_map="auto"`).
        features = features + torch.cat(of_slot).to(features)
        return (features + self._image_embedding(schedule, scales, features.device).to(features)).to(codes.device)

    def _image_embedding(self, schedule: ScaleSchedule, scales: range, device: torch.device) -> torch.Tensor:
        """What all slots share: sinusoidal embedding `(H,)` of the number of scales, as wide as a freshly made one."""
        half = self.config.hidden_size // 2
        angles = schedule.num_scales * 10000.0 ** (-torch.arange(half, dtype=torch.float32, device=device) / half)
        return math.sqrt(2) * self.config.initializer_range * torch.cat([angles.sin(), angles.cos()])

    def _scale_step_mask(self, inputs_embeds, attention_mask, cache, num_past):
        """No mask when every cached slot is real, so that fused kernels run."""
        num_visible = num_past + inputs_embeds.shape[1]
        num_keys = num_visible if cache is None else cache.get_mask_sizes(inputs_embeds.shape[1], 0)[0]
        if attention_mask is None:
            if num_keys == num_visible:
                return None
            attention_mask = inputs_embeds.new_ones((inputs_embeds.shape[0], int(num_visible)), dtype=torch.long)
        # A static cache hands out its empty slots too.
        attention_mask = F.pad(attention_mask, (0, num_keys - attention_mask.shape[-1]))
        mask = create_bidirectional_mask(self.config, inputs_embeds, attention_mask, cache=cache)
        if isinstance(mask, torch.Tensor) and mask.ndim == 4:
            return mask[:, :, :1].clone()  # all queries see the same keys, so one row does for all of them
        return mask

    def _causal_mask(self, inputs_embeds, attention_mask, cache, num_past, text_position_ids, layout):
        """Causal between blocks, full inside a block; without images exactly Qwen's mask (or none)."""
        if isinstance(attention_mask, dict):
            return attention_mask["full_attention"]
        block_ids, is_flash = None, is_flash_attention_requested(self.config)
        if layout is not None and layout.is_padded is False and attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = None  # whose values would be looked at
        if layout is not None and (layout.images or (layout.is_padded and not is_flash)):
            if is_flash:
                raise ValueError(
                    f'attn_implementation="{self.config._attn_implementation}" can\'t let the slots of one scale see '
                    'each other, as sequences with images need. Use "sdpa" or "flex_attention". (Text, and scale steps '
                    "with a cache, do run on flash attention.)"
                )
            block_ids = F.pad(layout.block_ids, (int(num_past), 0), value=-1)
        if cache is not None and self.config._attn_implementation == "flex_attention":
            cache = with_fixed_lengths(cache)
        return create_causal_mask(
            self.config,
            inputs_embeds,
            attention_mask,
            cache,
            position_ids=text_position_ids,
            block_sequence_ids=block_ids,
        )


@dataclass
class NextFlowCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Args:
        token_losses (`torch.FloatTensor` of shape `(B, L)`, *optional*):
            Beside a loss: the unweighted cross-entropy of each slot's prediction, 0 where there is none. No gradient.
        image_codes (`torch.LongTensor` of shape `(B, n)`, *optional*): What a `code_sampler` drew.

    The other fields are transformers' own.
    """

    token_losses: torch.Tensor | None = None
    image_codes: torch.Tensor | None = None


class NextFlowForCausalLM(NextFlowPreTrainedModel, NextFlowGenerationMixin):  # type: ignore[misc]  # both name `config`
    """NextFlow with its one output head over text and visual ids."""

    generation_config_class = NextFlowGenerationConfig
    model_class: type[NextFlowModel] = NextFlowModel
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # as in transformers
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: NextFlowConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        image_grid_shw: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        scale_step: ScaleStep | None = None,
        seq_idx: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        visual_logits: bool = False,
        skip_logits: bool | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        layout: TokenLayout | None = None,
        **kwargs,
    ) -> NextFlowCausalLMOutputWithPast:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `(B, L)`, *optional*):
                Token-view ids to predict, -100 where nothing is; `labels=input_ids` works, the shift is made here. The
                loss is the mean cross-entropy in which the scales of each image weigh `1 / (h_s * w_s) ** alpha`,
                normalised within the image (`config.scale_reweight_alpha`; 0 gives the stock loss).
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute only the last `logits_to_keep` logits (0: all), or those at the given places.
            visual_logits (`bool`, *optional*, defaults to `False`):
                Return `(B, L, visual_codebook_size)` logits, of the visual ids only.
            skip_logits (`bool`, *optional*):
                Whether to return no logits beside a loss, which is computed in chunks that never hold them all. By
                default they are left out in training mode only, so that `model.eval()(ids, labels=ids)` has logits as
                usual; pass True wherever only the loss is wanted.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*):
                What the sum of the losses is divided by; by default the number of predicted tokens.

        The other arguments are [`NextFlowModel.forward`]'s.

        Example:

        ```python
        >>> outputs = model(input_ids, image_grid_shw=torch.tensor([[8, 16, 16]]), labels=input_ids)
        >>> outputs.loss.backward()
        ```
        """
        check_names(NextFlowForCausalLM.forward, kwargs)
        if labels is not None:
            slots = input_ids if inputs_embeds is None else inputs_embeds
            check_labels(self.config, labels, slots, scale_step, num_items_in_batch, layout)
            if image_grid_shw is not None and layout is None:  # the loss needs the images, too: they are found once
                given = (input_ids, inputs_embeds, image_grid_shw, attention_mask, position_ids, seq_idx, cache)
                layout = lay_out(self.config, *given)
                image_grid_shw = image_grid_shw if layout is None else None
        outputs = self.model(
            input_ids=input_ids,
            image_grid_shw=image_grid_shw,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            scale_step=scale_step,
            seq_idx=seq_idx,
            layout=layout,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = logits = token_losses = image_codes = None
        if labels is not None:
            loss, token_losses = self._loss(hidden_states, labels, layout, seq_idx, num_items_in_batch)
        if loss is None or not (self.training if skip_logits is None else skip_logits):
            hidden_states = slice_logits_to_keep(hidden_states, logits_to_keep)
            if scale_step is not None and scale_step.code_sampler is not None:
                image_codes = scale_step.code_sampler(self._visual_head, hidden_states)
            else:
                logits = self._visual_head(hidden_states) if visual_logits else self.lm_head(hidden_states)
        return NextFlowCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            token_losses=token_losses,
            image_codes=image_codes,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(self, hidden_states, labels, layout, seq_idx, num_items) -> tuple[torch.Tensor, torch.Tensor]:
        """Shifted cross-entropy with a weight per token, and that of each token without weights, `(B, L)`."""
        targets, weights = targets_of_slots(labels, seq_idx).to(hidden_states.device), None
        if layout is None or layout.learned_slots is None:
            slots = (targets != -100).nonzero()[:, 0]
        else:
            slots = layout.learned_slots.to(targets.device)
            check_learned_slots(self.config, slots, targets)
        if layout is not None and (alpha := float(self.config.scale_reweight_alpha)):
            weights = F.pad(layout.loss_weights(alpha)[:, 1:], (0, 1)).to(slots.device).flatten()[slots]
        total, losses = head_cross_entropy(
            self.lm_head, hidden_states.flatten(0, 1)[slots], targets[slots], self.config.vocab_size, weights
        )
        token_losses = losses.new_zeros(targets.shape).index_copy(0, slots, losses).view(labels.shape)
        num_items = len(slots) if num_items is None else num_items
        return total / (num_items + (num_items == 0)), token_losses  # 0 of 0 is 0: a rank may have nothing to learn

    def _visual_head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits of the visual rows only; the text rows are multiplied only where the head can't be cut."""
        head, first = self.lm_head, self.config.text_vocab_size
        if is_plain_linear(head):
            return F.linear(hidden_states, head.weight[first:])
        return head(hidden_states)[..., first:]


__all__ = ["NextFlowForCausalLM", "NextFlowModel", "NextFlowPreTrainedModel"]
