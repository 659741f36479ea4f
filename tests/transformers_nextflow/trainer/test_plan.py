"""The plan of a recipe: parameters and FLOPs counted another way, the paper's own run, what is refused."""

from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from transformers_nextflow import NextFlowConfig, NextFlowForCausalLM, ScaleSchedule
from transformers_nextflow.trainer import NextFlowImageTokenizerTrainingConfig, NextFlowSFTConfig
from transformers_nextflow.trainer.plan import count_parameters, main, read_recipe, sample_flops, stage_cost

SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "rope_parameters": {"rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
RECIPES = Path(__file__).parents[3] / "examples" / "recipes"


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
    assert costs["alignment"].memory < costs["sft"].memory
    per_token = [costs[f"pretraining_{size}"].flops / costs[f"pretraining_{size}"].tokens for size in (256, 512, 1024)]
    assert per_token == sorted(per_token)


def test_a_stage_is_the_sum_of_its_kinds():
    config = NextFlowConfig(**SMALL)
    kinds = ({"text": 3}, {"editing": 2}, {"text": 3, "editing": 2})
    one, other, both = (stage_cost(config, {"samples": samples, "num_scales": 8}) for samples in kinds)
    assert both.tokens == one.tokens + other.tokens and both.flops == pytest.approx(one.flops + other.flops)
    assert other.tokens == 2 * (60 + 2 + 2 * ScaleSchedule(num_scales=8).num_tokens)
    assert both.hours(2, 1e12, 0.5) == pytest.approx(both.flops / 1e12 / 3600)


@pytest.mark.parametrize("folder", ["7b-paper", "tiny"])
def test_settings_of_recipes_are_settings(folder, tmp_path):
    for path in (RECIPES / folder).glob("*.yaml"):
        settings = yaml.safe_load(path.read_text())
        if not path.stem.startswith(("language", "image_tokenizer")):
            continue
        own = ("image_sizes", "teacher", "discriminator_hidden_size", "widen", "deepen", "perceptual")
        kind = NextFlowSFTConfig if path.stem.startswith("language") else NextFlowImageTokenizerTrainingConfig
        settings |= {"output_dir": str(tmp_path), "use_cpu": True}
        kind(**{name: value for name, value in settings.items() if name not in own})


def test_the_table(capsys):
    main(["--recipe", str(RECIPES / "7b-paper"), "--gpus", "256"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("7.7") and sum(line.startswith("| pretraining_") for line in lines) == 3


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"samples": {"video": 1}}, "Samples are text, .*, not video"),
        ({"samples": {"text": 1}, "scales": 3}, "not scales"),
        ({"samples": {"text": 1}, "trains": "some"}, "`trains` is all or alignment, not some"),
    ],
)
def test_bad_budgets(budget, message):
    config = NextFlowConfig(**SMALL)
    with pytest.raises(ValueError, match=message):
        stage_cost(config, budget)


def test_a_recipe_without_a_model_has_no_plan():
    with pytest.raises(ValueError, match="does not say what its `model` is"):
        read_recipe(RECIPES / "tiny")
