"""The papers' ablations in miniature: one script, one table, and whether each came out as the paper has it.

    python examples/ablations.py --work runs/ablations --markdown ablations.md
    python examples/ablations.py --studies cost correction in_context          # minutes; the rest takes hours
    python examples/ablations.py --studies features --seeds 0

| study | the paper (arXiv 2601.02204) | here |
|---|---|---|
| `cost` | figure 24: FLOPs of an MMDiT over ours, four sizes | the cost model, exact |
| `correction` | 60 % of tokens drawn among the nearest | what share changes, what it costs, what later scales repair |
| `in_context` | section 2: examples in the prompt | edits by an own example, another's, none |
| `features` | figure 10 | residual or accumulated features at 0, 30, 60, 100 % of tokens drawn |
| `heads` | figure 9 | one head over both vocabularies, or two |
| `text` | table 1 | a quarter of text-only data, or none |
| `reweighting` | figure 11 | from 5 to 8 scales at alpha 0 and 0.9, losses by scale |
| `tokenizer` | figure 8, the recipe of section 3 | tokenizers of equal steps, and a language model on each's codes |
| `prefixes` | figure 12 | GRPO on prefixes of 1 to 8 scales |

Language models have 3 layers of width 192 with heads of 64 at theta 1e6, learn shapes alone, and have the same seed,
batches and number of steps unless the study says otherwise. Accuracy is a detector's verdict on held-out prompts
("strict" wants nothing superfluous), loss the mean cross-entropy of held-out codes, among codes alone, on true inputs.
A run is a file in `--work`, named by its sizes, and is not repeated: start the script again after a kill. The table
says of how many seeds a row is; what has not run has no row.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from evaluate_tiny import generate, reconstruct, scene_sample, to_pixels
from tiny_world.shapes import render, sample_scene
from tiny_world.tasks import sample_example, sample_reading
from transformers_nextflow import (
    NextFlowConfig,
    NextFlowForCausalLM,
    NextFlowImageTokenizer,
    NextFlowProcessor,
    ScaleSchedule,
    tiny_checkpoint,
)
from transformers_nextflow.multi_scale_quantizer import SelfCorrection, downsample, upsample
from transformers_nextflow.token_layout import TokenLayout

KINDS = ("single", "colour", "position", "attribution")
SCHEDULE = ScaleSchedule(num_scales=8)
COARSE_SCALES = 5
GUIDANCE = {"guidance_scale": 3.0, "image_top_p": 0.8}
FRACTIONS = (0.0, 0.3, 0.6, 1.0)
Result = dict[str, Any]


# What a study measures


@dataclass(frozen=True)
class Run:
    """A language model: what differs from run to run. `codes` names the tokenizer that made them."""

    features: str = "residual"
    fraction: float = 0.6
    alpha: float = 0.9
    heads: int = 1
    text: float = 0.0
    codes: str = "nextflow-tiny"
    start_scales: int = 0  # train on so many scales alone first, then as many steps on all

    @property
    def name(self) -> str:
        changed = {name: value for name, value in asdict(self).items() if value != getattr(Run(), name)}
        return ",".join(f"{name}={value}" for name, value in changed.items()) or "base"


STUDIES: dict[str, tuple[str, list[tuple[str, Run]]]] = {
    "features": (
        "Figure 10: accumulated with correction below accumulated without; residual gains from it, most at 60 %",
        [
            (f"{f}, {n:.0%} of tokens", Run(features=f, fraction=n))
            for f in ("residual", "accumulated")
            for n in FRACTIONS
        ],
    ),
    "heads": ("Figure 9: one head has the lower loss", [("one head", Run()), ("two heads", Run(heads=2))]),
    "text": ("Table 1: a quarter of text does no harm", [("no text", Run()), ("a quarter of text", Run(text=0.25))]),
    "reweighting": (
        "Figure 11: without reweighting finer scales raise the losses of coarse ones; alpha 0.9 mends it",
        [(f"5 scales, then 8 at alpha {a:g}", Run(alpha=a, start_scales=COARSE_SCALES)) for a in (0.0, 0.9)],
    ),
}


# The language model


@dataclass(frozen=True)
class Codes:
    """M captions, and codes `(M, N)` int16: the nearest; drawn ones and their targets, by fraction of tokens."""

    captions: list[str]
    clean: np.ndarray
    drawn: dict[float, np.ndarray]
    targets: dict[float, np.ndarray]


@torch.no_grad()
def extract(tokenizer: NextFlowImageTokenizer, file: Path, number: int, seed: int) -> Codes:
    """Codes of random training scenes at all fractions; kept in a file."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, "train", KINDS[index % len(KINDS)]) for index in range(number)]
    if not file.exists():
        generator, parts = torch.Generator().manual_seed(seed), {}
        for start in range(0, number, 50):
            features = tokenizer.encode_features(to_pixels([render(scene) for scene in scenes[start : start + 50]]))
            parts.setdefault("clean", []).append(tokenizer.quantize(features).codes)
            for fraction in FRACTIONS[1:]:
                result = tokenizer.quantizer(features, SCHEDULE.grids, SelfCorrection(10, fraction, 1.0), generator)
                parts.setdefault(f"drawn {fraction}", []).append(result.codes)
                parts.setdefault(f"targets {fraction}", []).append(result.target_codes)
        arrays = {name: torch.cat(rows).numpy().astype(np.int16) for name, rows in parts.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file.with_suffix(".part.npz"), **arrays)
        file.with_suffix(".part.npz").rename(file)
    arrays = dict(np.load(file))
    drawn, targets = (
        {0.0: arrays["clean"], **{f: arrays[f"{name} {f}"] for f in FRACTIONS[1:]}} for name in ("drawn", "targets")
    )
    return Codes([scene.caption for scene in scenes], arrays["clean"], drawn, targets)


