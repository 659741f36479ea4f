"""NextFlow's classes for `trust_remote_code=True`. They come from the package: `pip install transformers-nextflow`.

`add_remote_code` puts a copy of this file into a checkpoint. Subclasses, not the classes themselves: transformers marks
what it loads this way, and `save_pretrained` then copies the file that defines a marked class. So this file goes along
with a checkpoint, and not the whole package.
"""

import transformers_nextflow


class NextFlowConfig(transformers_nextflow.NextFlowConfig):
    pass


class NextFlowModel(transformers_nextflow.NextFlowModel):
    pass


class NextFlowForCausalLM(transformers_nextflow.NextFlowForCausalLM):
    pass


class NextFlowImageProcessor(transformers_nextflow.NextFlowImageProcessor):
    pass


class NextFlowImageProcessorPil(transformers_nextflow.NextFlowImageProcessorPil):
    pass


class NextFlowProcessor(transformers_nextflow.NextFlowProcessor):
    pass
