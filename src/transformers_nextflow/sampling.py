"""Choosing the codes of a scale: guidance, candidates and seeded sampling, as pure functions of tensors.

Letters: B samples, n positions (codes of a scale), K codes of the codebook, H hidden size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from numbers import Real
from typing import Any, NamedTuple

import torch

GUIDANCE_SCHEDULES = ("constant", "linear")

# Logits that exist at once, 64 MB in fp32. Those of the last scale of one 1024 x 1024 image would be 512 MB.
_MAX_LOGITS = 2**24


class ScaleSampling(NamedTuple):
    """How the codes of one scale are chosen.

    Args:
        guidance_scale (`float`): 1 leaves the conditional logits as they are.
        temperature (`float`): Divides the logits, before anything is cut off.
        top_k (`int`): Only the `top_k` likeliest codes may be drawn; 1 is greedy, 0 allows all.
        top_p (`float`): Only the likeliest codes that together reach this probability may be drawn; 1 allows all.
        image_guidance_scale (`float`): Guidance by the prompt's images apart from the text; see [`guide`].
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    image_guidance_scale: float = 1.0


def sampling_plan(
    num_scales: int,
    codebook_size: int,
    guidance_scale: float | None = None,
    guidance_schedule: str = "constant",
    image_guidance_scale: float | None = None,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] | None = None,
    top_p: float | Sequence[float] = 1.0,
    do_sample: bool = True,
) -> list[ScaleSampling]:
    """Spreads the settings of an image over its scales.

    Args:
        num_scales (`int`): Number of scales of the image.
        codebook_size (`int`): K, the most that `top_k` can be.
        guidance_scale (`float`, *optional*): Strength of classifier-free guidance; None or 1 for none.
        guidance_schedule (`str`, *optional*, defaults to `"constant"`):
            `"constant"` guides every scale alike. `"linear"` grows from 1 (no guidance) at the first scale to
            `guidance_scale` at the last: VAR's ramp, whose `cfg` is `guidance_scale - 1`.
        image_guidance_scale (`float`, *optional*): Strength of guidance by the prompt's images, apart from the text.
        temperature, top_k, top_p (a number, or a sequence of one per scale): See [`ScaleSampling`].
        do_sample (`bool`, *optional*, defaults to `True`): False takes the likeliest code everywhere.

    Returns:
        `list[ScaleSampling]`, one per scale.

    Raises:
        `ValueError`: if a temperature, `top_k` or `top_p` is out of range, or a sequence has another length than there
            are scales. The rest is checked by [`NextFlowGenerationConfig`].
    """
    temperatures, top_ks, top_ps = check_candidates(num_scales, codebook_size, temperature, top_k, top_p)
    top_ks = [int(value) if do_sample else 1 for value in top_ks]
    ramp = [
        s / (num_scales - 1) if guidance_schedule == "linear" and num_scales > 1 else 1.0 for s in range(num_scales)
    ]
    text_scales, image_scales = (
        [1.0 + ((1.0 if strength is None else strength) - 1.0) * share for share in ramp]
        for strength in (guidance_scale, image_guidance_scale)
    )
    settings = zip(text_scales, temperatures, top_ks, top_ps, image_scales, strict=True)
    return [ScaleSampling(*values) for values in settings]


def passes_of_scales(
    plan: Sequence[ScaleSampling], later_passes: Sequence[tuple[int, float]]
) -> list[list[ScaleSampling]]:
    """How each pass over each scale is drawn: as planned, then by top-k and top-p of later passes; scale 0 has one."""
    again: list[dict[str, Any]] = [{"top_k": top_k, "top_p": top_p} for top_k, top_p in later_passes]
    return [[first, *(first._replace(**cut) for cut in again[: len(again) * (s > 0)])] for s, first in enumerate(plan)]


