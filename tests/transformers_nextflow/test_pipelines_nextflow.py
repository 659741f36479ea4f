"""transformers' pipelines on NextFlow: our text-to-image, and any-to-any, image-text-to-text and text-generation."""

from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from transformers_nextflow import (
    NextFlowForCausalLM,
    NextFlowGenerationConfig,
    NextFlowProcessor,
    NextFlowTextToImagePipeline,
)
from transformers_nextflow.sampling import make_generators


@pytest.fixture(scope="module")
def draw(tiny_random_checkpoint):
    return pipeline("text-to-image", model=tiny_random_checkpoint)


@pytest.fixture(scope="module")
def any_to_any(tiny_random_checkpoint):
    return pipeline("any-to-any", model=tiny_random_checkpoint)


def pixels(image: Image.Image) -> bytes:
    return image.tobytes()


def alike(left: Image.Image, right: Image.Image) -> bool:
    """The same codes; decoding in another batch may round a value to the next level."""
    levels = [np.asarray(image).astype(int) for image in (left, right)]
    return levels[0].shape == levels[1].shape and np.abs(levels[0] - levels[1]).max() <= 1


# Text to image


def test_draws(draw, tiny_random_checkpoint):
    assert type(draw) is NextFlowTextToImagePipeline
    (image,) = draw("a cat", seed=0)
    assert isinstance(image, Image.Image) and image.size == (80, 80) and image.mode == "RGB"
    # Step by step.
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint)
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    output = model.generate(
        **processor("a cat", return_tensors="pt"),
        generation_mode="image",
        generator=torch.Generator().manual_seed(0),
        return_dict_in_generate=True,
    )
    ((expected,),) = processor.decode_images(output.sequences, output.image_grid_shw)
    assert pixels(image) == pixels(expected)


def test_an_empty_prompt_draws_too(draw, any_to_any):
    assert draw("")[0].size == (80, 80)
    assert any_to_any(text="", generation_mode="image")[0]["generated_image"].size == (80, 80)


def test_seeds(draw):
    together = draw(["a cat", "two dogs"], seed=3, num_images_per_prompt=2, batch_size=2)
    assert [len(images) for images in together] == [2, 2]
    for prompt, images in zip(["a cat", "two dogs"], together, strict=True):
        assert alike(draw(prompt, seed=3)[0], images[0])
        assert alike(draw(prompt, seed=4)[0], images[1])
        assert not alike(*images)
    assert pixels(draw("a cat")[0]) != pixels(draw("a cat")[0])


