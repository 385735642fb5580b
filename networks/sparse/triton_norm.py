"""Group normalisation of each sample's own voxels with its activation, and its gradients, fused in Triton. CUDA.

Rows are cut into chunks of one sample; their means and squares are combined in float64, in a fixed order, so repeats
are equal to the bit. What ops.py does in plain torch, in three launches a pass.
"""

from typing import NamedTuple, no_type_check

import numpy as np
import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from networks.sparse.triton_launch import ceil_div, power_of_two, quick

ELEMENTS = 8192  # of a step
CHUNKS = 1024  # of a batch, about: eight programs for each processor of a large card


class Chunks(NamedTuple):
    """Runs of consecutive rows of one sample, about as many in all as a card works on at a time."""

    bounds: Int32[Tensor, "J 3"]  # sample, first row, end
    starts: Int32[Tensor, " B1"]  # the first chunk of each sample, and the end


def cut(sample_sizes: list[int], rows: int, device: torch.device) -> Chunks:
    """Chunks of a multiple of `rows` rows."""
    length = rows * max(1, ceil_div(sum(sample_sizes), rows * CHUNKS))
    firsts = [np.arange(0, size, length, dtype=np.int32) for size in sample_sizes]
    bounds, offset = [np.empty((0, 3), dtype=np.int32)], 0
    for sample, (first, size) in enumerate(zip(firsts, sample_sizes, strict=True)):
        end = np.minimum(first + length, size)
        bounds.append(np.stack([np.full_like(first, sample), offset + first, offset + end], 1))
        offset += size
    starts = np.cumsum([0, *map(len, firsts)])
    flat = torch.from_numpy(np.concatenate([np.concatenate(bounds).ravel(), starts]).astype(np.int32))
    flat = flat.to(device, non_blocking=True)
    return Chunks(flat[: -len(starts)].view(-1, 3), flat[-len(starts) :].clone())


