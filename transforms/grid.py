"""The one resampler: any volume onto a RAS, isotropic, centred cube, by the rule that RESAMPLER names.

Linear interpolation; along an axis that shrinks, the triangle is stretched to the new step, so that it also smooths.
Axis-aligned volumes take three sparse products, one an axis. Where one axis alone runs true (a tilted gantry, a turn in
the plane) planes are sampled by one sparse product and mixed by another; what is left is sampled in three axes at once.
Axes that run askew are smoothed as much by a Gaussian. Within half a voxel of the volume's border the border's value
holds; beyond is air. Labels take the nearest voxel. Prepared grids and presets' grids are both made here, and what a
grid cuts off is told by `share_beyond` alone. Pure functions; indices are [x, y, z].
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Num, Shaped
from scipy import ndimage, sparse

from transforms.body import BODY_LEVEL
from transforms.windows import AIR

RESAMPLER = "triangle 1"  # name and version of the rule; another number whenever a value or a cut would differ
CUT_OFF = 0.001  # share of what is denser than air beyond a grid, from which on it counts as cut off
ALIGNED = 0.02  # voxels by which a volume may lie off the grid's axes, at its far end, to count as axis-aligned
SLAB = 16  # output planes at a time: bounds the memory


class Grid(NamedTuple):
    """A cubic grid: `size` voxels a side."""

    size: int
    spacing: float
    affine: Float[np.ndarray, "4 4"]


class OnGrid(NamedTuple):
    array: Shaped[np.ndarray, "X Y Z"]
    affine: Float[np.ndarray, "4 4"]
    route: str  # how it came there, in words


class Axis(NamedTuple):
    """How one world axis of the grid samples one axis of the source: grid indices start .. start + rows of weights."""

    start: int
    weights: sparse.csr_matrix


def spacing_of(affine: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, " 3"]:
    return np.linalg.norm(affine[:3, :3], axis=0)


def resample(
    volume: Num[np.ndarray, "A B C"],
    affine: Float[np.ndarray, "4 4"],
    grid: Grid,
    *,
    outside: int = AIR,
    dtype: type = np.int16,
) -> OnGrid:
    """The volume on the grid, `outside` beyond its field; whole numbers are rounded to the nearest."""
    out = np.full((grid.size,) * 3, outside, dtype)
    axes = _aligned_axes(volume.shape, affine, grid)
    true_axis = _true_axis(volume.shape, affine)
    if axes is not None:
        _resample_aligned(volume, axes, out)
        route = "linear along each axis, triangle stretched where the grid is coarser"
    elif true_axis is not None:
        _resample_planes(volume, affine, grid, true_axis, out)
        route = "linear in planes and across them, Gaussian before or triangle stretched where the grid is coarser"
    else:
        _resample_oblique(volume, affine, grid, out, outside)
        route = "linear in three axes at once, Gaussian before where the grid is coarser"
    return OnGrid(out.transpose(2, 1, 0), grid.affine, route)


def millimetres_beyond(shape: Sequence[int], affine: Float[np.ndarray, "4 4"], grid: Grid) -> float:
    """By how much the field reaches beyond the grid on the side where most of it does; half a voxel is none."""
    corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in shape])).reshape(3, -1)
    inside = np.linalg.inv(grid.affine) @ np.vstack([affine[:3, :3] @ corners + affine[:3, 3:], np.ones(8)])
    over = max(-0.5 - inside[:3].min(), inside[:3].max() - (grid.size - 0.5))
    return over * grid.spacing if over > 0.5 + 1e-3 else 0.0


def share_beyond(hu: Num[np.ndarray, "A B C"], affine: Float[np.ndarray, "4 4"], grid: Grid) -> float:
    """Share of what is denser than air (patient, clothes, table) whose voxels' middles lie beyond the grid.

    A volume is cut off by a grid where this is at least CUT_OFF: a field that reaches further with air alone is not.
    """
    if not millimetres_beyond(hu.shape, affine, grid):
        return 0.0
    to_grid = (np.linalg.inv(grid.affine) @ affine)[:3]
    box = _box_inside(hu.shape, to_grid, grid.size)
    if box is not None:
        dense, inside = (np.count_nonzero(np.asarray(part) > BODY_LEVEL) for part in (hu, hu[box]))
        return 1 - int(inside) / int(dense) if dense else 0.0
    dense = inside = 0
    for z in range(hu.shape[2]):
        x, y = np.nonzero(np.asarray(hu[:, :, z]) > BODY_LEVEL)
        on = [_is_inside(_affine_row(row, x, y, z), grid.size) for row in to_grid]
        dense, inside = dense + len(x), inside + int(np.count_nonzero(np.logical_and.reduce(on)))
    return 1 - inside / dense if dense else 0.0


def _is_inside(place: Float[np.ndarray, "..."], size: int) -> Bool[np.ndarray, "..."]:
    return (place >= -0.5 - 1e-6) & (place <= size - 0.5 + 1e-6)


def _box_inside(shape: Sequence[int], to_grid: Float[np.ndarray, "3 4"], size: int) -> tuple[slice, ...] | None:
    """The voxels whose middles lie on the grid, where the axes of both run alike; else None."""
    axes = np.abs(to_grid[:, :3]).argmax(1)
    straight = np.zeros((3, 3))
    straight[range(3), axes] = to_grid[range(3), axes]
    if len(set(axes)) < 3 or (np.abs(to_grid[:, :3] - straight) * np.array(shape)).max() > ALIGNED:
        return None
    box = [slice(0)] * 3
    for row, axis in zip(to_grid, axes, strict=True):
        on = np.flatnonzero(_is_inside(row[axis] * np.arange(shape[axis]) + row[3], size))
        box[axis] = slice(on[0], on[-1] + 1) if len(on) else slice(0)
    return tuple(box)


def centred_grid(shape: Sequence[int], affine: Float[np.ndarray, "4 4"], size: int, spacing: float) -> Grid:
    """The grid whose middle is the scan's middle; moved by less than half a voxel where voxels then coincide."""
    middle = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
    origin = middle - spacing * (size - 1) / 2
    source = _source_axes(affine)
    for world in range(3):
        axis = source[world]
        step = affine[world, axis]
        if abs(abs(step) - spacing) < 1e-4 * spacing:
            off = (origin[world] - affine[world, 3]) / spacing
            origin[world] = affine[world, 3] + spacing * math.floor(off + 0.5 + 1e-6)
    placed = np.diag([spacing, spacing, spacing, 1.0])
    placed[:3, 3] = origin
    return Grid(size, spacing, placed)


