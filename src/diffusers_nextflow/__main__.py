"""Draws images in a terminal: `python -m diffusers_nextflow "a red circle left of a blue square" --output out.png`."""

import argparse
import os
import random
import re
import sys
import time
from pathlib import Path

PROGRAM = "python -m diffusers_nextflow"
MAX_IMAGES = 1000  # they are drawn in one batch


class OneLineParser(argparse.ArgumentParser):
    """Says what was wrong in one line, without repeating all options, and takes no shortened ones."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists all options)\n")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(PROGRAM, usage="%(prog)s PROMPT [options]", description="Draws images, scale by scale.")
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("out.png"),
        help="image file (default: %(default)s); several images go to out_0.png, out_1.png, ...",
    )
    parser.add_argument("--steps-dir", type=Path, help="folder for a preview of every scale: scale_01_1x1.png, ...")
    parser.add_argument("--num-images", type=int, default=1, help="how many images (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, help="same seed, same image; the next images count on from it (default: a random one)"
    )
    parser.add_argument("--model", help="folder or Hub repository of a checkpoint (default: the one in the package)")

    drawing = parser.add_argument_group("drawing", "what is left out comes from the checkpoint")
    drawing.add_argument("--height", type=int, help="pixels")
    drawing.add_argument("--width", type=int, help="pixels")
    drawing.add_argument("--num-scales", type=int, help="number of scales; height and width then only give the shape")
    drawing.add_argument("--negative-prompt", help="what to lead away from")
    drawing.add_argument(
        "--prompt-style", choices=["bare", "chat"], help="how to word the prompt (default: as trained)"
    )
    drawing.add_argument("--guidance-scale", type=float, help="how closely to follow the prompt; 1 is no guidance")
    drawing.add_argument("--temperature", type=float, help="how freely to draw; 1 is as trained")
    drawing.add_argument("--top-k", type=int, help="draw from this many best codes; 1 is greedy")
    drawing.add_argument("--top-p", type=float, help="draw from the best codes that hold this share of probability")
    drawing.add_argument("--num-passes", type=int, help="draw each scale so many times (TokenFlow: 1 to 3)")
    drawing.add_argument("--decoder", choices=["vq", "diffusion"], default="vq", help="what makes pictures of codes")
    drawing.add_argument("--decoder-steps", type=int, help="of the diffusion decoder")
    drawing.add_argument("--decoder-scale", type=int, default=1, help="2: the diffusion decoder draws twice the size")

    running = parser.add_argument_group("running")
    running.add_argument("--device", help="cpu, cuda, mps, ... (default: the best there is)")
    running.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32 on a CPU, else bfloat16"
    )
    running.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser.parse_args(arguments)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Finds what can be known to be wrong before seconds go into imports and a model."""
    from PIL import Image

    from transformers_nextflow.scale_schedule import BASE_SIDES, ScaleSchedule

    output = arguments.output
    if not arguments.prompt.strip():
        raise ValueError("the prompt is empty; say what to draw")
    if not 1 <= arguments.num_images <= MAX_IMAGES:
        raise ValueError(f"--num-images must be between 1 and {MAX_IMAGES}, not {arguments.num_images}")
    if arguments.seed is not None and not 0 <= arguments.seed < 2**63:
        raise ValueError(f"--seed must be between 0 and 2**63 - 1, not {arguments.seed}")
    for path in output_paths(arguments):
        if path.is_dir():
            raise ValueError(f'--output "{path}" is a folder; name a file in it')
        if path.exists() and not os.access(path, os.W_OK):
            raise ValueError(f'--output "{path}" is there and may not be written to')
    Image.init()
    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        ending = f'"{output.suffix}" is no image format' if output.suffix else "has no file extension"
        raise ValueError(f'--output "{output}": {ending}; name it like "{output.with_suffix(".png")}"')
    if arguments.temperature is not None and not arguments.temperature > 0:
        raise ValueError(f"--temperature must be above 0, not {arguments.temperature}; for the best codes: --top-k 1")
    if arguments.num_scales is not None and not 1 <= arguments.num_scales <= len(BASE_SIDES):
        raise ValueError(f"--num-scales must be between 1 and {len(BASE_SIDES)}, not {arguments.num_scales}")
    if arguments.height and arguments.width and arguments.num_scales is None:
        ScaleSchedule.from_size(arguments.height, arguments.width)
    model = arguments.model
    if model is not None and not os.path.isdir(model) and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        raise ValueError(f'--model "{model}" is neither a folder nor the name of a Hub repository (owner/name)')
    for option, folder in {"--output": output.parent, "--steps-dir": arguments.steps_dir}.items():
        if folder is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(f'{option}: "{folder}" is to be a folder, but a file is in its place') from None
        if not os.access(folder, os.W_OK):
            raise ValueError(f'{option}: cannot write into the folder "{folder}"')


