"""Voxels as runs along z: where each run begins and how many voxels it has, a fraction of what coordinates take.

`Runs` stand wherever coordinates may: `numpy.asarray` makes them, row by row in the same order. What moves or cuts
voxels works on runs, of which a body has thirty times fewer.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Integer


class Box(NamedTuple):
    start: tuple[int, int, int]
    stop: tuple[int, int, int]


class Runs:
    """Integer coordinates (N, 3) as `begins` (R, 3), `lengths` (R,), and the row at which each run `ends` (R,)."""

    ndim = 2

    def __init__(self, begins: Integer[np.ndarray, "R 3"], lengths: Integer[np.ndarray, " R"]) -> None:
        self.begins, self.lengths = begins, lengths
        self.ends = np.cumsum(lengths, dtype=np.int64)
        self.shape = (int(self.ends[-1]) if len(lengths) else 0, 3)
        self.dtype = begins.dtype

    @classmethod
    def of(cls, coords: "Runs | Integer[np.ndarray, 'N 3']") -> "Runs":
        """Of coordinates in any order: a run goes on where the next row is the next voxel along z."""
        if isinstance(coords, Runs):
            return coords
        x, y, z = (np.ascontiguousarray(column) for column in coords.T)
        breaks = np.ones(len(z), bool)
        breaks[1:] = (z[1:] != z[:-1] + z.dtype.type(1)) | (y[1:] != y[:-1]) | (x[1:] != x[:-1])
        first = np.flatnonzero(breaks)
        begins = np.empty((len(first), 3), z.dtype, order="F")
        for column, source in zip(begins.T, (x, y, z), strict=True):
            np.take(source, first, out=column, mode="clip")
        return cls(begins, np.diff(first, append=len(z)).astype(np.int32))

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> Integer[np.ndarray, "N 3"]:
        columns = np.repeat(self.begins.T, self.lengths, axis=1)
        columns[2] += (np.arange(len(self)) - np.repeat(self.ends - self.lengths, self.lengths)).astype(columns.dtype)
        return columns.T if dtype is None else columns.T.astype(dtype, copy=False)

    def __getitem__(self, index: Any) -> Integer[np.ndarray, "..."]:
        """The voxel of a row, or whatever else coordinates give for an index."""
        if not isinstance(index, int | np.integer):
            return np.asarray(self)[index]
        row = range(len(self))[index]
        run = int(np.searchsorted(self.ends, row, side="right"))
        voxel = self.begins[run].copy()
        voxel[2] += row - int(self.ends[run] - self.lengths[run])
        return voxel

    @property
    def nbytes(self) -> int:
        return self.begins.nbytes + self.lengths.nbytes + self.ends.nbytes

    def bounds(self) -> tuple[Int[np.ndarray, " 3"], Int[np.ndarray, " 3"]]:
        """The lowest voxel of the box that holds all, and the highest."""
        x, y, z = self.begins.T
        low = np.array([column.min() for column in (x, y, z)], np.int64)
        return low, np.array([x.max(), y.max(), (z + self.lengths).max() - 1], np.int64)

    def moved(self, shift: Integer[np.ndarray, " 3"]) -> "Runs":
        return Runs(np.asfortranarray(self.begins + shift.astype(self.dtype)), self.lengths)

    def inside(self, box: Box) -> tuple["Runs", Int[np.ndarray, " M"]]:
        """What lies in a box, and its rows."""
        x, y, z = self.begins.T
        lengths = self.lengths.astype(np.int32, copy=False)
        first = np.maximum(z, box.start[2], dtype=np.int32)
        last = np.minimum(z + lengths, box.stop[2])
        crosses = (x >= box.start[0]) & (x < box.stop[0]) & (y >= box.start[1]) & (y < box.stop[1]) & (first < last)
        which = np.flatnonzero(crosses)
        begins = np.empty((len(which), 3), self.dtype, order="F")
        begins[:, 0], begins[:, 1], begins[:, 2] = x[which], y[which], first[which]
        cut = Runs(begins, (last - first)[which])
        offsets = (self.ends - lengths + first - z)[which] - (cut.ends - cut.lengths)
        rows = np.repeat(offsets, cut.lengths)
        rows += np.arange(len(cut))
        return cut, rows


def counts_of_blocks(runs: Runs, *, side: int) -> Int[np.ndarray, "X Y Z"]:
    """How many voxels lie in each block of `side` voxels.

    Told by how the counts change along z: a run adds `side` voxels a block from its begin on, and from its end on takes
    them away again; the block in which it begins or ends holds a part.
    """
    extent = (runs.bounds()[1] // side + 1).tolist()
    x, y, z = (column.astype(np.int32) for column in runs.begins.T)
    line = (x // side * extent[1] + y // side) * (extent[2] + 2)
    changes = np.zeros(extent[0] * extent[1] * (extent[2] + 2))
    for at, sign in ((z, 1), (z + runs.lengths, -1)):
        into = at % side
        place = line + at // side
        changes += np.bincount(place, sign * (side - into), minlength=len(changes))
        changes += np.bincount(place + 1, sign * into, minlength=len(changes))
    per_line = changes.reshape(extent[0], extent[1], extent[2] + 2).cumsum(2)
    return np.rint(per_line[..., : extent[2]]).astype(np.int64)
