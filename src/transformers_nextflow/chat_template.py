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

    Those of them that stand for a picture or a video (`marks`) still do in a chat without picture and video parts.
    """
    shape = 'A message is {"role": "user", "content": a text or a list of parts}'
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"{shape}, and a chat is a list of them, but got {messages!r:.80}.")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not message["role"]:
            raise ValueError(f"{shape}; this one has no role: {message!r:.80}.")
        if not isinstance(message.get("content"), str | list | tuple):
            raise ValueError(f"{shape}; this one has no content: {message!r:.80}.")
        for part in _parts(message):
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in ("text", "image", "video") or (kind == "text" and not isinstance(part.get("text"), str)):
                raise ValueError(
                    'A message has parts {"type": "text", "text": ...}, {"type": "image", "image": ...} and '
                    f'{{"type": "video", "video": ...}}, not {part!r:.80}.'
                )
            if kind != "text" and message["role"] == "system":
                raise ValueError("A system message is text; put a picture into a message of the user.")
    if all(part["type"] == "text" for message in messages for part in _parts(message)):
        special_tokens = [token for token in special_tokens if token not in marks]
    read = []
    for message in messages:
        parts = [
            {**part, "text": break_up(part["text"], special_tokens)} if part["type"] == "text" else part
            for part in _parts(message)
        ]
        content = parts[0]["text"] if isinstance(message["content"], str) else parts
        read.append({**message, "role": break_up(message["role"], special_tokens), "content": content})
    return read


def _parts(message: Mapping[str, Any]) -> list[Any]:
    """The content of a message as parts."""
    content = message["content"]
    parts = [content] if isinstance(content, str) else content
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
