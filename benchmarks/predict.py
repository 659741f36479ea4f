"""What counts say about this machine: seconds from bare operations, timed at the shapes in question.

Letters: R rows of a step, n slots that a row adds, T slots that it attends to.
"""

import math
import statistics
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from floor import Size
from measure import TEXT_VOCAB, make_config, make_model, make_prompt, seconds
from roofline import SETTINGS, draw

from transformers_nextflow import ScaleSchedule
from transformers_nextflow.sampling import ScaleSampling, sample_codes
from transformers_nextflow.scale_cache import _MAX_SLOTS, _MIN_SLOTS

OVERHEAD_SCALES = 6


class Machine:
    """Times bare operations of a model's sizes. Weights are as many as the model has, so that they come from memory.

    Args:
        size (`Size`): The model's.
        device (`str`), dtype (`torch.dtype`): Where and in what.
        repeats (`int`): Runs that medians are taken of.
    """

    def __init__(self, size: Size, device: str, dtype: torch.dtype, repeats: int):
        self.size, self.device, self.dtype, self.repeats = size, device, dtype, repeats
        key_value = size.hidden_size * size.num_key_value_heads // size.num_heads
        shapes = [
            *[(size.hidden_size, size.hidden_size)] * 2,
            *[(key_value, size.hidden_size)] * 2,
            *[(size.intermediate_size, size.hidden_size)] * 2,
            (size.hidden_size, size.intermediate_size),
        ]
        self.layers = [[self._random(*shape) for shape in shapes] for _ in range(size.num_layers)]
        self.head_weight = self._random(size.codebook_size, size.hidden_size)
        # Timings by shape: parts of a run ask for the same ones.
        self.linear, self.head, self.attention = cache(self._linear), cache(self._head), cache(self._attention)
        self.append_and_attend = cache(self._append_and_attend)
        self.sampling, self.overhead = cache(self._sampling), cache(self._overhead)

    def forget(self):
        """Times all operations anew from here on: a machine that others use is not the same after a minute."""
        by_shape = (self.linear, self.head, self.attention, self.append_and_attend)
        for timed in (*by_shape, self.sampling, self.overhead):
            timed.cache_clear()

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    @torch.no_grad()
    def _median(self, run: Callable[[], object]) -> float:
        run()
        return statistics.median(seconds(run, self.device) for _ in range(self.repeats))

    def _linear(self, slots: int) -> float:
        """The linear layers of the whole model on so many slots."""
        inputs = {width: self._random(slots, width) for width in (self.size.hidden_size, self.size.intermediate_size)}
        turn = iter(range(10**9))

        def run():  # one layer at a time, another each time
            for weight in self.layers[next(turn) % len(self.layers)]:
                F.linear(inputs[weight.shape[1]], weight)

        return len(self.layers) * self._median(run)

    def _head(self, slots: int) -> float:
        """The head's visual rows on so many slots, at most as many as are drawn at once."""
        hidden = self._random(slots, self.size.hidden_size)
        return self._median(lambda: F.linear(hidden, self.head_weight))

    def _attention(self, n: int, length: int) -> float:
        """Attention of one row's n slots on T, in all layers."""
        heads, kv_heads = self.size.num_heads, self.size.num_key_value_heads
        width = self.size.hidden_size // heads
        query = self._random(1, n, heads, width).transpose(1, 2)
        keys, values = self._random(2, 1, kv_heads, length, width)
        gqa = heads != kv_heads
        return len(self.layers) * self._median(
            lambda: F.scaled_dot_product_attention(query, keys, values, enable_gqa=gqa)
        )

    def _append_and_attend(self, rows: int, length: int) -> float:
        """What a cache that grows by concatenation costs a token: all layers copy T slots and attend to the copy."""
        heads, kv_heads = self.size.num_heads, self.size.num_key_value_heads
        width = self.size.hidden_size // heads
        query, new = self._random(rows, heads, 1, width), self._random(rows, kv_heads, 1, width)
        old = [self._random(2, rows, kv_heads, length, width) for _ in self.layers]
        kept: dict[tuple[int, int], torch.Tensor] = {}

        def run():
            for layer, states in enumerate(old):
                for i in range(2):
                    kept[layer, i] = torch.cat([states[i], new], dim=-2)
                F.scaled_dot_product_attention(query, kept[layer, 0], kept[layer, 1], enable_gqa=heads != kv_heads)

        return self._median(run)

    def _sampling(self) -> float:
        """Drawing a code from its logits."""
        settings = ScaleSampling(SETTINGS["guidance_scale"], 1.0, SETTINGS["image_top_k"], SETTINGS["image_top_p"])
        number = max(1, 2**24 // self.size.codebook_size)
        logits = self._random(number, self.size.codebook_size)
        seeds = torch.zeros(number, 2, dtype=torch.int, device=self.device)
        return self._median(lambda: sample_codes(logits, settings, seeds)) / number

    def _overhead(self) -> float:
        """Python and launches of a step: a model of as many layers that has next to nothing to compute."""
        config = make_config(128, self.size.num_layers, codebook_size=64)
        model, prompt = make_model(config, self.device, self.dtype), make_prompt(1, self.device, length=2)
        schedule = ScaleSchedule(num_scales=OVERHEAD_SCALES)
        return self._median(lambda: draw(model, prompt, schedule)) / OVERHEAD_SCALES

    @staticmethod
    def between(time: Callable[[int], float], slots: int) -> float:
        """Time on so many slots, on a straight line between powers of two, so that few shapes are timed."""
        low = 2 ** int(math.log2(slots))
        if low == slots:
            return time(slots)
        share = slots / low - 1
        return (1 - share) * time(low) + share * time(2 * low)

    def image(self, schedule: ScaleSchedule, prompt_length: int, batch_size: int = 1) -> float:
        """An image with guidance: prompts, then a step a scale, whose large ones take groups of rows as ours do."""
        rows, length = 2 * batch_size, prompt_length
        total = self.between(self.linear, rows * length) + rows * self.attention(length, length)
        total += self.overhead() + self.head(1) + self.sampling()
        at_once = max(1, 2**24 // self.size.codebook_size)
        for n in schedule.scale_lengths[1:]:
            length += n
            group = rows if rows * n <= _MIN_SLOTS else max(1, min(batch_size, _MAX_SLOTS // n))
            total += rows / group * self.between(self.linear, group * n) + rows * self.attention(n, length)
            whole, part = divmod(batch_size * n, at_once)
            total += whole * self.head(at_once) + (self.between(self.head, part) if part else 0)
            total += batch_size * n * self.sampling() + self.overhead()
        return total

    def token(self, length: int, rows: int = 2) -> float:
        """A token with guidance on a cache of T slots that grows by concatenation; without launches."""
        head = self._head_of_all_ids(rows)
        return self.linear(rows) + head + self.append_and_attend(rows, length)

    def _head_of_all_ids(self, rows: int) -> float:
        return self.head(rows) * (self.size.codebook_size + TEXT_VOCAB) / self.size.codebook_size
