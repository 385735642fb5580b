"""Volume files with something changed: written by writers of our own, read by nibabel, SimpleITK and pynrrd."""

import bz2
import gzip
import itertools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import nrrd
import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from app.dataset import prepared
from tests import scans

FORMATS = ("nifti", "nifti2", "pair", "analyze", "nrrd", "nhdr", "mha", "mhd")
KINDS = ("same", "fields", "fields", "text", "bytes", "voxels")
TEXT_TYPES = {"i2": ("short", "MET_SHORT"), "i4": ("int", "MET_INT"), "f4": ("float", "MET_FLOAT")}
TEXT_TYPES |= {"f8": ("double", "MET_DOUBLE")}
ODD = ["-1", "0", "1e308", "nan", "inf", "", "a", "1 2 3 4", "-0.0", "2", "16", "500", "True", "False", "(1,0,0)", "6"]


class Drawn(NamedTuple):
    """A scan as it is meant, and how it will be written."""

    affine: np.ndarray
    hu: np.ndarray
    kind: str  # voxel type
    order: str  # < or >
    packed: int  # which packing of those that a format knows


def drawn_scan(rng: np.random.Generator) -> Drawn:
    shape = tuple(int(n) for n in rng.integers(7, 13, 3))
    spacing = tuple(rng.choice([4.0, 6.5, 9.0, 11.25], 3))
    turn = np.eye(3)[rng.permutation(3)] * rng.choice([-1.0, 1.0], 3)
    if rng.random() < 0.6:
        turn = scans.turned(float(rng.choice([3, 17, 40])), tuple(rng.normal(size=3))) @ turn
    affine = scans.centred(spacing, shape, turn)
    affine[:3, 3] += np.round(rng.uniform(-8, 8, 3), 3)
    noise = rng.integers(-20, 20, shape)  # no two voxels alike, so that a shift shows
    hu = scans.sample(affine, shape) + noise.astype(np.int16)
    hu.flat[0], hu.flat[1] = -1020, 60  # air and tissue, however little of the body is in the field of view
    return Drawn(affine, hu, str(rng.choice(list(TEXT_TYPES))), str(rng.choice(["<", ">"])), int(rng.integers(4)))


# ---- writers: header fields and voxels apart, so that either can be changed


class Written(NamedTuple):
    """Files of a scan: what stands in the header as (name, value) where it is text, else as bytes; the voxels."""

    head: bytes | list[list[str]]
    voxels: bytes
    join: Callable[[Path, bytes | list[list[str]], bytes], Path]
    base: str  # nifti, nrrd or mha


def as_nifti(scan: Drawn, name: str) -> Written:
    kinds = {"nifti": nib.Nifti1Header, "nifti2": nib.Nifti2Header, "pair": nib.Nifti1Header}
    header = kinds.get(name, nib.AnalyzeHeader)(endianness=scan.order)
    header.set_data_shape(scan.hu.shape)
    stored = np.dtype(scan.order + scan.kind)
    header.set_data_dtype(stored)
    values, single = scan.hu.astype(np.float64), name in ("nifti", "nifti2")
    if name != "analyze":
        header.set_sform(scan.affine, 1)
        header.set_qform(scan.affine, int(scan.packed > 0))
        header["magic"] = {"nifti": b"n+1", "pair": b"ni1", "nifti2": b"n+2\0\r\n\x1a\n"}[name]
        header["vox_offset"] = (header.template_dtype.itemsize + 4) if single else 0
        if scan.packed == 3:
            header["scl_slope"], header["scl_inter"] = 0.5, -1024
            values = (values + 1024) * 2
    voxels = values.astype(stored).tobytes(order="F")

    def join(folder: Path, head: bytes, data: bytes) -> Path:
        gz = scan.packed >= 2
        pack = gzip.compress if gz else bytes
        ending = ".gz" if gz else ""
        if single:
            path = folder / f"s.nii{ending}"
            path.write_bytes(pack(head + bytes(4) + data))
            return path
        (folder / f"s.img{ending}").write_bytes(pack(data))
        path = folder / f"s.hdr{ending}"
        path.write_bytes(pack(head))
        return path

    return Written(header.binaryblock, voxels, join, "nifti")


