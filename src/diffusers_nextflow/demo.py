"""A web page to draw, edit, ask, tell stories and chat: `python -m diffusers_nextflow.demo`, of the extra `[demo]`."""

import argparse
import os
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from math import gcd
from typing import Any

import PIL.Image
import torch

from transformers_nextflow import NextFlowProcessor, NextFlowSession, ScaleSchedule, StreamChunk, aspect_buckets
from transformers_nextflow.generation_config_nextflow import prompt_task
from transformers_nextflow.kept_pictures import read_source

from .pipeline_nextflow import NextFlowPipeline

PROGRAM = "python -m diffusers_nextflow.demo"
MAX_SEED = 2**31 - 1
MAX_CHATS = 16  # conversations that are held; the oldest ends
MAX_GALLERY = 60
PROMPTS = ["a red circle left of a blue square", "three yellow stars on a black background", "a green ring"]
STORIES = [
    "A story in three pictures: a red circle moves right.",
    "A story in three pictures: a black ring moves down.",
]

Shown = tuple[PIL.Image.Image | None, str]


class Studio:
    """What the page does, without the page: generators over what is to be shown.

    Args:
        pipe ([`NextFlowPipeline`]): The pipeline.
    """

    def __init__(self, pipe: NextFlowPipeline):
        self.pipe, self.model = pipe, pipe.model
        self.processor: NextFlowProcessor = pipe._processor
        self._chats: OrderedDict[str, NextFlowSession] = OrderedDict()

    def sizes(self) -> list[tuple[str, str]]:
        """Labels and values "HEIGHTxWIDTH" of all aspects, at as many scales as the model draws; the square first."""
        limit = self.model.config.num_scales
        schedules = [
            ScaleSchedule(bucket, limit) for bucket in sorted(aspect_buckets(), key=lambda b: abs(b[0] - b[1]))
        ]
        return [(_label(schedule), f"{schedule.bucket[0]}x{schedule.bucket[1]}") for schedule in schedules]

    def draw(
        self,
        prompt: str,
        pictures: Any = None,
        size: str | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        thinking: bool = False,
        num_frames: int | None = None,
        mask: PIL.Image.Image | None = None,
        image_in_prompt: bool = True,
    ) -> Iterator[StreamChunk]:
        """Text, previews and pictures, as they come. With a mask, only what is white in it is drawn."""
        if not prompt.strip():
            raise ValueError("Say what to draw.")
        pictures, kept = list(pictures or ()), {}
        if mask is not None:
            parts = self.model, self.pipe.image_processor, [pictures], mask
            if source := read_source(*parts, image_in_prompt=image_in_prompt):
                kept = source.options(self.pipe.image_tokenizer)
            pictures = pictures if image_in_prompt else []
        task = prompt_task(thinking, num_frames or None, bool(pictures))
        options: dict[str, Any] = {"thinking": thinking, "num_frames": num_frames, **kept}
        if size:
            height, width = (16 * int(side) for side in size.split("x"))
            options |= {"height": height, "width": width, "num_scales": self.model.config.num_scales}
        events = self.model.stream(
            **self.pipe._encode([prompt], [pictures], task, None),
            generation_mode="image",
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(int(seed)),
            **options,
        )
        yield from self.processor.decode_stream(events)

    def ask(self, picture: Any, question: str) -> Iterator[str]:
        """An answer, longer and longer."""
        if picture is None:
            raise ValueError("Show a picture first.")
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": question.strip() or "What do you see?"}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.pipe._execution_device)
        answer = ""
        for chunk in self.processor.decode_stream(self.model.stream(**inputs, max_new_images=0, max_new_tokens=128)):
            answer += str(chunk.value)
            yield answer

    def say(self, chat: str, text: str, pictures: Any, mode: str, **settings: Any) -> Iterator[StreamChunk]:
        """A turn of a conversation; the session of a page is made with its first turn."""
        if not text.strip():
            raise ValueError("Say something.")
        session = self._chats.pop(chat, None) or NextFlowSession(self.model, self.processor)
        self._chats[chat] = session
        while len(self._chats) > MAX_CHATS:
            self._chats.popitem(last=False)
        yield from self.processor.decode_stream(session.events(text, list(pictures or ()), mode, **settings))

    def forget(self, chat: str) -> None:
        self._chats.pop(chat, None)


