"""Image mode against teacher forcing and a slow double; text mode against Qwen2; seeds, settings and bad input."""

from dataclasses import replace
from threading import Thread
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, GenerationConfig, Qwen2Config, Qwen2ForCausalLM, StaticCache, pipeline

from random_weights import sharpen
from transformers_nextflow.configuration_nextflow import NextFlowConfig
from transformers_nextflow.generation_nextflow import NextFlowGenerateOutput
from transformers_nextflow.modeling_nextflow import NextFlowForCausalLM
from transformers_nextflow.scale_schedule import ScaleSchedule

TEXT, CODES, BOI, EOI, MARK, PAD, EOS = 200, 64, 190, 191, 192, 193, 194
SCHEDULE = ScaleSchedule(num_scales=5)  # 1 + 4 + 9 + 16 + 25 codes
N = SCHEDULE.num_tokens

PROMPTS = torch.tensor([[5, 6, 7, 8, 9], [PAD, PAD, 10, 11, 12], [PAD, 13, 14, 15, 16]])
MASK = (PROMPTS != PAD).long()


def build_model(**config) -> NextFlowForCausalLM:
    torch.manual_seed(0)
    model = NextFlowForCausalLM(
        NextFlowConfig(
            **{
                "vocab_size": TEXT + CODES,
                "text_vocab_size": TEXT,
                "visual_codebook_size": CODES,
                "visual_code_dim": 12,
                "num_scales": SCHEDULE.num_scales,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
                "boi_token_id": BOI,
                "eoi_token_id": EOI,
                "image_token_id": MARK,
                "bos_token_id": None,
                "eos_token_id": EOS,
                "pad_token_id": PAD,
                **config,
            }
        )
    )
    sharpen(model)
    model.generation_config.eos_token_id = None  # texts of a fixed length
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return build_model()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(model, ids=PROMPTS, mask=MASK, **settings) -> NextFlowGenerateOutput:
    settings = {"generator": seeded(0), **settings}
    return model.generate(ids, attention_mask=mask, generation_mode="image", return_dict_in_generate=True, **settings)


class ForwardCalls:
    """Records the arguments and logits of every call of a model, also those that a `code_sampler` reads in slices."""

    def __init__(self, model):
        self.arguments, self.logits = [], []
        self.hooks = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after),
        ]

    def before(self, model, args, kwargs):
        # The mask and cache may change later.
        self.arguments.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()})
        step = kwargs.get("scale_step")
        if step is None or step.code_sampler is None:
            return None

        def sample(head, hidden_states):
            self.logits.append(head(hidden_states))
            return step.code_sampler(head, hidden_states)

        return args, {**kwargs, "scale_step": replace(step, code_sampler=sample)}

    def after(self, model, args, output):
        if output.logits is not None:
            self.logits.append(output.logits.clone())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def slow_logits(model, prompt: list[int], codes: torch.Tensor, num_scales: int) -> torch.Tensor:
    """Logits `(n_s, K)` of the next scale for one sample: everything again, without padding and without a cache."""
    ids = torch.cat([torch.tensor([*prompt, BOI]), codes + TEXT])[None]
    grids = torch.tensor([SCHEDULE.grid_shw]) if len(codes) else None
    if len(codes) == 0:
        return model(ids).logits[0, -1:, TEXT:]
    # The slots of the next scale's features exist only once codes stand there; which ones does not matter.
    ids = torch.cat([ids, ids.new_full((1, SCHEDULE.scale_lengths[num_scales]), TEXT)], dim=1)
    first = len(prompt) + SCHEDULE.offsets[num_scales]
    return model(ids, image_grid_shw=grids).logits[0, first:-1, TEXT:]


def slow_greedy(model, prompt: list[int], negative: list[int] | None, guidance_scales: list[float]) -> torch.Tensor:
    """Two branches, one sample, written out."""
    codes = torch.empty(0, dtype=torch.long)
    for step, guidance_scale in enumerate(guidance_scales):
        logits = slow_logits(model, prompt, codes, step)
        if negative is not None:
            unconditional = slow_logits(model, negative, codes, step)
            logits = unconditional + guidance_scale * (logits - unconditional)
        codes = torch.cat([codes, logits.argmax(-1)])
    return codes


def prompt_of(row: int) -> list[int]:
    return PROMPTS[row][MASK[row].bool()].tolist()


# --- Image mode: exactness ---


@pytest.fixture(params=["sdpa", "eager", "flex_attention"])
def attention(request, model):
    model.set_attn_implementation(request.param)
    # On CPU, torch 2.14 can't compile flex attention for varying lengths; uncompiled it takes the same masks.
    with torch.compiler.set_stance("force_eager"):
        yield request.param
    model.set_attn_implementation("sdpa")


