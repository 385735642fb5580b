"""The built-in cohort: CT phantoms in HU with findings whose side, count and size are known.

They are for trying the chain and for tests: no phantom stands for a patient, and nothing measured on them says how
well a model reads scans. The anatomy itself is in anatomy.py.
"""

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import nibabel
import numpy as np
import pydicom
from jaxtyping import Bool, Float, Int
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from scipy import ndimage

from app.dataset import writer
from app.phantoms import anatomy
from app.phantoms.anatomy import SIGN_OF_X, Build, Canvas, Number, Point, Torso
from app.prepare import cohort
from app.prepare.gate import LPS_TO_RAS
from app.prepare.headers import CT
from app.shared.json_files import read_object, write_object

log = logging.getLogger(__name__)
WAIT = 600  # seconds that other ranks wait for rank 0 to make the cohort
ANATOMY_VERSION = 4  # a cohort of another version is made again
LATTICE_MM = 40  # between points that say where fluid is


class Phantom(NamedTuple):
    hu: Int[np.ndarray, "X Y Z"]
    spacing: tuple[Number, Number, Number]
    affine: Float[np.ndarray, "4 4"]
    findings: list[dict[str, Any]]


def _finding(name: str, organ: str, side: str, sizes: list[Number], centers: list[Point]) -> dict[str, Any]:
    return {
        "finding": name,
        "organ": organ,
        "side": side,
        "count": len(sizes),
        "size_mm": [round(float(size), 1) for size in sizes],
        "center_mm": [[round(float(v), 1) for v in center] for center in centers],
    }


def paint_effusion(canvas: Canvas, build: Build, torso: Torso, side: str) -> dict[str, Any]:
    """Fluid behind one lung of a lying patient: a level that rises at the wall and thins out towards the apex."""
    thick = build.rng.uniform(22, 115)
    reach = build.rng.uniform(220, 400)
    height = np.clip((canvas.z - build.dome + 60) / reach, 0, None)
    level = build.back + 17 + thick * (1 - height) + 0.12 * (np.abs(canvas.x) - 60)
    own = canvas.cover(-SIGN_OF_X[side] * canvas.x)
    fluid = np.clip(2.5 * torso.lungs, 0, 1)  # the lung's blended edge is filled too
    part = fluid * own * canvas.cover(canvas.y - level)
    canvas.blend(part, build.near(10, 6))
    volume = float(part.sum()) * canvas.step**3 / 1000
    size = "small" if volume < 220 else "moderate" if volume < 450 else "large"
    return {
        **_finding("pleural effusion", "pleura", side, [], []),
        "count": 1,
        "size": size,
        "volume_ml": round(volume),
        "inside_mm": _points_inside(canvas, part > 0.5),
    }


