"""What settings may be: tables of legal values instead of a sentence for each."""

from collections.abc import Callable, Iterable
from typing import Any

Legal = tuple[Callable[[Any], bool], str]  # a test, and what passes it in words

AT_LEAST_0: Legal = (lambda value: value >= 0, "at least 0")
AT_LEAST_1: Legal = (lambda value: value >= 1, "at least 1")
POSITIVE: Legal = (lambda value: value > 0, "positive")
SHARE: Legal = (lambda value: 0 <= value <= 1, "between 0 and 1")

COMPILATION = {"torch_compile": False, "torch_compile_backend": None, "torch_compile_mode": None}
NOT_COMPILED = tuple((name, off, "only `NextFlowSFTTrainer` compiles layers") for name, off in COMPILATION.items())


def one_of(*choices: str) -> Legal:
    """One of some words."""
    return lambda value: value in choices, f"one of {', '.join(choices)}"


def refuse(settings: Any, fixed: Iterable[tuple[str, Any, str]] = (), **legal: Legal) -> None:
    """Refuses settings other than the `fixed` ones (name, value, why), and those that are neither `legal` nor None."""
    for name, value, reason in fixed:
        if getattr(settings, name) != value:
            raise ValueError(f"`{name}` must be {value!r}, but got {getattr(settings, name)!r}: {reason}.")
    for name, (is_legal, words) in legal.items():
        value = getattr(settings, name)
        if value is not None and not is_legal(value):
            raise ValueError(f"`{name}` must be {words}, but got {value!r}.")


def name_activation_checkpointing(args: Any) -> None:
    """Gives `activation_checkpointing` the value that TRL still sets by its old name, `gradient_checkpointing`."""
    for end in ("", "_kwargs"):
        if getattr(args, f"activation_checkpointing{end}") is None:
            setattr(args, f"activation_checkpointing{end}", getattr(args, f"gradient_checkpointing{end}"))