@pytest.mark.filterwarnings("ignore:flex_attention called without", "ignore:_compile flag on create_block_mask")
@pytest.mark.parametrize("cache", ["preallocated", "dynamic", "static"])
def test_cached_greedy_equals_teacher_forcing(model, attention, cache):
    with ForwardCalls(model) as calls:
        out = draw(model, do_sample=False, cache_implementation=cache)
    stepped = torch.cat(calls.logits, dim=1)
    mask = F.pad(MASK, (0, 1 + N), value=1)
    with torch.no_grad():
        forced = model(out.sequences, image_grid_shw=out.image_grid_shw, attention_mask=mask).logits
    forced = forced[:, PROMPTS.shape[1] : -1, TEXT:]
    assert stepped.shape == (3, N, CODES)
    assert (stepped - forced).abs().max() < 1e-4
    assert torch.equal(out.image_codes, forced.argmax(-1))
    assert stepped.std() > 0.1  # or the comparison says nothing


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize("negative", [[], [20, 21], [20, 21, 22, 23, 24, 25, 26, 27]])
def test_guidance_equals_two_branches_written_out(model, schedule, negative):
    out = draw(
        model,
        do_sample=False,
        guidance_scale=3.0,
        guidance_schedule=schedule,
        negative_prompt_ids=torch.tensor([negative]) if negative else None,
    )
    guidance_scales = [3.0] * 5 if schedule == "constant" else [1.0, 1.5, 2.0, 2.5, 3.0]
    for row in range(3):
        assert torch.equal(out.image_codes[row], slow_greedy(model, prompt_of(row), negative, guidance_scales))


def test_negative_prompts_may_differ_by_row_and_end_with_boi(model):
    negatives = torch.tensor([[20, 21, 22, BOI], [PAD, PAD, 23, BOI], [PAD, 24, 25, 26]])
    out = draw(model, do_sample=False, guidance_scale=3.0, negative_prompt_ids=negatives)
    for row, negative in enumerate(([20, 21, 22], [23], [24, 25, 26])):
        assert torch.equal(out.image_codes[row], slow_greedy(model, prompt_of(row), negative, [3.0] * 5))


def test_accumulated_features_are_fed_all_codes_so_far():
    model = build_model(visual_feature_mode="accumulated")
    out = draw(model, do_sample=False, guidance_scale=2.0)
    assert torch.equal(out.image_codes[1], slow_greedy(model, prompt_of(1), [], [2.0] * 5))


def test_a_prompt_may_hold_images_which_the_unconditional_branch_keeps(model):
    condition = ScaleSchedule((8, 32), 3)
    picture = [BOI, *(TEXT + torch.arange(condition.num_tokens)).tolist()]
    long, short = [5, *picture, 6, 7], [8, 9]
    ids = torch.tensor([long, [PAD] * (len(long) - 2) + short])
    out = draw(
        model,
        ids,
        (ids != PAD).long(),
        image_grid_shw=torch.tensor([condition.grid_shw]),
        guidance_scale=2.0,
        do_sample=False,
        num_return_sequences=1,
    )
    assert out.image_grid_shw.tolist() == [list(condition.grid_shw), list(SCHEDULE.grid_shw), list(SCHEDULE.grid_shw)]
    # Teacher forcing of both branches on the same codes.
    codes = out.image_codes + TEXT
    grids = torch.tensor([condition.grid_shw, SCHEDULE.grid_shw])
    branches = [torch.cat([torch.tensor([*prompt, BOI]), codes[0]])[None] for prompt in (long, picture)]
    with torch.no_grad():
        conditional, unconditional = (
            model(ids, image_grid_shw=grids).logits[0, -N - 1 : -1, TEXT:] for ids in branches
        )
    logits = unconditional + 2.0 * (conditional - unconditional)
    assert torch.equal(out.image_codes[0], logits.argmax(-1))
    assert torch.equal(out.image_codes[1], slow_greedy(model, short, [], [2.0] * 5))


def test_number_of_forward_calls_is_number_of_scales(model):
    for settings in ({}, {"guidance_scale": 3.0, "num_return_sequences": 2}):
        with ForwardCalls(model) as calls:
            draw(model, **settings)
        assert len(calls.arguments) == SCHEDULE.num_scales
        # The prompts are run once, whatever the number of images.
        assert len(calls.arguments[0]["input_ids"]) == (6 if settings else 3)
        assert len(calls.arguments[-1]["input_ids"]) == (12 if settings else 3)


