"""Dense to sparse and back: which voxels become rows (KEEPS), and what the dropped ones stand for.

Pure functions on arrays indexed [x, y, z] along R A S.
"""

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, Num, Shaped
from scipy import ndimage
from scipy.spatial import cKDTree

from transforms.body import body_mask
from transforms.windows import AIR, DEFAULT_WINDOWS, Number, window_bounds, windows_range

DROPPED = -1024  # HU that a voxel outside the kept ones stands for
INTERFACES = (-400, 200)  # HU between air and tissue, between soft tissue and bone
BAND = 4  # voxels on either side of a surface


class Sparse(NamedTuple):
    coords: Int[np.ndarray, "N 3"]
    values: Shaped[np.ndarray, "N ..."]


def _signed_distance(mask: Bool[np.ndarray, "X Y Z"]) -> Float[np.ndarray, "X Y Z"]:
    """Voxels from each centre to the surface of a mask, negative inside; endless where there is no surface."""
    if mask.all() or not mask.any():
        return np.where(mask, -np.inf, np.inf)
    outside = ndimage.distance_transform_edt(~mask)
    inside = ndimage.distance_transform_edt(mask)
    return np.where(mask, 0.5 - inside, outside - 0.5)


def _above_air(hu: Num[np.ndarray, "X Y Z"], windows: Sequence[str], _spacing: Number) -> Bool[np.ndarray, "X Y Z"]:
    """Above air and above zero in some window."""
    return hu > max(AIR, windows_range(windows)[0])


def _near_interfaces(
    hu: Num[np.ndarray, "X Y Z"], _windows: Sequence[str], _spacing: Number
) -> Bool[np.ndarray, "X Y Z"]:
    """Within a few voxels of a surface between air, soft tissue and bone."""
    kept = np.zeros(hu.shape, bool)
    for level in INTERFACES:
        kept |= np.abs(_signed_distance(hu > level)) < BAND
    return kept


def _unsaturated(hu: Num[np.ndarray, "X Y Z"], windows: Sequence[str], spacing: Number) -> Bool[np.ndarray, "X Y Z"]:
    """Body voxels that some window does not saturate, and their neighbours."""
    unsaturated = np.zeros(hu.shape, bool)
    for name in windows:
        low, high = window_bounds(name)
        unsaturated |= (hu > low) & (hu < high)
    neighbours = ndimage.generate_binary_structure(3, 3)
    return ndimage.binary_dilation(unsaturated & body_mask(hu, spacing=spacing), neighbours)


class Keep(NamedTuple):
    """A sparsification: which voxels become rows, and what the dropped ones stand for."""

    mask: Callable[[np.ndarray, Sequence[str], Number], np.ndarray]  # of HU, windows and spacing in mm
    fill: Number | Literal["nearest"]  # what `densify` puts where a voxel was dropped
    by_window: bool  # whether the mask depends on the windows


KEEPS = MappingProxyType(
    {
        "body": Keep(lambda hu, _, spacing: body_mask(hu, spacing=spacing), DROPPED, by_window=False),
        "nonzero": Keep(_above_air, DROPPED, by_window=True),
        "band": Keep(_near_interfaces, "nearest", by_window=False),
        "informative": Keep(_unsaturated, "nearest", by_window=True),
    }
)


def keep_mask(
    hu: Num[np.ndarray, "X Y Z"],
    keep: str = "body",
    *,
    windows: Sequence[str] = DEFAULT_WINDOWS,
    spacing: Number = 4.0,
) -> Bool[np.ndarray, "X Y Z"]:
    """Which voxels become rows, by one of KEEPS: `body` is the patient."""
    if keep not in KEEPS:
        raise ValueError(f"keep must be one of {', '.join(KEEPS)}, got {keep!r}")
    return KEEPS[keep].mask(np.asarray(hu), windows, spacing)


def signed_band(mask: Bool[np.ndarray, "X Y Z"], band: Number = BAND) -> Float[np.ndarray, "X Y Z"]:
    """Distance to the surface of a 0/1 mask over `band` voxels, clipped to -1..1, negative inside."""
    return np.clip(_signed_distance(mask) / band, -1, 1).astype(np.float32)


def sparsify_masks(masks: Shaped[np.ndarray, "X Y Z C"]) -> Sparse:
    """0/1 masks as signed bands, one a channel; voxels far from every surface are dropped."""
    bands = np.stack([signed_band(masks[..., channel] > 0.5) for channel in range(masks.shape[-1])], -1)
    return sparsify(bands, (np.abs(bands) < 1).any(-1))


def sparsify(array: Shaped[np.ndarray, "X Y Z ..."], mask: Bool[np.ndarray, "X Y Z"]) -> Sparse:
    """Coordinates and values of the kept voxels, x slowest."""
    coords = np.argwhere(mask)
    return Sparse(coords.astype(np.int16 if max(mask.shape) < 2**15 else np.int32), array[mask])


def densify(
    values: Shaped[np.ndarray, "N ..."],
    coords: Integer[np.ndarray, "N 3"],
    shape: Sequence[int],
    *,
    fill: Number | Literal["nearest"] = DROPPED,
) -> Shaped[np.ndarray, "X Y Z ..."]:
    """The dense array; a dropped voxel takes `fill`, or with "nearest" the value of the kept voxel nearest to it."""
    x, y, z = np.asarray(coords, np.int64).T
    if fill != "nearest":
        array = np.full((*shape, *values.shape[1:]), fill, values.dtype)
        array[x, y, z] = values
        return array
    if len(values) == 0:
        raise ValueError("fill='nearest' needs at least one kept voxel, got none")
    dropped = np.ones(tuple(shape), bool)
    dropped[x, y, z] = False
    array = np.empty((*shape, *values.shape[1:]), values.dtype)
    array[x, y, z] = values
    missing = np.argwhere(dropped)
    if len(missing):
        nearest = cKDTree(coords).query(missing)[1]
        array[dropped] = values[nearest]
    return array
