"""More than drawing from a caption: edits, captions, questions, stories, prompts that need a thought; as conversations.

Every sample is a conversation in transformers' chat format (pictures as arrays) whose last message is the answer to be
learned, and a judge of answers that looks at pixels or at text only. What a test sample shows was never trained on: its
split is the target scene's, as in `shapes`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from .judge import Detection, detect, judge_scene
from .shapes import (
    COLOURS,
    DICE,
    GROUP_SIZE,
    NUMBERS,
    PLURALS,
    SHAPES,
    SIDE,
    Scene,
    Thing,
    article,
    draw_background,
    render,
    sample_scene,
)

Message = dict[str, Any]
Detector = Callable[[np.ndarray], list[Detection]]
STEPS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
NUM_FRAMES = 3
FRAME_STEP = 22  # pixels a frame
MOVE = 30  # pixels that an edit moves a thing
IN_PLACE = 14  # pixels that a thing's centre may be off
EDITS = ("recolour", "move", "add", "remove", "replace")
PLAN = ". What will the picture show?"
QUESTIONS = ("count", "colour", "position")
LOOK_FIRST = " Look first."
DESCRIBE = ("What is in the picture?", "Describe the picture.", "What do you see?")
THOUGHTS = ("sum", "difference", "analogy")
# What a colour is the colour of: prompts that name the thing and mean the colour.
COLOUR_OF = {
    "the sky at noon": "blue",
    "fresh grass": "green",
    "a ripe banana": "yellow",
    "a ripe tomato": "red",
    "a moonless night": "black",
    "a flamingo": "pink",
    "a carrot": "orange",
    "an eggplant": "purple",
}


@dataclass(frozen=True)
class TaskSample:
    """A conversation and the judge of an answer to it.

    `messages` end with the answer. `judge` takes what the task asks for, a picture (uint8 `(H, W, 3)`), a text, or a
    list of pictures, and returns named verdicts; one of pictures also takes another `detector`. `untouched` `(H, W)`
    bool marks what an edit must leave alone, and `scenes` are its source and its target.
    """

    task: str
    messages: tuple[Message, ...]
    judge: Callable[..., dict[str, bool]]
    untouched: np.ndarray | None = None
    scenes: tuple[Scene, ...] = ()

    @property
    def prompt(self) -> list[Message]:
        """The conversation without its answer."""
        return list(self.messages[:-1])


def _message(role: str, *parts: str | np.ndarray) -> Message:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return {"role": role, "content": content}


def _draw(rng: np.random.Generator, items: Sequence[str], unless: Sequence[str] = ()) -> str:
    return str(rng.choice([item for item in items if item not in unless]))


def _describe(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def _split_of(scene: Scene, split: str) -> bool:
    """Whether a scene belongs to a split: `test` is content that training never shows, without held-out pairs."""
    return not scene.held_out and scene.for_testing == (split == "test")


def _any_held_out(things: Sequence[Thing]) -> bool:
    """Whether two of several things are a pair that training never shows."""
    return any(Scene("", "", pair, "white").held_out for pair in combinations(things, 2))


def _picture_judge(scene: Scene) -> Callable[[np.ndarray], dict[str, bool]]:
    def judge(image: np.ndarray, detector: Detector = detect) -> dict[str, bool]:
        verdict = judge_scene(image, scene, detector)
        return {"accuracy": verdict.correct, "strict": verdict.strict}

    return judge


def _word_judge(answer: str) -> Callable[[str], dict[str, bool]]:
    return lambda text: {"right": text.strip().lower().rstrip(".") == answer}


def _last_word_judge(answer: str) -> Callable[[str], dict[str, bool]]:
    return lambda text: {"right": text.lower().rstrip(". ").split()[-1:] == [answer]}


# Editing


def sample_edit(rng: np.random.Generator, split: str = "train", kind: str | None = None) -> TaskSample:
    """A picture, an instruction that changes one thing, and the changed picture."""
    kind = kind or str(rng.choice(EDITS))
    while True:
        source = _edit_source(rng, kind)
        instruction, target, changed = _EDITS[kind](rng, source)
        if not source.held_out and _split_of(target, split):
            break
    messages = (_message("user", render(source), instruction), _message("assistant", render(target)))
    judge, scenes = partial(judge_edit, target=target), (source, target)
    return TaskSample(f"edit: {kind}", messages, judge, untouched=~_boxes(changed), scenes=scenes)


def judge_edit(image: np.ndarray, target: Scene, detector: Detector = detect) -> dict[str, bool]:
    """Whether a picture shows the target's things, each in its place, and no others."""
    found = detector(image)
    wanted = Counter((thing.shape, thing.colour) for thing in target.objects)
    accurate = Counter((d.shape, d.colour) for d in found) == wanted
    in_place = all(
        any(
            (d.shape, d.colour) == (thing.shape, thing.colour)
            and np.abs(d.centre - (thing.cx, thing.cy)).max() < IN_PLACE
            for d in found
        )
        for thing in target.objects
    )
    return {"accuracy": accurate and in_place}


