"""Interleaved generation against one forward over the whole, batches against single rows, limits and stops."""

from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from test_generation_nextflow import BOI, CODES, EOI, EOS, MARK, PAD, SCHEDULE, TEXT, N, build_model, seeded
from transformers import DynamicCache, GenerationConfig
from transformers.generation import CompileConfig

from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, ScaleCache, ScaleSchedule
from transformers_nextflow.decoding import Decoding
from transformers_nextflow.token_layout import TokenLayout

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
    return TokenLayout.of(torch.tensor([row]), grids, model.config).position_ids[..., -1:]


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
        ({"stop_strings": ["x"]}, "must pass the model's tokenizer"),
        ({"num_return_sequences": 0}, "`num_return_sequences` must be a whole number of at least 1"),
        ({"thinking": True}, "`thinking` does not fit here: it is for `generation_mode=.image.`"),
        ({"num_frames": 2}, "`num_frames` does not fit here: it is for `generation_mode=.image.`"),
        ({"max_new_tokens": 4000}, "5 tokens, which with 4000 new ones is more than the model's context of 2048"),
        ({"generation_mode": "image", "num_frames": 0}, "`num_frames` must be a whole number of at least 1"),
        ({"generation_mode": "image", "num_frames": 2, "thinking": True}, "not both"),
        ({"generation_mode": "image", "max_new_images": 2}, "image mode draws one image per row"),
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


# --- One engine: what works in one mode works in the others, or is refused by name ---

MODES = {
    "image": dict(generation_mode="image"),
    "frames": dict(generation_mode="image", num_frames=2),
    "thinking": dict(generation_mode="image", thinking=True, max_new_tokens=3),
    "interleaved": dict(generation_mode="interleaved", max_new_tokens=4, max_new_images=2),
}


def in_mode(model, mode, **settings):
    return model.generate(
        PROMPTS,
        attention_mask=MASK,
        **{"generator": seeded(0), "return_dict_in_generate": True, **MODES[mode], **settings},
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache", ["preallocated", "dynamic", "static", "offloaded", "offloaded_static"])
def test_every_cache_draws_the_same_in_every_mode(model, mode, cache):
    if cache.startswith("offloaded") and not torch.cuda.is_available():
        pytest.skip("transformers' offloaded caches need an accelerator")
    expected = in_mode(model, mode, guidance_scale=2.0)
    drawn = in_mode(model, mode, guidance_scale=2.0, cache_implementation=cache)
    assert torch.equal(drawn.sequences, expected.sequences)
    own = in_mode(model, mode, guidance_scale=2.0, cache=DynamicCache(config=model.config))
    assert torch.equal(own.sequences, expected.sequences)


@pytest.mark.parametrize("mode", MODES)
def test_training_mode_with_checkpointing_draws_the_same(mode):
    model = build_model()
    expected = in_mode(model, mode).sequences
    model.activation_checkpointing_enable()
    model.train()
    assert torch.equal(in_mode(model, mode).sequences, expected)
    texts = [model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=4) for _ in (model, model.eval())]
    assert torch.equal(*texts)


def test_a_negative_prompt_leads_away_from_it_after_a_thought(model):
    """With a thought of no tokens the image is that of image mode."""
    settings = dict(guidance_scale=3.0, do_sample=False)
    for negatives in (torch.tensor([[20, 21, 22]]), torch.tensor([[20, 21], [PAD, 22], [23, 24]])):
        thought = in_mode(
            model, "thinking", negative_prompt_ids=negatives, logits_processor=[Raise(BOI, 1)], **settings
        )
        expected = in_mode(model, "image", negative_prompt_ids=negatives, **settings)
        assert thought.thought_ids.shape[1] == 0
        assert torch.equal(thought.image_codes, expected.image_codes)


def test_rows_stop_one_by_one(model):
    """A criterion ends the rows that it names, and no others."""

    def long_enough(ids, scores):
        return (ids != PAD).sum(-1) >= torch.tensor([8, 5, 7])[: len(ids)]

    output = model.generate(
        PROMPTS, attention_mask=MASK, generation_mode="interleaved", max_new_images=0, max_new_tokens=6,
        stopping_criteria=[long_enough], return_dict_in_generate=True,
    )  # fmt: skip
    assert output.attention_mask.sum(-1).tolist() == [8, 5, 7]


