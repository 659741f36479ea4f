"""What the rotary pairs of 3D RoPE tell a model of columns, rows and scales: chunks against pairs in turn.

    python benchmarks/positions.py                  # shares by formula, at the 7B's geometry
    python benchmarks/positions.py --train          # and the held-out loss of a small model of the 7B's heads

**Shares.** Let query and key be random, alike in all directions. A shift by d along an axis turns each pair of that
axis by d times its frequency, which decorrelates the pair's part of the logit by 1 - cos. The mean over all pairs of a
head is the share of the logit's variance that the shift makes anew: 0 if attention can't see it, 1 if the logit is
another one altogether.

**Loss.** Two layers, heads of 128, theta 1e6, on codes of shapes (nextflow-tiny's image tokenizer, 5 scales), with the
same seeds and batches for both ways. "Columns flattened" is the loss of the trained model when all cells of a row are
told that they stand in the picture's middle: a model that gets no worse did not know columns.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from transformers_nextflow import (
    NextFlowConfig,
    NextFlowForCausalLM,
    NextFlowProcessor,
    ScaleSchedule,
    tiny_checkpoint,
)

SECTION, THETA, HEAD, RANGE = (16, 24, 24), 1e6, 128, 64.0  # the 7B's
AXES = ("scale", "row", "column")
SCHEDULE = ScaleSchedule(num_scales=5)
WAYS = {"chunks": False, "in turn": True}


def axis_of_pairs(section: tuple[int, ...], interleaved: bool) -> list[int]:
    """Which axis each rotary pair belongs to, from the highest frequency on."""
    if not interleaved:
        return [axis for axis, number in enumerate(section) for _ in range(number)]
    axes = [0] * sum(section)  # as in Qwen3-VL: pair i goes to axis i mod 3, while its section lasts
    for axis in (1, 2):
        axes[axis : section[axis] * 3 : 3] = [axis] * len(axes[axis : section[axis] * 3 : 3])
    return axes


def variance_share(
    shift: float, axis: int, interleaved: bool, section: tuple[int, ...] = SECTION, theta: float = THETA
) -> float:
    """Share of the variance of an attention logit that a shift along an axis makes anew."""
    axes = np.array(axis_of_pairs(section, interleaved))
    frequencies = theta ** (-np.arange(len(axes)) / len(axes))
    return float(((1 - np.cos(shift * frequencies)) * (axes == axis)).mean())


def shares_table() -> str:
    """Shares at the 7B's geometry: a step of one scale, and one row or column of grids of several sides."""
    lines = ["| a shift by | chunks | in turn |", "|---|---:|---:|"]
    shifts = [("one scale", 1.0, 0)]
    for axis in (2, 1):
        shifts += [(f"one {AXES[axis]} of a {n} x {n} grid", RANGE / n, axis) for n in (4, 16, 64)]
        shifts.append((f"a whole picture, along a {AXES[3 - axis]}", RANGE, axis))
    for name, shift, axis in shifts:
        chunks, in_turn = (variance_share(shift, axis, interleaved) for interleaved in WAYS.values())
        lines.append(f"| {name} | {chunks:.2g} | {in_turn:.2g} |")
    return "\n".join(lines)


