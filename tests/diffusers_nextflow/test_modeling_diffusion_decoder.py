"""The diffusion decoder: what it starts from, that codes steer it, what it is saved as, and what it refuses."""

import copy
import json
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
)

from diffusers_nextflow import NextFlowDiffusionDecoder
from diffusers_nextflow.diffusion_backbones import decode_with_vae, encode_with_vae
from diffusers_nextflow.modeling_diffusion_decoder import condition_of
from diffusion_parts import BACKBONE_NAMES, build_backbone, build_decoder, build_vae, random_codes
from transformers_nextflow import NextFlowImageTokenizer

GRID = torch.tensor([[5, 16, 16]])
FLOW = FlowMatchEulerDiscreteScheduler()
SCHEDULERS = {
    "epsilon": EulerDiscreteScheduler(prediction_type="epsilon"),
    "v_prediction": DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
    "sample": DPMSolverMultistepScheduler(prediction_type="sample", algorithm_type="sde-dpmsolver++"),
    "flow_prediction": FLOW,
}


@pytest.fixture(scope="module")
def image_tokenizer(tiny_random_checkpoint):
    return NextFlowImageTokenizer.from_pretrained(tiny_random_checkpoint, subfolder="image_tokenizer")


@pytest.fixture(scope="module")
def pixel_decoder(image_tokenizer):
    return build_decoder("UNet2DModel", image_tokenizer)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def inputs_of(name: str, image_tokenizer: Any, number: int = 2) -> dict[str, Any]:
    """Inputs of `forward` at the codes' size."""
    latents = image_tokenizer.codes_to_latents(random_codes(number), GRID)
    inputs = {"timestep": torch.tensor([900.0, 20.0])[:number], "condition": condition_of(image_tokenizer, latents)}
    if name == "UNet2DModel":
        return {"sample": noise(number, 3, 80, 80), **inputs}
    text = {"prompt_embeds": noise(number, 4, 12, seed=1), "pooled_prompt_embeds": noise(number, 6, seed=2)}
    return {"sample": noise(number, 4, 10, 10), **inputs, **text}


def call_base(name: str, base: Any, sample, timestep, condition, prompt_embeds=None, pooled_prompt_embeds=None):
    """The stock denoiser, called as its own pipelines call it."""
    if name == "UNet2DModel":
        places = torch.nn.functional.pixel_unshuffle(sample, 4)
        predicted = base(places, timestep, class_labels=torch.zeros(len(sample), dtype=torch.long)).sample
        return torch.nn.functional.pixel_shuffle(predicted, 4)
    if name == "UNet2DConditionModel":
        time_ids = torch.tensor([[80.0, 80, 0, 0, 80, 80]] * len(sample))
        added = {"text_embeds": pooled_prompt_embeds, "time_ids": time_ids}
        return base(sample, timestep, prompt_embeds, added_cond_kwargs=added).sample
    if name == "SD3Transformer2DModel":
        return base(sample, prompt_embeds, pooled_prompt_embeds, timestep).sample
    packed = FluxPipeline._pack_latents(sample, *sample.shape)
    img_ids = FluxPipeline._prepare_latent_image_ids(1, 5, 5, "cpu", torch.float32)
    txt_ids = torch.zeros(prompt_embeds.shape[1], 3)
    ones = torch.ones(len(sample))
    predicted = base(packed, prompt_embeds, pooled_prompt_embeds, timestep / 1000, img_ids, txt_ids, ones).sample
    return FluxPipeline._unpack_latents(predicted, 80, 80, 8)


# What it starts from


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_a_new_decoder_is_its_backbone(name, image_tokenizer, tmp_path):
    base = build_backbone(name)
    base.save_pretrained(tmp_path / "base")
    decoder = build_decoder(name, image_tokenizer, trained=False)
    inputs = inputs_of(name, image_tokenizer)
    with torch.no_grad():
        expected = call_base(name, type(base).from_pretrained(tmp_path / "base"), **inputs)
        torch.testing.assert_close(decoder(**inputs).sample, expected, atol=1e-6, rtol=0)
        other = inputs | {"condition": noise(*inputs["condition"].shape)}
        assert torch.equal(decoder(**other).sample, decoder(**inputs).sample)


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_codes_steer_a_trained_decoder_unless_they_are_dropped(name, image_tokenizer):
    decoder, inputs = build_decoder(name, image_tokenizer), inputs_of(name, image_tokenizer)
    other = inputs | {
        "condition": condition_of(image_tokenizer, image_tokenizer.codes_to_latents(random_codes(2, 1), GRID))
    }
    with torch.no_grad():
        difference = (decoder(**inputs).sample - decoder(**other).sample).abs()
        assert difference.mean() > 1e-3
        keep = torch.tensor([True, False])
        kept, dropped = decoder(**inputs, keep_condition=keep).sample - decoder(**other, keep_condition=keep).sample
        assert kept.abs().mean() > 1e-3 and not dropped.any()
        if "prompt_embeds" in inputs:
            captioned = inputs | {"prompt_embeds": noise(2, 4, 12, seed=7)}
            assert not torch.equal(decoder(**captioned).sample, decoder(**inputs).sample)


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
def test_lora_off_is_the_base(name, image_tokenizer):
    peft = pytest.importorskip("peft")
    decoder, inputs = build_decoder(name, image_tokenizer, trained=False), inputs_of(name, image_tokenizer)
    with torch.no_grad():
        before = decoder(**inputs).sample
        decoder.backbone.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        assert not torch.allclose(decoder(**inputs).sample, before, atol=1e-4)
        decoder.backbone.disable_adapters()
        torch.testing.assert_close(decoder(**inputs).sample, before, atol=1e-6, rtol=0)


