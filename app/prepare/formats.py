"""Headers of NIfTI, NRRD and MetaImage: shape, RAS affine, and where the voxels lie.

Small readers of our own on purpose: the header is judged before a byte of data is read, and data files that a header
names must lie beside it. Voxels are read by `volume_file`.
"""

import math
import os
import re
import struct
import zlib
from collections.abc import Iterable
from types import MappingProxyType

import nibabel as nib
import numpy as np
from jaxtyping import Float

from app.prepare.files import Ref, open_ref
from app.prepare.findings import Finding, finding
from app.prepare.gate import LPS_TO_RAS
from app.prepare.volume_file import VolumeFile, three_axes
from app.prepare.volume_rules import check_mha, check_nrrd, numbers_of, value_of
from app.shared.refusals import Refused

MAGICS = (b"n+1\0", b"n+2\0", b"ni1\0", b"ni2\0")
HEADER_BYTES = 1 << 16
NRRD_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}
NRRD_ENCODINGS = {
    "raw": "raw",
    **dict.fromkeys(("gzip", "gz"), "gzip"),
    **dict.fromkeys(("bzip2", "bz2"), "bzip2"),
    **dict.fromkeys(("ascii", "text", "txt"), "ascii"),
}
META_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}


def read_header(ref: Ref, kind: str) -> VolumeFile:
    """Judges a file's header; raises Refused with the rule it breaks."""
    try:
        return READERS[kind](ref)
    except Refused:
        raise
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, OSError, EOFError, zlib.error) as error:
        raise Refused("CORRUPT_FILE", f"the {kind} header cannot be read") from error


# ---- NIfTI


