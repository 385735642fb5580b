"""CT arrays: HU windows, body mask, what is kept, dense to sparse and back, resampling, crops, augmentation.

Pure functions on arrays indexed [x, y, z] along R A S. HU in, HU out unless a name says otherwise; values of windows
lie in -1..1. Nothing here reads files, knows a network or draws random numbers: who wants chance passes it in.
"""

import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
from einops import reduce, repeat
from jaxtyping import Bool, Float, Int, Integer, Num, Shaped
from scipy import ndimage
from scipy.spatial import cKDTree

AIR = -1000  # HU around the patient: the value of padding
DROPPED = -1024  # HU that a voxel outside the kept ones stands for
BODY_LEVEL = -400  # HU between air and tissue: a voxel a little more than half full
WALL_LEVEL = -650  # HU of a block that is a third wall
CUT_OFF = 0.001  # share of what is denser than air beyond a grid, above which it is reported
BODY_BLOCK_MM = 6.0  # a table's shell is much thinner, a chest wall is not
INTERFACES = (-400, 200)  # HU between air and tissue, between soft tissue and bone
BAND = 4  # voxels on either side of a surface
SATURATION = 0.02  # a window says little about HU this close to its ends
BLOCK = 8  # crops start at multiples of this, so that latent voxels keep their place

WINDOWS = MappingProxyType(  # name -> (width, level) in HU; the first four are prepared by default
    {
        "lung": (1500, -600),
        "bone": (1500, 300),
        "soft_tissue": (400, 50),
        "brain": (80, 35),
        "mediastinum": (350, 50),
        "abdomen": (400, 40),
        "liver": (150, 30),
        "angio": (600, 300),
        "subdural": (200, 75),
        "stroke": (40, 40),
    }
)
DEFAULT_WINDOWS = ("lung", "bone", "soft_tissue", "brain")

Number = int | float
Voxel = Sequence[int] | Integer[np.ndarray, " 3"]


class Sparse(NamedTuple):
    coords: Int[np.ndarray, "N 3"]
    values: Shaped[np.ndarray, "N ..."]


class OnGrid(NamedTuple):
    array: Float[np.ndarray, "X Y Z"]
    affine: Float[np.ndarray, "4 4"]


# ---- windows


def window_bounds(name: str) -> tuple[float, float]:
    """Lowest and highest HU that a named window shows."""
    if name not in WINDOWS:
        raise ValueError(f"window must be one of {', '.join(WINDOWS)}, got {name!r}")
    width, level = WINDOWS[name]
    return level - width / 2, level + width / 2


def window_file_name(name: str, suffix: str = ".npy") -> str:
    """The file that holds this window in a prepared case: lung -> lung_w1500_l-600.npy."""
    window_bounds(name)
    width, level = WINDOWS[name]
    return f"{name}_w{width}_l{level}{suffix}"


def window(hu: Num[np.ndarray, "..."], width: Number, level: Number) -> Float[np.ndarray, "..."]:
    """(HU - (L - W/2)) / W, clipped to 0..1, float32."""
    return np.clip((np.asarray(hu, np.float32) - np.float32(level - width / 2)) / np.float32(width), 0, 1)


def window_values(hu: Num[np.ndarray, "..."], names: Sequence[str]) -> Float[np.ndarray, "... C"]:
    """One channel a window, -1 at its lower end and 1 at its upper end."""
    if not names:
        raise ValueError("windows must name at least one window, got none")
    hu = np.asarray(hu)
    values = np.empty((*hu.shape, len(names)), np.float32)
    for channel, name in enumerate(names):
        window_bounds(name)
        values[..., channel] = window(hu, *WINDOWS[name]) * 2 - 1
    return values


def hu_from_windows(values: Float[np.ndarray, "... C"], names: Sequence[str]) -> Float[np.ndarray, "..."]:
    """HU as shown by the narrowest window that is not near its ends, else by the widest.

    Where all windows are near their lower ends, or all near their upper ends, the end that lies farthest out is
    believed: it need not be the widest's.
    """
    if values.shape[-1] != len(names):
        raise ValueError(f"values must have a channel for each of {list(names)}, got {values.shape[-1]} channels")
    parts = (np.asarray(values, np.float32) + 1) / 2
    lower, upper = np.array([window_bounds(name) for name in names], np.float32).T
    levels = lower + parts * (upper - lower)  # the HU that each window shows
    widths = upper - lower
    low, high = (parts < 0.5).all(-1), (parts > 0.5).all(-1)
    hu = np.where(low, levels.min(-1), np.where(high, levels.max(-1), levels[..., widths.argmax()]))
    for channel in np.argsort(-widths, kind="stable"):  # the narrowest comes last and wins
        inside = (parts[..., channel] > SATURATION) & (parts[..., channel] < 1 - SATURATION)
        hu = np.where(inside, levels[..., channel], hu)
    return hu.astype(np.float32)


