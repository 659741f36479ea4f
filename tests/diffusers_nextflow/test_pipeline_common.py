"""What diffusers' PipelineTesterMixin checks of every pipeline, on ours."""

import copy
import inspect

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    MultiPipelineCallbacks,
    PipelineCallback,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
)

from diffusers_nextflow import NextFlowPipeline, NextFlowPipelineOutput
from transformers_nextflow import ScaleSchedule

PROMPT = "a red circle"
SCHEDULE = ScaleSchedule(num_scales=5)


@pytest.fixture(scope="module")
def pipe(tiny_random_checkpoint):
    pipe = NextFlowPipeline.from_pretrained(tiny_random_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt=PROMPT, **settings):
    settings = {"generator": torch.Generator().manual_seed(0), "output_type": "pt", **settings}
    return pipe(prompt, **settings).images


# Loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_save_and_load(dtype, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, dtype=dtype)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.dtype == loaded.model.dtype == loaded.image_tokenizer.dtype == dtype
    assert loaded.diffusion_decoder is None and loaded.scheduler is None  # optional components stay missing
    images = draw(loaded)
    assert images.isfinite().all()
    if dtype == torch.float32:
        assert torch.equal(images, draw(pipe))


def test_components_make_the_same_pipeline(pipe):
    assert set(pipe.components) == set(inspect.signature(NextFlowPipeline.__init__).parameters) - {"self"}
    again = NextFlowPipeline(**pipe.components)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), draw(pipe))
    from_pipe = NextFlowPipeline.from_pipe(pipe)
    assert all(from_pipe.components[name] is part for name, part in pipe.components.items())


def test_to_dtype_and_device(pipe):
    moved = NextFlowPipeline(**{name: copy.deepcopy(part) for name, part in pipe.components.items()})
    assert moved.to(torch.bfloat16) is moved and moved.dtype == torch.bfloat16
    assert moved.to("cpu", torch.float32).device.type == "cpu" and moved.dtype == torch.float32
    assert {p.device.type for p in moved.to("meta").model.parameters()} == {"meta"}


def test_a_component_that_is_replaced_is_the_one_that_is_used(pipe):
    changed = NextFlowPipeline(**pipe.components)
    changed.set_progress_bar_config(disable=True)
    picture = PIL.Image.new("RGB", (80, 80), "red")
    before = draw(changed, image=picture, image_top_k=1)
    changed.image_tokenizer = copy.deepcopy(pipe.image_tokenizer)
    with torch.no_grad():
        for weight in changed.image_tokenizer.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(0))
    draw(changed, image=picture)
    assert changed._processor.image_tokenizer is changed.image_tokenizer
    assert not torch.equal(draw(changed, image=picture, image_top_k=1), before)


# Calling


def test_the_call_has_the_parameters_of_text_to_image_pipelines():
    parameters = inspect.signature(NextFlowPipeline.__call__).parameters
    assert {
        "prompt", "negative_prompt", "height", "width", "num_inference_steps", "guidance_scale", "generator",
        "num_images_per_prompt", "output_type", "return_dict", "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
    } <= set(parameters)  # fmt: skip


