"""The image tokenizer's trainer: what each stage trains, scale dropout, revival, the optional terms, resuming."""

from unittest import mock

import pytest
import torch
from PIL import Image
from torch import nn

from transformers_nextflow import NextFlowImageTokenizer
from transformers_nextflow.trainer import (
    NextFlowImageTokenizerTrainer,
    NextFlowImageTokenizerTrainingConfig,
    PatchDiscriminator,
    find_last_checkpoint,
)
from transformers_nextflow.trainer.image_tokenizer_trainer import (
    collate_pixels,
    draw_kept_scales,
    psnr,
    revive_dead_codes,
)

SIDE = 80


@pytest.fixture
def images() -> list[dict]:
    """Smooth pictures, which can be learned."""
    coarse = torch.rand(8, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return [{"pixel_values": image} for image in nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")]


def teacher(pixels: torch.Tensor) -> torch.Tensor:
    """Mean colours of the cells, repeated to the width that the tokenizer predicts."""
    cells = nn.functional.avg_pool2d(pixels, 16)
    return cells.repeat(1, -(-TEACHER_WIDTH // 3), 1, 1)[:, :TEACHER_WIDTH]


TEACHER_WIDTH = 0


@pytest.fixture
def make_trainer(images, tiny_random_checkpoint, tmp_path):
    def make(stage: str, model: NextFlowImageTokenizer | None = None, **changes) -> NextFlowImageTokenizerTrainer:
        global TEACHER_WIDTH
        kwargs = {name: changes.pop(name) for name in ("perceptual_loss", "discriminator") if name in changes}
        model = model or NextFlowImageTokenizer.from_pretrained(tiny_random_checkpoint, subfolder="image_tokenizer")
        TEACHER_WIDTH = model.config.semantic_feature_dim
        settings = dict(max_steps=12, learning_rate=3e-3, logging_steps=1, save_strategy="no", report_to=[])
        settings |= dict(per_device_train_batch_size=4, use_cpu=True, revive_steps=4, lr_scheduler_type="constant")
        return NextFlowImageTokenizerTrainer(
            model,
            NextFlowImageTokenizerTrainingConfig(str(tmp_path / "run"), stage=stage, **{**settings, **changes}),
            teacher=teacher,
            train_dataset=images,
            **kwargs,
        )

    return make


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("stage", ["pixel", "joint", "decoder"])
def test_a_stage_trains_its_part_and_learns(make_trainer, stage):
    trainer = make_trainer(stage, max_steps=20)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    pixel_decoder = {name for name in before if name.startswith(("pixel_decoder", "post_pixel_proj"))}
    semantic = {name for name in before if name.startswith("semantic_")}
    assert pixel_decoder & changed
    if stage == "decoder":
        assert changed <= pixel_decoder
    else:
        assert bool(semantic & changed) == (stage == "joint")
    assert sum(logged(trainer, "reconstruction")[-3:]) < sum(logged(trainer, "reconstruction")[:3])
    assert logged(trainer, "psnr")[-1] > logged(trainer, "psnr")[0]
    assert 0 < logged(trainer, "codes_in_use")[-1] <= 1
    assert bool(logged(trainer, "semantic")) == (stage == "joint")


def test_the_larger_decoder_is_a_stage_of_its_own(make_trainer):
    first = make_trainer("pixel", max_steps=2)
    first.train()
    first.model.enlarge_pixel_decoder()
    make_trainer("decoder", first.model, max_steps=2).train()


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_each_scale_falls_as_often_as_asked_and_the_ends_never(dropout):
    generator = torch.Generator().manual_seed(0)
    draws = [draw_kept_scales(8, dropout, generator) for _ in range(3000)]
    assert all(kept[0] == 0 and kept[-1] == 7 and kept == sorted(set(kept)) for kept in draws)
    for scale in range(1, 7):
        assert sum(scale in kept for kept in draws) / 3000 == pytest.approx(1 - dropout, abs=0.04)
    assert draw_kept_scales(1, 1.0) == [0]


def test_dead_codes_come_back_beside_busy_ones(tiny_random_checkpoint):
    model = NextFlowImageTokenizer.from_pretrained(tiny_random_checkpoint, subfolder="image_tokenizer")
    tables = [model.quantizer.semantic_codebook.weight, model.quantizer.pixel_codebook.weight]
    before = [table.clone() for table in tables]
    counts = torch.zeros(model.config.codebook_size)
    counts[[3, 5]] = 10
    moved = revive_dead_codes(model, counts, torch.Generator().manual_seed(0))
    assert moved == model.config.codebook_size - 2
    for table, old in zip(tables, before, strict=True):
        assert torch.equal(table[[3, 5]], old[[3, 5]])
        similar = nn.functional.normalize(table, dim=-1) @ nn.functional.normalize(old[[3, 5]], dim=-1).T
        assert (similar.amax(1) > 0.9).all()
    assert revive_dead_codes(model, torch.ones_like(counts)) == 0


def test_optional_terms(make_trainer):
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.LeakyReLU(), nn.Conv2d(8, 1, 1))
    before = critic[0].weight.clone()
    trainer = make_trainer(
        "pixel", discriminator=critic, perceptual_loss=lambda a, b: (a - b).abs().mean(), perceptual_weight=0.5
    )
    trainer.train()
    assert not torch.equal(critic[0].weight, before) and all(p.grad is None for p in critic.parameters())
    assert {"perceptual", "adversarial", "discriminator"} <= set(trainer.state.log_history[0])
    terms = ("reconstruction", "codebook", "residual", "perceptual", "adversarial")
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(sum(entry[name] for name in terms), abs=1e-3)


def test_the_discriminator_joins_in_after_its_warm_up(make_trainer):
    torch.manual_seed(0)
    trainer = make_trainer("pixel", discriminator=PatchDiscriminator(8, 2), adversarial_start_steps=3, max_steps=5)
    trainer.train()
    assert ["adversarial" in entry for entry in trainer.state.log_history[:5]] == [False] * 3 + [True] * 2


def test_tokenflows_weights_by_name(tmp_path):
    settings = NextFlowImageTokenizerTrainingConfig(str(tmp_path), loss_preset="tokenflow", use_cpu=True)
    assert (settings.l1_weight, settings.l2_weight, settings.semantic_weight) == (0.0, 1.0, 1.0)
    assert (settings.perceptual_weight, settings.adversarial_weight) == (1.0, 0.5)
    assert settings.adversarial_start_steps == 20_000 and settings.residual_weight == 0.0
    with pytest.raises(ValueError, match=r'`l2_weight` is 3\.0, but the preset "tokenflow" sets it to 1\.0'):
        NextFlowImageTokenizerTrainingConfig(str(tmp_path), loss_preset="tokenflow", l2_weight=3.0, use_cpu=True)


def test_pictures_are_written_and_a_resumed_run_goes_on(make_trainer, tmp_path):
    settings = dict(save_strategy="steps", save_steps=3, max_steps=6, revive_until=0)
    whole, resumed = make_trainer("pixel", **settings), make_trainer("pixel", **settings)
    whole.train()
    with Image.open(tmp_path / "run" / "reconstructions" / "000003.png") as picture:
        assert picture.size == (4 * SIDE, 2 * SIDE)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert logged(resumed, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)


def test_a_kill_before_a_checkpoint_is_whole_loses_no_picture(make_trainer, tmp_path, monkeypatch):
    """A run that goes on from a checkpoint makes no picture of its step."""
    trainer = make_trainer("pixel", save_strategy="steps", save_steps=1, max_steps=1)
    monkeypatch.setattr(type(trainer), "_save_rng_state", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert find_last_checkpoint(tmp_path / "run") is None
    assert (tmp_path / "run" / "reconstructions" / "000001.png").is_file()


def test_revival_and_the_discriminator_go_on_too(make_trainer, tmp_path):
    def make():
        torch.manual_seed(0)
        discriminator = nn.Conv2d(3, 1, 16, stride=16)
        settings = dict(save_strategy="steps", save_steps=3, max_steps=6, revive_steps=2, revive_until=1.0)
        return make_trainer("pixel", discriminator=discriminator, **settings)

    whole, resumed = make(), make()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert logged(resumed, "revived")[-1] == logged(whole, "revived")[-1]
    assert logged(resumed, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)
    torch.testing.assert_close(resumed.discriminator.weight, whole.discriminator.weight)


def test_a_loss_that_is_not_finite_stops_and_tells_its_terms(make_trainer):
    trainer = make_trainer("pixel")
    trainer.train_dataset = [{"pixel_values": torch.full_like(trainer.train_dataset[0]["pixel_values"], torch.inf)}] * 4
    with pytest.raises(ValueError, match=r"The loss is nan at step 0: reconstruction .*Pixels reach from inf to inf"):
        trainer.train()


def test_psnr_is_the_textbooks():
    target = torch.zeros(2, 3, 4, 4)
    prediction = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 3.0)])
    assert psnr(prediction, target).tolist() == pytest.approx([20.0, 6.0206], abs=1e-3)  # 10 log10(2^2 / error^2)


def test_bad_input(tiny_random_checkpoint, tmp_path, make_trainer):
    model = NextFlowImageTokenizer.from_pretrained(tiny_random_checkpoint, subfolder="image_tokenizer")
    common = dict(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match='The stage "joint" needs a `teacher`'):
        NextFlowImageTokenizerTrainer(model, NextFlowImageTokenizerTrainingConfig(**common))
    with pytest.raises(ValueError, match="must be one of pixel, joint, decoder, but got 'all'"):
        NextFlowImageTokenizerTrainingConfig(stage="all", **common)
    with pytest.raises(ValueError, match="`scale_dropout` must be between 0 and 1, but got 2"):
        NextFlowImageTokenizerTrainingConfig(scale_dropout=2, **common)
    square, wide = torch.zeros(3, 64, 64), torch.zeros(3, 48, 80)
    assert collate_pixels([{"pixel_values": square}] * 2)["pixel_values"].shape == (2, 3, 64, 64)
    with pytest.raises(ValueError, match=r"must have one size, but these have .*\(3, 48, 80\)"):
        collate_pixels([{"pixel_values": square}, {"pixel_values": wide}])
    with pytest.raises(ValueError, match=r"A sample needs `pixel_values`.* this one has image"):
        collate_pixels([{"image": square}])
    trainer = make_trainer("joint")
    trainer.teacher = lambda pixels: pixels
    with pytest.raises(ValueError, match="The teacher's features are"):
        trainer.train()


@pytest.mark.parametrize("stage", ["joint", "decoder"])
def test_evaluation_has_a_loss_its_terms_and_psnr(make_trainer, images, stage):
    trainer = make_trainer(stage, max_steps=1, per_device_eval_batch_size=3)
    metrics = trainer.evaluate(images)
    with torch.no_grad():
        model, pixels = trainer.model.eval(), torch.stack([image["pixel_values"] for image in images])
        encoded = model.encode(pixels)
        expected = psnr(model.decode_latents(encoded.quantized, clamp=False), pixels).mean()
    assert metrics["eval_psnr"] == pytest.approx(float(expected), abs=1e-3)
    assert metrics["eval_loss"] > 0 and metrics["eval_reconstruction"] > 0
    assert ("eval_semantic" in metrics) == (stage == "joint") and trainer._counts.sum() == 0
    trainer.train()
    assert logged(trainer, "psnr") and "eval_psnr" not in trainer.state.log_history[-1]
