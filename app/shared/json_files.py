"""JSON files: read where others may have written or cut them short, written whole."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.shared.atomic_files import write_text


def read_object(path: str | Path) -> dict[str, Any] | None:
    """The object in a file; None where the file is missing, damaged or holds something else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of one a line, but for lines at which a run was stopped; none where there is no file."""
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            yield content


def write_object(path: Path, content: dict[str, Any], **how: Any) -> None:
    """A whole file or none, a value a line; `how` is `json.dumps`'s."""
    write_text(path, json.dumps(content, **{"indent": 1, **how}) + "\n")
