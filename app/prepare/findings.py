"""What is found in an input: a code of the one table, how it ended, the detail. Never holds header text or names."""

from collections.abc import Sequence
from typing import NamedTuple

from app.shared.codes import CODES, Kind
from app.shared.refusals import Refused


class Finding(NamedTuple):
    """One code that applies to an input, how it ended and the detail."""

    code: str
    kind: Kind
    message: str = ""


def finding(code: str, message: str = "") -> Finding:
    """A finding of a code that has one kind."""
    (kind,) = CODES[code].kinds
    return Finding(code, kind, message)


def finding_of(refused: Refused) -> Finding:
    return Finding(refused.code, "skipped" if refused.skipped else "refused", refused.what)


def codes_of(findings: Sequence[Finding]) -> list[str]:
    """Codes in order of appearance, each once; OK where there is none."""
    return list(dict.fromkeys(finding.code for finding in findings)) or ["OK"]
