"""What a mesh is found to be: closed or not, one way round, crossing itself, sharp."""

import numpy as np
import pytest

from tests.solids import BOX_FACES, box, joined, shuffled, sphere
from transforms.mesh_check import kind_of, sharp_edges, welded


def test_a_closed_surface_is_closed_in_any_order(rng):
    assert kind_of(*sphere(3)) == (0, 0, True, 0)
    assert kind_of(*shuffled(sphere(3), rng))[:2] == (0, 0) and not kind_of(*shuffled(sphere(3), rng)).is_oriented


def test_a_hole_has_the_edges_of_the_triangles_that_are_gone():
    vertices, faces = box((1, 1, 1))
    assert kind_of(vertices, faces[1:]).open_edges == 3
    assert kind_of(vertices, faces[2:]).open_edges == 4  # the two triangles of a side share one


def test_crossing_parts_are_found_and_touching_or_nested_ones_are_not():
    crossing = kind_of(*joined(box((1, 1, 1)), box((1, 1, 1), (0.7, 0.6, 0.5))))
    assert crossing.crossing >= 6 and crossing.open_edges == 0
    assert kind_of(*joined(sphere(3), sphere(1))).crossing == 0
    beside = welded(*joined(box((1, 1, 1)), box((1, 1, 1), (2, 2, 0))))
    assert kind_of(*beside).branching_edges == 1 and kind_of(*beside).crossing == 0


def test_slivers_about_a_pole_are_judged_quickly():
    import time

    begun = time.process_time()
    assert kind_of(*sphere(50, n=40)).crossing == 0
    assert time.process_time() - begun < 3


def test_vertices_at_one_place_are_one():
    vertices, faces = box((1, 1, 1))
    apart, rows = vertices[faces].reshape(-1, 3), np.arange(36).reshape(-1, 3)
    assert kind_of(apart, rows).open_edges == 36
    assert kind_of(*welded(apart, rows)).open_edges == 0
    shaken = apart + np.random.default_rng(0).uniform(-1e-8, 1e-8, apart.shape)
    assert kind_of(*welded(shaken, rows)).open_edges > 0
    assert kind_of(*welded(shaken + 0.3, rows, within=1e-5)).open_edges == 0
    assert len(welded(vertices, np.array([[0, 0, 1], [0, 1, 2]]))[1]) == 1  # a triangle with a corner twice is none


@pytest.mark.parametrize(("degrees", "count"), [(30, 12), (91, 0)])
def test_the_sharp_edges_of_a_box_are_its_twelve(degrees, count, rng):
    vertices, _ = box((1, 2, 3))
    for faces in (BOX_FACES, shuffled((vertices, BOX_FACES), rng)[1]):
        ends = sharp_edges(vertices, faces, degrees=degrees)
        assert len(ends) == count
        assert set(np.linalg.norm(ends[:, 1] - ends[:, 0], axis=1)) <= {2.0, 4.0, 6.0}
