"""The diffusers pipeline: both layouts, the same pictures as `generate`, and what a call can ask for."""

import copy
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from diffusers.utils import export_to_gif
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled

from diffusers_nextflow import NextFlowPipeline, NextFlowPipelineOutput
from transformers_nextflow import (
    NextFlowForCausalLM,
    NextFlowImageTokenizer,
    NextFlowProcessor,
    ScaleSchedule,
    tiny_checkpoint,
)

PROMPT = "a red circle"
NUM_SCALES = 5
SCHEDULE = ScaleSchedule(num_scales=NUM_SCALES)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipe, prompt=PROMPT, seed=0, **settings):
    return pipe(prompt, generator=seeded(seed), output_type="pt", **settings).images


@pytest.fixture(scope="module")
def pipe(tiny_random_checkpoint):
    pipe = NextFlowPipeline.from_pretrained(tiny_random_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def diffusers_folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers_folder")
    pipe.save_pretrained(folder)
    return folder


# Loading and saving


@pytest.mark.parametrize("loader", [NextFlowPipeline, DiffusionPipeline, AutoPipelineForText2Image])
def test_a_saved_pipeline_loads_and_draws_the_same(loader, pipe, diffusers_folder):
    loaded = loader.from_pretrained(diffusers_folder)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is NextFlowPipeline
    assert loaded.components.keys() == pipe.components.keys()
    assert torch.equal(draw(loaded), draw(pipe))


def test_a_saved_pipeline_names_the_package_of_its_components(diffusers_folder):
    index = json.loads((diffusers_folder / "model_index.json").read_text())
    assert index["model"] == ["transformers_nextflow", "NextFlowForCausalLM"]
    assert index["image_tokenizer"] == ["transformers_nextflow", "NextFlowImageTokenizer"]
    assert index["diffusion_decoder"] == index["scheduler"] == index["vae"] == [None, None]


def test_a_transformers_checkpoint_with_an_index_loads_in_diffusers(pipe, tiny_random_checkpoint, tmp_path):
    """One folder can be both layouts: diffusers looks for a component in the root if it has no sub-folder."""
    folder = shutil.copytree(tiny_random_checkpoint, tmp_path / "checkpoint")
    (folder / "model_index.json").unlink()
    assert torch.equal(draw(NextFlowPipeline.from_pretrained(folder)), draw(pipe))
    pipe.save_config(folder)
    loaded = DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded), draw(pipe))


@pytest.mark.parametrize("missing", ["config.json", "tokenizer_config.json", "tokenizer.json", "image_tokenizer"])
def test_an_incomplete_checkpoint_is_named(missing, tiny_random_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_random_checkpoint, tmp_path / "checkpoint")
    shutil.rmtree(folder / missing) if (folder / missing).is_dir() else (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"has no `{missing}`.*NextFlowProcessor"):
        NextFlowPipeline.from_pretrained(folder)


@pytest.fixture
def hub(monkeypatch):
    """A Hub with one repository: `hub(folder)` publishes a folder, and returns the list of what is fetched whole."""

    def publish(folder, online=True):
        names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        fetched = []

        def model_info(repository, **kwargs):
            if not online:
                raise OfflineModeIsEnabled
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

        def hf_hub_download(repository, filename, **kwargs):
            if filename not in names:
                raise EntryNotFoundError(filename) if online else LocalEntryNotFoundError(filename)
            return str(folder / filename)

        def snapshot_download(repository, **kwargs):
            fetched.append(kwargs)
            return str(folder)

        for module in ("diffusers.pipelines.pipeline_utils", "diffusers_nextflow.pipeline_nextflow"):
            for function in (model_info, hf_hub_download, snapshot_download):
                monkeypatch.setattr(f"{module}.{function.__name__}", function, raising=False)
        monkeypatch.setattr(
            "diffusers.pipelines.pipeline_utils._resolve_revision", lambda *args, revision, **kwargs: revision
        )
        return fetched

    return publish


