"""Phantoms: right HU in the right place, findings where and as large as they are said to be, the same for a seed."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy import ndimage

from app.dataset.prepared import find_cases
from app.phantoms import anatomy, phantoms
from app.phantoms.phantoms import ensure_cohort, make_phantom
from transforms.body import body_mask

SEEDS = range(12)
SIDES = {"right": 1.0, "left": -1.0}  # the sign of x in RAS, said again


@pytest.fixture(scope="module")
def cohort() -> list[phantoms.Phantom]:
    return [make_phantom(seed, size=64, spacing=6.0) for seed in SEEDS]


def world(phantom: phantoms.Phantom) -> tuple[np.ndarray, ...]:
    index = np.indices(phantom.hu.shape)
    return tuple(phantom.affine[a, a] * index[a] + phantom.affine[a, 3] for a in range(3))


def test_a_seed_is_a_patient_and_another_seed_another(cohort):
    again = make_phantom(3, size=64, spacing=6.0)
    assert np.array_equal(again.hu, cohort[3].hu) and again.findings == cohort[3].findings
    assert np.mean(cohort[3].hu != cohort[4].hu) > 0.5


def test_values_are_hu_of_the_tissues(cohort):
    for phantom in cohort:
        body = body_mask(phantom.hu, spacing=6.0)
        inside = phantom.hu[body]
        assert phantom.hu.dtype == np.int16 and 0.2 < body.mean() < 0.55
        assert np.abs(np.median(phantom.hu[~body]) + 1000) < 15
        shares = {
            "lung": np.mean((inside > -950) & (inside < -700)),
            "fat": np.mean((inside > -160) & (inside < -50)),
            "soft": np.mean((inside > 0) & (inside < 200)),
            "bone": np.mean(inside > 250),
        }
        assert shares["lung"] > 0.06 and shares["fat"] > 0.08 and shares["soft"] > 0.3 and 0.004 < shares["bone"] < 0.12


def test_patients_differ_in_ways_that_matter(cohort):
    volumes = [body_mask(p.hu, spacing=6.0).sum() for p in cohort]
    assert max(volumes) > 1.3 * min(volumes)
    hearts = []
    for phantom in cohort:
        _, y, z = world(phantom)
        x = world(phantom)[0]
        hearts.append(np.median(phantom.hu[(np.abs(x + 25) < 20) & (np.abs(y - 30) < 20) & (np.abs(z - 45) < 20)]))
    assert max(hearts) - min(hearts) > 40  # with and without contrast medium


def test_the_liver_lies_right_and_the_heart_left(cohort):
    """Right is +x in RAS: soft tissue under the right dome, the heart's bulk on the left of the midline."""
    for phantom in cohort:
        x, y, z = world(phantom)
        soft = (phantom.hu > 20) & (phantom.hu < 250)
        band = (z > -60) & (z < -20) & (np.abs(y) < 60) & (np.abs(x) > 35) & (np.abs(x) < 100)
        assert soft[band & (x > 0)].mean() > soft[band & (x < 0)].mean() + 0.1
        chest = (z > 30) & (z < 70) & (y > 0) & (y < 70) & (np.abs(x) < 90)
        assert soft[chest & (x < 0)].sum() > 1.3 * soft[chest & (x > 0)].sum()


def painted(seed: int, monkeypatch, paint) -> tuple[phantoms.Phantom, dict, np.ndarray]:
    """A patient with findings of one kind on one side only: the phantom, what is said, and the voxels it changed."""
    said, changed = {}, []

    def watched(canvas, build, torso, side):
        before = canvas.hu.copy()
        said.update(paint(canvas, build, torso, side))
        changed.append(np.abs(canvas.hu - before) > 60)
        return said

    monkeypatch.setattr(phantoms, "PAINTERS", (watched,))
    monkeypatch.setattr(phantoms, "SIGN_OF_X", dict([list(anatomy.SIGN_OF_X.items())[seed % 2]]))
    return make_phantom(seed, size=64, spacing=6.0), said, np.logical_or.reduce(changed) if changed else np.zeros(0)


def test_an_effusion_is_on_its_side_behind_the_lung_and_as_large_as_said(monkeypatch):
    sizes = set()
    for seed in range(12):
        phantom, said, mask = painted(seed, monkeypatch, phantoms.paint_effusion)
        if not said:
            continue
        x, y, _ = world(phantom)
        assert np.median(SIDES[said["side"]] * x[mask]) > 30 and np.median(y[mask]) < -20
        assert 0.75 * said["volume_ml"] < mask.sum() * 6.0**3 / 1000 < 1.25 * said["volume_ml"] + 20
        sizes.add(said["size"])
    assert len(sizes) >= 2


