"""A volume as its header describes it, and its voxels, both bounded by what the file really holds.

Nothing is allocated that the file cannot fill; slope and intercept are honoured once. Headers are read by `formats`.
"""

import bz2
import math
import zlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from app.prepare.files import Ref, read_bytes
from app.prepare.findings import Finding
from app.prepare.gate import MAX_VOXELS, MIN_SLICES, SPACING_LIMITS
from app.shared.refusals import Refused

MAX_PACKED = 900  # what gzip may save on more than 256 MiB: labels save a lot, a bomb a thousand times


class VolumeFile(NamedTuple):
    """A volume as its header describes it; the voxels wait in `data`."""

    ref: Ref
    data: Ref
    shape: tuple[int, ...]
    affine: Float[np.ndarray, "4 4"]  # index to RAS mm
    dtype: str
    offset: int
    encoding: str  # raw, gzip (the data alone), gzipped (the whole file), bzip2, ascii
    slope: float = 1.0
    intercept: float = 0.0
    findings: tuple[Finding, ...] = ()
    packed_length: int = 0  # bytes of the packed voxels, where the header tells them

    @property
    def refs(self) -> tuple[Ref, ...]:
        """All that is read of it: a header may name a data file."""
        return tuple(dict.fromkeys((self.ref, self.data)))

    def __repr__(self) -> str:
        return f"VolumeFile({self.shape}, {self.dtype})"


def read_voxels(file: VolumeFile) -> np.ndarray:
    """Voxels indexed [x, y, z], slope applied; raises Refused where the file holds fewer than its header says, or a
    slice more: then header and voxels are not of one scan."""
    dtype = np.dtype(file.dtype)
    count = math.prod(file.shape)
    length, plane = count * dtype.itemsize, file.shape[0] * file.shape[1] * dtype.itemsize
    try:
        data = _data(file, length, spare=plane)
    except Refused:
        raise
    except (zlib.error, OSError, EOFError, ValueError) as error:
        raise Refused("CORRUPT_FILE", "the voxels cannot be read") from error
    if file.encoding == "ascii":
        values = _ascii(data, count, dtype)
    else:
        if not length <= len(data) < length + plane:
            raise Refused("CORRUPT_FILE", f"{len(data)} bytes of voxels, the header wants {length}")
        values = np.frombuffer(data, dtype, count)
    values = values.reshape(file.shape, order="F")
    if values.dtype.byteorder == ">":
        values = values.astype(values.dtype.newbyteorder("="))
    if (file.slope, file.intercept) != (1.0, 0.0):
        values = values.astype(np.float64) * file.slope + file.intercept
        values = values.astype(np.float32)
    return values


def _data(file: VolumeFile, length: int, *, spare: int) -> bytes | memoryview:
    """The bytes of the voxels, and up to `spare` more where there are."""
    raw = read_bytes(file.data)
    if file.encoding in ("gzip", "gzipped", "bzip2") and length > max(256 << 20, MAX_PACKED * len(raw)):
        raise Refused("CORRUPT_FILE", f"{len(raw)} bytes that claim to hold {length}")
    if file.encoding == "gzipped":
        return memoryview(gunzip(raw, file.offset + length + spare))[file.offset :]
    raw = memoryview(raw)[file.offset if file.offset >= 0 else max(0, len(raw) - length) :]
    if file.packed_length > len(raw):
        raise Refused("CORRUPT_FILE", f"{len(raw)} bytes of packed voxels, the header wants {file.packed_length}")
    if file.encoding == "gzip":
        return gunzip(raw[: file.packed_length or None], length + spare)
    if file.encoding == "bzip2":
        return bz2.BZ2Decompressor().decompress(bytes(raw), length + spare)
    return raw


def gunzip(data: bytes | memoryview, limit: int) -> bytes:
    """At most `limit` bytes out of gzip or zlib members one after the other: a bomb ends where the header ends."""
    parts, size = [], 0
    while len(data) and size < limit:
        stream = zlib.decompressobj(47)
        part = stream.decompress(data, limit - size)
        parts.append(part)
        size += len(part)
        if not stream.eof:
            break
        data = stream.unused_data.lstrip(b"\0")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _ascii(data: bytes | memoryview, count: int, dtype: np.dtype) -> np.ndarray:
    reach = 32 * (count + 1)  # far more than numbers take
    words = bytes(data[:reach]).split()
    if len(words) != count or bytes(data[reach:]).strip():
        raise Refused("CORRUPT_FILE", f"{len(words)} numbers, the header wants {count}")
    try:
        return np.array([float(word) for word in words[:count]]).astype(dtype)
    except ValueError as error:
        raise Refused("CORRUPT_FILE", "a voxel is no number") from error


def three_axes(shape: list[int], affine: np.ndarray) -> tuple[int, int, int]:
    """A shape of three axes that a scan can have, with a usable affine."""
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        raise Refused("FOUR_D", f"{len(shape)} axes, {shape[3]} volumes")
    if len(shape) < 3 or min(shape) == 1:
        raise Refused("TOO_FEW_SLICES", f"a shape of {' x '.join(map(str, shape))}")
    if min(shape) < 1 or math.prod(shape) > MAX_VOXELS:
        raise Refused("EMPTY" if min(shape) == 0 else "CORRUPT_FILE", f"a shape of {' x '.join(map(str, shape))}")
    if min(shape) < MIN_SLICES:
        raise Refused("TOO_FEW_SLICES", f"{min(shape)} slices, at least {MIN_SLICES} are needed")
    check_affine(affine)
    return shape[0], shape[1], shape[2]


def check_affine(affine: np.ndarray) -> None:
    if not np.isfinite(affine).all() or np.abs(affine[:3, 3]).max() > 1e5:
        raise Refused("NO_SPACING", "a geometry that is not finite")
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = SPACING_LIMITS
    if not ((steps >= low) & (steps <= high)).all():
        raise Refused("NO_SPACING", f"voxels of {' x '.join(f'{s:.4g}' for s in steps)} mm")
    if abs(np.linalg.det(affine[:3, :3] / steps)) < 0.2:
        raise Refused("NO_SPACING", "axes that do not span a volume")
