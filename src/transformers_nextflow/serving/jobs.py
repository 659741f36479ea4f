"""What passes between the web application and the engines: jobs one way, events the other. Both pickle."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from PIL import Image

from ..session import Transcript


@dataclass(frozen=True)
class Job:
    """One row of a batch: what to draw or answer.

    Args:
        mode (`str`): `"image"` (a picture) or `"interleaved"` (text and pictures as the model likes).
        prompt (`str`): What to draw, worded as pipelines do.
        pictures (tuple of `PIL.Image.Image`): What the prompt is about.
        mask (`PIL.Image.Image`, *optional*): White where the one picture is drawn anew, black where it is kept.
        image_in_prompt (`bool`): Whether the model reads a picture with a mask before the prompt.
        messages (tuple of `dict`, *optional*): A chat in place of a prompt.
        in_conversation (`bool`): The one message is a turn of a conversation, which is held for the next.
        previous (`str`, *optional*), transcript ([`Transcript`], *optional*): The answer that the turn follows.
        answer (`str`): What the answer will be called; "" if it is not to be held.
        options (`dict`): Of [`~NextFlowGenerationMixin.generate`].
        negative_prompt (`str`, *optional*): What guidance leads away from.
        seed (`int`): Makes the answer repeatable.
        previews (`int`): How many previews of each picture.
        adapter (`str`, *optional*): The name of a LoRA adapter.
    """

    mode: str = "image"
    prompt: str = ""
    pictures: tuple[Image.Image, ...] = ()
    mask: Image.Image | None = None
    image_in_prompt: bool = True
    messages: tuple[dict[str, Any], ...] | None = None
    in_conversation: bool = False
    previous: str | None = None
    transcript: Transcript | None = None
    answer: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    negative_prompt: str | None = None
    seed: int = 0
    previews: int = 0
    adapter: str | None = None

    @property
    def read_pictures(self) -> tuple[Image.Image, ...]:
        """The pictures that stand before the prompt."""
        return self.pictures if self.mask is None or self.image_in_prompt else ()


class Event(NamedTuple):
    """Something that happened to a job.

    Args:
        kind (`str`):
            `"accepted"` (it is right, and waits), `"text"`, `"thought"`, `"preview"`, `"image"`, `"done"` or, between
            threads and processes, `"error"`.
        value: None, a `str`, a `PIL.Image.Image`, an [`Outcome`] or an [`ApiError`].
        step (`int`): Of a preview: its scale, from 0.
    """

    kind: str
    value: Any
    step: int = 0


@dataclass
class Outcome:
    """The end of a job: tokens that it read and wrote, and why it ended.

    Args:
        text_in, images_in, text_out, images_out (`int`): Tokens; those of pictures are their codes.
        finish_reason (`str`): `"stop"` or `"length"`.
        transcript ([`Transcript`], *optional*): Of a turn in a conversation: all of it.
    """

    text_in: int = 0
    images_in: int = 0
    text_out: int = 0
    images_out: int = 0
    finish_reason: str = "stop"
    transcript: Transcript | None = None


__all__ = ["Event", "Job", "Outcome"]
