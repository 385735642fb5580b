"""Files of signed distance, `{name}_r{R}.npz`: their one reader and their one writer.

`sparse_sdf` float32 (N, 1) in -1..1, `sparse_index` int32 (N, 3) in Morton order, `resolution`, `affine` (index to mm),
and what they were made by. A file from outside is hostile: every array is checked before memory is taken.
"""

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy

from app.shapes.bands import BAND, Shape
from app.shapes.mesh_files import READERS
from app.shared.array_files import UNREADABLE, ZIP_TIME, damage, read_arrays
from app.shared.atomic_files import written_whole
from app.shared.refusals import Refused

MAX_BYTES = 8 << 30  # of all arrays, unpacked
MAX_SIDE = 4096
VERSION = 1
SIGNS = ("parity", "winding", "none")


class Provenance(NamedTuple):
    """Of what, and how, a file was made: the same again is not made again."""

    source_hash: str = ""
    settings: str = ""
    codes: tuple[str, ...] = ()


def write_shape(path: Path, shape: Shape, provenance: Provenance) -> None:
    """A whole file or none; the same shape gives the same bytes."""
    arrays = {
        "sparse_sdf": shape.values[:, None].astype(np.float32, copy=False),
        "sparse_index": shape.coords.astype(np.int32),
        "resolution": np.array(shape.resolution, np.int32),
        "affine": np.asarray(shape.affine, np.float64),
        "band": np.array(shape.band, np.float64),
        "sign": np.array(shape.sign),
        "source_hash": np.array(provenance.source_hash),
        "settings": np.array(provenance.settings),
        "codes": np.array(provenance.codes, np.str_),
        "version": np.array(VERSION, np.int32),
    }
    if shape.sharp is not None:
        arrays["sharp"] = shape.sharp.astype(np.uint8)
    with written_whole(path) as beside, zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", ZIP_TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as stream:
                npy.write_array(stream, np.ascontiguousarray(array) if array.ndim else array, allow_pickle=False)


def read_shape(path: str | Path) -> Shape:
    """The distance in a file, checked. Files of others need `sparse_sdf`, `sparse_index` and `resolution` alone."""
    arrays = _arrays(Path(path))
    try:
        return _shape_of(arrays)
    except UNREADABLE as error:
        raise _damaged(Path(path), error) from error


def holds_shape(path: Path) -> bool:
    """Whether a file is a mesh by its ending, or an npz with a signed distance; it may be damaged all the same."""
    if path.suffix.lower() in READERS:
        return path.is_file()
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return "sparse_sdf.npy" in archive.namelist()
    except UNREADABLE:
        return False


def read_provenance(path: Path) -> Provenance:
    """What a file says it was made of and by."""
    arrays = _arrays(path, only=("source_hash", "settings", "codes"))
    if len(arrays) < 3:
        return Provenance()
    return Provenance(str(arrays["source_hash"]), str(arrays["settings"]), tuple(arrays["codes"].tolist()))


def _arrays(path: Path, *, only: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
    try:
        return read_arrays(path, max_bytes=MAX_BYTES, only=only)
    except FileNotFoundError:
        raise Refused("NO_SOURCE", f"{path} does not exist") from None
    except UNREADABLE as error:
        raise _damaged(path, error) from error


def _shape_of(arrays: dict[str, np.ndarray]) -> Shape:
    values, coords = arrays["sparse_sdf"], arrays["sparse_index"]
    resolution = int(arrays["resolution"])
    if not 8 <= resolution <= MAX_SIDE:
        raise ValueError(f"resolution must be 8 to {MAX_SIDE}, got {resolution}")
    if coords.dtype.kind not in "iu" or coords.ndim != 2 or coords.shape[1] != 3 or len(coords) == 0:
        raise ValueError(f"sparse_index must be integers (N, 3), got {coords.dtype} {coords.shape}")
    if values.dtype.kind != "f" or values.shape not in ((len(coords), 1), (len(coords),)):
        raise ValueError(f"sparse_sdf must be floats ({len(coords)}, 1), got {values.dtype} {values.shape}")
    if coords.min() < 0 or coords.max() >= resolution:
        raise ValueError(f"sparse_index leaves 0..{resolution - 1}")
    if not np.isfinite(values).all() or np.abs(values).max() > 1 + 1e-6:
        raise ValueError("sparse_sdf leaves -1..1")
    affine = arrays.get("affine", np.diag([1 / resolution] * 3 + [1.0])).astype(np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-30:
        raise ValueError("affine must be an invertible 4 x 4 matrix")
    sign, band = str(arrays.get("sign", "parity")), float(arrays.get("band", BAND))
    if sign not in SIGNS or not 0 < band < resolution:
        raise ValueError(f"sign must be one of {', '.join(SIGNS)} and band above 0, got {sign[:20]} and {band}")
    sharp = arrays.get("sharp")
    if sharp is not None and sharp.shape != (len(coords),):
        raise ValueError(f"sharp must be ({len(coords)},), got {sharp.shape}")
    return Shape(coords, values.reshape(-1).astype(np.float32, copy=False), resolution, affine, band, sign, sharp)


def _damaged(path: Path, error: Exception) -> Refused:
    return Refused("DAMAGED_SHAPE", f"{path.name} is damaged or no file of signed distance: {damage(error)}")
