"""Kills every long job at random moments, starts it again, and compares what it leaves with an unbroken run.

    python tests/kills/run.py --rounds 60 --jobs sft extract_codes
    python tests/kills/run.py --list

A round starts a job's command, kills it (SIGKILL), and starts the same command again, after up to two more kills to its
end. It must end, and its result must be that of an unbroken run: the same tensors, rows and files, nothing more.
Saving over an old checkpoint is not started again: the folder must load as the old or the new one, or be refused.

Half of the kills strike at the n-th time that the process opens, renames or removes a file for writing, which is where
things break and does not depend on how busy the machine is; half after a share of the CPU time. Commands run in forks
of one process that has imported the libraries, so a round costs what the job costs. `--seed` repeats the moments.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
sys.path.extend(str(Path(__file__).parents[2] / folder) for folder in ("tests", "tests/conversion", "examples", "."))


from conftest import save_tiny_random_checkpoint
from forks import as_script, fork

ROOT = Path(__file__).parents[2]
CPU_SECONDS = 300  # of a whole job: more is a hang
WALL_SECONDS = 1800
# What says when or where something was done, and not what.
PASSING = (
    "README.md",
    "training_args.bin",
    "trainer_state.json",
    "optimizer.pt",
    "scheduler.pt",
    "state.pt",
    "runs",
    "cache-",
)


class Job(NamedTuple):
    """A command whose `{output}` and `{inputs}` are folders; `prepare` fills the inputs, `old` what is saved over.

    `resume` is added once there is a whole checkpoint: before, the trainers say that there is nothing to go on from.
    """

    command: list[str]
    prepare: Callable[[Path], None] = lambda inputs: None
    old: Callable[[Path, Path], None] | None = None
    resume: tuple[str, ...] = ()


def pictures(inputs: Path) -> None:
    import numpy as np
    from PIL import Image

    (inputs / "pictures").mkdir()
    with open(inputs / "pictures" / "metadata.jsonl", "w") as file:
        for index in range(12):
            pixels = np.random.default_rng(index).integers(0, 256, (80, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(inputs / "pictures" / f"{index}.png")
            file.write(json.dumps({"file_name": f"{index}.png", "text": f"picture {index}"}) + "\n")


def codes(inputs: Path) -> None:
    import extract_codes

    pictures(inputs)
    data, checkpoint = inputs / "pictures", inputs / "checkpoint"
    extract_codes.main(["--data", str(data), "--checkpoint", str(checkpoint), "--output", str(inputs / "codes")])


def qwen(inputs: Path) -> None:
    from test_qwen2_5 import save_source

    save_source(inputs / "source", "untied", "20kB")


def tokenflow(inputs: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from test_tokenflow import WEIGHTS

    torch.save({"ema": load_file(WEIGHTS["siglip_tiny"]), "steps": 3}, inputs / "tokenflow.pt")


def siglip(inputs: Path) -> None:
    from test_siglip2 import TEXT, VISION
    from transformers import Siglip2Config, Siglip2Model

    vision = {**VISION, "hidden_size": 24}  # which the converter's 12 heads divide
    Siglip2Model(Siglip2Config(vision_config=vision, text_config=TEXT)).save_pretrained(inputs / "source")


def another_checkpoint(inputs: Path, output: Path) -> None:
    """What is saved over: other weights of the same shapes, with another image tokenizer."""
    import torch

    from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor

    model = NextFlowForCausalLM.from_pretrained(inputs / "checkpoint")
    processor = NextFlowProcessor.from_pretrained(inputs / "checkpoint")
    with torch.no_grad():
        for parameter in [*model.parameters(), *processor.image_tokenizer.parameters()]:
            parameter.add_(1)
    save(model, processor, output)


def save(model, processor, output: Path) -> None:
    from transformers_nextflow.trainer import hash_image_tokenizer

    model.config.image_tokenizer_hash = hash_image_tokenizer(processor.image_tokenizer)
    model.save_pretrained(output, max_shard_size="20kB")
    processor.save_pretrained(output)


SAVE = """
import sys
from pathlib import Path
sys.path.insert(0, "{here}")
from run import save
from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor
model = NextFlowForCausalLM.from_pretrained("{inputs}/checkpoint")
save(model, NextFlowProcessor.from_pretrained("{inputs}/checkpoint"), Path("{output}"))
"""
TOKENIZER = """
import torch
from transformers_nextflow import NextFlowImageTokenizer
from transformers_nextflow.trainer import NextFlowImageTokenizerTrainer, NextFlowImageTokenizerTrainingConfig
from transformers_nextflow.trainer import find_last_checkpoint
coarse = torch.rand(8, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
images = torch.nn.functional.interpolate(coarse, (80, 80), mode="bilinear")
torch.manual_seed(0)
trainer = NextFlowImageTokenizerTrainer(
    NextFlowImageTokenizer.from_pretrained("{inputs}/checkpoint", subfolder="image_tokenizer"),
    NextFlowImageTokenizerTrainingConfig(
        "{output}", stage="pixel", max_steps=8, learning_rate=3e-3, save_steps=2, report_to=[], use_cpu=True,
        per_device_train_batch_size=4, revive_steps=3,
    ),
    train_dataset=[{{"pixel_values": image}} for image in images],
)
trainer.train(resume_from_checkpoint=find_last_checkpoint("{output}") is not None)
trainer.save_model()
"""
TOKENFLOW = """
from test_tokenflow import GOLDEN_SETTINGS
from conversion.tokenflow import convert_tokenflow
settings = GOLDEN_SETTINGS["siglip_tiny"]  # smaller than what the command takes
convert_tokenflow("{inputs}/tokenflow.pt", "{output}", max_shard_size="200kB", **settings)
"""
RANKS = ROOT / "tests" / "fixtures" / "qwen" / "first_1024_ranks.tiktoken"
TRAINER = "--model_name_or_path {inputs}/checkpoint --output_dir {output} "
TRAINER += "--use_cpu true --bf16 false --report_to none --save_strategy steps"
RESUME = ("--resume_from_checkpoint", "true")
CODES = "--codes {inputs}/codes --checkpoint {inputs}/checkpoint --output {output}"
PICTURES = "--data {inputs}/pictures --checkpoint {inputs}/checkpoint --output {output}"
CONVERTER = "--source {inputs}/source --output {output} --max-shard-size 20kB"
JOBS: dict[str, Job] = {
    "sft": Job(
        f"examples/sft.py --codes {{inputs}}/codes {TRAINER} --max_steps 8 --save_steps 2 "
        "--per_device_train_batch_size 2".split(),
        codes,
        resume=RESUME,
    ),
    "grpo": Job(
        f"examples/grpo_shapes.py {TRAINER} --max_steps 4 --save_steps 1 --num_prompts 16 --num_generations 2 "
        "--per_device_train_batch_size 4 --num_trained_scales 3".split(),
        resume=RESUME,
    ),
    "loop": Job(f"examples/train_loop.py {CODES} --steps 8 --budget 500 --save-every 2".split(), codes),
    "image_tokenizer": Job(["-c", TOKENIZER]),
    "extract_codes": Job(f"examples/extract_codes.py {PICTURES} --shard-size 3".split(), pictures),
    "qwen2_5": Job(
        f"conversion/qwen2_5.py {CONVERTER} --text-tokenizer {RANKS} "
        "--image-tokenizer {inputs}/checkpoint/image_tokenizer".split(),
        qwen,
    ),
    "tokenflow": Job(["-c", TOKENFLOW], tokenflow),
    "siglip2": Job(f"conversion/siglip2.py {CONVERTER}".split(), siglip),
    "save": Job(["-c", SAVE], old=another_checkpoint),
}


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file of a result, of tensors and not of their order; checkpoints on the way are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not name.startswith("checkpoint-") and not path.name.startswith(PASSING):
            found[name] = _tensors(path) if path.suffix == ".safetensors" else _hash(path.read_bytes())
    return found


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _tensors(path: Path) -> str:
    import torch
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for name, value in sorted(load_file(path).items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Killer:
    """Ends this process at its n-th change of a file (0: never, and only counts), or after so much CPU time."""

    def __init__(self, change: int = 0, cpu_seconds: float = 0.0, report: Path | None = None):
        self.change, self.cpu_seconds, self.report = change, cpu_seconds, report
        self.count, self.pid = 0, 0

    def install(self) -> None:
        self.pid = os.getpid()
        if self.cpu_seconds:
            signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process without any cleaning up
            signal.setitimer(signal.ITIMER_PROF, self.cpu_seconds)
        sys.addaudithook(self.see)

    def see(self, event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and any(letter in arguments[1] for letter in "wax+")
        if not (writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")):
            return
        if os.getpid() != self.pid:
            return
        self.count += 1
        if self.count == self.change:
            os.kill(self.pid, signal.SIGKILL)


class Runner:
    """A job with its inputs and its unbroken result."""

    def __init__(self, name: str, folder: Path):
        self.job, self.folder = JOBS[name], folder
        self.inputs = folder / "inputs"
        self.inputs.mkdir(parents=True)
        save_tiny_random_checkpoint(self.inputs / "checkpoint")
        code, log = self.forked(lambda: self.job.prepare(self.inputs), Killer())
        if code:
            raise RuntimeError(f"The inputs of {name} can't be made:\n{log[-3000:]}")
        self.output = folder / "output"
        self.begin()
        self.before = contents(self.output)
        code, log = self.run(Killer(report=folder / "counts"))
        if code:
            raise RuntimeError(f"An unbroken run of {name} fails:\n{log[-3000:]}")
        self.changes, self.cpu_seconds = json.loads((folder / "counts").read_text())
        self.unbroken = contents(self.output)

    def begin(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        for path in self.folder.glob("output*"):  # what stands beside it, such as output.partial
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.job.old is not None:
            old = self.job.old
            self.forked(lambda: old(self.inputs, self.output), Killer())

    def forked(self, function: Callable[[], object], killer: Killer) -> tuple[int, str]:
        """Exit code (negative: a signal's number) and output of a function in a fork."""

        def limited():
            os.chdir(ROOT)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            start = time.process_time()
            killer.install()
            function()
            signal.setitimer(signal.ITIMER_PROF, 0)
            killer.change = 0
            if killer.report is not None:
                killer.report.write_text(json.dumps([killer.count, time.process_time() - start]))

        log = self.folder / "log"
        process = fork(limited, log)
        deadline = time.monotonic() + WALL_SECONDS
        while True:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.killpg(process, signal.SIGKILL)
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)  # what it had started
        return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")

    def run(self, killer: Killer) -> tuple[int, str]:
        places = {"output": self.output, "inputs": self.inputs, "here": Path(__file__).parent}
        from transformers_nextflow.trainer import find_last_checkpoint

        words = [*self.job.command, *(self.job.resume if find_last_checkpoint(self.output) else ())]
        return self.forked(as_script([word.format(**places) for word in words]), killer)

    def moment(self, rng: random.Random) -> Killer:
        if rng.random() < 0.5:
            return Killer(change=rng.randint(1, self.changes))
        return Killer(cpu_seconds=max(0.01, rng.random() * self.cpu_seconds))

    def round(self, rng: random.Random) -> str:
        """One round; what is wrong with it, or ""."""
        self.begin()
        if self.job.old is not None:
            self.run(self.moment(rng))
            code, log = self.forked(self.load, Killer())
            known = code == 0 or "ValueError" in log.strip().splitlines()[-1] or "OSError" in log
            return "" if known else log.strip().splitlines()[-1]
        for _ in range(rng.randint(1, 3)):
            code, log = self.run(self.moment(rng))
            if contents(self.output) == self.unbroken and not self.beside():
                return ""
            if code > 0:
                return f"a restart fails: {_last_line(log)}"
        code, log = self.run(Killer())
        if code:
            return f"{'a hang' if code < 0 else 'the last start fails'}: {_last_line(log)}"
        result = contents(self.output)
        other = sorted(
            name for name in result.keys() | self.unbroken.keys() if result.get(name) != self.unbroken.get(name)
        )
        beside = self.beside()
        return f"other than unbroken: {', '.join([*other, *beside][:4])}" if other or beside else ""

    def beside(self) -> list[str]:
        """What a run has left outside of its folder."""
        return sorted(path.name for path in self.folder.glob("output?*"))

    def load(self) -> None:
        """Loads what was saved; what is neither the old nor the new checkpoint is an AssertionError."""
        from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor

        model = NextFlowForCausalLM.from_pretrained(self.output)
        processor = NextFlowProcessor.from_pretrained(self.output)
        new_model = NextFlowForCausalLM.from_pretrained(self.inputs / "checkpoint")
        new_processor = NextFlowProcessor.from_pretrained(self.inputs / "checkpoint")
        shifts = set()
        for part, new in ((model, new_model), (processor.image_tokenizer, new_processor.image_tokenizer)):
            for (name, value), wanted in zip(part.named_parameters(), new.parameters(), strict=True):
                shift = (value.float() - wanted.float()).mean()
                shifts.add(int(shift.round()))
                assert shift.round() in (0, 1), f"{name} is neither old nor new"
        assert len(shifts) == 1, "a mixture of the old and the new checkpoint loads"


def _last_line(log: str) -> str:
    return (log.strip().splitlines() or [""])[-1][:200]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--rounds", type=int, default=60, help="over all jobs (default 60)")
    parser.add_argument("--seconds", type=float, default=3600, help="no round begins after so long (default 3600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="show the commands")
    options = parser.parse_args(arguments)
    if options.list:
        for name, job in JOBS.items():
            print(f"{name}: python {' '.join(job.command)}\n")
        return 0
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import trl  # noqa: F401

    import transformers_nextflow.trainer  # noqa: F401
    from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor  # noqa: F401

    wrong = 0
    begin = time.monotonic()
    for index, name in enumerate(options.jobs):
        rounds = len(range(index, options.rounds, len(options.jobs)))
        with tempfile.TemporaryDirectory() as folder:
            try:
                runner = Runner(name, Path(folder) / name)
            except RuntimeError as error:
                wrong += rounds
                print(f"{name}: {error}", flush=True)
                continue
            found: Counter[str] = Counter()
            done = 0
            for number in range(rounds):
                if time.monotonic() - begin > options.seconds:
                    break
                rng = random.Random(f"{options.seed} {name} {number}")
                found[runner.round(rng).replace(folder, "")] += 1
                done += 1
            good = found.pop("", 0)
            wrong += done - good
            size = f"{runner.changes} changes of files and {runner.cpu_seconds:.1f} CPU seconds a run"
            print(f"{name}: {good} of {done} rounds are right ({size})", flush=True)
            for what, count in found.most_common():
                print(f"  {count} x {what}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
