"""Surfaces out of volumes and out of bands: closed, in their place, the same across blocks."""

import numpy as np

from tests.solids import sphere
from transforms.crossings import crossings
from transforms.isosurface import surface_at, surface_of_band
from transforms.mesh_check import kind_of
from transforms.triangle_band import band_pieces


def band_of_sphere(radius, center, *, side, band=4.0):
    low, high = np.floor(np.subtract(center, radius + 6)), np.ceil(np.add(center, radius + 6))
    grid = np.stack(np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True)), indexing="ij"), -1)
    distance = np.linalg.norm(grid - center, axis=-1) - radius
    near = np.abs(distance) < band
    return grid[near].astype(int), distance[near] / band


def test_a_band_gives_the_closed_surface_it_was_made_of():
    center = np.array([61.3, 64.8, 63.1])  # across eight blocks
    found = surface_of_band(*band_of_sphere(29.4, center, side=128))
    radius = np.linalg.norm(found.vertices - center, axis=1)
    assert np.abs(radius - 29.4).max() < 0.02
    kind = kind_of(*found)
    assert kind.open_edges == 0 and kind.is_oriented and kind.crossing == 0
    corners = found.vertices[found.faces]
    volume = np.einsum("ti,ti->t", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum() / 6
    assert abs(volume / (4 / 3 * np.pi * 29.4**3) - 1) < 0.002  # fronts are outside, or it would be negative


def test_a_band_far_from_the_origin_needs_no_more_memory():
    import tracemalloc

    coords, values = band_of_sphere(12.2, (1000.4, 3.1 + 20, 2040.7), side=2048)
    tracemalloc.start()
    found = surface_of_band(coords, values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.abs(np.linalg.norm(found.vertices - [1000.4, 23.1, 2040.7], axis=1) - 12.2).max() < 0.05
    assert peak < 30 << 20


def test_values_of_zero_on_the_grid_make_no_crack():
    coords, values = band_of_sphere(16, (32, 32, 32), side=64)  # many voxels lie on the surface itself
    assert kind_of(*surface_of_band(coords, values)).open_edges == 0


def test_a_band_of_one_side_alone_has_no_surface():
    coords, values = band_of_sphere(9, (20, 20, 20), side=40)
    for part in (values > 0, values < 0):
        assert len(surface_of_band(coords[part], values[part]).faces) == 0


def test_a_ragged_band_has_the_same_surface_where_it_is_known():
    coords, values = band_of_sphere(14.5, (24, 24, 24), side=48)
    kept = np.random.default_rng(0).random(len(values)) > 0.1 * (np.abs(values) > 0.4)
    found = surface_of_band(coords[kept], values[kept])
    assert np.abs(np.linalg.norm(found.vertices - 24, axis=1) - 14.5).max() < 0.1
    assert kind_of(*found).open_edges == 0


def test_the_level_of_a_volume_is_met_between_voxels():
    grid = np.indices((30, 30, 30)).transpose(1, 2, 3, 0)
    volume = 100 * (11.3 - np.linalg.norm(grid - [14.2, 15.1, 14.7], axis=-1))
    found = surface_at(volume.astype(np.int16), 0)
    assert np.abs(np.linalg.norm(found.vertices - [14.2, 15.1, 14.7], axis=1) - 11.3).max() < 0.03
    assert kind_of(*found).open_edges == 0
    assert len(surface_at(volume, 5000).faces) == 0


def test_a_mask_that_fills_its_volume_is_closed_at_its_border():
    found = surface_at(np.ones((4, 5, 6), bool), 0.5)
    assert kind_of(*found).open_edges == 0
    assert np.allclose(found.vertices.min(0), -0.5, atol=0.01) and np.allclose(
        found.vertices.max(0), [3.5, 4.5, 5.5], atol=0.01
    )


def test_a_surface_becomes_a_band_and_the_same_surface_again():
    vertices, faces = sphere(20, (31.4, 32.2, 31.9))
    lines = crossings(vertices, faces, side=64)
    coords = np.concatenate([p.coords for p in band_pieces(vertices[faces], side=64, band=4.0)])
    values = np.concatenate([p.distance for p in band_pieces(vertices[faces], side=64, band=4.0)]) / 4
    found = surface_of_band(coords, np.where(lines.parity(coords), -values, values))
    assert kind_of(*found).open_edges == 0
    radius = np.linalg.norm(found.vertices - [31.4, 32.2, 31.9], axis=1)
    assert radius.min() > 20 - 0.35 and radius.max() < 20.05  # facets cut a little off a sphere, cells off its corners
