"""NextFlow for diffusers: [`NextFlowPipeline`], and `python -m diffusers_nextflow` in a terminal.

Importing this package makes NextFlow known to diffusers: `from_pretrained` of `DiffusionPipeline` finds it, and so does
that of `AutoPipelineForText2Image`, `AutoPipelineForImage2Image` and `AutoPipelineForInpainting`. It imports diffusers.
"""

import importlib

from diffusers.pipelines import auto_pipeline, pipeline_loading_utils

from .modeling_diffusion_decoder import NextFlowDiffusionDecoder
from .pipeline_nextflow import NextFlowPipeline, NextFlowPipelineOutput
from .pipeline_nextflow_decode import NextFlowDecodePipeline

# Without these entries a folder on disk would still load, but a repository on the Hub would be refused.
_METHODS = ["save_pretrained", "from_pretrained"]
_MODELS = ("NextFlowForCausalLM", "TokenFlowForCausalLM", "NextFlowImageTokenizer")
_COMPONENTS = (*_MODELS, "NextFlowImageProcessor", "NextFlowImageProcessorPil")
_OURS = ("NextFlowPipeline", "NextFlowDecodePipeline", "NextFlowDiffusionDecoder")
pipeline_loading_utils.LOADABLE_CLASSES["transformers_nextflow"] = dict.fromkeys(_COMPONENTS, _METHODS)
pipeline_loading_utils.LOADABLE_CLASSES["diffusers_nextflow"] = dict.fromkeys(_OURS, _METHODS)
pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(dict.fromkeys((*_COMPONENTS, *_OURS), _METHODS))
for mapping in ("TEXT2IMAGE", "IMAGE2IMAGE", "INPAINT"):
    getattr(auto_pipeline, f"AUTO_{mapping}_PIPELINES_MAPPING")["nextflow"] = NextFlowPipeline

# Loaded when they are first used: they need the extra `train`.
_TRAINING = {
    "NextFlowDiffusionDecoderTrainer": ".diffusion_decoder_trainer",
    "NextFlowDiffusionDecoderTrainingConfig": ".diffusion_decoder_config",
}

__all__ = [
    "NextFlowDecodePipeline",
    "NextFlowDiffusionDecoder",
    "NextFlowDiffusionDecoderTrainer",
    "NextFlowDiffusionDecoderTrainingConfig",
    "NextFlowPipeline",
    "NextFlowPipelineOutput",
]


def __getattr__(name: str):
    if name not in _TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_TRAINING[name], __name__), name)
