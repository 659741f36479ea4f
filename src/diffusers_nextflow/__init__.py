"""NextFlow for diffusers: [`NextFlowPipeline`], and `python -m diffusers_nextflow` in a terminal.

Importing this package makes NextFlow known to diffusers, so that `DiffusionPipeline.from_pretrained` and
`AutoPipelineForText2Image.from_pretrained` find it too. It imports diffusers.
"""

from diffusers.pipelines import auto_pipeline, pipeline_loading_utils

from .pipeline_nextflow import NextFlowPipeline, NextFlowPipelineOutput

# Without these entries a folder on disk would still load, but a repository on the Hub would be refused.
_METHODS = ["save_pretrained", "from_pretrained"]
_COMPONENTS = ("NextFlowForCausalLM", "NextFlowImageTokenizer", "NextFlowImageProcessor", "NextFlowImageProcessorPil")
pipeline_loading_utils.LOADABLE_CLASSES["transformers_nextflow"] = dict.fromkeys(_COMPONENTS, _METHODS)
pipeline_loading_utils.LOADABLE_CLASSES["diffusers_nextflow"] = {"NextFlowPipeline": _METHODS}
pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(dict.fromkeys((*_COMPONENTS, "NextFlowPipeline"), _METHODS))
auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["nextflow"] = NextFlowPipeline

__all__ = ["NextFlowPipeline", "NextFlowPipelineOutput"]
