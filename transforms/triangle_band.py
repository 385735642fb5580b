"""Exact distance from the voxels of a grid to a set of triangles, on the voxels within a band of it and no others.

Everything is in voxels: the centre of voxel (i, j, k) is the point (i, j, k). Cells of 16 voxels that a triangle may
reach are halved until 4 (2 for fine meshes) are left; a (cell, triangle) pair is dropped as soon as the triangle is
farther than the band, or than another triangle must be, from all of the cell. Nothing of the grid's size is ever
stored. Distances know no sign: see crossings.py.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, Int64

START = 16  # voxels a side of the cells that triangles are first put into
DISTANCES_AT_A_TIME = 1 << 16  # of point and triangle: the numbers they are made of fit into a core's cache
PAIRS_AT_A_TIME = 1 << 18  # of cell and triangle that are halved together
FINE = 3.0  # voxels: meshes of smaller triangles go down to cells of two voxels
MAX_SIDE = 1 << 15  # voxels: coordinates are int16
OCTANTS = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])


class Piece(NamedTuple):
    """Some voxels of a band, in Morton order of the whole; pieces come in that order as well."""

    coords: Int[np.ndarray, "N 3"]
    distance: Float32[np.ndarray, " N"]  # voxels


class Frames(NamedTuple):
    """Triangles as what a distance is made of: seven linear functions of a point, and the lengths of three edges.

    The functions are the height over the plane, how far the point lies outside each edge within the plane, and how far
    along each edge.
    """

    axes: Float[np.ndarray, "7 T 3"]
    origins: Float[np.ndarray, "T 3 3"]
    lengths: Float32[np.ndarray, "3 T"]


def band_pieces(corners: Float[np.ndarray, "T 3 3"], *, side: int, band: float) -> Iterator[Piece]:
    """The voxels of a grid of `side` voxels that lie nearer than `band` voxels to a triangle, and how near."""
    if not 1 <= side <= MAX_SIDE or not band > 0:
        raise ValueError(f"a grid must have 1 to {MAX_SIDE} voxels a side and a band above 0, got {side} and {band}")
    leaf = 2 if np.median(np.ptp(corners, axis=1).max(1)) < FINE else 4
    keys, triangles = _first_pairs(corners, side=side, band=band)
    for group in _groups(keys, PAIRS_AT_A_TIME // 16):
        part, members, size = keys[group], triangles[group], START
        while size > leaf:
            part, members = _halved(part, members, corners, size=size, band=band)
            size //= 2
        for inner in _groups(part, PAIRS_AT_A_TIME // 4):
            yield _leaves(part[inner], members[inner], corners, size=leaf, side=side, band=band)


def frames_of(corners: Float[np.ndarray, "T 3 3"]) -> Frames:
    """Triangles without area count as the segment or the point that they are."""
    edges = np.roll(corners, -1, axis=1) - corners
    lengths = np.linalg.norm(edges, axis=2)
    longest = lengths.max(1)
    rows = np.arange(len(corners))
    along = edges[rows, lengths.argmax(1)]
    along = np.where(longest[:, None] > 0, along / np.maximum(longest, 1e-300)[:, None], [1.0, 0, 0])
    normal = np.cross(edges[:, 0], edges[:, 1])
    area = np.linalg.norm(normal, axis=1)
    flat = area <= 1e-9 * longest**2
    other = np.eye(3)[np.abs(along).argmin(1)]
    free = np.cross(along, other)
    free /= np.linalg.norm(free, axis=1)[:, None]
    normal = np.where(flat[:, None], free, normal / np.maximum(area, 1e-300)[:, None])
    tangents = np.where(flat[:, None, None], along[:, None], edges / np.maximum(lengths, 1e-300)[:, :, None])
    backwards = flat[:, None] & (np.einsum("tij,tj->ti", edges, along) < 0)
    backwards[:, 2] |= longest == 0  # a point has no inside either: it lies outside of one of two opposite edges
    tangents = np.where(backwards[:, :, None], -tangents, tangents)
    outward = np.cross(tangents, normal[:, None])
    axes = np.concatenate([normal[:, None], outward, tangents], 1)
    return Frames(np.ascontiguousarray(axes.transpose(1, 0, 2)), corners, lengths.T.astype(np.float32))


def normals_of(corners: Float[np.ndarray, "T 3 3"]) -> tuple[Float[np.ndarray, "T 3"], Float[np.ndarray, " T"]]:
    """Unit normals, and twice the areas; a triangle without area has none."""
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    lengths = np.linalg.norm(normals, axis=1)
    return normals / np.maximum(lengths, 1e-300)[:, None], lengths


def distances(
    frames: Frames, rows: Int[np.ndarray, " P"], centres: Float[np.ndarray, "P 3"], offsets: Float[np.ndarray, "K 3"]
) -> Float32[np.ndarray, "P K"]:
    """From each centre plus each offset to the triangle of its row."""
    result = np.empty((len(rows), len(offsets)), np.float32)
    steps = np.ascontiguousarray(offsets.T, np.float32)
    count = max(1, DISTANCES_AT_A_TIME // len(offsets))
    for start in range(0, len(rows), count):
        part = slice(start, start + count)
        at = rows[part]
        axes = frames.axes[:, at]
        from_corners = centres[part, None] - frames.origins[at]
        middle = np.empty(axes.shape[:2], np.float32)
        middle[0] = np.einsum("pj,pj->p", axes[0], from_corners[:, 0])
        for edge in range(3):
            middle[1 + edge] = np.einsum("pj,pj->p", axes[1 + edge], from_corners[:, edge])
            middle[4 + edge] = np.einsum("pj,pj->p", axes[4 + edge], from_corners[:, edge])
        values = axes.astype(np.float32) @ steps
        values += middle[:, :, None]
        lengths = frames.lengths[:, at, None]
        nearest, outside = None, None
        for edge in range(3):
            across, along = values[1 + edge], values[4 + edge]
            outside = across > 0 if outside is None else outside | (across > 0)
            along -= np.clip(along, 0, lengths[edge])
            along *= along
            np.multiply(across, across, out=across)
            along += across
            nearest = along if nearest is None else np.minimum(nearest, along, out=nearest)
        nearest *= outside
        height = values[0]
        height *= height
        height += nearest
        np.sqrt(height, out=result[part])
    return result


def _first_pairs(
    corners: Float[np.ndarray, "T 3 3"], *, side: int, band: float
) -> tuple[Int64[np.ndarray, " P"], Int64[np.ndarray, " P"]]:
    """Cells of START voxels by key, and the triangles that may come within the band of each; sorted by key."""
    last = (side - 1) // START
    low = np.floor((corners.min(1) - band) / START)
    high = np.floor((corners.max(1) + band) / START)
    reaches = ((high >= 0) & (low <= last)).all(1)
    low, high = np.clip(low, 0, last).astype(np.int64), np.clip(high, 0, last).astype(np.int64)
    sizes = np.where(reaches[:, None], high - low + 1, 0)
    counts = sizes.prod(1)
    ends = counts.cumsum()
    found, owners = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    start = 0
    while start < len(corners):
        stop = max(int(np.searchsorted(ends, ends[start] - counts[start] + PAIRS_AT_A_TIME)), start + 1)
        block = slice(start, stop)
        owner = np.repeat(np.arange(stop - start), counts[block])
        place = np.arange(len(owner)) - np.repeat(counts[block].cumsum() - counts[block], counts[block])
        height, depth = sizes[block, 1][owner], sizes[block, 2][owner]
        cells = np.stack([place // (height * depth), place // depth % height, place % depth], 1) + low[block][owner]
        centres = cells * START + (START - 1) / 2
        near = distances(frames_of(corners[block]), owner, centres, np.zeros((1, 3)))[:, 0] <= band + _reach(START)
        found.append(_interleaved(cells[near]))
        owners.append(owner[near] + start)
        start = stop
    keys, triangles = np.concatenate(found), np.concatenate(owners)
    order = np.argsort(keys, kind="stable")
    return keys[order], triangles[order]


def _halved(
    keys: Int64[np.ndarray, " P"],
    triangles: Int64[np.ndarray, " P"],
    corners: Float[np.ndarray, "T 3 3"],
    *,
    size: int,
    band: float,
) -> tuple[Int64[np.ndarray, " Q"], Int64[np.ndarray, " Q"]]:
    """Pairs of the eight cells in each cell of `size` voxels, less those that cannot matter."""
    small = size // 2
    offsets = (OCTANTS - 0.5) * small
    near = _of_pairs(keys, triangles, corners, offsets, size=size)
    limit = np.minimum(_lowest(near, keys) + 2 * _reach(small), band + _reach(small))
    wanted = near <= limit + 1e-3
    inner = (keys[:, None] * 8 + np.arange(8))[wanted]
    members = np.broadcast_to(triangles[:, None], wanted.shape)[wanted]
    order = np.argsort(inner, kind="stable")
    return inner[order], members[order]


def _leaves(
    keys: Int64[np.ndarray, " P"],
    triangles: Int64[np.ndarray, " P"],
    corners: Float[np.ndarray, "T 3 3"],
    *,
    size: int,
    side: int,
    band: float,
) -> Piece:
    """The voxels of the smallest cells."""
    voxels = OCTANTS if size == 2 else (2 * OCTANTS[:, None] + OCTANTS).reshape(-1, 3)
    near = _of_pairs(keys, triangles, corners, voxels - (size - 1) / 2, size=size)
    firsts = _firsts(keys)
    nearest = np.minimum.reduceat(near, firsts, axis=0) if len(firsts) else near
    lows = _apart(keys[firsts]) * size
    wanted = nearest < band
    if lows.size and lows.max() + size > side:
        wanted &= ((lows[:, None] + voxels) < side).all(2)
    rows, places = np.nonzero(wanted)
    coords = (lows.astype(np.int16))[rows] + voxels.astype(np.int16)[places]
    return Piece(coords, nearest[wanted])


def _of_pairs(keys, triangles, corners, offsets, *, size: int) -> Float32[np.ndarray, "P K"]:
    """Distances of points about the middle of each pair's cell."""
    used, rows = np.unique(triangles, return_inverse=True)
    middles = _apart(keys) * size + (size - 1) / 2
    return distances(frames_of(corners[used]), rows, middles, offsets)


