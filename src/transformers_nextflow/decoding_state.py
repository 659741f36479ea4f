"""Rows that share one cache: where they stand, and how text, whole images or single scales are appended to them.

Letters: B rows, T slots that the cache holds, q slots of a step, n_s codes of a scale, K codes in the codebook.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import CompileConfig

from .scale_cache import ScaleCache
from .scale_schedule import ScaleSchedule
from .token_layout import ScaleStep, TokenLayout, positions_before, scale_position_ids


class DecodingState:
    """A cache, which of its slots are real, and the position that each row goes on from.

    Rows may run at different paces: a row that takes no part in a step gets a masked slot. As long as every slot is
    real no mask is made, so steps run on fused attention kernels.

    Args:
        model ([`NextFlowForCausalLM`]): Every step goes through its `forward`.
        num_rows (`int`): B.
        cache (`Cache`, *optional*): An empty cache; a `DynamicCache` by default.
        device (`torch.device`, *optional*): The ids' device; the model's by default.
        compile_config (`CompileConfig`, *optional*): Compiles the layers of scale steps; needs a [`ScaleCache`].
    """

    def __init__(
        self,
        model: Any,
        num_rows: int,
        cache: Cache | None = None,
        device: torch.device | None = None,
        compile_config: CompileConfig | None = None,
    ):
        self.model, self.compile_config = model, compile_config
        self.cache = DynamicCache(config=model.config) if cache is None else cache
        device = model.device if device is None else device
        self.mask = torch.ones(num_rows, 0, dtype=torch.long, device=device)
        self.position = torch.zeros(num_rows, dtype=torch.long, device=device)
        self._all_real = True

    @property
    def num_slots(self) -> int:
        """T."""
        return self.mask.shape[1]

    def run(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        image_grid_shw: torch.Tensor | None = None,
        visual_logits: bool = False,
    ) -> torch.Tensor:
        """Appends token-view ids, whole images among them, and returns the logits of the last slot.

        Args:
            ids (`torch.LongTensor` of shape `(B, q)`): A step that starts with an image's last code has `<eoi>` there.
            mask (`torch.Tensor` of shape `(B, q)`, *optional*): 0 where a row has no token.
            image_grid_shw (`torch.LongTensor` of shape `(num_images, 3)`, *optional*): Grids of the images in `ids`.
            visual_logits (`bool`, *optional*, defaults to `False`): Return logits of the visual ids alone.

        Returns:
            `torch.FloatTensor` of shape `(B, vocab_size)`, or `(B, K)`.
        """
        layout = TokenLayout.of(ids, image_grid_shw, self.model.config, mask, self.position[:, None])
        real = torch.ones_like(ids) if mask is None else mask.long()
        self._all_real = self._all_real and (mask is None or bool(mask.all()))
        self.mask = torch.cat([self.mask, real], dim=1)
        logits = self.model(
            input_ids=ids,
            image_grid_shw=image_grid_shw,
            attention_mask=None if self._all_real else self.mask,
            position_ids=layout.position_ids,
            cache=self.cache,
            use_cache=True,
            logits_to_keep=1,
            visual_logits=visual_logits,
        ).logits
        furthest = torch.where(real.bool(), layout.position_ids[0].long() + 1, 0).amax(-1)
        self.position = torch.maximum(self.position, furthest)
        return logits[:, -1]

    def run_scale(
        self,
        ids: torch.Tensor,
        schedule: ScaleSchedule,
        scale_index: int,
        code_sampler: Callable[..., torch.Tensor],
        own_map: bool = False,
    ) -> torch.Tensor:
        """Appends the slots of one scale of an image that every row has open, and draws from what they predict.

        Args:
            ids (`torch.LongTensor` of shape `(B, n)`): Ids that the scale's features are made of, see
                [`NextFlowModel.forward`].
            schedule (`ScaleSchedule`): The image's.
            scale_index (`int`): The scale, at least 1; after scale 0 the position is that of the slot after `<boi>`.
            code_sampler (`Callable`): See [`ScaleStep`].
            own_map (`bool`, *optional*, defaults to `False`):
                The scale's slots are there already, and its codes among the ids: predicts these anew, from what they
                have become (see [`ScaleStep`]). This leaves no trace in the state.

        Returns:
            What the sampler returned.
        """
        spatial_range, number = self.model.config.rope_spatial_range, schedule.scale_lengths[scale_index]
        cache = self.cache
        before, after = (positions_before(schedule, index, spatial_range) for index in (scale_index, scale_index + 1))
        if own_map:
            cache = self._cache_without_last(number)
        else:
            self.mask, self.position = F.pad(self.mask, (0, number), value=1), self.position + after - before
        return self.model(
            input_ids=ids,
            attention_mask=None if self._all_real else self.mask,
            position_ids=scale_position_ids(self.position - after, schedule, scale_index, spatial_range),
            cache=cache,
            use_cache=True,
            scale_step=ScaleStep(schedule, scale_index, own_map, code_sampler, self.compile_config),
        ).image_codes

    def _cache_without_last(self, number: int) -> Cache:
        """The cache without its last slots, for one step in their place."""
        num_slots = self.num_slots - number
        if isinstance(self.cache, ScaleCache):
            return self.cache.beginning(num_slots, number)
        twin = self.fork()
        twin.crop(num_slots, self.position)
        return twin.cache

    def select(self, rows: torch.Tensor) -> None:
        """Keeps the given rows, in the given order; a row may occur more than once."""
        if len(rows) == len(self.mask) and torch.equal(rows, torch.arange(len(rows), device=rows.device)):
            return
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]
        self.mask, self.position = self.mask[rows], self.position[rows]
        self._all_real = self._all_real or bool(self.mask.all())

    def crop(self, num_slots: int, position: torch.Tensor) -> None:
        """Drops all slots but the first `num_slots`; `position` `(B,)` is what it was then."""
        if not 0 <= num_slots <= self.num_slots:
            raise ValueError(f"A cache of {self.num_slots} slots can't be cropped to {num_slots}.")
        layers: list[Any] = list(self.cache.layers)
        for layer in layers:  # by their own lengths: a forward that failed reached some of them only
            if type(layer) is DynamicLayer and layer.keys is not None:  # keys may be longer than values then
                layer.keys, layer.values = layer.keys[:, :, :num_slots], layer.values[:, :, :num_slots]  # type: ignore[index]
            elif (extra := int(layer.get_seq_length()) - num_slots) > 0:
                layer.crop(-extra)
        self.mask, self.position = self.mask[:, :num_slots], position.clone()
        self._all_real = bool(self.mask.all())

    @property
    def num_bytes(self) -> int:
        """Memory of the cached keys and values; a fork shares what it has in common."""
        layers: list[Any] = list(self.cache.layers)
        tensors = (tensor for layer in layers for tensor in (layer.keys, layer.values))
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def offload(self) -> None:
        """Moves keys and values to the CPU; [`~DecodingState.onload`] must come before the next step."""
        self._move("cpu")

    def onload(self) -> None:
        """Moves keys and values back to the devices of their layers, which may be several."""
        self._move(None)

    def _move(self, device: str | None) -> None:
        layers: list[Any] = list(self.cache.layers)
        for layer in layers:
            if layer.keys is not None:
                target = device or layer.device  # of the first step
                layer.keys, layer.values = layer.keys.to(target), layer.values.to(target)

    def fork(self) -> "DecodingState":
        """An independent state that continues from here; what both have in common is held once."""
        twin = copy.copy(self)
        if all(type(layer) is DynamicLayer for layer in self.cache.layers):
            # These layers never write into their tensors, so the beginning is held once.
            twin.cache = copy.copy(self.cache)
            twin.cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        else:
            twin.cache = copy.deepcopy(self.cache)
        return twin


__all__ = ["DecodingState"]
