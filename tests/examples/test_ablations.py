"""The ablations: all runs end in one table, and runs that are done are not done again."""

import sys
from pathlib import Path

import pytest

from transformers_nextflow import tiny_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
pytest.importorskip("skimage", reason="the judge needs the [tiny] extra")
import ablations


@pytest.mark.slow
def test_every_run_ends_in_the_table_and_is_done_once(tmp_path, capsys):
    try:
        tiny_checkpoint()
    except FileNotFoundError:
        pytest.skip("nextflow-tiny is not in this checkout")
    sizes = ["--steps", "2", "--batch-size", "2", "--num-codes", "16", "--held-out", "8", "--prompts", "1"]
    ablations.main(["--work", str(tmp_path), *sizes, "--markdown", str(tmp_path / "table.md")])
    first = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert first.count("\n| ") == len(ablations.RUNS)
    assert capsys.readouterr().out.count("[codes]") == 2

    (tmp_path / f"{ablations.RUNS[0].name}-seed0.json").unlink()
    ablations.main(["--work", str(tmp_path), *sizes, "--markdown", str(tmp_path / "table.md")])
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == first  # the same seed, the same result
    assert "[codes]" not in capsys.readouterr().out
