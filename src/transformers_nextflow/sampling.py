"""Choosing the codes of a scale: guidance, candidates and seeded sampling, as pure functions of tensors.

Letters: B samples, n positions (codes of a scale), K codes of the codebook.
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch

GUIDANCE_SCHEDULES = ("constant", "linear")

# Logits that are drawn from at once, 64 MB in fp32. Those of the last scale of one 1024 x 1024 image are 512 MB, and
# guiding, cutting off and drawing make several copies.
_MAX_LOGITS = 2**24


class ScaleSampling(NamedTuple):
    """How the codes of one scale are chosen.

    Args:
        guidance_scale (`float`): 1 leaves the conditional logits as they are.
        temperature (`float`): Divides the logits, before anything is cut off.
        top_k (`int`): Only the `top_k` likeliest codes may be drawn; 1 is greedy, 0 allows all.
        top_p (`float`): Only the likeliest codes that together reach this probability may be drawn; 1 allows all.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def sampling_plan(
    num_scales: int,
    codebook_size: int,
    guidance_scale: float | None = None,
    guidance_schedule: str = "constant",
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] | None = None,
    top_p: float | Sequence[float] = 1.0,
    do_sample: bool = True,
) -> list[ScaleSampling]:
    """Spread the settings of an image over its scales.

    Args:
        num_scales (`int`): Number of scales of the image.
        codebook_size (`int`): K, the most that `top_k` can be.
        guidance_scale (`float`, *optional*): Strength of classifier-free guidance; None or 1 for none.
        guidance_schedule (`str`, *optional*, defaults to `"constant"`):
            `"constant"` guides every scale alike. `"linear"` grows from 1 (no guidance) at the first scale to
            `guidance_scale` at the last: VAR's ramp, whose `cfg` is `guidance_scale - 1`.
        temperature, top_k, top_p (a number, or a sequence of one a scale): See [`ScaleSampling`].
        do_sample (`bool`, *optional*, defaults to `True`): False takes the likeliest code everywhere.

    Returns:
        `list[ScaleSampling]`, one a scale.

    Raises:
        `ValueError`: if a value is out of range, or a sequence has another length than there are scales.
    """
    if guidance_schedule not in GUIDANCE_SCHEDULES:
        legal = " or ".join(f'"{name}"' for name in GUIDANCE_SCHEDULES)
        raise ValueError(f'`guidance_schedule` must be {legal}, but got "{guidance_schedule}".')
    strength = 1.0 if guidance_scale is None else guidance_scale
    if not 0 <= strength < math.inf:
        raise ValueError(
            f"`guidance_scale` must be at least 0 and finite (1 turns guidance off), but got {guidance_scale}."
        )
    temperatures = _one_a_scale("image_temperature", temperature, num_scales)
    top_ks = _one_a_scale("image_top_k", 0 if top_k is None else top_k, num_scales)
    top_ps = _one_a_scale("image_top_p", top_p, num_scales)
    if not all(0 < value < math.inf for value in temperatures):
        raise ValueError(
            f"`image_temperature` must be positive and finite, but got {temperature}. For the likeliest codes pass "
            "`do_sample=False`."
        )
    if not all(float(value).is_integer() and 0 <= value <= codebook_size for value in top_ks):
        raise ValueError(
            f"`image_top_k` must be a whole number from 1 to {codebook_size} (the codebook's size), or 0 for no limit, "
            f"but got {top_k}."
        )
    if not all(0 < value <= 1 for value in top_ps):
        raise ValueError(f"`image_top_p` must be above 0 and at most 1 (no limit), but got {top_p}.")
    top_ks = [int(value) if do_sample else 1 for value in top_ks]
    ramp = [
        s / (num_scales - 1) if guidance_schedule == "linear" and num_scales > 1 else 1.0 for s in range(num_scales)
    ]
    guidance_scales = [1.0 + (strength - 1.0) * share for share in ramp]
    return [ScaleSampling(*values) for values in zip(guidance_scales, temperatures, top_ks, top_ps, strict=True)]


