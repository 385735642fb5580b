"""Body mask and sparsification on shapes whose answer is known."""

import numpy as np
import pytest
from scipy import ndimage

from transforms.body import body_mask
from transforms.sparse import BAND, DROPPED, KEEPS, densify, keep_mask, signed_band, sparsify, sparsify_masks
from transforms.windows import window_values


def distances(size: int, center: tuple[float, ...]) -> np.ndarray:
    grid = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"), -1)
    return np.linalg.norm(grid - np.array(center), axis=-1)


def assert_nearly(found: np.ndarray, expected: np.ndarray, *, share: float = 0.005) -> None:
    """Blocks of the body mask may cut a corner of a lung that comes within a block of the skin."""
    assert (found & ~expected).sum() <= share * expected.sum()
    assert (expected & ~found).sum() <= share * expected.sum()


@pytest.fixture
def chest() -> np.ndarray:
    """A trunk that both ends of the volume cut, with two lungs that the upper end cuts open."""
    x, y, z = np.meshgrid(*[np.arange(40)] * 3, indexing="ij")
    hu = np.full((40, 40, 40), -1000, np.int16)
    hu[((x - 20) / 16) ** 2 + ((y - 20) / 12) ** 2 < 1] = 50
    for center in (12, 28):
        hu[(((x - center) / 5) ** 2 + ((y - 20) / 8) ** 2 < 1) & (z > 12)] = -850
    return hu


def trunk() -> np.ndarray:
    x, y, _ = np.meshgrid(*[np.arange(40)] * 3, indexing="ij")
    return ((x - 20) / 16) ** 2 + ((y - 20) / 12) ** 2 < 1


def test_body_holds_lungs_that_the_end_of_the_volume_cuts_open(chest):
    assert_nearly(body_mask(chest), trunk())


def test_body_leaves_out_a_table_that_touches_the_skin(chest):
    chest[:, 8, :] = 0  # a plate one voxel thick that touches the back
    found = body_mask(chest, spacing=4.0)
    assert not found[:4].any() and not found[-3:].any()  # only what lies against the skin may stay
    assert_nearly(found, trunk(), share=0.04)


def test_body_leaves_out_a_separate_thing(chest):
    chest[2:6, 2:8, 2:8] = 100
    found = body_mask(chest)
    assert not found[2:6, 2:8, 2:8].any()
    assert_nearly(found, trunk())


def test_body_that_the_side_of_the_volume_cuts_keeps_its_lung(chest):
    chest[:, :, 34:][trunk()[:, :, 34:]] = 50
    half = chest[12:]  # through the middle of a lung
    assert_nearly(body_mask(half), trunk()[12:])


def test_body_at_coarse_voxels_keeps_a_wall_of_one_voxel():
    inner = ndimage.binary_erosion(trunk(), ndimage.generate_binary_structure(3, 2), border_value=1)
    thin = np.where(inner, -850, np.where(trunk(), 50, -1000)).astype(np.int16)
    assert np.array_equal(body_mask(thin, spacing=8.0), trunk())


def test_body_of_nothing_is_nothing():
    assert not body_mask(np.full((8, 8, 8), -1000, np.int16)).any()


def test_nonzero_drops_the_padding_and_what_no_window_shows(chest):
    assert np.array_equal(keep_mask(chest, "nonzero", windows=["lung"]), chest > -1000)
    assert np.array_equal(keep_mask(chest, "nonzero", windows=["soft_tissue"]), chest > -150)


def test_band_is_a_few_voxels_round_each_surface():
    distance = distances(32, (15.5, 15.5, 15.5))
    hu = np.where(distance < 10, 50, -1000)
    kept = keep_mask(hu, "band")
    assert kept[np.abs(distance - 10) < BAND - 1].all()
    assert not kept[np.abs(distance - 10) > BAND + 1].any()


def test_informative_keeps_what_is_unsaturated_and_its_neighbours():
    hu = np.full((24, 24, 24), -1000, np.int16)
    hu[2:22, 2:22, 2:22] = 800  # bone: soft tissue window saturated
    hu[10:14, 10:14, 10:14] = 60
    kept = keep_mask(hu, "informative", windows=["soft_tissue"])
    expected = np.zeros_like(kept)
    expected[9:15, 9:15, 9:15] = True
    assert np.array_equal(kept, expected)


def test_informative_gives_back_the_windows_of_every_body_voxel(chest, rng):
    """A dropped voxel takes its nearest kept voxel's value: for the chosen window nothing at all is lost."""
    names = ["soft_tissue"]
    kept = keep_mask(chest, "informative", windows=names)
    coords, values = sparsify(chest, kept)
    dense = densify(values, coords, chest.shape, fill=KEEPS["informative"].fill)
    assert 0 < kept.sum() < chest.size
    assert np.array_equal(window_values(dense, names), window_values(chest, names))


def test_keep_says_what_there_is(chest):
    with pytest.raises(ValueError, match=f"keep must be one of {', '.join(KEEPS)}, got 'all'"):
        keep_mask(chest, "all")


def test_sparsify_and_densify_are_inverse(chest):
    mask = keep_mask(chest, "body")
    coords, values = sparsify(chest, mask)
    assert coords.dtype == np.int16 and len(coords) == mask.sum()
    dense = densify(values, coords, chest.shape)
    assert np.array_equal(dense[mask], chest[mask])
    assert (dense[~mask] == DROPPED).all()


def test_densify_with_the_nearest_value():
    dense = densify(np.array([5.0, 9.0]), np.array([[0, 0, 0], [7, 0, 0]]), (8, 1, 1), fill="nearest")
    assert dense[:, 0, 0].tolist() == [5, 5, 5, 5, 9, 9, 9, 9]
    with pytest.raises(ValueError, match="at least one kept voxel"):
        densify(np.zeros(0), np.zeros((0, 3), int), (2, 2, 2), fill="nearest")


def test_signed_band_is_the_distance_to_a_sphere_negative_inside():
    distance = distances(40, (19.5, 19.5, 19.5)) - 12
    band = signed_band(distance < 0, band=4)
    near = np.abs(distance) < 3
    assert np.abs(band[near] * 4 - distance[near]).max() < 0.8  # a 0/1 surface knows half a voxel, more on a diagonal
    assert (band[distance < -6] == -1).all() and (band[distance > 6] == 1).all()


def test_masks_become_signed_bands_with_rows_near_surfaces_only():
    distance = distances(40, (19.5, 19.5, 19.5)) - 12
    coords, values = sparsify_masks((distance < 0)[..., None].astype(np.float32))
    assert values.shape == (len(coords), 1)
    assert np.abs(values).max() < 1
    assert np.abs(distance[tuple(coords.T.astype(int))]).max() < 6


@pytest.mark.parametrize("value", [0, 1])
def test_a_mask_without_surface_is_saturated(value):
    assert (signed_band(np.full((4, 4, 4), bool(value))) == (-1 if value else 1)).all()
