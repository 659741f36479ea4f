"""The transformers pipeline that draws: `pipeline("text-to-image")`."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers.pipelines.base import Pipeline

from .codebook import check_same_codebook
from .generation_nextflow import NextFlowGenerateOutput
from .modeling_nextflow import NextFlowForCausalLM
from .processing_nextflow import NextFlowProcessor


class NextFlowTextToImagePipeline(Pipeline):
    """
    Draws pictures of prompts: `transformers.pipeline("text-to-image", model=path)`.

    Example:

    ```python
    >>> import transformers_nextflow
    >>> from transformers import pipeline

    >>> draw = pipeline("text-to-image", model=transformers_nextflow.tiny_checkpoint())
    >>> pictures = draw("a red circle left of a blue square", seed=0)
    >>> pictures[0].size
    (128, 128)
    ```
    """

    _load_processor: Any = True
    _load_tokenizer: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False
    model: NextFlowForCausalLM
    processor: NextFlowProcessor

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if getattr(self.processor, "image_tokenizer", None) is None:
            raise ValueError(
                'The "text-to-image" pipeline needs a processor with an image tokenizer. Load it from a checkpoint '
                "with a folder `image_tokenizer/`, or pass `processor=NextFlowProcessor(..., image_tokenizer=...)`."
            )
        check_same_codebook(self.model.config, self.processor.image_tokenizer)
        self.processor.image_tokenizer.to(self.device)

    def __call__(self, inputs: str | Sequence[str], **kwargs) -> list[Image.Image] | list[list[Image.Image]]:  # type: ignore[override]
        """Draws.

        Args:
            inputs (`str` or `list[str]`):
                The prompt or prompts.
            negative_prompt (`str`, *optional*):
                What guidance leads away from, instead of no text.
            num_images_per_prompt (`int`, *optional*, defaults to 1):
                How many pictures of each prompt.
            seed (`int`, *optional*):
                Makes the pictures repeatable: picture j of any prompt is drawn with the seed `seed + j`.
            batch_size (`int`, *optional*, defaults to 1):
                How many prompts are drawn together.
            kwargs:
                `height`, `width`, `guidance_scale`, `generator` and whatever else image generation takes, see
                [`~NextFlowGenerationMixin.generate`].

        Returns:
            `list[PIL.Image.Image]` of length `num_images_per_prompt`; for a list of prompts a list of such lists.
        """
        if isinstance(inputs, list | tuple) and not inputs:
            raise ValueError("There are no prompts; give at least one.")
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self, negative_prompt: str | None = None, num_images_per_prompt: int | None = None, **kwargs
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if num_images_per_prompt is not None:
            if num_images_per_prompt < 1:
                raise ValueError(f"`num_images_per_prompt` must be at least 1, but got {num_images_per_prompt}.")
            kwargs["num_return_sequences"] = num_images_per_prompt
        seed = kwargs.get("seed")
        if not isinstance(seed, int | None):
            raise TypeError(f"`seed` must be a whole number, but got {seed!r}.")
        if seed is not None and kwargs.get("generator") is not None:
            raise ValueError("Pass `seed` or `generator`, not both.")
        return {} if negative_prompt is None else {"negative_prompt": negative_prompt}, kwargs, {}

    def preprocess(self, inputs: str, negative_prompt: str | None = None) -> dict[str, Any]:  # type: ignore[override]
        model_inputs = dict(self.processor(text=inputs, return_tensors="pt"))
        if negative_prompt is not None:
            negative = self.processor(text=negative_prompt, return_tensors="pt")
            model_inputs["negative_prompt_ids"] = negative["input_ids"]
        return model_inputs

    def _forward(  # type: ignore[override]
        self, model_inputs: dict[str, Any], seed: int | None = None, **generate_kwargs
    ) -> dict[str, torch.Tensor]:
        num_prompts = len(model_inputs["input_ids"])
        if seed is not None:
            seeds = range(seed, seed + generate_kwargs.get("num_return_sequences", 1))
            generate_kwargs["generator"] = [torch.Generator().manual_seed(s) for _ in range(num_prompts) for s in seeds]
        output = self.model.generate(
            **model_inputs,
            **generate_kwargs,
            generation_mode="image",
            return_dict_in_generate=True,
            return_cache=False,
        )
        # One row a prompt, as the base class cuts batches.
        return {
            "image_codes": output.image_codes.unflatten(0, (num_prompts, -1)),
            "image_grid_shw": output.image_grid_shw.unflatten(0, (num_prompts, -1)),
        }

    def postprocess(self, model_outputs: dict[str, torch.Tensor]) -> list[Image.Image]:  # type: ignore[override]
        codes, grids = model_outputs["image_codes"][0], model_outputs["image_grid_shw"][0]
        output = NextFlowGenerateOutput(image_codes=codes, image_grid_shw=grids)
        return self.processor.post_process_multimodal_output(output, generation_mode="image")  # type: ignore[return-value]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Saves the model and the processor with its image tokenizer."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


__all__ = ["NextFlowTextToImagePipeline"]
