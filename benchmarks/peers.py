"""Peers: the same picture, grid, width and depth, drawn in other ways, with random weights."""

import inspect
import statistics
from collections.abc import Iterator

import torch
from floor import H100, floor_seconds, image_costs, raster_costs
from growth import size_of
from measure import PROMPT_LENGTH, Row, Spread, alternate, make_config, make_model, make_prompt
from predict import Machine
from roofline import draw
from transformers import DynamicCache, Emu3ForCausalLM, Emu3TextConfig

from transformers_nextflow import ScaleSchedule

MMDIT_STEPS = 18  # the paper's comparison
RASTER_SIDES = (16, 32, 64)
RASTER_SAMPLES = 6  # lengths of the cache at which steps are timed
RASTER_STEPS = 8  # steps timed at each
SHORTEST_CACHE = 16


class Uncached:
    """Next-scale prediction as TokenFlow's own inference does it: each step runs all scales so far again."""

    def __init__(self, model, schedule: ScaleSchedule, device: str):
        self.model, self.schedule, self.device = model, schedule, device

    @torch.no_grad()
    def __call__(self):
        # Both branches are as long, so that no mask is needed beyond the one between scales.
        prompt, offset = make_prompt(2, self.device), self.model.config.text_vocab_size
        codes = prompt.new_empty(1, 0)
        for step, length in enumerate(self.schedule.scale_lengths):
            if step == 0:
                logits = self.model(prompt, logits_to_keep=1, visual_logits=True).logits
            else:
                placed = torch.cat([codes, codes.new_zeros(1, length)], dim=1) + offset
                ids = torch.cat([prompt, placed.expand(2, -1)], dim=1)
                grids = torch.tensor([self.schedule.grid_shw] * 2)
                # The output before a code predicts it: all but the last of the last n_s + 1.
                logits = self.model(ids, grids, logits_to_keep=length + 1, visual_logits=True).logits[:, :-1]
            conditional, unconditional = logits.float()
            drawn = torch.lerp(unconditional, conditional, 5.0).argmax(-1)
            codes = torch.cat([codes, drawn[None]], dim=1)


def make_mmdit(hidden_size: int, num_layers: int, side: int, device: str, dtype: torch.dtype):
    """A step of an MMDiT on `side` x `side` tokens and a prompt, with guidance."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    with torch.device(device):
        transformer = SD3Transformer2DModel(
            sample_size=2 * side,
            patch_size=2,
            in_channels=16,
            num_layers=num_layers,
            attention_head_dim=128,
            num_attention_heads=hidden_size // 128,
            joint_attention_dim=hidden_size,
            caption_projection_dim=hidden_size,
            pooled_projection_dim=hidden_size,
            out_channels=16,
            pos_embed_max_size=2 * side,
        )
    transformer = transformer.to(dtype).eval()
    latents = torch.randn(2, 16, 2 * side, 2 * side, device=device).to(dtype)
    text = torch.randn(2, PROMPT_LENGTH, hidden_size, device=device).to(dtype)
    time = torch.tensor([500.0, 500.0], device=device).to(dtype)

    @torch.no_grad()
    def step():
        transformer(latents, encoder_hidden_states=text, pooled_projections=text[:, 0], timestep=time)

    return step


class Raster:
    """Emu3 at equal width, token by token, with a cache and guidance: single steps at some lengths of the cache."""

    def __init__(self, config, device: str, dtype: torch.dtype):
        torch.manual_seed(0)
        settings = Emu3TextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        with torch.device(device):
            self.model = Emu3ForCausalLM(settings).to(dtype).eval()
        self.device, self.dtype, self.config = device, dtype, settings

    @torch.no_grad()
    def steps_at(self, length: int):
        """A function that runs a few steps on a cache of about `length`."""
        cache, heads = DynamicCache(config=self.config), self.config.num_key_value_heads
        for layer in range(self.config.num_hidden_layers):
            states = torch.randn(2, 2, heads, length, 128, device=self.device).to(self.dtype)
            cache.update(states[0], states[1], layer)

        @torch.no_grad()
        def steps():
            ids = torch.ones(2, 1, dtype=torch.long, device=self.device)
            for _ in range(RASTER_STEPS):
                logits = self.model(ids, cache=cache, use_cache=True).logits[:, -1].float()
                ids = torch.lerp(logits[1:], logits[:1], 5.0).argmax(-1, keepdim=True).repeat(2, 1)
            cache.crop(-RASTER_STEPS)

        steps()
        return steps


def default_steps() -> int:
    """Steps of diffusers' SD3 pipeline if nobody says how many."""
    from diffusers import StableDiffusion3Pipeline

    return inspect.signature(StableDiffusion3Pipeline.__call__).parameters["num_inference_steps"].default


