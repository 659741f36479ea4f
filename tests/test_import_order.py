"""Imports go one way: a module imports only what stands before it in one list, so there is no circle.

A newcomer can read the modules in this order. A new module needs a place in it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

ORDER = """
    scale_schedule whole_folder strict_loading remote_code configuration_nextflow configuration_tokenflow
    token_layout model_inputs varlen_attention linear_cross_entropy scale_cache layer_compilation
    multi_scale_quantizer sampling padding kept_regions regional_prompts word_attention
    generation_config_nextflow decoding_state decoding_settings decoding generation_nextflow
    modeling_nextflow modeling_tokenflow
    semantic_branch strip_decoding modeling_nextflow_image_tokenizer codebook
    picture_sources image_processing_pil_nextflow image_processing_nextflow kept_pictures
    chat_template token_fields stream_decoding pipeline_index processing_nextflow processing_tokenflow
    session pipelines _registration
"""
TRAINER_ORDER = """
    settings coded_dataset data_list data_collator packing agreement checkpoints
    sft_config muon new_weights samples sft_trainer
    dpo_config dpo_trainer
    grpo_config grpo_losses reward_call rewards grpo_trainer
    image_tokenizer_losses image_tokenizer_config image_tokenizer_trainer
    plan
"""
DIFFUSERS_ORDER = """
    control lora_loader diffusion_backbones modeling_diffusion_decoder pipeline_nextflow pipeline_nextflow_decode
    diffusion_decoder_config diffusion_decoder_trainer
"""
SERVING_ORDER = """
    errors settings jobs adapters sessions engine pictures protocol answers guard application local deployment
"""
MODULES = [
    *(f"transformers_nextflow.{name}" for name in ORDER.split()),
    *("transformers_nextflow", "transformers_nextflow.nextflow_remote_code"),
    *(f"transformers_nextflow.trainer.{name}" for name in TRAINER_ORDER.split()),
    "transformers_nextflow.trainer",
    *(f"transformers_nextflow.serving.{name}" for name in SERVING_ORDER.split()),
    *("transformers_nextflow.serving", "transformers_nextflow.serving.__main__"),
    *(f"diffusers_nextflow.{name}" for name in DIFFUSERS_ORDER.split()),
    *("diffusers_nextflow", "diffusers_nextflow.__main__", "diffusers_nextflow.demo"),
]


def source_files() -> dict[str, Path]:
    files = {}
    for file in SOURCE.rglob("*.py"):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        if "checkpoints" not in parts[:-1]:  # package data: what a checkpoint carries along
            files[".".join(part for part in parts if part != "__init__")] = file
    return files


def imports_of(module: str, code: str, is_package: bool) -> Iterator[str]:
    """Modules of our own that code imports, anywhere in it but for type checkers alone."""
    package = module if is_package else module.rpartition(".")[0]
    pending: list[ast.AST] = [ast.parse(code)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        pending.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            names = (f"{source}.{alias.name}" for alias in node.names)
            yield from {name if name in MODULES else source for name in names} & set(MODULES)


def test_the_list_names_every_module_once():
    assert sorted(MODULES) == sorted(source_files())


def test_files_are_short():
    long = {name: number for name, file in source_files().items() if (number := len(file.open().readlines())) > 600}
    assert not long, f"more than 600 lines: {long}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    file = source_files()[module]
    imported = set(imports_of(module, file.read_text(encoding="utf-8"), file.name == "__init__.py"))
    upward = sorted(imported - set(MODULES[: MODULES.index(module)]))
    assert not upward, f"{module} imports {upward}, which stand behind it in the order of this file"


def test_the_list_reads_every_kind_of_import():
    code = """
from . import _registration
from .sampling import draw_codes
from .scale_schedule import ScaleSchedule
import transformers_nextflow.padding
from transformers_nextflow import NextFlowConfig
if TYPE_CHECKING:
    from .session import NextFlowSession
def late():
    from .pipelines import NextFlowTextToImagePipeline
"""
    found = set(imports_of("transformers_nextflow.x", code, is_package=False))
    names = ("_registration", "sampling", "scale_schedule", "padding", "pipelines")
    assert found == {"transformers_nextflow", *(f"transformers_nextflow.{name}" for name in names)}
    (parent,) = imports_of("transformers_nextflow.trainer.x", "from ..scale_schedule import ScaleSchedule", False)
    assert parent == "transformers_nextflow.scale_schedule"
