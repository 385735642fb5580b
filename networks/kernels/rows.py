"""Row operations fused in Triton: adding up children, copying to children, sums of columns. CUDA.

What ops.py does in plain torch, in one pass over memory; sums in float32 and in a fixed order, so repeats are equal to
the bit. Knows rows and tables, not space.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from networks.kernels.launch import ceil_div, power_of_two, quick

NUMBERS_PER_PROGRAM = 8192  # of its tile
MAX_PROGRAMS = 1024  # that sum columns; a longer table gives each more tiles


def sum_children(
    fine: Float[Tensor, "N C"], children: Int64[Tensor, "8 M"], scale: Float32[Tensor, " M"] | None
) -> Float[Tensor, "M C"]:
    """out[m] = scale[m] * sum of the rows children[:, m]; a row number N counts as none."""
    (num_fine, channels), num_coarse = fine.shape, children.shape[1]
    out = fine.new_empty((num_coarse, channels))
    width = power_of_two(channels)
    tile = max(1, NUMBERS_PER_PROGRAM // 2 // width)
    if out.numel():
        _sum_children[(ceil_div(num_coarse, tile),)](
            fine.contiguous(), children, scale, out, num_fine, num_coarse, channels, scale is not None, tile, width
        )
    return out


@no_type_check
@quick
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
        rows = tl.load(at, mask=cells < num_coarse, other=num_fine)  # (TILE,) of a line of (8, M)
        keep = (rows < num_fine)[:, None] & (channels < CHANNELS)[None, :]
        # (TILE, WIDTH) of (N, C)
        sums += tl.load(fine + rows[:, None] * CHANNELS + channels[None, :], mask=keep, other=0.0).to(tl.float32)
    if SCALED:
        sums *= tl.load(scale + cells, mask=cells < num_coarse, other=0.0)[:, None]  # (TILE, 1) of (M,)
    keep = (cells < num_coarse)[:, None] & (channels < CHANNELS)[None, :]
    tl.store(out + cells[:, None] * CHANNELS + channels[None, :], sums.to(out.dtype.element_ty), mask=keep)


def spread(
    coarse: Float[Tensor, "M C"], parent: Int64[Tensor, " N"], scale: Float32[Tensor, " M"] | None
) -> Float[Tensor, "N C"]:
    """out[n] = scale[parent[n]] * coarse[parent[n]]: the transpose of `sum_children`."""
    num_fine, channels = parent.shape[0], coarse.shape[1]
    out = coarse.new_empty((num_fine, channels))
    width = power_of_two(channels)
    tile = max(1, NUMBERS_PER_PROGRAM // 2 // width)
    if out.numel():
        _spread[(ceil_div(num_fine, tile),)](
            coarse.contiguous(), parent, scale, out, num_fine, channels, scale is not None, tile, width
        )
    return out


@no_type_check
@quick
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
    cells = tl.load(parent + rows, mask=rows < num_fine, other=0)  # (TILE,) of (N,)
    values = tl.load(coarse + cells[:, None] * CHANNELS + channels[None, :], mask=keep, other=0.0)  # (TILE, WIDTH)
    if SCALED:
        values = values.to(tl.float32) * tl.load(scale + cells, mask=rows < num_fine, other=0.0)[:, None]  # of (M,)
    tl.store(out + rows[:, None] * CHANNELS + channels[None, :], values.to(out.dtype.element_ty), mask=keep)


def column_sums(x: Float[Tensor, "N C"]) -> Float32[Tensor, " C"]:
    """Sum of all rows."""
    num_rows, channels = x.shape
    width = power_of_two(channels)
    tile = max(1, NUMBERS_PER_PROGRAM // width)
    length = tile * max(1, ceil_div(num_rows, MAX_PROGRAMS * tile))
    parts = x.new_empty((ceil_div(num_rows, length), channels), dtype=torch.float32)
    if parts.numel():
        _column_sums[(len(parts),)](x.contiguous(), parts, num_rows, length, channels, tile, width)
    return parts.sum(0)


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows", "length"])
def _column_sums(x, parts, num_rows, length, CHANNELS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    channels = tl.arange(0, WIDTH)
    start = tl.program_id(0).to(tl.int64) * length
    sums = tl.zeros((TILE, WIDTH), dtype=tl.float32)
    for first in range(start, tl.minimum(start + length, num_rows), TILE):
        rows = first + tl.arange(0, TILE)
        keep = (rows < num_rows)[:, None] & (channels < CHANNELS)[None, :]
        # (TILE, WIDTH) of (N, C)
        sums += tl.load(x + rows[:, None] * CHANNELS + channels[None, :], mask=keep, other=0.0).to(tl.float32)
    target = parts + tl.program_id(0) * CHANNELS + channels
    tl.store(target, tl.sum(sums, 0), mask=channels < CHANNELS)
