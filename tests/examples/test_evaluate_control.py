"""The scenes, halves and decibels of the control figures, and a run of one part."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import evaluate_control
from tiny_world.judge import judge_scene
from tiny_world.shapes import render


def test_only_what_is_in_the_hole_differs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        source, target, hole = evaluate_control.change_a_thing(rng)
        one, other = render(source), render(target)
        assert (one != other).any(-1)[hole].any() and not (one != other).any(-1)[~hole].any()
        assert judge_scene(other, target).strict and not judge_scene(one, target).correct
        assert source.caption != target.caption


def test_a_thing_is_in_its_half():
    rng = np.random.default_rng(0)
    for _ in range(20):
        source, _, _ = evaluate_control.change_a_thing(rng)
        for thing in source.objects:
            rows, columns = evaluate_control.HALVES[evaluate_control.place_of(thing)]
            assert thing.cy in range(128)[rows] and thing.cx in range(128)[columns]
            assert evaluate_control.stays(render(source), thing)


def test_decibels_are_those_of_the_chosen_pixels():
    one, other = np.zeros((1, 4, 4, 3), np.uint8), np.zeros((1, 4, 4, 3), np.uint8)
    other[0, :2] = 51
    where = np.zeros((1, 4, 4), bool)
    where[0, 0] = True
    assert evaluate_control.psnr(one, other, where) == pytest.approx([20 * np.log10(5)])
    assert evaluate_control.psnr(one, other, ~where | (np.arange(4) > 1)[:, None]) > [20 * np.log10(5)]
    assert evaluate_control.psnr(one, one, where) == pytest.approx([60])


def test_the_words_of_a_thing_are_found():
    thing = evaluate_control.Thing("square", "blue", 0, 0, 40)
    spans = [(0, 1), (1, 6), (6, 10), (10, 13), (13, 18), (0, 0)]
    assert evaluate_control.tokens_of("a blue square left", thing, spans) == [1, 2, 3]
    spans = [(0, 1), (1, 8), (8, 11), (11, 16), (16, 20), (0, 0)]
    assert evaluate_control.tokens_of("a square in blue too", thing, spans) == [1, 2, 3]


def test_a_run(tmp_path, monkeypatch, capsys):
    options = [
        "--parts",
        "inpainting",
        "regions",
        "maps",
        "--number",
        "2",
        "--pictures",
        str(tmp_path),
        "--json",
        str(tmp_path / "f.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate_control.py", *options])
    evaluate_control.main()
    assert "| inpainting, latents | right | 2 |" in capsys.readouterr().out
    assert all((tmp_path / f"{name}.png").is_file() for name in ("regions", "maps"))
    assert (tmp_path / "inpainting.png").is_file() and (tmp_path / "f.json").is_file()
