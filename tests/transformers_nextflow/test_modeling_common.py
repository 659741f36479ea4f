"""What transformers' common tests check of every causal language model, on two layers."""

import pytest
import torch
from test_modeling_nextflow import BOI, FIRST, IDS, SCHEDULE, TEXT, build, grids, loss_batch, random_codes
from transformers import DynamicCache, Trainer, TrainingArguments
from transformers.utils.generic import TransformersKwargs

from transformers_nextflow import token_layout
from transformers_nextflow.modeling_nextflow import NextFlowForCausalLM, NextFlowModel
from transformers_nextflow.token_layout import ScaleStep, TokenLayout, scale_position_ids

TEXT_IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [4, 3, 2, 1, 11, 12]])


@pytest.fixture(scope="module")
def model():
    return build()


@torch.no_grad()
@pytest.mark.parametrize("with_image", [False, True])
def test_outputs(model, with_image):
    """Hidden states and attentions of every layer; the same as a tuple; the same twice."""
    ids, grid = (IDS, grids(SCHEDULE)) if with_image else (TEXT_IDS, None)
    model.set_attn_implementation("eager")
    settings = {"labels": ids, "output_hidden_states": True, "output_attentions": True}
    outputs = model(ids, grid, **settings)
    again = model(ids, grid, **settings, return_dict=False)
    layers, shape = model.config.num_hidden_layers, (*ids.shape, model.config.hidden_size)
    assert [state.shape for state in outputs.hidden_states] == [shape] * (layers + 1)
    heads = model.config.num_attention_heads
    assert [weights.shape for weights in outputs.attentions] == [(len(ids), heads, ids.shape[1], ids.shape[1])] * layers
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(len(ids), heads, ids.shape[1]))
    assert isinstance(again, tuple) and torch.equal(again[0], outputs.loss) and torch.equal(again[1], outputs.logits)
    assert len(again) == len(outputs.to_tuple())
    base = model.model(ids, grid, use_cache=False, return_dict=False)
    assert torch.equal(base[0], outputs.hidden_states[-1]) and len(base) == 1
    model.set_attn_implementation("sdpa")


@torch.no_grad()
def test_embeddings_equal_ids(model):
    embeds = model.get_input_embeddings()(TEXT_IDS)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(TEXT_IDS).logits)


def test_gradients_reach_all_inputs_and_all_layers():
    model = build("eager").train()
    embeds = model.get_input_embeddings()(TEXT_IDS).detach().requires_grad_()
    outputs = model(inputs_embeds=embeds, output_hidden_states=True, output_attentions=True, use_cache=False)
    kept = [*outputs.hidden_states[1:], *outputs.attentions]
    for tensor in kept:
        tensor.retain_grad()
    outputs.logits[:, -1].sum().backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in [embeds, *kept])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(use_reentrant):
    losses, gradients = [], []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        loss = model(**loss_batch(), use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert torch.equal(*losses)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_saved_is_loaded_by_both_classes(tmp_path, model):
    model.save_pretrained(tmp_path)
    again, report = NextFlowForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(again(IDS, grids(SCHEDULE)).logits, model(IDS, grids(SCHEDULE)).logits)
    model.model.save_pretrained(tmp_path / "base")
    base = NextFlowModel.from_pretrained(tmp_path / "base")
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), model.model.parameters(), strict=True))


@pytest.mark.parametrize("size", [None, 150, TEXT, TEXT + 64])
def test_unused_ids_are_room_for_new_tokens(model, size):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.resize_token_embeddings(size) is model.get_input_embeddings()
    assert model.config.text_vocab_size == TEXT
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_embeddings_and_head_are_found_and_not_tied(model):
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    model.tie_weights()
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="must be False"):
        build(tie_word_embeddings=True)


@torch.no_grad()
def test_every_argument_that_transformers_passes_on_is_taken(model):
    """And none else: what would be dropped changes results in silence."""
    plain = model(TEXT_IDS).logits
    names = set(TransformersKwargs.__annotations__) - {"output_hidden_states", "output_attentions"}
    for forward in (model, model.model):
        values = dict.fromkeys(names) | {"use_cache": False, "return_dict": True}
        outputs = forward(TEXT_IDS, **values, output_hidden_states=True)
        assert outputs.hidden_states is not None
        for misspelt in ("attention_masks", "head_mask", "cache_position", "shift_labels", "scale_index"):
            with pytest.raises(ValueError, match=f"unknown arguments .*{misspelt}.* It takes .*'attention_mask'"):
                forward(TEXT_IDS, **{misspelt: None})
    cache = DynamicCache(config=model.config)
    with pytest.warns(FutureWarning, match="past_key_values"):
        logits = model(TEXT_IDS, past_key_values=cache).logits
    assert torch.equal(logits, plain) and cache.get_seq_length() == TEXT_IDS.shape[1]


# --- Training by stock transformers ---


