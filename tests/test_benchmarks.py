"""The benchmarks run, at small sizes.

Apart from this process, for some train: autograd, once used, can't be used in forks.
"""

import json
import math
from pathlib import Path

import pytest

from forks import FRESH
from transformers_nextflow import ScaleSchedule

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak of a process")
def test_fused_loss():
    command = [str(ROOT / "benchmarks" / "fused_loss.py"), "--rows", "16", "--hidden-size", "8"]
    done = FRESH.run([*command, "--vocab-size", "100", "--runs", "1"])
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["naive", "chunked", "fused"]
    assert len({row[-1] for row in rows}) == 1, "all ways give one loss"


@pytest.mark.slow
def test_packing():
    options = ["--samples", "64", "--timed", "4", "--batch-size", "2", "--hidden-size", "64", "--layers", "1"]
    command = [str(ROOT / "benchmarks" / "packing.py"), *options, "--drop-scales", "10", "--ranks", "2"]
    command += ["--runs", "2"]
    done = FRESH.run(command)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["padded", "length", "compute"]
    assert "median of 2 runs" in done.stdout and rows[0][3].split() == ["1.00", "(1.00", "to", "1.00)"]
    imbalance = [float(row[4]) for row in rows]
    assert imbalance[2] < imbalance[1] < imbalance[0]


@pytest.mark.slow
def test_grpo_prefix(tmp_path):
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    sizes = ["--updates", "1", "--pictures", "16", "--hard", "2", "--easy", "2", "--seeds", "0"]
    command = [str(ROOT / "benchmarks" / "grpo_prefix.py"), "--output", str(tmp_path), *sizes]
    command += ["--variants", "prefix, VMR", "--plot", str(tmp_path / "curves.png")]
    done = FRESH.run(command)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows == ["variant", "base", "prefix, VMR", "reconstructions"]
    assert (tmp_path / "curves.png").is_file() and (tmp_path / "prefix_VMR_0" / "sheet.png").is_file()
    # What is there is not done again.
    again = FRESH.run(command)
    assert "seconds" in again.stdout and "'loss'" not in again.stdout


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


# --- positions.py ---


@pytest.mark.parametrize("interleaved", [True, False])
def test_shares_of_variance_are_those_of_the_models_rotation(benchmarks, interleaved):
    """The formula against random queries and keys that the model's own rotary embedding turns."""
    import torch
    from positions import HEAD, SECTION, THETA, variance_share
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    from transformers_nextflow import NextFlowConfig
    from transformers_nextflow.modeling_nextflow import NextFlowModel

    rope = {"rope_type": "default", "rope_theta": THETA, "mrope_section": list(SECTION)}
    sizes = dict(hidden_size=HEAD, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1, num_scales=2)
    tokens = dict(boi_token_id=1, eoi_token_id=2, image_token_id=3, eos_token_id=None, bos_token_id=None)
    vocabulary = dict(text_vocab_size=8, visual_codebook_size=4, vocab_size=12, pad_token_id=0)
    options = {**rope, "mrope_interleaved": interleaved}
    config = NextFlowConfig(**sizes, **tokens, **vocabulary, intermediate_size=8, rope_parameters=options)
    rotary, generator = NextFlowModel(config).rotary_emb, torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 4000, 1, HEAD, generator=generator).transpose(2, 3)
    for axis in range(3):
        for shift in (1.0, 4.0, 64.0):
            logits = []
            for place in (0.0, shift):
                position = torch.zeros(3, 1, 1)
                position[axis] = place
                turned, _ = apply_rotary_pos_emb(query, query, *rotary(query, position))
                logits.append((turned * key).sum(-1).flatten())
            there, here = (logit - logit.mean() for logit in logits)
            share = 1 - float((here * there).mean() / there.square().mean())
            assert share == pytest.approx(variance_share(shift, axis, interleaved), abs=0.02)
    assert variance_share(64.0, 2, False) < 1e-5 < 0.1 < variance_share(64.0, 2, True)


@pytest.mark.slow
def test_positions(tmp_path, benchmarks, capsys):
    pytest.importorskip("scipy")
    import positions

    sizes = ["--pictures", "8", "--steps", "2", "--batch-size", "2", "--seeds", "0", "--work", str(tmp_path)]
    positions.main(["--train", *sizes])
    first = capsys.readouterr().out
    assert first.count("\n| chunks | ") == first.count("\n| in turn | ") == 1
    positions.main(["--train", *sizes])
    assert capsys.readouterr().out == first


# --- speed.py ---


def test_counted_flops_are_those_that_run(benchmarks):
    import measure
    import torch
    from floor import image_costs
    from growth import size_of
    from roofline import draw

    config = measure.make_config(hidden_size=128, num_layers=2, codebook_size=64)
    model, schedule = measure.make_model(config, "cpu", torch.float32), ScaleSchedule(num_scales=5)
    with measure.Breakdown("cpu") as parts:
        draw(model, measure.make_prompt(2, "cpu"), schedule)
    ran = {kind: sum(call.flops for call in parts.calls if call.kind == kind) for kind in ("linear", "attention")}
    costs = image_costs(size_of(config), schedule, guided=True, batch_size=2, itemsize=4)
    assert ran["attention"] == sum(cost.attention for cost in costs)
    # The connector's two layers are not in the cost model; the first scale's logits are made for both branches.
    slots = 4 * (schedule.num_tokens - 1)
    more = 2 * slots * (40 * 128 + 128 * 128) + 2 * 2 * 128 * 64
    assert ran["linear"] == sum(cost.linear + cost.head for cost in costs) + more


