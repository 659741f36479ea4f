"""The plan of a recipe: parameters and FLOPs counted another way, the paper's own run, what is refused."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, Qwen2Config

from transformers_nextflow import (
    NextFlowConfig,
    NextFlowForCausalLM,
    NextFlowImageTokenizer,
    NextFlowImageTokenizerConfig,
    ScaleSchedule,
)
from transformers_nextflow.linear_cross_entropy import chunk_rows
from transformers_nextflow.trainer import (
    NextFlowGRPOConfig,
    NextFlowImageTokenizerTrainingConfig,
    NextFlowSFTConfig,
)
from transformers_nextflow.trainer.plan import (
    count_parameters,
    image_tokenizer_cost,
    main,
    read_image_tokenizer,
    read_recipe,
    sample_flops,
    stage_cost,
)
from transformers_nextflow.trainer.sft_trainer import train_new_weights_only

sys.path.insert(0, str(Path(__file__).parents[3]))
from conversion.qwen2_5 import expected_shapes, nextflow_config
from conversion.tokenflow import PAPER_SCHEDULES, tokenflow_config

ROOT = Path(__file__).parents[3]

SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "rope_parameters": {"rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
RECIPES = ROOT / "examples" / "recipes"


def test_flops_are_those_that_torch_counts(tiny_random_checkpoint):
    """With plain attention, whose products torch counts in full: every slot with every other."""
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint, attn_implementation="eager")
    length = 7
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(length)[None], use_cache=False)
    ours = sample_flops(model.config, count_parameters(model.config), [length])
    rotary = 2 * length * model.config.hidden_size // model.config.num_attention_heads // 2 * 3  # of positions
    assert counter.get_total_flops() == pytest.approx(ours, abs=rotary)


def test_memory_is_adams_of_a_real_model(tiny_random_checkpoint):
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.ndim]
    tensors = [*model.parameters(), *(p.grad for p in model.parameters()), *moments]
    held = sum(tensor.nbytes for tensor in tensors)
    budget = {"samples": {"text": 1}}
    one, two = (stage_cost(model.config, budget, gpus, row=0).memory for gpus in (1, 2))
    assert 2 * (one - two) == pytest.approx(held)


def test_the_papers_own_run():
    """Six trillion tokens; alignment holds little beside the weights; later stages cost as the schedule says."""
    config, budgets = read_recipe(RECIPES / "7b-paper")
    costs = {name: stage_cost(config, budget, gpus=8) for name, budget in budgets.items()}
    assert 5.5e12 < sum(cost.tokens for cost in costs.values()) < 6.5e12
    assert 7.6e9 < count_parameters(config)["all"] < 7.9e9
    assert stage_cost(config, budgets["alignment"]).memory < stage_cost(config, budgets["sft"]).memory
    per_token = [costs[f"pretraining_{size}"].flops / costs[f"pretraining_{size}"].tokens for size in (256, 512, 1024)]
    assert per_token == sorted(per_token)


@pytest.mark.parametrize("folder", ["0.5b-256px", "7b-paper"])
def test_what_stages_train_at_their_real_sizes(folder):
    """On the meta device, with the optimizer's own states: weights, gradients, moments."""
    config, budgets = read_recipe(RECIPES / folder)
    for trains, budget in {
        budget.get("trains", "all"): budget for budget in budgets.values() if "samples" in budget
    }.items():
        with torch.device("meta"):
            model = NextFlowForCausalLM(config)
        if trains == "alignment":
            train_new_weights_only(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.AdamW(trained, foreach=True)
        optimizer.step()
        moments = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.ndim]
        held = sum(tensor.nbytes for tensor in (*model.parameters(), *trained, *moments))
        held += sum(parameter.nbytes for parameter in model.parameters()) if trains == "grpo" else 0
        without_rows = stage_cost(config, budget, row=0).memory - 4 * chunk_rows(config.vocab_size) * config.vocab_size
        assert without_rows == pytest.approx(held, rel=1e-6), trains


