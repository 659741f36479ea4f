"""Checks of the model's inputs: every argument is looked at once, before anything is computed."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils.generic import TransformersKwargs

from .token_layout import ScaleStep, TokenLayout

# What transformers' own models take in `**kwargs`.
_PASSED_ON = frozenset(TransformersKwargs.__annotations__) | {"return_dict"}


def lay_out(
    config, input_ids, inputs_embeds, image_grid_shw, attention_mask, position_ids, seq_idx, cache, layout=None
) -> TokenLayout | None:
    """Checks all inputs and returns the layout of a batch with images, or the given one; None for text."""
    num_past = cache.get_seq_length() if cache is not None else 0
    check_tensors(image_grid_shw=image_grid_shw)
    check_shapes(input_ids, inputs_embeds, attention_mask, position_ids, seq_idx, num_past)
    if inputs_embeds is not None and image_grid_shw is not None:
        raise ValueError("`image_grid_shw` needs `input_ids`: the codes of the images are read from them.")
    if seq_idx is not None and (attention_mask is not None or cache is not None):
        raise ValueError(
            "Packed rows (`seq_idx`) go without `attention_mask`, cache and scale steps: give padding a number of its "
            "own in `seq_idx`."
        )
    if layout is not None:
        _check_layout(config, layout, input_ids, image_grid_shw, attention_mask, seq_idx)
    elif not torch.compiler.is_compiling():
        _check_values(config, input_ids, image_grid_shw, position_ids, attention_mask)
    if (first := getattr(cache, "first_image_slot", None)) is not None:
        if num_past <= first:
            del cache.first_image_slot  # it has been cropped or reset
        elif position_ids is None:
            raise ValueError(
                "The cache holds an image, which takes fewer positions than slots: pass `position_ids` (those of the "
                "whole sequence are `TokenLayout.of(...).position_ids`)."
            )
    if image_grid_shw is None:
        return layout
    length, start = input_ids.shape[1], num_past
    own_mask = None
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        own_mask = attention_mask[:, -length:]
        start = attention_mask[:, :-length].sum(-1, keepdim=True)
    layout = TokenLayout.of(input_ids, image_grid_shw, config, own_mask, start, seq_idx)
    return layout if layout.images else None


def mark_image(cache: Any, num_past: int | torch.Tensor) -> None:
    """Notes in a cache where images begin: from there on the number of slots differs from the position."""
    if not hasattr(cache, "first_image_slot"):
        cache.first_image_slot = num_past + 0  # a static cache counts in place


def check_names(forward: Callable, kwargs: dict[str, Any]) -> None:
    """Refuses unknown arguments, which would be dropped silently."""
    if unknown := [name for name in kwargs if name not in _PASSED_ON]:
        legal = {*inspect.signature(forward).parameters, *_PASSED_ON} - {"self", "kwargs"}
        raise ValueError(f"`forward` got the unknown arguments {unknown}. It takes {sorted(legal)}.")


def check_labels(
    config, labels, slots, scale_step: ScaleStep | None, num_items: int | torch.Tensor | None, layout=None
) -> None:
    """Refuses labels that don't fit the ids or embeddings, and numbers of items that are none.

    Values are left to `check_learned_slots` where a layout says which labels there are.
    """
    check_tensors(labels=labels)
    if scale_step is not None or (slots is not None and labels.shape != slots.shape[:2]):
        raise ValueError(
            f"`labels` must have the shape of `input_ids`, but got {tuple(labels.shape)}; scale steps have none. They "
            "are not shifted: that is done here."
        )
    is_known = torch.compiler.is_compiling() or getattr(layout, "learned_slots", None) is not None
    wrong = ((labels < 0) & (labels != -100)) | (labels >= config.vocab_size)
    if labels.dtype not in (torch.int64, torch.int32) or (not is_known and wrong.any()):
        raise ValueError(
            f"`labels` must be ids below {config.vocab_size}, or -100 where there is nothing to learn, but are "
            f"{labels.dtype} with {labels[wrong].tolist()[:5]}."
        )
    if num_items is None or (is_known and isinstance(num_items, torch.Tensor)):
        return
    if not 0 <= float(num_items) < float("inf"):
        raise ValueError(f"`num_items_in_batch` must be a number of tokens, but got {float(num_items)}.")


def _demand(condition: torch.Tensor, message: str) -> None:
    """A `ValueError` unless a bool `()` is True; on CUDA an assertion of the device, so that the host doesn't wait."""
    if torch.compiler.is_compiling():
        return
    try:
        torch._assert_async(condition, message)
    except NotImplementedError:  # there is none on this device
        if not condition:
            raise ValueError(message) from None
    except RuntimeError:
        raise ValueError(message) from None


