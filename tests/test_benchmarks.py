"""The benchmarks run, at small sizes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak of a process")
def test_fused_loss():
    command = [sys.executable, str(ROOT / "benchmarks" / "fused_loss.py"), "--rows", "16", "--hidden-size", "8"]
    done = subprocess.run([*command, "--vocab-size", "100", "--runs", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["naive", "chunked", "fused"]
    assert len({row[-1] for row in rows}) == 1, "all ways give one loss"


@pytest.mark.slow
def test_packing():
    options = ["--samples", "64", "--timed", "4", "--batch-size", "2", "--hidden-size", "64", "--layers", "1"]
    command = [sys.executable, str(ROOT / "benchmarks" / "packing.py"), *options, "--drop-scales", "10", "--ranks", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["padded", "length", "compute"]
    imbalance = [float(row[4]) for row in rows]
    assert imbalance[2] < imbalance[1] < imbalance[0]


@pytest.mark.slow
def test_grpo_prefix(tmp_path):
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    sizes = ["--updates", "1", "--pictures", "16", "--hard", "2", "--easy", "2", "--seeds", "0"]
    command = [sys.executable, str(ROOT / "benchmarks" / "grpo_prefix.py"), "--output", str(tmp_path), *sizes]
    command += ["--variants", "prefix, VMR", "--plot", str(tmp_path / "curves.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows == ["variant", "base", "prefix, VMR", "reconstructions"]
    assert (tmp_path / "curves.png").is_file() and (tmp_path / "prefix_VMR_0" / "sheet.png").is_file()
    # What is there is not done again.
    again = subprocess.run(command, capture_output=True, text=True)
    assert "seconds" in again.stdout and "'loss'" not in again.stdout
