"""Losses over rows fused in Triton, each a weighted sum in one pass, its gradient in another. CUDA.

What losses.py does in plain torch. Rows count by `shares`, or equally where there are none. Sums are float32 in a fixed
order, so repeats are equal to the bit.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from networks.kernels.launch import ceil_div, power_of_two, quick

NUMBERS_PER_PROGRAM = 8192


def row_error(
    recon: Float[Tensor, "N C"],
    target: Float[Tensor, "N C"],
    channels: Float32[Tensor, " C"] | None,
    shares: Float32[Tensor, " N"] | None,
    *,
    kind: tuple[float, float],
) -> Float32[Tensor, ""]:
    """Sum over rows of share * sum over channels of weight * (a |d| + b d^2); d is recon - target, kind is (a, b)."""
    parts = recon.new_empty(_grid(recon), dtype=torch.float32)
    given = recon.contiguous(), target.contiguous(), channels, shares, parts, len(recon)
    _row_error[_grid(recon)](*given, **_shape(recon, kind))
    return parts.sum()


def row_error_grad(
    upstream: Float[Tensor, ""],
    recon: Float[Tensor, "N C"],
    target: Float[Tensor, "N C"],
    channels: Float32[Tensor, " C"] | None,
    shares: Float32[Tensor, " N"] | None,
    *,
    kind: tuple[float, float],
) -> Float[Tensor, "N C"]:
    """Of `recon`."""
    out = torch.empty_like(recon, memory_format=torch.contiguous_format)
    given = recon.contiguous(), target.contiguous(), channels, shares, upstream, out, len(recon)
    _row_error_grad[_grid(recon)](*given, **_shape(recon, kind))
    return out


def children_error(
    logits: Float[Tensor, "M 8"], exists: Bool[Tensor, "M 8"], shares: Float32[Tensor, " M"] | None
) -> Float32[Tensor, ""]:
    """Binary cross-entropy of which children exist, a mean over eight and a weighted sum over cells."""
    parts = logits.new_empty(_grid(logits), dtype=torch.float32)
    given = logits.contiguous(), exists.view(torch.uint8), shares, parts
    _children_error[_grid(logits)](*given, len(logits), *exists.stride(), NUMBERS_PER_PROGRAM // 8)
    return parts.sum()


def children_error_grad(
    upstream: Float[Tensor, ""],
    logits: Float[Tensor, "M 8"],
    exists: Bool[Tensor, "M 8"],
    shares: Float32[Tensor, " M"] | None,
) -> Float[Tensor, "M 8"]:
    """Of `logits`."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    given = logits.contiguous(), exists.view(torch.uint8), shares, upstream, out
    _children_error_grad[_grid(logits)](*given, len(logits), *exists.stride(), NUMBERS_PER_PROGRAM // 8)
    return out


def _grid(rows: Float[Tensor, "N C"]) -> tuple[int]:
    return (ceil_div(len(rows), NUMBERS_PER_PROGRAM // power_of_two(rows.shape[1])),)


def _shape(rows: Float[Tensor, "N C"], kind: tuple[float, float]) -> dict[str, object]:
    width = power_of_two(rows.shape[1])
    sizes = {"CHANNELS": rows.shape[1], "WIDTH": width, "TILE": NUMBERS_PER_PROGRAM // width}
    return sizes | {"LINEAR": float(kind[0]), "SQUARE": float(kind[1])}


@no_type_check
@triton.jit
def _differences(
    recon, target, channels, shares, num_rows, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr
):
    """Places and mask of a tile, its differences, and how much each number counts."""
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    lane = tl.arange(0, WIDTH)
    at = rows[:, None] * CHANNELS + lane[None, :]
    keep = (rows < num_rows)[:, None] & (lane < CHANNELS)[None, :]
    away = tl.load(recon + at, mask=keep, other=0.0).to(tl.float32)  # (TILE, WIDTH) of (N, C)
    away -= tl.load(target + at, mask=keep, other=0.0).to(tl.float32)  # (TILE, WIDTH) of (N, C)
    if channels is None:
        weight = tl.full((1, WIDTH), 1.0 / CHANNELS, dtype=tl.float32)
    else:
        weight = tl.load(channels + lane, mask=lane < CHANNELS, other=0.0)[None, :]  # (1, WIDTH) of (C,)
    if shares is None:
        weight = weight * (1.0 / num_rows)
    else:
        weight = weight * tl.load(shares + rows, mask=rows < num_rows, other=0.0)[:, None]  # (TILE, 1) of (N,)
    return at, keep, away, weight


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows"])
def _row_error(  # noqa: PLR0913
    recon,
    target,
    channels,
    shares,
    parts,
    num_rows,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    LINEAR: tl.constexpr,
    SQUARE: tl.constexpr,
):
    _, _, away, weight = _differences(recon, target, channels, shares, num_rows, CHANNELS, WIDTH, TILE)
    error = LINEAR * tl.abs(away) + SQUARE * away * away
    tl.store(parts + tl.program_id(0), tl.sum(tl.sum(error * weight, 1), 0))


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows"])
def _row_error_grad(  # noqa: PLR0913
    recon,
    target,
    channels,
    shares,
    upstream,
    out,
    num_rows,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    LINEAR: tl.constexpr,
    SQUARE: tl.constexpr,
):
    at, keep, away, weight = _differences(recon, target, channels, shares, num_rows, CHANNELS, WIDTH, TILE)
    sign = (away > 0).to(tl.float32) - (away < 0).to(tl.float32)
    slope = (LINEAR * sign + 2 * SQUARE * away) * weight * tl.load(upstream).to(tl.float32)
    tl.store(out + at, slope.to(out.dtype.element_ty), mask=keep)


@no_type_check
@triton.jit
def _of_children(logits, exists, shares, num_cells, stride_cell, stride_octant, TILE: tl.constexpr):
    """Places and mask of a tile, its logits, whether the children exist, and how much each counts."""
    cells, octant = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE), tl.arange(0, 8)
    at, keep = cells[:, None] * 8 + octant[None, :], (cells < num_cells)[:, None] & (octant < 8)[None, :]
    x = tl.load(logits + at, mask=keep, other=0.0).to(tl.float32)  # (TILE, 8) of (M, 8)
    there = tl.load(exists + cells[:, None] * stride_cell + octant[None, :] * stride_octant, mask=keep, other=0)
    if shares is None:
        share = tl.full((TILE,), 0.125, dtype=tl.float32) / num_cells
    else:
        share = 0.125 * tl.load(shares + cells, mask=cells < num_cells, other=0.0)  # (TILE,) of (M,)
    return at, keep, x, there.to(tl.float32), tl.where(keep, share[:, None], 0.0)


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_cells", "stride_cell", "stride_octant"])
def _children_error(logits, exists, shares, parts, num_cells, stride_cell, stride_octant, TILE: tl.constexpr):
    _, _, x, there, share = _of_children(logits, exists, shares, num_cells, stride_cell, stride_octant, TILE)
    error = tl.maximum(x, 0.0) - x * there + tl.log(1 + tl.exp(-tl.abs(x)))
    tl.store(parts + tl.program_id(0), tl.sum(tl.sum(error * share, 1), 0))


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_cells", "stride_cell", "stride_octant"])
def _children_error_grad(  # noqa: PLR0913
    logits, exists, shares, upstream, out, num_cells, stride_cell, stride_octant, TILE: tl.constexpr
):
    at, keep, x, there, share = _of_children(logits, exists, shares, num_cells, stride_cell, stride_octant, TILE)
    slope = (tl.sigmoid(x) - there) * share * tl.load(upstream).to(tl.float32)
    tl.store(out + at, slope.to(out.dtype.element_ty), mask=keep)
