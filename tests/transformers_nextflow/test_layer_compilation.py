"""Compiled scale steps: what is compiled, how often, and that nothing changes."""

from unittest import mock

import pytest
import torch
from transformers import CompileConfig, GenerationConfig

from random_weights import sharpen
from transformers_nextflow import NextFlowConfig, NextFlowForCausalLM, ScaleCache, ScaleSchedule, scale_cache
from transformers_nextflow.decoding_state import DecodingState

TEXT, CODES, BOI, PAD = 40, 32, 30, 33
SCHEDULE = ScaleSchedule(num_scales=10)  # more scales than torch compiles of one function by default
PROMPTS = torch.tensor([[5, 6, 7, 8, 9, BOI], [PAD, PAD, 10, 11, 12, BOI]])
MASK = (PROMPTS != PAD).long()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = NextFlowConfig(
        vocab_size=TEXT + CODES,
        text_vocab_size=TEXT,
        visual_codebook_size=CODES,
        visual_code_dim=12,
        num_scales=SCHEDULE.num_scales,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        boi_token_id=BOI,
        eoi_token_id=31,
        image_token_id=32,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=34,
    )
    model = NextFlowForCausalLM(config)
    sharpen(model)
    return model.eval()


@pytest.fixture
def graphs():
    """The settings of a compiler that runs graphs as they are, and the list of those that it got."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    return CompileConfig(fullgraph=True, backend=backend, mode=None), compiled


def draw(model, config=None, prompts=PROMPTS, mask=MASK, **settings) -> torch.Tensor:
    return model.generate(
        prompts,
        attention_mask=mask,
        generation_mode="image",
        image_top_k=4,
        generator=torch.Generator().manual_seed(0),
        **{"guidance_scale": 3.0, "compile_config": config, **settings},
    )


def step_logits(model, config, prompts, mask, num_scales) -> list[torch.Tensor]:
    """Visual logits of every scale after the first, on the same codes."""
    schedule = SCHEDULE.prefix(num_scales)
    codes = torch.randint(CODES, (len(prompts), schedule.num_tokens), generator=torch.Generator().manual_seed(0))
    cache = ScaleCache(model.config, prompts.shape[1] + schedule.num_tokens)
    cache.set_padding(mask)
    state, logits = DecodingState(model, len(prompts), cache, compile_config=config), []
    with torch.no_grad():
        state.run(prompts, None if mask.all() else mask)
        for step in range(1, schedule.num_scales):
            ids = codes[:, schedule.offsets[step - 1] : schedule.offsets[step]] + TEXT
            logits.append(state.run_scale(ids, schedule, step, lambda head, hidden_states: head(hidden_states)))
    return logits


def test_one_graph_a_scale_whatever_the_prompt_and_call(model, graphs):
    config, compiled = graphs
    expected = draw(model)
    assert torch.equal(draw(model, config), expected)
    # All layers share a scale's graph, and a scale's length is a fixed size in it: so there is one for each.
    assert len(compiled) == SCHEDULE.num_scales - 1
    assert torch.equal(draw(model, config), expected)
    longer = torch.cat([torch.full((2, 3), 4), PROMPTS.masked_fill(PROMPTS == PAD, 4)], dim=1)
    ones = torch.ones_like(longer)
    assert torch.equal(draw(model, config, longer, ones), draw(model, None, longer, ones))
    # Prompts without padding need no mask in small scales, so those are other graphs: these, and no more.
    number = len(compiled)
    assert number <= 2 * (SCHEDULE.num_scales - 1)
    for length in (3, 7):
        draw(model, config, longer[:, -length:], ones[:, -length:])
    again = CompileConfig(**config.to_dict())  # equal settings share what they compiled
    draw(model, again, cache_implementation="quantized")
    assert len(compiled) == number


def test_small_scales_are_compiled_in_one_piece_and_large_ones_in_groups(model, graphs):
    config, compiled = graphs
    with mock.patch.object(scale_cache, "_MIN_SLOTS", 64), mock.patch.object(scale_cache, "_MAX_SLOTS", 200):
        assert torch.equal(draw(model, config), draw(model))
        number = len(compiled)
        draw(model, config)
    assert number == len(compiled) <= 2 * (SCHEDULE.num_scales - 1)


@pytest.mark.parametrize("cache", ["preallocated", "quantized"])
def test_the_cache_that_is_returned_is_the_same(model, graphs, cache):
    settings = {"num_scales": 4, "return_dict_in_generate": True, "cache_implementation": cache}
    expected, output = draw(model, **settings), draw(model, graphs[0], **settings)
    assert torch.equal(output.sequences, expected.sequences)
    for ours, theirs in zip(output.cache.layers, expected.cache.layers, strict=True):
        assert ours.length == theirs.length
        for buffer, other in zip(ours._buffers, theirs._buffers, strict=True):
            torch.testing.assert_close(buffer[:, :, : ours.length], other[:, :, : ours.length])


@pytest.mark.filterwarnings("ignore:flex_attention called without", "ignore:_compile flag on create_block_mask")
def test_flex_attention_compiles_no_step_that_needs_a_mask(model, graphs):
    model.set_attn_implementation("flex_attention")
    try:
        # On CPU, torch 2.14 can't compile flex attention for varying lengths.
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(draw(model, graphs[0], num_scales=3), draw(model, num_scales=3))
        assert not graphs[1]
    finally:
        model.set_attn_implementation("sdpa")


def test_settings_may_be_stored_and_turned_off(model, graphs):
    config, compiled = graphs
    stored = GenerationConfig(compile_config=config)
    draw(model, generation_config=stored, disable_compile=True)
    assert not compiled
    draw(model, generation_config=stored, num_scales=3)
    assert len(compiled) == 2


def test_nothing_is_compiled_by_default(model):
    with mock.patch("torch.compile") as compile:
        draw(model)
    compile.assert_not_called()


@pytest.mark.parametrize("settings", [True, {"mode": "default"}])
def test_other_settings_are_refused(model, settings):
    with pytest.raises(ValueError, match=r"must be an instance of `CompileConfig`"):
        draw(model, settings)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_other_caches_are_refused(model, graphs, cache):
    with pytest.raises(ValueError, match="preallocated"):
        draw(model, graphs[0], cache_implementation=cache)


# The fewest scales of which two have the same graph but for their length: inductor takes seconds for each.
@pytest.mark.parametrize(
    ("backend", "num_scales"), [("aot_eager", 5), pytest.param("inductor", 3, marks=pytest.mark.slow)]
)
def test_logits_are_those_of_the_plain_path(model, backend, num_scales):
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    for mask in (MASK, torch.ones_like(MASK)):
        prompts = PROMPTS.masked_fill(mask == 1, 4) if mask.all() else PROMPTS
        with mock.patch("torch._dynamo.config.recompile_limit", 1):  # of no avail
            compiled = step_logits(model, config, prompts, mask, num_scales)
        for ours, plain in zip(compiled, step_logits(model, None, prompts, mask, num_scales), strict=True):
            torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
