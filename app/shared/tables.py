"""CSV tables as rows by column, whoever wrote them: a cell too many is told by its line, never dropped."""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from app.shared.refusals import Refused


def read_table(lines: Iterable[str], *, name: str) -> Iterator[dict[str, str | None]]:
    """Rows of a table of that name. Cells beyond the header, as an unquoted comma makes them, are refused.

    Blank cells at a line's end, which spreadsheets write, are none.
    """
    reader = csv.reader(lines)
    header = next(reader, [])
    check_header(header, name=name)
    start = reader.line_num + 1
    for cells in reader:
        surplus = cells[len(header) :]
        if any(cell.strip() for cell in surplus):
            what = f"line {start} of {name} has {len(cells)} cells, its header has {len(header)}"
            raise Refused("BAD_TABLE", what, "put a cell with a comma in it into quotation marks")
        if cells:
            yield dict(zip(header, [*cells, *[None] * (len(header) - len(cells))], strict=False))
        start = reader.line_num + 1


def check_header(header: Sequence[str], *, name: str) -> None:
    """Of two columns with one name only the last would be read."""
    twice = [column for column, count in Counter(header).items() if count > 1 and column.strip()]
    if twice:
        raise Refused("BAD_TABLE", f"{name} has the column {twice[0]!r} twice", "rename or remove one")
