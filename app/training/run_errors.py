"""How a run ends: a refusal as one line with its status, SIGTERM before the first step at once, a fault with its trace.

Under MONAI's command line nothing else stands between an error and MONAI's forty-line chain.
"""

import logging
import os
import re
import signal
import sys
import traceback
from typing import Any

from app.shared.refusals import Refused, refusal_of, say

log = logging.getLogger(__name__)

ENGINES = tuple(f"ignite.engine.engine.{name}" for name in ("SupervisedTrainer", "SupervisedEvaluator"))


def one_line_errors() -> None:
    """From here on a refusal ends the process as one line with its status; the trace goes to the log."""
    quiet_engines()
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        refused = refusal_of_run(error)
        if refused is None:
            usual(kind, error, trace)
            return
        log.debug("".join(traceback.format_exception(kind, error, trace)))
        logging.shutdown()
        say(refused)
        if refused.code == "LOST_RANK" or isinstance(error, KeyboardInterrupt):
            # an orderly end would wait for the process that is gone, or for loader workers
            os._exit(refused.status)
        raise SystemExit(refused.status)

    sys.excepthook = hook


def quiet_engines(*, end: bool = False) -> None:
    """Ignite's engines do not log a refusal that passes through them: it is printed at its end. `end` undoes it."""
    for logger in map(logging.getLogger, ENGINES):
        (logger.removeFilter if end else logger.addFilter)(_is_no_refusal)


def refusal_of_run(error: BaseException) -> Refused | None:
    """As `refusal_of`, and a config's own `$` expression that failed."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    unread = isinstance(cause, SyntaxError) and cause.filename in ("<string>", "<unknown>")
    if not unread and _files_of(cause)[-1:] != ["<string>"]:
        return refusal_of(error)
    what = f"{type(cause).__name__}: {cause}".splitlines()[0]
    text = f"${(cause.text or '').strip()}" if unread else _expression(error)
    return Refused("BAD_EXPRESSION", f"{text} gives {what}")


def end_at_once_on_sigterm() -> None:
    """SIGTERM ends the process with one line, like Ctrl-C: before the first step nothing is lost."""
    process = os.getpid()

    def end(number: int, _frame: object) -> None:
        if os.getpid() == process:  # what was forked from here has nothing to say
            os.write(2, f"{Refused('STOPPED', 'ended by SIGTERM')}\n".encode())
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def _is_no_refusal(_record: logging.LogRecord) -> bool:
    error = sys.exc_info()[1]
    return error is None or refusal_of(error) is None


def _files_of(error: BaseException) -> list[str]:
    """The files that it passed through, outermost first."""
    return [frame.filename for frame in traceback.extract_tb(error.__traceback__)]


def _expression(error: BaseException | None) -> str:
    """The expression that MONAI says it could not evaluate, the innermost of several."""
    innermost = "an expression"
    while error is not None:
        if match := re.match(r"Failed to evaluate \w+:\s*'?(.+?)'?$", str(error), re.DOTALL):
            innermost = match[1]
        error = error.__cause__
    return innermost
