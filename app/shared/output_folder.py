"""Looks at where results go, before any work."""

import os
from pathlib import Path

from app.shared.refusals import Refused


def check_folder(path: Path, *, name: str = "OUT") -> None:
    """Before any work: a folder can be made or is there, and can be written; `name` is what the user calls it."""
    for part in (path, *path.parents):
        if part.exists():
            if not part.is_dir():
                raise Refused("NO_OUTPUT", f"{part} is a file, {name} needs a folder there", f"give another {name}")
            if not os.access(part, os.W_OK | os.X_OK):
                what = f"{part} may not be written"
                raise Refused("NO_OUTPUT", what, f"give another {name}, or mend its permissions")
            return
