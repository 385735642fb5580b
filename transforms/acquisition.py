"""HU as another scanner, kernel, slice thickness or dose would give them.

Nothing here draws its own chance: who wants it passes numbers or a generator in.
"""

from functools import cache

import numpy as np
from jaxtyping import Float, Int16, Integer, Num
from scipy import ndimage
from scipy.special import ndtri

from transforms.windows import AIR, Number

_PART = 1 << 15  # values at a time: they stay in the processor's cache


@cache
def _normal_numbers() -> Float[np.ndarray, " 65536"]:
    """Equally likely, up to 4.3 deviations from the mean."""
    return ndtri((np.arange(1 << 16) + 0.5) / (1 << 16)).astype(np.float32)


def jitter(
    hu: Num[np.ndarray, " N"],
    *,
    scale: Number = 1.0,
    offset: Number = 0.0,
    noise: Number = 0.0,
    generator: np.random.Generator | None = None,
) -> Float[np.ndarray, " N"]:
    """HU as another scanner might give them: stretched about air, shifted, with normal noise of `noise` HU.

    Noise is looked up by 16 random bits a voxel, a tenth of the time that normal draws take.
    """
    jittered = np.empty(len(hu), np.float32)
    if noise:
        bits = generator.bit_generator.random_raw(-(-len(hu) // 4)).view(np.uint16)
        drawn = _normal_numbers() * np.float32(noise)
    for start in range(0, len(hu), _PART):
        part = jittered[start : start + _PART]
        np.subtract(hu[start : start + _PART], np.float32(AIR), out=part)
        part *= np.float32(scale)
        part += np.float32(AIR + offset)
        if noise:
            part += drawn[bits[start : start + len(part)]]
    return jittered


def whole_hu(hu: Num[np.ndarray, " N"]) -> Int16[np.ndarray, " N"]:
    """HU as scanners give them, drawn ones too: whole, at half the size of float32."""
    if hu.dtype == np.int16:
        return np.ascontiguousarray(hu)
    made, limits = np.empty(len(hu), np.int16), np.iinfo(np.int16)
    for start in range(0, len(hu), _PART):
        part = np.rint(hu[start : start + _PART])
        made[start : start + _PART] = np.clip(part, limits.min, limits.max, out=part)
    return made


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
