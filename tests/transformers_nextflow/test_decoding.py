"""Interleaved generation against one forward over the whole, batches against single rows, limits and stops."""

from itertools import pairwise
from unittest import mock

import pytest
import torch
from test_generation_nextflow import BOI, CODES, EOI, EOS, PAD, SCHEDULE, TEXT, N, build_model, seeded
from transformers import GenerationConfig

from transformers_nextflow import ScaleSchedule
from transformers_nextflow.decoding import Decoding

PROMPTS = torch.tensor([[5, 6, 7, 8, 9], [PAD, PAD, 10, 11, 12], [PAD, 13, 14, 15, 16]])
MASK = (PROMPTS != PAD).long()
GRID = list(SCHEDULE.grid_shw)


class Raise:
    """Scores that tempt: now and then, at other times in other rows, the given id is the likeliest."""

    def __init__(self, token, every):
        self.token, self.every = token, every

    def __call__(self, ids, scores):
        scores = scores.clone()
        first = (ids != PAD).long().argmax(-1, keepdim=True)
        time = (ids != PAD).sum(-1) + ids.gather(-1, first)[:, 0]
        scores[time % self.every == 0, self.token] = 1e4
        return scores


@pytest.fixture(scope="module")
def model():
    return build_model(max_position_embeddings=2048)


def interleave(model, ids=PROMPTS, mask=MASK, **settings):
    settings = {
        "do_sample": False,
        "eos_token_id": EOS,
        "max_new_images": 2,
        "max_new_tokens": 12,
        "logits_processor": [Raise(BOI, 9), Raise(EOS, 149)],
        "return_dict_in_generate": True,
        **settings,
    }
    return model.generate(ids, attention_mask=mask, generation_mode="interleaved", **settings)


def rows_of(output):
    return [row[mask.bool()].tolist() for row, mask in zip(output.sequences, output.attention_mask, strict=True)]


def images_in(row):
    return sum(a < TEXT <= b for a, b in pairwise(row))


@pytest.mark.parametrize("guidance_scale", [None, 3.0])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_batch_is_its_rows_one_by_one(model, guidance_scale, do_sample):
    settings = dict(guidance_scale=guidance_scale, do_sample=do_sample)
    together = interleave(model, generator=[seeded(i) for i in range(3)], **settings)
    rows = rows_of(together)
    alone = []
    for i in range(3):
        ids = PROMPTS[i][MASK[i].bool()][None]
        alone += rows_of(interleave(model, ids, torch.ones_like(ids), generator=seeded(i), **settings))
    assert rows == alone
    assert sum(map(images_in, rows)) == len(together.image_grid_shw) >= 4
    assert len({row.index(BOI) for row in rows if BOI in row}) > 1  # they switch at different times


@pytest.mark.parametrize("guidance_scale", [None, 3.0])
def test_nothing_is_run_twice_and_the_cache_is_that_of_one_forward(model, guidance_scale):
    ids = PROMPTS[:1]
    slots = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: slots.append(kwargs["position_ids"].shape[-1]), with_kwargs=True
    )
    settings = dict(guidance_scale=guidance_scale, generator=seeded(0), max_new_tokens=16)
    output = interleave(model, ids, MASK[:1], **settings)
    hook.remove()
    row = rows_of(output)[0]
    images = images_in(row)
    assert images == 2
    # The last token is never run; guidance's branch runs the images and their <boi>, but not the last code's slot.
    expected = len(row) - 1 + (0 if guidance_scale is None else images * (N + 1) - 1)
    assert sum(slots) == expected
    assert output.cache.get_seq_length() == len(row) - 1
    with torch.no_grad():
        whole = model(torch.tensor([row]), image_grid_shw=output.image_grid_shw)
        after = model(
            torch.tensor([row])[:, -1:].clamp(max=TEXT - 1),
            cache=output.cache,
            position_ids=_position_after(model, row, output.image_grid_shw),
        )
    if row[-1] < TEXT:
        torch.testing.assert_close(after.logits[:, -1], whole.logits[:, -1], atol=1e-4, rtol=1e-4)


