"""Regions with prompts of their own against guidance written out, whole-image prompts, caches and batches."""

import pytest
import torch
from test_generation_nextflow import (
    BOI,
    CODES,
    MASK,
    PAD,
    PROMPTS,
    SCHEDULE,
    TEXT,
    N,
    build_model,
    draw,
    prompt_of,
    seeded,
    slow_logits,
)
from transformers import DynamicCache

from transformers_nextflow.kept_regions import pixel_shares
from transformers_nextflow.regional_prompts import Region

OTHER = torch.tensor([[30, 31, 32, 33]])
AWAY = torch.tensor([[40, 41]])
LEFT = torch.zeros(1, SCHEDULE.height, SCHEDULE.width)
LEFT[..., :37] = 1
LOW = torch.zeros(1, SCHEDULE.height, SCHEDULE.width)
LOW[:, 25:] = 0.8
EVERYWHERE = torch.ones_like(LEFT)
REGIONS = [Region(OTHER, LEFT), Region(PROMPTS.flip(0), LOW, MASK.flip(0)), Region(AWAY, LOW, negative=True)]


@pytest.fixture(scope="module")
def model():
    return build_model()


def slow_regions(model, row, scale):
    """One sample, each branch by itself, from the definition."""
    codes = torch.empty(0, dtype=torch.long)
    ids = [OTHER[0].tolist(), prompt_of(2 - row), AWAY[0].tolist()]
    shares = [pixel_shares(mask, SCHEDULE)[0] for mask in (LEFT, LOW, LOW)]
    for index in range(SCHEDULE.num_scales):
        cells = slice(*SCHEDULE.offsets[index : index + 2])
        first, second, away = (share[cells, None] for share in shares)
        total = (first + second).clamp(min=1)
        first, second = first / total, second / total
        own, other, flipped, left = (slow_logits(model, p, codes, index) for p in [prompt_of(row), *ids])
        with_text = (1 - first - second) * own + first * other + second * flipped
        without = (1 - away) * slow_logits(model, [], codes, index) + away * left
        codes = torch.cat([codes, (without + scale * (with_text - without)).argmax(-1)])
    return codes


@pytest.mark.parametrize("cache", ["preallocated", "dynamic", "static", "own"])
def test_regions_equal_branches_written_out(model, cache):
    given = {"cache": DynamicCache(config=model.config)} if cache == "own" else {"cache_implementation": cache}
    codes = draw(model, regions=REGIONS, guidance_scale=3.0, do_sample=False, **given).image_codes
    assert torch.equal(codes, torch.stack([slow_regions(model, row, 3.0) for row in range(3)]))


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 3.0}])
def test_a_region_that_is_everywhere_is_the_prompt(model, settings):
    alone = draw(model, OTHER.repeat(3, 1), torch.ones(3, 4), **settings).image_codes
    assert torch.equal(draw(model, regions=[Region(OTHER, EVERYWHERE)], **settings).image_codes, alone)
    nowhere = draw(model, regions=[Region(OTHER, EVERYWHERE * 0)], **settings).image_codes
    assert torch.equal(nowhere, draw(model, **settings).image_codes)


def test_a_negative_region_that_is_everywhere_is_the_negative_prompt(model):
    whole = draw(model, negative_prompt_ids=AWAY, guidance_scale=3.0).image_codes
    region = Region(AWAY, EVERYWHERE, negative=True)
    assert torch.equal(draw(model, regions=[region], guidance_scale=3.0).image_codes, whole)


