"""The floor: what FLOPs and bytes alone ask of a GPU. Arithmetic, nothing is run."""

from typing import NamedTuple

from measure import PROMPT_LENGTH, Row

from transformers_nextflow import ScaleSchedule


class Gpu(NamedTuple):
    """Dense peak of a GPU by its data sheet."""

    name: str
    flops: float
    bandwidth: float


H100 = Gpu("H100 SXM, bf16", 989e12, 3.35e12)


class Size(NamedTuple):
    """The numbers of a model that its cost depends on."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    codebook_size: int

    @property
    def layer_parameters(self) -> int:
        """Weights of the linear layers of one layer."""
        key_value = 2 * self.hidden_size * self.hidden_size * self.num_key_value_heads // self.num_heads
        return 2 * self.hidden_size**2 + key_value + 3 * self.hidden_size * self.intermediate_size


SEVEN_B = Size(3584, 18944, 28, 28, 4, 32768)


class Cost(NamedTuple):
    """FLOPs of the linear layers, of the head and of attention, and bytes that must be read or written."""

    linear: float
    head: float
    attention: float
    bytes: float

    @property
    def flops(self) -> float:
        return self.linear + self.head + self.attention

    def __add__(self, other):
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))


def step_cost(size: Size, rows: int, queries: int, keys: int, predicted: int, itemsize: int = 2) -> Cost:
    """A step of `rows` sequences with `queries` slots each on `keys` slots, `predicted` rows of the head in all."""
    weights = size.num_layers * size.layer_parameters
    cache = 2 * size.num_layers * size.hidden_size * size.num_key_value_heads // size.num_heads * itemsize
    head = size.hidden_size * size.codebook_size
    return Cost(
        linear=2 * rows * queries * weights,
        head=2 * predicted * head,
        attention=4 * rows * queries * keys * size.hidden_size * size.num_layers,
        bytes=itemsize * (weights + (head if predicted else 0)) + rows * keys * cache,
    )


def image_costs(
    size: Size, schedule: ScaleSchedule, guided: bool, batch_size: int = 1, itemsize: int = 2
) -> list[Cost]:
    """The prompts' step, and one a scale after the first: guidance doubles the rows, but not those of the head."""
    rows, keys = batch_size * (2 if guided else 1), PROMPT_LENGTH
    costs = [step_cost(size, rows, PROMPT_LENGTH, PROMPT_LENGTH, batch_size, itemsize)]
    for length in schedule.scale_lengths[1:]:
        keys += length
        costs.append(step_cost(size, rows, length, keys, batch_size * length, itemsize))
    return costs


def raster_costs(size: Size, num_codes: int, guided: bool, itemsize: int = 2) -> list[Cost]:
    """The same model token by token: as many steps as codes."""
    rows = 2 if guided else 1
    costs = [step_cost(size, rows, PROMPT_LENGTH, PROMPT_LENGTH, 1, itemsize)]
    return costs + [step_cost(size, rows, 1, PROMPT_LENGTH + i, 1, itemsize) for i in range(1, num_codes)]


def floor_seconds(costs: list[Cost], flops: float, bandwidth: float) -> float:
    """Each step takes as long as its FLOPs or its bytes, whichever is longer."""
    return sum(max(cost.flops / flops, cost.bytes / bandwidth) for cost in costs)


def measure() -> list[Row]:
    """Floor of the 7B's images on an H100, beside the paper's 5 seconds."""
    rows = []
    for side, num_scales in ((256, 12), (512, 16), (1024, 18)):
        schedule = ScaleSchedule(num_scales=num_scales)
        for guided in (True, False):
            costs = image_costs(SEVEN_B, schedule, guided)
            least = floor_seconds(costs, H100.flops, H100.bandwidth)
            total = sum(costs[1:], costs[0])
            read = sum(cost.bytes for cost in costs)
            name = f"7B, {side} x {side}, {'with' if guided else 'without'} guidance, {H100.name}"
            rows.append(
                Row(
                    name,
                    f"{least:.3f} s: {total.flops / 1e12:.0f} TFLOP, {read / 1e9:.0f} GB",
                    "5 s (the paper, 1024)" if side == 1024 else "",
                    5 / least if side == 1024 else 0.0,
                )
            )
            raster = floor_seconds(raster_costs(SEVEN_B, (side // 16) ** 2, guided), H100.flops, H100.bandwidth)
            rows.append(
                Row(f"{name}: token by token", f"{raster:.3g} s", f"{least:.3g} s scale by scale", raster / least)
            )
    return rows
