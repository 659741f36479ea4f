"""Trains nextflow-tiny's image tokenizer in the paper's three stages, small enough for a CPU.

`pixel` trains the pixel branch alone, `joint` both branches (the semantic one towards a teacher's features), and
`decoder` a new pixel decoder of twice the width, with all else frozen.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from transformers_nextflow import NextFlowImageTokenizer, NextFlowImageTokenizerConfig
from transformers_nextflow.trainer.image_tokenizer_trainer import (
    draw_kept_scales,
    psnr,
    revive_dead_codes,
    trainable_parameters,
)

from . import training_state
from .training_state import load_state, save_state

NUM_SCALES = 8
SCALE_DROPOUT = 0.5
REVIVE_EVERY, REVIVE_UNTIL = 25, 0.7  # steps, and the share of a stage
LOG_EVERY = 100
RESIDUAL_WEIGHT = 0.25
# The teacher costs more than all the rest; a few pictures a step are enough to shape the semantic half.
TEACHER_BATCH = 2


@dataclass(frozen=True)
class Stage:
    """One training stage: its name, its share of the wall-clock budget, its peak learning rate."""

    name: str
    share: float
    learning_rate: float


STAGES = (Stage("pixel", 0.27, 1.5e-3), Stage("joint", 0.46, 1.2e-3), Stage("decoder", 0.27, 1.2e-3))


def tiny_config(semantic_feature_dim: int) -> NextFlowImageTokenizerConfig:
    """nextflow-tiny's tokenizer: the real architecture with narrow parts."""
    return NextFlowImageTokenizerConfig(
        codebook_size=2048,
        semantic_code_dim=16,
        pixel_code_dim=8,
        semantic_distance_weight=0.3,
        num_scales=NUM_SCALES,
        semantic_config={
            "model_type": "siglip2_vision_model",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_patches": 64,
            "vision_use_head": False,
        },
        vision_feature_layer=-1,
        semantic_feature_dim=semantic_feature_dim,
        semantic_decoder_layers=1,
        semantic_decoder_num_heads=4,
        pixel_patch_size=4,
        encoder_hidden_sizes=[32, 64, 128],
        encoder_num_res_blocks=1,
        decoder_hidden_sizes=[32, 48, 48],
        decoder_num_res_blocks=1,
        latent_channels=64,
        cnn_norm_groups=8,
        self_correction_token_fraction=0.3,
    )


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 `(B, H, W, 3)` to fp32 `(B, 3, H, W)` in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def step_losses(
    model: NextFlowImageTokenizer, stage: Stage, pixels: torch.Tensor, teacher: Callable | None, kept: list[int]
) -> tuple[torch.Tensor, dict[str, float], torch.Tensor]:
    """Total loss, its parts for the log, and the codes of one batch."""
    with torch.autocast("cpu", torch.bfloat16):
        if stage.name == "decoder":
            with torch.no_grad():
                encoded = model.encode(pixels)
            prediction, codes = model.decode_latents(encoded.quantized, clamp=False), encoded.codes
            output = None
        else:
            output = model(pixels, kept_scales=kept, semantic=stage.name == "joint")
            prediction, codes = output.pixel_values, output.codes
    prediction = prediction.float()
    reconstruction = F.l1_loss(prediction, pixels) + 2 * F.mse_loss(prediction, pixels)
    loss, parts = (
        reconstruction,
        {"reconstruction": reconstruction.item(), "psnr": psnr(prediction.detach(), pixels).mean().item()},
    )
    if output is not None:
        residual = output.residual.square().mean()
        loss = loss + output.codebook_loss + output.commitment_loss + RESIDUAL_WEIGHT * residual
        parts["residual"] = residual.item()
        parts["codebook"] = output.codebook_loss.item()
        if stage.name == "joint":
            target = teacher(pixels[:TEACHER_BATCH]).flatten(2).transpose(1, 2)
            predicted = output.semantic_features[:TEACHER_BATCH].float()
            semantic = 1 - F.cosine_similarity(predicted, target, dim=-1).mean()
            loss = loss + 0.3 * semantic
            parts["semantic"] = semantic.item()
    return loss, parts, codes


def train(
    images: np.ndarray,
    make_teacher: Callable[[], Callable],
    folder: Path,
    seconds: float,
    seed: int = 0,
    batch_size: int = 16,
    stages: tuple[Stage, ...] = STAGES,
    semantic_feature_dim: int = 320,
) -> NextFlowImageTokenizer:
    """Trains all stages within a wall-clock budget; picks up where a killed run stopped.

    Args:
        images (`np.ndarray` of shape `(M, 128, 128, 3)`, uint8): training pictures.
        make_teacher: makes a function from pixels `(B, 3, 128, 128)` in [-1, 1] to features `(B, C, 8, 8)`.
        folder (`Path`): where checkpoints go, one a stage; the last stage's is the result.
        seconds (`float`): budget of all stages together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, stage in enumerate(stages):
        done = folder / stage.name
        if (done / "model.safetensors").exists():
            print(f"[tokenizer] stage {stage.name} is done already", flush=True)
            continue
        torch.manual_seed(seed + number)
        if number == 0:
            model = NextFlowImageTokenizer(tiny_config(semantic_feature_dim))
        else:
            model = NextFlowImageTokenizer.from_pretrained(folder / stages[number - 1].name)
        if stage.name == "decoder":
            model.enlarge_pixel_decoder()
        teacher = make_teacher() if stage.name == "joint" else None
        state_file = folder / f"{stage.name}.state.pt"
        _train_stage(model, stage, images, teacher, state_file, stage.share * seconds, seed + number, batch_size)
        model.save_pretrained(done)
        state_file.unlink(missing_ok=True)
    return NextFlowImageTokenizer.from_pretrained(folder / stages[-1].name).eval()


def _train_stage(
    model: NextFlowImageTokenizer,
    stage: Stage,
    images: np.ndarray,
    teacher: Callable | None,
    state_file: Path,
    budget: float,
    seed: int,
    batch_size: int,
) -> None:
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(
        trainable_parameters(model, stage.name),
        lr=stage.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.01,
        fused=True,
    )
    step, spent = load_state(state_file, model, [optimizer])
    rng = np.random.default_rng((seed, step))
    generator = torch.Generator().manual_seed(seed + step)
    counts = torch.zeros(model.config.codebook_size)
    last = saved = training_state.clock()
    while spent < budget:
        progress = spent / budget
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = warm * stage.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        pixels = to_pixels(images[rng.integers(0, len(images), batch_size)])
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        loss, parts, codes = step_losses(
            model, stage, pixels, teacher, draw_kept_scales(NUM_SCALES, SCALE_DROPOUT, generator)
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        counts = 0.97 * counts + torch.bincount(codes.flatten(), minlength=len(counts))
        counts[counts < 0.5] = 0
        if stage.name != "decoder" and step % REVIVE_EVERY == 0 and progress < REVIVE_UNTIL:
            parts["revived"] = revive_dead_codes(model, counts, generator)
        now = training_state.clock()
        spent, last = spent + now - last, now
        if step % LOG_EVERY == 0:
            line = " ".join(f"{name} {value:.3f}" for name, value in parts.items())
            used = int((counts > 0).sum())
            print(f"[tokenizer] {stage.name} step {step} {spent:.0f}/{budget:.0f} s {line} used {used}", flush=True)
        if now - saved > training_state.SAVE_EVERY:
            saved = now
            save_state(state_file, model, [optimizer], step, spent)