def test_stock_trainer_evaluates(tmp_path):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            row = {"input_ids": IDS[0], "labels": IDS[0]}
            return {**row, "image_grid_shw": torch.tensor(SCHEDULE.grid_shw)}

    settings = TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, per_device_eval_batch_size=2, save_strategy="no"
    )
    trainer = Trainer(build(), settings, train_dataset=Rows(), eval_dataset=Rows())
    assert trainer.label_names == ["labels"]
    metrics = trainer.evaluate()
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(metrics["eval_loss"]), build()(IDS, grids(SCHEDULE), labels=IDS).loss)
    trainer.train()


def test_a_forward_lays_out_once(monkeypatch):
    calls = []
    find = token_layout.find_images
    monkeypatch.setattr(token_layout, "find_images", lambda *args: calls.append(args) or find(*args))
    for training in (True, False):
        build().train(training)(**loss_batch())
        assert len(calls) == 1
        calls.clear()


def test_a_loss_without_gradients_makes_none(monkeypatch):
    """Under `no_grad`, in evaluation: the same losses, no matrix product but the head's own."""
    model, products = build(), []
    expected = model(**loss_batch(), skip_logits=True)
    multiply = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: products.append(a.shape) or multiply(a, b))
    model(**loss_batch(), skip_logits=True)
    with_gradients, _ = len(products), products.clear()
    with torch.no_grad():
        outputs = model(**loss_batch(), skip_logits=True)
    assert len(products) < with_gradients and outputs.logits is None
    assert torch.equal(outputs.loss, expected.loss) and torch.equal(outputs.token_losses, expected.token_losses)


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)])
def test_nothing_to_learn_is_no_loss(model, num_items):
    batch = {**loss_batch(), "num_items_in_batch": num_items}
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert model(**batch).loss == 0


def test_a_share_of_a_token_divides_the_loss(model):
    """Trainers divide the number by that of the ranks which split one batch."""
    whole, share = (model(**loss_batch(), num_items_in_batch=number).loss for number in (1, torch.tensor(0.5)))
    torch.testing.assert_close(share, 2 * whole)


# --- A cache that holds an image ---