def _position_after(model, row, grids):
    return model._token_position_ids(torch.tensor([row]), grids, None)[..., -1:]


def test_greedy_tokens_are_the_likeliest_of_one_forward(model):
    output = interleave(model, PROMPTS[:1], MASK[:1], logits_processor=[Raise(BOI, 9)])
    row = rows_of(output)[0]
    with torch.no_grad():
        logits = model(torch.tensor([row]), image_grid_shw=output.image_grid_shw).logits[0]
    for slot in range(len(PROMPTS[0]) - 1, len(row) - 1):
        scores, wanted = logits[slot].clone(), row[slot + 1]
        if wanted >= TEXT:
            assert scores[TEXT:].argmax() == wanted - TEXT
        elif wanted != BOI:
            scores[TEXT:] = -torch.inf
            scores[EOI] = scores[192] = -torch.inf
            assert scores.argmax() == wanted


def test_both_limits_hold(model):
    endless = [Raise(BOI, 1)]
    output = interleave(model, max_new_images=3, max_new_tokens=5, logits_processor=endless)
    assert [images_in(row) for row in rows_of(output)] == [3, 3, 3]
    never = interleave(model, max_new_images=3, max_new_tokens=5, logits_processor=[Raise(7, 1)])
    assert [len(row) for row in rows_of(never)] == [10, 8, 9]
    none = interleave(model, max_new_images=0, logits_processor=[Raise(BOI, 1)], max_new_tokens=4)
    assert all(BOI not in row for row in rows_of(none))


def test_a_stop_inside_an_image_finishes_the_scale(model):
    def after_ten_codes(ids, scores):
        return (ids >= TEXT).sum(-1) >= 10

    output = interleave(model, PROMPTS[:1], MASK[:1], stopping_criteria=[after_ten_codes])
    row = rows_of(output)[0]
    assert sum(token >= TEXT for token in row) == SCHEDULE.offsets[3]  # 14: the first whole scale with ten codes
    with torch.no_grad():
        model(torch.tensor([row]), image_grid_shw=output.image_grid_shw)  # a sequence that the model reads
    image = model.generate(
        PROMPTS[:1], generation_mode="image", stopping_criteria=after_ten_codes, return_dict_in_generate=True
    )
    assert image.image_codes.shape == (1, 14)


