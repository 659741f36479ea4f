"""The doors of the package, and what may come through them: plausible values, right and wrong.

A door draws a case (names to small descriptions of values, so that a case can be printed and repeated), makes the call,
and looks at what comes back. `Bad` marks a value that has to be refused.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from diffusers_nextflow import NextFlowPipeline
from transformers_nextflow import (
    NextFlowConfig,
    NextFlowForCausalLM,
    NextFlowImageProcessor,
    NextFlowImageProcessorPil,
    NextFlowImageTokenizerConfig,
    NextFlowProcessor,
    NextFlowSession,
    ScaleSchedule,
)

NAN, INF = math.nan, math.inf


class Bad(NamedTuple):
    """A value that no call can accept."""

    value: Any


class Door(NamedTuple):
    """A way into the package: `look(world, case, result)` says what is wrong with what `call(world, case)` returns."""

    name: str
    cases: st.SearchStrategy[dict[str, Any]]
    call: Callable[["World", dict[str, Any]], Any]
    look: Callable[["World", dict[str, Any], Any], str]
    cost: float  # milliseconds a call, about: how the calls are shared out
    words: tuple[str, ...] = ()  # a message with one of them is clear, too
    used: Callable[[dict[str, Any], str], bool] = lambda case, name: True  # a bad value that is not read harms nothing


class World:
    """What the calls need: a small checkpoint, loaded once."""

    def __init__(self, folder: Path, scratch: Path):
        self.folder, self.scratch = folder, scratch
        self.model = NextFlowForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = NextFlowProcessor.from_pretrained(folder)
        self.processor.image_tokenizer.float().eval()
        self.config = self.model.config
        self.schedule = ScaleSchedule(num_scales=self.config.num_scales)
        self.prompt = self.processor(["a red ring", "two"], padding=True, padding_side="left", return_tensors="pt")
        self.pipe = NextFlowPipeline.from_pretrained(folder)
        self.pipe.set_progress_bar_config(disable=True)
        self.weights = load_file(folder / "model.safetensors")
        self.codes = torch.randint(0, 64, (1, self.schedule.num_tokens), generator=torch.Generator().manual_seed(0))


def given(case: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a case: bad values without their mark, what stands for a tensor made."""
    return {name: make(value.value if isinstance(value, Bad) else value) for name, value in case.items()}


