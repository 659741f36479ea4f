"""NextFlow for transformers: configuration, models, image tokenizer, processor, generation and pipelines.

Importing this package makes NextFlow known to transformers' Auto classes and pipelines. It is cheap: every name is
loaded when it is first used, and the classes are registered when the first of them is.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import _registration

if TYPE_CHECKING:  # the same names, for editors and type checkers
    from .codebook import *
    from .configuration_nextflow import *
    from .configuration_tokenflow import *
    from .decoding import GenerationEvent as GenerationEvent
    from .generation_config_nextflow import *
    from .generation_nextflow import *
    from .image_processing_nextflow import *
    from .image_processing_pil_nextflow import *
    from .modeling_nextflow import *
    from .modeling_nextflow_image_tokenizer import *
    from .modeling_tokenflow import *
    from .pipelines import *
    from .processing_nextflow import *
    from .processing_tokenflow import TokenFlowProcessor as TokenFlowProcessor
    from .regional_prompts import Region as Region
    from .remote_code import *
    from .scale_cache import ScaleCache as ScaleCache
    from .scale_schedule import *
    from .session import *
    from .word_attention import *

__version__ = "0.1.0"

# The public names of each module: the only list of them at run time.
_MODULES = {
    "codebook": ("check_same_codebook", "hash_image_tokenizer", "reseat_codebook"),
    "configuration_nextflow": ("NextFlowConfig", "NextFlowImageTokenizerConfig"),
    "configuration_tokenflow": ("TokenFlowConfig",),
    "generation_config_nextflow": ("NextFlowGenerationConfig",),
    "generation_nextflow": ("NextFlowGenerateOutput", "NextFlowGenerationMixin"),
    "image_processing_nextflow": ("NextFlowImageProcessor",),
    "image_processing_pil_nextflow": ("NextFlowImageProcessorPil",),
    "modeling_nextflow": ("NextFlowForCausalLM", "NextFlowModel", "NextFlowPreTrainedModel"),
    "modeling_nextflow_image_tokenizer": ("NextFlowImageTokenizer", "NextFlowImageTokenizerOutput"),
    "modeling_tokenflow": ("TokenFlowForCausalLM", "TokenFlowModel", "TokenFlowPreTrainedModel"),
    "pipelines": ("NextFlowTextToImagePipeline",),
    "decoding": ("GenerationEvent",),
    "processing_nextflow": ("NextFlowProcessor", "StreamChunk"),
    "processing_tokenflow": ("TokenFlowProcessor",),
    "regional_prompts": ("Region",),
    "remote_code": ("add_remote_code",),
    "scale_cache": ("ScaleCache",),
    "scale_schedule": ("ScaleSchedule", "aspect_buckets", "nearest_bucket", "nearest_sizes"),
    "word_attention": ("attention_maps",),
    "session": ("NextFlowSession", "SessionMemory"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted([*_MODULE_OF, "tiny_checkpoint"])


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    if _MODULE_OF[name] != "scale_schedule":  # which works without torch
        _registration.register()
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def tiny_checkpoint() -> Path:
    """The folder of nextflow-tiny, the small trained checkpoint that ships with the package.

    It is a plain transformers checkpoint of a model that draws 128 x 128 pixels, for trying things out and for tests.

    Raises:
        `FileNotFoundError`: if the package was installed without its data.
    """
    path = _registration.TINY_CHECKPOINT
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f'nextflow-tiny is missing: there is no checkpoint in "{path}". Reinstall transformers-nextflow with its '
            "package data, or train the checkpoint with `python examples/run_recipe.py`."
        )
    return path


_registration.announce(sys.modules[__name__])
