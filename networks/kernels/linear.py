"""The linear map of every row and its gradients in Triton: CUDA, 16-bit rows, parameters and their gradients float32.

The number of rows is another in every step. cuBLAS looks for its kernel anew for each new shape, which takes the host
longer than these small products take the card; here one kernel serves every number of rows. Sums are float32 in a fixed
order, so repeats are equal to the bit. With `live`, a number on the device, the rows from there on are neither read nor
written: so many work in a CUDA graph, whatever length its tables have.
"""

from functools import cache
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from networks.kernels.launch import ceil_div, power_of_two, processors, quick, shared_memory
from networks.kernels.tiles import even_parts, fitted, grad_tile, product_tile


def rows_product(
    rows: Float[Tensor, "N C"],
    weight: Float[Tensor, "F C"] | Float[Tensor, "C F"],
    bias: Float[Tensor, " F"] | None,
    *,
    added: Float[Tensor, "N F"] | None = None,
    live: Int32[Tensor, "1"] | None = None,
) -> Float[Tensor, "N F"]:
    """rows @ weight.T + bias + added; with `weight.T` in place of a layer's weight, the gradient of its input."""
    out = rows.new_empty((rows.shape[0], weight.shape[0]))
    _start_product(rows, weight, bias, added, out, ending=PLAIN, live=live)
    return out


def rows_product_gelu(
    rows: Float[Tensor, "N C"],
    weight: Float[Tensor, "F C"],
    bias: Float[Tensor, " F"],
    *,
    live: Int32[Tensor, "1"] | None = None,
) -> tuple[Float[Tensor, "N F"], Float[Tensor, "N F"]]:
    """rows @ weight.T + bias, and GELU of it (by tanh)."""
    before = rows.new_empty((rows.shape[0], weight.shape[0]))
    out = torch.empty_like(before)
    _start_product(rows, weight, bias, before, out, ending=GELU, live=live)
    return before, out


def rows_product_gelu_grad(
    grad: Float[Tensor, "N F"],
    weight: Float[Tensor, "C F"],
    before: Float[Tensor, "N C"],
    *,
    live: Int32[Tensor, "1"] | None = None,
) -> Float[Tensor, "N C"]:
    """Gradient of `before`, whose GELU went into a layer: (grad @ weight.T) * GELU'(before)."""
    out = torch.empty_like(before)
    _start_product(grad, weight, None, before, out, ending=GELU_GRAD, live=live)
    return out


PLAIN, GELU, GELU_GRAD = range(3)  # what is done to a product before it is stored


def _start_product(
    rows: Float[Tensor, "N C"],
    weight: Float[Tensor, "F C"],
    bias: Float[Tensor, " F"] | None,
    beside: Float[Tensor, "N F"] | None,
    out: Float[Tensor, "N F"],
    *,
    ending: int,
    live: Int32[Tensor, "1"] | None,
) -> None:
    if out.numel() == 0:
        return
    (num_rows, channels), columns = rows.shape, weight.shape[0]
    tile = product_tile(channels, columns, rows.dtype, thin=False)
    tile = fitted(tile, rows.dtype, shared_memory(rows.device))
    grid = (ceil_div(num_rows, tile.rows) * ceil_div(columns, tile.columns),)
    _rows_product[grid](
        rows.contiguous(),
        weight,
        bias,
        beside,
        out,
        num_rows if live is None else live,
        *weight.stride(),
        CHANNELS=channels,
        COLUMNS=columns,
        HAS_BIAS=bias is not None,
        ADDED=beside is not None and ending == PLAIN,
        ENDING=ending,
        LIVE=live is not None,
        TILE_ROWS=tile.rows,
        TILE_COLUMNS=tile.columns,
        DEPTH=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@no_type_check
@triton.jit
def _gelu_tanh(x):
    """tanh of the approximation of GELU, x / 2 * (1 + tanh)."""
    return 2 * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x)) - 1


@no_type_check
@triton.jit
def _gelu_slope(x):
    bent = _gelu_tanh(x)
    return 0.5 * (1 + bent) + 0.5 * x * (1 - bent * bent) * 0.7978845608028654 * (1 + 0.134145 * x * x)


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows"])
def _rows_product(  # noqa: PLR0913
    feats,
    weight,
    bias,
    beside,
    out,
    num_rows,
    weight_f,
    weight_c,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDED: tl.constexpr,
    ENDING: tl.constexpr,
    LIVE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    column_tiles: tl.constexpr = (COLUMNS + TILE_COLUMNS - 1) // TILE_COLUMNS
    if LIVE:
        num_rows = tl.load(num_rows)
        if tl.program_id(0) // column_tiles * TILE_ROWS >= num_rows:
            return
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
    at = rows[:, None] * COLUMNS + columns[None, :]
    keep = (rows < num_rows)[:, None] & (columns < COLUMNS)[None, :]
    if ADDED:
        sums += tl.load(beside + at, mask=keep, other=0.0).to(tl.float32)  # (TILE_ROWS, TILE_COLUMNS) of (N, F)
    if ENDING == 1:  # the activation of what is stored, as backward will see it
        rounded = sums.to(out.dtype.element_ty)
        tl.store(beside + at, rounded, mask=keep)
        sums = rounded.to(tl.float32)
        sums = 0.5 * sums * (1 + _gelu_tanh(sums))
    if ENDING == 2:
        before = tl.load(beside + at, mask=keep, other=0.0).to(tl.float32)  # (TILE_ROWS, TILE_COLUMNS) of (N, F)
        sums *= _gelu_slope(before)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=keep)


