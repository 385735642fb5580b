"""A refusal as a client is told it: status, code, meaning, what to do; nothing of what was sent.

A refusal's own line may name the file it is about, and files are named after patients: so the client gets the code's
entry in the one table, whose words are ours.
"""

from typing import Any

from app.shared.codes import CODES
from app.shared.refusals import Refused, as_refused, refusal_of

SAID_AS_IT_IS = ("BAD_VALUE",)  # about an option, in our own words alone


def as_http(error: BaseException) -> tuple[int, dict[str, Any]]:
    """HTTP status and detail."""
    if isinstance(error, Refused) and error.code in SAID_AS_IT_IS:
        return 422, {"code": error.code, "message": error.what, "remedy": error.remedy}
    refused = refusal_of(error) or (as_refused(error) if isinstance(error, ValueError | OSError) else None)
    if refused is None:
        return 500, {"code": "FAULT", "message": type(error).__name__, "remedy": "see the server's log"}
    row = CODES[refused.code]
    return 422, {"code": refused.code, "message": row.meaning, "remedy": row.remedy}
