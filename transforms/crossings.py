"""Which voxels lie inside a surface: where the lines of a grid along x cross its triangles.

A voxel is inside where the crossings before it are odd in number, whatever the triangles' order: cavities and several
parts come right by themselves. A crossing is decided edge by edge, from its two ends in an order that both triangles of
the edge share, so a line never slips between two triangles and a closed surface gives an even number on every line.
The sum of their turns, +1 where the line enters through a triangle seen from its front, is the winding number.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int64

HITS_AT_A_TIME = 1 << 21


class Crossings(NamedTuple):
    """Along each line (y, z) of a grid the places where a surface is crossed, in order."""

    starts: Int64[np.ndarray, " L"]  # of line y * side + z among the crossings; one more at the end
    x: Float[np.ndarray, " H"]
    turns: Int[np.ndarray, " H"]
    side: int

    def parity(self, coords: Int[np.ndarray, "N 3"]) -> Bool[np.ndarray, " N"]:
        """Whether the number of crossings before each voxel is odd."""
        return self._sum(coords, None).astype(bool)

    def winding(self, coords: Int[np.ndarray, "N 3"]) -> Int[np.ndarray, " N"]:
        """How many times the surface is wound about each voxel; 1 inside a plain one with its front outside."""
        return self._sum(coords, self.turns)

    def _sum(self, coords: Int[np.ndarray, "N 3"], turns: Int[np.ndarray, " H"] | None) -> Int[np.ndarray, " N"]:
        line = coords[:, 1].astype(np.int64) * self.side + coords[:, 2]
        at, end = self.starts[line], self.starts[line + 1]
        total = np.zeros(len(coords), np.int8 if turns is None else np.int32)
        rows = np.flatnonzero(at < end)
        at, end, x = at[rows], end[rows], coords[rows, 0].astype(np.float64)
        while len(rows):
            passed = self.x[at] < x
            rows, at, end, x = rows[passed], at[passed], end[passed], x[passed]
            if turns is None:
                total[rows] ^= 1
            else:
                total[rows] += turns[at]
            at = at + 1
            more = at < end
            rows, at, end, x = rows[more], at[more], end[more], x[more]
        return total


def crossings(vertices: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "T 3"], *, side: int) -> Crossings:
    """Of the lines of a grid of `side` voxels with a surface; vertices in voxels, shared by the faces around them."""
    vertices = np.ascontiguousarray(vertices, np.float64)
    low, high = _rows_of(vertices[faces, 2], side)
    counts = high - low
    ends = counts.cumsum()
    lines, places, turns = [np.zeros(0, np.int64)], [np.zeros(0)], [np.zeros(0, np.int8)]
    start = 0
    while start < len(faces):
        stop = max(int(np.searchsorted(ends, ends[start] - counts[start] + HITS_AT_A_TIME // 8)), start + 1)
        for y, z, x, turn in _hits(vertices, faces[start:stop], low[start:stop], counts[start:stop], side):
            lines.append(y * side + z)
            places.append(x)
            turns.append(turn)
        start = stop
    line, x, turn = np.concatenate(lines), np.concatenate(places), np.concatenate(turns)
    order = np.lexsort((x, line))
    starts = np.concatenate([[0], np.bincount(line, minlength=side * side).cumsum()])
    return Crossings(starts, x[order], turn[order], side)


def _rows_of(z: Float[np.ndarray, "T 3"], side: int) -> tuple[Int64[np.ndarray, " T"], Int64[np.ndarray, " T"]]:
    """First whole z that each triangle may cross, and the one after the last: it crosses where low <= z < high."""
    low, high = (np.clip(np.ceil(end), 0, side).astype(np.int64) for end in (z.min(1), z.max(1)))
    return low, np.maximum(high, low)


def _hits(vertices, faces, low, counts, side: int):
    """Lines through each triangle, a chunk at a time: y, z, where along x, and the turn."""
    owner = np.repeat(np.arange(len(faces)), counts)
    z = np.arange(len(owner)) - np.repeat(counts.cumsum() - counts, counts) + low[owner]
    y, x = np.full((3, len(owner)), np.nan), np.full((3, len(owner)), np.nan)
    for edge in range(3):
        one, two = faces[owner, edge], faces[owner, (edge + 1) % 3]
        a, b = vertices[np.minimum(one, two)], vertices[np.maximum(one, two)]
        crosses = (a[:, 2] <= z) != (b[:, 2] <= z)
        a, b = a[crosses], b[crosses]
        share = (z[crosses] - a[:, 2]) / (b[:, 2] - a[:, 2])
        y[edge, crosses] = a[:, 1] + share * (b[:, 1] - a[:, 1])
        x[edge, crosses] = a[:, 0] + share * (b[:, 0] - a[:, 0])
    first, last = np.nanargmin(y, axis=0), np.nanargmax(y, axis=0)
    first = np.where(first == last, _other(y, first), first)
    rows = np.arange(len(owner))
    y0, y1, x0, x1 = y[first, rows], y[last, rows], x[first, rows], x[last, rows]
    begin, stop = (np.clip(np.ceil(end), 0, side).astype(np.int64) for end in (y0, y1))
    (ya, yb, yc), (za, zb, zc) = vertices[faces, 1].T, vertices[faces, 2].T
    area = (yb - ya) * (zc - za) - (yc - ya) * (zb - za)
    turn = np.where(area < 0, 1, -1).astype(np.int8)[owner]  # a front seen from low x is entered
    width = stop - begin
    ends = width.cumsum()
    at = 0
    while at < len(width):
        to = max(int(np.searchsorted(ends, ends[at] - width[at] + HITS_AT_A_TIME)), at + 1)
        block = slice(at, to)
        row = np.repeat(np.arange(at, to), width[block])
        line = np.arange(len(row)) - np.repeat(width[block].cumsum() - width[block], width[block]) + begin[row]
        length = y1[row] - y0[row]
        share = np.divide(line - y0[row], length, out=np.zeros(len(row)), where=length > 0)
        yield line, z[row], x0[row] + share * (x1[row] - x0[row]), turn[row]
        at = to


def _other(y: Float[np.ndarray, "3 N"], one: Int64[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
    """Of two edges crossed at one y the other one."""
    rest = ~np.isnan(y)
    rest[one, np.arange(y.shape[1])] = False
    return rest.argmax(0)
