"""Labels that come along with scans: volumes, DICOM SEG, names, damage."""

import json

import numpy as np
import pytest

from app.dataset import prepared
from app.prepare import options
from tests import scans
from tests.cohorts import AFFINE, by_source, report


def test_labels_come_along_on_the_same_grid(tmp_path):
    raw = tmp_path / "raw"
    scans.nifti_scan(raw / "ds" / "ct.nii.gz")
    labels = np.zeros((36, 32, 28), np.uint8)
    labels[10:20, 8:20, 5:15] = 3
    labels[22:30, 8:20, 5:15] = 9
    scans.write_nifti(raw / "ds" / "ct_seg.nii.gz", AFFINE, labels)
    scans.write_nifti(raw / "ds" / "segmentations" / "kidney_left.nii.gz", AFFINE, np.zeros_like(labels))
    coarse = scans.centred((6.0, 6.0, 8.0), (18, 16, 14), np.diag([-1.0, -1.0, 1.0]))
    scans.write_nifti(raw / "ds" / "segmentations" / "liver.nii.gz", coarse, np.ones((18, 16, 14), np.uint8))
    away = AFFINE.copy()
    away[:3, 3] += 900
    scans.write_nifti(raw / "ds" / "masks" / "spleen.nii.gz", away, labels)
    (tmp_path / "map.json").write_text(json.dumps({"*": {"3": "heart"}, "ds": {"9": "aorta"}}))
    organs = options.read_organs(str(tmp_path / "map.json"))
    result = report(raw, tmp_path / "out", organs=organs)
    assert by_source(result)["ds/masks/spleen.nii.gz"].codes == ("LABEL_GRID_MISMATCH",)
    assert by_source(result)["ds/ct_seg.nii.gz"].status == "skipped"
    (case,) = prepared.find_cases(tmp_path / "out")
    assert case.sidecar["organs"].keys() == {"aorta", "heart", "kidney_left", "liver"}
    assert case.sidecar["organs"]["kidney_left"] == 0 and not case.organ("kidney_left").any()
    index = np.argwhere(case.organ("heart"))
    points = index @ case.affine[:3, :3].T + case.affine[:3, 3]
    at = np.rint((points - AFFINE[:3, 3]) / np.diag(AFFINE)[:3]).astype(int)
    assert (labels[tuple(at.T)] == 3).all()
    assert abs(len(index) * 6**3 - 10 * 12 * 10 * 36) < 0.15 * 10 * 12 * 10 * 36
    assert case.organ("liver").sum() == pytest.approx(18 * 16 * 14 * 6 * 6 * 8 / 6**3, rel=0.15)


def test_damaged_labels_are_named_not_dropped(tmp_path):
    scans.nifti_scan(tmp_path / "raw" / "ct.nii")
    path = scans.write_nifti(tmp_path / "raw" / "ct_seg.nii", AFFINE, np.ones((36, 32, 28), np.uint8))
    path.write_bytes(path.read_bytes()[:-500])
    outcome = by_source(report(tmp_path / "raw", tmp_path / "out"))["ct.nii"]
    assert outcome.codes == ("CORRUPT_FILE",) and outcome.message.startswith("labels beside it")


def test_dicom_segmentations_come_along_and_rtstruct_is_skipped(tmp_path):
    folder = scans.write_series(tmp_path / "raw" / "ds" / "ct", scans.series())
    seg = scans.dicom_slice(np.zeros((32, 36), np.uint16), (0, 0, 0), SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4")
    seg.Modality, seg.SeriesInstanceUID, seg.NumberOfFrames = "SEG", "1.2.3.77", 4
    seg.BitsAllocated = seg.BitsStored = 8
    seg.HighBit, seg.SegmentationType, seg.MaximumFractionalValue = 7, "FRACTIONAL", 255
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):
        delattr(seg, name)
    frames = np.zeros((4, 32, 36), np.uint8)
    frames[:, 10:22, 6:18] = 255
    seg.PixelData = frames.tobytes()
    reference, segment, shared = scans.Dataset(), scans.Dataset(), scans.Dataset()
    reference.SeriesInstanceUID = "1.2.3.4"
    segment.SegmentNumber, segment.SegmentLabel = 1, "Liver"
    measures, turn = scans.Dataset(), scans.Dataset()
    measures.PixelSpacing, measures.SliceThickness = [3.0, 3.0], 4.0
    turn.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [turn]
    seg.ReferencedSeriesSequence, seg.SegmentSequence = [reference], [segment]
    seg.SharedFunctionalGroupsSequence, groups = [shared], []
    slices = scans.series()
    for k in (9, 6, 7, 8):
        own, place, which = scans.Dataset(), scans.Dataset(), scans.Dataset()
        place.ImagePositionPatient = slices[k].ImagePositionPatient
        which.ReferencedSegmentNumber = 1
        own.PlanePositionSequence, own.SegmentIdentificationSequence = [place], [which]
        groups.append(own)
    seg.PerFrameFunctionalGroupsSequence = groups
    scans.save(seg, folder.parent / "seg.dcm")
    struct = scans.dicom_slice(np.zeros((4, 4), np.uint16), (0, 0, 0), SOPClassUID="1.2.840.10008.5.1.4.1.1.481.3")
    for name in ("Rows", "Columns", "PixelData"):
        delattr(struct, name)
    struct.Modality = "RTSTRUCT"
    scans.save(struct, folder.parent / "rs.dcm")
    result = report(tmp_path / "raw", tmp_path / "out")
    assert {o.status for s, o in by_source(result).items() if s.endswith(".dcm")} == {"skipped"}
    assert result.exit_status == 0
    (case,) = prepared.find_cases(tmp_path / "out")
    points = np.argwhere(case.organ("liver")) @ case.affine[:3, :3].T + case.affine[:3, 3]
    corner = np.array(slices[6].ImagePositionPatient, float) * [-1, -1, 1]
    low, high = corner - [17.5 * 3, 21.5 * 3, 2], corner - [5.5 * 3, 9.5 * 3, -14]
    assert len(points) == pytest.approx(12 * 3 * 12 * 3 * 16 / 6**3, rel=0.2)
    assert (points >= low - 1e-6).all() and (points <= high + 1e-6).all()
