"""Rewards for pictures. Each is a function as TRL's trainers take them; `functools.partial` binds its options:

    reward_funcs=[ocr_reward, partial(image_text_reward, model=clip, processor=clip_processor)]

They get `images` (PIL, one per sample), `prompts` and the columns of the data set, one entry per sample.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from .reward_call import CallTimeout, RewardOutput, call_with_timeout

POSITIONS = ("left of", "right of", "above", "below")


class Word(NamedTuple):
    """A word that was read in a picture: confidence in [0, 1], and the corners of its box, `(x, y)` in pixels."""

    text: str
    confidence: float
    corners: Sequence[tuple[float, float]] = ()


class DetectedObject(NamedTuple):
    """An object that was found in a picture; `box` is (left, top, right, bottom) in pixels."""

    name: str
    box: tuple[float, float, float, float]
    colour: str | None = None


# Text in pictures


def ocr_reward(
    images: Sequence[Image.Image],
    text: Sequence[str],
    *,
    reader: Callable[[Image.Image], Sequence[Word]] | None = None,
    penalty: float = 0.6,
    return_masks: bool = True,
    **kwargs,
) -> RewardOutput | list[float]:
    """How well the words of the column `text` are drawn (arXiv 2601.02256): completeness + similarity - penalty.

    Args:
        images (sequence of `PIL.Image.Image`): B pictures.
        text (sequence of `str`): What should stand in each, words separated by spaces; case does not count.
        reader (`Callable`, *optional*): Picture -> words; by default rapidocr (`pip install -e ".[ocr]"`).
        penalty (`float`, *optional*, defaults to 0.6):
            Weight of the bag distance, which is the number of letters that are missing or that are too many, whichever
            is larger, over the letters of both texts.
        return_masks (`bool`, *optional*, defaults to `True`):
            Return the boxes of the words as masks, too; a picture without any has none, so all of it counts.

    Returns:
        `RewardOutput` (or a list of B `float`): between -penalty and 2.
    """
    reader = reader or read_with_rapidocr
    rewards, masks = [], []
    for image, wanted in zip(images, text, strict=True):
        words = reader(image)
        rewards.append(text_score(wanted, words, penalty))
        masks.append(_mask_of_words(image, words))
    return RewardOutput(rewards, masks) if return_masks else rewards


def text_score(wanted: str, words: Sequence[Word], penalty: float = 0.6) -> float:
    """Score of the words that were read where `wanted` should stand; see [`ocr_reward`]."""
    targets = wanted.lower().split()
    if not targets:
        raise ValueError("There is no word to be drawn: the column `text` holds an empty text.")
    read = [(part, word.confidence) for word in words for part in word.text.lower().split()]
    completeness = similarity = 0.0
    for target in targets:
        completeness += min((confidence for part, confidence in read if part == target), default=0.0)
        alike = [(1 - edit_distance(target, part) / max(len(target), len(part)), sure) for part, sure in read]
        best = max(alike, default=(0.0, 0.0))
        similarity += best[0] * best[1]
    expected, found = Counter("".join(targets)), Counter("".join(part for part, _ in read))
    difference = max((expected - found).total(), (found - expected).total())  # bag distance
    total = expected.total() + found.total()
    return (completeness + similarity) / len(targets) - penalty * difference / total


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions of single letters."""
    previous = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        current = [i]
        for j, b in enumerate(second, start=1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (a != b)))
        previous = current
    return previous[-1]


def read_with_rapidocr(image: Image.Image) -> list[Word]:
    """The words of a picture, by rapidocr."""
    pixels = np.asarray(image.convert("RGB"))[..., ::-1]
    # Its flags are sticky: a call that leaves one out gets the last call's.
    result = _rapidocr()(np.ascontiguousarray(pixels), use_det=True, use_cls=False, use_rec=True)
    if result.txts is None:
        return []
    rows = zip(result.txts, result.scores, np.asarray(result.boxes).tolist(), strict=True)
    return [Word(text, float(score), box) for text, score, box in rows]


@lru_cache
def _rapidocr():
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError('`ocr_reward` reads with rapidocr: `pip install -e ".[ocr]"`, or pass a `reader`.') from error
    return RapidOCR(params={"Global.log_level": "error"})


def _mask_of_words(image: Image.Image, words: Sequence[Word]) -> np.ndarray | None:
    boxes = [word.corners for word in words if word.corners]
    if not boxes:
        return None
    mask = Image.new("1", image.size)
    for corners in boxes:
        ImageDraw.Draw(mask).polygon([tuple(corner) for corner in corners], fill=1, outline=1)
    return np.asarray(mask)