def measure(
    schedule: ScaleSchedule, hidden_size: int, num_layers: int, device: str, dtype: torch.dtype, repeats: int
) -> Iterator[Row]:
    """Seconds of the peers over ours."""
    config = make_config(hidden_size, num_layers)
    model = make_model(config, device, dtype)
    prompt, side = make_prompt(1, device), schedule.grids[-1][0]
    name = f"{schedule.height} x {schedule.width}, {num_layers} layers of {hidden_size}, {dtype}".replace("torch.", "")
    mmdit = make_mmdit(hidden_size, num_layers, side, device, dtype)
    draw(model, prompt, ScaleSchedule(num_scales=8))
    # Without a cache all slots run in one piece under a boolean mask: two sizes below, or it would take minutes.
    uncached = schedule.prefix(schedule.num_scales - 2) if schedule.num_scales > 8 else schedule
    runs = {
        "ours": lambda: draw(model, prompt, schedule),
        "mmdit step": mmdit,
        "ours, uncached size": lambda: draw(model, prompt, uncached, image_top_k=1),
        "uncached": Uncached(model, uncached, device),
    }
    times = alternate(runs, repeats, device)
    spread = {key: Spread.of(values) for key, values in times.items()}
    ours = spread["ours"]
    tokens = side * side
    paper = (
        (12 * tokens * hidden_size**2 + 4 * tokens**2 * hidden_size) * MMDIT_STEPS / schedule.flops(hidden_size, 100)
    )
    for steps, note, target in (
        (MMDIT_STEPS, f"SD3Transformer2DModel; paper's count: {paper:.2f}", ">= 4.5"),
        (default_steps(), "diffusers' default for SD3; derived from the time of a step", ""),
    ):
        theirs = Spread.of([steps * step for step in times["mmdit step"]])
        yield Row(
            f"{name}: MMDiT, {steps} steps ({note})", f"{theirs} s", f"{ours} s", theirs.median / ours.median, target
        )
    yield Row(
        f"no-cache next-scale, {uncached.height} x {uncached.width}",
        f"{spread['uncached']} s",
        f"{spread['ours, uncached size']} s",
        spread["uncached"].median / spread["ours, uncached size"].median,
        ">= 2.5",
    )
    del mmdit, runs
    yield from measure_raster(config, model, device, dtype, repeats, known={schedule: times["ours"]})


def measure_raster(
    config, model, device: str, dtype: torch.dtype, repeats: int, known: dict[ScaleSchedule, list[float]]
) -> Iterator[Row]:
    """Token by token over scale by scale: measured, beside what this machine's rates say, and what an H100's say.

    Steps are timed at a few lengths of the cache, which stand for all of a grid's. `known` has seconds of our runs.
    """
    raster, size = Raster(config, device, dtype), size_of(config)
    machine = Machine(size, device, dtype, repeats)
    # What a step costs whatever it computes is taken from the shortest cache, where all else is known.
    shortest = statistics.median(alternate({"": raster.steps_at(SHORTEST_CACHE)}, repeats, device)[""]) / RASTER_STEPS
    overhead = max(0.0, shortest - machine.token(SHORTEST_CACHE))
    largest_side = max(schedule.grids[-1][0] for schedule in known)
    for side in (side for side in RASTER_SIDES if side <= largest_side):
        schedule = next(s for s in (ScaleSchedule(num_scales=n) for n in range(1, 19)) if s.grids[-1][0] == side)
        lengths = [PROMPT_LENGTH + round(side * side * (i + 0.5) / RASTER_SAMPLES) for i in range(RASTER_SAMPLES)]
        runs = {f"{length}": raster.steps_at(length) for length in lengths}
        if schedule not in known:
            runs["ours"] = lambda schedule=schedule: draw(model, make_prompt(1, device), schedule)
        times = alternate(runs, repeats, device)
        ours = Spread.of(times.pop("ours") if schedule not in known else known[schedule])
        rounds = zip(*times.values(), strict=True)
        theirs = Spread.of([sum(spent) / RASTER_SAMPLES / RASTER_STEPS * side * side for spent in rounds])
        expected = sum(overhead + machine.token(length) for length in lengths) / RASTER_SAMPLES * side * side
        expected_ours = machine.image(schedule, PROMPT_LENGTH)
        on_gpu = [
            floor_seconds(costs, H100.flops, H100.bandwidth)
            for costs in (
                raster_costs(size, side * side, True, dtype.itemsize),
                image_costs(size, schedule, True, 1, dtype.itemsize),
            )
        ]
        yield Row(
            f"raster-scan (Emu3), {side} x {side} codes, from {RASTER_SAMPLES * RASTER_STEPS} tokens: {theirs} s, "
            f"{expected:.3g} predicted, to {ours} s, {expected_ours:.3g} predicted; H100 by count: "
            f"{on_gpu[0] / on_gpu[1]:.0f}",
            f"{theirs.median / ours.median:.3g} times",
            f"{expected / expected_ours:.3g} predicted here",
            theirs.median / ours.median * expected_ours / expected,
            "0.75 to 1.25",
        )