def read_strokes(painted: dict[str, Any]) -> PIL.Image.Image | None:
    """The mask of what was painted over a picture: white where a brush has been; None if it has not."""
    mask = PIL.Image.new("L", painted["background"].size, 0)
    for layer in painted["layers"]:
        mask.paste(255, mask=layer.convert("RGBA").getchannel("A").point([0, *[255] * 255]))
    return mask if mask.getbbox() else None


def _label(schedule: ScaleSchedule) -> str:
    h, w = schedule.bucket
    shared = gcd(h, w)
    return f"{w // shared}:{h // shared} · {schedule.width} x {schedule.height}"


# On a phone the picture stands above what was asked for, on a desktop beside it.
CSS = """
.gradio-container {max-width: 1080px !important; margin: 0 auto !important}
#title h1 {margin-bottom: 0}
.picture img {width: 100%; object-fit: contain}
.status {min-height: 1.6em}
.sides {flex-direction: row-reverse}
#gallery .grid-wrap {min-height: 0 !important; height: auto !important}
footer {display: none !important}
@media (max-width: 700px) {
    .sides {flex-direction: column; align-items: stretch}
    .sides > * {width: 100%; max-width: 100%; flex-grow: 0}
    .picture, .picture .image-container {height: 300px !important}
    #gallery .grid-container {grid-template-columns: repeat(3, 1fr) !important}
}
"""