def as_nrrd(scan: Drawn, name: str) -> Written:
    lps = scans.LPS @ scan.affine
    encoding = ["raw", "gzip", "bzip2", "ascii"][scan.packed]
    head = [
        ["type", TEXT_TYPES[scan.kind][0]],
        ["dimension", "3"],
        ["space", "left-posterior-superior"],
        ["sizes", " ".join(map(str, scan.hu.shape))],
        ["space directions", " ".join(_vector(lps[:3, k]) for k in range(3))],
        ["kinds", "domain domain domain"],
        ["endian", "little" if scan.order == "<" else "big"],
        ["encoding", encoding],
        ["space origin", _vector(lps[:3, 3])],
    ]
    stored = scan.hu.astype(scan.order + scan.kind)
    voxels = stored.tobytes(order="F")
    if encoding == "ascii":
        voxels = " ".join(map(str, scan.hu.ravel(order="F").tolist())).encode()
    packs = {"gzip": gzip.compress, "bzip2": bz2.compress}

    def join(folder: Path, head: list, data: bytes) -> Path:
        lines = ["NRRD0004", *(f"{key}: {value}" if not key.startswith("#") else key for key, value in head)]
        data = packs.get(encoding, bytes)(data)
        text = "\n".join(lines) + "\n"
        path = folder / f"s.{name}"
        if name == "nhdr":
            (folder / "s.dat").write_bytes(data)
            path.write_bytes(f"{text}data file: s.dat\n".encode("latin-1"))
        else:
            path.write_bytes(f"{text}\n".encode("latin-1") + data)
        return path

    return Written(head, voxels, join, "nrrd")


def _vector(values) -> str:
    return f"({','.join(repr(float(v)) for v in values)})"


def as_mha(scan: Drawn, name: str) -> Written:
    lps = scans.LPS @ scan.affine
    steps = np.linalg.norm(lps[:3, :3], axis=0)
    packed = bool(scan.packed % 2)
    head = [
        ["ObjectType", "Image"],
        ["NDims", "3"],
        ["BinaryData", "True"],
        ["BinaryDataByteOrderMSB", str(scan.order == ">")],
        ["CompressedData", str(packed)],
        ["TransformMatrix", " ".join(repr(float(v)) for v in (lps[:3, :3] / steps).T.ravel())],
        ["Offset", " ".join(repr(float(v)) for v in lps[:3, 3])],
        ["CenterOfRotation", "0 0 0"],
        ["ElementSpacing", " ".join(repr(float(v)) for v in steps)],
        ["DimSize", " ".join(map(str, scan.hu.shape))],
        ["ElementType", TEXT_TYPES[scan.kind][1]],
    ]
    voxels = scan.hu.astype(scan.order + scan.kind).tobytes(order="F")

    def join(folder: Path, head: list, data: bytes) -> Path:
        data = zlib.compress(data) if packed else data
        if packed and not any(key == "CompressedDataSize" for key, _ in head):
            head = [*head, ["CompressedDataSize", str(len(data))]]
        path = folder / f"s.{name}"
        text = "".join(f"{key} = {value}\n" for key, value in head)
        if name == "mhd":
            (folder / "s.raw").write_bytes(data)
            path.write_bytes(f"{text}ElementDataFile = s.raw\n".encode("latin-1"))
        else:
            path.write_bytes(f"{text}ElementDataFile = LOCAL\n".encode("latin-1") + data)
        return path

    return Written(head, voxels, join, "mha")


WRITERS = {**dict.fromkeys(FORMATS[:4], as_nifti), "nrrd": as_nrrd, "nhdr": as_nrrd, "mha": as_mha, "mhd": as_mha}


# ---- changes

