"""The world of nextflow-tiny: deterministic, splits apart, captions true, judges right on what was drawn."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
pytest.importorskip("scipy")

from tiny_world import emoji, shapes, words
from tiny_world.fetch import NpmPackage, fetch
from tiny_world.judge import detect, judge_scene

SIDE = shapes.SIDE


def scenes(split, number, kind=None, seed=0):
    rng = np.random.default_rng(seed)
    return [shapes.sample_scene(rng, split, kind) for _ in range(number)]


class TestShapes:
    def test_same_seed_same_scenes_and_pixels(self):
        first, second = scenes("train", 20), scenes("train", 20)
        assert first == second
        assert all(np.array_equal(shapes.render(a), shapes.render(b)) for a, b in zip(first, second, strict=True))
        assert shapes.render(first[0]).shape == (SIDE, SIDE, 3) and shapes.render(first[0]).dtype == np.uint8

    def test_training_never_shows_what_is_held_out(self):
        train = scenes("train", 2000)
        assert not any(scene.held_out or scene.for_testing for scene in train)
        assert {scene.kind for scene in train} == set(shapes.KINDS)
        assert not {scene.caption for scene in train} & {scene.caption for scene in scenes("test", 500)}

    @pytest.mark.parametrize("split", shapes.SPLITS)
    def test_splits_hold_what_they_promise(self, split):
        for scene in scenes(split, 100):
            assert scene.held_out == (split == "heldout")
            assert scene.for_testing == (split in ("test", "hard")) or split == "heldout"
            assert (scene.kind == "free") == (split == "hard") or split == "train"

    def test_every_shape_and_colour_is_held_out_once_and_no_default_is(self):
        held_out_shapes, held_out_colours = zip(*shapes.HELD_OUT_COLOURS, strict=True)
        assert sorted(held_out_shapes) == sorted(shapes.SHAPES) and sorted(held_out_colours) == sorted(shapes.COLOURS)
        assert not shapes.HELD_OUT_COLOURS & set(shapes.DEFAULT_COLOURS.items())

    def test_captions_agree_with_scenes(self):
        for scene in scenes("train", 500):
            assert all(thing.shape in scene.caption for thing in scene.objects)
            named = [thing.colour for thing in scene.objects if thing.colour in scene.caption]
            unnamed = [thing for thing in scene.objects if thing.colour not in scene.caption]
            assert len(named) + len(unnamed) == len(scene.objects)
            assert all(shapes.DEFAULT_COLOURS[thing.shape] == thing.colour for thing in unnamed)
            assert scene.background == "white" or f"on {shapes.article(scene.background)} background" in scene.caption
            if scene.kind == "count":
                assert shapes.NUMBERS[len(scene.objects)] in scene.caption

    def test_free_layouts_lean_but_leave_every_quarter_open(self):
        quarters = np.zeros((2, 4))
        for scene in scenes("hard", 300):
            for index, thing in enumerate(scene.objects):
                quarters[index, 2 * (thing.cy > 64) + (thing.cx > 64)] += 1 / 300
        assert quarters.min() > 0.03 and quarters[0, 0] > 0.5 and quarters[1, 3] > 0.5
        assert (quarters.argmax(1) == [0, 3]).all()

    @pytest.mark.parametrize(
        "relation, axis, sign", [("left of", "cx", -1), ("right of", "cx", 1), ("above", "cy", -1), ("below", "cy", 1)]
    )
    def test_relations_place_the_first_object(self, relation, axis, sign):
        found = [scene for scene in scenes("train", 200, "position") if scene.relation.endswith(relation)]
        assert found
        for scene in found:
            first, second = scene.objects
            assert np.sign(getattr(first, axis) - getattr(second, axis)) == sign

    def test_objects_stay_inside_and_apart(self):
        for scene in scenes("train", 500):
            boxes = [
                (o.cx - o.size / 2, o.cy - o.size / 2, o.cx + o.size / 2, o.cy + o.size / 2) for o in scene.objects
            ]
            assert all(min(box) >= 0 and max(box) <= SIDE for box in boxes)
            assert all(thing.size >= SIDE / 5 for thing in scene.objects)

    def test_errors_name_what_is_legal(self):
        rng = np.random.default_rng(0)
        with pytest.raises(ValueError, match="'train', 'test', 'heldout', 'hard'"):
            shapes.sample_scene(rng, "validation")
        with pytest.raises(ValueError, match="single"):
            shapes.sample_scene(rng, kind="three")
        with pytest.raises(ValueError, match="take another kind"):
            shapes.sample_scene(rng, "heldout", "single")


class TestJudge:
    def test_finds_what_was_drawn(self):
        drawn = [*scenes("test", 120, seed=1), *scenes("heldout", 40, seed=2), *scenes("hard", 40, seed=3)]
        verdicts = [judge_scene(shapes.render(scene), scene) for scene in drawn]
        assert np.mean([verdict.correct for verdict in verdicts]) >= 0.99
        assert np.mean([verdict.strict for verdict in verdicts]) >= 0.99

    def test_bears_what_a_tokenizer_loses(self):
        rng, verdicts = np.random.default_rng(0), []
        for scene in scenes("test", 60, seed=4):
            small = Image.fromarray(shapes.render(scene)).resize((56, 56), Image.Resampling.BICUBIC)
            pixels = np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) + rng.normal(
                0, 6, (SIDE, SIDE, 3)
            )
            verdicts.append(judge_scene(np.clip(pixels, 0, 255).astype(np.uint8), scene).correct)
        assert np.mean(verdicts) >= 0.97

    def test_refuses_another_scene(self):
        drawn = scenes("test", 60, seed=5)
        wrong = [
            (picture, scene)
            for picture, scene in pairwise(drawn)
            if {(o.shape, o.colour) for o in picture.objects} != {(o.shape, o.colour) for o in scene.objects}
        ]
        strict = [judge_scene(shapes.render(picture), scene).strict for picture, scene in wrong]
        assert len(strict) > 40 and not any(strict)

    def test_counts_exactly(self):
        three = next(scene for scene in scenes("train", 200, "count") if len(scene.objects) == 3)
        two = shapes.Scene(three.caption, "count", three.objects[:2], three.background)
        assert judge_scene(shapes.render(three), three).correct
        assert not judge_scene(shapes.render(two), three).correct
        assert not judge_scene(shapes.render(three), two).correct

    def test_sees_swapped_places(self):
        scene = next(scene for scene in scenes("train", 50, "position") if scene.relation == "left of")
        swapped = shapes.Scene(scene.caption, "position", scene.objects, scene.background, "right of")
        assert judge_scene(shapes.render(scene), scene).correct
        assert not judge_scene(shapes.render(scene), swapped).correct

    def test_correct_is_genevals_rule(self):
        """Colour over the surest `count` of a shape, and every pair in its place; a size word comes on top."""
        drawn = [*scenes("train", 30, "position", seed=6), *scenes("train", 20, "count", seed=7)]
        for picture, scene in [*zip(drawn, drawn, strict=True), *pairwise(drawn)]:
            verdict = judge_scene(shapes.render(picture), scene)
            surest = sorted(verdict.detections, key=lambda found: -found.iou)
            right = True
            for shape in {thing.shape for thing in scene.objects}:
                wanted = [thing.colour for thing in scene.objects if thing.shape == shape]
                found = [seen.colour for seen in surest if seen.shape == shape]
                exact = scene.kind != "count" or len(found) == len(wanted)
                right = right and exact and found[: len(wanted)] == wanted
            if right and scene.relation:
                one, two = (next(s for s in surest if s.shape == thing.shape) for thing in scene.objects)
                x, y = one.centre - two.centre
                way = scene.relation.removeprefix("to the ").split()[0]
                right = {"left": x < -30, "right": x > 30, "above": y < -30, "below": y > 30}[way]
            assert verdict.correct == right
        three = next(scene for scene in drawn if len(scene.objects) == 3)
        other = replace(three.objects[0], colour="black" if three.objects[0].colour != "black" else "red")
        pixels = shapes.render(replace(three, objects=(other, *three.objects[1:])))
        assert not judge_scene(pixels, three).correct

    def test_sees_nothing_on_plain_paper_and_no_shape_in_noise(self):
        assert detect(np.full((SIDE, SIDE, 3), 255, np.uint8)) == []
        noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
        assert all(found.shape == "unknown" for found in detect(noise))


class TestWords:
    def test_same_seed_same_word_inside_the_picture(self):
        pytest.importorskip("matplotlib")
        for seed in range(20):
            lettering = words.sample_word(np.random.default_rng(seed))
            assert lettering == words.sample_word(np.random.default_rng(seed))
            image = words.render_word(lettering)
            assert image.shape == (SIDE, SIDE, 3) and image.dtype == np.uint8
            paper = shapes.BACKGROUNDS[lettering.background]
            frame = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
            assert (frame == paper).all(), "the letters touch the border"
            assert f'"{lettering.word}"' in lettering.caption and lettering.colour in lettering.caption

    def test_held_out_words_are_apart(self):
        assert not set(words.TRAIN_WORDS) & set(words.HELD_OUT_WORDS)
        assert all(2 <= len(word) <= 6 and word.isalpha() and word.isupper() for word in words.TRAIN_WORDS)
        assert all(2 <= len(word) <= 6 and word.isalpha() and word.isupper() for word in words.HELD_OUT_WORDS)
        rng = np.random.default_rng(0)
        assert {words.sample_word(rng, "heldout").word for _ in range(50)} <= set(words.HELD_OUT_WORDS)


class TestEmoji:
    @pytest.fixture
    def two(self):
        discs = np.zeros((2, SIDE, SIDE, 4), np.uint8)
        discs[0, 32:96, 32:96], discs[1, 40:80, 40:80] = (200, 0, 0, 255), (0, 0, 200, 255)
        return emoji.EmojiSet(("red disc", "blue discs"), discs)

    def test_same_seed_same_picture(self, two):
        first, second = (emoji.sample_emoji(np.random.default_rng(3), two) for _ in range(2))
        assert first[0] == second[0] and np.array_equal(first[1], second[1])
        assert first[2] in first[0] and "emoji" in first[0]

    def test_composition_keeps_colour_and_paper(self, two):
        picture = emoji.compose(two.pictures[0], "mint", 120, (2, -2))
        assert tuple(picture[0, 0]) == shapes.BACKGROUNDS["mint"]
        assert tuple(picture[64, 64]) == (200, 0, 0)

    def test_named_backgrounds_of_the_test_split_are_new(self, two):
        rng = np.random.default_rng(0)
        splits = {
            split: {(c.split(" on ")[1], n) for c, _, n in drawn if " on " in c and "white" not in c}
            for split in ("train", "test")
            for drawn in [[emoji.sample_emoji(rng, two, split) for _ in range(200)]]
        }
        assert not splits["train"] & splits["test"]


def test_a_wrong_archive_is_refused(tmp_path):
    package = NpmPackage("@scope/some-package", "1.0.0", "0" * 64)
    assert package.archive == "scope-some-package-1.0.0.tgz"
    (tmp_path / package.archive).write_bytes(b"not the archive")
    with pytest.raises(RuntimeError, match="delete it and fetch again"):
        fetch(package, tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in shapes.KINDS])
def test_the_layout_reward_is_one_for_true_pictures_and_less_for_others(kind):
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from grpo_prefix import layout_reward

    from tiny_world.detector import scene_metadata

    found = scenes("train", 12, kind)
    pictures, metadata = [shapes.render(scene) for scene in found], [scene_metadata(scene) for scene in found]
    assert np.mean(layout_reward(pictures, metadata)) > 0.95
    assert np.mean(layout_reward(pictures[1:] + pictures[:1], metadata)) < 0.4
