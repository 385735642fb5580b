"""Onto the grid: against an independent resampler, and laws (centre, no-op, mean, air, labels, blocks of output)."""

from typing import NamedTuple

import numpy as np
import pytest
from scipy import ndimage

from app.prepare.geometry import Grid, axis_weights, centred_grid, normalise, resample_labels
from tests import scans


class Scan(NamedTuple):
    hu: np.ndarray
    affine: np.ndarray


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
    out = normalise(Scan(data, affine), 64, 1.7)
    index = np.stack(np.meshgrid(*[np.arange(64)] * 3, indexing="ij"), -1).reshape(-1, 3)
    at = places(out.affine, affine, index)
    inside = ((at > 1e-6) & (at < np.array(shape) - 1 - 1e-6)).all(1)
    truth = ndimage.map_coordinates(data.astype(float), at[inside].T, order=1)
    assert inside.sum() > 3000
    assert np.abs(out.hu[tuple(index[inside].T)] - truth).max() <= 0.51
    far = ((at < -0.51) | (at > np.array(shape) - 0.49)).any(1)
    assert (out.hu[tuple(index[far].T)] == -1000).all()
    rim = ~far & ~inside & ((at >= -0.49) & (at <= np.array(shape) - 0.51)).all(1)
    clamped = ndimage.map_coordinates(data.astype(float), at[rim].T, order=1, mode="nearest")
    assert rim.any() and np.abs(out.hu[tuple(index[rim].T)] - clamped).max() <= 0.51


def test_a_volume_on_the_grid_already_is_not_touched(rng):
    data = rng.integers(-1000, 1000, (24, 24, 24)).astype(np.int16)
    once = normalise(Scan(data, scans.centred((2.0, 2.0, 2.0), data.shape)), 24, 2.0)
    np.testing.assert_array_equal(once.hu, data)
    padded = normalise(Scan(data[:23, :22, :19], scans.centred((2.0, 2.0, 2.0), (23, 22, 19))), 24, 2.0)
    again = normalise(Scan(padded.hu, padded.affine), 24, 2.0)
    np.testing.assert_array_equal(again.hu, padded.hu)
    np.testing.assert_array_equal(again.affine, padded.affine)
    assert {tuple(np.argwhere(padded.hu > -1000).min(0))} <= {(0, 1, 2), (1, 1, 2), (0, 1, 3)}


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
        shrunk = normalise(Scan(noise, affine), 12, 4.0).hu[3:9, 3:9, 3:9].astype(float)
        assert shrunk.std() < 25  # picking single voxels would leave 100, plain linear about 35
        assert abs(normalise(Scan(noise + 500, affine), 12, 4.0).hu[3:9, 3:9, 3:9].mean() - 500) < 5


def test_stretched_weights_sum_to_one_and_stay_inside():
    for factor in (0.3, 1.0, 1.7, 4.2):
        axis = axis_weights(np.arange(-20, 60) * factor + 0.3, 30, factor)
        np.testing.assert_allclose(np.asarray(axis.weights.sum(1)).ravel(), 1, atol=1e-6)
        assert axis.weights.min() >= 0 and axis.weights.shape[1] == 30
        taps = np.diff(axis.weights.indptr)
        assert taps.max() <= 2 * np.ceil(max(1, factor))


def test_a_scan_larger_than_the_grid_is_cut_and_said():
    data = np.zeros((60, 20, 20), np.int16)
    out = normalise(Scan(data, scans.centred((2.0, 2.0, 2.0), data.shape)), 24, 2.0)
    assert [f.code for f in out.findings] == ["FOV_CROPPED"] and "36 mm" in out.findings[0].message
    coarse = normalise(Scan(data[:20], scans.centred((2.0, 2.0, 9.0), (20, 20, 20))), 128, 2.0)
    assert [f.code for f in coarse.findings] == ["LOW_RESOLUTION"]


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
    out = normalise(Scan(data, affine), 96, 1.0)
    spots, count = ndimage.label(out.hu > -200)
    assert count == 3
    centres = np.array(ndimage.center_of_mass(out.hu + 1000.0, spots, range(1, 4)))
    found = centres @ out.affine[:3, :3].T + out.affine[:3, 3]
    for mark in marks:
        truth = (affine @ [*mark, 1])[:3]
        assert np.linalg.norm(found - truth, axis=1).min() < 0.3
