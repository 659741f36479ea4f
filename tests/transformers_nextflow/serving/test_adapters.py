"""LoRA adapters: loaded when they are asked for, put away when there are too many, and never in anybody else's way."""

import asyncio
import json

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model

from random_weights import sharpen
from transformers_nextflow import NextFlowForCausalLM
from transformers_nextflow.serving import ApiError, Engine, Job

NAMES = ("ink", "oil", "wax")


@pytest.fixture(scope="module")
def folder(tiny_random_checkpoint, tmp_path_factory):
    """A folder of adapters that change what is drawn."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
        adapted.save_pretrained(folder / name)
    pickled = folder / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (pickled / "adapter_model.bin").write_bytes(b"")
    return folder


@pytest.fixture
def model(tiny_random_checkpoint):
    """A model of its own: adapters change its layers."""
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint).eval()
    sharpen(model)
    return model


def test_each_request_has_its_adapter_and_the_model_stays_as_it_was(model, parts, settings, folder):
    engine = Engine(settings(adapters=str(folder), max_adapters=2), model, parts[1])

    def drawn(*adapters):
        async def draw(adapter):
            events = [event async for event in engine.run(Job(prompt="a", adapter=adapter))]
            return next(event.value for event in events if event.kind == "image").tobytes()

        async def together():
            return await asyncio.gather(*(draw(adapter) for adapter in adapters))

        return asyncio.run(together())

    bare, ink, oil, wax = drawn(None, *NAMES)
    assert len({bare, ink, oil, wax}) == 4
    assert list(engine.adapters.held) == ["oil", "wax"]  # the third put the first away
    assert drawn("ink", None, "wax") == [ink, bare, wax]
    assert list(engine.adapters.held) == ["ink", "wax"]
    for name in NAMES:
        base = NextFlowForCausalLM.from_pretrained(settings().folder).eval()
        sharpen(base)
        merged = PeftModel.from_pretrained(base, folder / name).merge_and_unload()
        assert drawn(name) == [drawn_by(Engine(settings(), merged, parts[1]))]


def drawn_by(engine):
    async def draw():
        return [event.value async for event in engine.run(Job(prompt="a")) if event.kind == "image"]

    return asyncio.run(draw())[0].tobytes()


@pytest.mark.parametrize("name, status", [("pickled", 400), ("none", 404), ("../ink", 404)])
def test_what_is_no_safe_adapter_is_refused(model, parts, settings, folder, name, status):
    engine = Engine(settings(adapters=str(folder)), model, parts[1])

    async def first():
        await anext(engine.run(Job(prompt="a", adapter=name)))

    with pytest.raises(ApiError, match="adapter") as error:
        asyncio.run(first())
    assert error.value.status == status and not engine.adapters.held


def test_clients_call_them_by_the_models_name(model, parts, settings, folder, talk):
    engine = Engine(settings(adapters=str(folder)), model, parts[1])

    async def ask(client, http):
        names = [model.id async for model in client.models.list()]
        answers = [await client.images.generate(prompt="a", model=name, extra_body={"seed": 0}) for name in names[:2]]
        return names, [answer.data[0].b64_json for answer in answers]

    names, pictures = talk(ask, own_engine=engine)
    assert names == ["tiny", "tiny:ink", "tiny:oil", "tiny:pickled", "tiny:wax"] and pictures[0] != pictures[1]
