"""What a person at a terminal sees while work goes on."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track


def progress(items: Sequence[Any], what: str) -> Iterable[Any]:
    """The items, with a bar on standard error where that is a terminal."""
    console = Console(stderr=True)
    return track(items, what, console=console, transient=True, disable=not console.is_terminal or len(items) < 2)