@pytest.mark.parametrize("num_images_per_prompt", [1, 3])
def test_a_batch_is_its_samples(num_images_per_prompt, pipe):
    prompts = [PROMPT, "a", "three blue squares left of a star"]
    number = len(prompts) * num_images_per_prompt
    generators = [torch.Generator().manual_seed(seed) for seed in range(number)]
    together = draw(
        pipe, prompts, num_images_per_prompt=num_images_per_prompt, generator=generators, guidance_scale=2.0
    )
    assert together.shape == (number, 3, SCHEDULE.height, SCHEDULE.width)
    for index, image in enumerate(together):
        generator = torch.Generator().manual_seed(index)
        [alone] = draw(pipe, prompts[index // num_images_per_prompt], generator=generator, guidance_scale=2.0)
        torch.testing.assert_close(image, alone, atol=1e-4, rtol=0)


def test_output_types_are_one_picture(pipe):
    tensor = draw(pipe)
    array, [picture] = draw(pipe, output_type="np"), draw(pipe, output_type="pil")
    assert np.allclose(array, tensor.permute(0, 2, 3, 1).numpy())
    assert np.abs(np.asarray(picture) / 255 - array[0]).max() <= 1 / 255
    output = pipe(PROMPT, generator=torch.Generator().manual_seed(0), output_type="pt")
    assert type(output) is NextFlowPipelineOutput and torch.equal(output.images, output[0])
    [of_tuple] = pipe(PROMPT, generator=torch.Generator().manual_seed(0), output_type="pt", return_dict=False)
    assert torch.equal(of_tuple, tensor)


@pytest.mark.parametrize("prompt", [(PROMPT, "a blue square"), [PROMPT, "a blue square"]])
def test_a_tuple_of_prompts_is_a_list(prompt, pipe):
    assert len(draw(pipe, prompt, negative_prompt=("red", ""), guidance_scale=2.0)) == 2


def test_num_inference_steps_is_the_number_of_scales(pipe):
    assert torch.equal(draw(pipe, num_inference_steps=5), draw(pipe))
    assert draw(pipe, num_inference_steps=3, num_scales=3).shape[-1] == 48
    with pytest.raises(ValueError, match="80 x 80 pixels has 5: leave out `num_inference_steps`, which is 50"):
        draw(pipe, num_inference_steps=50)


def test_pictures_may_be_arrays(pipe):
    array = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    picture = PIL.Image.fromarray(array)
    expected = draw(pipe, image=picture)
    assert torch.equal(draw(pipe, image=array), expected)
    assert torch.equal(draw(pipe, image=[array]), expected)
    assert torch.equal(draw(pipe, image=torch.from_numpy(array).permute(2, 0, 1)), expected)
    two = draw(pipe, [PROMPT, PROMPT], image=[picture, picture])
    assert torch.equal(draw(pipe, [PROMPT, PROMPT], image=np.stack([array, array])), two)
    assert torch.equal(draw(pipe, image=np.stack([array, array])), draw(pipe, image=[picture, picture]))


def test_guidance_of_at_most_one_is_none(pipe):
    """As in diffusers; to `generate`, 0 would be the picture of no prompt."""
    plain = draw(pipe, guidance_scale=1.0)
    assert torch.equal(draw(pipe, guidance_scale=0.0), plain) and torch.equal(draw(pipe, guidance_scale=0.5), plain)


def test_an_empty_negative_prompt_is_none(pipe):
    settings = {"guidance_scale": 5.0, "image_top_k": 1}
    for style in ("bare", "chat"):
        plain = draw(pipe, prompt_style=style, **settings)
        assert torch.equal(draw(pipe, prompt_style=style, negative_prompt="", **settings), plain)
        assert not torch.equal(draw(pipe, prompt_style=style, negative_prompt="red", **settings), plain)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"prompt": ()}, ValueError, "`prompt` must be a string or a list of strings, but got \\(\\)"),
        ({"prompt": [PROMPT, 3]}, ValueError, "`prompt` must be a string or a list of strings"),
        ({"negative_prompt": []}, ValueError, "`negative_prompt` must be a string or a list of strings"),
        ({"prompt": "a <|im_end|>"}, ValueError, "must not hold any of <\\|im_end\\|>"),
        ({"negative_prompt": "a <boi>"}, ValueError, "must not hold any of <boi>"),
        ({"prompt": "a<boi>", "thinking": True}, ValueError, "must not hold any of <boi>"),
        ({"prompt_style": "haiku"}, ValueError, 'A prompt style is "bare" or "chat", but got \'haiku\''),
        ({"generator": 0}, TypeError, "`generator` must be a `torch.Generator`"),
        ({"generator": [0]}, TypeError, "`generator` must be a `torch.Generator`"),
        ({"generator": []}, ValueError, "Got 0 generators for 1 images"),
        ({"num_images_per_prompt": 1.5}, ValueError, "`num_images_per_prompt` must be at least 1, but got 1.5"),
        ({"guidance_scale": float("nan")}, ValueError, "`guidance_scale` must be at least 0, but got nan"),
        ({"guidance_scale": -1}, ValueError, "`guidance_scale` must be at least 0, but got -1"),
    ],
)
def test_bad_arguments(settings, error, message, pipe):
    with pytest.raises(error, match=message):
        pipe(**{"prompt": PROMPT, **settings})


# Callbacks


def test_callback_inputs(pipe):
    """All that may be asked for is given, a subset too, and nothing else is."""
    names = NextFlowPipeline._callback_tensor_inputs
    for asked in (names, names[:1], ()):
        seen = []
        draw(
            pipe,
            callback_on_step_end=lambda pipe, step, timestep, tensors, seen=seen: seen.append(set(tensors)),
            callback_on_step_end_tensor_inputs=asked,
        )
        assert seen == [set(asked)] * 5


def test_a_callback_sees_guidance_and_steps(pipe):
    seen = []
    callback = lambda pipe, *_: seen.append((pipe.num_timesteps, pipe.guidance_scale))  # noqa: E731
    draw(pipe, guidance_scale=4.0, callback_on_step_end=callback)
    draw(pipe, num_scales=3, guidance_scale=0.0, callback_on_step_end=callback)
    draw(pipe, num_scales=2, callback_on_step_end=callback)
    stored = pipe.model.generation_config.guidance_scale
    assert seen == [(5, 4.0)] * 5 + [(3, 1.0)] * 3 + [(2, stored)] * 2


class Watcher(PipelineCallback):
    """Written as diffusers' documentation says."""

    tensor_inputs = ["codes"]
    steps: list = []

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        self.steps.append((step_index, callback_kwargs["codes"].shape[1]))
        return callback_kwargs