def windows_range(names: Sequence[str]) -> tuple[float, float]:
    """Lowest and highest HU that the windows together can show: errors in HU are against truth clipped to it."""
    bounds = [window_bounds(name) for name in names]
    return min(low for low, _ in bounds), max(high for _, high in bounds)


# ---- masks


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
    size = 0
    while np.count_nonzero(body) != size:  # what one plane closes may close another
        size = np.count_nonzero(body)
        for axes in ((0, 1, 2), (0, 1), (0, 2), (1, 2)):
            body |= _enclosed(body, axes)
    if factor == 1:
        return body
    inner = ndimage.binary_erosion(body, border_value=1)
    outer = ndimage.binary_dilation(body)
    inner, outer = (
        repeat(m, "x y z -> (x a) (y b) (z c)", a=factor, b=factor, c=factor)[tuple(map(slice, hu.shape))]
        for m in (inner, outer)
    )
    return inner | (outer & (hu > BODY_LEVEL))


def _signed_distance(mask: Bool[np.ndarray, "X Y Z"]) -> Float[np.ndarray, "X Y Z"]:
    """Voxels from each centre to the surface of a mask, negative inside; endless where there is no surface."""
    if mask.all() or not mask.any():
        return np.where(mask, -np.inf, np.inf)
    outside = ndimage.distance_transform_edt(~mask)
    inside = ndimage.distance_transform_edt(mask)
    return np.where(mask, 0.5 - inside, outside - 0.5)


def _above_air(hu: Num[np.ndarray, "X Y Z"], windows: Sequence[str], _spacing: Number) -> Bool[np.ndarray, "X Y Z"]:
    """Above air and above zero in some window."""
    return hu > max(AIR, windows_range(windows)[0])


def _near_interfaces(
    hu: Num[np.ndarray, "X Y Z"], _windows: Sequence[str], _spacing: Number
) -> Bool[np.ndarray, "X Y Z"]:
    """Within a few voxels of a surface between air, soft tissue and bone."""
    kept = np.zeros(hu.shape, bool)
    for level in INTERFACES:
        kept |= np.abs(_signed_distance(hu > level)) < BAND
    return kept


def _unsaturated(hu: Num[np.ndarray, "X Y Z"], windows: Sequence[str], spacing: Number) -> Bool[np.ndarray, "X Y Z"]:
    """Body voxels that some window does not saturate, and their neighbours."""
    unsaturated = np.zeros(hu.shape, bool)
    for name in windows:
        low, high = window_bounds(name)
        unsaturated |= (hu > low) & (hu < high)
    neighbours = ndimage.generate_binary_structure(3, 3)
    return ndimage.binary_dilation(unsaturated & body_mask(hu, spacing=spacing), neighbours)


class Keep(NamedTuple):
    """A sparsification: which voxels become rows, and what the dropped ones stand for."""

    mask: Callable[[np.ndarray, Sequence[str], Number], np.ndarray]  # of HU, windows and spacing in mm
    fill: Number | Literal["nearest"]  # what `densify` puts where a voxel was dropped
    by_window: bool  # whether the mask depends on the windows


KEEPS = MappingProxyType(
    {
        "body": Keep(lambda hu, _, spacing: body_mask(hu, spacing=spacing), DROPPED, by_window=False),
        "nonzero": Keep(_above_air, DROPPED, by_window=True),
        "band": Keep(_near_interfaces, "nearest", by_window=False),
        "informative": Keep(_unsaturated, "nearest", by_window=True),
    }
)


def _above_air(hu: Num[np.ndarray, "X Y Z"], windows: Sequence[str], _spacing: Number) -> Bool[np.ndarray, "X Y Z"]:
    """Above air and above zero in some window."""
    return hu > max(AIR, windows_range(windows)[0])


def _near_interfaces(
    hu: Num[np.ndarray, "X Y Z"], _windows: Sequence[str], _spacing: Number
) -> Bool[np.ndarray, "X Y Z"]:
    """Within a few voxels of a surface between air, soft tissue and bone."""
    kept = np.zeros(hu.shape, bool)
    for level in INTERFACES:
        kept |= np.abs(_signed_distance(hu > level)) < BAND
    return kept


