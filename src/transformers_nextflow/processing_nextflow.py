"""The processor of NextFlow: text and images to the token view and back.

Token view: an image stands in a sequence as `<boi>` and its codes, each as the id `visual_token_offset + code`.
"""

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import logging

from .chat_template import CHAT_TEMPLATE, read_messages
from .codebook import check_same_codebook, check_schedules
from .configuration_nextflow import NextFlowConfig
from .decoding import GenerationEvent
from .generation_config_nextflow import trained_style
from .image_processing_pil_nextflow import to_pil
from .modeling_nextflow_image_tokenizer import NextFlowImageTokenizer
from .picture_sources import VIDEO_MARK, SourceLimits, match_pictures, place_frames
from .pipeline_index import write_pipeline_index
from .remote_code import write_shim
from .scale_schedule import ScaleSchedule
from .stream_decoding import StreamChunk, decode_stream
from .strict_loading import HUB_ARGUMENTS, read_json
from .token_fields import expand_marks, id_of, pad, to_rows, tokenize, truncate
from .token_layout import count_images, read_grids, split_grids
from .whole_folder import whole_folder

logger = logging.get_logger(__name__)

IMAGE_TOKENIZER_FOLDER = "image_tokenizer"
PROCESSOR_FILES = ("processor_config.json", "tokenizer_config.json", "tokenizer.json")
PADDING_ARGUMENTS = ("padding", "max_length", "pad_to_multiple_of", "padding_side")
ENCODED_TOGETHER = 2**22  # pixels that the image tokenizer encodes at once


