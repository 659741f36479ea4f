"""Makes NextFlow known to transformers' Auto classes and pipelines.

transformers' Auto modules take seconds to import and bring torchvision along, so they are not imported for this: the
entries are made when somebody else imports them. Then NextFlow looks like a model of transformers' own, with names in
the tables that transformers resolves when they are needed: importing the classes at that point would run in circles,
because transformers' modeling files import the Auto modules themselves.
"""

import sys
from pathlib import Path
from types import ModuleType

from ._after_import import after_import

TINY_CHECKPOINT = Path(__file__).parent / "checkpoints" / "nextflow-tiny"

MODEL_TYPE = "nextflow"
IMAGE_TOKENIZER_TYPE = "nextflow_image_tokenizer"

# Module of transformers.models.auto -> its table of names -> model type -> our names.
ENTRIES: dict[str, dict[str, dict[str, str | dict[str, str]]]] = {
    "configuration_auto": {
        "CONFIG_MAPPING_NAMES": {
            MODEL_TYPE: "NextFlowConfig",
            IMAGE_TOKENIZER_TYPE: "NextFlowImageTokenizerConfig",
        },
        "SPECIAL_MODEL_TYPE_TO_MODULE_NAME": {IMAGE_TOKENIZER_TYPE: MODEL_TYPE},
    },
    "modeling_auto": {
        "MODEL_MAPPING_NAMES": {MODEL_TYPE: "NextFlowModel", IMAGE_TOKENIZER_TYPE: "NextFlowImageTokenizer"},
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": {MODEL_TYPE: "NextFlowForCausalLM"},
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": {MODEL_TYPE: "NextFlowForCausalLM"},
        "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": {MODEL_TYPE: "NextFlowForCausalLM"},
    },
    "image_processing_auto": {
        "IMAGE_PROCESSOR_MAPPING_NAMES": {
            MODEL_TYPE: {"torchvision": "NextFlowImageProcessor", "pil": "NextFlowImageProcessorPil"}
        },
    },
    "processing_auto": {"PROCESSOR_MAPPING_NAMES": {MODEL_TYPE: "NextFlowProcessor"}},
    "tokenization_auto": {"TOKENIZER_MAPPING_NAMES": {MODEL_TYPE: "Qwen2Tokenizer"}},
}


def register(package: ModuleType) -> None:
    """Registers the classes of `package`, which resolves their names, and the pipelines."""
    sys.modules[f"transformers.models.{MODEL_TYPE}"] = package  # where transformers looks the names up
    for name in ENTRIES:
        auto_module = f"transformers.models.auto.{name}"
        enter = _enter_names_and_classes if auto_module in sys.modules else _enter_names
        after_import(auto_module, enter)
    after_import("transformers.pipelines", _register_pipelines)


def _enter_names(auto_module: ModuleType) -> None:
    for table, names in _entries(auto_module).items():
        getattr(auto_module, table).update(names)


def _enter_names_and_classes(auto_module: ModuleType) -> None:
    # Mappings that were made before the names came don't see them: they take classes. (Pipelines and servers look into
    # the tables, so the names are still worth entering.)
    from transformers.models.auto.auto_factory import _LazyAutoMapping, getattribute_from_module
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    _enter_names(auto_module)
    package = sys.modules[f"transformers.models.{MODEL_TYPE}"]
    for table, names in _entries(auto_module).items():
        mapping = getattr(auto_module, table.removesuffix("_NAMES"))
        if isinstance(mapping, _LazyAutoMapping):
            for model_type, name in names.items():
                mapping.register(CONFIG_MAPPING[model_type], getattribute_from_module(package, name), exist_ok=True)


def _entries(auto_module: ModuleType) -> dict[str, dict[str, str | dict[str, str]]]:
    return ENTRIES[auto_module.__name__.rpartition(".")[2]]


def _register_pipelines(pipelines: ModuleType) -> None:
    # A name here too. (`PIPELINE_REGISTRY.register_pipeline` takes the class and marks it as one whose code
    # `save_pretrained` copies into every checkpoint.)
    pipelines.PIPELINE_REGISTRY.supported_tasks["text-to-image"] = {
        "impl": f"{__package__}.pipelines.NextFlowTextToImagePipeline",
        "pt": (pipelines.AutoModelForMultimodalLM,),
        "default": {"model": (str(TINY_CHECKPOINT), "main")},
        "type": "text",
    }
