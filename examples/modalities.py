"""One picture of each thing the model can do: reading, editing, examples, stories, thoughts, conversations.

    python examples/modalities.py                              # nextflow-tiny; writes runs/modalities/*.png
    python examples/modalities.py FOLDER --output docs/assets/modalities

The samples are the first of their task for the seed; none is selected.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import export_to_gif
from PIL import Image, ImageDraw, ImageFont

from diffusers_nextflow import NextFlowPipeline
from tiny_world.tasks import (
    sample_edit,
    sample_example,
    sample_look,
    sample_question,
    sample_story,
    sample_thought,
)
from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, NextFlowSession, tiny_checkpoint

ZOOM, MARGIN, LINE = 144, 12, 15
Cell = tuple[Image.Image, str]


def sheet(rows: Sequence[Sequence[Cell]]) -> Image.Image:
    """Pictures in rows, each with its text below."""
    font = ImageFont.load_default(size=12)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    texts = [[wrap(text, font, ruler) for _, text in row] for row in rows]
    heights = [ZOOM + 3 + LINE * max(map(len, row)) + MARGIN for row in texts]
    page = Image.new("RGB", (max(map(len, rows)) * (ZOOM + MARGIN) + MARGIN, sum(heights) + MARGIN), "white")
    draw = ImageDraw.Draw(page)
    top = MARGIN
    for row, lines, height in zip(rows, texts, heights, strict=True):
        for x, (picture, _) in enumerate(row):
            left = MARGIN + x * (ZOOM + MARGIN)
            page.paste(picture.convert("RGB").resize((ZOOM, ZOOM), Image.Resampling.LANCZOS), (left, top))
            draw.rectangle([left - 1, top - 1, left + ZOOM, top + ZOOM], outline=(170, 170, 170))
            draw.multiline_text((left, top + ZOOM + 3), "\n".join(lines[x]), fill="black", font=font)
        top += height
    return page


def wrap(text: str, font, draw: ImageDraw.ImageDraw) -> list[str]:
    """Lines that fit below a picture."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= ZOOM or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def parts_of(message) -> tuple[list[Image.Image], str]:
    pictures = [Image.fromarray(part["image"]) for part in message["content"] if part["type"] == "image"]
    return pictures, "".join(part["text"] for part in message["content"] if part["type"] == "text").strip()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def editing(pipe: NextFlowPipeline, seed: int, number: int) -> Image.Image:
    rng, rows = np.random.default_rng(seed), []
    for i in range(number):
        (source,), instruction = parts_of(sample_edit(rng, "test").messages[0])
        edited = pipe(instruction, image=source, generator=seeded(seed + i)).images[0]
        rows.append([(source, "source"), (edited, instruction)])
    return sheet([[*a, *b] for a, b in zip(rows[::2], rows[1::2], strict=True)])


def examples(session: NextFlowSession, seed: int, number: int) -> Image.Image:
    rng, rows = np.random.default_rng(seed), []
    for i in range(number):
        content = sample_example(rng, "test").messages[0]["content"]
        shown = [Image.fromarray(part["image"]) for part in content if part["type"] == "image"]
        inputs = session.processor(
            session.processor.apply_chat_template(
                [{"role": "user", "content": [{k: v for k, v in part.items() if k != "image"} for part in content]}],
                add_generation_prompt=True,
                tokenize=False,
            ),
            images=shown,
            return_tensors="pt",
        )
        sequences = session.model.generate(**inputs, generation_mode="image", generator=seeded(seed + i))
        drawn = session.model.decode_image_tokens(sequences)
        [made] = session.processor.post_process_multimodal_output(drawn, generation_mode="image")
        rows.append(list(zip([*shown, made], ["this", "becomes this", "so this", "becomes"], strict=True)))
    return sheet(rows)


def reading(session: NextFlowSession, seed: int, number: int) -> Image.Image:
    rng, cells = np.random.default_rng(seed), []
    for i in range(number):
        # The second row: questions that are answered after a look.
        sample = sample_look(rng, "test") if i < number // 2 else sample_question(rng, "test", "position", True)
        (picture,), question = parts_of(sample.messages[0])
        answer = session.fork().ask(question, picture, max_new_tokens=24)
        cells.append((picture, f"{question} {answer}"))
    return sheet([cells[: number // 2], cells[number // 2 :]])


def stories(pipe: NextFlowPipeline, seed: int, number: int, folder: Path) -> Image.Image:
    rng, rows = np.random.default_rng(seed), []
    for i in range(number):
        _, prompt = parts_of(sample_story(rng, "test").messages[0])
        frames = pipe(prompt, num_frames=3, prompt_style="chat", generator=seeded(seed + i)).frames[0]
        if i == 0:
            export_to_gif([frame.resize((256, 256)) for frame in frames], str(folder / "story.gif"), fps=2)
        rows.append([(frame, prompt if j == 0 else "") for j, frame in enumerate(frames)])
    return sheet([[*a, *b] for a, b in zip(rows[::2], rows[1::2], strict=True)])


def thoughts(session: NextFlowSession, seed: int, number: int) -> Image.Image:
    rng, rows = np.random.default_rng(seed), []
    for i in range(number):
        _, prompt = parts_of(sample_thought(rng, "test").messages[0])
        plain = session.fork().draw(prompt, generator=seeded(seed + i))
        thinker = session.fork()
        thought_through = thinker.draw(prompt, thinking=True, generator=seeded(seed + i))
        rows.append([(plain, f"at once: {prompt}"), (thought_through, f"thinking: {thinker.last_thought}")])
    return sheet([[*a, *b] for a, b in zip(rows[::2], rows[1::2], strict=True)])


def conversation(session: NextFlowSession, seed: int) -> Image.Image:
    talk = session.fork()
    turns = ["a blue star on a gray background", "make the blue star red", "replace the red star with a circle"]
    cells = [(talk.draw(text, generator=seeded(seed + i)), text) for i, text in enumerate(turns)]
    question = "What colour is the circle?"
    return sheet([[*cells, (cells[-1][0], f"{question} {talk.ask(question, max_new_tokens=8)}")]])


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", nargs="?", default=str(tiny_checkpoint()), help="default: nextflow-tiny")
    parser.add_argument("--output", type=Path, default=Path("runs/modalities"), help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=8, help="samples of each task, even (default 8)")
    options = parser.parse_args(arguments)
    if options.number < 2 or options.number % 2:
        parser.error(f"--number must be even and at least 2, not {options.number}")
    options.output.mkdir(parents=True, exist_ok=True)
    pipe = NextFlowPipeline.from_pretrained(options.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    session = NextFlowSession(
        NextFlowForCausalLM.from_pretrained(options.checkpoint).eval(),
        NextFlowProcessor.from_pretrained(options.checkpoint),
    )
    seed, number = options.seed, options.number
    made = {
        "editing": editing(pipe, seed, number),
        "examples": examples(session, seed, number // 2),
        "reading": reading(session, seed, number),
        "stories": stories(pipe, seed, number, options.output),
        "thoughts": thoughts(session, seed, number),
        "conversation": conversation(session, seed),
    }
    for name, picture in made.items():
        picture.quantize(256).save(options.output / f"{name}.png", optimize=True)
    return [options.output / f"{name}.png" for name in made]


if __name__ == "__main__":
    main()
