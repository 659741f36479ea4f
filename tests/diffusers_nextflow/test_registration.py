"""diffusers knows NextFlow whichever of the two packages is imported first."""

import pytest

import diffusers_nextflow


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import diffusers_nextflow; from diffusers import DiffusionPipeline, AutoPipelineForText2Image",
        "from diffusers import DiffusionPipeline, AutoPipelineForText2Image; import diffusers_nextflow",
    ],
)
def test_diffusers_knows_the_pipeline(imports, fresh_process):
    code = (
        f"{imports}; import diffusers; from diffusers.pipelines import auto_pipeline, pipeline_loading_utils as utils;"
        "pipeline = diffusers.NextFlowPipeline; assert pipeline is diffusers_nextflow.NextFlowPipeline;"
        "assert auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING['nextflow'] is pipeline;"
        "assert {'transformers_nextflow', 'diffusers_nextflow'} <= set(utils.LOADABLE_CLASSES)"
    )
    fresh_process(code)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'NextFlowPipelin'"):
        diffusers_nextflow.NextFlowPipelin  # noqa: B018