def parameter_grads(
    feats: Float[Tensor, "N C"], grad: Float[Tensor, "N F"], *, live: Int32[Tensor, "1"] | None = None
) -> tuple[Float32[Tensor, "F C"], Float32[Tensor, " F"]]:
    """grad.T @ feats and the sum of grad's rows."""
    return several_parameter_grads([(feats, grad)], live=live)[0]


def several_parameter_grads(
    pairs: list[tuple[Float[Tensor, "N _"], Float[Tensor, "N _"]]], *, live: Int32[Tensor, "1"] | None = None
) -> list[tuple[Float32[Tensor, "F C"], Float32[Tensor, " F"]]]:
    """`parameter_grads` of several maps of the same rows: their partial sums lie side by side and are added at once."""
    feats, num_rows = pairs[0][0], pairs[0][0].shape[0]
    sizes = [grad.shape[1] * (rows.shape[1] + 1) for rows, grad in pairs]
    plans = [_parts(rows.shape[1], grad.shape[1], rows.dtype, shared_memory(feats.device)) for rows, grad in pairs]
    most = max(programs for *_, programs in plans)
    splits = even_parts(2 * most, processors(feats.device)) if num_rows else 0  # the same for any number of rows
    parts = feats.new_empty((splits, sum(sizes)), dtype=torch.float32)
    grads, first = [], 0
    for (rows, grad), size, plan in zip(pairs, sizes, plans, strict=True):
        if num_rows:
            _start_grads(rows, grad, parts, first, plan, live)
        first += size
    sums = parts.sum(0)
    for (rows, grad), part in zip(pairs, sums.split(sizes), strict=True):
        lines, channels = grad.shape[1], rows.shape[1]
        grads.append((part[: lines * channels].view(lines, channels), part[lines * channels :]))
    return grads


def _start_grads(feats, grad, parts, first, plan, live) -> None:
    """Partial sums into the columns of `parts` from `first` on."""
    tile, lines, programs = plan
    _parameter_grads[(programs, parts.shape[0])](
        feats.contiguous(),
        grad.contiguous(),
        parts[:, first:],
        feats.shape[0] if live is None else live,
        parts.shape[1],
        CHANNELS=feats.shape[1],
        COLUMNS=grad.shape[1],
        LIVE=live is not None,
        TILE_LINES=lines,
        TILE_CHANNELS=tile.columns,
        DEPTH=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@cache
def _parts(channels: int, columns: int, dtype: torch.dtype, room: int) -> tuple:
    """The tile, its lines (columns of the gradient), and the programs that cover the weight."""
    tile = fitted(grad_tile(columns, channels, dtype), dtype, room)
    lines = min(max(power_of_two(columns), 16), tile.rows)
    return tile, lines, ceil_div(columns, lines) * ceil_div(channels, tile.columns)


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows", "pitch"])
def _parameter_grads(  # noqa: PLR0913
    feats,
    grad,
    parts,
    num_rows,
    pitch,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LIVE: tl.constexpr,
    TILE_LINES: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    channel_tiles: tl.constexpr = (CHANNELS + TILE_CHANNELS - 1) // TILE_CHANNELS
    lines = (tl.program_id(0) // channel_tiles) * TILE_LINES + tl.arange(0, TILE_LINES)
    channels = (tl.program_id(0) % channel_tiles) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    if LIVE:
        num_rows = tl.load(num_rows)
    length = tl.cdiv(num_rows, tl.num_programs(1) * DEPTH) * DEPTH  # so that parts do not depend on a table's length
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
    base = parts + tl.program_id(1).to(tl.int64) * pitch
    keep = (lines < COLUMNS)[:, None] & (channels < CHANNELS)[None, :]
    tl.store(base + lines[:, None] * CHANNELS + channels[None, :], sums, mask=keep)
    if tl.program_id(0) % channel_tiles == 0:
        tl.store(base + COLUMNS * CHANNELS + lines, tl.sum(totals, 1) * 0.0625, mask=lines < COLUMNS)