def check_learned_slots(config, slots: torch.Tensor, targets: torch.Tensor) -> None:
    """Refuses slots `(T,)` of a layout that are not those which targets `(B * L)` have, without waiting for them."""
    learned = targets[slots]
    fits = ((learned >= 0) & (learned < config.vocab_size)).all() & ((targets != -100).sum() == len(learned))
    fits = fits & (slots[1:] > slots[:-1]).all()
    _demand(fits, "`layout.learned_slots` are not the slots that predict `labels`: make it anew from these labels.")


def _check_layout(config, layout: TokenLayout, input_ids, image_grid_shw, attention_mask, seq_idx) -> None:
    """Refuses a layout of other ids or packs, without waiting for their values."""
    if input_ids is None or image_grid_shw is not None:
        raise ValueError("`layout` goes with `input_ids` and takes the place of `image_grid_shw`: pass one of the two.")
    if not isinstance(layout, TokenLayout):
        raise ValueError(f"`layout` must be a `TokenLayout`, but is a {type(layout).__name__}.")
    if layout.block_ids.shape != input_ids.shape or layout.block_ids.device != input_ids.device:
        raise ValueError(
            f"`layout` is of ids of shape {tuple(layout.block_ids.shape)} on {layout.block_ids.device}, but "
            f"`input_ids` have {tuple(input_ids.shape)} on {input_ids.device}: make it anew, or move it with `.to`."
        )
    codes = (input_ids >= config.text_vocab_size).flatten()
    fits = ((input_ids >= 0) & (input_ids < config.vocab_size)).all()
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        codes = codes & attention_mask[:, -input_ids.shape[1] :].bool().flatten()
        if layout.is_padded is False:
            fits = fits & attention_mask.bool().all()
    fits = fits & (codes.sum() == sum(group.slots.numel() for group in layout.images))
    for group in layout.images:
        fits = fits & codes[group.slots].all()
    if (layout.seq_idx is None) != (seq_idx is None):
        raise ValueError("`layout` and `seq_idx` belong together: `TokenLayout.of` takes it, too, for packed rows.")
    if seq_idx is not None:
        fits = fits & (layout.seq_idx == seq_idx).all()
    _demand(
        fits,
        "`layout` is not that of these `input_ids`: image codes, packed sequences or padding stand elsewhere, or ids "
        "are out of range. Make it anew.",
    )


def check_scale_step(config, step: ScaleStep, input_ids, attention_mask, position_ids, num_past, others: tuple) -> None:
    """Refuses arguments that don't make a scale step."""
    if input_ids is None or position_ids is None or any(argument is not None for argument in others):
        raise ValueError(
            "A scale step needs `input_ids` (the codes of the scale before) and `position_ids` (`scale_position_ids` "
            "makes them), and takes neither `image_grid_shw`, `layout` nor `seq_idx`."
        )
    schedule, index = step.schedule, step.index
    num_scales = min(schedule.num_scales, config.num_scales)
    if not 1 <= index < num_scales:
        raise ValueError(f"The index of a scale step must be between 1 and {num_scales - 1} here, but got {index}.")
    first = 0 if config.visual_feature_mode == "accumulated" else index - 1
    last = index if step.own_map else index - 1
    if step.own_map and config.visual_feature_mode != "accumulated":
        raise ValueError('`own_map` is for `visual_feature_mode="accumulated"`, where a scale has such a map.')
    num_codes = schedule.offsets[last + 1] - schedule.offsets[first]
    if input_ids.shape[-1] != num_codes:
        raise ValueError(
            f"The step for scale {index} takes the {num_codes} codes of scales {first} to {last}, but got "
            f"{input_ids.shape[-1]}."
        )
    check_shapes(input_ids, None, attention_mask, position_ids, None, num_past, schedule.scale_lengths[index])


