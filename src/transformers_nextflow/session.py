"""Conversations that keep their cache: ask, draw, edit, ask again, and nothing is encoded twice."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from .interleaved_decoding import GenerationEvent, InterleavedDecoding
from .modeling_nextflow import NextFlowForCausalLM
from .processing_nextflow import NextFlowProcessor, StreamChunk

Segments = list[str | Image.Image]


@dataclass
class SessionMemory:
    """What a session holds.

    Args:
        num_tokens (`int`): Of the conversation so far, in the token view.
        num_images (`int`): Among them.
        num_bytes (`int`): Of keys and values, guidance's branch included.
        num_tokens_left (`int`): Until the model's context is full.
    """

    num_tokens: int
    num_images: int
    num_bytes: int
    num_tokens_left: int


class NextFlowSession:
    r"""
    A conversation with a model that reads and draws. Each turn adds to one cache.

    Args:
        model ([`NextFlowForCausalLM`]): The model.
        processor ([`NextFlowProcessor`]): With its image tokenizer.
        settings: Defaults of every turn, as [`~NextFlowGenerationMixin.generate`] takes them (`guidance_scale`, ...).

    Example:

    ```python
    >>> from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, NextFlowSession, tiny_checkpoint

    >>> path = tiny_checkpoint()
    >>> session = NextFlowSession(NextFlowForCausalLM.from_pretrained(path), NextFlowProcessor.from_pretrained(path))
    >>> picture = session.draw("a red circle left of a blue square")
    >>> picture = session.draw("make the red circle yellow")
    >>> answer = session.ask("What colour is the circle?")
    >>> other = session.fork()  # two continuations of one beginning
    >>> session.undo()  # the last turn
    ```
    """

    def __init__(self, model: NextFlowForCausalLM, processor: NextFlowProcessor, **settings):
        processor._image_parts()  # says what is missing
        self.model, self.processor, self.settings = model, processor, settings
        pad_token_id = model.config.eoi_token_id if model.config.pad_token_id is None else model.config.pad_token_id
        self._decoding = InterleavedDecoding(model, 1, pad_token_id)
        self._marks: list[dict[str, Any]] = []

    # Turns

    def ask(self, text: str, images: Sequence[Any] | Any = None, **settings) -> str:
        """An answer in words.

        Args:
            text (`str`): What the user says.
            images (a picture or a list, *optional*): What the user shows, before the text.
            settings: As [`~NextFlowGenerationMixin.generate`] takes them; those for images have no effect.
        """
        events = self._turn(text, images, "interleaved", {**settings, "max_new_images": 0})
        ids = [int(event.ids) for event in events if event.kind == "token"]
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def draw(self, text: str, images: Sequence[Any] | Any = None, thinking: bool = False, **settings) -> Image.Image:
        """A picture; an edit of the last one if there is any and nothing else is asked for.

        Args:
            text, images: As for [`~NextFlowSession.ask`].
            thinking (`bool`, *optional*, defaults to `False`): Write a thought first; it stands in `last_thought`.
            settings: As [`~NextFlowGenerationMixin.generate`] takes them.
        """
        chosen = {"thinking": True} if thinking else {"num_frames": 1}
        codes = None
        thought: list[int] = []
        for event in self._turn(text, images, "image", {**settings, **chosen}):
            if event.kind == "token":
                thought.append(int(event.ids))
            elif event.kind == "image":
                codes = event
        assert codes is not None and codes.schedule is not None  # image mode always draws
        self.last_thought = self.processor.tokenizer.decode(thought, skip_special_tokens=True).strip()
        return self.processor._decode_codes([codes.ids], [codes.schedule.grid_shw])[0]

    def chat(self, text: str, images: Sequence[Any] | Any = None, **settings) -> Segments:
        """Text and pictures as the model likes: a list of `str` and `PIL.Image.Image` in order."""
        start = self._length_after(text, images)
        for _ in self._turn(text, images, "interleaved", settings):
            pass
        grids = torch.tensor(self._decoding.grids[0][start[1] :]).view(-1, 3)
        return self.processor.decode_segments(self._decoding.ids[0, start[0] :], grids)[0]

    def stream(self, text: str, images: Sequence[Any] | Any = None, **settings) -> Iterator[StreamChunk]:
        """As [`~NextFlowSession.chat`], piece by piece; the turn is over when the iterator is."""
        yield from self.processor.decode_stream(self._turn(text, images, "interleaved", settings))

    def _length_after(self, text: str, images: Any) -> tuple[int, int]:
        inputs = self._user_turn(text, images)
        return (
            self._decoding.ids.shape[1] + inputs["input_ids"].shape[1],
            len(self._decoding.grids[0]) + len(inputs.get("image_grid_shw", ())),
        )

    def _user_turn(self, text: str, images: Any) -> Any:
        pictures = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
        content: list[Any] = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": text}]
        message: Any = {"role": "user", "content": content}
        prompt = self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        if self._marks:
            ended = int(self._decoding.ids[0, -1]) in self._eos
            prompt = ("" if ended else self.processor.tokenizer.eos_token) + "\n" + prompt
        return self.processor(text=prompt, images=pictures or None, return_tensors="pt")

    @property
    def _eos(self) -> tuple[int, ...]:
        eos = self.model.generation_config.eos_token_id or self.model.config.eos_token_id
        return tuple(eos) if isinstance(eos, list | tuple) else (eos,)

    @torch.no_grad()
    def _turn(self, text: str, images: Any, mode: str, settings: dict[str, Any]) -> Iterator[GenerationEvent]:
        settings = {**self.settings, **settings}
        thinking, num_frames = settings.pop("thinking", None), settings.pop("num_frames", None)
        inputs = self._user_turn(text, images)
        decoding = self._decoding
        ids = inputs["input_ids"].to(decoding.ids.device)
        new = inputs.get("image_grid_shw", torch.empty(0, 3, dtype=torch.long))
        whole = torch.cat([decoding.ids, ids], dim=1)
        grids = torch.tensor([*decoding.grids[0], *new.tolist()]) if decoding.grids[0] or len(new) else None
        plan = self.model.interleaved_settings(
            None, mode, thinking, num_frames, (whole, torch.ones_like(whole)), grids, 1, settings
        )
        self._marks.append(decoding.mark())
        self.onload()
        decoding.extend(ids, torch.ones_like(ids), [new.tolist()])
        yield from decoding.run(plan)

    # What is there

    @property
    def input_ids(self) -> torch.Tensor:
        """The whole conversation in the token view, `(1, L)`."""
        return self._decoding.ids

    @property
    def image_grid_shw(self) -> torch.Tensor:
        """`(num_images, 3)`: grids of the images in `input_ids`."""
        return torch.tensor(self._decoding.grids[0], dtype=torch.long).view(-1, 3)

    @property
    def num_turns(self) -> int:
        """Turns of the user so far."""
        return len(self._marks)

    @property
    def messages(self) -> Segments:
        """The conversation as text and pictures, in order."""
        return self.processor.decode_segments(self.input_ids[0], self.image_grid_shw)[0]

    @property
    def memory(self) -> SessionMemory:
        """What the session holds; see [`SessionMemory`]."""
        length = self.input_ids.shape[1]
        states = [state for state in (self._decoding.state, self._decoding._images) if state is not None]
        left = self.model.config.max_position_embeddings - length
        return SessionMemory(length, len(self.image_grid_shw), sum(state.num_bytes for state in states), left)

    def undo(self, num_turns: int = 1) -> None:
        """Forgets the last turns, the answers to them included."""
        if not 1 <= num_turns <= self.num_turns:
            raise ValueError(f"There are {self.num_turns} turns, so {num_turns} can't be undone.")
        self._decoding.rewind(self._marks[-num_turns])
        del self._marks[-num_turns:]

    def fork(self) -> "NextFlowSession":
        """A session that goes on from here by itself. The common beginning is held once."""
        twin = copy.copy(self)
        twin._decoding, twin._marks = self._decoding.fork(), list(self._marks)
        twin.settings = dict(self.settings)
        return twin

    def offload(self) -> None:
        """Moves keys and values to the CPU until the next turn."""
        self._move("cpu")

    def onload(self) -> None:
        """Moves keys and values to the model's device; every turn begins so."""
        self._move(self.model.device)

    def _move(self, device: torch.device | str) -> None:
        for state in (self._decoding.state, self._decoding._images):
            if state is not None:
                state.to(device)


__all__ = ["NextFlowSession", "SessionMemory"]
