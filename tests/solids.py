"""Closed meshes with closed forms for tests of shapes: boxes, spheres, a torus; and a broken one."""

import numpy as np

BOX_FACES = np.array(
    [[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4],
     [1, 5, 7], [1, 7, 3]]
)  # fmt: skip


def box(half, center=(0, 0, 0)):
    """Eight corners, twelve triangles with their fronts outside."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
    return signs * np.asarray(half, float) + center, BOX_FACES


def box_distance(points, half, center=(0, 0, 0)):
    """Signed distance to a box, negative inside."""
    outside = np.abs(points - np.asarray(center, float)) - np.asarray(half, float)
    return np.linalg.norm(np.maximum(outside, 0), axis=-1) + np.minimum(outside.max(-1), 0)


def grid_of(rows, columns, place, *, closed_rows):
    """Triangles over a grid of parameters, columns always closed."""
    u, v = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    vertices = place(u, v).reshape(-1, 3)
    last = rows if closed_rows else rows - 1
    i, j = np.meshgrid(np.arange(last), np.arange(columns), indexing="ij")
    a, b = i * columns + j, (i + 1) % rows * columns + j
    c, d = i * columns + (j + 1) % columns, (i + 1) % rows * columns + (j + 1) % columns
    return vertices, np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([c, b, d], -1).reshape(-1, 3)])


def sphere(radius, center=(0, 0, 0), n=24):
    """Rings between two poles, fronts outside; the sagitta is about radius * (pi / n)^2 / 2."""

    def place(u, v):
        polar, around = np.pi * (u + 1) / n, np.pi * v / n
        return np.stack([np.sin(polar) * np.cos(around), np.sin(polar) * np.sin(around), np.cos(polar)], -1)

    vertices, faces = grid_of(n - 1, 2 * n, place, closed_rows=False)
    north, south, m = len(vertices), len(vertices) + 1, 2 * n
    j = np.arange(m)
    caps = [np.stack([np.full(m, north), j, (j + 1) % m], 1)]
    caps += [np.stack([(n - 2) * m + j, np.full(m, south), (n - 2) * m + (j + 1) % m], 1)]
    vertices = np.concatenate([vertices, [[0, 0, 1.0], [0, 0, -1.0]]])
    return vertices * radius + center, np.concatenate([faces, *caps])


def torus(large, small, n=48):
    def place(u, v):
        a, b = 2 * np.pi * u / n, 2 * np.pi * v / n
        return np.stack(
            [(large + small * np.cos(b)) * np.cos(a), (large + small * np.cos(b)) * np.sin(a), small * np.sin(b)], -1
        )

    return grid_of(n, n, place, closed_rows=True)


def joined(*meshes):
    vertices, faces, count = [], [], 0
    for points, triangles in meshes:
        vertices.append(points)
        faces.append(triangles + count)
        count += len(points)
    return np.concatenate(vertices), np.concatenate(faces)


def turned(rng):
    """A rotation drawn evenly."""
    made, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return made * np.linalg.det(made)


def shuffled(mesh, rng):
    """The same surface with its triangles in another order and half of them turned over."""
    vertices, faces = mesh
    faces = faces[rng.permutation(len(faces))]
    flip = rng.random(len(faces)) < 0.5
    return vertices, np.where(flip[:, None], faces[:, ::-1], faces)