def _source_axes(affine: np.ndarray) -> list[int]:
    """For each world axis the source axis that runs most along it, each used once."""
    share = np.abs(affine[:3, :3] / spacing_of(affine))
    taken: dict[int, int] = {}
    for _ in range(3):
        world, axis = np.unravel_index(share.argmax(), share.shape)
        taken[int(world)] = int(axis)
        share[world, :] = share[:, axis] = -1
    return [taken[world] for world in range(3)]


def _settled(values: Float[np.ndarray, "..."], dtype: np.dtype) -> Num[np.ndarray, "..."]:
    """As this kind of number; whole ones the nearest within 16 bits. The values may be written over."""
    if dtype.kind == "f":
        return values
    return np.clip(np.rint(values, out=values), -32768, 32767, out=values).astype(dtype)


# ---- axis-aligned


def _wanted(shape: Sequence[int], affine: np.ndarray, grid: Grid) -> list[tuple[int, np.ndarray]] | None:
    """For each world axis its source axis and the place on it of each grid index; None for oblique or sheared scans."""
    axes = _source_axes(affine)
    straight = np.zeros((3, 3))
    for world, axis in enumerate(axes):
        straight[world, axis] = affine[world, axis]
    off = np.abs((affine[:3, :3] - straight) * np.array(shape))
    if off.max() > ALIGNED * spacing_of(affine).min():
        return None
    # lengths along each axis stay true when a slight turn is ignored; the middle stays in place
    middle = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
    out = []
    for world, axis in enumerate(axes):
        step = affine[world, axis]
        origin = middle[world] - step * (shape[axis] - 1) / 2
        out.append((axis, (grid.affine[world, 3] + grid.spacing * np.arange(grid.size) - origin) / step))
    return out


