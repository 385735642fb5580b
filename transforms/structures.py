"""Small structures put into HU: balls and tubes of a few millimetres, as nodules, stones and vessels are.

Scans hold few of them, so a tokenizer learns to leave them out; put in by the hundred they cost it something. Nothing
here draws its own chance: who wants it passes a generator.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer, Num

from transforms.crops import columns
from transforms.windows import Number

SIZES_MM = (3.0, 14.0)  # across, drawn evenly on a logarithmic scale
LENGTHS_MM = (15.0, 40.0)  # of tubes
TUBES = 0.4  # share of structures that are tubes
LUNG = (-1000, -650)  # HU at the centre, and what is added there
ADDED_IN_LUNG = (300, 700)
SOFT_TISSUE = (-50, 150)
ADDED_IN_SOFT_TISSUE = (100, 500)
TAKEN_IN_SOFT_TISSUE = (-80, -30)
DARK = 0.25  # share of those in soft tissue that are darker than it


class Structure(NamedTuple):
    """A ball, or a tube where it has a length."""

    centre: Float[np.ndarray, " 3"]  # in voxels
    size_mm: float
    length_mm: float
    axis: Float[np.ndarray, " 3"]  # unit, of a tube
    added: float  # HU


def draw_structure(hu: Number, centre: Integer[np.ndarray, " 3"], generator: np.random.Generator) -> Structure | None:
    """What may lie where a voxel has these HU; None in bone, fat and at borders."""
    small, large = np.log(SIZES_MM)
    size = float(np.exp(generator.uniform(small, large)))
    tube, dark = generator.uniform(size=2) < (TUBES, DARK)
    length = float(generator.uniform(*LENGTHS_MM)) if tube else 0.0
    axis = generator.normal(size=3)
    place = centre + generator.uniform(-0.5, 0.5, 3)
    if LUNG[0] <= hu <= LUNG[1]:
        bounds = ADDED_IN_LUNG
    elif SOFT_TISSUE[0] <= hu <= SOFT_TISSUE[1]:
        bounds = TAKEN_IN_SOFT_TISSUE if dark else ADDED_IN_SOFT_TISSUE
    else:
        return None
    return Structure(place, size, length, axis / np.linalg.norm(axis), float(generator.uniform(*bounds)))


def add_structures(
    hu: Num[np.ndarray, " N"],
    coords: Integer[np.ndarray, "N 3"],
    *,
    number: int,
    spacing: Number,
    generator: np.random.Generator,
) -> Float[np.ndarray, " N"]:
    """HU with up to `number` structures around voxels drawn by chance; rows may lie in any order.

    A voxel takes the share of what is added that the structure takes of it, to a fraction of a voxel.
    """
    changed = np.array(hu, np.float32)
    rows = _Rows(coords)
    for row in generator.integers(len(hu), size=number):
        structure = draw_structure(hu[row], coords[row], generator)
        if structure is not None:
            near, share = _shares(structure, rows, float(spacing))
            changed[near] += np.float32(structure.added) * share
    return changed


class _Rows:
    """Which row holds a voxel."""

    def __init__(self, coords: Integer[np.ndarray, "N 3"]):
        parts = columns(coords)
        self.low = np.array([part.min() for part in parts], np.int64)
        self.shape = np.array([part.max() for part in parts], np.int64) - self.low + 1
        kind = np.int32 if self.shape.prod() < 2**31 else np.int64  # half the bytes, twice as fast
        x, y, z = (np.subtract(part, low, dtype=kind) for part, low in zip(parts, self.low, strict=True))
        keys = (x * kind(self.shape[1]) + y) * kind(self.shape[2]) + z
        ascending = bool((keys[1:] > keys[:-1]).all())
        self.order = None if ascending else keys.argsort()
        self.keys = keys if ascending else keys[self.order]

    def at(self, voxels: Integer[np.ndarray, "V 3"]) -> tuple[np.ndarray, np.ndarray]:
        """Which of the voxels there are, as indices of `voxels`, and their rows."""
        inner = voxels - self.low
        inside = np.flatnonzero(((inner >= 0) & (inner < self.shape)).all(1))
        x, y, z = inner[inside].T
        keys = (x * self.shape[1] + y) * self.shape[2] + z
        keys = keys.astype(self.keys.dtype)  # else every search converts all rows
        rows = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        there = self.keys[rows] == keys
        rows = rows[there]
        return inside[there], rows if self.order is None else self.order[rows]


def _shares(structure: Structure, rows: _Rows, spacing: float) -> tuple[np.ndarray, Float[np.ndarray, " V"]]:
    """Rows that a structure reaches, and the share of each voxel that it takes."""
    reach = max(structure.size_mm, structure.length_mm) / 2 / spacing + 1
    voxels = [np.arange(np.floor(c - reach), np.ceil(c + reach) + 1, dtype=np.int64) for c in structure.centre]
    away = np.ix_(
        *(((axis - c) * spacing).astype(np.float32) for axis, c in zip(voxels, structure.centre, strict=True))
    )
    squared, radius = sum(part**2 for part in away), structure.size_mm / 2
    if structure.length_mm:
        along = sum(part * np.float32(step) for part, step in zip(away, structure.axis, strict=True))
        across = np.sqrt(np.maximum(squared - along**2, 0))
        outside = np.maximum(across - radius, np.abs(along) - structure.length_mm / 2)
    else:
        outside = np.sqrt(squared) - radius
    share = np.clip(0.5 - outside / spacing, 0, 1)  # as if the surface were flat
    taken = np.nonzero(share)
    there, near = rows.at(np.stack([axis[part] for axis, part in zip(voxels, taken, strict=True)], 1))
    return near, share[taken][there]
