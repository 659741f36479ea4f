"""What the stages of a recipe cost: tokens, FLOPs, memory of a GPU, hours. Arithmetic, nothing is run.

    python -m transformers_nextflow.trainer.plan --recipe examples/recipes/7b-paper --gpus 256

The kinds' images and tokens of text (`KINDS`) are assumptions; with them the paper's own samples come to the 6 trillion
tokens that it says it was trained on.

A recipe's `recipe.yaml` says under `model` what the language model is (fields of `NextFlowConfig`), and under `budget`
of a stage what it trains on:

    budget:
      samples: {text: 700e6, text_to_image: 345e6, editing: 20e6}
      num_scales: 16
      trains: all  # or alignment, or grpo: its samples are pictures that are drawn
    budget: {pictures: 3.2e6, size: 256, batch: 32}  # of an image tokenizer, whose fields are under `image_tokenizer`

FLOPs are those of the model's own matrices and of attention, where `q` new tokens see `kv`. Training takes three times
the forward pass, with activation checkpointing four times; GRPO draws with guidance, which is two more, and asks the
reference, one more. Memory is what must be held: weights, gradients and Adam's two moments in float32, a layer's
activations, and one chunk of logits (GRPO: and the reference). Of image tokenizers torch counts the FLOPs and what
autograd keeps, on tensors without data; teacher and critic are not in it.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils.flop_counter import FlopCounterMode

from ..configuration_nextflow import NextFlowConfig, NextFlowImageTokenizerConfig
from ..linear_cross_entropy import chunk_rows
from ..modeling_nextflow import NextFlowForCausalLM
from ..modeling_nextflow_image_tokenizer import NextFlowImageTokenizer
from ..scale_schedule import ScaleSchedule

# Images of a sample of each kind, and its tokens of text: prompts and answers of the kind that is usual.
KINDS = {
    "text": (0, 800),
    "text_to_image": (1, 80),
    "image_to_text": (1, 160),
    "editing": (2, 60),
    "interleaved": (4, 600),
}
PEAKS = {"h100": 989e12, "a100": 312e12, "l40s": 362e12, "rtx4090": 165e12}  # dense bf16, data sheets
PASSES = {"all": 4, "alignment": 4, "grpo": 7}  # in units of a forward pass
STATE_BYTES = 16  # of a trained weight: itself, its gradient, two moments, all float32


@dataclass(frozen=True)
class StageCost:
    """What a stage costs in all, and what a GPU must hold.

    Attributes:
        samples, tokens (`float`): Of the whole stage.
        flops (`float`): Of the whole stage, forward, backward and recomputation.
        memory (`float`): Bytes of a GPU.
    """

    samples: float
    tokens: float
    flops: float
    memory: float

    def hours(self, gpus: int, peak: float, utilisation: float) -> float:
        """Wall-clock hours on so many GPUs, of which each does that share of its peak."""
        return self.flops / (gpus * peak * utilisation) / 3600


def count_parameters(config: NextFlowConfig) -> dict[str, int]:
    """Weights of the layers' matrices, of the head, of what alignment trains, of all, counted on the meta device."""
    with torch.device("meta"):
        model = NextFlowForCausalLM(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.ndim > 1}
    layers = sum(size for name, size in sizes.items() if ".layers." in name)
    # Of the two large matrices alignment trains single rows, but gradients and moments are whole.
    parts = ("model.connector.", "model.scale_embedding.", "model.embed_tokens.", "lm_head.")
    new = sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith(parts))
    return {"layers": layers, "head": sizes["lm_head.weight"], "alignment": new, "all": model.num_parameters()}


def sample_flops(config: NextFlowConfig, parameters: Mapping[str, int], blocks: Sequence[int]) -> float:
    """Forward FLOPs of one sequence, block by block; the head is computed for every token."""
    total = kv = 0.0
    for q in blocks:
        kv += q
        total += 2 * q * parameters["layers"] + 4 * config.num_hidden_layers * q * kv * config.hidden_size
    return total + 2 * kv * parameters["head"]


def stage_cost(
    config: NextFlowConfig, budget: Mapping[str, Any], gpus: int = 1, row: int = 32_768, sharded: bool = True
) -> StageCost:
    """The cost of a stage.

    Args:
        config ([`NextFlowConfig`]): The language model's.
        budget (`dict`): `samples` of each kind, `num_scales`, `trains` (`"all"`, `"alignment"`, `"grpo"`).
        gpus (`int`, *optional*, defaults to 1): Over which weights, gradients and moments are cut if `sharded`.
        row (`int`, *optional*, defaults to 32768): Tokens of a pack, which a GPU computes at once.

    Raises:
        `ValueError`: for kinds, stages and fields that there are not.
    """
    if unknown := set(budget) - {"samples", "num_scales", "trains"}:
        raise ValueError(f"A budget has samples, num_scales and trains, not {', '.join(sorted(unknown))}.")
    samples = {kind: float(number) for kind, number in budget["samples"].items()}
    if unknown := set(samples) - set(KINDS):
        raise ValueError(f"Samples are {', '.join(KINDS)}, not {', '.join(sorted(unknown))}.")
    if (trains := budget.get("trains", "all")) not in PASSES:
        raise ValueError(f"`trains` is {', '.join(PASSES)}, not {trains}.")
    if trains == "grpo" and samples.keys() != {"text_to_image"}:
        raise ValueError(f"GRPO draws: its samples are text_to_image, not {', '.join(samples)}.")
    scales = ScaleSchedule(num_scales=int(budget.get("num_scales", config.num_scales))).scale_lengths
    parameters = count_parameters(config)
    tokens = flops = 0.0
    for kind, number in samples.items():
        images, text = KINDS[kind]
        blocks = [text + images, *(length for _ in range(images) for length in scales)]
        tokens += number * sum(blocks)
        flops += number * sample_flops(config, parameters, blocks)
    shards = gpus if sharded else 1
    if trains == "alignment":  # FSDP would cut the rows apart: weights are whole, the rest is sharded as by ZeRO-2
        weights = 4 * parameters["all"] + (STATE_BYTES - 4) * parameters["alignment"] / shards
    else:
        weights = (STATE_BYTES + 4 * (trains == "grpo")) * parameters["all"] / shards
    layer = 2 * row * (config.hidden_size * 8 + config.intermediate_size * 3)  # bf16, inside of one layer
    kept = 2 * row * config.hidden_size * config.num_hidden_layers  # bf16, between layers
    logits = 4 * chunk_rows(config.vocab_size) * config.vocab_size
    memory = weights + layer + kept + logits
    return StageCost(sum(samples.values()), tokens, PASSES[trains] * flops, memory)