def new_model(run: Run, processor: NextFlowProcessor) -> NextFlowForCausalLM:
    """A fresh small model at Qwen2.5's theta."""
    text, images = processor.tokenizer, processor.image_tokenizer.config
    ids = {f"{name}_token_id": text.convert_tokens_to_ids(f"<{name}>") for name in ("boi", "eoi", "image")}
    config = NextFlowConfig(
        vocab_size=len(text) + images.codebook_size,
        text_vocab_size=len(text),
        visual_codebook_size=images.codebook_size,
        visual_code_dim=images.code_dim,
        num_scales=SCHEDULE.num_scales,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        visual_feature_mode=run.features,
        scale_reweight_alpha=run.alpha,
        bos_token_id=None,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        **ids,
    )
    model = NextFlowForCausalLM(config)
    with torch.no_grad():
        model.model.visual_codebook.weight.copy_(processor.image_tokenizer.quantizer.codebook())
        if processor.image_tokenizer.config.semantic_distance_weight == 0:  # one branch: no semantic half to see
            model.model.visual_codebook.weight[:, : images.semantic_code_dim] = 0
    return model


def make_batch(
    rng: np.random.Generator, run: Run, codes: Codes, processor: NextFlowProcessor, size: int, scales: int
) -> dict[str, torch.Tensor]:
    """Rows of caption, `<boi>` and codes, a tenth of them without the caption; and a share of rows of text alone."""
    tokenizer, num_codes, first = processor.tokenizer, SCHEDULE.offsets[scales], processor.visual_token_offset
    rows, labels, grids = [], [], []
    for place in range(size):
        if place < round(run.text * size):
            messages = sample_reading(rng).messages
            row = tokenizer.encode(" ".join(m["content"][0]["text"] for m in messages), add_special_tokens=False)
            wanted = [-100, *row[1:]]
        else:
            index = int(rng.integers(len(codes.captions)))
            text = [] if rng.random() < 0.1 else tokenizer.encode(codes.captions[index], add_special_tokens=False)
            seen, aim = (part[run.fraction][index, :num_codes].astype(int) for part in (codes.drawn, codes.targets))
            row = [*text, processor.boi_token_id, *(seen + first)]
            wanted = [-100, *text[1:], *[-100] * bool(text), *(aim + first)]  # `<boi>` is given, not written
            grids.append([scales, *SCHEDULE.bucket])
        rows.append(row)
        labels.append(wanted)
    length = max(map(len, rows))
    pads = [length - len(row) for row in rows]
    return {
        "input_ids": torch.tensor([[*row, *[tokenizer.pad_token_id] * n] for row, n in zip(rows, pads, strict=True)]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * n for row, n in zip(rows, pads, strict=True)]),
        "labels": torch.tensor([[*row, *[-100] * n] for row, n in zip(labels, pads, strict=True)]),
        "image_grid_shw": torch.tensor(grids),
    }