def _edit_source(rng: np.random.Generator, kind: str) -> Scene:
    scene = sample_scene(rng, "train", "colour" if kind in ("move", "add") else "attribution")
    # The judge of an edit wants all objects and their colours; sizes and relations belong to the caption.
    objects = scene.objects
    if len(objects) == 1:
        objects = (replace(objects[0], size=GROUP_SIZE),)
        if kind == "add":
            objects = (replace(objects[0], cx=DICE[2][0][0], cy=DICE[2][0][1]),)
    return Scene(scene.caption, "edit", objects, scene.background)


def _recolour(rng: np.random.Generator, source: Scene) -> tuple[str, Scene, tuple[Thing, ...]]:
    index = int(rng.integers(len(source.objects)))
    old = source.objects[index]
    new = replace(old, colour=_draw(rng, list(COLOURS), [thing.colour for thing in source.objects]))
    form = str(rng.choice(["make the {} {}", "change the {} to {}", "paint the {} {}"]))
    return form.format(_describe(old), new.colour), _with(source, index, new), (old,)


def _move(rng: np.random.Generator, source: Scene) -> tuple[str, Scene, tuple[Thing, ...]]:
    old, way = source.objects[0], str(rng.choice(list(STEPS)))
    dx, dy = STEPS[way]
    new = replace(old, cx=old.cx + MOVE * dx, cy=old.cy + MOVE * dy)
    place = {"right": "to the right", "left": "to the left", "down": "down", "up": "up"}[way]
    return f"move the {_describe(old)} {place}", _with(source, 0, new), (old, new)


def _add(rng: np.random.Generator, source: Scene) -> tuple[str, Scene, tuple[Thing, ...]]:
    there = source.objects[0]
    new = Thing(_draw(rng, SHAPES, [there.shape]), _draw(rng, list(COLOURS), [there.colour]), *DICE[2][1], GROUP_SIZE)
    target = replace(source, objects=(there, new))
    return f"add {article(_describe(new))} on the right", target, (new,)


def _remove(rng: np.random.Generator, source: Scene) -> tuple[str, Scene, tuple[Thing, ...]]:
    index = int(rng.integers(len(source.objects)))
    old = source.objects[index]
    form = str(rng.choice(["remove the {}", "take the {} away"]))
    target = replace(source, objects=tuple(thing for thing in source.objects if thing != old))
    return form.format(_describe(old)), target, (old,)


def _replace(rng: np.random.Generator, source: Scene) -> tuple[str, Scene, tuple[Thing, ...]]:
    index = int(rng.integers(len(source.objects)))
    old = source.objects[index]
    new = replace(old, shape=_draw(rng, SHAPES, [thing.shape for thing in source.objects]))
    return f"replace the {_describe(old)} with {article(new.shape)}", _with(source, index, new), (old, new)


def sample_plan(rng: np.random.Generator, split: str = "train") -> TaskSample:
    """An edit that is told instead of drawn: the same understanding, taught by words, at half of the length."""
    edit = sample_edit(rng, split)
    source, instruction = edit.messages[0]["content"]
    text = describe(edit.scenes[1])
    messages = (_message("user", source["image"], instruction["text"], PLAN), _message("assistant", text))
    return TaskSample("plan", messages, _word_judge(text), scenes=edit.scenes)


_EDITS = {"recolour": _recolour, "move": _move, "add": _add, "remove": _remove, "replace": _replace}


def _with(scene: Scene, index: int, thing: Thing) -> Scene:
    return replace(scene, objects=(*scene.objects[:index], thing, *scene.objects[index + 1 :]))


