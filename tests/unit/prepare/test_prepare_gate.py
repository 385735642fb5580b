"""The gate's rules on DICOM series written slice by slice: fixed, warned, skipped, refused, and the geometry."""

import numpy as np
import pytest

from app.prepare import Refused, normalise, read_scan
from app.prepare.gate import Rules, usual_step
from app.prepare.survey import survey
from tests import scans

STEPS = tuple(4.0 * k for k in range(-7, 8))


def outcomes(folder, **rules):
    """(source, kind, code) of what cannot be read, and the codes of what can."""
    items = survey(folder, Rules(**rules))
    return [(i.finding.kind, i.finding.code) if i.plan is None else ("stack", len(i.plan.slices)) for i in items]


def assert_right(volume, *, tolerance=30.0, edge=1.0, inside=True):
    """On a fine grid every voxel inside the scan has the HU of its point in the world (smooth, so linear is close)."""
    grid = normalise(volume, 48, 2.0)
    index = np.stack(np.meshgrid(*[np.arange(4, 44, 3)] * 3, indexing="ij"), -1).reshape(-1, 3)
    points = index @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    back = np.linalg.inv(volume.affine)
    places = points @ back[:3, :3].T + back[:3, 3]
    on = ((places >= edge) & (places <= np.array(volume.hu.shape) - 1 - edge)).all(1)
    assert on.sum() > 200
    deep = np.abs(scans.world_hu(points) - 40) < 250 if inside else np.ones(len(points), bool)
    error = np.abs(grid.hu[tuple(index.T)] - scans.world_hu(points))
    assert error[on & deep].max() < tolerance


def test_clean_series_is_read_in_order_of_position_with_world_geometry(tmp_path):
    (volume,) = read_scan(scans.write_series(tmp_path / "s", scans.series()))
    assert volume.codes == ["OK"]
    assert volume.hu.shape == (36, 32, 15)
    np.testing.assert_array_equal(volume.hu, scans.sample(volume.affine, volume.hu.shape))
    np.testing.assert_allclose(volume.affine[:3, :3], np.diag([-3.0, -3.0, 4.0]))


def test_descending_heights_give_the_same_volume(tmp_path):
    up = read_scan(scans.write_series(tmp_path / "up", scans.series()))[0]
    down = read_scan(scans.write_series(tmp_path / "down", scans.series()[::-1]))[0]
    np.testing.assert_array_equal(up.hu, down.hu)
    np.testing.assert_array_equal(up.affine, down.affine)


def test_pixel_spacing_is_rows_then_columns(tmp_path):
    (volume,) = read_scan(scans.write_series(tmp_path / "s", scans.series(spacing=(2.0, 3.5))))
    np.testing.assert_allclose(np.diag(volume.affine)[:3], [-3.5, -2.0, 4.0])
    np.testing.assert_array_equal(volume.hu, scans.sample(volume.affine, volume.hu.shape))


@pytest.mark.parametrize("orientation", [(0, 1, 0, 0, 0, -1), (1, 0, 0, 0, 0, -1), (0.8, 0.6, 0, -0.6, 0.8, 0)])
def test_sagittal_coronal_and_oblique_stacks_keep_the_world(tmp_path, orientation):
    (volume,) = read_scan(scans.write_series(tmp_path / "s", scans.series(orientation=orientation)))
    np.testing.assert_array_equal(volume.hu, scans.sample(volume.affine, volume.hu.shape))
    assert_right(volume)


def test_tilted_gantry_is_corrected_and_said(tmp_path):
    shear = float(np.tan(np.radians(20)))
    (volume,) = read_scan(scans.write_series(tmp_path / "s", scans.series(shear=shear)))
    assert volume.codes == ["TILT_CORRECTED"]
    assert "20.00 degrees" in volume.findings[0].message
    np.testing.assert_array_equal(volume.hu, scans.sample(volume.affine, volume.hu.shape))
    assert_right(volume)


def test_uneven_steps_are_resampled_to_their_places(tmp_path):
    heights = np.cumsum([0, 3, 3, 3.4, 3, 3.9, 3, 3, 3, 4.3, 3, 3, 3.6, 3, 3]) - 24
    (volume,) = read_scan(scans.write_series(tmp_path / "s", scans.series(heights=heights)))
    assert volume.codes == ["UNEVEN_SPACING_RESAMPLED"]
    assert_right(volume)
    top = volume.affine @ [0, 0, volume.hu.shape[2] - 1, 1]
    assert top[2] == pytest.approx(heights[-1]) and volume.affine[2, 3] == pytest.approx(heights[0])


