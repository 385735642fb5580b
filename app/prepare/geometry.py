"""World geometry: any affine onto the RAS, isotropic, air-padded grid that is centred on the scan.

Linear interpolation; along an axis that shrinks, the triangle is stretched to the new step, so that it also smooths.
Axis-aligned scans take three sparse products, one an axis; oblique and sheared ones are smoothed the same amount by a
Gaussian and sampled in one go. Within half a voxel of the scan's border the border's value holds; beyond is air.
Labels take the nearest voxel. Pure functions; indices are [x, y, z].
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num, Shaped
from scipy import ndimage, sparse

from app.prepare.codes import Finding, found
from app.prepare.values import AIR

ALIGNED = 0.02  # voxels by which a scan may lie off the grid's axes, at its far end, to count as axis-aligned
COARSE = 4.0  # grid steps a source voxel may measure before it is called low resolution
SLAB = 16  # output planes at a time: bounds the memory


class Grid(NamedTuple):
    """A cubic grid: `size` voxels a side."""

    size: int
    spacing: float
    affine: Float[np.ndarray, "4 4"]


class Normalised(NamedTuple):
    hu: Int[np.ndarray, "X Y Z"]
    affine: Float[np.ndarray, "4 4"]
    findings: tuple[Finding, ...]
    steps: tuple[str, ...]


class Axis(NamedTuple):
    """How one world axis of the grid samples one axis of the source: grid indices start .. start + rows of weights."""

    start: int
    weights: sparse.csr_matrix


def spacing_of(affine: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, " 3"]:
    return np.linalg.norm(affine[:3, :3], axis=0)


def normalise(volume: "object", size: int, spacing: float | int) -> Normalised:
    """A volume (`hu`, `affine`) as int16 HU on the grid of this size and spacing around its centre."""
    hu, affine = volume.hu, np.asarray(volume.affine, np.float64)
    grid = centred_grid(hu.shape, affine, size, spacing)
    axes = _aligned_axes(hu.shape, affine, grid)
    if axes is not None:
        out = _resample_aligned(hu, axes, grid.size)
        step = "linear along each axis, triangle stretched where the grid is coarser"
    else:
        out = _resample_oblique(hu, affine, grid)
        step = "linear in three axes at once, Gaussian before where the grid is coarser"
    return Normalised(out, grid.affine, _grid_findings(hu.shape, affine, grid), (step, f"air {AIR} outside the scan"))


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


def _grid_findings(shape: Sequence[int], affine: np.ndarray, grid: Grid) -> tuple[Finding, ...]:
    findings = []
    corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in shape])).reshape(3, -1)
    inside = np.linalg.inv(grid.affine) @ np.vstack([affine[:3, :3] @ corners + affine[:3, 3:], np.ones(8)])
    over = max(-0.5 - inside[:3].min(), inside[:3].max() - (grid.size - 0.5))
    if over > 0.5 + 1e-3:
        findings.append(found("FOV_CROPPED", f"by up to {over * grid.spacing:.0f} mm on a side"))
    if spacing_of(affine).max() > COARSE * grid.spacing:
        voxel = " x ".join(f"{s:.3g}" for s in spacing_of(affine))
        findings.append(found("LOW_RESOLUTION", f"{voxel} mm onto {grid.spacing:g} mm"))
    return tuple(findings)


# ---- axis-aligned


def _aligned_axes(shape: Sequence[int], affine: np.ndarray, grid: Grid) -> list[tuple[int, Axis]] | None:
    """For each world axis its source axis and weights; None where the scan is oblique or sheared."""
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
        wanted = (grid.affine[world, 3] + grid.spacing * np.arange(grid.size) - origin) / step
        out.append((axis, axis_weights(wanted, shape[axis], grid.spacing / abs(step))))
    return out


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


def _resample_aligned(hu: np.ndarray, axes: list[tuple[int, Axis]], size: int) -> np.ndarray:
    """Planes are resampled as the third axis needs them, then mixed along it; [z][y][x] memory, returned as [x, y, z]."""
    source = hu.transpose([axis for axis, _ in axes])
    (_, along_x), (_, along_y), (_, along_z) = axes
    out = np.full((size, size, size), AIR, np.int16)
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
        whole = np.clip(np.rint(mixed, out=mixed), -32768, 32767, out=mixed).astype(np.int16)
        top = along_z.start + low
        out[top : top + part.shape[0], ys, xs] = whole.reshape(part.shape[0], *stack.shape[1:])
    return out.transpose(2, 1, 0)


def _plane(plane: Num[np.ndarray, "X Y"], along_x: Axis, along_y: Axis) -> Float[np.ndarray, "V U"]:
    """One source plane at the grid's x and y."""
    wide = along_x.weights @ np.ascontiguousarray(plane, np.float32)
    return along_y.weights @ np.ascontiguousarray(wide.T)


