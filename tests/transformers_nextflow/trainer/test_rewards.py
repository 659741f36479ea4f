"""Rewards: OCR, GenEval's rule, CLIP-like models, adapters, remote ones."""

import json
import math
import random
import threading
from collections import Counter
from functools import partial
from itertools import product

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from transformers_nextflow.trainer import (
    DetectedObject,
    RewardOutput,
    Word,
    detector_reward,
    image_text_reward,
    ocr_reward,
    remote_reward,
    scored_reward,
)
from transformers_nextflow.trainer.rewards import edit_distance, text_score

PICTURES = [Image.new("RGB", (80, 80), colour) for colour in ("red", "green", "blue")]


def box(cx, cy, side=20):
    return (cx - side / 2, cy - side / 2, cx + side / 2, cy + side / 2)


# --- Text ---


def test_text_score_is_completeness_plus_similarity_minus_penalty():
    assert text_score("Moon", [Word("moon", 0.9)]) == pytest.approx(0.9 + 0.9)
    assert text_score("moon", []) == pytest.approx(-0.6)
    # "noon": nothing complete, 3 of 4 letters alike; m is missing, n is too many: the larger of one and one, of eight.
    assert text_score("moon", [Word("NOON", 0.8)]) == pytest.approx(0.75 * 0.8 - 0.6 * 1 / 8)
    # Two words, one of them read twice with different confidence, one not at all. Of "openlate" l, a and t are missing;
    # of "opennowopen" o, o, p, n, n and w are too many: six of nineteen.
    read = [Word("open now", 0.8), Word("open", 0.6)]
    expected = (0.6 + 0) / 2 + (0.8 + (1 - edit_distance("late", "open") / 4) * 0.8) / 2
    assert text_score("open late", read) == pytest.approx(expected - 0.6 * 6 / 19)
    with pytest.raises(ValueError, match="no word to be drawn"):
        text_score("  ", [])


def test_edit_distance():
    assert [edit_distance(*pair) for pair in (("", "ab"), ("kitten", "sitting"), ("abc", "abc"))] == [2, 3, 0]


def test_boxes_of_words_are_the_mask():
    corners = [(10, 20), (30, 20), (30, 40), (10, 40)]

    def reader(image):
        return [Word("HI", 1.0, corners)] if image is PICTURES[0] else []

    rewards, masks = ocr_reward(PICTURES[:2], ["hi", "hi"], reader=reader)
    assert rewards == pytest.approx([2.0, -0.6])
    assert masks[0][30, 20] and not masks[0][50, 20] and masks[0].sum() == 21 * 21
    assert masks[1] is None
    assert ocr_reward(PICTURES[:1], ["hi"], reader=reader, return_masks=False) == [2.0]


def test_rapidocr_reads():
    pytest.importorskip("rapidocr")
    matplotlib = pytest.importorskip("matplotlib")
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf", 36)
    picture = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(picture).text((10, 44), "MOON", fill="black", font=font)
    rewards, masks = ocr_reward([picture, Image.new("RGB", (128, 128), "white")], ["moon", "moon"])
    assert rewards[0] > 1.5 and rewards[1] < 0
    assert masks[0][64, 64] and not masks[0][10, 64]


# --- Objects ---


def judge(found, include, exclude=None, **options):
    metadata = {"include": include, "exclude": exclude}
    (reward,) = detector_reward(PICTURES[:1], [metadata], detector=lambda image: found, **options)
    assert detector_reward(PICTURES[:1], [json.dumps(metadata)], detector=lambda image: found, **options) == [reward]
    return reward


RED_CIRCLE = DetectedObject("circle", box(20, 40), "red")
BLUE_SQUARE = DetectedObject("square", box(60, 40), "blue")


def test_genevals_rule():
    circle, square = {"class": "circle", "count": 1}, {"class": "square", "count": 1}
    assert judge([RED_CIRCLE], [circle]) == 1
    assert judge([RED_CIRCLE], [circle, square]) == 0
    assert judge([RED_CIRCLE, BLUE_SQUARE], [circle, square]) == 1
    assert judge([RED_CIRCLE], [{**circle, "color": "blue"}]) == 0
    assert judge([RED_CIRCLE], [{**circle, "count": 2}]) == 0
    three = [RED_CIRCLE] * 3
    assert judge(three, [{**circle, "count": 2}]) == 1
    assert judge(three, [{**circle, "count": 2}], [{"class": "circle", "count": 3}]) == 0
    for relation, holds in (("left of", 1), ("right of", 0), ("above", 0), ("below", 0)):
        assert judge([RED_CIRCLE, BLUE_SQUARE], [square, {**circle, "position": [relation, 0]}]) == holds


