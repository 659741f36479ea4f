"""Where every slot of the token view stands: scale, block, position and loss weight, as pure functions of tensors.

Token view: `... text <boi> v_1 ... v_N text ...`. The output at a slot predicts the token at the next slot, so

- the slot of `<boi>` carries its own embedding and predicts `v_1`;
- the slot of `v_j` carries the input feature made for `v_{j+1}`, hence stands where `v_{j+1}` stands;
- the slot of the last code carries `<eoi>` and predicts the text that follows.

Letters: B rows, L slots a row, G images of a group, n codes an image (N when it is whole), S scales.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .scale_schedule import ScaleSchedule


class ImageGroup(NamedTuple):
    """The images of a batch that share a schedule and stop after the same scale.

    Args:
        schedule (`ScaleSchedule`): The whole schedule, as `image_grid_shw` states it.
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


class TokenLayout(NamedTuple):
    """What [`get_token_layout`] returns.

    Args:
        position_ids (`torch.FloatTensor` of shape `(3, B, L)`):
            Scale (temporal), row (height) and column (width) coordinates, in the order that mrope reads them.
        block_ids (`torch.LongTensor` of shape `(B, L)`):
            -1 for slots that attend causally, else a number shared by the slots of one scale of one image.
        scale_index (`torch.LongTensor` of shape `(B, L)`):
            The 0-based scale whose input features a slot carries; 0 for text, `<boi>` and `<eoi>`.
    """

    position_ids: torch.Tensor
    block_ids: torch.Tensor
    scale_index: torch.Tensor


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what the cache keeps must serve training, whoever comes first
def code_coordinates(schedule: ScaleSchedule) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and place of every code of an image.

    Returns:
        `scale_index` `(N,)` int64, and `coordinates` `(2, N)` float32: rows and columns of the cells' centres, in units
        of the side of a square with as many cells as the scale has (for a square grid they span 0 to 1). They are on
        the CPU, and cached: don't write into them.
    """
    scale_index, coordinates = [], []
    for s, (h, w) in enumerate(schedule.grids):
        cells = torch.arange(h * w, device="cpu")
        rows_and_columns = torch.stack([cells // w, cells % w])
        scale_index.append(torch.full((h * w,), s, device="cpu"))
        coordinates.append((rows_and_columns + 0.5) / (h * w) ** 0.5)
    return torch.cat(scale_index), torch.cat(coordinates, dim=1).float()


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def code_coordinates_on(schedule: ScaleSchedule, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """[`code_coordinates`] on a device, copied there once: in a decoding step a copy would make the host wait."""
    scale_index, coordinates = code_coordinates(schedule)
    return scale_index.to(device), coordinates.to(device)


def scale_position_ids(
    start: torch.Tensor, schedule: ScaleSchedule, scale_index: int, spatial_range: float
) -> torch.Tensor:
    """Positions of the slots that carry one scale of an image.

    Args:
        start (`torch.Tensor` of shape `(B,)`): Position of each row's `<boi>`.
        schedule (`ScaleSchedule`): The image's schedule.
        scale_index (`int`): 0-based scale, at least 1 (the 1x1 scale is never an input).
        spatial_range (`float`): `config.rope_spatial_range`.

    Returns:
        `torch.FloatTensor` of shape `(3, B, n_s)`.
    """
    if not 1 <= scale_index < schedule.num_scales:
        raise ValueError(
            f"`scale_index` must be between 1 and {schedule.num_scales - 1} for a schedule of {schedule.num_scales} "
            f"scales, but got {scale_index}. (Scale 0 is predicted by the slot of `<boi>`.)"
        )
    cells = slice(schedule.offsets[scale_index], schedule.offsets[scale_index + 1])
    rows, columns = code_coordinates_on(schedule, start.device)[1][:, cells] * spatial_range
    start = start.float()[:, None]
    depth = (start + scale_index).expand(-1, rows.shape[0])
    return torch.stack([depth, rows.expand_as(depth), columns.expand_as(depth)])


def check_grids(image_grid_shw: torch.Tensor, num_images: int) -> None:
    """A `ValueError` unless there is one row of three numbers an image."""
    if image_grid_shw.ndim != 2 or image_grid_shw.shape[-1] != 3:
        raise ValueError(
            "`image_grid_shw` must have shape (num_images, 3), one row (number of scales, bucket height, bucket width) "
            f"an image, but got shape {tuple(image_grid_shw.shape)}."
        )
    if len(image_grid_shw) != num_images:
        raise ValueError(
            f"`input_ids` hold {num_images} images, but `image_grid_shw` has {len(image_grid_shw)} rows. Pass one row "
            "(number of scales, bucket height, bucket width) for each image, in reading order over the batch."
        )


def find_image_groups(
    input_ids: torch.Tensor,
    image_grid_shw: torch.Tensor,
    attention_mask: torch.Tensor | None,
    text_vocab_size: int,
    boi_token_id: int,
    max_num_scales: int,
) -> list[ImageGroup]:
    """Find the images of a batch of token-view ids and check that the grids fit them.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, L)`): Token-view ids; ids from `text_vocab_size` on are visual.
        image_grid_shw (`torch.LongTensor` of shape `(num_images, 3)`): One row an image, in reading order.
        attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 0 where a slot is padding.
        text_vocab_size (`int`): The first visual id.
        boi_token_id (`int`): The id that opens an image.
        max_num_scales (`int`): The most scales an image may have.

    Returns:
        `list[ImageGroup]`: one entry for each (schedule, number of scales present) that occurs.

    Raises:
        `ValueError`: if codes don't follow a `<boi>`, if there are more or fewer images than grids, or if an image
        stops inside a scale, is longer than its grid or has more scales than the model.
    """
    length = input_ids.shape[1]
    is_code = input_ids >= text_vocab_size
    if attention_mask is not None:
        is_code = is_code & attention_mask.bool()
    follows_code = torch.zeros_like(is_code)
    follows_code[:, 1:] = is_code[:, :-1]
    follows_boi = torch.zeros_like(is_code)
    follows_boi[:, 1:] = input_ids[:, :-1] == boi_token_id
    rows, columns = (is_code & ~follows_code).nonzero(as_tuple=True)
    # For each slot, the next one that holds no code.
    ends = torch.arange(length, device=input_ids.device).masked_fill(is_code, length)
    ends = ends.flip(-1).cummin(-1).values.flip(-1)
    columns_and_lengths = torch.stack([columns, ends[rows, columns] - columns, follows_boi[rows, columns]], dim=-1)

    found = list(zip(rows.tolist(), columns_and_lengths.tolist(), strict=True))
    for row, (column, _, opened) in found:
        if not opened:
            raise ValueError(
                f"The image codes at row {row}, slot {column} don't follow a `<boi>` (id {boi_token_id}). An image is "
                "`<boi>` and then all its codes, with nothing in between."
            )
    check_grids(image_grid_shw, len(found))
    members: dict[tuple[ScaleSchedule, int], list[int]] = {}
    for (row, (column, num_codes, _)), grid in zip(found, image_grid_shw.tolist(), strict=True):
        schedule = ScaleSchedule.from_grid_shw(grid)
        if schedule.num_scales > max_num_scales:
            raise ValueError(
                f"An image of {schedule.num_scales} scales was given, but the model has {max_num_scales} "
                "(`config.num_scales`). Encode the image with fewer scales."
            )
        if num_codes not in schedule.offsets:
            raise ValueError(
                f"The image at row {row}, slot {column} has {num_codes} codes. An image with grid {tuple(grid)} has "
                f"{schedule.num_tokens}, and a sequence may stop only after a whole scale: {schedule.offsets[1:]}."
            )
        members.setdefault((schedule, num_codes), []).append(row * length + column)
    return [
        ImageGroup(
            schedule,
            schedule.offsets.index(num_codes),
            torch.tensor(starts, device=input_ids.device)[:, None] + torch.arange(num_codes, device=input_ids.device),
        )
        for (schedule, num_codes), starts in members.items()
    ]


def index_of_sequence_start(seq_idx: torch.Tensor) -> torch.Tensor:
    """Where the packed sequence of each slot starts in its row: `(B, L)` -> `(B, L)`, int64."""
    slots = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(seq_idx)
    continues = F.pad(seq_idx[:, 1:] == seq_idx[:, :-1], (1, 0), value=False)
    return slots.masked_fill(continues, 0).cummax(-1).values


def get_token_layout(
    input_ids: torch.Tensor,
    image_groups: list[ImageGroup],
    attention_mask: torch.Tensor | None,
    spatial_range: float,
    start: int | torch.Tensor = 0,
    seq_idx: torch.Tensor | None = None,
) -> TokenLayout:
    """Positions, blocks and scales of every slot.

    A text slot advances the position by one, and so does every scale of an image: an image of S scales costs S + 1
    counts (`<boi>` and `<eoi>` take one each, scale 0 has no slot of its own).

    Args:
        input_ids (`torch.LongTensor` of shape `(B, L)`): Token-view ids.
        image_groups (`list[ImageGroup]`): From [`find_image_groups`].
        attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
            0 where a slot is padding, left or right.
        spatial_range (`float`): `config.rope_spatial_range`.
        start (`int` or `torch.LongTensor` of shape `(B, 1)`, *optional*, defaults to 0):
            Position of the first real slot of a row: how much text a cache holds already.
        seq_idx (`torch.LongTensor` of shape `(B, L)`, *optional*):
            Number of the packed sequence that a slot belongs to; positions restart wherever it changes.
    """
    shape, device = input_ids.shape, input_ids.device
    scale_index = torch.zeros(shape.numel(), dtype=torch.long, device=device)
    coordinates = torch.zeros(2, shape.numel(), device=device)
    for group in image_groups:
        scale_of_code, place_of_code = code_coordinates(group.schedule)
        carried = slice(1, group.slots.shape[1])
        scale_index[group.feature_slots] = scale_of_code[carried].to(device)
        coordinates[:, group.feature_slots] = spatial_range * place_of_code[:, None, carried].to(device)
    scale_index, coordinates = scale_index.view(shape), coordinates.view(2, *shape)

    advances = torch.ones_like(scale_index)
    advances[:, 1:] = (scale_index[:, 1:] == 0) | (scale_index[:, 1:] != scale_index[:, :-1])
    if attention_mask is not None:
        advances = advances * attention_mask.bool()
    counter = (advances.cumsum(-1) - 1).clamp(min=0) + start

    in_scale = scale_index > 0
    # The counter tells the scales of a row apart, so it serves as their name.
    block_ids = counter.masked_fill(~in_scale, -1)
    if seq_idx is not None:
        counter = counter - counter.gather(-1, index_of_sequence_start(seq_idx))
    spatial = torch.where(in_scale, coordinates, counter.float())
    position_ids = torch.cat([counter.float()[None], spatial])
    return TokenLayout(position_ids, block_ids, scale_index)


def scale_of_tokens(image_groups: list[ImageGroup], shape: torch.Size, device: torch.device) -> torch.Tensor:
    """The 0-based scale `(B, L)` that each *token* is a code of, -1 for text.

    (Not the scale whose features its slot carries: that one is [`TokenLayout`]'s.)

    Args:
        image_groups (`list[ImageGroup]`): From [`find_image_groups`].
        shape (`torch.Size`): `(B, L)`.
        device (`torch.device`): Of the result.
    """
    scales = torch.full((shape.numel(),), -1, device=device)
    for group in image_groups:
        scales[group.slots] = code_coordinates(group.schedule)[0][: group.slots.shape[1]].to(device)
    return scales.view(shape)


def scale_loss_weights(
    image_groups: list[ImageGroup], shape: torch.Size, device: torch.device, alpha: float
) -> torch.Tensor:
    """Weight of every *token* in the loss (arXiv 2601.02204, scale reweighting).

    A code of scale s weighs `1 / (h_s * w_s) ** alpha`, normalised so that the weights of an image's codes sum to their
    number; text weighs 1.

    Args:
        image_groups (`list[ImageGroup]`): From [`find_image_groups`].
        shape (`torch.Size`): `(B, L)`.
        device (`torch.device`): Of the result.
        alpha (`float`): `config.scale_reweight_alpha`; 0 gives ones.

    Returns:
        `torch.FloatTensor` of shape `(B, L)`: at the slot of each token, the weight of predicting that token.
    """
    weights = torch.ones(shape.numel(), device=device)
    for group in image_groups:
        weights[group.slots] = _normalised_code_weights(group.schedule.prefix(group.num_scales), alpha).to(device)
    return weights.view(shape)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what the cache keeps must serve training, whoever comes first
def _normalised_code_weights(schedule: ScaleSchedule, alpha: float) -> torch.Tensor:
    lengths = torch.tensor(schedule.scale_lengths, device="cpu")
    weights = lengths.double().pow(-alpha).repeat_interleave(lengths)
    return (weights * schedule.num_tokens / weights.sum()).float()