def test_scale_steps_have_no_mask_when_nothing_is_padded(model):
    ids = PROMPTS[:1].repeat(2, 1)
    seen = []
    attend = F.scaled_dot_product_attention

    def spy(*args, **kwargs):
        seen.append((args[0].shape[2], kwargs.get("attn_mask"), kwargs.get("is_causal")))
        return attend(*args, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", spy), ForwardCalls(model) as calls:
        draw(model, ids, None)
    assert all(arguments["attention_mask"] is None for arguments in calls.arguments)
    steps = [call for call in seen if call[0] > 1 and call[0] != ids.shape[1] + 1]
    assert len(steps) == 2 * (SCHEDULE.num_scales - 1)
    assert all(mask is None and is_causal is False for _, mask, is_causal in steps)


def test_only_visual_rows_of_the_head_are_multiplied(model):
    with ForwardCalls(model) as calls:
        draw(model)
    assert {logits.shape[-1] for logits in calls.logits} == {CODES}
    assert calls.logits[0].shape[1] == 1


@pytest.mark.parametrize("make_cache", [DynamicCache, lambda: StaticCache(build_model().config, max_cache_len=128)])
def test_a_callers_own_cache_is_used(model, make_cache):
    cache = make_cache()
    out = draw(model, cache=cache, guidance_scale=2.0)
    assert out.cache is cache
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    assert torch.equal(out.image_codes, draw(model, guidance_scale=2.0).image_codes)


def test_bfloat16_runs(model):
    out = draw(build_model().bfloat16(), guidance_scale=2.0, image_top_p=0.9)
    assert out.image_codes.shape == (3, N)


# --- Image mode: results ---


def test_output_is_the_token_view(model):
    out = draw(model, num_return_sequences=2)
    assert isinstance(out, NextFlowGenerateOutput)
    assert out.sequences.shape == (6, PROMPTS.shape[1] + 1 + N)
    assert torch.equal(out.sequences[:, :5], PROMPTS.repeat_interleave(2, dim=0))
    assert (out.sequences[:, 5] == BOI).all()
    assert torch.equal(out.sequences[:, 6:], out.image_codes + TEXT)
    assert out.image_codes.min() >= 0
    assert out.image_codes.max() < CODES
    assert out.image_grid_shw.tolist() == [list(SCHEDULE.grid_shw)] * 6
    plain = model.generate(PROMPTS, attention_mask=MASK, generation_mode="image", generator=seeded(0))
    assert torch.equal(plain, draw(model).sequences)


def test_boi_is_appended_only_where_it_lacks(model):
    with_boi = F.pad(PROMPTS, (0, 1), value=BOI)
    out = draw(model, with_boi, F.pad(MASK, (0, 1), value=1))
    assert torch.equal(out.sequences, draw(model).sequences)
    mixed = torch.tensor([[5, 6, BOI], [7, 8, 9]])
    out = draw(model, mixed, None, do_sample=False)
    assert out.sequences[:, :4].tolist() == [[PAD, 5, 6, BOI], [7, 8, 9, BOI]]
    assert torch.equal(out.image_codes[0], slow_greedy(model, [5, 6], None, [1.0] * 5))


def test_no_prompt_at_all_draws_an_image(model):
    out = model.generate(generation_mode="image", do_sample=False)
    assert out.shape == (1, 1 + N)
    assert torch.equal(out[0, 1:] - TEXT, slow_greedy(model, [], None, [1.0] * 5))


def test_an_empty_text_is_an_empty_prompt(model):
    # Tokenizers make a float tensor of it, for want of ids.
    empty = {"input_ids": torch.empty(1, 0), "attention_mask": torch.empty(1, 0)}
    out = model.generate(**empty, generation_mode="image", do_sample=False)
    assert torch.equal(out, model.generate(generation_mode="image", do_sample=False))


@pytest.mark.parametrize("negative", [None, torch.tensor([[20]])])
def test_ids_stay_where_the_caller_put_them(model, negative):
    """With offloading the weights are elsewhere than where they run: the model's own device says nothing then."""
    elsewhere = mock.PropertyMock(return_value=torch.device("meta"))
    with mock.patch.object(NextFlowForCausalLM, "device", elsewhere):
        out = draw(model, guidance_scale=2.0, negative_prompt_ids=negative, generator=None)
    assert out.image_codes.shape == (3, N)


def test_size_and_number_of_scales(model):
    wide = ScaleSchedule((8, 32), 5)
    out = draw(model, height=wide.height, width=wide.width)
    assert out.image_grid_shw[0].tolist() == [5, 8, 32]
    assert draw(model, height=512, width=512, num_scales=3).image_grid_shw[0].tolist() == [3, 16, 16]
    assert draw(model, num_scales=2).image_codes.shape == (3, 5)
    assert draw(model, num_scales=1).image_codes.shape == (3, 1)


def test_lists_give_every_scale_its_own_settings(model):
    greedy = draw(model, do_sample=False).image_codes
    assert torch.equal(draw(model, image_top_k=[1] * 5).image_codes, greedy)
    half = draw(model, image_top_k=[1, 1, 1, 0, 0], image_temperature=[1, 1, 1, 9.0, 9.0]).image_codes
    assert torch.equal(half[:, :14], greedy[:, :14])
    assert not torch.equal(half, greedy)


def test_every_scale_is_reported(model):
    reports = []
    out = draw(model, on_scale_end=lambda step, schedule, codes: reports.append((step, schedule, codes)))
    assert [step for step, _, _ in reports] == list(range(5))
    for step, schedule, codes in reports:
        assert schedule == SCHEDULE
        assert torch.equal(codes, out.image_codes[:, : SCHEDULE.offsets[step + 1]])


def test_what_the_callback_raises_ends_generation(model):
    def interrupt(step, schedule, codes):
        raise KeyboardInterrupt

    with ForwardCalls(model) as calls, pytest.raises(KeyboardInterrupt):
        draw(model, on_scale_end=interrupt)
    assert len(calls.arguments) == 1


def test_a_streamer_is_only_told_the_end(model):
    streamer = mock.Mock()
    draw(model, streamer=streamer)
    assert streamer.mock_calls == [mock.call.end()]


def test_decode_image_tokens_cuts_out_the_image(model):
    wide = ScaleSchedule((8, 32), 4)
    out = draw(model, height=wide.height, width=wide.width)
    decoded = model.decode_image_tokens(out.sequences)
    assert torch.equal(decoded.image_codes, out.image_codes)
    assert torch.equal(decoded.image_grid_shw, out.image_grid_shw)
    draw(model)
    decoded = model.decode_image_tokens(out.sequences)  # also after another call
    assert torch.equal(decoded.image_codes, out.image_codes)
    plain = out.sequences.as_subclass(torch.Tensor)
    decoded = model.decode_image_tokens(plain, out.image_grid_shw)
    assert torch.equal(decoded.image_codes, out.image_codes)
    with pytest.raises(ValueError, match="must share one grid"):
        model.decode_image_tokens(plain, torch.tensor([[5, 16, 16], [5, 8, 32]]))
    with pytest.raises(ValueError, match=r"end with \[.*\] image codes, but an image with grid \(5, 8, 32\)"):
        model.decode_image_tokens(plain[:, :-1], torch.tensor([[5, 8, 32]]))
    with pytest.raises(ValueError, match="grid of the images is not known"):
        model.decode_image_tokens(plain)


def test_sequences_keep_their_grid_wherever_they_go(model):
    """64 x 48 and 48 x 64 pixels have as many codes, so a neighbour's grid would go unnoticed."""
    grids, drawn = {}, {}

    def run(height, width):
        drawn[height] = model.generate(
            PROMPTS, attention_mask=MASK, generation_mode="image", height=height, width=width
        )
        grids[height] = ScaleSchedule.from_size(height, width).grid_shw

    threads = [Thread(target=run, args=size) for size in [(48, 64), (64, 48)]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for height, sequences in drawn.items():
        moved = sequences.reshape(3, 1, -1).flatten(0, 1).to("cpu", copy=True)  # what pipelines do
        assert [tuple(row) for row in model.decode_image_tokens(moved).image_grid_shw.tolist()] == [grids[height]] * 3
        assert type(sequences.float()) is torch.Tensor and type(sequences == 0) is not torch.Tensor
    assert not any(isinstance(value, ScaleSchedule) for value in vars(model).values())


# --- Image mode: seeds ---


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.0, "image_top_k": 20, "image_top_p": 0.9}])
def test_same_seed_same_image_alone_and_in_a_batch(model, settings):
    batch = draw(model, generator=[seeded(seed) for seed in (7, 8, 9)], **settings).image_codes
    for row, seed in enumerate((7, 8, 9)):
        alone = draw(model, torch.tensor([prompt_of(row)]), None, generator=[seeded(seed)], **settings).image_codes
        assert torch.equal(alone[0], batch[row])
    assert len({tuple(codes.tolist()) for codes in batch}) == 3


