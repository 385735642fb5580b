"""A second run of `prepare`, and one that ends early: what is stale, cut short, full or no text."""

import errno
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from app.check import check
from app.dataset import prepared, writer
from app.prepare import case, cohort
from app.shared.refusals import Refused, refusal_of
from app.shared.workers import run_jobs
from app.text.manifests import read_rows
from tests import scans
from tests.cohorts import AFFINE, SMALL, raw_cohort, report, tree


def statuses(out) -> dict[str, str]:
    rows = [row for table in out.glob("*/metadata.csv") for row in prepared.read_metadata(table).values()]
    return {row["case_id"]: row["status"] for row in rows}


def test_a_case_whose_source_lost_a_slice_is_stale(tmp_path):
    raw = raw_cohort(tmp_path / "raw", 1)
    report(raw, tmp_path / "out")
    assert set(statuses(tmp_path / "out").values()) == {"ok"}
    lost = next(iter(sorted((raw / "clinic" / "one").iterdir(), key=lambda f: abs(height(f)))))
    lost.unlink()
    result = report(raw, tmp_path / "out")
    (refused,) = [o for o in result.outcomes if o.status == "refused"]
    after = statuses(tmp_path / "out")
    assert after[refused.case] == "stale" and sorted(after.values()) == ["ok", "stale"]
    checked = check(tmp_path / "out")
    assert [p.cases for p in checked.problems if p.code == "STALE"] == [(refused.case,)] and checked.exit_status == 3


def height(file) -> float:
    import pydicom

    return float(pydicom.dcmread(file, stop_before_pixels=True).ImagePositionPatient[2])


@pytest.mark.parametrize("file_format", ["npy", "zarr"])
def test_a_case_that_is_cut_short_or_lacks_a_file_is_made_again(tmp_path, file_format):
    raw, settings = raw_cohort(tmp_path / "raw", 1), SMALL._replace(file_format=file_format)
    report(raw, tmp_path / "out", settings)
    whole = tree(tmp_path / "out")
    files = [f for f in (tmp_path / "out").rglob("*") if f.is_file() and "processed" in f.parts]
    assert len(files) >= 4
    for file in files:
        for damage in (lambda f: f.unlink(), lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2])):
            damage(file)
            assert report(raw, tmp_path / "out", settings).count("ok") == 2
            assert tree(tmp_path / "out") == whole, file.name


def test_a_damaged_case_of_another_run_does_not_end_this_one(tmp_path):
    raw = raw_cohort(tmp_path / "raw", 2)
    report(raw, tmp_path / "out", SMALL._replace(keep_names=True))
    cases = tmp_path / "out" / "hospital" / "processed"
    (raw / "hospital" / "scan0.nii.gz").unlink()
    (cases / "scan0" / "case.json").write_text("{")
    (cases / "notes.txt").write_text("mine")
    (cases / "mine").mkdir()
    assert report(raw, tmp_path / "out", SMALL._replace(keep_names=True)).count("ok") == 2
    assert statuses(tmp_path / "out") == {"scan0": "damaged", "scan1": "ok", "one": "ok"}
    shutil.rmtree(cases / "mine")
    unread = next(p for p in check(tmp_path / "out").problems if p.code == "UNREADABLE")
    assert unread.cases == ("scan0",)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full", "x"), OSError("9 requested and 4 written")])
def test_a_full_disk_ends_the_run_at_the_first_case(tmp_path, monkeypatch, error):
    """NumPy tells a short write without the error's number."""
    tried = []

    def full(*args, **kwargs):
        tried.append(1)
        raise error

    monkeypatch.setattr(writer, "_write_volume", full)
    with pytest.raises(OSError, match=r".") as ended:
        cohort.prepare(raw_cohort(tmp_path / "raw", 2), tmp_path / "out", SMALL, cohort.Request(workers=1))
    refused = refusal_of(ended.value)
    assert len(tried) == 1 and refused.status == 2 and refused.code == "DISK_FULL"
    assert not list((tmp_path / "out").rglob(".*"))


def test_a_full_disk_under_worker_processes_begins_no_more_cases(tmp_path):
    with pytest.raises(OSError, match="full"):
        run_jobs(full_disk, [str(tmp_path / str(n)) for n in range(40)], failed=lambda job: job, workers=2)
    assert 1 <= len(list(tmp_path.iterdir())) < 20


def full_disk(begun: str) -> str:
    Path(begun).touch()
    time.sleep(0.1)
    raise OSError(errno.ENOSPC, "full")


def test_half_a_character_in_a_report_is_written_as_unknown(tmp_path):
    raw = raw_cohort(tmp_path / "raw", 1)
    lines = [{"image": "scan0.nii.gz", "report": "Clear \ud83d. \ud83d\ude00"}, {"image": "one", "findings": "\udc00x"}]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "text.json").write_text(json.dumps({"train": lines}))
    said = {"Clear \ufffd. \U0001f600", "\ufffdx"}
    for name in ("text.jsonl", "text.json"):
        assert {row.answer for row in read_rows(tmp_path / name)} == said
        report(raw, tmp_path / "out", text=str(tmp_path / name))
        texts = [json.loads(t) for file in (tmp_path / "out").glob("*/text.jsonl") for t in file.open(encoding="utf-8")]
        assert {text["report"] for text in texts} == said


def test_a_refused_file_whose_name_is_no_text_is_listed_with_names_kept(tmp_path):
    raw = tmp_path / "raw" / "ds"
    scans.write_nifti(raw / "good.nii.gz", AFFINE, scans.sample(AFFINE, (36, 32, 28)))
    (raw / "bad\udcff.nii").write_bytes(b"x" * 400)
    report(tmp_path / "raw", tmp_path / "out", SMALL._replace(keep_names=True))
    table = (tmp_path / "out" / "ds" / "failures.csv").read_text(encoding="utf-8")
    assert "bad\\udcff.nii" in table
    assert np.asarray(prepared.find_cases(tmp_path / "out")[0].hu()).shape == (24, 24, 24)


def test_a_dataset_begun_by_another_version_of_the_resampler_is_refused_or_made_again_whole(tmp_path, monkeypatch):
    raw, out = raw_cohort(tmp_path / "raw", 2), tmp_path / "out"
    named = SMALL._replace(keep_names=True)
    report(raw, out, named)
    whole = tree(out)
    monkeypatch.setattr(case, "RESAMPLER", "triangle 2")
    with pytest.raises(Refused, match=r"prepared with another resampler.*--overwrite"):
        report(raw, out, named)
    assert tree(out) == whole
    (raw / "hospital" / "scan0.nii.gz").rename(tmp_path / "elsewhere.nii.gz")
    with pytest.raises(Refused, match=r"RAW does not give 1 of its cases \(scan0"):
        report(raw, out, named, overwrite=True)
    (tmp_path / "elsewhere.nii.gz").rename(raw / "hospital" / "scan0.nii.gz")
    assert report(raw, out, named, overwrite=True).count("ok") == 3
    assert {case.sidecar["resampler"] for case in prepared.find_cases(out)} == {"triangle 2"}


def test_a_dataset_from_before_the_resampler_was_recorded_is_made_again_whole(tmp_path):
    raw, out = raw_cohort(tmp_path / "raw", 1), tmp_path / "out"
    report(raw, out)
    whole = tree(out)
    for file in out.glob("*/processed/*/case.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "recipe": "of other code", "resampler": ""}))
    for file in out.glob("*/dataset_config.json"):
        config = json.loads(file.read_text())
        del config["settings"]["resampler"]
        file.write_text(json.dumps(config))
    assert report(raw, out).count("ok") == 2 and tree(out) == whole
