"""Positions, blocks and loss weights against a slot-by-slot double, and against figure 5 of the paper."""

import pytest
import torch
from slow_layout import walk

from transformers_nextflow import NextFlowConfig
from transformers_nextflow.scale_schedule import ScaleSchedule, aspect_buckets
from transformers_nextflow.token_layout import (
    TokenLayout,
    count_images,
    find_images,
    scale_position_ids,
    split_grids,
)

TEXT, BOI, PAD, C = 100, 90, 0, 64.0
SIZES = {"text_vocab_size": TEXT, "visual_codebook_size": 100, "vocab_size": TEXT + 100}
MARKS = {"boi_token_id": BOI, "eoi_token_id": BOI + 1, "image_token_id": BOI + 2}
CONFIG = NextFlowConfig(**SIZES, **MARKS, rope_spatial_range=C)


def image(schedule: ScaleSchedule, num_scales: int | None = None) -> list[int]:
    """`<boi>` and the codes of the first scales of an image."""
    num_codes = schedule.offsets[num_scales or schedule.num_scales]
    return [BOI, *(TEXT + i % 50 for i in range(num_codes))]


def lay_out(rows, grids, side="right"):
    """Pads rows, and returns ids, mask and layout."""
    length = max(map(len, rows))
    pads = [[PAD] * (length - len(row)) for row in rows]
    ids = torch.tensor([row + pad if side == "right" else pad + row for row, pad in zip(rows, pads, strict=True)])
    masks = [[1] * len(row) for row in rows]
    mask = torch.tensor(
        [m + [0] * len(pad) if side == "right" else [0] * len(pad) + m for m, pad in zip(masks, pads, strict=True)]
    )
    return ids, mask, TokenLayout.of(ids, torch.tensor(grids).view(-1, 3), CONFIG, mask)


A, B_, ONE = ScaleSchedule((16, 16), 4), ScaleSchedule((9, 27), 6), ScaleSchedule((16, 16), 1)
BATCHES = {
    "one image a row, one schedule": [([1, 2, *image(A)], [A]), ([1, 2, 3, *image(A)], [A])],
    "different schedules": [
        ([1, *image(A)], [A]),
        (image(B_), [B_]),
        ([5, 5, *image(ScaleSchedule((27, 9), 5))], None),
    ],
    "text after, two images, a row without": [
        ([1, *image(A), 7, 8, *image(B_), 9], [A, B_]),
        ([3, 4, 5], []),
        ([*image(A), *image(A)], [A, A]),
    ],
    "prefixes": [([1, 2, *image(B_, 3)], [B_]), ([*image(B_, 1), 4], [B_]), ([6, *image(B_)], [B_])],
    "a single scale": [([1, *image(ONE), 2], [ONE])],
    "an open <boi>": [([1, BOI, 2, *image(A), BOI], [A])],
    "no image": [([1, 2, BOI], []), ([1], [])],
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BATCHES)
def test_layout_is_that_of_the_slow_double(name, side):
    rows = [row for row, _ in BATCHES[name]]
    grids = [
        [s.grid_shw for s in ([ScaleSchedule((27, 9), 5)] if schedules is None else schedules)]
        for _, schedules in BATCHES[name]
    ]
    _, mask, layout = lay_out(rows, [grid for row in grids for grid in row], side)
    assert layout.position_ids.dtype == torch.float32
    for b, (row, row_grids) in enumerate(zip(rows, grids, strict=True)):
        slots = walk(row, row_grids, TEXT, BOI, C)
        real = mask[b].bool()
        torch.testing.assert_close(layout.position_ids[:, b, real].T, torch.tensor([s.position for s in slots]).float())
        assert layout.scale_index[b, real].tolist() == [s.scale or 0 for s in slots]
        blocks = layout.block_ids[b, real].tolist()
        assert [block >= 0 for block in blocks] == [slot.image is not None for slot in slots]
        named = {(s.image, s.scale, block) for s, block in zip(slots, blocks, strict=True) if s.image is not None}
        assert len(named) == len({n[:2] for n in named}) == len({n[2] for n in named})  # one name a scale and image
        assert (layout.block_ids[b, ~real] == -1).all()