SAME_TEXT = {
    "nrrd": [["content", "CT of Smith^John"], ["# a comment", ""], ["key:=a", "value"],
             ["space units", '"mm" "mm" "mm"'], ["centerings", "cell cell cell"], ["byte skip", "0"],
             ["sample units", '"HU"'], ["number", "12"], ["thicknesses", "nan nan nan"]],
    "mha": [["Comment", "CT of Smith"], ["AnatomicalOrientation", "RAI"], ["HeaderSize", "0"], ["Name", "x"],
            ["Modality", "MET_MOD_CT"], ["ElementNumberOfChannels", "1"], ["ID", "3"], ["DistanceUnits", "?"],
            ["ElementMin", "-1024"], ["ElementToIntensityFunctionSlope", "1"]],
}  # fmt: skip
TELLING_TEXT = {
    "nrrd": [["space units", '"cm" "cm" "cm"'], ["byte skip", "2"], ["byte skip", "-1"], ["line skip", "1"],
             ["spacings", "2 2 2"], ["space", "RAS"], ["space", "left-anterior-superior"], ["space", "scanner-xyz"],
             ["space", "right-anterior-superior"], ["endian", "big"], ["endian", "little"], ["type", "ushort"],
             ["type", "int"], ["encoding", "gzip"], ["encoding", "raw"], ["old min", "-1000"], ["axis mins", "1 1 1"],
             ["units", '"cm" "cm" "cm"'], ["dimension", "4"], ["space dimension", "3"], ["encoding", "hex"],
             ["measurement frame", "(0,1,0) (1,0,0) (0,0,1)"], ["space directions", "none (1,0,0) (0,1,0) (0,0,1)"],
             ["kinds", "domain domain list"], ["kinds", "vector domain domain"], ["sizes", "7 7 7"]],
    "mha": [["DistanceUnits", "cm"], ["DistanceUnits", "um"], ["HeaderSize", "300"], ["HeaderSize", "-1"],
            ["HeaderSize", "2"], ["ElementToIntensityFunctionSlope", "2"], ["ElementToIntensityFunctionOffset", "-9"],
            ["BinaryDataByteOrderMSB", "True"], ["ElementByteOrderMSB", "True"], ["CompressedData", "False"],
            ["CompressedData", "True"], ["ElementNumberOfChannels", "2"], ["ElementType", "MET_USHORT"],
            ["ElementType", "MET_INT"], ["NDims", "2"], ["Rotation", "0 1 0 1 0 0 0 0 1"], ["ElementSize", "1 1 1"],
            ["Orientation", "1 0 0 0 -1 0 0 0 1"], ["Origin", "5 5 5"], ["Position", "9 9 9"], ["BinaryData", "False"],
            ["Modality", "MET_MOD_MR"], ["CompressedDataSize", "20"], ["ElementSpacing", "-2 2 2"],
            ["DimSize", "7 7 7"], ["AnatomicalOrientation", "LPS"], ["ObjectType", "Tube"]],
}  # fmt: skip


def changed_text(rng: np.random.Generator, kind: str, base: str, head: list[list[str]]) -> list[list[str]]:
    """A header of text with a line more, another, fewer, doubled, or with the value of a third."""
    head = [list(line) for line in head]
    if kind == "same":
        for _ in range(int(rng.integers(1, 4))):
            line = SAME_TEXT[base][int(rng.integers(len(SAME_TEXT[base])))]
            if line[0] not in {name for name, _ in head}:
                head.insert(int(rng.integers(1, len(head) + 1)), line)
        return head
    if kind == "fields":
        for line in rng.permutation(np.array(TELLING_TEXT[base], object))[: int(rng.integers(1, 3))].tolist():
            at = next((n for n, own in enumerate(head) if own[0] == line[0]), None)
            head[at if at is not None else slice(len(head), None)] = line if at is not None else [line]
        return head
    at, other = (int(n) for n in rng.integers(0, len(head), 2))
    change = int(rng.integers(5))
    if change == 0:
        del head[at]
    elif change == 1:
        head.append(list(head[at]))
    elif change == 2:
        head[at][1] = head[other][1]
    elif change == 3:
        head[at][1] = ODD[int(rng.integers(len(ODD)))]
    else:
        words = head[at][1].split(" ")
        words[int(rng.integers(len(words)))] = ODD[int(rng.integers(len(ODD)))]
        head[at][1] = " ".join(words)
    return head


