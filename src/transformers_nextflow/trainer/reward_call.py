"""Calls of reward functions: what they are given, how long they may take, and whether what they return makes sense."""

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
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
        self.bound = function.keywords if isinstance(function, partial) else {}
        self.names = parameters.keys() - self.bound.keys()

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """What the function gets of what is there."""
        if any(given.get("source_images") or ()) and not (self.takes_all or "source_images" in self.names):
            raise ValueError(
                f"The prompts have images, but the reward function `{self.__name__}` can't see them: give it a "
                "parameter `source_images` (or `**kwargs`)."
            )
        hidden = {"masks_of", *self.bound}
        return {n: v for n, v in given.items() if (self.takes_all or n in self.names) and n not in hidden}

    def check(self, output: Any, given: dict[str, Any]) -> list[float | None]:
        """Rewards as TRL takes them."""
        num_images = len(given["images"])
        rewards, masks = output if isinstance(output, RewardOutput) else (output, None)
        for what, values in {"rewards": rewards, "masks": [()] * num_images if masks is None else masks}.items():
            number = len(values) if hasattr(values, "__len__") else type(values).__name__
            if number != num_images:
                raise ValueError(
                    f"The reward function `{self.__name__}` returned {number} {what} for {num_images} images. It must "
                    "return one per image (None where it can't tell)."
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

    @contextmanager
    def explaining(self, num_images: int, timeout_error: type[Exception]) -> Iterator[None]:
        """Names the function in what it raises."""
        try:
            yield
        except timeout_error as error:
            raise TimeoutError(
                f"The reward function `{self.__name__}` took longer than {self.timeout} seconds for {num_images} "
                "images. Raise `reward_timeout` if it may; or see why it hangs."
            ) from error
        except Exception as error:
            raise RuntimeError(
                f"The reward function `{self.__name__}` failed on {num_images} images: {type(error).__name__}: {error}"
            ) from error

    def __call__(self, **given) -> list[float | None]:
        call = partial(self.function, **self.arguments(given))
        with self.explaining(len(given["images"]), CallTimeout), torch.no_grad():
            output = call_with_timeout(call, self.timeout)
        return self.check(output, given)


class AsyncRewardCall(RewardCall):
    """The same for a coroutine function; TRL runs all of these at once."""

    async def __call__(self, **given) -> list[float | None]:  # type: ignore[override]  # what tells TRL to await
        call = partial(self.function, **self.arguments(given))
        with self.explaining(len(given["images"]), asyncio.TimeoutError):
            output = await asyncio.wait_for(call(), self.timeout)
        return self.check(output, given)


def make_reward_call(function: Callable, timeout: float | None) -> RewardCall:
    """The checked call of a function or coroutine function."""
    is_async = callable(function) and is_async_callable(function)
    return (AsyncRewardCall if is_async else RewardCall)(function, timeout)


def call_with_timeout(function: Callable[[], Any], timeout: float | None) -> Any:
    """What a function returns; CallTimeout if that takes longer than `timeout` seconds (it is left behind)."""
    if timeout is None:
        return function()
    outcome: Future[Any] = Future()
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run():
        try:
            # Threads have a current device and a gradient mode of their own.
            if gpu is not None:
                torch.cuda.set_device(gpu)
            with torch.no_grad():
                outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # one that hangs must not keep the process alive
    if not wait([outcome], timeout).done:
        raise CallTimeout
    return outcome.result()