def check_candidates(
    num_scales: int | None, codebook_size: int | None, temperature: Any = 1.0, top_k: Any = None, top_p: Any = 1.0
) -> tuple[list[Any], list[Any], list[Any]]:
    """Temperatures, top-k and top-p of each scale; a `ValueError` for what no image (None: of this model) can take."""
    temperatures = _one_a_scale("image_temperature", temperature, num_scales)
    top_ks = _one_a_scale("image_top_k", 0 if top_k is None else top_k, num_scales)
    top_ps = _one_a_scale("image_top_p", top_p, num_scales)
    most = math.inf if codebook_size is None else codebook_size
    if not all(0 < value < math.inf for value in temperatures):
        raise ValueError(
            f"`image_temperature` must be positive and finite, but got {temperature}. For the likeliest codes pass "
            "`do_sample=False`."
        )
    if not all(float(value).is_integer() and 0 <= value <= most for value in top_ks):
        raise ValueError(
            f"`image_top_k` must be a whole number from 1 to {codebook_size or 'K'} (the codebook's size), or 0 for "
            f"no limit, but got {top_k}."
        )
    if not all(0 < value <= 1 for value in top_ps):
        raise ValueError(f"`image_top_p` must be above 0 and at most 1 (no limit), but got {top_p}.")
    return temperatures, top_ks, top_ps


def _one_a_scale(name: str, value: Any, num_scales: int | None) -> list[Any]:
    values = value.tolist() if hasattr(value, "tolist") else value  # arrays and tensors
    values = list(values) if isinstance(values, list | tuple) else [values] * (num_scales or 1)
    if not all(isinstance(number, Real) for number in values):
        raise ValueError(f"`{name}` must be a number, or a list with one per scale, but got {value!r}.")
    if len(values) != num_scales and num_scales is not None:
        raise ValueError(
            f"`{name}` has {len(values)} entries, but the image has {num_scales} scales. Pass one number for all "
            "scales, or one per scale."
        )
    return values


def guide(branches: Sequence[torch.Tensor], sampling: ScaleSampling) -> torch.Tensor:
    """Classifier-free guidance of logits, or of the hidden states that an affine head turns into logits, in float32.

    Two branches, with the text and without it: `without + guidance_scale * (with - without)`. Three branches, with
    text and images, with the images alone, with neither (InstructPix2Pix, arXiv 2211.09800): `neither +
    image_guidance_scale * (images - neither) + guidance_scale * (all - images)`. Either way the weights sum to 1.
    """
    everything, *others = (branch.float() for branch in branches)
    if not others:
        return everything
    guided = torch.lerp(others[0], everything, sampling.guidance_scale)
    if len(others) == 1:
        return guided
    return guided + (sampling.image_guidance_scale - 1) * (others[0] - others[1])


