"""Polygons and strips as triangles."""

import numpy as np
from jaxtyping import Int64


def fans(counts: Int64[np.ndarray, " F"], corners: Int64[np.ndarray, " C"]) -> Int64[np.ndarray, "T 3"]:
    """Triangles of polygons with `counts` corners each, all corners in a row."""
    first, place = _places(counts, corners)
    return np.stack([corners[first], corners[first + place + 1], corners[first + place + 2]], 1)


def strips(counts: Int64[np.ndarray, " F"], corners: Int64[np.ndarray, " C"]) -> Int64[np.ndarray, "T 3"]:
    """Triangles of strips: every three corners in a row, every other one the other way round."""
    first, place = _places(counts, corners)
    at, odd = first + place, place % 2
    return np.stack([corners[at], corners[at + 1 + odd], corners[at + 2 - odd]], 1)


def _places(counts: np.ndarray, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each triangle where its polygon begins, and its number within it."""
    if (counts < 0).any() or counts.sum() != len(corners):
        raise ValueError(f"its faces name {counts.sum()} corners, there are {len(corners)}")
    starts, triangles = counts.cumsum() - counts, np.maximum(counts - 2, 0)
    owner = np.repeat(np.arange(len(counts)), triangles)
    return starts[owner], np.arange(len(owner)) - np.repeat(triangles.cumsum() - triangles, triangles)