def _points_inside(canvas: Canvas, part: Bool[np.ndarray, "X Y Z"]) -> list[list[float]]:
    """Points of the scan in a part of it: the one nearest to its middle, and those of a lattice."""
    rows = np.argwhere(part)
    if not len(rows):
        return []
    nearest = rows[np.square(rows - rows.mean(0)).sum(1).argmin()]
    step = max(1, round(LATTICE_MM / canvas.step))
    points = np.concatenate([nearest[None], rows[(rows % step == step // 2).all(1)]])
    return [[round(float(v), 1) for v in canvas.axis[point]] for point in points]


def paint_nodules(canvas: Canvas, build: Build, torso: Torso, side: str, *, most: int = 3) -> dict[str, Any]:
    """One to `most` round nodules well inside one lung, apart from each other."""
    own = (canvas.x * SIGN_OF_X[side] > 0) & (torso.wall < -14) & (torso.lungs > 0.99) & (canvas.hu < -600)
    own = np.argwhere(ndimage.binary_erosion(own, iterations=max(1, round(8 / canvas.step))))
    centers: list[Point] = []
    sizes: list[Number] = []
    for _ in range(int(build.rng.integers(1, most + 1)) if len(own) else 0):  # no room in a lung full of fluid
        for _ in range(20):
            at = tuple(own[build.rng.integers(len(own))])
            center = (float(canvas.x[at]), float(canvas.y[at]), float(canvas.z[at]))
            if all(np.linalg.norm(np.subtract(center, other)) > 45 for other in centers):
                sizes.append(build.rng.uniform(14, 30))
                canvas.ellipsoid(center, (sizes[-1] / 2,) * 3, build.near(45, 20))
                centers.append(center)
                break
    return _finding("nodule", "lung", side, sizes, [canvas.in_scan(center) for center in centers])


def paint_stones(canvas: Canvas, build: Build, torso: Torso, side: str) -> dict[str, Any]:
    """One or two dense stones in a kidney's sinus."""
    x, y, z = anatomy.kidney_center(build, side)
    count = int(build.rng.integers(1, 3))
    offsets = [build.near(0, 12)] if count == 1 else [build.near(-17, 4), build.near(17, 4)]
    sizes = [build.rng.uniform(8, 15) for _ in offsets]
    centers = [(x - SIGN_OF_X[side] * (8 + 0.2 * offset), y + 2, z + offset) for offset in offsets]
    for center, size in zip(centers, sizes, strict=True):
        canvas.ellipsoid(center, (size / 2,) * 3, build.near(950, 250))
    return _finding("kidney stone", "kidney", side, sizes, [canvas.in_scan(center) for center in centers])


CHANCE, CROWDED_CHANCE, CROWDED_NODULES = 0.35, 0.8, 8  # of a finding on a side
PAINTERS: tuple[Callable[..., dict[str, Any]], ...] = (paint_effusion, paint_nodules, paint_stones)


def make_phantom(seed: int, *, size: int = 96, spacing: Number = 4.0, crowded: bool = False) -> Phantom:
    """One patient on a RAS cube; the same seed gives the same patient, at any size and spacing the same anatomy.

    `crowded`: most lungs have nodules, up to eight, and most kidneys stones; as no patient has, but as many as can be
    learned from.
    """
    rng = np.random.default_rng([seed, 7])
    build = anatomy.draw_build(rng)
    canvas = Canvas(size, spacing, rng)
    if rng.random() < 0.7:  # the table under the patient
        table = np.abs(canvas.axis[None, :, None] + build.depth + 16 - 0.0006 * canvas.axis[:, None, None] ** 2) - 3
        canvas.blend(np.broadcast_to(canvas.cover(table), canvas.hu.shape), -120)
    torso = anatomy.paint_torso(canvas, build)
    anatomy.paint_abdomen(canvas, build, torso)
    anatomy.paint_kidneys(canvas, build)
    anatomy.paint_chest(canvas, build, torso)
    anatomy.paint_bones(canvas, build, torso)
    findings = []
    for paint in PAINTERS:
        for side in SIGN_OF_X:
            if rng.random() < (CROWDED_CHANCE if crowded and paint is not paint_effusion else CHANCE):
                more = {"most": CROWDED_NODULES} if crowded and paint is paint_nodules else {}
                findings.append(paint(canvas, build, torso, side, **more))
    hu = _scan(canvas, rng)
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = -(size - 1) / 2 * spacing
    return Phantom(hu, (spacing,) * 3, affine, [f for f in findings if f["count"]])


def _scan(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """What a scanner adds: blur, grain of the tissue, noise."""
    noise = rng.standard_normal(canvas.hu.shape, dtype=np.float32)
    grain = ndimage.uniform_filter(noise, 3, mode="wrap") * rng.uniform(30, 60)
    inside = canvas.hu > -950
    hu = canvas.hu + grain * inside + noise * rng.uniform(6, 16)
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16)


# ---- the cohort


def ensure_cohort(out: str | Path, *, num_train: int = 30, num_val: int = 6, seed: int = 0) -> Path:
    """The folder of the cohort, made once: by rank 0 where several run, and renamed into place when whole.

    Fewer phantoms than these the demo's tokenizer learns by heart: its training error falls and that on others rises.
    """
    out = Path(out)
    settings = {"phantoms": ANATOMY_VERSION, "num_train": num_train, "num_val": num_val, "seed": seed}
    if _is_whole(out, settings):
        return out
    if idist.get_rank() == 0:
        log.info("Making %d phantoms in %s", num_train + num_val, out)
        _make_cohort(out, settings)
        return out
    deadline = time.monotonic() + WAIT
    while not _is_whole(out, settings):
        if time.monotonic() > deadline:
            raise ValueError(f"phantoms in {str(out)!r} did not appear within {WAIT} s; see the log of rank 0")
        time.sleep(0.2)
    return out


def _is_whole(out: Path, settings: dict[str, int]) -> bool:
    stored = read_object(out / "dataset_config.json") or {}
    return all(stored.get(key) == value for key, value in settings.items())


def _is_ours(out: Path) -> bool:
    return not any(out.iterdir()) or "phantoms" in (read_object(out / "dataset_config.json") or {})


def _make_cohort(out: Path, settings: dict[str, int]) -> None:
    if out.exists() and not _is_ours(out):
        raise ValueError(f"{str(out)!r} holds something that is no phantom cohort; give the phantoms another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _fill(beside / "new", settings)
        if out.exists():  # made with other settings
            out.rename(beside / "old")
        (beside / "new").rename(out)
    finally:
        shutil.rmtree(beside)


def _fill(folder: Path, settings: dict[str, int]) -> None:
    """The cohort, written as raw scans and taken through `prepare` like any other; findings.json says what is known."""
    count = settings["num_train"] + settings["num_val"]
    raw, findings, split = folder.with_name("raw"), {}, {}
    for index in range(count):
        phantom = make_phantom(settings["seed"] * 100_000 + index)
        name = f"phantom_{index:04d}"
        if index == count - 1:
            write_phantom_dicom(raw / name, phantom, name=name)
        else:
            write_phantom_nifti(raw / f"{name}.nii.gz", phantom)
        split[name] = "train" if index < settings["num_train"] else "val"
        findings[name] = phantom.findings
    key = folder.with_name("key")
    key.write_text("phantoms have no secrets")
    sizes = cohort.PrepareSettings(phantom.hu.shape[0], phantom.spacing[0], keep_names=True)
    request = cohort.Request(split=split, key_file=str(key), workers=1)
    report = cohort.prepare(raw, folder.with_name("out"), sizes, request)
    refused = [(o.source, *o.codes, o.message) for o in report.outcomes if o.status != "ok"]
    if refused:
        raise RuntimeError(f"phantoms did not pass the gate: {refused}")
    (folder.with_name("out") / "raw").rename(folder)
    raw.rename(folder / "raw")
    write_object(folder / "findings.json", findings)
    config = json.loads((folder / "dataset_config.json").read_text())
    writer.write_dataset_config(folder, {**config, **settings})


def write_phantom_nifti(path: Path, phantom: Phantom) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(phantom.hu, phantom.affine)
    image.set_sform(phantom.affine, 1)
    image.set_qform(phantom.affine, 1)
    nibabel.save(image, path)


def write_phantom_dicom(folder: Path, phantom: Phantom, *, name: str) -> None:
    """A CT series, a file a slice: what a scanner's export looks like."""
    folder.mkdir(parents=True, exist_ok=True)
    lps = LPS_TO_RAS @ phantom.affine  # its own inverse
    uids = {level: generate_uid(entropy_srcs=[name, level]) for level in ("study", "series")}
    step = float(phantom.spacing[0])
    for number in range(phantom.hu.shape[2]):
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID = CT, generate_uid(entropy_srcs=[name, str(number)])
        ds.StudyInstanceUID, ds.SeriesInstanceUID = uids["study"], uids["series"]
        ds.PatientID, ds.PatientName = name, "Phantom"
        ds.Modality, ds.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        pixels = phantom.hu[::-1, ::-1, number].T  # rows run to the back, columns to the left
        ds.Rows, ds.Columns = pixels.shape
        last = [phantom.hu.shape[0] - 1, phantom.hu.shape[1] - 1, number, 1]
        ds.ImagePositionPatient = [float(v) for v in (lps @ last)[:3]]
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.SliceThickness, ds.InstanceNumber = [step, step], step, number + 1
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, -1024, "HU"
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
        ds.PixelData = (pixels.astype(np.int32) + 1024).astype("<u2").tobytes()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = CT, ds.SOPInstanceUID
        _save(ds, folder / f"IM{number:04d}.dcm")


def _save(ds: Dataset, path: Path) -> None:
    if int(pydicom.__version__.split(".")[0]) >= 3:
        pydicom.dcmwrite(path, ds, enforce_file_format=True)
    else:
        ds.is_little_endian, ds.is_implicit_VR = True, False
        pydicom.dcmwrite(path, ds, write_like_original=False)
