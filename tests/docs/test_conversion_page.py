"""The key tables of the conversion page are the converters' own.

`python tests/docs/test_conversion_page.py` writes them anew.
"""

import re
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from conversion.streaming import markdown_table

PAGE = Path(__file__).parents[2] / "docs" / "conversion.md"
BLOCK = re.compile(r"(<!-- keys: (\w+)\.(\w+) -->\n).*?(<!-- /keys -->)", re.S)


def with_tables(text: str) -> str:
    """A page whose blocks hold the tables that they name."""

    def fill(block: re.Match) -> str:
        table = getattr(import_module(f"conversion.{block[2]}"), block[3])
        return f"{block[1]}\n{markdown_table(table)}\n\n{block[4]}"

    return BLOCK.sub(fill, text)


def test_tables_are_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    assert len(BLOCK.findall(text)) == 4
    assert with_tables(text) == text, "run `python tests/docs/test_conversion_page.py`"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