@pytest.mark.parametrize("number", [1, 2])
def test_thinking_comes_before_one_image_in_every_row(model, number):
    output = model.generate(
        PROMPTS,
        attention_mask=MASK,
        generation_mode="image",
        thinking=True,
        max_new_tokens=6,
        eos_token_id=EOS,
        do_sample=False,
        num_return_sequences=number,
        logits_processor=[Raise(BOI, 8)],
        return_dict_in_generate=True,
    )
    rows = rows_of(output)
    assert output.image_codes.shape == (3 * number, N)
    assert torch.equal(output.sequences[:, -N:] - TEXT, output.image_codes)
    for i, row in enumerate(rows):
        prompt = PROMPTS[i // number][MASK[i // number].bool()].tolist()
        thought = output.thought_ids[i]
        thought = thought[thought != PAD].tolist()
        assert row == [*prompt, *thought, BOI, *(output.image_codes[i] + TEXT).tolist()]
        assert len(thought) <= 6
    assert len({len(row) for row in rows}) > 1


@pytest.mark.parametrize("guidance_scale", [None, 2.0])
def test_frames_follow_one_another(model, guidance_scale):
    output = model.generate(
        PROMPTS,
        attention_mask=MASK,
        generation_mode="image",
        num_frames=3,
        guidance_scale=guidance_scale,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert output.image_codes.shape == (3, 3, N)
    for i, row in enumerate(rows_of(output)):
        frames = [token for codes in output.image_codes[i] for token in [BOI, *(codes + TEXT).tolist()]]
        assert row == [*PROMPTS[i][MASK[i].bool()].tolist(), *frames]
        if guidance_scale is None:
            with torch.no_grad():
                grids = torch.tensor([GRID] * 3)
                logits = model(torch.tensor([row]), image_grid_shw=grids, visual_logits=True).logits[0]
            codes = torch.tensor(row[1:])
            visual = codes >= TEXT
            assert torch.equal(logits[:-1][visual].argmax(-1), codes[visual] - TEXT)


def test_an_edit_keeps_the_size_of_its_source(model):
    source = torch.randint(TEXT, TEXT + CODES, (1, 1 + 4 + 9), generator=seeded(0))
    ids = torch.cat([torch.tensor([[BOI]]), source, torch.tensor([[5, 6]])], dim=1)
    grids = torch.tensor([[3, 12, 20]])
    with pytest.raises(ValueError, match="14"):
        model.generate(ids, image_grid_shw=grids, generation_mode="image")
    wide = ScaleSchedule((12, 20), 3)
    source = torch.randint(TEXT, TEXT + CODES, (1, wide.num_tokens), generator=seeded(0))
    ids = torch.cat([torch.tensor([[BOI]]), source, torch.tensor([[5, 6]])], dim=1)
    edit = dict(image_grid_shw=grids, generation_mode="image", return_dict_in_generate=True, generator=seeded(1))
    output = model.generate(ids, **edit)
    assert output.image_grid_shw.tolist() == [[3, 12, 20]] * 2
    told = model.generate(ids, height=80, width=80, **edit)
    assert told.image_grid_shw.tolist() == [[3, 12, 20], GRID]
    tall = ScaleSchedule((20, 12), 3)
    assert tall.num_tokens == wide.num_tokens
    both = torch.tensor([[3, 12, 20], [3, 20, 12]])
    with pytest.raises(ValueError, match=r"have the sizes .* drawn at one size. Pass `height` and `width`"):
        model.generate(ids.repeat(2, 1), image_grid_shw=both, generation_mode="image")


def test_text_and_images_are_guided_apart(model):
    source = torch.randint(TEXT, TEXT + CODES, (2, N), generator=seeded(0))
    ids = torch.cat([torch.full((2, 1), BOI), source, torch.tensor([[5, 6], [7, 8]])], dim=1)
    grids = torch.tensor([GRID, GRID])

    def draw(**settings):
        return model.generate(
            ids,
            image_grid_shw=grids,
            generation_mode="image",
            generator=seeded(2),
            return_dict_in_generate=True,
            **settings,
        ).image_codes

    assert torch.equal(draw(guidance_scale=3.0, image_guidance_scale=1.0), draw(guidance_scale=3.0))
    apart = draw(guidance_scale=3.0, image_guidance_scale=2.0)
    assert not torch.equal(apart, draw(guidance_scale=3.0))
    # The first scale by hand.
    with torch.no_grad():

        def first(ids, grids):
            ids = torch.cat([ids, torch.full((len(ids), 1), BOI)], dim=1)
            return model(ids, image_grid_shw=grids, visual_logits=True).logits[:, -1]

        everything, images = first(ids, grids), first(ids[:, :-2], grids)
        neither = first(ids[:, :0], None)
    guided = neither + 2.0 * (images - neither) + 3.0 * (everything - images)
    greedy = draw(guidance_scale=3.0, image_guidance_scale=2.0, do_sample=False)
    assert torch.equal(greedy[:, 0], guided.argmax(-1))
    # And one cache per branch, as interleaved rows have them, draws the same.
    frames = draw(guidance_scale=3.0, image_guidance_scale=2.0, num_frames=2)
    assert torch.equal(frames[:, 0], apart)


def test_a_fork_does_not_touch_its_sibling(model):
    decoding = Decoding(model, 1, PAD)
    decoding.extend(PROMPTS[:1], MASK[:1], [[]])
    before = [layer.keys.clone() for layer in decoding.state.cache.layers]
    twin = decoding.fork()
    twin.extend(torch.tensor([[20, 21]]), torch.ones(1, 2), [[]])
    assert decoding.state.num_slots == 5 and twin.state.num_slots == 7
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, decoding.state.cache.layers, strict=True))
    assert decoding.sequences()[0].tolist() == PROMPTS[0].tolist()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_new_images": 40}, "36 images of 80 x 80 pixels fit .* but 40 were asked for"),
        ({"max_new_images": -1}, "`max_new_images` must be a whole number of at least 0"),
        ({"image_guidance_scale": 2.0}, "3 of 3 prompts have none"),
        ({"negative_prompt_ids": PROMPTS}, "would stand between the images"),
        ({"num_beams": 2}, "beams"),
        ({"nonsense": 2}, "does not take `nonsense`"),
        ({"max_length": 9}, "the model's context of 9 .*`max_length`"),
        ({"stop_strings": ["x"]}, "must pass the model's tokenizer"),
        ({"num_return_sequences": 0}, "`num_return_sequences` must be a whole number of at least 1"),
        ({"thinking": True}, "`thinking` does not fit here: it is for `generation_mode=.image.`"),
        ({"num_frames": 2}, "`num_frames` does not fit here: it is for `generation_mode=.image.`"),
        ({"max_new_tokens": 4000}, "5 tokens, which with 4000 new ones is more than the model's context of 2048"),
        ({"generation_mode": "image", "num_frames": 0}, "`num_frames` must be a whole number of at least 1"),
        ({"generation_mode": "image", "num_frames": 2, "thinking": True}, "not both"),
        ({"generation_mode": "image", "max_new_images": 2}, "Image mode draws one image per row"),
        ({"generation_mode": "text", "num_frames": 2}, "Text mode does not take `num_frames`"),
    ],
)
def test_misuse_is_explained(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(
            PROMPTS, attention_mask=MASK, **{"generation_mode": "interleaved", "max_new_tokens": 5, **settings}
        )


@pytest.mark.parametrize("mode", ["image", "interleaved", "text"])
@pytest.mark.parametrize("number", [1, 3])
def test_grids_that_are_not_one_an_image_are_explained(model, mode, number):
    image = torch.randint(TEXT, TEXT + CODES, (2, N), generator=seeded(0))
    ids = torch.cat([torch.full((2, 1), BOI), image, torch.full((2, 1), 5)], dim=1)
    with pytest.raises(ValueError, match=f"hold 2 images, but `image_grid_shw` has {number} rows"):
        model.generate(ids, image_grid_shw=torch.tensor([GRID] * number), generation_mode=mode)
    with pytest.raises(ValueError, match=r"must have shape \(num_images, 3\)"):
        model.generate(ids, image_grid_shw=torch.tensor(GRID), generation_mode=mode)


def test_a_prompt_that_opens_an_image_gets_one(model):
    ids = torch.cat([PROMPTS[:1], torch.tensor([[BOI]])], dim=1)
    frames = dict(generation_mode="image", num_frames=2, do_sample=False, return_dict_in_generate=True)
    opened, plain = model.generate(ids, **frames), model.generate(PROMPTS[:1], **frames)
    assert torch.equal(opened.sequences, plain.sequences)
    assert opened.cache.get_seq_length() == opened.sequences.shape[1] - 1
    with pytest.raises(ValueError, match="A prompt ends with `<boi>`"):
        interleave(model, ids, torch.ones_like(ids), max_new_images=0)


@pytest.mark.parametrize("settings", [{}, {"logits_processor": [Raise(BOI, 1)], "max_new_images": 1}])
def test_text_goes_on_from_the_cache(model, settings):
    output = interleave(model, PROMPTS[:1], MASK[:1], **settings)
    inputs = dict(image_grid_shw=output.image_grid_shw, max_new_tokens=4, do_sample=False)
    expected = model.generate(output.sequences, **inputs)
    assert torch.equal(model.generate(output.sequences, cache=output.cache, **inputs), expected)


def test_stops_while_frames_or_thoughts_come(model):
    def after(number):
        return [lambda ids, scores: (ids >= TEXT).sum(-1) >= number]

    settings = dict(generation_mode="image", return_dict_in_generate=True, generator=seeded(0))
    frames = model.generate(PROMPTS[:2], num_frames=3, stopping_criteria=after(N + 2), **settings)
    assert frames.image_codes.shape == (2, 2, N)
    assert (frames.image_codes >= 0).sum(-1).tolist() == [[N, 5]] * 2
    thought = model.generate(PROMPTS[:2], thinking=True, stopping_criteria=after(0), **settings)
    assert thought.image_codes.shape == (2, 0) and thought.thought_ids.shape == (2, 1)
    image = model.generate(PROMPTS[:2], stopping_criteria=after(2), **settings)
    assert torch.equal(model.decode_image_tokens(image.sequences, image.image_grid_shw).image_codes, image.image_codes)
    assert torch.equal(model.decode_image_tokens(image.sequences).image_codes, image.image_codes)


def test_settings_may_stand_in_a_generation_config(model):
    config = GenerationConfig(max_new_tokens=3, max_new_images=0, do_sample=True, temperature=2.0)
    given = dict(max_new_tokens=3, max_new_images=0, do_sample=True, temperature=2.0)
    stored, told = (
        model.generate(PROMPTS[:1], *config, generation_mode="interleaved", generator=seeded(0), **settings)
        for config, settings in ([(config,), {}], [(), given])
    )
    assert stored.shape == (1, 8) and torch.equal(stored, told)
    thinks = GenerationConfig(thinking=True, max_new_tokens=2)
    output = model.generate(PROMPTS[:1], thinks, generation_mode="image", return_dict_in_generate=True)
    assert output.thought_ids.shape[1] <= 2


def test_text_and_images_share_a_small_context():
    small = build_model(max_position_embeddings=150)
    output = small.generate(PROMPTS[:1], generation_mode="interleaved", logits_processor=[Raise(7, 1)])
    assert output.shape[1] == 5 + 145 // 4
    [row] = rows_of(interleave(small, PROMPTS[:1], MASK[:1], max_new_images=None, max_new_tokens=20))
    assert images_in(row) == 2 and len(row) <= 150


def test_a_streamer_gets_the_prompt_first_as_in_text_mode(model):
    streams = [mock.Mock(), mock.Mock()]
    settings = dict(max_new_tokens=3, do_sample=False)
    model.generate(PROMPTS[:1], generation_mode="interleaved", max_new_images=0, streamer=streams[0], **settings)
    model.generate(PROMPTS[:1], streamer=streams[1], **settings)
    ours, theirs = ([c.args[0].tolist() for c in s.put.mock_calls] for s in streams)
    assert ours == theirs and len(ours) == 4


def test_a_stream_checks_its_arguments_when_it_is_made(model):
    with pytest.raises(ValueError, match="does not take `nonsense`"):
        model.stream(PROMPTS, nonsense=1)


@pytest.mark.parametrize("mode", ["image", "text"])
def test_too_many_images_say_how_many_fit(mode):
    small = build_model()  # a context of 256
    image = torch.randint(TEXT, TEXT + CODES, (1, N), generator=seeded(0))
    ids = torch.cat([torch.tensor([[BOI]]), image], dim=1).repeat(1, 5)
    with pytest.raises(ValueError, match=r"At most [34] images of 80 x 80 pixels fit \(56 tokens each\)"):
        small.generate(ids, image_grid_shw=torch.tensor([GRID] * 5), generation_mode=mode)