def _unsaturated(hu: Num[np.ndarray, "X Y Z"], windows: Sequence[str], spacing: Number) -> Bool[np.ndarray, "X Y Z"]:
    """Body voxels that some window does not saturate, and their neighbours."""
    unsaturated = np.zeros(hu.shape, bool)
    for name in windows:
        low, high = window_bounds(name)
        unsaturated |= (hu > low) & (hu < high)
    neighbours = ndimage.generate_binary_structure(3, 3)
    return ndimage.binary_dilation(unsaturated & body_mask(hu, spacing=spacing), neighbours)


class Keep(NamedTuple):
    """A sparsification: which voxels become rows, and what the dropped ones stand for."""

    mask: Callable[[np.ndarray, Sequence[str], Number], np.ndarray]  # of HU, windows and spacing in mm
    fill: Number | Literal["nearest"]  # what `densify` puts where a voxel was dropped
    by_window: bool  # whether the mask depends on the windows


KEEPS = MappingProxyType(
    {
        "body": Keep(lambda hu, _, spacing: body_mask(hu, spacing=spacing), DROPPED, by_window=False),
        "nonzero": Keep(_above_air, DROPPED, by_window=True),
        "band": Keep(_near_interfaces, "nearest", by_window=False),
        "informative": Keep(_unsaturated, "nearest", by_window=True),
    }
)


def keep_mask(
    hu: Num[np.ndarray, "X Y Z"],
    keep: str = "body",
    *,
    windows: Sequence[str] = DEFAULT_WINDOWS,
    spacing: Number = 4.0,
) -> Bool[np.ndarray, "X Y Z"]:
    """Which voxels become rows, by one of KEEPS: `body` is the patient."""
    if keep not in KEEPS:
        raise ValueError(f"keep must be one of {', '.join(KEEPS)}, got {keep!r}")
    return KEEPS[keep].mask(np.asarray(hu), windows, spacing)


def signed_band(mask: Bool[np.ndarray, "X Y Z"], band: Number = BAND) -> Float[np.ndarray, "X Y Z"]:
    """Distance to the surface of a 0/1 mask over `band` voxels, clipped to -1..1, negative inside."""
    return np.clip(_signed_distance(mask) / band, -1, 1).astype(np.float32)


# ---- dense and sparse


def sparsify_masks(masks: Shaped[np.ndarray, "X Y Z C"]) -> Sparse:
    """0/1 masks as signed bands, one a channel; voxels far from every surface are dropped."""
    bands = np.stack([signed_band(masks[..., channel] > 0.5) for channel in range(masks.shape[-1])], -1)
    return sparsify(bands, (np.abs(bands) < 1).any(-1))


def sparsify(array: Shaped[np.ndarray, "X Y Z ..."], mask: Bool[np.ndarray, "X Y Z"]) -> Sparse:
    """Coordinates and values of the kept voxels, x slowest."""
    coords = np.argwhere(mask)
    return Sparse(coords.astype(np.int16 if max(mask.shape) < 2**15 else np.int32), array[mask])


def densify(
    values: Shaped[np.ndarray, "N ..."],
    coords: Integer[np.ndarray, "N 3"],
    shape: Sequence[int],
    *,
    fill: Number | Literal["nearest"] = DROPPED,
) -> Shaped[np.ndarray, "X Y Z ..."]:
    """The dense array; a dropped voxel takes `fill`, or with "nearest" the value of the kept voxel nearest to it."""
    x, y, z = np.asarray(coords, np.int64).T
    if fill != "nearest":
        array = np.full((*shape, *values.shape[1:]), fill, values.dtype)
        array[x, y, z] = values
        return array
    if len(values) == 0:
        raise ValueError("fill='nearest' needs at least one kept voxel, got none")
    dropped = np.ones(tuple(shape), bool)
    dropped[x, y, z] = False
    array = np.empty((*shape, *values.shape[1:]), values.dtype)
    array[x, y, z] = values
    missing = np.argwhere(dropped)
    if len(missing):
        nearest = cKDTree(coords).query(missing)[1]
        array[dropped] = values[nearest]
    return array


def fill_for(keep: str) -> Number | str:
    """What `densify` puts where a voxel was dropped, so that every mode answers for the whole grid."""
    return KEEPS[keep].fill