# Objects in pictures


def detector_reward(
    images: Sequence[Image.Image],
    metadata: Sequence[dict[str, Any] | str],
    *,
    detector: Callable[[Image.Image], Sequence[DetectedObject]],
    partial_credit: bool = False,
    **kwargs,
) -> list[float]:
    """Whether pictures show the objects that they should, by GenEval's rule (arXiv 2310.11513).

    Args:
        images (sequence of `PIL.Image.Image`): B pictures.
        metadata (sequence of `dict`, or of the same as JSON):
            As in GenEval's prompt file: `include`, a list of `{"class": ..., "count": 1, "color": ..., "position":
            ["left of", 0]}` (the last two optional; a position refers to an entry before its own by number), and
            optionally `exclude`, a list of `{"class": ..., "count": n}` for fewer than n. Other keys have no effect.
        detector (`Callable`):
            Picture -> [`DetectedObject`]s, the surest first: colour and place are asked of the first `count` of a
            class.
        partial_credit (`bool`, *optional*, defaults to `False`):
            The share of the conditions that hold instead of 1 for all and 0 for less. A model that hardly ever gets
            all of them right learns nothing from groups of zeros.

    Returns:
        `list[float]`: B rewards in [0, 1].
    """
    rewards = []
    for image, wanted in zip(images, metadata, strict=True):
        shares = condition_shares(detector(image), json.loads(wanted) if isinstance(wanted, str) else wanted)
        rewards.append(float(np.mean(shares)) if partial_credit else float(min(shares) >= 1))
    return rewards


def condition_shares(objects: Sequence[DetectedObject], metadata: dict[str, Any]) -> list[float]:
    """How far each condition of GenEval's metadata holds, in [0, 1]: presence, colour and place of each entry.

    As in GenEval's own evaluation, colour and place are asked of the first `count` objects of a class, whatever comes
    after them. A place holds if all of them stand so to all of the other entry's, and the other entry holds itself.
    """
    include, exclude = metadata.get("include") or [], metadata.get("exclude") or []
    if not include:
        raise ValueError("The metadata names no object: `include` must be a list of at least one entry.")
    shares: list[float] = []
    groups: list[list[DetectedObject]] = []  # of each entry; empty where it does not hold
    for entry in include:
        count = _count(entry)
        things = [thing for thing in objects if thing.name == entry["class"]][:count]
        own = [len(things) / count]
        if entry.get("color"):
            own.append(sum(thing.colour == entry["color"] for thing in things) / count)
        if entry.get("position"):
            relation, other = entry["position"]
            if relation not in POSITIONS or other not in range(len(groups)):
                raise ValueError(
                    f"A position must be one of {POSITIONS} and the number of an entry before its own, but got "
                    f"{entry['position']!r} in entry {len(groups)}."
                )
            pairs = [is_placed(one.box, relation, two.box) for one in things for two in groups[other]]
            own.append(float(min(own) >= 1 and bool(pairs) and all(pairs)))
        groups.append(things if min(own) >= 1 else [])
        shares += own
    for entry in exclude:
        shares.append(float(sum(thing.name == entry["class"] for thing in objects) < _count(entry)))
    return shares


def _count(entry: dict[str, Any]) -> int:
    count = 1 if entry.get("count") is None else entry["count"]
    if not isinstance(entry.get("class"), str) or not isinstance(count, int) or count < 1:
        raise ValueError(f"An entry names a `class` and a `count` of at least 1 (1 if it is left out), not {entry!r}.")
    return count