FIELDS_OF_NIFTI = ("dim", "datatype", "bitpix", "pixdim", "vox_offset", "scl_slope", "scl_inter", "qform_code")
FIELDS_OF_NIFTI += ("sform_code", "quatern_b", "quatern_c", "qoffset_x", "srow_x", "srow_y", "srow_z", "xyzt_units")
SAID_OF_NIFTI = ("descrip", "aux_file", "db_name", "intent_name", "cal_max", "cal_min", "toffset", "slice_code")


def changed_nifti(rng: np.random.Generator, kind: str, head: bytes) -> bytes:
    """A binary header with other values in its fields, by their names."""
    classes = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
    if len(head) == 348 and head[344:346] not in (b"n+", b"ni"):
        classes = {348: nib.AnalyzeHeader}
    header = classes[len(head)](head, check=False)
    names = [n for n in (SAID_OF_NIFTI if kind == "same" else FIELDS_OF_NIFTI) if n in header.template_dtype.names]
    for name in rng.choice(names, int(rng.integers(1, 3))):
        field = header._structarr[str(name)]
        if field.dtype.kind == "S":
            header._structarr[str(name)] = b"Smith^John"
            continue
        whole = field.dtype.kind in "iu"
        values = (
            [0, 1, 2, 3, 4, 5, 7, 8, 10, 16, 64, 255, 352, 512, 30000, -1] if whole else [0, 1, -1, 0.5, 2, 1e-9, 360]
        )
        values += [] if whole else [np.nan, np.inf, 1e30, 352, 544, 1000]
        value = values[int(rng.integers(len(values)))]
        with np.errstate(all="ignore"):
            if field.ndim:
                header._structarr[str(name)][int(rng.integers(field.size))] = np.array(value).astype(field.dtype)
            else:
                header._structarr[str(name)] = np.array(value).astype(field.dtype)
    return header.binaryblock


def changed_bytes(rng: np.random.Generator, data: bytes) -> bytes:
    out, at, length = bytearray(data), int(rng.integers(len(data))), int(rng.integers(1, 12))
    change = int(rng.integers(4))
    if change == 0:
        for _ in range(int(rng.integers(1, 5))):
            out[int(rng.integers(len(out)))] ^= 1 << int(rng.integers(8))
        return bytes(out)
    middle = [b"", data[at : at + length] * 2, bytes(length)][change - 1]
    return bytes(out[:at]) + middle + bytes(out[at + length :])


def write_mutant(rng: np.random.Generator, folder: Path) -> tuple[str, str, Drawn]:
    """Writes the files of one mutant: its format, the kind of its change, and the scan that it was made from."""
    name, kind, scan = str(rng.choice(FORMATS)), str(rng.choice(KINDS)), drawn_scan(rng)
    written = WRITERS[name](scan, name)
    head, voxels = written.head, written.voxels
    folder.mkdir(parents=True)
    if kind in ("same", "fields", "text"):
        if isinstance(head, bytes):
            head = changed_nifti(rng, kind, head)
        else:
            head = changed_text(rng, kind, written.base, head)
    elif kind == "voxels":
        cut = int(rng.choice([1, 2, 4, 7, 64, 500]))
        voxels = [voxels[:-cut], voxels + bytes(cut), voxels[cut:]][int(rng.integers(3))]
    path = written.join(folder, head, voxels)
    if kind == "bytes":
        data = path.read_bytes()
        reach = len(data) if path.suffix in (".gz", ".mhd", ".nhdr") else min(len(data), 560)
        path.write_bytes(changed_bytes(rng, data[:reach]) + data[reach:])
    return name, kind, scan


# ---- what others read


class Read(NamedTuple):
    affine: np.ndarray  # index to RAS mm
    hu: np.ndarray


