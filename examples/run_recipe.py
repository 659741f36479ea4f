"""Runs a recipe: a folder whose `recipe.yaml` lists stages, each a command that starts from what earlier ones wrote.

    python examples/run_recipe.py --recipe examples/recipes/tiny --work runs/tiny --set ranks=qwen.tiktoken
    python examples/run_recipe.py --recipe examples/recipes/tiny --work runs/tiny --set ranks=qwen.tiktoken \\
        --from language_64 --launcher "torchrun --nproc_per_node 2"

A stage is a script of this repository with its options. In them `{here}` is the folder that the stage writes, `{NAME}`
that of an earlier stage, `{recipe}` the recipe's own folder, and anything else is given with `--set NAME=VALUE`. What
is finished is not done again, and a training goes on from its last whole checkpoint: run the same line again after a
kill. `--list` only prints the commands, to run them elsewhere. `python -m transformers_nextflow.trainer.plan` says what
stages cost.

`--miniature` tries a recipe out in minutes. A stage's `miniature` says how: more options; or another script (`run`,
`options`, `done`) in its place; or a `folder` that stands for what it would write. A stage that is nothing but that is
one of the miniature alone. The miniature needs nothing that is given with `--set` to the stages that it replaces.
"""

import argparse
import shlex
import string
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from transformers_nextflow.trainer import find_last_checkpoint

ROOT = Path(__file__).parents[1]
RECIPE = "recipe.yaml"
STAGE_FIELDS = {"run", "options", "miniature", "trains", "done", "budget"}
MINIATURE_FIELDS = {"run", "options", "done", "folder"}  # of one that replaces its stage


@dataclass(frozen=True)
class Stage:
    """A stage with its command filled in."""

    name: str
    command: tuple[str, ...]  # without the interpreter
    here: Path
    trains: bool  # it writes checkpoints, resumes from them, and may be launched on many GPUs
    done: str  # the file of `here` that is there when it is finished
    needs: tuple[str, ...] = ()  # the stages that it starts from

    @property
    def is_there(self) -> bool:
        """Whether later stages can start from it."""
        return self.is_done if self.done else self.here.exists()

    @property
    def is_done(self) -> bool:
        """Whether it has nothing left to do; what tells by itself is always run again."""
        return self.done != "" and (self.here / self.done).exists()


