"""Conversations that keep their cache: ask, draw, edit, ask again, and nothing is encoded twice."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image

from .codebook import check_same_checkpoint
from .decoding import Decoding, GenerationEvent, events_of
from .decoding_settings import INPUTS, Call, check_abilities, read_options, read_settings
from .decoding_state import DecodingState
from .generation_config_nextflow import NextFlowGenerationConfig, refuse_unknown
from .modeling_nextflow import NextFlowForCausalLM
from .processing_nextflow import NextFlowProcessor, StreamChunk

Segments = list[str | Image.Image]

# Arguments of `generate` that a conversation gives itself.
_OF_THE_SESSION = {
    *("attention_mask", "cache", "cache_implementation", "generation_mode", "image_grid_shw", "input_ids"),
    *("negative_prompt_attention_mask", "negative_prompt_ids", "num_return_sequences", "on_scale_end", "streamer"),
}


@dataclass
class SessionMemory:
    """What a session holds.

    Args:
        num_tokens (`int`): Tokens of the conversation so far, in the token view.
        num_images (`int`): Images among them.
        num_bytes (`int`): Bytes of keys and values, those of guidance's branch included. While a turn is answered
            there may be twice as many: those from before it stay until it has succeeded.
        num_tokens_left (`int`): Tokens until the model's context is full.
    """

    num_tokens: int
    num_images: int
    num_bytes: int
    num_tokens_left: int


class Transcript(NamedTuple):
    """A conversation without its keys and values: small, and enough to go on from it.

    Args:
        input_ids (`list[int]`): All of it in the token view.
        image_grid_shw (`list[list[int]]`): The grids of its images.
    """

    input_ids: list[int]
    image_grid_shw: list[list[int]]


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
        if not isinstance(processor, NextFlowProcessor):
            raise ValueError(
                f"A session takes a model and its `NextFlowProcessor`, but got {type(processor).__name__}."
            )
        check_abilities(model.config)
        processor._image_parts()  # says what is missing
        check_same_checkpoint(model.config, processor)
        _check_settings(settings)
        self.model, self.processor, self.settings = model, processor, settings
        pad_token_id = model.config.eoi_token_id if model.config.pad_token_id is None else model.config.pad_token_id
        # The decoding, and where each turn and its answer began. One attribute, so that whatever interrupts a turn, an
        # undo or a move finds the session as it was before or after, never in between.
        self._now: tuple[Decoding, tuple[dict[str, Any], ...]] = Decoding(model, 1, pad_token_id), ()
        self._open: tuple[Any, Decoding, tuple[dict[str, Any], ...]] | None = None  # a turn that is being answered
        self.last_thought = ""

    @classmethod
    @torch.no_grad()
    def from_transcript(
        cls, model: NextFlowForCausalLM, processor: NextFlowProcessor, transcript: Transcript, **settings
    ) -> "NextFlowSession":
        """A session that goes on from a [`~NextFlowSession.transcript`], which is run once.

        `messages`, `num_turns` and `undo` know of the turns from here on alone.
        """
        session = cls(model, processor, **settings)
        if transcript.input_ids:
            ids = torch.tensor([transcript.input_ids], device=session.input_ids.device)
            session._decoding.extend(ids, torch.ones_like(ids), [transcript.image_grid_shw])
        return session

    @property
    def _decoding(self) -> Decoding:
        return self._now[0]

    @property
    def _marks(self) -> tuple[dict[str, Any], ...]:
        return self._now[1]

    # Turns

    def ask(self, text: str, images: Sequence[Any] | Any = None, **settings) -> str:
        """An answer in words.

        Args:
            text (`str`): What the user says.
            images (a picture or a list, *optional*): What the user shows, before the text.
            settings: As for [`~NextFlowGenerationMixin.generate`]; those for images have no effect.
        """
        with self._all_or_nothing():
            events = self._turn(text, images, "interleaved", {**settings, "max_new_images": 0})
            ids = [int(event.ids) for event in events if event.kind == "token"]
            return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def draw(
        self, text: str, images: Sequence[Any] | Any = None, thinking: bool | None = None, **settings
    ) -> Image.Image:
        """A picture: an edit of the last one, if there is one and nothing else is asked for, at the last one's size.

        Args:
            text, images: As for [`~NextFlowSession.ask`].
            thinking (`bool`, *optional*): Write a thought first, which `last_thought` then holds.
            settings: As for [`~NextFlowGenerationMixin.generate`]. The size of the first picture holds for those after
                it, until `height` and `width` or `num_scales` say otherwise.

        Raises:
            `ValueError`: for settings that don't fit, or if `stopping_criteria` end the turn before the picture begins.
        """
        if {**self.settings, **settings}.get("num_frames") is not None:
            raise ValueError(
                "`draw` makes one picture, so it does not take `num_frames`. Call it again, or use `chat`."
            )
        thinking = self.settings.get("thinking") if thinking is None else thinking
        chosen = {"thinking": True} if thinking else {"thinking": False, "num_frames": 1}
        codes = None
        thought: list[int] = []
        with self._all_or_nothing():
            for event in self._turn(text, images, "image", {**settings, **chosen}):
                if event.kind == "token":
                    thought.append(int(event.ids))
                elif event.kind == "image":
                    codes = event
            if codes is None:
                raise ValueError("The `stopping_criteria` ended the turn before the picture began, so it is forgotten.")
            picture = self.processor.decode_codes([codes.ids], [codes.schedule.grid_shw])[0]
            self.last_thought = self.processor.tokenizer.decode(thought, skip_special_tokens=True).strip()
            return picture

    def chat(self, text: str, images: Sequence[Any] | Any = None, **settings) -> Segments:
        """Text and pictures as the model chooses: a list of `str` and `PIL.Image.Image` in order."""
        with self._all_or_nothing():
            for _ in self._turn(text, images, "interleaved", settings):
                pass
            num_tokens, num_images = self._marks[-1]["answer"]
            return self.processor.decode_segments(self.input_ids[0, num_tokens:], self.image_grid_shw[num_images:])[0]

    def stream(self, text: str, images: Sequence[Any] | Any = None, **settings) -> Iterator[StreamChunk]:
        """As [`~NextFlowSession.chat`], but piece by piece; the turn ends with the iterator, or when another begins."""
        yield from self.processor.decode_stream(self.events(text, images, **settings))

    def events(
        self, text: str, images: Sequence[Any] | Any = None, mode: str = "interleaved", **settings
    ) -> Iterator[GenerationEvent]:
        """As [`~NextFlowSession.stream`], but tokens, scales and images as they come; `mode="image"` draws one."""
        return self._turn(text, images, mode, settings)

    def _read_turn(self, content: list[dict[str, Any]]) -> Any:
        """Model inputs of a user's turn and of what stands between it and the turn before."""
        pictures = [part["image"] for part in content if part["type"] == "image"]
        message: Any = {"role": "user", "content": content}
        prompt = self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        if self.input_ids.shape[1]:
            ended = int(self._decoding.ids[0, -1]) in self._eos
            prompt = ("" if ended else self.processor.tokenizer.eos_token) + "\n" + prompt
        return self.processor(text=prompt, images=pictures or None, return_tensors="pt")

    @property
    def _eos(self) -> tuple[int, ...]:
        eos = self.model.generation_config.eos_token_id or self.model.config.eos_token_id
        return tuple(eos) if isinstance(eos, list | tuple) else (eos,)

    @torch.no_grad()
    def _turn(self, text: str, images: Any, mode: str, settings: dict[str, Any]) -> Iterator[GenerationEvent]:
        self._end_turn()
        if not isinstance(text, str):
            raise ValueError(f"The text of a turn must be a string, but got {type(text).__name__}.")
        pictures = [] if images is None else images if isinstance(images, list | tuple) else [images]
        content: list[dict[str, Any]] = [
            *({"type": "image", "image": picture} for picture in pictures),
            {"type": "text", "text": text},
        ]
        inputs = self._read_turn(content)
        decoding, marks = self._now
        decoding = decoding.fork()
        for state in _states_of(decoding):
            state.onload()
        # Defaults are for the turns that they can serve.
        unfit = {"thinking", "max_new_images"} if mode == "image" else {"thinking", "num_frames"}
        if mode == "image" and not settings.get("thinking"):
            unfit.add("logits_processor")  # no text is written
        defaults = {name: value for name, value in self.settings.items() if name not in unfit}
        if not decoding.grids[0] and "image_grid_shw" not in inputs:
            defaults.pop("image_guidance_scale", None)  # until there is an image
        chosen = {**defaults, **settings}
        _check_settings(chosen)
        ids = inputs["input_ids"].to(decoding.ids.device)
        new = inputs.get("image_grid_shw", torch.empty(0, 3, dtype=torch.long))
        whole = torch.cat([decoding.ids, ids], dim=1)
        grids = [[*decoding.grids[0], *new.tolist()]]
        # Forks share what a dynamic cache holds.
        chosen |= {"generation_mode": mode, "cache_implementation": "dynamic", "disable_compile": True}
        given, config, others = read_options(self.model, chosen)
        plan = read_settings(Call(self.model, given, config, (whole, torch.ones_like(whole)), grids), **others)
        answer = whole.shape[1], len(decoding.grids[0]) + len(new)
        marks = (*marks, {**decoding.mark(), "user": content, "answer": answer})
        decoding.extend(ids, torch.ones_like(ids), [new.tolist()])
        events = events_of(decoding.run(plan))
        self._open = events, decoding, marks
        done = False
        try:
            yield from events
            done = True
        except GeneratorExit:
            done = True
            raise
        finally:  # what interrupts it by hand, or out of memory, leaves the session as if the turn had not been
            if self._open is not None and self._open[0] is events:  # no other turn has begun
                if done:
                    self._end_turn()
                self._open = None

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """A turn and all that is made of it: if anything fails, the session stays as it was."""
        self._end_turn()
        before = self._now
        try:
            yield
        except BaseException:
            self._now, self._open = before, None
            raise

    def _end_turn(self) -> None:
        """Closes the open turn and keeps it; an image that has begun ends with its last whole scale."""
        if self._open is not None:
            events, decoding, marks = self._open
            events.close()
            self._now, self._open = (decoding, marks), None

    # What it holds

    @property
    def input_ids(self) -> torch.Tensor:
        """The whole conversation in the token view, `(1, L)`."""
        return self._decoding.ids

    @property
    def image_grid_shw(self) -> torch.Tensor:
        """`(num_images, 3)`: grids of the images in `input_ids`."""
        return torch.tensor(self._decoding.grids[0], dtype=torch.long).view(-1, 3)

    @property
    def transcript(self) -> Transcript:
        """What [`~NextFlowSession.from_transcript`] goes on from."""
        return Transcript(self.input_ids[0].tolist(), self.image_grid_shw.tolist())

    @property
    def num_turns(self) -> int:
        """The number of the user's turns so far."""
        return len(self._marks)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as chat templates take it, with pictures as parts `{"type": "image", "image": ...}`."""
        ends = [(mark["length"], mark["grids"][0]) for mark in self._marks[1:]]
        ends.append((self.input_ids.shape[1], len(self.image_grid_shw)))
        messages = []
        for mark, (num_tokens, num_images) in zip(self._marks, ends, strict=True):
            ids = self.input_ids[0, mark["answer"][0] : num_tokens]
            segments = self.processor.decode_segments(ids, self.image_grid_shw[mark["answer"][1] : num_images])[0]
            answer = [
                {"type": "text", "text": segment} if isinstance(segment, str) else {"type": "image", "image": segment}
                for segment in segments
            ]
            messages += [{"role": "user", "content": mark["user"]}, {"role": "assistant", "content": answer}]
        return messages

    @property
    def memory(self) -> SessionMemory:
        """What the session holds, and how much room is left; see [`SessionMemory`]."""
        length = self.input_ids.shape[1]
        left = self.model.config.max_position_embeddings - length
        return SessionMemory(length, len(self.image_grid_shw), sum(state.num_bytes for state in self._states), left)

    @property
    def _states(self) -> list[DecodingState]:
        return _states_of(self._decoding)

    def undo(self, num_turns: int = 1) -> None:
        """Forgets the last turns, the answers to them included."""
        self._end_turn()
        if num_turns not in range(1, self.num_turns + 1):
            raise ValueError(f"There are {self.num_turns} turns, so {num_turns} can't be undone.")
        decoding, marks = self._now
        decoding = decoding.fork()
        decoding.rewind(marks[-num_turns])
        self._now = decoding, marks[:-num_turns]

    def fork(self) -> "NextFlowSession":
        """An independent session that continues from here. The common beginning is held once."""
        self._end_turn()
        twin = copy.copy(self)
        twin._now = self._decoding.fork(), self._marks
        twin.settings = dict(self.settings)
        return twin

    def offload(self) -> None:
        """Moves keys and values to the CPU until the next turn."""
        self._end_turn()
        for state in self._states:
            state.offload()

    def onload(self) -> None:
        """Moves keys and values back to the devices of their layers; every turn begins so."""
        for state in self._states:
            state.onload()


def _check_settings(settings: dict[str, Any]) -> None:
    if of_the_session := sorted(settings.keys() & _OF_THE_SESSION):
        raise ValueError(f"A session sees to `{of_the_session[0]}` itself: leave it out.")
    refuse_unknown("A session", settings, [name for name in INPUTS if name not in _OF_THE_SESSION])
    NextFlowGenerationConfig.merge(settings, None)[0].validate()


def _states_of(decoding: Decoding) -> list[DecodingState]:
    return [state for state in (decoding.state, decoding._images) if state is not None]


__all__ = ["NextFlowSession", "SessionMemory", "Transcript"]