def test_a_missing_slice_is_refused_unless_allowed(tmp_path):
    slices = scans.series()
    folder = scans.write_series(tmp_path / "s", slices[:6] + slices[7:])
    assert outcomes(folder) == [("refused", "MISSING_SLICES")]
    (volume,) = read_scan(folder, allow_gaps=True)
    assert volume.codes == ["GAPS_INTERPOLATED"] and volume.hu.shape == (36, 32, 15)
    whole = read_scan(scans.write_series(tmp_path / "w", slices))[0]
    np.testing.assert_array_equal(volume.affine, whole.affine)
    np.testing.assert_allclose(volume.hu[:, :, 6], (whole.hu[:, :, 5] / 2 + whole.hu[:, :, 7] / 2), atol=0.5)
    kept = [k for k in range(15) if k != 6]
    np.testing.assert_array_equal(volume.hu[:, :, kept], whole.hu[:, :, kept])


@pytest.mark.parametrize(
    ("factor", "code"), [(1.96, "MISSING_SLICES"), (1.8, None), (3.1, "MISSING_SLICES"), (1.4, None)]
)
def test_a_gap_is_a_step_within_five_percent_of_a_multiple(tmp_path, factor, code):
    heights = np.cumsum([0.0] + [4.0] * 6 + [4.0 * factor] + [4.0] * 6) - 20
    found = outcomes(scans.write_series(tmp_path / "s", scans.series(heights=heights)))
    assert found == ([("refused", code)] if code else [("stack", 14)])


def test_usual_step_is_the_common_one_not_the_mean():
    assert usual_step(np.array([2.0, 2.0, 2.01, 6.0, 2.0])) == pytest.approx(2.0025)
    assert usual_step(np.array([1.0, 2.0, 1.0, 2.0])) == 1.0


def test_equal_doubles_are_dropped_and_different_ones_refused(tmp_path):
    slices = scans.series()
    folder = scans.write_series(tmp_path / "same", [*slices, slices[3], slices[9]])
    (volume,) = read_scan(folder)
    assert volume.codes == ["DUPLICATES_DROPPED"] and volume.hu.shape[2] == 15
    np.testing.assert_array_equal(volume.hu, scans.sample(volume.affine, volume.hu.shape))
    other = scans.series()[3]
    other.PixelData = bytes(len(other.PixelData))
    with pytest.raises(Refused, match="DUPLICATE_SLICES"):
        read_scan(scans.write_series(tmp_path / "other", [*slices, other]))


def test_time_points_are_four_d_and_kernels_are_cases(tmp_path):
    times = [ds for t in (1, 2, 3) for ds in scans.series(AcquisitionNumber=t)]
    assert outcomes(scans.write_series(tmp_path / "t", times)) == [("refused", "FOUR_D")]
    kernels = [ds for k in ("SOFT", "BONE") for ds in scans.series(ConvolutionKernel=k)]
    volumes = read_scan(scans.write_series(tmp_path / "k", kernels))
    assert [v.codes for v in volumes] == [["SERIES_SPLIT"], ["SERIES_SPLIT"]]


def test_two_series_become_two_cases_and_one_can_be_asked_for(tmp_path):
    slices = scans.series() + scans.series(SeriesInstanceUID="1.2.3.5", heights=tuple(5.0 * k for k in range(-6, 7)))
    folder = scans.write_series(tmp_path / "s", slices)
    assert sorted(v.hu.shape[2] for v in read_scan(folder)) == [13, 15]
    (one,) = read_scan(folder, series="1.2.3.5")
    assert one.hu.shape[2] == 13 and one.affine[2, 2] == pytest.approx(5)
    with pytest.raises(Refused, match="NO_CASES"):
        read_scan(folder, series="1.2.9")


def test_interlocking_geometries_are_refused_and_separate_stacks_split(tmp_path):
    odd = scans.series(spacing=(3.5, 3.5))
    mixed = [o if k == 7 else s for k, (s, o) in enumerate(zip(scans.series(), odd, strict=True))]
    assert outcomes(scans.write_series(tmp_path / "m", mixed)) == [("refused", "MIXED_GEOMETRY")]
    apart = scans.series()[:7] + odd[8:]
    assert outcomes(scans.write_series(tmp_path / "a", apart)) == [("stack", 7), ("stack", 7)]
    straggler = [*scans.series()[:-1], odd[-1]]
    assert sorted(outcomes(scans.write_series(tmp_path / "b", straggler))) == [
        ("refused", "MIXED_GEOMETRY"),
        ("stack", 14),
    ]


def test_headers_rounded_differently_are_one_stack(tmp_path):
    slices = scans.series()
    for number, ds in enumerate(slices):
        ds.ImageOrientationPatient = [1, 0.0004 + 0.0002 * (number % 2), 0, -0.0004 - 0.0002 * (number % 2), 1, 0]
        ds.PixelSpacing = [3.00004 + 0.00002 * (number % 2)] * 2
    assert outcomes(scans.write_series(tmp_path / "s", slices)) == [("stack", 15)]


