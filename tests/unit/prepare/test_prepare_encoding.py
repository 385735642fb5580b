"""What a DICOM file states of its encoding against what its bytes show: pixels are never read from a wrong place."""

import copy
import resource
import zlib

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from app.prepare import Refused, read_scan
from app.prepare.encoding import HEADER_BYTES
from app.prepare.survey import survey
from tests import scans
from tests.unit.prepare.test_prepare_pixels import enhanced

IMPLICIT, EXPLICIT, BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED, JPEG_2000 = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.90"
HEIGHTS = tuple(4.0 * k for k in range(-3, 4))


def body(ds: Dataset, encoding: str) -> bytes:
    """The data set alone, its pixels in the byte order of the encoding."""
    ds, stream = copy.deepcopy(ds), DicomBytesIO()
    stream.is_implicit_VR, stream.is_little_endian = encoding == IMPLICIT, encoding != BIG
    ds["PixelData"].VR = "OW"
    if encoding == BIG:
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
    write_dataset(stream, ds)
    return stream.getvalue()


def meta(syntax: str | None) -> bytes:
    """Preamble and file meta; no transfer syntax where it is None."""
    fields = [(b"\x02\x00\x02\x00UI", scans.CT)] + ([(b"\x02\x00\x10\x00UI", syntax)] if syntax else [])
    out = bytes(128) + b"DICM"
    for head, value in fields:
        text = value.encode() + b"\0" * (len(value) % 2)
        out += head + len(text).to_bytes(2, "little") + text
    return out


def written(folder, head: bytes, bodies: list[bytes]):
    folder.mkdir()
    for number, data in enumerate(bodies):
        (folder / f"{number}.dcm").write_bytes(head + data)
    return folder


def code_of(path) -> str:
    with pytest.raises(Refused) as caught:
        read_scan(path)
    return caught.value.code


@pytest.mark.parametrize("encoding", [IMPLICIT, EXPLICIT, BIG])
@pytest.mark.parametrize("head", ["no preamble", "no syntax", "stated"])
def test_without_file_meta_the_encoding_that_is_found_counts(tmp_path, encoding, head):
    if (encoding, head) == (BIG, "no preamble"):
        pytest.skip("nothing tells such a file from any other")
    start = {"no preamble": b"", "no syntax": meta(None), "stated": meta(encoding)}[head]
    bodies = [body(ds, encoding) for ds in scans.series(heights=HEIGHTS)]
    (volume,) = read_scan(written(tmp_path / "s", start, bodies))
    assert volume.codes == ["OK"]
    np.testing.assert_array_equal(volume.hu, scans.sample(volume.affine, volume.hu.shape))


@pytest.mark.parametrize("encoding", [IMPLICIT, EXPLICIT, BIG])
@pytest.mark.parametrize("stated", [IMPLICIT, EXPLICIT, BIG, DEFLATED, JPEG_2000])
def test_file_meta_that_contradicts_the_encoding_is_corrupt(tmp_path, encoding, stated):
    if stated == encoding:
        pytest.skip("agrees")
    bodies = [body(ds, encoding) for ds in scans.series(heights=HEIGHTS)]
    assert code_of(written(tmp_path / "s", meta(stated), bodies)) == "CORRUPT_FILE"


def test_a_pixel_element_encoded_otherwise_than_its_file_is_corrupt(tmp_path):
    bodies = []
    for ds in scans.series(heights=HEIGHTS):
        explicit, implicit = body(ds, EXPLICIT), body(ds, IMPLICIT)
        cut, other = explicit.index(b"\xe0\x7f\x10\x00"), implicit.index(b"\xe0\x7f\x10\x00")
        bodies.append(explicit[:cut] + implicit[other:])
    assert code_of(written(tmp_path / "s", meta(EXPLICIT), bodies)) == "CORRUPT_FILE"


