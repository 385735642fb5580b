"""Inside and outside, whatever the triangles' order: parts, cavities, rotations, ties on the grid."""

import numpy as np

from tests.oracle import solid_angle_winding
from tests.solids import box, box_distance, joined, shuffled, sphere, torus, turned
from transforms.crossings import crossings

GRID = np.argwhere(np.ones((48,) * 3, bool))


def test_the_sign_is_right_for_any_rotation_and_any_order_of_triangles(rng):
    half, center = (11.2, 17.9, 7.4), np.array([23.6, 24.1, 23.8])
    for _ in range(8):
        rotation = turned(rng)
        vertices, faces = shuffled(box(half), rng)
        lines = crossings(vertices @ rotation.T + center, faces, side=48)
        truth = box_distance((GRID - center) @ rotation, half)
        assert np.array_equal(lines.parity(GRID), truth < 0)


def test_a_cavity_is_outside_and_a_part_is_inside(rng):
    middle = np.array([20.2, 24.4, 24.6])
    mesh = shuffled(joined(sphere(15.3, middle), sphere(7.1, middle), box((3, 3, 3), (42.3, 40.2, 10.1))), rng)
    inside = crossings(*mesh, side=48).parity(GRID)
    radius = np.linalg.norm(GRID - middle, axis=1)
    in_box = box_distance(GRID, (3, 3, 3), (42.3, 40.2, 10.1)) < 0
    clear = (np.abs(radius - 15.1) > 0.4) & (np.abs(radius - 7) > 0.3)  # facets lie a little inside their sphere
    assert np.array_equal(inside[clear], ((radius < 15) & (radius > 7) | in_box)[clear])


def test_every_line_is_crossed_an_even_number_of_times_even_on_ties(rng):
    whole, faces = box((10, 10, 10), (24, 24, 24))  # faces, edges and corners on the lines themselves
    flat = torus(14, 5)[0] + 24
    for vertices, triangles in ((whole, faces), (np.rint(flat), torus(14, 5)[1]), (flat, torus(14, 5)[1])):
        lines = crossings(vertices, triangles, side=48)
        assert (np.diff(lines.starts) % 2 == 0).all()
    inside = crossings(whole, faces, side=48).parity(GRID)
    clear = np.abs(box_distance(GRID, (10, 10, 10), (24, 24, 24))) > 1e-9
    assert np.array_equal(inside[clear], (box_distance(GRID, (10, 10, 10), (24, 24, 24)) < 0)[clear])


def test_the_winding_number_is_that_of_solid_angles(rng):
    mesh = joined(box((9, 9, 9), (18.2, 20.3, 22.1)), box((9, 9, 9), (27.4, 24.9, 25.2)))
    points = GRID[rng.choice(len(GRID), 300)]
    found = crossings(*mesh, side=48).winding(points)
    truth = np.array([solid_angle_winding(p, mesh[0][mesh[1]]) for p in points])
    assert np.array_equal(found, np.rint(truth)) and set(found) == {0, 1, 2}
