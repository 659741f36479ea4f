"""One pipeline in several threads: what a call is asked for, and what its callbacks see, is its own."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from diffusers_nextflow import NextFlowPipeline

PROMPTS = ["a red circle", ["two", "three blue squares left of a star"], ["", "a"], "x" * 40]
SIZES = [{}, {"num_scales": 3}, {"height": 64, "width": 112}, {"height": 32, "width": 32}]


@pytest.fixture(scope="module")
def pipe(tiny_random_checkpoint):
    pipe = NextFlowPipeline.from_pretrained(tiny_random_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_task(seed: int) -> dict:
    """The arguments of a call, and how its callback behaves."""
    chance = random.Random(seed)
    settings = {"prompt": chance.choice(PROMPTS), **chance.choice(SIZES), "guidance_scale": chance.choice([1.0, 3.0])}
    if chance.random() < 0.3:
        settings["negative_prompt"] = chance.choice(["red", ""])
    elif chance.random() < 0.2:
        settings["num_frames"] = 2
    elif chance.random() < 0.2:
        settings["image"] = torch.rand(3, 40, 70, generator=torch.Generator().manual_seed(seed))
    if isinstance(settings["prompt"], list):
        settings.pop("image", None)
    return {
        "settings": settings | {"prompt_style": chance.choice(["bare", "chat"])},
        "seed": seed,
        "interrupted": chance.choice([None, None, 0, 2]),
        "previews": chance.random() < 0.5,
    }


def run(pipe, task: dict) -> list[torch.Tensor]:
    """The pictures of a call and its previews."""
    seen = []

    def callback(pipe, step, timestep, tensors):
        assert pipe.num_timesteps == pipe.schedule.num_scales and pipe.schedule.num_tokens >= tensors["codes"].shape[1]
        assert pipe.guidance_scale == task["settings"]["guidance_scale"]
        if task["previews"]:
            seen.append(pipe.decode_latents(tensors["latents"], "pt"))
        if step == task["interrupted"]:
            pipe._interrupt = True

    images = pipe(
        **task["settings"],
        generator=torch.Generator().manual_seed(task["seed"]),
        output_type="pt",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "codes"],
    ).images
    return [images, *seen]


@pytest.mark.parametrize(
    ("num_kinds", "num_calls"), [(20, 60), pytest.param(100, 1000, marks=pytest.mark.slow)], ids=["some", "thousand"]
)
def test_calls_in_threads_are_those_of_one_thread(pipe, num_kinds, num_calls):
    tasks = [make_task(seed) for seed in range(num_kinds)]
    expected = [run(pipe, task) for task in tasks]
    chance = random.Random(0)
    order = [chance.randrange(num_kinds) for _ in range(num_calls)]
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda index: run(pipe, tasks[index]), order))
    for index, result in zip(order, results, strict=True):
        assert len(result) == len(expected[index])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(result, expected[index], strict=True)), index
    assert not pipe._calls


def test_an_interrupt_stops_its_own_call_only(pipe):
    """Whether the callback speaks of the pipeline that it gets or of the one that it knows."""
    turn = threading.Barrier(2)
    steps = {True: [], False: []}

    def draw(stop: bool):
        def callback(given, step, timestep, tensors):
            steps[stop].append(step)
            if step > 1:
                return
            turn.wait()  # both calls are at this step
            if stop:
                (given if step else pipe)._interrupt = step == 1
            assert pipe.interrupt is (stop and step == 1)
            turn.wait()

        return pipe("a ring", callback_on_step_end=callback, num_scales=3)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(draw, [True, False]))
    assert steps == {True: [0, 1], False: [0, 1, 2]} and pipe.interrupt is False


def test_a_button_outside_stops_what_runs(pipe):
    steps = []

    def callback(given, step, timestep, tensors):
        steps.append(step)
        if step == 1:
            button = threading.Thread(target=lambda: setattr(pipe, "_interrupt", True))
            button.start()
            button.join()

    pipe("a ring", callback_on_step_end=callback)
    assert steps == [0, 1]
    pipe._interrupt = True  # nothing runs
    pipe("a ring", callback_on_step_end=callback)
    assert steps == [0, 1, 0, 1]


def test_a_callback_may_call_the_pipeline(pipe):
    def callback(given, step, timestep, tensors):
        inner = given("a ring", num_scales=2, callback_on_step_end=lambda p, *_: setattr(p, "_interrupt", True))
        assert inner.images[0].size == (32, 32)
        assert given.num_timesteps == 3 and not given.interrupt

    assert pipe("a star", num_scales=3, callback_on_step_end=callback).images[0].size == (48, 48)


def test_a_call_leaves_configs_and_tokenizer_as_they_were(pipe):
    state = lambda: (  # noqa: E731
        pipe.model.config.to_json_string(),
        pipe.model.generation_config.to_json_string(),
        pipe.tokenizer.backend_tokenizer.padding,
        pipe.tokenizer.padding_side,
    )
    before = state()
    seen = []
    pipe(["a", "a longer one"], guidance_scale=2.0, callback_on_step_end=lambda *_: seen.append(state()))
    assert set(map(str, [*seen, state()])) == {str(before)}


def test_outside_a_call_there_is_no_state(pipe):
    assert (pipe.schedule, pipe.guidance_scale, pipe.num_timesteps, pipe.interrupt) == (None, None, None, False)
    with pytest.raises(ValueError, match="`guidance_scale` belongs to a call"):
        pipe._guidance_scale = 2.0
    with pytest.raises(ValueError):
        pipe("a ring", num_scales=99)
    assert not pipe._calls