def slow_geneval(found, include, exclude):
    """GenEval's verdict, written from what its evaluation does, object by object."""

    def relations(one, two):
        offsets, shrunk = [], []
        for axis in (0, 1):
            middles = [(b[axis] + b[axis + 2]) / 2 for b in (one.box, two.box)]
            widths = [abs(b[axis + 2] - b[axis]) for b in (one.box, two.box)]
            offsets.append(middles[0] - middles[1])
            shrunk.append(max(abs(offsets[-1]) - 0.1 * sum(widths), 0) * (1 if offsets[-1] > 0 else -1))
        if all(abs(value) < 1e-3 for value in shrunk):
            return set()
        x, y = (value / math.hypot(*offsets) for value in shrunk)
        names = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
        return {name for name, holds in names.items() if holds}

    right, matched = True, []
    for entry in include:
        things, number = [], entry.get("count", 1)
        for thing in found:
            if thing.name == entry["class"] and len(things) < number:
                things.append(thing)
        holds = len(things) == number
        if holds and "color" in entry:
            holds = all(thing.colour == entry["color"] for thing in things)
        if holds and "position" in entry:
            relation, other = entry["position"]
            holds = matched[other] is not None
            for one in things:
                for two in matched[other] or ():
                    holds = holds and relation in relations(one, two)
        matched.append(things if holds else None)
        right = right and holds
    for entry in exclude:
        if len([thing for thing in found if thing.name == entry["class"]]) >= entry["count"]:
            right = False
    return right


def test_genevals_rule_on_random_scenes():
    rng, verdicts = random.Random(0), []
    names, colours = ("circle", "square"), ("red", "blue")
    for _ in range(4000):
        size = rng.choice((4, 40, 160))  # from boxes that hardly overlap to boxes that mostly do
        found = []
        for _ in range(rng.randint(0, 7)):
            x, y = rng.randrange(0, 200, 10), rng.randrange(0, 200, 10)
            corners = (x, y, x + rng.randint(0, size), y + rng.randint(0, size))
            found.append(DetectedObject(rng.choice(names), corners, rng.choice(colours)))
        include = []
        for index in range(rng.choice((1, 2, 2, 3))):
            entry = {"class": names[index % 2], "count": rng.choice((1, 1, 1, 1, 2))}
            if rng.random() < 0.3:
                entry["color"] = rng.choice(colours)
            if index and rng.random() < 0.7:
                entry["position"] = [rng.choice(("left of", "right of", "above", "below")), rng.randrange(index)]
            include.append(entry)
        exclude = [{"class": rng.choice(names), "count": rng.randint(1, 3)}] if rng.random() < 0.2 else []
        wanted = slow_geneval(found, include, exclude)
        assert judge(found, include, exclude) == wanted, (found, include, exclude)
        placed = any("position" in entry for entry in include)
        verdicts.append((wanted, placed))
    counts = Counter(verdicts)
    assert all(counts[key] > 100 for key in product((False, True), repeat=2)), counts


def test_the_first_ones_decide():
    """What is surest counts: a second object does not save a wrong first one, and every pair must stand right."""
    blue, red = RED_CIRCLE._replace(colour="blue"), RED_CIRCLE
    wanted = [{"class": "circle", "count": 1, "color": "red"}]
    assert judge([red, blue], wanted) == 1 and judge([blue, red], wanted) == 0
    pair = [{"class": "square", "count": 1}, {"class": "circle", "count": 2, "position": ["left of", 0]}]
    other = RED_CIRCLE._replace(box=box(100, 40))
    assert judge([red, red, BLUE_SQUARE], pair) == 1 and judge([red, other, BLUE_SQUARE], pair) == 0
    # A margin is taken off before the offset is measured against its whole length: slanted places are neither.
    slanted = [RED_CIRCLE._replace(box=box(0, 0)), BLUE_SQUARE._replace(box=box(22, 30))]
    assert judge(slanted, [{"class": "square"}, {"class": "circle", "position": ["left of", 0]}]) == 0
    # The other entry must hold itself.
    green = [{"class": "square", "color": "green"}, {"class": "circle", "position": ["left of", 0]}]
    assert judge([red, BLUE_SQUARE], green, partial_credit=True) == pytest.approx((1 + 0 + 1 + 0) / 4)


def test_partial_credit_is_the_share_of_what_holds():
    wanted = [{"class": "circle", "count": 1, "color": "red"}, {"class": "square", "count": 2, "color": "green"}]
    score = partial(judge, include=wanted, partial_credit=True)
    assert score([]) == 0
    assert score([RED_CIRCLE]) == 0.5
    assert score([RED_CIRCLE, BLUE_SQUARE]) == pytest.approx((1 + 1 + 0.5 + 0) / 4)


