"""Compressed, multi-frame and zipped DICOM: every lossless syntax exact, lossy warned, the rest refused."""

import base64
import io
import zipfile

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate

from app.prepare import Refused, read_scan
from app.prepare.survey import survey
from tests import scans

LOSSLESS = {
    "RLELossless": "1.2.840.10008.1.2.5",
    "JPEGLosslessProcess14": "1.2.840.10008.1.2.4.57",
    "JPEGLosslessProcess14_1": "1.2.840.10008.1.2.4.70",
    "JPEGLSLossless": "1.2.840.10008.1.2.4.80",
    "JPEG2000Lossless": "1.2.840.10008.1.2.4.90",
    "DeflatedExplicitVRLittleEndian": "1.2.840.10008.1.2.1.99",
    "ExplicitVRBigEndian": "1.2.840.10008.1.2.2",
    "ImplicitVRLittleEndian": "1.2.840.10008.1.2",
}
# 16 x 16 pixels, (37 x + 101 y + 3 x y) % 3000, as a High-Throughput JPEG 2000 codestream (OpenJPH)
HTJ2K = (
    "/0//UQApQAAAAAAQAAAAEAAAAAAAAAAAAAAAEAAAABAAAAAAAAAAAAABDwEB/1AACAACAAAACv9SAAwAAgABAAUEBEAB/1wAEyCI"
    "kJCQkJCQkJCQkJCQiIiI/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAAKgAAf+TwAAmk/oFB3QAAMAAEsAAE0AAEoCe"
    "Agd0ADD4Awd0APYBh3QAwAATwAATwAATAFCV/ACCVACak+QAo1QAAP0AI1QAwAAVUAAFXAABOCYugESnqDECdQDG+WW4+cBBgey2"
    "AADggMhT5QDAAC0YAAWlAACUCAWyeAIgnudCXKWUenCCegDIVDAbnwDC4/2MYHvOIQHsugD8/oRUAP/Z"
)


def recode(path, name):
    """Rewrites a file in another transfer syntax."""
    gdcm = pytest.importorskip("gdcm")
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, name)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path))
    assert writer.Write()


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("signed", [False, True])
def test_every_lossless_syntax_is_exact(tmp_path, name, signed):
    slices = scans.series(heights=tuple(range(-12, 13, 6)))
    if signed:
        for ds in slices:
            hu = np.frombuffer(ds.PixelData, "<u2").astype(np.int16) - 1024
            ds.PixelData, ds.PixelRepresentation, ds.RescaleIntercept = hu.tobytes(), 1, 0
    for number, ds in enumerate(slices):
        recode(scans.save(ds, tmp_path / f"{number}"), name)
        assert pydicom.dcmread(tmp_path / f"{number}").file_meta.TransferSyntaxUID == LOSSLESS[name]
    (volume,) = read_scan(tmp_path)
    assert volume.codes == ["OK"]
    np.testing.assert_array_equal(volume.hu, scans.sample(volume.affine, volume.hu.shape))


@pytest.mark.parametrize("name", [n for n in LOSSLESS if n.startswith(("RLE", "JPEG"))])
@pytest.mark.parametrize("matrix", [(36, 32), (16, 72), (32, 35), (31, 36), (32, 40), (48, 36)])
def test_a_compressed_image_of_another_matrix_than_the_header_is_corrupt(tmp_path, name, matrix):
    if name == "RLELossless" and np.prod(matrix) == 32 * 36:
        pytest.skip("RLE tells the number of pixels alone")
    for number, ds in enumerate(scans.series(heights=tuple(range(-12, 13, 6)))):
        path = scans.save(ds, tmp_path / f"{number}")
        recode(path, name)
        data = bytearray(path.read_bytes())
        for tag, length in zip((b"\x28\x00\x10\x00US", b"\x28\x00\x11\x00US"), matrix, strict=True):
            at = data.index(tag) + 8
            data[at : at + 2] = length.to_bytes(2, "little")
        path.write_bytes(data)
    with pytest.raises(Refused, match="CORRUPT_FILE"):
        read_scan(tmp_path)