def check_tensors(**inputs) -> None:
    """Refuses lists and arrays."""
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor | None):
            raise ValueError(
                f'`{name}` must be a tensor, but is a {type(value).__name__}: pass `return_tensors="pt"` to the '
                "processor."
            )


def check_shapes(
    input_ids, inputs_embeds, attention_mask, position_ids, seq_idx, num_past, length: int | None = None
) -> None:
    """Refuses inputs whose shapes don't fit, without reading values: the host would wait for them.

    `length` is the number of slots where it differs from that of the ids.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
    check_tensors(input_ids=input_ids, inputs_embeds=inputs_embeds)
    if input_ids is not None and (input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32)):
        raise ValueError(
            "`input_ids` must be integers of shape (batch, length), but got "
            f"{input_ids.dtype} of shape {tuple(input_ids.shape)}."
        )
    if inputs_embeds is not None and inputs_embeds.ndim != 3:
        raise ValueError(
            f"`inputs_embeds` must have shape (batch, length, hidden size), but got {tuple(inputs_embeds.shape)}."
        )
    rows, number = (inputs_embeds if input_ids is None else input_ids).shape[:2]
    length = number if length is None else length
    positions = [(*axes, number, length) for axes in ((), (3,), (4,)) for number in (rows, 1)]
    legal = {"position_ids": (position_ids, positions), "seq_idx": (seq_idx, [(rows, length)])}
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim != 4:
        # The length of a static cache is on its device.
        width = num_past + length if isinstance(num_past, int) else attention_mask.shape[-1]
        legal["attention_mask"] = (attention_mask, [(rows, width)])
    for name, (tensor, shapes) in legal.items():
        if tensor is not None and tuple(tensor.shape) not in shapes:
            raise ValueError(
                f"`{name}` has shape {tuple(tensor.shape)}, but for {rows} rows of {length} slots (after {num_past} "
                f"cached ones) it must be one of {', '.join(map(str, shapes))}."
            )


def _check_values(config, input_ids, image_grid_shw, position_ids, attention_mask) -> None:
    """Refuses ids out of range, and positions and masks that are no numbers."""
    for name, tensor in {"position_ids": position_ids, "attention_mask": attention_mask}.items():
        floats = isinstance(tensor, torch.Tensor) and tensor.ndim < 4 and tensor.is_floating_point()
        if floats and not tensor.isfinite().all():
            raise ValueError(f"`{name}` must be finite, but some are NaN or infinite.")
    if input_ids is None or not input_ids.numel():
        return
    smallest, largest = torch.stack(input_ids.aminmax()).tolist()
    if smallest < 0 or largest >= config.vocab_size:
        raise ValueError(
            f"`input_ids` must be between 0 and {config.vocab_size - 1}, but they reach from {smallest} to "
            f"{largest}. Visual ids are {config.text_vocab_size} + code, and the codebook has "
            f"{config.visual_codebook_size} codes."
        )
    if image_grid_shw is None and largest >= config.text_vocab_size:
        raise ValueError(
            f"`input_ids` hold image codes (ids from {config.text_vocab_size} on), but `image_grid_shw` is "
            "missing: pass one row (number of scales, bucket height, bucket width) for each image."
        )


def split_position_ids(position_ids: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Text positions `(B, L)`, if they come with the others, and coordinates `(3, B, L)`, if there are any."""
    if position_ids is None or position_ids.shape[:-2] == (3,):
        return None, position_ids
    if position_ids.ndim == 2:
        return None, position_ids.expand(3, *position_ids.shape)
    return position_ids[0], position_ids[1:]


def text_positions(inputs_embeds: torch.Tensor, attention_mask, num_past: int) -> torch.Tensor:
    """Positions `(3, B, L)` of plain text: a running count that skips padding."""
    batch_size, length = inputs_embeds.shape[:2]
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:].to(inputs_embeds.device)
    else:
        positions = (torch.arange(length, device=inputs_embeds.device) + num_past).expand(batch_size, -1)
    return positions.float().expand(3, -1, -1)
