"""The band of a surface against brute force and closed forms: the same voxels, the same distances."""

import numpy as np
import pytest

from tests.oracle import triangle_distance
from tests.solids import box, box_distance, sphere, turned
from transforms.triangle_band import _apart, _interleaved, band_pieces


def band_of(corners, *, side, band):
    pieces = list(band_pieces(corners, side=side, band=band))
    return np.concatenate([p.coords for p in pieces]).astype(int), np.concatenate([p.distance for p in pieces])


def test_any_triangles_give_the_voxels_and_distances_of_brute_force(rng):
    side, band = 20, 3.0
    corners = rng.uniform(-4, side + 4, (30, 3, 3))
    corners[:6, 1:] = corners[:6, :1] + rng.normal(size=(6, 2, 3))  # small ones
    corners[6, 2] = corners[6, 1]  # a segment
    corners[7] = corners[7, 0]  # a point
    corners[8, 2] = (corners[8, 0] + corners[8, 1]) / 2  # three corners in a row
    every = np.argwhere(np.ones((side,) * 3, bool))
    truth = np.array([min(triangle_distance(p, t) for t in corners) for p in every[::7]])
    coords, distance = band_of(corners, side=side, band=band)
    found = np.full((side,) * 3, np.inf)
    found[tuple(coords.T)] = distance
    mine = found[tuple(every[::7].T)]
    assert np.array_equal(np.isfinite(mine), truth < band)
    assert np.abs(mine - truth)[truth < band].max() < 2e-5


@pytest.mark.parametrize("turn", [False, True])
def test_a_box_has_its_closed_form(rng, turn):
    side, half = 96, (21.3, 30.7, 12.9)
    rotation, center = turned(rng) if turn else np.eye(3), np.array([47.2, 48.1, 46.6])
    vertices, faces = box(half)
    coords, distance = band_of((vertices @ rotation.T + center)[faces], side=side, band=4.0)
    truth = np.abs(box_distance((coords - center) @ rotation, half))
    assert np.abs(distance - truth).max() < 2e-5
    every = np.argwhere(np.ones((side,) * 3, bool))
    assert len(coords) == (np.abs(box_distance((every - center) @ rotation, half)) < 4).sum()


def test_fine_and_coarse_triangles_lie_as_near_as_their_sphere_does():
    center = np.array([31.5, 31.2, 30.9])
    for n in (6, 24, 96):
        vertices, faces = sphere(24, center, n)
        coords, distance = band_of(vertices[faces], side=64, band=4.0)
        inside = np.linalg.norm(coords - center, axis=1) < 24
        signed = np.where(inside, -distance, distance)
        off = signed - (np.linalg.norm(coords - center, axis=1) - 24)
        sagitta = 24 * (1 - np.cos(np.pi / n / 2) ** 2) * 2
        assert np.abs(off[np.abs(signed) > sagitta]).max() < sagitta + 1e-4


def test_pieces_come_in_morton_order_without_a_voxel_twice():
    vertices, faces = sphere(100, (128, 128, 128), 12)
    coords, _ = band_of(vertices[faces], side=256, band=2.0)
    keys = _interleaved(coords)
    assert (np.diff(keys) > 0).all() and np.array_equal(_apart(keys), coords)


def test_memory_follows_the_band():
    import tracemalloc

    vertices, faces = sphere(40, (512, 512, 512), 24)
    tracemalloc.start()
    count = sum(len(piece.coords) for piece in band_pieces(vertices[faces], side=1024, band=4.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 100_000 and peak < 200 << 20  # a dense grid of bytes would hold 1024 MiB


def test_a_surface_beyond_the_grid_gives_what_reaches_in():
    vertices, faces = box((10, 10, 10), (-8, 8, 8))
    coords, _ = band_of(vertices[faces], side=16, band=3.0)
    assert len(coords) and coords.min() >= 0 and coords[:, 0].max() == 4  # the face at x = 2, 3 voxels beyond: 2, 3, 4
    assert not sum(len(p.coords) for p in band_pieces(vertices[faces] + 100, side=16, band=3.0))
