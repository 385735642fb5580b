"""Mutated headers through the gate: never a traceback, a hang or unbounded memory; what is accepted is read right.

A mutant is a small scan with bits flipped, bytes removed, or a header value swapped for another or an absurd one. An
accepted mutant's geometry must agree with an independent reading (nibabel, or pydicom's plain values).
"""

import resource
import struct
import time

import nibabel as nib
import numpy as np
import pydicom
import pytest

from app.prepare.gate import NO_RULES
from app.prepare.survey import survey
from app.prepare.volume import read_item
from app.shared.codes import CODES
from app.shared.refusals import Refused
from tests import scans

SHAPE = (9, 8, 7)
AFFINE = scans.centred((9.0, 9.0, 12.0), SHAPE, scans.turned(10, (0, 0, 1)))
ABSURD = [b"-1", b"0", b"1e308", b"nan", b"inf", b"99999999999", b"", b"\\", b"a", b"1\\2\\3\\4", b"-0.0", b"\xff\xfe"]


def flip(data: bytearray, rng: np.random.Generator, reach: int) -> bytearray:
    for _ in range(int(rng.integers(1, 9))):
        data[int(rng.integers(0, reach))] ^= 1 << int(rng.integers(0, 8))
    return data


def mutate_bytes(data: bytes, rng: np.random.Generator, reach: int) -> bytes:
    """Flipped bits, a removed, doubled or overwritten stretch, within the header."""
    kind, out = rng.integers(0, 5), bytearray(data)
    at, length = int(rng.integers(0, reach)), int(rng.integers(1, 24))
    if kind <= 1:
        return bytes(flip(out, rng, reach))
    if kind == 2:
        return bytes(out[:at] + out[at + length :])
    if kind == 3:
        return bytes(out[:at] + out[at : at + length] + out[at:])
    return bytes(out[:at] + ABSURD[int(rng.integers(len(ABSURD)))] + out[at + length :])


def nifti_mutant(rng: np.random.Generator, base: bytes) -> bytes:
    if rng.random() < 0.5:
        return mutate_bytes(base, rng, 352)
    fields = {40: "<h", 42: "<h", 44: "<h", 46: "<h", 48: "<h", 70: "<h", 72: "<h", 76: "<f", 80: "<f", 108: "<f"}
    fields |= {112: "<f", 116: "<f", 252: "<h", 254: "<h", 256: "<f", 260: "<f", 268: "<f", 280: "<f", 296: "<f"}
    out = bytearray(base)
    for _ in range(int(rng.integers(1, 4))):
        offset = list(fields)[int(rng.integers(len(fields)))]
        absurd = [0, -1, 1, 2, 7, 30000, 512, float("nan"), float("inf"), 1e30, 1e-30, -3.5]
        value = absurd[int(rng.integers(len(absurd)))]
        with np.errstate(all="ignore"):
            whole = int(value) if np.isfinite(value) and abs(value) < 32768 else 32767
        struct.pack_into(fields[offset], out, offset, whole if fields[offset] == "<h" else value)
    return bytes(out)


def text_mutant(rng: np.random.Generator, base: bytes) -> bytes:
    """NRRD: a line dropped, doubled, swapped or with an absurd value; or bytes."""
    end = base.index(b"\n\n")
    if rng.random() < 0.4:
        return mutate_bytes(base, rng, end)
    lines = base[:end].split(b"\n")
    at = int(rng.integers(1, len(lines)))
    kind = rng.integers(0, 3)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines[at] = lines[at].split(b":")[0] + b": " + ABSURD[int(rng.integers(len(ABSURD)))]
    else:
        other = int(rng.integers(1, len(lines)))
        lines[at] = lines[at].split(b":")[0] + b":" + lines[other].split(b":", 1)[-1]
    return b"\n".join(lines) + base[end:]


def dicom_mutants(rng: np.random.Generator, base: list[bytes]) -> list[bytes]:
    """A series of which a few, or all, files are mutated in their headers."""
    out = list(base)
    reach = base[0].index(b"\xe0\x7f\x10\x00")
    chosen = rng.permutation(len(base))[: int(rng.choice([1, 2, len(base)]))]
    for number in chosen:
        if rng.random() < 0.5:
            out[number] = mutate_bytes(base[number], rng, reach)
            continue
        data = base[number]
        tags = [b"\x28\x00\x30\x00", b"\x20\x00\x32\x00", b"\x20\x00\x37\x00", b"\x28\x00\x10\x00", b"\x28\x00\x53\x10"]
        tags += [
            b"\x28\x00\x52\x10",
            b"\x28\x00\x00\x01",
            b"\x28\x00\x01\x01",
            b"\x08\x00\x60\x00",
            b"\x20\x00\x0e\x00",
        ]
        at = data.index(tags[int(rng.integers(len(tags)))])
        length = struct.unpack_from("<H", data, at + 6)[0]
        value = (ABSURD[int(rng.integers(len(ABSURD)))] * 40)[:length].ljust(length)
        out[number] = data[: at + 8] + value + data[at + 8 + length :]
    return out


