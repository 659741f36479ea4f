"""The nodes for ComfyUI, against a stub of its API: their schemas, and the workflow beside them, node by node."""

import asyncio
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples" / "comfyui"


class Kind:
    """One of ComfyUI's types, with what its inputs and outputs are declared with."""

    def __init__(self, name, *allowed):
        self.name, self.allowed = name, {"tooltip", *allowed}

    def Input(self, id, **options):
        assert set(options) <= self.allowed, f"{self.name} takes no {set(options) - self.allowed}"
        return SimpleNamespace(id=id, kind=self.name, **options)

    def Output(self, name):
        return SimpleNamespace(id=name, kind=self.name)


def stub_of_comfyui(progress):
    """`comfy_api.latest` with what the nodes use of it."""
    limits = ("default", "min", "max")
    io = SimpleNamespace(
        ComfyNode=type("ComfyNode", (), {}),
        Schema=SimpleNamespace,
        NodeOutput=lambda *values: values,
        Custom=Kind,
        String=Kind("STRING", "default", "multiline"),
        Int=Kind("INT", *limits, "control_after_generate"),
        Float=Kind("FLOAT", *limits, "step"),
        Combo=Kind("COMBO", "options", "default"),
        Image=Kind("IMAGE"),
    )

    def set_progress(value, max_value, node_id=None, preview_image=None):
        progress.append((value, max_value, preview_image))

    latest = ModuleType("comfy_api.latest")
    latest.io = io
    latest.ComfyExtension = type("ComfyExtension", (), {})
    latest.ComfyAPISync = lambda: SimpleNamespace(execution=SimpleNamespace(set_progress=set_progress))
    return latest


@pytest.fixture
def comfy(monkeypatch):
    """The node classes by their ids, and the list of what is told of their progress."""
    progress = []
    monkeypatch.setitem(sys.modules, "comfy_api", ModuleType("comfy_api"))
    monkeypatch.setitem(sys.modules, "comfy_api.latest", stub_of_comfyui(progress))
    # As ComfyUI loads a pack: the folder as a package of any name.
    spec = importlib.util.spec_from_file_location(
        "a_pack", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    pack = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "a_pack", pack)
    monkeypatch.delitem(sys.modules, "a_pack.nodes", raising=False)
    spec.loader.exec_module(pack)

    async def nodes():
        return await (await pack.comfy_entrypoint()).get_node_list()

    classes = {node.define_schema().node_id: node for node in asyncio.run(nodes())}
    yield classes, progress
    sys.modules.pop("a_pack.nodes", None)


def execute(workflow, classes):
    """The outputs of all our nodes in a workflow, whose inputs are checked against the schemas."""
    outputs = {}
    for number, node in workflow.items():
        if node["class_type"] not in classes:
            assert node["class_type"] == "PreviewImage"
            continue
        schema = classes[node["class_type"]].define_schema()
        declared = {declared.id: declared for declared in schema.inputs}
        assert node["inputs"].keys() == declared.keys()
        values = {}
        for name, value in node["inputs"].items():
            kind = declared[name].kind
            if isinstance(value, list):
                source, slot = value
                origin = classes[workflow[source]["class_type"]].define_schema().outputs[slot]
                assert origin.kind == kind
                value = outputs[source][slot]
            elif kind == "COMBO":
                assert value in declared[name].options
            elif kind in ("INT", "FLOAT"):
                assert declared[name].min <= value <= declared[name].max
            values[name] = value
        outputs[number] = classes[node["class_type"]].execute(**values)
        assert len(outputs[number]) == len(schema.outputs)
    return outputs


def test_the_workflow_draws_and_edits_as_the_pipeline_does(comfy, tiny_random_checkpoint):
    classes, progress = comfy
    workflow = json.loads((FOLDER / "workflow.json").read_text())
    workflow["1"]["inputs"] |= {"folder": str(tiny_random_checkpoint), "device": "cpu"}
    workflow["2"]["inputs"] |= {"number": 2, "negative": "a square"}
    outputs = execute(workflow, classes)
    (pipe,) = outputs["1"]
    drawn, edited = outputs["3"][0], outputs["6"][0]
    assert drawn.shape == (2, 80, 80, 3) and edited.shape == (1, 80, 80, 3)
    assert drawn.dtype == torch.float32 and drawn.min() >= 0 and drawn.max() <= 1

    def seeds(number):
        return [torch.Generator().manual_seed(seed) for seed in range(number)]

    prompt, change = (workflow[number]["inputs"]["prompt"] for number in "25")
    options = {"guidance_scale": 3.0, "output_type": "np"}
    wanted = pipe(prompt, negative_prompt="a square", num_images_per_prompt=2, generator=seeds(2), **options).images
    np.testing.assert_array_equal(drawn.numpy(), wanted)
    pictures = pipe(prompt, negative_prompt="a square", num_images_per_prompt=2, generator=seeds(2), guidance_scale=3.0)
    wanted = pipe(change, image=pictures.images, generator=seeds(1), **options).images
    np.testing.assert_array_equal(edited.numpy(), wanted)
    assert [(value, most) for value, most, _ in progress] == [(scale, 5) for scale in range(1, 6)] * 2
    assert {preview.size for *_, preview in progress} == {(80, 80)}


def test_every_aspect_can_be_drawn(comfy, tiny_random_checkpoint):
    classes, _ = comfy
    aspects = next(part for part in classes["NextFlowDraw"].define_schema().inputs if part.id == "aspect").options
    assert len(aspects) == 41
    (pipe,) = classes["NextFlowLoad"].execute(str(tiny_random_checkpoint), "cpu", "float32")
    for aspect in aspects[::10]:
        (latents,) = classes["NextFlowDraw"].execute(pipe, "a", 1.0, 2**63 - 1, 2, aspect, 3, "")
        height, width = map(int, aspect.split(":"))
        assert (latents.shape[2] >= latents.shape[3]) == (height >= width)


def test_what_the_registry_reads():
    tomllib = pytest.importorskip("tomllib")
    metadata = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    assert metadata["project"]["name"] and metadata["tool"]["comfy"].keys() >= {"PublisherId", "DisplayName"}