def _aligned_axes(shape: Sequence[int], affine: np.ndarray, grid: Grid) -> list[tuple[int, Axis]] | None:
    """For each world axis its source axis and weights; None for oblique or sheared scans."""
    wanted = _wanted(shape, affine, grid)
    factors = grid.spacing / spacing_of(affine)
    return wanted and [(axis, axis_weights(places, shape[axis], float(factors[axis]))) for axis, places in wanted]


def axis_weights(wanted: Float[np.ndarray, " N"], length: int, factor: float) -> Axis:
    """Weights of source samples for each wanted place (in source samples) that lies on the source, border included.

    `factor`: source samples a step; above 1 the triangle is that wide on either side, else 1.
    """
    on = np.flatnonzero((wanted >= -0.5 - 1e-6) & (wanted <= length - 0.5 + 1e-6))
    if len(on) == 0:
        return Axis(0, sparse.csr_matrix((0, length), dtype=np.float32))
    wide = max(1.0, factor)
    places = np.clip(wanted[on], 0, length - 1)
    places = np.where(np.abs(places - np.rint(places)) < 1e-5, np.rint(places), places)
    reach = math.ceil(wide)
    taps = np.floor(places)[:, None].astype(np.int64) + np.arange(-reach + 1, reach + 1)
    weights = np.clip(1 - np.abs(taps - places[:, None]) / wide, 0, None)
    weights[(taps < 0) | (taps >= length)] = 0
    weights /= weights.sum(1, keepdims=True)
    rows = np.broadcast_to(np.arange(len(on))[:, None], taps.shape)
    used = weights > 0
    matrix = sparse.csr_matrix((weights[used], (rows[used], taps[used])), (len(on), length), dtype=np.float32)
    return Axis(int(on[0]), matrix)


def _resample_aligned(hu: np.ndarray, axes: list[tuple[int, Axis]], out: np.ndarray) -> None:
    """Planes are resampled as the third axis needs them, then mixed along it; memory [z][y][x], seen as [x, y, z]."""
    source = hu.transpose([axis for axis, _ in axes])
    (_, along_x), (_, along_y), (_, along_z) = axes
    xs = slice(along_x.start, along_x.start + along_x.weights.shape[0])
    ys = slice(along_y.start, along_y.start + along_y.weights.shape[0])
    rows = along_z.weights
    planes: dict[int, np.ndarray] = {}
    for low in range(0, rows.shape[0], SLAB):
        part = rows[low : low + SLAB]
        needed = np.unique(part.indices)
        if len(needed) == 0 or xs.start == xs.stop or ys.start == ys.stop:
            continue
        planes = {z: planes[z] if z in planes else _plane(source[:, :, z], along_x, along_y) for z in needed}
        stack = np.stack([planes[z] for z in needed])
        mixed = part[:, needed] @ stack.reshape(len(needed), -1)
        top = along_z.start + low
        out[top : top + part.shape[0], ys, xs] = _settled(mixed, out.dtype).reshape(part.shape[0], *stack.shape[1:])


def _plane(plane: Num[np.ndarray, "X Y"], along_x: Axis, along_y: Axis) -> Float[np.ndarray, "V U"]:
    """One source plane at the grid's x and y."""
    wide = along_x.weights @ np.ascontiguousarray(plane, np.float32)
    return along_y.weights @ np.ascontiguousarray(wide.T)


# ---- one axis true


def _true_axis(shape: Sequence[int], affine: np.ndarray) -> tuple[int, int] | None:
    """The world axis and source axis that run alike while the other two are askew."""
    axes = _source_axes(affine)
    limit = ALIGNED * spacing_of(affine).min()
    extents = np.abs(affine[:3, :3] * np.array(shape))
    for world in (2, 0, 1):
        axis = axes[world]
        others = np.delete(extents[world], axis).max(), np.delete(extents[:, axis], world).max()
        if max(others) <= limit:
            return world, axis
    return None


