"""Attention of cells to words: where it is put together, and bad input."""

import pytest
import torch
import torch.nn.functional as F
from test_generation_nextflow import MASK, PROMPTS, SCHEDULE, TEXT, N, build_model, draw

from transformers_nextflow.word_attention import attention_maps


@pytest.fixture(scope="module")
def drawn():
    model = build_model()
    model.set_attn_implementation("eager")
    return model, draw(model)


def maps_of(drawn, **settings):
    model, out = drawn
    mask = F.pad(MASK, (0, 1 + N), value=1)
    given = {"sequences": out.sequences, "image_grid_shw": out.image_grid_shw, "attention_mask": mask, **settings}
    return attention_maps(model, **given)


@pytest.mark.parametrize("scale", [0, 2, -1])
def test_a_cell_looks_where_its_slot_does(drawn, scale):
    index = scale % SCHEDULE.num_scales
    found = maps_of(drawn, scale=scale)
    length = PROMPTS.shape[1] + 1
    assert found.shape == (3, length, *SCHEDULE.grids[index])
    assert (found.sum(1) <= 1 + 1e-5).all() and (found >= 0).all()
    assert (found[1, :2] == 0).all() and (found[:, -1] > 0).all()  # padding; <boi>
    if index == 0:  # it sees nothing but the prompt
        assert torch.allclose(found.sum(1), torch.ones(3, 1, 1))


def test_it_is_the_mean_over_layers_and_heads(drawn):
    seen = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[1]))
        for layer in drawn[0].model.layers
    ]
    found = maps_of(drawn)
    for hook in hooks:
        hook.remove()
    slots = slice(-SCHEDULE.scale_lengths[-1] - 1, -1)
    weights = torch.stack(seen).mean((0, 2))[:, slots, : PROMPTS.shape[1] + 1]
    assert torch.allclose(found, weights.mT.unflatten(2, SCHEDULE.grids[-1]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 5}, "`scale` must be below 5"),
        ({"scale": -6}, "`scale` must be below 5"),
        ({"sequences": torch.cat([PROMPTS, PROMPTS], 1), "attention_mask": None}, "must end with a whole image"),
        ({"sequences": torch.full((3, N), TEXT), "attention_mask": None}, "don't follow a `<boi>`"),
    ],
)
def test_misuse_is_explained(drawn, settings, message):
    with pytest.raises(ValueError, match=message):
        maps_of(drawn, **settings)


def test_fast_attention_has_nothing_to_show(drawn):
    model = build_model()
    with pytest.raises(ValueError, match='attn_implementation="sdpa"'):
        attention_maps(model, drawn[1].sequences, drawn[1].image_grid_shw)
