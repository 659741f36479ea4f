"""The transformers pipeline that draws: `pipeline("text-to-image")`."""

import os
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from transformers.pipelines.base import Pipeline

from .codebook import check_same_checkpoint
from .decoding_settings import INPUTS
from .generation_config_nextflow import NextFlowGenerationConfig, prompt_task, refuse_unknown
from .generation_nextflow import NextFlowGenerateOutput
from .modeling_nextflow import NextFlowForCausalLM
from .processing_nextflow import NextFlowProcessor
from .sampling import make_generators, spread_generator


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
        check_same_checkpoint(self.model.config, self.processor)
        self.processor.image_tokenizer.to(self.device)

    def __call__(self, inputs: str | Sequence[str], **kwargs) -> list[Any]:  # type: ignore[override]
        """Draws pictures of prompts.

        Args:
            inputs (`str` or `list[str]`): The prompt or prompts.
            negative_prompt (`str`, *optional*): What guidance leads away from, instead of no text; one for all prompts.
            num_images_per_prompt (`int`, *optional*, defaults to 1): How many pictures of each prompt.
            seed (`int`, *optional*):
                Makes the pictures repeatable: picture j of any prompt is drawn with the seed `seed + j`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of all draws: one, or one per picture, those of one prompt side by side. One serves the first
                picture and seeds the others', whatever the `batch_size`.
            prompt_style (`str`, *optional*):
                `"bare"` or `"chat"`; by default as the model was trained (`model.generation_config.prompt_styles`).
            batch_size (`int`, *optional*, defaults to 1): How many prompts are drawn together.
            kwargs:
                `height`, `width`, `guidance_scale` and everything else that image generation takes; see
                [`~NextFlowGenerationMixin.generate`].

        Returns:
            `list[PIL.Image.Image]` of length `num_images_per_prompt`; with `num_frames` a list of frames in place of
            each picture; with `thinking` a picture's `info["thought"]` is what was written before it. For a list of
            prompts a list of such lists.
        """
        inputs = list(inputs) if isinstance(inputs, tuple) else inputs
        if isinstance(inputs, list) and not inputs:
            raise ValueError("There are no prompts; give at least one.")
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        negative_prompt: str | None = None,
        num_images_per_prompt: int | None = None,
        prompt_style: str | None = None,
        **kwargs,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        own = ("generation_config", "negative_prompt", "num_images_per_prompt", "prompt_style", "seed")
        if kwargs.keys() & {"image", "images"}:
            raise ValueError(
                'This pipeline draws of text alone. For an edit use `pipeline("any-to-any")` or `NextFlowPipeline`.'
            )
        refuse_unknown("The pipeline", kwargs, [*own, *INPUTS])
        if num_images_per_prompt is not None:
            if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
                raise ValueError(f"`num_images_per_prompt` must be at least 1, but got {num_images_per_prompt}.")
            if kwargs.setdefault("num_return_sequences", num_images_per_prompt) != num_images_per_prompt:
                raise ValueError("`num_images_per_prompt` and `num_return_sequences` are one option: pass one of them.")
        seed, generator = kwargs.get("seed"), kwargs.get("generator")
        if not isinstance(seed, int | None):
            raise TypeError(f"`seed` must be a whole number, but got {seed!r}.")
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"`seed` must be from 0 to 2**63 - 1, but got {seed}.")
        if seed is not None and generator is not None:
            raise ValueError("Pass `seed` or `generator`, not both.")
        if seed is not None or generator is not None:
            kwargs |= {"seed": seed, "generator": generator}  # one overrules the other that the pipeline was made with
        prompting: dict[str, Any] = {"negative_prompt": negative_prompt, "style": prompt_style}
        if {"thinking", "num_frames"} & kwargs.keys():
            prompting["task"] = prompt_task(kwargs.get("thinking"), kwargs.get("num_frames"))
        return {name: value for name, value in prompting.items() if value is not None}, kwargs, {}

    def preprocess(  # type: ignore[override]
        self, inputs: str, negative_prompt: str | None = None, task: str = "image", style: str | None = None
    ) -> dict[str, Any]:
        texts = {"": inputs} if negative_prompt is None else {"": inputs, "negative_prompt_": negative_prompt}
        if not all(isinstance(text, str) for text in texts.values()):
            raise ValueError("`text` must be a string or a list of strings, and `negative_prompt` one string for all.")
        config = self.model.generation_config
        model_inputs: dict[str, Any] = {}
        for prefix, text in texts.items():
            styled = self.processor.style_prompts([text], task, config, style, negative=bool(prefix))
            kind = "negative prompt" if prefix else "prompt"
            encoded = self.processor(text=styled, return_tensors="pt", text_kind=kind)
            model_inputs |= {prefix + name: value for name, value in encoded.items()}
        if negative_prompt is not None:
            model_inputs["negative_prompt_ids"] = model_inputs.pop("negative_prompt_input_ids")
        return model_inputs

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        forward_params = self._deal_generators([inputs], **forward_params)
        return super().run_single(inputs, preprocess_params, forward_params, postprocess_params)

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        forward_params = self._deal_generators(inputs, **forward_params)
        return super().get_iterator(
            inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
        )

    def _deal_generators(
        self, prompts: Any, seed: int | None = None, generator: Any = None, **options
    ) -> dict[str, Any]:
        """Options with `generators`, from which each batch takes its own in turn, `num_images` for each prompt."""
        given, _ = NextFlowGenerationConfig.merge(options, options.get("generation_config"))
        num_images = given.over(self.model.generation_config).num_return_sequences or 1
        generators: Iterator[torch.Generator] | None = None
        if seed is not None:
            generators = (torch.Generator().manual_seed(seed + j) for j in cycle(range(num_images)))
        elif isinstance(generator, torch.Generator):
            generators = spread_generator(generator)
        elif generator is not None:
            number = len(prompts) * num_images if hasattr(prompts, "__len__") else len(generator)
            generators = iter(make_generators(generator, number, self.device))
        return {"generators": generators, "num_images": num_images, **options}

    def _forward(  # type: ignore[override]
        self, model_inputs: dict[str, Any], generators: Iterator[torch.Generator] | None, num_images: int, **options
    ) -> dict[str, torch.Tensor]:
        num_prompts = len(model_inputs["input_ids"])
        if generators is not None:
            options["generator"] = list(islice(generators, num_prompts * num_images))
        output = self.model.generate(
            **model_inputs, **options, generation_mode="image", return_dict_in_generate=True, return_cache=False
        )
        names = ("image_codes", "image_grid_shw", "thought_ids")
        parts = {name: part for name in names if (part := getattr(output, name)) is not None}
        # One row a prompt, as the base class cuts batches.
        return {name: part.unflatten(0, (num_prompts, -1)) for name, part in parts.items()}

    def postprocess(self, model_outputs: dict[str, torch.Tensor]) -> list[Any]:  # type: ignore[override]
        codes, grids = model_outputs["image_codes"][0], model_outputs["image_grid_shw"][0]
        drawn = [of_image[of_image >= 0] for of_image in codes.flatten(0, -2)]  # -1 where it was stopped
        output = NextFlowGenerateOutput(image_codes=drawn, image_grid_shw=grids)  # type: ignore[arg-type]
        images: list[Any] = self.processor.post_process_multimodal_output(output, generation_mode="image")
        if codes.ndim == 3:  # frames
            images = [images[start : start + codes.shape[1]] for start in range(0, len(images), codes.shape[1])]
        if "thought_ids" in model_outputs:
            for image, thought in zip(images, model_outputs["thought_ids"][0], strict=True):
                image.info["thought"] = str(self.processor.decode(thought, skip_special_tokens=True)).strip()
        return images

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Saves the model and the processor with its image tokenizer."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


__all__ = ["NextFlowTextToImagePipeline"]
