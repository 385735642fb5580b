"""How far two triangle surfaces are apart: distances in mm, normals, and the volume that they share.

Points are drawn evenly over the area of each; the distance of each to the other surface is exact among the triangles
whose middles are nearest.
"""

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial import cKDTree

from transforms.crossings import crossings
from transforms.triangle_band import distances, frames_of, normals_of

POINTS = 20_000  # drawn on each surface
NEAREST = 24  # triangles that a point is measured against
SIDE = 96  # voxels a side of the grid on which volumes are compared


def compare(
    truth: tuple[Float[np.ndarray, "V 3"], Int[np.ndarray, "T 3"]],
    other: tuple[Float[np.ndarray, "W 3"], Int[np.ndarray, "U 3"]],
) -> dict[str, float]:
    """`distance` mean over both directions, `distance_95` and `distance_max` (the larger direction), in the unit of the
    vertices; `normals`, the mean of |cosine| between normals; `dice` of the volumes, for closed surfaces.
    """
    generator = np.random.default_rng(0)
    there = _to_surface(truth, other, generator)
    back = _to_surface(other, truth, generator)
    return {
        "distance": float(there[0].mean() + back[0].mean()) / 2,
        "distance_95": float(max(np.percentile(there[0], 95), np.percentile(back[0], 95))),
        "distance_max": float(max(there[0].max(), back[0].max())),
        "normals": float(there[1].mean() + back[1].mean()) / 2,
        "dice": dice_of_meshes(truth, other),
    }


def _to_surface(source, target, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Distances of points on one surface to the other, and |cosine| of the normals there."""
    vertices, faces = source
    normals, areas = normals_of(vertices[faces])
    chosen = generator.choice(len(faces), POINTS, p=areas / areas.sum())
    u, v = generator.random((2, POINTS))
    turned = u + v > 1
    u, v = np.where(turned, 1 - u, u), np.where(turned, 1 - v, v)
    a, b, c = (vertices[faces[chosen, corner]] for corner in range(3))
    places = a + u[:, None] * (b - a) + v[:, None] * (c - a)
    others, theirs = target
    corners = others[theirs]
    nearest = min(NEAREST, len(corners))
    rows = cKDTree(corners.mean(1)).query(places, nearest)[1].reshape(POINTS, nearest)
    used, at = np.unique(rows, return_inverse=True)
    found = distances(
        frames_of(corners[used].astype(np.float64)), at.reshape(-1), np.repeat(places, nearest, 0), np.zeros((1, 3))
    ).reshape(POINTS, nearest)
    best = rows[np.arange(POINTS), found.argmin(1)]
    cosine = np.abs(np.einsum("pi,pi->p", normals[chosen], normals_of(corners)[0][best]))
    return found.min(1).astype(np.float64), cosine


def dice_of_meshes(truth, other) -> float:
    """Twice the shared volume over the sum of both, counted on a grid about them."""
    ends = np.concatenate([mesh[0][mesh[1]].reshape(-1, 3) for mesh in (truth, other)])
    low, high = ends.min(0), ends.max(0)
    step = max(float((high - low).max()), 1e-9) / (SIDE - 2)
    grid = np.indices((SIDE,) * 3).reshape(3, -1).T
    one, two = (
        crossings((vertices - low) / step + 0.51, faces, side=SIDE).parity(grid) for vertices, faces in (truth, other)
    )
    total = int(one.sum()) + int(two.sum())
    return 2 * int((one & two).sum()) / total if total else 0.0