def output_paths(arguments: argparse.Namespace) -> list[Path]:
    """`out.png`, or `out_0.png`, `out_1.png`, ..."""
    output, number = arguments.output, arguments.num_images
    return [output] if number == 1 else [output.with_stem(f"{output.stem}_{index}") for index in range(number)]


def save_whole(image, path: Path) -> None:
    """Saves beside and renames, so that a full disk or Ctrl-C leaves no part of a picture."""
    path = path.resolve()  # of a link, what it points to
    part = path.with_name(f".{os.getpid()}_{path.name[-100:]}")
    try:
        image.save(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_pipeline(arguments: argparse.Namespace):
    """The pipeline on its device, with a progress bar that names scales and grids."""
    import torch
    import transformers
    from diffusers.utils import logging
    from diffusers.utils.torch_utils import get_device

    from diffusers_nextflow import NextFlowPipeline
    from transformers_nextflow import tiny_checkpoint

    for library_logging in (logging, transformers.utils.logging):
        library_logging.set_verbosity_error()
        library_logging.disable_progress_bar()
    device = arguments.device or get_device()
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f'--device "{device}" cannot be used here: {str(error).splitlines()[0]}') from error
    dtype = arguments.dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16")
    checkpoint = arguments.model or tiny_checkpoint()
    pipe = NextFlowPipeline.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).to(device)
    disable = arguments.quiet or None  # None: where stderr is no terminal
    pipe.set_progress_bar_config(bar_format="{desc}|{bar:24}| {elapsed}", mininterval=0, disable=disable)
    return pipe


def draw(arguments: argparse.Namespace) -> None:
    """Loads the model, draws and writes the images and their previews."""
    pipe = load_pipeline(arguments)

    import torch

    first_seed = random.randrange(2**31) if arguments.seed is None else arguments.seed
    seeds = range(first_seed, first_seed + arguments.num_images)
    paths = output_paths(arguments)

    def save_previews(pipe, step, timestep, tensors):
        h, w = pipe.schedule.grids[step]
        for preview, path in zip(pipe.decode_latents(tensors["latents"]), paths, strict=True):
            ending = path.stem.removeprefix(arguments.output.stem)
            save_whole(preview, arguments.steps_dir / f"scale_{step + 1:02d}_{h}x{w}{ending}.png")

    start = time.perf_counter()
    images = pipe(
        arguments.prompt,
        negative_prompt=arguments.negative_prompt,
        height=arguments.height,
        width=arguments.width,
        num_scales=arguments.num_scales,
        prompt_style=arguments.prompt_style,
        guidance_scale=arguments.guidance_scale,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        image_temperature=arguments.temperature,
        image_top_k=arguments.top_k,
        image_top_p=arguments.top_p,
        num_passes=arguments.num_passes,
        decoder=arguments.decoder,
        decoder_steps=arguments.decoder_steps,
        decoder_scale=arguments.decoder_scale,
        callback_on_step_end=save_previews if arguments.steps_dir else None,
    ).images
    seconds = time.perf_counter() - start
    for image, seed, path in zip(images, seeds, paths, strict=True):
        save_whole(image, path)
        if not arguments.quiet:
            print(f"{path}: {image.height} x {image.width} pixels (height x width), seed {seed}, {seconds:.1f} s")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for anything that the user can put right."""
    parsed = parse_arguments(arguments)
    try:
        check_arguments(parsed)
        draw(parsed)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # what a shell says of a program that Ctrl-C ended
    return 0


if __name__ == "__main__":
    sys.exit(main())