def _nifti(ref: Ref) -> VolumeFile:
    with open_ref(ref) as stream:
        head = stream.read(HEADER_BYTES)
    gzipped = head[:2] == b"\x1f\x8b"
    if gzipped:
        head = zlib.decompressobj(31).decompress(head, 1024)
    two = head[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")
    kind = nib.Nifti2Header if two else nib.Nifti1Header
    if len(head) < kind.template_dtype.itemsize:
        raise Refused("CORRUPT_FILE" if head else "EMPTY", "the NIfTI header is cut short")
    header = kind(head[: kind.template_dtype.itemsize], check=False)
    magic = bytes(head[4:8] if two else head[344:348])
    if int(header["sizeof_hdr"]) != kind.template_dtype.itemsize or magic not in MAGICS:
        if ref.name.lower().endswith((".hdr", ".hdr.gz")):
            raise Refused("NO_SPACING", "Analyze 7.5 does not tell left from right")
        raise Refused("CORRUPT_FILE", "no NIfTI magic")
    dims = [int(n) for n in header["dim"]]
    if not 1 <= dims[0] <= 7:
        raise Refused("CORRUPT_FILE", f"{dims[0]} dimensions")
    dtype = _nifti_dtype(header)
    with np.errstate(all="ignore"):
        affine, findings = _nifti_affine(header)
    shape = three_axes(dims[1 : dims[0] + 1], affine)
    data, offset = ref, int(header["vox_offset"])
    if magic.startswith(b"ni"):
        data = _beside(ref, re.sub(r"\.hdr(\.gz)?$", lambda m: ".img" + (m[1] or ""), ref.name, flags=re.I))
    if not (0 if data != ref else kind.template_dtype.itemsize + 4) <= offset <= 1 << 30:
        raise Refused("CORRUPT_FILE", f"voxels at byte {offset}")
    if data == ref and _extensions_end(head, kind.template_dtype.itemsize, little=header.endianness == "<") > offset:
        raise Refused("CORRUPT_FILE", "extensions of the header reach into the voxels")
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        slope, intercept = 1.0, 0.0  # how NIfTI says "not scaled"
    elif not math.isfinite(intercept):
        raise Refused("CORRUPT_FILE", "the intercept is not finite")
    encoding = "gzipped" if gzipped else "raw"
    return VolumeFile(ref, data, shape, affine, dtype, offset, encoding, slope, intercept, tuple(findings))


def _extensions_end(head: bytes, size: int, *, little: bool) -> int:
    """Where the extensions that lie in the first bytes of a file end, a header of this size before them."""
    at, order = size + 4, "<" if little else ">"
    while head[size : size + 1] not in (b"", b"\0") and at + 8 <= len(head):
        (length,) = struct.unpack_from(order + "i", head, at)
        if length < 16 or length % 16:  # what follows is no extension
            break
        at += length
    return at


def _nifti_dtype(header: nib.Nifti1Header) -> str:
    try:
        dtype = header.get_data_dtype()
    except nib.spatialimages.HeaderDataError as error:
        raise Refused("CORRUPT_FILE", "an unknown voxel type") from error
    if dtype.fields:
        raise Refused("RGB", "colour voxels")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise Refused("CORRUPT_FILE", "complex or unusual voxels are no CT")
    return dtype.str


def _nifti_affine(header: nib.Nifti1Header) -> tuple[np.ndarray, list[Finding]]:
    """The sform where it is set, else the qform; both set and far apart is worth a warning."""
    sform, qform = (1 <= int(header[name]) <= 5 for name in ("sform_code", "qform_code"))
    if not (sform or qform):
        raise Refused("NO_SPACING", "neither sform nor qform is set: orientation unknown")
    by_s = header.get_sform() if sform else None
    try:
        by_q = header.get_qform() if qform else None
    except (ValueError, nib.spatialimages.HeaderDataError) as error:
        if not sform:
            raise Refused("NO_SPACING", "the qform is no rotation") from error
        return nifti_units(header) @ by_s, [finding("SFORM_QFORM_DIFFER", "the qform is no rotation")]
    affine = nifti_units(header) @ np.asarray(by_q if by_s is None else by_s, np.float64)
    if by_s is None:
        return affine, [finding("ORIENTATION_FROM_QFORM")]
    shape = [max(int(n), 1) for n in header["dim"][1:4]]
    steps, pixdim = np.linalg.norm(by_s[:3, :3], axis=0), np.abs(header["pixdim"][1:4].astype(np.float64))
    if by_q is not None:
        corners = np.array([[x, y, z, 1] for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])])
        apart = np.abs(corners @ (by_s - by_q).T).max()
        if not apart <= 0.5 * steps.min():
            return affine, [finding("SFORM_QFORM_DIFFER", f"by up to {apart:.2f} mm")]
    elif not (np.abs(steps - pixdim) * shape).max() <= 0.5 * steps.min():  # ITK takes this spacing
        return affine, [finding("SFORM_QFORM_DIFFER", f"pixdim says {' x '.join(f'{n:.4g}' for n in pixdim)} mm")]
    return affine, []


def nifti_units(header: nib.Nifti1Header) -> Float[np.ndarray, "4 4"]:
    """From the unit that a header tells, metres or microns, to mm."""
    scale = {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)
    return np.diag([scale, scale, scale, 1.0])


def _beside(ref: Ref, name: str) -> Ref:
    """Another file in the same folder; a name that leads elsewhere is refused."""
    name = name.strip()
    if not name or name != os.path.basename(name.replace("\\", "/")) or name in (".", ".."):
        raise Refused("CORRUPT_FILE", "the header names a data file that does not lie beside it")
    if ref.member:
        other = Ref(ref.path, os.path.join(os.path.dirname(ref.member), name))
    else:
        other = Ref(os.path.join(os.path.dirname(ref.path), name))
        if not os.path.isfile(other.path):
            raise Refused("CORRUPT_FILE", "the data file that the header names is missing")
    return other


# ---- NRRD


