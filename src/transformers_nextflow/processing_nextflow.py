"""The processor of NextFlow."""

# ChatML as Qwen writes it, without a system prompt of its own. An image part of a message becomes `<image>`. The
# `generation` marks let trainers find what the assistant said (`return_assistant_tokens_mask=True`).
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part is string -%}
                {{- part -}}
            {%- elif part.type == 'image' or part.type == 'image_url' -%}
                {{- '<image>' -}}
            {%- elif part.type == 'text' -%}
                {{- part.text -}}
            {%- else -%}
                {{- raise_exception('A message may hold parts of type "text" and "image", not "' ~ part.type ~ '".') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
            {{- render(message.content) + '<|im_end|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- render(message.content) + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
