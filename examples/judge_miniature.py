"""Judges what the miniature of a recipe has learned: twelve things, drawn, read and edited through every door.

    python examples/judge_miniature.py --model runs/mine/grpo --output runs/mine/judged

Every door draws all of them once, and the judge of `tiny_world/little.py` looks at the pixels. OUTPUT/figures.md has
the table, OUTPUT/drawn.png the pictures of `NextFlowPipeline` and OUTPUT/edited.png sources above their edits.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor, pipeline

from diffusers_nextflow import NextFlowPipeline
from diffusers_nextflow.__main__ import main as command_line
from tiny_world.little import NAMES, QUESTION, change, draw_thing, name_thing
from tiny_world.shapes import article

SAMPLING = {"guidance_scale": 2.0, "image_top_k": 5}
COMMANDS = 3  # things that the command line draws: it loads the model for each


def ask(*parts: Any) -> list[dict[str, Any]]:
    """A conversation of one message, of texts and pictures."""
    named = [{"type": "text" if isinstance(part, str) else "image"} for part in parts]
    content = [{**kind, kind["type"]: part} for kind, part in zip(named, parts, strict=True)]
    return [{"role": "user", "content": content}]


def draw_with_command(model: Path, prompt: str, seed: int) -> Image.Image:
    sampling = ["--guidance-scale", str(SAMPLING["guidance_scale"]), "--top-k", str(SAMPLING["image_top_k"])]
    with TemporaryDirectory() as folder:
        output = Path(folder, "out.png")
        options = ["--model", str(model), "--seed", str(seed), "--output", str(output), "--quiet"]
        command_line([prompt, *options, *sampling])
        return Image.open(output).convert("RGB")


def judge(model: Path) -> tuple[dict[tuple[str, str], list[bool]], list[Image.Image], list[Image.Image]]:
    """By task and door, whether each answer was right; pictures drawn, and sources with their edits."""
    pipe = NextFlowPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    text_to_image, chat, read = (
        pipeline(task, model=str(model)) for task in ("text-to-image", "any-to-any", "image-text-to-text")
    )
    plain = AutoModelForMultimodalLM.from_pretrained(model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(model)
    styles, rng = plain.generation_config.prompt_styles, np.random.default_rng(0)

    def auto(prompt: str, seed: int) -> Image.Image:
        batch = processor(processor.style_prompt(prompt, "image", styles), return_tensors="pt")
        generator = torch.Generator().manual_seed(seed)
        options = {**SAMPLING, "generator": generator, "return_dict_in_generate": True}
        out = plain.generate(**batch, generation_mode="image", **options)
        return processor.decode_images(out.sequences, out.image_grid_shw)[0][0]

    def chat_picture(messages: list[dict[str, Any]], seed: int) -> Image.Image:
        options = {**SAMPLING, "generator": torch.Generator().manual_seed(seed)}
        return chat(messages, generation_mode="image", generate_kwargs=options)[0]["generated_image"]

    def nextflow_pipeline(prompt: str, seed: int, **more: Any) -> Image.Image:
        return pipe(prompt, generator=torch.Generator().manual_seed(seed), **SAMPLING, **more).images[0]

    doors: dict[str, Callable[[str, int], Image.Image]] = {
        "`NextFlowPipeline`": nextflow_pipeline,
        "Auto classes": auto,
        '`pipeline("text-to-image")`': lambda prompt, seed: text_to_image(prompt, seed=seed, **SAMPLING)[0],
        '`pipeline("any-to-any")`': lambda prompt, seed: chat_picture(ask(prompt), seed),
        "command line": lambda prompt, seed: draw_with_command(model, prompt, seed),
    }
    right: dict[tuple[str, str], list[bool]] = {}
    drawn, edited = [], []
    for door, draw in doors.items():
        names = NAMES[:: len(NAMES) // COMMANDS] if door == "command line" else NAMES
        pictures = [draw(article(name), seed) for seed, name in enumerate(names)]
        right["drawing", door] = [name_thing(picture) == name for picture, name in zip(pictures, names, strict=True)]
        drawn = drawn or pictures
    for seed, name in enumerate(NAMES):
        picture = draw_thing(name, rng)
        question = ask(picture, QUESTION)
        answers = {
            '`pipeline("image-text-to-text")`': read(text=question, max_new_tokens=24, return_full_text=False),
            '`pipeline("any-to-any")`': chat(
                question, generation_mode="text", max_new_tokens=24, return_full_text=False
            ),
        }
        for door, answer in answers.items():
            right.setdefault(("reading", door), []).append(answer[0]["generated_text"].strip() == article(name))
        instruction, changed = change(name, rng)
        result = nextflow_pipeline(instruction, seed, image=picture)
        right.setdefault(("editing", "`NextFlowPipeline`"), []).append(name_thing(result) == changed)
        edited += [picture.resize(result.size), result]
        result = chat_picture(ask(picture, instruction), seed)
        right.setdefault(("editing", '`pipeline("any-to-any")`'), []).append(name_thing(result) == changed)
    return right, drawn, edited


def sheet(pictures: Sequence[Image.Image], rows: int) -> Image.Image:
    """Pictures column by column."""
    columns = [np.concatenate([np.asarray(p) for p in pictures[i : i + rows]]) for i in range(0, len(pictures), rows)]
    return Image.fromarray(np.concatenate(columns, axis=1))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the last stage")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    right, drawn, edited = judge(options.model)
    rows = [f"| {task} | {door} | {np.mean(of):.2f} | {len(of)} |" for (task, door), of in right.items()]
    table = "\n".join(["| task | door | right | n |", "|---|---|---:|---:|", *rows]) + "\n"
    options.output.mkdir(parents=True, exist_ok=True)
    sheet(drawn, 3).save(options.output / "drawn.png")
    sheet(edited, 2).save(options.output / "edited.png")
    (options.output / "figures.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