def by_nibabel(path: Path) -> Read | None:
    try:
        image = nib.load(path)
        unit = {1: 1000.0, 3: 0.001}.get(int(image.header["xyzt_units"]) & 7, 1.0)
        return cleaned(np.diag([unit, unit, unit, 1]) @ image.affine, np.asarray(image.dataobj, np.float64))
    except Exception:  # what it cannot read, it does not speak for
        return None


def by_sitk(path: Path) -> Read | None:
    try:
        image = sitk.ReadImage(str(path))
        if image.GetNumberOfComponentsPerPixel() > 1:
            return None
        hu = sitk.GetArrayFromImage(image).astype(np.float64).transpose()
    except Exception:  # as above
        return None
    affine = np.eye(4)
    dims = image.GetDimension()
    turn = np.reshape(image.GetDirection(), (dims, dims))[:3, :3]
    if dims < 3:
        return None
    affine[:3, :3] = turn * image.GetSpacing()[:3]
    affine[:3, 3] = image.GetOrigin()[:3]
    return cleaned(scans.LPS @ affine, hu)


def by_pynrrd(path: Path) -> Read | None:
    try:
        values, header = nrrd.read(str(path))
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = header["space directions"].T, header["space origin"]
        first = "".join(word[0] for word in header["space"].lower().split("-"))  # RAS is written both ways
        flip = {"lps": (-1, -1, 1), "ras": (1, 1, 1), "las": (-1, 1, 1)}[
            first if len(first) == 3 else header["space"].lower()
        ]
        return cleaned(np.diag([*flip, 1]) @ affine, np.asarray(values, np.float64))
    except Exception:  # as above
        return None


def cleaned(affine: np.ndarray, hu: np.ndarray) -> Read:
    """Three axes, and what is no measurement as air."""
    hu = hu.reshape(hu.shape[:3]) if hu.ndim > 3 and hu.size == np.prod(hu.shape[:3]) else hu
    hu = np.where(np.isfinite(hu) & (hu >= -1500), hu, -1000.0)
    return Read(affine, hu)


READERS = {"nibabel": by_nibabel, "SimpleITK": by_sitk, "pynrrd": by_pynrrd}
READERS_OF = {"nifti": ("nibabel", "SimpleITK"), "nrrd": ("SimpleITK", "pynrrd"), "mha": ("SimpleITK",)}


def apart(one: Read, other: Read, mm: float = 0.02) -> str:
    """Where two readings differ; "" where they agree."""
    if one.hu.shape != other.hu.shape:
        return f"shapes {one.hu.shape} and {other.hu.shape}"
    ends = np.array(list(itertools.product(*((0, n - 1) for n in one.hu.shape))))
    off = np.abs(ends @ (one.affine - other.affine)[:3, :3].T + (one.affine - other.affine)[:3, 3]).max()
    if not off < mm:
        return f"{off:.3g} mm"
    wrong = ~np.isclose(one.hu, other.hu, rtol=1e-5, atol=0.02)
    return f"{int(wrong.sum())} voxels by up to {np.abs(one.hu - other.hu).max():.4g}" if wrong.any() else ""


def resampled_apart(case: prepared.PreparedCase, read: Read) -> str:
    """How the prepared volume differs from linear interpolation of what was read, well inside the scan.

    Nothing is said of a scan finer than the grid, which is smoothed.
    """
    if np.linalg.norm(read.affine[:3, :3], axis=0).min() < case.spacing[0] - 1e-3:
        return ""
    index = np.indices(case.shape).reshape(3, -1)
    places = np.linalg.inv(read.affine) @ case.affine @ np.vstack([index, np.ones(index.shape[1])])
    inside = (places[:3] > 0.01).all(0) & (places[:3] < np.array(read.hu.shape)[:, None] - 1.01).all(0)
    want = ndimage.map_coordinates(read.hu, places[:3, inside], order=1)
    got = np.asarray(case.hu(), np.float64).reshape(-1)[inside]
    off = np.abs(got - want)
    return f"{off.max():.4g} HU on the grid" if off.size and off.max() > 3 else ""
