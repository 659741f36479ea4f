"""TokenFlow's decoding with and without a cache, at the same widths, on random weights.

    python benchmarks/plain_tokenflow.py --hidden-size 512 --num-layers 8

`plain_codes` is TokenFlow's way, written anew from its description: at every step (a scale, or one more pass over it)
the prompt and all slots so far run through all layers. The same function is the slow double of the tests.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from transformers_nextflow import TokenFlowConfig, TokenFlowForCausalLM

Draw = Callable[[torch.Tensor, int, int], torch.Tensor]


def greedy(logits: torch.Tensor, scale: int, number: int) -> torch.Tensor:
    return logits.argmax(-1)


@torch.no_grad()
def plain_embeds(model: Any, prompt: torch.Tensor, codes: torch.Tensor, scale: int, own_map: bool) -> torch.Tensor:
    """Input slots `(L + n, H)` of a prompt `(L,)` that opens an image, and of its scales up to `scale`."""
    net, sides = model.model, model.config.scale_sides
    vectors = net.visual_codebook.weight[codes].float()
    embeds = net.embed_tokens.weight[prompt] + net.scale_embedding.weight[0]
    embeds[-1] += net.position_embedding.weight[0]
    rows, start, total = [embeds], 0, torch.zeros(1, vectors.shape[1], 1, 1)
    for s in range(scale + 1):
        n = sides[s] ** 2
        if s:
            total = F.interpolate(total, (sides[s], sides[s]), mode="bicubic", align_corners=False)
        own = vectors[start : start + n].T.reshape(1, -1, sides[s], sides[s]) if len(codes) >= start + n else 0
        shown = total + own if own_map and s == scale else total
        if s:
            slots = net.connector(shown.flatten(2)[0].T)
            rows.append(slots + net.scale_embedding.weight[s] + net.position_embedding.weight[start : start + n])
        total = total + own
        start += n
    return torch.cat(rows)


@torch.no_grad()
def plain_logits(model: Any, embeds: torch.Tensor, length: int, scale: int) -> torch.Tensor:
    """Logits `(n_s, K)` of the codes of a scale, from all slots `(L + n, H)` of one sequence."""
    config, net = model.config, model.model
    scales = torch.cat([torch.full((side**2,), s) for s, side in enumerate(config.scale_sides[: scale + 1])])
    order = torch.cat([torch.arange(length - 1), length - 1 + scales])  # what a slot may see does not come after it
    mask = (order[:, None] >= order)[None, None]
    positions = torch.arange(len(embeds), dtype=torch.float32).expand(3, 1, -1)
    rotary = net.rotary_emb(embeds[None], positions)
    hidden = embeds[None]
    for layer in net.layers:
        hidden = layer(hidden, position_embeddings=rotary, attention_mask=mask, is_causal=False)
    own = net.norm(hidden)[0, -(config.scale_sides[scale] ** 2) :]
    return F.linear(own, model.lm_head.weight[config.text_vocab_size :])


def plain_codes(
    model: Any, prompt: torch.Tensor, negative: torch.Tensor, guidance: float, num_passes: int = 1, draw: Draw = greedy
) -> tuple[torch.Tensor, int]:
    """Codes `(N,)` of an image, and how many slots went through the layers.

    Args:
        model ([`TokenFlowForCausalLM`]): In float32.
        prompt, negative (`torch.LongTensor` of shape `(L,)`): Both end with the ids that open an image.
        guidance (`float`): TokenFlow's `cfg`; t grows with the scale, logits are `(1 + t) * prompt - t * negative`.
        num_passes (`int`, *optional*, defaults to 1): Passes over each scale but the first.
        draw (callable, *optional*): Chooses codes of logits `(n_s, K)`, the scale and the pass.
    """
    sides = model.config.scale_sides
    codes, num_slots = torch.empty(0, dtype=torch.long), 0
    for scale in range(len(sides)):
        strength, known = guidance * scale / (len(sides) - 1), codes
        for number in range(num_passes if scale else 1):
            logits = []
            for text in (prompt, negative):
                embeds = plain_embeds(model, text, codes, scale, own_map=number > 0)
                logits.append(plain_logits(model, embeds, len(text), scale))
                num_slots += len(embeds)
            codes = torch.cat([known, draw((1 + strength) * logits[0] - strength * logits[1], scale, number)])
    return codes, num_slots


def cached_slots(config: TokenFlowConfig, lengths: Sequence[int], num_passes: int = 1) -> int:
    """Slots that go through the layers with a cache: each once, and those of a scale again in each further pass."""
    images = config.schedule().num_tokens - 1
    return sum(length + images * num_passes for length in lengths)


def build(hidden_size: int, num_layers: int) -> TokenFlowForCausalLM:
    """A model of random weights with TokenFlow's schedule and a small vocabulary."""
    torch.manual_seed(0)
    config = TokenFlowConfig(
        vocab_size=1000 + 4096,
        text_vocab_size=1000,
        visual_codebook_size=4096,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, hidden_size // 64),
        image_start_ids=[5, 6, 7],
        image_end_ids=[9, 10],
        pad_token_id=999,
    )
    return TokenFlowForCausalLM(config).eval()


def measure(model: TokenFlowForCausalLM, length: int, num_passes: int, repeats: int) -> dict[str, float]:
    """Seconds of CPU (medians, both ways in turn) and slots of one guided image, for each way."""
    generator = torch.Generator().manual_seed(0)
    prompt, negative = (torch.randint(20, 900, (length,), generator=generator) for _ in range(2))
    for text in (prompt, negative):
        text[-3:] = torch.tensor(model.config.image_start_ids)
    settings = dict(guidance_scale=8.5, guidance_schedule="linear", do_sample=False, return_dict_in_generate=True)
    seconds: dict[str, list[float]] = {"plain": [], "cached": []}
    for _ in range(repeats):
        start = time.process_time()
        expected, num_slots = plain_codes(model, prompt, negative, 7.5, num_passes)
        middle = time.process_time()
        output = model.generate(
            prompt[None], negative_prompt_ids=negative[None], num_passes=num_passes, return_cache=False, **settings
        )
        seconds["cached"].append(time.process_time() - middle)
        seconds["plain"].append(middle - start)
        same = float((output.image_codes[0] == expected).float().mean())
    counts = {"plain_slots": num_slots, "cached_slots": cached_slots(model.config, [length, length], num_passes)}
    return {**{way: statistics.median(times) for way, times in seconds.items()}, **counts, "same_codes": same}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=131, help="tokens, as TokenFlow pads them (128 + <img>)")
    parser.add_argument("--passes", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    model = build(options.hidden_size, options.num_layers)
    print("| passes | plain, s | cached, s | ratio | plain slots | cached slots | ratio | equal codes |")
    print("|---|---|---|---|---|---|---|---|")
    for num_passes in options.passes:
        row = measure(model, options.prompt_length, num_passes, options.repeats)
        print(
            f"| {num_passes} | {row['plain']:.2f} | {row['cached']:.2f} | {row['plain'] / row['cached']:.2f} | "
            f"{row['plain_slots']} | {row['cached_slots']} | {row['plain_slots'] / row['cached_slots']:.2f} | "
            f"{row['same_codes']:.1%} |"
        )


if __name__ == "__main__":
    main()
