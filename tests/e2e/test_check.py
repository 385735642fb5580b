"""`check`: what is wrong with a prepared dataset, a folder of scans with text, or a manifest."""

import numpy as np
import pytest

from app.check import check
from app.dataset import prepared
from app.training.data import preprocessing
from tests import scans
from tests.cohorts import SMALL, raw_cohort, report


def test_check_tells_what_is_wrong(tmp_path):
    raw = raw_cohort(tmp_path / "raw", 2)
    report(
        raw, tmp_path / "out", SMALL._replace(keep_names=True), split={"scan0.nii.gz": "val", "scan1.nii.gz": "train"}
    )
    good = check(tmp_path / "out")
    assert good.problems == () and good.exit_status == 0
    assert [row["shape"] for row in good.rows] == [[24, 24, 24]] * 3
    assert all(row["points"] > 100 and 0 < row["foreground"] < 1 for row in good.rows)
    folder = tmp_path / "out" / "hospital"
    (folder / "processed" / "scan0" / "ct_normalized_24.npy").write_bytes(b"broken")
    for file in (folder / "processed" / "scan1" / "windows").glob("*.npy"):
        np.save(file, np.zeros((3, 3, 3), np.uint8))
    text = (folder / "metadata.csv").read_text().splitlines()
    same = [",".join([*line.split(",")[:1], "same", *line.split(",")[2:]]) for line in text[1:]]
    (folder / "metadata.csv").write_text("\n".join([text[0], *same]) + "\n")
    bad = check(tmp_path / "out")
    assert {p.code for p in bad.problems} == {"UNREADABLE", "SPLIT_LEAKAGE"} and bad.exit_status == 3
    assert next(p for p in bad.problems if p.code == "UNREADABLE").cases == ("scan0", "scan1")
    (tmp_path / "out" / "abroad").mkdir()
    table = "source,status,codes,message,remedy\nx,refused,NOT_HU,m,r\n"
    (tmp_path / "out" / "abroad" / "failures.csv").write_text(table)
    refused = next(p for p in check(tmp_path / "out").problems if p.code == "INPUTS_REFUSED")
    assert "1 inputs" in refused.message and "NOT_HU 1" in refused.message
    few = check(tmp_path / "out", min_points=10**6)
    assert "UNDER_MIN_POINTS" in {p.code for p in few.problems}


def test_check_counts_the_points_that_will_train_and_knows_its_windows(tmp_path):
    report(raw_cohort(tmp_path / "raw", 1), tmp_path / "out", SMALL._replace(keep_names=True))
    chain = preprocessing(resolution=80, spacing=5.0)
    for case, row in zip(
        prepared.find_cases(tmp_path / "out"), check(tmp_path / "out", preset="tiny").rows, strict=True
    ):
        item = {"image": case.hu(), "affine": case.affine}
        for transform in chain:
            item = transform(item)
        assert (row["points"], row["points_spacing"]) == (len(item["coords"]), 5.0)
    assert check(tmp_path / "out", preset="tiny", spacing=2.5).rows[-1]["points"] > 4 * row["points"]
    with pytest.raises(ValueError, match="lnug"):
        check(tmp_path / "out", windows=("lnug", "bone"))
    with pytest.raises(ValueError, match="preset must be one of"):
        check(tmp_path / "out", preset="basic")


@pytest.mark.parametrize(("split", "code"), [("train", "NO_VALIDATION"), ("val", "NO_TRAINING")])
def test_check_tells_that_a_dataset_of_one_case_cannot_be_trained_on(tmp_path, split, code):
    scans.write_series(tmp_path / "raw" / "one", scans.series())
    report(tmp_path / "raw", tmp_path / "out", split={"one": split})
    assert [problem.code for problem in check(tmp_path / "out").problems] == [code]


def test_check_reads_scans_with_text_beside_them(tmp_path):
    for name in ("a.nii.gz", "a.txt", "b.nii.gz"):
        (tmp_path / name).write_text(f"No nodule in {name}.")
    (tmp_path / "b.txt").touch()
    checked = check(tmp_path)
    assert checked.kind == "manifest" and checked.summary["matched"] == 2
    assert [problem.code for problem in checked.problems] == ["EMPTY_TEXT"]


def test_check_reads_a_manifest(tmp_path):
    scans.nifti_scan(tmp_path / "a.nii")
    (tmp_path / "m.csv").write_text(
        "image,report,split,patient,nodule\n"
        "a.nii,Clear.,train,p1,0\na.nii,Clear.,train,p1,0\nb.nii,Not given.,val,p1,1\n"
    )
    found = check(tmp_path / "m.csv")
    assert {k: found.summary[k] for k in ("rows", "matched", "missing", "duplicated", "empty")} == {
        "rows": 3, "matched": 2, "missing": 1, "duplicated": 1, "empty": 1,
    }  # fmt: skip
    assert {p.code for p in found.problems} == {"SCANS_MISSING", "DUPLICATED", "EMPTY_TEXT", "SPLIT_LEAKAGE"}
    assert found.summary["labels"] == {"nodule": 1}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.nii").touch()
    assert check(tmp_path / "m.csv", image_root=str(tmp_path / "elsewhere")).summary["missing"] == 0
    with pytest.raises(ValueError, match="column"):
        (tmp_path / "w.csv").write_text("x,y\n1,2\n")
        check(tmp_path / "w.csv")
