"""An input that cannot be used, as a stable code and one line. Whoever works on many lists it and goes on."""

import sys
from pathlib import Path
from typing import NoReturn


class RefusedInput(ValueError):
    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code

    def __reduce__(self):
        return RefusedInput, (self.code, str(self))


def refuse_empty(path: str | Path, *, name: str = "OUT") -> None:
    """An empty path, as an unset variable leaves it, would mean the current folder."""
    if not str(path).strip():
        raise ValueError(f"{name} is empty (a variable that is not set?); give a path, the current folder is .")


def code_of(error: ValueError) -> str:
    """The code of a refusal; BAD_INPUT where a value was refused that has none of its own."""
    return getattr(error, "code", "BAD_INPUT")


def text_of(error: ValueError) -> str:
    """What a refusal says, without its code."""
    return str(error).removeprefix(f"{code_of(error)}: ")


def fail(code: str, what: str, remedy: str, *, status: int = 2) -> NoReturn:
    """Ends the process with one line on standard error: 2 the call or a config is wrong, 3 an input was refused."""
    remedy = remedy[:1].upper() + remedy[1:].rstrip(".")
    sys.stderr.write(f"{code}: {what.rstrip('.')}. {remedy}{'' if remedy.endswith('?') else '.'}\n")
    sys.stderr.flush()
    raise SystemExit(status)