def test_the_cost_model_is_the_papers(benchmarks):
    from floor import Size, image_costs

    size = Size(2048, round(2048 * 8 / 3), 1, 16, 16, 1)
    schedule = ScaleSchedule()
    costs = image_costs(size, schedule, guided=False)
    # The paper counts a multiplication and an addition as one operation in linear layers, and runs the 1x1 scale.
    linear, attention = 2 * 12 * (schedule.num_tokens - 1 + 100) * 2048**2, schedule.flops(2048, 100)
    assert sum(cost.linear for cost in costs) == pytest.approx(linear, rel=1e-3)
    in_paper = attention - 12 * (schedule.num_tokens + 100) * 2048**2
    assert sum(cost.attention for cost in costs) == pytest.approx(in_paper, rel=1e-2)


def test_a_floor_is_the_longer_of_flops_and_bytes(benchmarks):
    from floor import Cost, floor_seconds

    costs = [Cost(8, 1, 1, 100), Cost(900, 50, 50, 100)]
    assert floor_seconds(costs, flops=10, bandwidth=10) == 10 + 100


@pytest.mark.parametrize(("batch_size", "num_scales"), [(1, 5), (2, 12), (8, 12)])
def test_a_prediction_counts_all_that_is_in_the_cost_model(benchmarks, batch_size, num_scales):
    import measure
    import torch
    from floor import image_costs
    from growth import size_of
    from predict import Machine

    class Counter(Machine):
        """A machine that does one FLOP a second."""

        _linear = lambda self, slots: 2 * slots * self.size.num_layers * self.size.layer_parameters  # noqa: E731
        _head = lambda self, slots: 2 * slots * self.size.hidden_size * self.size.codebook_size  # noqa: E731
        _attention = lambda self, n, length: 4 * n * length * self.size.hidden_size * self.size.num_layers  # noqa: E731
        _sampling = _overhead = lambda self: 0

    size, schedule = size_of(measure.make_config(128, 2, codebook_size=64)), ScaleSchedule(num_scales=num_scales)
    costs = image_costs(size, schedule, guided=True, batch_size=batch_size)
    counted = Counter(size, "cpu", torch.float32, 1).image(schedule, measure.PROMPT_LENGTH, batch_size)
    # Of the first scale the prediction has one code, the cost model one a prompt.
    assert counted == pytest.approx(sum(cost.flops for cost in costs), rel=1e-3)


def test_a_token_reads_what_a_cache_holds(benchmarks):
    import torch
    import torch.nn.functional as F
    from growth import size_of
    from measure import make_config
    from predict import Machine
    from torch.overrides import TorchFunctionMode

    class Reader(Machine):
        """A machine that reads a number a second."""

        def _median(self, run):
            with Reads() as reads:
                run()
            return reads.numbers

    class Reads(TorchFunctionMode):
        numbers = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            read = {torch.cat: args[0], F.scaled_dot_product_attention: args}.get(func, ())
            self.numbers += sum(value.numel() for value in read)
            return func(*args, **(kwargs or {}))

    size = size_of(make_config(128, 2, codebook_size=64))
    short, long = (Reader(size, "cpu", torch.float32, 1).token(length) for length in (20, 20000))
    # Every layer reads keys and values of both rows twice: to append to them, and to attend.
    assert long - short == 2 * size.num_layers * 2 * 2 * 19980 * size.hidden_size


