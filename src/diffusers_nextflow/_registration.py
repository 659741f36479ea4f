"""Makes NextFlow known to diffusers: as soon as diffusers is there, and not before."""

import importlib
from types import ModuleType

from transformers_nextflow._after_import import after_import

COMPONENTS = ("NextFlowForCausalLM", "NextFlowImageTokenizer", "NextFlowImageProcessor", "NextFlowImageProcessorPil")


def register() -> None:
    """Registers the pipeline and its components; with parts of diffusers that are not imported yet, when they are."""
    after_import("diffusers.pipelines.pipeline_utils", _register_pipeline)
    after_import("diffusers.pipelines.auto_pipeline", _register_auto_pipeline)


def _register_pipeline(pipeline_utils: ModuleType) -> None:
    # Without these entries a folder on disk would still load, but a repository on the Hub would be refused.
    methods = ["save_pretrained", "from_pretrained"]
    pipeline_utils.LOADABLE_CLASSES["transformers_nextflow"] = dict.fromkeys(COMPONENTS, methods)
    pipeline_utils.LOADABLE_CLASSES["diffusers_nextflow"] = {"NextFlowPipeline": methods}
    pipeline_utils.ALL_IMPORTABLE_CLASSES.update(dict.fromkeys((*COMPONENTS, "NextFlowPipeline"), methods))

    importlib.import_module("diffusers_nextflow.pipeline_nextflow")  # puts the pipeline's class into `diffusers`


def _register_auto_pipeline(auto_pipeline: ModuleType) -> None:
    from .pipeline_nextflow import NextFlowPipeline

    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["nextflow"] = NextFlowPipeline
