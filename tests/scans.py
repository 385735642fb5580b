"""Small scans of a known world, written as DICOM, NIfTI, NRRD or MetaImage for tests; imports nothing of ours.

`world_hu` says which HU lies at a point in RAS mm, so a test can ask any reader, at any geometry, for the truth.
"""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

CT = "1.2.840.10008.5.1.4.1.1.2"
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def world_hu(points: np.ndarray) -> np.ndarray:
    """A smooth body (an ellipsoid of tissue around the origin) in air; points (..., 3) in RAS mm."""
    x, y, z = np.moveaxis(np.asarray(points, np.float64), -1, 0)
    inside = 1 / (1 + np.exp((np.sqrt((x / 40) ** 2 + (y / 32) ** 2 + (z / 45) ** 2) - 1) * 12))
    tissue = 40 + 2.0 * x - 1.5 * y + 1.0 * z + 60 * np.sin(x / 15) * np.cos(z / 15)
    return -1000 + inside * (tissue + 1000)


def sample(affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The world at the voxels of a grid, rounded."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    return np.rint(world_hu(index @ affine[:3, :3].T + affine[:3, 3])).astype(np.int16)


def centred(
    spacing: tuple[float, float, float], shape: tuple[int, int, int], turn: np.ndarray | None = None
) -> np.ndarray:
    """An affine whose middle voxel lies at the origin."""
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if turn is None else turn) @ np.diag(spacing)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def turned(degrees: float, axis: tuple[float, float, float]) -> np.ndarray:
    unit = np.array(axis) / np.linalg.norm(axis)
    k = np.array([[0, -unit[2], unit[1]], [unit[2], 0, -unit[0]], [-unit[1], unit[0], 0]])
    a = np.radians(degrees)
    return np.eye(3) + np.sin(a) * k + (1 - np.cos(a)) * k @ k


def write_nifti(path: Path, affine: np.ndarray, data: np.ndarray, *, sform: int = 2, qform: int = 0) -> Path:
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def nifti_scan(
    path: Path, *, spacing=(3.0, 3.0, 4.0), shape=(36, 32, 28), turn: np.ndarray | None = None, **kwargs
) -> np.ndarray:
    """A scan of the world in one file; returns its affine."""
    affine = centred(spacing, shape, turn)
    write_nifti(path, affine, sample(affine, shape), **kwargs)
    return affine


def dicom_slice(stored: np.ndarray, position, *, spacing=(3.0, 3.0), orientation=(1, 0, 0, 0, 1, 0), **tags) -> Dataset:
    """One CT slice; `stored` is (rows, columns). Any tag may be given by its keyword, None removes it."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = tags.pop("SOPClassUID", CT)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    ds.Modality, ds.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.PatientID, ds.StudyInstanceUID, ds.SeriesInstanceUID = "P1", "1.2.3", "1.2.3.4"
    ds.Rows, ds.Columns = stored.shape[:2]
    ds.PixelSpacing = [float(s) for s in spacing]
    ds.ImagePositionPatient = [round(float(p), 6) for p in position]
    ds.ImageOrientationPatient = [round(float(o), 8) for o in orientation]
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, -1024, "HU"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    ds.SliceThickness = 1.0
    ds.PixelData = stored.astype("<i2" if stored.dtype.kind == "i" else "<u2").tobytes()
    for name, value in tags.items():
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)
    return ds


def save(ds: Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if int(pydicom.__version__.split(".")[0]) >= 3:
        pydicom.dcmwrite(path, ds, enforce_file_format=True)
    else:
        ds.is_little_endian, ds.is_implicit_VR = True, False
        pydicom.dcmwrite(path, ds, write_like_original=False)
    return path


def series(
    *,
    heights=tuple(4.0 * k for k in range(-7, 8)),
    shape=(32, 36),
    spacing=(3.0, 3.0),
    shear=0.0,
    orientation=(1, 0, 0, 0, 1, 0),
    **tags,
) -> list[Dataset]:
    """Slices of the world at these heights along the normal; `shear`: mm towards the column a mm of height (a tilt)."""
    row, column = np.array(orientation[:3], float), np.array(orientation[3:], float)
    normal = np.cross(row, column)
    rows, columns = shape
    corner = -row * spacing[1] * (columns - 1) / 2 - column * spacing[0] * (rows - 1) / 2
    out = []
    for height in heights:
        position = corner + height * (normal + shear * column)
        i, j = np.meshgrid(np.arange(columns), np.arange(rows))
        lps = position + i[..., None] * spacing[1] * row + j[..., None] * spacing[0] * column
        hu = np.rint(world_hu(lps * [-1, -1, 1]))
        stored = (hu + 1024).astype(np.uint16)
        out.append(dicom_slice(stored, position, spacing=spacing, orientation=orientation, **tags))
    return out


def write_series(folder: Path, slices: list[Dataset], *, order: np.random.Generator | None = None) -> Path:
    """Files whose names say nothing about the order of the slices."""
    numbers = (order or np.random.default_rng(5)).permutation(len(slices))
    for number, ds in zip(numbers, slices, strict=True):
        save(ds, folder / f"IM{number:04d}")
    return folder


def write_nrrd(path: Path, affine: np.ndarray, data: np.ndarray, *, encoding: str = "gzip", **fields: str) -> Path:
    lps = LPS @ affine
    types = {"i2": "short", "u1": "uchar", "u2": "ushort", "f4": "float", "i4": "int"}
    header = {
        "type": types[data.dtype.str[1:]],
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": " ".join(map(str, data.shape)),
        "space directions": " ".join(f"({','.join(repr(float(v)) for v in lps[:3, k])})" for k in range(3)),
        "space origin": f"({','.join(repr(float(v)) for v in lps[:3, 3])})",
        "endian": "little",
        "encoding": encoding,
        **fields,
    }
    body = data.tobytes(order="F")
    text = "NRRD0004\n" + "".join(f"{name}: {value}\n" for name, value in header.items()) + "\n"
    path.write_bytes(text.encode() + (gzip.compress(body) if encoding == "gzip" else body))
    return path


def write_mha(path: Path, affine: np.ndarray, data: np.ndarray, **fields: str) -> Path:
    lps = LPS @ affine
    steps = np.linalg.norm(lps[:3, :3], axis=0)
    types = {"i2": "MET_SHORT", "u1": "MET_UCHAR", "f4": "MET_FLOAT"}
    header = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": " ".join(repr(float(v)) for v in (lps[:3, :3] / steps).T.ravel()),
        "Offset": " ".join(repr(float(v)) for v in lps[:3, 3]),
        "ElementSpacing": " ".join(repr(float(v)) for v in steps),
        "DimSize": " ".join(map(str, data.shape)),
        "ElementType": types[data.dtype.str[1:]],
        **fields,
        "ElementDataFile": "LOCAL",
    }
    text = "".join(f"{name} = {value}\n" for name, value in header.items())
    path.write_bytes(text.encode() + data.tobytes(order="F"))
    return path
