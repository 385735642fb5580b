"""NIfTI, NRRD and MetaImage: values and geometry as an independent reader has them; hostile files end in one line."""

import gzip
import zlib

import nibabel as nib
import numpy as np
import pytest

from app.prepare import Refused, read_scan
from app.prepare.survey import survey
from tests import scans

SHAPE = (20, 18, 16)
TURN = scans.turned(25, (1, 2, 3))


def affine_of(turn=None):
    return scans.centred((5.0, 5.5, 6.0), SHAPE, turn)


def refusal(path, **kwargs) -> str:
    with pytest.raises(Refused) as caught:
        read_scan(path, **kwargs)
    return caught.value.code


@pytest.mark.parametrize("turn", [None, TURN])
@pytest.mark.parametrize("name", ["s.nii", "s.nii.gz"])
def test_nifti_is_as_nibabel_has_it(tmp_path, name, turn):
    path = scans.write_nifti(tmp_path / name, affine_of(turn), scans.sample(affine_of(turn), SHAPE))
    (volume,) = read_scan(path)
    image = nib.load(path)
    np.testing.assert_array_equal(volume.hu, image.get_fdata())
    np.testing.assert_allclose(volume.affine, image.affine)
    assert volume.codes == ["OK"]


def test_nifti_slope_is_honoured_once(tmp_path):
    image = nib.Nifti1Image(scans.sample(affine_of(), SHAPE) + 1024, affine_of())
    image.header.set_slope_inter(1, -1024)
    raw = (scans.sample(affine_of(), SHAPE) + 1024).astype("<i2").tobytes(order="F")
    header = image.header.copy()
    header.set_data_dtype(np.int16)
    header["vox_offset"] = 352
    data = header.binaryblock + b"\0\0\0\0" + raw
    (tmp_path / "s.nii").write_bytes(data)
    (volume,) = read_scan(tmp_path / "s.nii")
    np.testing.assert_array_equal(volume.hu, scans.sample(affine_of(), SHAPE))


def test_qform_alone_counts_and_a_disagreeing_one_is_a_warning(tmp_path):
    affine, data = affine_of(TURN), scans.sample(affine_of(TURN), SHAPE)
    scans.write_nifti(tmp_path / "q.nii", affine, data, sform=0, qform=1)
    (volume,) = read_scan(tmp_path / "q.nii")
    assert volume.codes == ["ORIENTATION_FROM_QFORM"]
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine_of(), 1)
    nib.save(image, tmp_path / "both.nii")
    (volume,) = read_scan(tmp_path / "both.nii")
    assert volume.codes == ["SFORM_QFORM_DIFFER"]
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    scans.write_nifti(tmp_path / "none.nii", affine, data, sform=0, qform=0)
    assert refusal(tmp_path / "none.nii") == "NO_SPACING"


@pytest.mark.parametrize("turn", [None, TURN])
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("raw.nrrd", lambda p, a, d: scans.write_nrrd(p, a, d, encoding="raw")),
        ("gzip.nrrd", lambda p, a, d: scans.write_nrrd(p, a, d)),
        ("s.mha", lambda p, a, d: scans.write_mha(p, a, d)),
    ],
)
def test_nrrd_and_metaimage_are_as_simpleitk_has_them(tmp_path, name, write, turn):
    sitk = pytest.importorskip("SimpleITK")
    path = write(tmp_path / name, affine_of(turn), scans.sample(affine_of(turn), SHAPE))
    (volume,) = read_scan(path)
    image = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(volume.hu, sitk.GetArrayFromImage(image).transpose(2, 1, 0))
    for index in [(0, 0, 0), (3, 7, 11), (19, 17, 15)]:
        lps = np.array(image.TransformContinuousIndexToPhysicalPoint(index))
        np.testing.assert_allclose((volume.affine @ [*index, 1])[:3], lps * [-1, -1, 1], atol=1e-6)


def test_big_endian_compressed_and_detached_files(tmp_path):
    data = scans.sample(affine_of(), SHAPE)
    big = nib.Nifti1Image(data, affine_of(), header=nib.Nifti1Header(endianness=">"))
    nib.save(big, tmp_path / "big.nii")
    packed = zlib.compress(data.tobytes(order="F"))
    path = scans.write_mha(tmp_path / "z.mha", affine_of(), data, CompressedData="True")
    head = path.read_bytes()[: -data.nbytes]
    path.write_bytes(head + packed)
    (tmp_path / "d.mhd").write_bytes(head.replace(b"LOCAL", b"d.raw.z").replace(b"= True\nT", b"= True\nT"))
    (tmp_path / "d.raw.z").write_bytes(packed)
    nib.save(nib.Nifti1Pair(data, affine_of()), tmp_path / "pair.hdr")
    for name in ("big.nii", "z.mha", "d.mhd", "pair.hdr"):
        (volume,) = read_scan(tmp_path / name)
        np.testing.assert_array_equal(volume.hu, data)


