"""Data that a run cannot train on: one line that names them, and what it does without."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from app.training import checkpoints, seals
from tests.runs import STEPS, assert_refused, make_cohort, run_in, snapshot


def test_a_missing_folder_of_data(run_bundle):
    assert_refused(
        run_bundle(dataset_dir="nowhere", output_dir="out"),
        code="[A-Z_]+",
        naming=["nowhere", "prepare"],
    )


def test_an_empty_folder_of_data(run_bundle, place):
    (place / "empty").mkdir()
    assert_refused(run_bundle(dataset_dir="empty", output_dir="out"), code="[A-Z_]+", naming=["empty", "prepare"])


def test_bad_data_leaves_an_earlier_run_in_its_place(earlier, place):
    before = snapshot(earlier)
    assert_refused(run_in(place, dataset_dir="nowhere", output_dir="out", **STEPS), code="[A-Z_]+")
    assert snapshot(earlier) == before
    assert not (place / "out.1").exists()


def test_a_case_without_the_asked_window(run_bundle, place):
    data = make_cohort(place / "old")
    for case in (data / "processed").iterdir():  # an older tree: windows only
        (case / "case.json").unlink()
        next((case / "windows").glob("brain*")).unlink()
    end = run_bundle(dataset_dir=data, output_dir="out", windows="['lung','brain']")
    assert_refused(end, code="[A-Z_]+", naming=["brain", "case_0", "lung"])


@pytest.mark.parametrize("workers", [0, 2])
def test_constant_features(run_bundle, place, workers):
    data = make_cohort(place / "flat", change=lambda hu, index: np.full_like(hu, 40))
    end = run_bundle(dataset_dir=data, output_dir="out", window_type="lung", num_workers=workers, **STEPS)
    assert_refused(end, code="[A-Z_]+", naming=["constant", "case_"])


def spoil(case, how):
    """One case of a dataset damaged; what the refusal has to name."""
    volume, side = next(case.glob("ct_normalized_*")), case / "case.json"
    if how == "volume cut short":
        volume.write_bytes(volume.read_bytes()[:5000])
    if how == "volume of text":
        volume.write_text("hello")
    if how == "volume of two axes":
        np.save(volume, np.zeros((24, 24), np.int16))
    if how == "volume of floats":
        np.save(volume, np.full((24, 24, 24), np.nan, np.float32))
    if how == "sidecar cut short":
        side.write_text(side.read_text()[:40])
    if how == "sidecar of a list":
        side.write_text("[]")
    if how == "affine of zeros":
        side.write_text(json.dumps({**json.loads(side.read_text()), "affine": [[0] * 4] * 4}))
    if how == "shape of nothing":
        side.write_text(json.dumps({**json.loads(side.read_text()), "shape": None}))
    if how == "volume gone":
        volume.unlink()
    return [case.name, volume.name if how.startswith("volume") else side.name, "Prepare the case again"]


@pytest.mark.parametrize(
    "how",
    [
        *("volume cut short", "volume of text", "volume of two axes", "volume of floats", "volume gone"),
        *("sidecar cut short", "sidecar of a list", "affine of zeros", "shape of nothing"),
    ],
)
def test_a_damaged_case(run_bundle, place, cohort, how):
    data = place / "damaged"
    shutil.copytree(cohort, data)
    naming = spoil(data / "processed" / "case_0", how)
    end = run_bundle(dataset_dir=data, output_dir="out", num_workers=0, **STEPS)
    assert_refused(end, code="DAMAGED_CASE", naming=naming)


def test_a_table_of_cases_that_is_no_text(run_bundle, place, cohort):
    data = place / "damaged"
    shutil.copytree(cohort, data)
    (data / "metadata.csv").write_bytes(b"\xff\xfe\x00")
    end = run_bundle(dataset_dir=data, output_dir="out", **STEPS)
    assert_refused(end, code="DAMAGED_CASE", naming=["metadata.csv", "UTF-8"])


def test_a_cache_that_cannot_be_written_is_done_without(run_bundle, place, cohort):
    data = place / "full"
    shutil.copytree(cohort, data, ignore=shutil.ignore_patterns(".cache"))
    (data / ".cache").write_text("x")
    end = run_bundle(dataset_dir=data, output_dir="out", **{**STEPS, "warmup_steps": 2, "max_steps": 1})
    assert end.status == 0 and "cannot be written" in end.out, end.err


def test_fewer_points_than_min_points_everywhere(run_bundle, cohort):
    end = run_bundle(dataset_dir=cohort, output_dir="out", min_points=1_000_000, **STEPS)
    assert_refused(end, code="[A-Z_]+", naming=["min_points", "1000000"])


def shrunk(hu):
    """A body of 27 voxels."""
    small = np.full_like(hu, -1000)
    small[10:13, 10:13, 10:13] = hu[10:13, 10:13, 10:13].clip(0, 80)
    return small


def test_one_small_case_is_skipped_and_the_rest_trains(run_bundle, place):
    data = make_cohort(place / "mixed", change=lambda hu, index: shrunk(hu) if index == 1 else hu)
    end = run_bundle(dataset_dir=data, output_dir="out", **{**STEPS, "warmup_steps": 4, "max_steps": 4})
    assert end.status == 0, end.err
    assert re.search(r"Skipped case_1: \d+ points, min_points 100", end.out)


def test_all_validation_cases_too_small(run_bundle, place):
    data = make_cohort(place / "mixed", change=lambda hu, index: shrunk(hu) if index > 2 else hu)
    end = run_bundle(dataset_dir=data, output_dir="out", **STEPS)
    assert_refused(end, code="[A-Z_]+", naming=["val", "min_points"])
    assert "Warm-up" not in end.out


def test_too_many_codes_for_the_data(run_bundle, cohort):
    end = run_bundle(dataset_dir=cohort, output_dir="out", num_embeddings=100_000, warmup_steps=1, max_steps=1)
    assert_refused(end, code="TOO_LITTLE_DATA", naming=["100000", "num_embeddings"])


def test_an_encoder_that_gives_the_same_everywhere(earlier, place, cohort):
    file = checkpoints.averaged_file(earlier)
    state = torch.load(file, weights_only=True)
    for name in ("out_layer", "components"):
        state[f"encoder.{name}.weight"].zero_()
    torch.save(seals.sealed(state), place / "flat.pt")
    end = run_in(place, dataset_dir=cohort, output_dir="next", pretrained_vae_path="flat.pt", **STEPS)
    assert_refused(end, code="CONSTANT_ENCODER", naming=["pretrained_vae_path"])
