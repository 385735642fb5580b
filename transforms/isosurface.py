"""Surfaces as triangles: of a volume at a level, and of a signed distance that is known on a band of voxels alone.

Marching cubes by scikit-image. A band goes through it in blocks, so that nothing of the grid's size is stored; vertices
that blocks share are one, for each lies on an edge of the grid that knows its own number.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int64, Shaped
from scipy import ndimage
from skimage.measure import marching_cubes

BLOCK = 32  # cubes a side
TINY = 1e-4  # values nearer to 0 are moved so far away: a vertex lies on an edge and never on its end


class Triangles(NamedTuple):
    vertices: Float[np.ndarray, "V 3"]  # indices of the grid, unless placed
    faces: Int64[np.ndarray, "T 3"]


def surface_at(volume: Shaped[np.ndarray, "X Y Z"], level: float | int) -> Triangles:
    """Where a volume passes a level; closed, for what lies beyond its border counts as lower than all of it.

    Empty where nothing is above the level. The front of each triangle is on the lower side.
    """
    above = volume > level
    if not above.any():
        return Triangles(np.zeros((0, 3)), np.zeros((0, 3), np.int64))
    box = [slice(max(cut.start - 1, 0), cut.stop + 1) for cut in ndimage.find_objects(above.astype(np.uint8))[0]]
    part = np.asarray(volume[tuple(box)], np.float32)
    outside = min(float(part.min()), level) - max(1.0, abs(level) * 1e-3)
    if volume.dtype == bool:  # a mask ends half a voxel beyond its last
        outside = 0.0
    padded = np.pad(part, 1, constant_values=np.float32(outside))
    padded[padded == np.float32(level)] = np.nextafter(np.float32(level), np.float32(-np.inf))
    vertices, faces, *_ = marching_cubes(padded, level, gradient_direction="ascent", allow_degenerate=True)
    start = np.array([part.start for part in box]) - 1
    return Triangles(vertices.astype(np.float64) + start, faces.astype(np.int64))


def placed(surface: Triangles, affine: Float[np.ndarray, "4 4"]) -> Triangles:
    """In mm. Where the affine mirrors, triangles are turned over, so that their fronts stay where they were."""
    vertices = surface.vertices @ affine[:3, :3].T + affine[:3, 3]
    faces = surface.faces[:, ::-1] if np.linalg.det(affine[:3, :3]) < 0 else surface.faces
    return Triangles(vertices, np.ascontiguousarray(faces))


def surface_of_band(coords: Int[np.ndarray, "N 3"], values: Float[np.ndarray, " N"]) -> Triangles:
    """The zero level of a distance that is negative inside; fronts are outside.

    Voxels beside the band take the sign of their neighbours in it. Cubes with a corner that is unknown even so make no
    surface: a band with gaps gives one with holes.
    """
    coords = np.asarray(coords, np.int64)
    if not len(coords) or not (values < 0).any() or not (values >= 0).any():
        return Triangles(np.zeros((0, 3)), np.zeros((0, 3), np.int64))
    low = coords.min(0) - 2
    span = int((coords.max(0) - low).max()) + 3
    near = coords - low
    blocks = -(-span // BLOCK)
    values = np.where(np.abs(values) < TINY, np.where(values < 0, -TINY, TINY), values).astype(np.float32)
    names, points, triangles, count = [], [], [], 0
    for block, rows in _by_block(near, blocks):
        name, point, face = _block_surface(near[rows] - block * BLOCK, values[rows])
        if len(face):
            names.append(_global(name, block, span))
            points.append(point + block * BLOCK)
            triangles.append(face + count)
            count += len(point)
    if not triangles:
        return Triangles(np.zeros((0, 3)), np.zeros((0, 3), np.int64))
    _, first, number = np.unique(np.concatenate(names), return_index=True, return_inverse=True)
    vertices = np.concatenate(points)[first] + low
    return Triangles(vertices, number.reshape(-1)[np.concatenate(triangles)].astype(np.int64))


def _by_block(near: Int64[np.ndarray, "N 3"], blocks: int):
    """Each block with the rows that its cubes touch, and one voxel around them; a row may belong to several."""
    keys, rows = [], []
    for shift in np.ndindex(2, 2, 2):  # a block takes voxels from 1 below its start to 1 beyond its last corner
        block, inner = np.divmod(near, BLOCK)
        belongs = np.ones(len(near), bool)
        for axis, moved in enumerate(shift):
            if moved:
                below = inner[:, axis] <= 1
                above = inner[:, axis] == BLOCK - 1
                belongs &= below | above
                block[:, axis] += np.where(above, 1, -1)
        belongs &= ((block >= 0) & (block < blocks)).all(1)
        keys.append((block @ [blocks * blocks, blocks, 1])[belongs])
        rows.append(np.flatnonzero(belongs))
    keys, rows = np.concatenate(keys), np.concatenate(rows)
    order = np.argsort(keys, kind="stable")
    keys, rows = keys[order], rows[order]
    bounds = np.flatnonzero(np.diff(keys, prepend=-1, append=-1))
    for start, stop in pairwise(bounds):
        yield np.array(np.unravel_index(keys[start], (blocks,) * 3)), rows[start:stop]


def _block_surface(near: Int64[np.ndarray, "N 3"], values: Float[np.ndarray, " N"]):
    """Names, places and triangles of the vertices of one block of cubes."""
    side = BLOCK + 3
    box = np.full((side,) * 3, np.nan, np.float32)
    box[tuple((near + 1).T)] = values
    known = ~np.isnan(box)
    nothing = (np.zeros((0, 4), np.int64), np.zeros((0, 3)), np.zeros((0, 3), np.int64))
    if not (values < 0).any() or not (values > 0).any():
        return nothing
    signs = np.where(known, np.sign(np.nan_to_num(box)), 0).astype(np.float32)
    around = ndimage.uniform_filter(signs, 3, mode="constant")
    filled = ~known & (np.abs(around) > 0.5 / 27)
    box[filled] = np.sign(around[filled])
    inner = (slice(1, -1),) * 3
    cube = _of_cubes(ndimage.minimum_filter, (known | filled)[inner])  # whether all eight corners are known
    box = box[inner]
    mask = np.zeros(box.shape, bool)
    mask[1:, 1:, 1:] = cube
    box = np.nan_to_num(box, nan=1.0)
    low, high = _of_cubes(ndimage.minimum_filter, box), _of_cubes(ndimage.maximum_filter, box)
    if not (cube & (low < 0) & (high > 0)).any():
        return nothing
    vertices, faces, *_ = marching_cubes(box, 0.0, gradient_direction="descent", mask=mask)  # inside is below 0
    return _names_of(vertices), vertices.astype(np.float64), faces.astype(np.int64)


def _of_cubes(extreme: Callable[..., np.ndarray], corners: Shaped[np.ndarray, "S S S"]) -> Shaped[np.ndarray, "B B B"]:
    """The lowest or highest of the eight corners of each cube."""
    return extreme(corners, 2, origin=-1)[:-1, :-1, :-1]


def _names_of(vertices: Float[np.ndarray, "V 3"]) -> Int64[np.ndarray, "V 4"]:
    """The edge of the grid that each vertex lies on: its start and its axis; 3 for one inside a cube."""
    start = np.floor(vertices).astype(np.int64)
    part = vertices - start
    along = (part > 0).sum(1) > 1
    axis = np.where(along, 3, part.argmax(1))
    return np.concatenate([start, axis[:, None]], 1)


def _global(names: Int64[np.ndarray, "V 4"], block: Int64[np.ndarray, " 3"], span: int) -> Int64[np.ndarray, " V"]:
    side = span + BLOCK
    x, y, z = (names[:, :3] + block * BLOCK).T
    return ((x * side + y) * side + z) * 4 + names[:, 3]