@pytest.mark.parametrize("name", [n for n in LOSSLESS if n.startswith(("RLE", "JPEG"))])
@pytest.mark.parametrize(("stored", "why"), [(11, None), (10, "values of more than the 10 bits")])
def test_a_compressed_image_of_more_bits_than_the_header_tells_loses_none(tmp_path, name, stored, why):
    """Decoders cut to the header's bits without a word."""
    for number, ds in enumerate(scans.series(heights=tuple(range(-12, 13, 6)))):
        path = scans.save(ds, tmp_path / f"{number}")
        recode(path, name)
        data = path.read_bytes()
        for tag, value in ((b"\x28\x00\x01\x01US", stored), (b"\x28\x00\x02\x01US", stored - 1)):
            at = data.index(tag) + 8
            data = data[:at] + value.to_bytes(2, "little") + data[at + 2 :]
        path.write_bytes(data)
    if why:
        with pytest.raises(Refused, match=f"CORRUPT_FILE: {why}"):
            read_scan(tmp_path)
    else:
        (volume,) = read_scan(tmp_path)
        np.testing.assert_array_equal(volume.hu, scans.sample(volume.affine, volume.hu.shape))


def _encapsulated(ds, syntax, stream):
    ds.PixelData = encapsulate([stream])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = syntax
    return ds


@pytest.mark.parametrize("last", ["201", "202", "203"])
def test_high_throughput_jpeg_2000_is_exact(tmp_path, last):
    if int(pydicom.__version__.split(".")[0]) < 3:
        pytest.skip("pydicom 2.4 does not know these syntaxes: such files are refused with DECODER_MISSING")
    x, y = np.meshgrid(np.arange(16), np.arange(16))
    pixels = ((37 * x + 101 * y + 3 * x * y) % 3000).astype(np.uint16)
    for k in range(6):
        ds = scans.dicom_slice(pixels, (0, 0, 3 * k))
        scans.save(_encapsulated(ds, f"1.2.840.10008.1.2.4.{last}", base64.b64decode(HTJ2K)), tmp_path / f"{k}")
    (volume,) = read_scan(tmp_path)
    np.testing.assert_array_equal(volume.hu[:, :, 2], pixels.T.astype(int) - 1024)
    assert volume.codes == (["LOSSY_COMPRESSION"] if last == "203" else ["OK"])


def test_lossy_pixels_are_read_with_a_warning(tmp_path):
    for number, ds in enumerate(scans.series()):
        recode(scans.save(ds, tmp_path / f"{number}"), "JPEGLSNearLossless")
    (volume,) = read_scan(tmp_path)
    assert volume.codes == ["LOSSY_COMPRESSION"]
    assert read_scan(scans.write_series(tmp_path / "said", scans.series(LossyImageCompression="01")))[0].codes == [
        "LOSSY_COMPRESSION"
    ]


@pytest.mark.parametrize("last", ["51", "53", "55", "100"])
def test_what_nothing_decodes_is_named(tmp_path, last):
    syntax = f"1.2.840.10008.1.2.4.{last}"
    for number, ds in enumerate(scans.series(BitsStored=12, HighBit=11)):
        scans.save(_encapsulated(ds, syntax, b"\xff\xd8\xff\xd9"), tmp_path / f"{number}")
    with pytest.raises(Refused, match=f"DECODER_MISSING: transfer syntax {syntax}"):
        read_scan(tmp_path)


def test_damaged_pixels_are_corrupt_not_zero(tmp_path):
    folder = scans.write_series(tmp_path / "native", scans.series())
    victim = sorted(folder.iterdir())[4]
    victim.write_bytes(victim.read_bytes()[:-300])
    with pytest.raises(Refused, match="CORRUPT_FILE"):
        read_scan(folder)
    for number, ds in enumerate(scans.series()):
        recode(scans.save(ds, tmp_path / "j2k" / f"{number}"), "JPEG2000Lossless")
    victim = tmp_path / "j2k" / "3"
    data = bytearray(victim.read_bytes())
    data[-400:-100] = bytes(300)
    victim.write_bytes(data[:-600])
    with pytest.raises(Refused, match="CORRUPT_FILE"):
        read_scan(tmp_path / "j2k")