def read_recipe(folder: Path) -> dict[str, dict[str, Any]]:
    """The stages of a recipe by name, checked.

    Raises:
        `ValueError`: if there is none, or a stage has unknown fields or no script.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise ValueError(f"{folder} is no recipe: it has no {RECIPE}.")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    stages = recipe.get("stages") if isinstance(recipe, dict) else None
    if not isinstance(stages, dict) or not stages:
        raise ValueError(f"{path} has no `stages`.")
    for name, stage in stages.items():
        stage = stages[name] = stage or {}
        small = stage.get("miniature", "")
        unknown = set(stage) - STAGE_FIELDS | (set(small) - MINIATURE_FIELDS if isinstance(small, dict) else set())
        if unknown:
            raise ValueError(f"Stage {name} of {path} has the unknown fields {', '.join(sorted(unknown))}.")
        for run in filter(None, (in_size(stage, small) for small in (False, True))):
            if "folder" not in run and not (ROOT / run.get("run", "nothing")).is_file():
                raise ValueError(f"Stage {name} of {path} must `run` a script of the repository.")
    return stages


def in_size(stage: Mapping[str, Any], miniature: bool) -> Mapping[str, Any] | None:
    """A stage as it is run, in the miniature or not; None if it has no part in that."""
    small = stage.get("miniature", "")
    if isinstance(small, str):
        return {**stage, "options": f"{stage.get('options', '')} {small if miniature else ''}"}
    if miniature:
        return small
    return stage if stage.keys() != {"miniature"} else None


def fill(name: str, text: str, values: Mapping[str, str], later: Sequence[str]) -> list[str]:
    """The words of a stage's options with their values in place.

    Raises:
        `ValueError`: for a value that is of a later stage, or that nobody has given.
    """
    words = shlex.split(text)
    for word in words:
        for _, key, _, _ in string.Formatter().parse(word):
            if key in later:
                raise ValueError(f"Stage {name} starts from {key}, which comes after it.")
            if key is not None and key not in values:
                raise ValueError(f"Stage {name} needs `--set {key}=...`.")
    return [word.format_map(values) for word in words]


def plan_stages(folder: Path, work: Path, settings: Mapping[str, str], miniature: bool = False) -> Iterator[Stage]:
    """All stages in order, their commands filled in."""
    stages = read_recipe(folder)
    names = list(stages)
    if taken := set(settings) & {*names, "here", "recipe"}:
        raise ValueError(f"`--set` can't be {', '.join(sorted(taken))}: the recipe gives these names their meaning.")
    values = {**settings, "recipe": str(folder)}
    for index, (name, stage) in enumerate(stages.items()):
        here, run = work / name, in_size(stage, miniature)
        if run is None:
            continue
        words = fill(name, run.get("options", ""), {**values, "here": str(here)}, names[index + 1 :])
        if "folder" in run:
            (values[name],) = fill(name, run["folder"], values, names[index:])
            continue
        values[name] = str(here)
        trains = bool(run.get("trains"))
        done = run.get("done", "model.safetensors" if trains else "")
        named = {key for _, key, _, _ in string.Formatter().parse(run.get("options", "")) if key in names}
        yield Stage(name, (str(ROOT / run["run"]), *words), here, trains, done, tuple(sorted(named)))


def refuse_missing(stages: Sequence[Stage], chosen: Sequence[Stage]) -> None:
    """Refuses stages whose predecessors are neither done nor among those that are run.

    Raises:
        `ValueError`: names the first of them.
    """
    by_name = {stage.name: stage for stage in stages}
    for stage in chosen:
        for name in stage.needs:
            before = by_name.get(name)  # one that a folder stands for is no stage here
            if before is not None and before not in chosen and not before.is_there:
                wanted = before.here / before.done if before.done else before.here
                raise ValueError(
                    f"Stage {stage.name} starts from {name}, which has not been finished: there is no {wanted}. Run "
                    f"it first (`--from {name}`), or leave `--from` out."
                )


def execute(command: Sequence[str]) -> int:
    """Runs a command in a process of its own; returns its exit status."""
    return subprocess.run(command, cwd=ROOT).returncode


def run(stage: Stage, launcher: Sequence[str]) -> None:
    """Runs a stage, unless it is done."""
    if stage.is_done:
        print(f"== {stage.name}: done", flush=True)
        return
    start = list(launcher) if stage.trains and launcher else [sys.executable]
    command = [*start, *stage.command]
    if stage.trains and find_last_checkpoint(stage.here):
        command += ["--resume_from_checkpoint", "true"]
    print(f"== {stage.name}: {shlex.join(command)}", flush=True)
    if execute(command):
        raise SystemExit(f"Stage {stage.name} failed; the same command goes on from here.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", type=Path, required=True, help="its folder")
    parser.add_argument("--work", type=Path, required=True, help="where every stage has a folder")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="what the recipe asks for")
    parser.add_argument("--from", dest="first", metavar="STAGE", help="leave out the stages before")
    parser.add_argument("--until", dest="last", metavar="STAGE", help="leave out the stages after")
    parser.add_argument("--launcher", default="", help="of trainings: torchrun or accelerate launch, with its options")
    parser.add_argument("--miniature", action="store_true", help="in minutes, to try it out")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    options = parser.parse_args(arguments)
    if wrong := [pair for pair in options.set if "=" not in pair]:
        parser.error(f"--set takes NAME=VALUE, not {wrong[0]}")
    settings = dict(pair.split("=", 1) for pair in options.set)
    # Commands run in the repository's folder.
    settings = {
        name: str(Path(value).absolute()) if Path(value).exists() else value for name, value in settings.items()
    }
    try:
        stages = list(plan_stages(options.recipe.absolute(), options.work.absolute(), settings, options.miniature))
    except ValueError as error:
        parser.error(str(error))
    names = [stage.name for stage in stages]
    for name in (options.first, options.last):
        if name is not None and name not in names:
            parser.error(f"{name} is no stage of the recipe; they are {', '.join(names)}")
    first = names.index(options.first) if options.first else 0
    last = names.index(options.last) if options.last else len(names) - 1
    chosen = stages[first : last + 1]
    try:
        if not options.list:
            refuse_missing(stages, chosen)
    except ValueError as error:
        parser.error(str(error))
    for stage in chosen:
        if options.list:
            print(f"# {stage.name}\n{shlex.join(['python', *stage.command])}\n")
        else:
            run(stage, shlex.split(options.launcher))


if __name__ == "__main__":
    main()
