"""Adapters in the pipeline: PEFT's own result, weights, swapping, fusing, how they are prompted, what is refused."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from diffusers_nextflow import NextFlowPipeline


@pytest.fixture(scope="module")
def adapters(tiny_random_checkpoint, tmp_path_factory):
    """Two adapters with weights that change what is drawn; the second was trained on chat turns."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        base = NextFlowPipeline.from_pretrained(tiny_random_checkpoint).model
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"], r=4, lora_alpha=8))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.5)
        model.save_pretrained(folder / name)
        if name == "two":
            base.generation_config.prompt_styles = {"image": "chat"}
            base.generation_config.save_pretrained(folder / name)
    return folder


@pytest.fixture
def pipe(tiny_random_checkpoint) -> NextFlowPipeline:
    pipe = NextFlowPipeline.from_pretrained(tiny_random_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: NextFlowPipeline) -> torch.Tensor:
    """Logits of three ids: pictures of random models hardly change."""
    with torch.no_grad():
        return pipe.model(torch.tensor([[97, 98, 99]]), use_cache=False).logits


def test_an_adapter_is_pefts_and_leaves_nothing_behind(pipe, adapters):
    plain = draw(pipe)
    wrapped = copy.copy(pipe)
    wrapped.model = PeftModel.from_pretrained(copy.deepcopy(pipe.model), str(adapters / "one"))
    pipe.load_lora_weights(adapters / "one")
    assert pipe.get_list_adapters() == pipe.get_active_adapters() == ["default"]
    adapted = draw(pipe)
    assert torch.equal(adapted, draw(wrapped)) and not torch.equal(adapted, plain)
    assert len(pipe("a ring", generator=torch.Generator().manual_seed(0)).images) == 1
    pipe.set_adapters("default", 0.0)
    assert torch.equal(draw(pipe), plain)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain) and pipe.get_list_adapters() == []


def test_adapters_are_swapped_and_added(pipe, adapters):
    pipe.load_lora_weights(adapters / "one", "one")
    one = draw(pipe)
    pipe.load_lora_weights(adapters / "two", "two")
    two = draw(pipe)
    assert not torch.equal(one, two) and pipe.get_active_adapters() == ["two"]
    pipe.set_adapters("one")
    assert torch.equal(draw(pipe), one)
    pipe.set_adapters(["one", "two"], [1.0, 0.0])
    assert torch.equal(draw(pipe), one)
    pipe.set_adapters(["one", "two"], [0.5, 0.5])
    assert not torch.equal(draw(pipe), one) and not torch.equal(draw(pipe), two)
    pipe.delete_adapters("one")
    assert pipe.get_list_adapters() == pipe.get_active_adapters() == ["two"] and torch.equal(draw(pipe), two)


def test_what_is_fused_stays_and_can_be_saved(pipe, adapters, tmp_path):
    plain = copy.deepcopy(pipe.model.state_dict())
    pipe.load_lora_weights(adapters / "one")
    adapted = draw(pipe)
    pipe.fuse_lora()
    torch.testing.assert_close(draw(pipe), adapted)
    pipe.unfuse_lora()
    weights = {name.replace("base_layer.", ""): w for name, w in pipe.model.get_base_model().state_dict().items()}
    for name, weight in plain.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=1e-4)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    again = NextFlowPipeline.from_pretrained(tmp_path / "fused")
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(again), draw(pipe))


def test_an_adapter_is_prompted_as_it_was_trained(pipe, adapters):
    before = pipe.model.generation_config.prompt_styles
    pipe.load_lora_weights(adapters / "one", "one")
    assert pipe.model.generation_config.prompt_styles == before
    pipe.load_lora_weights(adapters / "two", "two")
    assert pipe.model.generation_config.prompt_styles["image"] == "chat"
    pipe.set_adapters("one")
    assert pipe.model.generation_config.prompt_styles == before
    pipe.unload_lora_weights()
    assert pipe.model.generation_config.prompt_styles == before


def test_bad_input(pipe, adapters, tmp_path):
    with pytest.raises(ValueError, match="No adapter is loaded"):
        pipe.fuse_lora()
    with pytest.raises(ValueError, match="it is no adapter that PEFT saved"):
        pipe.load_lora_weights(tmp_path)
    get_peft_model(
        copy.deepcopy(pipe.model), IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    ).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match="but LoRA was expected"):
        pipe.load_lora_weights(tmp_path / "ia3")
    pipe.load_lora_weights(adapters / "one", "one")
    with pytest.raises(ValueError, match='An adapter is called "one" already'):
        pipe.load_lora_weights(adapters / "two", "one")
    with pytest.raises(ValueError, match="Loaded adapters are one, but got three"):
        pipe.set_adapters("three")
    with pytest.raises(ValueError, match="Got 1 adapters but 2 weights"):
        pipe.set_adapters("one", [1.0, 2.0])