def test_four_d_colour_flat_and_thin_files_are_refused(tmp_path):
    data = scans.sample(affine_of(), SHAPE)
    scans.write_nifti(tmp_path / "4d.nii", affine_of(), np.stack([data, data], -1))
    assert refusal(tmp_path / "4d.nii") == "FOUR_D"
    scans.write_nifti(tmp_path / "one.nii", affine_of(), data[..., None])
    assert read_scan(tmp_path / "one.nii")[0].hu.shape == SHAPE
    rgb = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    nib.save(nib.Nifti1Image(rgb, affine_of()), tmp_path / "rgb.nii")
    assert refusal(tmp_path / "rgb.nii") == "RGB"
    scans.write_nifti(tmp_path / "thin.nii", affine_of(), data[:, :, :4])
    assert refusal(tmp_path / "thin.nii") == "TOO_FEW_SLICES"
    scans.write_nifti(tmp_path / "flat.nii", affine_of(), np.full(SHAPE, -1000, np.int16))
    assert refusal(tmp_path / "flat.nii") == "EMPTY"


def test_truncated_and_lying_files_are_corrupt(tmp_path):
    path = scans.write_nifti(tmp_path / "s.nii.gz", affine_of(), scans.sample(affine_of(), SHAPE))
    whole = path.read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert refusal(tmp_path / "cut.nii.gz") == "CORRUPT_FILE"
    (tmp_path / "head.nii").write_bytes(gzip.decompress(whole)[:200])
    assert refusal(tmp_path / "head.nii") == "CORRUPT_FILE"
    (tmp_path / "none.nii").write_bytes(b"")
    assert refusal(tmp_path / "none.nii") == "EMPTY"
    header = nib.Nifti1Header(gzip.decompress(whole)[:348])
    header["dim"][1:4] = (1200, 1200, 1200)
    (tmp_path / "huge.nii").write_bytes(header.binaryblock + b"\0" * 4 + b"\1\2" * 1000)
    assert refusal(tmp_path / "huge.nii") == "CORRUPT_FILE"
    header["dim"][1:4] = (32767, 32767, 32767)
    (tmp_path / "absurd.nii").write_bytes(header.binaryblock + b"\0" * 4 + b"\1\2" * 1000)
    assert refusal(tmp_path / "absurd.nii") == "CORRUPT_FILE"


def test_a_gzip_bomb_is_read_no_farther_than_its_header_says(tmp_path):
    data = scans.sample(affine_of(), SHAPE)
    image = nib.Nifti1Image(data, affine_of())
    image.header["vox_offset"] = 352
    body = image.header.binaryblock + b"\0" * 4 + data.tobytes(order="F")
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(body + b"\0" * (64 << 20)))
    with pytest.raises(Refused, match=f"{data.nbytes + data[:, :, 0].nbytes} bytes of voxels"):
        read_scan(tmp_path / "bomb.nii.gz")
    (tmp_path / "padded.nii.gz").write_bytes(gzip.compress(body + b"\0" * 16))
    np.testing.assert_array_equal(read_scan(tmp_path / "padded.nii.gz")[0].hu, data)
    cut = scans.write_nrrd(tmp_path / "s.nrrd", affine_of(), data, encoding="raw", sizes="20 18 15")
    assert refusal(cut) == "CORRUPT_FILE"


def test_a_bomb_whose_header_claims_it_all_is_refused_unread(tmp_path):
    header = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), affine_of()).header
    header["dim"][1:4], header["vox_offset"] = (1000, 1000, 900), 352
    header.set_sform(affine_of(), 1)
    packed = gzip.compress(header.binaryblock + b"\0" * 4 + bytes(8 << 20))
    (tmp_path / "bomb.nii.gz").write_bytes(packed)
    with pytest.raises(Refused, match="claim to hold 1800000000"):
        read_scan(tmp_path / "bomb.nii.gz")