def _boxes(things: Sequence[Thing], margin: int = 8) -> np.ndarray:
    """Bool `(H, W)`: where the things are, with a margin."""
    mask = np.zeros((SIDE, SIDE), bool)
    for thing in things:
        half = round(0.56 * thing.size) + margin
        rows, columns = (slice(max(c - half, 0), c + half) for c in (thing.cy, thing.cx))
        mask[rows, columns] = True
    return mask


# Captions and questions


def sample_caption(rng: np.random.Generator, split: str = "train") -> TaskSample:
    """A picture and its description; every object, colour, number and relation must be named."""
    scene = sample_scene(rng, split, str(rng.choice(["colour", "count", "position", "attribution"])))
    text = describe(scene)

    def judge(answer: str) -> dict[str, bool]:
        return {"exact attributes": attributes(answer) == attributes(text)}

    messages = (_message("user", render(scene), str(rng.choice(DESCRIBE))), _message("assistant", text))
    return TaskSample("captioning", messages, judge)


def describe(scene: Scene) -> str:
    """The plain description of a scene, the same words for the same picture."""
    things = scene.objects
    if scene.kind == "count":
        noun = PLURALS.get(things[0].shape, things[0].shape + "s")
        text = f"{NUMBERS[len(things)]} {things[0].colour} {noun}"
    elif len(things) == 1:
        text = article(_describe(things[0]))
    else:
        first, second, side_by_side = _in_order(things)
        word = "left of" if side_by_side else "above"
        text = f"{article(_describe(first))} {word} {article(_describe(second))}"
    return text + ("" if scene.background == "white" else f" on {article(scene.background)} background")


def _in_order(things: Sequence[Thing]) -> tuple[Thing, Thing, bool]:
    """Two things from left to right or from top to bottom, and whether they stand side by side.

    A picture does not show which way its caption was put.
    """
    by_row = abs(things[0].cx - things[1].cx) > abs(things[0].cy - things[1].cy)
    first, second = sorted(things, key=lambda thing: thing.cx if by_row else thing.cy)
    return first, second, by_row


def attributes(text: str) -> tuple[str, ...]:
    """The words of a description that carry meaning, in order, plurals as singulars."""
    singular = {PLURALS.get(shape, shape + "s"): shape for shape in SHAPES}
    words = text.lower().replace(".", " ").replace(",", " ").split()
    return tuple(singular.get(word, word) for word in words if word not in ("a", "an", "the"))


def sample_question(
    rng: np.random.Generator, split: str = "train", kind: str | None = None, look_first: bool = False
) -> TaskSample:
    """A picture, a question about a number, a colour or a place, and one word as the answer.

    With `look_first` the question ends with [`LOOK_FIRST`], and the answer begins with what there is to see: "a pink
    ring left, a red star right: the star right". A thing stands before its place, so the end is a look-up in a text.
    """
    kind = kind or str(rng.choice(QUESTIONS))
    scene = sample_scene(rng, split, {"count": "count", "colour": "attribution", "position": "position"}[kind])
    question, answer = _ask(rng, scene, kind)
    judge, task = _word_judge(answer), f"question: {kind}"
    if look_first:
        asked = next((thing.shape for thing in scene.objects if f"is the {thing.shape}" in question), "")
        told = f"the {asked} {answer}" if asked else answer
        question, answer, judge = question + LOOK_FIRST, f"{list_things(scene)}: {told}", _last_word_judge(answer)
        task = f"looking first: {kind}"
    messages = (_message("user", render(scene), question), _message("assistant", answer))
    return TaskSample(task, messages, judge)


def list_things(scene: Scene) -> str:
    """The things of a scene, two with their places: "a pink ring left, a red star right"."""
    if scene.kind == "count" or len(scene.objects) == 1:
        return describe(replace(scene, background="white"))
    first, second, side_by_side = _in_order(scene.objects)
    places = ("left", "right") if side_by_side else ("above", "below")
    return _listed((first, second), places)


def _listed(things: Sequence[Thing], places: Sequence[str]) -> str:
    return ", ".join(f"{article(_describe(thing))} {place}" for thing, place in zip(things, places, strict=True))


