"""How many codes each cell has, where cells have unlike numbers: a bit a level, predicted from its neighbours.

A cell has its first code; then a bit says whether a second follows, and so on. Each bit is predicted from the kind of
the first code and from how many of the neighbours coded so far have another code or none, learned as the file goes.
"""

import numpy as np
from jaxtyping import Int, Int64

from app.tokens.entropy import AdaptiveBits
from app.tokens.occupancy import CodeBits

NUM_KINDS = 8  # of first codes
VOTES = 3  # of neighbours: none, one, more

Passes = list[tuple[Int[np.ndarray, " _"], Int[np.ndarray, "_ 6"]]]  # rows, and those of their six neighbours


def code_levels(
    code: CodeBits,
    passes: Passes,
    kinds: Int64[np.ndarray, " M"],
    most: int,
    truth: Int64[np.ndarray, " M"] | None = None,
) -> Int64[np.ndarray, " M"]:
    """Numbers of 1 to `most`, encoded where given, else decoded. `kinds`: of the first codes, under NUM_KINDS."""
    levels = np.ones(len(kinds), np.int64)
    for number in range(1, most):
        model = AdaptiveBits(NUM_KINDS * VOTES * VOTES)
        goes_on = np.full(len(kinds) + 1, -1)  # the last stands for a neighbour that does not exist
        for rows, near in passes:
            stop, go = (np.minimum((goes_on[near] == side).sum(1), VOTES - 1) for side in (0, 1))
            contexts = (kinds[rows] * VOTES + stop) * VOTES + go
            open_ = levels[rows] == number
            given = None if truth is None else truth[rows[open_]] > number
            goes_on[rows] = 0
            goes_on[rows[open_]] = code(model, contexts[open_], given)
        levels += goes_on[:-1] == 1
    return levels