@pytest.mark.parametrize("paint", [phantoms.paint_nodules, phantoms.paint_stones])
def test_nodules_and_stones_are_on_their_side_as_many_and_as_large_as_said(monkeypatch, paint):
    seen = 0
    for seed in range(12):
        phantom, said, mask = painted(seed, monkeypatch, paint)
        if not said:
            continue
        seen += 1
        assert np.median(SIDES[said["side"]] * world(phantom)[0][mask]) > 20  # right is +x
        labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
        assert count == said["count"] == len(said["size_mm"]) == len(said["center_mm"])
        found = sorted((6 / np.pi * 6.0**3 * np.bincount(labels.ravel())[1:]) ** (1 / 3))
        assert np.allclose(found, sorted(said["size_mm"]), rtol=0.35, atol=5)
        middles = np.array(ndimage.center_of_mass(mask, labels, range(1, count + 1)))
        middles = middles * 6.0 + phantom.affine[:3, 3]
        off = np.linalg.norm(middles[:, None] - np.array(said["center_mm"]), axis=-1).min(1)
        assert off.max() < 3, "places are told as they lie in the scan, pose and warp undone"
    assert seen >= 3


def test_every_finding_and_its_absence_occur_on_both_sides():
    said = [{(f["finding"], f["side"]) for f in make_phantom(s, size=32, spacing=12.0).findings} for s in range(40)]
    for finding in ("nodule", "pleural effusion", "kidney stone"):
        for side in SIDES:
            share = np.mean([(finding, side) in findings for findings in said])
            assert 0.1 < share < 0.7


def test_findings_can_be_written_as_json(cohort):
    for phantom in cohort:
        assert json.loads(json.dumps(phantom.findings)) == phantom.findings
        for finding in phantom.findings:
            assert set(finding) >= {"finding", "organ", "side", "count", "size_mm", "center_mm"}


# ---- the cohort on disk


@pytest.fixture
def small(monkeypatch):
    """Phantoms of 24 voxels: what is tested is the folder."""
    real = phantoms.make_phantom
    calls = []

    def make(seed):
        calls.append(seed)
        return real(seed, size=24, spacing=16.0)

    monkeypatch.setattr(phantoms, "make_phantom", make)
    return calls


def test_a_cohort_is_made_once_whole_and_with_its_findings(tmp_path, small):
    out = tmp_path / "deep" / "phantoms"
    ensure_cohort(out, num_train=3, num_val=2, seed=1)
    assert [c.case_id for c in find_cases(out, split="val")] == ["phantom_0003", "phantom_0004"]
    assert len(find_cases(out, split="train")) == 3
    findings = json.loads((out / "findings.json").read_text())
    assert sorted(findings) == [c.case_id for c in find_cases(out)]
    assert len(small) == 5
    ensure_cohort(out, num_train=3, num_val=2, seed=1)
    assert len(small) == 5  # nothing made again
    assert [p.name for p in out.parent.iterdir()] == ["phantoms"]
    ensure_cohort(out, num_train=1, num_val=1, seed=1)
    assert len(find_cases(out)) == 2 and [p.name for p in out.parent.iterdir()] == ["phantoms"]


def test_phantoms_pass_the_gate_untouched_as_files_and_as_a_dicom_series(tmp_path, small):
    out = ensure_cohort(tmp_path / "p", num_train=2, num_val=1)
    assert sorted(p.name for p in (out / "raw").iterdir()) == [
        "phantom_0000.nii.gz",
        "phantom_0001.nii.gz",
        "phantom_0002",
    ]
    assert len(list((out / "raw" / "phantom_0002").glob("*.dcm"))) > 20
    for number, case in enumerate(find_cases(out)):
        phantom = phantoms.make_phantom(number)
        np.testing.assert_array_equal(case.hu(), phantom.hu)
        np.testing.assert_allclose(case.affine, phantom.affine, atol=1e-6)
        assert case.codes == ["OK"]


def test_no_two_cases_of_a_cohort_are_alike(tmp_path, small):
    cases = find_cases(ensure_cohort(tmp_path / "p", num_train=3, num_val=3))
    assert len({case.hu().tobytes() for case in cases}) == 6


def test_a_cohort_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch, small):
    def broken(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(phantoms.writer, "write_metadata", broken)
    with pytest.raises(OSError, match="No space left"):
        ensure_cohort(tmp_path / "p", num_train=1, num_val=1)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="no phantom cohort; give the phantoms another folder"):
        ensure_cohort(tmp_path, num_train=1, num_val=1)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_rank_zero_makes_the_cohort_and_the_others_wait(tmp_path, monkeypatch, small):
    rank = threading.local()
    monkeypatch.setattr(phantoms.idist, "get_rank", lambda: rank.number)
    monkeypatch.setattr(phantoms, "WAIT", 20)

    def run(number: int) -> int:
        rank.number = number
        return len(find_cases(ensure_cohort(tmp_path / "p", num_train=2, num_val=1)))

    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(run, 1)
        time.sleep(0.5)
        assert not small and not waiting.done()
        assert [pool.submit(run, 0).result(), waiting.result()] == [3, 3]
    assert len(small) == 3
