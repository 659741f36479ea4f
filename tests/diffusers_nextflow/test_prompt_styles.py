"""A model that was trained on chat turns, or on bare captions, draws what it was trained to draw through every door."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, pipeline

from diffusers_nextflow import NextFlowPipeline
from diffusers_nextflow.__main__ import main
from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor
from transformers_nextflow.trainer.coded_dataset import drop_condition, encode_messages, expand_sample
from transformers_nextflow.trainer.data_collator import NextFlowDataCollator

PROMPTS = ["red", "green", "a blue one", "yellow"]


def make_samples(processor, style: str) -> list[dict]:
    """Coded samples of four pictures, as the documented scripts make them (chat), or of bare captions."""
    samples = []
    for number, prompt in enumerate(PROMPTS):
        picture = Image.new("RGB", (80, 80))
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": [{"type": "image", "image": picture}]},
        ]
        sample = encode_messages(messages, processor, num_scales=3)
        # One code a scale, another in every picture: learned within seconds.
        sample["codes"] = sample["target_codes"] = [
            [10 * number + s for s, n in enumerate((1, 4, 9)) for _ in range(n)]
        ]
        if style == "bare":
            sample["token_ids"] = [*processor.tokenizer(prompt)["input_ids"], processor.image_token_id]
            sample["completion_mask"] = [*(0 for _ in sample["token_ids"][1:]), 1]
        samples.append(sample)
    return samples


@pytest.fixture(scope="module", params=["chat", "bare"])
def trained(request, tiny_random_checkpoint, tmp_path_factory):
    """Style, folder, processor and samples of a model that knows four pictures by heart."""
    style = request.param
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    samples = make_samples(processor, style)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint).train()
        model.config.scale_reweight_alpha = 0.0
        batches = NextFlowDataCollator(model.config, condition_dropout=0.1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0)
        for _ in range(300):
            loss = model(**batches(samples)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if loss < 0.02:  # and nothing was dropped
                break
    model.generation_config = GenerationConfig(
        prompt_styles={"image": style}, guidance_scale=1.5, image_top_k=1, num_scales=3
    )
    folder = tmp_path_factory.mktemp(style)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return style, folder, processor, samples


def expected_pictures(processor, samples) -> list[np.ndarray]:
    pictures = processor.post_process_multimodal_output(
        type("Output", (), {"image_codes": [sample["codes"][0] for sample in samples],
                            "image_grid_shw": torch.tensor([sample["image_grid_shw"][0] for sample in samples])}),
        generation_mode="image",
    )  # fmt: skip
    return [np.asarray(picture).astype(int) for picture in pictures]


def test_diffusers_pipeline(trained):
    style, folder, _, samples = trained
    pipe = NextFlowPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    codes = []

    def callback(pipe, step, timestep, tensors):
        codes.append(tensors["codes"])

    options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["codes"]}
    wanted = torch.tensor([sample["codes"][0] for sample in samples])
    pipe(PROMPTS, **options)
    assert torch.equal(codes[-1], wanted)
    other = {"chat": "bare", "bare": "chat"}[style]
    pipe(PROMPTS, prompt_style=other, **options)
    assert not torch.equal(codes[-1], wanted)  # the words around a prompt matter


def test_transformers_pipeline(trained):
    _, folder, processor, samples = trained
    draw = pipeline("text-to-image", model=folder)
    for drawn, expected in zip(draw(PROMPTS, batch_size=4), expected_pictures(processor, samples), strict=True):
        assert np.abs(np.asarray(drawn[0]).astype(int) - expected).max() <= 1


def test_command(trained, tmp_path):
    _, folder, processor, samples = trained
    file = tmp_path / "out.png"
    assert main([PROMPTS[2], "--model", str(folder), "--device", "cpu", "--output", str(file), "--quiet"]) == 0
    expected = expected_pictures(processor, samples)[2]
    assert np.abs(np.asarray(Image.open(file)).astype(int) - expected).max() <= 1


def test_the_styles_are_saved(trained):
    style, folder, *_ = trained
    assert json.loads((folder / "generation_config.json").read_text())["prompt_styles"] == {"image": style}


def test_what_is_left_of_a_dropped_prompt_is_the_unconditional_branch(trained):
    """In both styles `<boi>` alone, which is what guidance and an empty prompt run."""
    _, folder, processor, samples = trained
    config = NextFlowForCausalLM.from_pretrained(folder).config
    for sample in samples:
        ids = expand_sample(drop_condition(sample, config.image_token_id), config)["input_ids"]
        assert ids[0] == config.boi_token_id and ids[1] >= config.text_vocab_size
    for style in ("bare", "chat"):
        assert processor.style_prompt("", style=style) == processor.boi_token


def test_a_chat_prompt_is_what_training_saw(trained):
    """All ids of the sample up to its picture."""
    style, _, processor, samples = trained
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        seen = sample["token_ids"][: sample["token_ids"].index(processor.image_token_id)]
        assert processor.tokenizer(processor.style_prompt(prompt, styles={"image": style}))["input_ids"] == seen


@pytest.mark.parametrize(
    ("task", "styles", "style", "chat"),
    [
        ("image", None, None, False),
        ("image", {"edit": "chat"}, None, False),
        ("edit", {"edit": "chat"}, None, True),
        ("frames", {"frames": "chat"}, "bare", False),
        ("thinking", None, None, True),
        ("thinking", {"thinking": "bare"}, None, False),
        ("image", {}, "chat", True),
    ],
)
def test_which_style(task, styles, style, chat, tiny_random_checkpoint):
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    styled = processor.style_prompt("<image>a ring", task, styles, style)
    assert styled == ("<|im_start|>user\n<image>a ring<|im_end|>\n<|im_start|>assistant\n" if chat else "<image>a ring")


def test_prompts_of_a_task(tiny_random_checkpoint):
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    config = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint).generation_config
    config.prompt_styles = {"edit": "chat"}
    chat = processor.style_prompt("<image><image>red", style="chat")
    assert processor.style_prompts(["red", "blue"], "edit", config, num_pictures=[2, 0])[0] == chat
    assert processor.style_prompts(["red"], "edit", config, "bare") == ["red"]
    negative = processor.style_prompts(["", "red"], "thinking", config, negative=True)
    assert negative[0] == processor.boi_token != negative[1]
    assert processor.style_prompts([""], "thinking", config) != [processor.boi_token]
    with pytest.raises(ValueError, match="plain text"):
        processor.style_prompts(["<image>"], "image", config)


def test_the_template_of_the_checkpoint_is_used(tiny_random_checkpoint):
    pipe = NextFlowPipeline.from_pretrained(tiny_random_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    pipe.tokenizer.chat_template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    pipe("a ring", prompt_style="chat", num_scales=1)
    assert pipe._processor.style_prompt("a ring", style="chat") == "[a ring]"
