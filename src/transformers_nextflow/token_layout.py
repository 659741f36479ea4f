"""Where every slot of the token view stands: scale, block, position and loss weight, as pure functions of tensors.

Token view: `... text <boi> v_1 ... v_N text ...`. The output at a slot predicts the token at the next slot, so

- the slot of `<boi>` carries its own embedding and predicts `v_1`;
- the slot of `v_j` carries the input feature made for `v_{j+1}`, hence has the position of `v_{j+1}`;
- the slot of the last code carries `<eoi>` and predicts the text that follows.

Letters: B rows, L slots per row, G images of a group, n codes per image (N when it is whole), S scales.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.generation import CompileConfig

from .scale_schedule import ScaleSchedule


@dataclass(frozen=True)
class ScaleStep:
    """A cached decoding step that appends the slots of one scale of an image to every row.

    Args:
        schedule (`ScaleSchedule`): The images' schedule, the same in all rows.
        index (`int`): 0-based scale, at least 1, whose n_s slots are fed, and whose codes their outputs predict.
        own_map (`bool`, *optional*, defaults to `False`):
            The slots carry the accumulated map of the scale itself, its codes among them, and predict these anew.
        code_sampler (`Callable`, *optional*):
            Called as `code_sampler(head, hidden_states)`, where `head` computes visual logits. What it returns becomes
            `image_codes`, and there are no `logits`: a scale is drawn without ever holding all its logits.
        compile_config (`CompileConfig`, *optional*):
            With a [`ScaleCache`]: compiles the layers, once for each length of a scale.
    """

    schedule: ScaleSchedule
    index: int
    own_map: bool = False
    code_sampler: Callable[..., torch.Tensor] | None = None
    compile_config: CompileConfig | None = None


class ImageGroup(NamedTuple):
    """The images of a batch that share a schedule and stop after the same scale.

    Args:
        schedule (`ScaleSchedule`): The whole schedule, as in `image_grid_shw`.
        num_scales (`int`): How many of its scales the sequences hold.
        slots (`torch.LongTensor` of shape `(G, n)`): Where the codes stand, in the ids flattened to `(B * L)`.
    """

    schedule: ScaleSchedule
    num_scales: int
    slots: torch.Tensor

    @property
    def feature_slots(self) -> torch.Tensor:
        """`(G, n - 1)`: the slots that carry input features, those of flat codes 1 to n - 1."""
        return self.slots[:, :-1]


class PackedSequence(NamedTuple):
    """One sequence of a packed row.

    Args:
        row (`int`): The row of the batch.
        slots (`slice`): The sequence's place in the row.
        has_images (`bool`): Whether it holds slots that don't attend causally.
    """

    row: int
    slots: slice
    has_images: bool


@dataclass(frozen=True)
class TokenLayout:
    """The images in a batch of token-view ids, and where every slot stands because of them; see [`TokenLayout.of`].

    Args:
        position_ids (`torch.FloatTensor` of shape `(3, B, L)`):
            Scale (temporal), row (height) and column (width) coordinates, in the order that mrope reads them.
        block_ids (`torch.LongTensor` of shape `(B, L)`):
            -1 for slots that attend causally, else a number shared by the slots of one scale of one image.
        scale_index (`torch.LongTensor` of shape `(B, L)`):
            The 0-based scale whose input features a slot carries; 0 for text, `<boi>` and `<eoi>`.
        images (`list[ImageGroup]`): One entry for each (schedule, number of scales present) that occurs.
        seq_idx (`torch.LongTensor` of shape `(B, L)`, *optional*): That of packed rows.
        sequences (`list[PackedSequence]`, *optional*): Those of packed rows, see [`find_sequences`].
        learned_slots (`torch.LongTensor` of shape `(T,)`, *optional*):
            The slots that predict a label, in the ids flattened to `(B * L)`, in order.
        is_padded (`bool`, *optional*): Whether the `attention_mask` has a 0.

    A layout that is made on the CPU, with the last three, and then moved saves the host from waiting for the device:
    `NextFlowDataCollator(config, with_layout=True)` makes such ones.
    """

    position_ids: torch.Tensor
    block_ids: torch.Tensor
    scale_index: torch.Tensor
    images: list[ImageGroup]
    seq_idx: torch.Tensor | None = None
    sequences: list[PackedSequence] | None = None
    learned_slots: torch.Tensor | None = None
    is_padded: bool | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TokenLayout":
        """The same on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TokenLayout":
        """The same in pinned memory, from which it is moved without waiting; data loaders call it."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "TokenLayout":
        return replace(
            self,
            position_ids=move(self.position_ids),
            block_ids=move(self.block_ids),
            scale_index=move(self.scale_index),
            images=[group._replace(slots=move(group.slots)) for group in self.images],
            seq_idx=None if self.seq_idx is None else move(self.seq_idx),
            learned_slots=None if self.learned_slots is None else move(self.learned_slots),
        )

    @classmethod
    def of(
        cls,
        input_ids: torch.Tensor,
        image_grid_shw: torch.Tensor | None,
        config: Any,
        attention_mask: torch.Tensor | None = None,
        start: int | torch.Tensor = 0,
        seq_idx: torch.Tensor | None = None,
    ) -> "TokenLayout":
        """Finds the images of a batch, checks that the grids fit them, and lays out all slots.

        A text slot advances the position by one, and so does every scale of an image: an image of S scales takes S + 1
        positions (`<boi>` and `<eoi>` take one each, scale 0 has no slot of its own). Where the model has no
        `rope_spatial_range` every slot advances it, and all coordinates are equal.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): Token-view ids.
            image_grid_shw (`torch.LongTensor` of shape `(num_images, 3)`, *optional*):
                One row (number of scales, bucket height, bucket width) for each image, in reading order.
            config ([`NextFlowConfig`]): The model's.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 0 where a slot is padding, left or right.
            start (`int` or `torch.LongTensor` of shape `(B, 1)`, *optional*, defaults to 0):
                Position of the first real slot of each row.
            seq_idx (`torch.LongTensor` of shape `(B, L)`, *optional*):
                Number of the packed sequence that a slot belongs to; positions restart wherever it changes.

        Raises:
            `ValueError`: if codes don't follow a `<boi>`, if there are more or fewer images than grids, or if an image
            stops inside a scale, is longer than its grid or has more scales than the model.
        """
        images = _group_images(input_ids, image_grid_shw, config, attention_mask)
        shape, device = input_ids.shape, input_ids.device
        scale_index = torch.zeros(shape.numel(), dtype=torch.long, device=device)
        coordinates = torch.zeros(2, shape.numel(), device=device)
        for group in images:
            scale_of_code, place_of_code = code_coordinates(group.schedule, device)
            carried = slice(1, group.slots.shape[1])
            scale_index[group.feature_slots] = scale_of_code[carried]
            place = float(config.rope_spatial_range or 0) * place_of_code[:, None, carried]
            coordinates[:, group.feature_slots] = place
        scale_index, coordinates = scale_index.view(shape), coordinates.view(2, *shape)

        is_spatial, in_scale = config.rope_spatial_range is not None, scale_index > 0
        begins = torch.ones_like(scale_index)
        begins[:, 1:] = ~in_scale[:, 1:] | (scale_index[:, 1:] != scale_index[:, :-1])
        # Counting what begins in a row tells its scales apart.
        block_ids = begins.cumsum(-1).masked_fill(~in_scale, -1)
        advances = begins if is_spatial else torch.ones_like(begins)
        if attention_mask is not None:
            advances = advances * attention_mask.bool()
        counter = (advances.cumsum(-1) - 1).clamp(min=0) + start
        if seq_idx is not None:
            counter = counter - counter.gather(-1, index_of_sequence_start(seq_idx))
        spatial = torch.where(in_scale & is_spatial, coordinates, counter.float())
        position_ids = torch.cat([counter.float()[None], spatial])
        return cls(position_ids, block_ids, scale_index, images, seq_idx)

    def scale_of_tokens(self) -> torch.Tensor:
        """The 0-based scale `(B, L)` that each *token* is a code of, -1 for text.

        (Not the scale whose features its slot carries: that one is `scale_index`.)
        """
        scales = torch.full_like(self.scale_index, -1).flatten()
        for group in self.images:
            scales[group.slots] = code_coordinates(group.schedule, scales.device)[0][: group.slots.shape[1]]
        return scales.view_as(self.scale_index)

    def loss_weights(self, alpha: float) -> torch.Tensor:
        """Weight of each *token* in the loss (arXiv 2601.02204, scale reweighting).

        Args:
            alpha (`float`): `config.scale_reweight_alpha`; 0 gives ones.

        Returns:
            `torch.FloatTensor` of shape `(B, L)`: at the slot of each token, the weight of predicting that token. Codes
            of an image have the weights of [`scale_weights`], and text has weight 1.
        """
        weights = torch.ones(self.scale_index.numel(), device=self.scale_index.device)
        for group in self.images:
            weights[group.slots] = scale_weights(group.schedule, range(group.num_scales), alpha, weights.device)
        return weights.view_as(self.scale_index)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what the cache keeps must serve training, whoever comes first
def code_coordinates(schedule: ScaleSchedule, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and place of every code of an image, made once for a device: a copy would make the host wait.

    Returns:
        `scale_index` `(N,)` int64, and `coordinates` `(2, N)` float32: rows and columns of the cells' centres, in units
        of the side of a square with as many cells as the scale has (for a square grid they span 0 to 1). They are
        cached: don't write into them.
    """
    scale_index, coordinates = [], []
    for s, (h, w) in enumerate(schedule.grids):
        cells = torch.arange(h * w, device="cpu")
        rows_and_columns = torch.stack([cells // w, cells % w])
        scale_index.append(torch.full((h * w,), s, device="cpu"))
        coordinates.append((rows_and_columns + 0.5) / (h * w) ** 0.5)
    return torch.cat(scale_index).to(device), torch.cat(coordinates, dim=1).float().to(device)


def positions_before(schedule: ScaleSchedule, scale_index: int, spatial_range: float | None) -> int:
    """How many positions `<boi>` and the slots before those of a scale take."""
    return schedule.offsets[scale_index] if spatial_range is None else scale_index


def scale_position_ids(
    start: torch.Tensor, schedule: ScaleSchedule, scale_index: int, spatial_range: float | None
) -> torch.Tensor:
    """Positions of the slots that carry one scale of an image.

    Args:
        start (`torch.Tensor` of shape `(B,)`): Position of each row's `<boi>`.
        schedule (`ScaleSchedule`): The image's schedule.
        scale_index (`int`): 0-based scale, at least 1 (the 1x1 scale is never an input).
        spatial_range (`float`, *optional*): `config.rope_spatial_range`.

    Returns:
        `torch.FloatTensor` of shape `(3, B, n_s)`.
    """
    if not 1 <= scale_index < schedule.num_scales:
        raise ValueError(
            f"`scale_index` must be between 1 and {schedule.num_scales - 1} for a schedule of {schedule.num_scales} "
            f"scales, but got {scale_index}. (Scale 0 is predicted by the slot of `<boi>`.)"
        )
    cells = slice(schedule.offsets[scale_index], schedule.offsets[scale_index + 1])
    start = start.float()[:, None]
    if spatial_range is None:
        return (start + torch.arange(cells.start, cells.stop, device=start.device)).expand(3, -1, -1)
    rows, columns = code_coordinates(schedule, start.device)[1][:, cells] * spatial_range
    depth = (start + scale_index).expand(-1, rows.shape[0])
    return torch.stack([depth, rows.expand_as(depth), columns.expand_as(depth)])


def read_grids(image_grid_shw: Any, num_images: int | None = None, source: str = "`input_ids` hold") -> torch.Tensor:
    """Grids as a tensor `(num_images, 3)`; a `ValueError` unless there is a row for each of the images in a source."""
    grids = torch.as_tensor([] if image_grid_shw is None else image_grid_shw)
    if not grids.numel():
        grids = grids.new_empty((0, 3), dtype=torch.long)
    if grids.ndim != 2 or grids.shape[-1] != 3 or grids.is_floating_point():
        raise ValueError(
            "`image_grid_shw` must have shape (num_images, 3), one row of whole numbers (number of scales, bucket "
            f"height, bucket width) per image, but got {grids.dtype} in the shape {tuple(grids.shape)}."
        )
    if num_images is not None and len(grids) != num_images:
        raise ValueError(
            f"{source} {num_images} images, but `image_grid_shw` has {len(grids)} rows. Pass one row (number of "
            "scales, bucket height, bucket width) for each image, in reading order over the batch."
        )
    return grids


def opens_image(ids: torch.Tensor, start_ids: Sequence[int]) -> torch.Tensor:
    """Where an image opens: bool `(B, L)`, True at the last of the ids that open one."""
    opens = torch.ones_like(ids, dtype=torch.bool)
    for distance, token in enumerate(reversed(start_ids)):
        opens &= F.pad(ids == token, (distance, 0))[:, : ids.shape[1]]
    return opens


def find_images(
    input_ids: torch.Tensor, text_vocab_size: int, attention_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Finds the images in token-view ids: each is a run of visual ids.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, L)`): Token-view ids; ids from `text_vocab_size` on are visual.
        text_vocab_size (`int`): The first visual id.
        attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 0 where a slot is padding.

    Returns:
        Rows, slots of the first codes, and numbers of codes, in reading order: three int64 tensors `(num_images,)`.
    """
    is_code = input_ids >= text_vocab_size
    if attention_mask is not None:
        is_code = is_code & attention_mask.bool()
    rows, starts = (is_code & ~F.pad(is_code, (1, 0))[:, :-1]).nonzero(as_tuple=True)
    ends = (is_code & ~F.pad(is_code, (0, 1))[:, 1:]).nonzero(as_tuple=True)[1]
    return rows, starts, ends + 1 - starts


def count_images(
    input_ids: torch.Tensor, text_vocab_size: int, attention_mask: torch.Tensor | None = None
) -> list[int]:
    """Number of images in each row of token-view ids `(B, L)`."""
    rows, _, _ = find_images(input_ids, text_vocab_size, attention_mask)
    return rows.bincount(minlength=len(input_ids)).tolist()


def split_grids(
    input_ids: torch.Tensor,
    image_grid_shw: torch.Tensor,
    text_vocab_size: int,
    attention_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The rows of `image_grid_shw` `(num_images, 3)` that belong to each row of token-view ids `(B, L)`."""
    counts = count_images(input_ids, text_vocab_size, attention_mask)
    return read_grids(image_grid_shw, sum(counts)).split(counts)


def _group_images(
    input_ids: torch.Tensor, image_grid_shw: torch.Tensor | None, config: Any, attention_mask: torch.Tensor | None
) -> list[ImageGroup]:
    """The images of a batch by schedule and number of scales, checked against their grids."""
    if image_grid_shw is None:
        return []
    length = input_ids.shape[1]
    rows, starts, lengths = find_images(input_ids, config.text_vocab_size, attention_mask)
    opened = (starts > 0) & opens_image(input_ids, config.image_start_ids)[rows, (starts - 1).clamp(min=0)]
    found = torch.stack([rows, starts, lengths, opened], dim=-1).tolist()
    for row, start, _, is_open in found:
        if not is_open:
            raise ValueError(
                f"The image codes at row {row}, slot {start} don't follow a `<boi>` (id "
                f"{', '.join(map(str, config.image_start_ids))}). An image is `<boi>` and then all its codes, with "
                "nothing in between."
            )
    grids = read_grids(image_grid_shw, len(found)).tolist()
    members: dict[tuple[ScaleSchedule, int], list[int]] = {}
    for (row, start, num_codes, _), grid in zip(found, grids, strict=True):
        schedule = config.schedule_of(grid)
        if num_codes not in schedule.offsets:
            raise ValueError(
                f"The image at row {row}, slot {start} has {num_codes} codes. An image with grid {tuple(grid)} has "
                f"{schedule.num_tokens}, and a sequence may stop only after a whole scale: {schedule.offsets[1:]}."
            )
        members.setdefault((schedule, num_codes), []).append(row * length + start)
    return [
        ImageGroup(
            schedule,
            schedule.offsets.index(num_codes),
            torch.tensor(firsts, device=input_ids.device)[:, None] + torch.arange(num_codes, device=input_ids.device),
        )
        for (schedule, num_codes), firsts in members.items()
    ]


def index_of_sequence_start(seq_idx: torch.Tensor) -> torch.Tensor:
    """Where the packed sequence of each slot starts in its row: `(B, L)` -> `(B, L)`, int64."""
    slots = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(seq_idx)
    continues = F.pad(seq_idx[:, 1:] == seq_idx[:, :-1], (1, 0), value=False)
    return slots.masked_fill(continues, 0).cummax(-1).values


def find_sequences(seq_idx: torch.Tensor, block_ids: torch.Tensor | None) -> list[PackedSequence]:
    """The sequences of packed rows, in reading order.

    Args:
        seq_idx (`torch.LongTensor` of shape `(B, L)`): Number of the sequence of each slot.
        block_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): Those of the [`TokenLayout`].
    """
    length = seq_idx.shape[1]
    starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True).nonzero().tolist()
    ends = [start for _, start in starts[1:]] + [length]
    sequences = []
    for (row, start), end in zip(starts, ends, strict=True):
        slots = slice(start, end or length)  # the next row starts at 0
        has_images = block_ids is not None and bool((block_ids[row, slots] >= 0).any())
        sequences.append(PackedSequence(row, slots, has_images))
    return sequences


def targets_of_slots(labels: torch.Tensor, seq_idx: torch.Tensor | None) -> torch.Tensor:
    """What each slot is to predict, `(B * L)`: the label of the next one, -100 at the end of a packed sequence."""
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    if seq_idx is not None:
        ends = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (0, 1))
        targets = targets.masked_fill(ends.to(targets.device), -100)
    return targets.flatten()


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def scale_weights(
    schedule: ScaleSchedule, scales: range, alpha: float, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Weight of every code of some scales: `1 / (h_s * w_s) ** alpha`, normalised to a mean of 1.

    Args:
        schedule (`ScaleSchedule`): The image's schedule.
        scales (`range`): Consecutive 0-based scales.
        alpha (`float`): 0 gives ones; the papers found 0.6 to 0.8 best for GRPO.
        device (`torch.device`, *optional*, defaults to `"cpu"`): Where they are; a copy would make the host wait.

    Returns:
        `torch.FloatTensor` of shape `(n,)`, cached: don't write into it.
    """
    lengths = torch.tensor(schedule.scale_lengths[scales.start : scales.stop], device="cpu")
    weights = lengths.double().pow(-alpha).repeat_interleave(lengths)
    return (weights * len(weights) / weights.sum()).float().to(device)