def test_slices_off_the_line_are_refused(tmp_path):
    slices = scans.series()
    slices[5].ImagePositionPatient = [p + d for p, d in zip(slices[5].ImagePositionPatient, (2, 0, 0), strict=True)]
    assert outcomes(scans.write_series(tmp_path / "s", slices)) == [("refused", "MIXED_GEOMETRY")]


def test_empty_series_uids_group_by_geometry_with_a_warning(tmp_path):
    slices = scans.series(SeriesInstanceUID="") + scans.series(SeriesInstanceUID="", shape=(24, 24))
    volumes = read_scan(scans.write_series(tmp_path / "s", slices))
    assert [v.codes for v in volumes] == [["NO_SERIES_UID"]] * 2
    assert sorted(v.hu.shape[:2] for v in volumes) == [(24, 24), (36, 32)]


@pytest.mark.parametrize(
    ("tags", "kind", "code"),
    [
        ({"Modality": "MR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}, "refused", "NOT_CT"),
        ({"Modality": "PT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.128"}, "refused", "NOT_CT"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "skipped", "NOT_CT"),
        ({"ImageType": ["DERIVED", "PRIMARY", "MIP"]}, "refused", "NOT_CT"),
        ({"ImageType": ["DERIVED", "SECONDARY", "MPR"]}, "refused", "NOT_CT"),
        ({"ImageType": ["DERIVED", "SECONDARY", "CSAPARALLEL"]}, "refused", "NOT_CT"),
        ({"ImageType": ["DERIVED", "SECONDARY", "VOLREN"]}, "refused", "NOT_CT"),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "refused", "NOT_CT"),
        ({"ImageType": ["DERIVED", "PRIMARY", "PROJECTION IMAGE"]}, "refused", "NOT_CT"),
        ({"BurnedInAnnotation": "YES"}, "refused", "NOT_CT"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "refused", "LOCALIZER"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "refused", "RGB"),
        ({"NumberOfFrames": 4}, "refused", "MULTI_FRAME_UNSUPPORTED"),
        ({"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelData": bytes(32 * 36)}, "refused", "NOT_HU"),
        ({"SamplesPerPixel": 0}, "refused", "CORRUPT_FILE"),
        ({"RescaleIntercept": "1e308"}, "refused", "NOT_HU"),
        ({"RescaleType": "OD"}, "refused", "NOT_HU"),
        ({"PixelSpacing": None}, "refused", "NO_SPACING"),
        ({"ImagePositionPatient": None}, "refused", "NO_SPACING"),
        ({"ImageOrientationPatient": None}, "refused", "NO_SPACING"),
        ({"PixelSpacing": [0, 3]}, "refused", "NO_SPACING"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "refused", "NO_SPACING"),
    ],
)
def test_what_cannot_be_a_ct_volume_is_refused_by_its_header(tmp_path, tags, kind, code):
    found = outcomes(scans.write_series(tmp_path / "s", scans.series(**tags)))
    assert set(found) == {(kind, code)}


def test_a_reformatted_series_is_read_when_asked_for_by_uid(tmp_path):
    folder = scans.write_series(tmp_path / "s", scans.series(ImageType=["DERIVED", "SECONDARY", "MPR"]))
    assert len(read_scan(folder, series="1.2.3.4")) == 1


@pytest.mark.parametrize(
    "image_type",
    [["ORIGINAL", "SECONDARY", "AXIAL"], ["DERIVED", "SECONDARY", "PROCESSED"], ["DERIVED", "PRIMARY", "AXIAL"]],
)
def test_real_ct_that_other_software_rewrote_is_read_with_a_warning(tmp_path, image_type):
    (volume,) = read_scan(scans.write_series(tmp_path / "s", scans.series(ImageType=image_type)))
    assert volume.codes == ["DERIVED_SERIES"]
    np.testing.assert_array_equal(volume.hu, scans.sample(volume.affine, volume.hu.shape))


def test_a_series_without_image_type_is_read(tmp_path):
    (volume,) = read_scan(scans.write_series(tmp_path / "s", scans.series(ImageType=None)))
    assert volume.codes == ["OK"]


# ---- what slices of one series may not differ in


@pytest.mark.parametrize("where", [0, 7, 14])
@pytest.mark.parametrize(
    ("tag", "value"),
    [("PatientID", "P2"), ("StudyInstanceUID", "1.2.9"), ("FrameOfReferenceUID", "1.2.8"), ("PatientID", "")],
)
def test_two_identities_under_one_series_uid_are_no_case(tmp_path, tag, value, where):
    slices = scans.series(FrameOfReferenceUID="1.2.7")
    setattr(slices[where], tag, value)
    assert outcomes(scans.write_series(tmp_path / "s", slices)) == [("refused", "MIXED_IDENTITY")]


def test_half_a_series_of_another_study_in_another_folder_is_no_case(tmp_path):
    slices = scans.series()
    for ds in slices[8:]:
        ds.StudyInstanceUID = "1.2.9"
    scans.write_series(tmp_path / "a", slices[:8])
    scans.write_series(tmp_path / "b", slices[8:])
    assert outcomes(tmp_path) == [("refused", "MIXED_IDENTITY")]


def test_without_series_uids_studies_are_not_fused(tmp_path):
    slices = scans.series(SeriesInstanceUID="")
    for ds in slices[8:]:
        ds.StudyInstanceUID = "1.2.9"
    assert sorted(outcomes(scans.write_series(tmp_path / "s", slices))) == [("stack", 7), ("stack", 8)]


@pytest.mark.parametrize("where", [0, 7, 14])
@pytest.mark.parametrize("name", ["RescaleSlope", "RescaleIntercept"])
def test_a_rescale_value_that_one_slice_lacks_is_refused(tmp_path, name, where):
    slices = scans.series()
    delattr(slices[where], name)
    assert outcomes(scans.write_series(tmp_path / "s", slices)) == [("refused", "CORRUPT_FILE")]


def test_half_a_rescale_in_every_slice_is_refused(tmp_path):
    folder = scans.write_series(tmp_path / "s", scans.series(RescaleSlope=None))
    assert outcomes(folder) == [("refused", "CORRUPT_FILE")]


@pytest.mark.parametrize("text", [b"-1024x", b"-1024,0 ", b"nan ", b"inf ", b"1\\1 ", b"0x400 "])
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_rescale_value_that_is_no_number_is_refused(tmp_path, text, everywhere):
    slices = scans.series(RescaleIntercept="-1024.0  "[: len(text)])
    folder = scans.write_series(tmp_path / "s", slices)
    files = sorted(folder.iterdir())
    for path in files if everywhere else files[:1]:
        data = path.read_bytes()
        at = data.index(b"\x28\x00\x52\x10DS") + 6
        length = int.from_bytes(data[at : at + 2], "little")
        path.write_bytes(data[:at] + len(text).to_bytes(2, "little") + text + data[at + 2 + length :])
    assert outcomes(folder) == [("refused", "CORRUPT_FILE")]


def test_a_slice_whose_intercept_takes_it_out_of_all_measure_is_not_made_air(tmp_path):
    slices = scans.series()
    slices[-1].RescaleIntercept = "1e308"
    found = outcomes(scans.write_series(tmp_path / "s", slices))
    assert sorted(found) == [("refused", "NOT_HU"), ("stack", 14)]


@pytest.mark.parametrize("where", ["all", 0, 7])
@pytest.mark.parametrize(
    "tags",
    [{"HighBit": 11}, {"BitsStored": 12}, {"BitsStored": 12, "HighBit": 11}, {"PixelRepresentation": 1}],
)
def test_bits_that_contradict_or_differ_between_slices_are_refused(tmp_path, tags, where):
    slices = scans.series()
    for ds in slices if where == "all" else slices[where : where + 1]:
        for name, value in tags.items():
            setattr(ds, name, value)
    found = set(outcomes(scans.write_series(tmp_path / "s", slices)))
    consistent = where == "all" and ("HighBit" in tags) == ("BitsStored" in tags)
    if consistent:
        assert found == {("stack", 15)}
    else:
        assert ("refused", "CORRUPT_FILE") in found and ("stack", 15) not in found


def test_localizer_beside_a_scan_is_skipped(tmp_path):
    scout = scans.series(heights=(0,), SeriesInstanceUID="1.2.3.9", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    scans.write_series(tmp_path / "study" / "scan", scans.series())
    scans.write_series(tmp_path / "study" / "scout", scout)
    assert sorted(outcomes(tmp_path)) == [("skipped", "LOCALIZER"), ("stack", 15)]


def test_few_slices_and_thick_slices(tmp_path):
    assert outcomes(scans.write_series(tmp_path / "few", scans.series(heights=(0, 4, 8, 12)))) == [
        ("refused", "TOO_FEW_SLICES")
    ]
    (volume,) = read_scan(scans.write_series(tmp_path / "thick", scans.series(SliceThickness=5.0)))
    assert volume.codes == ["OVERLAPPING_SLICES"]


def test_a_series_spread_over_folders_is_one_scan_and_copies_are_two(tmp_path):
    slices = scans.series()
    scans.write_series(tmp_path / "spread" / "a", slices[:8])
    scans.write_series(tmp_path / "spread" / "b", slices[8:])
    assert outcomes(tmp_path / "spread") == [("stack", 15)]
    scans.write_series(tmp_path / "copied" / "a", slices)
    scans.write_series(tmp_path / "copied" / "b", slices)
    assert outcomes(tmp_path / "copied") == [("stack", 15), ("stack", 15)]
