"""Kept codes: nothing kept is plain drawing, all kept is the source, and what is drawn sees what is kept."""

import pytest
import torch
import torch.nn.functional as F
from test_generation_nextflow import CODES, MASK, PAD, PROMPTS, SCHEDULE, TEXT, N, build_model, draw, seeded
from transformers import DynamicCache

from transformers_nextflow import ScaleSchedule
from transformers_nextflow.kept_regions import kept_places

SOURCE = torch.randint(CODES, (3, N), generator=seeded(1))
PIXELS = torch.ones(3, SCHEDULE.height, SCHEDULE.width)
PIXELS[0, 10:50, 20:70] = 0
PIXELS[1, :, 40:] = 0
PIXELS[2, 30:, :30] = 0.2


@pytest.fixture(scope="module")
def model():
    return build_model(max_position_embeddings=2048)


def keep(model, mask=PIXELS, **settings):
    return draw(model, keep_codes=SOURCE, keep_mask=mask, **settings)


def check_repair(model, codes, source=SOURCE, places=None):
    """Every kept code is the nearest to the source's vector and all that is missing before it, from the definition."""
    places = kept_places(PIXELS, SCHEDULE) if places is None else places
    table, size = model.model.visual_codebook.weight.detach(), SCHEDULE.grids[-1]
    for row, own, kept in zip(codes, source, places, strict=True):
        missing = torch.zeros(1, table.shape[1], *size)
        for index, grid in enumerate(SCHEDULE.grids):
            scale = slice(*SCHEDULE.offsets[index : index + 2])
            resized = F.interpolate(missing, grid, mode="area")[0].flatten(1).T
            for code, wanted, gap, is_kept in zip(row[scale], own[scale], resized, kept[scale], strict=True):
                if is_kept:
                    nearest = (table - (table[wanted] + gap)).square().sum(-1).argmin() if gap.any() else wanted
                    assert code == nearest
            left = (table[own[scale]] - table[row[scale]]).T.reshape(1, -1, *grid)
            missing = missing + F.interpolate(left, size, mode="bicubic", align_corners=False)


def test_a_cell_is_kept_if_half_of_it_is():
    schedule = ScaleSchedule((8, 32), 6)
    mask = torch.rand(2, schedule.height, schedule.width, generator=seeded(0))
    places = kept_places(mask, schedule)
    for index, (h, w) in enumerate(schedule.grids):
        cells = places[:, slice(*schedule.offsets[index : index + 2])].unflatten(1, (h, w))
        for y in range(h):
            for x in range(w):
                # The pixels that a cell touches, as torch's area resize has it.
                top, bottom = y * mask.shape[1] // h, -(-(y + 1) * mask.shape[1] // h)
                left, right = x * mask.shape[2] // w, -(-(x + 1) * mask.shape[2] // w)
                assert torch.equal(cells[:, y, x], mask[:, top:bottom, left:right].mean((1, 2)) >= 0.5)


CALLS = {
    "plain": {},
    "guided": {"guidance_scale": 3.0},
    "greedy": {"do_sample": False},
    "thinking": {"thinking": True, "max_new_tokens": 3, "guidance_scale": 2.0},
    "shared": {"num_return_sequences": 4, "prefix_scales": 2, "images_per_prefix": 2, "guidance_scale": 2.0},
}