def sample_reading(rng: np.random.Generator, split: str = "train") -> TaskSample:
    """A list of things with their places and a question about one of them, without a picture: looking up in a text."""
    while True:
        number = int(rng.integers(2, 5))
        shapes, colours, places = (rng.permutation(list(names))[:number] for names in (SHAPES, COLOURS, _PLACES))
        things = [Thing(str(s), str(c), 0, 0, 0) for s, c in zip(shapes, colours, strict=True)]
        # The first two say which split it is of.
        if not _any_held_out(things) and _split_of(Scene("", "reading", tuple(things[:2]), "white"), split):
            break
    text = _listed(things, places)
    index = int(rng.integers(number))
    asked, answer = things[index].shape, str(places[index])
    messages = (_message("user", f"{text}. Where is the {asked}?"), _message("assistant", f"the {asked} {answer}"))
    return TaskSample("reading", messages, _last_word_judge(answer))


_PLACES = ("left", "right", "above", "below")


def _ask(rng: np.random.Generator, scene: Scene, kind: str) -> tuple[str, str]:
    things = scene.objects
    thing = things[int(rng.integers(len(things)))]
    if kind == "count":
        noun = PLURALS.get(things[0].shape, things[0].shape + "s")
        return f"How many {noun} are there?", NUMBERS[len(things)]
    if kind == "colour":
        return f"What colour is the {thing.shape}?", thing.colour
    if kind == "shape":
        return f"What shape is {thing.colour}?", thing.shape
    if kind == "thing":
        return f"What is {_place(thing, scene)}?", article(_describe(thing))
    if kind == "place":
        return f"Where is the {thing.shape}?", _place(thing, scene)
    if kind == "list":
        in_order = sorted(things, key=lambda thing: (round(thing.cy / 32), thing.cx))
        return "List all things.", ", ".join(_describe(thing) for thing in in_order)
    one, other = (things[i] for i in rng.permutation(len(things))[:2])
    dx, dy = one.cx - other.cx, one.cy - other.cy
    answer = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("below" if dy > 0 else "above")
    return f"Where is the {one.shape}, seen from the {other.shape}: left, right, above or below?", answer


def _place(thing: Thing, scene: Scene) -> str:
    """Where a thing stands among the others: "on the left", "at the top", "at the bottom right"."""
    rows, columns = ({round(getattr(other, axis) / 32) for other in scene.objects} for axis in ("cy", "cx"))
    row = "" if len(rows) == 1 else "top" if thing.cy < SIDE / 2 else "bottom"
    middle = len(columns) == 1 or abs(thing.cx - SIDE / 2) < 10
    column = "" if middle else "left" if thing.cx < SIDE / 2 else "right"
    return f"at the {row} {column}".strip() if row else f"on the {column}"


def sample_look(rng: np.random.Generator, split: str = "train") -> TaskSample:
    """One picture, and much that can be asked about it, turn by turn in any order.

    Many answers to a picture teach more than one: telling things apart is what takes longest to learn.
    """
    kind = str(rng.choice(list(_LOOKS), p=[0.24, 0.12, 0.28, 0.16, 0.2]))
    scene = _crowd(rng, split) if kind == "crowd" else sample_scene(rng, split, kind)
    asked = {_ask(rng, scene, str(question)) for question in rng.permutation(_LOOKS[kind])}
    if kind != "crowd":
        asked.add((str(rng.choice(DESCRIBE)), describe(scene)))
    asked = [sorted(asked)[i] for i in rng.permutation(len(asked))]
    messages = [
        message for question, answer in asked for message in (_message("user", question), _message("assistant", answer))
    ]
    messages[0] = _message("user", render(scene), asked[0][0])
    return TaskSample("look", tuple(messages), _word_judge(asked[-1][1]))


# Questions about each kind of scene. Where a thing stands is asked most: from a place to its thing is learned soon,
# from a thing to its place takes long (positions enter by rotation only, so no slot simply says where it is).
_LOOKS = {
    "colour": ["colour", "shape"],
    "count": ["count"],
    "position": ["position", "position", "place", "place", "place", "thing", "colour", "shape"],
    "attribution": ["position", "place", "place", "place", "thing", "colour", "colour", "shape"],
    "crowd": ["place", "place", "place", "thing", "colour", "colour", "shape", "list"],
}


def _crowd(rng: np.random.Generator, split: str) -> Scene:
    """Three or four things, all different: harder to tell apart than the scenes of captions."""
    while True:
        number = int(rng.integers(3, 5))
        shapes, colours = (rng.permutation(list(names))[:number] for names in (SHAPES, COLOURS))
        background = draw_background(rng)[0]
        places = [tuple(int(c + rng.integers(-2, 3)) for c in place) for place in DICE[number]]
        things = [
            Thing(str(s), str(c), *place, GROUP_SIZE) for s, c, place in zip(shapes, colours, places, strict=True)
        ]
        scene = Scene("", "crowd", tuple(things), background)
        if not _any_held_out(things) and _split_of(scene, split):
            return scene