def test_bad_metadata_is_explained():
    with pytest.raises(ValueError, match="`include` must be a list of at least one"):
        judge([], [])
    with pytest.raises(ValueError, match="A position must be one of"):
        judge([RED_CIRCLE], [{"class": "circle", "position": ["inside", 0]}])
    for other in (0, 1, -1):  # itself, one that comes later, none
        with pytest.raises(ValueError, match="number of an entry before its own"):
            judge([RED_CIRCLE], [{"class": "circle", "position": ["left of", other]}, {"class": "square"}])
    for entry in ({"count": 1}, {"class": "circle", "count": 0}, {"class": "circle", "count": "two"}):
        with pytest.raises(ValueError, match="names a `class` and a `count` of at least 1"):
            judge([RED_CIRCLE], [entry])


# --- Other judges ---


class FakeClip:
    """As transformers' CLIP: the embedding of a picture is its mean colour, of a text its place in a list."""

    device = torch.device("cpu")

    def eval(self):
        return self

    def __call__(self, image_embeds, text_embeds):
        return type("Output", (), {"image_embeds": image_embeds, "text_embeds": text_embeds})


class FakeProcessor:
    def __call__(self, text, images, return_tensors, **settings):
        import numpy as np
        from transformers import BatchFeature

        embeds = torch.stack([torch.tensor(np.asarray(image).mean((0, 1))).float() for image in images])
        words = torch.eye(3)[[("red", "green", "blue").index(word) for word in text]]
        return BatchFeature({"image_embeds": embeds, "text_embeds": words})


def test_image_text_reward():
    reward = partial(image_text_reward, model=FakeClip(), processor=FakeProcessor())
    assert reward(PICTURES, ["red", "green", "red"]) == pytest.approx([1, 1, 0])
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "blue"}]}]
    assert reward(PICTURES[2:], [conversation]) == pytest.approx([1])
    assert reward(PICTURES, ["?"] * 3, caption=["green", "green", "blue"]) == pytest.approx([0, 1, 1])


def test_image_text_reward_with_a_real_clip():
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.configuration_clip import CLIPTextConfig, CLIPVisionConfig

    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = CLIPTextConfig(vocab_size=20, max_position_embeddings=8, eos_token_id=2, **small)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **small)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).eval()

    class Processor:
        def __call__(self, text, images, return_tensors, padding, truncation):
            from transformers import BatchFeature

            ids = torch.tensor([[1, 3 + len(word), 2] for word in text])
            pixels = torch.stack([torch.full((3, 8, 8), image.getpixel((0, 0))[0] / 255) for image in images])
            return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels})

    rewards = image_text_reward(PICTURES, ["red", "green", "blue"], model=model, processor=Processor())
    inputs = Processor()(["red", "green", "blue"], PICTURES, "pt", True, True)
    with torch.no_grad():
        logits = model(**inputs).logits_per_image / model.logit_scale.exp()
    assert rewards == pytest.approx(logits.diagonal().tolist(), abs=1e-5)


def test_functions_of_diffusion_code_fit():
    logged = {}

    def score(images, prompts, metadata):
        return torch.arange(len(images)).float(), {"sharpness": [1.0, 2.0, 6.0], "note": metadata[1]["word"]}

    rewards = scored_reward(
        PICTURES, ["a", "b", "c"], function=score, log_metric=logged.__setitem__, word=["x", "y", "z"], other=None
    )
    assert rewards == [0, 1, 2] and logged == {"sharpness": 3.0}


def test_remote_rewards_are_asked_at_once_and_in_order():
    busy, most, lock = [0], [0], threading.Lock()
    three = threading.Barrier(3)  # which three calls at once pass, and fewer never

    def ask(image, prompt, word):
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        three.wait(600)
        with lock:
            busy[0] -= 1
        return float(prompt) + len(word)

    prompts = [str(index) for index in range(6)]
    rewards = remote_reward(PICTURES * 2, prompts, function=ask, max_concurrency=3, word=["w" * i for i in range(6)])
    assert rewards == [0, 2, 4, 6, 8, 10] and most[0] == 3


def test_remote_failures_are_named():
    released, left = threading.Event(), threading.Event()

    def ask(image, prompt):
        if prompt == "slow":
            released.wait()
            left.set()
        if prompt == "bad":
            raise ConnectionError("refused")
        return 1.0

    with pytest.raises(RuntimeError, match=r"Sample 1 \('bad'\): ConnectionError: refused"):
        remote_reward(PICTURES[:2], ["good", "bad"], function=ask)
    with pytest.raises(TimeoutError, match=r"Sample 0 \('slow'\): no reward within 0.1 seconds"):
        remote_reward(PICTURES[:1], ["slow"], function=ask, timeout=0.1)
    assert not left.is_set(), "nobody waits for what hangs"
    released.set()


def test_rewards_with_masks_are_pairs():
    assert RewardOutput([1.0], [None]).masks == [None]