def losses_of(
    model: NextFlowForCausalLM, batch: dict[str, torch.Tensor], heads: int, text_weight: float = 0.3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss to learn from; and of every code its cross-entropy and its scale.

    With two heads text ids and codes are predicted among their own kind alone.
    """
    config, first = model.config, model.config.text_vocab_size
    labels = batch["labels"][:, 1:]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        is_code, is_text = labels >= first, (labels >= 0) & (labels < first)
        code_logits, text_logits = (model.lm_head(hidden[where]).float() for where in (is_code, is_text))
    layout = TokenLayout.of(batch["input_ids"], batch["image_grid_shw"], config, batch["attention_mask"])
    weights = layout.loss_weights(float(config.scale_reweight_alpha))[:, 1:][is_code]
    among_codes = F.cross_entropy(code_logits[:, first:], labels[is_code] - first, reduction="none")
    if heads == 2:
        code_losses, text_logits = among_codes, text_logits[:, :first]
    else:
        code_losses = F.cross_entropy(code_logits, labels[is_code], reduction="none")
    text_loss = F.cross_entropy(text_logits, labels[is_text], reduction="sum") / is_text.sum().clamp(min=1)
    loss = (code_losses * weights).sum() / max(1, len(weights)) + text_weight * text_loss
    return loss, among_codes, layout.scale_of_tokens()[:, 1:][is_code]


def train_language_model(
    run: Run, processor: NextFlowProcessor, codes: Codes, options: argparse.Namespace, seed: int
) -> tuple[NextFlowForCausalLM, list[NextFlowForCausalLM]]:
    """A trained model; before it, with `start_scales`, what it was when it had seen those alone."""
    torch.manual_seed(seed)
    model = new_model(run, processor).train()
    model.set_attn_implementation("eager")
    matrices = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    others = [p for n, p in model.named_parameters() if not (".layers." in n and p.ndim == 2)]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01), 0.02),
        (torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01), 2e-3),
    ]
    rng, early = np.random.default_rng(seed), []
    total = options.steps * (2 if run.start_scales else 1)
    for step in range(total):
        coarse = step < (options.steps if run.start_scales else 0.4 * options.steps)
        if run.start_scales and step == options.steps:
            early.append(copy.deepcopy(model))
        factor = min(1.0, (step + 1) / 100) * min(1.0, max(0.01, (1 - step / total) / 0.4))
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        # alpha is for the second part: small pictures are trained without it, as in the paper.
        model.config.scale_reweight_alpha = 0.0 if run.start_scales and coarse else run.alpha
        size, scales = options.batch_size * (2 if coarse else 1), COARSE_SCALES if coarse else SCHEDULE.num_scales
        loss, code_losses, _ = losses_of(model, make_batch(rng, run, codes, processor, size, scales), run.heads)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0:
            print(f"[{run.name}] step {step + 1}/{total} codes {float(code_losses.mean()):.3f}", flush=True)
    model.set_attn_implementation("sdpa")
    return model.eval(), early


@torch.no_grad()
def held_out_losses(model: NextFlowForCausalLM, processor: NextFlowProcessor, codes: Codes, scales: int) -> list[float]:
    """Mean cross-entropy of held-out codes at each scale, on true inputs."""
    rng, sums = np.random.default_rng(0), torch.zeros(2, scales)
    for _ in range(max(1, len(codes.captions) // 32)):
        _, losses, of_scale = losses_of(
            model, make_batch(rng, Run(fraction=0.0), codes, processor, 32, scales), heads=2
        )
        sums[0].index_add_(0, of_scale, losses)
        sums[1] += torch.bincount(of_scale, minlength=scales)
    return (sums[0] / sums[1]).tolist()


def measure_language_model(run: Run, processor: NextFlowProcessor, options: argparse.Namespace, seed: int) -> Result:
    """Trains, and measures loss by scale and accuracy."""
    folder, tokenizer = options.work / "codes", processor.image_tokenizer
    codes = extract(tokenizer, folder / f"{run.codes}-{options.pictures}.npz", options.pictures, 1)
    held_out = extract(tokenizer, folder / f"{run.codes}-held-out-{options.held_out}.npz", options.held_out, 2)
    model, early = train_language_model(run, processor, codes, options, seed)
    result: Result = {}
    if early:
        result["before"] = held_out_losses(early[0].eval(), processor, held_out, COARSE_SCALES)
    result["by scale"] = held_out_losses(model, processor, held_out, SCHEDULE.num_scales)
    shares = np.diff(SCHEDULE.offsets) / SCHEDULE.num_tokens
    result["loss"] = float(np.dot(result["by scale"], shares))
    rng = np.random.default_rng([seed, 1])
    samples = [scene_sample(rng, "test", KINDS[index % len(KINDS)]) for index in range(options.prompts)]
    pictures = generate(model, processor, [sample.prompt for sample in samples], 0, 16, GUIDANCE)
    verdicts = [sample.judge(picture) for sample, picture in zip(samples, pictures, strict=True)]
    return {**result, **{name: float(np.mean([v[name] for v in verdicts])) for name in ("accuracy", "strict")}}


# Studies of their own


def cost_rows() -> Iterator[Result]:
    """Figure 24. The paper lists no schedule of 2048 pixels; sides of 96 and 128 after the 18 give its figures."""
    sides = (*(grid[0] for grid in ScaleSchedule().grids), 96, 128)
    paper = {256: (3.1, 1.4, 2.9), 512: (4.3, 2.0, 3.7), 1024: (7.2, 4.7, 6.0), 2048: (9.2, 6.5, 7.0)}
    text, width = 100, 2048
    for (pixels, printed), steps in zip(paper.items(), (12, 16, 18, 20), strict=True):
        lengths = [text, *(side * side for side in sides[:steps])]
        seen = np.cumsum(lengths)
        linear, attention = 12 * sum(lengths), 4 * int(np.dot(lengths, seen))
        theirs = 12 * lengths[-1] * steps, 4 * lengths[-1] ** 2 * steps
        total = (theirs[0] * width + theirs[1]) / (linear * width + attention)
        ratios = (theirs[0] / linear, theirs[1] / attention, total)
        named = zip(("linear", "attention", "total"), ratios, printed, strict=True)
        figures = {f"{name} (paper {there})": round(here, 2) for name, here, there in named}
        yield {"setting": f"{pixels} pixels, {steps} scales", **figures}


@torch.no_grad()
def correction_rows(processor: NextFlowProcessor, model: NextFlowForCausalLM, number: int) -> Iterator[Result]:
    """How many tokens change and what pictures lose, over k and temperature; and what the model repairs."""
    tokenizer, generator = processor.image_tokenizer, torch.Generator().manual_seed(0)
    rng = np.random.default_rng(3)
    scenes = [sample_scene(rng, "test", KINDS[index % len(KINDS)]) for index in range(number)]
    pixels = to_pixels([render(scene) for scene in scenes])
    features = tokenizer.encode_features(pixels)
    clean = tokenizer.quantize(features)

    def psnr(codes: torch.Tensor) -> float:
        error = (tokenizer.decode(codes, clean.image_grid_shw) - pixels).square().mean((1, 2, 3))
        return float((10 * torch.log10(4 / error)).mean())

    yield {"setting": "nothing drawn", "PSNR": psnr(clean.codes)}
    for k, temperature in ((2, 1.0), (10, 0.3), (10, 1.0), (10, 3.0), (50, 1.0)):
        row: Result = {"setting": f"k = {k}, T = {temperature:g}"}
        for fraction in (0.6, 1.0):
            correction = SelfCorrection(k, fraction, temperature)
            drawn = tokenizer.quantizer(features, SCHEDULE.grids, correction, generator)
            row[f"changed of {fraction:.0%}"] = float((drawn.codes != drawn.target_codes).float().mean())
            row[f"PSNR at {fraction:.0%}"] = psnr(drawn.codes)
        yield row
    for scale in (2, 3, 4):  # counted from 1
        yield repair_row(processor, model, scenes, features, clean.codes, scale, generator)


def repair_row(
    processor, model, scenes, features: torch.Tensor, clean: torch.Tensor, scale: int, generator: torch.Generator
) -> Result:
    """Corrupts a scale (half of its cells take another of the ten nearest codes), and compares losses of the next two.

    The tokenizer knows best how to go on from the corrupted scale: those codes are to be predicted. The loss "ignored"
    is that of the codes of the true picture after the corrupted scale, as if it were to be ignored.
    """
    quantizer = processor.image_tokenizer.quantizer
    codebook, residual, rows = quantizer.codebook(), features.float(), []
    for index, grid in enumerate(SCHEDULE.grids):
        vectors = quantizer.normalize(downsample(residual, grid), dim=1).permute(0, 2, 3, 1).flatten(0, 2)
        nearest = quantizer.distances(vectors, codebook).topk(10, largest=False).indices
        slip = (torch.rand(len(nearest), generator=generator) < 0.5) & (index == scale - 1)
        choice = torch.where(slip, torch.randint(1, 10, (len(nearest),), generator=generator), 0)
        codes = nearest.gather(1, choice[:, None])[:, 0]
        rows.append(codes.view(len(features), -1))
        found = codebook[codes].view(len(features), *grid, -1).permute(0, 3, 1, 2)
        residual = residual - upsample(found, features.shape[-2:])
    repaired = torch.cat(rows, 1)
    start, stop = SCHEDULE.offsets[scale], SCHEDULE.offsets[scale + 2]
    mixed = torch.cat([repaired[:, :start], clean[:, start:]], 1)
    first, losses = processor.visual_token_offset, {}
    text = [processor.tokenizer.encode(s.caption, add_special_tokens=False) for s in scenes]
    for name, seen, wanted in (("clean", clean, clean), ("repaired", repaired, repaired), ("ignored", mixed, clean)):
        values = []
        for caption, row, aim in zip(text, seen, wanted, strict=True):
            ids = torch.tensor([[*caption, processor.boi_token_id, *(row + first).tolist()]])
            logits = model(ids, torch.tensor([SCHEDULE.grid_shw]), visual_logits=True).logits[0, len(caption) :]
            values.append(F.cross_entropy(logits[start:stop].float(), aim[start:stop]))
        losses[name] = float(torch.stack(values).mean())
    lost, kept = losses["ignored"] - losses["clean"], losses["repaired"] - losses["clean"]
    return {
        "setting": f"scale {scale} corrupted",
        **{f"loss, {n}": v for n, v in losses.items()},
        "repaired": 1 - kept / lost,
    }


@torch.no_grad()
def in_context_rows(processor: NextFlowProcessor, model: NextFlowForCausalLM, number: int) -> Iterator[Result]:
    """Edits that only an example names: its own, another sample's, or none."""
    rng = np.random.default_rng(4)
    samples = [sample_example(rng, "test") for _ in range(number)]
    for setting in ("own example", "another's example", "no example"):
        right = []
        for index, sample in enumerate(samples):
            parts = list(sample.messages[0]["content"])
            if setting == "another's example":
                other = samples[(index + 1) % number].messages[0]["content"]
                parts = [*other[:-1], parts[-1]]
            elif setting == "no example":
                parts = parts[-1:]
            batch = processor.apply_chat_template(
                [{"role": "user", "content": parts}],
                add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            )  # fmt: skip
            out = model.generate(
                **batch, generation_mode="image", generator=torch.Generator().manual_seed(index),
                return_dict_in_generate=True, height=SCHEDULE.height, width=SCHEDULE.width,
            )  # fmt: skip
            picture = processor.decode_codes(out.image_codes, [SCHEDULE.grid_shw])[0]
            right.append(sample.judge(np.asarray(picture))["accuracy"])
        yield {"setting": setting, "accuracy": float(np.mean(right)), "n": number}


def prefix_result(scales: int, options: argparse.Namespace, seed: int) -> Result:
    """GRPO on the first scales only, by benchmarks/grpo_prefix.py."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import grpo_prefix

    name = f"{scales} scales"
    grpo_prefix.VARIANTS[name] = {"num_trained_scales": scales, "scale_reweight_alpha": 0.7}
    settings = grpo_prefix.make_parser().parse_args(
        ["--updates", str(options.updates), "--learning-rate", "0.015", "--hard", "80", "--easy", "40"]
    )
    folder = options.work / "prefixes" / f"{scales}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    figures = grpo_prefix.run(name, seed, settings, folder)
    return {
        "reward": float(np.mean(figures["reward"][-10:])),
        "strict": figures["hard strict"],
        "other kinds": figures["easy strict"],
    }


# Image tokenizers

TOKENIZERS = {  # stages of (name, share of the steps, settings)
    "one branch": [("pixel", 1.0, {})],
    "dual, jointly from the start, no scale drop": [("joint", 1.0, {"scale_dropout": 0.0})],
    "dual, the paper's recipe": [("pixel", 0.4, {}), ("joint", 0.4, {}), ("decoder", 0.2, {})],
}


def train_tokenizer(name: str, options: argparse.Namespace, seed: int) -> NextFlowImageTokenizer:
    """A small image tokenizer on shapes, by the package's trainer; finished ones are kept."""
    from tiny_world.teacher import EfficientNetTeacher
    from transformers_nextflow.trainer import NextFlowImageTokenizerTrainer, NextFlowImageTokenizerTrainingConfig

    folder = options.work / "tokenizers" / f"{list(TOKENIZERS).index(name)}-{options.tokenizer_steps}-{seed}"
    if (folder / "final").exists():
        return NextFlowImageTokenizer.from_pretrained(folder / "final").eval()
    torch.manual_seed(seed)
    config = NextFlowProcessor.from_pretrained(tiny_checkpoint()).image_tokenizer.config
    sizes = {"encoder_hidden_sizes": [32, 48, 64], "decoder_hidden_sizes": [32, 48, 64], "pixel_patch_size": 4}
    tokenizer = NextFlowImageTokenizer(type(config)(**{**config.to_dict(), **sizes})).float()
    rng = np.random.default_rng(seed)
    pictures = [to_pixels([render(sample_scene(rng))])[0] for _ in range(min(options.pictures, 2000))]
    for stage, share, settings in TOKENIZERS[name]:
        if stage == "decoder":
            tokenizer.enlarge_pixel_decoder()
        arguments = NextFlowImageTokenizerTrainingConfig(
            str(folder / stage), stage=stage, max_steps=max(1, round(share * options.tokenizer_steps)),
            per_device_train_batch_size=8, learning_rate=1e-3, lr_scheduler_type="linear", seed=seed, report_to=[],
            save_strategy="no", use_cpu=True, bf16=True, disable_tqdm=True, logging_steps=50, **settings,
        )  # fmt: skip
        trainer = NextFlowImageTokenizerTrainer(
            tokenizer, arguments, train_dataset=[{"pixel_values": picture} for picture in pictures],
            teacher=EfficientNetTeacher().features if stage == "joint" else None,
        )  # fmt: skip
        trainer.train()
    if name == "one branch":
        tokenizer.config.semantic_distance_weight = tokenizer.quantizer.semantic_distance_weight = 0.0
    tokenizer.save_pretrained(folder / "final")
    return tokenizer.eval()


def tokenizer_result(name: str, options: argparse.Namespace, seed: int) -> Result:
    """PSNR on held-out scenes, and a language model on its codes."""
    processor = NextFlowProcessor.from_pretrained(tiny_checkpoint())
    processor.image_tokenizer = train_tokenizer(name, options, seed)
    rng = np.random.default_rng(5)
    truth = [render(sample_scene(rng, "test")) for _ in range(64)]
    errors = [
        np.square(a.astype(float) - b).mean()
        for a, b in zip(truth, reconstruct(processor.image_tokenizer, truth)[0], strict=True)
    ]
    run = Run(codes=f"tokenizer-{list(TOKENIZERS).index(name)}-{options.tokenizer_steps}-{seed}")
    figures = measure_language_model(run, processor, options, seed)
    return {"PSNR": float(np.mean(10 * np.log10(255**2 / np.maximum(errors, 1e-2)))), **figures}


# The table


@lru_cache
def shipped() -> tuple[NextFlowProcessor, NextFlowForCausalLM]:
    processor = NextFlowProcessor.from_pretrained(tiny_checkpoint())
    processor.image_tokenizer.float()
    return processor, NextFlowForCausalLM.from_pretrained(tiny_checkpoint(), dtype=torch.float32).eval()


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, str, str, Callable[[int], Result] | None, Any]]:
    """Study, what the paper says, setting, and how to measure it with a seed (None: rows without seeds)."""
    tables = {
        "cost": ("Figure 24, exact", cost_rows),
        "correction": ("On nextflow-tiny", lambda: correction_rows(*shipped(), options.samples)),
        "in_context": ("On nextflow-tiny", lambda: in_context_rows(*shipped(), options.samples)),
    }
    for study, (says, rows) in tables.items():
        yield study, says, "", None, rows
    for study, (says, runs) in STUDIES.items():
        for setting, run in runs:
            measure = lambda seed, run=run: measure_language_model(run, shipped()[0], options, seed)  # noqa: E731
            yield study, says, setting, measure, run.name
    for name in TOKENIZERS:
        says = "Figure 8: the dual codebook has 0.5 dB less and the lower loss; the recipe gains 2 dB at 512"
        yield "tokenizer", says, name, lambda seed, name=name: tokenizer_result(name, options, seed), name
    for scales in (1, 2, 3, 5, 8):
        says = "Figure 12: prefixes beat all scales"
        yield "prefixes", says, f"{scales} of 8 scales", lambda seed, m=scales: prefix_result(m, options, seed), scales