@pytest.mark.parametrize("folder", ["0.5b-256px", "7b-paper"])
def test_flops_at_real_sizes_are_those_that_torch_counts(folder):
    config, _ = read_recipe(RECIPES / folder)
    config._attn_implementation = "eager"
    length = 64
    with torch.device("meta"):
        model = NextFlowForCausalLM(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        states = torch.zeros(1, length, config.hidden_size, device="meta")
        places = model.model.rotary_emb(states, torch.zeros(3, 1, length, dtype=torch.long, device="meta"))
        for layer in model.model.layers:
            states = layer(states, attention_mask=None, position_embeddings=places)
            states = states[0] if isinstance(states, tuple) else states
        model.lm_head(states)
    ours = sample_flops(config, count_parameters(config), [length])
    assert counter.get_total_flops() == pytest.approx(ours, rel=1e-3)


def test_a_stage_is_the_sum_of_its_kinds():
    config = NextFlowConfig(**SMALL)
    kinds = ({"text": 3}, {"editing": 2}, {"text": 3, "editing": 2})
    one, other, both = (stage_cost(config, {"samples": samples, "num_scales": 8}) for samples in kinds)
    assert both.tokens == one.tokens + other.tokens and both.flops == pytest.approx(one.flops + other.flops)
    assert other.tokens == 2 * (60 + 2 + 2 * ScaleSchedule(num_scales=8).num_tokens)
    assert both.hours(2, 1e12, 0.5) == pytest.approx(both.flops / 1e12 / 3600)


@pytest.mark.parametrize("folder", ["7b-paper", "0.5b-256px", "tiny"])
def test_settings_of_recipes_are_settings(folder, tmp_path):
    kinds = {"language": NextFlowSFTConfig, "image": NextFlowImageTokenizerTrainingConfig, "grpo": NextFlowGRPOConfig}
    kinds |= dict.fromkeys(("alignment", "pretraining", "continued", "sft"), NextFlowSFTConfig)
    own = ("image_sizes", "teacher", "discriminator_hidden_size", "widen", "deepen", "perceptual", "reward")
    for path in (RECIPES / folder).glob("*.yaml"):
        kind = kinds.get(path.stem.partition("_")[0])
        if kind is not None and not path.stem.endswith("_data"):
            settings = yaml.safe_load(path.read_text()) | {"output_dir": str(tmp_path), "use_cpu": True}
            kind(**{name: value for name, value in settings.items() if name not in own})


PAGES = (*RECIPES.glob("*/README.md"), ROOT / "docs" / "training.md")
COMMAND = re.compile(r"^python -m transformers_nextflow\.trainer\.plan (.+)$", re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_tables_of_pages_are_what_their_commands_print(page, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text(encoding="utf-8")
    assert COMMAND.findall(text)
    for command in COMMAND.finditer(text):
        main(command[1].split())
        table = capsys.readouterr().out.partition("\n\n")[2].strip()
        assert text[command.end() :].partition("| stage |")[2].startswith(table.removeprefix("| stage |"))


def test_grpo_draws_twice_learns_and_asks_its_reference():
    """And holds that reference. Its pictures are what it costs."""
    config = NextFlowConfig(**SMALL)
    budget = {"samples": {"text_to_image": 10}, "num_scales": 8}
    plain, drawn = (stage_cost(config, {**budget, "trains": trains}) for trains in ("all", "grpo"))
    assert drawn.flops == pytest.approx(plain.flops / 4 * 7) and drawn.tokens == plain.tokens
    assert drawn.memory - plain.memory == 4 * count_parameters(config)["all"]


def test_an_image_tokenizer_is_counted_by_torch():
    """On tensors without data as on real ones, with what autograd keeps."""
    encoder = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, patch_size=16
    )
    config = NextFlowImageTokenizerConfig(codebook_size=64, semantic_config=encoder, vision_feature_layer=None)
    config.update(
        {
            "semantic_decoder_grid_size": 4,
            "encoder_hidden_sizes": [32] * 5,
            "decoder_hidden_sizes": [32] * 5,
            "latent_channels": 32,
        }
    )
    model = NextFlowImageTokenizer(config)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = model(torch.zeros(1, 3, 64, 64))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    activations = sum(size for place, size in kept.items() if place not in own) / 2
    cost = image_tokenizer_cost(model.config, {"pictures": 7, "size": 64, "batch": 3})
    assert cost.flops == 3 * 7 * counter.get_total_flops() and cost.tokens == 7 * output.codes.shape[-1]
    assert cost.memory == pytest.approx(16 * model.num_parameters() + 3 * activations, rel=0.05)


def test_the_models_of_recipes_are_what_their_converters_make():
    """At their real sizes, on the meta device: parents as published, image tokenizers by their layout."""
    qwen = Qwen2Config(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24)
    qwen.update({"num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768})
    qwen.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    images = tokenflow_config("clipb_224", enhanced=True, **PAPER_SCHEDULES)
    made = nextflow_config(qwen, images, 12)
    planned, _ = read_recipe(RECIPES / "0.5b-256px")
    assert expected_shapes(made) == expected_shapes(planned)
    assert made.rope_parameters == planned.rope_parameters
    assert 0.65e9 < count_parameters(planned)["all"] < 0.67e9  # 494 M, the head untied, rows for codes, connector
    ours = read_image_tokenizer(RECIPES / "0.5b-256px")
    theirs = images.to_dict() | {"_name_or_path": ""}
    assert {name: value for name, value in ours.to_dict().items() if theirs.get(name) != value} == {}


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"pictures": 1, "size": 64, "samples": 1}, "pictures, size and batch, not samples"),
        ({"pictures": 1, "size": 64}, "SigLIP2, in the encoder .* looks at numbers"),
    ],
)
def test_bad_budgets_of_pictures(budget, message):
    encoder = None if len(budget) == 2 else CLIPVisionConfig()
    with pytest.raises(ValueError, match=message):
        image_tokenizer_cost(NextFlowImageTokenizerConfig(semantic_config=encoder), budget)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"samples": {"video": 1}}, "Samples are text, .*, not video"),
        ({"samples": {"text": 1}, "scales": 3}, "not scales"),
        ({"samples": {"text": 1}, "trains": "some"}, "`trains` is all, alignment, grpo, not some"),
        ({"samples": {"text": 1}, "trains": "grpo"}, "GRPO draws: its samples are text_to_image, not text"),
    ],
)
def test_bad_budgets(budget, message):
    config = NextFlowConfig(**SMALL)
    with pytest.raises(ValueError, match=message):
        stage_cost(config, budget)


def test_a_recipe_without_a_model_has_no_plan():
    with pytest.raises(ValueError, match="does not say what its `model` is"):
        read_recipe(RECIPES / "tiny")