def test_stop_strings_end_a_text_and_the_picture_still_comes(tiny_random_checkpoint):
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint).eval()
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    prompts = processor(["a b", "two"], padding=True, padding_side="left", return_tensors="pt")
    letter = processor.tokenizer.convert_tokens_to_ids("x")
    output = model.generate(
        **prompts, generation_mode="image", thinking=True, max_new_tokens=5, stop_strings=["x"],
        tokenizer=processor.tokenizer, logits_processor=[Raise(letter, 1)], return_dict_in_generate=True,
    )  # fmt: skip
    assert output.thought_ids.tolist() == [[letter]] * 2 and (output.image_codes >= 0).all()


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"suppress_tokens": [7]}, {"no_repeat_ngram_size": 1}, {"bad_words_ids": [[7]]}, {"repetition_penalty": 1e9}],
)
def test_text_between_images_is_made_by_the_whole_configuration(stored, options):
    model = build_model()
    settings = dict(generation_mode="interleaved", max_new_images=0, max_new_tokens=3, sequence_bias=[[[7], 1e4]])
    ids = torch.tensor([[7, 5]])
    assert model.generate(ids, **settings)[0, 2:].tolist() == [7, 7, 7]
    if stored:
        vars(model.generation_config).update(options)
    assert 7 not in model.generate(ids, **settings, **({} if stored else options))[0, 2:].tolist()


def test_lengths_count_as_they_are_named(model):
    bias = [[[EOS], 1e4]]
    settings = dict(generation_mode="interleaved", max_new_images=0, eos_token_id=EOS, sequence_bias=bias)
    assert model.generate(PROMPTS[:1], **settings).shape[1] == 6
    assert model.generate(PROMPTS[:1], min_new_tokens=3, **settings).shape[1] == 9
    assert model.generate(PROMPTS[:1], min_length=7, **settings).shape[1] == 8
    assert model.generate(PROMPTS[:1], max_length=9, min_new_tokens=50, **settings).shape[1] == 9


def test_sampled_text_has_transformers_top_k(model):
    """As in text mode, where the 50 likeliest tokens are drawn from."""
    settings = dict(generation_mode="interleaved", max_new_images=0, max_new_tokens=1, do_sample=True)
    best = model(PROMPTS[:1]).logits[0, -1, :TEXT].float()
    best[[BOI, EOI, MARK]] = -torch.inf
    allowed = set(best.topk(50).indices.tolist())
    drawn = model.generate(PROMPTS[:1], **settings, temperature=50.0, num_return_sequences=64, generator=seeded(0))
    assert set(drawn[:, -1].tolist()) <= allowed
    settings |= dict(top_k=0, generator=seeded(0))
    free = model.generate(PROMPTS[:1], **settings, temperature=50.0, num_return_sequences=64)
    assert not set(free[:, -1].tolist()) <= allowed


@pytest.mark.parametrize("mode", ["image", "frames", "thinking"])
def test_a_callback_changes_codes_and_what_follows(model, mode):
    changed = {}

    def replace(index, schedule, codes):
        if index == 1:
            codes = codes.clone()
            codes[:, 1:] = (codes[:, 1:] + 1) % CODES
            changed[len(changed)] = codes
            return codes

    plain, other = in_mode(model, mode), in_mode(model, mode, on_scale_end=replace)
    first = other.image_codes.reshape(len(PROMPTS), -1)[:, :5]
    assert torch.equal(first, changed[0])
    assert not torch.equal(other.image_codes, plain.image_codes)
    with torch.no_grad():  # the next scale is conditioned on them
        mask = torch.ones_like(other.sequences) if other.attention_mask is None else other.attention_mask
        mask = F.pad(MASK, (0, other.sequences.shape[1] - 5), value=1) if mode != "thinking" else mask
        logits = model(other.sequences, image_grid_shw=other.image_grid_shw, attention_mask=mask).logits
    greedy = in_mode(model, mode, on_scale_end=replace, do_sample=False)
    assert torch.isfinite(logits).all() and greedy.image_codes.shape == other.image_codes.shape


