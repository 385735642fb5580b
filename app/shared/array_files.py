"""Arrays of an npz of unknown origin, read without running code and within a limit."""

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

MAX_MEMBERS = 64
ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # of a member that we write: the same content gives the same bytes
UNREADABLE = (  # what zipfile, zlib and numpy raise on bytes that are no archive or no arrays
    *(OSError, EOFError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
)


def read_arrays(path: Path, *, max_bytes: int, only: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
    """All arrays, or some, by their names; no member may claim more than its bytes hold. Raises `UNREADABLE`."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > MAX_MEMBERS or sum(member.file_size for member in members) > max_bytes:
            raise ValueError(f"it unpacks to more than {MAX_MEMBERS} arrays or {max_bytes >> 20} MiB")
        names = {member.filename.removesuffix(".npy"): member for member in members}
        return {name: _read_array(archive, member) for name, member in names.items() if only is None or name in only}


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as stream:
        version = npy.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{member.filename} has array format {version}")
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, by_column, dtype = read_header(stream, max_header_size=10_000)
        if dtype.hasobject or dtype.kind not in "iufU":
            raise ValueError(f"{member.filename} holds {dtype}")
        size = math.prod(shape) * dtype.itemsize
        content = stream.read(member.file_size)
        if len(content) != size:
            raise ValueError(f"{member.filename} should hold {size} bytes, it has {len(content)}")
    array = np.frombuffer(content, dtype)
    return (array.reshape(shape[::-1]).T if by_column else array.reshape(shape)).copy()


def damage(error: Exception) -> str:
    """What is wrong with a file's content, in one line, out of what its reader ran into."""
    text = str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
    return f"it has no {error}" if isinstance(error, KeyError) else text.splitlines()[0]
