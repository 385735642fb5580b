"""Structures put into HU lie where they are said to lie, in the tissue they are said to lie in, and nowhere else."""

import numpy as np
import pytest

from transforms.structures import DARK, TAKEN_IN_SOFT_TISSUE, Structure, _Rows, _shares, add_structures, draw_structure


@pytest.fixture
def block():
    return np.argwhere(np.ones((40, 36, 32), bool)).astype(np.int16)


def volume_mm3(structure, coords, spacing):
    rows, share = _shares(structure, _Rows(coords), spacing)
    return share.sum() * spacing**3, rows


@pytest.mark.parametrize("size", [3.0, 6.0, 12.0])
@pytest.mark.parametrize("spacing", [1.0, 1.5])
def test_a_ball_has_its_volume_and_its_place(block, size, spacing):
    centre = np.array([20.3, 17.8, 15.1])
    ball = Structure(centre, size, 0.0, np.array([1.0, 0, 0]), 500.0)
    volume, rows = volume_mm3(ball, block, spacing)
    assert volume == pytest.approx(np.pi / 6 * size**3, rel=0.3 if size < 2.5 * spacing or size < 4 else 0.08)
    assert np.abs(block[rows].mean(0) - centre).max() < 0.5
    assert np.linalg.norm((block[rows] - centre) * spacing, axis=1).max() <= size / 2 + spacing


def test_a_tube_has_its_volume_and_its_direction(block):
    axis = np.array([1.0, 2, 2]) / 3
    tube = Structure(np.array([20.0, 18, 16]), 6.0, 24.0, axis, 150.0)
    volume, rows = volume_mm3(tube, block, 1.0)
    assert volume == pytest.approx(np.pi * 9 * 24, rel=0.05)
    away = block[rows] - tube.centre
    direction = np.linalg.svd(away - away.mean(0), full_matrices=False)[2][0]
    assert abs(direction @ axis) > 0.99


def test_rows_in_any_order_get_the_same_values(block):
    hu = np.where(block[:, 0] < 20, -850, 40).astype(np.int16)
    settings = {"number": 30, "spacing": 1.5}
    order = np.random.default_rng(1).permutation(len(block))
    one = Structure(np.array([9.0, 9, 9]), 6.0, 0.0, np.array([1.0, 0, 0]), 500.0)
    straight, mixed = (_shares(one, _Rows(coords), 1.5) for coords in (block, block[order]))
    assert np.array_equal(block[straight[0]], block[order][mixed[0]]) and np.array_equal(straight[1], mixed[1])
    made = add_structures(hu, block, generator=np.random.default_rng(3), **settings)
    again = add_structures(hu, block, generator=np.random.default_rng(3), **settings)
    other = add_structures(hu, block, generator=np.random.default_rng(4), **settings)
    assert np.array_equal(made, again) and not np.array_equal(made, other) and made.dtype == np.float32


def test_voxels_that_are_not_there_take_nothing(block):
    there = (block[:, 1] < 10) | (block[:, 1] > 20)
    ball = Structure(np.array([20.0, 12.0, 15.0]), 12.0, 0.0, np.array([1.0, 0, 0]), 500.0)
    rows, _ = _shares(ball, _Rows(block[there]), 1.5)
    assert len(rows) and (block[there][rows][:, 1] < 10).all()


def test_what_is_put_in_follows_the_tissue():
    rng, centre = np.random.default_rng(0), np.zeros(3, np.int16)
    lung = [draw_structure(-850, centre, rng) for _ in range(400)]
    soft = [draw_structure(40, centre, rng) for _ in range(400)]
    assert min(one.added for one in lung) >= 300
    dark = [one.added for one in soft if one.added < 0]
    assert len(dark) / len(soft) == pytest.approx(DARK, abs=0.07) and min(dark) >= TAKEN_IN_SOFT_TISSUE[0]
    assert 0.3 < np.mean([one.length_mm > 0 for one in soft]) < 0.5
    assert all(draw_structure(hu, centre, rng) is None for hu in (-1020, -400, -90, 700))
