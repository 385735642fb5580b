"""What kind of surface a triangle mesh is: closed, manifold, one way round, crossing itself.

A surface is closed where every edge belongs to an even number of triangles: then each line crosses it an even number of
times, and inside and outside are well defined.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int64

from transforms.triangle_band import OCTANTS, distances, frames_of, normals_of

TRIANGLES_OF_A_CELL = 12  # below this all pairs are tried
DEEPEST = 12  # halvings of the box: many triangles may meet in one point
PAIRS_AT_A_TIME = 1 << 19
MARGIN = 1e-7  # of an edge or triangle, near whose ends touching is no crossing


class Kind(NamedTuple):
    open_edges: int  # that belong to an odd number of triangles
    branching_edges: int  # that belong to more than two
    is_oriented: bool  # whether neighbours run along their common edge in opposite directions
    crossing: int  # triangles that another one passes through


def welded(
    vertices: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "T 3"], *, within: float = 0.0
) -> tuple[Float[np.ndarray, "W 3"], Int64[np.ndarray, "U 3"]]:
    """One vertex a place, places up to `within` apart being one, without triangles that have a vertex twice."""
    places = np.rint(vertices / within) if within > 0 else vertices
    _, first, number = np.unique(places, axis=0, return_index=True, return_inverse=True)
    faces = number.reshape(-1)[faces]
    good = (faces != np.roll(faces, 1, axis=1)).all(1)
    return vertices[first], faces[good]


def kind_of(vertices: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "T 3"]) -> Kind:
    """Of a welded mesh."""
    one, two = faces.reshape(-1), np.roll(faces, -1, axis=1).reshape(-1)
    edges = np.minimum(one, two).astype(np.int64) * len(vertices) + np.maximum(one, two)
    order = np.argsort(edges)
    firsts = np.flatnonzero(np.diff(edges[order], prepend=-1))
    counts = np.diff(firsts, append=len(edges))
    sense = np.where(one < two, 1, -1)[order]
    balance = np.add.reduceat(sense, firsts) if len(firsts) else counts
    crossing = np.zeros(len(faces), bool)
    for rows, others in _close_pairs(vertices[faces]):
        through = _pass_through(vertices, faces[rows], faces[others])
        crossing[rows[through]] = crossing[others[through]] = True
    return Kind(int((counts % 2).sum()), int((counts > 2).sum()), not balance.any(), int(crossing.sum()))


def sharp_edges(
    vertices: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "T 3"], *, degrees: float
) -> Float[np.ndarray, "E 2 3"]:
    """The ends of edges at which two triangles meet under more than this angle, whichever way round they are."""
    one, two = faces.reshape(-1), np.roll(faces, -1, axis=1).reshape(-1)
    low, high = np.minimum(one, two), np.maximum(one, two)
    order = np.lexsort((high, low))
    same = (np.diff(low[order]) == 0) & (np.diff(high[order]) == 0)
    left, right = order[:-1][same], order[1:][same]
    normals, _ = normals_of(vertices[faces])
    cosine = np.einsum("ei,ei->e", normals[left // 3], normals[right // 3])
    cosine *= np.where(one[left] == one[right], -1, 1)  # both run along the edge the same way: one is turned over
    sharp = left[cosine < np.cos(np.radians(degrees))]
    return vertices[np.stack([low[sharp], high[sharp]], 1)]


def _close_pairs(corners: Float[np.ndarray, "T 3 3"]) -> Iterator[tuple[Int64[np.ndarray, " P"], ...]]:
    """Pairs of triangles whose boxes meet, some several times, by cells that are halved while many share one."""
    low, high = corners.min(1), corners.max(1)
    if not len(corners):
        return
    origin, side = low.min(0), float((high.max(0) - low.min(0)).max()) or 1.0
    cells, members = np.zeros((len(corners), 3), np.int64), np.arange(len(corners))
    frames = frames_of(corners)
    for depth in range(DEEPEST + 1):
        if not len(members):
            return
        order = np.lexsort(cells.T)
        cells, members = cells[order], members[order]
        firsts = np.flatnonzero(np.concatenate([[True], (cells[1:] != cells[:-1]).any(1)]))
        counts = np.diff(firsts, append=len(members))
        few = (counts <= TRIANGLES_OF_A_CELL) | (depth == DEEPEST)
        yield from _meeting(members, firsts[few], counts[few], low, high)
        many = np.repeat(~few, counts)
        size = side / 2 ** (depth + 1)
        parent, child = cells[many], members[many]
        inner = 2 * parent[:, None] + OCTANTS
        middles, offsets = origin + (2 * parent + 1) * size, (OCTANTS - 0.5) * size
        touches = distances(frames, child, middles, offsets) <= math.sqrt(3) / 2 * size * (1 + 1e-3)
        cells, members = inner[touches], np.broadcast_to(child[:, None], touches.shape)[touches]


def _meeting(members, firsts, counts, low, high) -> Iterator[tuple[Int64[np.ndarray, " P"], ...]]:
    """All pairs in each cell whose boxes meet."""
    for size in np.unique(counts):
        one, two = np.triu_indices(size, 1)
        starts = firsts[counts == size]
        step = max(1, PAIRS_AT_A_TIME // max(len(one), 1))
        for at in range(0, len(starts), step):
            group = members[starts[at : at + step, None] + np.arange(size)]
            rows, others = group[:, one].reshape(-1), group[:, two].reshape(-1)
            meet = ((low[rows] <= high[others]) & (low[others] <= high[rows])).all(1)
            yield rows[meet], others[meet]


def _pass_through(vertices, faces, others) -> Bool[np.ndarray, " P"]:
    """Whether an edge of one triangle passes through the inside of the other; edges that meet at a corner do not."""
    result = np.zeros(len(faces), bool)
    for these, those in ((faces, others), (others, faces)):
        for edge in range(3):
            ends = these[:, [edge, (edge + 1) % 3]]
            apart = (ends[:, :, None] != those[:, None]).all((1, 2)) & ~result
            rows = np.flatnonzero(apart)
            result[rows] = _pierces(vertices[ends[rows]], vertices[those[rows]])
    return result


def _pierces(ends: Float[np.ndarray, "P 2 3"], corners: Float[np.ndarray, "P 3 3"]) -> Bool[np.ndarray, " P"]:
    """Moeller and Trumbore's test of a segment and a triangle."""
    along = ends[:, 1] - ends[:, 0]
    left, right = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    across = np.cross(along, right)
    scale = np.einsum("pi,pi->p", left, across)
    size = np.linalg.norm(along, axis=1) * np.linalg.norm(np.cross(left, right), axis=1)
    level = np.abs(scale) <= 1e-9 * size
    safe = np.where(level, 1.0, scale)
    start = ends[:, 0] - corners[:, 0]
    u = np.einsum("pi,pi->p", start, across) / safe
    turned = np.cross(start, left)
    v = np.einsum("pi,pi->p", along, turned) / safe
    t = np.einsum("pi,pi->p", right, turned) / safe
    inner = (u > MARGIN) & (v > MARGIN) & (u + v < 1 - MARGIN) & (t > MARGIN) & (t < 1 - MARGIN)
    return inner & ~level
