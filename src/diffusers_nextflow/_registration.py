"""Makes NextFlow known to diffusers: as soon as diffusers is there, and not before."""

import importlib
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.util import find_spec


def register() -> None:
    """Registers the pipeline and its components; with parts of diffusers that are not imported yet, when they are."""
    _after_import("diffusers.pipelines.pipeline_utils", _register_pipeline)
    _after_import("diffusers.pipelines.auto_pipeline", _register_auto_pipeline)


def _register_pipeline() -> None:
    from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES

    # Without these entries a folder on disk would still load, but a repository on the Hub would be refused.
    methods = ["save_pretrained", "from_pretrained"]
    components = (
        "NextFlowForCausalLM",
        "NextFlowImageTokenizer",
        "NextFlowImageProcessor",
        "NextFlowImageProcessorPil",
    )
    LOADABLE_CLASSES["transformers_nextflow"] = dict.fromkeys(components, methods)
    LOADABLE_CLASSES["diffusers_nextflow"] = {"NextFlowPipeline": methods}
    ALL_IMPORTABLE_CLASSES.update(dict.fromkeys((*components, "NextFlowPipeline"), methods))

    importlib.import_module("diffusers_nextflow.pipeline_nextflow")  # puts the pipeline's class into `diffusers`


def _register_auto_pipeline() -> None:
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    from .pipeline_nextflow import NextFlowPipeline

    AUTO_TEXT2IMAGE_PIPELINES_MAPPING["nextflow"] = NextFlowPipeline


def _after_import(name: str, action: Callable[[], None]) -> None:
    """Calls `action` once the module `name` is imported: now if it is already, else right after somebody imports it."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _AfterImport(name, action))


class _AfterImport(MetaPathFinder):
    """Finds one module by way of the other finders, once, and has `action` follow its execution."""

    def __init__(self, name: str, action: Callable[[], None]):
        self.name = name
        self.action = action

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_then_act(module):
                execute(module)
                self.action()

            spec.loader.exec_module = execute_then_act  # the loader is this module's own
        return spec
