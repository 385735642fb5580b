"""Kept voxels as a patient who lies a little otherwise, or is a little larger, would give them.

Nothing here draws its own chance. Angles are small and there is no mirror: left stays left.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Integer, Num
from torch.nn import functional

from transforms.crops import Voxel, columns
from transforms.windows import Number

LEAST_SHARE = 0.5  # of what a new voxel is interpolated from, kept before: from there on it is kept


def rotation_of(angles: Sequence[Number]) -> Float[np.ndarray, "3 3"]:
    """About x, then y, then z, in degrees."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(angles)):
        one, other = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[one, one] = turn[other, other] = np.cos(angle)
        turn[other, one], turn[one, other] = np.sin(angle), -np.sin(angle)
        matrix = turn @ matrix
    return matrix


def repose(
    hu: Num[np.ndarray, " N"],
    coords: Integer[np.ndarray, "N 3"],
    *,
    angles: Sequence[Number],
    scale: Number,
    shape: Voxel,
) -> tuple[Num[np.ndarray, " M"], Integer[np.ndarray, "M 3"]]:
    """Turned by `angles` and scaled about the middle of the voxels' box, interpolated among kept voxels alone.

    What leaves the grid of `shape` is dropped. HU keep their type.
    """
    low = np.array([column.min() for column in columns(coords)], np.int64)
    high = np.array([column.max() for column in columns(coords)], np.int64) + 1
    middle = (low + high - 1) / 2
    forth = scale * rotation_of(angles)
    reach = np.abs(forth) @ ((high - low - 1) / 2)  # of the box, turned
    start = np.maximum(np.floor(middle - reach), 0).astype(np.int64)
    stop = np.minimum(np.ceil(middle + reach) + 1, shape).astype(np.int64)
    back = np.linalg.inv(forth)
    box = np.zeros((2, *(high - low)), np.float32)
    at = tuple(column - first for column, first in zip(columns(coords), low, strict=True))
    box[(0, *at)], box[(1, *at)] = hu, 1
    moved, share = _sampled(box, back, back @ (start - middle) + middle - low, tuple(stop - start))
    found = np.nonzero(share >= LEAST_SHARE)
    made = moved[found] / share[found]
    if np.issubdtype(hu.dtype, np.integer):
        made = np.rint(made)
    placed = np.empty((len(made), 3), coords.dtype, order="F")  # in columns: see crops.columns
    for column, where, first in zip(placed.T, found, start, strict=True):
        column[:] = where + first
    return made.astype(hu.dtype, copy=False), placed


def _sampled(
    box: Float[np.ndarray, "C X Y Z"], back: Float[np.ndarray, "3 3"], offset: Float[np.ndarray, " 3"], shape: Voxel
) -> Float[np.ndarray, "C U V W"]:
    """Trilinear values at `back @ place + offset` for each place of a box of `shape`, zero outside."""
    places = [torch.arange(size, dtype=torch.float32) for size in shape]
    mesh = torch.meshgrid(*places, indexing="ij")
    grid = torch.empty(*mesh[0].shape, 3)
    for axis, size in enumerate(box.shape[1:]):
        source = sum(float(factor) * one for factor, one in zip(back[axis], mesh, strict=True)) + float(offset[axis])
        grid[..., 2 - axis] = (2 * source + 1) / size - 1  # as torch counts: the last axis first, -1 to 1
    sampled = functional.grid_sample(torch.from_numpy(box)[None], grid[None], align_corners=False)
    return sampled[0].numpy()