def test_compressed_pixels_without_a_stated_syntax_are_corrupt(tmp_path):
    bodies = []
    for ds in scans.series(heights=HEIGHTS):
        data = body(ds, EXPLICIT)
        cut = data.index(b"\xe0\x7f\x10\x00")
        bodies.append(data[: cut + 8] + b"\xff" * 4 + b"\xfe\xff\x00\xe0" + bytes(4) + b"\xfe\xff\xdd\xe0" + bytes(4))
    assert code_of(written(tmp_path / "s", meta(None), bodies)) == "CORRUPT_FILE"


@pytest.mark.parametrize("tags", [{"Columns": 35}, {"Rows": 29}, {"Columns": 37}, {"Rows": 33}])
@pytest.mark.parametrize("how", ["slices", "frames", "one slice"])
def test_pixels_of_another_length_than_rows_times_columns_are_corrupt(tmp_path, tags, how):
    (name, value) = next(iter(tags.items()))
    files = [enhanced(HEIGHTS)] if how == "frames" else scans.series(heights=HEIGHTS)
    for ds in files[3:4] if how == "one slice" else files:
        setattr(ds, name, value)
    folder = scans.write_series(tmp_path / "s", files)
    codes = {item.finding.code for item in survey(folder) if item.finding}
    assert "CORRUPT_FILE" in codes and not any(item.plan for item in survey(folder) if how != "one slice")


def test_frames_without_file_meta_are_read_where_they_lie(tmp_path):
    path = tmp_path / "e.dcm"
    path.write_bytes(meta(None) + body(enhanced(HEIGHTS), EXPLICIT))
    (volume,) = read_scan(path)
    np.testing.assert_array_equal(volume.hu, scans.sample(volume.affine, volume.hu.shape))


def test_fewer_frames_than_pixels_are_corrupt(tmp_path):
    ds = enhanced(HEIGHTS)
    ds.NumberOfFrames = len(HEIGHTS) - 1
    ds.PerFrameFunctionalGroupsSequence = list(ds.PerFrameFunctionalGroupsSequence)[:-1]
    assert code_of(scans.save(ds, tmp_path / "e.dcm")) == "CORRUPT_FILE"


# ---- deflated


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def test_deflated_slices_and_frames_are_exact(tmp_path):
    bodies = [deflated(body(ds, EXPLICIT)) for ds in scans.series(heights=HEIGHTS)]
    (volume,) = read_scan(written(tmp_path / "s", meta(DEFLATED), bodies))
    (frames,) = read_scan(written(tmp_path / "e", meta(DEFLATED), [deflated(body(enhanced(HEIGHTS), EXPLICIT))]))
    for one in (volume, frames):
        np.testing.assert_array_equal(one.hu, scans.sample(one.affine, one.hu.shape))


def test_a_deflated_bomb_is_refused_in_little_memory(tmp_path):
    """A pixel element of 512 MiB in a small file: its header is read from the first bytes alone."""
    ds = scans.series(heights=(0.0,))[0]
    data = body(ds, EXPLICIT)
    cut = data.index(b"\xe0\x7f\x10\x00")
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    parts = [packer.compress(data[: cut + 8] + (1 << 29).to_bytes(4, "little"))]
    parts += [packer.compress(bytes(64 << 20)) for _ in range(8)]
    path = tmp_path / "bomb.dcm"
    path.write_bytes(meta(DEFLATED) + b"".join(parts) + packer.flush())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (item,) = survey(path)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert item.finding.code == "CORRUPT_FILE" and grown < 4 * HEADER_BYTES


def test_damaged_deflated_bytes_are_corrupt(tmp_path):
    bodies = [b"\xff" + deflated(body(ds, EXPLICIT)) for ds in scans.series(heights=HEIGHTS)]
    assert code_of(written(tmp_path / "s", meta(DEFLATED), bodies)) == "CORRUPT_FILE"
    short = [deflated(body(ds, EXPLICIT))[:-40] for ds in scans.series(heights=HEIGHTS)]
    assert code_of(written(tmp_path / "t", meta(DEFLATED), short)) == "CORRUPT_FILE"
