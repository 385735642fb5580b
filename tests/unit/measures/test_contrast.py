"""The contrast of findings: whole for a perfect copy, nothing where one is gone; what a probe of tokens finds."""

import numpy as np
import pytest

from app.phantoms.phantoms import make_phantom
from tests.benchmarks import bench_findings
from tests.benchmarks.bench_findings import (
    Cells,
    contrasts,
    hidden,
    in_kidney,
    in_lung,
    linear,
    probe,
    share_kept,
)
from transforms import Resampled


@pytest.fixture(scope="module")
def phantom():
    return next(p for p in map(make_phantom, range(50)) if any(f["finding"] == "nodule" for f in p.findings))


@pytest.mark.parametrize("left", [1.0, 0.5, 0.0])
def test_what_is_left_of_a_nodule_is_told(phantom, left):
    item = Resampled("image", spacing=6.0, grid=64)({"image": phantom.hu, "affine": phantom.affine})
    truth, affine = item["image"].astype(np.float32), item["affine"]
    index = np.stack(np.meshgrid(*[np.arange(64)] * 3, indexing="ij"), -1)
    made = truth.copy()
    nodules = [f for f in phantom.findings if f["finding"] == "nodule"]
    for nodule in nodules:
        for size, centre in zip(nodule["size_mm"], nodule["center_mm"], strict=True):
            away = 6 * np.linalg.norm(index - (np.linalg.inv(affine) @ [*centre, 1])[:3], axis=-1)
            near = away <= size / 2 + 6
            lung = truth[(away > size / 2 + 9) & (away < size / 2 + 23) & (truth > -1100) & (truth < -500)].mean()
            made[near] = lung + left * (truth[near] - lung)
    rows = [row for row in contrasts(phantom, truth, made, affine) if row.finding == "nodule"]
    assert len(rows) == sum(nodule["count"] for nodule in nodules)
    assert all(row.truth > 400 for row in rows)
    assert share_kept(rows) == pytest.approx(left, abs=0.02)


def made_cells(rng, signal):
    """Phantoms of 40 cells without a place; of every second one a cell of the right side holds a finding."""
    cases = []
    for number in range(40):
        vectors = rng.standard_normal((40, 6)).astype(np.float32)
        holds = np.zeros(40, bool)
        holds[number % 20] = number % 2 == 0
        vectors[holds] = signal(vectors[holds])
        cases.append(Cells(vectors, np.arange(40) < 20, holds, holds, (number % 2 == 0, False)))
    return cases


def moved(vectors):
    return vectors + np.float32([6, 0, 0, 0, 0, 0])


def far_out(vectors):
    """On either side, so that no plane parts them from the others."""
    return np.sign(vectors) * np.float32([6, 6, 1, 1, 1, 1])


def test_the_linear_probe_finds_what_a_plane_parts_and_the_hidden_one_also_what_none_does(rng, monkeypatch):
    monkeypatch.setattr(bench_findings, "HIDDEN_STEPS", 200)
    for signal, parted in ((moved, True), (far_out, False)):
        fitted, unseen = made_cells(rng, signal), made_cells(rng, signal)
        found = {fit.__name__: probe(fitted, unseen, fit) for fit in (linear, hidden)}
        assert (found["linear"]["cell"] > 0.95) == parted
        assert found["hidden"]["cell"] > 0.95 and found["hidden"]["side"] > 0.9


def test_cells_of_an_organ_hold_its_findings_and_little_else():
    """Of stones all, of nodules most: a cell at the lung's edge may be less than a quarter lung."""
    held, kept = {"nodule": [], "kidney stone": []}, []
    axis = (np.arange(10) - 4.5) * 40
    middles = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    coords = np.stack(np.meshgrid(*[np.arange(10)] * 3, indexing="ij"), -1).reshape(-1, 3)
    for number in range(10):
        phantom = make_phantom(number, size=80, spacing=5.0)
        organs = {"nodule": in_lung(phantom, coords), "kidney stone": in_kidney(phantom, number, middles)}
        kept.append([cells.sum() for cells in organs.values()])
        for row in phantom.findings:
            for centre in row["center_mm"] if row["finding"] in organs else ():
                own = np.abs(middles - centre).max(1) <= 20
                held[row["finding"]].append(organs[row["finding"]][own].any())
    assert len(held["kidney stone"]) >= 4 and all(held["kidney stone"])
    assert len(held["nodule"]) >= 5 and np.mean(held["nodule"]) >= 0.8
    assert np.all(np.mean(kept, 0) < 200)
