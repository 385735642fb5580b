"""The contrast of findings: whole for a perfect copy, nothing where a finding is gone, half where half is left."""

import numpy as np
import pytest

from app.phantoms.phantoms import make_phantom
from tests.benchmarks.bench_findings import contrasts, share_kept
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
