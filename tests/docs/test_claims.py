"""What the pages say of names, defaults and figures is what the code has."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import diffusers_nextflow
import transformers_nextflow
from transformers_nextflow import NextFlowConfig, NextFlowImageProcessor, NextFlowImageTokenizerConfig, ScaleSchedule
from transformers_nextflow.generation_config_nextflow import OWN_OPTIONS, NextFlowGenerationConfig
from transformers_nextflow.picture_sources import SourceLimits

DOCS = Path(__file__).parents[2] / "docs"


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def code_words(text: str) -> set[str]:
    return {word for span in re.findall(r"`([^`]+)`", text) for word in re.findall(r"\w+", span)}


def test_the_page_of_names_has_all_of_them():
    trainer = pytest.importorskip("transformers_nextflow.trainer")
    pytest.importorskip("trl")
    names = read("names.md")
    for module in (transformers_nextflow, trainer, diffusers_nextflow):
        section = names.partition(f"## {module.__name__}\n")[2].partition("\n## ")[0]
        assert not set(module.__all__) - code_words(section), module.__name__
    assert all(f"`{name}" in names for name in ("TokenLayout", "SourceLimits", "save_merged"))


def test_choices_of_our_own_name_fields_that_exist():
    """The last column of the tables of architecture.md."""
    known = {
        *NextFlowConfig().to_dict(),
        *NextFlowImageTokenizerConfig().to_dict(),
        *NextFlowImageProcessor().to_dict(),
    }
    known |= {*OWN_OPTIONS, *vars(NextFlowGenerationConfig()), "mrope_section", "mrope_interleaved", "chat_template"}
    known |= {*inspect.signature(transformers_nextflow.NextFlowForCausalLM.generate).parameters}
    enlarge = transformers_nextflow.NextFlowImageTokenizer.enlarge_pixel_decoder
    known |= {"enlarge_pixel_decoder", *inspect.signature(enlarge).parameters, "RewardOutput"}
    trainer = pytest.importorskip("transformers_nextflow.trainer")
    pytest.importorskip("trl")
    known |= {"paper_sampling", "detector_reward", *inspect.signature(trainer.detector_reward).parameters}
    configs = (
        trainer.NextFlowSFTConfig,
        trainer.NextFlowDPOConfig,
        trainer.NextFlowGRPOConfig,
        trainer.NextFlowImageTokenizerTrainingConfig,
    )
    known |= {field.name for config in configs for field in dataclasses.fields(config)}
    tables = read("architecture.md").partition("## What the papers leave open")[2]
    rows = [line.strip("| \n").split("|") for line in tables.splitlines() if line.startswith("|") and "---" not in line]
    named = {word for row in rows if len(row) > 2 for word in code_words(row[-1])}
    assert len(named) > 30 and not named - known


def test_the_front_pages_have_the_figures_of_the_checkpoints_page():
    figures = {
        path: re.search(r"<!-- figures -->\n(.*?)<!-- /figures -->", path.read_text("utf-8"), re.S)[1]
        for path in (DOCS / "nextflow_tiny.md", DOCS / "index.md", DOCS.parent / "README.md")
    }
    whole, *short = ({line for line in text.splitlines() if line.startswith("|")} for text in figures.values())
    assert all(len(rows) > 8 and rows <= whole for rows in short)


def test_defaults_of_what_is_opened():
    rows = dict(re.findall(r"^\| (`max_[^|]+|`allow_[^|]+) \| ([^|]+) \|", read("text_to_image.md"), flags=re.M))
    said = {
        name: value.strip()
        for names, values in rows.items()
        for name, value in zip(re.findall(r"`(\w+)`", names), (values + ", " + values).split(", "), strict=False)
    }
    limits = SourceLimits()
    assert {name: said[name] for name in vars(limits)} == {
        "max_pixels": f"{limits.max_pixels:,}",
        "max_aspect_ratio": f"{limits.max_aspect_ratio:g}",
        "max_download_bytes": f"{limits.max_download_bytes >> 20} MiB",
        "max_download_seconds": f"{limits.max_download_seconds:g}",
        "allow_urls": "True",
        "allow_paths": "True",
    }


def test_the_papers_figures_of_cost():
    text = re.sub(r"\s+", " ", read("architecture.md"))
    schedule = ScaleSchedule()
    factors = {
        width: (884_736 * width**2 + 1_207_959_552 * width) / schedule.flops(width, num_text_tokens=100)
        for width in (2048, 4096)
    }
    assert f"a factor of {factors[2048]:.2f}" in text
    assert f"the same formula gives {factors[4096]:.3f}" in text