@pytest.mark.parametrize("layout", ["tiny_random_checkpoint", "diffusers_folder"])
@pytest.mark.parametrize("loader", [NextFlowPipeline, DiffusionPipeline])
def test_a_pipeline_on_the_hub_loads(loader, layout, pipe, request, hub):
    hub(request.getfixturevalue(layout))
    loaded = loader.from_pretrained("somebody/a-pipeline")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded), draw(pipe))


@pytest.mark.parametrize("online", [True, False])
def test_a_transformers_checkpoint_on_the_hub_loads(online, pipe, tiny_random_checkpoint, hub, tmp_path):
    """Also one from before there was an index."""
    folder = shutil.copytree(tiny_random_checkpoint, tmp_path / "checkpoint")
    (folder / "model_index.json").unlink()
    fetched = hub(folder, online)
    loaded = NextFlowPipeline.from_pretrained("somebody/a-checkpoint", revision="v1")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded), draw(pipe))
    [arguments] = fetched
    assert arguments["revision"] == "v1"
    if online:
        assert not any(pattern.endswith((".bin", ".py")) for pattern in arguments["allow_patterns"])


@pytest.mark.parametrize("layout", ["tiny_random_checkpoint", "diffusers_folder"])
def test_dtype(layout, request):
    pipe = NextFlowPipeline.from_pretrained(request.getfixturevalue(layout), dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.model.dtype == pipe.image_tokenizer.dtype == torch.bfloat16
    assert draw(pipe).dtype == torch.bfloat16
    assert {p.dtype for p in pipe.image_tokenizer.quantizer.parameters()} == {torch.float32}
    assert pipe.to(torch.float32).model.dtype == torch.float32


def test_components_can_be_given(pipe, tiny_random_checkpoint):
    loaded = NextFlowPipeline.from_pretrained(
        tiny_random_checkpoint, model=pipe.model, image_tokenizer=pipe.image_tokenizer
    )
    assert loaded.model is pipe.model and loaded.image_tokenizer is pipe.image_tokenizer


def test_an_adapter_is_not_lost_on_saving(pipe, tmp_path):
    peft = pytest.importorskip("peft")
    model = NextFlowForCausalLM(pipe.model.config)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    adapted_pipe = NextFlowPipeline(**{**pipe.components, "model": adapted})
    with pytest.raises(ValueError, match=r"`model` carries a PEFT adapter.*merge_and_unload"):
        adapted_pipe.save_pretrained(tmp_path)
    adapted_pipe.model = adapted.merge_and_unload()
    adapted_pipe.save_pretrained(tmp_path)
    assert (tmp_path / "model" / "model.safetensors").is_file()


# Editing, stories, thoughts


def test_an_edit_is_what_generate_makes_of_picture_and_prompt(pipe, tiny_random_checkpoint):
    picture = pipe(PROMPT, generator=seeded(5)).images[0]
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    inputs = processor(text="<image>" + PROMPT, images=[picture], return_tensors="pt")
    settings = {"guidance_scale": 2.0, "image_guidance_scale": 1.5}
    codes = pipe.model.generate(
        **inputs, generation_mode="image", generator=seeded(), return_dict_in_generate=True, **settings
    ).image_codes
    edited = pipe(PROMPT, image=picture, generator=seeded(), output_type="latent", **settings).images
    assert torch.equal(edited, pipe._codes_to_latents(codes, SCHEDULE))


def test_pictures_go_to_their_prompts(pipe):
    one, two = pipe([PROMPT, "a blue square"], generator=seeded(3)).images
    prompts = ["make it red", "make it blue"]
    generators = [seeded(0), seeded(1)]

    def edit(prompts, image, generators):
        return pipe(prompts, image=image, generator=generators, output_type="pt", guidance_scale=2.0).images

    both = edit(prompts, [one, two], generators)
    alone = edit(prompts[1], two, [seeded(1)])
    assert torch.allclose(both[1], alone[0], atol=1e-5)
    several = edit(prompts[0], [one, two], [seeded(0)])
    assert several.shape == (1, 3, 80, 80)
    with pytest.raises(ValueError, match="Got 3 entries of `image` for 2 prompts"):
        edit(prompts, [one, two, one], generators)


def test_an_edit_keeps_the_aspect_of_its_picture_unless_told_otherwise(pipe):
    wide = pipe(PROMPT, generator=seeded(), height=64, width=112).images[0]
    assert pipe(PROMPT, image=wide, generator=seeded()).images[0].size == (112, 64)
    assert pipe(PROMPT, image=wide, generator=seeded(), height=80, width=80).images[0].size == (80, 80)


def test_frames_are_lists_of_pictures_that_export(pipe, tmp_path):
    output = pipe([PROMPT, "two"], num_frames=3, generator=seeded(), guidance_scale=2.0)
    assert [len(frames) for frames in output.frames] == [3, 3] and len(output.images) == 6
    file = export_to_gif(output.frames[0], str(tmp_path / "story.gif"))
    with PIL.Image.open(file) as animation:
        assert animation.n_frames == 3


def test_an_interrupted_story_keeps_its_frames(pipe):
    whole = pipe([PROMPT, "two"], num_frames=2, generator=seeded())
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = len(steps) == SCHEDULE.num_scales + 2

    cut = pipe([PROMPT, "two"], num_frames=3, generator=seeded(), callback_on_step_end=callback)
    assert [len(frames) for frames in cut.frames] == [2, 2]
    for ours, theirs in zip(cut.frames, whole.frames, strict=True):
        assert ours[0].tobytes() == theirs[0].tobytes() and ours[1].tobytes() != theirs[1].tobytes()


def test_thoughts_are_given_beside_the_pictures(pipe):
    output = pipe([PROMPT, "two"], thinking=True, generator=seeded())
    assert len(output.images) == len(output.thoughts) == 2
    assert all(isinstance(thought, str) for thought in output.thoughts)
    with pytest.raises(ValueError, match="not both"):
        pipe(PROMPT, thinking=True, num_frames=2)
    with pytest.raises(ValueError, match="`negative_prompt` is for single images"):
        pipe(PROMPT, num_frames=2, negative_prompt="x")


def test_a_thought_may_come_with_a_negative_prompt(pipe):
    settings = {"thinking": True, "guidance_scale": 4.0, "output_type": "latent"}
    none, empty, red = (pipe(PROMPT, negative_prompt=p, generator=seeded(), **settings) for p in (None, "", "red"))
    assert none.thoughts == empty.thoughts == red.thoughts
    assert torch.equal(none.images, empty.images) and not torch.equal(none.images, red.images)


def test_an_image_tokenizer_of_another_codebook_is_refused(pipe):
    config = type(pipe.image_tokenizer.config)(**{**pipe.image_tokenizer.config.to_dict(), "codebook_size": 32})
    with pytest.raises(ValueError, match="The model draws 64 codes but the image tokenizer has 32"):
        NextFlowPipeline(**{**pipe.components, "image_tokenizer": NextFlowImageTokenizer(config)})


# Generating


def test_the_pipeline_draws_what_generate_draws(pipe):
    inputs = pipe.tokenizer(PROMPT, return_tensors="pt")
    output = pipe.model.generate(
        **inputs, generation_mode="image", guidance_scale=3.0, generator=seeded(), return_dict_in_generate=True
    )
    expected = pipe.image_tokenizer.decode(output.image_codes, output.image_grid_shw)
    images = draw(pipe, guidance_scale=3.0)
    assert images.shape == (1, 3, SCHEDULE.height, SCHEDULE.width)
    torch.testing.assert_close(images, expected / 2 + 0.5)


def test_the_seed_decides_and_the_global_random_state_is_left_alone(pipe):
    state = torch.get_rng_state()
    first, same, other = draw(pipe), draw(pipe), draw(pipe, seed=1)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_output_types(pipe):
    tensor = draw(pipe)
    array = pipe(PROMPT, generator=seeded(), output_type="np").images
    [picture] = pipe(PROMPT, generator=seeded()).images
    latents = pipe(PROMPT, generator=seeded(), output_type="latent").images
    assert tensor.min() >= 0 and tensor.max() <= 1
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(picture), (array[0] * 255).round().astype("uint8"))
    assert latents.shape == (1, pipe.image_tokenizer.config.code_dim, *SCHEDULE.grids[-1])
    assert torch.equal(pipe.decode_latents(latents, "pt"), tensor)


