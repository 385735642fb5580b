"""Which cells exist, from coarse to fine: an octree whose occupancy is entropy-coded by what is known around each cell.

The octree ends at the latents; stored support goes on from there, three halvings further down. Cells come in Morton
order, x highest, so the children of sorted cells are sorted. A cell first says whether all its eight children exist;
one with fewer says each, predicted from its siblings, its neighbours and their children so far. Needs no table: the
model learns as it goes.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt8

from app.tokens.entropy import AdaptiveBits, Reader, Writer

MAX_CELLS = 2**25
MAX_MAP = 2**26  # cells of a level's grid: four bytes each are taken
OCTANTS = np.array([[o >> 2 & 1, o >> 1 & 1, o & 1] for o in range(8)])
CORNER_CLASS = np.array([0, 0, 1, 1, 2])  # of the four neighbours over edges and corner of an octant: few, some, all

Shape = tuple[int, int, int]
# Codes bits by contexts with a model; a writer is given the bits, a reader finds them.
CodeBits = Callable[[AdaptiveBits, Int64[np.ndarray, " N"], Bool[np.ndarray, " N"] | None], Bool[np.ndarray, " N"]]


def writing(writer: Writer) -> CodeBits:
    def code(model: AdaptiveBits, contexts: np.ndarray, bits: np.ndarray | None) -> np.ndarray:
        model.put(writer, bits, contexts)
        return bits

    return code


def reading(reader: Reader) -> CodeBits:
    return lambda model, contexts, bits: model.take(reader, contexts)


class OccupancyModel:
    """What was learned of cells and their children so far, whatever their level."""

    def __init__(self) -> None:
        self._full, self._parts = AdaptiveBits(27 * 7), AdaptiveBits(4 * 4 * 4 * 7 * 3)

    def children(
        self, code: CodeBits, cells: Int[np.ndarray, "N 3"], shape: Shape, truth: Bool[np.ndarray, "N 8"] | None = None
    ) -> Bool[np.ndarray, "N 8"]:
        """Which children each cell of a grid has: encoded where they are given, else decoded."""
        row_of = row_map(cells, shape, border=1)
        around, faces = _numbers_around(row_of, len(cells), cells)
        full = code(self._full, 7 * around + faces, None if truth is None else truth.all(1))
        known = np.zeros((len(cells) + 1, 8), bool)  # the last stands for a neighbour that does not exist
        known[:-1][full] = True
        kind = np.append(1 + full.astype(np.int64), 0)
        rows = np.flatnonzero(~full)
        for octant in range(8):
            contexts = _contexts(known, kind, row_of, cells[rows], rows, octant)
            num_known = known[rows].sum(1)
            open_ = ~np.isin(num_known, (0, 7)) if octant == 7 else np.ones(len(rows), bool)
            known[rows[~open_], octant] = num_known[~open_] == 0  # one child at least, eight are said to be full
            given = None if truth is None else truth[rows[open_], octant]
            known[rows[open_], octant] = code(self._parts, contexts[open_], given)
        return known[:-1]


def _numbers_around(row_of: np.ndarray, count: int, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of the 26 neighbours each cell has, and how many of the six across a face."""
    there = (row_of < count).astype(np.uint8)
    faces, box = np.zeros_like(there), there.copy()
    for axis in range(3):
        low, high = ([slice(None)] * 3 for _ in range(2))
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        for source, into in ((there, faces), (box.copy(), box)):
            into[tuple(low)] += source[tuple(high)]
            into[tuple(high)] += source[tuple(low)]
    place = tuple(cells.T + 1)
    return box[place].astype(np.int64) - 1, faces[place].astype(np.int64)


def _contexts(
    known: np.ndarray, kind: np.ndarray, row_of: np.ndarray, cells: np.ndarray, rows: np.ndarray, octant: int
) -> Int64[np.ndarray, " N"]:
    """Contexts of one octant: along each axis a sibling behind and a cousin ahead, coded already or of a coded cell."""
    ahead = 2 * OCTANTS[octant] - 1
    siblings, cousins, outer = (np.zeros(len(cells), np.int64) for _ in range(3))
    for axis in range(3):
        step = np.where(np.arange(3) == axis, ahead, 0)
        near = _neighbours(row_of, cells, step)
        if OCTANTS[octant][axis]:
            other = octant ^ (4 >> axis)
            siblings += known[rows, other]
            cousins += known[near, other]
        else:
            outer += kind[near]
    corners = sum(
        (kind[_neighbours(row_of, cells, np.where(mask, ahead, 0))] > 0).astype(np.int64)
        for mask in ([1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1])
    )
    kept = int(OCTANTS[octant].sum())
    return (((kept * 4 + siblings) * 4 + cousins) * 7 + outer) * 3 + CORNER_CLASS[corners]