# Saving


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_a_saved_decoder_predicts_the_same(name, image_tokenizer, tmp_path):
    decoder, inputs = build_decoder(name, image_tokenizer), inputs_of(name, image_tokenizer)
    decoder.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = NextFlowDiffusionDecoder.from_pretrained(tmp_path)
    for dtype, atol in ((torch.float32, 0), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        half = NextFlowDiffusionDecoder.from_pretrained(tmp_path, torch_dtype=dtype)
        assert half.dtype == dtype
        with torch.no_grad():
            predicted = half(**inputs).sample.float()
            torch.testing.assert_close(predicted, decoder(**inputs).sample, atol=atol, rtol=0)
    assert {**json.loads(decoder.to_json_string()), "_name_or_path": str(tmp_path)} == json.loads(
        loaded.to_json_string()
    )


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_activation_checkpointing_changes_no_gradient(name, image_tokenizer):
    decoder, inputs = build_decoder(name, image_tokenizer).train(), inputs_of(name, image_tokenizer)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            decoder.enable_gradient_checkpointing()
        decoder.zero_grad()
        decoder(**inputs).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in decoder.parameters() if p.grad is not None])
    assert len(gradients[0]) > 10
    torch.testing.assert_close(*gradients)


# Drawing


def draw(decoder, image_tokenizer, codes, scheduler=FLOW, seeds=None, **settings) -> torch.Tensor:
    generators = [seeded(seed) for seed in (range(len(codes)) if seeds is None else seeds)]
    settings = {"generator": generators, **settings}
    return decoder.decode(codes, GRID, image_tokenizer=image_tokenizer, scheduler=scheduler, **settings).sample


@pytest.mark.parametrize("prediction_type", SCHEDULERS)
def test_a_batch_is_its_pictures(prediction_type, image_tokenizer):
    decoder = build_decoder("UNet2DModel", image_tokenizer, prediction_type=prediction_type)
    codes, scheduler = random_codes(3), SCHEDULERS[prediction_type]
    before = copy.deepcopy(vars(scheduler))
    settings = {"scheduler": scheduler, "guidance_scale": 2.0}
    together = draw(decoder, image_tokenizer, codes, **settings)
    assert together.shape == (3, 3, 80, 80) and together.isfinite().all() and together.std() > 0.05
    for index in range(3):
        alone = draw(decoder, image_tokenizer, codes[index : index + 1], seeds=[index], **settings)
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-3, rtol=0)
    assert not torch.equal(draw(decoder, image_tokenizer, codes, seeds=[3, 1, 2], **settings)[0], together[0])
    assert str(vars(scheduler)) == str(before), "threads share it"


def test_one_generator_is_the_first_pictures(pixel_decoder, image_tokenizer):
    codes = random_codes(2)
    together = draw(pixel_decoder, image_tokenizer, codes, generator=seeded(0))
    alone = draw(pixel_decoder, image_tokenizer, codes[:1], generator=seeded(0))
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=0)
    state = torch.get_rng_state()
    draw(pixel_decoder, image_tokenizer, codes, generator=None)
    assert torch.equal(torch.get_rng_state(), state)


def test_flow_matching_is_eulers_method(pixel_decoder, image_tokenizer):
    """Written out: the velocity points from the picture to the noise."""
    codes = random_codes(1)
    condition = condition_of(image_tokenizer, image_tokenizer.codes_to_latents(codes, GRID))
    sample = noise(1, 3, 80, 80)
    for sigma, following in ((1.0, 0.5005), (0.5005, 0.001), (0.001, 0.0)):
        with torch.no_grad():
            velocity = pixel_decoder(sample, torch.tensor(1000 * sigma), condition).sample
        sample = sample + (following - sigma) * velocity
    drawn = draw(pixel_decoder, image_tokenizer, codes, num_inference_steps=3)
    torch.testing.assert_close(drawn, sample.clamp(-1, 1), atol=1e-4, rtol=0)


