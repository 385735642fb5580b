"""Sparse voxels in part or elsewhere: contiguous crops within a budget, and moves by whole voxels.

Coordinates stay absolute. Nothing here draws random numbers: who wants chance passes it in.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Integer, Shaped

from transforms.runs import Box, Runs, counts_of_blocks

CROP_STEP = 8  # crops start at multiples of this, so that latent voxels keep their place
Voxel = Sequence[int] | Integer[np.ndarray, " 3"]
Coords = Runs | Integer[np.ndarray, "N 3"]


def columns(coords: Integer[np.ndarray, "N 3"]) -> list[Integer[np.ndarray, " N"]]:
    """x, y and z apart: NumPy is up to twenty times slower at comparing or reducing millions of rows of three.

    Faster still where each lies in one piece, as runs and `sparsify` leave them.
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


def crop_box(coords: Coords, *, center: Voxel, max_points: int) -> Box:
    """The box around `center` that grows block by block while its voxels fit `max_points`.

    Starts and stops are multiples of eight voxels. Growing goes round the six faces: a box is as cubic as it can be.
    """
    if max_points < CROP_STEP**3:
        raise ValueError(
            f"max_points must be at least {CROP_STEP**3}, the voxels of one latent block, got {max_points}"
        )
    counts = counts_of_blocks(Runs.of(coords), side=CROP_STEP)
    extent = np.array(counts.shape)
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


def crop_to_budget(coords: Coords, max_points: int | None, *, center: Voxel) -> tuple[Runs, Int[np.ndarray, " M"]]:
    """What lies in one contiguous box of at most `max_points` voxels, all where they fit, and its rows.

    Coordinates stay absolute.
    """
    runs = Runs.of(coords)
    if max_points is None:
        return runs, np.arange(len(runs))
    return runs.inside(crop_box(runs, center=center, max_points=max_points))


def translate(coords: Coords, shift: Voxel, shape: Sequence[int]) -> Runs:
    """Coordinates moved by whole voxels, as far as the grid allows: nothing leaves it, left stays left."""
    runs = Runs.of(coords)
    low, high = runs.bounds()
    return runs.moved(np.clip(np.asarray(shift, np.int64), -low, np.asarray(shape) - 1 - high))
