"""Docstrings as the reference prints them: types without marks of emphasis, names of classes as code.

transformers' style writes "name (`str`, *optional*)"; griffe takes what stands in the brackets for code, and code shows
backticks and asterisks as they are. Its "[`~NextFlowProcessor.decode`]" is a link to nobody here.
"""

import re
from typing import Any

import griffe

TYPES = re.compile(r"^ *\*{0,2}\w[^:\n]*? \(.*?`.*?\):(?= |$)", re.MULTILINE)
ERRORS = re.compile(r"^ *`\w+`(?: or `\w+`)*:(?= |$)", re.MULTILINE)
LINKS = re.compile(r"\[`(?:~(?:\w+\.)*)?([\w.]+)`\](?!\()")


class PlainDocstrings(griffe.Extension):
    """Rewrites every docstring."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ERRORS.sub(_plain, TYPES.sub(_plain, LINKS.sub(r"`\1`", obj.docstring.value)))


def _plain(head: re.Match) -> str:
    return head[0].replace("`", "").replace("*optional*", "optional")
