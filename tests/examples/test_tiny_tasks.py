"""The tasks of the tiny world: their own answers pass their judges, and other answers don't."""

import sys
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
pytest.importorskip("scipy", reason="the judge needs the [tiny] extra")

from tiny_world.shapes import HELD_OUT_COLOURS, HELD_OUT_SHAPES, SHAPES
from tiny_world.tasks import (
    EDITS,
    LOOK_FIRST,
    QUESTIONS,
    TASKS,
    THOUGHTS,
    attributes,
    sample_edit,
    sample_look,
    sample_question,
    sample_reading,
    sample_thought,
)


def answer(sample):
    """The answer of a sample's last message, in the form that its judge takes."""
    parts = sample.messages[-1]["content"]
    pictures = [part["image"] for part in parts if part["type"] == "image"]
    if sample.task == "story":
        return pictures
    return pictures[0] if pictures else parts[0]["text"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_true_answer_passes_and_another_samples_does_not(task, split):
    rng = np.random.default_rng(0)
    samples = [TASKS[task](rng, split) for _ in range(12)]
    verdicts = [all(sample.judge(answer(sample)).values()) for sample in samples]
    assert np.mean(verdicts) >= 0.95
    others = [all(a.judge(answer(b)).values()) for a, b in pairwise(samples)]
    assert np.mean(others) <= 0.5  # "above" answers two different questions


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_changes_one_place_and_the_source_does_not_pass(kind):
    rng = np.random.default_rng(1)
    for _ in range(5):
        sample = sample_edit(rng, "test", kind)
        source, target = sample.messages[0]["content"][0]["image"], answer(sample)
        assert np.array_equal(source[sample.untouched], target[sample.untouched])
        assert not np.array_equal(source, target)
        assert not sample.judge(source)["accuracy"]


def test_train_and_test_share_no_target():
    def targets(split):
        rng = np.random.default_rng(2)
        return {sample_edit(rng, split, "recolour").messages[-1]["content"][0]["image"].tobytes() for _ in range(40)}

    assert not targets("train") & targets("test")


def test_a_picture_of_many_things_has_one_answer_to_each_question():
    rng = np.random.default_rng(4)
    for _ in range(40):
        messages = sample_look(rng).messages
        texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        asked = texts[::2]
        assert len(set(asked)) == len(asked)  # no question twice, so no two answers to one
        answers = dict(zip(asked, texts[1::2], strict=True))
        for question, answer in answers.items():
            place = question.removeprefix("What is ").removesuffix("?")
            if place.startswith(("on ", "at ")):  # the thing that stands there is said to stand there
                assert answers.get(f"Where is the {answer.split()[-1]}?", place) == place


@pytest.mark.parametrize("sample, kinds", [(sample_question, QUESTIONS), (sample_thought, THOUGHTS)])
def test_every_kind_can_be_asked_for(sample, kinds):
    assert {sample(np.random.default_rng(3), "train", kind).task.split(": ")[1] for kind in kinds} == set(kinds)


def test_looking_first_says_what_there_is_and_then_what_the_question_alone_asks_for():
    for seed in range(30):
        plain, looking = (
            sample_question(np.random.default_rng(seed), "test", look_first=look) for look in (False, True)
        )
        asked, asked_to_look = (sample.messages[0]["content"][1]["text"] for sample in (plain, looking))
        assert asked_to_look == asked + LOOK_FIRST
        seen, told = answer(looking).split(": ")
        assert told.split()[-1] == answer(plain) and looking.judge(answer(looking))["right"]
        if "position" in looking.task:  # the list says the same of the thing as the answer
            assert told.removeprefix("the ") in seen


def test_texts_without_a_picture_name_no_held_out_pair():
    rng = np.random.default_rng(5)
    for _ in range(200):
        text = sample_reading(rng).messages[0]["content"][0]["text"]
        words = text.partition(". ")[0].replace(",", "").split()
        shapes = [word for word in words if word in SHAPES]
        assert not {(shape, words[words.index(shape) - 1]) for shape in shapes} & HELD_OUT_COLOURS
        assert not {frozenset(pair) for pair in combinations(shapes, 2)} & HELD_OUT_SHAPES


def test_attributes_ignore_articles_and_plurals_only():
    assert attributes("Two red crosses.") == attributes("two red cross")
    assert attributes("a red cross above a ring") != attributes("a ring above a red cross")