# ---- oblique


def _resample_oblique(hu: np.ndarray, affine: np.ndarray, grid: Grid) -> np.ndarray:
    import torch  # takes seconds, and most scans need none of it

    smooth = [math.sqrt(max(0.0, (grid.spacing / step) ** 2 - 1) / 6) for step in spacing_of(affine)]
    source = np.ascontiguousarray(hu.transpose(2, 1, 0), np.float32)
    for axis, sigma in enumerate(reversed(smooth)):
        if sigma > 0.1:
            source = ndimage.gaussian_filter1d(source, sigma, axis=axis, mode="nearest", truncate=3)
    tensor = torch.from_numpy(source)[None, None]
    out = np.full((grid.size,) * 3, AIR, np.int16)
    for box, places, inside in _slabs(hu.shape, affine, grid):
        # grid_sample wants -1..1 between the middles of the first and last voxel
        scaled = places * (2 / np.maximum(np.array(hu.shape) - 1, 1)) - 1
        sampled = torch.nn.functional.grid_sample(
            tensor,
            torch.from_numpy(scaled.astype(np.float32))[None],
            mode="bilinear",
            padding_mode="border",
            align_corners=True,
        )
        values = np.clip(np.rint(sampled[0, 0].numpy()), -32768, 32767).astype(np.int16)
        out[box] = np.where(inside, values, AIR)
    return out.transpose(2, 1, 0)


def _slabs(shape: Sequence[int], affine: np.ndarray, grid: Grid):
    """Boxes [z, y, x] of the grid around the scan, the source place of each voxel, and whether it lies on the scan."""
    to_source = np.linalg.inv(affine) @ grid.affine
    corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in shape])).reshape(3, -1)
    back = np.linalg.inv(to_source)
    box = back[:3, :3] @ corners + back[:3, 3:]
    low = np.clip(np.floor(box.min(1)).astype(int), 0, grid.size)
    high = np.clip(np.ceil(box.max(1)).astype(int) + 1, 0, grid.size)
    ends = np.array(shape) - 0.5 + 1e-6
    for z in range(low[2], high[2], SLAB):
        top = min(z + SLAB, high[2])
        ranges = [np.arange(z, top), np.arange(low[1], high[1]), np.arange(low[0], high[0])]
        if min(map(len, ranges)) == 0:
            continue
        zs, ys, xs = (
            r.astype(np.float64).reshape(s) for r, s in zip(ranges, [(-1, 1, 1), (1, -1, 1), (1, 1, -1)], strict=True)
        )
        places = np.stack(
            [to_source[i, 0] * xs + to_source[i, 1] * ys + to_source[i, 2] * zs + to_source[i, 3] for i in range(3)], -1
        )
        inside = ((places >= -0.5 - 1e-6) & (places <= ends)).all(-1)
        where = (slice(z, top), slice(low[1], high[1]), slice(low[0], high[0]))
        yield where, places, inside


# ---- labels


def resample_labels(
    labels: Shaped[np.ndarray, "A B C"], affine: Float[np.ndarray, "4 4"], grid: Grid
) -> Shaped[np.ndarray, "X Y Z"]:
    """Labels on the grid, each voxel that of the nearest source voxel; 0 outside."""
    out = np.zeros((grid.size,) * 3, labels.dtype)
    for box, places, inside in _slabs(labels.shape, affine, grid):
        nearest = np.clip(np.floor(places + 0.5 + 1e-6), 0, np.array(labels.shape) - 1).astype(np.int64)
        x, y, z = nearest[..., 0], nearest[..., 1], nearest[..., 2]
        out[box] = np.where(inside, labels[x, y, z], 0)
    return out.transpose(2, 1, 0)
