"""Who is in which split: patients stay together, somebody is held out, a scan under two names is found."""

import json
import shutil

import pytest

from app.check import check
from app.dataset import prepared
from app.phantoms.phantoms import make_phantom, write_phantom_dicom, write_phantom_nifti
from app.prepare.geometry import hash_of_voxels
from app.prepare.report import lines
from app.prepare.volume import read_scan
from tests import scans
from tests.cohorts import SMALL, report

NAMED = SMALL._replace(keep_names=True)


def scan_of(raw, name, number=0):
    write_phantom_nifti(raw / f"{name}.nii.gz", make_phantom(number, size=20, spacing=20.0))


def leaks(out):
    problems = check(out, preset="tiny").problems
    return {case for problem in problems if problem.code == "SPLIT_LEAKAGE" for case in problem.cases}


def test_the_same_scan_in_two_formats_or_names_on_both_sides_is_found(tmp_path):
    raw = tmp_path / "raw"
    write_phantom_dicom(raw / "series", make_phantom(1, size=20, spacing=20.0), name="x")
    scan_of(raw, "copy", 1)
    scan_of(raw, "other", 2)
    shutil.copy(raw / "other.nii.gz", raw / "again.nii.gz")
    scan_of(raw, "third", 3)
    split = {"series": "train", "copy.nii.gz": "val", "other.nii.gz": "val", "again.nii.gz": "train"}
    report(raw, tmp_path / "out", NAMED, split={**split, "third.nii.gz": "val"})
    assert leaks(tmp_path / "out") == {"series", "copy", "other", "again"}
    for sidecar in (tmp_path / "out").glob("*/processed/*/case.json"):  # prepared before: the voxels alone tell
        content = json.loads(sidecar.read_text())
        del content["hu_hash"]
        sidecar.write_text(json.dumps(content))
    assert leaks(tmp_path / "out") == {"series", "copy", "other", "again"}
    report(raw, tmp_path / "same", NAMED, split=dict.fromkeys([*split, "third.nii.gz"], "val"))
    assert leaks(tmp_path / "same") == set()


def test_voxels_have_one_hash_in_any_order_of_axes(tmp_path):
    phantom = make_phantom(4, size=20, spacing=20.0)
    write_phantom_dicom(tmp_path / "series", phantom, name="x")
    write_phantom_nifti(tmp_path / "a.nii.gz", phantom)
    (one,), (other,) = read_scan(tmp_path / "series"), read_scan(tmp_path / "a.nii.gz")
    assert hash_of_voxels(one.hu, one.affine) == hash_of_voxels(other.hu, other.affine)
    changed = other.hu.copy()
    changed[3, 4, 5] += 1
    assert hash_of_voxels(changed, other.affine) != hash_of_voxels(other.hu, other.affine)


def test_the_manifest_says_who_a_scan_is_of(tmp_path):
    """Files with names of their own, of one patient: without the manifest each would be its own patient."""
    raw = tmp_path / "raw" / "ds"
    for number in range(6):
        scan_of(raw, f"s{number}", number)
    rows = "".join(f"s{number}.nii.gz,Clear.,p{number // 2}\n" for number in range(6))
    (tmp_path / "text.csv").write_text("image,report,patient\n" + rows)
    report(tmp_path / "raw", tmp_path / "out", NAMED, text=str(tmp_path / "text.csv"))
    cases = {case.case_id: case for case in prepared.find_cases(tmp_path / "out")}
    assert len({case.patient for case in cases.values()}) == 3
    assert all(cases[f"s{n}"].patient == cases[f"s{n + 1}"].patient for n in (0, 2, 4))
    assert all(cases[f"s{n}"].split == cases[f"s{n + 1}"].split for n in (0, 2, 4))
    assert "p0" not in "".join(file.read_text() for file in (tmp_path / "out").rglob("*.csv"))
    (tmp_path / "two.csv").write_text("image,report,patient\ns0.nii.gz,Clear.,p0\ns0.nii.gz,Clear.,p1\n")
    with pytest.raises(ValueError, match="two patients of case s0"):
        report(tmp_path / "raw", tmp_path / "out", NAMED, text=str(tmp_path / "two.csv"))


@pytest.mark.parametrize("start", range(4))
def test_of_two_people_one_is_always_held_out_and_one_trained_on(tmp_path, start):
    for number in (2 * start, 2 * start + 1):
        series = scans.series(PatientID=f"P{number}", SeriesInstanceUID=f"1.{number}")
        scans.write_series(tmp_path / "raw" / f"folder{number}", series)
    made = report(tmp_path / "raw", tmp_path / "out")
    assert sorted(case.split for case in prepared.find_cases(tmp_path / "out")) == ["train", "val"]
    assert made.splits == {"train": {"cases": 1, "patients": 1}, "val": {"cases": 1, "patients": 1}}
    assert list(lines(made, False))[-1] == "split: train 1 cases of 1 patients, val 1 cases of 1 patients"


def test_what_a_split_table_leaves_open_is_told_and_goes_with_its_patient(tmp_path):
    for number in range(4):
        series = scans.series(PatientID=f"P{number // 2}", SeriesInstanceUID=f"1.{number}")
        scans.write_series(tmp_path / "raw" / "ds" / f"s{number}", series)
    made = report(tmp_path / "raw", tmp_path / "out", NAMED, split={"ds/s0": "val", "s9": "train"})
    sides = {case.case_id: case.split for case in prepared.find_cases(tmp_path / "out")}
    assert sides["s0"] == sides["s1"] == "val" and sides["s2"] == sides["s3"] == "train"
    told = "\n".join(lines(made, False))
    assert "names 1 of 4 cases: 3 went with" in told and "1 names in the split table fit no case" in told
    assert made.as_json()["notes"] == list(made.notes)