# Stories


def sample_story(rng: np.random.Generator, split: str = "train") -> TaskSample:
    """Frames in which one thing moves a step at a time."""
    way = str(rng.choice(list(STEPS)))
    dx, dy = STEPS[way]
    while True:
        scene = sample_scene(rng, "train", "colour")
        start = replace(scene.objects[0], size=GROUP_SIZE, cx=64 - FRAME_STEP * dx, cy=64 - FRAME_STEP * dy)
        frames = [
            Scene(
                "", "story", (replace(start, cx=start.cx + FRAME_STEP * dx * i, cy=start.cy + FRAME_STEP * dy * i),),
                scene.background,
            )
            for i in range(NUM_FRAMES)
        ]  # fmt: skip
        if _split_of(frames[0], split):
            break
    where = "" if scene.background == "white" else f" on {article(scene.background)} background"
    prompt = f"A story in {NUMBERS[NUM_FRAMES]} pictures: {article(_describe(start))} moves {way}{where}."
    messages = (_message("user", prompt), _message("assistant", *(render(frame) for frame in frames)))
    return TaskSample("story", messages, partial(judge_story, thing=start, step=(dx, dy)))


def judge_story(
    pictures: Sequence[np.ndarray], thing: Thing, step: tuple[int, int], detector: Detector = detect
) -> dict[str, Any]:
    """Whether every frame shows the thing alone, and whether it moves the way that was told from frame to frame."""
    centres: list[np.ndarray | None] = []
    alone: list[bool] = []
    for picture in pictures:
        found = detector(picture)
        same = [d for d in found if (d.shape, d.colour) == (thing.shape, thing.colour)]
        alone.append(len(found) == len(same) == 1)
        centres.append(same[0].centre if same else None)
    whole = len(centres) == NUM_FRAMES
    moves = whole and all(
        a is not None and b is not None and _goes(b - a, np.array(step)) for a, b in pairwise(centres)
    )
    pairs = [alone[i] and alone[i + 1] for i in range(len(alone) - 1)] or [False]
    return {"identity": all(alone) and whole, "identity in pairs": float(np.mean(pairs)), "moves": moves}


def _goes(offset: np.ndarray, step: np.ndarray) -> bool:
    """At least half a step forward, and less than half a step aside."""
    return offset @ step > FRAME_STEP / 2 and abs(offset @ step[::-1]) < FRAME_STEP / 2


# Thoughts


def sample_thought(rng: np.random.Generator, split: str = "train", kind: str | None = None) -> TaskSample:
    """A prompt that must be understood before it can be drawn; the answer is the thought and then the picture."""
    kind = kind or str(rng.choice(THOUGHTS))
    while True:
        scene = sample_scene(rng, split, "colour" if kind == "analogy" else "count")
        if not (scene.size_word or scene.held_out):
            break
    prompt, thought = _riddle(rng, kind, scene)
    where = "" if scene.background == "white" else f" on {article(scene.background)} background"
    messages = (_message("user", prompt + where), _message("assistant", thought + where, render(scene)))
    return TaskSample(f"thought: {kind}", messages, _picture_judge(scene))


def _riddle(rng: np.random.Generator, kind: str, scene: Scene) -> tuple[str, str]:
    thing, number = scene.objects[0], len(scene.objects)
    if kind == "analogy":
        named = next(name for name, colour in COLOUR_OF.items() if colour == thing.colour)
        return f"the colour of {named}, as {article(thing.shape)}", article(_describe(thing))
    words = {1: "one", **NUMBERS, 5: "five"}
    noun = PLURALS.get(thing.shape, thing.shape + "s")
    thought = f"{words[number]} {thing.colour} {noun}"
    if kind == "sum":
        part = int(rng.integers(1, number))
        one = f"{thing.colour} {thing.shape if part == 1 else noun}"
        return f"{words[number - part]} more than {words[part]} {one}", thought
    whole = int(rng.integers(number + 1, 6))
    return f"{words[whole - number]} less than {words[whole]} {thing.colour} {noun}", thought


