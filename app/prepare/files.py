"""Files of strangers: walking a tree, members of zips, telling formats by content.

Reads bytes only; nothing is unpacked to disk and nothing executed. What a format means is read elsewhere.
"""

import hashlib
import io
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from app.shared.hashes import hash_file
from app.shared.refusals import Refused
from app.shared.scan_formats import FORMATS, NIFTI_SIZES

MAX_MEMBERS = 100_000
MAX_MEMBER_BYTES = 4 << 30
MAX_ARCHIVE_BYTES = 64 << 30
MAX_RATIO = 1000  # a constant DICOM slice deflates about 1000 times; bombs go far beyond, or past the sizes above
SNIFF = 512
FIRST_TAGS = (  # of a DICOM file in implicit VR without a preamble, as old scanners wrote
    *(b"\x08\x00\x05\x00", b"\x08\x00\x08\x00", b"\x08\x00\x16\x00", b"\x08\x00\x00\x00", b"\x02\x00\x00\x00"),
)


class Ref(NamedTuple):
    """One file, or one member of a zip."""

    path: str
    member: str = ""

    @property
    def name(self) -> str:
        return os.path.basename(self.member or self.path)

    @property
    def folder(self) -> str:
        return os.path.join(self.path, os.path.dirname(self.member)) if self.member else os.path.dirname(self.path)


def files_below(root: str | Path) -> Iterator[tuple[Ref, Refused | None]]:
    """Every regular file below a path, in order, zips opened; what cannot be opened comes with its refusal."""
    root = os.path.abspath(root)
    if not os.path.isdir(root):
        yield from _members_or_file(root)
        return
    seen, closed = set(), []
    for folder, folders, files in os.walk(root, followlinks=True, onerror=closed.append):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        for name in sorted(files):
            path = os.path.join(folder, name)
            if not name.startswith(".") and _is_regular(path):
                yield from _members_or_file(path)
    for error in closed:
        yield Ref(error.filename), Refused("CORRUPT_FILE", "the folder cannot be opened")


def _is_regular(path: str) -> bool:
    """A pipe or a device would block for ever, a dangling link is nothing."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _members_or_file(path: str) -> Iterator[tuple[Ref, Refused | None]]:
    ref = Ref(path)
    if not path.lower().endswith(".zip"):
        yield ref, None
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
            _check_members(members)
    except Refused as refused:
        yield ref, refused
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, UnicodeDecodeError):
        yield ref, Refused("CORRUPT_FILE", "the zip cannot be read")
    else:
        hidden = ("__MACOSX", ".")
        names = sorted({info.filename for info in members})
        shown = (name for name in names if not any(part.startswith(hidden) for part in name.split("/")))
        yield from ((Ref(path, name), None) for name in shown)


def _check_members(members: list[zipfile.ZipInfo]) -> None:
    if len(members) > MAX_MEMBERS:
        raise Refused("UNSAFE_ARCHIVE", f"{len(members)} members, at most {MAX_MEMBERS} are allowed")
    if sum(info.file_size for info in members) > MAX_ARCHIVE_BYTES:
        raise Refused("UNSAFE_ARCHIVE", f"unpacks to more than {MAX_ARCHIVE_BYTES >> 30} GiB")
    for number, info in enumerate(members):
        parts = info.filename.replace("\\", "/").split("/")
        if info.filename.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
            raise Refused("UNSAFE_ARCHIVE", f"member {number} has an absolute or climbing path")
        mode = info.external_attr >> 16
        if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise Refused("UNSAFE_ARCHIVE", f"member {number} is a link or a device")
        if info.file_size > MAX_MEMBER_BYTES or info.file_size > MAX_RATIO * max(info.compress_size, 1024):
            raise Refused("UNSAFE_ARCHIVE", f"member {number} unpacks to {info.file_size} bytes")
        if info.flag_bits & 1:
            raise Refused("CORRUPT_FILE", "the zip is encrypted")


def open_ref(ref: Ref) -> io.BufferedIOBase:
    """The file, or a member held in memory; a member longer than its entry says is refused."""
    if not ref.member:
        return open(ref.path, "rb")
    return io.BytesIO(_read_member(ref))


def _read_member(ref: Ref) -> bytes:
    try:
        found = os.stat(ref.path)
        archive = _archive(ref.path, found.st_mtime_ns, found.st_size)
        info = archive.getinfo(ref.member)
        _check_members([info])
        with archive.open(info) as stream:
            data = stream.read(info.file_size + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError, NotImplementedError) as error:
        raise Refused("CORRUPT_FILE", "a member of the zip cannot be read") from error
    if len(data) != info.file_size:
        raise Refused("CORRUPT_FILE", "a member of the zip is not as long as its entry says")
    return data


@lru_cache(maxsize=4)
def _archive(path: str, _changed: int, _size: int) -> zipfile.ZipFile:
    """An open zip: its directory of thousands of slices is read once, not once a slice."""
    return zipfile.ZipFile(path)


def read_bytes(ref: Ref) -> bytes:
    return _read_member(ref) if ref.member else Path(ref.path).read_bytes()


def hash_of(refs: list[Ref] | tuple[Ref, ...]) -> str:
    """SHA-256 over the files' own SHA-256s, whatever their names and order."""
    digests = sorted(_file_hash(ref) for ref in refs)
    return digests[0].hex() if len(digests) == 1 else hashlib.sha256(b"".join(digests)).hexdigest()


def _file_hash(ref: Ref) -> bytes:
    if ref.member:
        return hashlib.sha256(_read_member(ref)).digest()
    return bytes.fromhex(hash_file(ref.path))  # a folder that cannot be looked into is one of these too, and is refused


def sniff(ref: Ref) -> str:
    """dicom, nifti, nrrd, mha, empty or other: by content, the name only where content cannot tell."""
    with open_ref(ref) as stream:
        head = stream.read(SNIFF)
    name = ref.name.lower()
    if not head:
        return "empty"
    if head[:2] == b"\x1f\x8b":
        head = _gunzip_head(head)
        packed = [kind for kind, it in FORMATS.items() if it.packed and (it.begins(head) or name.endswith(it.packed))]
        return packed[0] if packed else "other"
    if head[128:132] == b"DICM" or head[:6] in (b"\x08\x00\x05\x00CS", b"\x08\x00\x08\x00CS", b"\x08\x00\x16\x00UI"):
        return "dicom"
    if head[:4] in FIRST_TAGS and len(head) > 64:
        return "dicom"
    begun = [kind for kind, it in FORMATS.items() if it.begins(head)]
    if name.endswith(".hdr") and head[:4] in NIFTI_SIZES:
        return "nifti"  # Analyze 7.5, to be told so
    named = [kind for kind, it in FORMATS.items() if name.endswith(it.endings)]
    return next(iter(begun + named), "other")


def _gunzip_head(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(31).decompress(head, SNIFF)
    except zlib.error:
        return b""