def row_map(cells: np.ndarray, shape: Shape, *, border: int) -> Int[np.ndarray, "X Y Z"]:
    """The row of each cell of the grid and of a border around it; the number of rows where there is none."""
    sides = np.array(shape, np.int64) + 2 * border
    if int(np.prod(sides)) > MAX_MAP:
        raise ValueError(f"a grid of {' x '.join(map(str, shape))} cells is too large to be packed")
    row_of = np.full(sides, len(cells), np.int32)
    row_of[tuple(cells.T + border)] = np.arange(len(cells), dtype=np.int32)
    return row_of


def _neighbours(row_of: np.ndarray, cells: np.ndarray, step: np.ndarray) -> Int[np.ndarray, " N"]:
    return row_of[tuple((cells + (1 + np.asarray(step))).T)]


def grown(cells: Int[np.ndarray, "N 3"], children: Bool[np.ndarray, "N 8"]) -> Int[np.ndarray, "M 3"]:
    """The children themselves, one level finer."""
    rows, octants = np.nonzero(children)
    return 2 * cells[rows] + OCTANTS[octants]


def _levels(shape: Shape) -> list[Shape]:
    """Grids from one cell down to one of `shape`."""
    halvings = (max(shape) - 1).bit_length()
    return [tuple(-(-n // (1 << k)) for n in shape) for k in range(halvings, -1, -1)]


# ---- the octree down to the latents


def put_cells(writer: Writer, coords: Int[np.ndarray, "M 3"], shape: Shape) -> OccupancyModel:
    """Cells in Morton order. Gives the model, for what follows."""
    model, code, grids = OccupancyModel(), writing(writer), _levels(shape)
    for grid, (cells, children) in zip(grids[:-1], _ancestors(coords, len(grids) - 1), strict=True):
        model.children(code, cells, grid, children)
    return model


def _ancestors(coords: np.ndarray, halvings: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The cells above, coarsest first, each level with which children its cells have."""
    levels, fine = [], np.asarray(coords, np.int64)
    for _ in range(halvings):
        parents = fine >> 1
        first = np.append(True, (parents[1:] != parents[:-1]).any(1))
        children = np.zeros((int(first.sum()), 8), bool)
        children[np.cumsum(first) - 1, (fine & 1) @ np.array([4, 2, 1])] = True
        fine = parents[first]
        levels.insert(0, (fine, children))
    return levels


def take_cells(reader: Reader, count: int, shape: Shape) -> tuple[Int[np.ndarray, "M 3"], OccupancyModel]:
    """So many cells in Morton order, and the model."""
    if not 1 <= count <= MAX_CELLS:
        raise ValueError(f"it claims {count} cells, 1 to {MAX_CELLS} can be packed")
    model, code, cells = OccupancyModel(), reading(reader), np.zeros((1, 3), np.int64)
    for coarse, fine in pairwise(_levels(shape)):
        cells = grown(cells, model.children(code, cells, coarse))
        if len(cells) > count or (cells >= np.array(fine)).any():
            raise ValueError(f"its octree leaves a grid of {fine} cells, or has more than the {count} it claims")
    if len(cells) != count:
        raise ValueError(f"its octree has {len(cells)} cells, it claims {count}")
    return cells, model


def octree_bytes(coords: Int[np.ndarray, "M 3"], shape: Shape) -> int:
    """Of the octree as it stands: one a cell above the latents."""
    return sum(len(cells) for cells, _ in _ancestors(coords, len(_levels(shape)) - 1))


# ---- support: the octree further down


def put_support(
    writer: Writer,
    model: OccupancyModel,
    coords: Int[np.ndarray, "M 3"],
    shape: Shape,
    support: tuple[UInt8[np.ndarray, " _"], ...],
) -> None:
    cells, code = np.asarray(coords, np.int64), writing(writer)
    for part in support:
        children = np.unpackbits(part[:, None], axis=1, bitorder="little").astype(bool)
        model.children(code, cells, shape, children)
        cells, shape = grown(cells, children), tuple(2 * n for n in shape)


def take_support(
    reader: Reader, model: OccupancyModel, coords: Int[np.ndarray, "M 3"], shape: Shape, levels: int
) -> tuple[UInt8[np.ndarray, " _"], ...]:
    cells, code, parts = np.asarray(coords, np.int64), reading(reader), []
    for level in range(levels):
        children = model.children(code, cells, shape)
        parts.append(np.packbits(children, axis=1, bitorder="little")[:, 0])
        if int(children.sum()) > MAX_CELLS:
            raise ValueError(f"its support has more than {MAX_CELLS} cells")
        if level + 1 < levels:
            cells, shape = grown(cells, children), tuple(2 * n for n in shape)
    return tuple(parts)
