"""Laws of turning and scaling kept voxels: exact where the answer is known, no air at borders, left stays left."""

import numpy as np
import pytest

from transforms.pose import repose, rotation_of

SIDE = 40


def kept(rng, *, share=0.8):
    mask = np.zeros((SIDE,) * 3, bool)
    mask[8:32, 10:30, 12:28] = rng.random((24, 20, 16)) < share
    coords = np.asfortranarray(np.argwhere(mask).astype(np.int16))
    return coords, rng.integers(-1000, 1500, len(coords)).astype(np.int16)


def dense(coords, hu):
    array = np.full((SIDE,) * 3, 9999, np.int16)
    array[tuple(coords.T)] = hu
    return array


@pytest.mark.parametrize(("axis", "plane"), [(0, (1, 2)), (1, (2, 0)), (2, (0, 1))])
def test_a_quarter_turn_moves_every_voxel_as_numpy_does(rng, axis, plane):
    mask = np.zeros((SIDE,) * 3, bool)
    mask[10:30, 10:30, 10:30] = rng.random((20, 20, 20)) < 0.7
    mask[10, 10, 10] = mask[29, 29, 29] = True  # the box about whose middle it turns
    coords = np.argwhere(mask).astype(np.int16)
    hu = rng.integers(-1000, 1500, len(coords)).astype(np.int16)
    angles = [90 if one == axis else 0 for one in range(3)]
    made, placed = repose(hu, coords, angles=angles, scale=1, shape=(SIDE,) * 3)
    assert np.array_equal(dense(placed, made), np.rot90(dense(coords, hu), 1, plane))


def test_no_turn_and_no_scale_change_nothing(rng):
    coords, hu = kept(rng)
    made, placed = repose(hu, coords, angles=(0, 0, 0), scale=1, shape=(SIDE,) * 3)
    assert np.array_equal(placed, coords) and np.array_equal(made, hu)
    assert made.dtype == hu.dtype and placed.dtype == coords.dtype and placed.flags.f_contiguous


def test_what_is_linear_in_space_stays_so(rng):
    """Trilinear interpolation is exact there: the oracle is the way back, by hand."""
    coords = np.argwhere(np.ones((20, 20, 20), bool)).astype(np.int16) + np.int16(10)
    slope, angles, scale = np.array([3.0, -7.0, 11.0]), (5, -8, 12), 1.1
    hu = (coords @ slope).astype(np.float32)
    made, placed = repose(hu, coords, angles=angles, scale=scale, shape=(SIDE,) * 3)
    forth, middle = scale * rotation_of(angles), coords.mean(0)
    source = (placed - middle) @ np.linalg.inv(forth).T + middle
    inner = ((source >= 10) & (source <= 29)).all(1)
    assert inner.sum() > 5000
    assert np.abs(made - source @ slope)[inner].max() < 0.05


@pytest.mark.parametrize("scale", [0.8, 1.2])
def test_flat_tissue_stays_flat_up_to_its_border_and_fills_its_share_of_space(rng, scale):
    coords, hu = kept(rng, share=1.0)
    made, placed = repose(np.full_like(hu, 40), coords, angles=(6, -4, 9), scale=scale, shape=(SIDE,) * 3)
    assert (made == 40).all()
    assert len(placed) / len(coords) == pytest.approx(scale**3, rel=0.05)


def test_turning_there_and_back_gives_nearly_the_same_voxels(rng):
    coords, _ = kept(rng, share=1.0)
    smooth = (200 * np.sin(coords / 6).sum(1)).astype(np.int16)
    there = repose(smooth, coords, angles=(0, 0, 10), scale=1, shape=(SIDE,) * 3)
    back, placed = repose(*there, angles=(0, 0, -10), scale=1, shape=(SIDE,) * 3)
    array, again = dense(coords, smooth), dense(placed, back)
    both = (array < 9999) & (again < 9999)
    assert both.sum() > 0.9 * len(coords) and np.abs(array - again)[both].mean() < 8


def test_nothing_leaves_the_grid_and_left_stays_left(rng):
    coords, _ = kept(rng, share=1.0)
    side = np.where(coords[:, 0] < 20, -500, 500).astype(np.int16)
    made, placed = repose(side, coords, angles=(10, 10, 10), scale=1.9, shape=(SIDE,) * 3)
    assert placed.min() >= 0 and placed.max() < SIDE and len(placed) > len(coords)
    far = np.abs(placed[:, 0] - 19.5) > 10
    assert (np.sign(made[far]) == np.sign(placed[far, 0] - 19.5)).all()


def test_rotations_keep_lengths_and_do_not_mirror(rng):
    for _ in range(5):
        matrix = rotation_of(rng.uniform(-45, 45, 3).tolist())
        assert np.allclose(matrix @ matrix.T, np.eye(3)) and np.linalg.det(matrix) == pytest.approx(1)