def test_return_dict(pipe):
    assert isinstance(pipe(PROMPT), NextFlowPipelineOutput)
    images = pipe(PROMPT, return_dict=False)
    assert isinstance(images, tuple) and len(images) == 1


def test_images_of_a_prompt_stand_side_by_side(pipe):
    prompts = ["a red circle", "two blue squares left of a star"]
    generators = [seeded(seed) for seed in range(4)]
    images = pipe(prompts, num_images_per_prompt=2, generator=generators, output_type="pt").images
    alone = [draw(pipe, prompts[index // 2], seed=index) for index in range(4)]
    torch.testing.assert_close(images, torch.cat(alone))


def test_size_and_number_of_scales(pipe):
    assert pipe(PROMPT, height=64, width=64).images[0].size == (64, 64)
    assert pipe(PROMPT, num_scales=3).images[0].size == (48, 48)
    wide = ScaleSchedule.from_size(1, 2, num_scales=NUM_SCALES)
    seen = []
    [picture] = pipe(
        PROMPT,
        height=1,
        width=2,
        num_scales=NUM_SCALES,
        callback_on_step_end=lambda pipe, *_: seen.append(pipe.schedule),
    ).images
    assert (picture.height, picture.width) == (wide.height, wide.width)
    assert set(seen) == {wide} and pipe.schedule is None


def test_guidance_and_negative_prompt(pipe):
    plain, guided, away = (
        draw(pipe, image_top_k=1, **settings)  # random weights whisper, and noise would drown what guidance does
        for settings in (
            {"guidance_scale": 1.0},
            {"guidance_scale": 5.0},
            {"guidance_scale": 5.0, "negative_prompt": "red"},
        )
    )
    assert not torch.equal(plain, guided) and not torch.equal(guided, away)
    one_for_all = draw(pipe, [PROMPT, PROMPT], image_top_k=1, guidance_scale=5.0, negative_prompt="red")
    torch.testing.assert_close(one_for_all[:1], away)


def test_the_callback_sees_one_scale_at_a_time(pipe):
    seen = []

    def callback(pipe, step, timestep, tensors):
        assert timestep == step and pipe.schedule == SCHEDULE
        seen.append((step, tensors["codes"].shape[1], pipe.decode_latents(tensors["latents"], "pt")))
        return tensors

    images = draw(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents", "codes"])
    steps, num_codes, previews = zip(*seen, strict=True)
    assert steps == tuple(range(NUM_SCALES))
    assert num_codes == SCHEDULE.offsets[1:]
    assert all(preview.shape == images.shape for preview in previews)
    assert torch.equal(previews[-1], images) and not torch.equal(previews[-2], images)


def test_a_callback_can_interrupt(pipe):
    previews = []

    def callback(pipe, step, timestep, tensors):
        previews.append(pipe.decode_latents(tensors["latents"], "pt"))
        pipe._interrupt = step == 2

    images = draw(pipe, callback_on_step_end=callback)
    assert len(previews) == 3 and torch.equal(images, previews[-1])
    assert draw(pipe).shape == images.shape and not pipe.interrupt


def test_another_call_at_the_same_time_changes_nothing(pipe):
    """What a second thread does to the pipeline while this one draws."""

    def neighbour(pipe, step, timestep, tensors):
        pipe.schedule = ScaleSchedule((8, 32), NUM_SCALES)

    assert torch.equal(draw(pipe, callback_on_step_end=neighbour), draw(pipe))


def test_the_progress_bar_counts_scales(tiny_random_checkpoint, pipe):
    terminal = io.StringIO()
    talkative = NextFlowPipeline(**pipe.components)
    talkative.set_progress_bar_config(file=terminal)
    talkative(PROMPT, num_scales=3)
    assert "scale 3/3 · 3x3" in terminal.getvalue() and "3/3 [" in terminal.getvalue()


def test_model_cpu_offload_goes_through_the_model_then_the_image_tokenizer(pipe, monkeypatch):
    import accelerate

    onloaded = []
    pre_forward = accelerate.hooks.CpuOffload.pre_forward

    def record(hook, module, *args, **kwargs):
        onloaded.append(type(module))
        return pre_forward(hook, module, *args, **kwargs)

    monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", record)
    offloaded = NextFlowPipeline(**pipe.components)
    offloaded.set_progress_bar_config(disable=True)
    try:
        offloaded.enable_model_cpu_offload(device="cpu")
        images = draw(offloaded)
    finally:
        offloaded.remove_all_hooks()
    assert list(dict.fromkeys(onloaded)) == [NextFlowForCausalLM, NextFlowImageTokenizer]
    assert torch.equal(images, draw(pipe))


def test_sequential_cpu_offload_draws_the_same(pipe, monkeypatch):
    import accelerate

    # diffusers says "cpu:0", which accelerate takes for another device than the weights' "cpu".
    offload = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda module, _, **kw: offload(module, torch.device("cpu"), **kw))
    offloaded = NextFlowPipeline(**{name: copy.deepcopy(module) for name, module in pipe.components.items()})
    offloaded.set_progress_bar_config(disable=True)
    offloaded.enable_sequential_cpu_offload(device="cpu")
    assert offloaded.model.device == torch.device("meta")  # weights come one layer at a time
    settings = {"guidance_scale": 2.0, "image_top_k": 5}
    assert torch.equal(draw(offloaded, **settings), draw(pipe, **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": []}, "`prompt` must be a string or a list of strings"),
        ({"prompt": None}, "`prompt` must be a string or a list of strings"),
        ({"prompt": "a <image> of a cat"}, "must not hold any of <image>. Leave"),
        ({"prompt": ["a", "b"], "negative_prompt": ["a", "b", "c"]}, "Got 3 negative prompts for 2 prompts"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be at least 1"),
        ({"output_type": "jpeg"}, '`output_type` must be one of pil, np, pt, latent, but got "jpeg"'),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"\['noise'\], but may only hold"),
        ({"height": 100, "width": 100}, "nearest legal sizes .* are 96 x 96"),
        ({"height": 80}, "`height` and `width`"),
        ({"height": 1024, "width": 1024}, "18 scales, but this model has 5"),
        ({"image_top_k": [1, 2]}, "`image_top_k` has 2 entries, but the image has 5 scales"),
        ({"generator": [seeded()], "num_images_per_prompt": 2}, "Got 1 generators for 2 images"),
        ({"prompt": "x" * 600}, "context of 512"),
    ],
)
def test_bad_arguments(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": PROMPT, **settings})


def test_an_adapter_alone_is_no_pipeline(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter, and a pipeline takes a whole model"):
        NextFlowPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: {"latents": tensors["latents"] + 1}, "can change `codes`, of which `latents` are a view"),
        (lambda tensors: tensors["latents"].add_(1) is None or {}, "can change `codes`, of which `latents` are a view"),
        (lambda tensors: {"codes": tensors["codes"].float() + 0.5}, "gives `codes` as whole numbers"),
    ],
    ids=["returned latents", "latents in place", "float codes"],
)
def test_changes_of_callbacks_that_would_have_no_effect(pipe, change, message):
    settings = {"callback_on_step_end_tensor_inputs": ["latents", "codes"]}
    with pytest.raises(ValueError, match=message):
        draw(pipe, callback_on_step_end=lambda pipe, step, timestep, tensors: change(tensors), **settings)


def test_the_shipped_checkpoint_draws_stories_as_it_was_trained():
    pipe = NextFlowPipeline.from_pretrained(tiny_checkpoint())
    options = {"num_frames": 2, "num_scales": 2}
    by_default, chat, bare = (
        pipe("it moves right", generator=seeded(), output_type="latent", **options, **style).images
        for style in ({}, {"prompt_style": "chat"}, {"prompt_style": "bare"})
    )
    assert torch.equal(by_default, chat)
    assert not torch.equal(by_default, bare)
