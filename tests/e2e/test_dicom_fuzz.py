"""Mutated DICOM headers against pydicom read directly: what is accepted has its HU and its place, or it is refused.

A mutant is a small series in one encoding whose fields are changed, dropped or garbled in one, two or all files, whose
file meta is another's, or whose bytes are flipped. `SAME` mutants cannot change what the scan means, so an accepted one
also equals the scan that it was made from.
"""

import shutil
import struct
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest

from app.prepare.gate import NO_RULES
from app.prepare.survey import survey
from app.prepare.volume import read_item
from app.shared.refusals import Refused
from tests import scans
from tests.unit.prepare.test_prepare_encoding import BIG, DEFLATED, EXPLICIT, IMPLICIT, body, deflated, meta
from tests.unit.prepare.test_prepare_pixels import enhanced, recode

JPEG_2000 = "1.2.840.10008.1.2.4.90"
COMPRESSED = {"JPEG2000Lossless": JPEG_2000, "JPEGLSLossless": "1.2.840.10008.1.2.4.80"}
COMPRESSED |= {"RLELossless": "1.2.840.10008.1.2.5", "JPEGLosslessProcess14_1": "1.2.840.10008.1.2.4.70"}
HEIGHTS = tuple(8.0 * k for k in range(-3, 4))
SHAPE = (32, 36)
NUMBERS = {"slope": 0x00281053, "intercept": 0x00281052, "spacing": 0x00280030, "position": 0x00200032}
NUMBERS |= {"orientation": 0x00200037, "thickness": 0x00180050}
BITS = {"rows": 0x00280010, "columns": 0x00280011, "allocated": 0x00280100, "stored": 0x00280101, "high": 0x00280102}
BITS |= {"representation": 0x00280103, "samples": 0x00280002}
NAMES = {"patient": 0x00100020, "study": 0x0020000D, "series": 0x0020000E, "type": 0x00080008, "modality": 0x00080060}
TEXTS = [b"-1024x", b"-1024,0", b"nan", b"", b"1\\1", b"2", b"0", b"-1", b"1e308", b"0.5", b"a", b" 1", b"3.0\\3.5"]
SAME = {"meta", "texts", "pixels", "names"}


def with_field(data: bytes, encoding: str, tag: int, value: bytes | None) -> bytes:
    """The data set with another value in the first element of a tag; without the element where value is None."""
    order = ">" if encoding == BIG else "<"
    at = data.index(struct.pack(order + "HH", tag >> 16, tag & 0xFFFF))
    size = "I" if encoding == IMPLICIT else "H"
    begin = at + (4 if encoding == IMPLICIT else 6)
    (length,) = struct.unpack_from(order + size, data, begin)
    after = at + 8 + length
    if value is None:
        return data[:at] + data[after:]
    value += b" " * (len(value) % 2)
    return data[:begin] + struct.pack(order + size, len(value)) + value + data[after:]


def mutated(rng: np.random.Generator, data: bytes, encoding: str, change: tuple) -> bytes:
    """One data set after one change, which was drawn for the whole series."""
    kind, what, value = change
    pixels = data.rindex(b"\x7f\xe0\x00\x10" if encoding == BIG else b"\xe0\x7f\x10\x00")
    if kind in ("numbers", "texts", "names"):
        return with_field(data, encoding, what, value)
    if kind == "bits":
        return with_field(data, encoding, what, struct.pack(">H" if encoding == BIG else "<H", value))
    if kind == "pixels":
        return data[:-value] if what else data + bytes(value)
    if kind == "flips":
        out = bytearray(data)
        for _ in range(value):
            out[int(rng.integers(0, pixels + 12))] ^= 1 << int(rng.integers(0, 8))
        return bytes(out)
    return data