def look() -> dict[str, Any]:
    """How the page looks, as options of `launch`; in fonts of the system, so that it asks nobody else for any."""
    from gradio import themes

    return {"css": CSS, "theme": themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"])}


def build_page(studio: Studio) -> Any:
    """The page, as `gradio.Blocks`."""
    import gradio as gr

    def seed_of(seed: float | None, is_random: bool) -> int:
        return random.randrange(MAX_SEED) if is_random or seed is None else int(seed)

    def told(error: Exception) -> Any:
        return gr.Error(str(error), duration=8, print_exception=False)

    def kept(gallery: list[Any], *pictures: Any) -> list[Any]:
        return [*pictures, *gallery][:MAX_GALLERY]

    def show(chunks: Iterator[StreamChunk], seed: int, gallery: list[Any]) -> Iterator[Any]:
        """Picture, words beside it, seed, gallery and its pictures, after every scale."""
        thought = ""
        try:
            for chunk in chunks:
                if chunk.kind == "text":
                    thought += str(chunk.value)
                    yield gr.skip(), f"*{thought.strip()}*", seed, gr.skip(), gr.skip()
                elif chunk.kind == "preview":
                    yield chunk.value, f"scale {(chunk.step or 0) + 1}", seed, gr.skip(), gr.skip()
                else:
                    gallery = kept(gallery, chunk.value)
                    words = f"seed {seed}" + (f" · *{thought.strip()}*" if thought else "")
                    yield chunk.value, words, seed, gallery, gallery
        except (ValueError, TypeError) as error:
            raise told(error) from error

    def draw(prompt, size, guidance, seed, is_random, thinking, gallery):
        seed = seed_of(seed, is_random)
        yield from show(studio.draw(prompt, None, size, guidance, seed, thinking), seed, gallery)

    def edit(painted, prompt, whole, guidance, seed, is_random, gallery):
        if not painted or painted["background"] is None:
            raise gr.Error("Show a picture first.", print_exception=False)
        seed, picture, mask = seed_of(seed, is_random), painted["background"].convert("RGB"), read_strokes(painted)
        kept = {} if mask is None else {"mask": mask, "image_in_prompt": not whole}
        yield from show(studio.draw(prompt, [picture], None, guidance, seed, **kept), seed, gallery)

    def ask(picture, question):
        try:
            yield from studio.ask(picture, question)
        except (ValueError, TypeError) as error:
            raise told(error) from error

    def tell(prompt, number, guidance, seed, is_random, gallery):
        seed, frames = seed_of(seed, is_random), []
        try:
            for chunk in studio.draw(prompt, None, None, guidance, seed, num_frames=int(number)):
                frames = [*frames, chunk.value] if chunk.kind == "image" else frames
                shown = frames if chunk.kind == "image" else [*frames, chunk.value]
                yield shown, f"picture {len(frames) + (chunk.kind != 'image')} · seed {seed}", gr.skip(), gr.skip()
        except (ValueError, TypeError) as error:
            raise told(error) from error
        gallery = kept(gallery, *frames)
        yield frames, f"seed {seed}", gallery, gallery

    def chat(message, mode, guidance, history, gallery, request: gr.Request):
        text = message.get("text") or ""
        pictures = [PIL.Image.open(file) for file in message.get("files") or []]
        history = [*history, *({"role": "user", "content": gr.Image(picture)} for picture in pictures)]
        history.append({"role": "user", "content": text})
        options: dict[str, Any] = {"guidance_scale": guidance}
        if mode != "draw":
            options |= {"max_new_tokens": 128, "max_new_images": 0 if mode == "talk" else 3}
        drawn: list[Any] = []
        words = ""
        try:
            how = "image" if mode == "draw" else "interleaved"
            for chunk in studio.say(request.session_hash or "", text, pictures, how, **options):
                if chunk.kind == "text":
                    words += str(chunk.value)
                    yield None, [*history, {"role": "assistant", "content": words.strip()}], gr.skip(), gr.skip()
                    continue
                if words.strip():
                    history.append({"role": "assistant", "content": words.strip()})
                words = ""
                shown = {"role": "assistant", "content": gr.Image(chunk.value, height=256, buttons=[])}
                yield None, [*history, shown], gr.skip(), gr.skip()
                if chunk.kind == "image":
                    drawn.append(chunk.value)
                    history.append(shown)
        except (ValueError, TypeError) as error:
            raise told(error) from error
        if words.strip():
            history.append({"role": "assistant", "content": words.strip()})
        gallery = kept(gallery, *drawn)
        yield None, history, gallery, gallery

    def forget(request: gr.Request):
        studio.forget(request.session_hash or "")
        return []

    def settings(with_size: bool = False) -> list[Any]:
        """Guidance, seed, and size where it can be chosen."""
        parts: list[Any] = []
        if with_size:
            sizes = studio.sizes()
            parts.append(gr.Dropdown(sizes, value=sizes[0][1], label="Size (width x height)", elem_id="size"))
        parts.append(gr.Slider(1, 15, value=usual_guidance, step=0.5, label="Guidance", info="1 is none"))
        with gr.Row():
            parts.append(gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=100))
            parts.append(gr.Checkbox(True, label="a new one each time", min_width=100))
        return parts

    upload: dict[str, Any] = {"type": "pil", "height": 260, "sources": ["upload", "clipboard"]}
    usual_guidance = studio.model.generation_config.guidance_scale or 1.0

    def shown(label: str, name: str) -> tuple[Any, Any]:
        options: dict[str, Any] = {"buttons": ["download", "fullscreen"], "elem_classes": "picture", "height": 420}
        picture = gr.Image(label=label, format="png", interactive=False, elem_id=name, **options)
        return picture, gr.Markdown("", elem_classes="status", elem_id=f"{name}-status")

    with gr.Blocks(title="NextFlow", analytics_enabled=False) as page:
        pictures = gr.State([])
        gr.Markdown(
            "# NextFlow\nPictures grow scale by scale: what you see while you wait is the model's own preview.",
            elem_id="title",
        )
        with gr.Tab("Draw"), gr.Row(elem_classes="sides"):
            with gr.Column(min_width=300):
                picture, status = shown("Picture", "drawn")
                to_edit = gr.Button("Edit this picture", elem_id="to-edit")
            with gr.Column(min_width=300):
                prompt = gr.Textbox(label="Prompt", value=PROMPTS[0], lines=2, elem_id="prompt")
                go = gr.Button("Draw", variant="primary", elem_id="draw")
                gr.Examples(PROMPTS, prompt, label="For example")
                size, guidance, seed, is_random = settings(with_size=True)
                thinking = gr.Checkbox(False, label="think before drawing")
        with gr.Tab("Edit"), gr.Row(elem_classes="sides"):
            with gr.Column(min_width=300):
                edited, edit_status = shown("Edited", "edited")
                again = gr.Button("Go on from this picture")
            with gr.Column(min_width=300):
                source = gr.ImageMask(
                    label="Picture",
                    elem_id="source",
                    layers=False,
                    brush=gr.Brush(default_size="auto", colors=["#e0218a"], color_mode="fixed"),
                    transforms=(),
                    **{**upload, "height": 380},
                )
                change = gr.Textbox(
                    label="What to change",
                    info="Paint over a part of the picture, and the rest stays",
                    value="make the red circle yellow",
                    elem_id="change",
                )
                go_edit = gr.Button("Edit", variant="primary", elem_id="edit")
                whole = gr.Checkbox(False, label="the text says what the whole picture shows (for a painted part)")
                edit_settings = settings()
        with gr.Tab("Ask"), gr.Row():
            with gr.Column(min_width=300):
                subject = gr.Image(label="Picture", **upload)
            with gr.Column(min_width=300):
                question = gr.Textbox(label="Question", value="What do you see?")
                go_ask = gr.Button("Ask", variant="primary")
                answer = gr.Textbox(label="Answer", lines=3, interactive=False)
        with gr.Tab("Story"), gr.Row(elem_classes="sides"):
            with gr.Column(min_width=300):
                frames = gr.Gallery(label="Story", columns=3, height=320, interactive=False, format="png")
                story_status = gr.Markdown("", elem_classes="status")
            with gr.Column(min_width=300):
                plot = gr.Textbox(label="Story", value=STORIES[0], lines=2)
                go_story = gr.Button("Tell", variant="primary")
                gr.Examples(STORIES, plot, label="For example")
                number = gr.Slider(2, 5, value=3, step=1, label="Pictures")
                story_settings = settings()
        with gr.Tab("Chat"):
            dialogue = gr.Chatbot(label="Conversation", height=460, buttons=[], elem_id="dialogue")
            message = gr.MultimodalTextbox(
                show_label=False,
                placeholder="Say something, or show a picture",
                file_types=["image"],
                file_count="multiple",
                elem_id="message",
            )
            with gr.Row():
                modes = [("answer with a picture", "draw"), ("answer in words", "talk"), ("as it likes", "either")]
                mode = gr.Radio(modes, value="draw", label="The model should")
                strength = gr.Slider(1, 15, value=usual_guidance, label="Guidance")
                anew = gr.Button("Start anew", scale=0)
        with gr.Accordion("Gallery", open=True):
            gallery = gr.Gallery(
                show_label=False,
                columns=6,
                fit_columns=False,
                height="auto",
                interactive=False,
                format="png",
                elem_id="gallery",
            )

        drawn = [picture, status, seed, pictures, gallery]
        inputs = [prompt, size, guidance, seed, is_random, thinking, pictures]
        gr.on([go.click, prompt.submit], draw, inputs, drawn, show_progress="hidden")
        edit_inputs = [source, change, whole, *edit_settings, pictures]
        edit_outputs = [edited, edit_status, edit_settings[1], pictures, gallery]
        gr.on([go_edit.click, change.submit], edit, edit_inputs, edit_outputs, show_progress="hidden")
        to_edit.click(lambda image: image, picture, source)
        again.click(lambda image: image, edited, source)
        gr.on([go_ask.click, question.submit], ask, [subject, question], answer, show_progress="hidden")
        story_inputs = [plot, number, *story_settings, pictures]
        go_story.click(tell, story_inputs, [frames, story_status, pictures, gallery], show_progress="hidden")
        chat_inputs = [message, mode, strength, dialogue, pictures]
        message.submit(chat, chat_inputs, [message, dialogue, pictures, gallery], show_progress="hidden")
        anew.click(forget, None, dialogue)
        page.unload(forget)
    return page


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(PROGRAM, description="A web page to draw, edit, ask, tell stories and chat.")
    parser.add_argument("--model", help="folder or Hub repository of a checkpoint (default: the one in the package)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: the best there is)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32 on a CPU, else bfloat16"
    )
    return parser.parse_args(arguments)


def load_studio(model: str | None = None, device: str | None = None, dtype: str | None = None) -> Studio:
    """The studio of a checkpoint."""
    from diffusers.utils.torch_utils import get_device

    from transformers_nextflow import tiny_checkpoint

    device = device or get_device()
    dtype = dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16")
    pipe = NextFlowPipeline.from_pretrained(model or tiny_checkpoint(), dtype=getattr(torch, dtype)).to(device)
    return Studio(pipe)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for anything that the user can put right."""
    parsed = parse_arguments(arguments)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        studio = load_studio(parsed.model, parsed.device, parsed.dtype)
        page = build_page(studio)
        page.queue(max_size=64, default_concurrency_limit=1)
        page.launch(server_name=parsed.host, server_port=parsed.port, max_file_size="32mb", **look())
    except (ValueError, OSError, ImportError) as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