def chunk_rows(channels: int) -> int:
    """Rows of a step."""
    return max(1, ELEMENTS // power_of_two(channels))


class Statistics(NamedTuple):
    """Of a group norm's input, spread to channels: what its backward needs."""

    mean: Float32[Tensor, "B C"]
    rstd: Float32[Tensor, "B C"]


def group_norm(
    x: Float[Tensor, "N C"],
    chunks: Chunks,
    num_groups: int,
    weight: Float[Tensor, " C"],
    bias: Float[Tensor, " C"],
    *,
    eps: float,
    silu: bool,
) -> tuple[Float[Tensor, "N C"], Statistics]:
    out, parts, stats = torch.empty_like(x), _moments_of(x, chunks), Statistics(*_tables(x, chunks))
    grid, shape = _by_chunk(x, chunks)
    groups, sizes = _by_group(x, chunks, num_groups)
    _moments[grid](x, chunks.bounds, parts, **shape)
    _combine[groups](parts, chunks.bounds, chunks.starts, *stats, eps, **sizes)
    _normalize[grid](x, chunks.bounds, *stats, weight, bias, out, SILU=silu, **shape)
    return out, stats


def _moments_of(x: Float[Tensor, "N C"], chunks: Chunks) -> Float32[Tensor, "J 2 C"]:
    return x.new_empty((chunks.bounds.shape[0], 2, x.shape[1]), dtype=torch.float32)


def _tables(x: Float[Tensor, "N C"], chunks: Chunks) -> Float32[Tensor, "2 B C"]:
    return x.new_empty((2, chunks.starts.shape[0] - 1, x.shape[1]), dtype=torch.float32)


def _by_chunk(x: Float[Tensor, "N C"], chunks: Chunks) -> tuple[tuple[int, ...], dict[str, int]]:
    """Grid and sizes of a kernel with a program for each chunk."""
    channels = x.shape[1]
    sizes = {"CHANNELS": channels, "TILE": chunk_rows(channels), "WIDTH": power_of_two(channels)}
    return (chunks.bounds.shape[0],), sizes


def _by_group(x: Float[Tensor, "N C"], chunks: Chunks, num_groups: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and sizes of a kernel with a program for some whole groups of channels of a sample."""
    channels = x.shape[1]
    group = channels // num_groups
    block = group * max(1, min(16 // group, num_groups))
    width = power_of_two(block)
    sizes = {"CHANNELS": channels, "GROUP": group, "BLOCK": block, "WIDTH": width, "TILE": max(1, 2048 // width)}
    return (chunks.starts.shape[0] - 1, ceil_div(channels, block)), sizes


@no_type_check
@triton.jit
def _chunk_of(bounds):
    """Sample, first row and end of this program's chunk."""
    at = bounds + tl.program_id(0).to(tl.int64) * 3
    return tl.load(at), tl.load(at + 1).to(tl.int64), tl.load(at + 2).to(tl.int64)


@no_type_check
@triton.jit
def _tile_at(start, end, CHANNELS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets and mask of some rows."""
    rows, channels = start + tl.arange(0, TILE), tl.arange(0, WIDTH)
    return rows[:, None] * CHANNELS + channels[None, :], (rows < end)[:, None] & (channels < CHANNELS)[None, :]


@no_type_check
@triton.jit
def _of_sample(table, sample, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    channels = tl.arange(0, WIDTH)
    return tl.load(table + sample * CHANNELS + channels, mask=channels < CHANNELS, other=0.0).to(tl.float32)[None, :]


@no_type_check
@triton.jit
def _store_pair(parts, first, second, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    channels = tl.arange(0, WIDTH)
    target = parts + tl.program_id(0).to(tl.int64) * 2 * CHANNELS + channels
    tl.store(target, first, mask=channels < CHANNELS)
    tl.store(target + CHANNELS, second, mask=channels < CHANNELS)


@no_type_check
@quick
@triton.jit
def _moments(x, bounds, parts, CHANNELS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Mean of each channel over the chunk, and the squares about it.

    Sums are of distances to the first tile's mean, so that no large numbers cancel.
    """
    _, first, end = _chunk_of(bounds)
    at, keep = _tile_at(first, end, CHANNELS, TILE, WIDTH)
    values = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    centre = tl.sum(values, 0) / tl.minimum(end - first, TILE).to(tl.float32)
    sums, squares = tl.zeros((WIDTH,), dtype=tl.float32), tl.zeros((WIDTH,), dtype=tl.float32)
    for start in range(first, end, TILE):
        at, keep = _tile_at(start, end, CHANNELS, TILE, WIDTH)
        values = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
        away = tl.where(keep, values - centre[None, :], 0.0)
        sums += tl.sum(away, 0)
        squares += tl.sum(away * away, 0)
    shift = sums / (end - first).to(tl.float32)
    _store_pair(parts, centre + shift, tl.maximum(squares - sums * shift, 0.0), CHANNELS, WIDTH)


@no_type_check
@triton.jit
def _chunks_at(parts, bounds, start, end, channels, there, CHANNELS: tl.constexpr, TILE: tl.constexpr):
    """Rows of some chunks, and the two numbers that each has for some channels; in float64."""
    chunks = start + tl.arange(0, TILE)
    inside = chunks < end
    first = tl.load(bounds + chunks * 3 + 1, mask=inside, other=0)
    rows = (tl.load(bounds + chunks * 3 + 2, mask=inside, other=0) - first).to(tl.float64)
    at = chunks.to(tl.int64)[:, None] * 2 * CHANNELS + channels[None, :]
    keep = inside[:, None] & there[None, :]
    one = tl.load(parts + at, mask=keep, other=0.0).to(tl.float64)
    return rows[:, None], one, tl.load(parts + at + CHANNELS, mask=keep, other=0.0).to(tl.float64)


@no_type_check
@triton.jit
def _groups_of(starts, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """This program's sample with its chunks, and its channels: some whole groups."""
    sample, channels = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, WIDTH)
    there = (tl.arange(0, WIDTH) < BLOCK) & (channels < CHANNELS)
    return sample, tl.load(starts + sample), tl.load(starts + sample + 1), channels, there


@no_type_check
@triton.jit
def _over_group(values, channels, there, GROUP: tl.constexpr):
    """The mean over each channel's group."""
    same = (channels // GROUP)[:, None] == (channels // GROUP)[None, :]
    return tl.sum(tl.where(same & there[None, :], values[None, :], 0.0), 1) / GROUP


@no_type_check
@quick
@triton.jit
def _combine(  # noqa: PLR0913
    parts,
    bounds,
    starts,
    mean,
    rstd,
    eps,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """Mean and inverse deviation of a sample's groups from those of its chunks."""
    sample, first, end, channels, there = _groups_of(starts, CHANNELS, BLOCK, WIDTH)
    total, number = tl.zeros((WIDTH,), dtype=tl.float64), tl.zeros((1,), dtype=tl.float64)
    for start in range(first, end, TILE):
        rows, means, _ = _chunks_at(parts, bounds, start, end, channels, there, CHANNELS, TILE)
        total += tl.sum(rows * means, 0)
        number += tl.sum(rows, 0)
    number = tl.maximum(number, 1.0)
    centre = _over_group(total / number, channels, there, GROUP)
    spread_out = tl.zeros((WIDTH,), dtype=tl.float64)
    for start in range(first, end, TILE):
        rows, means, squares = _chunks_at(parts, bounds, start, end, channels, there, CHANNELS, TILE)
        away = means - centre[None, :]
        spread_out += tl.sum(squares + rows * away * away, 0)
    var = _over_group(spread_out / number, channels, there, GROUP)
    at = sample * CHANNELS + channels
    tl.store(mean + at, centre.to(tl.float32), mask=there)
    tl.store(rstd + at, (1.0 / tl.sqrt(var + eps)).to(tl.float32), mask=there)


@no_type_check
@quick
@triton.jit
def _normalize(  # noqa: PLR0913
    x,
    bounds,
    mean,
    rstd,
    weight,
    bias,
    out,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    sample, first, end = _chunk_of(bounds)
    centre = _of_sample(mean, sample, CHANNELS, WIDTH)
    gain = _of_sample(rstd, sample, CHANNELS, WIDTH) * _of_sample(weight, 0, CHANNELS, WIDTH)
    lift = _of_sample(bias, 0, CHANNELS, WIDTH)
    for start in range(first, end, TILE):
        at, keep = _tile_at(start, end, CHANNELS, TILE, WIDTH)
        values = (tl.load(x + at, mask=keep, other=0.0).to(tl.float32) - centre) * gain + lift
        if SILU:
            values *= tl.sigmoid(values)
        tl.store(out + at, values.to(out.dtype.element_ty), mask=keep)


def group_norm_grads(
    x: Float[Tensor, "N C"],
    grad: Float[Tensor, "N C"],
    chunks: Chunks,
    stats: Statistics,
    num_groups: int,
    weight: Float[Tensor, " C"],
    bias: Float[Tensor, " C"],
    *,
    silu: bool,
) -> tuple[Float[Tensor, "N C"], Float32[Tensor, " C"], Float32[Tensor, " C"]]:
    """Gradients of input, weight and bias. With z the normalised values, and sums over a sample's group,
    d input = rstd * (w g - mean(w g) - z * mean(w g z)).
    """
    out, parts = torch.empty_like(x), _moments_of(x, chunks)
    sums, shifts = _tables(x, chunks), _tables(x, chunks)
    grid, shape = _by_chunk(x, chunks)
    groups, sizes = _by_group(x, chunks, num_groups)
    inputs = (x, grad, chunks.bounds, *stats, weight, bias)
    _grad_moments[grid](*inputs, parts, SILU=silu, **shape)
    _combine_grads[groups](
        parts, chunks.bounds, chunks.starts, stats.rstd, weight, *sums.unbind(0), *shifts.unbind(0), **sizes
    )
    _grad_input[grid](*inputs, *shifts.unbind(0), out, SILU=silu, **shape)
    of_bias, of_weight = sums.sum(1) if sums.shape[1] > 1 else sums[:, 0]
    return out, of_weight, of_bias


@no_type_check
@triton.jit
def _upstream(x, grad, at, keep, centre, gain, lift, SILU: tl.constexpr):
    """Centred input, and the gradient before the activation."""
    centred = tl.where(keep, tl.load(x + at, mask=keep, other=0.0).to(tl.float32) - centre, 0.0)
    slope = tl.load(grad + at, mask=keep, other=0.0).to(tl.float32)
    if SILU:
        z = centred * gain + lift
        gate = tl.sigmoid(z)
        slope *= gate * (1 + z * (1 - gate))
    return centred, slope


@no_type_check
@quick
@triton.jit
def _grad_moments(  # noqa: PLR0913
    x,
    grad,
    bounds,
    mean,
    rstd,
    weight,
    bias,
    parts,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sums over the chunk of g and of g z."""
    sample, first, end = _chunk_of(bounds)
    centre, scale = _of_sample(mean, sample, CHANNELS, WIDTH), _of_sample(rstd, sample, CHANNELS, WIDTH)
    gain, lift = scale * _of_sample(weight, 0, CHANNELS, WIDTH), _of_sample(bias, 0, CHANNELS, WIDTH)
    sums, along = tl.zeros((WIDTH,), dtype=tl.float32), tl.zeros((WIDTH,), dtype=tl.float32)
    for start in range(first, end, TILE):
        at, keep = _tile_at(start, end, CHANNELS, TILE, WIDTH)
        centred, slope = _upstream(x, grad, at, keep, centre, gain, lift, SILU)
        sums += tl.sum(slope, 0)
        along += tl.sum(slope * centred * scale, 0)
    _store_pair(parts, sums, along, CHANNELS, WIDTH)


@no_type_check
@quick
@triton.jit
def _combine_grads(  # noqa: PLR0913
    parts,
    bounds,
    starts,
    rstd,
    weight,
    sums,
    sums_along,
    flat,
    tilt,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """A sample's sums of g and g z, and what its groups' means take from each row's gradient."""
    sample, first, end, channels, there = _groups_of(starts, CHANNELS, BLOCK, WIDTH)
    total, along = tl.zeros((WIDTH,), dtype=tl.float64), tl.zeros((WIDTH,), dtype=tl.float64)
    number = tl.zeros((1,), dtype=tl.float64)
    for start in range(first, end, TILE):
        rows, slopes, slopes_along = _chunks_at(parts, bounds, start, end, channels, there, CHANNELS, TILE)
        total += tl.sum(slopes, 0)
        along += tl.sum(slopes_along, 0)
        number += tl.sum(rows, 0)
    number = tl.maximum(number, 1.0)
    at = sample * CHANNELS + channels
    gain = tl.load(weight + channels, mask=there, other=0.0).to(tl.float64)
    scale = tl.load(rstd + at, mask=there, other=0.0).to(tl.float64)
    level = _over_group(total * gain / number, channels, there, GROUP)
    slope = _over_group(along * gain / number, channels, there, GROUP)
    tl.store(sums + at, total.to(tl.float32), mask=there)
    tl.store(sums_along + at, along.to(tl.float32), mask=there)
    tl.store(flat + at, (scale * level).to(tl.float32), mask=there)
    tl.store(tilt + at, (scale * scale * slope).to(tl.float32), mask=there)


@no_type_check
@quick
@triton.jit
def _grad_input(  # noqa: PLR0913
    x,
    grad,
    bounds,
    mean,
    rstd,
    weight,
    bias,
    flat,
    tilt,
    out,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    sample, first, end = _chunk_of(bounds)
    centre = _of_sample(mean, sample, CHANNELS, WIDTH)
    gain = _of_sample(rstd, sample, CHANNELS, WIDTH) * _of_sample(weight, 0, CHANNELS, WIDTH)
    lift = _of_sample(bias, 0, CHANNELS, WIDTH)
    level, slant = _of_sample(flat, sample, CHANNELS, WIDTH), _of_sample(tilt, sample, CHANNELS, WIDTH)
    for start in range(first, end, TILE):
        at, keep = _tile_at(start, end, CHANNELS, TILE, WIDTH)
        centred, slope = _upstream(x, grad, at, keep, centre, gain, lift, SILU)
        values = slope * gain - level - centred * slant
        tl.store(out + at, values.to(out.dtype.element_ty), mask=keep)
