"""Everything checked before anything is trained, and the one way to end a run over a user's mistake.

`fail` writes one line and leaves with an exit status; any other exception would reach the user as MONAI's
forty-line chain.
"""

import sys
from typing import NoReturn


def fail(code: str, what: str, remedy: str, *, status: int = 2) -> NoReturn:
    """Ends the process with one line on standard error: 2 the call or a config is wrong, 3 an input was refused."""
    sys.stderr.write(f"{code}: {what.rstrip('.')}. {remedy.rstrip('.')}.\n")
    sys.stderr.flush()
    raise SystemExit(status)