def make(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.make()
    if isinstance(value, list):
        return [make(item) for item in value]
    return value


class Spec(NamedTuple):
    """A tensor, an array or a picture, told by what it is made of."""

    kind: str
    shape: tuple[int, ...]
    dtype: str = "uint8"
    fill: Any = "random"

    def make(self) -> Any:
        rng = np.random.default_rng(0)
        if self.kind == "pil":
            width, height = self.shape
            mode = self.dtype
            return Image.new(mode, (width, height)) if self.fill == "black" else _noise(mode, width, height)
        if self.fill == "random":
            array = rng.random(self.shape)
            array = array if self.dtype.startswith(("float", "bfloat", "complex")) else array * 255
        else:
            array = np.full(self.shape, self.fill)
        if self.kind == "array":
            return array.astype(self.dtype)
        return torch.from_numpy(np.ascontiguousarray(array)).to(getattr(torch, self.dtype))


def _noise(mode: str, width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    picture = Image.fromarray(noise, "RGBA") if width and height else Image.new("RGBA", (width, height))
    if mode in ("I", "F", "I;16"):
        return Image.fromarray(noise[..., 0].astype({"I": "int32", "F": "float32", "I;16": "uint16"}[mode]))
    return picture.convert(mode)


def some(options: dict[str, tuple[list[Any], list[Any]]], least: int = 0, most: int = 3) -> st.SearchStrategy:
    """A few of the options, each with a good value, or now and then a bad one: `{name: ([good], [bad])}`."""

    @st.composite
    def draw(draw):
        names = draw(st.lists(st.sampled_from(sorted(options)), min_size=least, max_size=most, unique=True))
        case = {}
        for name in names:
            good, bad = options[name]
            use_bad = bad and (not good or draw(st.integers(0, 2)) == 0)
            case[name] = Bad(draw(st.sampled_from(bad))) if use_bad else draw(st.sampled_from(good))
        return case

    return draw()


BAD_NUMBERS = [NAN, INF, -INF, -1, -1e30, "1", "", [], {}]
BAD_COUNTS = [0, -1, -(2**63), NAN, INF, 2.5, "3", [], 10**12]

# --- schedules ---

SCHEDULE = {
    "bucket": ([(16, 16), (12, 20), [20, 12]], [(0, 16), (1, 1), (-16, -16), (NAN, 16), ("16", "16"), (), (16,), 16]),
    "num_scales": ([1, 5, 12, 18], [*BAD_COUNTS, 19]),
    "stride": ([8, 16, 32], [0, -16, NAN, INF, "16", 1.5, 1j, []]),
    "sides": ([(1, 2, 3), [1, 2, 4, 8]], [(), (2, 3), (1, 1), (1, NAN), "123", (1, 3, 2), 5, (1, -2)]),
}


def call_schedule(world, case):
    return ScaleSchedule(**given(case))


def look_schedule(world, case, schedule):
    if schedule.num_tokens != sum(h * w for h, w in schedule.grids) or schedule.grids[0] != (1, 1):
        return "the grids are not what the schedule says"
    if schedule.height != schedule.grids[-1][0] * schedule.stride:
        return "the height is not that of the last grid"
    return ""


SIZE = {
    "height": ([256, 512, 1024, 80], [0, -256, NAN, INF, "256", 257, 10**12, 2.5, [], 1j]),
    "width": ([256, 512, 1024, 80], [0, -256, NAN, INF, "256", 257, 10**12, 2.5, [], 1j]),
    "num_scales": ([None, 5, 18], BAD_COUNTS),
    "stride": ([16], [0, -16, NAN, "16", []]),
}


def call_size(world, case):
    return ScaleSchedule.from_size(**{"height": 256, "width": 256, **given(case)})


# --- pictures ---

PICTURES = [
    *(Spec("pil", (w, h), mode) for w, h in ((80, 80), (1, 1), (7, 31)) for mode in ("RGB", "L", "RGBA", "P", "I;16")),
    *(Spec("pil", (40, 30), mode) for mode in ("1", "CMYK", "F", "LA", "I")),
    *(Spec("array", shape, "uint8") for shape in ((30, 40, 3), (3, 30, 40), (30, 40), (30, 40, 1), (30, 40, 4))),
    *(Spec(kind, (30, 40, 3), dtype) for kind in ("array", "tensor") for dtype in ("float32", "float16", "int64")),
    Spec("tensor", (3, 30, 40), "float32"),
    Spec("tensor", (3, 30, 40), "uint8"),
    Spec("array", (30, 40, 3), "uint16"),
]
BAD_PICTURES = [
    *(Spec(kind, (30, 40, 3), "float32", fill) for kind in ("array", "tensor") for fill in (NAN, INF, -3.0, 1e9)),
    *(
        Spec(kind, shape)
        for kind in ("array", "tensor")
        for shape in ((0, 40, 3), (30, 0, 3), (5,), (), (2, 3, 4, 5, 6))
    ),
    *(Spec(kind, (30, 40, channels)) for kind in ("array", "tensor") for channels in (2, 5, 0)),
    Spec("array", (30, 40, 3), "complex64"),
    Spec("array", (30, 40, 3), "int64", 10**9),
    Spec("array", (30, 40, 3), "int64", -5),
    Spec("array", (30, 40, 3), "str"),
    Spec("pil", (0, 5), "RGB", "black"),
    Spec("pil", (40, 30), "F", "random"),
    *(None, 5, "nowhere.png", "", "data:image/png;base64,AAAA", b"PNG", {}, [None]),
]
LONG_PICTURES = [Spec("pil", size, "L", "black") for size in ((65000, 1), (1, 65000), (8000, 3))]
IMAGE = {
    "images": ([*PICTURES, *LONG_PICTURES, [PICTURES[0], PICTURES[1]]], [*BAD_PICTURES, []]),
    "num_scales": ([3, 5], BAD_COUNTS),
    "height": ([], [80, 0, -80, NAN, "80", 81]),  # without the width
    "do_pad": ([True, False], []),
    "do_rescale": ([True], []),
    "do_normalize": ([True, False], []),
    "rescale_factor": ([1 / 255], [NAN, INF, "a", []]),
    "image_mean": ([[0.5, 0.5, 0.5]], [[NAN] * 3, [INF] * 3, [0.5] * 2, "a", []]),
    "image_std": ([[0.5, 0.5, 0.5]], [[0.0] * 3, [NAN] * 3, [0.5] * 4, []]),
    "background_color": ([[0, 0, 0], (255, 255, 255)], [[300, 0, 0], [0, 0], [NAN] * 3, "white?", [-1, 0, 0]]),
    "stride": ([16], [0, -16, NAN, "16", 10**9]),
}


def call_image_processor(backend):
    def call(world, case):
        arguments = {"images": PICTURES[0].make(), **given(case)}
        return backend(num_scales=5)(**arguments, return_tensors="pt")

    return call


def look_pixels(world, case, batch):
    pixels = batch["pixel_values"]
    for picture in pixels:
        if picture.ndim != 3 or picture.shape[0] != 3:
            return f"pixels have the shape {tuple(picture.shape)}"
        if not torch.isfinite(picture).all():
            return "pixels are not finite"
        if picture.abs().max() > 1.001 and case.get("do_normalize", True):
            return "pixels are outside of [-1, 1]"
    return "" if len(pixels) == len(batch["image_grid_shw"]) else "grids and pictures differ in number"


# --- processor ---

TEXTS = [
    "a ring",
    "",
    "<image>",
    "<image>Make it red.",
    "é\n漢字 🎨",
    "<boi>",
    "<|im_start|>user\n",
    "<video>",
    " " * 99,
]
PROCESSOR = {
    "text": ([*TEXTS, ["a", "bb"], ["<image>", "x<image>y"]], [None, 5, [], [None], {}, b"a", ["a", 5], "a\ud800"]),
    "images": ([None, *PICTURES[:6], [PICTURES[0]], [PICTURES[0], PICTURES[1]], []], BAD_PICTURES[:12]),
    "videos": ([None], [5, "nowhere.mp4", [5]]),
    "padding": ([True, False, "longest"], ["widest", 5.5, NAN]),
    "truncation": ([True, False], ["somewhere"]),
    "max_length": ([64, None], [-1, 0, NAN, "9"]),
    "return_tensors": (["pt", None, "np"], ["tf?", 5]),
    "self_correction": ([True, False], []),
    "num_frames": ([1, 4], BAD_COUNTS),
    "num_scales": ([3, 5], BAD_COUNTS),
    "audio": ([None], [5]),
}


def call_processor(world, case):
    return world.processor(**{"text": "a ring", **given(case)})


def look_processor(world, case, batch):
    rows = batch["input_ids"]
    if any(len(a) != len(b) for a, b in zip(rows, batch["attention_mask"], strict=True)):
        return "ids and mask differ in length"
    num_grids = len(batch["image_grid_shw"]) if "image_grid_shw" in batch else 0
    num_codes = sum(int(token) >= world.config.text_vocab_size for row in rows for token in row)
    marks = sum(text.count("<image>") for text in np.atleast_1d(given(case).get("text", "")).tolist())
    if num_grids != marks or (num_grids == 0) != (num_codes == 0):
        return f"{marks} marks, {num_grids} grids, {num_codes} codes"
    return ""


def message(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


MESSAGES = {
    "conversation": (
        [
            [message("user", "a ring")],
            [message("user", [{"type": "text", "text": "a ring"}])],
            [message("system", "Draw."), message("user", "a"), message("assistant", "b")],
            [[message("user", "a")], [message("user", "b")]],
        ],
        [
            *([], "a ring", None, 5, [5], ["user: a"], {}, [{}], [{"content": "a"}], [{"role": "user"}]),
            *([message(None, "a")], [message("user", [{"type": "sound", "sound": 5}])]),
            *([message("user", [{"type": "image"}])], [message("user", [{"text": "a"}])], [message("user", [5])]),
            [message("user", [{"type": "image", "image": None}])],
        ],
    ),
    "add_generation_prompt": ([True, False], []),
    "tokenize": ([True, False], []),
}


def call_chat(world, case):
    case = {"conversation": [message("user", "a ring")], "tokenize": True, **given(case)}
    return world.processor.apply_chat_template(**case, return_dict=bool(case["tokenize"]))


def look_chat(world, case, result):
    return "" if len(result) else "nothing came back"


def token_ids(*rows: int) -> Spec:
    return Spec("tensor", rows, "int64", 256 + 30)


DECODE = {
    "codes": (["whole", "prefix"], ["short", "long", "text", "beyond", "negative", "float", "none", "empty"]),
    "image_grid_shw": (["own", "flat"], ["none", "zero", "two", "huge", "float", "negative", "off"]),
}


def call_decode(world, case):
    case = given({"codes": "whole", "image_grid_shw": "own", **case})
    offset, boi = world.config.text_vocab_size, world.config.boi_token_id
    ids = torch.cat([torch.tensor([[boi]]), world.codes + offset], 1)
    grid = torch.tensor([world.schedule.grid_shw])
    ids = {
        "whole": ids,
        "prefix": ids,
        "short": ids[:, :-3],
        "long": torch.cat([ids, ids[:, -1:]], 1),
        "text": torch.full_like(ids, 65),
        "beyond": ids + 64,
        "negative": torch.cat([ids[:, :-1], torch.tensor([[-5]])], 1),
        "float": ids + 0.5,
        "none": None,
        "empty": ids[:, :0],
    }[case["codes"]]
    grid = {
        "own": grid,
        "none": None,
        "zero": grid * 0,
        "two": grid.repeat(2, 1),
        "huge": torch.tensor([[2**40, 16, 16]]),
        "float": grid + 0.5,
        "flat": grid[0],
        "negative": -grid,
        "off": torch.tensor([[5, 3, 3]]),
    }[case["image_grid_shw"]]
    return world.processor.decode_images(ids, grid)


def look_images(world, case, rows):
    pictures = [picture for row in rows for picture in row]
    expected = [] if no_pictures(given(case)) else [(80, 80)]
    return "" if [picture.size for picture in pictures] == expected else f"pictures: {pictures}"


# --- generate ---

NUMBER = ([0.5, 1.0, 3], BAD_NUMBERS)
GENERATE = {
    "generation_mode": (["text", "image", "interleaved", None], ["video", 5, ""]),
    "height": ([80, None], [0, -80, NAN, "80", 81, 10**12, 2.5, True]),
    "width": ([80, None], [0, -80, NAN, "80", 81, 10**12, 2.5]),
    "num_scales": ([3, 5, None], [*BAD_COUNTS, 19]),
    "guidance_scale": ([None, 1.0, 3.0], BAD_NUMBERS),
    "guidance_schedule": (["constant", "linear", None], ["cosine", 5, ""]),
    "image_guidance_scale": ([None], BAD_NUMBERS),
    "image_temperature": ([0.7, [1.0] * 5], [0, [1.0] * 4, *BAD_NUMBERS]),
    "image_top_k": ([0, 3, [1, 2, 3, 4, 5]], [65, 2.5, [1] * 6, *BAD_NUMBERS]),
    "image_top_p": ([0.5, 1.0], [0, 1.5, [0.5] * 4, *BAD_NUMBERS]),
    "negative_prompt_ids": ([None, Spec("tensor", (1, 3), "int64", 65)], [Spec("tensor", (3, 3), "int64", 65)]),
    "num_return_sequences": ([1, 2], BAD_COUNTS),
    "prefix_scales": ([None], [0, 6, -1, NAN, "2"]),
    "images_per_prefix": ([None], [0, -1, NAN, "2", 3]),
    "max_new_tokens": ([1, 4], [0, -1, NAN, "4", 2.5]),
    "max_new_images": ([1, None], [-1, NAN, "1", 2.5]),
    "num_frames": ([1, None], BAD_COUNTS),
    "thinking": ([True, False, None], []),
    "do_sample": ([True, False], []),
    "temperature": ([0.7], [0.0, *BAD_NUMBERS]),
    "top_k": ([5], [-1, 2.5, NAN, "5"]),
    "top_p": ([0.5], [-0.5, 1.5, NAN, "a"]),
    "repetition_penalty": ([1.2], [0.0, -1.0, NAN, "a"]),
    "num_beams": ([1], [0, -1, NAN]),
    "cache_implementation": (["preallocated", "quantized", "dynamic", "static"], ["paged?", 5]),
    "use_cache": ([True], []),
    "return_dict_in_generate": ([True, False], []),
    "generator": ([None], [5, [], "seed", [None]]),
    "attention_mask": (
        [],
        [
            Spec("tensor", (2, 3), "int64", 1),
            Spec("tensor", (2, 10), "float32", NAN),
            Spec("tensor", (2, 10), "int64", 0),
        ],
    ),
    "image_grid_shw": ([None], [Spec("tensor", (1, 3), "int64", 5), Spec("tensor", (2,), "int64", 5)]),
    "input_ids": (
        [Spec("tensor", (1, 4), "int64", 65), Spec("tensor", (2, 1), "int64", 65)],
        [
            *(Spec("tensor", (1, 4), "int64", fill) for fill in (-1, 10**9, 300)),
            *(Spec("tensor", shape, "int64", 65) for shape in ((1, 0), (0, 4), (4,), (1, 2, 3), (1, 600))),
            *(Spec("tensor", (1, 4), "float32", 65), Spec("tensor", (1, 4), "bool", 1), [[65, 66]], "a ring", None),
        ],
    ),
    "stop_strings": ([], [5, ["a"]]),
    "no_such_option": ([], [1]),
}


def call_generate(world, case):
    case = given(case)
    inputs = {"max_new_tokens": 4, **case}
    if "input_ids" not in case:
        inputs = {**world.prompt, **inputs}
    if (
        inputs.get("generation_mode") in ("image", "interleaved")
        and "num_scales" not in inputs
        and "height" not in inputs
    ):
        inputs.setdefault("num_scales", 3)
    torch.manual_seed(0)
    return world.model.generate(**inputs)


def look_generate(world, case, output):
    ids = output if isinstance(output, torch.Tensor) else output["sequences"]
    if ids.ndim != 2 or ids.dtype != torch.int64:
        return f"sequences are {tuple(ids.shape)} {ids.dtype}"
    if int(ids.min()) < 0 or int(ids.max()) >= world.config.vocab_size:
        return "ids beyond the vocabulary"
    if case.get("generation_mode") == "image" and not (ids >= world.config.text_vocab_size).any(-1).all():
        return "a row without a picture"
    return ""


FORWARD = {
    "input_ids": (
        [Spec("tensor", (2, 6), "int64", 65)],
        [
            *(Spec("tensor", (2, 6), "int64", fill) for fill in (-1, 10**9, 300)),
            *(
                Spec("tensor", shape, dtype, 1)
                for shape, dtype in (((6,), "int64"), ((2, 6), "float32"), ((2, 6, 2), "int64"))
            ),
        ],
    ),
    "attention_mask": (
        [Spec("tensor", (2, 6), "int64", 1)],
        [Spec("tensor", shape, "int64", 1) for shape in ((2, 5), (1, 6, 6), (6,))]
        + [Spec("tensor", (2, 6), "float32", NAN)],
    ),
    "labels": (
        [Spec("tensor", (2, 6), "int64", 65)],
        [
            *(Spec("tensor", (2, 6), "int64", fill) for fill in (10**9, -5)),
            *(
                Spec("tensor", (2, 5), "int64", 65),
                Spec("tensor", (2, 6), "float32", 65),
                Spec("tensor", (6,), "int64", 65),
            ),
        ],
    ),
    "position_ids": (
        [Spec("tensor", (3, 2, 6), "float32", 1.0)],
        [
            *(Spec("tensor", shape, "float32", 1.0) for shape in ((5, 2, 6), (3, 2, 5), (6,))),
            *(Spec("tensor", (3, 2, 6), "float32", fill) for fill in (NAN, INF)),
        ],
    ),
    "image_grid_shw": ([None], [Spec("tensor", (1, 3), "int64", 5), Spec("tensor", (3,), "int64", 5)]),
    "seq_idx": (
        [Spec("tensor", (2, 6), "int64", 0)],
        [Spec("tensor", (2, 5), "int64", 0), Spec("tensor", (6,), "int64", 0)],
    ),
    "scale_index": ([], [0, -1, 99, "1", NAN]),
    "num_items_in_batch": ([4, 0], [NAN, INF, -1]),  # 0 of 0: a rank may have nothing to learn
    "no_such_option": ([], [1]),
}


def call_forward(world, case):
    case = given(case)
    case.setdefault("input_ids", Spec("tensor", (2, 6), "int64", 65).make())
    if "num_items_in_batch" in case:
        case.setdefault("labels", case["input_ids"])
    with torch.no_grad():
        return world.model(**case)


def look_forward(world, case, output):
    loss = output.loss
    return "" if loss is None or torch.isfinite(loss) else f"the loss is {loss}"


SESSION = {
    "text": (["a ring", ""], [None, 5, ["a"], b"a"]),
    "images": ([None, PICTURES[0], [PICTURES[0], PICTURES[15]]], BAD_PICTURES[:6]),
    "turn": (["ask", "draw", "chat"], []),
    "num_scales": ([3], BAD_COUNTS),
    "max_new_tokens": ([2], [0, -1, NAN, "2"]),
    "undo": ([0, 1], [2, -1, NAN, "1"]),
}


def call_session(world, case):
    case = given({"text": "a ring", "turn": "ask", **case})
    turn, undo = case.pop("turn"), case.pop("undo", None)
    if turn == "ask":
        case.pop("num_scales", None)
    session = NextFlowSession(world.model, world.processor, max_new_tokens=2)
    result = getattr(session, turn)(case.pop("text"), **case)
    if undo is not None:
        session.undo(undo)
    return session, result


def look_session(world, case, result):
    return "" if result[0].num_turns in (0, 1) else "one turn was made"


PIPELINE = {
    "prompt": (["a ring", ["a", "b"], ("a", "b")], [None, 5, [], [5], {}, b"a"]),
    "negative_prompt": ([None, "blue"], [5, ["a", "b", "c"], b"a"]),
    "image": ([None, PICTURES[0]], BAD_PICTURES[:6]),
    "height": ([80, None], [0, -80, NAN, "80", 81, 10**12]),
    "width": ([80, None], [0, -80, NAN, "80", 81, 10**12]),
    "guidance_scale": ([None, 1.0, 3.0], BAD_NUMBERS),
    "num_images_per_prompt": ([1, 2], BAD_COUNTS),
    "image_top_k": ([0, 3], [65, 2.5, *BAD_NUMBERS]),
    "image_top_p": ([0.5, 1.0], [0, 1.5, *BAD_NUMBERS]),
    "generator": ([None], [5, "seed", [None]]),
    "output_type": (["pil", "np", "pt", "latent"], ["jpg", 5]),
    "callback_on_step_end": ([None], [5, "print"]),
    "no_such_option": ([], [1]),
}


def call_pipeline(world, case):
    return world.pipe(**{"prompt": "a ring", "num_scales": 3, **given(case)}).images


def look_pipeline(world, case, images):
    if isinstance(images, list) and images and isinstance(images[0], Image.Image):
        prompts = case.get("prompt", "a ring")
        number = case.get("num_images_per_prompt", 1) * (1 if isinstance(prompts, str) else len(prompts))
        return "" if len(images) == number else f"{len(images)} pictures for {number}"
    return "" if len(images) else "no picture"


PIXELS = {
    "pixel_values": (
        [Spec("tensor", (2, 3, 80, 80), "float32"), Spec("tensor", (1, 3, 80, 80), "float32", 1.0)],
        [
            *(Spec("tensor", (1, 3, 80, 80), "float32", fill) for fill in (NAN, INF, 1e9)),
            *(
                Spec("tensor", shape, "float32")
                for shape in ((3, 80, 80), (1, 1, 80, 80), (1, 3, 81, 80), (0, 3, 80, 80))
            ),
            *(Spec("tensor", (1, 3, 80, 80), dtype) for dtype in ("uint8", "complex64")),
            *(None, [], "picture"),
        ],
    ),
    "image_grid_shw": (
        [None],
        [Spec("tensor", shape, "int64", 5) for shape in ((2, 3), (3,), (1, 2))]
        + [5, Spec("tensor", (1, 3), "float32", NAN)],
    ),
    "self_correction": ([True, False], []),
    "generator": ([None], [5, "seed"]),
}


def call_image_tokenizer(world, case):
    return world.processor.image_tokenizer.encode(
        **{"pixel_values": PIXELS["pixel_values"][0][0].make(), **given(case)}
    )


def look_codes(world, case, output):
    codes = output.codes
    inside = all(int(row.min()) >= 0 and int(row.max()) < 64 for row in codes)
    return "" if inside and len(codes) == len(output.image_grid_shw) else "codes beyond the codebook"


# --- configurations ---

CONFIG = {
    "vocab_size": ([323], [0, -1, NAN, "323", 10]),
    "text_vocab_size": ([259], [0, -1, NAN, "259", 10**12]),
    "visual_codebook_size": ([64], [0, -1, NAN, "64"]),
    "visual_code_dim": ([12], [0, -1, NAN, "12"]),
    "num_scales": ([1, 5, 18], [0, -1, NAN, "5", 19, 2**40]),
    "hidden_size": ([32], [0, -32, NAN, "32", 33]),
    "num_hidden_layers": ([1, 2], [-1, NAN, "2", 2**40]),
    "num_attention_heads": ([2], [0, -1, NAN, "2", 3]),
    "num_key_value_heads": ([1, 2], [0, -1, NAN, 3]),
    "rope_spatial_range": ([64.0, 8.0], [NAN, INF, "64", -1.0]),
    "scale_reweight_alpha": ([0.0, 0.9], [NAN, INF, "0.9"]),
    "visual_feature_mode": (["residual", "accumulated"], ["other", 5, None]),
    "boi_token_id": ([3], [-1, 10**9, NAN, "3", 300]),
    "image_token_id": ([5], [-1, 10**9, NAN, "5"]),
    "rope_parameters": ([], [{"mrope_section": [1, 1, 1]}, {"rope_theta": NAN}, 5, {"mrope_section": "abc"}]),
}
TOKENIZER_CONFIG = {
    "codebook_size": ([16], [0, -1, NAN, "16", 2**60]),
    "semantic_code_dim": ([8], [0, -1, NAN, "8"]),
    "pixel_code_dim": ([4], [0, -1, NAN]),
    "num_scales": ([1, 5], [0, -1, NAN, 2**40, "5"]),
    "stride": ([16], [0, -16, NAN, "16", 17]),
    "semantic_distance_weight": ([1.0, 0.0], [NAN, INF, -1.0, "1"]),
    "commitment_cost": ([0.25], [NAN, -1.0, "1"]),
    "self_correction_top_k": ([10], [0, -1, NAN, 2**60]),
    "self_correction_token_fraction": ([0.6], [NAN, -0.1, 1.5]),
    "self_correction_temperature": ([1.0], [NAN, 0.0, -1.0]),
    "decoder_num_res_blocks": ([1], [-1, NAN, 2**40]),
    "encoder_hidden_sizes": ([[8, 8, 8]], [[], [0], "abc", [NAN], [8] * 64]),
    "semantic_config": ([None], [5, {"model_type": "nothing"}, {"hidden_size": -1}]),
}


def call_config(world, case):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "text_vocab_size": 259, "visual_codebook_size": 64, "vocab_size": 323}
    sizes |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    sizes |= {"boi_token_id": 1, "eoi_token_id": 2, "image_token_id": 3, "pad_token_id": 0, "eos_token_id": 4}
    config = NextFlowConfig(**{**sizes, **given(case)})
    with torch.device("meta"):
        return NextFlowForCausalLM(config)


def call_tokenizer_config(world, case):
    return NextFlowImageTokenizerConfig(**given(case))


def nothing_to_see(world, case, result):
    return ""


# --- checkpoints ---

FILES = ["config.json", "model.safetensors", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
FILES += ["processor_config.json", "image_tokenizer/config.json", "image_tokenizer/model.safetensors"]
DAMAGES = ["cut", "empty", "gone", "zeros", "text", "list", "less", "null", "header", "folder"]
CHECKPOINT = {"file": (FILES, []), "damage": (DAMAGES, []), "place": ([0.0, 0.01, 0.3, 0.6, 0.999], [])}


def call_checkpoint(world, case):
    folder = world.scratch / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world.folder, folder)
    path = folder / case["file"]
    if path.is_file():
        damage(path, case["damage"], case["place"])
    model = NextFlowForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, NextFlowProcessor.from_pretrained(folder)


def damage(path: Path, kind: str, place: float) -> None:
    data = path.read_bytes()
    at = int(place * len(data))
    if kind == "cut":
        path.write_bytes(data[:at])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind in ("gone", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
    elif kind == "zeros":
        path.write_bytes(data[:at] + bytes(8) + data[at + 8 :])
    elif kind == "header":
        path.write_bytes(data[:10] + b"\xff" * 4 + data[14:])
    elif path.suffix == ".json":
        content = json.loads(data)
        keys = sorted(content)
        key = keys[int(place * len(keys))]
        changed = {"text": f"{content[key]}?", "list": [], "null": None}.get(kind)
        content = {name: value for name, value in content.items() if name != key}
        path.write_text(json.dumps(content if kind == "less" else {**content, key: changed}))


def look_checkpoint(world, case, result):
    model, _ = result
    if case["file"] == "model.safetensors" and case["damage"] in ("zeros", "text", "list", "less", "null"):
        return ""  # a number in a tensor is as good as another
    for name, value in model.state_dict().items():
        if not torch.equal(value, world.weights.get(name, value).float()):
            return f"{name} is another"
    return ""


def used_by_images(case: dict[str, Any], name: str) -> bool:
    needs = {"image_mean": "do_normalize", "image_std": "do_normalize", "rescale_factor": "do_rescale"}
    # A background shows where there is padding or transparency.
    return name != "background_color" and (name not in needs or case.get(needs[name], True))


def used_by_processor(case: dict[str, Any], name: str) -> bool:
    text = given(case).get("text", "")
    return {
        "num_frames": "<video>" in str(text),
        "num_scales": "<image>" in str(text),
        "max_length": bool(case.get("truncation")),
    }.get(name, True)


def used_by_generate(case: dict[str, Any], name: str) -> bool:
    mode = case.get("generation_mode")
    if name in ("temperature", "top_k", "top_p"):
        return case.get("do_sample") is True and mode != "image"
    return mode != "image" or name not in ("max_new_tokens", "repetition_penalty", "stop_strings")


def used_by_size(case: dict[str, Any], name: str) -> bool:
    """With a number of scales only the aspect of a size counts."""
    forced = case.get("num_scales") is not None
    return not (forced and name in ("height", "width") and case[name].value in (257, 10**12))


def used_by_chat(case: dict[str, Any], name: str) -> bool:
    """Pictures are opened where ids are made; in the text of a chat each is a mark."""
    return case.get("tokenize", True) or '"type": "image"' not in json.dumps(case[name].value)


def used_by_decode(case: dict[str, Any], name: str) -> bool:
    """Text holds no pictures, so it needs no grids."""
    return not no_pictures(given(case))


def no_pictures(case: dict[str, Any]) -> bool:
    return case.get("codes") in ("text", "empty") and case.get("image_grid_shw") == "none"


def used_by_image_tokenizer(case: dict[str, Any], name: str) -> bool:
    return name != "generator" or case.get("self_correction", False)


def used_by_session(case: dict[str, Any], name: str) -> bool:
    turn = case.get("turn", "ask")
    return not (name == "num_scales" and turn == "ask") and not (name == "max_new_tokens" and turn == "draw")


DOORS = [
    Door("schedule", some(SCHEDULE, 0, 4), call_schedule, look_schedule, 0.1),
    Door("schedule from size", some(SIZE, 0, 4), call_size, look_schedule, 0.1, used=used_by_size),
    *(
        Door(
            f"image processor, {name}", some(IMAGE), call_image_processor(backend), look_pixels, 3, used=used_by_images
        )
        for name, backend in {"torchvision": NextFlowImageProcessor, "PIL": NextFlowImageProcessorPil}.items()
    ),
    Door(
        "processor",
        some(PROCESSOR, 1, 4),
        call_processor,
        look_processor,
        5,
        ("please select one of",),
        used_by_processor,
    ),
    Door("chat", some(MESSAGES, 1, 3), call_chat, look_chat, 1, ("message", "role", "content"), used_by_chat),
    Door("decode", some(DECODE, 1, 2), call_decode, look_images, 5, ("ids", "image_grid_shw", "codes"), used_by_decode),
    Door(
        "generate",
        some(GENERATE, 1, 3),
        call_generate,
        look_generate,
        20,
        ("stop strings", "penalty"),
        used_by_generate,
    ),
    Door("forward", some(FORWARD, 1, 3), call_forward, look_forward, 4),
    Door("session", some(SESSION, 1, 4), call_session, look_session, 25, ("turn",), used_by_session),
    Door("pipeline", some(PIPELINE, 1, 3), call_pipeline, look_pipeline, 25),
    Door("image tokenizer", some(PIXELS, 1, 3), call_image_tokenizer, look_codes, 10, used=used_by_image_tokenizer),
    Door("config", some(CONFIG, 1, 3), call_config, nothing_to_see, 2),
    Door("image tokenizer config", some(TOKENIZER_CONFIG, 1, 3), call_tokenizer_config, nothing_to_see, 2),
    Door("checkpoint", some(CHECKPOINT, 3, 3), call_checkpoint, look_checkpoint, 60, (".json", ".safetensors")),
]