def is_placed(box: Sequence[float], relation: str, other: Sequence[float], margin: float = 0.1) -> bool:
    """Whether a box stands in a relation to another, as in GenEval's evaluation.

    Of the offset of the centres, each axis loses a share `margin` of both boxes' sides; what is left must be more than
    half as long as the whole offset.
    """
    first, second = np.asarray(box, float).reshape(2, 2), np.asarray(other, float).reshape(2, 2)
    offset = first.mean(0) - second.mean(0)
    sides = np.abs(first[1] - first[0]) + np.abs(second[1] - second[0])
    left = np.sign(offset) * np.maximum(np.abs(offset) - margin * sides, 0)
    if (np.abs(left) < 1e-3).all():
        return False
    x, y = left / np.linalg.norm(offset)
    return bool({"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}[relation])


# Other judges


@torch.no_grad()
def image_text_reward(
    images: Sequence[Image.Image],
    prompts: Sequence[Any],
    *,
    model: Any,
    processor: Any,
    caption: Sequence[str] | None = None,
    processor_kwargs: dict[str, Any] | None = None,
    **kwargs,
) -> list[float]:
    """Cosine similarity of pictures and texts by a CLIP-like model of transformers (CLIP, SigLIP, ALIGN, ...).

    Args:
        images (sequence of `PIL.Image.Image`): B pictures.
        prompts (sequence): What was asked for; of a conversation the text of its last message.
        model (`PreTrainedModel`): Its outputs have `image_embeds` and `text_embeds`.
        processor (`ProcessorMixin`): The model's.
        caption (sequence of `str`, *optional*): What to compare with instead of the prompts (a column).
        processor_kwargs (`dict`, *optional*): By default `{"padding": True, "truncation": True}`; SigLIP was trained
            with `{"padding": "max_length"}`.

    Returns:
        `list[float]`: B rewards in [-1, 1].
    """
    texts = list(caption) if caption is not None else [prompt_text(prompt) for prompt in prompts]
    settings = {"padding": True, "truncation": True, **(processor_kwargs or {})}
    inputs = processor(text=texts, images=list(images), return_tensors="pt", **settings)
    outputs = model.eval()(**inputs.to(model.device))
    return F.cosine_similarity(outputs.image_embeds.float(), outputs.text_embeds.float()).tolist()


def prompt_text(prompt: Any) -> str:
    """The text of a prompt: itself, or what the last message of a conversation says."""
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


def scored_reward(
    images: Sequence[Image.Image],
    prompts: Sequence[Any],
    *,
    function: Callable[[list[Image.Image], list[str], list[dict[str, Any]]], tuple[Sequence[float], dict[str, Any]]],
    log_metric: Callable[[str, float], Any] | None = None,
    **columns,
) -> list[float]:
    """Adapter for functions `(images, prompts, metadata) -> (scores, info)`, as diffusion RL code has them.

    Args:
        images, prompts: B of each.
        function (`Callable`): It gets the prompts as texts, and the other columns as a dictionary per sample. Numbers
            in its `info` are logged (the mean, if there is one per sample).
        log_metric (`Callable`, *optional*): TRL passes it.

    Returns:
        `list[float]`: The B scores.
    """
    scores, info = function(list(images), [prompt_text(p) for p in prompts], sample_columns(columns, len(images)))
    for name, values in (info or {}).items():
        numbers = np.asarray(values)
        if log_metric is not None and numbers.size and np.issubdtype(numbers.dtype, np.number):
            log_metric(name, float(numbers.mean()))
    return [float(score) for score in scores]


def sample_columns(columns: dict[str, Any], num_samples: int) -> list[dict[str, Any]]:
    """One dictionary per sample of all that has one entry per sample."""
    kept = {n: v for n, v in columns.items() if isinstance(v, list | tuple) and len(v) == num_samples}
    return [{name: values[index] for name, values in kept.items()} for index in range(num_samples)]


def remote_reward(
    images: Sequence[Image.Image],
    prompts: Sequence[Any],
    *,
    function: Callable[..., float | None],
    timeout: float = 60.0,
    max_concurrency: int = 8,
    **columns,
) -> list[float | None]:
    """One call of a function for each picture, several at once: for services that are asked over a network.

    Args:
        images, prompts: B of each.
        function (`Callable`): `function(image, prompt, **columns of the sample) -> float`, called in threads.
        timeout (`float`, *optional*, defaults to 60.0): Seconds that one call may take.
        max_concurrency (`int`, *optional*, defaults to 8): Calls at once.

    Returns:
        `list[float | None]`: B rewards.

    Raises:
        `TimeoutError`: naming the first sample whose call took too long.
        `RuntimeError`: naming the first sample whose call failed, and why.
    """
    samples = sample_columns(columns, len(images))

    def ask(index: int) -> float | None:
        name = f"Sample {index} ({prompts[index]!r})"
        call = partial(function, images[index], prompt_text(prompts[index]), **samples[index])
        try:
            return call_with_timeout(call, timeout)
        except CallTimeout as error:
            raise TimeoutError(f"{name}: no reward within {timeout} seconds.") from error
        except Exception as error:
            raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error

    with ThreadPoolExecutor(max_concurrency) as pool:
        return list(pool.map(ask, range(len(images))))
