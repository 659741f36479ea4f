"""The language model: the shift, what sees what, cached steps, Qwen's logits, the loss, loading and bad input."""

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from slow_layout import may_see, walk
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM, StaticCache
from transformers.loss.loss_utils import ForCausalLMLoss

from transformers_nextflow.configuration_nextflow import NextFlowConfig
from transformers_nextflow.modeling_nextflow import NextFlowForCausalLM, NextFlowModel, scale_feature_maps
from transformers_nextflow.scale_schedule import ScaleSchedule
from transformers_nextflow.token_layout import (
    ScaleStep,
    TokenLayout,
    code_coordinates,
    scale_position_ids,
    scale_weights,
)

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
TEXT, CODES, CODE_DIM, BOI, EOI, MARK = 200, 64, 12, 197, 198, 199
SCHEDULE = ScaleSchedule((14, 18), 5)


def build(attn_implementation="sdpa", **config) -> NextFlowForCausalLM:
    torch.manual_seed(0)
    model = NextFlowForCausalLM(
        NextFlowConfig(
            **{
                "vocab_size": TEXT + CODES,
                "text_vocab_size": TEXT,
                "visual_codebook_size": CODES,
                "visual_code_dim": CODE_DIM,
                "num_scales": 8,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
                "scale_reweight_alpha": 0.6,
                "boi_token_id": BOI,
                "eoi_token_id": EOI,
                "image_token_id": MARK,
                "bos_token_id": None,
                "eos_token_id": None,
                "pad_token_id": 0,
                **config,
            }
        )
    )
    with torch.no_grad():  # far from uniform, so that a wrong mask or position shows
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.set_attn_implementation(attn_implementation)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(params=["sdpa", "eager", "flex_attention"])
def any_attention(request):
    # Compiling flex attention takes a minute on CPU; run as it is, it takes the same masks.
    with torch.compiler.set_stance("force_eager"):
        yield request.param


def random_codes(schedule: ScaleSchedule, seed: int = 0) -> list[int]:
    codes = torch.randint(CODES, (schedule.num_tokens,), generator=torch.Generator().manual_seed(seed))
    return (codes + TEXT).tolist()