def test_a_single_generator_draws_image_i_alike_in_every_batch(model):
    alone = draw(model, PROMPTS[:1], None).image_codes
    four = draw(model, PROMPTS[:1], None, num_return_sequences=4).image_codes
    assert torch.equal(four[:1], alone)
    assert len({tuple(codes.tolist()) for codes in four}) == 4
    six = draw(model, PROMPTS[:1], None, num_return_sequences=6).image_codes
    assert torch.equal(six[:4], four)


def test_without_a_generator_images_differ_and_global_random_state_is_untouched(model):
    state = torch.get_rng_state()
    first, second = (draw(model, generator=None).image_codes for _ in range(2))
    assert not torch.equal(first, second)
    draw(model, guidance_scale=2.0, image_top_k=5)
    assert torch.equal(torch.get_rng_state(), state)


# --- Text mode ---


def test_text_mode_equals_qwen2(model):
    config = model.config
    stock = Qwen2ForCausalLM(
        Qwen2Config(
            **{
                name: getattr(config, name)
                for name in (
                    "vocab_size",
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "num_key_value_heads",
                    "max_position_embeddings",
                    "rms_norm_eps",
                )
            },
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            pad_token_id=PAD,
        )
    ).eval()
    weights = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(part in name for part in ("visual_codebook", "connector", "scale_embedding"))
    }
    weights["model.embed_tokens.weight"] = F.pad(weights["model.embed_tokens.weight"], (0, 0, 0, CODES))
    stock.load_state_dict(weights)
    forbidden = [BOI, EOI, MARK, *range(TEXT, TEXT + CODES)]
    settings = {"attention_mask": MASK, "max_new_tokens": 12}
    expected = stock.generate(PROMPTS, suppress_tokens=forbidden, eos_token_id=None, **settings)
    assert torch.equal(model.generate(PROMPTS, **settings), expected)
    # Sampling draws the same ids from the same global state, too.
    torch.manual_seed(1)
    expected = stock.generate(PROMPTS, suppress_tokens=forbidden, eos_token_id=None, do_sample=True, **settings)
    torch.manual_seed(1)
    assert torch.equal(model.generate(PROMPTS, do_sample=True, **settings), expected)


