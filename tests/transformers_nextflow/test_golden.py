"""What nextflow-tiny computes, mode by mode, against a file that was made with an earlier version of the code.

The other tests compare one way through the code with another, so a change of both goes unseen: a dropped embedding, a
scale that is counted from elsewhere, another activation. This one compares with what the weights were trained with.
After a new training: `python tests/transformers_nextflow/test_golden.py` writes the file anew.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, NextFlowSession, tiny_checkpoint

GOLDEN = Path(__file__).parents[1] / "fixtures" / "nextflow_tiny"
PROMPTS = ["a red circle left of a blue square", "two green stars", "a cat emoji"]
QUESTION = "What colour is the circle?"


def a_picture(width: int = 128, height: int = 128) -> Image.Image:
    picture = Image.new("RGB", (width, height), (250, 240, 220))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((width // 8, height // 4, width // 2, 3 * height // 4), fill=(210, 30, 40))
    draw.rectangle((5 * width // 8, height // 4, 7 * width // 8, height // 2), fill=(40, 80, 200))
    return picture


def seeds(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def some_of(logits: torch.Tensor) -> torch.Tensor:
    """Every 5th slot and every 61st id: `(B, L, V)` to a size that a file can hold."""
    return logits[:, ::5, ::61].contiguous()


class Recorder:
    """Everything that is compared, by name. `tensors` are floats, `exact` is ids, codes and texts."""

    def __init__(self):
        path = tiny_checkpoint()
        self.model = NextFlowForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.processor = NextFlowProcessor.from_pretrained(path)
        self.tensors: dict[str, torch.Tensor] = {}
        self.exact: dict[str, Any] = {}

    def read(self, texts: list[str], images: Any = None) -> dict[str, torch.Tensor]:
        return self.processor(texts, images, padding=True, padding_side="left", return_tensors="pt")

    def chat(self, text: str, images: Any = None) -> dict[str, torch.Tensor]:
        content = [*({"type": "image", "image": image} for image in images or []), {"type": "text", "text": text}]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return self.read([prompt], images)

    def keep(self, name: str, output: Any) -> None:
        """Ids, grids and codes of a generation."""
        self.exact[name] = {
            field: value.tolist()
            for field in ("sequences", "image_grid_shw", "image_codes", "attention_mask", "thought_ids")
            if isinstance(value := getattr(output, field, None), torch.Tensor)
        }

    def processing(self) -> None:
        pictures = [a_picture(), a_picture(200, 100)]
        batch = self.read(["<image>What is it?", "before <image> after"], pictures)
        self.exact["processor"] = {name: value.tolist() for name, value in batch.items()}
        corrected = self.processor(
            "<image>", [a_picture()], self_correction=True, generator=torch.Generator().manual_seed(3)
        )
        self.exact["self_correction"] = [list(corrected["input_ids"][0]), list(corrected["labels"][0])]
        decoded = self.processor.decode_images(batch["input_ids"], batch["image_grid_shw"])
        flat = [picture for row in decoded for picture in row]
        pixels = [torch.from_numpy(np.asarray(picture)[::9, ::9].astype(np.float32)) for picture in flat]
        self.tensors |= {f"pixels_{i}": value.contiguous() for i, value in enumerate(pixels)}

    @torch.no_grad()
    def forward(self) -> None:
        batch = self.read(["<image>What is it? <image>", "before <image> after"], [a_picture()] * 2 + [a_picture(9, 4)])
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for alpha in (0.0, 0.9):
            self.model.config.scale_reweight_alpha = alpha
            output = self.model(**batch, labels=labels)
            self.tensors[f"loss_{alpha}"] = output.loss[None]
        self.model.config.scale_reweight_alpha = 0.5
        self.tensors["logits"] = some_of(output.logits * batch["attention_mask"][..., None])
        self.tensors["token_losses"] = output.token_losses
        rows = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        packed = torch.cat(rows)[None]
        seq_idx = torch.arange(2).repeat_interleave(torch.tensor([len(row) for row in rows]))[None]
        output = self.model(packed, image_grid_shw=batch["image_grid_shw"], seq_idx=seq_idx, labels=packed)
        self.tensors["packed_logits"] = some_of(output.logits)
        self.tensors["packed_loss"] = output.loss[None]

    def images(self) -> None:
        prompts = self.read(PROMPTS)
        edits = self.read([f"<image>{prompt}" for prompt in PROMPTS[:2]], [a_picture(), a_picture(128, 128)])
        negative = self.read(["a blue star"])["input_ids"]
        several = dict(num_return_sequences=4, prefix_scales=3, images_per_prefix=2)
        ways: dict[str, tuple[Any, int, dict[str, Any]]] = {
            "greedy": (prompts, 3, {"do_sample": False}),
            "sampled": (prompts, 3, {}),
            "unguided": (prompts, 3, {"guidance_scale": 1.0, "image_top_k": 0, "image_top_p": 1.0}),
            "linear": (prompts, 3, {"guidance_schedule": "linear", "guidance_scale": 6.0, "image_top_k": 2}),
            "negative": (prompts, 3, {"negative_prompt_ids": negative}),
            "per_scale": (prompts, 3, {"image_top_k": [1, 2, 3, 5, 8, 13, 21, 34], "image_temperature": 0.8}),
            "wide": (prompts, 3, {"height": 96, "width": 160, "num_scales": 7}),
            "shared_prefix": (prompts, 12, several),
            "edit": (edits, 2, {}),
            "edit_three_branches": (edits, 2, {"image_guidance_scale": 1.5}),
            "quantized": (prompts, 3, {"cache_implementation": "quantized"}),
            "thinking": (self.chat(PROMPTS[0]), 1, {"thinking": True, "max_new_tokens": 24}),
            "frames": (prompts, 3, {"num_frames": 2}),
        }
        for name, (inputs, count, settings) in ways.items():
            settings = {"generator": seeds(count), **settings}
            self.keep(
                name,
                self.model.generate(**inputs, generation_mode="image", return_dict_in_generate=True, **settings),
            )

    def texts(self) -> None:
        questions = self.read([f"<image>{QUESTION}", "count: one two"], [a_picture()])
        greedy = self.model.generate(**questions, max_new_tokens=12)
        self.exact["text"] = greedy.tolist()
        torch.manual_seed(0)
        sampled = self.model.generate(**questions, max_new_tokens=12, do_sample=True, top_k=20, temperature=0.9)
        self.exact["sampled_text"] = sampled.tolist()
        story = self.chat("Tell a story of a red circle in two pictures.")
        for name, settings in {"interleaved": {}, "interleaved_sampled": {"do_sample": True, "top_k": 20}}.items():
            output = self.model.generate(
                **story,
                generation_mode="interleaved",
                max_new_tokens=40,
                max_new_images=2,
                generator=seeds(1),
                return_dict_in_generate=True,
                **settings,
            )
            self.keep(name, output)

    def session(self) -> None:
        session = NextFlowSession(self.model, self.processor, max_new_tokens=12)
        said = [session.ask(QUESTION, a_picture())]
        session.draw("make the red circle green", generator=seeds(1)[0])
        said.append(session.ask("What is on the left?"))
        self.exact["session"] = {"said": said, "ids": session.input_ids.tolist()}

    def record(self) -> "Recorder":
        for part in (self.processing, self.forward, self.images, self.texts, self.session):
            part()
        return self


@pytest.fixture(scope="module")
def recorded() -> Recorder:
    return Recorder().record()


def test_floats_are_those_of_the_file(recorded):
    golden = load_file(GOLDEN / "golden.safetensors")
    assert golden.keys() == recorded.tensors.keys()
    for name, value in golden.items():
        atol = 1.01 if name.startswith("pixels") else 2e-4  # a pixel may be rounded the other way
        torch.testing.assert_close(
            recorded.tensors[name], value, atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_ids_codes_and_texts_are_those_of_the_file(recorded):
    golden = json.loads((GOLDEN / "golden.json").read_text())
    assert golden.keys() == recorded.exact.keys()
    different = [name for name in golden if golden[name] != recorded.exact[name]]
    assert not different


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    recorder = Recorder().record()
    save_file(recorder.tensors, GOLDEN / "golden.safetensors")
    (GOLDEN / "golden.json").write_text(json.dumps(recorder.exact, separators=(",", ":")) + "\n")
