"""Kernel, slice thickness and noise as another scanner would give them: laws on kept voxels, by sums written out."""

import numpy as np
import pytest

from transforms.acquisition import acquire


@pytest.fixture
def cube():
    return np.argwhere(np.ones((7, 7, 7), bool)).astype(np.int16)


def at(values, coords, *voxel):
    return values[(coords == voxel).all(1)][0]


def test_a_sharper_kernel_raises_a_point_by_what_smoothing_takes_and_a_softer_one_lowers_it(cube):
    hu = np.where((cube == 3).all(1), 800, 0).astype(np.int16)
    share = 1 - 0.5**3  # of a point the binomial filter leaves an eighth
    assert at(acquire(hu, cube, sharpness=0.5), cube, 3, 3, 3) == pytest.approx(800 * (1 + 0.5 * share))
    softer = acquire(hu, cube, sharpness=-1.0)
    assert at(softer, cube, 3, 3, 3) == pytest.approx(100) and at(softer, cube, 2, 3, 3) == pytest.approx(50)
    assert softer.sum() == pytest.approx(800)


def test_thicker_slices_mix_three_along_the_body_axis_alone(cube):
    hu = np.where((cube == 3).all(1), 900.0, 0.0)
    thick = acquire(hu, cube, slice_blur=1.0)
    assert [round(float(at(thick, cube, *v))) for v in ((3, 3, 2), (3, 3, 3), (3, 2, 3), (2, 3, 3))] == [300, 300, 0, 0]
    assert at(acquire(hu, cube, slice_blur=0.5), cube, 3, 3, 3) == pytest.approx(600)


def test_no_air_enters_where_the_body_ends(cube):
    flat = np.full(len(cube), 40, np.int16)
    rough = cube[(cube.sum(1) % 3 > 0) | (cube[:, 0] > 4)]
    for coords in (cube, rough, cube + 100):
        made = acquire(flat[: len(coords)], coords, sharpness=0.7, slice_blur=0.4)
        assert np.abs(made - 40).max() < 1e-3


def test_grain_has_its_size_everywhere_and_reaches_its_neighbours():
    coords = np.argwhere(np.ones((40, 40, 40), bool))
    made = acquire(np.zeros(len(coords)), coords, grain=20.0, generator=np.random.default_rng(0)).reshape(40, 40, 40)
    assert made.std() == pytest.approx(20, rel=0.03) and abs(made.mean()) < 0.5
    assert made[0].std() == pytest.approx(20, rel=0.08), "at the border too"
    beside = np.corrcoef(made[1:].ravel(), made[:-1].ravel())[0, 1]
    assert beside == pytest.approx(2 / 3, abs=0.03), "the binomial filter's correlation at one voxel"