@pytest.mark.parametrize("repair", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_nothing_kept_is_plain_drawing_and_all_kept_is_the_source(model, name, repair):
    settings, copies = {**CALLS[name], "keep_repair": repair}, CALLS[name].get("num_return_sequences", 1)
    for ones in (torch.ones_like(PIXELS), torch.ones(1, N, dtype=torch.bool)):
        assert torch.equal(keep(model, ones, **settings).image_codes, SOURCE.repeat_interleave(copies, 0))
        assert torch.equal(keep(model, ones * 0, **settings).sequences, draw(model, **CALLS[name]).sequences)


@pytest.mark.parametrize("name", CALLS)
def test_what_is_kept_makes_up_for_what_is_drawn(model, name):
    copies = CALLS[name].get("num_return_sequences", 1)
    places, source = (part.repeat_interleave(copies, 0) for part in (kept_places(PIXELS, SCHEDULE), SOURCE))
    codes = keep(model, **CALLS[name]).image_codes
    check_repair(model, codes, source, places)
    assert (codes[~places] != source[~places]).float().mean() > 0.5
    as_they_are = keep(model, **CALLS[name], keep_repair=False).image_codes
    assert torch.equal(as_they_are[places], source[places]) and not torch.equal(codes[places], source[places])


def test_drawn_codes_are_those_of_teacher_forcing_on_kept_ones(model):
    out = keep(model, do_sample=False)
    with torch.no_grad():
        forced = model(
            out.sequences, image_grid_shw=out.image_grid_shw, attention_mask=F.pad(MASK, (0, 1 + N), value=1)
        ).logits[:, PROMPTS.shape[1] : -1, TEXT:]
    drawn = ~kept_places(PIXELS, SCHEDULE)
    assert torch.equal(out.image_codes[drawn], forced.argmax(-1)[drawn])


@pytest.mark.parametrize("name", CALLS)
def test_a_batch_is_its_rows_one_by_one(model, name):
    copies = CALLS[name].get("num_return_sequences", 1)
    together = keep(model, **CALLS[name], generator=[seeded(i) for i in range(3 * copies)]).image_codes
    for i in range(3):
        ids = PROMPTS[i][MASK[i].bool()][None]
        alone = draw(
            model,
            ids,
            torch.ones_like(ids),
            keep_codes=SOURCE[i : i + 1],
            keep_mask=PIXELS[i : i + 1],
            generator=[seeded(i * copies + j) for j in range(copies)],
            **CALLS[name],
        ).image_codes
        assert torch.equal(alone, together[i * copies : (i + 1) * copies])


@pytest.mark.parametrize("cache", ["dynamic", "static", "own"])
def test_every_cache_draws_the_same(model, cache):
    for name in ("guided", "thinking"):
        given = {"cache": DynamicCache(config=model.config)} if cache == "own" else {"cache_implementation": cache}
        assert torch.equal(keep(model, **CALLS[name], **given).sequences, keep(model, **CALLS[name]).sequences)


def test_eight_bits_keep_as_well(model):
    check_repair(model, keep(model, cache_implementation="quantized").image_codes)


def test_a_callback_changes_what_has_to_be_made_up_for(model):
    def change(index, schedule, codes):
        return torch.cat([codes[:, : schedule.offsets[index]], codes[:, schedule.offsets[index] :] * 0], 1)

    places = kept_places(PIXELS, SCHEDULE) & (torch.arange(N) >= SCHEDULE.offsets[2])
    codes = keep(model, on_scale_end=lambda index, *rest: change(index, *rest) if index < 2 else None).image_codes
    check_repair(model, codes, places=places)


def test_the_other_precision(model):
    half = build_model(max_position_embeddings=2048).to(torch.bfloat16)
    assert torch.equal(keep(half, torch.ones_like(PIXELS)).image_codes, SOURCE)
    assert keep(half).image_codes.shape == (3, N)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_mask": None}, "`keep_codes` and `keep_mask` together"),
        ({"keep_codes": None}, "`keep_codes` and `keep_mask` together"),
        ({"keep_codes": None, "keep_mask": None, "keep_repair": True}, "`keep_repair` says how `keep_codes` are kept"),
        ({"keep_repair": "yes"}, "`keep_repair` must be True or False, but got 'yes'"),
        ({"keep_codes": SOURCE[:, :-1]}, r"the codes of an image of 80 x 80 pixels .* but got torch.int64 of shape"),
        ({"keep_codes": SOURCE.float()}, "`keep_codes` must be whole numbers"),
        ({"keep_codes": SOURCE + TEXT}, "`keep_codes` must be from 0 to 63, .* They are codes and not ids"),
        ({"keep_codes": SOURCE[:2]}, "`keep_codes` has 2 rows for 3 prompts"),
        ({"keep_mask": PIXELS[:2]}, "`keep_mask` has 2 rows for 3 prompts"),
        ({"keep_mask": PIXELS[:, :64]}, r"`keep_mask`: A mask of pixels has the image's size, \(batch, 80, 80\)"),
        ({"keep_mask": PIXELS * 255}, "`keep_mask`: A mask has values from 0 to 1, but these are from 0.0 to 255.0"),
        ({"keep_mask": PIXELS * torch.nan}, "`keep_mask`: A mask has values from 0 to 1"),
        ({"keep_mask": torch.full((3, N), 0.5)}, "`keep_mask` must have a yes or no for each code"),
        ({"keep_mask": torch.ones(3, 7)}, "`keep_mask` must have a yes or no for each code"),
        ({"keep_mask": PIXELS.numpy()}, "`keep_mask` must be a tensor"),
        ({"num_scales": 4}, r"`keep_codes` must be .* \(1 or 3, 30\): the codes of an image of 64 x 64"),
        ({"num_frames": 2}, "`keep_codes` are of one image"),
        ({"generation_mode": "interleaved"}, "`keep_codes` are of one image"),
        ({"generation_mode": "text"}, "Text mode does not take `keep_codes`, `keep_mask`"),
    ],
)
def test_misuse_is_explained(model, settings, message):
    given = {"generation_mode": "image", "keep_codes": SOURCE, "keep_mask": PIXELS, **settings}
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPTS, attention_mask=MASK, pad_token_id=PAD, **given)
