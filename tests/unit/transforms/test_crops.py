"""Crops to a budget are contiguous and aligned; augmentation keeps left left."""

import numpy as np
import pytest
from scipy import stats

from transforms.acquisition import jitter, whole_hu
from transforms.crops import CROP_STEP, crop_box, crop_to_budget, translate


@pytest.fixture
def coords(rng) -> np.ndarray:
    """A ball with holes, not centred."""
    grid = np.argwhere(np.ones((48, 40, 56), bool))
    ball = grid[np.linalg.norm(grid - [26, 20, 30], axis=1) < 18]
    return ball[rng.random(len(ball)) < 0.8].astype(np.int16)


@pytest.mark.parametrize("max_points", [512, 3000, 9000])
def test_a_crop_is_every_voxel_of_one_aligned_box(coords, max_points, rng):
    for center in coords[rng.integers(len(coords), size=8)]:
        box = crop_box(coords, center=center, max_points=max_points)
        runs, rows = crop_to_budget(coords, max_points, center=center)
        assert 0 < len(rows) <= max_points
        start, stop = np.array(box.start), np.array(box.stop)
        assert (start % CROP_STEP == 0).all() and (stop % CROP_STEP == 0).all()
        inside = ((coords >= start) & (coords < stop)).all(1)
        assert np.array_equal(np.flatnonzero(inside), rows)  # nothing thinned out, nothing else
        assert np.array_equal(runs, coords[rows])
        assert ((center >= start) & (center < stop)).all()


def test_a_crop_uses_most_of_its_budget(coords):
    sizes = [len(crop_to_budget(coords, 9000, center=center)[0]) for center in coords[::1500]]
    assert np.median(sizes) > 0.6 * 9000


def test_no_face_can_grow_any_more(coords):
    box = crop_box(coords, center=coords[100], max_points=4000)
    extent = (coords.max(0) // CROP_STEP + 1) * CROP_STEP
    for axis in range(3):
        for end in (0, 1):
            start, stop = np.array(box.start), np.array(box.stop)
            (stop if end else start)[axis] += CROP_STEP if end else -CROP_STEP
            if start[axis] < 0 or stop[axis] > extent[axis]:
                continue
            assert ((coords >= start) & (coords < stop)).all(1).sum() > 4000


def test_what_fits_is_kept_whole(coords):
    for budget in (len(coords), None):
        runs, rows = crop_to_budget(coords, budget, center=coords[0])
        assert np.array_equal(runs, coords) and np.array_equal(rows, np.arange(len(coords)))


def test_a_budget_holds_a_block(coords):
    with pytest.raises(ValueError, match="max_points must be at least 512"):
        crop_to_budget(coords, 100, center=coords[0])


def test_translation_moves_all_by_the_same_and_keeps_them_in_the_grid(coords):
    moved = np.asarray(translate(coords, [3, -2, 1], (48, 40, 56)))
    assert np.array_equal(moved - coords, np.broadcast_to([3, -2, 1], coords.shape))
    far = np.asarray(translate(coords, [99, -99, 99], (48, 40, 56)))
    assert far.min() >= 0 and (far.max(0) < [48, 40, 56]).all()
    assert len(np.unique(far - coords, axis=0)) == 1
    assert far.dtype == coords.dtype


def test_jitter_stretches_about_air():
    assert np.allclose(jitter(np.array([-1000, 0, 100]), scale=1.1, offset=5), [-995, 105, 215])


def test_noise_is_normal_and_a_function_of_its_generator():
    air, count = np.full(200_001, -1000, np.int16), 200_001
    drawn = [jitter(air, noise=5, generator=np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    noise = (drawn[0] + 1000) / 5
    assert stats.kstest(noise, "norm").pvalue > 0.01
    parts = noise[: count // 2], noise[count // 2 : -1]
    assert abs(np.corrcoef(*parts)[0, 1]) < 0.02 and abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 0.02


@pytest.mark.parametrize("count", [0, 1, 70_000])
def test_hu_become_whole_numbers_that_a_scanner_could_give(count):
    hu = np.random.default_rng(0).uniform(-40_000, 40_000, count).astype(np.float32)
    made = whole_hu(hu)
    assert made.dtype == np.int16 and np.array_equal(made, np.rint(hu).clip(-(2**15), 2**15 - 1))
    assert np.shares_memory(whole_hu(made), made) or not count
