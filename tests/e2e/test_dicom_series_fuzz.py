"""DICOM series that are whole but odd, beside SimpleITK: what is read has the geometry and HU that GDCM gives it.

test_dicom_fuzz.py garbles fields and bytes. Here every file is well formed, in a drawn orientation, spacing, order and
rescale; the oddity lies in what the files say together, or in an attribute that others heed and a reader may miss.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset

from app.prepare.volume import read_scan
from app.shared.refusals import Refused
from tests import scans
from tests.volume_mutants import Read, apart, cleaned

HEIGHTS = np.arange(-4, 5)


def drawn_series(rng: np.random.Generator, uid: str) -> list[Dataset]:
    """Slices of the world in any orientation, with noise of their own and a rescale that may differ by slice."""
    turn = np.eye(3)[rng.permutation(3)] * rng.choice([-1.0, 1.0], 3)
    if rng.random() < 0.6:
        turn = scans.turned(float(rng.choice([4, 20, 35])), tuple(rng.normal(size=3))) @ turn
    spacing = tuple(float(s) for s in rng.choice([5.0, 6.5, 8.0], 2))
    shear = float(rng.choice([0, 0, 0.2]))
    heights = tuple(HEIGHTS * float(rng.choice([5.0, 7.25, 10.0])) * rng.choice([-1, 1]))
    orientation = (*turn[0], *turn[1])
    made = scans.series(heights=heights, shape=(14, 15), spacing=spacing, orientation=orientation, shear=shear)
    slopes = rng.choice([1.0, 0.5, 2.0], len(made)) if rng.random() < 0.3 else np.full(len(made), 1.0)
    for ds, slope in zip(made, slopes, strict=True):
        hu = np.frombuffer(ds.PixelData, "<u2").reshape(14, 15).astype(float) - 1024
        stored = np.clip(np.rint((hu + rng.integers(-15, 15, hu.shape) + 1024) / slope), 0, 65535)
        ds.RescaleSlope, ds.PixelData = float(slope), stored.astype("<u2").tobytes()
        ds.SeriesInstanceUID, ds.FrameOfReferenceUID = uid, "1.2.7"
    return made


def change_all(**tags) -> Callable:
    return lambda rng, made: [setattr(ds, name, value) for ds in made for name, value in tags.items()]


def lut(rng, made):
    for ds in made:
        item = Dataset()
        item.LUTDescriptor, item.ModalityLUTType, item.LUTData = [4, 0, 16], "HU", bytes(8)
        ds.ModalityLUTSequence = pydicom.Sequence([item])
        del ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType
        ds.PixelData = (np.frombuffer(ds.PixelData, "<u2").astype(np.int32) - 1024).astype("<i2").tobytes()
        ds.PixelRepresentation = 1


def scaled_orientation(rng, made):
    for ds in made:
        ds.ImageOrientationPatient = [2 * float(v) for v in ds.ImageOrientationPatient]


def skewed_orientation(rng, made):
    for ds in made:
        row, column = np.reshape([float(v) for v in ds.ImageOrientationPatient], (2, 3))
        ds.ImageOrientationPatient = [round(float(v), 6) for v in (*row, *(column + 0.1 * row))]


def one_shifted(rng, made):
    at = int(rng.integers(1, len(made) - 1))
    made[at].ImagePositionPatient = [float(v) + 3 for v in made[at].ImagePositionPatient]


def swapped_pixels(rng, made):
    """Two slices that lie at one another's place say so by their positions alone, which count."""
    made[2].ImagePositionPatient, made[5].ImagePositionPatient = (
        list(made[5].ImagePositionPatient),
        list(made[2].ImagePositionPatient),
    )


def misleading_order(rng, made):
    for number, ds in zip(rng.permutation(len(made)), made, strict=True):
        ds.InstanceNumber, ds.SliceLocation = int(number) + 1, float(number) * 3


def negative_slope(rng, made):
    for ds in made:
        stored = np.frombuffer(ds.PixelData, "<u2").astype(np.int32)
        ds.PixelData = (4000 - stored).clip(0, 65535).astype("<u2").tobytes()
        ds.RescaleIntercept = 4000 * float(ds.RescaleSlope) - 1024
        ds.RescaleSlope = -float(ds.RescaleSlope)


