"""JSON files that others may have written or cut short."""

import json
from pathlib import Path
from typing import Any


def read_object(path: str | Path) -> dict[str, Any] | None:
    """The object in a file; None where the file is missing, damaged or holds something else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