def _nrrd(ref: Ref) -> VolumeFile:
    with open_ref(ref) as stream:
        head = stream.read(HEADER_BYTES)
    match = re.search(rb"\r?\n\r?\n", head)
    text = (head[: match.start()] if match else head).decode("latin-1")
    magic, *lines = text.splitlines()
    if re.fullmatch(r"NRRD000[1-5]", magic.strip()) is None:
        raise Refused("CORRUPT_FILE", "no NRRD magic")
    written = (line for line in lines if not line.startswith("#") and ":=" not in line)
    fields = _fields(written, ":", blanks=False)  # of names with a blank in them both forms are in use
    data_file = fields.get("datafile")
    if match is None and data_file is None:
        raise Refused("CORRUPT_FILE", "the NRRD header has no end")
    if fields["type"].lower() == "block" or fields["type"].lower() not in NRRD_TYPES:
        raise Refused("CORRUPT_FILE", "an unknown voxel type")
    sizes = [int(word) for word in fields["sizes"].split()]
    if int(fields["dimension"]) != len(sizes):
        raise Refused("CORRUPT_FILE", "dimension and sizes disagree")
    _no_colours(fields, sizes)
    check_nrrd(fields)
    affine = _nrrd_affine(fields)
    shape = three_axes(sizes, affine)
    encoding = NRRD_ENCODINGS.get(fields["encoding"].lower())
    if encoding is None:
        raise Refused("CORRUPT_FILE", "an unknown encoding")
    offset = int(fields.get("byteskip", "0"))
    if offset < -1 or int(fields.get("lineskip", "0")):
        raise Refused("CORRUPT_FILE", "skipped lines are not read")
    data = ref if data_file is None else _beside(ref, data_file)
    offset = offset + match.end() if data is ref and offset >= 0 else offset
    kind = NRRD_TYPES[fields["type"].lower()]
    order = {"little": "<", "big": ">"}.get(fields.get("endian", "").lower())
    if order is None and (kind.endswith("1") or encoding == "ascii"):
        order = "<"  # a byte has no order
    if order is None:
        raise Refused("CORRUPT_FILE", "the byte order is missing or unknown")
    return VolumeFile(ref, data, shape, affine, order + kind, offset, encoding)


def _no_colours(fields: dict[str, str], sizes: list[int]) -> None:
    kinds = fields.get("kinds", "").lower().split()
    if len(sizes) > 3 and any("color" in kind for kind in kinds):
        raise Refused("RGB", "colour voxels")
    if len(sizes) > 3 and max(sizes[:1] + sizes[3:]) > 1:
        raise Refused("FOUR_D", f"{len(sizes)} axes")


def _nrrd_affine(fields: dict[str, str]) -> np.ndarray:
    if "spacedirections" not in fields:
        raise Refused("NO_SPACING", "no space directions: orientation unknown")
    vectors = _vectors(fields["spacedirections"], count=int(fields["dimension"]))
    (origin,) = _vectors(fields.get("spaceorigin", "(0,0,0)"))
    space = fields.get("space", "").lower()
    letters = {"lps": "lps", "ras": "ras", "las": "las", "right-anterior-superior": "ras"}
    letters |= {"left-posterior-superior": "lps", "left-anterior-superior": "las"}
    if space not in letters:
        raise Refused("NO_SPACING", "the space is not LPS, RAS or LAS: left and right unknown")
    affine = np.eye(4)
    affine[:3, :3] = np.array(vectors, np.float64).reshape(3, 3).T
    affine[:3, 3] = origin
    signs = [1.0 if got == want else -1.0 for got, want in zip(letters[space], "ras", strict=True)]
    return np.diag([*signs, 1.0]) @ affine + 0.0


def _vectors(text: str, *, count: int = 1) -> list[list[float]]:
    """(a,b,c) (d,e,f) ...; `none` stands for an axis that is not in space. As many as there are axes."""
    if re.fullmatch(r"\s*(none|\([^()]*\))(\s*(none|\([^()]*\)))*\s*", text) is None:
        raise Refused("CORRUPT_FILE", "a vector that is not written (a,b,c)")
    if len(re.findall(r"none|\([^()]*\)", text)) != count:
        raise Refused("CORRUPT_FILE", f"not {count} vectors, one for each axis")
    return [[float(part) for part in vector.split(",")] for vector in re.findall(r"\(([^()]*)\)", text)]


