"""Repeats two of the paper's ablations in the tiny world and prints a table: do its findings hold in direction?

    python examples/ablations.py --work runs/ablations --markdown ablations.md

Input features: residual or accumulated, each with and without self-correction (the paper: accumulated features and
self-correction do not mix, so it takes residual ones). Loss: scale reweighting with alpha = 0.9 or 0. Every run has the
same small language model, seed, batches and number of steps, and differs in what its name says. Only shapes; codes by
nextflow-tiny's image tokenizer. Runs that are finished are kept: start it again after a kill.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from evaluate_tiny import Sample, generate, scene_sample
from tiny_world.codes import Codes, extract_codes
from tiny_world.train_language_model import (
    PEAK_ADAM,
    PEAK_MUON,
    SCHEDULE,
    Batches,
    batch_loss,
    learning_rate_factor,
    make_optimizers,
    new_model,
    tiny_config,
)
from transformers_nextflow import NextFlowConfig, NextFlowForCausalLM, NextFlowProcessor, tiny_checkpoint

KINDS = ("single", "colour", "position", "attribution")
NUM_CODES = 8_000
COARSE_SCALES, COARSE_SHARE = 5, 0.4
GUIDANCE = {"guidance_scale": 3.0, "image_top_p": 0.8}


@dataclass(frozen=True)
class Run:
    """One row of the table."""

    features: str
    self_correction: bool
    alpha: float

    @property
    def name(self) -> str:
        return f"{self.features}-{'corrected' if self.self_correction else 'clean'}-alpha{self.alpha:g}"


RUNS = (
    Run("residual", True, 0.9),
    Run("accumulated", True, 0.9),
    Run("residual", False, 0.9),
    Run("accumulated", False, 0.9),
    Run("residual", True, 0.0),
)


def small_config(processor: NextFlowProcessor, run: Run) -> NextFlowConfig:
    """nextflow-tiny's configuration at 3 layers of width 192."""
    config = tiny_config(processor.tokenizer, processor.image_tokenizer)
    config.update(
        {
            "hidden_size": 192,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "visual_feature_mode": run.features,
            "scale_reweight_alpha": run.alpha,
        }
    )
    return NextFlowConfig(**{name: value for name, value in config.to_dict().items() if name != "layer_types"})


def train(run: Run, processor: NextFlowProcessor, codes: Codes, num_steps: int, batch_size: int, seed: int):
    """A model after `num_steps`: the coarse scales alone at first, then all."""
    torch.manual_seed(seed)
    config = small_config(processor, run)
    model = new_model(config, processor.image_tokenizer).train()
    model.set_attn_implementation("eager")
    if not run.self_correction:
        codes = replace(codes, corrected=codes.clean, targets=codes.clean)
    batches, optimizers = Batches(codes, processor.tokenizer, config), make_optimizers(model)
    rng = np.random.default_rng(seed)
    for step in range(num_steps):
        factor = learning_rate_factor(step, step / num_steps)
        for optimizer, peak in zip(optimizers, (PEAK_MUON, PEAK_ADAM), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        coarse = step < COARSE_SHARE * num_steps
        batch = batches.draw(rng, batch_size * (2 if coarse else 1), COARSE_SCALES if coarse else SCHEDULE.num_scales)
        loss, _, code_loss = batch_loss(model, batch, whole_vocabulary=False)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            print(f"[{run.name}] step {step + 1}/{num_steps} codes {code_loss:.3f}", flush=True)
    model.set_attn_implementation("sdpa")
    return model.eval()


@torch.no_grad()
def held_out_loss(model: NextFlowForCausalLM, processor: NextFlowProcessor, codes: Codes) -> float:
    """Mean cross-entropy of held-out codes, clean inputs, all codes alike."""
    batches = Batches(codes, processor.tokenizer, model.config)
    batches.codes = replace(codes, corrected=codes.clean, targets=codes.clean)
    rng = np.random.default_rng(0)
    losses = [batch_loss(model, batches.draw(rng, 32, SCHEDULE.num_scales), False)[2] for _ in range(8)]
    return float(np.mean(losses))


def accuracies(model: NextFlowForCausalLM, processor: NextFlowProcessor, samples: Sequence[Sample]) -> dict[str, float]:
    """Shares of held-out prompts whose picture the detector accepts, by GenEval's rule and strictly."""
    pictures = generate(model, processor, [sample.prompt for sample in samples], 0, 16, GUIDANCE)
    verdicts = [sample.judge(picture) for sample, picture in zip(samples, pictures, strict=True)]
    return {name: float(np.mean([verdict[name] for verdict in verdicts])) for name in ("accuracy", "strict")}


def format_table(results: Sequence[dict]) -> str:
    """The results as a markdown table."""
    lines = [
        "| features | self-correction | alpha | accuracy | strict | cross-entropy of held-out codes | n |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        corrected = "yes" if result["self_correction"] else "no"
        lines.append(
            f"| {result['features']} | {corrected} | {result['alpha']:g} | {result['accuracy']:.3f} "
            f"| {result['strict']:.3f} | {result['held_out_loss']:.3f} | {result['n']} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"), help="where codes and results are kept")
    parser.add_argument("--runs", nargs="+", choices=[run.name for run in RUNS], help="some only, for processes")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--num-codes", type=int, default=NUM_CODES)
    parser.add_argument("--held-out", type=int, default=256, help="pictures of the held-out loss")
    parser.add_argument("--prompts", type=int, default=50, help="held-out prompts a kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args(arguments)

    options.work.mkdir(parents=True, exist_ok=True)
    processor = NextFlowProcessor.from_pretrained(tiny_checkpoint())
    processor.image_tokenizer.float()
    weights = {"shapes": 1.0}
    codes = extract_codes(processor.image_tokenizer, options.work / "codes", options.num_codes, 1, weights=weights)
    held_out = extract_codes(processor.image_tokenizer, options.work / "held_out", options.held_out, 2, weights=weights)
    rng = np.random.default_rng([options.seed, 1])
    samples = [scene_sample(rng, "test", kind) for _ in range(options.prompts) for kind in KINDS]

    results = []
    for run in RUNS:
        if options.runs and run.name not in options.runs:
            continue
        path = options.work / f"{run.name}-seed{options.seed}.json"
        if not path.exists():
            model = train(run, processor, codes, options.steps, options.batch_size, options.seed)
            result = {
                **asdict(run),
                **accuracies(model, processor, samples),
                "held_out_loss": held_out_loss(model, processor, held_out),
                "n": len(samples),
            }
            path.write_text(json.dumps(result), encoding="utf-8")
        results.append(json.loads(path.read_text(encoding="utf-8")))
    table = format_table(results)
    print(table)
    if options.markdown:
        options.markdown.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
