"""Volumes on their way out: brought onto another grid, written as NIfTI in mm."""

from pathlib import Path

import nibabel
import numpy as np
from jaxtyping import Float, Num
from scipy import ndimage

from app.shared.atomic_files import written_whole
from app.tokens.open_scan import Volume
from transforms.sparse import DROPPED


def onto_grid(volume: Volume, shape: tuple[int, int, int], affine: Float[np.ndarray, "4 4"]) -> Volume:
    """The volume on another grid, linear, air outside."""
    to_volume = np.linalg.inv(volume.affine) @ affine
    hu = ndimage.affine_transform(
        np.asarray(volume.hu, np.float32),
        to_volume[:3, :3],
        to_volume[:3, 3],
        shape,
        order=1,
        mode="constant",
        cval=DROPPED,
    )
    return Volume(hu, affine)


def write_nifti(path: Path, volume: Volume) -> None:
    """int16 HU."""
    write_image(path, np.clip(np.rint(volume.hu), -32768, 32767).astype(np.int16), volume.affine)


def write_image(path: Path, values: Num[np.ndarray, "X Y Z"], affine: Float[np.ndarray, "4 4"]) -> None:
    """As NIfTI in mm, whole or not at all."""
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    with written_whole(path) as beside:
        nibabel.save(image, beside)
