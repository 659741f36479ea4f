"""The processor of TokenFlow's text-to-image model: NextFlow's with Llama's tokenizer, square pictures and no chats."""

from typing import Any

import torch
from transformers.utils import logging

from .configuration_tokenflow import TokenFlowConfig
from .processing_nextflow import NextFlowProcessor
from .token_fields import name_text

logger = logging.get_logger(__name__)


class TokenFlowProcessor(NextFlowProcessor):
    r"""
    [`NextFlowProcessor`] for [`TokenFlowForCausalLM`]: an image stands as the text `<img>`, its codes and the text
    `</img>`; the text before it is cut to what the model reads; pictures are cropped to the one size that there is.

    How much of a text it reads is the tokenizer's `model_max_length`. Arguments are as there, without `chat_template`.
    """

    config_class = TokenFlowConfig
    model_name = "TokenFlowForCausalLM"

    def __init__(
        self, image_processor=None, tokenizer=None, image_tokenizer=None, visual_token_offset=None, chat_template=None
    ):
        super().__init__(image_processor, tokenizer, image_tokenizer, visual_token_offset)
        self.chat_template = None
        if chat_template is not None:
            raise ValueError("TokenFlow draws pictures of plain texts and has no chats: leave `chat_template` out.")

    def _read_marks(self, tokenizer: Any) -> None:
        self.image_token, self.boi_token = tokenizer.unk_token, "<img>"
        self.image_token_id = tokenizer.unk_token_id
        # Plain text, as the model was trained on: not tokens of their own.
        self.image_start_ids, self.image_end_ids = tokenizer(
            [self.boi_token, "</img>"], add_special_tokens=False
        ).input_ids
        self.boi_token_id = self.image_start_ids[-1]

    def cut_prompts(self, encoded: dict[str, list[Any]], kind: str = "text") -> None:
        for row, ids in enumerate(rows := encoded["input_ids"]):
            length = ids.index(self.image_token_id) if self.image_token_id in ids else len(ids)
            if ids[:length][-len(self.image_start_ids) :] == self.image_start_ids:
                length -= len(self.image_start_ids)
            if length > (limit := self.tokenizer.model_max_length):
                lost = self.tokenizer.decode(ids[limit:length])
                logger.warning(
                    f"{name_text(kind, row, rows)} has {length} tokens, but TokenFlow reads {limit} of one: the last "
                    f"{length - limit} are cut off, from {lost[:40]!r} on. Shorten it to choose what is left out."
                )
                for values in encoded.values():
                    del values[row][limit:length]

    def _read_images(self, pictures: list[Any], images_kwargs: dict) -> tuple[Any, torch.Tensor]:
        config = self._image_parts()[0].config
        side = config.stride * config.sides[config.num_scales - 1]
        if asked := {"height", "width", "num_scales"} & images_kwargs.keys():
            raise ValueError(f"TokenFlow's pictures have {side} x {side} pixels: leave out {', '.join(sorted(asked))}.")
        pixel_values, _ = super()._read_images(pictures, {**images_kwargs, "height": side, "width": side})
        return pixel_values, torch.tensor([[config.num_scales, 16, 16]] * len(pictures))

    def style_prompt(
        self, text: str, task: str = "image", styles: dict[str, str] | None = None, style: str | None = None
    ) -> str:
        """A prompt in the only form that there is, the text itself; `<img>` for an empty one."""
        if style == "chat" or task == "thinking":
            raise ValueError('TokenFlow reads plain texts: leave out `prompt_style="chat"` and `thinking`.')
        return super().style_prompt(text, task, None, "bare")

    def apply_chat_template(self, conversation, *args, **kwargs):
        """TokenFlow has no chats; a `ValueError`."""
        raise ValueError("TokenFlow draws pictures of plain texts and has no chats: pass the text itself.")


PROCESSORS: dict[str, type[NextFlowProcessor]] = {
    processor.config_class.model_type: processor for processor in (NextFlowProcessor, TokenFlowProcessor)
}

__all__ = ["PROCESSORS", "TokenFlowProcessor"]