def test_text_mode_never_says_what_marks_or_makes_an_image(model):
    bias = torch.zeros(TEXT + CODES)
    bias[[BOI, EOI, MARK, *range(TEXT, TEXT + CODES)]] = 100.0
    with mock.patch.object(model.lm_head, "bias", torch.nn.Parameter(bias)):
        ids = model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=8, do_sample=True)[:, 5:]
    assert (ids < TEXT).all()
    assert not torch.isin(ids, torch.tensor([BOI, EOI, MARK])).any()


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_text_after_images_in_the_prompt_equals_teacher_forcing(model, cache):
    first, second = ScaleSchedule((8, 32), 3), ScaleSchedule((16, 16), 2)
    codes = [(TEXT + torch.randint(CODES, (s.num_tokens,), generator=seeded(0))).tolist() for s in (first, second)]
    rows = [[5, BOI, *codes[0], 6, 7, BOI, *codes[1]], [8, BOI, *codes[1], 9]]
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = (ids != PAD).long()
    grids = torch.tensor([first.grid_shw, second.grid_shw, second.grid_shw])
    out = model.generate(
        ids,
        attention_mask=mask,
        image_grid_shw=grids,
        max_new_tokens=6,
        return_dict_in_generate=True,
        output_logits=True,
        num_beams=1,
        **({"cache_implementation": cache} if cache else {"use_cache": False}),
    )
    mask = F.pad(mask, (0, 6), value=1)
    with torch.no_grad():
        forced = model(out.sequences, image_grid_shw=grids, attention_mask=mask).logits[:, length - 1 : -1]
    assert (torch.stack(out.logits, dim=1) - forced).abs().max() < 1e-4


def test_several_texts_a_prompt_keep_its_images(model):
    schedule = ScaleSchedule((8, 32), 2)
    codes = [TEXT + torch.arange(schedule.num_tokens) + offset for offset in (0, 20, 40)]
    opened = [torch.cat([torch.tensor([BOI]), c]) for c in codes]
    texts = torch.arange(5, 5 + len(opened[0]))
    ids = torch.stack([torch.cat([opened[0], opened[1]]), torch.cat([opened[2], texts])])
    grids = torch.tensor([schedule.grid_shw] * 3)
    settings = {"max_new_tokens": 4, "num_beams": 2}
    both = model.generate(ids, image_grid_shw=grids, num_return_sequences=2, **settings)
    assert torch.equal(both[:2], model.generate(ids[:1], image_grid_shw=grids[:2], num_return_sequences=2, **settings))
    assert torch.equal(both[2:], model.generate(ids[1:], image_grid_shw=grids[2:], num_return_sequences=2, **settings))