def test_official_callbacks_run(pipe):
    Watcher.steps.clear()
    draw(pipe, callback_on_step_end=Watcher())
    assert Watcher.steps == list(enumerate(SCHEDULE.offsets[1:]))
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=0.4)
    draw(pipe, callback_on_step_end=cutoff, guidance_scale=5.0)
    draw(pipe, callback_on_step_end=MultiPipelineCallbacks([Watcher(), cutoff]), guidance_scale=5.0)
    assert len(Watcher.steps) == 10
    with pytest.raises(ValueError, match=r"\['add_text_embeds', 'add_time_ids'\], but may only hold"):
        draw(pipe, callback_on_step_end=SDXLCFGCutoffCallback())
    with pytest.raises(AttributeError, match="set_ip_adapter_scale"):
        draw(pipe, callback_on_step_end=IPAdapterScaleCutoffCallback(cutoff_step_ratio=0.0))


def replace_last(value):
    """A callback that makes the codes of scale 2 all one code."""

    def callback(pipe, step, timestep, tensors):
        codes = tensors["codes"].clone()
        if step == 2:
            codes[:, SCHEDULE.offsets[2] :] = value
        return {"codes": codes}

    return callback


def on_scale_2(result):
    return lambda step, schedule, codes: result(codes) if step == 2 else None


def test_changed_codes_change_what_follows(pipe):
    inputs = pipe.tokenizer(PROMPT, return_tensors="pt")
    settings = {"generation_mode": "image", "return_dict_in_generate": True, "image_top_k": 1}
    start = SCHEDULE.offsets[2]
    expected = pipe.model.generate(
        **inputs,
        **settings,
        on_scale_end=on_scale_2(lambda codes: torch.cat([codes[:, :start], codes[:, start:] * 0 + 7], 1)),
    ).image_codes
    assert expected[0, start : SCHEDULE.offsets[3]].tolist() == [7] * 9
    options = {"image_top_k": 1, "output_type": "latent", "callback_on_step_end_tensor_inputs": ["codes"]}
    latents = draw(pipe, callback_on_step_end=replace_last(7), **options)
    assert torch.equal(latents, pipe._codes_to_latents(expected, SCHEDULE))
    assert not torch.equal(latents, draw(pipe, callback_on_step_end=replace_last(9), **options))


def test_changed_guidance_changes_what_follows(pipe):
    """The cut-off is the whole picture's guidance up to its scale, and none after it."""
    whole, none = (
        draw(pipe, guidance_scale=g, image_top_k=1, output_type="latent", callback_on_step_end=None) for g in (8.0, 1.0)
    )
    cut = draw(
        pipe,
        guidance_scale=8.0,
        image_top_k=1,
        output_type="latent",
        callback_on_step_end=SDCFGCutoffCallback(cutoff_step_index=1, cutoff_step_ratio=None),
    )
    assert not torch.equal(cut, whole) and not torch.equal(cut, none)


def test_guidance_that_was_off_is_not_turned_on(pipe):
    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale = 3.0

    with pytest.raises(ValueError, match="guidance"):
        draw(pipe, guidance_scale=1.0, callback_on_step_end=callback)


def test_what_a_callback_leaves_is_what_is_kept(pipe):
    """Interrupted at the scale that was changed, the picture is that of the changed codes."""

    def stop(pipe, step, timestep, tensors):
        tensors["codes"][:, SCHEDULE.offsets[2] :] = 5  # in place, and nothing is returned
        pipe._interrupt = step == 2
        return None if step == 2 else {"codes": tensors["codes"] * 0}

    names = {"callback_on_step_end_tensor_inputs": ["codes"], "output_type": "latent"}
    shown = draw(pipe, callback_on_step_end=lambda *a: stop(*a) if a[1] == 2 else None, **names)
    codes = []
    draw(
        pipe, callback_on_step_end=lambda p, i, t, tensors: codes.append(tensors["codes"]) if i == 2 else None, **names
    )
    codes[0][:, SCHEDULE.offsets[2] :] = 5
    assert torch.equal(shown, pipe._codes_to_latents(codes[0], SCHEDULE))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"codes": torch.zeros(1, 2, dtype=torch.long)}, "must not change shapes"),
        ({"noise": 1}, "None or a dict of .* not {'noise': 1}"),
        (torch.zeros(1), "None or a dict of .* not tensor"),
    ],
)
def test_what_a_callback_may_not_return(returned, message, pipe):
    with pytest.raises(ValueError, match=message):
        draw(pipe, callback_on_step_end=lambda *_: returned)


def test_offload_hooks_survive_callbacks_and_edits(pipe):
    offloaded = NextFlowPipeline(**pipe.components)
    offloaded.set_progress_bar_config(disable=True)
    picture = PIL.Image.new("RGB", (80, 80), "red")
    settings = {
        "image": picture,
        "callback_on_step_end": lambda pipe, step, timestep, tensors: pipe.decode_latents(tensors["latents"]) and None,
        "callback_on_step_end_tensor_inputs": NextFlowPipeline._callback_tensor_inputs,
    }
    try:
        offloaded.enable_model_cpu_offload(device="cpu")
        assert torch.equal(draw(offloaded, **settings), draw(offloaded, **settings))
    finally:
        offloaded.remove_all_hooks()
    assert torch.equal(draw(offloaded, **settings), draw(pipe, **settings))