def load_codes(folder: Path, number: int, seed: int) -> tuple[NextFlowProcessor, list[list[int]], torch.Tensor]:
    """Captions as ids, and codes `(M, N)` of their pictures."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from tiny_world.shapes import render, sample_scene

    processor = NextFlowProcessor.from_pretrained(tiny_checkpoint())
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(number)]
    file = folder / f"codes_{seed}_{number}.pt"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for start in range(0, number, 50):
            some = scenes[start : start + 50]
            pictures = [[render(scene)] for scene in some]
            ids = processor(["<image>"] * len(some), images=pictures, num_scales=5, return_tensors="pt").input_ids
            rows.append(ids[ids >= processor.visual_token_offset].view(len(some), -1))
        torch.save(torch.cat(rows), file)
    captions = processor.tokenizer([scene.caption for scene in scenes])["input_ids"]
    return processor, captions, torch.load(file)


def batch_of(captions: list[list[int]], codes: torch.Tensor, chosen: np.ndarray, config: NextFlowConfig) -> dict:
    """A row is a caption, `<boi>` and codes, then padding; codes alone are to be predicted."""
    rows = [[*captions[i], config.boi_token_id, *codes[i].tolist()] for i in chosen]
    length = max(map(len, rows))
    ids = torch.tensor([row + [config.pad_token_id] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = ids.masked_fill(ids < config.text_vocab_size, -100)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "image_grid_shw": torch.tensor([SCHEDULE.grid_shw] * len(rows)),
    }


def flatten_columns(model: NextFlowForCausalLM, batch: dict) -> dict:
    """The batch with positions in which all cells of a row stand in one column."""
    from transformers_nextflow.token_layout import TokenLayout

    layout = TokenLayout.of(batch["input_ids"], batch["image_grid_shw"], model.config, batch["attention_mask"])
    positions = layout.position_ids.clone()
    cells = positions[1] != positions[0]  # text and the ends of an image have three equal coordinates
    positions[2] = torch.where(cells, RANGE / 2, positions[2])
    return {**batch, "position_ids": positions}


def train(interleaved: bool, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Held-out cross-entropy of a code after a short training, and with columns flattened."""
    processor, captions, codes = load_codes(options.work, options.pictures, 1)
    _, new_captions, new_codes = load_codes(options.work, 256, 2)
    base = NextFlowConfig.from_pretrained(tiny_checkpoint())
    names = ("vocab_size", "text_vocab_size", "visual_codebook_size", "visual_code_dim", "pad_token_id", "eos_token_id")
    names += ("boi_token_id", "eoi_token_id", "image_token_id", "bos_token_id")
    rope = {"rope_type": "default", "rope_theta": THETA, "mrope_section": list(SECTION)}
    config = NextFlowConfig(
        **{name: getattr(base, name) for name in names},
        num_scales=5,
        hidden_size=2 * HEAD,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        scale_reweight_alpha=0.0,
        rope_parameters={**rope, "mrope_interleaved": interleaved},
    )
    torch.manual_seed(seed)
    model = NextFlowForCausalLM(config).train()
    with torch.no_grad():
        model.model.visual_codebook.weight.copy_(processor.image_tokenizer.quantizer.codebook())
    model.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    rng = np.random.default_rng(seed)
    for step in range(options.steps):
        factor = min(1.0, (step + 1) / 30) * min(1.0, (1 - step / options.steps) / 0.4)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * factor
        batch = batch_of(captions, codes, rng.integers(0, len(captions), options.batch_size), config)
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    losses: dict[str, list[float]] = {"loss": [], "columns flattened": []}
    with torch.no_grad():
        for start in range(0, 256, 64):
            batch = batch_of(new_captions, new_codes, np.arange(start, start + 64), config)
            for name, given in zip(losses, (batch, flatten_columns(model, batch)), strict=True):
                losses[name].append(float(model(**given, use_cache=False).loss))
    return {name: float(np.mean(values)) for name, values in losses.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--train", action="store_true", help="train the small models, too")
    parser.add_argument("--work", type=Path, default=Path("runs/positions"), help="where codes and results are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args(arguments)
    print(shares_table())
    if not options.train:
        return
    print("\n| pairs | held-out loss (seeds) | columns flattened |\n|---|---:|---:|")
    for way, interleaved in WAYS.items():
        results = []
        for seed in options.seeds:
            name = f"{way.replace(' ', '_')}_{seed}_{options.steps}_{options.batch_size}_{options.pictures}.json"
            if not (file := options.work / name).exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                result = train(interleaved, seed, options)
                file.write_text(json.dumps(result), encoding="utf-8")
            results.append(json.loads(file.read_text(encoding="utf-8")))
        cells = [" / ".join(f"{result[name]:.3f}" for result in results) for name in ("loss", "columns flattened")]
        print(f"| {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
