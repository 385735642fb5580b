"""Linear maps between cells and their eight children in Triton: gathered and mapped in one pass, and back. CUDA.

A cell's children lie side by side, WIDTH numbers each: their channels and, where `marked`, a one that says that the
child is there; an absent child is zeros. What ops.py does in plain torch with the rows laid out in memory. Sums are
float32 in a fixed order, so repeats are equal to the bit. For `live` see linear.py.
"""

from functools import cache
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

from networks.kernels.launch import ceil_div, power_of_two, processors, quick, shared_memory
from networks.kernels.tiles import even_parts, fitted, grad_tile, product_tile

# How many rows and how many cells count, where a device alone knows.
LiveCounts = tuple[Int32[Tensor, "1"], Int32[Tensor, "1"]] | None
NOT_LIVE = (None, None)


def gather_product(
    fine: Float[Tensor, "N C"],
    children: Int64[Tensor, "8 M"],
    weight: Float[Tensor, "F _"],
    bias: Float[Tensor, " F"] | None,
    *,
    marked: bool = False,
    live: LiveCounts = None,
) -> Float[Tensor, "M F"]:
    """(children side by side) @ weight.T + bias."""
    (num_fine, channels), num_cells, (columns, depth) = fine.shape, children.shape[1], weight.shape
    out = weight.new_empty((num_cells, columns))
    if out.numel() == 0:
        return out
    tile = fitted(product_tile(depth, columns, weight.dtype, thin=False), weight.dtype, shared_memory(fine.device))
    _gather_product[(ceil_div(num_cells, tile.rows) * ceil_div(columns, tile.columns),)](
        fine.contiguous(),
        children,
        weight,
        bias,
        out,
        num_fine,
        num_cells,
        *(live or NOT_LIVE),
        *weight.stride(),
        CHANNELS=channels,
        WIDTH=channels + marked,
        COLUMNS=columns,
        HAS_BIAS=bias is not None,
        TILE_ROWS=tile.rows,
        TILE_COLUMNS=tile.columns,
        DEPTH=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def scatter_product(
    coarse: Float[Tensor, "M C"],
    weight: Float[Tensor, "_ C"],
    bias: Float[Tensor, " _"] | None,
    children: Int64[Tensor, "8 M"],
    *,
    num_fine: int,
    channels: int,
    live: LiveCounts = None,
) -> Float[Tensor, "N F"]:
    """coarse @ weight.T + bias, of whose eight parts each child takes the first `channels` numbers of its own."""
    (num_cells, depth), columns = coarse.shape, weight.shape[0]
    out = coarse.new_empty((num_fine, channels))
    if out.numel() == 0:
        return out
    tile = fitted(product_tile(depth, columns, coarse.dtype, thin=False), coarse.dtype, shared_memory(coarse.device))
    _scatter_product[(ceil_div(num_cells, tile.rows) * ceil_div(columns, tile.columns),)](
        coarse.contiguous(),
        weight,
        bias,
        children,
        out,
        num_fine,
        num_cells,
        *(live or NOT_LIVE),
        *weight.stride(),
        DEPTHS=depth,
        CHANNELS=channels,
        WIDTH=columns // 8,
        HAS_BIAS=bias is not None,
        TILE_ROWS=tile.rows,
        TILE_COLUMNS=tile.columns,
        DEPTH=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def gathered_grads(
    fine: Float[Tensor, "N C"],
    children: Int64[Tensor, "8 M"],
    grad: Float[Tensor, "M F"],
    *,
    marked: bool = False,
    live: LiveCounts = None,
) -> tuple[Float32[Tensor, "F _"], Float32[Tensor, " F"]]:
    """Of weight and bias of `gather_product`: grad.T @ (children side by side), and the sum of grad's rows."""
    return _grads(fine, children, grad, marked=marked, gathered_lines=False, live=live)


def scattered_grads(
    coarse: Float[Tensor, "M C"], children: Int64[Tensor, "8 M"], grad: Float[Tensor, "N F"], *, live: LiveCounts = None
) -> tuple[Float32[Tensor, "_ C"], Float32[Tensor, " _"]]:
    """Of weight and bias of `scatter_product`: (children's grad side by side).T @ coarse, and the sum of those rows."""
    return _grads(grad, children, coarse, marked=False, gathered_lines=True, live=live)


def _grads(
    fine: Float[Tensor, "N C"],
    children: Int64[Tensor, "8 M"],
    coarse: Float[Tensor, "M F"],
    *,
    marked: bool,
    gathered_lines: bool,
    live: LiveCounts,
) -> tuple[Float32[Tensor, "L P"], Float32[Tensor, " L"]]:
    """Lines and places of the result come from one of the two each."""
    (num_fine, channels), (num_cells, columns), wide = fine.shape, coarse.shape, 8 * (fine.shape[1] + marked)
    lines, places = (wide, columns) if gathered_lines else (columns, wide)
    if num_cells == 0:
        zeros = fine.new_zeros((lines, places + 1), dtype=torch.float32)
        return zeros[:, :places], zeros[:, places]
    tile, height, programs = _parts(places, lines, coarse.dtype, shared_memory(coarse.device))
    splits = even_parts(2 * programs, processors(coarse.device))  # the same for any number of cells
    parts = fine.new_empty((splits, lines * (places + 1)), dtype=torch.float32)
    _gathered_grads[(programs, splits)](
        fine.contiguous(),
        children,
        coarse.contiguous(),
        parts,
        num_fine,
        num_cells,
        *(live or NOT_LIVE),
        CHANNELS=channels,
        WIDTH=channels + marked,
        COLUMNS=columns,
        GATHERED_LINES=gathered_lines,
        TILE_LINES=height,
        TILE_PLACES=tile.columns,
        DEPTH=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    sums = parts.sum(0)
    return sums[: lines * places].view(lines, places), sums[lines * places :]


@cache
def _parts(places: int, lines: int, dtype: torch.dtype, room: int) -> tuple:
    """The tile, its lines, and the programs that cover the weight."""
    tile = fitted(grad_tile(lines, places, dtype), dtype, room)
    height = min(max(power_of_two(lines), 16), tile.rows)
    return tile, height, ceil_div(lines, height) * ceil_div(places, tile.columns)


@no_type_check
@triton.jit
def _side_by_side(  # noqa: PLR0913
    fine,
    children,
    cells,
    inside,
    first,
    num_fine,
    pitch,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Numbers first..first + SIZE of the children of some cells."""
    lane = first + tl.arange(0, SIZE)
    if CHANNELS == WIDTH and WIDTH % SIZE == 0:  # of one child
        octant = first // WIDTH
        # (ROWS,) of a line of (8, M)
        row = tl.load(children + octant * pitch + cells, mask=inside, other=num_fine)
        at = row[:, None] * CHANNELS + (lane % WIDTH)[None, :]
        values = tl.load(fine + at, mask=(row < num_fine)[:, None], other=0.0)  # (ROWS, SIZE) of (N, C)
    else:
        octant, channel = (lane // WIDTH).to(tl.int64)[None, :], (lane % WIDTH)[None, :]
        known = inside[:, None] & (octant < 8)
        # (ROWS, SIZE) of (8, M)
        row = tl.load(children + octant * pitch + cells[:, None], mask=known, other=num_fine)
        there = row < num_fine
        # (ROWS, SIZE) of (N, C)
        values = tl.load(fine + row * CHANNELS + channel, mask=there & (channel < CHANNELS), other=0.0)
        if WIDTH > CHANNELS:
            values += (there & (channel == CHANNELS)).to(values.dtype)  # a `where` here does not compile for Hopper
    return values


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_fine", "pitch"])
def _gather_product(  # noqa: PLR0913
    fine,
    children,
    weight,
    bias,
    out,
    num_fine,
    pitch,
    live_fine,
    live_cells,
    weight_f,
    weight_c,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    column_tiles: tl.constexpr = (COLUMNS + TILE_COLUMNS - 1) // TILE_COLUMNS
    num_cells = pitch
    if live_cells is not None:
        num_fine, num_cells = tl.load(live_fine), tl.load(live_cells)  # () of (1,)
        if tl.program_id(0) // column_tiles * TILE_ROWS >= num_cells:
            return
    cells = (tl.program_id(0) // column_tiles).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    inside = cells < num_cells
    columns = (tl.program_id(0) % column_tiles) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    sums = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    for first in range(0, 8 * WIDTH, DEPTH):
        # (TILE_ROWS, DEPTH)
        block = _side_by_side(fine, children, cells, inside, first, num_fine, pitch, CHANNELS, WIDTH, DEPTH)
        lane = first + tl.arange(0, DEPTH)
        known = (lane < 8 * WIDTH)[:, None] & (columns < COLUMNS)[None, :]
        # (DEPTH, TILE_COLUMNS) of (F, 8 WIDTH), turned
        factors = tl.load(weight + lane[:, None] * weight_c + columns[None, :] * weight_f, mask=known, other=0.0)
        sums = tl.dot(block.to(factors.dtype), factors, sums)
    if HAS_BIAS:
        sums += tl.load(bias + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)[None, :]  # of (F,)
    target = out + cells[:, None] * COLUMNS + columns[None, :]
    tl.store(target, sums.to(out.dtype.element_ty), mask=inside[:, None] & (columns < COLUMNS)[None, :])


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_fine", "pitch"])
def _scatter_product(  # noqa: PLR0913
    coarse,
    weight,
    bias,
    children,
    out,
    num_fine,
    pitch,
    live_fine,
    live_cells,
    weight_f,
    weight_c,
    DEPTHS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    column_tiles: tl.constexpr = (8 * WIDTH + TILE_COLUMNS - 1) // TILE_COLUMNS
    num_cells = pitch
    if live_cells is not None:
        num_fine, num_cells = tl.load(live_fine), tl.load(live_cells)  # () of (1,)
        if tl.program_id(0) // column_tiles * TILE_ROWS >= num_cells:
            return
    cells = (tl.program_id(0) // column_tiles).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    inside = (cells < num_cells)[:, None]
    columns = (tl.program_id(0) % column_tiles) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    known = (columns < 8 * WIDTH)[None, :]
    sums = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    for first in range(0, DEPTHS, DEPTH):
        lane = first + tl.arange(0, DEPTH)
        block = tl.load(
            coarse + cells[:, None] * DEPTHS + lane[None, :], mask=inside & (lane < DEPTHS)[None, :], other=0.0
        )  # (TILE_ROWS, DEPTH) of (M, C)
        # (DEPTH, TILE_COLUMNS) of (8 WIDTH, C), turned
        factors = tl.load(
            weight + lane[:, None] * weight_c + columns[None, :] * weight_f,
            mask=(lane < DEPTHS)[:, None] & known,
            other=0.0,
        )
        sums = tl.dot(block, factors, sums)
    if HAS_BIAS:
        sums += tl.load(bias + columns, mask=columns < 8 * WIDTH, other=0.0).to(tl.float32)[None, :]  # of (8 WIDTH,)
    octant, channel = (columns // WIDTH).to(tl.int64)[None, :], (columns % WIDTH)[None, :]
    # (TILE_ROWS, TILE_COLUMNS) of (8, M)
    row = tl.load(children + octant * pitch + cells[:, None], mask=inside & known, other=num_fine)
    tl.store(
        out + row * CHANNELS + channel, sums.to(out.dtype.element_ty), mask=(row < num_fine) & (channel < CHANNELS)
    )


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_fine", "pitch"])
def _gathered_grads(  # noqa: PLR0913
    fine,
    children,
    coarse,
    parts,
    num_fine,
    pitch,
    live_fine,
    live_cells,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATHERED_LINES: tl.constexpr,
    TILE_LINES: tl.constexpr,
    TILE_PLACES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    lines_in_all: tl.constexpr = 8 * WIDTH if GATHERED_LINES else COLUMNS
    places_in_all: tl.constexpr = COLUMNS if GATHERED_LINES else 8 * WIDTH
    place_tiles: tl.constexpr = (places_in_all + TILE_PLACES - 1) // TILE_PLACES
    first_line = (tl.program_id(0) // place_tiles) * TILE_LINES
    first_place = (tl.program_id(0) % place_tiles) * TILE_PLACES
    lines, places = first_line + tl.arange(0, TILE_LINES), first_place + tl.arange(0, TILE_PLACES)
    num_cells = pitch
    if live_cells is not None:
        num_fine, num_cells = tl.load(live_fine), tl.load(live_cells)  # () of (1,)
    length = tl.cdiv(num_cells, tl.num_programs(1) * DEPTH) * DEPTH  # so that parts do not depend on a table's length
    start = tl.program_id(1) * length
    end = tl.minimum(start + length, num_cells)
    sums = tl.zeros((TILE_LINES, TILE_PLACES), dtype=tl.float32)
    totals = tl.zeros((TILE_LINES, 16), dtype=tl.float32)  # sixteen times the same: a product with ones is the fastest
    for begin in range(start, end, DEPTH):
        cells = (begin + tl.arange(0, DEPTH)).to(tl.int64)
        inside = cells < end
        if GATHERED_LINES:
            upstream = _side_by_side(
                fine, children, cells, inside, first_line, num_fine, pitch, CHANNELS, WIDTH, TILE_LINES
            )
            keep = inside[:, None] & (places < COLUMNS)[None, :]
            block = tl.load(coarse + cells[:, None] * COLUMNS + places[None, :], mask=keep, other=0.0)
        else:
            keep = inside[:, None] & (lines < COLUMNS)[None, :]
            upstream = tl.load(coarse + cells[:, None] * COLUMNS + lines[None, :], mask=keep, other=0.0)
            block = _side_by_side(
                fine, children, cells, inside, first_place, num_fine, pitch, CHANNELS, WIDTH, TILE_PLACES
            )
        turned = tl.trans(upstream.to(coarse.dtype.element_ty))
        sums = tl.dot(turned, block.to(coarse.dtype.element_ty), sums)
        totals = tl.dot(turned, tl.full((DEPTH, 16), 1.0, dtype=coarse.dtype.element_ty), totals)
    base = parts + tl.program_id(1).to(tl.int64) * (lines_in_all * (places_in_all + 1))
    keep = (lines < lines_in_all)[:, None] & (places < places_in_all)[None, :]
    tl.store(base + lines[:, None] * places_in_all + places[None, :], sums, mask=keep)
    if tl.program_id(0) % place_tiles == 0:
        tl.store(base + lines_in_all * places_in_all + lines, tl.sum(totals, 1) * 0.0625, mask=lines < lines_in_all)
