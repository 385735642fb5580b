"""Sparse voxels in part or elsewhere: contiguous crops within a budget, and moves by whole voxels.

Coordinates stay absolute. Nothing here draws random numbers: who wants chance passes it in.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Integer, Shaped

CROP_STEP = 8  # crops start at multiples of this, so that latent voxels keep their place
Voxel = Sequence[int] | Integer[np.ndarray, " 3"]


def columns(coords: Integer[np.ndarray, "N 3"]) -> list[Integer[np.ndarray, " N"]]:
    """x, y and z apart: NumPy is up to twenty times slower at comparing or reducing millions of rows of three.

    Faster still where each lies in one piece, as `sparsify` leaves them.
    """
    return [coords[:, axis] for axis in range(3)]


def pick_rows(array: Shaped[np.ndarray, "N ..."], rows: Int[np.ndarray, " M"]) -> Shaped[np.ndarray, "M ..."]:
    """`array[rows]`, in columns where the array lies in columns."""
    if array.ndim != 2 or not array.flags.f_contiguous:
        return array[rows]
    taken = np.empty((len(rows), array.shape[1]), array.dtype, order="F")
    for column, source in zip(taken.T, array.T, strict=True):
        np.take(source, rows, out=column, mode="clip")  # other modes write to a buffer first
    return taken


class Box(NamedTuple):
    start: tuple[int, int, int]
    stop: tuple[int, int, int]


def crop_box(coords: Integer[np.ndarray, "N 3"], *, center: Voxel, max_points: int) -> Box:
    """The box around `center` that grows block by block while its voxels fit `max_points`.

    Starts and stops are multiples of eight voxels. Growing goes round the six faces: a box is as cubic as it can be.
    """
    if max_points < CROP_STEP**3:
        raise ValueError(
            f"max_points must be at least {CROP_STEP**3}, the voxels of one latent block, got {max_points}"
        )
    x, y, z = (column // CROP_STEP for column in columns(coords))
    extent = np.array([int(blocks.max()) + 1 for blocks in (x, y, z)])
    leaves = (x[1:] != x[:-1]) | (y[1:] != y[:-1]) | (z[1:] != z[:-1])
    last = np.append(np.flatnonzero(leaves), len(coords) - 1)  # of each run of rows in one block: far fewer to count
    cells = np.ravel_multi_index((x[last], y[last], z[last]), extent)
    counts = np.bincount(cells, weights=np.diff(last, prepend=-1), minlength=extent.prod()).reshape(extent)
    sums = np.pad(counts.cumsum(0).cumsum(1).cumsum(2), ((1, 0),) * 3)  # summed volume: any box in eight look-ups

    def inside(low: np.ndarray, high: np.ndarray) -> int:
        total = 0
        for corner in np.ndindex(2, 2, 2):
            at = tuple(np.where(corner, high, low))
            total += (-1) ** (3 - sum(corner)) * int(sums[at])
        return total

    low = np.clip(np.asarray(center, np.int64) // CROP_STEP, 0, extent - 1)
    high = low + 1
    faces = [(axis, end) for end in (1, 0) for axis in range(3)]
    while faces:
        for axis, end in list(faces):
            grown_low, grown_high = low.copy(), high.copy()
            (grown_high if end else grown_low)[axis] += 1 if end else -1
            fits = grown_low[axis] >= 0 and grown_high[axis] <= extent[axis]
            if fits and inside(grown_low, grown_high) <= max_points:
                low, high = grown_low, grown_high
            else:
                faces.remove((axis, end))  # a box only grows: what does not fit now never will
    return Box(tuple(int(v) * CROP_STEP for v in low), tuple(int(v) * CROP_STEP for v in high))


def crop_to_budget(
    coords: Integer[np.ndarray, "N 3"], max_points: int | None, *, center: Voxel
) -> Int[np.ndarray, " M"]:
    """Rows in one contiguous box of at most `max_points` voxels, all where they fit; coordinates stay absolute."""
    if max_points is None:
        return np.arange(len(coords))
    start, stop = crop_box(coords, center=center, max_points=max_points)
    x, y, z = (
        (column >= low) & (column < high) for column, low, high in zip(columns(coords), start, stop, strict=True)
    )
    return np.flatnonzero(x & y & z)


def translate(coords: Integer[np.ndarray, "N 3"], shift: Voxel, shape: Sequence[int]) -> Integer[np.ndarray, "N 3"]:
    """Coordinates moved by whole voxels, as far as the grid allows: nothing leaves it, left stays left."""
    room_low = [-int(column.min()) for column in columns(coords)]
    room_high = [size - 1 - int(column.max()) for column, size in zip(columns(coords), shape, strict=True)]
    return coords + np.clip(np.asarray(shift, np.int64), room_low, room_high).astype(coords.dtype)
