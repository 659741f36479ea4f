"""NextFlow for diffusers: [`NextFlowPipeline`], and `python -m diffusers_nextflow` in a terminal.

Importing this package makes NextFlow known to diffusers, so that `DiffusionPipeline.from_pretrained` and
`AutoPipelineForText2Image.from_pretrained` find it too. It costs nothing: diffusers takes seconds to import, so the
registration waits until somebody imports the part of diffusers that needs it.
"""

from typing import TYPE_CHECKING

from . import _registration

if TYPE_CHECKING:
    from .pipeline_nextflow import NextFlowPipeline, NextFlowPipelineOutput

_registration.register()

__all__ = ["NextFlowPipeline", "NextFlowPipelineOutput"]


def __getattr__(name: str):
    if name in __all__:
        from . import pipeline_nextflow

        return getattr(pipeline_nextflow, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