def _fields(lines: Iterable[str], mark: str, *, blanks: bool = True) -> dict[str, str]:
    """Lines `name: value` with lower-case names; a line without the mark, or a name that comes twice, is damage."""
    fields: dict[str, str] = {}
    for line in lines:
        name, found_mark, value = line.partition(mark)
        name = name.strip().lower() if blanks else name.replace(" ", "").lower()
        if re.search(r"[\x00-\x08\x0e-\x1f]", line):
            raise Refused("CORRUPT_FILE", "a header line that is no text")
        if not found_mark or name in fields:
            raise Refused("CORRUPT_FILE", "a header line without a value, or one that comes twice")
        fields[name] = value.strip()
    return fields


# ---- MetaImage


def _mha(ref: Ref) -> VolumeFile:
    with open_ref(ref) as stream:
        head = stream.read(HEADER_BYTES)
    match = re.search(rb"(?m)^ElementDataFile\s*=\s*([^\r\n]*)\r?\n?", head)
    if match is None:
        raise Refused("CORRUPT_FILE", "the MetaImage header has no end")
    fields = _fields(head[: match.start()].decode("latin-1").splitlines(), "=")
    sizes = [int(word) for word in fields["dimsize"].split()]
    if int(fields["ndims"]) != len(sizes):
        raise Refused("CORRUPT_FILE", "NDims and DimSize disagree")
    if int(fields.get("elementnumberofchannels", "1")) != 1:
        raise Refused("RGB", "several values a voxel")
    check_mha(fields)
    affine = _mha_affine(fields, len(sizes))
    shape = three_axes(sizes, affine)
    if fields["elementtype"] not in META_TYPES:
        raise Refused("CORRUPT_FILE", "an unknown voxel type")
    if not _yes(fields, "binarydata", default=True):
        raise Refused("CORRUPT_FILE", "text voxels are not read")
    big = _yes(fields, "binarydatabyteordermsb", "elementbyteordermsb")
    packed = _yes(fields, "compresseddata")
    name = match[1].decode("latin-1").strip()
    data = ref if name.upper() == "LOCAL" else _beside(ref, name)
    offset = int(fields.get("headersize", "0"))
    if offset and (data is ref or packed or offset < -1):
        raise Refused("CORRUPT_FILE", "a HeaderSize where there is no other header")
    offset = match.end() if data is ref else offset
    dtype = (">" if big else "<") + META_TYPES[fields["elementtype"]]
    length = int(fields.get("compresseddatasize", "0")) if packed else 0
    return VolumeFile(ref, data, shape, affine, dtype, offset, "gzip" if packed else "raw", packed_length=length)


def _yes(fields: dict[str, str], *names: str, default: bool = False) -> bool:
    value = (value_of(fields, *names) or str(default)).lower()
    if value not in ("true", "false"):
        raise Refused("CORRUPT_FILE", "a header value that is neither True nor False")
    return value == "true"


def _mha_affine(fields: dict[str, str], dims: int) -> np.ndarray:
    if dims < 3:
        return np.eye(4)  # refused for its shape in a moment
    spacing = fields.get("elementspacing", fields.get("elementsize"))  # a size may differ from the spacing
    if spacing is None:
        raise Refused("NO_SPACING", "no ElementSpacing")
    turn = value_of(fields, "transformmatrix", "rotation", "orientation")
    matrix = np.array([float(w) for w in turn.split()]).reshape(dims, dims)[:3, :3] if turn else np.eye(3)
    origin = value_of(fields, "offset", "position", "origin") or " ".join("0" * dims)
    affine = np.eye(4)
    affine[:3, :3] = matrix.T * numbers_of(spacing, dims)[:3]
    affine[:3, 3] = numbers_of(origin, dims)[:3]
    numbers_of(fields.get("centerofrotation", origin), dims)
    return LPS_TO_RAS @ affine + 0.0


READERS = MappingProxyType({"nifti": _nifti, "nrrd": _nrrd, "mha": _mha})  # of headers, by the names in FORMATS