@pytest.mark.parametrize("settings", [{"guidance_scale": 3.0}, {"prefix_scales": 2, "images_per_prefix": 2}])
def test_a_batch_is_its_rows_one_by_one(model, settings):
    copies = 2
    regions = REGIONS if "guidance_scale" in settings else REGIONS[:2]
    settings = {**settings, "num_return_sequences": copies}
    together = draw(model, regions=regions, generator=[seeded(i) for i in range(6)], **settings).image_codes
    for i in range(3):
        ids, flipped = (torch.tensor([prompt_of(row)]) for row in (i, 2 - i))
        own = [regions[0], Region(flipped, LOW), *regions[2:]]
        generators = [seeded(i * copies + j) for j in range(copies)]
        alone = draw(model, ids, torch.ones_like(ids), regions=own, generator=generators, **settings).image_codes
        assert torch.equal(alone, together[i * copies : (i + 1) * copies])


def test_regions_after_a_thought_of_no_tokens_are_those_without(model):
    settings = {"regions": REGIONS, "guidance_scale": 3.0, "do_sample": False, "num_return_sequences": 2}
    thought = draw(model, **settings, thinking=True, max_new_tokens=1, eos_token_id=list(range(TEXT)))
    assert thought.thought_ids.numel() == 0
    assert torch.equal(thought.image_codes, draw(model, **settings).image_codes)


def test_regions_share_the_pictures_of_the_prompt(model):
    """Everywhere, a region's text stands behind the pictures, as if it were the prompt's."""
    picture = [BOI, *range(TEXT, TEXT + 5)]
    grids = torch.tensor([[2, 16, 16]])
    prompts = [torch.tensor([[*picture, *text]]) for text in ([5, 6], OTHER[0].tolist())]
    asked, wanted = ({"ids": ids, "mask": torch.ones_like(ids), "image_grid_shw": grids} for ids in prompts)
    settings = {"guidance_scale": 2.0, "image_guidance_scale": 1.5, "num_scales": 4}
    everywhere = Region(OTHER, torch.ones(1, 64, 64))
    drawn = draw(model, **asked, regions=[everywhere], **settings).image_codes
    assert torch.equal(drawn, draw(model, **wanted, **settings).image_codes)


def test_kept_parts_and_regions_go_together(model):
    source = torch.randint(CODES, (1, N), generator=seeded(3))
    codes = draw(model, regions=REGIONS[:2], keep_codes=source, keep_mask=LEFT, keep_repair=False).image_codes
    places = (pixel_shares(LEFT, SCHEDULE) >= 0.5)[0]
    assert (codes[:, places] == source[:, places]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regions": []}, "`regions` is a list of one `Region` at least"),
        ({"regions": Region(OTHER, LEFT)}, "`regions` is a list of one `Region` at least"),
        ({"regions": [(OTHER,)]}, r"`regions\[0\]`: .*missing 1 required positional argument: 'mask'"),
        ({"regions": [Region("a star", LEFT)]}, r"`regions\[0\]`: `input_ids` must be a tensor"),
        ({"regions": [Region(OTHER + TEXT, LEFT)]}, "its prompt must be text"),
        ({"regions": [Region(OTHER, LEFT[:, 1:])]}, r"has the image's size, \(batch, 80, 80\)"),
        ({"regions": [Region(OTHER, LEFT * 255)]}, "has values from 0 to 1"),
        ({"regions": [Region(OTHER, LEFT.repeat(2, 1, 1))]}, "has 2 masks for 3 prompts"),
        ({"regions": [Region(OTHER.repeat(2, 1), LEFT)]}, "has 2 prompts for 3 prompts"),
        ({"regions": [Region(OTHER, LEFT, None, 1)]}, "`negative` must be True or False"),
        ({"regions": REGIONS}, "pass a `guidance_scale` other than 1"),
        ({"regions": REGIONS[:1], "num_frames": 2}, "`regions` are of one image"),
        ({"regions": REGIONS[:1], "generation_mode": "interleaved"}, "`regions` are of one image"),
        ({"regions": REGIONS[:1], "generation_mode": "text"}, "Text mode does not take `regions`"),
    ],
)
def test_misuse_is_explained(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPTS, attention_mask=MASK, pad_token_id=PAD, **{"generation_mode": "image", **settings})