def find_candidates(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes that may be drawn at each position: top-k first, then top-p of what is left.

    Codes that tie for the last of the `top_k` places stay, as in VAR and transformers: which of them a sort puts first
    depends on the machine. (There is room for `top_k + 32` of them.) Top-p keeps a code if the likelier ones together
    have less than `top_p`; the likeliest always stays, without `top_k` so do all ties. Nothing waits for a device.

    Args:
        logits (`torch.Tensor` of shape `(..., K)`): Logits, any temperature applied.
        top_k (`int`, *optional*, defaults to 0): 0 for no limit.
        top_p (`float`, *optional*, defaults to 1.0): 1 for no limit.

    Returns:
        `logits` `(..., k)`, `-inf` where a code is cut off, and the codes `(..., k)` int64 they belong to. With `top_k`
        best first, k at most `2 * top_k + 32`; without it all K codes in their order.
    """
    num_codes = logits.shape[-1]
    if not top_k:
        if top_p < 1:
            probabilities = logits.softmax(-1)
            logits = logits.masked_fill(probabilities < nucleus_floor(probabilities, top_p), -torch.inf)
        return logits, torch.arange(num_codes, device=logits.device).expand_as(logits)
    # Sorting all codes for top-p would be most of sampling's time, so top-k comes first.
    candidates, codes = logits.topk(min(2 * top_k + 32, num_codes))
    candidates = candidates.masked_fill(candidates < candidates[..., top_k - 1 : top_k], -torch.inf)
    if top_p < 1:
        probabilities = candidates.softmax(-1)
        likelier = probabilities.cumsum(-1) - probabilities
        candidates = candidates.masked_fill(likelier >= top_p, -torch.inf)
    return candidates, codes


def nucleus_floor(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest probability that top-p keeps, without a sort: the likelier codes together have less than `top_p`.

    Floats that are not negative are in the order of their bits, so 31 halvings find it exactly.

    Args:
        probabilities (`torch.Tensor` of shape `(..., K)`): float32.
        top_p (`float`): Below 1.

    Returns:
        `torch.Tensor` of shape `(..., 1)`, float32.
    """
    # Too low: as likely as nothing. High enough: the likeliest, of which no code is likelier.
    high = probabilities.amax(-1, keepdim=True).view(torch.int32)
    low = torch.full_like(high, -1)
    for _ in range(31):
        middle = low + (high - low) // 2
        likelier = (probabilities * (probabilities > middle.view(torch.float32))).sum(-1, keepdim=True)
        enough = likelier < top_p
        high, low = torch.where(enough, middle, high), torch.where(enough, low, middle)
    return high.view(torch.float32)


def draw_seeds(
    generators: Sequence[torch.Generator], lengths: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Seeds for the positions of a few scales: all that sampling needs from the generators, which may be on a CPU.

    Args:
        generators (`Sequence[torch.Generator]` of length B): Each serves one sample.
        lengths (`Sequence[int]`): n of each scale; 0 for one that is not drawn.
        device (`torch.device`): The result's device.

    Returns:
        For each scale a `torch.IntTensor` of shape `(B, n, 2)`.
    """
    total, limit = sum(lengths), 2**31
    seeds = [
        torch.randint(-limit, limit, (total, 2), generator=source, device=source.device).to(device)
        for source in generators
    ]
    return torch.stack(seeds).int().split(list(lengths), dim=1)


def gumbel_noise(seeds: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise of (position, code) pairs: a hash of the position's two seeds and the code.

    So the noise is made only where codes may be drawn, is the same on every device, and depends neither on what is cut
    off nor on how positions are sliced.

    Args:
        seeds (`torch.IntTensor` of shape `(..., 2)`): From [`draw_seeds`].
        codes (`torch.LongTensor` of shape `(..., k)`): Codes in question.

    Returns:
        `torch.FloatTensor` of shape `(..., k)`.
    """
    # Multiplication wraps around. The constants are those of Knuth's multiplicative hash and MurmurHash3's finalizer.
    hashed = codes.int().mul(-1640531535).add(seeds[..., :1])
    for key in (seeds[..., 1:], None):
        hashed = _xor_shift(hashed, 16).mul_(-2048144789)
        hashed = _xor_shift(hashed, 13).mul_(-1028477387)
        hashed = _xor_shift(hashed, 16)
        if key is not None:
            hashed += key
    # Above 0 even for 0, and below 1 even where 31 bits are rounded to 24. The finest steps are where noise is largest.
    uniform = (hashed & 0x7FFFFFFF).float().add_(0.5).mul_(2**-31).clamp_(max=1 - 2**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _xor_shift(numbers: torch.Tensor, places: int) -> torch.Tensor:
    """`numbers ^ (numbers >> places)` of int32, with zeros shifted in."""
    return numbers ^ ((numbers >> places) & (2 ** (32 - places) - 1))


def sample_codes(logits: torch.Tensor, sampling: ScaleSampling, seeds: torch.Tensor | None) -> torch.Tensor:
    """Draw codes, in float32.

    The Gumbel-max trick: the noise belongs to (position, code), so logits that differ by the rounding of float32
    (another batch, another kernel) give the same codes, and settings can be compared on the same noise.

    Args:
        logits (`torch.Tensor` of shape `(m, K)`): Guided logits.
        sampling (`ScaleSampling`): Temperature, top-k and top-p; greedy if `top_k` is 1.
        seeds (`torch.IntTensor` of shape `(m, 2)`): From [`draw_seeds`]; not read if greedy.

    Returns:
        `torch.LongTensor` of shape `(m,)`.
    """
    logits = logits.float()
    if sampling.top_k == 1 or seeds is None:
        return logits.argmax(-1)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    candidates, codes = find_candidates(logits, sampling.top_k, sampling.top_p)
    drawn = (candidates + gumbel_noise(seeds, codes)).argmax(-1, keepdim=True)
    return codes.gather(-1, drawn).squeeze(-1)


def draw_codes(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden_states: torch.Tensor,
    sampling: ScaleSampling,
    seeds: torch.Tensor | None,
    num_codes: int,
    num_branches: int = 1,
) -> torch.Tensor:
    """Draws the codes of a scale from its last hidden states, slice by slice: all logits never exist at once.

    Guidance comes before the head: the head is affine and the weights of the branches sum to 1, so one pass of it over
    the guided hidden states gives the guided logits.

    Args:
        head (`Callable`): Hidden states `(m, H)` to logits `(m, K)`; affine.
        hidden_states (`torch.Tensor` of shape `(num_branches * B, n, H)`):
            What the head reads; the branches of [`guide`] one below the other.
        sampling (`ScaleSampling`): See [`sample_codes`].
        seeds (`torch.IntTensor` of shape `(B, n, 2)`, *optional*): From [`draw_seeds`]; None is greedy.
        num_codes (`int`): K.
        num_branches (`int`, *optional*, defaults to 1): How many there are, up to 3.

    Returns:
        `torch.LongTensor` of shape `(B, n)`.
    """
    branches = hidden_states.chunk(num_branches)
    if sampling.guidance_scale == sampling.image_guidance_scale == 1:
        branches = branches[:1]
    positions = branches[0].shape[:2]
    rows = max(1, _MAX_LOGITS // num_codes)
    drawn = []
    for start in range(0, positions.numel(), rows):
        part = slice(start, start + rows)
        guided = guide([branch.flatten(0, 1)[part] for branch in branches], sampling).to(hidden_states.dtype)
        # The head may be on another device than ids and seeds (`device_map`).
        own_seeds = None if seeds is None else seeds.flatten(0, 1)[part].to(guided.device)
        drawn.append(sample_codes(head(guided), sampling, own_seeds))
    return torch.cat(drawn).view(positions)


def make_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, num_samples: int, device: torch.device
) -> list[torch.Generator]:
    """One generator per sample, so that a sample does not depend on its neighbours in the batch.

    Args:
        generator (`torch.Generator` or a sequence of them, *optional*):
            A sequence has one per sample. A single one serves the first sample and seeds the others', so sample i
            has the same one in every batch that holds it. None draws a fresh seed from the operating system.
        num_samples (`int`): B.
        device (`torch.device`): Where a generator is made if none is given.

    Returns:
        `list[torch.Generator]` of length B. The global random state is never read or written.
    """
    if isinstance(generator, Sequence):
        if len(generator) != num_samples:
            raise ValueError(
                f"Got {len(generator)} generators for {num_samples} images. Pass one, or one per image (number of "
                "prompts times images per prompt)."
            )
        if all(isinstance(of_one, torch.Generator) for of_one in generator):
            return list(generator)
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(
            f"`generator` must be a `torch.Generator` or a list of them, but got {type(generator).__name__}. For a "
            "seed pass `torch.Generator().manual_seed(seed)`."
        )
    if generator is None:
        generator = torch.Generator(device)
        generator.seed()
    return list(islice(spread_generator(generator), num_samples))


def spread_generator(generator: torch.Generator) -> Iterator[torch.Generator]:
    """Endlessly generators of samples: the given one for the first, and others that it seeds."""
    # A copy hands out the seeds: the given generator must serve the first sample as if it were alone.
    seeder = torch.Generator(generator.device)
    seeder.set_state(generator.get_state())
    yield generator
    while True:
        seed = int(torch.randint(2**63 - 1, (), generator=seeder, device=seeder.device))
        yield torch.Generator(generator.device).manual_seed(seed)