@torch.no_grad()
def test_after_an_image_the_number_of_slots_is_not_the_position(model):
    ids = torch.tensor([[5, BOI, *random_codes(SCHEDULE), 9, 10, 11]])
    cut = ids.shape[1] - 2
    positions = TokenLayout.of(ids, grids(SCHEDULE), model.config).position_ids
    expected = model(ids, grids(SCHEDULE)).logits[:, cut:]
    cache = DynamicCache(config=model.config)
    model(ids[:, :cut], grids(SCHEDULE), cache=cache)
    for mask in (None, torch.ones_like(ids)):
        with pytest.raises(ValueError, match=r"cache holds an image.*pass `position_ids`"):
            model(ids[:, cut:], attention_mask=mask, cache=cache)
    logits = model(ids[:, cut:], position_ids=positions[..., cut:], cache=cache).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    cache.crop(-cache.get_seq_length())
    model(TEXT_IDS[:1, :3], cache=cache)  # no image is left
    after = model(TEXT_IDS[:1, 3:], cache=cache).logits
    torch.testing.assert_close(after, model(TEXT_IDS[:1]).logits[:, 3:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_so_it_is_after_scale_steps(model):
    cache = DynamicCache(config=model.config)
    model(IDS[:, :FIRST], cache=cache)
    positions = scale_position_ids(torch.tensor([FIRST - 1]), SCHEDULE, 1, 64.0)
    model(IDS[:, FIRST : FIRST + 1], position_ids=positions, scale_step=ScaleStep(SCHEDULE, 1), cache=cache)
    with pytest.raises(ValueError, match="cache holds an image"):
        model(IDS[:, -1:], cache=cache)


# --- Compiled and exported ---


class Step(torch.nn.Module):
    """A scale step from keys and values, as `torch.export` wants it."""

    def __init__(self, model, index: int):
        super().__init__()
        self.model, self.step = model, ScaleStep(SCHEDULE, index)

    def forward(self, ids, position_ids, *past):
        cache = DynamicCache(config=self.model.config)
        for layer in range(len(past) // 2):
            cache.update(*past[2 * layer : 2 * layer + 2], layer)
        return self.model(ids, position_ids=position_ids, scale_step=self.step, cache=cache).logits


def step_inputs(model, index: int):
    cache = DynamicCache(config=model.config)
    model(IDS[:, :FIRST], cache=cache)
    ids = IDS[:, FIRST + SCHEDULE.offsets[index - 1] : FIRST + SCHEDULE.offsets[index]]
    positions = scale_position_ids(torch.tensor([FIRST - 1]), SCHEDULE, index, 64.0)
    return ids, positions, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


@pytest.mark.slow
@torch.no_grad()
def test_a_scale_step_is_exported(model):
    inputs = step_inputs(model, 2)
    step = Step(model, 2)
    exported = torch.export.export(step, inputs).module()
    torch.testing.assert_close(exported(*inputs), step(*inputs))


@pytest.mark.slow
@torch.no_grad()
def test_steps_and_text_are_one_graph(model):
    """No break from our tables of schedules, and no search in them inside the trace."""
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(TEXT_IDS, use_cache=False).logits, model(TEXT_IDS).logits)
    for index in (1, 2):
        inputs = step_inputs(model, index)
        expected = Step(model, index)(*inputs)
        step = torch.compile(Step(model, index), fullgraph=True, backend="eager")
        torch.testing.assert_close(step(*inputs), expected)
    torch._dynamo.reset()


# --- Interleaved 3D RoPE ---


def rotary(section, **rope):
    config = build(
        hidden_size=128,
        num_attention_heads=1,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": section, **rope},
    ).config
    return NextFlowModel(config).rotary_emb


@pytest.mark.parametrize("section", [[24, 20, 20], [16, 24, 24]])
def test_rotary_pairs_take_the_axes_in_turn(section):
    """As Qwen3-VL's; text to the bit as Qwen2's, at its theta and size of a head."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2RotaryEmbedding
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextConfig, Qwen3VLTextRotaryEmbedding

    ours, hidden = rotary(section), torch.zeros(1, 1)
    positions = 100 * torch.rand(3, 2, 7)
    theirs = Qwen3VLTextRotaryEmbedding(
        Qwen3VLTextConfig(head_dim=128, rope_parameters={**ours.config.rope_parameters, "rope_type": "default"})
    )
    for a, b in zip(ours(hidden, positions), theirs(hidden, positions), strict=True):
        torch.testing.assert_close(a, b)
    text = torch.arange(3000)[None]
    qwen = Qwen2RotaryEmbedding(
        Qwen2Config(hidden_size=128, num_attention_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    )
    for interleaved in (True, False):
        emb = rotary(section, mrope_interleaved=interleaved)
        for a, b in zip(emb(hidden, text.float().expand(3, -1, -1)), qwen(hidden, text), strict=True):
            assert torch.equal(a, b)


def test_columns_turn_as_far_as_rows():
    """In chunks a whole picture turns columns by 0.01 rad at Qwen's theta: the model can't tell them."""
    turns = {}
    for interleaved in (True, False):
        emb = rotary([16, 24, 24], mrope_interleaved=interleaved)
        for axis in (1, 2):
            moved = torch.zeros(3, 1, 2)
            moved[axis, 0, 1] = 64.0
            cos, sin = emb(torch.zeros(1, 1), moved)
            turns[interleaved, axis] = (cos[0, 1] - cos[0, 0]).square().add((sin[0, 1] - sin[0, 0]).square()).max()
    assert turns[True, 2] > 1 and turns[True, 1] > 1 and turns[False, 2] < 0.001


def test_files_without_the_key_keep_their_chunks(tmp_path, model):
    import json

    assert model.config.rope_parameters["mrope_interleaved"] is True
    model.config.save_pretrained(tmp_path)
    assert type(model.config).from_pretrained(tmp_path).rope_parameters["mrope_interleaved"] is True
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["rope_parameters"]["mrope_interleaved"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    old = type(model.config).from_pretrained(tmp_path)
    assert old.rope_parameters["mrope_interleaved"] is False
    old.save_pretrained(tmp_path)
    assert type(old).from_pretrained(tmp_path).rope_parameters["mrope_interleaved"] is False


# --- Split over devices ---


@torch.no_grad()
def test_a_scale_step_runs_on_two_devices():
    """Pretended ones: fake tensors refuse what mixes devices. The sampler is called where the head is."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, places = build(), []
    second = ("model.scale_embedding", "model.layers.1", "model.norm", "lm_head")
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, module in model.named_modules():
            device = "cuda:1" if name.startswith(second) else "cuda:0"
            for tensors in (module._parameters, module._buffers):
                for key, value in tensors.items():
                    tensors[key] = torch.empty_like(value, device=device) if value is not None else None
            add_hook_to_module(module, AlignDevicesHook(device, io_same_device=name == "", skip_keys=["cache"]))
        cache = DynamicCache(config=model.config)
        model.model(inputs_embeds=torch.zeros(2, 3, 64, device="cuda:0"), cache=cache)
        ids = torch.ones(2, SCHEDULE.scale_lengths[1], dtype=torch.long, device="cuda:0")
        positions = torch.zeros(3, 2, SCHEDULE.scale_lengths[2], device="cuda:0")

        def sample(head, hidden_states):
            places.append(hidden_states.device)
            return head(hidden_states).argmax(-1)

        outputs = model(
            ids, position_ids=positions, scale_step=ScaleStep(SCHEDULE, 2, code_sampler=sample), cache=cache
        )
    assert places == [torch.device("cuda:1")]
    assert outputs.image_codes.device == ids.device and outputs.image_codes.shape == (2, 9)
