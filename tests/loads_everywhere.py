"""One question to a folder that somebody saved: does it load, and draw, through every door?"""

import os
from pathlib import Path

import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

from diffusers_nextflow import NextFlowPipeline
from transformers_nextflow import NextFlowForCausalLM, NextFlowModel, NextFlowProcessor, check_same_codebook

DRAWING = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM, NextFlowForCausalLM)


def assert_loads_everywhere(folder: str | os.PathLike) -> None:
    """Asserts that a folder with a model and a processor, or one of a pipeline, loads and draws by every way there is.

    Args:
        folder: What `model.save_pretrained` and `processor.save_pretrained` wrote, a trainer's output or one of its
            checkpoints, or what `NextFlowPipeline.save_pretrained` wrote.
    """
    folder = Path(folder)
    in_parts = (folder / "model_index.json").is_file() and (folder / "model").is_dir()
    sizes = set()
    for load in (NextFlowPipeline, DiffusionPipeline, AutoPipelineForText2Image):
        pipe = load.from_pretrained(folder)
        assert type(pipe) is NextFlowPipeline
        sizes.add(pipe("a ring", generator=torch.Generator().manual_seed(0)).images[0].size)
    model_folder = folder / "model" if in_parts else folder
    models = [load.from_pretrained(model_folder) for load in DRAWING]
    assert {type(model) for model in models} == {NextFlowForCausalLM}
    for name, weight in models[0].state_dict().items():
        assert all(torch.equal(weight, model.state_dict()[name]) for model in models), name
    assert type(AutoModel.from_pretrained(model_folder)) is NextFlowModel
    assert AutoConfig.from_pretrained(model_folder).to_dict() == models[0].config.to_dict()
    if in_parts:
        assert len(sizes) == 1
        return
    processors = [AutoProcessor.from_pretrained(folder), NextFlowProcessor.from_pretrained(folder)]
    for processor in processors:
        assert type(processor) is NextFlowProcessor
        check_same_codebook(models[0].config, processor.image_tokenizer)
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == processor.tokenizer.get_vocab()
        assert type(AutoImageProcessor.from_pretrained(folder)) is type(processor.image_processor)
    sizes.add(pipeline("text-to-image", model=str(folder))("a ring", seed=0)[0].size)
    both = pipeline("any-to-any", model=str(folder))
    sizes.add(both(text="a ring", generation_mode="image")[0]["generated_image"].size)
    assert len(sizes) == 1, "every door draws at the size that the checkpoint states"
    picture = [{"type": "image", "image": processors[0].decode_images(*_blank(models[0], processors[0]))[0][0]}]
    chat = [{"role": "user", "content": [*picture, {"type": "text", "text": "what?"}]}]
    for read in (both, pipeline("image-text-to-text", model=str(folder))):
        assert isinstance(read(text=chat, max_new_tokens=2, return_full_text=False)[0]["generated_text"], str)


def _blank(model: NextFlowForCausalLM, processor: NextFlowProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    """A sequence with one picture, as the model draws it."""
    output = model.generate(
        processor("a ring", return_tensors="pt").input_ids, generation_mode="image", return_dict_in_generate=True
    )
    return output.sequences, output.image_grid_shw
