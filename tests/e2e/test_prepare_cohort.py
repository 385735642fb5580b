"""A mixed cohort through `prepare`: layout, report, ids, text, privacy."""

import csv
import json
import os
import re
import shutil
import stat
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from app.dataset import prepared
from app.prepare import names, options
from app.shared.workers import only_run
from tests import scans
from tests.cohorts import AFFINE, SMALL, raw_cohort, report, tree


def test_layout_and_sidecar_are_the_contract(tmp_path):
    result = report(raw_cohort(tmp_path / "raw"), tmp_path / "out", SMALL._replace(keep_names=True))
    assert (result.count("ok"), result.exit_status) == (4, 0)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["clinic", "hospital"]
    folder = tmp_path / "out" / "hospital" / "processed" / "scan1"
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "case.json",
        "ct_normalized_24.npy",
        "windows/bone_w1500_l300.npy",
        "windows/brain_w80_l35.npy",
        "windows/lung_w1500_l-600.npy",
        "windows/soft_tissue_w400_l50.npy",
    ]
    hu = np.load(folder / "ct_normalized_24.npy")
    assert hu.dtype == np.int16 and hu.shape == (24, 24, 24)
    bone = np.load(folder / "windows" / "bone_w1500_l300.npy")
    assert bone.dtype == np.uint8
    np.testing.assert_array_equal(bone, np.rint(np.clip((hu - (300.0 - 750)) / 1500, 0, 1) * 255))
    side = json.loads((folder / "case.json").read_text())
    assert side["codes"] == ["OK"] and side["source_shape"] == [36, 32, 28] and side["spacing"] == [6, 6, 6]
    middle = np.array(side["affine"]) @ [11.5, 11.5, 11.5, 1]
    np.testing.assert_allclose(middle[:3], (1, 1, 1), atol=1e-4)
    with open(tmp_path / "out" / "hospital" / "metadata.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["case_id"] for row in rows] == ["scan0", "scan1", "scan2"]
    assert {row["status"] for row in rows} == {"ok"} and {row["split"] for row in rows} <= {"train", "val"}
    failures = (tmp_path / "out" / "hospital" / "failures.csv").read_text().splitlines()
    assert len(failures) == 1
    config = json.loads((tmp_path / "out" / "hospital" / "dataset_config.json").read_text())
    assert config["size"] == 24 and config["windows"]["lung"] == [1500, -600]


def test_command_line_reports_refusals_in_one_json_object(tmp_path):
    raw = raw_cohort(tmp_path / "raw", 1)
    scans.write_nifti(raw / "hospital" / "mr.nii", AFFINE, np.abs(scans.sample(AFFINE, (36, 32, 28))))
    (raw / "hospital" / "notes.txt").write_text("text")
    command = [
        sys.executable,
        "-m",
        "app",
        "prepare",
        str(raw),
        str(tmp_path / "out"),
        "--size",
        "24",
        "--spacing",
        "6",
    ]
    done = subprocess.run([*command, "--json", "--workers", "2"], capture_output=True, text=True, check=False)
    assert re.search(
        r"^\d cases: at most \S+ GB of disk \(8.3e-05 GB a case\), \S+ GB are free; about ", done.stderr, re.M
    )
    assert done.returncode == 3, done.stderr
    told = json.loads(done.stdout)
    assert {k: told[k] for k in ("ok", "skipped", "refused", "failed")} == {
        "ok": 2,
        "skipped": 1,
        "refused": 1,
        "failed": 0,
    }
    assert set(told["cases"][0]) == {
        "case", "dataset", "source", "status", "codes", "message", "shape", "spacing", "hu_range",
    }  # fmt: skip
    refused = next(c for c in told["cases"] if c["status"] == "refused")
    assert refused["source"] == "hospital/mr.nii" and refused["codes"] == ["NOT_HU"] and refused["shape"] is None
    ok = next(c for c in told["cases"] if c["source"] == "clinic/one")
    assert ok["codes"] == ["OK"] and ok["shape"] == [24, 24, 24] and ok["spacing"] == [6, 6, 6]
    wrong = subprocess.run([*command, "--windows", "no_such"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "no_such" in wrong.stderr and "Traceback" not in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1
    missing = [*command[:4], str(tmp_path / "nowhere"), str(tmp_path / "out2"), "--json"]
    wrong = subprocess.run(missing, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "error" in json.loads(wrong.stdout)


def test_file_names_may_hold_anything_and_datasets_are_folders_or_all_of_raw(tmp_path):
    name = os.fsdecode(b"sc\xffan,\n1.nii.gz")
    scans.nifti_scan(tmp_path / "raw" / "plain.nii.gz")
    (tmp_path / "raw" / "plain.nii.gz").rename(tmp_path / "raw" / name)
    scans.nifti_scan(tmp_path / "raw" / "masks of 1999" / "deep" / "other.nii")
    for _ in range(2):  # the table of the first run is read by the second
        result = report(tmp_path / "raw", tmp_path / "out")
        assert result.count("ok") == 2 and len({o.dataset for o in result.outcomes}) == 1
    json.dumps(result.as_json()).encode()


def test_each_folder_below_raw_is_a_dataset_even_where_it_is_one_series(tmp_path):
    scans.write_series(tmp_path / "raw" / "one", scans.series())
    scans.write_series(tmp_path / "raw" / "two" / "deep" / "er", scans.series(SeriesInstanceUID="1.5"))
    scans.write_series(tmp_path / "raw" / "few", scans.series()[:3])
    result = report(tmp_path / "raw", tmp_path / "out", SMALL._replace(keep_names=True))
    assert [(o.dataset, o.case, o.source, o.status) for o in result.outcomes] == [
        ("few", "few", "few", "refused"),
        ("one", "one", "one", "ok"),
        ("two", "deep_er", "two/deep/er", "ok"),
    ]
    assert "few,refused,TOO_FEW_SLICES" in (tmp_path / "out" / "few" / "failures.csv").read_text()
    whole = report(tmp_path / "raw" / "one", tmp_path / "out1", SMALL._replace(keep_names=True))
    assert [(o.dataset, o.case) for o in whole.outcomes] == [("one", "one")]


def test_a_second_run_on_the_same_output_waits_its_turn(tmp_path):
    raw = raw_cohort(tmp_path / "raw", 1)
    with only_run(tmp_path / "out"), pytest.raises(ValueError, match="another run is writing"):
        report(raw, tmp_path / "out")
    assert report(raw, tmp_path / "out").count("ok") == 2


def test_a_scan_that_only_its_name_calls_a_label_is_a_scan(tmp_path):
    scans.nifti_scan(tmp_path / "raw" / "ds" / "patient_mask_off.nii")
    assert report(tmp_path / "raw", tmp_path / "out").count("ok") == 1


def test_nothing_but_text_is_no_cases(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.txt").write_text("x")
    result = report(tmp_path / "raw", tmp_path / "out")
    assert result.exit_status == 3 and result.outcomes[0].codes == ("NO_CASES",)


def test_same_input_and_key_give_the_same_bytes_and_a_rerun_does_nothing(tmp_path):
    raw = raw_cohort(tmp_path / "raw", 2)
    (tmp_path / "key").write_text("a key")
    report(raw, tmp_path / "one", key_file=str(tmp_path / "key"))
    report(raw, tmp_path / "two", key_file=str(tmp_path / "key"))
    one = tree(tmp_path / "one")
    assert one == tree(tmp_path / "two")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "one").glob("*/processed/*/*.npy")}
    assert len(times) == 3
    again = report(raw, tmp_path / "one", key_file=str(tmp_path / "key"))
    assert again.count("ok") == 3 and {p: p.stat().st_mtime_ns for p in times} == times
    report(raw, tmp_path / "one", key_file=str(tmp_path / "key"), overwrite=True)
    assert {p: p.stat().st_mtime_ns for p in times} != times and tree(tmp_path / "one") == one
    report(raw, tmp_path / "three", key_file=None)
    assert set(tree(tmp_path / "three")) != set(one)


def test_a_changed_source_is_made_again_and_other_settings_are_refused(tmp_path):
    raw = raw_cohort(tmp_path / "raw", 2)
    report(raw, tmp_path / "out")
    before = tree(tmp_path / "out")
    changed = scans.sample(AFFINE, (36, 32, 28)) + np.int16(7)
    scans.write_nifti(raw / "hospital" / "scan1.nii.gz", AFFINE, changed)
    report(raw, tmp_path / "out")
    after = tree(tmp_path / "out")
    assert set(after) == set(before)
    assert sum(after[k] != before[k] for k in after if k.endswith("case.json")) == 1
    with pytest.raises(ValueError, match="another size"):
        report(raw, tmp_path / "out", SMALL._replace(size=32))


@pytest.mark.parametrize("where", ["raw/out", "."])
def test_raw_and_out_must_lie_apart(tmp_path, where):
    raw_cohort(tmp_path / "raw", 1)
    with pytest.raises(ValueError, match="RAW and OUT"):
        report(tmp_path / "raw", tmp_path / where)


def test_ids_are_keyed_hashes_and_the_table_is_its_owners(tmp_path):
    result = report(raw_cohort(tmp_path / "raw"), tmp_path / "out")
    table = names.file_beside(tmp_path / "out", "sources.csv")
    key = names.file_beside(tmp_path / "out", "key")
    for path in (table, key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with open(table, newline="") as stream:
        rows = {(r["dataset"], r["case"]): r["source"] for r in csv.DictReader(stream)}
    assert rows == {(o.dataset, o.case): o.source for o in result.outcomes}
    assert all(len(o.case) == 16 and int(o.case, 16) for o in result.outcomes)


def test_the_table_keeps_what_earlier_runs_wrote_also_of_a_dataset_called_dataset(tmp_path):
    names.write_sources(tmp_path / "out", [("dataset", "one", "dataset/one.nii")])
    table = names.write_sources(tmp_path / "out", [("dataset", "two", "dataset/two.nii")])
    assert table.read_text().splitlines() == [
        "dataset,case,source",
        "dataset,one,dataset/one.nii",
        "dataset,two,dataset/two.nii",
    ]


# ---- formats, text, split


def test_zarr_holds_the_same_volume_and_gives_the_same_windows(tmp_path):
    raw = raw_cohort(tmp_path / "raw", 1)
    report(raw, tmp_path / "npy", key_file=None)
    report(
        raw,
        tmp_path / "zarr",
        SMALL._replace(file_format="zarr"),
        key_file=str(names.file_beside(tmp_path / "npy", "key")),
    )
    cases = zip(prepared.find_cases(tmp_path / "npy"), prepared.find_cases(tmp_path / "zarr"), strict=True)
    for plain, packed in cases:
        assert plain.case_id == packed.case_id and not list(packed.path.rglob("*.npy"))
        np.testing.assert_array_equal(plain.hu(), packed.hu())
        for name in plain.window_names():
            np.testing.assert_array_equal(plain.window(name), packed.window(name))


def test_text_and_split_are_joined_to_cases(tmp_path):
    raw = raw_cohort(tmp_path / "raw")
    (tmp_path / "text.csv").write_text(
        "VolumeName,Findings_EN,PatientName\n"
        "scan0.nii.gz,No nodule.,Jane\nscan2.nii.gz,A nodule.,Jane\nscan9.nii.gz,x,Jane\n"
    )
    (tmp_path / "split.csv").write_text("image,split\nscan0.nii.gz,val\nhospital/scan1.nii.gz,train\nP1,val\n")
    split = options.read_split(str(tmp_path / "split.csv"))
    result = report(raw, tmp_path / "out", text=str(tmp_path / "text.csv"), split=split)
    ids = {o.case: o.source for o in result.outcomes}
    (file,) = (tmp_path / "out").glob("*/text.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(ids[r.pop("case_id")], r) for r in rows] == [
        ("hospital/scan0.nii.gz", {"report": "No nodule."}),
        ("hospital/scan2.nii.gz", {"report": "A nodule."}),
    ]
    sides = {ids[c.case_id]: c.split for c in prepared.find_cases(tmp_path / "out")}
    assert sides["hospital/scan0.nii.gz"] == "val" and sides["hospital/scan1.nii.gz"] == "train"
    assert sides["clinic/one"] == "val"
    (tmp_path / "other.csv").write_text("image,report\nscan9.nii.gz,x\n")
    report(raw, tmp_path / "out", text=str(tmp_path / "other.csv"), split=split)
    assert not file.exists(), "a text that joins nothing leaves none of another"


def test_a_report_is_never_joined_to_another_patient_s_scan_of_the_same_name(tmp_path):
    raw, affine = tmp_path / "raw", AFFINE
    scans.write_nifti(raw / "good" / "ct.nii.gz", affine, scans.sample(affine, (36, 32, 28)))
    scans.write_nifti(raw / "bad" / "ct.nii.gz", affine, scans.sample(affine, (36, 32, 28)).clip(0, 200))
    for images, joined in (
        (["good/ct.nii.gz", "bad/ct.nii.gz"], 1),  # refused: no other scan takes its report
        (["bad/ct.nii.gz"], 0),
        (["bad/ct.nii.gz", "ct.nii.gz"], 0),
        (["/old/good/ct.nii.gz", "gone/ct.nii.gz"], 1),
        (["other/good/ct.nii.gz", "gone/ct.nii.gz"], 0),
        (["raw/good/ct.nii.gz"], 1),
    ):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "text.csv").write_text("image,report\n" + "".join(f"{image},{image}\n" for image in images))
        report(raw, tmp_path / "out", text=str(tmp_path / "text.csv"))
        texts = [json.loads(line) for file in (tmp_path / "out").glob("*/text.jsonl") for line in file.open()]
        assert len(texts) == joined and all("good/" in text["report"] for text in texts)


def test_a_report_of_another_site_is_not_joined_to_the_only_scan_of_that_name(tmp_path):
    scans.write_nifti(tmp_path / "siteB" / "x.nii.gz", AFFINE, scans.sample(AFFINE, (36, 32, 28)))
    for raw in (tmp_path / "siteB", tmp_path / "siteB" / "x.nii.gz"):
        for image, joined in (("siteA/x.nii.gz", 0), ("siteB/x.nii.gz", 1), ("x.nii.gz", 1)):
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            (tmp_path / "text.csv").write_text(f"image,report\n{image},Clear.\n")
            report(raw, tmp_path / "out", text=str(tmp_path / "text.csv"))
            assert len(list((tmp_path / "out").glob("*/text.jsonl"))) == joined, (raw, image)


def test_one_patient_is_on_one_side(tmp_path):
    for number in range(6):
        patient = f"P{number % 2}"
        scans.write_series(
            tmp_path / "raw" / "ds" / f"s{number}", scans.series(PatientID=patient, SeriesInstanceUID=f"1.{number}")
        )
    report(tmp_path / "raw", tmp_path / "out")
    cases = prepared.find_cases(tmp_path / "out")
    assert len({c.patient for c in cases}) == 2 and len(cases) == 6


def test_files_without_a_patient_are_split_by_folder_or_by_ct_rate_name(tmp_path):
    for source in ("a/one.nii", "a/two.nii", "b/one.nii", "valid_5_a_1.nii.gz", "valid_5_b_2.nii.gz", "imagesTr/x.nii"):
        scans.nifti_scan(tmp_path / "raw" / "ds" / source)
    scans.nifti_scan(tmp_path / "raw" / "ds" / "imagesTr" / "y.nii")
    result = report(tmp_path / "raw", tmp_path / "out")
    ids = {o.case: o.source.removeprefix("ds/") for o in result.outcomes}
    who = {ids[case.case_id]: case.patient for case in prepared.find_cases(tmp_path / "out")}
    assert who["a/one.nii"] == who["a/two.nii"] and who["valid_5_a_1.nii.gz"] == who["valid_5_b_2.nii.gz"]
    assert len(set(who.values())) == 5


def test_preview_is_a_picture_a_case(tmp_path):
    report(raw_cohort(tmp_path / "raw", 1), tmp_path / "out", preview=True)
    pictures = sorted((tmp_path / "out").glob("*/previews/*.png"))
    assert [p.stem for p in pictures] == sorted(c.case_id for c in prepared.find_cases(tmp_path / "out")) or len(
        pictures
    ) == 2
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 10_000 for p in pictures)


# ---- privacy

SECRETS = ("Mustermann", "ErikaXQ", "PID778899", "19630517", "NotesOfDrWho")


def test_no_name_id_date_or_free_text_reaches_the_output_or_the_log(tmp_path):
    raw = tmp_path / "raw" / "Mustermann_ErikaXQ" / "19630517"
    planted = {
        "PatientName": "Mustermann^ErikaXQ",
        "PatientID": "PID778899",
        "PatientBirthDate": "19630517",
        "StudyDate": "19630517",
        "StudyDescription": "NotesOfDrWho",
        "SeriesDescription": "NotesOfDrWho",
        "ImageComments": "NotesOfDrWho for Mustermann",
        "AccessionNumber": "PID778899",
        "ConvolutionKernel": "NotesOfDrWho",
    }
    scans.write_series(raw / "good", scans.series(**planted))
    scans.write_series(raw / "gap", scans.series(**planted, SeriesInstanceUID="1.9")[::7])
    scans.write_series(raw / "odd", scans.series(**planted, RescaleType="PID778899"[:16], SeriesInstanceUID="1.8"))
    broken = scans.series(**planted, SeriesInstanceUID="1.7")
    for number, ds in enumerate(broken):
        path = scans.save(ds, raw / "bad" / f"Mustermann{number}")
        path.write_bytes(path.read_bytes()[:-100])
    image = nib.Nifti1Image(scans.sample(AFFINE, (36, 32, 28)), AFFINE)
    image.header["descrip"] = b"Mustermann ErikaXQ 19630517"
    nib.save(image, raw / "PID778899.nii.gz")
    scans.write_nifti(raw / "PID778899_seg.nii.gz", AFFINE, (scans.sample(AFFINE, (36, 32, 28)) > 0).astype(np.uint8))
    scans.write_nifti(raw / "masks" / "Mustermann.nii.gz", AFFINE, np.ones((36, 32, 28), np.uint8))
    data = scans.sample(AFFINE, (36, 32, 28))
    scans.write_nrrd(raw / "ErikaXQ.nrrd", AFFINE, data, content="Mustermann")
    (raw / "NotesOfDrWho.txt").write_text("Mustermann")
    command = [sys.executable, "-m", "app", "prepare", str(tmp_path / "raw"), str(tmp_path / "out"), "--preview"]
    done = subprocess.run(
        [*command, "--size", "24", "--spacing", "6", "--workers", "2"], capture_output=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout.count(b"\nok ") + done.stdout.startswith(b"ok ") == 3
    everything = {"the log": done.stdout + done.stderr}
    for path in (tmp_path / "out").rglob("*"):
        everything[f"name of {path.name}"] = str(path.relative_to(tmp_path / "out")).encode()
        if path.suffix == ".npz":
            with np.load(path) as stored:
                everything[path.name] = str({k: stored[k].tolist() for k in stored.files}).encode()
        elif path.is_file():
            everything[path.name] = path.read_bytes()
    for place, data in everything.items():
        for secret in SECRETS:
            assert secret.lower().encode() not in data.lower(), f"{secret} in {place}"
    table = names.file_beside(tmp_path / "out", "sources.csv").read_text()
    assert "Mustermann" in table  # the way back exists, beside OUT
