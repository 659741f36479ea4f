"""Padding and grids of prompt batches."""

import pytest
import torch

from transformers_nextflow.padding import (
    check_left_padded,
    check_not_empty,
    end_with_boi,
    move_right,
    read_prompts,
    stack_rows,
    unconditional_prompts,
)
from transformers_nextflow.token_layout import count_images, split_grids

PAD, TEXT, BOI = 0, 100, 9
IDS = torch.tensor([[1, 2, 3, 4], [PAD, 5, 6, 7]])
MASK = (IDS != PAD).long()


def test_padding_on_the_right_is_refused():
    check_left_padded(IDS, MASK, PAD)
    check_left_padded(IDS, None, PAD)
    check_left_padded(IDS.flip(-1), None, None)  # no way to tell
    check_left_padded(IDS.flip(-1)[1:], None, PAD)  # a single prompt may end with any token
    for ids, mask in ((IDS.flip(-1), MASK.flip(-1)), (IDS.flip(-1), None)):
        with pytest.raises(ValueError, match="padded on the right"):
            check_left_padded(ids, mask, PAD)


def test_move_right_keeps_the_order():
    keep = torch.tensor([[True, False, True, False], [False, True, True, True]])
    ids, mask = move_right(IDS, keep, PAD)
    assert ids.tolist() == [[PAD, PAD, 1, 3], [PAD, 5, 6, 7]]
    assert mask.tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]


def test_stack_rows_pads_the_shorter_batch():
    short = (torch.tensor([[8, 8]]), torch.tensor([[0, 1]]))
    for upper, lower in (((IDS, MASK), short), (short, (IDS, MASK))):
        ids, mask = stack_rows([upper, lower], PAD)
        assert ids.shape == mask.shape == (3, 4)
        row = 2 if lower is short else 0
        assert ids[row].tolist() == [PAD, PAD, 8, 8]
        assert mask[row].tolist() == [0, 0, 0, 1]


def test_without_a_mask_leading_padding_is_found():
    ids, mask = read_prompts(torch.tensor([[PAD, PAD, 5, PAD, 6]]), None, PAD)
    assert mask.tolist() == [[0, 0, 1, 1, 1]]
    ids, mask = read_prompts(torch.empty(1, 0), torch.empty(1, 0), PAD)
    assert ids.dtype == mask.dtype == torch.long


def test_boi_is_added_where_it_lacks():
    ids, mask = end_with_boi(
        torch.tensor([[1, 2, BOI], [PAD, 5, 6]]), torch.tensor([[1, 1, 1], [0, 1, 1]]), (BOI,), PAD
    )
    assert ids.tolist() == [[PAD, 1, 2, BOI], [PAD, 5, 6, BOI]]
    assert mask.tolist() == [[0, 1, 1, 1], [0, 1, 1, 1]]


def test_unconditional_prompts_keep_images_and_drop_text():
    code = TEXT + 3
    ids = torch.tensor([[1, BOI, code, code, 2, BOI], [PAD, 5, 6, 7, 8, BOI]])
    negative = torch.tensor([[4, BOI]]), torch.tensor([[1, 1]])
    ids, mask = unconditional_prompts((ids, (ids != PAD).long()), negative, TEXT, PAD)
    assert ids.tolist() == [[BOI, code, code, 4, BOI], [PAD, PAD, PAD, 4, BOI]]
    assert mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]


def test_grids_go_to_the_rows_that_hold_their_images():
    code = TEXT + 3
    ids = torch.tensor([[BOI, code, BOI, code, code], [1, 2, 3, 4, 5], [1, BOI, code, code, 2]])
    grids = torch.tensor([[1, 16, 16], [2, 16, 16], [3, 16, 16]])
    assert count_images(ids, TEXT) == [2, 0, 1]
    assert [rows.tolist() for rows in split_grids(ids, grids, TEXT)] == [grids[:2].tolist(), [], grids[2:].tolist()]


def test_prompts_are_tensors_and_masks_are_0_and_1():
    ids = torch.tensor([[5, 6, 7]])
    for arguments in (([[5, 6, 7]], None), (ids, [[1, 1, 1]])):
        with pytest.raises(ValueError, match='pass `return_tensors="pt"` to the processor'):
            check_left_padded(*arguments, 0)
    with pytest.raises(ValueError, match=r"must be integers, but got torch\.bool"):
        check_left_padded(ids.bool(), None, 0)
    for value in (torch.nan, 2, -1):
        with pytest.raises(ValueError, match="`attention_mask` must be 1 for what is read and 0 for padding"):
            check_left_padded(ids, torch.tensor([[value, 1, 1]]), 0)


def test_text_does_not_go_on_from_nothing():
    check_not_empty(torch.tensor([[0, 1], [1, 1]]))
    for mask in (torch.tensor([[0, 1], [0, 0]]), torch.ones(2, 0)):
        with pytest.raises(ValueError, match="A prompt is empty"):
            check_not_empty(mask)