def test_guidance_leads_away_from_no_codes(pixel_decoder, image_tokenizer):
    codes, settings = random_codes(1), {"num_inference_steps": 1}
    plain = draw(pixel_decoder, image_tokenizer, codes, **settings)
    assert torch.equal(draw(pixel_decoder, image_tokenizer, codes, guidance_scale=0.5, **settings), plain)
    guided = [draw(pixel_decoder, image_tokenizer, codes, guidance_scale=scale, **settings) for scale in (1.5, 2.0)]
    inside = (plain.abs() < 1) & (guided[1].abs() < 1)  # one step is linear in the prediction, where nothing is clamped
    torch.testing.assert_close((guided[0] - plain)[inside] * 2, (guided[1] - plain)[inside], atol=1e-4, rtol=0)
    assert not torch.equal(guided[0], plain)


def test_codes_and_their_latents_are_one_picture(pixel_decoder, image_tokenizer):
    for codes in (random_codes(1), random_codes(1)[:, :14]):  # all scales, and the first three
        latents = image_tokenizer.codes_to_latents(codes, GRID)
        settings = {"image_tokenizer": image_tokenizer, "scheduler": FLOW, "return_dict": False}
        [of_codes] = pixel_decoder.decode(codes, GRID, generator=seeded(0), **settings)
        [of_latents] = pixel_decoder.decode(latents=latents, generator=seeded(0), **settings)
        assert torch.equal(of_codes, of_latents)


def test_twice_the_size_is_another_picture(pixel_decoder, image_tokenizer):
    large = draw(pixel_decoder, image_tokenizer, random_codes(1), scale_factor=2)
    assert large.shape == (1, 3, 160, 160)
    relabelled = copy.deepcopy(pixel_decoder)
    with torch.no_grad():
        relabelled.backbone.class_embedding.weight[1] += 1  # the class embedding says that it is twice the size
    assert not torch.equal(draw(relabelled, image_tokenizer, random_codes(1), scale_factor=2), large)
    small = draw(pixel_decoder, image_tokenizer, random_codes(1))
    assert torch.equal(draw(relabelled, image_tokenizer, random_codes(1)), small)


@pytest.mark.parametrize("name", BACKBONE_NAMES[1:])
def test_latents_of_an_autoencoder(name, image_tokenizer):
    decoder, vae = build_decoder(name, image_tokenizer), build_vae()
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    inputs = inputs_of(name, image_tokenizer)
    text = {key: inputs[key] for key in ("prompt_embeds", "pooled_prompt_embeds")}
    for scheduler in (FLOW, dynamic):
        settings = {"vae": vae, "num_inference_steps": 2, "scheduler": scheduler, "guidance_scale": 1.5, **text}
        pixels = draw(decoder, image_tokenizer, random_codes(2), **settings)
        assert pixels.shape == (2, 3, 80, 80) and pixels.isfinite().all()


def test_latents_are_scaled_as_the_autoencoder_says():
    vae, pixels = build_vae(), noise(1, 3, 16, 16)
    torch.manual_seed(0)
    with torch.no_grad():
        latents = encode_with_vae(vae, pixels)
        torch.manual_seed(0)
        raw = vae.encode(pixels).latent_dist.sample()
        torch.testing.assert_close(latents, (raw - 0.1) * 0.5)
        torch.testing.assert_close(decode_with_vae(vae, latents), vae.decode(raw).sample, atol=1e-5, rtol=0)


