"""Runs stand for coordinates: row by row the same, moved, cut and counted as coordinates are."""

import numpy as np
import pytest

from transforms.runs import Box, Runs, counts_of_blocks


def voxels(rng, kind):
    mask = rng.random((21, 18, 43)) >= {"solid": 0, "few holes": 0.1, "mostly holes": 0.9}.get(kind, 0.3)
    coords = np.argwhere(mask).astype(np.int16)
    if kind == "any order":
        return rng.permutation(coords)
    if kind == "backwards":
        return coords[::-1]
    if kind == "in columns":
        return np.asfortranarray(coords)
    return coords


KINDS = ["solid", "few holes", "mostly holes", "any order", "backwards", "in columns"]


@pytest.mark.parametrize("kind", KINDS)
def test_runs_stand_for_their_coordinates(rng, kind):
    coords = voxels(rng, kind)
    runs = Runs.of(coords)
    assert np.array_equal(runs, coords) and len(runs) == len(coords) and runs.shape == coords.shape
    assert np.asarray(runs).dtype == coords.dtype and np.asarray(runs, np.int64).dtype == np.int64
    for row in (*rng.integers(len(coords), size=50).tolist(), 0, -1, len(coords) - 1):
        assert np.array_equal(runs[row], coords[row])
    assert np.array_equal(runs[3:9], coords[3:9]) and np.array_equal(runs[:, 1], coords[:, 1])
    with pytest.raises(IndexError):
        runs[len(coords)]
    assert Runs.of(runs) is runs


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_cut_and_moved_as_coordinates_are(rng, kind):
    coords = voxels(rng, kind)
    runs = Runs.of(coords)
    low, high = runs.bounds()
    assert np.array_equal(low, coords.min(0)) and np.array_equal(high, coords.max(0))
    assert np.array_equal(runs.moved(np.array([4, -2, 1])), coords + np.array([4, -2, 1], np.int16))
    for _ in range(20):
        start, stop = np.sort(rng.integers(0, 48, (2, 3)), 0)
        cut, rows = runs.inside(Box(tuple(start.tolist()), tuple(stop.tolist())))
        expected = np.flatnonzero(((coords >= start) & (coords < stop)).all(1))
        assert np.array_equal(rows, expected) and np.array_equal(cut, coords[expected])


@pytest.mark.parametrize("side", [1, 3, 8, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_hold_as_many_voxels(rng, kind, side):
    coords = voxels(rng, kind)
    counts = counts_of_blocks(Runs.of(coords), side=side)
    expected = np.zeros(coords.max(0) // side + 1, np.int64)
    np.add.at(expected, tuple((coords // side).T), 1)
    assert np.array_equal(counts, expected)


def test_no_voxels_are_no_runs():
    none = Runs.of(np.zeros((0, 3), np.int16))
    assert len(none) == 0 and np.asarray(none).shape == (0, 3) and len(none.lengths) == 0


def test_a_body_has_many_voxels_a_run():
    ball = np.argwhere(np.linalg.norm(np.indices((64, 64, 64)) - 32, axis=0) < 30).astype(np.int16)
    assert Runs.of(ball).nbytes < 0.1 * ball.nbytes