def outcome(path):
    """Volumes and codes; anything raised but a refusal is a fault."""
    volumes, codes = [], []
    for item in survey(path):
        if item.plan is None:
            codes.append(item.finding.code)
            continue
        try:
            volumes.append(read_item(item, NO_RULES))
        except Refused as refused:
            codes.append(refused.code)
    assert set(codes) <= set(CODES)
    return volumes


def agrees_with_nibabel(path, volume) -> None:
    image = nib.load(path)
    unit = {1: 1000.0, 3: 0.001}.get(int(image.header["xyzt_units"]) & 7, 1.0)
    np.testing.assert_allclose(volume.affine, np.diag([unit, unit, unit, 1]) @ image.affine, rtol=1e-5, atol=1e-3)
    assert volume.hu.shape == tuple(n for n in image.shape[:3])
    truth = np.nan_to_num(np.asarray(image.dataobj, np.float64), nan=-1000, posinf=-1000, neginf=-1000).reshape(
        volume.hu.shape
    )
    same = (truth >= -1500) & (np.abs(truth) < 1e6)
    np.testing.assert_allclose(np.asarray(volume.hu, np.float64)[same], truth[same], rtol=1e-4, atol=0.5)


def agrees_with_pydicom(folder, volume) -> None:
    """Every slice of the volume lies where some file says that its first pixel lies, and no step is invented."""
    places = []
    for path in folder.iterdir():
        try:
            ds = pydicom.dcmread(path, stop_before_pixels=True, force=True)
            places.append([float(v) for v in ds.ImagePositionPatient])
        except Exception:  # a file that pydicom cannot read was not accepted either
            continue
    places = np.array([p for p in places if len(p) == 3]) * [-1, -1, 1]
    ends = (volume.affine @ np.array([[0, 0, 0, 1], [0, 0, volume.hu.shape[2] - 1, 1]]).T)[:3].T
    for end in ends:
        assert np.linalg.norm(places - end, axis=1).min() < 0.1


def fuzz(folder, count: int, seed: int) -> dict[str, int]:
    rng = np.random.default_rng(seed)
    data = scans.sample(AFFINE, SHAPE)
    nifti = scans.write_nifti(folder / "base.nii", AFFINE, data, sform=1, qform=1).read_bytes()
    nrrd = scans.write_nrrd(folder / "base.nrrd", AFFINE, data, encoding="raw").read_bytes()
    slices = scans.series(heights=tuple(12.0 * k for k in range(-3, 4)), shape=(8, 9), spacing=(9.0, 9.0))
    dicom = [scans.save(ds, folder / "base" / f"{n}").read_bytes() for n, ds in enumerate(slices)]
    told, slowest = {"accepted": 0, "refused": 0}, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        start = time.perf_counter()
        kind = number % 3
        if kind == 0:
            path = folder / "m.nii"
            path.write_bytes(nifti_mutant(rng, nifti))
            path = path
        elif kind == 1:
            path = folder / "m.nrrd"
            path.write_bytes(text_mutant(rng, nrrd))
        else:
            path = folder / "m"
            path.mkdir(exist_ok=True)
            for name, content in enumerate(dicom_mutants(rng, dicom)):
                (path / str(name)).write_bytes(content)
        volumes = outcome(path)
        for volume in volumes:
            assert np.isfinite(volume.affine).all() and volume.hu.size > 0
            if kind == 0:
                agrees_with_nibabel(path, volume)
            elif kind == 2:
                agrees_with_pydicom(path, volume)
        told["accepted" if volumes else "refused"] += 1
        slowest = max(slowest, time.perf_counter() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    return {**told, "slowest_ms": round(1000 * slowest), "grown_mib": grown}


def test_mutated_headers_never_break_the_gate(tmp_path):
    told = fuzz(tmp_path, 450, seed=11)
    assert told["accepted"] > 50 and told["refused"] > 100
    assert told["slowest_ms"] < 10_000 and told["grown_mib"] < 500


@pytest.mark.slow
def test_ten_thousand_mutated_headers_never_break_the_gate(tmp_path):
    told = fuzz(tmp_path, 10_000, seed=12)
    print(told)
    assert told["slowest_ms"] < 10_000 and told["grown_mib"] < 500