@pytest.mark.parametrize("cache", ["preallocated", "dynamic", "static"])
@pytest.mark.parametrize("guidance_scale", [None, 2.0])
def test_text_goes_on_from_the_cache_of_an_image(model, guidance_scale, cache):
    own = DynamicCache() if cache == "dynamic" else StaticCache(model.config, max_cache_len=128)
    out = draw(model, guidance_scale=guidance_scale, cache=own, num_return_sequences=2)
    settings = {
        "attention_mask": F.pad(MASK.repeat_interleave(2, dim=0), (0, 1 + N), value=1),
        "image_grid_shw": out.image_grid_shw,
        "max_new_tokens": 5,
    }
    expected = model.generate(out.sequences, **settings)
    with ForwardCalls(model) as calls:
        text = model.generate(out.sequences, cache=out.cache, **settings)
    assert torch.equal(text, expected)
    assert {arguments["input_ids"].shape[1] for arguments in calls.arguments} == {1}  # nothing is run again


def test_going_on_from_a_cache_needs_whole_sequences(model):
    out = draw(model, PROMPTS[:1], None)
    with pytest.raises(ValueError, match="pass whole sequences"):
        model.generate(
            out.sequences[:, -1:],
            cache=out.cache,
            attention_mask=torch.ones_like(out.sequences),
            image_grid_shw=out.image_grid_shw,
        )


def test_a_cache_that_ends_inside_an_image_is_refused(model):
    out = draw(model, PROMPTS[:1], None)
    out.cache.crop(-3)
    with pytest.raises(ValueError, match="ends inside an image"):
        model.generate(out.sequences, cache=out.cache, image_grid_shw=out.image_grid_shw, max_new_tokens=2)


def test_a_longer_negative_prompt_leaves_no_cache_to_go_on_from(model):
    negative = torch.arange(20, 30)[None]
    assert draw(model, guidance_scale=2.0, negative_prompt_ids=negative).cache is None
    assert draw(model, guidance_scale=2.0, negative_prompt_ids=negative[:, :3]).cache is not None


# --- Stored settings ---


def test_settings_survive_saving_and_are_used(model, tmp_path):
    stored = {
        "guidance_scale": 2.0,
        "guidance_schedule": "linear",
        "image_top_k": [1, 2, 3, 4, 5],
        "image_top_p": 0.9,
        "image_temperature": 0.8,
        "num_scales": 5,
        "height": 80,
        "width": 80,
    }
    other = build_model()
    other.generation_config = GenerationConfig(pad_token_id=PAD, **stored)
    other.save_pretrained(tmp_path)
    loaded = NextFlowForCausalLM.from_pretrained(tmp_path)
    assert {name: getattr(loaded.generation_config, name) for name in stored} == stored
    expected = draw(model, **stored).image_codes
    assert torch.equal(draw(loaded).image_codes, expected)
    assert not torch.equal(draw(loaded, guidance_scale=1, image_top_k=0).image_codes, expected)
    # A configuration given to the call stands above the stored one, arguments above both.
    given = GenerationConfig(image_top_k=1, num_scales=3)
    assert torch.equal(
        draw(loaded, generation_config=given).image_codes,
        draw(loaded, image_top_k=1, num_scales=3).image_codes,
    )
    # Guidance is for images: text is generated as without it, by one forward call a token.
    with ForwardCalls(loaded) as calls:
        text = loaded.generate(PROMPTS, attention_mask=MASK, max_new_tokens=4)
    assert torch.equal(text, model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=4))
    assert len(calls.arguments) == 4
    given = GenerationConfig(max_new_tokens=4, guidance_scale=3.0)
    assert torch.equal(loaded.generate(PROMPTS, attention_mask=MASK, generation_config=given), text)
    assert given.guidance_scale == 3.0


def test_a_size_asked_for_does_not_meet_a_stored_number_of_scales():
    other = build_model()
    other.generation_config.num_scales = 5
    assert draw(other, height=32, width=32).image_grid_shw[0].tolist() == [2, 16, 16]
    other.generation_config.height, other.generation_config.width = 80, 160
    assert draw(other, num_scales=3).image_grid_shw[0].tolist() == [3, 11, 22]


def test_generation_mode_may_be_stored(model):
    other = build_model()
    other.generation_config.generation_mode = "image"
    assert torch.equal(other.generate(PROMPTS, attention_mask=MASK, generator=seeded(0)), draw(model).sequences)


