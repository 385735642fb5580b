"""The one resampler: against an independent one, and laws (centre, no-op, mean, air, labels, what is cut off)."""

import numpy as np
import pytest
from scipy import ndimage

from tests import scans
from transforms.grid import (
    Grid,
    OnGrid,
    axis_weights,
    centred_grid,
    millimetres_beyond,
    resample,
    resample_labels,
    share_beyond,
)
from transforms.windows import AIR


def onto(volume: np.ndarray, affine: np.ndarray, size: int, spacing: float, **options) -> OnGrid:
    return resample(volume, affine, centred_grid(volume.shape, affine, size, spacing), **options)


def upright(*spacing: float) -> np.ndarray:
    return np.diag([*spacing, 1.0])


def places(grid_affine, affine, index):
    points = index @ grid_affine[:3, :3].T + grid_affine[:3, 3]
    back = np.linalg.inv(affine)
    return points @ back[:3, :3].T + back[:3, 3]


AXES = {
    "ras": np.eye(3),
    "lps": np.diag([-1.0, -1.0, 1.0]),
    "coronal": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "sagittal": np.array([[0, 0, -1.0], [1, 0, 0], [0, -1, 0]]),
    "in plane": scans.turned(-20, (0, 0, 1)),
    "coronal tilt": scans.turned(12, (0, 1, 0)) @ np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "oblique": scans.turned(31, (1, -2, 0.5)),
    "sheared": np.array([[1, 0, 0], [0, 1, 0.36], [0, 0, 1]]),
}


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_linear_values_equal_an_independent_resampler(rng, axes, kind):
    shape = (17, 21, 13)
    affine = scans.centred((3.1, 2.7, 5.0), shape, AXES[axes])
    affine[:3, 3] += (11, -7, 3)
    data = rng.normal(0, 300, shape).astype(kind)
    out = onto(data, affine, 64, 1.7)
    index = np.stack(np.meshgrid(*[np.arange(64)] * 3, indexing="ij"), -1).reshape(-1, 3)
    at = places(out.affine, affine, index)
    inside = ((at > 1e-6) & (at < np.array(shape) - 1 - 1e-6)).all(1)
    truth = ndimage.map_coordinates(data.astype(float), at[inside].T, order=1)
    assert inside.sum() > 3000
    assert np.abs(out.array[tuple(index[inside].T)] - truth).max() <= 0.51
    far = ((at < -0.51) | (at > np.array(shape) - 0.49)).any(1)
    assert (out.array[tuple(index[far].T)] == -1000).all()
    rim = ~far & ~inside & ((at >= -0.49) & (at <= np.array(shape) - 0.51)).all(1)
    clamped = ndimage.map_coordinates(data.astype(float), at[rim].T, order=1, mode="nearest")
    assert rim.any() and np.abs(out.array[tuple(index[rim].T)] - clamped).max() <= 0.51


def test_a_volume_on_the_grid_already_is_not_touched(rng):
    data = rng.integers(-1000, 1000, (24, 24, 24)).astype(np.int16)
    once = onto(data, scans.centred((2.0, 2.0, 2.0), data.shape), 24, 2.0)
    np.testing.assert_array_equal(once.array, data)
    padded = onto(data[:23, :22, :19], scans.centred((2.0, 2.0, 2.0), (23, 22, 19)), 24, 2.0)
    again = onto(padded.array, padded.affine, 24, 2.0)
    np.testing.assert_array_equal(again.array, padded.array)
    np.testing.assert_array_equal(again.affine, padded.affine)
    assert {tuple(np.argwhere(padded.array > -1000).min(0))} <= {(0, 1, 2), (1, 1, 2), (0, 1, 3)}


@pytest.mark.parametrize("axes", ["lps", "coronal", "oblique"])
def test_the_scan_is_in_the_middle(axes):
    affine = scans.centred((3.0, 2.0, 4.0), (20, 20, 20), AXES[axes])
    affine[:3, 3] += (100, -50, 30)
    grid = centred_grid((20, 20, 20), affine, 40, 2.5)
    middle = grid.affine @ [19.5, 19.5, 19.5, 1]
    np.testing.assert_allclose(middle[:3], (100, -50, 30), atol=1e-9)
    np.testing.assert_array_equal(grid.affine[:3, :3], np.eye(3) * 2.5)


def test_shrinking_averages_instead_of_skipping(rng):
    noise = rng.normal(0, 100, (48, 48, 48)).astype(np.float32)
    for axes in ("ras", "in plane", "oblique"):
        affine = scans.centred((1.0, 1.0, 1.0), noise.shape, AXES[axes])
        shrunk = onto(noise, affine, 12, 4.0).array[3:9, 3:9, 3:9].astype(float)
        assert shrunk.std() < 25  # picking single voxels would leave 100, plain linear about 35
        assert abs(onto(noise + 500, affine, 12, 4.0).array[3:9, 3:9, 3:9].mean() - 500) < 5


def test_stretched_weights_sum_to_one_and_stay_inside():
    for factor in (0.3, 1.0, 1.7, 4.2):
        axis = axis_weights(np.arange(-20, 60) * factor + 0.3, 30, factor)
        np.testing.assert_allclose(np.asarray(axis.weights.sum(1)).ravel(), 1, atol=1e-6)
        assert axis.weights.min() >= 0 and axis.weights.shape[1] == 30
        taps = np.diff(axis.weights.indptr)
        assert taps.max() <= 2 * np.ceil(max(1, factor))


