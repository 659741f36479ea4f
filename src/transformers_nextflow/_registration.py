"""Makes NextFlow known to transformers' Auto classes and pipelines, in two steps.

transformers' Auto modules take seconds to import and bring torchvision along. `announce` therefore only enters names
into the tables that those modules read; whoever then loads a configuration or a processor by an Auto class asks this
package for a class by name, and with the first class `register` makes the ordinary `AutoX.register` calls.
"""

import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

TINY_CHECKPOINT = Path(__file__).parent / "checkpoints" / "nextflow-tiny"

MODEL_TYPE, TOKENFLOW_TYPE = "nextflow", "tokenflow_t2i"
IMAGE_TOKENIZER_TYPE = "nextflow_image_tokenizer"


def announce(package: ModuleType) -> None:
    """Enters the names of the classes that are loaded first; transformers looks them up as attributes of `package`."""
    from transformers.models.auto import auto_mappings

    sys.modules[f"transformers.models.{MODEL_TYPE}"] = package  # where transformers looks the names up
    configs = {
        MODEL_TYPE: "NextFlowConfig",
        TOKENFLOW_TYPE: "TokenFlowConfig",
        IMAGE_TOKENIZER_TYPE: "NextFlowImageTokenizerConfig",
    }
    auto_mappings.CONFIG_MAPPING_NAMES.update(configs)
    for model_type in (TOKENFLOW_TYPE, IMAGE_TOKENIZER_TYPE):
        auto_mappings.SPECIAL_MODEL_TYPE_TO_MODULE_NAME[model_type] = MODEL_TYPE
    for model_type, processor in ((MODEL_TYPE, "NextFlowProcessor"), (TOKENFLOW_TYPE, "TokenFlowProcessor")):
        auto_mappings.PROCESSOR_MAPPING_NAMES[model_type] = processor
        auto_mappings.IMAGE_PROCESSOR_MAPPING_NAMES[model_type] = {
            "torchvision": "NextFlowImageProcessor",
            "pil": "NextFlowImageProcessorPil",
        }
    if (auto := sys.modules.get("transformers.models.auto.configuration_auto")) is not None:
        auto.CONFIG_MAPPING_NAMES.update(configs)  # it has copied the table already
    if "transformers.pipelines" in sys.modules:
        register()


@cache
def register() -> None:
    """Registers the classes with transformers' Auto classes, and the pipeline that draws."""
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.pipelines import PIPELINE_REGISTRY

    from .configuration_nextflow import NextFlowConfig, NextFlowImageTokenizerConfig
    from .configuration_tokenflow import TokenFlowConfig
    from .image_processing_nextflow import NextFlowImageProcessor
    from .image_processing_pil_nextflow import NextFlowImageProcessorPil
    from .modeling_nextflow import NextFlowForCausalLM, NextFlowModel
    from .modeling_nextflow_image_tokenizer import NextFlowImageTokenizer
    from .modeling_tokenflow import TokenFlowForCausalLM, TokenFlowModel
    from .processing_nextflow import NextFlowProcessor
    from .processing_tokenflow import TokenFlowProcessor

    transformers.AutoConfig.register(IMAGE_TOKENIZER_TYPE, NextFlowImageTokenizerConfig, exist_ok=True)
    transformers.AutoModel.register(NextFlowImageTokenizerConfig, NextFlowImageTokenizer, exist_ok=True)
    backends: dict[str, type] = {"torchvision": NextFlowImageProcessor, "pil": NextFlowImageProcessorPil}
    rows: tuple[tuple[Any, ...], ...] = (
        (NextFlowConfig, NextFlowModel, NextFlowForCausalLM, transformers.Qwen2Tokenizer, NextFlowProcessor),
        (TokenFlowConfig, TokenFlowModel, TokenFlowForCausalLM, transformers.LlamaTokenizer, TokenFlowProcessor),
    )
    for config, model, causal_model, tokenizer, processor in rows:
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        transformers.AutoModel.register(config, model, exist_ok=True)
        for task in ("CausalLM", "ImageTextToText", "MultimodalLM"):
            auto_model = getattr(transformers, f"AutoModelFor{task}")
            auto_model.register(config, causal_model, exist_ok=True)
            # `register` leaves out the tables of names, which pipelines and servers read.
            auto_model._model_mapping._model_mapping[config.model_type] = causal_model.__name__
        modeling_auto.MODEL_MAPPING_NAMES[config.model_type] = model.__name__
        transformers.AutoTokenizer.register(config, tokenizer, exist_ok=True)
        transformers.AutoImageProcessor.register(config, image_processor_classes=backends, exist_ok=True)
        transformers.AutoProcessor.register(config, processor, exist_ok=True)
    # An entry by name. (`PIPELINE_REGISTRY.register_pipeline` takes the class and marks it as one whose code
    # `save_pretrained` copies into every checkpoint.)
    PIPELINE_REGISTRY.supported_tasks["text-to-image"] = {
        "impl": f"{__package__}.pipelines.NextFlowTextToImagePipeline",
        "pt": (transformers.AutoModelForMultimodalLM,),
        "default": {"model": (str(TINY_CHECKPOINT), "main")},
        "type": "text",
    }