def test_what_pipelines_add_is_ignored(model):
    expected = draw(model)
    out = draw(model, max_new_tokens=256, eos_token_id=EOS, pad_token_id=PAD)
    assert torch.equal(out.sequences, expected.sequences)


# --- Bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "can't be searched with beams"),
        ({"num_return_sequences": 0}, "`num_return_sequences` must be a whole number of at least 1"),
        ({"use_cache": False}, "does not take `use_cache=False`"),
        ({"height": 80}, "`height` and `width` together"),
        ({"height": 81, "width": 80}, r"No scale schedule ends at height 81 x width 80.*80 x 80"),
        ({"height": 256, "width": 256}, r"takes 12 scales, but this model has 5 .* up to 80 x 80"),
        ({"num_scales": 6}, "takes 6 scales, but this model has 5"),
        ({"num_scales": 0}, "`num_scales` must be a whole number of at least 1"),
        ({"prefix_scales": 2}, "`prefix_scales` and `images_per_prefix` together"),
        ({"prefix_scales": 5, "images_per_prefix": 1}, "`prefix_scales` must be between 1 and 4 .* 5 scales"),
        ({"prefix_scales": 2, "images_per_prefix": 2}, "must divide the 1 images of a prompt"),
        ({"generator": [torch.Generator()]}, "Got 1 generators for 3 images"),
        ({"image_top_k": [1, 2]}, "`image_top_k` has 2 entries, but the image has 5 scales"),
        ({"image_top_k": 65}, "whole number from 1 to 64"),
        ({"image_top_p": 1.5}, "above 0 and at most 1"),
        ({"image_temperature": 0.0}, "`image_temperature` must be positive"),
        ({"guidance_scale": -1}, "at least 0"),
        ({"guidance_schedule": "cosine"}, "one of 'constant', 'linear', but got 'cosine'"),
        ({"temperature": 0.5, "top_p": 0.9}, "does not take `temperature`, `top_p`. Use `image_temperature` for"),
        ({"image_topk": 5}, "does not take `image_topk`"),
        ({"logits_processor": [], "stopping_criteria": None}, "does not take `logits_processor`"),
        ({"cache_implementation": "hybrid"}, 'no cache_implementation "hybrid"'),
        ({"cache": StaticCache(NextFlowConfig(num_hidden_layers=1), max_cache_len=20)}, "take 60"),
        ({"input_ids": PROMPTS}, "as `inputs` or as `input_ids`, not both"),
        ({"guidance_scale": 2, "negative_prompt_ids": PROMPTS[:2]}, "Got 2 negative prompts for 3 prompts"),
        ({"guidance_scale": 2, "negative_prompt_ids": PROMPTS[0]}, r"must have shape \(batch, length\)"),
        ({"guidance_scale": 2, "negative_prompt_ids": torch.tensor([[TEXT]])}, "`negative_prompt_ids` must be text"),
        ({"generation_mode": "video"}, "one of 'text', 'image', 'interleaved', but got 'video'"),
        (
            {"generation_mode": "text", "height": 80, "image_top_k": 2},
            "Text mode does not take `height`, `image_top_k`",
        ),
    ],
)
def test_misuse_is_explained(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPTS, attention_mask=MASK, **{"generation_mode": "image", **settings})


@pytest.mark.parametrize("mode", ["image", "text"])
def test_bad_prompts_are_explained(model, mode):
    def generate(ids, **settings):
        model.generate(ids, generation_mode=mode, max_new_tokens=2, **settings)

    with pytest.raises(ValueError, match=r"padded on the right.*padding_side"):
        generate(PROMPTS.flip(-1), attention_mask=MASK.flip(-1))
    with pytest.raises(ValueError, match="padded on the right"):
        generate(PROMPTS.flip(-1))
    with pytest.raises(ValueError, match=r"The prompt has 30\d tokens.*context of 256"):
        generate(torch.full((1, 300), 7))
    with pytest.raises(ValueError, match=r"must have shape \(batch, length\), but got shape \(2,\)"):
        generate(torch.tensor([5, 6]))
    with pytest.raises(ValueError, match=r"must be integers, but got torch\.float32"):
        generate(torch.tensor([[5.0, 6.0]]))
    with pytest.raises(ValueError, match="hold image codes"):
        generate(torch.tensor([[5, BOI, TEXT, 6]]))
    with pytest.raises(ValueError, match="hold 1 images, but `image_grid_shw` has 2 rows"):
        generate(torch.tensor([[5, BOI, TEXT, 6]]), image_grid_shw=torch.tensor([[1, 16, 16], [1, 16, 16]]))