def drawn(rng: np.random.Generator) -> tuple:
    """What to change: (kind, tag or choice, value)."""
    kind = str(rng.choice(["numbers", "texts", "names", "bits", "pixels", "flips", "meta"]))
    pick = lambda values: values[int(rng.integers(len(values)))]  # noqa: E731
    if kind == "numbers":
        return kind, pick(list(NUMBERS.values())), pick(TEXTS)
    if kind == "texts":  # what is no number, or nothing, in a field that every slice needs
        return (
            kind,
            pick([NUMBERS["slope"], NUMBERS["intercept"]]),
            pick([None, b"-1024x", b"nan", b"-1024,0", b"1\\1"]),
        )
    if kind == "names":
        return kind, pick(list(NAMES.values())), pick([None, b"", b"X9", b"1.2.99"])
    if kind == "bits":
        return kind, pick(list(BITS.values())), pick([0, 1, 2, 7, 8, 11, 12, 15, 16, 23, 31, 32, 33, 35, 36, 37, 512])
    return kind, bool(rng.random() < 0.5), int(rng.integers(1, 5))


def mutant(rng: np.random.Generator, bases: dict, folder: Path) -> tuple[str, str]:
    """Writes the files of one mutant; the name of its base and the kind of its change."""
    name = str(rng.choice(sorted(bases)))
    encoding, bodies = bases[name]
    change = drawn(rng)
    chosen = set(rng.permutation(len(bodies))[: int(rng.choice([1, 2, len(bodies)]))])
    stated = {"deflated": DEFLATED, **COMPRESSED}.get(name, encoding)
    other = [None, IMPLICIT, EXPLICIT, BIG, DEFLATED, JPEG_2000, "no preamble"][int(rng.integers(7))]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, data in enumerate(bodies):
        if number in chosen:
            data = mutated(rng, data, encoding, change)
        syntax = other if change[0] == "meta" and number in chosen else stated
        data = deflated(data) if name == "deflated" else data
        (folder / f"{number}").write_bytes((b"" if syntax == "no preamble" else meta(syntax)) + data)
    return name, change[0]


def direct(folder: Path) -> list[tuple]:
    """(position, affine columns, HU, padding) of every slice or frame, as pydicom alone reads the files."""
    out = []
    for path in folder.iterdir():
        try:
            ds = pydicom.dcmread(path, force=True)
            if "TransferSyntaxUID" not in ds.file_meta:
                ds.file_meta.TransferSyntaxUID = {(True, True): IMPLICIT, (False, True): EXPLICIT}.get(
                    (ds.is_implicit_VR, ds.is_little_endian), BIG
                )
            packed = ds.file_meta.TransferSyntaxUID in COMPRESSED.values()
            if packed and (ds.Rows, ds.Columns, ds.BitsAllocated) != (*SHAPE, 16):
                continue  # decoders end the process on some of these
            # no HU depends on these, which pydicom asks for
            ds.PhotometricInterpretation = ds.get("PhotometricInterpretation", "MONOCHROME2")
            ds.SamplesPerPixel = ds.get("SamplesPerPixel", 1)
            pixels = np.asarray(ds.pixel_array).reshape(-1, ds.Rows, ds.Columns)
            frames = ds.get("PerFrameFunctionalGroupsSequence", [None])
            for stored, own in zip(pixels, frames, strict=True):
                out.append(one_slice(ds, own, stored))
        except Exception:  # what pydicom cannot read, nothing may accept: no slice will be found for it
            continue
    return out


def one_slice(ds, own, stored) -> tuple:
    shared = ds.SharedFunctionalGroupsSequence[0] if own else None
    place = own.PlanePositionSequence[0] if own else ds
    turn = shared.PlaneOrientationSequence[0] if own else ds
    measures = shared.PixelMeasuresSequence[0] if own else ds
    rescale = own.PixelValueTransformationSequence[0] if own else ds
    hu = stored.astype(np.float64)
    if "RescaleSlope" in rescale or "RescaleIntercept" in rescale:
        hu = hu * float(rescale.RescaleSlope) + float(rescale.RescaleIntercept)
    row, column = np.reshape([float(v) for v in turn.ImageOrientationPatient], (2, 3))
    down, across = (float(v) for v in measures.PixelSpacing)
    flip = np.array([-1, -1, 1])
    position = np.array([float(v) for v in place.ImagePositionPatient]) * flip
    return position, row * across * flip, column * down * flip, hu


