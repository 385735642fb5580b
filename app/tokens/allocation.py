"""How many quantiser levels each cell of a volume is worth: bits go where they take most error away.

Every cell has its first level. The rest of a budget is spent greedily: the next levels of the cell where they lower
the squared error in HU most a level, where that is known by decoding each prefix once. What decoding one cell does to
its neighbours' voxels is left out. Same errors, same levels.
"""

import numpy as np
from jaxtyping import Float, Int, Int64


def spread_levels(errors: Float[np.ndarray, "M L"], mean: float) -> Int64[np.ndarray, " M"]:
    """Numbers of levels, `mean` on average or less where more would not help.

    `errors` of each cell with so many levels, from one up. A level that brings nothing by itself is taken along with
    the one after it that does (the lower convex hull), so gains fall from step to step and greed is best.
    """
    cells, most = errors.shape
    every = np.arange(cells)
    at, gains, rows, widths = np.zeros(cells, np.int64), [], [], []
    for _ in range(most - 1):
        with np.errstate(divide="ignore", invalid="ignore"):
            ahead = np.arange(most) - at[:, None]
            slopes = np.where(ahead > 0, (errors[every, at][:, None] - errors) / ahead, -np.inf)
        best = slopes.argmax(1)
        helps = slopes[every, best] > 0
        gains.append(slopes[every, best][helps])
        rows.append(every[helps])
        widths.append((best - at)[helps])
        at = np.where(helps, best, at)
    gain, row, width = (np.concatenate(parts) for parts in (gains, rows, widths))
    order = np.argsort(-gain, kind="stable")
    affordable = order[np.cumsum(width[order]) <= round(mean * cells) - cells]
    levels = np.ones(cells, np.int64)
    np.add.at(levels, row[affordable], width[affordable])
    return levels


def squared_errors(
    hu: Float[np.ndarray, " N"],
    decoded: Float[np.ndarray, "X Y Z"],
    coords: Int[np.ndarray, "N 3"],
    owner: Int64[np.ndarray, " N"],
) -> Float[np.ndarray, " M"]:
    """Of each cell, summed over its voxels; `owner` is the cell of each."""
    return np.bincount(owner, (decoded[tuple(coords.T)].astype(np.float64) - hu) ** 2)
