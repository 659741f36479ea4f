"""The measures of the diffusion decoder: distances whose value is known, and the same pictures at twice the size."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from evaluate_diffusion_decoder import Row, format_table, frechet_distance, gradient_energy
from tiny_world.shapes import render, sample_scene
from tiny_world.words import render_word, sample_word


def test_frechet_distance_of_known_distributions():
    rng = np.random.default_rng(0)
    one = rng.normal(size=(20_000, 3))
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, one + np.array([1, 2, 0])) == pytest.approx(5)  # the squared distance of the means
    assert frechet_distance(one, 3 * one) == pytest.approx(12, rel=0.05)  # three times (3 - 1) squared
    other = one @ rng.normal(size=(3, 3))
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one))


def test_gradient_energy_falls_with_blur():
    sharp = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    soft = np.asarray(Image.fromarray(sharp).resize((16, 16), Image.Resampling.BOX).resize((32, 32)))
    assert gradient_energy([np.zeros_like(sharp)]) == 0
    assert gradient_energy([soft]) < 0.5 * gradient_energy([sharp])
    stripes = np.zeros((4, 4, 3), np.uint8)
    stripes[:, 1::2] = 255
    assert gradient_energy([stripes]) == pytest.approx(4)  # from -1 to 1 across, nothing along


def test_twice_the_size_is_the_same_picture():
    pairs = []
    for seed in range(4):
        scene = sample_scene(np.random.default_rng(seed))
        pairs.append((render(scene), render(scene, 2)))
        word = sample_word(np.random.default_rng(seed))
        pairs.append((render_word(word), render_word(word, 2)))
    for small, large in pairs:
        assert large.shape == (256, 256, 3)
        halved = np.asarray(Image.fromarray(large).resize((128, 128), Image.Resampling.BOX), int)
        assert np.abs(halved - small).mean() < 4


def test_a_table_has_both_decoders():
    table = format_table([Row("true codes: SSIM", 200, 0.9, 0.8), Row("peak memory", 1, None, 512.0)])
    assert "| true codes: SSIM | 0.900 | 0.800 | 200 |" in table and "| peak memory |  | 512.0 | 1 |" in table
