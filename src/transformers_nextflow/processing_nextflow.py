"""The processor of NextFlow: text and images to the token view and back.

Token view: an image stands in a sequence as `<boi>` and its codes, each as the id `visual_token_offset + code`.
"""

import copy
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging
from transformers.video_utils import load_video

from .codebook import check_same_codebook, check_schedules
from .configuration_nextflow import NextFlowConfig
from .decoding import GenerationEvent
from .image_processing_pil_nextflow import to_pil
from .modeling_nextflow_image_tokenizer import NextFlowImageTokenizer
from .remote_code import write_shim
from .scale_schedule import ScaleSchedule
from .strict_loading import HUB_ARGUMENTS, read_json
from .token_layout import count_images
from .whole_folder import whole_folder

logger = logging.get_logger(__name__)

IMAGE_TOKENIZER_FOLDER = "image_tokenizer"
PROCESSOR_FILES = ("processor_config.json", "tokenizer_config.json")
VIDEO_MARK = "<video>"
PADDING_ARGUMENTS = ("padding", "max_length", "pad_to_multiple_of", "padding_side")

# ChatML as Qwen writes it, without a system prompt of its own. An image part of a message becomes `<image>`. The
# `generation` marks let trainers find what the assistant said (`return_assistant_tokens_mask=True`).
CHAT_TEMPLATE = """\
{%- macro render(content, role) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part is string -%}
                {{- part -}}
            {%- elif role == 'system' and part.type != 'text' -%}
                {{- raise_exception('A system message is text; put a picture into a message of the user.') -}}
            {%- elif part.type == 'image' or part.type == 'image_url' -%}
                {{- '<image>' -}}
            {%- elif part.type == 'video' -%}
                {{- '<video>' -}}
            {%- elif part.type == 'text' -%}
                {{- part.text -}}
            {%- else -%}
                {{- raise_exception('A message has parts "text", "image" and "video", not "' ~ part.type ~ '".') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
            {{- render(message.content, message.role) + '<|im_end|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- render(message.content, message.role) + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


class StreamChunk(NamedTuple):
    """A piece of a stream.

    Args:
        kind (`str`): `"text"`, `"preview"` or `"image"`.
        value (`str` or `PIL.Image.Image`): The piece.
        row (`int`): Which row of the batch.
        step (`int`, *optional*): Of a preview: the scale, from 0.
    """

    kind: str
    value: str | Image.Image
    row: int = 0
    step: int | None = None


class NextFlowProcessor(ProcessorMixin):
    r"""
    Turns texts with `<image>` marks and pictures into the ids that NextFlow reads, and ids back into text and pictures.

    It holds the image tokenizer, which the language model does not; it is saved in the sub-folder `image_tokenizer/`.

    Args:
        image_processor ([`NextFlowImageProcessor`] or [`NextFlowImageProcessorPil`]):
            Brings pictures to the size of a scale schedule.
        tokenizer (`PreTrainedTokenizerBase`):
            The text tokenizer; it must know `<boi>` and `<image>`.
        image_tokenizer ([`NextFlowImageTokenizer`], *optional*):
            Encodes and decodes pictures. Without it the processor handles text alone.
        visual_token_offset (`int`, *optional*):
            The first visual id, the model's `config.text_vocab_size`. Needed for pictures.
        chat_template (`str`, *optional*):
            A Jinja template; ChatML by default.

    Example:

    ```python
    >>> from PIL import Image
    >>> from transformers_nextflow import NextFlowProcessor, tiny_checkpoint

    >>> processor = NextFlowProcessor.from_pretrained(tiny_checkpoint())
    >>> picture = Image.new("RGB", (128, 128), "skyblue")
    >>> batch = processor("<image>Make the sky pink.", images=[picture], return_tensors="pt")
    >>> batch.image_grid_shw.tolist()
    [[8, 16, 16]]
    >>> processor.decode(batch.input_ids[0])
    '<image>Make the sky pink.'
    >>> processor.decode_images(batch.input_ids, batch.image_grid_shw)[0][0].size
    (128, 128)
    ```
    """

    def __init__(
        self, image_processor=None, tokenizer=None, image_tokenizer=None, visual_token_offset=None, chat_template=None
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        check_schedules(image_tokenizer)
        self.image_tokenizer = image_tokenizer
        self.visual_token_offset = visual_token_offset
        self.image_token = getattr(tokenizer, "image_token", None) or "<image>"
        self.boi_token = getattr(tokenizer, "boi_token", None) or "<boi>"
        self.image_token_id = _id_of(tokenizer, self.image_token)
        self.boi_token_id = _id_of(tokenizer, self.boi_token)

    @classmethod
    def get_attributes(cls) -> list[str]:
        # The base class would take `image_tokenizer` for a second text tokenizer.
        return ["image_processor", "tokenizer"]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "image_grid_shw"]

    # Text and pictures to ids

    def __call__(  # type: ignore[override]  # text comes first: it is what every call has
        self,
        text: str | Sequence[str] | None = None,
        images: ImageInput | None = None,
        videos=None,
        audio=None,
        self_correction: bool = False,
        generator: torch.Generator | None = None,
        num_frames: int = 4,
        **kwargs: Any,
    ) -> BatchFeature:
        """Makes model inputs.

        Args:
            text (`str` or `list[str]`):
                One text or a batch. Each `<image>` in it stands for one picture.
            images (a picture or a list of pictures, *optional*):
                As many as there are marks, in reading order over the batch; or a list of them for each text. A picture
                is a PIL image, an array, a tensor, a path, a URL or a base64 string.
            videos (a video or a list of videos, *optional*):
                As many as there are `<video>` marks in the texts, in reading order. A video is a list of frames, an
                array `(T, H, W, 3)`, a path or a URL; `num_frames` of it are read, evenly spaced, as pictures.
            num_frames (`int`, *optional*, defaults to 4): Frames read of a video (all of a shorter one).
            self_correction (`bool`, *optional*, defaults to `False`):
                Encode with self-correction and add `labels`.
            generator (`torch.Generator`, *optional*):
                Source of self-correction's draws, on the image tokenizer's device.
            kwargs:
                Options of the tokenizer (`padding`, `return_tensors`, ...) and of the image processor (`num_scales`,
                `height`, `width`, `do_pad`, ...).

        Returns:
            [`BatchFeature`] with:
                - **input_ids** `(B, L)` int64 -- the token view.
                - **attention_mask** `(B, L)` int64.
                - **image_grid_shw** `(num_images, 3)` int64 -- only with images: number of scales, bucket height and
                  bucket width, in reading order over the batch.
                - **labels** `(B, L)` int64 -- only with `self_correction`: the ids with the nearest codes instead of
                  the drawn ones; -100 where there is padding.

        Raises:
            `ValueError`: if pictures and marks differ in number, if there is no image tokenizer for the pictures, or if
                `truncation` would cut a picture.
        """
        if audio is not None:
            raise ValueError("NextFlow reads text, images and videos; `audio` must be None.")
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(sample, str) for sample in texts):
            raise ValueError(
                "`text` must be a string or a list of strings. For a picture alone pass its mark: "
                f'text="{self.image_token}".'
            )
        texts, images = self._frames_as_images(list(texts), images, videos, num_frames)
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_kwargs = merged["text_kwargs"]
        for name in ("return_mm_token_type_ids", "return_text_replacement_offsets"):  # of no use with our ids
            text_kwargs.pop(name, None)
        return_tensors = text_kwargs.pop("return_tensors", None)
        padding = {name: text_kwargs.pop(name) for name in PADDING_ARGUMENTS if name in text_kwargs}
        max_length = None
        if text_kwargs.pop("truncation", False) not in (None, False, "do_not_truncate"):
            max_length = padding.get("max_length") or self.tokenizer.model_max_length

        encoded = self.tokenizer(list(texts), **text_kwargs)
        num_marks = [ids.count(self.image_token_id) for ids in encoded["input_ids"]]
        pictures = self._flatten_images(images, num_marks)
        if not pictures and {"height", "width"} & merged["images_kwargs"].keys():
            logger.warning_once(
                "`height` and `width` are for pictures that are given, and there are none. For the size of a picture "
                'to be drawn pass them to `generate`; in a pipeline: `generate_kwargs={"height": ..., "width": ...}`.'
            )
        codes, target_codes, grids = self._encode_images(pictures, self_correction, generator, merged["images_kwargs"])
        fields = self._expand_marks(encoded, codes)
        if self_correction:
            fields["labels"] = self._expand_marks(encoded, target_codes)["input_ids"]
        self._truncate(fields, max_length, num_marks)
        batch = self._pad(fields, **{"padding": False, **padding})
        if pictures:
            batch["image_grid_shw"] = grids
        return BatchFeature(batch, tensor_type=return_tensors)

    def _frames_as_images(self, texts: list[str], images: Any, videos: Any, num_frames: int) -> tuple[list[str], Any]:
        """Texts with an `<image>` for each frame of a `<video>`, and the pictures with the frames among them."""
        num_marks = sum(text.count(VIDEO_MARK) for text in texts)
        if videos is None and not num_marks:
            return texts, images
        if num_frames < 1:
            raise ValueError(f"`num_frames` must be at least 1, but got {num_frames}.")
        given = [] if videos is None else _flatten_videos(videos)
        if len(given) != num_marks:
            raise ValueError(
                f"`text` has {num_marks} `{VIDEO_MARK}` marks, but `videos` has {len(given)} videos. Put one mark into "
                "the text where each video stands."
            )
        pictures = iter(self._flatten_images(images, [text.count(self.image_token) for text in texts]))
        clips, merged, spread = iter(given), [], []
        for text in texts:
            parts = re.split(f"({re.escape(VIDEO_MARK)}|{re.escape(self.image_token)})", text)
            for i, part in enumerate(parts):
                if part == self.image_token:
                    merged.append(next(pictures))
                elif part == VIDEO_MARK:
                    frames = _sample_frames(next(clips), num_frames)
                    merged += frames
                    parts[i] = self.image_token * len(frames)
            spread.append("".join(parts))
        return spread, merged

    def _flatten_images(self, images: Any, num_marks: list[int]) -> list[Any]:
        """All pictures in reading order; checks that they are as many as the marks."""
        marks = f"`{self.image_token}` marks"
        if images is None or (isinstance(images, list | tuple) and not images):
            if sum(num_marks):
                raise ValueError(f"`text` has {sum(num_marks)} {marks}, but there are no `images`. Pass one a mark.")
            return []
        if isinstance(images, list | tuple) and all(isinstance(group, list | tuple) for group in images):
            counts = [len(group) for group in images]
            if counts != num_marks:
                raise ValueError(
                    f"The texts have {num_marks} {marks}, but the lists of `images` have {counts} pictures. "
                    "Pass one list a text, with one picture a mark."
                )
            images = [image for group in images for image in group]
            if not images:
                return []
        pictures: list[Any] = list(make_flat_list_of_images(self.image_processor.fetch_images(images)))  # type: ignore[arg-type]
        if len(pictures) != sum(num_marks):
            raise ValueError(
                f"`text` has {sum(num_marks)} {marks}, but `images` has {len(pictures)} pictures. "
                "Put one mark into the text where each picture stands."
            )
        return pictures

    def _encode_images(
        self, pictures: list[Any], self_correction: bool, generator: torch.Generator | None, images_kwargs: dict
    ) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """Visual ids, target ids and grids, one entry a picture."""
        if not pictures:
            return [], [], []
        image_tokenizer, offset = self._image_parts()
        inputs = self.image_processor(pictures, **{**images_kwargs, "return_tensors": "pt"})
        pixel_values, grids = inputs["pixel_values"], inputs["image_grid_shw"]
        if len(grids.unique(dim=0)) > 1:
            pixel_values = list(pixel_values)  # no batch even if the sizes agree: several buckets share coarse grids
        encoded = image_tokenizer.encode(pixel_values, grids, self_correction=self_correction, generator=generator)
        codes, targets = (
            [(image_codes + offset).tolist() for image_codes in images]
            for images in (encoded["codes"], encoded["target_codes"])
        )
        return codes, targets, grids.tolist()

    def _image_parts(self) -> tuple[NextFlowImageTokenizer, int]:
        if self.image_tokenizer is None:
            raise ValueError(
                "This processor has no image tokenizer, so it can neither read nor draw pictures. Load it from a "
                f"checkpoint with a folder `{IMAGE_TOKENIZER_FOLDER}/`, or pass `image_tokenizer=`."
            )
        if self.visual_token_offset is None:
            raise ValueError(
                "This processor has no `visual_token_offset`, so it does not know the ids of image codes. It is the "
                "model's `config.text_vocab_size`; pass it to the processor."
            )
        return self.image_tokenizer, self.visual_token_offset

    def _expand_marks(self, encoded, codes: Iterable[list[int]]) -> dict[str, list[list[Any]]]:
        """The tokenizer's fields with every mark replaced by `<boi>` and the ids of an image."""
        remaining = iter(codes)
        fields: dict[str, list[list[Any]]] = {name: [] for name in encoded}
        for row, ids in enumerate(encoded["input_ids"]):
            spans = [
                [self.boi_token_id, *next(remaining)] if token == self.image_token_id else [token] for token in ids
            ]
            for name in fields:
                values = encoded[name][row]
                spread = ([value] * len(span) for value, span in zip(values, spans, strict=True))
                fields[name].append([item for span in (spans if name == "input_ids" else spread) for item in span])
        return fields

    def _truncate(self, fields: dict[str, list[list[Any]]], max_length: int | None, num_marks: list[int]) -> None:
        if max_length is None:
            return
        for row, ids in enumerate(fields["input_ids"]):
            if len(ids) <= max_length:
                continue
            if num_marks[row]:
                raise ValueError(
                    f"Text {row} takes {len(ids)} tokens with its pictures, more than `max_length` ({max_length}), and "
                    "a picture can't be cut. Raise `max_length`, turn `truncation` off or use fewer `num_scales`."
                )
            kept = slice(max_length) if self.tokenizer.truncation_side == "right" else slice(-max_length, None)
            for rows in fields.values():
                rows[row] = rows[row][kept]

    def _pad(self, fields: dict[str, list[list[Any]]], **padding) -> dict[str, Any]:
        """Pads as the tokenizer does; it knows its own fields, the others follow."""
        own = ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask")
        batch = dict(self.tokenizer.pad({name: fields[name] for name in own if name in fields}, **padding))
        left = padding.get("padding_side", self.tokenizer.padding_side) == "left"
        for name in fields.keys() - batch.keys():
            filler = -100 if name == "labels" else (0, 0)
            batch[name] = []
            for values, padded in zip(fields[name], batch["input_ids"], strict=True):
                fill = [filler] * (len(padded) - len(values))
                batch[name].append(fill + values if left else values + fill)
        return batch

    # Prompts

    def check_plain(self, texts: Iterable[str]) -> None:
        """Raises a `ValueError` for prompts that hold special tokens, which mark pictures and turns."""
        marks = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        if found := sorted({mark for text in texts for mark in marks if mark in text}):
            raise ValueError(f"A prompt is plain text: it must not hold any of {', '.join(found)}. Leave them out.")

    def style_prompt(
        self, text: str, task: str = "image", styles: dict[str, str] | None = None, style: str | None = None
    ) -> str:
        """A prompt (with an `<image>` mark a picture) in the words that the model was trained to be prompted with.

        Args:
            text (`str`): The prompt. For an empty one it is `<boi>`, all that training leaves of a dropped prompt.
            task (`str`, *optional*, defaults to `"image"`): `"image"`, `"edit"`, `"thinking"` or `"frames"`.
            styles (`dict[str, str]`, *optional*):
                `model.generation_config.prompt_styles`: for each task `"bare"` (the text itself, the default) or
                `"chat"` (the text as a user's turn, the assistant's follows; the default of `"thinking"`).
            style (`str`, *optional*): Overrules them.
        """
        style = style or (styles or {}).get(task) or ("chat" if task == "thinking" else "bare")
        if style not in ("bare", "chat"):
            raise ValueError(f'A prompt style is "bare" or "chat", but got {style!r} for the task "{task}".')
        if not text and task != "thinking":
            return self.boi_token
        turns = [{"role": "user", "content": text}]  # as `encode_messages` writes them for training
        options: Any = {"chat_template": self.chat_template, "tokenize": False, "add_generation_prompt": True}
        return text if style == "bare" else self.tokenizer.apply_chat_template(turns, **options)

    # Ids to text and pictures

    def decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> str | list[str]:  # type: ignore[override]
        """Text of ids: a string for one sequence, a list for a batch. A whole image reads `<image>`.

        Args:
            token_ids (`torch.Tensor`, `np.ndarray` or `list[int]`, of shape `(L,)` or `(B, L)`):
                Ids in the token view.
            skip_special_tokens (`bool`, *optional*, defaults to `False`):
                Leaves special tokens out; `<image>` is one of them.
            kwargs:
                Options of the tokenizer's `decode`.
        """
        rows, is_batch = _to_rows(token_ids)
        texts = [
            self.tokenizer.decode(self._collapse_images(ids), skip_special_tokens=skip_special_tokens, **kwargs)
            for ids in rows
        ]
        return texts if is_batch else texts[0]

    def batch_decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> list[str]:  # type: ignore[override]
        """A list of texts, one a sequence; see [`~NextFlowProcessor.decode`]."""
        return [self.decode(ids, skip_special_tokens, **kwargs) for ids in token_ids]  # type: ignore[misc]

    def _is_visual(self, token: int) -> bool:
        return self.visual_token_offset is not None and token >= self.visual_token_offset

    def _collapse_images(self, ids: list[int]) -> list[int]:
        """Ids with one `<image>` for every run of visual ids and the `<boi>` before it."""
        collapsed: list[int] = []
        for visual, run in groupby(ids, key=self._is_visual):
            if not visual:
                collapsed.extend(run)
                continue
            if collapsed and collapsed[-1] == self.boi_token_id:
                collapsed.pop()
            collapsed.append(self.image_token_id)
        return collapsed

    def decode_images(self, token_ids, image_grid_shw) -> list[list[Image.Image]]:
        """The pictures in ids.

        Args:
            token_ids (`torch.Tensor` or `list[int]`, of shape `(L,)` or `(B, L)`):
                Ids in the token view. An image may stop after any whole scale; then it is a preview at full size.
            image_grid_shw (`torch.Tensor` of shape `(num_images, 3)`):
                Their grids, in reading order over the batch.

        Returns:
            `list[list[PIL.Image.Image]]`: for each sequence its pictures.

        Raises:
            `ValueError`: if images and grids differ in number, if an image stops inside a scale, or if its codes are
                not in the image tokenizer's codebook.
        """
        offset = self._image_parts()[1]
        codes_of_rows = [
            [[token - offset for token in run] for visual, run in groupby(ids, key=self._is_visual) if visual]
            for ids in _to_rows(token_ids)[0]
        ]
        pictures = iter(self.decode_codes([codes for row in codes_of_rows for codes in row], image_grid_shw))
        return [[next(pictures) for _ in row] for row in codes_of_rows]

    def decode_codes(self, codes: Sequence[Any], image_grid_shw) -> list[Image.Image]:
        image_tokenizer, _ = self._image_parts()
        grids = torch.as_tensor(image_grid_shw).reshape(-1, 3)
        if len(codes) != len(grids):
            raise ValueError(
                f"The ids hold {len(codes)} images, but `image_grid_shw` has {len(grids)} rows; it needs one an image."
            )
        if not len(codes):
            return []
        for number, (image_codes, grid) in enumerate(zip(codes, grids.tolist(), strict=True)):
            schedule = ScaleSchedule.from_grid_shw(grid)
            if len(image_codes) not in schedule.offsets[1:]:
                raise ValueError(
                    f"Image {number} has {len(image_codes)} codes, but its grid {schedule.grid_shw} has "
                    f"{schedule.num_tokens}, and only whole scales can be left off: {schedule.offsets[1:]}."
                )
        tensors = [torch.as_tensor(image_codes) for image_codes in codes]
        alike = len(grids.unique(dim=0)) == 1 and len({len(image_codes) for image_codes in codes}) == 1
        return to_pil(image_tokenizer.decode(torch.stack(tensors) if alike else tensors, grids))

    def decode_segments(self, token_ids, image_grid_shw) -> list[list[str | Image.Image]]:
        """Text and pictures in the order in which they stand in ids.

        Args:
            token_ids (`torch.Tensor` or `list[int]`, of shape `(L,)` or `(B, L)`): Ids in the token view.
            image_grid_shw (`torch.Tensor` of shape `(num_images, 3)`): Their grids, in reading order over the batch.

        Returns:
            `list[list[str | PIL.Image.Image]]`, one list a sequence; special tokens and blank texts are left out.

        Raises:
            `ValueError`: as for [`~NextFlowProcessor.decode_images`].
        """
        rows = _to_rows(token_ids)[0]
        has_images = len(image_grid_shw) or any(self._is_visual(token) for ids in rows for token in ids)
        pictures = self.decode_images(rows, image_grid_shw) if has_images else [[] for _ in rows]
        segments: list[list[str | Image.Image]] = []
        for ids, of_row in zip(rows, pictures, strict=True):
            remaining = iter(of_row)
            segments.append([])
            for visual, run in groupby(ids, key=self._is_visual):
                if visual:
                    segments[-1].append(next(remaining))
                elif text := self.tokenizer.decode(list(run), skip_special_tokens=True).strip():
                    segments[-1].append(text)
        return segments

    def post_process_interleaved(self, generated_outputs, prompt_length: int) -> list[list[str | Image.Image]]:
        """Text and pictures that interleaved generation made, in order.

        Args:
            generated_outputs ([`NextFlowGenerateOutput`]): From `generate(generation_mode="interleaved")`.
            prompt_length (`int`): Columns of the prompts, `input_ids.shape[1]`.

        Returns:
            `list[list[str | PIL.Image.Image]]`: for each sequence what is new.

        Raises:
            `ValueError`: for what another mode generated, or without `return_dict_in_generate=True`.
        """
        _, offset = self._image_parts()
        mask = getattr(generated_outputs, "attention_mask", None)
        if mask is None or generated_outputs.image_codes is not None:
            raise ValueError(
                'This takes what `generate(generation_mode="interleaved", return_dict_in_generate=True)` returns. For '
                "the pictures of image mode use `decode_images(sequences, image_grid_shw)`."
            )
        sequences = generated_outputs.sequences
        old, new = (
            count_images(ids.masked_fill(real == 0, 0), offset)
            for ids, real in zip(
                (sequences[:, :prompt_length], sequences[:, prompt_length:]),
                (mask[:, :prompt_length], mask[:, prompt_length:]),
                strict=True,
            )
        )
        grids = iter(generated_outputs.image_grid_shw.tolist())
        kept = []
        for before, after in zip(old, new, strict=True):
            row = [next(grids) for _ in range(before + after)]
            kept += row[before:]
        rows = [
            ids[real.bool()].tolist()
            for ids, real in zip(sequences[:, prompt_length:], mask[:, prompt_length:], strict=True)
        ]
        return self.decode_segments(rows, torch.tensor(kept, dtype=torch.long).view(-1, 3))

    def decode_stream(self, events: Iterable[GenerationEvent], previews: bool = True) -> Iterator[StreamChunk]:
        """Text and pictures of a stream as they come: text, then a preview a scale, then the picture.

        Args:
            events (iterable of [`GenerationEvent`]): From [`~NextFlowGenerationMixin.stream`].
            previews (`bool`, *optional*, defaults to `True`): Decode every scale, not the last alone.

        Yields:
            [`StreamChunk`]: `kind` is `"text"` (a piece of text), `"preview"` or `"image"` (a PIL image).
        """
        written: dict[int, list[int]] = {}
        shown: dict[int, str] = {}

        def new_text(row: int, whole: bool) -> Iterator[StreamChunk]:
            text = self.tokenizer.decode(written.get(row, []), skip_special_tokens=True)
            known = shown.get(row, "")
            # A character may take several tokens.
            if len(text) > len(known) and (whole or not text.endswith("\ufffd")):
                shown[row] = text
                yield StreamChunk("text", text[len(known) :], row)

        for event in events:
            row = event.row
            if event.kind == "token":
                written.setdefault(row, []).append(int(event.ids))
                yield from new_text(row, whole=False)
                continue
            yield from new_text(row, whole=True)
            written.pop(row, None)
            shown.pop(row, None)
            last = event.kind == "scale" and event.step == event.schedule.num_scales - 1
            if event.kind == "image" or (previews and not last):
                picture = self.decode_codes([event.ids], [event.schedule.grid_shw])[0]
                yield StreamChunk("image" if event.kind == "image" else "preview", picture, row, event.step)
        for row in list(written):
            yield from new_text(row, whole=True)

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens: bool = True, generation_mode: str | None = None, **kwargs
    ) -> list[str] | list[Image.Image]:
        """Text or pictures from what the model generated; `pipeline("any-to-any")` calls it.

        Args:
            generated_outputs:
                Text mode: ids `(B, L)`. Image mode: a [`NextFlowGenerateOutput`] with `image_codes` `(B, N)` and one
                row of `image_grid_shw` a sequence, as the model's `decode_image_tokens` gives it.
            skip_special_tokens (`bool`, *optional*, defaults to `True`):
                Text mode: leave special tokens out.
            generation_mode (`str`, *optional*, defaults to `"text"`):
                `"text"` or `"image"`.

        Returns:
            `list[str]` or `list[PIL.Image.Image]`, one entry a sequence.
        """
        if generation_mode in (None, "text"):
            return self.post_process_image_text_to_text(generated_outputs, skip_special_tokens, **kwargs)
        if generation_mode != "image":
            raise ValueError(f'`generation_mode` must be "text" or "image", but got "{generation_mode}".')
        if getattr(generated_outputs, "image_codes", None) is None:
            raise ValueError(
                "Image mode needs codes and grids: pass `model.decode_image_tokens(sequences, image_grid_shw)`."
            )
        return self.decode_codes(generated_outputs.image_codes, generated_outputs.image_grid_shw)

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens: bool = True, **kwargs):
        """Texts of generated ids; `pipeline("image-text-to-text")` calls it."""
        return self.decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    # Saving and loading

    def to_dict(self) -> dict[str, Any]:
        bare = copy.copy(self)  # the base class would copy the image tokenizer's weights
        del bare.image_tokenizer
        return super(NextFlowProcessor, bare).to_dict()

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Saves the processor; the image tokenizer goes to the sub-folder `image_tokenizer/`."""
        with whole_folder(save_directory) as partial:
            files = super().save_pretrained(partial)
            if getattr(self, "auto_map", None):
                write_shim(partial)
            if self.image_tokenizer is not None:
                self.image_tokenizer.save_pretrained(os.path.join(partial, IMAGE_TOKENIZER_FOLDER))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(save_directory)), **kwargs)
        return [os.path.join(save_directory, os.path.relpath(file, partial)) for file in files]

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        path = pretrained_model_name_or_path
        if None in [read_json(path, name, **kwargs) for name in PROCESSOR_FILES]:
            raise ValueError(
                f'"{path}" has no processor ({" and ".join(PROCESSOR_FILES)}), or saving it was interrupted. Save '
                "or download it again."
            )
        processor_dict, unused_kwargs = super().get_processor_dict(path, **kwargs)
        if "image_tokenizer" not in kwargs:
            processor_dict["image_tokenizer"] = cls._load_image_tokenizer(path, kwargs)
        return processor_dict, unused_kwargs

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict[str, Any], **kwargs):
        loaded = super().from_args_and_dict(args, processor_dict, **kwargs)
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        if "auto_map" in processor_dict:  # the base class forgets it
            processor.auto_map = processor_dict["auto_map"]
        return loaded

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        for name in ("image_tokenizer", "dtype"):  # not for the tokenizer and the image processor
            kwargs.pop(name, None)
        try:
            return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
        except (OSError, TypeError):
            raise
        except Exception as error:  # the tokenizers library raises just that, and names no file
            raise ValueError(
                f'The tokenizer in "{pretrained_model_name_or_path}" does not load: {error}. If tokenizer.json is '
                "damaged, download or save it again."
            ) from error

    @classmethod
    def _load_image_tokenizer(cls, pretrained_model_name_or_path, kwargs: dict) -> NextFlowImageTokenizer | None:
        passed = {name: kwargs[name] for name in (*HUB_ARGUMENTS, "dtype") if name in kwargs}
        subfolder = os.path.join(kwargs.get("subfolder") or "", IMAGE_TOKENIZER_FOLDER)
        path = pretrained_model_name_or_path
        if read_json(path, "config.json", **{**passed, "subfolder": subfolder}) is None:
            return None
        image_tokenizer = NextFlowImageTokenizer.from_pretrained(path, subfolder=subfolder, **passed)
        model_config = read_json(path, "config.json", **kwargs) or {}  # none where a processor is saved by itself
        if model_config.get("model_type") == NextFlowConfig.model_type:
            check_same_codebook(NextFlowConfig.from_dict(model_config), image_tokenizer)
        return image_tokenizer


def _flatten_videos(videos: Any) -> list[Any]:
    """Videos one by one, however they are nested (each chat has a list); a video is a path, or frames."""
    if isinstance(videos, str | os.PathLike) or getattr(videos, "ndim", 0) == 4:
        return [videos]
    if isinstance(videos, list | tuple) and videos and _is_frame(videos[0]):
        return [videos]
    if not isinstance(videos, list | tuple) and getattr(videos, "ndim", 0) != 5:
        raise ValueError(
            "A video is a list of pictures, an array of shape (frames, height, width, 3), a path or a URL, but "
            f"`videos` holds an object of type {type(videos).__name__}."
        )
    return [video for entry in videos for video in _flatten_videos(entry)]


def _is_frame(item: Any) -> bool:
    return isinstance(item, Image.Image) or getattr(item, "ndim", 0) == 3


def _sample_frames(video: Any, number: int) -> list[Any]:
    """`number` frames of a video, evenly spaced, first and last among them; all frames of a shorter one."""
    if isinstance(video, str | os.PathLike):
        video = load_video(cast(Any, str(video)))[0]
    if not len(video):
        raise ValueError("A video has no frames.")
    last = len(video) - 1
    places = (
        range(len(video)) if len(video) <= number else [round(i * last / max(number - 1, 1)) for i in range(number)]
    )
    return [video[place] for place in places]


def _id_of(tokenizer, token: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id is None or token_id == tokenizer.unk_token_id:
        raise ValueError(
            f"The tokenizer does not know `{token}`. NextFlow's tokenizers have `<boi>`, `<eoi>` and `<image>` after "
            "Qwen's own tokens; `conversion/qwen_tokenizer.py` makes one."
        )
    return token_id


def _to_rows(token_ids) -> tuple[list[list[int]], bool]:
    """Ids as a list of lists, and whether they came as a batch."""
    rows = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
    if isinstance(rows, int):
        return [[rows]], False
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
    is_batch = bool(rows) and not isinstance(rows[0], int)
    return (rows if is_batch else [rows]), is_batch


__all__ = ["NextFlowProcessor"]