def mirrored_half(rng, made):
    for ds in made[: len(made) // 2]:
        row, column = np.reshape([float(v) for v in ds.ImageOrientationPatient], (2, 3))
        ds.ImageOrientationPatient = [float(v) for v in (*-row, *column)]


def trailing_pad(rng, made):
    for ds in made:
        ds.DataSetTrailingPadding = b"\0" * 64


CHANGES: dict[str, tuple[str, Callable]] = {  # what is to come of it, and how it is done
    "as it is": ("same", lambda rng, made: None),
    "monochrome1": ("same", change_all(PhotometricInterpretation="MONOCHROME1")),
    "order of numbers": ("same", misleading_order),
    "other spacing between": ("same", change_all(SpacingBetweenSlices=1.0)),
    "tilt that is none": ("same", change_all(GantryDetectorTilt=15.0)),
    "imager spacing": ("same", change_all(ImagerPixelSpacing=[1.0, 1.0])),
    "negative slope": ("same", negative_slope),
    "padding behind": ("same", trailing_pad),
    "positions exchanged": ("agree", swapped_pixels),
    "orientation of two": ("agree", scaled_orientation),
    "axes askew": ("agree", skewed_orientation),
    "one shifted": ("agree", one_shifted),
    "half mirrored": ("agree", mirrored_half),
    "modality table": ("refused", lut),
    "aspect ratio": ("agree", change_all(PixelAspectRatio=[2, 1])),
    "rescale in optical density": ("refused", change_all(RescaleType="OD")),
    "electron density": ("refused", change_all(RescaleType="ED")),
    "private big endian pixels": ("refused", lambda rng, made: None),
}


def write(folder: Path, name: str, made: list[Dataset]) -> None:
    scans.write_series(folder, made)
    if name == "private big endian pixels":
        private = b"1.2.840.113619.5.2\0\0"
        for path in folder.iterdir():
            path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", private, 1))


def by_sitk(folder: Path) -> Read | None:
    """The series as GDCM sorts and rescales it."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageSeriesReader()
    names = reader.GetGDCMSeriesFileNames(str(folder))
    if not names:
        return None
    reader.SetFileNames(names)
    try:
        image = reader.Execute()
    except RuntimeError:
        return None
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return cleaned(scans.LPS @ affine, sitk.GetArrayFromImage(image).astype(np.float64).transpose())


def at_places(read: Read, other: Read) -> Read:
    """With slices in the other's order: GDCM goes up along the normal of its own."""
    if apart(read, other, 1e9) and np.dot(read.affine[:3, 2], other.affine[:3, 2]) < 0:
        affine = read.affine.copy()
        affine[:3, 3] += affine[:3, 2] * (read.hu.shape[2] - 1)
        affine[:3, 2] *= -1
        return Read(affine, read.hu[:, :, ::-1])
    return read


def truth_of(made: list[Dataset]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(position in RAS, steps along columns and rows in RAS, HU) of every slice as it was made."""
    out = []
    for ds in made:
        stored = np.frombuffer(ds.PixelData, "<u2").reshape(14, 15)
        hu = stored * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        across = np.reshape([float(v) for v in ds.ImageOrientationPatient], (2, 3)) * [-1, -1, 1]
        steps = across * np.array([[ds.PixelSpacing[1]], [ds.PixelSpacing[0]]], float)
        out.append((np.array([float(v) for v in ds.ImagePositionPatient]) * [-1, -1, 1], steps.T, hu))
    return out


def why_wrong(volume, made: list[Dataset], folder: Path) -> str:
    """A volume's slices against the files, each at its place, all of it against SimpleITK where nothing is tilted."""
    affine, hu = np.asarray(volume.affine), np.asarray(volume.hu, np.float64)
    by_itself = {"TILT_CORRECTED", "UNEVEN_SPACING_RESAMPLED", "SERIES_SPLIT"}.isdisjoint(volume.codes)
    if by_itself and made[0].PhotometricInterpretation != "MONOCHROME1":  # which GDCM turns over, as for a screen
        read = by_sitk(folder)
        own = cleaned(affine, hu)
        if read is not None and (why := apart(own, at_places(read, own), 0.05)):
            return f"SimpleITK: {why}"
    truth = truth_of(made)
    for z in range(hu.shape[2]):
        place = affine[:3, 3] + z * affine[:3, 2]
        near = [rest for position, *rest in truth if np.abs(position - place).max() < 0.1]
        if not near and "UNEVEN_SPACING_RESAMPLED" not in volume.codes:
            return f"no file has a slice at {place.round(2)}"
        if near and not any(np.abs(hu[:, :, z].T - values).max() < 0.01 for _, values in near):
            return f"slice {z} has other HU"
        if near and not any(np.abs(affine[:3, :2] - steps).max() < 1e-3 for steps, _ in near):
            return f"slice {z} runs another way"
    return ""


def attack(folder: Path, count: int, seed: int) -> tuple[Counter, list[str]]:
    rng, told, errors = np.random.default_rng(seed), Counter(), []
    for number in range(count):
        name = list(CHANGES)[number % len(CHANGES)]
        wanted, change = CHANGES[name]
        made = drawn_series(rng, f"1.2.3.{number}")
        change(rng, made)
        home = folder / f"s{number}"
        write(home, name, made)
        try:
            volumes = read_scan(home)
        except Refused as refused:
            told[name, refused.code] += 1
            if wanted == "same":
                errors.append(f"{number} of seed {seed}, {name}: refused, {refused}")
            continue
        told[name, "ok"] += 1
        checked = volumes if wanted != "refused" else []
        wrong = [why for volume in checked if (why := why_wrong(volume, made, home))]
        wrong += ["accepted"] if wanted == "refused" else []
        if wrong:
            errors.append(f"{number} of seed {seed}, {name}: {'; '.join(wrong)} {volumes[0].codes}")
    return told, errors


def test_no_odd_series_is_read_wrong(tmp_path):
    told, errors = attack(tmp_path, 2 * len(CHANGES), seed=1)
    assert not errors and sum(n for (_, how), n in told.items() if how == "ok") >= 16


@pytest.mark.slow
def test_no_series_out_of_six_hundred_is_read_wrong(tmp_path):
    told, errors = attack(tmp_path, 600, seed=2)
    print(told)
    assert not errors, "\n".join(errors)
