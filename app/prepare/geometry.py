"""A scan in HU onto the grid of a prepared dataset, with what there is to say of it; the hash of its voxels.

How values come onto the grid is `transforms.grid`'s.
"""

import hashlib
from typing import NamedTuple

import nibabel
import numpy as np
from jaxtyping import Float, Int, Num

from app.prepare.findings import Finding, finding
from transforms.grid import CUT_OFF, Grid, centred_grid, millimetres_beyond, resample, share_beyond, spacing_of
from transforms.windows import AIR

LOW_RESOLUTION_STEPS = 4.0  # grid steps a source voxel may measure before it is called low resolution


class Normalised(NamedTuple):
    hu: Int[np.ndarray, "X Y Z"]
    affine: Float[np.ndarray, "4 4"]
    findings: tuple[Finding, ...]
    steps: tuple[str, ...]


def hash_of_voxels(hu: Num[np.ndarray, "X Y Z"], affine: Float[np.ndarray, "4 4"]) -> str:
    """sha256 of a scan's HU along its patient's axes: the same whatever format, file order or name it came in."""
    along_patient = nibabel.apply_orientation(hu, nibabel.io_orientation(affine))
    digest = hashlib.sha256(str(along_patient.shape).encode())
    for z in range(along_patient.shape[2]):  # a slice at a time, for want of memory
        digest.update(np.ascontiguousarray(np.rint(along_patient[:, :, z].T), np.int32))
    return digest.hexdigest()


def normalise(volume: "object", size: int, spacing: float | int) -> Normalised:
    """A volume (`hu`, `affine`) as int16 HU on the grid of this size and spacing around its centre."""
    hu, affine = volume.hu, np.asarray(volume.affine, np.float64)
    grid = centred_grid(hu.shape, affine, size, spacing)
    on_grid = resample(hu, affine, grid)
    steps = (on_grid.route, f"air {AIR} outside the scan")
    return Normalised(on_grid.array, grid.affine, _findings(hu, affine, grid), steps)


def _findings(hu: np.ndarray, affine: np.ndarray, grid: Grid) -> tuple[Finding, ...]:
    findings = []
    share = share_beyond(hu, affine, grid)
    if share >= CUT_OFF:
        over = millimetres_beyond(hu.shape, affine, grid)
        what = f"{100 * share:.1f} % of what is denser than air lies beyond the grid, up to {over:.0f} mm on a side"
        findings.append(finding("FOV_CROPPED", what))
    if spacing_of(affine).max() > LOW_RESOLUTION_STEPS * grid.spacing:
        voxel = " x ".join(f"{s:.3g}" for s in spacing_of(affine))
        findings.append(finding("LOW_RESOLUTION", f"{voxel} mm onto {grid.spacing:g} mm"))
    return tuple(findings)
