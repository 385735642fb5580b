"""The linear map of every row and its gradients in Triton: CUDA, 16-bit rows, parameters and their gradients float32.

The number of rows is another in every step. cuBLAS looks for its kernel anew for each new shape, which takes the host
longer than these small products take the card; here one kernel serves every number of rows. Sums are float32 in a fixed
order, so repeats are equal to the bit.
"""

from functools import cache
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

from networks.kernels.launch import ceil_div, power_of_two, processors, quick, shared_memory
from networks.kernels.tiles import fitted, grad_tile, product_tile, split


def rows_product(
    rows: Float[Tensor, "N C"], weight: Float[Tensor, "F C"] | Float[Tensor, "C F"], bias: Float[Tensor, " F"] | None
) -> Float[Tensor, "N F"]:
    """rows @ weight.T + bias; with the layer's `weight.T` in place of its weight, the gradient of its input."""
    (num_rows, channels), columns = rows.shape, weight.shape[0]
    out = rows.new_empty((num_rows, columns))
    if out.numel() == 0:
        return out
    tile = product_tile(channels, columns, rows.dtype, thin=False)
    tile = fitted(tile, rows.dtype, shared_memory(rows.device))
    grid = (ceil_div(num_rows, tile.rows) * ceil_div(columns, tile.columns),)
    _rows_product[grid](
        rows.contiguous(),
        weight,
        bias,
        out,
        num_rows,
        *weight.stride(),
        CHANNELS=channels,
        COLUMNS=columns,
        HAS_BIAS=bias is not None,
        TILE_ROWS=tile.rows,
        TILE_COLUMNS=tile.columns,
        DEPTH=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows"])
def _rows_product(  # noqa: PLR0913
    feats,
    weight,
    bias,
    out,
    num_rows,
    weight_f,
    weight_c,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    column_tiles: tl.constexpr = (COLUMNS + TILE_COLUMNS - 1) // TILE_COLUMNS
    rows = (tl.program_id(0) // column_tiles).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    columns = (tl.program_id(0) % column_tiles) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    sums = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    for first in range(0, CHANNELS, DEPTH):
        channels = first + tl.arange(0, DEPTH)
        there = (rows < num_rows)[:, None]
        known = (columns < COLUMNS)[None, :]
        if CHANNELS % DEPTH != 0:
            there = there & (channels < CHANNELS)[None, :]
            known = known & (channels < CHANNELS)[:, None]
        # (TILE_ROWS, DEPTH)
        block = tl.load(feats + rows[:, None] * CHANNELS + channels[None, :], mask=there, other=0.0)
        # (DEPTH, TILE_COLUMNS) of (F, C), turned
        factors = tl.load(weight + channels[:, None] * weight_c + columns[None, :] * weight_f, mask=known, other=0.0)
        sums = tl.dot(block, factors, sums)
    if HAS_BIAS:
        sums += tl.load(bias + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)[None, :]  # of (F,)
    target = out + rows[:, None] * COLUMNS + columns[None, :]
    tl.store(target, sums.to(out.dtype.element_ty), mask=(rows < num_rows)[:, None] & (columns < COLUMNS)[None, :])


def parameter_grads(
    feats: Float[Tensor, "N C"], grad: Float[Tensor, "N F"]
) -> tuple[Float32[Tensor, "F C"], Float32[Tensor, " F"]]:
    """grad.T @ feats and the sum of grad's rows."""
    (num_rows, channels), columns = feats.shape, grad.shape[1]
    if num_rows == 0:
        zeros = feats.new_zeros((columns, channels + 1), dtype=torch.float32)
        return zeros[:, :channels], zeros[:, channels]
    tile, lines, programs = _parts(channels, columns, feats.dtype, shared_memory(feats.device))
    splits, length = split(num_rows, 2 * programs, tile.depth, processors(feats.device))
    parts = feats.new_empty((splits, columns * (channels + 1)), dtype=torch.float32)
    _parameter_grads[(programs, splits)](
        feats.contiguous(),
        grad.contiguous(),
        parts,
        num_rows,
        length,
        CHANNELS=channels,
        COLUMNS=columns,
        TILE_LINES=lines,
        TILE_CHANNELS=tile.columns,
        DEPTH=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    sums = parts.sum(0)
    return sums[: columns * channels].view(columns, channels), sums[columns * channels :]


@cache
def _parts(channels: int, columns: int, dtype: torch.dtype, room: int) -> tuple:
    """The tile, its lines (columns of the gradient), and the programs that cover the weight."""
    tile = fitted(grad_tile(columns, channels, dtype), dtype, room)
    lines = min(max(power_of_two(columns), 16), tile.rows)
    return tile, lines, ceil_div(columns, lines) * ceil_div(channels, tile.columns)


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows", "length"])
def _parameter_grads(  # noqa: PLR0913
    feats,
    grad,
    parts,
    num_rows,
    length,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_LINES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    channel_tiles: tl.constexpr = (CHANNELS + TILE_CHANNELS - 1) // TILE_CHANNELS
    lines = (tl.program_id(0) // channel_tiles) * TILE_LINES + tl.arange(0, TILE_LINES)
    channels = (tl.program_id(0) % channel_tiles) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    start = tl.program_id(1) * length
    end = tl.minimum(start + length, num_rows)
    sums = tl.zeros((TILE_LINES, TILE_CHANNELS), dtype=tl.float32)
    totals = tl.zeros((TILE_LINES, 16), dtype=tl.float32)  # sixteen times the same: a product with ones is the fastest
    for first in range(start, end, DEPTH):
        rows = first + tl.arange(0, DEPTH)
        at = rows.to(tl.int64)[:, None]
        keep = (rows < end)[:, None]
        # (DEPTH, TILE_LINES) of (N, F)
        upstream = tl.load(grad + at * COLUMNS + lines[None, :], mask=keep & (lines < COLUMNS)[None, :], other=0.0)
        # (DEPTH, TILE_CHANNELS) of (N, C)
        block = tl.load(
            feats + at * CHANNELS + channels[None, :], mask=keep & (channels < CHANNELS)[None, :], other=0.0
        )
        turned = tl.trans(upstream)
        sums = tl.dot(turned, block, sums)
        totals = tl.dot(turned, tl.full((DEPTH, 16), 1.0, dtype=feats.dtype.element_ty), totals)
    base = parts + tl.program_id(1).to(tl.int64) * (COLUMNS * (CHANNELS + 1))
    keep = (lines < COLUMNS)[:, None] & (channels < CHANNELS)[None, :]
    tl.store(base + lines[:, None] * CHANNELS + channels[None, :], sums, mask=keep)
    if tl.program_id(0) % channel_tiles == 0:
        tl.store(base + COLUMNS * CHANNELS + lines, tl.sum(totals, 1) * 0.0625, mask=lines < COLUMNS)