def _resample_planes(
    hu: np.ndarray, affine: np.ndarray, grid: Grid, true_axis: tuple[int, int], out: np.ndarray
) -> None:
    """Every source plane across the true axis is sampled at the grid's points in that plane; then planes are mixed."""
    world, axis = true_axis
    (v, u), (q, p) = ([n for n in range(3) if n != one] for one in (world, axis))
    smoothed = _smoothed(hu, affine, grid, axes=(p, q))
    planes = np.ascontiguousarray(smoothed.transpose(p, q, axis), np.float32).reshape(-1, hu.shape[axis])
    target = out.transpose([2 - world, 2 - u, 2 - v])  # memory is [z][y][x]
    places = grid.affine[world, 3] + grid.spacing * np.arange(grid.size) - affine[world, 3]
    step = affine[world, axis]
    along = axis_weights(places / step, hu.shape[axis], grid.spacing / abs(step))
    rows = slice(along.start, along.start + along.weights.shape[0])
    back = np.linalg.inv(affine[np.ix_([u, v], [p, q])])
    v_world = grid.affine[v, 3] + grid.spacing * np.arange(grid.size) - affine[v, 3]
    for low in range(0, grid.size, SLAB):
        u_index = np.arange(low, min(low + SLAB, grid.size))
        u_world = grid.affine[u, 3] + grid.spacing * u_index - affine[u, 3]
        wanted = np.stack(np.meshgrid(u_world, v_world, indexing="ij"), -1).reshape(-1, 2) @ back.T
        on, weights = _bilinear(wanted, (hu.shape[p], hu.shape[q]))
        if len(on) and rows.start < rows.stop:
            mixed = along.weights @ np.ascontiguousarray((weights @ planes).T)
            u_on, v_on = u_index[on // grid.size], on % grid.size
            target[rows, u_on, v_on] = _settled(mixed, out.dtype)


def _bilinear(wanted: Float[np.ndarray, "N 2"], shape: tuple[int, int]) -> tuple[np.ndarray, sparse.csr_matrix]:
    """Which places lie on a plane, its border included, and the weights of the four pixels around each."""
    lengths = np.array(shape)
    on = np.flatnonzero(((wanted >= -0.5 - 1e-6) & (wanted <= lengths - 0.5 + 1e-6)).all(1))
    places = np.clip(wanted[on], 0, lengths - 1)
    first = np.minimum(places.astype(np.int64), lengths - 2)
    share = places - first
    taps = [(0, 0), (0, 1), (1, 0), (1, 1)]
    columns = np.stack([(first[:, 0] + a) * shape[1] + first[:, 1] + b for a, b in taps], 1)
    weights = np.stack([np.abs(1 - a - share[:, 0]) * np.abs(1 - b - share[:, 1]) for a, b in taps], 1)
    starts = np.arange(0, 4 * len(on) + 1, 4)
    return on, sparse.csr_matrix(
        (weights.ravel().astype(np.float32), columns.ravel(), starts), (len(on), shape[0] * shape[1])
    )


def _smoothed(hu: np.ndarray, affine: np.ndarray, grid: Grid, axes: Sequence[int]) -> np.ndarray:
    """Gaussian along the axes whose steps are finer than the grid's, as wide as a stretched triangle."""
    for axis in axes:
        sigma = math.sqrt(max(0.0, (grid.spacing / spacing_of(affine)[axis]) ** 2 - 1) / 6)
        if sigma > 0.1:
            hu = ndimage.gaussian_filter1d(hu.astype(np.float32), sigma, axis=axis, mode="nearest", truncate=3)
    return hu


# ---- oblique


def _resample_oblique(hu: np.ndarray, affine: np.ndarray, grid: Grid, out: np.ndarray, outside: int) -> None:
    import torch  # takes seconds, and most scans need none of it

    source = np.array(_smoothed(hu, affine, grid, axes=(0, 1, 2)).transpose(2, 1, 0), np.float32, order="C")
    tensor = torch.from_numpy(np.clip(source, -32768, 32767, out=source))[None, None]
    # grid_sample wants -1..1 between the middles of the first and last voxel
    lengths = np.array(hu.shape)
    scale = np.diag([*(2 / np.maximum(lengths - 1, 1)), 1.0])
    scale[:3, 3] = -1
    to_scaled = (scale @ np.linalg.inv(affine) @ grid.affine)[:3]
    border = 1 + (1 + 1e-5) / np.maximum(lengths - 1, 1)
    for box, inner in _blocks(to_scaled, border, grid.size):
        z, y, x = (torch.from_numpy(r).float() for r in np.ogrid[box])
        places = torch.empty(*(s.stop - s.start for s in box), 3)
        for axis, row in enumerate(to_scaled.tolist()):
            torch.add(row[0] * x, row[1] * y + (row[2] * z + row[3]), out=places[..., axis])
        options = {"mode": "bilinear", "padding_mode": "border", "align_corners": True}
        sampled = torch.nn.functional.grid_sample(tensor, places[None], **options)[0, 0]
        if not inner:
            sampled.masked_fill_((places.abs() > torch.tensor(border).float()).any(-1), outside)
        out[box] = _settled(sampled.numpy(), out.dtype)


def _blocks(to_scaled: np.ndarray, border: np.ndarray, size: int, block: tuple[int, int, int] = (SLAB, 64, 64)):
    """Blocks [z, y, x] of the grid that touch the scan, and whether they lie on it whole.

    The map is affine, so the corners of a block bound all of it.
    """
    for low in np.ndindex(*(-(-size // side) for side in block)):
        box = tuple(slice(n * side, min((n + 1) * side, size)) for n, side in zip(low, block, strict=True))
        ends = np.array(np.meshgrid(*[(s.start, s.stop - 1) for s in reversed(box)])).reshape(3, -1)
        corners = to_scaled[:, :3] @ ends + to_scaled[:, 3:]
        if (corners.min(1) <= border).all() and (corners.max(1) >= -border).all():
            yield box, bool((np.abs(corners).max(1) <= border).all())


# ---- labels


def _affine_row(row, x, y, z):
    """One row of an affine at open grids of x, y, z."""
    return row[0] * x + row[1] * y + (row[2] * z + row[3])


def resample_labels(
    labels: Shaped[np.ndarray, "A B C"], affine: Float[np.ndarray, "4 4"], grid: Grid
) -> Shaped[np.ndarray, "X Y Z"]:
    """Labels on the grid, each voxel that of the nearest source voxel; 0 outside."""
    out = np.zeros((grid.size,) * 3, labels.dtype)
    wanted = _wanted(labels.shape, affine, grid)
    if wanted is not None:
        nearest = [np.floor(places + 0.5 + 1e-6).astype(np.int64) for _, places in wanted]
        ons = [np.flatnonzero((n >= 0) & (n < labels.shape[a])) for n, (a, _) in zip(nearest, wanted, strict=True)]
        if all(map(len, ons)):
            taken = labels.transpose([axis for axis, _ in wanted])[
                np.ix_(*(n[on] for n, on in zip(nearest, ons, strict=True)))
            ]
            out[tuple(slice(on[0], on[-1] + 1) for on in reversed(ons))] = taken.T
        return out.transpose(2, 1, 0)
    to_source = np.linalg.inv(affine) @ grid.affine
    border = np.array(labels.shape) / 2
    middle = to_source[:3].copy()
    middle[:, 3] -= border - 0.5
    for box, _ in _blocks(middle, border, grid.size):
        z, y, x = np.ogrid[box]
        index = [np.floor(_affine_row(row, x, y, z) + 0.5 + 1e-6).astype(np.int64) for row in to_source[:3]]
        inside = np.logical_and.reduce([(i >= 0) & (i < n) for i, n in zip(index, labels.shape, strict=True)])
        clipped = tuple(np.clip(i, 0, n - 1) for i, n in zip(index, labels.shape, strict=True))
        out[box] = np.where(inside, labels[clipped], 0)
    return out.transpose(2, 1, 0)
