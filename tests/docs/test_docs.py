"""The documentation: its Python runs, its commands exist, its links lead somewhere, and CI tests as the README says."""

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusers_nextflow.__main__ import main
from transformers_nextflow import tiny_checkpoint

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
# A block stands at the margin; one that CI can't run has a comment that says why on the line above.
BLOCK = re.compile(r"(?P<not_run><!-- not run: .+ -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.fixture
def checkpoint() -> Path:
    try:
        return tiny_checkpoint()
    except FileNotFoundError:
        pytest.skip("nextflow-tiny is not in this checkout; `python examples/run_recipe.py` makes it")


def blocks(page: Path, language: str) -> Iterator[tuple[str, int, bool]]:
    """Code, number of the line before it, and whether CI runs it."""
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        if block["language"] == language:
            yield block["code"], text.count("\n", 0, block.start("code")), block["not_run"] is None


def commands(page: Path) -> list[list[str]]:
    """All commands of a page's bash blocks, as words."""
    lines = "".join(code for code, _, _ in blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(command, comments=True) for line in lines for command in line.split("&&")]


@each_page
def test_python_runs(page, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for code, line, run in blocks(page, "python"):
        compiled = compile("\n" * line + code, page, "exec")  # so that a traceback names the page's own lines
        if run:
            exec(compiled, names)


@pytest.mark.parametrize("script", sorted((ROOT / "docs" / "notebooks").glob("*.py")), ids=lambda script: script.name)
def test_notebooks_run(script, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script))


@each_page
def test_commands_exist(page):
    for words in commands(page):
        if words[:1] != ["python"]:
            continue
        script = ROOT / words[1]
        if words[1] == "-m":
            module = ROOT / "src" / words[2].replace(".", "/")
            script = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
        assert script.is_file(), f"{page.name} runs {script}"
        code = script.read_text(encoding="utf-8")
        if script.parent.name == "conversion":
            code += (script.parent / "command.py").read_text(encoding="utf-8")  # the options of all converters
        for option in (word for word in words if word.startswith("--") and word != "--help"):
            assert f'"{option}"' in code, f"{page.name} gives {words[1]} {option}"


def test_the_first_command_of_the_readme_draws(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    install, draw = commands(README)[:2]
    assert install[:3] == ["pip", "install", "-e"] and draw[:3] == ["python", "-m", "diffusers_nextflow"]
    assert main(draw[3:]) == 0
    assert (tmp_path / "out.png").is_file()


def test_ci_runs_the_second_command_of_the_readme():
    command = [code for code, _, _ in blocks(README, "bash")][1].strip()
    assert "pytest" in command
    assert f"({command})\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@each_page
def test_links_lead_somewhere(page, checkpoint):  # the sheet of samples comes with the checkpoint
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name} links to {target}"