def _one_a_scale(name: str, value: Any, num_scales: int) -> list[Any]:
    values = value.tolist() if hasattr(value, "tolist") else value  # arrays and tensors
    values = list(values) if isinstance(values, list | tuple) else [values] * num_scales
    if not all(isinstance(number, Real) for number in values):
        raise ValueError(f"`{name}` must be a number, or a list of one number a scale, but got {value!r}.")
    if len(values) != num_scales:
        raise ValueError(
            f"`{name}` has {len(values)} entries, but the image has {num_scales} scales. Pass one number for all "
            "scales, or one a scale."
        )
    return values


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance, `unconditional + guidance_scale * (conditional - unconditional)`, in float32."""
    return torch.lerp(unconditional.float(), conditional.float(), guidance_scale)


def find_candidates(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes that may be drawn at each position: top-k first, then top-p of what is left.

    All codes that tie for the last of the `top_k` places stay, as in VAR and transformers: which of them a sort puts
    first depends on the machine. Top-p keeps a code if the likelier ones together have less than `top_p`; the
    likeliest always stays.

    Args:
        logits (`torch.Tensor` of shape `(..., K)`): Logits, any temperature applied.
        top_k (`int`, *optional*, defaults to 0): 0 for no limit.
        top_p (`float`, *optional*, defaults to 1.0): 1 for no limit.

    Returns:
        `logits` `(..., k)`, best first, `-inf` where a code is cut off, and the codes `(..., k)` int64 they belong to.
        k is a little more than `top_k`; K without it.
    """
    num_codes = logits.shape[-1]
    # Sorting all codes for top-p would be most of sampling's time, so top-k comes first, with one more to see ties.
    candidates, codes = logits.topk(min(top_k + 1, num_codes) if top_k else num_codes)
    if 0 < top_k < num_codes:
        last = candidates[..., top_k - 1 : top_k]
        if (candidates[..., top_k:] == last).any():
            candidates, codes = logits.topk(int((logits >= last).sum(-1).max()))
        candidates = candidates.masked_fill(candidates < last, -torch.inf)
    if top_p < 1:
        probabilities = candidates.softmax(-1)
        likelier = probabilities.cumsum(-1) - probabilities
        candidates = candidates.masked_fill(likelier >= top_p, -torch.inf)
    return candidates, codes


def sample_codes(logits: torch.Tensor, sampling: ScaleSampling, generator: torch.Generator) -> torch.Tensor:
    """Draw the codes of one sample's scale, in float32.

    The Gumbel-max trick: the noise belongs to (position, code), so logits that differ by rounding alone (another batch,
    another kernel) give the same codes, and settings can be compared on the same noise.

    Args:
        logits (`torch.Tensor` of shape `(n, K)`): Guided logits.
        sampling (`ScaleSampling`): Temperature, top-k and top-p; greedy if `top_k` is 1.
        generator (`torch.Generator`): Source of all randomness, on any device; untouched if greedy.

    Returns:
        `torch.LongTensor` of shape `(n,)`.
    """
    logits = logits.float()
    if sampling.top_k == 1:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    uniform = torch.rand(logits.shape, generator=generator, device=generator.device).to(logits.device)
    if not sampling.top_k and sampling.top_p == 1:
        return (logits - torch.log(-torch.log(uniform))).argmax(-1)
    candidates, codes = find_candidates(logits, sampling.top_k, sampling.top_p)
    drawn = (candidates - torch.log(-torch.log(uniform.gather(-1, codes)))).argmax(-1, keepdim=True)
    return codes.gather(-1, drawn).squeeze(-1)


def draw_codes(
    conditional: torch.Tensor,
    unconditional: torch.Tensor | None,
    sampling: ScaleSampling,
    generator: torch.Generator,
) -> torch.Tensor:
    """Guide the logits of one sample's scale and draw its codes, a slice of positions at a time to save memory.

    Args:
        conditional (`torch.Tensor` of shape `(n, K)`): Logits.
        unconditional (`torch.Tensor` of shape `(n, K)`, *optional*): What guidance leads away from; None for none.
        sampling (`ScaleSampling`): See [`sample_codes`].
        generator (`torch.Generator`): See [`sample_codes`].

    Returns:
        `torch.LongTensor` of shape `(n,)`.
    """
    rows = max(1, _MAX_LOGITS // conditional.shape[-1])
    if unconditional is None:
        slices = iter(conditional.split(rows))
    else:
        pairs = zip(conditional.split(rows), unconditional.split(rows), strict=True)
        slices = (guide(with_prompt, without, sampling.guidance_scale) for with_prompt, without in pairs)
    return torch.cat([sample_codes(logits, sampling, generator) for logits in slices])


def make_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, num_samples: int, device: torch.device
) -> list[torch.Generator]:
    """One generator a sample, so that a sample does not depend on its neighbours in the batch.

    Args:
        generator (`torch.Generator` or a sequence of them, *optional*):
            A sequence has one a sample. A single one serves the first sample itself and seeds the others', so sample i
            is the same in every batch that holds it. None draws a fresh seed from the operating system.
        num_samples (`int`): B.
        device (`torch.device`): Where a generator is made if none is given.

    Returns:
        `list[torch.Generator]` of length B. The global random state is never read or written.
    """
    if isinstance(generator, Sequence):
        if len(generator) != num_samples:
            raise ValueError(
                f"Got {len(generator)} generators for {num_samples} images. Pass one, or one an image (number of "
                "prompts times `num_return_sequences`)."
            )
        return list(generator)
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(
            f"`generator` must be a `torch.Generator` or a list of them, but got {type(generator).__name__}. For a "
            "seed pass `torch.Generator().manual_seed(seed)`."
        )
    if generator is None:
        generator = torch.Generator(device)
        generator.seed()
    # A copy hands out the seeds: the given generator must serve the first sample as if it were alone.
    seeder = torch.Generator(generator.device)
    seeder.set_state(generator.get_state())
    seeds = [int(torch.randint(2**63 - 1, (), generator=seeder, device=seeder.device)) for _ in range(num_samples - 1)]
    return [generator, *(torch.Generator(generator.device).manual_seed(seed) for seed in seeds)]
