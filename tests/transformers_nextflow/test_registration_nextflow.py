"""What `import transformers_nextflow` costs and brings about; fresh processes, because imports happen once in each."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    Qwen2Tokenizer,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

import transformers_nextflow

HEAVY = ("trl", "peft", "datasets", "diffusers", "torchvision")

CHECK_REGISTRY = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import AutoModelForMultimodalLM, AutoTokenizer
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY
import transformers_nextflow as t

config = type(AutoConfig.for_model("nextflow"))
assert config is t.NextFlowConfig
assert AutoModel._model_mapping[config] is t.NextFlowModel
for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    assert auto._model_mapping[config] is t.NextFlowForCausalLM
assert AutoModel._model_mapping[t.NextFlowImageTokenizerConfig] is t.NextFlowImageTokenizer
assert IMAGE_PROCESSOR_MAPPING[config] == {
    "torchvision": t.NextFlowImageProcessor, "pil": t.NextFlowImageProcessorPil
}
assert PROCESSOR_MAPPING[config] is t.NextFlowProcessor
assert TOKENIZER_MAPPING[config].__name__ == "Qwen2Tokenizer"
assert "text-to-image" in PIPELINE_REGISTRY.get_supported_tasks()
"""


def test_import_is_light():
    """It takes tables of names from transformers, and none of the modules that cost time (see CONTRIBUTING.md)."""
    code = "import json, sys, torch, transformers; before = set(sys.modules); import transformers_nextflow as t;"
    code += "t.ScaleSchedule; print(json.dumps(sorted(set(sys.modules) - before)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = json.loads(done.stdout)
    assert not [name for name in loaded if name.split(".")[0] in HEAVY]
    assert [name for name in loaded if name.startswith("transformers.")] == [
        "transformers.models",
        "transformers.models.auto",
        "transformers.models.auto.auto_mappings",
        "transformers.models.nextflow",
    ]


@pytest.mark.parametrize(
    "imports",
    [
        # transformers' modeling files import its Auto modules themselves: our entries must not run in circles.
        "import transformers_nextflow, transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
        "import transformers_nextflow; from transformers_nextflow import NextFlowForCausalLM",
        "from transformers import AutoConfig; import transformers_nextflow; from transformers import AutoModel",
        "from transformers import AutoModel, AutoProcessor, pipeline; import transformers_nextflow",
    ],
)
def test_order_of_imports_does_not_matter(fresh_process, imports):
    fresh_process(imports + CHECK_REGISTRY)


def test_fresh_process_loads_every_class(fresh_process, tiny_random_checkpoint):
    code = """
import sys
import transformers_nextflow
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor,
    AutoTokenizer,
)
path = sys.argv[1]
autos = (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer)
kinds = [type(auto.from_pretrained(path)).__name__ for auto in autos]
kinds += [type(AutoImageProcessor.from_pretrained(path, backend=name)).__name__ for name in ("torchvision", "pil")]
kinds += [type(AutoModel.from_pretrained(path, subfolder="image_tokenizer")).__name__]
print(*kinds)
"""
    assert fresh_process(code, str(tiny_random_checkpoint)).split() == [
        "NextFlowConfig",
        "NextFlowModel",
        "NextFlowForCausalLM",
        "NextFlowForCausalLM",
        "NextFlowProcessor",
        "Qwen2Tokenizer",
        "NextFlowImageProcessor",
        "NextFlowImageProcessorPil",
        "NextFlowImageTokenizer",
    ]


def test_auto_classes_here(tiny_random_checkpoint):
    assert type(AutoConfig.from_pretrained(tiny_random_checkpoint)) is transformers_nextflow.NextFlowConfig
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert type(auto.from_pretrained(tiny_random_checkpoint)) is transformers_nextflow.NextFlowForCausalLM
    assert type(AutoModel.from_pretrained(tiny_random_checkpoint)) is transformers_nextflow.NextFlowModel
    assert type(AutoProcessor.from_pretrained(tiny_random_checkpoint)) is transformers_nextflow.NextFlowProcessor
    image_processor = AutoImageProcessor.from_pretrained(tiny_random_checkpoint)
    assert type(image_processor) is transformers_nextflow.NextFlowImageProcessor
    assert type(AutoTokenizer.from_pretrained(tiny_random_checkpoint)) is Qwen2Tokenizer


def test_tables_of_names_have_entries():
    # `pipeline` and `transformers serve` look into these, not into the mappings.
    for table in (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ):
        assert table["nextflow"] == "NextFlowForCausalLM"


def test_public_names():
    for name in transformers_nextflow.__all__:
        assert getattr(transformers_nextflow, name).__module__.startswith("transformers_nextflow")
        assert name in dir(transformers_nextflow)
    from transformers_nextflow import _MODULE_OF

    assert set(_MODULE_OF) | {"tiny_checkpoint"} == set(transformers_nextflow.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'NextFlow'"):
        _ = transformers_nextflow.NextFlow


def test_version():
    assert transformers_nextflow.__version__ == importlib.metadata.version("transformers-nextflow")


def test_tiny_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers_nextflow._registration, "TINY_CHECKPOINT", tmp_path)
    with pytest.raises(FileNotFoundError, match="nextflow-tiny is missing: there is no checkpoint in"):
        transformers_nextflow.tiny_checkpoint()
    (tmp_path / "config.json").touch()
    assert transformers_nextflow.tiny_checkpoint() == tmp_path


def test_every_pipeline_in_a_fresh_process(fresh_process, tiny_random_checkpoint):
    code = """
import sys
import transformers_nextflow
from PIL import Image
from transformers import pipeline

path, picture = sys.argv[1], Image.new("RGB", (80, 80), "skyblue")
chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}]}]
read = dict(text=chat, max_new_tokens=3, return_full_text=False)
both = pipeline("any-to-any", model=path)
edited = both(text=chat, generation_mode="image", generate_kwargs={"guidance_scale": 2.0, "image_guidance_scale": 1.5})
print(
    type(pipeline("image-text-to-text", model=path)(**read)[0]["generated_text"]).__name__,
    type(both(**read)[0]["generated_text"]).__name__,
    edited[0]["generated_image"].size[0],
    type(pipeline("text-generation", model=path)("a", max_new_tokens=3)[0]["generated_text"]).__name__,
    pipeline("text-to-image", model=path)("a red circle", seed=0)[0].size[0],
)
"""
    assert fresh_process(code, str(tiny_random_checkpoint)) == "str str 80 str 80"
