"""The settings and the manifest in examples/serving: what a server would make of them."""

from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("pydantic") is None or find_spec("yaml") is None:
    pytest.skip("needs pydantic and PyYAML", allow_module_level=True)

import yaml

from transformers_nextflow.serving.settings import ServingSettings

FOLDER = Path(__file__).parents[2] / "examples" / "serving"


def test_the_settings_are_legal():
    assert ServingSettings.read(FOLDER / "serve.yaml").replicas == 2


def test_the_manifest_names_what_is_there():
    manifest = yaml.safe_load((FOLDER / "rayservice.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    assert {"headGroupSpec", "workerGroupSpecs"} <= manifest["spec"]["rayClusterConfig"].keys()
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    ServingSettings.of(application["args"])
    module, name = application["import_path"].split(":")
    source = (FOLDER.parents[1] / "src" / f"{module.replace('.', '/')}.py").read_text()
    assert f"def {name}(" in source
    assert all(f'name="{deployment["name"]}"' in source for deployment in application["deployments"])
    if find_spec("ray") is not None:
        from ray.serve.schema import ServeDeploySchema

        ServeDeploySchema.model_validate(config)
