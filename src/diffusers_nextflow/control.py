"""Parts of a picture with prompts of their own, as the pipeline takes them."""

from typing import Any

from transformers_nextflow import Region
from transformers_nextflow.kept_pictures import read_mask
from transformers_nextflow.picture_sources import SourceLimits


def read_regions(pipe: Any, task: str, style: str | None, *groups: Any) -> list[Region] | None:
    """`regions` and `negative_regions` of a call, with prompts in the style of the task's; None if there are none."""
    limits, device = SourceLimits.of(vars(pipe.image_processor)), pipe._execution_device
    read: list[Region] = []
    for name, group in zip(("regions", "negative_regions"), groups, strict=True):
        listed = [None] if group == [] else [] if group is None else group
        if not isinstance(listed, list | tuple) or not all(
            isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str) for entry in listed
        ):
            raise ValueError(f"`{name}` is a list of (prompt, mask), one at least, but got {group!r:.200}.")
        for prompt, mask in listed:
            inputs = pipe._encode([prompt], [[]], task, style)
            share = read_mask(mask, limits)[None].to(device)
            read.append(Region(inputs["input_ids"], share, inputs["attention_mask"], name == "negative_regions"))
    return read or None
