"""Training: tokens a second of a teacher-forced step, and its share of the matrix rate (MFU)."""

import statistics

import torch
from floor import step_cost
from growth import size_of
from measure import PROMPT_LENGTH, Row, alternate, make_config, make_model, make_prompt, measure_rates

from transformers_nextflow import ScaleSchedule


def measure(hidden_size: int, num_layers: int, device: str, dtype: torch.dtype, repeats: int) -> list[Row]:
    """A step on two 256 x 256 images, forward and backward."""
    config = make_config(hidden_size, num_layers)
    model, rates = make_model(config, device, dtype).train(), measure_rates(hidden_size, device, dtype, repeats)
    schedule, batch_size = ScaleSchedule(num_scales=12), 2
    codes = torch.randint(config.visual_codebook_size, (batch_size, schedule.num_tokens), device=device)
    ids = torch.cat([make_prompt(batch_size, device), codes + config.text_vocab_size], dim=1)
    grids = torch.tensor([schedule.grid_shw] * batch_size)

    def step():
        model(ids, image_grid_shw=grids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    step()
    took = statistics.median(alternate({"step": step}, repeats, device)["step"])
    length, head = ids.shape[1], hidden_size * config.vocab_size
    cost = step_cost(size_of(config), batch_size, length, length, 0, dtype.itemsize)
    # Backward is twice forward. Attention under the block mask is counted whole, as the kernel computes it.
    least = 3 * ((cost.linear + 2 * batch_size * length * head) / rates.linear + cost.attention / rates.attention)
    name = (
        f"training step, {num_layers} layers of {hidden_size}, {batch_size} x ({PROMPT_LENGTH} + {schedule.num_tokens})"
    )
    return [
        Row(
            f"{name}, {dtype}".replace("torch.", ""),
            f"{batch_size * length / took:.0f} tokens/s",
            f"{batch_size * length / least:.0f} tokens/s at the bare rates",
            least / took,
        )
    ]