def generators(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_generators(draw, batch_size):
    """One per picture, those of a prompt side by side; a single one deals out the same ones in any batches."""
    prompts, settings = ["a cat", "two dogs", "a red car"], {"num_return_sequences": 2, "batch_size": batch_size}
    together = draw(prompts, generator=generators(*range(6)), **settings)
    for row, prompt in enumerate(prompts):
        assert alike(draw(prompt, generator=generators(2 * row))[0], together[row][0])
        assert alike(draw(prompt, seed=2 * row + 1)[0], together[row][1])
    stored = NextFlowGenerationConfig(num_return_sequences=2)
    again = draw((prompt for prompt in prompts), generator=generators(*range(6)), generation_config=stored)
    assert all(map(alike, chain(*together), chain(*again)))
    dealt = make_generators(generators(7)[0], 6, torch.device("cpu"))
    one, six = draw(prompts, generator=generators(7)[0], **settings), draw(prompts, generator=dealt, **settings)
    assert all(map(alike, chain(*one), chain(*six)))


def test_global_random_state_is_untouched(draw):
    before = torch.random.get_rng_state()
    draw("a cat")
    draw("a cat", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_settings_reach_generation(draw):
    (image,) = draw("a cat", height=48, width=64)
    assert image.size == (64, 48)
    plain = draw("a cat", seed=0, image_top_k=5)[0]
    guided = draw("a cat", seed=0, image_top_k=5, guidance_scale=4.0)[0]
    negative = draw("a cat", seed=0, image_top_k=5, guidance_scale=4.0, negative_prompt="dogs")[0]
    assert len({pixels(image) for image in (plain, guided, negative)}) == 3
    scales = []
    draw("a cat", on_scale_end=lambda step, schedule, codes: scales.append(codes.shape[1]))
    assert scales == [1, 5, 14, 30, 55]
    images = draw("a cat", num_images_per_prompt=3, generator=torch.Generator().manual_seed(0))
    assert len(images) == 3


def test_settings_at_construction(tiny_random_checkpoint):
    draw = pipeline("text-to-image", model=tiny_random_checkpoint, seed=5, num_images_per_prompt=2)
    first, second = draw("a cat"), draw("a cat")
    assert len(first) == 2 and [pixels(image) for image in first] == [pixels(image) for image in second]
    other = draw("a cat", generator=generators(7, 8))  # in place of the seed that it was made with
    assert all(map(alike, other, draw("a cat", seed=7))) and not alike(first[0], other[0])


def test_save_and_load(draw, tmp_path):
    draw.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    loaded = pipeline("text-to-image", model=tmp_path)
    assert pixels(loaded("a cat", seed=0)[0]) == pixels(draw("a cat", seed=0)[0])


def test_model_and_processor_may_be_given(tiny_random_checkpoint):
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint)
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    draw = pipeline("text-to-image", model=model, processor=processor)
    assert draw("a cat")[0].size == (80, 80)
    processor.image_tokenizer = None
    with pytest.raises(ValueError, match='"text-to-image" pipeline needs a processor with an image tokenizer'):
        pipeline("text-to-image", model=model, processor=processor)


def test_bad_arguments(draw):
    with pytest.raises(ValueError, match="`num_images_per_prompt` must be at least 1, but got 0"):
        draw("a cat", num_images_per_prompt=0)
    with pytest.raises(ValueError, match="Pass `seed` or `generator`, not both"):
        draw("a cat", seed=0, generator=torch.Generator())
    with pytest.raises(ValueError, match="No scale schedule ends at height 50 x width 64"):
        draw("a cat", height=50, width=64)
    with pytest.raises(ValueError, match="can't be searched with beams"):
        draw("a cat", num_beams=4)
    with pytest.raises(ValueError, match="does not take `quality`"):
        draw("a cat", quality="best")
    with pytest.raises(ValueError, match="`text` must be a string or a list of strings"):
        draw(3)
    with pytest.raises(ValueError, match="no prompts; give at least one"):
        draw([])
    with pytest.raises(TypeError, match="`seed` must be a whole number, but got '3'"):
        draw("a cat", seed="3")


def test_default_model():
    default, revision = PIPELINE_REGISTRY.check_task("text-to-image")[1]["default"]["model"]
    assert default.endswith("nextflow-tiny") and revision == "main"


# transformers' own


def test_any_to_any_draws(any_to_any):
    (result,) = any_to_any(text="a cat", generation_mode="image", generate_kwargs={"guidance_scale": 3.0})
    assert result["input_text"] == "a cat" and result["generated_image"].size == (80, 80)
    results = any_to_any(
        text=["a cat", "two dogs"],
        generation_mode="image",
        generate_kwargs={"height": 48, "width": 64, "num_return_sequences": 2},
    )
    assert [result["input_text"] for result in results] == ["a cat", "a cat", "two dogs", "two dogs"]
    assert all(result["generated_image"].size == (64, 48) for result in results)


def test_any_to_any_agrees_with_text_to_image(any_to_any, draw):
    generator = torch.Generator().manual_seed(1)
    (result,) = any_to_any(text="a cat", generation_mode="image", generate_kwargs={"generator": generator})
    assert pixels(result["generated_image"]) == pixels(draw("a cat", seed=1)[0])


def test_any_to_any_draws_after_a_chat_with_a_picture(any_to_any):
    picture = Image.fromarray(np.zeros((90, 80, 3), np.uint8))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "Make it green."}]
    (result,) = any_to_any(text=[{"role": "user", "content": content}], generation_mode="image")
    assert result["generated_image"].size == (80, 80)


@pytest.mark.parametrize("task", ["any-to-any", "image-text-to-text"])
def test_text_after_a_picture(task, tiny_random_checkpoint):
    answer = pipeline(task, model=tiny_random_checkpoint)
    picture = Image.fromarray(np.zeros((90, 80, 3), np.uint8))
    options = {"max_new_tokens": 4, "return_full_text": False}
    (result,) = answer(images=[picture], text="<image>What is it?", **options)
    assert isinstance(result["generated_text"], str) and "<image>" not in result["generated_text"]
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Well?"}]}]
    (result,) = answer(text=chat, **options)
    assert isinstance(result["generated_text"], str)


