"""How measures are shown to people: tables, a mean with its interval, what is missing; and JSON without NaN.

One place for the tokenizer's card and for answers, so that both read alike. Knows no measure.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "–"  # a score that does not exist here


def number(value: float | None, form: str = ".3f", *, percent: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{100 * value:{form}} %" if percent else f"{value:{form}}"


def with_interval(value: Mapping[str, float | None], form: str = ".1f", *, percent: bool = False) -> str:
    """A `mean` with its `low` and `high`, where there are any."""
    text = number(value["mean"], form, percent=percent)
    if text == MISSING or value["low"] is None:
        return text
    low, high = (number(value[side], form, percent=percent).removesuffix(" %") for side in ("low", "high"))
    return f"{text} ({low}–{high})"


def gap(value: Mapping[str, Any]) -> str:
    """A `difference` with its interval, signed, and what may be said of it; p only where it was put to the test."""
    if value["difference"] is None:
        return value["verdict"]
    text = f"{value['difference']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"
    return (
        f"{text}, p {value['p']:.2g}: {value['verdict']}" if value["p"] is not None else f"{text}: {value['verdict']}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown, an empty one behind."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def plain(node: Any) -> Any:
    """What JSON can hold: scores that do not exist are null."""
    if isinstance(node, Mapping):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [plain(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node
