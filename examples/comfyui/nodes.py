"""Nodes of ComfyUI's V3 schema: load, draw, edit, decode; a preview of every scale stands on the node that draws."""

from functools import lru_cache
from typing import Any

import torch
from comfy_api.latest import ComfyAPISync, ComfyExtension, io
from PIL import Image

from diffusers_nextflow import NextFlowPipeline
from transformers_nextflow import ScaleSchedule, aspect_buckets, tiny_checkpoint

CATEGORY = "NextFlow"
Pipe = io.Custom("NEXTFLOW_PIPE")
Latents = io.Custom("NEXTFLOW_LATENTS")
ASPECTS = {f"{h}:{w}": (h, w) for h, w in sorted(aspect_buckets(), key=lambda bucket: abs(bucket[0] - bucket[1]))}
DTYPES = ["auto", "float32", "bfloat16", "float16"]


@lru_cache(maxsize=1)
def load(folder: str, device: str, dtype: str) -> NextFlowPipeline:
    """The pipeline of a checkpoint; the last one stays."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        dtype = "float32" if torch.device(device).type == "cpu" else "bfloat16"
    pipe = NextFlowPipeline.from_pretrained(folder or tiny_checkpoint(), dtype=getattr(torch, dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: NextFlowPipeline, prompt: str, number: int, seed: int, **options: Any) -> torch.Tensor:
    """Latents `(number, D, h, w)`; picture j has the seed `seed + j`."""
    api = ComfyAPISync()

    def show(pipe: NextFlowPipeline, step: int, timestep: int, tensors: dict[str, torch.Tensor]) -> None:
        preview = pipe.decode_latents(tensors["latents"][:1])[0]
        api.execution.set_progress(value=step + 1, max_value=pipe.num_timesteps, preview_image=preview)

    return pipe(
        prompt,
        num_images_per_prompt=number,
        generator=[torch.Generator().manual_seed((seed + j) % 2**63) for j in range(number)],
        output_type="latent",
        callback_on_step_end=show,
        **options,
    ).images


def drawing_inputs() -> list[Any]:
    """What drawing and editing have in common."""
    return [
        Pipe.Input("pipe"),
        io.String.Input("prompt", multiline=True, default="a red circle left of a blue square"),
        io.Float.Input("guidance", default=3.0, min=1.0, max=30.0, step=0.5, tooltip="1 is no guidance"),
        io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=True),
        io.Int.Input("number", default=1, min=1, max=64, tooltip="pictures in one batch"),
    ]


class NextFlowLoad(io.ComfyNode):
    """Loads a checkpoint."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NextFlowLoad",
            display_name="Load NextFlow",
            category=CATEGORY,
            inputs=[
                io.String.Input("folder", default="", tooltip="folder of a checkpoint; empty is nextflow-tiny"),
                io.String.Input("device", default="", tooltip="cpu, cuda, ...; empty is the best there is"),
                io.Combo.Input("dtype", options=DTYPES, default="auto"),
            ],
            outputs=[Pipe.Output("pipe")],
        )

    @classmethod
    def execute(cls, folder: str, device: str, dtype: str) -> io.NodeOutput:
        return io.NodeOutput(load(folder, device, dtype))


class NextFlowDraw(io.ComfyNode):
    """Draws pictures of a prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NextFlowDraw",
            display_name="Draw (NextFlow)",
            category=CATEGORY,
            inputs=[
                *drawing_inputs(),
                io.Combo.Input("aspect", options=list(ASPECTS), default=next(iter(ASPECTS)), tooltip="height : width"),
                io.Int.Input("scales", default=0, min=0, max=18, tooltip="fewer are a smaller picture; 0 is all"),
                io.String.Input("negative", default="", multiline=True, tooltip="what to lead away from"),
            ],
            outputs=[Latents.Output("latents")],
        )

    @classmethod
    def execute(
        cls,
        pipe: NextFlowPipeline,
        prompt: str,
        guidance: float,
        seed: int,
        number: int,
        aspect: str,
        scales: int,
        negative: str,
    ) -> io.NodeOutput:
        schedule = ScaleSchedule(ASPECTS[aspect], scales or pipe.model.config.num_scales)
        (height, width), stride = schedule.bucket, schedule.stride
        options = {"height": height * stride, "width": width * stride, "num_scales": schedule.num_scales}
        options |= {"guidance_scale": guidance, "negative_prompt": negative or None}
        return io.NodeOutput(draw(pipe, prompt, number, seed, **options))


class NextFlowEdit(io.ComfyNode):
    """Edits a picture, or makes something new of several (a batch of them)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NextFlowEdit",
            display_name="Edit (NextFlow)",
            category=CATEGORY,
            inputs=[*drawing_inputs(), io.Image.Input("image")],
            outputs=[Latents.Output("latents")],
        )

    @classmethod
    def execute(
        cls, pipe: NextFlowPipeline, prompt: str, guidance: float, seed: int, number: int, image: torch.Tensor
    ) -> io.NodeOutput:
        # ComfyUI's pictures are (B, H, W, 3) in [0, 1].
        pictures = [Image.fromarray(part) for part in (image.cpu() * 255).round().clamp(0, 255).byte().numpy()]
        return io.NodeOutput(draw(pipe, prompt, number, seed, image=pictures, guidance_scale=guidance))


class NextFlowDecode(io.ComfyNode):
    """Makes pictures of latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NextFlowDecode",
            display_name="Decode (NextFlow)",
            category=CATEGORY,
            inputs=[Pipe.Input("pipe"), Latents.Input("latents")],
            outputs=[io.Image.Output("image")],
        )

    @classmethod
    def execute(cls, pipe: NextFlowPipeline, latents: torch.Tensor) -> io.NodeOutput:
        pixels = pipe.decode_latents(latents, output_type="pt")  # (B, 3, H, W) in [0, 1]
        return io.NodeOutput(pixels.movedim(1, -1).float().cpu())


class NextFlowExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [NextFlowLoad, NextFlowDraw, NextFlowEdit, NextFlowDecode]


async def comfy_entrypoint() -> NextFlowExtension:
    return NextFlowExtension()
