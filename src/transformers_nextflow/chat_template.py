"""Chats: the template, what a message may hold, and special tokens that speakers type, which are text.

A speaker's `<|im_end|>` must not end a turn. In the text of messages every special token is broken up by [`BREAK`],
which survives in the rendered prompt, so that it is text for any tokenizer; the processor tokenizes the pieces and
leaves the marks out.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

# A noncharacter, which Unicode keeps for use inside programs: no text holds it.
BREAK = "\ufdd0"

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


def break_up(text: str, special_tokens: Sequence[str]) -> str:
    """The text with a [`BREAK`] inside every special token."""
    if not special_tokens:
        return text
    tokens = "|".join(map(re.escape, special_tokens))
    return re.sub(rf"(?=(?:{tokens}))(?s:.)", rf"\g<0>{BREAK}", text.replace(BREAK, ""))


def read_messages(messages: Any, special_tokens: Sequence[str], marks: Sequence[str]) -> list[dict[str, Any]]:
    """Messages of one chat, checked, with the special tokens in their texts broken up.

    Args:
        messages (list of `dict`): `role` and `content`, a text or a list of parts "text", "image" and "video".
        special_tokens (`list[str]`): What is text in a message; none to leave texts as they are.
        marks (`list[str]`):
            Such tokens among them as stand for a picture or a video. Those typed in a chat without picture and video
            parts still do.

    Raises:
        `ValueError`: for what is not a message.
    """
    shape = 'A message is {"role": "user", "content": a text or a list of parts}'
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"{shape}, and a chat is a list of them, but got {messages!r:.80}.")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not message["role"]:
            raise ValueError(f"{shape}; this one has no role: {message!r:.80}.")
        parts = message.get("content")
        if not isinstance(parts, str | list | tuple):
            raise ValueError(f"{shape}; this one has no content: {message!r:.80}.")
        for part in () if isinstance(parts, str) else parts:
            kind = part.get("type") if isinstance(part, Mapping) else "text" if isinstance(part, str) else None
            if kind not in ("text", "image", "video") or (kind == "text" and not isinstance(_text(part), str)):
                raise ValueError(
                    'A message has parts {"type": "text", "text": ...}, {"type": "image", "image": ...} and '
                    f'{{"type": "video", "video": ...}}, not {part!r:.80}.'
                )
            if kind != "text" and message["role"] == "system":
                raise ValueError("A system message is text; put a picture into a message of the user.")
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    if all(isinstance(part, str) or part["type"] == "text" for part in parts):
        special_tokens = [token for token in special_tokens if token not in marks]

    def read(content: Any) -> Any:
        if isinstance(content, str):
            return break_up(content, special_tokens)
        return [
            {"type": "text", "text": break_up(_text(part), special_tokens)} if _text(part) is not None else part
            for part in content
        ]

    return [
        {**message, "role": break_up(message["role"], special_tokens), "content": read(message["content"])}
        for message in messages
    ]


def _text(part: Any) -> Any:
    """Of a text part; None for any other."""
    return part if isinstance(part, str) else part.get("text") if part["type"] == "text" else None