def image_tokenizer_cost(config: NextFlowImageTokenizerConfig, budget: Mapping[str, Any]) -> StageCost:
    """The cost of a stage of the image tokenizer, all of it trained, every GPU with all weights.

    Args:
        config ([`NextFlowImageTokenizerConfig`]): The image tokenizer's.
        budget (`dict`): `pictures`, their `size` in pixels (squares), `batch` of a GPU.

    Raises:
        `ValueError`: for fields that there are not, and for semantic encoders that can't be counted without data.
    """
    if unknown := set(budget) - {"pictures", "size", "batch"}:
        raise ValueError(f"A budget of pictures has pictures, size and batch, not {', '.join(sorted(unknown))}.")
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    side = int(budget["size"])
    with torch.device("meta"):
        model = NextFlowImageTokenizer(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        pixels = torch.zeros(1, 3, side, side)
        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            try:
                output = model(pixels)
            except DataDependentOutputException as error:
                raise ValueError(
                    "SigLIP2, in the encoder or where `semantic_decoder_grid_size` is None, looks at numbers, so this "
                    "image tokenizer can't be counted without data."
                ) from error
        own = {id(parameter.untyped_storage()) for parameter in model.parameters()}
        codes = output.codes.shape[-1]
    pictures, weights = float(budget["pictures"]), model.num_parameters()
    activations = sum(size for name, size in kept.items() if name not in own) / 2  # bf16
    memory = STATE_BYTES * weights + activations * int(budget.get("batch", 1))
    return StageCost(pictures, pictures * codes, 3 * pictures * counter.get_total_flops(), memory)


def read_recipe(folder: Path) -> tuple[NextFlowConfig, dict[str, Mapping[str, Any]]]:
    """The language model of a recipe, and the budgets of the stages that have one."""
    recipe = _read(folder)
    budgets = {name: stage["budget"] for name, stage in recipe["stages"].items() if "budget" in stage}
    return NextFlowConfig(**recipe["model"]), budgets


def read_image_tokenizer(folder: Path) -> NextFlowImageTokenizerConfig:
    """The image tokenizer of a recipe."""
    return NextFlowImageTokenizerConfig(**_read(folder).get("image_tokenizer", {}))


def _read(folder: Path) -> dict[str, Any]:
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    if "model" not in recipe:
        raise ValueError(f"{folder} does not say what its `model` is, so its stages can't be planned.")
    return recipe


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", type=Path, required=True, help="its folder")
    parser.add_argument("--gpu", choices=sorted(PEAKS), default="h100")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the GPU's peak, an assumption")
    parser.add_argument("--row", type=int, default=32_768, help="tokens of a pack")
    parser.add_argument("--no-sharding", action="store_true", help="DDP: every GPU holds all weights")
    options = parser.parse_args(arguments)
    config, budgets = read_recipe(options.recipe)
    print(f"{count_parameters(config)['all'] / 1e9:.2f} billion weights; {options.gpus} x {options.gpu} at ", end="")
    print(f"{options.utilisation:.0%} of {PEAKS[options.gpu] / 1e12:.0f} TFLOP/s, packs of {options.row} tokens\n")
    print("| stage | samples | tokens | FLOPs | steps | GB a GPU | hours |\n|---|---:|---:|---:|---:|---:|---:|")
    for name, budget in budgets.items():
        if "pictures" in budget:
            cost = image_tokenizer_cost(read_image_tokenizer(options.recipe), budget)
            steps = cost.samples / (budget.get("batch", 1) * options.gpus)
        else:
            cost = stage_cost(config, budget, options.gpus, options.row, not options.no_sharding)
            steps = cost.tokens / (options.row * options.gpus)
        hours = cost.hours(options.gpus, PEAKS[options.gpu], options.utilisation)
        print(
            f"| {name} | {cost.samples / 1e6:,.1f} M | {cost.tokens / 1e9:,.1f} B | {cost.flops:.2e} | {steps:,.0f} "
            f"| {cost.memory / 2**30:.1f} | {hours:,.1f} |"
        )


if __name__ == "__main__":
    main()