def sample_text(rng: np.random.Generator, split: str = "train") -> TaskSample:
    """What other tasks ask of pictures, asked of words: sums, things and their colours, edits of a description."""
    if rng.random() < 0.3:
        kind = str(rng.choice(THOUGHTS))
        riddle = sample_thought(rng, split, kind)
        question, thought = (message["content"][0]["text"] for message in riddle.messages)
        messages = (_message("user", f"What is {question}?"), _message("assistant", thought))
        return TaskSample(f"text: {kind}", messages, _word_judge(thought))
    kind = str(rng.choice([kind for kind in EDITS if kind != "move"]))  # of which a description says nothing
    edit = sample_edit(rng, split, kind)
    source, target = map(describe, edit.scenes)
    instruction = edit.messages[0]["content"][1]["text"]
    messages = (_message("user", f"{source}; {instruction}"), _message("assistant", target))
    return TaskSample("text: edit", messages, _word_judge(target))


# Several turns, and examples instead of instructions


def sample_turns(rng: np.random.Generator, split: str = "train") -> TaskSample:
    """Draw or show, ask, edit, ask, edit, ask: one conversation, of which the judge hears the last answer."""
    while True:
        first = sample_edit(rng, "train", str(rng.choice(EDITS)))
        scenes = list(first.scenes)
        instructions = [first.messages[0]["content"][1]["text"]]
        if len(scenes[1].objects) == 2 and rng.random() < 0.5:
            instruction, target, _ = _EDITS[str(rng.choice(["recolour", "remove", "replace"]))](rng, scenes[1])
            scenes.append(target)
            instructions.append(instruction)
        if not any(scene.held_out for scene in scenes) and _split_of(scenes[-1], split):
            break
    messages: list[Message] = []
    show = render(scenes[0])
    shown = rng.random() < 0.5
    if not shown:
        messages += [_message("user", describe(scenes[0])), _message("assistant", show)]
    for scene, instruction, target in zip(scenes, [*instructions, ""], [*scenes[1:], scenes[-1]], strict=True):
        asked = [_ask_any(rng, scene) for _ in range(int(rng.integers(0, 3)) if instruction else 1)]
        for question, answer in asked:
            messages += [_message("user", question), _message("assistant", answer)]
        if instruction:
            messages += [_message("user", instruction), _message("assistant", render(target))]
    if shown:
        messages[0] = _message("user", show, messages[0]["content"][0]["text"])
    return TaskSample("turns", tuple(messages), _word_judge(messages[-1]["content"][0]["text"]), scenes=tuple(scenes))


def _ask_any(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    """A question that the scene of an edit has one answer to."""
    things = scene.objects
    if len(things) == 1:
        return _ask(rng, scene, str(rng.choice(["colour", "shape"])))
    if len({thing.shape for thing in things}) < 2 or len({thing.colour for thing in things}) < 2:
        return "How many things are there?", NUMBERS[len(things)]
    return _ask(rng, scene, str(rng.choice(["colour", "shape", "thing", "place", "position"])))


def sample_example(rng: np.random.Generator, split: str = "train") -> TaskSample:
    """In-context: a picture and what became of it, and a second picture to which the same is to be done."""
    colour = _draw(rng, list(COLOURS))
    while True:
        one, other = (_edit_source(rng, "add") for _ in range(2))
        kinds = [scene.objects[0] for scene in (one, other)]
        if colour in (thing.colour for thing in kinds) or kinds[0].shape == kinds[1].shape:
            continue
        shown, target = (_with(scene, 0, replace(scene.objects[0], colour=colour)) for scene in (one, other))
        if not (one.held_out or other.held_out or shown.held_out) and _split_of(target, split):
            break
    question = _message("user", render(one), " becomes ", render(shown), ". The same for ", render(other))
    judged = (question, _message("assistant", render(target)))
    return TaskSample("example", judged, partial(judge_edit, target=target), scenes=(other, target))


TASKS: dict[str, Callable[..., TaskSample]] = {
    "editing": sample_edit,
    "plan": sample_plan,
    "captioning": sample_caption,
    "question": sample_question,
    "looking first": partial(sample_question, look_first=True),
    "reading": sample_reading,
    "look": sample_look,
    "story": sample_story,
    "thought": sample_thought,
    "text": sample_text,
    "turns": sample_turns,
    "example": sample_example,
}
