"""Row operations fused in Triton: adding up children, copying to children, group norm with its activation. CUDA.

What ops.py does in plain torch, in as few passes over memory as it takes; sums in float32 (statistics combined in
float64) and in a fixed order, so repeats are equal to the bit. Knows rows and tables, not space.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

ELEMENTS = 8192  # of a program's tile


def sum_children(
    fine: Float[Tensor, "N C"], children: Int64[Tensor, "8 M"], scale: Float32[Tensor, " M"] | None
) -> Float[Tensor, "M C"]:
    """out[m] = scale[m] * sum of the rows children[:, m]; a row number N counts as none."""
    (num_fine, channels), num_coarse = fine.shape, children.shape[1]
    out = fine.new_empty((num_coarse, channels))
    width = triton.next_power_of_2(channels)
    tile = max(1, ELEMENTS // 2 // width)
    if out.numel():
        with torch.cuda.device_of(fine):
            _sum_children[(triton.cdiv(num_coarse, tile),)](
                fine.contiguous(), children, scale, out, num_fine, num_coarse, channels, scale is not None, tile, width
            )
    return out


@no_type_check
@triton.jit(do_not_specialize=["num_fine", "num_coarse"])
def _sum_children(  # noqa: PLR0913
    fine,
    children,
    scale,
    out,
    num_fine,
    num_coarse,
    CHANNELS: tl.constexpr,
    SCALED: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    cells = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    channels = tl.arange(0, WIDTH)
    sums = tl.zeros((TILE, WIDTH), dtype=tl.float32)
    for octant in tl.static_range(8):
        at = children + octant * num_coarse.to(tl.int64) + cells
        rows = tl.load(at, mask=cells < num_coarse, other=num_fine)
        keep = (rows < num_fine)[:, None] & (channels < CHANNELS)[None, :]
        sums += tl.load(fine + rows[:, None] * CHANNELS + channels[None, :], mask=keep, other=0.0).to(tl.float32)
    if SCALED:
        sums *= tl.load(scale + cells, mask=cells < num_coarse, other=0.0)[:, None]
    keep = (cells < num_coarse)[:, None] & (channels < CHANNELS)[None, :]
    tl.store(out + cells[:, None] * CHANNELS + channels[None, :], sums.to(out.dtype.element_ty), mask=keep)


def spread(
    coarse: Float[Tensor, "M C"], parent: Int64[Tensor, " N"], scale: Float32[Tensor, " M"] | None
) -> Float[Tensor, "N C"]:
    """out[n] = scale[parent[n]] * coarse[parent[n]]: the transpose of `sum_children`."""
    num_fine, channels = parent.shape[0], coarse.shape[1]
    out = coarse.new_empty((num_fine, channels))
    width = triton.next_power_of_2(channels)
    tile = max(1, ELEMENTS // 2 // width)
    if out.numel():
        with torch.cuda.device_of(coarse):
            _spread[(triton.cdiv(num_fine, tile),)](
                coarse.contiguous(), parent, scale, out, num_fine, channels, scale is not None, tile, width
            )
    return out


@no_type_check
@triton.jit(do_not_specialize=["num_fine"])
def _spread(  # noqa: PLR0913
    coarse,
    parent,
    scale,
    out,
    num_fine,
    CHANNELS: tl.constexpr,
    SCALED: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    channels = tl.arange(0, WIDTH)
    keep = (rows < num_fine)[:, None] & (channels < CHANNELS)[None, :]
    cells = tl.load(parent + rows, mask=rows < num_fine, other=0)
    values = tl.load(coarse + cells[:, None] * CHANNELS + channels[None, :], mask=keep, other=0.0)
    if SCALED:
        values = values.to(tl.float32) * tl.load(scale + cells, mask=rows < num_fine, other=0.0)[:, None]
    tl.store(out + rows[:, None] * CHANNELS + channels[None, :], values.to(out.dtype.element_ty), mask=keep)


def column_sums(x: Float[Tensor, "N C"]) -> Float32[Tensor, " C"]:
    """Sum of all rows."""
    num_rows, channels = x.shape
    width = triton.next_power_of_2(channels)
    tile = max(1, ELEMENTS // width)
    length = tile * max(1, triton.cdiv(num_rows, 1024 * tile))
    parts = x.new_empty((triton.cdiv(num_rows, length), channels), dtype=torch.float32)
    if parts.numel():
        with torch.cuda.device_of(x):
            _column_sums[(len(parts),)](x.contiguous(), parts, num_rows, length, channels, tile, width)
    return parts.sum(0)


@no_type_check
@triton.jit(do_not_specialize=["num_rows", "length"])
def _column_sums(x, parts, num_rows, length, CHANNELS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    channels = tl.arange(0, WIDTH)
    start = tl.program_id(0).to(tl.int64) * length
    sums = tl.zeros((TILE, WIDTH), dtype=tl.float32)
    for first in range(start, tl.minimum(start + length, num_rows), TILE):
        rows = first + tl.arange(0, TILE)
        keep = (rows < num_rows)[:, None] & (channels < CHANNELS)[None, :]
        sums += tl.load(x + rows[:, None] * CHANNELS + channels[None, :], mask=keep, other=0.0).to(tl.float32)
    target = parts + tl.program_id(0) * CHANNELS + channels
    tl.store(target, tl.sum(sums, 0), mask=channels < CHANNELS)


class Chunks(NamedTuple):
    """Runs of consecutive rows of one sample, short enough for one tile."""

    bounds: Int32[Tensor, "J 3"]  # sample, first row, end
    counts: list[int]  # chunks of each sample


def cut(sample_sizes: list[int], rows: int, device: torch.device) -> Chunks:
    bounds, start = [], 0
    for sample, size in enumerate(sample_sizes):
        firsts = torch.arange(start, start + size, rows, dtype=torch.int32)
        ends = (firsts + rows).clamp(max=start + size)
        bounds.append(torch.stack([torch.full_like(firsts, sample), firsts, ends], 1))
        start += size
    counts = [part.shape[0] for part in bounds]
    return Chunks(torch.cat(bounds).to(device, non_blocking=True), counts)


def chunk_rows(channels: int) -> int:
    return max(1, ELEMENTS // triton.next_power_of_2(channels))


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
    channels = x.shape[1]
    parts = x.new_empty((chunks.bounds.shape[0], 2, channels), dtype=torch.float32)
    out, width = torch.empty_like(x), triton.next_power_of_2(channels)
    grid, shape = (chunks.bounds.shape[0],), {"CHANNELS": channels, "TILE": chunk_rows(channels), "WIDTH": width}
    with torch.cuda.device_of(x):
        _moments[grid](x, chunks.bounds, parts, **shape)
        stats = _combine(parts, chunks, num_groups, eps)
        gain = stats.rstd * weight.float()
        _normalize[grid](x, chunks.bounds, stats.mean, gain, bias.float(), out, SILU=silu, **shape)
    return out, stats


def _combine(parts: Float32[Tensor, "J 2 C"], chunks: Chunks, num_groups: int, eps: float) -> Statistics:
    """Mean and deviation of each sample's groups from those of its chunks, in float64."""
    sizes = (chunks.bounds[:, 2] - chunks.bounds[:, 1]).double()
    means, rstds = [], []
    for part, size in zip(parts.double().split(chunks.counts), sizes.split(chunks.counts), strict=True):
        total = size.sum().clamp(min=1)
        mean = (part[:, 0] * size[:, None]).sum(0) / total
        group = mean.view(num_groups, -1).mean(1, keepdim=True).expand(-1, mean.shape[0] // num_groups).reshape(-1)
        spread_out = part[:, 1].sum(0) + (size[:, None] * (part[:, 0] - group).square()).sum(0)
        var = spread_out.view(num_groups, -1).mean(1, keepdim=True) / total
        means.append(group)
        rstds.append((var + eps).rsqrt().expand(-1, mean.shape[0] // num_groups).reshape(-1))
    return Statistics(torch.stack(means).float(), torch.stack(rstds).float())


@no_type_check
@triton.jit
def _chunk(bounds, CHANNELS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Sample, number of rows, offsets and mask of this program's tile."""
    at = bounds + tl.program_id(0).to(tl.int64) * 3
    first, end = tl.load(at + 1).to(tl.int64), tl.load(at + 2).to(tl.int64)
    rows = first + tl.arange(0, TILE)
    channels = tl.arange(0, WIDTH)
    keep = (rows < end)[:, None] & (channels < CHANNELS)[None, :]
    return tl.load(at), (end - first).to(tl.float32), rows[:, None] * CHANNELS + channels[None, :], keep


@no_type_check
@triton.jit
def _moments(x, bounds, parts, CHANNELS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Mean of each channel over the chunk, and the squares about it: no large numbers cancel."""
    _, count, at, keep = _chunk(bounds, CHANNELS, TILE, WIDTH)
    values = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    mean = tl.sum(values, 0) / count
    squares = tl.sum(tl.where(keep, (values - mean[None, :]) * (values - mean[None, :]), 0.0), 0)
    channels = tl.arange(0, WIDTH)
    target = parts + tl.program_id(0).to(tl.int64) * 2 * CHANNELS + channels
    tl.store(target, mean, mask=channels < CHANNELS)
    tl.store(target + CHANNELS, squares, mask=channels < CHANNELS)


@no_type_check
@triton.jit
def _of_sample(table, sample, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    channels = tl.arange(0, WIDTH)
    return tl.load(table + sample * CHANNELS + channels, mask=channels < CHANNELS, other=0.0)[None, :]


@no_type_check
@triton.jit
def _normalize(  # noqa: PLR0913
    x,
    bounds,
    mean,
    gain,
    bias,
    out,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    sample, _, at, keep = _chunk(bounds, CHANNELS, TILE, WIDTH)
    values = tl.load(x + at, mask=keep, other=0.0).to(tl.float32) - _of_sample(mean, sample, CHANNELS, WIDTH)
    values = values * _of_sample(gain, sample, CHANNELS, WIDTH) + _of_sample(bias, 0, CHANNELS, WIDTH)
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
    channels = x.shape[1]
    parts = x.new_empty((chunks.bounds.shape[0], 2, channels), dtype=torch.float32)
    out, width = torch.empty_like(x), triton.next_power_of_2(channels)
    grid, shape = (chunks.bounds.shape[0],), {"CHANNELS": channels, "TILE": chunk_rows(channels), "WIDTH": width}
    gain, bias = stats.rstd * weight.float(), bias.float()
    inputs = (x, grad, chunks.bounds, stats.mean, stats.rstd, gain, bias)
    with torch.cuda.device_of(x):
        _grad_moments[grid](*inputs, parts, SILU=silu, **shape)
        sums = torch.stack([part.sum(0) for part in parts.double().split(chunks.counts)])  # (B, 2, C)
        sizes = (chunks.bounds[:, 2] - chunks.bounds[:, 1]).double()
        rows = torch.stack([part.sum() for part in sizes.split(chunks.counts)]).clamp(min=1)
        by_group = (sums * weight.double()).view(*sums.shape[:2], num_groups, -1).mean(3) / rows[:, None, None]
        level, slope = by_group.repeat_interleave(channels // num_groups, 2).float().unbind(1)
        flat, tilt = (stats.rstd * level).contiguous(), (stats.rstd.square() * slope).contiguous()
        _grad_input[grid](*inputs, flat, tilt, out, SILU=silu, **shape)
    return out, sums[:, 1].sum(0).float(), sums[:, 0].sum(0).float()


@no_type_check
@triton.jit
def _upstream(  # noqa: PLR0913
    x, grad, sample, mean, gain, bias, at, keep, SILU: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr
):
    """Centred input, and the gradient before the activation."""
    centred = tl.load(x + at, mask=keep, other=0.0).to(tl.float32) - _of_sample(mean, sample, CHANNELS, WIDTH)
    slope = tl.load(grad + at, mask=keep, other=0.0).to(tl.float32)
    if SILU:
        z = centred * _of_sample(gain, sample, CHANNELS, WIDTH) + _of_sample(bias, 0, CHANNELS, WIDTH)
        gate = tl.sigmoid(z)
        slope *= gate * (1 + z * (1 - gate))
    return centred, slope


@no_type_check
@triton.jit
def _grad_moments(  # noqa: PLR0913
    x,
    grad,
    bounds,
    mean,
    rstd,
    gain,
    bias,
    parts,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    sample, _, at, keep = _chunk(bounds, CHANNELS, TILE, WIDTH)
    centred, slope = _upstream(x, grad, sample, mean, gain, bias, at, keep, SILU, CHANNELS, WIDTH)
    channels = tl.arange(0, WIDTH)
    target = parts + tl.program_id(0).to(tl.int64) * 2 * CHANNELS + channels
    tl.store(target, tl.sum(slope, 0), mask=channels < CHANNELS)
    along = tl.sum(slope * centred * _of_sample(rstd, sample, CHANNELS, WIDTH), 0)
    tl.store(target + CHANNELS, along, mask=channels < CHANNELS)


@no_type_check
@triton.jit
def _grad_input(  # noqa: PLR0913
    x,
    grad,
    bounds,
    mean,
    rstd,
    gain,
    bias,
    flat,
    tilt,
    out,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    sample, _, at, keep = _chunk(bounds, CHANNELS, TILE, WIDTH)
    centred, slope = _upstream(x, grad, sample, mean, gain, bias, at, keep, SILU, CHANNELS, WIDTH)
    values = slope * _of_sample(gain, sample, CHANNELS, WIDTH) - _of_sample(flat, sample, CHANNELS, WIDTH)
    values -= centred * _of_sample(tilt, sample, CHANNELS, WIDTH)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=keep)