def test_a_machine_forgets_all_timings(benchmarks):
    import torch
    from growth import size_of
    from measure import make_config
    from predict import Machine

    class Counter(Machine):
        """Counts what it times."""

        timings = 0

        def _median(self, run):
            self.timings += 1
            return 1.0

    machine = Counter(size_of(make_config(128, 1, codebook_size=64)), "cpu", torch.float32, 1)
    counts = []
    for _ in range(2):
        machine.image(ScaleSchedule(num_scales=4), 10)
        machine.token(10)
        counts.append(machine.timings)
    assert counts[0] == counts[1] > 0, "nothing is timed twice"
    machine.forget()
    machine.image(ScaleSchedule(num_scales=4), 10)
    machine.token(10)
    assert machine.timings == 2 * counts[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_add_up_and_what_they_wrap_is_restored(benchmarks, monkeypatch, dtype):
    import measure
    import torch
    from roofline import draw, make_decoding, parts_of, rows_of_parts

    from transformers_nextflow import decoding, sampling
    from transformers_nextflow.scale_cache import ScaleCacheLayer

    dtype = getattr(torch, dtype)
    model = measure.make_model(measure.make_config(128, 1, codebook_size=64), "cpu", dtype)
    schedule, update = ScaleSchedule(num_scales=5), ScaleCacheLayer.update
    ticks = iter(range(10**9))
    monkeypatch.setattr(measure, "clock", lambda: next(ticks))  # a second a look at the clock
    with measure.Parts(parts_of(model), "cpu") as parts:
        whole = measure.seconds(lambda: draw(model, measure.make_prompt(1, "cpu"), schedule), "cpu")
    assert not parts.inside
    assert parts.seconds["upsampling and connector"] == 4
    # 5 forwards: a write takes 3, as a function of its own is inside; the layer 2 around it, norm and embedding 1 each.
    assert parts.seconds["cache writes"] == 5 * 3
    assert parts.seconds["transformer (layers, last norm, rotary embedding)"] == 5 * (2 + 1 + 1)
    assert ScaleCacheLayer.update is update and decoding.draw_codes is sampling.draw_codes
    assert "forward" not in vars(model.model.layers[0]) and "_visual_head" not in vars(model)

    decoded = measure.seconds(make_decoding(schedule, "cpu", dtype), "cpu")
    rows = rows_of_parts("", [(whole, parts)], [decoded])
    assert [row.name.removeprefix(": part: ").split(" (")[0] for row in rows] == [
        "transformer",
        "head and sampling",
        "upsampling and connector",
        "cache writes",
        "Python and all else",
        "image decoding",
    ]
    assert sum(row.ratio for row in rows) == pytest.approx(1)
    assert all(row.ratio > 0 for row in rows)


def test_a_schedule_is_drawn_as_it_is(benchmarks):
    from roofline import draw

    from transformers_nextflow import NextFlowConfig, aspect_buckets

    class Model:
        def generate(self, prompt, height, width, num_scales, **settings):
            size = {"height": height, "width": width, "num_scales": num_scales}
            self.schedule = NextFlowConfig().schedule(**size)

    model = Model()
    for bucket in aspect_buckets():
        for num_scales in (1, 4, 12, 18):
            draw(model, [], ScaleSchedule(bucket, num_scales))
            assert model.schedule == ScaleSchedule(bucket, num_scales)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak of a process")
def test_speed(tmp_path):
    options = [
        "--size",
        "64",
        "--hidden-size",
        "128",
        "--num-layers",
        "1",
        "--repeats",
        "1",
        "--clock",
        "cpu",
        "--device",
        "cpu",
    ]
    parts = ["floor", "roofline", "growth", "peers", "memory", "tokenizer", "start", "training"]
    command = [
        str(ROOT / "benchmarks" / "speed.py"),
        *parts,
        *options,
        "--json",
        str(tmp_path / "rows"),
        "--markdown",
        str(tmp_path / "table"),
    ]
    done = FRESH.run(command)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows").read_text())["rows"]
    assert {row["part"] for row in rows} == set(parts)
    assert done.stdout.count("\n| ") == len(rows) + 1
    assert (tmp_path / "table").read_text() == done.stdout
    for part in ("growth", "peers"):
        assert all(row["ratio"] > 0 for row in rows if row["part"] == part and row["target"]), part
    assert all(math.isfinite(row["ratio"]) for row in rows)
    names = [row["name"] for row in rows]
    assert sum("41 aspect buckets" in name for name in names) == 1
    assert all("predicted, " in row["beside"] for row in rows if row["part"] == "growth"), "and by FLOPs"
    assert sum("MMDiT, 28 steps" in name and "derived" in name for name in names) == 1
    for dtype in ("float32", "bfloat16"):
        parts_of_run = [row["ratio"] for row in rows if ": part: " in row["name"] and row["dtype"] == dtype]
        assert len(parts_of_run) == 6 and sum(parts_of_run) == pytest.approx(1)
    shares = {row["dtype"]: row["ratio"] for row in rows if row["name"].endswith("the rest")}
    assert shares.keys() == {"float32", "bfloat16"}, "a roofline in each dtype"
    assert all(0 < share < 1 for share in shares.values())


@pytest.mark.slow
def test_encoding():
    command = [str(ROOT / "benchmarks" / "encoding.py"), "--rows", "4", "--num-scales", "4"]
    done = FRESH.run([*command, "--repeats", "1", "--device", "cpu"])
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["one at a time", "in order", "by shape"]
    assert "100.00% of the codes are the same" in done.stdout


def test_plain_tokenflow(benchmarks, capsys):
    """Both ways draw the same, and the slots are those of the description: 9 steps of two prompts of 131 tokens."""
    from plain_tokenflow import main

    main(["--hidden-size", "32", "--num-layers", "1", "--repeats", "1", "--passes", "1"])
    (row,) = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| 1 |")]
    ends = [sum(side**2 for side in (1, 2, 4, 6, 8, 10, 12, 14, 16)[: s + 1]) for s in range(9)]
    assert int(row[4]) == 2 * sum(131 + end - 1 for end in ends) and int(row[5]) == 2 * (131 + 816)
    assert row[7].strip() == "100.0%"
