"""The separable resampler against SciPy's interpolation at world coordinates."""

import numpy as np
import pytest
from scipy import ndimage

from transforms.array import AIR, resample, share_beyond


def oracle(hu: np.ndarray, affine_in: np.ndarray, affine_out: np.ndarray, grid: int) -> np.ndarray:
    """Smooths by the full width rule of Cardoso et al., then asks the input at the world places of the output."""
    steps_in, steps_out = (np.linalg.norm(a[:3, :3], axis=0) for a in (affine_in, affine_out))
    ratio = np.maximum(steps_out / steps_in, 1)
    sigma = np.sqrt(ratio**2 - 1) / np.sqrt(8 * np.log(2))
    smooth = ndimage.gaussian_filter(hu.astype(np.float64), sigma, mode="nearest", truncate=4)
    index = np.stack(np.meshgrid(*[np.arange(grid)] * 3, indexing="ij"), -1)
    world = index @ affine_out[:3, :3].T + affine_out[:3, 3]
    place = (world - affine_in[:3, 3]) @ np.linalg.inv(affine_in[:3, :3]).T
    values = ndimage.map_coordinates(smooth, np.moveaxis(place, -1, 0), order=1, mode="nearest")
    inside = ((place >= -0.5) & (place <= np.array(hu.shape) - 0.5)).all(-1)
    return np.where(inside, values, AIR)


@pytest.mark.parametrize(
    ("shape", "spacing_in", "spacing_out", "grid"),
    [
        ((20, 18, 16), (4.0, 4.0, 4.0), 8.0, 12),
        ((21, 17, 9), (0.9, 1.1, 5.0), 3.0, 16),
        ((10, 12, 14), (3.0, 3.0, 3.0), 1.3, 24),
        ((16, 16, 16), (2.0, 1.5, 1.0), 2.0, 9),
    ],
)
def test_resampling_equals_scipy_at_world_coordinates(rng, shape, spacing_in, spacing_out, grid):
    hu = rng.integers(-1000, 1500, shape).astype(np.int16)
    affine = np.diag([*spacing_in, 1.0])
    affine[:3, 3] = [-50, 20, 300]
    result = resample(hu, spacing_in=spacing_in, spacing_out=spacing_out, grid=grid, affine=affine)
    expected = oracle(hu, affine, result.affine, grid)
    assert np.abs(result.array - expected).max() < 0.05  # float32 sums of values up to 1500


def test_the_centre_stays_where_it_is():
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = [5, 6, 7]
    result = resample(np.zeros((11, 8, 5)), spacing_in=(2.0, 3.0, 4.0), spacing_out=1.7, grid=10, affine=affine)
    center_in = affine @ [5, 3.5, 2, 1]
    center_out = result.affine @ [4.5, 4.5, 4.5, 1]
    assert np.allclose(center_in, center_out)


def test_the_memory_order_of_the_input_does_not_matter(rng):
    hu = rng.integers(-1000, 1000, (9, 11, 13)).astype(np.int16)
    settings = {"spacing_in": (1.0, 2.0, 3.0), "spacing_out": 2.5, "grid": 12}
    one, other = resample(hu, **settings), resample(np.asfortranarray(hu), **settings)
    assert np.abs(one.array - other.array).max() < 1e-3 and np.array_equal(one.affine, other.affine)


def test_nothing_to_do_changes_nothing(rng):
    hu = rng.integers(-1024, 3000, (9, 9, 9)).astype(np.int16)
    result = resample(hu, spacing_in=(1.5, 1.5, 1.5), spacing_out=1.5, grid=9)
    assert np.array_equal(result.array, hu)
    assert np.allclose(result.affine, np.diag([1.5, 1.5, 1.5, 1]))


def test_a_larger_grid_is_padded_with_air_and_a_smaller_one_cuts(rng):
    hu = rng.integers(0, 100, (6, 6, 6)).astype(np.int16)
    larger = resample(hu, spacing_in=(1.0, 1.0, 1.0), spacing_out=1.0, grid=10).array
    assert np.array_equal(larger[2:8, 2:8, 2:8], hu)
    larger[2:8, 2:8, 2:8] = AIR
    assert (larger == AIR).all()
    smaller = resample(hu, spacing_in=(1.0, 1.0, 1.0), spacing_out=1.0, grid=4).array
    assert np.array_equal(smaller, hu[1:5, 1:5, 1:5])


def test_shrinking_smooths():
    checker = np.indices((32, 32, 32)).sum(0) % 2 * 1000.0
    inner = resample(checker, spacing_in=(1.0, 1.0, 1.0), spacing_out=4.0, grid=8).array[1:-1, 1:-1, 1:-1]
    assert np.abs(inner - 500).max() < 5


def test_spacings_must_be_positive():
    with pytest.raises(ValueError, match="spacings must be positive"):
        resample(np.zeros((2, 2, 2)), spacing_in=(1.0, 0.0, 1.0), spacing_out=1.0, grid=2)


@pytest.mark.parametrize(("side", "expected"), [(40.0, 0.0), (30.0, 0.0), (18.0, 1 - 18 / 20), (10.0, 1 - 10 / 20)])
def test_the_share_beyond_the_cube_is_that_of_what_is_denser_than_air(side, expected):
    """A bar of 20 mm along x, thinner than any cube; air around it is nobody's loss."""
    hu = np.full((30, 9, 5), AIR, np.int16)
    hu[5:25, 4, 2] = 40
    found = share_beyond(hu, spacing_in=(1.0, 1.0, 1.0), spacing_out=side / 10, grid=10)
    assert found == pytest.approx(expected, abs=0.026)  # half a voxel at each end
    assert share_beyond(np.full_like(hu, AIR), spacing_in=(1.0, 1.0, 1.0), spacing_out=0.5, grid=10) == 0