# ---- resampling


def _weights(size_in: int, size_out: int, ratio: float) -> Float[np.ndarray, "out in"]:
    """Linear interpolation on voxel centres with both centres aligned; rows outside the input are zero.

    When shrinking the input is first smoothed by the Gaussian that brings its voxel's width to the output's
    (Cardoso et al. 2015, scale factor smoothing).
    """
    place = (size_in - 1) / 2 + (np.arange(size_out) - (size_out - 1) / 2) * ratio
    inside = (place >= -0.5 - 1e-6) & (place <= size_in - 0.5 + 1e-6)
    place = np.clip(place, 0, size_in - 1)
    low = np.minimum(np.floor(place + 1e-9).astype(int), size_in - 1)
    high = np.minimum(low + 1, size_in - 1)
    part = np.clip(place - low, 0, 1)
    weights = np.zeros((size_out, size_in), np.float32)
    rows = np.arange(size_out)
    np.add.at(weights, (rows, low), 1 - part)
    np.add.at(weights, (rows, high), part)
    if ratio > 1 + 1e-6:
        sigma = np.sqrt(ratio**2 - 1) / (2 * np.sqrt(2 * np.log(2)))
        weights = weights @ ndimage.gaussian_filter1d(np.eye(size_in, dtype=np.float32), sigma, axis=0, mode="nearest")
    return (weights * inside[:, None]).astype(np.float32)


def resample(
    hu: Shaped[np.ndarray, "X Y Z"],
    *,
    spacing_in: Sequence[Number],
    spacing_out: Number,
    grid: int,
    affine: Float[np.ndarray, "4 4"] | None = None,
    air: Number = AIR,
) -> OnGrid:
    """The volume on a cubic grid of `grid` voxels of `spacing_out` mm around the same centre, `air` beyond its field.

    The affine takes an index of the result to the world of `affine` (default: mm along the input's axes).
    """
    if len(spacing_in) != 3 or min(spacing_in) <= 0 or spacing_out <= 0:
        raise ValueError(f"spacings must be positive, got {tuple(spacing_in)} and {spacing_out}")
    ratios = [spacing_out / step for step in spacing_in]
    weights = [_weights(n, grid, ratio) for n, ratio in zip(hu.shape, ratios, strict=True)]
    turned = hu.flags.f_contiguous  # planes are taken along the slowest axis: the input may be a memory map
    volume, (first, second, third) = (hu.T, weights[::-1]) if turned else (hu, weights)
    planes = np.empty((len(volume), grid, grid), np.float32)
    for index in range(len(volume)):
        planes[index] = second @ (np.asarray(volume[index], np.float32) - np.float32(air)) @ third.T
    array = (first @ planes.reshape(len(planes), -1)).reshape(grid, grid, grid) + np.float32(air)
    array = array.T if turned else array
    if affine is None:
        affine = np.diag([*spacing_in, 1.0])
    index_map = np.diag([*ratios, 1.0])
    index_map[:3, 3] = [(n - 1) / 2 - (grid - 1) / 2 * ratio for n, ratio in zip(hu.shape, ratios, strict=True)]
    return OnGrid(array, np.asarray(affine, np.float64) @ index_map)


def share_beyond(
    hu: Num[np.ndarray, "X Y Z"], *, spacing_in: Sequence[Number], spacing_out: Number, grid: int
) -> float:
    """Share of what is denser than air (patient, clothes, table) that lies outside the cube of `resample`."""
    inside = []
    for n, step in zip(hu.shape, spacing_in, strict=True):
        margin = max(math.ceil((n - 1) / 2 - grid * spacing_out / step / 2 - 1e-6), 0)
        inside.append(slice(margin, n - margin))
    if all(part.start == 0 for part in inside):
        return 0.0
    dense = int(np.count_nonzero(hu > BODY_LEVEL))
    return 1 - int(np.count_nonzero(hu[tuple(inside)] > BODY_LEVEL)) / dense if dense else 0.0


# ---- crops and augmentation of sparse voxels


def columns(coords: Integer[np.ndarray, "N 3"]) -> list[Integer[np.ndarray, " N"]]:
    """x, y and z apart: NumPy is up to twenty times slower at comparing or reducing millions of rows of three.

    Faster still where each lies in one piece, as `sparsify` leaves them.
    """
    return [coords[:, axis] for axis in range(3)]


