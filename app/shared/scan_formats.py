"""File formats of volumes as they are recognised: by their first bytes, else by how their names end. A row each.

Opens no file. What such a file holds is read elsewhere: prepare/formats.py has a reader for each row.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

NIFTI_SIZES = (b"\x5c\x01\x00\x00", b"\x00\x00\x01\x5c")  # of the header, in either order
OTHER_ENDINGS = (".gz", ".hdr", ".img", ".dcm", ".zip", ".npz")  # of scans and token files, of no one format


class Format(NamedTuple):
    """How files of one format are told from others."""

    begins: Callable[[bytes], bool]  # whether a file's first bytes are of it
    endings: tuple[str, ...]  # names that say so where the content cannot
    packed: tuple[str, ...] = ()  # names of such files inside gzip
    parts: tuple[str, ...] = ()  # names of headers whose voxels lie beside them


def _is_nifti(head: bytes) -> bool:
    size = head[:4]
    if size in NIFTI_SIZES:
        return head[344:348] in (b"n+1\0", b"ni1\0")
    return size in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c") and head[4:7] in (b"n+2", b"ni2")


FORMATS = MappingProxyType(
    {
        "nrrd": Format(lambda head: head[:4] == b"NRRD", (".nrrd",), parts=(".nhdr",)),
        "mha": Format(
            lambda head: head.lstrip()[:10] == b"ObjectType" or head.lstrip()[:5] == b"NDims", (".mha", ".mhd")
        ),
        "nifti": Format(_is_nifti, (".nii", ".nii.gz"), packed=(".nii.gz", ".hdr.gz")),
    }
)


def volume_endings() -> tuple[str, ...]:
    """How names of volumes end, packed ones and headers too; in small letters."""
    return tuple(ending for it in FORMATS.values() for ending in it.endings + it.packed + it.parts)


def without_ending(name: str) -> str:
    """The name of a scan or token file without what says its format."""
    for ending in sorted((*volume_endings(), *OTHER_ENDINGS), key=len, reverse=True):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name
