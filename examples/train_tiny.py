"""Trains nextflow-tiny from nothing, by the package's own scripts and trainers: data, image tokenizer, codes, language
model, checkpoint.

    python examples/train_tiny.py --ranks qwen.tiktoken --work runs/tiny

Every step is a command that you can run by itself; all are printed. What is finished is not done again, and a training
goes on from its last whole checkpoint: run the same command again after a kill. Settings are in `configs/tiny/`. Needs
`pip install -e ".[train,tiny]"`, and once the network for emoji (npm), photographs (Debian), the text vocabulary and
the teacher (PyPI).
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

import evaluate_tiny
from tiny_world.package import package, write_model_card
from transformers_nextflow import NextFlowForCausalLM, NextFlowImageTokenizer, NextFlowProcessor
from transformers_nextflow.trainer import find_last_checkpoint

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "configs" / "tiny"
PICTURES, CAPTIONS, CONVERSATIONS = 40_000, 40_000, 60_000
# Scales of a stage of the language model: 64 pixels first, then 128. One picture has all scales of its size.
SIZES = {"64": 4, "128": 8}


@dataclass(frozen=True)
class Step:
    """A command, and the file that says that it is done (None: it finds out by itself)."""

    name: str
    command: tuple[str, ...]
    done: Path | None = None
    output: Path | None = None  # of a training, which resumes


def steps(options: argparse.Namespace) -> Iterator[Step]:
    """All steps in order."""
    work, small = options.work, options.scale
    script = {name: (sys.executable, str(ROOT / "examples" / f"{name}.py")) for name in ("extract_codes", "sft")}

    def data(kind: str, number: int, seed: int) -> Step:
        words = (sys.executable, str(ROOT / "examples" / "make_tiny_data.py"), "--kind", kind, "--seed", str(seed))
        words += ("--number", str(max(16, round(number * small))), "--output", str(work / "data" / kind))
        words += ("--families", *options.families) if options.families else ()
        return Step(f"data: {kind}", words + (("--cache", str(options.cache)) if options.cache else ()))

    def train(name: str, *words: str, processes: int = 1) -> Step:
        settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
        output = work / name
        program = "sft" if name.startswith("language") else "train_image_tokenizer"
        launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes))
        command = (*(launcher if processes > 1 else (sys.executable,)), str(ROOT / "examples" / f"{program}.py"))
        command += ("--config", str(CONFIGS / f"{name}.yaml"), "--output_dir", str(output), *words)
        if small < 1:
            command += ("--max_steps", str(max(2, round(settings["max_steps"] * small))))
        return Step(name, command, output / "model.safetensors", output)

    yield data("pictures", PICTURES, 0)
    before = str(CONFIGS / "image_tokenizer.json")
    for stage in ("pixel", "joint", "decoder"):
        where = ("--pictures", str(work / "data" / "pictures"), "--model_name_or_path", before)
        yield train(f"image_tokenizer_{stage}", *where)
        before = str(work / f"image_tokenizer_{stage}")
    parent, start = work / "parent", work / "start"
    words = (sys.executable, str(ROOT / "examples" / "make_tiny_parent.py"), "--ranks", str(options.ranks))
    words += ("--num-ranks", str(options.num_ranks))
    yield Step("parent", (*words, "--output", str(parent)), parent / "tokenizer.json")
    words = (sys.executable, str(ROOT / "conversion" / "qwen2_5.py"), "--source", str(parent), "--output", str(start))
    yield Step("conversion", (*words, "--image-tokenizer", before), start / "model.safetensors")
    yield data("captions", CAPTIONS, 1)
    yield data("tasks", CONVERSATIONS, 2)
    model = str(start)
    for size, num_scales in SIZES.items():
        folders = []
        for kind, more in (("captions", ("--prompt-style", "bare")), ("tasks", ("--messages-column", "messages"))):
            folders.append(str(work / "codes" / f"{kind}_{size}"))
            words = (*script["extract_codes"], "--source", "parquet", "--data", str(work / "data" / kind / "*.parquet"))
            words += ("--checkpoint", str(start), "--output", folders[-1], "--num-scales", str(num_scales), *more)
            yield Step(f"codes: {kind} {size}", (*words, "--processes", str(options.processes)))
        where = ("--model_name_or_path", model, "--codes", *folders)
        yield train(f"language_{size}", *where, processes=options.processes)
        model = str(work / f"language_{size}")


def execute(command: Sequence[str]) -> int:
    """Runs a command in a process of its own; returns its exit status."""
    return subprocess.run(command, cwd=ROOT).returncode


def run(step: Step) -> None:
    """Runs a step, unless it is done."""
    if step.done is not None and step.done.exists():
        print(f"== {step.name}: done", flush=True)
        return
    command = step.command
    if step.output is not None and find_last_checkpoint(step.output):
        command += ("--resume_from_checkpoint", "true")
    print(f"== {step.name}: {' '.join(command)}", flush=True)
    if execute(command):
        raise SystemExit(f"{step.name} failed; the same command goes on from here.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=Path, required=True, help="qwen.tiktoken, from PyPI's dashscope 2.0.2")
    parser.add_argument("--num-ranks", type=int, default=8192, help="of the text vocabulary, the first ones")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="where everything is kept")
    parser.add_argument("--output", type=Path, help="the finished checkpoint (default: nextflow-tiny in --work)")
    parser.add_argument("--cache", type=Path, help="where fetched packages are kept (default: the user's cache)")
    parser.add_argument("--families", nargs="+", help="of pictures; by default all")
    parser.add_argument("--scale", type=float, default=1.0, help="share of all pictures and steps, to try it out")
    parser.add_argument("--processes", type=int, default=1, help="of extraction and of the language model's training")
    parser.add_argument("--no-evaluation", action="store_true", help="leave the figures of the model card out")
    options = parser.parse_args(arguments)
    if not options.ranks.is_file():
        parser.error(
            f"{options.ranks} does not exist. Get it with `pip download --no-deps dashscope==2.0.2` and unzip "
            "dashscope/resources/qwen.tiktoken from the wheel."
        )
    if not 0 < options.scale <= 1 or options.processes < 1:
        parser.error("--scale must be over 0 and at most 1, --processes at least 1")
    for name in ("ranks", "work", "output", "cache"):
        path = getattr(options, name)
        setattr(options, name, path and path.absolute())  # commands run in the repository's folder
    for step in steps(options):
        run(step)

    output = options.output or options.work / "nextflow-tiny"
    trained = options.work / f"language_{list(SIZES)[-1]}"
    model = NextFlowForCausalLM.from_pretrained(trained, dtype=torch.float32)
    tokenizer = NextFlowImageTokenizer.from_pretrained(options.work / "image_tokenizer_decoder")
    package(model, tokenizer, NextFlowProcessor.from_pretrained(trained).tokenizer, output)
    if not options.no_evaluation:
        table, samples = options.work / "figures.md", options.work / "samples.png"
        words = [str(output), "--markdown", str(table), "--samples", str(samples)]
        evaluate_tiny.main(words + (["--cache", str(options.cache)] if options.cache else []))
        write_model_card(output, table.read_text(encoding="utf-8"))
    print(f"Done: {output}")


if __name__ == "__main__":
    main()
