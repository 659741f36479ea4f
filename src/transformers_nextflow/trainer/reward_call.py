"""Calls of reward functions: what they are given, how long they may take, and whether what they return makes sense."""

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from trl.trainer.utils import get_callable_name, is_async_callable


class RewardOutput(NamedTuple):
    """What a reward function may return instead of a list of numbers.

    Args:
        rewards (sequence of `float`): One per image, higher is better; None where it can't tell.
        masks (sequence of arrays of shape `(H, W)`):
            For each image the pixels that decide its reward, at any resolution; None for all of them.
    """

    rewards: Sequence[float | None]
    masks: Sequence[Any]


class CallTimeout(Exception):
    """A function took longer than it may (and did not itself raise a TimeoutError)."""


class RewardCall:
    """A reward function with its checks. Masks that it returns are put into the list that the call gets as `masks_of`.

    A function gets `images`, `prompts`, the columns of the data set and what else TRL passes, as far as its signature
    names them (or all with `**kwargs`).
    """

    def __init__(self, function: Callable, timeout: float | None):
        if isinstance(function, str | nn.Module):
            raise TypeError(
                f"A reward must be a function of images, but got {function!r}. A reward model over text sees none; for "
                "a CLIP-like model use `partial(image_text_reward, model=..., processor=...)`."
            )
        if not callable(function):
            raise TypeError(f"A reward must be a function, but got {type(function).__name__}.")
        self.function, self.timeout = function, timeout
        self.__name__ = get_callable_name(function)
        parameters = inspect.signature(function).parameters
        self.takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        bound = function.keywords if isinstance(function, partial) else {}
        self.names = parameters.keys() - bound.keys()

    def takes(self, name: str) -> bool:
        return self.takes_all or name in self.names

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        bound = self.function.keywords if isinstance(self.function, partial) else {}
        if any(given.get("source_images") or ()) and not self.takes("source_images"):
            raise ValueError(
                f"The prompts have images, but the reward function `{self.__name__}` can't see them: give it a "
                "parameter `source_images` (or `**kwargs`)."
            )
        hidden = {"masks_of", *bound}
        return {name: value for name, value in given.items() if self.takes(name) and name not in hidden}

    def check(self, output: Any, given: dict[str, Any]) -> list[float | None]:
        """Rewards as TRL takes them."""
        num_images = len(given["images"])
        rewards: Any
        masks: Any
        rewards, masks = output if isinstance(output, RewardOutput) else (output, None)
        for what, values in (("rewards", rewards), ("masks", masks)):
            if what == "masks" and values is None:
                continue
            if not hasattr(values, "__len__") or len(values) != num_images:
                number = len(values) if hasattr(values, "__len__") else type(values).__name__
                raise ValueError(
                    f"The reward function `{self.__name__}` returned {number} {what} for {num_images} images. It must "
                    "return one an image (None where it can't tell)."
                )
        rewards = [None if reward is None else float(reward) for reward in rewards]
        for index, reward in enumerate(rewards):
            if reward is not None and not math.isfinite(reward):
                raise ValueError(
                    f"The reward function `{self.__name__}` returned {reward} for image {index}. Rewards must be "
                    "finite; return None for an image that it can't judge."
                )
        if masks is not None and "masks_of" in given:
            given["masks_of"][0].append(list(masks))  # TRL makes a column of it, one and the same list a row
        return rewards

    def explain(self, error: BaseException, num_images: int) -> RuntimeError:
        return RuntimeError(
            f"The reward function `{self.__name__}` failed on {num_images} images: {type(error).__name__}: {error}"
        )

    def late(self, num_images: int) -> TimeoutError:
        return TimeoutError(
            f"The reward function `{self.__name__}` took longer than {self.timeout} seconds for {num_images} images. "
            "Raise `reward_timeout` if it may; or see why it hangs."
        )

    def __call__(self, **given) -> list[float | None]:
        arguments, num_images = self.arguments(given), len(given["images"])
        try:
            with torch.no_grad():
                output = call_with_timeout(partial(self.function, **arguments), self.timeout)
        except CallTimeout as error:
            raise self.late(num_images) from error
        except Exception as error:
            raise self.explain(error, num_images) from error
        return self.check(output, given)


class AsyncRewardCall(RewardCall):
    """The same for a coroutine function; TRL runs all of these at once."""

    async def __call__(self, **given) -> list[float | None]:  # type: ignore[override]  # what tells TRL to await
        arguments, num_images = self.arguments(given), len(given["images"])
        try:
            output = await asyncio.wait_for(self.function(**arguments), self.timeout)
        except (TimeoutError, asyncio.TimeoutError) as error:  # two classes before Python 3.11
            raise self.late(num_images) from error
        except Exception as error:
            raise self.explain(error, num_images) from error
        return self.check(output, given)


def make_reward_call(function: Callable, timeout: float | None) -> RewardCall:
    """The checked call of a function or coroutine function."""
    is_async = callable(function) and is_async_callable(function)
    return (AsyncRewardCall if is_async else RewardCall)(function, timeout)


def call_with_timeout(function: Callable[[], Any], timeout: float | None) -> Any:
    """What a function returns; CallTimeout if that takes longer than `timeout` seconds (it is left behind)."""
    if timeout is None:
        return function()
    outcome: dict[str, Any] = {}
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run():
        try:
            # Threads have a current device and a gradient mode of their own.
            if gpu is not None:
                torch.cuda.set_device(gpu)
            with torch.no_grad():
                outcome["value"] = function()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)  # one that hangs must not keep the process alive
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise CallTimeout
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


__all__ = ["AsyncRewardCall", "RewardCall", "RewardOutput", "call_with_timeout", "make_reward_call"]