def test_image_mode_wants_an_empty_cache_and_a_mask_of_the_prompts_shape(model):
    with pytest.raises(ValueError, match="must be empty, but `cache` holds 60 tokens"):
        draw(model, cache=draw(model).cache)
    with pytest.raises(ValueError, match=r"mask has shape \(3, 4\), but the prompts have \(3, 5\)"):
        draw(model, mask=MASK[:, 1:])
    # A prompt that fits alone may not fit with its image.
    with pytest.raises(ValueError, match="55 slots of the context are free behind the prompt"):
        draw(model, torch.full((1, 201), 7), None)


def test_text_mode_takes_embeddings_and_prompts_in_chunks(model):
    settings = dict(attention_mask=MASK, max_new_tokens=4)
    expected = model.generate(PROMPTS, **settings)
    embeds = model.get_input_embeddings()(PROMPTS)
    assert torch.equal(model.generate(inputs_embeds=embeds, **settings), expected[:, -4:])
    for size in (1, 2, 4):
        assert torch.equal(model.generate(PROMPTS, prefill_chunk_size=size, **settings), expected)
    ids = torch.tensor([[5, BOI, *range(TEXT, TEXT + N), 6]])
    with pytest.raises(ValueError, match="run whole: leave `prefill_chunk_size` out"):
        model.generate(ids, image_grid_shw=torch.tensor([SCHEDULE.grid_shw]), prefill_chunk_size=4, max_new_tokens=2)


def test_a_callback_may_change_codes_and_guidance(model):
    """Both by name, each alone too; what is not named stays."""
    guided = dict(guidance_scale=4.0, do_sample=False)

    def changing(**answers):
        def on_scale_end(index, schedule, codes):
            found = {name: value(codes) for name, value in answers.items()}
            return found if index == 2 else None

        return draw(model, on_scale_end=on_scale_end, **guided).image_codes

    plain = draw(model, **guided).image_codes
    assert torch.equal(changing(), plain)
    assert torch.equal(changing(codes=lambda codes: codes.clone(), guidance_scale=lambda codes: 4.0), plain)
    off = changing(guidance_scale=lambda codes: 1.0)
    assert torch.equal(off[:, :14], plain[:, :14]) and not torch.equal(off, plain)
    zeros = changing(codes=lambda codes: torch.cat([codes[:, :5], 0 * codes[:, 5:]], dim=1))
    assert torch.equal(zeros[:, :5], plain[:, :5]) and (zeros[:, 5:14] == 0).all()
    both = changing(
        codes=lambda codes: torch.cat([codes[:, :5], 0 * codes[:, 5:]], dim=1), guidance_scale=lambda codes: 1.0
    )
    assert torch.equal(both[:, :14], zeros[:, :14]) and not torch.equal(both, zeros)


# --- Pipelines ---


def test_text_generation_pipeline(tiny_random_checkpoint):
    pipe = pipeline("text-generation", model=str(tiny_random_checkpoint))
    settings = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    first, second = pipe(["a red circle", "two"], batch_size=2, **settings)
    assert first == pipe("a red circle", **settings)
    assert second == pipe("two", **settings)


@pytest.mark.parametrize("guidance_scale", [None, 3.0])
@pytest.mark.parametrize("cache", ["preallocated", "dynamic", "static"])
def test_a_shared_prefix_is_drawn_once_and_goes_on_as_if_alone(model, guidance_scale, cache):
    settings = dict(guidance_scale=guidance_scale, cache_implementation=cache)
    generators = [seeded(seed) for seed in range(12)]
    with ForwardCalls(model) as calls:
        codes = draw(
            model,
            num_return_sequences=4,
            prefix_scales=3,
            images_per_prefix=2,
            generator=generators,
            **settings,
        ).image_codes
    branches = 1 if guidance_scale is None else 2
    assert [len(call["input_ids"]) for call in calls.arguments] == [3 * branches] + [6 * branches] * 2 + [
        12 * branches
    ] * 2
    shared = SCHEDULE.offsets[3]
    assert (codes[::2, :shared] == codes[1::2, :shared]).all()
    assert (codes[::2, shared:] != codes[1::2, shared:]).any(1).all()
    # The first image of a prefix is drawn by its own generator all the way: as without sharing.
    alone = draw(model, num_return_sequences=2, generator=[seeded(seed) for seed in range(0, 12, 2)], **settings)
    assert (codes[::2] == alone.image_codes).all()
