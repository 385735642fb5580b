"""HU as another scanner, kernel, slice thickness or dose would give them.

Nothing here draws its own chance: who wants it passes numbers or a generator in.
"""

import numpy as np
from jaxtyping import Float, Integer, Num
from scipy import ndimage

from transforms.windows import AIR, Number


def jitter(
    hu: Num[np.ndarray, " N"],
    *,
    scale: Number = 1.0,
    offset: Number = 0.0,
    noise: Float[np.ndarray, " N"] | None = None,
) -> Float[np.ndarray, " N"]:
    """HU as another scanner might give them: stretched about air, shifted, with noise."""
    jittered = np.subtract(hu, np.float32(AIR), dtype=np.float32)
    jittered *= np.float32(scale)
    jittered += np.float32(AIR + offset)
    if noise is not None:
        jittered += noise.astype(np.float32, copy=False)
    return jittered


def acquire(
    hu: Num[np.ndarray, " N"],
    coords: Integer[np.ndarray, "N 3"],
    *,
    sharpness: Number = 0.0,
    slice_blur: Number = 0.0,
    grain: Number = 0.0,
    generator: np.random.Generator | None = None,
) -> Float[np.ndarray, " N"]:
    """HU as another kernel, slice thickness and dose would give them.

    `sharpness` adds that share of what a 3x3x3 binomial filter takes away (below 0 it smooths), `slice_blur` mixes in
    that share of the mean over three slices, `grain` adds noise of that many HU with the filter's correlation. Filters
    know kept voxels alone: no air enters at the border.
    """
    low = coords.min(0)
    at = tuple((coords - low).T.astype(np.intp))
    shape = tuple(coords.max(0) - low + 1)
    box, there = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    box[at], there[at] = hu, 1
    changed = np.array(hu, np.float32)
    if slice_blur:
        thick = _along(box, (1 / 3,) * 3, axes=(2,))[at] / _along(there, (1 / 3,) * 3, axes=(2,))[at]
        changed += np.float32(slice_blur) * (thick - changed)
        box[at] = changed
    if sharpness:
        smooth = _along(box, BINOMIAL)[at] / _along(there, BINOMIAL)[at]
        changed += np.float32(sharpness) * (changed - smooth)
    if grain:
        white = np.zeros(shape, np.float32)
        white[at] = generator.standard_normal(len(hu), dtype=np.float32)
        spread = np.sqrt(_along(there, tuple(w * w for w in BINOMIAL))[at])
        changed += np.float32(grain) * _along(white, BINOMIAL)[at] / spread
    return changed


BINOMIAL = (0.25, 0.5, 0.25)


def _along(
    box: Float[np.ndarray, "X Y Z"], weights: tuple[float, ...], axes: tuple[int, ...] = (0, 1, 2)
) -> Float[np.ndarray, "X Y Z"]:
    """The box filtered along each of the axes, zeros beyond."""
    for axis in axes:
        box = ndimage.correlate1d(box, weights, axis, mode="constant")
    return box
