"""The diffusion decoder's trainer: the loss written out, learning, averages, LoRA, resuming, pictures, refusals."""

import copy

import pytest
import torch
from datasets import Dataset
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from transformers import TrainerCallback

from diffusers_nextflow import (
    NextFlowDecodePipeline,
    NextFlowDiffusionDecoderTrainer,
    NextFlowDiffusionDecoderTrainingConfig,
)
from diffusers_nextflow.diffusion_decoder_trainer import diffuse
from diffusion_parts import build_decoder, build_vae
from transformers_nextflow import NextFlowImageTokenizer

SIDE = 80


@pytest.fixture(scope="module")
def image_tokenizer(tiny_random_checkpoint):
    return NextFlowImageTokenizer.from_pretrained(tiny_random_checkpoint, subfolder="image_tokenizer")


def make_samples(image_tokenizer, factor: int = 1, number: int = 4) -> list[dict]:
    """Smooth pictures and their codes."""
    coarse = torch.rand(number, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures = torch.nn.functional.interpolate(coarse, (SIDE * factor,) * 2, mode="bilinear")
    small = torch.nn.functional.interpolate(pictures, (SIDE, SIDE), mode="area")
    encoded = image_tokenizer.encode(small)
    rows = zip(encoded.codes, encoded.image_grid_shw, pictures, strict=True)
    return [dict(zip(("codes", "image_grid_shw", "pixel_values"), row, strict=True)) for row in rows]


@pytest.fixture
def make_trainer(image_tokenizer, tmp_path):
    def make(decoder=None, data=None, scheduler=None, **changes):
        parts = {name: changes.pop(name) for name in ("vae", "peft_config", "eval_dataset") if name in changes}
        settings = dict(
            max_steps=4, learning_rate=3e-3, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True
        )
        settings |= dict(per_device_train_batch_size=2, lr_scheduler_type="constant", num_logged_images=1)
        args = NextFlowDiffusionDecoderTrainingConfig(str(tmp_path / "run"), **{**settings, **changes})
        return NextFlowDiffusionDecoderTrainer(
            decoder or build_decoder("UNet2DModel", image_tokenizer, trained=False),
            args,
            image_tokenizer=image_tokenizer,
            scheduler=scheduler or FlowMatchEulerDiscreteScheduler(),
            train_dataset=data or make_samples(image_tokenizer, max(changes.get("scale_factors", [1]))),
            **parts,
        )

    return make


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# The loss


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_targets_and_weights_are_diffusers_own(kind):
    scheduler = DDIMScheduler(prediction_type=kind)
    clean, noise, times = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0.0, 0.3, 0.9999])
    noisy, timesteps, target, weights = diffuse(scheduler, clean, noise, times, min_snr_gamma=5.0)
    assert timesteps.tolist() == [0, 300, 999]
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, timesteps))
    velocity = scheduler.get_velocity(clean, noise, timesteps)
    torch.testing.assert_close(target, {"epsilon": noise, "v_prediction": velocity, "sample": clean}[kind])
    snr = compute_snr(scheduler, timesteps)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[kind]
    torch.testing.assert_close(weights, torch.minimum(snr, torch.full_like(snr, 5.0)) / divisor)
    assert diffuse(scheduler, clean, noise, times)[3].eq(1).all()


def test_flow_matchings_noise_is_diffusers_own():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    clean, noise = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    noisy, timesteps, target, _ = diffuse(scheduler, clean, noise, torch.tensor([0.25, 0.5]))
    assert timesteps.tolist() == pytest.approx([500.0, 750.0])  # 3 t / (1 + 2 t)
    near = scheduler.timesteps[(scheduler.timesteps - timesteps[:, None]).abs().argmin(1)]
    torch.testing.assert_close(noisy, scheduler.scale_noise(clean, near, noise), atol=0.01, rtol=0)
    assert torch.equal(target, noise - clean)