STUDY_NAMES = ("cost", "correction", "in_context", *STUDIES, "tokenizer", "prefixes")


def collect(options: argparse.Namespace) -> list[Result]:
    """All rows: what there is in the folder, and, unless only the table is wanted, what is missing."""
    names = ("steps", "batch_size", "pictures", "held_out", "prompts")
    sizes = "-".join(str(getattr(options, name)) for name in names)
    more = {"tokenizer": f"-{options.tokenizer_steps}", "prefixes": f"-{options.updates}"}
    results: list[Result] = []
    for seed in options.seeds:  # a whole table with one seed comes before the next
        for study, says, setting, measure, key in jobs(options):
            if study not in options.studies or (measure is None and seed != options.seeds[0]):
                continue
            kind = "model" if study in STUDIES else study  # one model may stand in several studies
            name = f"{study}-{options.samples}"
            if measure:
                name = f"{kind}-{key}-{sizes}{more.get(study, '')}-seed{seed}".replace(" ", "_")
            file = options.work / f"{name}.json"
            if not file.exists() and not options.table_only:
                rows = [{"setting": setting, **measure(seed)}] if measure else list(key())
                file.parent.mkdir(parents=True, exist_ok=True)
                file.with_suffix(".part").write_text(json.dumps(rows), encoding="utf-8")
                file.with_suffix(".part").rename(file)
                print(f"[{study}] {setting} seed {seed}: {rows}", flush=True)
            if file.exists():
                rows = json.loads(file.read_text(encoding="utf-8"))
                results += [
                    {"study": study, "says": says, **row, **({"setting": setting} if setting else {})} for row in rows
                ]
    return results


