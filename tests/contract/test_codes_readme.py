"""The table of docs/codes.md is the code's table: same codes, kinds, meanings and remedies, in the same order."""

import re
from pathlib import Path

from app.prepare.codes import CODES

PAGE = Path(__file__).resolve().parents[2] / "docs/codes.md"


def table(text: str) -> list[tuple[str, ...]]:
    section = text.split("\n## Codes\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.+?) \| (.+?) \| (.+?) \|$", section, re.M)
    return [tuple(cell.strip() for cell in row) for row in rows]


def test_the_page_lists_every_code_as_the_program_has_it():
    assert table(PAGE.read_text(encoding="utf-8")) == [
        (name, " or ".join(code.kinds), code.meaning, code.remedy) for name, code in CODES.items()
    ]


def test_every_code_is_complete():
    for name, code in CODES.items():
        assert re.fullmatch(r"[A-Z]+(_[A-Z]+)*", name)
        assert code.kinds and code.meaning and code.remedy
        assert "|" not in code.meaning + code.remedy and not code.remedy.endswith(".")