def test_text_generation(tiny_random_checkpoint):
    write = pipeline("text-generation", model=tiny_random_checkpoint)
    (result,) = write("a cat", max_new_tokens=4, return_full_text=True)
    assert result["generated_text"].startswith("a cat")
    (result,) = write([{"role": "user", "content": "Hello!"}], max_new_tokens=4)
    assert result["generated_text"][-1]["role"] == "assistant"


def test_bad_pictures(any_to_any):
    with pytest.raises(ValueError, match="`text` has 0 `<image>` marks, but there are 1 images"):
        any_to_any(images=Image.new("RGB", (80, 80)), text="What is it?")


# What image generation can do beside one picture a prompt


@pytest.mark.parametrize("batch_size", [1, 3])
def test_frames_and_thoughts(draw, batch_size):
    prompts = ["a cat", "", "two dogs"]
    stories = draw(prompts, num_frames=2, num_images_per_prompt=2, seed=0, batch_size=batch_size)
    assert [[len(frames) for frames in story] for story in stories] == [[2, 2]] * 3
    assert all(frame.size == (80, 80) for story in stories for frames in story for frame in frames)
    pictures = draw(prompts, thinking=True, max_new_tokens=3, seed=0, batch_size=batch_size)
    assert all(isinstance(picture.info["thought"], str) for [picture] in pictures)
    assert draw("a cat", num_frames=1, seed=0)[0][0].size == (80, 80)


def test_frames_at_construction_can_be_taken_back(tiny_random_checkpoint):
    draw = pipeline("text-to-image", model=tiny_random_checkpoint, thinking=True, max_new_tokens=2)
    assert "thought" in draw("a cat")[0].info
    assert "thought" not in draw("a cat", thinking=False)[0].info


def test_a_tuple_of_prompts_is_a_list(draw):
    one, two = draw(("a cat", "two dogs"), seed=0), draw(["a cat", "two dogs"], seed=0)
    assert [pixels(image) for [image] in one] == [pixels(image) for [image] in two]
    with pytest.raises(ValueError, match="no prompts; give at least one"):
        draw(())


def test_an_empty_prompt_among_others(draw):
    together = draw(["", "two dogs", ""], seed=0, batch_size=3)
    assert all(alike(image, draw(prompt, seed=0)[0]) for prompt, [image] in zip(["", "two dogs"], together))  # noqa: B905


def test_negative_prompts_of_batches(draw):
    settings = {"image_top_k": 1, "guidance_scale": 4.0}
    plain = draw(["a cat", "two dogs"], batch_size=2, **settings)
    for style in (None, "chat"):
        together = draw(["a cat", "two dogs"], batch_size=2, negative_prompt="red", prompt_style=style, **settings)
        for prompt, [image] in zip(["a cat", "two dogs"], together, strict=True):
            assert alike(image, draw(prompt, negative_prompt="red", prompt_style=style, **settings)[0])
        assert not alike(together[0][0], plain[0][0])
    [[without], _] = draw(["a cat", "two dogs"], batch_size=2, negative_prompt="", **settings)
    assert alike(without, plain[0][0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"negative_prompt": ["red"]}, "`negative_prompt` one string for all"),
        ({"inputs": "a cat<boi>", "thinking": True}, "must not hold any of <boi>"),
        ({"inputs": "a <image> of a cat"}, "must not hold any of <image>"),
        ({"seed": -1}, "`seed` must be from 0 to"),
        ({"prompt_style": "haiku"}, 'A prompt style is "bare" or "chat"'),
        ({"num_images_per_prompt": 1.5}, "`num_images_per_prompt` must be at least 1, but got 1.5"),
        ({"generator": [torch.Generator()] * 2}, "Got 2 generators for 1 images"),
        ({"inputs": ["a"] * 3, "generator": [torch.Generator()] * 2}, "Got 2 generators for 3 images"),
        ({"num_images_per_prompt": 2, "num_return_sequences": 3}, "are one option: pass one of them"),
        ({"thinking": True, "num_frames": 2}, "`thinking` comes before one image"),
        ({"guidance": 2}, "does not take `guidance`. Similar names are `guidance_scale`"),
        ({"image": "a.png"}, 'This pipeline draws of text alone. For an edit use `pipeline\\("any-to-any"'),
    ],
)
def test_more_bad_arguments(draw, settings, message):
    with pytest.raises(ValueError, match=message):
        draw(**{"inputs": "a cat", **settings})


def test_a_generator_is_no_number(draw):
    for generator in (0, [0]):
        with pytest.raises(TypeError, match=r"`generator` must be a `torch.Generator`"):
            draw("a cat", generator=generator)