@pytest.mark.parametrize("kind", ["flow_prediction", "v_prediction"])
def test_loss_and_gradients_are_those_of_a_step_written_out(kind, make_trainer, image_tokenizer):
    flow = kind == "flow_prediction"
    scheduler = FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler(prediction_type=kind)
    decoder = build_decoder("UNet2DModel", image_tokenizer, prediction_type=kind)
    trainer = make_trainer(decoder, scheduler=scheduler, condition_dropout=0.5)
    samples = trainer.train_dataset[:2]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    trainer.model.train()
    torch.manual_seed(3)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in decoder.parameters()]

    decoder.zero_grad()
    torch.manual_seed(3)
    torch.randint(1, ())  # the scale factor
    noise, times, kept = torch.randn(2, 3, SIDE, SIDE), torch.rand(2), torch.rand(2) >= 0.5
    clean = batch["pixel_values"]
    if flow:
        t, target = times[:, None, None, None], noise - clean
        noisy, timesteps = (1 - t) * clean + t * noise, 1000 * times
    else:
        timesteps = (1000 * times).long()
        noisy, target = scheduler.add_noise(clean, noise, timesteps), scheduler.get_velocity(clean, noise, timesteps)
    codes, grids = batch["codes"], batch["image_grid_shw"]
    features = image_tokenizer.decode_semantic(codes, grids).transpose(1, 2).unflatten(2, (5, 5))
    condition = torch.cat([image_tokenizer.codes_to_latents(codes, grids), features], dim=1)
    predicted = decoder(noisy, timesteps, condition, kept).sample
    expected = torch.nn.functional.mse_loss(predicted, target)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    for parameter, gradient in zip(decoder.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-5)


# Training


def step_of(average: EMAModel, model):
    return lambda self, *args, **kwargs: average.step(model.parameters())