def test_a_callback_changes_the_guidance_of_what_follows(model):
    def off(index, schedule, codes):
        return {"guidance_scale": 1.0} if index == 2 else None

    guided = in_mode(model, "image", guidance_scale=4.0).image_codes
    changed = in_mode(model, "image", guidance_scale=4.0, on_scale_end=off).image_codes
    plan_by_hand = in_mode(model, "image", guidance_scale=4.0, on_scale_end=lambda i, *_: {"guidance_scale": 4.0})
    assert torch.equal(changed[:, :14], guided[:, :14]) and not torch.equal(changed, guided)
    assert torch.equal(plan_by_hand.image_codes, guided)
    with pytest.raises(ValueError, match="began without guidance"):
        in_mode(model, "image", on_scale_end=lambda *_: {"guidance_scale": 3.0})


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda codes: codes + CODES, "whole numbers from 0 to 63"),
        (lambda codes: codes[:, 1:], r"of shape \(3, 5\)"),
        (lambda codes: codes.float(), "whole numbers"),
        (lambda codes: (codes + 1) % CODES, "Only codes of the scale that was just drawn"),
    ],
)
def test_codes_that_a_callback_can_not_change(model, answer, message):
    with pytest.raises(ValueError, match=message):
        in_mode(model, "image", on_scale_end=lambda index, _, codes: answer(codes) if index == 1 else None)


def test_image_mode_streams_too(model):
    expected = in_mode(model, "image").image_codes
    events = list(model.stream(PROMPTS, attention_mask=MASK, generation_mode="image", generator=seeded(0)))
    assert [event.kind for event in events] == ["scale"] * 15 + ["image"] * 3
    assert torch.equal(torch.stack([event.ids for event in events[-3:]]), expected)


@pytest.mark.parametrize(
    "mode, settings, message",
    [
        ("thinking", {"inputs": torch.tensor([[5, BOI]])}, "`thinking` comes before it"),
        ("frames", {"negative_prompt_ids": PROMPTS, "guidance_scale": 2.0}, "would stand between the images"),
        ("thinking", {"prefix_scales": 2, "images_per_prefix": 2}, "`prefix_scales` does not fit here"),
        ("image", {"num_return_sequences": 10**12}, r"GB of keys and values, but the device has"),
        ("image", {"output_scores": True}, "does not take `output_scores=True`"),
        ("interleaved", {"prefill_chunk_size": 4}, "must not be cut"),
        ("image", {"inputs_embeds": torch.zeros(1, 2, 64)}, "does not take `inputs_embeds`"),
        ("image", {"height": "80", "width": 80}, "`height` must be a whole number of at least 1, but got '80'"),
        ("image", {"do_sample": True, "logits_processor": [Raise(1, 1)]}, "writes no text"),
    ],
)
def test_what_a_mode_can_not_do_is_refused_by_name(model, mode, settings, message):
    inputs = settings.pop("inputs", PROMPTS)
    with pytest.raises(ValueError, match=message):
        model.generate(inputs, **MODES[mode], **settings)


def test_text_is_never_guided_in_silence(model):
    with pytest.raises(ValueError, match="Text mode does not take `guidance_scale`"):
        model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=2, guidance_scale=3.0)


# --- Stored options ---


@pytest.mark.parametrize("mode", [*MODES, "text"])
@pytest.mark.parametrize(
    "stored",
    [
        {"thinking": True},
        {"num_frames": 2},
        {"prefix_scales": 2, "images_per_prefix": 3},
        {"output_scores": True, "prefill_chunk_size": 4, "forced_eos_token_id": EOS},
        {"cache_implementation": "preallocated"},
        {"max_length": 8},
        {"image_guidance_scale": 2.0, "max_new_images": 1},
        {"prompt_styles": {"image": "chat"}, "temperature": 0.7},
    ],
)
def test_an_option_that_is_stored_for_other_calls_is_in_no_calls_way(mode, stored):
    model = build_model(max_position_embeddings=2048)
    vars(model.generation_config).update(stored)
    if mode == "text":
        assert model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=4).shape[1] >= 9
        return
    output = in_mode(model, mode)
    assert output.sequences.shape[0] == 3
    passed = model.generate(
        PROMPTS, model.generation_config, attention_mask=MASK, generator=seeded(0), **MODES[mode]
    )  # which asks for nothing new
    assert torch.equal(passed, output.sequences)


