"""Rewards: OCR, GenEval's rule, CLIP-like models, adapters, remote ones."""

import json
import threading
from functools import partial

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
    # "noon": nothing complete, 3 of 4 letters alike, one letter missing and one too many among eight.
    assert text_score("moon", [Word("NOON", 0.8)]) == pytest.approx(0.75 * 0.8 - 0.6 * 2 / 8)
    # Two words, one of them read twice with different confidence, one not at all.
    read = [Word("open now", 0.8), Word("open", 0.6)]
    expected = (0.6 + 0) / 2 + (0.8 + (1 - edit_distance("late", "open") / 4) * 0.8) / 2
    letters = abs(len("opennowopen") - len("openlate"))
    assert text_score("open late", read) == pytest.approx(expected - 0.6 * (4 + 3 + 4 + 0 - 0) / 19, abs=0.2)
    assert letters == 3
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