def format_table(results: Sequence[Result]) -> str:
    """One table: a row for each setting, figures as mean (lowest to highest of the seeds)."""
    lines = ["| study | setting | figures | seeds |", "|---|---|---|---:|"]
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in sorted(results, key=lambda result: STUDY_NAMES.index(result["study"])):
        groups.setdefault((result["study"], result["setting"]), []).append(result)
    for (study, setting), rows in groups.items():
        if not any(line.startswith(f"| **{study}**") for line in lines):
            lines.append(f"| **{study}** | *{rows[0]['says']}* | | |")
        figures = {n: [row[n] for row in rows] for n in rows[0] if n not in ("study", "says", "setting")}
        cells = "; ".join(f"{name} {_figure(values)}" for name, values in figures.items())
        lines.append(f"| {study} | {setting} | {cells} | {len(rows)} |")
    return "\n".join(lines)


def _figure(values: list[Any]) -> str:
    if isinstance(values[0], list):
        return ", ".join(f"{number:.2f}" for number in np.mean(values, axis=0))
    if isinstance(values[0], int):  # a number of samples
        return str(values[0])
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"), help="where codes and results are kept")
    parser.add_argument("--studies", nargs="+", choices=STUDY_NAMES, default=STUDY_NAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500, help="of a language model")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=6000, help="trained on")
    parser.add_argument("--held-out", type=int, default=256, help="pictures of the held-out loss")
    parser.add_argument("--prompts", type=int, default=160, help="drawn and judged")
    parser.add_argument("--samples", type=int, default=48, help="of the studies on nextflow-tiny")
    parser.add_argument("--tokenizer-steps", type=int, default=1000)
    parser.add_argument("--updates", type=int, default=30, help="of GRPO")
    parser.add_argument("--table-only", action="store_true", help="run nothing; print what there is")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args(arguments)
    table = format_table(collect(options))
    print(table)
    if options.markdown:
        options.markdown.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