def enhanced(heights, *, stacks=1, times=1, groups=True) -> Dataset:
    """An Enhanced CT file whose frames are in no order."""
    slices = scans.series(heights=heights)
    order = np.random.default_rng(1).permutation(len(slices))
    ds = scans.dicom_slice(np.zeros((32, 36), np.uint16), (0, 0, 0), SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1")
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):
        delattr(ds, name)
    ds.NumberOfFrames = len(slices)
    ds.PixelData = b"".join(slices[k].PixelData for k in order)
    if not groups:
        return ds
    shared, frames = Dataset(), []
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [Dataset()], [Dataset()]
    shared.PixelMeasuresSequence[0].PixelSpacing, shared.PixelMeasuresSequence[0].SliceThickness = [3.0, 3.0], 1.0
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    for number, k in enumerate(order):
        own, place, values, content = Dataset(), Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = slices[k].ImagePositionPatient
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 1, -1024, "HU"
        content.StackID, content.TemporalPositionIndex = str(number % stacks), int(k % times) + 1
        own.PlanePositionSequence, own.PixelValueTransformationSequence = [place], [values]
        own.FrameContentSequence = [content]
        frames.append(own)
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [shared], frames
    return ds


def test_enhanced_multi_frame_ct_is_read_from_its_functional_groups(tmp_path):
    heights = tuple(4.0 * k for k in range(-7, 8))
    (volume,) = read_scan(scans.save(enhanced(heights), tmp_path / "e.dcm"))
    assert volume.codes == ["OK"] and volume.hu.shape == (36, 32, 15)
    np.testing.assert_array_equal(volume.hu, scans.sample(volume.affine, volume.hu.shape))


@pytest.mark.parametrize("name", ["RescaleSlope", "RescaleIntercept"])
@pytest.mark.parametrize("value", [None, "-1024x"])
def test_a_frame_without_readable_rescale_values_refuses_the_file(tmp_path, name, value):
    ds = enhanced(tuple(4.0 * k for k in range(-7, 8)))
    values = ds.PerFrameFunctionalGroupsSequence[4].PixelValueTransformationSequence[0]
    if value is None:
        delattr(values, name)
    else:
        values[name] = pydicom.DataElement(values[name].tag, "LO", value)
    with pytest.raises(Refused, match=r"CORRUPT_FILE: .*rescale slope"):
        read_scan(scans.save(ds, tmp_path / "e.dcm"))


@pytest.mark.parametrize(
    ("how", "code"),
    [({"stacks": 2}, "MIXED_GEOMETRY"), ({"times": 2}, "FOUR_D"), ({"groups": False}, "MULTI_FRAME_UNSUPPORTED")],
)
def test_enhanced_files_of_several_stacks_or_times_are_refused(tmp_path, how, code):
    heights = [4.0 * k for k in range(-7, 8)]
    heights = [h for h in heights for _ in range(how.get("times", 1))]
    with pytest.raises(Refused, match=code):
        read_scan(scans.save(enhanced(heights, **how), tmp_path / "e.dcm"))


# ---- zips


def zipped(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_a_zip_of_dicom_is_the_same_scan(tmp_path):
    folder = scans.write_series(tmp_path / "s", scans.series())
    path = zipped(tmp_path / "s.zip", {f"a/b/{f.name}": f.read_bytes() for f in folder.iterdir()})
    from_zip, from_folder = read_scan(path)[0], read_scan(folder)[0]
    np.testing.assert_array_equal(from_zip.hu, from_folder.hu)
    assert from_zip.source_hash == from_folder.source_hash


def finding(path):
    (item,) = survey(path)
    return item.finding.kind, item.finding.code


@pytest.mark.parametrize("name", ["../out.dcm", "/etc/out.dcm", "a/../../out.dcm", "C:/out.dcm", "..\\out.dcm"])
def test_climbing_members_make_an_archive_unsafe(tmp_path, name):
    assert finding(zipped(tmp_path / "s.zip", {"ok": b"1", name: b"2"})) == ("refused", "UNSAFE_ARCHIVE")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.zip"]


def test_links_bombs_and_damage_are_refused(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "l.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    assert finding(tmp_path / "l.zip") == ("refused", "UNSAFE_ARCHIVE")
    assert finding(zipped(tmp_path / "b.zip", {"bomb": bytes(50 << 20)})) == ("refused", "UNSAFE_ARCHIVE")
    (tmp_path / "d.zip").write_bytes(b"PK\x03\x04 no zip at all")
    assert finding(tmp_path / "d.zip") == ("refused", "CORRUPT_FILE")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("s.nii", b"\x5c\x01\0\0" + bytes(400))
    data = bytearray(buffer.getvalue())
    data[60] ^= 0xFF
    (tmp_path / "c.zip").write_bytes(data)
    assert finding(tmp_path / "c.zip") == ("refused", "CORRUPT_FILE")