@pytest.mark.parametrize(("side", "expected"), [(40.0, 0.0), (30.0, 0.0), (18.0, 1 - 18 / 20), (10.0, 1 - 10 / 20)])
@pytest.mark.parametrize("axes", AXES)
def test_the_share_beyond_the_grid_is_that_of_what_is_denser_than_air(side, expected, axes):
    """A bar of 20 mm along x, thinner than any cube; air around it is nobody's loss."""
    hu = np.full((30, 9, 5), AIR, np.int16)
    hu[5:25, 4, 2] = 40
    affine = scans.centred((1.0, 1.0, 1.0), hu.shape, AXES[axes])
    reach = 20 * np.abs(AXES[axes][:, 0]).max() if axes in ("in plane", "coronal tilt", "oblique") else 20
    expected = max(0.0, 1 - side / reach) if expected else 0.0
    found = share_beyond(hu, affine, centred_grid(hu.shape, affine, 10, side / 10))
    assert found == pytest.approx(expected, abs=0.051)  # a voxel at either end
    assert share_beyond(np.full_like(hu, AIR), affine, centred_grid(hu.shape, affine, 10, 0.5)) == 0


def test_what_reaches_beyond_with_air_alone_is_measured_but_not_cut_off():
    data = np.full((60, 20, 20), AIR, np.int16)
    data[20:40] = 0
    affine = scans.centred((2.0, 2.0, 2.0), data.shape)
    grid = centred_grid(data.shape, affine, 24, 2.0)
    assert millimetres_beyond(data.shape, affine, grid) == pytest.approx(36)
    assert share_beyond(data, affine, grid) == 0
    data[:20] = 0
    assert share_beyond(data, affine, grid) == pytest.approx(18 / 40)  # of slices 0 to 39 the grid holds 18 and on


@pytest.mark.parametrize("axes", AXES)
def test_labels_take_the_nearest_voxel(rng, axes):
    shape = (15, 14, 13)
    affine = scans.centred((3.0, 2.5, 4.0), shape, AXES[axes])
    labels = rng.integers(0, 5, shape).astype(np.uint16)
    grid = Grid(40, 1.9, scans.centred((1.9, 1.9, 1.9), (40, 40, 40)))
    out = resample_labels(labels, affine, grid)
    index = np.stack(np.meshgrid(*[np.arange(40)] * 3, indexing="ij"), -1).reshape(-1, 3)
    at = places(grid.affine, affine, index)
    clear = (np.abs(at - np.floor(at) - 0.5) > 1e-3).all(1)
    nearest = np.rint(at).astype(int)
    inside = ((nearest >= 0) & (nearest < shape)).all(1)
    truth = np.zeros(len(index), int)
    truth[inside] = labels[tuple(nearest[inside].T)]
    np.testing.assert_array_equal(out[tuple(index[clear].T)], truth[clear])


def test_landmarks_of_a_turned_anisotropic_scan_stay_at_their_world_points():
    shape = (40, 44, 30)
    affine = scans.centred((1.4, 1.4, 3.0), shape, scans.turned(22, (0.2, 1, -0.4)))
    data = np.full(shape, -1000, np.float32)
    marks = [(8, 9, 7), (30, 12, 20), (15, 36, 22)]
    for mark in marks:
        data[tuple(slice(m - 1, m + 2) for m in mark)] = 1000
    out = onto(data, affine, 96, 1.0)
    spots, count = ndimage.label(out.array > -200)
    assert count == 3
    centres = np.array(ndimage.center_of_mass(out.array + 1000.0, spots, range(1, 4)))
    found = centres @ out.affine[:3, :3].T + out.affine[:3, 3]
    for mark in marks:
        truth = (affine @ [*mark, 1])[:3]
        assert np.linalg.norm(found - truth, axis=1).min() < 0.3


def test_the_memory_order_of_the_input_does_not_matter(rng):
    hu = rng.integers(-1000, 1000, (9, 11, 13)).astype(np.int16)
    one, other = (onto(part, upright(1.0, 2.0, 3.0), 12, 2.5) for part in (hu, np.asfortranarray(hu)))
    assert np.array_equal(one.array, other.array) and np.array_equal(one.affine, other.affine)


def test_a_larger_grid_is_padded_with_air_and_a_smaller_one_cuts(rng):
    hu = rng.integers(0, 100, (6, 6, 6)).astype(np.int16)
    larger = onto(hu, upright(1.0, 1.0, 1.0), 10, 1.0).array.copy()
    assert np.array_equal(larger[2:8, 2:8, 2:8], hu)
    larger[2:8, 2:8, 2:8] = AIR
    assert (larger == AIR).all()
    smaller = onto(hu, upright(1.0, 1.0, 1.0), 4, 1.0).array
    assert np.array_equal(smaller, hu[1:5, 1:5, 1:5])


def test_shares_stay_shares_where_whole_numbers_are_not_asked_for():
    checker = (np.indices((32, 32, 32)).sum(0) % 2).astype(np.float32)
    shrunk = onto(checker, upright(1.0, 1.0, 1.0), 12, 4.0, outside=0, dtype=np.float32).array
    assert shrunk.dtype == np.float32 and np.abs(shrunk[3:9, 3:9, 3:9] - 0.5).max() < 0.005
    assert (shrunk[:2] == 0).all()
