import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from transformers_nextflow import ScaleSchedule, aspect_buckets, nearest_bucket, nearest_sizes

PAPER_TABLE = json.loads((Path(__file__).parents[1] / "fixtures" / "scale_schedules.json").read_text())


def test_rule_gives_all_buckets_of_the_papers_table():
    assert len(aspect_buckets()) == len(PAPER_TABLE) == 41
    assert set(aspect_buckets()) == {tuple(row["schedule"][11]) for row in PAPER_TABLE}


@pytest.mark.parametrize("row", PAPER_TABLE, ids=lambda row: row["label"])
def test_rule_gives_every_grid_of_the_papers_table(row):
    expected = tuple(map(tuple, row["schedule"]))
    schedule = ScaleSchedule(expected[11])
    assert schedule.grids == expected
    assert schedule.num_tokens == sum(h * w for h, w in expected)


def test_flops_are_the_papers_sums():
    schedule = ScaleSchedule()

    def linear_and_attention(hidden_size):  # two sizes separate the two terms
        return schedule.flops(hidden_size, num_text_tokens=100)

    f1, f2 = linear_and_attention(1), linear_and_attention(2)
    linear = (f2 - 2 * f1) // 2
    assert (linear, f1 - linear) == (122_208, 256_215_912)
    assert schedule.flops(2048, 100, num_layers=3) == 3 * schedule.flops(2048, 100)


def test_offsets_prefix_and_row():
    schedule = ScaleSchedule((8, 32), 8)
    assert schedule.offsets == tuple(itertools.accumulate(schedule.scale_lengths, initial=0))
    prefix = schedule.prefix(3)
    assert prefix.grids == schedule.grids[:3] and prefix.bucket == schedule.bucket
    assert ScaleSchedule.from_grid_shw(schedule.grid_shw) == schedule
    assert len({schedule, ScaleSchedule([8, 32], 8)}) == 1


@pytest.mark.parametrize("bucket", aspect_buckets())
@pytest.mark.parametrize("num_scales", [12, 16, 18])
def test_a_schedule_is_found_by_its_own_size(bucket, num_scales):
    schedule = ScaleSchedule(bucket, num_scales)
    found = ScaleSchedule.from_size(schedule.height, schedule.width)
    assert found.grids[-1] == schedule.grids[-1]
    assert ScaleSchedule.from_size(schedule.height, schedule.width, num_scales=num_scales).num_scales == num_scales


@pytest.mark.parametrize(("side", "num_scales"), [(1024, 18), (512, 16), (256, 12), (128, 8), (16, 1)])
def test_square_sizes_are_the_square_bucket(side, num_scales):
    assert ScaleSchedule.from_size(side, side) == ScaleSchedule((16, 16), num_scales)


def test_illegal_size_names_the_nearest_legal_ones():
    with pytest.raises(ValueError, match=r"nearest legal sizes.*1024 x 1024") as error:
        ScaleSchedule.from_size(1000, 1000)
    assert "num_scales" in str(error.value)
    for height, width in nearest_sizes(1000, 1000):
        assert ScaleSchedule.from_size(height, width).height == height


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bucket": (3, 3)}, r"\(3, 3\) is not one of the 41 aspect buckets; the nearest is"),
        ({"bucket": (0, 16)}, "not one of the 41"),
        ({"bucket": (16,)}, "not one of the 41"),
        ({"stride": 0}, "`stride` must be between 1 and 256"),
        ({"stride": 10**9}, "`stride` must be between 1 and 256"),
        ({"num_scales": 0}, "between 1 and 18"),
        ({"num_scales": 19}, "between 1 and 18"),
        ({"num_scales": 4, "sides": (1, 2, 4)}, "between 1 and 3"),
        ({"num_scales": 1, "sides": ()}, r"must begin with 1 and grow from scale to scale, but got \[\]"),
        ({"num_scales": 1, "sides": (2, 3)}, "must begin with 1"),
        ({"num_scales": 1, "sides": (1, 3, 3)}, "must begin with 1 and grow"),
    ],
)
def test_illegal_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScaleSchedule(**arguments)


@pytest.mark.parametrize(
    "arguments", [{"bucket": (16.9, 16)}, {"num_scales": 7.9}, {"num_scales": "8"}, {"stride": 1.5}, {"sides": "12"}]
)
def test_a_schedule_takes_whole_numbers(arguments):
    with pytest.raises(TypeError, match="must be whole numbers, but got"):
        ScaleSchedule(**arguments)


@pytest.mark.parametrize(("height", "width"), [(0, 16), (-16, 16)])
def test_sizes_must_be_positive(height, width):
    with pytest.raises(ValueError, match="positive"):
        ScaleSchedule.from_size(height, width)


def test_forced_scales_refuse_extreme_aspects_and_prefixes_their_range():
    with pytest.raises(ValueError, match="1:4 to 4:1"):
        ScaleSchedule.from_size(100, 900, num_scales=8)
    with pytest.raises(ValueError, match="1 to 8 scales, not 9"):
        ScaleSchedule(num_scales=8).prefix(9)


def test_nearest_bucket_is_nearest_in_log_aspect():
    assert nearest_bucket(1, 1) == (16, 16)
    assert nearest_bucket(480, 640) == nearest_bucket(3, 4)
    assert nearest_bucket(1, 9) == (8, 32)  # beyond 1:4 there is nothing nearer


def test_needs_no_torch():
    path = Path(sys.modules[ScaleSchedule.__module__].__file__)
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('schedule', {str(path)!r})\n"
        "module = sys.modules['schedule'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert module.ScaleSchedule.from_size(1024, 1024).num_tokens == 10084 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_sides():
    """TokenFlow's: 817 codes at 256 pixels, 561 of them at 224."""
    sides = (1, 2, 4, 6, 8, 10, 12, 14, 16)
    schedule = ScaleSchedule.from_size(256, 256, sides=sides)
    assert schedule == ScaleSchedule(num_scales=9, sides=list(sides)) and hash(schedule) == hash(schedule.prefix(9))
    assert schedule.grids == tuple((side, side) for side in sides) and schedule.num_tokens == 817
    smaller = ScaleSchedule.from_size(224, 224, sides=sides)
    assert smaller == schedule.prefix(8) and smaller.num_tokens == 561
    assert ScaleSchedule.from_grid_shw(smaller.grid_shw, sides=sides) == smaller
    assert schedule != ScaleSchedule(num_scales=9) and "sides=(1, 2, 4" in repr(schedule)
    with pytest.raises(ValueError, match=r"nearest legal sizes.* 64 x 64"):
        ScaleSchedule.from_size(48, 48, sides=sides)  # 3 x 3 cells are the paper's
    with pytest.raises(TypeError, match="must be whole numbers"):
        ScaleSchedule(num_scales=2, sides=(1, 2.5))