@pytest.mark.parametrize("target", ["../secret.raw", "/etc/passwd", "..", "a/b.raw"])
def test_headers_cannot_name_files_elsewhere(tmp_path, target):
    data = scans.sample(affine_of(), SHAPE)
    (tmp_path / "secret.raw").write_bytes(data.tobytes(order="F"))
    folder = tmp_path / "in"
    folder.mkdir()
    mha = scans.write_mha(folder / "s.mhd", affine_of(), data)
    mha.write_bytes(mha.read_bytes()[: -data.nbytes].replace(b"LOCAL", target.encode()))
    assert refusal(mha) == "CORRUPT_FILE"
    nrrd = scans.write_nrrd(folder / "s.nhdr", affine_of(), data, encoding="raw", **{"data file": target})
    assert refusal(nrrd) == "CORRUPT_FILE"


def test_nrrd_without_a_space_has_no_left_and_right(tmp_path):
    data = scans.sample(affine_of(), SHAPE)
    path = scans.write_nrrd(tmp_path / "s.nrrd", affine_of(), data, space="scanner-xyz")
    assert refusal(path) == "NO_SPACING"
    ras = scans.write_nrrd(tmp_path / "r.nrrd", scans.LPS @ affine_of(TURN), data, space="right-anterior-superior")
    np.testing.assert_allclose(read_scan(ras)[0].affine, affine_of(TURN))


def test_names_do_not_decide_what_a_file_is(tmp_path):
    scans.write_nifti(tmp_path / "s.nii", affine_of(), scans.sample(affine_of(), SHAPE))
    (tmp_path / "s.nii").rename(tmp_path / "scan")
    (tmp_path / "notes.txt").write_text("no scan")
    (tmp_path / "broken.dcm").write_text("no scan either")
    found = {item.source: item.finding for item in survey(tmp_path)}
    assert found["scan"] is None
    assert found["notes.txt"].kind == "skipped" and found["broken.dcm"].kind == "refused"


CONTRADICTIONS = [
    ("s.mha", {"Origin": "5 5 5"}, "CORRUPT_FILE"),
    ("s.mha", {"Position": "5 5 5"}, "CORRUPT_FILE"),
    ("s.mha", {"Rotation": "0 1 0 1 0 0 0 0 1"}, "CORRUPT_FILE"),
    ("s.mha", {"ElementByteOrderMSB": "True"}, "CORRUPT_FILE"),
    ("s.mha", {"HeaderSize": "64"}, "CORRUPT_FILE"),
    ("s.mha", {"DistanceUnits": "cm"}, "NO_SPACING"),
    ("s.mha", {"ElementToIntensityFunctionSlope": "2"}, "NOT_HU"),
    ("s.mha", {"ElementToIntensityFunctionOffset": "-1024"}, "NOT_HU"),
    ("s.mha", {"Modality": "MET_MOD_MR"}, "NOT_CT"),
    ("s.mha", {"ElementSpacing": "3"}, "CORRUPT_FILE"),
    ("s.mha", {"Offset": "16"}, "CORRUPT_FILE"),
    ("s.mha", {"Offset": "1 2 3 4"}, "CORRUPT_FILE"),
    ("s.mha", {"CenterOfRotation": "0"}, "CORRUPT_FILE"),
    ("s.mha", {"Comp\0ressed": "True"}, "CORRUPT_FILE"),
    ("s.nrrd", {"pace origin": "(0,0,0)"}, "CORRUPT_FILE"),
    ("s.nrrd", {"content": "a\x01b"}, "CORRUPT_FILE"),
    ("s.nrrd", {"spacings": "2 2 2"}, "CORRUPT_FILE"),
    ("s.nrrd", {"space directions": "none (5,0,0) (0,5,0) (0,0,5)"}, "CORRUPT_FILE"),
    ("s.nrrd", {"space directions": "(5,0,0) (0,5,0) (0,0,5) none"}, "CORRUPT_FILE"),
    ("s.nrrd", {"space units": '"cm" "cm" "cm"'}, "NO_SPACING"),
    ("s.nrrd", {"space units": '"mm" "mm" "um"'}, "NO_SPACING"),
    ("s.nrrd", {"kinds": "domain domain list"}, "CORRUPT_FILE"),
    ("s.nrrd", {"kinds": "space space time"}, "FOUR_D"),
    ("s.nrrd", {"old min": "-1024", "old max": "3071"}, "NOT_HU"),
    ("s.nrrd", {"encoding": "gzip", "byte skip": "-1"}, "CORRUPT_FILE"),
]


@pytest.mark.parametrize(("name", "fields", "code"), CONTRADICTIONS)
def test_a_header_that_says_it_twice_otherwise_or_in_other_units_is_refused(tmp_path, name, fields, code):
    write = scans.write_mha if name.endswith("mha") else scans.write_nrrd
    path = write(tmp_path / name, affine_of(), scans.sample(affine_of(), SHAPE), **fields)
    assert refusal(path) == code


