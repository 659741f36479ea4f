"""A key-value cache for images, whose length the schedule determines: written once in place, read as a view.

Letters: R rows, h key-value heads, L slots, d width of a head.
"""

import copy
import math
from itertools import groupby
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticCache
from transformers.configuration_utils import PreTrainedConfig

STORAGES = ("bfloat16", "int8")

# A group of rows goes through a layer at once up to this many slots: larger matrices are not faster, and activations
# of all rows would be most of the memory.
_MAX_SLOTS = 4096
# Below it, splitting rows costs more (weights are read for each group) than the mask that it saves.
_MIN_SLOTS = 512


class RowGroup(NamedTuple):
    """Rows `start` to `stop` of a batch, whose first `padding` slots are padding."""

    start: int
    stop: int
    padding: int


class Int8(NamedTuple):
    """Numbers in 8 bits, symmetric around 0, with one float16 factor for each vector of the last axis."""

    numbers: torch.Tensor
    factors: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor) -> "Int8":
        factors = (values.abs().amax(-1, keepdim=True).float() / 127).clamp(min=1e-7).half()
        return cls((values / factors.to(values.dtype)).round_().clamp_(-127, 127).to(torch.int8), factors)

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        return self.numbers.to(dtype) * self.factors.to(dtype)


class Workspace:
    """Keys and values of one layer at a time, where storage differs from what attention reads. Layers share it."""

    def __init__(self):
        self.buffers: dict[Any, torch.Tensor] = {}

    def get(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two buffers of a shape `(R, h, length, d)`, views as those of a layer are."""
        *rows, length, width = shape
        with_spare = (*rows, length + 1, width)
        needed = 2 * math.prod(with_spare)
        key = (device, dtype)
        if key not in self.buffers or self.buffers[key].numel() < needed:
            self.buffers.pop(key, None)
            self.buffers[key] = torch.empty(needed, dtype=dtype, device=device)
        keys, values = self.buffers[key][:needed].view(2, *with_spare)[..., :length, :]
        return keys, values


class ScaleCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, `(R, h, capacity, d)` each, filled up to `length`.

    Beyond `capacity` it grows by copying, as a dynamic cache does, so that text may follow.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, capacity: int, storage: str | None, num_unstored: int, workspace: Workspace):
        super().__init__()
        self.capacity = capacity
        self.storage = storage
        self.num_unstored = num_unstored
        self.workspace = workspace
        self.length = 0

    def __repr__(self):
        return f"{type(self).__name__}({self.length} of {self.capacity})"

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor):
        self.device, self.dtype = key_states.device, key_states.dtype
        self._allocate(len(key_states), key_states.shape[1], key_states.shape[-1])
        self.is_initialized = True

    def _allocate(self, rows: int, heads: int, width: int):
        # With a spare slot what is read is always a view with gaps: a compiler would make another graph of one without.
        shape = (rows, heads, max(self.capacity - self.num_unstored, self.length) + 1, width)
        dtype = self.dtype if self.storage is None else getattr(torch, self.storage)
        self._buffers = [torch.empty(shape, dtype=dtype, device=self.device) for _ in range(2)]
        self._factors: list[torch.Tensor | None] = [None, None]
        if self.storage == "int8":
            self._factors = [torch.empty(*shape[:-1], 1, dtype=torch.half, device=self.device) for _ in range(2)]

    @property
    def as_read(self) -> bool:
        """Whether attention reads the numbers as they are stored."""
        return self.storage is None or self.storage == str(self.dtype).removeprefix("torch.")

    def update(self, key_states, value_states, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds keys and values `(R, h, n, d)`; returns all `(R, h, length, d)`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows = RowGroup(0, len(key_states), 0)
        result = self.update_rows(rows, key_states, value_states)
        self.advance(key_states.shape[-2])
        return result

    def update_rows(self, group: RowGroup, *states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds keys and values of some rows; returns theirs, without padding. [`advance`] comes after the last rows."""
        new = states[0].shape[-2]
        spaces = self.open_rows(group, new)
        for space, state in zip(spaces, states, strict=True):
            space[:, :, space.shape[2] - new :] = state
        self.close_rows(group, new, spaces)
        return spaces

    def open_rows(self, group: RowGroup, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of some rows, without padding, as attention reads them: the last `new` are to be written.

        [`close_rows`] must come before the next layer's are opened.
        """
        rows, slots = slice(group.start, group.stop), slice(group.padding, self.length)
        if self._stores(new) and self.as_read:
            keys, values = (buffer[rows, :, group.padding : self.length + new] for buffer in self._buffers)
            return keys, values
        _, heads, _, width = self._buffers[0].shape
        past = self.length - group.padding
        spaces = self.workspace.get((group.stop - group.start, heads, past + new, width), self.dtype, self.device)
        for space, buffer, factors in zip(spaces, self._buffers, self._factors, strict=True):
            old = buffer[rows, :, slots]
            space[:, :, :past] = old if factors is None else Int8(old, factors[rows, :, slots]).read(space.dtype)
        return spaces

    def close_rows(self, group: RowGroup, new: int, spaces: tuple[torch.Tensor, torch.Tensor]):
        """Stores what was written into the end of the spaces, if it is stored at all."""
        if not self._stores(new) or self.as_read:
            return
        rows, slots = slice(group.start, group.stop), slice(self.length, self.length + new)
        for buffer, factors, space in zip(self._buffers, self._factors, spaces, strict=True):
            state = space[:, :, space.shape[2] - new :]
            if factors is not None:
                state, factors[rows, :, slots] = Int8.of(state)
            buffer[rows, :, slots] = state

    def _stores(self, new: int) -> bool:
        """Whether the next `new` slots are stored; if so, makes room for them."""
        fits = self.length + new <= self.capacity - self.num_unstored
        if not fits and not self.num_unstored:
            self._grow(self.length + new)
            fits = True
        return fits

    def advance(self, number: int):
        """Counts slots that all rows have."""
        self.length = min(self.length + number, self.capacity - self.num_unstored)

    def _grow(self, length: int):
        self.capacity = length
        old, factors = self._buffers, self._factors
        self._allocate(len(old[0]), old[0].shape[1], old[0].shape[-1])
        self._copy(old, factors, slice(None))

    def _copy(self, buffers, factors, rows):
        """Fills fresh buffers from rows of others."""
        for ours, theirs in zip((*self._buffers, *self._factors), (*buffers, *factors), strict=True):
            if ours is not None:
                ours[:, :, : self.length] = theirs[rows, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self):
        self.length = 0

    def crop(self, tokens_to_remove: int):
        """Drops the last `-tokens_to_remove` slots."""
        if tokens_to_remove > 0:
            raise ValueError(f"`crop` takes minus the number of slots to remove, but got {tokens_to_remove}.")
        self.length = max(0, self.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor):
        """Takes rows `beam_idx` `(R',)`; there may be more or fewer than before."""
        if not self.is_initialized:
            return
        old, factors = self._buffers, self._factors
        beam_idx = beam_idx.to(self.device)
        self._allocate(len(beam_idx), old[0].shape[1], old[0].shape[-1])
        self._copy(old, factors, beam_idx)

    def batch_select_indices(self, indices: torch.Tensor):
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int):
        if self.is_initialized:
            self.reorder_cache(torch.arange(len(self._buffers[0])).repeat_interleave(repeats))


class ScaleCache(Cache):
    """Keys and values of prompts and images in buffers of their final size: no copies as it grows, no mask to read it.

    Image mode makes one by itself. Make your own for `cache=` to store numbers in fewer bits than they are computed in.

    Args:
        config (`NextFlowConfig`): The model's.
        capacity (`int`): Slots per row, prompt and image; it grows if there are more.
        storage (`str`, *optional*):
            `"bfloat16"` or `"int8"` (with a factor for each key and each value); by default the model's dtype.
        num_unstored (`int`, *optional*, defaults to 0):
            How many slots at the end are attended to once and then dropped, since nothing reads them again.

    Raises:
        `ValueError`: for any other storage.
    """

    def __init__(self, config: PreTrainedConfig, capacity: int, storage: str | None = None, num_unstored: int = 0):
        if storage is not None and storage not in STORAGES:
            raise ValueError(f'`storage` must be None, "bfloat16" or "int8", but got {storage!r}.')
        workspace = Workspace()
        super().__init__(
            layers=[
                ScaleCacheLayer(capacity, storage, num_unstored, workspace) for _ in range(config.num_hidden_layers)
            ]
        )
        self.layers: list[Any]
        self.padding: tuple[int, ...] | None = None

    def set_padding(self, attention_mask: torch.Tensor | None):
        """Sets how many slots each row is padded by on the left, so that scale steps need no mask.

        Args:
            attention_mask (`torch.Tensor` of shape `(R, L)`, *optional*): The prompts'; None if nothing is padded.
        """
        self.padding = None if attention_mask is None else tuple((attention_mask == 0).sum(-1).tolist())

    def row_groups(self, num_rows: int, num_slots: int) -> list[RowGroup] | None:
        """Rows that a scale step takes together: equal padding, and not too many slots. None if all at once is best."""
        padding = self.padding or (0,) * num_rows
        if num_rows * num_slots <= _MIN_SLOTS:
            return None
        most = max(1, _MAX_SLOTS // num_slots)
        groups: list[RowGroup] = []
        for row, number in enumerate(padding):
            if groups and groups[-1].padding == number and row - groups[-1].start < most:
                groups[-1] = groups[-1]._replace(stop=row + 1)
            else:
                groups.append(RowGroup(row, row + 1, number))
        return None if len(groups) == 1 and not groups[0].padding else groups

    @staticmethod
    def equal_groups(groups: list[RowGroup]) -> list[RowGroup]:
        """The same rows in groups of one size, for code that is compiled for a number of rows."""
        padding = [group.padding for group in groups for _ in range(group.start, group.stop)]
        longest = max(group.stop - group.start for group in groups)
        common = math.gcd(*(len(list(run)) for _, run in groupby(padding)))
        size = max(size for size in range(1, longest + 1) if common % size == 0)
        return [RowGroup(start, start + size, padding[start]) for start in range(0, len(padding), size)]

    def beginning(self, length: int, number: int) -> "ScaleCache":
        """A view of the first `length` slots, for one step of `number` slots that are not kept."""
        view = copy.copy(self)
        view.layers = [copy.copy(layer) for layer in self.layers]
        for layer in view.layers:
            layer.length = min(layer.length, length)
            layer.capacity, layer.num_unstored = layer.length + number, number
        return view

    def advance(self, number: int):
        """Counts slots that all rows of all layers have."""
        for layer in self.layers:
            layer.advance(number)

    def reorder_cache(self, beam_idx: torch.Tensor):
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        if self.padding is not None:
            self.padding = tuple(self.padding[row] for row in beam_idx.tolist())


def make_cache(config: PreTrainedConfig, implementation: str, length: int, num_unstored: int = 0) -> Cache:
    """An empty cache of `length` slots per row, by its name in `generate`; `num_unstored` as in [`ScaleCache`]."""
    if implementation.startswith("offloaded") and not torch.accelerator.is_available():
        raise ValueError(f'"{implementation}" moves a cache off an accelerator, and there is none: leave it out.')
    if implementation in ("preallocated", "quantized"):
        return ScaleCache(config, length, "int8" if implementation == "quantized" else None, num_unstored)
    if implementation in ("static", "offloaded_static"):
        return StaticCache(config, max_cache_len=length, offloading=implementation.startswith("offloaded"))
    if implementation in ("dynamic", "offloaded"):
        return DynamicCache(config=config, offloading=implementation == "offloaded")
    raise ValueError(
        f'There is no cache_implementation "{implementation}" where images are drawn: use "preallocated", "quantized", '
        '"dynamic", "static", "offloaded" or "offloaded_static".'
    )


def check_empty(cache: Cache, length: int) -> None:
    """Raises a `ValueError` unless a cache that was passed is empty and has room for `length` slots."""
    if num_cached := int(cache.get_seq_length()):
        raise ValueError(
            f"Where images are drawn the cache must be empty, but `cache` holds {num_cached} tokens. Pass the whole "
            "prompt and a new cache."
        )
    if isinstance(cache, StaticCache) and cache.get_max_length() < length:
        raise ValueError(
            f"The cache has room for {cache.get_max_length()} tokens, but prompt and image take {length}. Pass one "
            f"with `max_cache_len={length}`, or none."
        )


def with_fixed_lengths(cache: Cache) -> Cache:
    """A shallow copy of a cache whose lengths stay what they are now.

    A static cache counts in a tensor, in place, and flex attention reads its mask after the count has moved on
    (transformers 5.23): queries would see as many slots too many as there are queries.
    """
    fixed: Any = copy.copy(cache)
    fixed.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in fixed.layers:
        if isinstance(length := getattr(layer, "cumulative_length", None), torch.Tensor):
            layer.cumulative_length = length.clone()
    return fixed


class CacheRows:
    """The view that a layer has of a [`ScaleCache`] while it runs one group of rows."""

    def __init__(self, cache: ScaleCache, group: RowGroup):
        self.layers: list[Any] = cache.layers
        self.group = group

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds keys and values of the rows; returns theirs."""
        return self.layers[layer_idx].update_rows(self.group, key_states, value_states)

    def open(self, layer_idx: int, number: int) -> "OpenRows":
        """Keys and values of the rows, to which a compiled layer adds `number`; [`close`] comes next."""
        return OpenRows(*self.layers[layer_idx].open_rows(self.group, number))

    def close(self, layer_idx: int, number: int, rows: "OpenRows"):
        """Keeps what a layer added."""
        self.layers[layer_idx].close_rows(self.group, number, rows)


class OpenRows(NamedTuple):
    """A layer's cache as tensors alone, `(R, h, length, d)` each: compiled code writes the last slots and reads all."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values; returns all. The layer's index is not read, so that one graph serves all layers."""
        number = key_states.shape[-2]
        self.keys[:, :, -number:] = key_states
        self.values[:, :, -number:] = value_states
        return self.keys, self.values
