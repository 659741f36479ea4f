"""Weight-only quantisation through transformers: models load, draw, and predict what they predicted."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transformers_nextflow import NextFlowForCausalLM, ScaleSchedule, tiny_checkpoint

PROMPT = torch.tensor([[5, 6, 7, 8, 8214]])
SCHEDULE = ScaleSchedule(num_scales=6)


def torchao_int8(**settings):
    pytest.importorskip("torchao", reason="torchao is in the extra [quantization]")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), **settings)


def torchao_int4(**settings):
    pytest.importorskip("torchao", reason="torchao is in the extra [quantization]")
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)), **settings)


def bitsandbytes_int8(**settings):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is in the extra [quantization]")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True, **settings)


def bitsandbytes_nf4(**settings):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is in the extra [quantization]")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **settings)


def load(config=None, dtype=torch.float32, path=None) -> NextFlowForCausalLM:
    settings = {} if config is None else {"quantization_config": config}
    return NextFlowForCausalLM.from_pretrained(path or tiny_checkpoint(), dtype=dtype, **settings).eval()


def draw(model) -> torch.Tensor:
    return model.generate(PROMPT, generation_mode="image", num_scales=6, guidance_scale=3.0, image_top_k=1)


@torch.no_grad()
def visual_logits(model, ids) -> torch.Tensor:
    grids = torch.tensor([SCHEDULE.grid_shw])
    return model(ids, image_grid_shw=grids, visual_logits=True).logits[:, PROMPT.shape[1] - 1 : -1].float()


def is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


@pytest.fixture(scope="module")
def original():
    model = load()
    ids = draw(model)
    return ids, visual_logits(model, ids)


# Least cosine of the logits to the original's in float32; bfloat16 alone costs 0.001.
METHODS = [(torchao_int8, 0.99), (torchao_int4, 0.9), (bitsandbytes_int8, 0.99), (bitsandbytes_nf4, 0.9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make_config", "cosine"), METHODS)
def test_it_loads_and_draws(original, make_config, cosine, dtype):
    model = load(make_config(), dtype)
    assert not any(is_plain(module) for module in model.model.layers.modules() if "Linear" in type(module).__name__)
    assert is_plain(model.model.connector[0]), "its rows of a code's width fit no group of weights"
    assert is_plain(model.lm_head), "it is cut to the visual rows"
    assert draw(model).shape == (1, PROMPT.shape[1] + SCHEDULE.num_tokens)
    ids, expected = original
    assert F.cosine_similarity(visual_logits(model, ids), expected, dim=-1).mean() > cosine


@pytest.mark.parametrize(
    "make_config",
    [
        pytest.param(lambda: torchao_int8(include_input_output_embeddings=True), id="torchao"),
        pytest.param(lambda: bitsandbytes_int8(llm_int8_skip_modules=[]), id="bitsandbytes"),
    ],
)
def test_the_head_may_be_quantised_too(original, make_config):
    model = load(make_config())
    assert not is_plain(model.lm_head)
    assert draw(model).shape == (1, PROMPT.shape[1] + SCHEDULE.num_tokens)
    ids, expected = original
    assert F.cosine_similarity(visual_logits(model, ids), expected, dim=-1).mean() > 0.995


@pytest.mark.parametrize("make_config", [torchao_int8, bitsandbytes_int8, bitsandbytes_nf4])
def test_it_can_be_saved(make_config, tmp_path):
    model = load(make_config())
    model.save_pretrained(tmp_path)
    again = load(path=tmp_path)
    assert again.config.quantization_config is not None
    assert torch.equal(draw(again), draw(model))


def test_text_is_written_too():
    model = load(torchao_int8())
    ids = model.generate(PROMPT[:, :-1], attention_mask=torch.ones_like(PROMPT[:, :-1]), max_new_tokens=3)
    assert ids.shape[1] <= PROMPT.shape[1] + 2


def test_embeddings_that_are_not_tied_cannot_be_untied():
    with pytest.raises(ValueError, match="aren't tied"):
        load(torchao_int8(include_input_output_embeddings=True, untie_embedding_weights=True))


def test_in_float16_the_connector_stays_in_float32(original):
    """Which is how quantizers know to leave it alone."""
    model = load(dtype=torch.float16)
    assert model.model.connector[0].weight.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float16
    assert draw(model).shape == (1, PROMPT.shape[1] + SCHEDULE.num_tokens)
    ids, expected = original
    assert F.cosine_similarity(visual_logits(model, ids), expected, dim=-1).mean() > 0.9999


def test_adapters_may_be_in_another_dtype():
    """On quantised weights TRL trains adapters, and the modules that are saved with them, in bfloat16."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["connector", "scale_embedding"])
    model = peft.get_peft_model(load(), settings)
    before = draw(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    assert draw(model).shape == before.shape
    assert visual_logits(model, before).isfinite().all()