def test_a_header_that_says_it_twice_alike_is_read(tmp_path):
    data = scans.sample(affine_of(), SHAPE)
    affine = scans.LPS @ affine_of()
    same = {"Origin": " ".join(f"{v:g}" for v in affine[:3, 3]), "DistanceUnits": "mm", "HeaderSize": "0"}
    same |= {"ElementToIntensityFunctionSlope": "1", "Modality": "MET_MOD_CT", "ElementByteOrderMSB": "False"}
    (volume,) = read_scan(scans.write_mha(tmp_path / "s.mha", affine_of(), data, **same))
    np.testing.assert_array_equal(volume.hu, data)
    same = {"space units": '"mm" "mm" "mm"', "kinds": "space domain domain", "byte skip": "0"}
    (volume,) = read_scan(scans.write_nrrd(tmp_path / "s.nrrd", affine_of(), data, **same))
    np.testing.assert_array_equal(volume.hu, data)


@pytest.mark.parametrize("told", [20, 10**6])
def test_a_compressed_metaimage_holds_as_many_bytes_as_it_says(tmp_path, told):
    data = scans.sample(affine_of(), SHAPE)
    packed = zlib.compress(data.tobytes(order="F"))
    for size, code in ((len(packed), None), (told, "CORRUPT_FILE")):
        path = scans.write_mha(
            tmp_path / "z.mha", affine_of(), data, CompressedData="True", CompressedDataSize=str(size)
        )
        path.write_bytes(path.read_bytes()[: -data.nbytes] + packed)
        if code is None:
            np.testing.assert_array_equal(read_scan(path)[0].hu, data)
        else:
            assert refusal(path) == code


def test_a_nifti_whose_pixdim_is_another_than_its_sform_is_told(tmp_path):
    """nibabel takes the sform, as the format says, ITK the spacing of pixdim."""
    path = scans.write_nifti(tmp_path / "s.nii", affine_of(), scans.sample(affine_of(), SHAPE))
    image = nib.load(path)
    header = image.header.copy()
    header["pixdim"][1:4], header["vox_offset"] = (5.0, 5.5, 9.0), 352
    path.write_bytes(header.binaryblock + path.read_bytes()[348:])
    (volume,) = read_scan(path)
    assert volume.codes == ["SFORM_QFORM_DIFFER"]
    np.testing.assert_allclose(volume.affine, affine_of())
    header["pixdim"][1:4], header["qform_code"], header["quatern_c"] = (5.0, 5.5, 6.0), 1, 544
    path.write_bytes(header.binaryblock + path.read_bytes()[348:])
    (volume,) = read_scan(path)
    assert volume.codes == ["SFORM_QFORM_DIFFER"], "a qform that is no rotation"


def test_a_nifti_whose_extensions_reach_into_its_voxels_is_corrupt(tmp_path):
    data = scans.sample(affine_of(), SHAPE)
    image = nib.Nifti1Image(data, affine_of())
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"a" * 20))
    nib.save(image, tmp_path / "s.nii")
    whole = bytearray((tmp_path / "s.nii").read_bytes())
    np.testing.assert_array_equal(read_scan(tmp_path / "s.nii")[0].hu, data)
    whole[108:112] = np.float32(352).tobytes()
    (tmp_path / "s.nii").write_bytes(whole)
    assert refusal(tmp_path / "s.nii") == "CORRUPT_FILE"


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_analyze_is_refused_for_what_it_lacks(tmp_path, ending):
    data = scans.sample(affine_of(), SHAPE)
    nib.save(nib.Spm2AnalyzeImage(data, affine_of()), tmp_path / f"a.hdr{ending}")
    with pytest.raises(Refused, match=r"Analyze 7\.5 does not tell left from right") as caught:
        read_scan(tmp_path)
    assert caught.value.code == "NO_SPACING"


@pytest.mark.parametrize("sizes", ["20 18 15", "20 18 17"])
def test_text_voxels_are_as_many_as_the_header_says(tmp_path, sizes):
    data = scans.sample(affine_of(), SHAPE)
    text = " ".join(map(str, data.ravel(order="F").tolist())).encode()
    for told, code in (("20 18 16", None), (sizes, "CORRUPT_FILE")):
        path = scans.write_nrrd(tmp_path / "s.nrrd", affine_of(), data, encoding="ascii", sizes=told)
        path.write_bytes(path.read_bytes()[: -data.nbytes] + text + b"\n")
        if code is None:
            np.testing.assert_array_equal(read_scan(path)[0].hu, data)
        else:
            assert refusal(path) == code