class NextFlowProcessor(ProcessorMixin):
    r"""
    Turns texts with `<image>` marks and pictures into the ids that NextFlow reads, and ids back into text and pictures.

    It holds the image tokenizer, which the language model does not; it is saved in the sub-folder `image_tokenizer/`.

    Args:
        image_processor ([`NextFlowImageProcessor`] or [`NextFlowImageProcessorPil`]):
            Brings pictures to the size of a scale schedule.
        tokenizer (`PreTrainedTokenizerBase`): The text tokenizer; it must know `<boi>` and `<image>`.
        image_tokenizer ([`NextFlowImageTokenizer`], *optional*):
            Encodes and decodes pictures. Without it the processor handles text alone.
        visual_token_offset (`int`, *optional*):
            The first visual id, the model's `config.text_vocab_size`. Needed for pictures.
        chat_template (`str`, *optional*): A Jinja template; ChatML by default.

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

    config_class: Any = NextFlowConfig
    model_name = "NextFlowForCausalLM"

    def __init__(
        self, image_processor=None, tokenizer=None, image_tokenizer=None, visual_token_offset=None, chat_template=None
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self._read_marks(tokenizer)
        if self.config_class.scale_sides is None:
            check_schedules(image_tokenizer)
        self.image_tokenizer = image_tokenizer
        self.visual_token_offset = visual_token_offset

    def _read_marks(self, tokenizer: Any) -> None:
        """Finds the mark of an image, and what opens and closes one."""
        self.image_token = getattr(tokenizer, "image_token", None) or "<image>"
        self.boi_token = getattr(tokenizer, "boi_token", None) or "<boi>"
        self.image_token_id = id_of(tokenizer, self.image_token)
        self.boi_token_id = id_of(tokenizer, self.boi_token)
        self.image_start_ids, self.image_end_ids = [self.boi_token_id], list[int]()

    def cut_prompts(self, encoded: dict[str, list[Any]], kind: str = "text") -> None:
        """Cuts texts before an image to what the model reads, in place: here they may have any length."""

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
        text_kind: str = "text",
        **kwargs: Any,
    ) -> BatchFeature:
        """Makes model inputs.

        Args:
            text (`str` or `list[str]`):
                One text or a batch. Each `<image>` in it stands for one picture. By position text and images may come
                in either order.
            images (a picture or a list of pictures, *optional*):
                As many as there are marks, in reading order over the batch; or a list of them for each text. A picture
                is a PIL image, an array, a tensor, a path, a URL or a base64 string; [`SourceLimits`] says what is
                opened, and its fields are options of the image processor.
            videos (a video or a list of videos, *optional*):
                As many as there are `<video>` marks in the texts, in reading order. A video is a list of frames, an
                array `(T, H, W, 3)`, a path or a URL; `num_frames` of it are read, evenly spaced, as pictures.
            num_frames (`int`, *optional*, defaults to 4): Frames read of a video (all of a shorter one).
            text_kind (`str`, *optional*, defaults to `"text"`): What messages call a text, such as "negative prompt".
            self_correction (`bool`, *optional*, defaults to `False`): Encode with self-correction and add `labels`.
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
            `ValueError`: if pictures and marks differ in number, if there is no image tokenizer for the pictures, if
                one cannot be opened, if `truncation` would cut a picture, or for an option that nothing takes.
        """
        if audio is not None:
            raise ValueError("NextFlow reads text, images and videos; `audio` must be None.")
        if text is not None and not _is_text(text) and _is_text(images):
            text, images = images, text  # type: ignore[assignment]
        texts: Any = [text] if isinstance(text, str) else text
        if not _is_text(texts):
            raise ValueError(
                "`text` must be a string or a list of strings. For a picture alone pass its mark: "
                f'text="{self.image_token}".'
            )
        merged = self._read_options(kwargs)
        images_kwargs = merged["images_kwargs"]
        limits = SourceLimits.of({**vars(self.image_processor), **images_kwargs})
        texts, images = place_frames(list(texts), images, videos, num_frames, self.image_token, limits)
        text_kwargs = merged["text_kwargs"]
        for name in ("return_mm_token_type_ids", "return_text_replacement_offsets"):  # of no use with our ids
            text_kwargs.pop(name, None)
        return_tensors = text_kwargs.pop("return_tensors", None)
        padding = {name: text_kwargs.pop(name) for name in PADDING_ARGUMENTS if name in text_kwargs}
        max_length = None
        truncation = text_kwargs.pop("truncation", None) or "do_not_truncate"
        if truncation is True or TruncationStrategy(truncation) != TruncationStrategy.DO_NOT_TRUNCATE:
            max_length = padding.get("max_length")
            max_length = self.tokenizer.model_max_length if max_length is None else max_length

        encoded = tokenize(self.tokenizer, texts, text_kind, **text_kwargs)
        self.cut_prompts(encoded, text_kind)
        num_marks = [ids.count(self.image_token_id) for ids in encoded["input_ids"]]
        pictures = match_pictures(images, num_marks, self.image_token)
        if not pictures and {"height", "width"} & images_kwargs.keys():
            logger.warning_once(
                "`height` and `width` are for pictures that are given, and there are none. For the size of a picture "
                'to be drawn pass them to `generate`; in a pipeline: `generate_kwargs={"height": ..., "width": ...}`.'
            )
        ids, target_ids, grids = self._encode_images(pictures, self_correction, generator, images_kwargs)
        marks = (self.image_token_id, self.image_start_ids, self.image_end_ids)
        fields = expand_marks(encoded, ids, *marks)
        if self_correction:
            fields["labels"] = expand_marks(encoded, target_ids, *marks)["input_ids"]
        truncate(fields, max_length, num_marks, self.tokenizer.truncation_side)
        batch = pad(self.tokenizer, fields, **{"padding": False, **padding})
        if pictures:
            batch["image_grid_shw"] = grids
        return BatchFeature(batch, tensor_type=return_tensors)

    def _read_options(self, options: dict[str, Any]) -> dict[str, dict]:
        """Options of the tokenizer and of the image processor, apart."""
        groups = self.valid_processor_kwargs.__annotations__
        known = {*groups, *self.image_processor.valid_kwargs.__annotations__, "do_sample_frames", "common_kwargs"}
        known.update(*(getattr(group, "__annotations__", ()) for group in groups.values()))
        if unknown := options.keys() - known:
            raise ValueError(f"Neither the tokenizer nor the image processor takes {', '.join(sorted(unknown))}.")
        try:
            return self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **options)
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error

    def _encode_images(
        self, pictures: list[Any], self_correction: bool, generator: Any, images_kwargs: dict
    ) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """Visual ids, target ids and grids, one entry per picture; `generator` may be a list with one for each."""
        ids: list[list[int]] = []
        target_ids: list[list[int]] = []
        rows: list[list[int]] = []
        if not pictures:
            return ids, target_ids, rows
        image_tokenizer, offset = self._image_parts()
        options = {**vars(self.image_processor), **images_kwargs}
        schedule = ScaleSchedule((16, 16), options["num_scales"], options["stride"])  # no bucket has a larger area
        area = (options.get("height") or schedule.height) * (options.get("width") or schedule.width)
        number = max(1, ENCODED_TOGETHER // area)
        for first in range(0, len(pictures), number):
            chosen = pictures[first : first + number]
            pixel_values, grids = self._read_images(chosen, images_kwargs)
            draws = generator[first : first + number] if isinstance(generator, list) else [generator] * len(chosen)
            together: dict[tuple[int, ...], list[int]] = {}
            for index, row in enumerate(grids.tolist()):
                together.setdefault(tuple(row), []).append(index)
            codes: list[Any] = [None] * len(chosen)
            for members in together.values():
                own = [draws[index] for index in members] if draws[0] is not None else None
                batch = torch.stack([pixel_values[index] for index in members])
                encoded = image_tokenizer.encode(batch, grids[members], self_correction, own)
                pairs = zip(encoded["codes"] + offset, encoded["target_codes"] + offset, strict=True)
                for index, pair in zip(members, pairs, strict=True):
                    codes[index] = [part.tolist() for part in pair]
            ids += [pair[0] for pair in codes]
            target_ids += [pair[1] for pair in codes]
            rows += grids.tolist()
        return ids, target_ids, rows

    def _read_images(self, pictures: list[Any], images_kwargs: dict) -> tuple[Any, torch.Tensor]:
        """Pixels and grids of pictures."""
        inputs = self.image_processor(pictures, **{**images_kwargs, "return_tensors": "pt"})
        return inputs["pixel_values"], inputs["image_grid_shw"]

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

    def apply_chat_template(self, conversation, *args, allow_special_tokens: bool = False, **kwargs):  # type: ignore[override]
        """The prompt of a chat, or its model inputs with `tokenize=True`.

        What speakers write is text, special tokens included: `<|im_end|>` in a message ends no turn. Such tokens are
        broken up by an invisible character in the prompt, which `processor(text=prompt)` removes. `<image>` and
        `<video>` are marks where the chat has no picture and video parts, and text where it has.

        Args:
            conversation (list of `dict`, or a list of such lists):
                Messages: `role` and `content`, a text or a list of parts "text", "image" and "video".
            allow_special_tokens (`bool`, *optional*, defaults to `False`):
                Read special tokens in messages as such; only for texts of your own.
            args, kwargs: As for [`~ProcessorMixin.apply_chat_template`].

        Raises:
            `ValueError`: for anything that is not a message or a part of one.
        """
        if not isinstance(conversation, list | tuple) or not conversation:
            raise ValueError(f"A chat is a list of messages, or a list of such lists, but got {conversation!r:.80}.")
        added = self.tokenizer.added_tokens_decoder.values()
        marks = (self.image_token, VIDEO_MARK)
        special = [] if allow_special_tokens else [VIDEO_MARK, *(token.content for token in added if token.special)]
        try:
            chats, is_batch = self._normalize_conversations(conversation)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"A chat is a list of messages: {error}") from error
        chats = [read_messages(chat, special, marks) for chat in chats]
        return super().apply_chat_template(chats if is_batch else chats[0], *args, **kwargs)

    # Prompts

    def check_plain(self, texts: Iterable[str]) -> None:
        """Raises a `ValueError` for prompts that hold special tokens, which mark pictures and turns."""
        marks = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        if found := sorted({mark for text in texts for mark in marks if mark in text}):
            raise ValueError(f"A prompt is plain text: it must not hold any of {', '.join(found)}. Leave them out.")

    def style_prompt(
        self, text: str, task: str = "image", styles: dict[str, str] | None = None, style: str | None = None
    ) -> str:
        """A prompt (with an `<image>` mark per picture) in the form in which the model was trained to be prompted.

        Args:
            text (`str`): The prompt. For an empty one it is `<boi>`, all that training leaves of a dropped prompt.
            task (`str`, *optional*, defaults to `"image"`): `"image"`, `"edit"`, `"thinking"` or `"frames"`.
            styles (`dict[str, str]`, *optional*):
                `model.generation_config.prompt_styles`: for each task `"bare"` (the text itself, the default) or
                `"chat"` (the text as a user's turn, the assistant's follows; the default of `"thinking"`).
            style (`str`, *optional*): Overrules `styles`.
        """
        style = style or trained_style(styles, task)
        if style not in ("bare", "chat"):
            raise ValueError(f'A prompt style is "bare" or "chat", but got {style!r} for the task "{task}".')
        if not text and task != "thinking":
            return self.boi_token
        turns = [{"role": "user", "content": text}]  # as `encode_messages` writes them for training
        options: Any = {"chat_template": self.chat_template, "tokenize": False, "add_generation_prompt": True}
        return text if style == "bare" else self.tokenizer.apply_chat_template(turns, **options)

    def style_prompts(
        self,
        texts: Sequence[str],
        task: str,
        generation_config: Any,
        style: str | None = None,
        num_pictures: Sequence[int] | None = None,
        negative: bool = False,
    ) -> list[str]:
        """Prompts of one task, as a pipeline words them: plain texts behind the `<image>` marks of their pictures.

        Args:
            texts (`list[str]`): The prompts.
            task (`str`): See [`~NextFlowProcessor.style_prompt`].
            generation_config ([`NextFlowGenerationConfig`]): The model's, with the styles of its training.
            style (`str`, *optional*): Overrules them.
            num_pictures (`list[int]`, *optional*): Of every prompt; none by default.
            negative (`bool`, *optional*, defaults to `False`): An empty one is none, also where a thought comes first.

        Raises:
            `ValueError`: for special tokens in a text.
        """
        self.check_plain(texts)
        styles = getattr(generation_config, "prompt_styles", None)
        return [
            self.style_prompt(self.image_token * count + text, task if text or not negative else "image", styles, style)
            for text, count in zip(texts, num_pictures or [0] * len(texts), strict=True)
        ]

    # Ids to text and pictures

    def decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> str | list[str]:  # type: ignore[override]
        """Text of ids: a string for one sequence, a list for a batch. A whole image reads `<image>`.

        Args:
            token_ids (`torch.Tensor`, `np.ndarray` or `list[int]`, of shape `(L,)` or `(B, L)`): Ids in the token view.
            skip_special_tokens (`bool`, *optional*, defaults to `False`):
                Leaves special tokens out; `<image>` is one of them.
            kwargs: Options of the tokenizer's `decode`.
        """
        rows, is_batch = to_rows(token_ids)
        texts = [
            self.tokenizer.decode(self._collapse_images(ids), skip_special_tokens=skip_special_tokens, **kwargs)
            for ids in rows
        ]
        return texts if is_batch else texts[0]

    def batch_decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> list[str]:  # type: ignore[override]
        """A list of texts, one per sequence; see [`~NextFlowProcessor.decode`]."""
        return [self.decode(ids, skip_special_tokens, **kwargs) for ids in token_ids]  # type: ignore[misc]

    def _runs(self, ids: Sequence[int]) -> Iterator[tuple[bool, list[int]]]:
        """Runs of text ids and of visual ids in turn; True for visual ones."""
        offset = self.visual_token_offset
        for visual, run in groupby(ids, key=lambda token: offset is not None and token >= offset):
            yield visual, list(run)

    def _collapse_images(self, ids: list[int]) -> list[int]:
        """Ids with one `<image>` for every run of visual ids and what opens it."""
        collapsed: list[int] = []
        for visual, run in self._runs(ids):
            if not visual:
                collapsed.extend(run)
                continue
            if collapsed[-len(self.image_start_ids) :] == self.image_start_ids:
                del collapsed[-len(self.image_start_ids) :]
            collapsed.append(self.image_token_id)
        return collapsed

    def decode_images(self, token_ids, image_grid_shw) -> list[list[Image.Image]]:
        """The pictures in ids.

        Args:
            token_ids (`torch.Tensor` or `list[int]`, of shape `(L,)` or `(B, L)`):
                Ids in the token view. An image may stop after any whole scale; then it is a preview at full size.
            image_grid_shw (`torch.Tensor` of shape `(num_images, 3)`): Their grids, in reading order over the batch.

        Returns:
            `list[list[PIL.Image.Image]]`: for each sequence its pictures.

        Raises:
            `ValueError`: if images and grids differ in number, if an image stops inside a scale, or if its codes are
                not in the image tokenizer's codebook.
        """
        self._image_parts()  # needed even for text alone
        rows = self.decode_segments(token_ids, image_grid_shw)
        return [[segment for segment in row if not isinstance(segment, str)] for row in rows]

    def decode_codes(self, codes: Sequence[Any], image_grid_shw) -> list[Image.Image]:
        """The pictures of codes.

        Args:
            codes (`torch.Tensor` of shape `(num_images, n)`, or a list of codes `(n,)`):
                Codes of the image tokenizer, from 0 (not ids).
            image_grid_shw (`torch.Tensor` of shape `(num_images, 3)`): Their grids.

        Returns:
            `list[PIL.Image.Image]`, one per image. Previews and errors as for [`~NextFlowProcessor.decode_images`].
        """
        image_tokenizer, _ = self._image_parts()
        grids = read_grids(image_grid_shw, len(codes), "There are codes of")
        if not len(codes):
            return []
        for number, (image_codes, grid) in enumerate(zip(codes, grids.tolist(), strict=True)):
            schedule = ScaleSchedule.from_grid_shw(grid, sides=image_tokenizer.config.sides)
            if len(image_codes) not in schedule.offsets[1:]:
                raise ValueError(
                    f"Image {number} has {len(image_codes)} codes, but its grid {schedule.grid_shw} has "
                    f"{schedule.num_tokens}, and only whole scales can be left off: {schedule.offsets[1:]}."
                )
        tensors = [torch.as_tensor(image_codes) for image_codes in codes]
        alike = len(grids.unique(dim=0)) == 1 and len({len(image_codes) for image_codes in codes}) == 1
        return to_pil(image_tokenizer.decode(torch.stack(tensors) if alike else tensors, grids))

    def decode_segments(self, token_ids, image_grid_shw) -> list[list[str | Image.Image]]:
        """Text and pictures of ids, in their order; arguments and errors as for [`~NextFlowProcessor.decode_images`].

        Returns:
            `list[list[str | PIL.Image.Image]]`, one list per sequence; special tokens and blank texts are left out.
        """
        runs = [list(self._runs(ids)) for ids in to_rows(token_ids)[0]]
        codes = [[token - self.visual_token_offset for token in run] for row in runs for visual, run in row if visual]
        pictures = iter(self.decode_codes(codes, image_grid_shw) if codes or len(read_grids(image_grid_shw)) else [])
        segments = [
            [
                next(pictures) if visual else self.tokenizer.decode(run, skip_special_tokens=True).strip()
                for visual, run in row
            ]
            for row in runs
        ]
        return [[segment for segment in row if segment != ""] for row in segments]

    def post_process_interleaved(self, generated_outputs, prompt_length: int) -> list[list[str | Image.Image]]:
        """New text and pictures of interleaved generation, in order.

        Args:
            generated_outputs ([`NextFlowGenerateOutput`]): From `generate(generation_mode="interleaved")`.
            prompt_length (`int`): Columns of the prompts, `input_ids.shape[1]`.

        Returns:
            `list[list[str | PIL.Image.Image]]`: the new segments of each sequence.

        Raises:
            `ValueError`: for the output of another mode, or without `return_dict_in_generate=True`.
        """
        mask = getattr(generated_outputs, "attention_mask", None)
        if mask is None or generated_outputs.image_codes is not None:
            raise ValueError(
                'This takes what `generate(generation_mode="interleaved", return_dict_in_generate=True)` returns. For '
                "the pictures of image mode use `decode_images(sequences, image_grid_shw)`."
            )
        sequences, offset = generated_outputs.sequences, self._image_parts()[1]
        grids = split_grids(sequences, generated_outputs.image_grid_shw, offset, mask)
        num_known = count_images(sequences[:, :prompt_length], offset, mask[:, :prompt_length])
        new = [ids[prompt_length:][real[prompt_length:].bool()] for ids, real in zip(sequences, mask, strict=True)]
        new_grids = torch.cat([own[number:] for own, number in zip(grids, num_known, strict=True)])
        return self.decode_segments(new, new_grids)

    def decode_stream(self, events: Iterable[GenerationEvent], previews: bool = True) -> Iterator[StreamChunk]:
        """Text and pictures of a stream as they come: text, then a preview per scale, then the picture.

        Args:
            events (iterable of [`GenerationEvent`]): From [`~NextFlowGenerationMixin.stream`].
            previews (`bool`, *optional*, defaults to `True`): Decode every scale, not the last alone.
        """
        return decode_stream(self, events, previews)

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens: bool = True, generation_mode: str | None = None, **kwargs
    ) -> list[str] | list[Image.Image]:
        """Text or pictures from what the model generated; `pipeline("any-to-any")` calls it.

        Args:
            generated_outputs:
                Text mode: ids `(B, L)`. Image mode: a [`NextFlowGenerateOutput`] with `image_codes` `(B, N)` and one
                row of `image_grid_shw` a sequence, as the model's `decode_image_tokens` gives it.
            skip_special_tokens (`bool`, *optional*, defaults to `True`): Text mode: leave special tokens out.
            generation_mode (`str`, *optional*, defaults to `"text"`): `"text"` or `"image"`.

        Returns:
            `list[str]` or `list[PIL.Image.Image]`, one entry per sequence.
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
                write_pipeline_index(partial, self.model_name, decoder_in=save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(save_directory)), **kwargs)
        return [os.path.join(save_directory, os.path.relpath(file, partial)) for file in files]

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        path = pretrained_model_name_or_path
        if missing := [name for name in PROCESSOR_FILES if read_json(path, name, **kwargs) is None]:
            raise ValueError(
                f'"{path}" has no processor: {" and ".join(missing)} is missing. Save or download it again.'
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
        except OSError:
            raise
        except Exception as error:  # the tokenizers library raises just that, and names no file
            raise ValueError(
                f'"{pretrained_model_name_or_path}" does not load: {error}. If tokenizer.json or processor_config.json '
                "is damaged, download or save it again."
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
        if model_config.get("model_type") == cls.config_class.model_type:
            check_same_codebook(cls.config_class.from_dict(model_config), image_tokenizer)
        return image_tokenizer


def _is_text(text: Any) -> bool:
    texts = [text] if isinstance(text, str) else text
    return isinstance(texts, list | tuple) and len(texts) > 0 and all(isinstance(sample, str) for sample in texts)


__all__ = ["NextFlowProcessor", "StreamChunk"]