def stack(rows: list[list[int]], side="left") -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    pads = [[0] * (length - len(row)) for row in rows]
    left = side == "left"
    ids = [pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)]
    mask = [pad + [1] * len(row) if left else [1] * len(row) + pad for row, pad in zip(rows, pads, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def grids(*schedules: ScaleSchedule) -> torch.Tensor:
    return torch.tensor([schedule.grid_shw for schedule in schedules])


IDS = torch.tensor([[5, 6, 7, 8, BOI, *random_codes(SCHEDULE), 9, 10, 11]])
FIRST = 5  # slot of the first code


# --- Input view ---


def test_only_coarser_scales_are_seen(model):
    """A code first shows where the next scale is predicted: never in its own scale, never before."""
    with torch.no_grad():
        logits = model(IDS, grids(SCHEDULE)).logits
        for s in range(SCHEDULE.num_scales):
            changed = IDS.clone()
            slot = FIRST + SCHEDULE.offsets[s]
            changed[0, slot] = TEXT + (changed[0, slot] - TEXT + 1) % CODES
            differs = (model(changed, grids(SCHEDULE)).logits - logits).abs().amax(-1)[0] > 1e-5
            if s == SCHEDULE.num_scales - 1:
                assert not differs.any()  # the last scale is never an input
            else:
                assert differs.nonzero()[0].item() == FIRST + SCHEDULE.offsets[s + 1] - 1


def test_stock_loss_is_a_cross_entropy_a_scale(model):
    """`labels=input_ids` under the stock shift scores every scale by the slots that predict it."""
    with torch.no_grad():
        logits = model(IDS, grids(SCHEDULE)).logits
    stock = ForCausalLMLoss(logits, IDS, model.config.vocab_size)
    by_hand = []
    for s in range(SCHEDULE.num_scales):
        start, stop = SCHEDULE.offsets[s : s + 2]
        predicting = range(FIRST + start - 1, FIRST + stop - 1)  # scale 0: the slot of <boi>
        by_hand += [F.cross_entropy(logits[0, i], IDS[0, i + 1], reduction="none") for i in predicting]
    text = [i for i in range(IDS.shape[1] - 1) if IDS[0, i + 1] < TEXT]
    by_hand += [F.cross_entropy(logits[0, i], IDS[0, i + 1], reduction="none") for i in text]
    torch.testing.assert_close(stock, torch.stack(by_hand).mean())


def test_a_prefix_of_scales_scores_as_in_the_whole(model):
    with torch.no_grad():
        logits = model(IDS, grids(SCHEDULE)).logits
        for m in range(1, SCHEDULE.num_scales):
            stop = FIRST + SCHEDULE.offsets[m]
            prefix = model(IDS[:, :stop], grids(SCHEDULE)).logits
            torch.testing.assert_close(prefix[:, :-1], logits[:, : stop - 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_do_not_depend_on_their_batch(any_attention, side):
    model = build(any_attention)
    tall = ScaleSchedule((27, 9), 4)
    rows = [
        [5, BOI, *random_codes(SCHEDULE, 1), 9],
        [7, 8, 9, 10],
        [BOI, *random_codes(tall, 2), 4, BOI, *random_codes(tall.prefix(2), 3)],
    ]
    row_grids = [[SCHEDULE], [], [tall, tall]]
    batch = stack(rows, side)
    with torch.no_grad():
        logits = model(**batch, image_grid_shw=grids(*(g for of_row in row_grids for g in of_row))).logits
        for b, (row, of_row) in enumerate(zip(rows, row_grids, strict=True)):
            alone = model(torch.tensor([row]), grids(*of_row) if of_row else None).logits[0]
            torch.testing.assert_close(logits[b, batch["attention_mask"][b].bool()], alone, atol=2e-5, rtol=1e-5)


def test_block_mask_is_the_brute_force_one():
    model = build("eager")
    with torch.no_grad():
        attentions = model(IDS, grids(SCHEDULE), output_attentions=True).attentions[0]
    seen = (attentions > 0).any(1)[0]
    assert torch.equal(seen, may_see(walk(IDS[0].tolist(), [SCHEDULE.grid_shw], TEXT, BOI, 64.0)))


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_the_slots_of_an_image_see_each_other_as_in_var(attn_implementation):
    """VAR's mask of 1, 2, 3 and 4 cells a side; what a slot sees is read off what its gradient reaches."""
    golden = load_file(GOLDEN / "var_sampling" / "mask_1234.safetensors")
    model, schedule = build(attn_implementation, num_hidden_layers=1), ScaleSchedule((16, 16), 4)
    ids = torch.tensor([[BOI, *random_codes(schedule, 1)]])
    values = []
    projection = model.model.layers[0].self_attn.v_proj
    projection.register_forward_hook(lambda module, args, output: values.append(output))
    outputs = model.model(ids, grids(schedule)).last_hidden_state[0, :-1]  # the last slot is <eoi>'s
    seen = [
        torch.autograd.grad(row.sum(), values[0], retain_graph=True)[0][0, :-1].abs().sum(-1) > 0 for row in outputs
    ]
    assert torch.equal(torch.stack(seen), golden["mask_visible"])


def test_accumulated_features_are_tokenflows():
    golden = load_file(GOLDEN / "tokenflow_t2i" / "features.safetensors")
    schedule = ScaleSchedule((16, 16), 4)
    maps = scale_feature_maps(golden["feat.codebook"][golden["feat.codes"]], schedule, range(1, 4), accumulated=True)
    torch.testing.assert_close(maps, golden["feat.teacher_forcing"], atol=1e-5, rtol=0)


def test_residual_features_are_the_resized_codes_of_the_scale_before():
    vectors = torch.randn(2, SCHEDULE.num_tokens, 3)
    maps = scale_feature_maps(vectors, SCHEDULE, range(1, 5))
    assert maps.shape == (2, SCHEDULE.num_tokens - 1, 3)
    for s in range(1, 5):
        before = vectors[:, SCHEDULE.offsets[s - 1] : SCHEDULE.offsets[s]]
        before = before.view(2, *SCHEDULE.grids[s - 1], 3).permute(0, 3, 1, 2)
        expected = F.interpolate(before, SCHEDULE.grids[s], mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
        torch.testing.assert_close(maps[:, SCHEDULE.offsets[s] - 1 : SCHEDULE.offsets[s + 1] - 1], expected)


# --- Cached steps ---


def run_in_steps(model, batch, schedule, cache, tail):
    """Prefill, one call a scale, then the text after the image; logits of all slots."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    first = ids.shape[1] - schedule.num_tokens - tail
    accumulated = model.config.visual_feature_mode == "accumulated"
    padded = not mask.all()
    boi_position = mask[:, :first].sum(-1) - 1
    step = {"cache": cache, "use_cache": True}
    outputs = [model(ids[:, :first], attention_mask=mask[:, :first] if padded else None, **step).logits]
    for s in range(1, schedule.num_scales):
        start, stop = schedule.offsets[0 if accumulated else s - 1], schedule.offsets[s]
        outputs.append(
            model(
                ids[:, first + start : first + stop],
                attention_mask=mask[:, : first + schedule.offsets[s + 1] - 1] if padded else None,
                position_ids=scale_position_ids(boi_position, schedule, s, model.config.rope_spatial_range),
                scale_step=ScaleStep(schedule, s),
                **step,
            ).logits
        )
    for i in range(tail + 1):
        slot = first + schedule.num_tokens - 1 + i
        position = (boi_position + schedule.num_scales + i).float().view(1, -1, 1).expand(3, -1, -1)
        token = ids[:, slot : slot + 1] if i else torch.full((len(ids), 1), EOI)
        cut = mask[:, : slot + 1] if padded else None
        outputs.append(model(token, attention_mask=cut, position_ids=position, **step).logits)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("mode", ["residual", "accumulated"])
def test_steps_with_a_cache_equal_teacher_forcing(any_attention, static, padded, mode):
    model = build(any_attention, visual_feature_mode=mode)
    rows = [[5, 6, 7, BOI, *random_codes(SCHEDULE, 1), 8, 9], [4, BOI, *random_codes(SCHEDULE, 2), 3, 2]]
    rows[1][:0] = [] if padded else [1, 2]
    batch = stack(rows)
    cache = StaticCache(model.config, max_cache_len=150) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(**batch, image_grid_shw=grids(SCHEDULE, SCHEDULE)).logits
        steps = run_in_steps(model, batch, SCHEDULE, cache, tail=2)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(steps[real], whole[real], atol=1e-4, rtol=0)


def record_sdpa(call):
    with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as sdpa:
        call()
    return [arguments.kwargs for arguments in sdpa.call_args_list]


def test_an_unpadded_scale_step_runs_without_a_mask(model):
    cache = DynamicCache(config=model.config)
    codes = IDS[:, FIRST : FIRST + 1]
    with torch.no_grad():
        model(IDS[:, :FIRST], cache=cache, use_cache=True)
        calls = record_sdpa(
            lambda: model(
                codes,
                position_ids=scale_position_ids(torch.tensor([4]), SCHEDULE, 1, 64.0),
                cache=cache,
                scale_step=ScaleStep(SCHEDULE, 1),
            )
        )
    assert len(calls) == model.config.num_hidden_layers
    assert all(call["attn_mask"] is None and call["is_causal"] is False for call in calls)
    assert not hasattr(model.config, "is_causal")  # which transformers would set for the call, for all threads


def test_a_padded_scale_step_has_one_row_of_mask_for_all_its_queries(model):
    """A mask as large as the attention would take most of a large step's time and memory."""
    batch = stack([[5, 6, 7, BOI], [4, BOI]])
    cache = DynamicCache(config=model.config)
    codes = torch.tensor(random_codes(SCHEDULE)[:5]).expand(2, -1)
    with torch.no_grad():
        model(**batch, cache=cache, use_cache=True)
        calls = record_sdpa(
            lambda: model(
                codes[:, 1:],
                attention_mask=F.pad(batch["attention_mask"], (0, 9), value=1),
                position_ids=scale_position_ids(torch.tensor([3, 1]), SCHEDULE, 2, 64.0),
                cache=cache,
                scale_step=ScaleStep(SCHEDULE, 2),
            )
        )
    assert [call["attn_mask"].shape for call in calls] == [(2, 1, 1, 13)] * model.config.num_hidden_layers


def test_text_runs_on_the_causal_kernel(model):
    calls = record_sdpa(lambda: model(IDS[:, :FIRST]))
    assert all(call["attn_mask"] is None and call["is_causal"] is True for call in calls)


def test_positions_made_after_a_padded_cache_go_on_from_its_text(model):
    rows = [[1, 2, 3, 4, BOI, *random_codes(SCHEDULE, 1)], [1, 2, BOI, *random_codes(SCHEDULE, 2)]]
    batch = stack(rows)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(**batch, image_grid_shw=grids(SCHEDULE, SCHEDULE)).logits
        ids, mask = batch["input_ids"], batch["attention_mask"]
        model(ids[:, :3], attention_mask=mask[:, :3], cache=cache, use_cache=True)
        rest = model(ids[:, 3:], grids(SCHEDULE, SCHEDULE), attention_mask=mask, cache=cache).logits
    torch.testing.assert_close(rest, whole[:, 3:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_text_and_images_can_follow_a_cache(any_attention, static):
    model = build(any_attention)
    ids = torch.tensor([[5, BOI, *random_codes(SCHEDULE, 1), 7, BOI, *random_codes(SCHEDULE, 2), 8, 9, 10]])
    both = grids(SCHEDULE, SCHEDULE)
    slots = walk(ids[0].tolist(), both.tolist(), TEXT, BOI, model.config.rope_spatial_range)
    positions = torch.tensor([slot.position for slot in slots]).T[:, None]
    second = 2 + SCHEDULE.num_tokens  # after the first image
    text = ids.shape[1] - 3
    cache = StaticCache(model.config, max_cache_len=150) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(ids, both).logits
        parts = [
            model(ids[:, start:stop], grid, position_ids=positions[..., start:stop], cache=cache).logits
            for start, stop, grid in ((0, second, both[:1]), (second, text, both[1:]), (text, None, None))
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=0)


def test_new_models_start_with_features_that_are_heard():
    """Codebook rows as long as a real code (two unit vectors), features about as wide as text embeddings."""
    model = NextFlowForCausalLM(build(visual_code_dim=40, hidden_size=256, num_attention_heads=16).config).model
    rows = model.visual_codebook.weight
    assert 1.3 < rows.norm(dim=-1).mean() < 1.5
    ratio = model.connector(rows).std() / model.embed_tokens.weight.std()
    assert 0.5 < ratio < 5
    assert not model.connector[0].bias.any()


# --- Qwen ---


SEVEN_B = dict(hidden_size=256, head_dim=128, num_attention_heads=2, num_key_value_heads=1)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    ("size", "section"), [({}, [2, 3, 3]), (SEVEN_B, [16, 24, 24])], ids=["small", "the 7B's heads"]
)
def test_text_is_qwens_to_the_bit(any_attention, size, section, interleaved):
    """At Qwen's theta, however the rotary pairs are shared."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    own = {"mrope_section": section, "mrope_interleaved": interleaved}
    model = build(any_attention, **size, rope_parameters={**rope, **own})
    shared = {name: value for name, value in model.config.to_dict().items() if name in Qwen2Config().to_dict()}
    shared |= {"model_type": "qwen2", "rope_parameters": rope, "vocab_size": TEXT}
    qwen = Qwen2ForCausalLM(Qwen2Config(**shared)).eval()
    weights = {name: value for name, value in model.state_dict().items() if name in qwen.state_dict()}
    weights["lm_head.weight"] = weights["lm_head.weight"][:TEXT]
    qwen.load_state_dict(weights, strict=True)
    qwen.set_attn_implementation(any_attention)
    ids = torch.randint(TEXT - 3, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.model(ids).last_hidden_state, qwen.model(ids).last_hidden_state)
        torch.testing.assert_close(model(ids).logits[..., :TEXT], qwen(ids).logits, atol=1e-5, rtol=0)


# --- Head and loss ---


def test_visual_logits_are_the_heads_visual_rows(model):
    with torch.no_grad():
        whole = model(IDS, grids(SCHEDULE)).logits
        torch.testing.assert_close(model(IDS, grids(SCHEDULE), visual_logits=True).logits, whole[..., TEXT:])
        handle = model.lm_head.register_forward_hook(lambda *_: None)  # now the head must be called
        torch.testing.assert_close(model(IDS, grids(SCHEDULE), visual_logits=True).logits, whole[..., TEXT:])
        handle.remove()
        last = model(IDS, grids(SCHEDULE), visual_logits=True, logits_to_keep=1).logits
        torch.testing.assert_close(last, whole[:, -1:, TEXT:])


def loss_batch():
    batch = stack([[5, 6, BOI, *random_codes(SCHEDULE, 1)], [4, BOI, *random_codes(SCHEDULE, 2), 7, 8, 9]])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[0, 20:30] = -100
    return batch | {"image_grid_shw": grids(SCHEDULE, SCHEDULE), "labels": labels}


@pytest.mark.parametrize("num_items", [None, 17, torch.tensor(17)])
def test_without_reweighting_the_loss_is_the_stock_one(num_items):
    model = build(scale_reweight_alpha=0.0)
    batch = loss_batch()
    output = model(**batch, num_items_in_batch=num_items)
    stock = ForCausalLMLoss(output.logits, batch["labels"], TEXT + CODES, num_items_in_batch=num_items)
    torch.testing.assert_close(output.loss, stock)


def test_reweighted_loss_is_the_hand_written_one(model):
    batch = loss_batch()
    output = model(**batch)
    raw = [1 / (h * w) ** 0.6 for h, w in SCHEDULE.grids for _ in range(h * w)]
    weight = [SCHEDULE.num_tokens * value / sum(raw) for value in raw]
    losses = []
    for b in range(2):
        first = batch["input_ids"][b].tolist().index(BOI) + 1
        for t in range(1, batch["labels"].shape[1]):
            label = batch["labels"][b, t]
            if label != -100:
                factor = weight[t - first] if label >= TEXT else 1.0
                losses.append(factor * F.cross_entropy(output.logits[b, t - 1], label))
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())


def test_training_holds_no_logits_unless_asked(model):
    model.train()
    try:
        assert model(**loss_batch()).logits is None
        assert model(**loss_batch(), skip_logits=False).logits.shape[-1] == TEXT + CODES
    finally:
        model.eval()
    assert model(**loss_batch()).logits is not None
    assert model(**loss_batch(), skip_logits=True).logits is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_weight_gets_the_naive_gradient(checkpointing):
    model = build().train()
    batch = loss_batch()
    naive = model(**batch, skip_logits=False)
    ids, grid, mask = (batch[name] for name in ("input_ids", "image_grid_shw", "attention_mask"))
    weights = TokenLayout.of(ids, grid, model.config, mask).loss_weights(0.6)[:, 1:]
    losses = F.cross_entropy(naive.logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    loss = (losses * weights).sum() / (batch["labels"][:, 1:] != -100).sum()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    if checkpointing:
        model.activation_checkpointing_enable()
    model(**batch).loss.backward()
    for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(
            parameter.grad, gradient, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.device("meta")])
def test_what_is_remembered_of_schedules_serves_training_too(context):
    """Tensors that a cache keeps from an inference-mode or meta context would break every later training step."""
    code_coordinates.cache_clear()
    scale_weights.cache_clear()
    with context():
        code_coordinates(SCHEDULE, torch.device("cpu"))
        scale_weights(SCHEDULE, range(5), 0.6)
    build().train()(**loss_batch()).loss.backward()


def test_labels_may_all_be_ignored(model):
    batch = loss_batch()
    batch["labels"].fill_(-100)
    assert model(**batch).loss.item() == 0


# --- Precision ---


def test_bfloat16_keeps_positions_and_loss_in_fp32(model):
    half = build().bfloat16()
    rotary = type(half.model.rotary_emb)
    with mock.patch.object(rotary, "forward", autospec=True, side_effect=rotary.forward) as forward:
        loss = half(**loss_batch()).loss
    assert forward.call_args.args[2].dtype == torch.float32
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(**loss_batch()).loss, atol=0.1, rtol=0)


def test_autocast(model):
    model.train()
    try:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**loss_batch()).loss
        loss.backward()
    finally:
        model.eval()
    torch.testing.assert_close(loss, model(**loss_batch()).loss, atol=0.1, rtol=0)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.zero_grad()


# --- Saving and loading ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, dtype):
    model = build().to(dtype)
    model.save_pretrained(tmp_path)
    again = NextFlowForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    for (name, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    fresh = NextFlowForCausalLM(model.config)
    assert torch.equal(again.model.rotary_emb.inv_freq, fresh.model.rotary_emb.inv_freq)  # a buffer, made anew
    with torch.no_grad():
        logits = again(IDS, grids(SCHEDULE)).logits
        if dtype == torch.float32:
            assert torch.equal(logits, model(IDS, grids(SCHEDULE)).logits)
        base = NextFlowModel.from_pretrained(tmp_path).eval()
        hidden = base(IDS, grids(SCHEDULE)).last_hidden_state
        torch.testing.assert_close(again.lm_head(hidden), logits)


def test_keys_are_qwens_and_four_more(model):
    new = {"visual_codebook", "connector", "scale_embedding"}
    inside = {name.split(".")[1] for name in model.state_dict() if name.startswith("model.")}
    assert inside == {"embed_tokens", "layers", "norm"} | new
    assert model.model.embed_tokens.weight.shape == (TEXT, 64)
    assert model.lm_head.weight.shape == (TEXT + CODES, 64)
    assert {name for name in model.state_dict() if not name.startswith("model.")} == {"lm_head.weight"}


@pytest.mark.parametrize("key", ["lm_head.weight", "model.visual_codebook.weight"])
def test_missing_visual_rows_are_refused(tmp_path, model, key):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    cut = weights | {key: weights[key][:-10].contiguous()}
    save_file(cut, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{key} has .* instead of"):
        NextFlowForCausalLM.from_pretrained(tmp_path)
    NextFlowForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)  # whoever wants it may
    del cut[key]
    save_file(cut, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"not a whole NextFlowForCausalLM checkpoint. Missing weights: {key}"):
        NextFlowForCausalLM.from_pretrained(tmp_path)


def test_pickles_are_refused(tmp_path, model):
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    os.remove(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="pickled weights"):
        NextFlowForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="safetensors only"):
        NextFlowForCausalLM.from_pretrained(tmp_path, use_safetensors=False)
    with pytest.raises(OSError):
        NextFlowForCausalLM.from_pretrained(tmp_path / "nowhere")


# --- Bad input ---


def code_step(model, ids, s=1, **arguments):
    positions = torch.zeros(3, len(ids), SCHEDULE.scale_lengths[s] if s < 5 else 1)
    return model(ids, **{"position_ids": positions, "scale_step": ScaleStep(SCHEDULE, s)} | arguments)


def shaped(**arguments):
    return lambda m: m(**{"input_ids": torch.ones(2, 3, dtype=torch.long)} | arguments)


BAD = {
    "image codes.*`image_grid_shw` is missing": lambda m: m(IDS),
    "must be between 0 and 263": lambda m: m(torch.tensor([[5, TEXT + CODES]])),
    "reach from -1": lambda m: m(torch.tensor([[5, -1]])),
    "exactly one of": lambda m: m(),
    "`image_grid_shw` needs `input_ids`": lambda m: m(None, grids(SCHEDULE), inputs_embeds=torch.zeros(1, 2, 64)),
    "has 8": lambda m: m(IDS, torch.tensor([[9, 16, 16]])),
    "hold 1 images": lambda m: m(IDS, grids(SCHEDULE, SCHEDULE)),
    "takes neither `image_grid_shw`": lambda m: code_step(m, IDS[:, FIRST : FIRST + 1], image_grid_shw=grids(SCHEDULE)),
    "index of a scale step must be between 1 and 4": lambda m: code_step(m, IDS[:, FIRST : FIRST + 1], 5),
    "takes the 1 codes of scales 0 to 0, but got 2": lambda m: code_step(m, IDS[:, FIRST : FIRST + 2]),
    "takes visual ids only": lambda m: code_step(m, torch.tensor([[5]])),
    "needs .* `position_ids`": lambda m: code_step(m, IDS[:, FIRST : FIRST + 1], position_ids=None),
    "of 4 slots .* must be one of": lambda m: code_step(m, torch.tensor([[TEXT]]), position_ids=torch.zeros(3, 1, 5)),
    "integers of shape .* torch.float32": shaped(input_ids=torch.ones(2, 3)),
    r"integers of shape .* \(3,\)": shaped(input_ids=torch.ones(3, dtype=torch.long)),
    r"`inputs_embeds` must have shape": shaped(input_ids=None, inputs_embeds=torch.zeros(2, 64)),
    r"`attention_mask` has shape \(2, 4\), but for 2 rows of 3": shaped(attention_mask=torch.ones(2, 4)),
    r"`attention_mask` has shape \(3,\)": shaped(attention_mask=torch.ones(3)),
    r"`position_ids` has shape \(2, 2, 3\)": shaped(position_ids=torch.ones(2, 2, 3)),
    r"`seq_idx` has shape \(1, 3\)": shaped(seq_idx=torch.ones(1, 3)),
    "`position_ids` must be finite": shaped(position_ids=torch.tensor([[0, 1, torch.nan]] * 2)),
    r"must have shape \(num_images, 3\)": shaped(image_grid_shw=torch.tensor([5, 14, 18])),
    "not one of the 41": lambda m: m(IDS, torch.tensor([[5, -14, 18]])),
    "`num_scales` must be between": lambda m: m(IDS, torch.tensor([[-5, 14, 18]])),
    "`labels` must have the shape": shaped(labels=torch.ones(2, 2, dtype=torch.long)),
    r"`labels` must be ids below .*float32": shaped(labels=torch.ones(2, 3)),
    r"`labels` must be ids below .*\[-5, ": shaped(labels=torch.full((2, 3), -5)),
    "`attention_mask` must be finite": shaped(attention_mask=torch.full((2, 3), torch.nan)),
    "scale steps have none": lambda m: code_step(m, IDS[:, FIRST : FIRST + 1], labels=IDS[:, FIRST : FIRST + 1]),
    "`num_items_in_batch` must be .* nan": shaped(labels=torch.ones(2, 3).long(), num_items_in_batch=torch.nan),
    "`num_items_in_batch` must be .* inf": shaped(
        labels=torch.ones(2, 3).long(), num_items_in_batch=torch.tensor(torch.inf)
    ),
    r"unknown arguments \['lables'\].*'labels'": shaped(lables=torch.ones(2, 3).long()),
    r"unknown arguments \['image_grid'\].*'image_grid_shw'": lambda m: m.model(IDS, image_grid=grids(SCHEDULE)),
    "300 tokens don't fit into the 200 text ids": lambda m: m.resize_token_embeddings(300),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(model, message):
    with pytest.raises(ValueError, match=message):
        BAD[message](model)


def test_flash_attention_is_refused_for_images(model):
    flash = mock.patch.object(model.config, "_attn_implementation_internal", "flash_attention_2")
    with flash, pytest.raises(ValueError, match='Use "sdpa" or "flex_attention"'):
        model(IDS, grids(SCHEDULE))


def test_sliding_windows_are_refused():
    with pytest.raises(ValueError, match="`use_sliding_window` must be False"):
        build(use_sliding_window=True)