def test_positions_of_figure_5():
    ids = [[*range(1, 10), *image(ScaleSchedule((16, 16), 3)), 5]]
    positions = lay_out(ids, [(3, 16, 16)])[2].position_ids[[1, 2, 0], 0].T  # as the figure has them: (x, y, s)
    cells = torch.tensor([0.25, 0.75]) * C
    expected = [(9, 9, 9), *((x, y, 10) for x in cells for y in cells)]
    cells = torch.tensor([1 / 6, 3 / 6, 5 / 6]) * C
    expected += [*((x, y, 11) for x in cells for y in cells), (12, 12, 12), (13, 13, 13)]
    torch.testing.assert_close(positions[9:], torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("bucket", aspect_buckets()[::8])
def test_scale_positions_are_the_layouts(bucket):
    schedule = ScaleSchedule(bucket, 7)
    _, _, layout = lay_out([[1, 2, *image(schedule)], [1, *image(schedule)]], [schedule.grid_shw] * 2, "left")
    start = torch.tensor([2, 1])
    for s in range(1, 7):
        slots = slice(*(2 + offset for offset in schedule.offsets[s : s + 2]))
        assert torch.equal(scale_position_ids(start, schedule, s, C), layout.position_ids[:, :, slots])
    with pytest.raises(ValueError, match="between 1 and 6"):
        scale_position_ids(start, schedule, 7, C)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_loss_weights_are_those_of_a_hand_written_loop(alpha):
    row = [1, *image(A), 2, *image(B_, 4)]
    _, _, layout = lay_out([row], [A.grid_shw, B_.grid_shw])
    expected, i = torch.ones(len(row)), 0
    for start, schedule in ((2, A), (2 + A.num_tokens + 2, B_.prefix(4))):
        raw = [1 / (h * w) ** alpha for h, w in schedule.grids for _ in range(h * w)]
        for i, weight in enumerate(raw):
            expected[start + i] = weight * schedule.num_tokens / sum(raw)
    weights = layout.loss_weights(alpha)
    torch.testing.assert_close(weights[0], expected)
    torch.testing.assert_close(weights.sum(), torch.tensor(float(len(row))))


BAD = {
    "no <boi>": ([1, TEXT, TEXT + 1], [(2, 16, 16)], "row 0, slot 1 don't follow a `<boi>`"),
    "stops inside a scale": (image(A)[:-1], [A.grid_shw], "has 29 codes.*may stop only after a whole scale"),
    "longer than its grid": (image(A), [(3, 16, 16)], r"has 30 codes.*\(3, 16, 16\) has 14"),
    "too few grids": ([*image(A), *image(A)], [A.grid_shw], "hold 2 images, but `image_grid_shw` has 1 rows"),
    "too many grids": ([1, 2], [A.grid_shw], "hold 0 images, but `image_grid_shw` has 1 rows"),
    "no bucket": (image(A), [(4, 16, 17)], "not one of the 41 aspect buckets"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    row, grids, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        lay_out([row], grids)


def test_bad_grids():
    ids = torch.tensor([image(A)])
    with pytest.raises(ValueError, match=r"must have shape \(num_images, 3\)"):
        TokenLayout.of(ids, torch.tensor([4, 16, 16]), CONFIG)
    with pytest.raises(ValueError, match="An image of 4 scales was given, but the model has 3"):
        TokenLayout.of(ids, torch.tensor([A.grid_shw]), NextFlowConfig(**SIZES, **MARKS, num_scales=3))


def test_images_are_found_in_one_place():
    """Runs of codes, at both ends of a row and side by side in neighbouring rows; masked ones are none."""
    ids = torch.tensor([[TEXT, 1, TEXT, TEXT], [TEXT, TEXT, 2, TEXT], [1, 2, 3, 4]])
    assert [found.tolist() for found in find_images(ids, TEXT)] == [[0, 0, 1, 1], [0, 2, 0, 3], [1, 2, 2, 1]]
    assert count_images(ids, TEXT) == [2, 2, 0]
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    assert count_images(ids, TEXT, mask) == [1, 1, 0]
    rows = torch.arange(12).view(4, 3)
    assert [part.tolist() for part in split_grids(ids, rows, TEXT)] == [rows[:2].tolist(), rows[2:].tolist(), []]
    with pytest.raises(ValueError, match="hold 2 images, but `image_grid_shw` has 4"):
        split_grids(ids, rows, TEXT, mask)


def test_each_token_knows_its_scale():
    row = [1, *image(A, 2), 7, *image(ONE)]
    _, _, layout = lay_out([row, [1]], [A.grid_shw, ONE.grid_shw])
    assert layout.scale_of_tokens().tolist() == [[-1, -1, 0, 1, 1, 1, 1, -1, -1, 0], [-1] * 10]
    assert (TokenLayout.of(torch.tensor([[1, 2]]), None, CONFIG).scale_of_tokens() == -1).all()