def _firsts(keys: Int64[np.ndarray, " P"]) -> Int64[np.ndarray, " C"]:
    """The first row of each cell."""
    return np.flatnonzero(np.diff(keys, prepend=-1))


def _lowest(values: Float32[np.ndarray, "P K"], keys: Int64[np.ndarray, " P"]) -> Float32[np.ndarray, "P K"]:
    """The smallest value of each cell, for each of its rows."""
    firsts = _firsts(keys)
    if not len(firsts):
        return values
    return np.repeat(np.minimum.reduceat(values, firsts, axis=0), np.diff(firsts, append=len(keys)), axis=0)


def _groups(keys: Int64[np.ndarray, " P"], size: int) -> Iterator[slice]:
    """About `size` rows at a time, cut between cells."""
    start = 0
    while start < len(keys):
        stop = min(start + size, len(keys))
        stop = int(np.searchsorted(keys, keys[stop - 1], side="right"))
        yield slice(start, stop)
        start = stop


def _reach(size: int) -> float:
    """From the middle of a cell to its farthest voxel."""
    return math.sqrt(3) * (size - 1) / 2


def _interleaved(cells: Int64[np.ndarray, "N 3"]) -> Int64[np.ndarray, " N"]:
    """Morton keys of cells, x highest."""
    keys = np.zeros(len(cells), np.int64)
    for bit in range(MAX_SIDE.bit_length()):
        for axis in range(3):
            keys |= (cells[:, axis] >> bit & 1) << (3 * bit + 2 - axis)
    return keys


def _apart(keys: Int64[np.ndarray, " N"]) -> Int64[np.ndarray, "N 3"]:
    """Undoes `_interleaved`."""
    masks = ((2, 0x30C30C30C30C30C3), (4, 0xF00F00F00F00F00F), (8, 0x00FF0000FF0000FF), (16, 0xFFFF00000000FFFF))
    cells = np.empty((len(keys), 3), np.int64)
    for axis in range(3):
        part = keys >> (2 - axis) & 0x1249249249249249
        for shift, mask in masks:
            part = (part | part >> shift) & np.int64(mask if mask < 1 << 63 else mask - (1 << 64))
        cells[:, axis] = part
    return cells