def pick_rows(array: Shaped[np.ndarray, "N ..."], rows: Int[np.ndarray, " M"]) -> Shaped[np.ndarray, "M ..."]:
    """`array[rows]`, in columns where the array lies in columns."""
    if array.ndim != 2 or not array.flags.f_contiguous:
        return array[rows]
    taken = np.empty((len(rows), array.shape[1]), array.dtype, order="F")
    for column, source in zip(taken.T, array.T, strict=True):
        np.take(source, rows, out=column, mode="clip")  # other modes write to a buffer first
    return taken


class Box(NamedTuple):
    start: tuple[int, int, int]
    stop: tuple[int, int, int]


def crop_box(
    coords: Integer[np.ndarray, "N 3"],
    *,
    center: Voxel,
    max_points: int | None = None,
    max_side: int | None = None,
) -> Box:
    """The box around `center` that grows block by block while its voxels fit `max_points` and its sides `max_side`.

    Starts and stops are multiples of eight voxels. Growing goes round the six faces: a box is as cubic as it can be.
    """
    if max_points is not None and max_points < BLOCK**3:
        raise ValueError(f"max_points must be at least {BLOCK**3}, the voxels of one latent block, got {max_points}")
    if max_side is not None and (max_side < BLOCK or max_side % BLOCK):
        raise ValueError(f"crop side must be a multiple of {BLOCK} voxels, got {max_side}")
    x, y, z = (column // BLOCK for column in columns(coords))
    extent = np.array([int(blocks.max()) + 1 for blocks in (x, y, z)])
    leaves = (x[1:] != x[:-1]) | (y[1:] != y[:-1]) | (z[1:] != z[:-1])
    last = np.append(np.flatnonzero(leaves), len(coords) - 1)  # of each run of rows in one block: far fewer to count
    cells = np.ravel_multi_index((x[last], y[last], z[last]), extent)
    counts = np.bincount(cells, weights=np.diff(last, prepend=-1), minlength=extent.prod()).reshape(extent)
    sums = np.pad(counts.cumsum(0).cumsum(1).cumsum(2), ((1, 0),) * 3)  # summed volume: any box in eight look-ups
    limit = len(coords) if max_points is None else max_points
    side = max(extent) if max_side is None else max_side // BLOCK

    def inside(low: np.ndarray, high: np.ndarray) -> int:
        total = 0
        for corner in np.ndindex(2, 2, 2):
            at = tuple(np.where(corner, high, low))
            total += (-1) ** (3 - sum(corner)) * int(sums[at])
        return total

    low = np.clip(np.asarray(center, np.int64) // BLOCK, 0, extent - 1)
    high = low + 1
    faces = [(axis, end) for end in (1, 0) for axis in range(3)]
    while faces:
        for axis, end in list(faces):
            grown_low, grown_high = low.copy(), high.copy()
            (grown_high if end else grown_low)[axis] += 1 if end else -1
            fits = (
                grown_low[axis] >= 0 and grown_high[axis] <= extent[axis] and grown_high[axis] - grown_low[axis] <= side
            )
            if fits and inside(grown_low, grown_high) <= limit:
                low, high = grown_low, grown_high
            else:
                faces.remove((axis, end))  # a box only grows: what does not fit now never will
    return Box(tuple(int(v) * BLOCK for v in low), tuple(int(v) * BLOCK for v in high))


def crop_to_budget(
    coords: Integer[np.ndarray, "N 3"],
    max_points: int | None,
    *,
    center: Voxel,
    max_side: int | None = None,
) -> Int[np.ndarray, " M"]:
    """Rows in one contiguous box of at most `max_points` voxels, all where they fit; coordinates stay absolute."""
    start, stop = crop_box(coords, center=center, max_points=max_points, max_side=max_side)
    x, y, z = (
        (column >= low) & (column < high) for column, low, high in zip(columns(coords), start, stop, strict=True)
    )
    return np.flatnonzero(x & y & z)


def translate(coords: Integer[np.ndarray, "N 3"], shift: Voxel, shape: Sequence[int]) -> Integer[np.ndarray, "N 3"]:
    """Coordinates moved by whole voxels, as far as the grid allows: nothing leaves it, left stays left."""
    room_low = [-int(column.min()) for column in columns(coords)]
    room_high = [size - 1 - int(column.max()) for column, size in zip(columns(coords), shape, strict=True)]
    return coords + np.clip(np.asarray(shift, np.int64), room_low, room_high).astype(coords.dtype)


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
