"""The patient in a CT volume: what is body, by HU and connectedness alone. Arrays are [x, y, z] along R A S."""

import itertools

import numpy as np
from einops import reduce, repeat
from jaxtyping import Bool, Num
from scipy import ndimage

from transforms.windows import Number

BODY_LEVEL = -400  # HU between air and tissue: a voxel a little more than half full
WALL_LEVEL = -650  # HU of a block that is a third wall
FILLED_ALONG = ((0, 1, 2), (0, 1), (0, 2), (1, 2))  # axes: holes in the volume, then in each of the three planes
BODY_BLOCK_MM = 6.0  # a table's shell is much thinner, a chest wall is not


def _enclosed(mask: Bool[np.ndarray, "X Y Z"], axes: tuple[int, ...]) -> Bool[np.ndarray, "X Y Z"]:
    """Background that no path along `axes` joins to the volume's border."""
    structure = np.zeros((3, 3, 3), bool)
    structure[1, 1, 1] = True
    for axis in axes:
        structure[tuple(slice(None) if a == axis else 1 for a in range(3))] = True
    labels, count = ndimage.label(~mask, structure)
    open_labels = np.zeros(count + 1, bool)
    for axis in axes:
        for end in (0, -1):
            open_labels[np.unique(labels.take(end, axis))] = True
    open_labels[0] = True
    return ~open_labels[labels]


def _largest(mask: Bool[np.ndarray, "X Y Z"]) -> Bool[np.ndarray, "X Y Z"]:
    labels, count = ndimage.label(mask)
    if count <= 1:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == sizes.argmax()


def body_mask(hu: Num[np.ndarray, "X Y Z"], *, spacing: Number = 4.0) -> Bool[np.ndarray, "X Y Z"]:
    """The patient: largest component above air with everything enclosed by it, lungs included. `spacing` is in mm.

    Looked for on blocks of about BODY_BLOCK_MM, where a table's thin shell has blurred away and a chest wall has not,
    then drawn at the volume's own voxels. Lungs and airways that the volume's end cuts open are enclosed in the planes
    along that end, so each of the three planes fills too.
    """
    hu = np.asarray(hu)
    factor = max(1, round(BODY_BLOCK_MM / spacing))
    padded = np.pad(hu, [(0, -n % factor) for n in hu.shape], mode="edge")
    blocks = reduce(padded, "(x a) (y b) (z c) -> x y z", np.mean, a=factor, b=factor, c=factor)
    body = _largest(blocks > BODY_LEVEL)
    body |= ndimage.binary_dilation(body) & (blocks > WALL_LEVEL)  # half blocks close a thin wall
    unchanged = 0
    for axes in itertools.cycle(FILLED_ALONG):  # what one plane closes may close another
        hole = _enclosed(body, axes)
        unchanged = 0 if hole.any() else unchanged + 1
        if unchanged == len(FILLED_ALONG):
            break
        body |= hole
    if factor == 1:
        return body
    inner = ndimage.binary_erosion(body, border_value=1)
    outer = ndimage.binary_dilation(body)
    inner, outer = (
        repeat(m, "x y z -> (x a) (y b) (z c)", a=factor, b=factor, c=factor)[tuple(map(slice, hu.shape))]
        for m in (inner, outer)
    )
    return inner | (outer & (hu > BODY_LEVEL))