def test_what_a_step_returns_is_gone_on_with(pixel_decoder, image_tokenizer):
    seen = []

    def on_step_end(step, num_steps, timestep, sample):
        seen.append((step, num_steps, float(timestep)))
        return torch.zeros_like(sample) if step == 2 else None

    assert not draw(pixel_decoder, image_tokenizer, random_codes(1), on_step_end=on_step_end).any()
    assert [(step, number, round(at, 1)) for step, number, at in seen] == [(0, 3, 1000.0), (1, 3, 500.5), (2, 3, 1.0)]


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"scheduler": SCHEDULERS["epsilon"]},
            'takes predictions for "epsilon", but the diffusion decoder predicts "flow',
        ),
        (
            {"scheduler": FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)},
            "draws from the global random state",
        ),
        ({"num_inference_steps": 0}, "at least 1 step of denoising, but got 0"),
        ({"num_inference_steps": 2.5}, "at least 1 step of denoising, but got 2.5"),
        ({"scale_factor": 3}, "trained for the scale factor 1, 2, but 3 was asked for"),
        ({"vae": build_vae()}, "draws pixels: leave out `vae`"),
        ({"prompt_embeds": torch.zeros(1, 1, 4)}, "trained without captions: leave out `prompt_embeds`"),
        ({"generator": [seeded(0)] * 2}, "Got 2 generators for 1 images"),
        ({"latents": torch.zeros(1, 12, 5, 5)}, "Give either `codes` with their `image_grid_shw`, or `latents`"),
        ({"codes": None, "image_grid_shw": None}, "Give either `codes`"),
        ({"codes": None, "image_grid_shw": None, "latents": torch.zeros(1, 7, 5, 5)}, r"must be \(batch, 12, h, w\)"),
        ({"codes": random_codes(1)[:, :7]}, "codes"),
    ],
)
def test_bad_calls(settings, message, pixel_decoder, image_tokenizer):
    settings = {"codes": random_codes(1), "image_grid_shw": GRID, "scheduler": FLOW, **settings}
    with pytest.raises(ValueError, match=message):
        pixel_decoder.decode(image_tokenizer=image_tokenizer, **settings)


def test_parts_that_do_not_fit(image_tokenizer, pixel_decoder, tiny_random_checkpoint):
    other = copy.deepcopy(image_tokenizer)
    with torch.no_grad():
        other.quantizer.pixel_codebook.weight.add_(1)
    with pytest.raises(ValueError, match=r"this one's codebook is .*the same code means another picture"):
        draw(pixel_decoder, other, random_codes(1))
    draw(pixel_decoder, copy.deepcopy(image_tokenizer).to(torch.bfloat16), random_codes(1))  # its hash can't be known
    narrow = NextFlowImageTokenizer.from_pretrained(tiny_random_checkpoint, subfolder="image_tokenizer")
    narrow.config.semantic_feature_dim += 1
    with pytest.raises(ValueError, match="Load the image tokenizer that it was trained on"):
        draw(pixel_decoder, narrow, random_codes(1))
    latent = build_decoder("UNet2DConditionModel", image_tokenizer)
    with pytest.raises(ValueError, match="draws latents of an autoencoder: pass that one as `vae`"):
        draw(latent, image_tokenizer, random_codes(1))
    wrong = build_vae()
    wrong.register_to_config(latent_channels=16)
    with pytest.raises(
        ValueError, match="has 16 channels at a stride of 8 pixels, but the diffusion decoder draws 4 at 8"
    ):
        draw(latent, image_tokenizer, random_codes(1), vae=wrong)
    with pytest.raises(ValueError, match="trained with captions and needs `prompt_embeds`"):
        draw(latent, image_tokenizer, random_codes(1), vae=build_vae())
    text = {"prompt_embeds": noise(1, 4, 12), "pooled_prompt_embeds": noise(1, 5)}
    with pytest.raises(ValueError, match="`pooled_prompt_embeds` must be 6 wide"):
        draw(latent, image_tokenizer, random_codes(1), vae=build_vae(), **text)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "velocity"}, "`prediction_type` must be one of epsilon, v_prediction, sample, flow_"),
        ({"scale_factors": [4]}, r"`scale_factors` may hold 1 and 2, but is \[4\]"),
        ({"scale_factors": []}, "`scale_factors` may hold"),
        ({"patch_size": 3}, r"`patch_size`\*\*2 = 9"),
        ({"patch_size": 2}, "3 channels, but the backbone takes 12"),
        ({"uses_text": True}, "UNet2DModel has no text branch"),
    ],
)
def test_bad_configurations(config, message, image_tokenizer):
    with pytest.raises(ValueError, match=message):
        build_decoder("UNet2DModel", image_tokenizer, **config)


def test_bad_backbones(image_tokenizer):
    with pytest.raises(ValueError, match=r"`backbone` must be one of UNet2DModel, .*but got Linear"):
        NextFlowDiffusionDecoder.from_backbone(torch.nn.Linear(1, 1), image_tokenizer)
    with pytest.raises(ValueError, match=r"`backbone_class` must be one of .*'DiT'"):
        NextFlowDiffusionDecoder("DiT")


def test_sizes_that_the_backbone_cannot_halve(image_tokenizer):
    decoder = build_decoder("UNet2DModel", image_tokenizer, patch_size=4)
    decoder.backbone.register_to_config(block_out_channels=(8,) * 4)
    with pytest.raises(ValueError, match=r"A sample of 80 x 80 places does not fit the backbone, .* multiples of 32"):
        draw(decoder, image_tokenizer, random_codes(1))
