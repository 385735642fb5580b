"""The one refusal: a code, what is wrong, what to do, an exit status. Raised anywhere, an exception like any other.

It leaves as one line at the outermost edge only: `app/__main__.py`, and under MONAI's command line pre-flight's hook.
Both ask `refusal_of` which refusal an error is. A plain ValueError raised in this project's code is one as well: so do
transforms and networks, which know no codes, refuse values.
"""

import errno
import os
import re
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from app.shared.codes import CODES

OURS = ("app", "transforms", "networks")
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_SUCH_PATH = (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
LOST_RANK = r"Connection (?:closed|reset) by peer|NCCL \w+ error|Broken pipe"  # how gloo and NCCL say it


class Refused(ValueError):
    """What a user can put right. Remedy and status are the code's own where none are given.

    `skipped`: no CT volume at all, which is no mistake where it lies beside one.
    """

    def __init__(
        self, code: str, what: object, remedy: str = "", *, status: int | None = None, skipped: bool = False
    ) -> None:
        row = CODES[code]
        self.code, self.what, self.skipped = code, " ".join(str(what).splitlines()).strip(), skipped
        self.remedy = remedy or row.remedy
        self.status = row.status if status is None else status
        super().__init__(str(self))

    @property
    def text(self) -> str:
        """What is wrong and what to do, without the code."""
        remedy = self.remedy[:1].upper() + self.remedy[1:].rstrip(".")
        return f"{self.what.rstrip('.')}. {remedy}{'' if remedy.endswith('?') else '.'}"

    def __str__(self) -> str:
        return f"{self.code}: {self.text}"

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), status=self.status, skipped=self.skipped), (self.code, self.what, self.remedy)


def check_path(path: str | Path, *, name: str = "OUT") -> None:
    """Refuses an empty path, which would mean the current folder, and a pipe or device, which would be waited for."""
    if not str(path).strip():
        what = f"{name} is empty (a variable that is not set?)"
        raise Refused("BAD_VALUE", what, "give a path, the current folder is .")
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise Refused("NO_SOURCE", f"{name} {path} is a pipe or a device", "save what comes from it as a file first")


def as_refused(error: Exception) -> Refused:
    """A refused input as it is listed, whoever refused it."""
    return error if isinstance(error, Refused) else Refused("BAD_VALUE", str(error) or type(error).__name__)


def refusal_of(error: BaseException) -> Refused | None:
    """The refusal that an error is, or that lies behind it; None where it is a fault of ours.

    What catches a refusal and raises another means the other, so that the outermost counts; of plain errors the
    innermost is what happened.
    """
    chain = [error]
    while chain[-1].__cause__ is not None and chain[-1].__cause__ not in chain:
        chain.append(chain[-1].__cause__)
    if isinstance(error, KeyboardInterrupt):
        return Refused("STOPPED", "ended by Ctrl-C")
    if (refusal := next((part for part in chain if isinstance(part, Refused)), None)) is not None:
        return refusal
    for part in reversed(chain):
        translated = _refused_value(part) or _from_worker(part) or _of_system(part)
        if translated is not None:
            translated.__cause__ = part
            return translated
    return None


def _refused_value(error: BaseException) -> Refused | None:
    """A ValueError that was raised in this project's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    text = str(error).strip()
    if not (isinstance(error, ValueError) and text and frames and _is_ours(frames[-1].filename)):
        return None
    return Refused("BAD_VALUE", text.splitlines()[0])


def _is_ours(file: str) -> bool:
    here = Path(__file__).resolve().parents[2]
    return any(Path(file).is_relative_to(here / part) for part in OURS)


def _from_worker(error: BaseException) -> Refused | None:
    """A refusal that torch made text of: a loader's worker sends its trace, cause first."""
    if " in DataLoader worker process " not in str(error):
        return None
    trace = re.split(r"\n\n(?:The above exception|During handling)", str(error))[0]
    files = re.findall(r'^ *File "(.+?)", line', trace, re.MULTILINE)
    if said := re.search(rf"^{Refused.__module__}\.Refused: (\w+): (.+)\. (.+)$", trace, re.MULTILINE):
        return Refused(*said.groups())
    _, is_value, text = trace.rpartition("\nValueError: ")
    return Refused("BAD_VALUE", text.splitlines()[0]) if is_value and text and files and _is_ours(files[-1]) else None


def _of_system(cause: BaseException) -> Refused | None:
    """What the machine refused."""
    if isinstance(cause, OSError) and cause.errno in FULL:
        return Refused("DISK_FULL", f"no space left on the disk of {cause.filename or 'OUT'}")
    if isinstance(cause, OSError) and cause.filename and cause.errno in FORBIDDEN:
        return Refused("NO_ACCESS", f"{cause.strerror}: {cause.filename}")
    if isinstance(cause, OSError) and cause.filename and cause.errno in NO_SUCH_PATH:
        return Refused("BAD_PATH", f"{cause.strerror}: {cause.filename}")
    if "RANK" in os.environ and (lost := re.search(LOST_RANK, str(cause))):
        return Refused("LOST_RANK", f"another process of this run is gone ({lost[0]}), so this one ends")
    if type(cause).__name__ == "OutOfMemoryError":  # torch's, whose import would cost every command seconds
        return Refused("OUT_OF_MEMORY", str(cause).splitlines()[0])
    return None


def say(refused: Refused) -> None:
    """The one line. Ranks that are told to end do so at the same step, and one of them says it."""
    if refused.code != "STOPPED" or os.environ.get("RANK", "0") == "0":
        sys.stdout.flush()
        sys.stderr.write(f"{refused}\n")
        sys.stderr.flush()
