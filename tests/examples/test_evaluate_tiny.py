"""The evaluation's bookkeeping, and its way through processor and model (with random weights)."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
pytest.importorskip("skimage")

import evaluate_tiny as evaluation
from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor


def plain(value: int, side: int = 8) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def sample(group: str, prompt: str, truth: int) -> evaluation.Sample:
    return evaluation.Sample(group, prompt, plain(truth), lambda image: {"accuracy": bool(image[0, 0, 0] == truth)})


class TestFigures:
    samples = (
        sample("shapes: one", "a", 1),
        sample("shapes: one", "b", 2),
        sample("shapes: two", "c", 3),
        sample("x", "d", 4),
    )

    def test_means_stand_beside_ceiling_and_originals(self):
        generated, reconstructed = [plain(v) for v in (1, 0, 3, 0)], [plain(v) for v in (1, 2, 3, 0)]
        figures = {(f.group, f.name): f for f in evaluation.accuracy_figures(self.samples, generated, reconstructed)}
        one = figures["shapes: one", "accuracy"]
        assert (one.value, one.ceiling, one.drawn, one.n) == (0.5, 1.0, 1.0, 2)
        overall = figures["shapes, overall", "accuracy"]
        assert (overall.value, overall.n) == (0.75, 3), "the mean over kinds, as GenEval has it, not over samples"
        assert figures["x", "accuracy"].value == 0

    def test_without_a_language_model_only_the_ceiling_is_known(self):
        figures = evaluation.accuracy_figures(self.samples, None, [item.truth for item in self.samples])
        assert all(figure.value is None for figure in figures)
        assert all(figure.ceiling == 1 for figure in figures if figure.n)
        table = evaluation.format_table(figures, seed=7)
        assert "| shapes: one | accuracy |  | 1.000 | 1.000 | 2 |" in table and table.endswith("Seed 7.")

    def test_too_few_pictures_are_an_error(self):
        with pytest.raises(ValueError):
            evaluation.accuracy_figures(self.samples, [plain(1)], [item.truth for item in self.samples])


def test_sheet_takes_the_first_of_each_family(tmp_path):
    samples = [
        sample(group, f"{group} {i}", i) for group in ("shapes: one", "emoji, of 100", "words, x") for i in range(20)
    ]
    first = evaluation.first_samples(samples)
    assert first == [*range(8), *range(20, 24), *range(40, 44)]
    evaluation.save_sheet([samples[i] for i in first], [samples[i].truth for i in first], tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width > 4 * 128


def test_same_prompts_every_time_and_all_kinds():
    first, second = (evaluation.shapes_samples(evaluation.QUICK, seed=3) for _ in range(2))
    assert [item.prompt for item in first] == [item.prompt for item in second]
    kinds = len(evaluation.TEST_KINDS)
    assert len({item.group for item in first[:kinds]}) == kinds, "the first samples show every kind"
    assert all(item.judge(item.truth)["strict"] for item in first)


def test_full_size_meets_the_promised_numbers():
    sizes = evaluation.Sizes()
    assert sizes.test * len(evaluation.TEST_KINDS) >= 300 and sizes.heldout * (len(evaluation.TEST_KINDS) - 1) >= 150


def test_pictures_do_not_depend_on_the_batch(tiny_random_checkpoint):
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint).eval()
    prompts = ["a red circle", "two blue stars on a white background", "a heart"]
    together, alone = (evaluation.generate(model, processor, prompts, 5, size, {"image_top_k": 8}) for size in (3, 1))
    assert all(picture.shape == (80, 80, 3) and picture.dtype == np.uint8 for picture in together)
    # The codes are equal; the decoder's sums may round differently in another batch.
    differences = [np.abs(a.astype(int) - b).max() for a, b in zip(together, alone, strict=True)]
    assert max(differences) <= 1
