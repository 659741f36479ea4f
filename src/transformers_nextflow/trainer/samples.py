"""Pictures of fixed prompts while a model trains."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from ..pipelines import NextFlowTextToImagePipeline

FOLDER = "samples"


class DrawSamples(TrainerCallback):
    """
    Draws the same prompts with the same noise every `sample_steps` steps: a row of pictures in `samples/STEP.png` of
    `output_dir`, and pictures in TensorBoard where it reports to that. The training is not touched by it.

    Args:
        trainer: Whose model, processor and settings are taken.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.sample_steps or not state.is_world_process_zero:
            return
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        training = model.training
        model.eval()
        try:
            pipe = NextFlowTextToImagePipeline(model=model, processor=trainer.processor)
            with trainer.averaged():
                drawn = pipe(list(args.sample_prompts), seed=0, batch_size=len(args.sample_prompts))
        finally:
            model.train(training)
        pictures = [row[0] for row in drawn]
        sheet = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
        for index, picture in enumerate(pictures):
            sheet.paste(picture, (sum(p.width for p in pictures[:index]), 0))
        folder = Path(args.output_dir, FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(folder / f"{state.global_step:06d}.png")
        for callback in trainer.callback_handler.callbacks:
            writer = getattr(callback, "tb_writer", None) if isinstance(callback, TensorBoardCallback) else None
            for prompt, picture in zip(args.sample_prompts, pictures, strict=True) if writer else ():
                pixels = np.asarray(picture.convert("RGB"))
                writer.add_image(f"{FOLDER}/{prompt}", pixels, state.global_step, dataformats="HWC")
