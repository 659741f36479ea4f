"""From a text model to pictures by the documented commands: every code that was trained on is drawn again."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2Config, Qwen2ForCausalLM, pipeline

from diffusers_nextflow import NextFlowPipeline
from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, NextFlowSession, ScaleSchedule

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import sft
from conversion import qwen2_5

ROOT = Path(__file__).parents[2]
RANKS = ROOT / "tests" / "fixtures" / "qwen" / "first_1024_ranks.tiktoken"
BUCKETS = ((16, 16), (11, 22), (24, 10), (13, 18))
NUM_PICTURES = 8
GREEDY = {"do_sample": False, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_random_checkpoint) -> tuple[Path, list[tuple[str, Image.Image]]]:
    """A random parent with Qwen2.5's theta and 0.5B's size of a head, converted and overfitted on 8 pictures."""
    folder = tmp_path_factory.mktemp("overfit")
    torch.manual_seed(0)
    parent = Qwen2Config(
        vocab_size=1100,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(parent).save_pretrained(folder / "qwen")
    image_tokenizer = ["--image-tokenizer", str(tiny_random_checkpoint / "image_tokenizer")]
    converting = ["--source", str(folder / "qwen"), "--text-tokenizer", str(RANKS), *image_tokenizer]
    qwen2_5.main([*converting, "--output", str(folder / "nextflow")])

    (folder / "pictures").mkdir()
    rng, shown = np.random.default_rng(0), []
    with open(folder / "pictures" / "metadata.jsonl", "w") as file:
        for index in range(NUM_PICTURES):
            schedule = ScaleSchedule(BUCKETS[index % len(BUCKETS)], 5)
            pixels = rng.integers(0, 256, (schedule.height, schedule.width, 3), dtype=np.uint8)
            picture, caption = Image.fromarray(pixels), f"picture number {index}"
            picture.save(folder / "pictures" / f"{index}.png")
            file.write(json.dumps({"file_name": f"{index}.png", "text": caption}) + "\n")
            shown.append((caption, picture))
    sft.main(
        f"--model_name_or_path {folder}/nextflow --pictures {folder}/pictures --output_dir {folder}/out "
        "--self_correction false --condition_dropout 0 --scale_reweight_alpha 0.5 --max_steps 150 --learning_rate 3e-3 "
        "--warmup_steps 10 --lr_scheduler_type cosine --per_device_train_batch_size 8 --max_grad_norm 1.0 "
        "--activation_checkpointing false --use_cpu true --bf16 false --report_to none --logging_steps 20 "
        "--save_strategy no".split()
    )
    return folder / "out", shown


def size_of(grid: list[int]) -> dict[str, int]:
    """Small grids of several aspects are alike, so the bucket is named by its full size."""
    full = ScaleSchedule(tuple(grid[1:]))
    return {"height": full.height, "width": full.width, "num_scales": grid[0]}


def test_greedy_drawing_returns_every_code_through_every_door(trained):
    folder, shown = trained
    model = NextFlowForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rope = model.config.rope_parameters
    assert rope["rope_theta"] == 1e6 and rope["mrope_interleaved"]  # Qwen's own, nothing that makes it easier
    processor = NextFlowProcessor.from_pretrained(folder)
    styles = model.generation_config.prompt_styles
    draw = NextFlowPipeline.from_pretrained(folder)
    chat, text_to_image = (pipeline(task, model=str(folder)) for task in ("any-to-any", "text-to-image"))
    offset, grids = model.config.text_vocab_size, set()

    for caption, picture in shown:
        seen = processor("<image>", images=[picture], return_tensors="pt")
        wanted = seen.input_ids[seen.input_ids >= offset] - offset
        grid = seen.image_grid_shw.tolist()
        (expected,) = processor.decode_images(seen.input_ids, seen.image_grid_shw)[0]
        grids.add(str(grid))
        size = size_of(grid[0])
        batch = processor(processor.style_prompt(caption, "image", styles), return_tensors="pt")
        for attention in ("sdpa", "eager"):
            model.set_attn_implementation(attention)
            out = model.generate(**batch, generation_mode="image", return_dict_in_generate=True, **GREEDY, **size)
            assert out.image_grid_shw.tolist() == grid and torch.equal(out.image_codes[0], wanted), (caption, attention)

        pictures = {"NextFlowPipeline": draw(caption, guidance_scale=1.0, image_top_k=1, **size).images[0]}
        message = {"role": "user", "content": [{"type": "text", "text": caption}]}
        answer = chat([message], generation_mode="image", generate_kwargs={**GREEDY, **size})
        pictures["any-to-any"] = answer[0]["generated_image"]
        pictures["text-to-image"] = text_to_image(caption, guidance_scale=1.0, image_top_k=1, **size)[0]
        pictures["session"] = NextFlowSession(model, processor).draw(caption, **GREEDY, **size)
        for door, drawn in pictures.items():
            assert np.array_equal(np.asarray(drawn), np.asarray(expected)), (caption, door)
    assert len(grids) == len(BUCKETS)


def test_batches_and_interleaved_answers_are_the_same(trained):
    """Rows of one aspect at a time; in interleaved mode the model itself decides to draw."""
    folder, shown = trained
    model = NextFlowForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    processor = NextFlowProcessor.from_pretrained(folder)
    styles = model.generation_config.prompt_styles
    for first in range(len(BUCKETS)):
        some = shown[first :: len(BUCKETS)]
        prompts = [processor.style_prompt(caption, "image", styles) for caption, _ in some]
        seen = processor(["<image>"] * len(some), images=[[picture] for _, picture in some], return_tensors="pt")
        wanted = seen.input_ids[seen.input_ids >= model.config.text_vocab_size].view(len(some), -1)
        batch = processor(prompts, padding=True, return_tensors="pt")
        size = size_of(seen.image_grid_shw[0].tolist())
        for options in ({"generation_mode": "image"}, {"generation_mode": "interleaved", "max_new_tokens": 4}):
            out = model.generate(**batch, return_dict_in_generate=True, **options, **GREEDY, **size)
            drawn = out.sequences[out.sequences >= model.config.text_vocab_size].view(len(some), -1)
            assert torch.equal(drawn, wanted), options