def test_a_stored_compile_config_compiles_where_it_can(model):
    graphs = CompileConfig(backend="eager", mode=None)
    for mode in MODES:
        plain = in_mode(model, mode, guidance_scale=2.0)
        compiled = in_mode(model, mode, guidance_scale=2.0, compile_config=graphs)
        assert torch.equal(plain.sequences, compiled.sequences)


def test_a_static_cache_has_room_for_rows_that_write_at_different_times(model):
    class Turns:
        """Row 0 writes much before its image and little behind it, row 1 the other way round."""

        def __call__(self, ids, scores):
            scores = scores.clone()
            for row, (of_row, before) in enumerate(zip(ids, (11, 1), strict=True)):
                drawn = (of_row >= TEXT).any()
                written = int((of_row != PAD).sum()) - 5
                scores[row, BOI] = 1e4 if written == before and not drawn else -1e4
            return scores

    settings = dict(
        attention_mask=MASK[:2], generation_mode="interleaved", max_new_tokens=12, max_new_images=1,
        logits_processor=[Turns()], do_sample=False,
    )  # fmt: skip
    expected = model.generate(PROMPTS[:2], **settings)
    for cache in ("static", "preallocated"):
        assert torch.equal(model.generate(PROMPTS[:2], cache_implementation=cache, **settings), expected)


def test_a_cache_that_is_used_again_forgets_its_padding(model):
    cache = ScaleCache(model.config, 400)
    in_mode(model, "image", cache=cache)
    cache.reset()
    fresh = in_mode(model, "frames")
    assert torch.equal(in_mode(model, "frames", cache=cache).sequences, fresh.sequences)


@pytest.mark.parametrize("mode", ["image", "thinking"])
def test_negative_prompts_are_one_or_one_for_each(model, mode):
    for number in (2, 4):
        negatives = torch.full((number, 2), 20)
        with pytest.raises(ValueError, match=f"Got {number} negative prompts for 3 prompts"):
            in_mode(model, mode, guidance_scale=2.0, negative_prompt_ids=negatives)


def test_the_context_is_used_to_its_end():
    small = build_model(max_position_embeddings=6 + N)
    assert small.generate(torch.tensor([[5, 6, 7, 8, 9, BOI]]), generation_mode="image").shape[1] == 6 + N
    with pytest.raises(ValueError, match=r"slots of the context are free|more than the model's context"):
        negative = torch.full((1, 300), 7)
        small.generate(PROMPTS[:1], generation_mode="image", guidance_scale=2.0, negative_prompt_ids=negative)


@pytest.mark.parametrize(
    "mode, settings",
    [
        ("image", {"max_time": 1.0}),
        ("frames", {"temperature": 0.5}),
        ("image", {"on_scale_end": lambda *_: {"code": 1}}),
        ("image", {"on_scale_end": lambda *_: [1]}),
        ("image", {"guidance_scale": 2.0, "on_scale_end": lambda *_: {"guidance_scale": float("nan")}}),
        ("image", {"schedule": SCHEDULE}),
        ("image", {"over": 1}),
    ],
)
def test_nothing_is_without_effect_in_silence(model, mode, settings):
    with pytest.raises(ValueError, match="|".join(settings)):
        in_mode(model, mode, **settings)


def test_a_thought_has_its_least_length(model):
    thought = in_mode(model, "thinking", min_new_tokens=3, sequence_bias=[[[BOI], 1e4]])
    assert thought.thought_ids.shape == (3, 3)


def test_codes_of_a_callback_are_int64_wherever_they_were(model):
    output = in_mode(model, "image", on_scale_end=lambda index, schedule, codes: codes.int())
    assert output.image_codes.dtype == torch.long


@pytest.mark.parametrize("mode", MODES)
def test_no_cache_that_is_full_is_given_to_go_on_from(model, mode):
    assert in_mode(model, mode, cache_implementation="static").cache is None