def assert_agrees(volume, slices: list[tuple]) -> None:
    """Every slice of a volume is one that pydicom finds at that place, or the one before the change; with those HU."""
    before = scans.sample(volume.affine, volume.hu.shape)
    for z in range(volume.hu.shape[2]):
        place = volume.affine[:3, 3] + z * volume.affine[:3, 2]
        near = [s for s in slices if np.abs(s[0] - place).max() < 0.2]
        if "UNEVEN_SPACING_RESAMPLED" in volume.codes and not near:
            continue
        if not near:  # pydicom stumbles over fields on which neither HU nor place depend
            np.testing.assert_array_equal(volume.hu[:, :, z], before[:, :, z])
            continue
        hu = np.asarray(volume.hu[:, :, z], np.float64).T
        assert any(hu.shape == s[3].shape and equal(hu, s[3]) for s in near), "other HU than the file has"
        np.testing.assert_allclose(volume.affine[:3, 0], near[0][1], atol=2e-3)
        np.testing.assert_allclose(volume.affine[:3, 1], near[0][2], atol=2e-3)


def equal(hu: np.ndarray, truth: np.ndarray) -> bool:
    """Equal but where there is no measurement, which is air."""
    same = np.isclose(hu, truth, rtol=1e-6, atol=1e-2)
    return bool((same | ((hu == -1000) & (truth < -1000))).all())


def compressed(series: list, name: str, folder: Path) -> list[bytes]:
    """Data sets in a compressed syntax, without their file meta."""
    out = []
    for ds in series:
        path = scans.save(ds, folder / "c.dcm")
        recode(path, name)
        data = path.read_bytes()
        out.append(data[144 + int.from_bytes(data[140:144], "little") :])
    return out


def attack(folder: Path, count: int, seed: int) -> Counter:
    rng = np.random.default_rng(seed)
    series = scans.series(heights=HEIGHTS, shape=SHAPE, FrameOfReferenceUID="1.2.7")
    bases = {syntax: (syntax, [body(ds, syntax) for ds in series]) for syntax in (IMPLICIT, EXPLICIT, BIG)}
    bases["deflated"] = bases[EXPLICIT]
    bases |= {name: (EXPLICIT, compressed(series, name, folder)) for name in COMPRESSED}
    bases["enhanced"] = (EXPLICIT, [body(enhanced(HEIGHTS), EXPLICIT)])
    told: Counter = Counter()
    for number in range(count):
        name, kind = mutant(rng, bases, folder / "m")
        volumes = []
        for item in survey(folder / "m"):
            try:
                volumes += [read_item(item, NO_RULES)] if item.plan else []
            except Refused:
                continue
        told[f"{kind} {'accepted' if volumes else 'refused'}"] += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            slices = direct(folder / "m") if volumes else []
        for volume in volumes:
            try:
                assert_agrees(volume, slices)
                if kind in SAME:
                    np.testing.assert_array_equal(volume.hu, scans.sample(volume.affine, volume.hu.shape))
            except AssertionError as error:
                raise AssertionError(f"mutant {number} of seed {seed}, {kind} in {name}, is read wrong") from error
    return told


def test_no_mutated_dicom_is_read_wrong(tmp_path):
    told = attack(tmp_path, 250, seed=3)
    assert sum(n for name, n in told.items() if name.endswith("accepted")) > 40
    assert sum(n for name, n in told.items() if name.endswith("refused")) > 80


@pytest.mark.slow
def test_no_dicom_out_of_three_thousand_is_read_wrong(tmp_path):
    print(attack(tmp_path, 3000, seed=4))