def test_it_learns_pictures_averages_and_resumes(make_trainer, image_tokenizer, tmp_path):
    """One run in two stretches is the unbroken one: weights, average, losses."""
    settings = dict(save_strategy="steps", save_steps=3, max_steps=6, ema_decay=0.9, timestep_sampling="logit_normal")
    whole, resumed = make_trainer(**settings), make_trainer(**settings)
    start = {name: value.clone() for name, value in whole.model.state_dict().items()}
    average = EMAModel(whole.model.parameters(), decay=0.9, use_ema_warmup=True)
    whole.add_callback(type("Average", (TrainerCallback,), {"on_step_end": step_of(average, whole.model)})())
    whole.train()
    assert not torch.equal(start["backbone.conv_in.weight"], whole.model.state_dict()["backbone.conv_in.weight"])
    for ours, theirs in zip(whole.ema.shadow_params, average.shadow_params, strict=True):
        torch.testing.assert_close(ours, theirs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert logged(resumed, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)
    assert len(logged(whole, "error_at_1x")) == 6
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(whole.ema.shadow_params, resumed.ema.shadow_params, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    with Image.open(tmp_path / "run" / "pictures" / "000003.png") as picture:
        assert picture.size == (3 * SIDE, SIDE)  # original, image tokenizer, diffusion decoder
    # What is saved is the average, and draws; what is trained goes on as it was.
    trained = copy.deepcopy(whole.model.state_dict())
    whole.save_model()
    assert all(torch.equal(value, trained[name]) for name, value in whole.model.state_dict().items())
    pipe = NextFlowDecodePipeline.from_pretrained(tmp_path / "run")
    pipe.set_progress_bar_config(disable=True)
    for parameter, shadow in zip(pipe.diffusion_decoder.parameters(), whole.ema.shadow_params, strict=True):
        assert torch.equal(parameter, shadow)
    sample = whole.train_dataset[0]
    assert pipe(sample["codes"][None], sample["image_grid_shw"][None], num_inference_steps=1).images[0].size == (80, 80)
    assert "NextFlowDecodePipeline.from_pretrained" in (tmp_path / "run" / "README.md").read_text()


def test_the_second_stage_draws_both_sizes(make_trainer):
    trainer = make_trainer(scale_factors=[1, 2], max_steps=6)
    trainer.train()
    assert logged(trainer, "error_at_1x") and logged(trainer, "error_at_2x")
    assert list(trainer.model.config.scale_factors) == [1, 2]
    metrics = [trainer.evaluate(trainer.train_dataset)["eval_loss"] for _ in range(2)]
    assert metrics[0] == metrics[1], "the same noise in every evaluation"


def test_the_loss_falls(make_trainer):
    trainer = make_trainer(max_steps=30, per_device_train_batch_size=4, condition_dropout=0.0)
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < 0.9 * before


def test_lora_trains_adapters_and_the_condition_and_is_merged(make_trainer, image_tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    samples = make_samples(image_tokenizer, number=2)
    for sample in samples:
        sample |= {"prompt_embeds": torch.randn(4, 12), "pooled_prompt_embeds": torch.randn(6)}
    decoder = build_decoder("SD3Transformer2DModel", image_tokenizer, trained=False, scale_factors=[1])
    base = copy.deepcopy(decoder.state_dict())
    lora = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"])
    settings = dict(vae=build_vae(), peft_config=lora, save_strategy="steps", save_steps=2, max_steps=3, ema_decay=0.5)
    trainer = make_trainer(decoder, samples, **settings)
    assert {name.rpartition("lora")[1] or name.split(".mlp")[0].split(".")[0] for name in trainer._trained()} == {
        "lora", "condition_proj", "backbone",
    }  # fmt: skip
    trainer.train()
    assert not list((tmp_path / "run" / "checkpoint-2").glob("diffusion_decoder/*"))
    trainer.save_model(str(tmp_path / "merged"))
    loaded = NextFlowDecodePipeline.from_pretrained(tmp_path / "merged")
    merged = loaded.diffusion_decoder.state_dict()
    assert merged.keys() == base.keys()
    changed = {name for name, value in base.items() if not torch.equal(merged[name], value)}
    assert any("to_q" in name for name in changed) and "condition_proj.weight" in changed
    assert not any("ff" in name for name in changed)
    batch = trainer.data_collator(samples[:1])
    text = {name: batch[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    inputs = (torch.randn(1, 4, 10, 10), torch.tensor([500.0]), torch.randn(1, 28, 5, 5))
    trainer.model.eval()
    with trainer.averaged(), torch.no_grad():
        expected = trainer.model(*inputs, **text).sample
        torch.testing.assert_close(loaded.diffusion_decoder(*inputs, **text).sample, expected, atol=1e-5, rtol=0)


def test_bad_input(make_trainer, image_tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match='takes predictions for "epsilon"'):
        make_trainer(scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match="`min_snr_gamma` is not for flow matching"):
        make_trainer(min_snr_gamma=5.0)
    with pytest.raises(ValueError, match="A UNet2DModel is trained whole"):
        make_trainer(peft_config=peft.LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ValueError, match="`scale_factors` may hold 1 and 2"):
        make_trainer(scale_factors=[1, 3], data=make_samples(image_tokenizer))
    for changes, message in (
        ({"condition_dropout": 2}, "`condition_dropout` must be between 0 and 1"),
        ({"timestep_sampling": "cosine"}, "must be one of uniform, logit_normal"),
        ({"min_snr_gamma": 0}, "`min_snr_gamma` must be positive"),
        ({"ema_decay": 1.5}, "`ema_decay` must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            NextFlowDiffusionDecoderTrainingConfig(str(tmp_path), use_cpu=True, **changes)
    foreign = Dataset.from_list([{"codes": [1], "image_tokenizer_hash": "another"}])
    with pytest.raises(ValueError, match="The codes come from the image tokenizer another, but"):
        make_trainer(data=foreign)
    with pytest.raises(ValueError, match="`pixel_values` must be 160 x 160, but they are 80 x 80"):
        make_trainer(data=make_samples(image_tokenizer), scale_factors=[2]).train()
    broken = make_samples(image_tokenizer)
    for sample in broken:
        sample["pixel_values"] = sample["pixel_values"] * torch.inf
    with pytest.raises(ValueError, match="The loss is nan at step 0"):
        make_trainer(data=broken).train()
    settings = dict(save_strategy="steps", save_steps=1, max_steps=1, num_logged_images=0)
    make_trainer(**settings).train()
    with pytest.raises(ValueError, match="`ema` was False, now True"):
        make_trainer(**settings, ema_decay=0.9).train(resume_from_checkpoint=True)
