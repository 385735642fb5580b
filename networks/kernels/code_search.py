"""Nearest codes and sums by code, fused in Triton: O(N) memory, near the time of the arithmetic. CUDA, float32.

score(x, c) = |c|^2 / 2 - x . c, smallest wins, the lowest index on a tie. Each factor is split into two TF32 parts and
three of the four products are added (error near 2^-21 of |x||c|): plain TF32 was seen to pick wrong codes.
"""

from functools import cache
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from networks.kernels.launch import ceil_div, power_of_two, quick, shared_memory
from networks.kernels.tiles import Tile

FEW_ROWS = 2**15  # below it a program takes fewer, so that every processor has some
NUMBERS_PER_PROGRAM = 1024  # of the codebook, where averages advance


@cache
def tile_for(width: int, device: torch.device, *, few: bool) -> Tile:
    """Rows of a program and codes of a step, its columns; the fastest of about thirty on an H100.

    Where rows are few, fewer a program fill the card; no stages where no step of the table fits beside the rows.
    """
    depth = max(power_of_two(width), 16)
    if depth > 32:
        rows, codes, warps = 128, max(4096 // depth, 16), 8
    else:
        rows, codes, warps = 64 if few else 128, 64, 4
    room = (shared_memory(device) // (8 * depth) - rows) // codes
    return Tile(rows, codes, depth, warps, max(0, min(3 if depth > 32 else 4, room)))


class Nearest(NamedTuple):
    """The closest codebook row of each row."""

    codes: Int64[Tensor, " N"]
    values: Float32[Tensor, "N D"]
    errors: Float32[Tensor, " N"]  # mean squared difference


def nearest_codes(rows: Float32[Tensor, "N D"], codebook: Float32[Tensor, "K D"]) -> Int64[Tensor, " N"]:
    """Index of the closest codebook row."""
    return _nearest(rows, codebook, read=False)[0]


def nearest(rows: Float32[Tensor, "N D"], codebook: Float32[Tensor, "K D"]) -> Nearest:
    """The closest codebook row, read in the pass that finds it."""
    return Nearest(*_nearest(rows, codebook, read=True))


def _nearest(
    rows: Float32[Tensor, "N D"], codebook: Float32[Tensor, "K D"], *, read: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    (num_rows, width), num_codes = rows.shape, codebook.shape[0]
    rows, codebook = rows.contiguous(), codebook.contiguous()
    found = torch.empty(num_rows, dtype=torch.int64, device=rows.device)
    values, errors = (torch.empty_like(rows), rows.new_empty(num_rows)) if read else (None, None)
    if num_rows == 0:
        return found, values, errors
    tile = tile_for(width, rows.device, few=num_rows < FEW_ROWS)
    padded = ceil_div(num_codes, tile.columns) * tile.columns
    table, halves = rows.new_empty((2, padded, tile.depth)), rows.new_empty(padded)
    _split_table[(padded // tile.columns,)](codebook, table, halves, num_codes, padded, width, tile.depth, tile.columns)
    _search[(ceil_div(num_rows, tile.rows),)](
        rows,
        table,
        halves,
        codebook,
        found,
        values,
        errors,
        num_rows,
        padded,
        WIDTH=width,
        DEPTH=tile.depth,
        ROWS=tile.rows,
        CODES=tile.columns,
        READ=read,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return found, values, errors


@no_type_check
@triton.jit
def _upper_bits(values):
    """The part that TF32 holds exactly: 10 bits of the mantissa."""
    return (values.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@no_type_check
@quick
@triton.jit
def _split_table(
    codebook, table, halves, num_codes, padded, WIDTH: tl.constexpr, DEPTH: tl.constexpr, CODES: tl.constexpr
):
    """Both parts of the codebook and half of each code's square, infinite where there is no code."""
    codes, depth = tl.program_id(0).to(tl.int64) * CODES + tl.arange(0, CODES), tl.arange(0, DEPTH)
    keep = (codes < num_codes)[:, None] & (depth < WIDTH)[None, :]
    # (CODES, DEPTH) of (K, D)
    values = tl.load(codebook + codes[:, None] * WIDTH + depth[None, :], mask=keep, other=0.0)
    high = _upper_bits(values)
    at = table + codes[:, None] * DEPTH + depth[None, :]
    tl.store(at, high)
    tl.store(at + padded.to(tl.int64) * DEPTH, values - high)
    tl.store(halves + codes, tl.where(codes < num_codes, tl.sum(values * values, 1) / 2, float("inf")))


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows"])
def _search(  # noqa: PLR0913
    rows,
    table,
    halves,
    codebook,
    found,
    values,
    errors,
    num_rows,
    num_codes,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    READ: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    depth, lane = tl.arange(0, DEPTH), tl.arange(0, CODES)
    keep = (places < num_rows)[:, None] & (depth < WIDTH)[None, :]
    x = tl.load(rows + places[:, None] * WIDTH + depth[None, :], mask=keep, other=0.0)  # (ROWS, DEPTH) of (N, D)
    x_high = _upper_bits(x)
    x_low = x - x_high
    low = table + num_codes.to(tl.int64) * DEPTH
    best = tl.full((ROWS, CODES), float("inf"), dtype=tl.float32)
    start_of_best = tl.zeros((ROWS, CODES), dtype=tl.int32)
    for start in range(0, num_codes, CODES):
        at = (start + lane)[:, None] * DEPTH + depth[None, :]
        c_high, c_low = tl.trans(tl.load(table + at)), tl.trans(tl.load(low + at))  # (DEPTH, CODES) of (2, K, DEPTH)
        product = tl.dot(x_low, c_high, input_precision="tf32")
        product = tl.dot(x_high, c_low, product, input_precision="tf32")
        product = tl.dot(x_high, c_high, product, input_precision="tf32")
        score = tl.load(halves + start + lane)[None, :] - product  # (ROWS, CODES)
        better = score < best
        best = tl.where(better, score, best)
        start_of_best = tl.where(better, start, start_of_best)
    least = tl.min(best, 1)
    candidates = tl.where(best == least[:, None], start_of_best + lane[None, :], 2147483647)
    code = tl.min(candidates, 1).to(tl.int64)
    tl.store(found + places, code, mask=places < num_rows)
    if READ:
        value = tl.load(codebook + code[:, None] * WIDTH + depth[None, :], mask=keep, other=0.0)  # (ROWS, DEPTH)
        tl.store(values + places[:, None] * WIDTH + depth[None, :], value, mask=keep)
        x = tl.load(rows + places[:, None] * WIDTH + depth[None, :], mask=keep, other=0.0)  # (ROWS, DEPTH)
        tl.store(errors + places, tl.sum((x - value) * (x - value), 1) / WIDTH, mask=places < num_rows)


def code_sums(
    rows: Float32[Tensor, "N D"], codes: Int64[Tensor, " N"], num_codes: int
) -> tuple[Float32[Tensor, " K"], Float32[Tensor, "K D"]]:
    """How many rows chose each code, and their sum, added in a fixed order."""
    (num_rows, width), narrow = rows.shape, torch.int16 if num_codes < 2**15 else torch.int32
    ordered, order = torch.sort(codes.to(narrow), stable=True)  # fewer passes to sort
    counts, sums = rows.new_empty(num_codes), rows.new_empty((num_codes, width))
    depth = power_of_two(width)
    halvings = num_rows.bit_length()
    _segment_sums[(num_codes,)](
        rows.contiguous(), ordered, order, counts, sums, num_rows, halvings, WIDTH=width, DEPTH=depth, ROWS=64
    )
    return counts, sums


@no_type_check
@triton.jit
def _first_at_least(ordered, code, num_rows, halvings):
    """Where `code` or what is above it begins among sorted codes."""
    low, high = num_rows * 0, num_rows
    for _ in range(halvings):
        middle = (low + high) // 2
        # () of (N,), sorted
        below = (tl.load(ordered + middle, mask=middle < num_rows, other=0).to(tl.int32) < code) & (middle < num_rows)
        low, high = tl.where(below, middle + 1, low), tl.where(below, high, middle)
    return low


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows", "halvings"])
def _segment_sums(  # noqa: PLR0913
    rows,
    ordered,
    order,
    counts,
    sums,
    num_rows,
    halvings,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    code, depth = tl.program_id(0), tl.arange(0, DEPTH)
    first = _first_at_least(ordered, code, num_rows, halvings)
    end = _first_at_least(ordered, code + 1, num_rows, halvings)
    total = tl.zeros((ROWS, DEPTH), dtype=tl.float32)
    for start in range(first, end, ROWS):
        places = start + tl.arange(0, ROWS)
        row = tl.load(order + places, mask=places < end, other=0)  # (ROWS,) of (N,)
        keep = (places < end)[:, None] & (depth < WIDTH)[None, :]
        total += tl.load(rows + row[:, None] * WIDTH + depth[None, :], mask=keep, other=0.0)  # (ROWS, DEPTH) of (N, D)
    tl.store(counts + code, (end - first).to(tl.float32))
    tl.store(sums + code.to(tl.int64) * WIDTH + depth, tl.sum(total, 0), mask=depth < WIDTH)


def advance(
    averages: tuple[Float32[Tensor, " K"], Float32[Tensor, "K D"], Float32[Tensor, "K D"]],
    counts: Float32[Tensor, " K"],
    sums: Float32[Tensor, "K D"],
    *,
    share: float,
    rate: float,
    least: float,
) -> Bool[Tensor, " K"]:
    """Moves the mean counts and sums by `rate` towards this step's in units of `share`, and the codes with them.

    `averages` are mean counts, mean sums and codes, changed in place. Gives the codes whose count is not above `least`.
    """
    num_codes, width = sums.shape
    depth = power_of_two(width)
    tile = max(1, NUMBERS_PER_PROGRAM // depth)
    unused = torch.empty(num_codes, dtype=torch.bool, device=sums.device)
    _advance[(ceil_div(num_codes, tile),)](
        *averages, counts, sums, unused, num_codes, share, rate, least, WIDTH=width, DEPTH=depth, TILE=tile
    )
    return unused


@no_type_check
@quick
@triton.jit(do_not_specialize=["share", "rate", "least"])
def _advance(  # noqa: PLR0913
    mean_count,
    mean_sum,
    codes_out,
    counts,
    sums,
    unused,
    num_codes,
    share,
    rate,
    least,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    TILE: tl.constexpr,
):
    codes, depth = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, DEPTH)
    inside = codes < num_codes
    count = tl.load(mean_count + codes, mask=inside, other=1.0)  # (TILE,) of (K,)
    count += rate * (tl.load(counts + codes, mask=inside, other=0.0) / share - count)  # (TILE,) of (K,)
    at, keep = codes[:, None] * WIDTH + depth[None, :], inside[:, None] & (depth < WIDTH)[None, :]
    total = tl.load(mean_sum + at, mask=keep, other=0.0)  # (TILE, DEPTH) of (K, D)
    total += rate * (tl.load(sums + at, mask=keep, other=0.0) / share - total)  # (TILE, DEPTH) of (K, D)
    tl.store(mean_count + codes, count, mask=inside)
    tl.store(mean_sum + at, total, mask=keep)
    tl.store(codes_out + at, total / count[:, None], mask=keep)
    tl.store(unused + codes, count <= least, mask=inside)


def revive(
    averages: tuple[Float32[Tensor, " K"], Float32[Tensor, "K D"], Float32[Tensor, "K D"]],
    unused: Bool[Tensor, " K"],
    places: Int64[Tensor, " K"],
    picks: Int64[Tensor, " P"],
    rows: Float32[Tensor, "N D"],
) -> None:
    """Unused codes restart at rows[picks[places - 1]], with a mean count of one; `averages` as in `advance`."""
    num_codes, width = averages[1].shape
    depth = power_of_two(width)
    tile = max(1, NUMBERS_PER_PROGRAM // depth)
    _revive[(ceil_div(num_codes, tile),)](
        *averages, unused, places, picks, rows, num_codes, WIDTH=width, DEPTH=depth, TILE=tile
    )


@no_type_check
@quick
@triton.jit
def _revive(  # noqa: PLR0913
    mean_count,
    mean_sum,
    codes_out,
    unused,
    places,
    picks,
    rows,
    num_codes,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    TILE: tl.constexpr,
):
    codes, depth = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, DEPTH)
    dead = tl.load(unused + codes, mask=codes < num_codes, other=0) != 0  # (TILE,) of (K,)
    place = tl.load(places + codes, mask=dead, other=1) - 1  # (TILE,) of (K,)
    row = tl.load(picks + place, mask=dead, other=0)  # (TILE,) of (P,)
    at, keep = codes[:, None] * WIDTH + depth[None, :], dead[:, None] & (depth < WIDTH)[None, :]
    fresh = tl.load(rows + row[:, None] * WIDTH + depth[None, :], mask=keep, other=0.0)  # (TILE, DEPTH) of (N, D)
    tl.store(mean_count + codes, tl.full((TILE,), 1.0, tl.float32), mask=dead)
    tl.store(mean_sum + at, fresh, mask=keep)
    tl.store(codes_out + at, fresh, mask=keep)
