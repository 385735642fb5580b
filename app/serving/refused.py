"""A refusal as a client is told it: status, code, meaning, what to do; nothing of what was sent.

A refusal's own line may name the file it is about, and files are named after patients: so the client gets the code's
entry in the one table, whose words are ours.
"""

from typing import Any

from app.prepare.codes import CODES
from app.shared.refusals import RefusedInput, code_of

SAID_AS_IT_IS = ("BAD_VALUE",)  # about an option, in our own words alone


def refusal(error: BaseException) -> tuple[int, dict[str, Any]]:
    """HTTP status and detail."""
    if not isinstance(error, ValueError | OSError):
        return 500, {"code": "FAULT", "message": type(error).__name__, "remedy": "see the server's log"}
    code = code_of(error)
    if isinstance(error, RefusedInput) and code in SAID_AS_IT_IS:
        message, _, remedy = str(error).partition(": ")
        return 422, {"code": code, "message": message, "remedy": remedy}
    row = CODES.get(code)
    if row is None:
        return 422, {"code": code, "message": "this input cannot be used", "remedy": "give another scan or token file"}
    return 422, {"code": code, "message": row.meaning, "remedy": row.remedy}
