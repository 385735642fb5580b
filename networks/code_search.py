"""Nearest codes and sums by code, fused in Triton: O(N) memory, near the time of the arithmetic. CUDA, float32.

score(x, c) = |c|^2 / 2 - x . c, smallest wins, the lowest index on a tie. Each factor is split into two TF32 parts and
three of the four products are added (error near 2^-21 of |x||c|): plain TF32 was seen to pick wrong codes.
"""

from functools import cache
from typing import no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float32, Int64
from torch import Tensor

ROWS = 128  # of a program
STEP = 4096  # numbers of a table that a step reads: 128 codes of 32


def stages(width: int, device: torch.device) -> int:
    """Steps of a table that fit into a program's shared memory beside its rows, at most 3; 0 where none does."""
    depth = max(triton.next_power_of_2(width), 16)
    return max(0, min(3, (shared_memory(device) // (8 * depth) - ROWS) // min(STEP // depth, 128)))


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes a program may use."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 2**17


def nearest_codes(rows: Float32[Tensor, "N D"], codebook: Float32[Tensor, "K D"]) -> Int64[Tensor, " N"]:
    """Index of the closest codebook row."""
    (num_rows, width), num_codes = rows.shape, codebook.shape[0]
    found = torch.empty(num_rows, dtype=torch.int64, device=rows.device)
    if num_rows == 0:
        return found
    depth = max(triton.next_power_of_2(width), 16)
    step = min(STEP // depth, 128)
    padded = triton.cdiv(num_codes, step) * step
    table = F.pad(codebook, (0, depth - width, 0, padded - num_codes))
    high = _upper_bits(table)
    halves = F.pad(codebook.square().sum(1) / 2, (0, padded - num_codes), value=torch.inf)
    with torch.cuda.device_of(rows):
        _search[(triton.cdiv(num_rows, ROWS),)](
            rows.contiguous(),
            high,
            table - high,
            halves,
            found,
            num_rows,
            padded,
            WIDTH=width,
            DEPTH=depth,
            ROWS=ROWS,
            CODES=step,
            num_warps=8,
            num_stages=stages(width, rows.device),
        )
    return found


def _upper_bits(values: Float32[Tensor, "K D"]) -> Float32[Tensor, "K D"]:
    """The part that TF32 holds exactly: 10 bits of the mantissa."""
    return (values.view(torch.int32) & -8192).view(torch.float32)


@no_type_check
@triton.jit(do_not_specialize=["num_rows"])
def _search(  # noqa: PLR0913
    rows,
    high,
    low,
    halves,
    found,
    num_rows,
    num_codes,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    depth, lane = tl.arange(0, DEPTH), tl.arange(0, CODES)
    keep = (places < num_rows)[:, None] & (depth < WIDTH)[None, :]
    x = tl.load(rows + places[:, None] * WIDTH + depth[None, :], mask=keep, other=0.0)
    x_high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    x_low = x - x_high
    best = tl.full((ROWS, CODES), float("inf"), dtype=tl.float32)
    start_of_best = tl.zeros((ROWS, CODES), dtype=tl.int32)
    for start in range(0, num_codes, CODES):
        at = (start + lane)[:, None] * DEPTH + depth[None, :]
        c_high, c_low = tl.trans(tl.load(high + at)), tl.trans(tl.load(low + at))
        product = tl.dot(x_low, c_high, input_precision="tf32")
        product = tl.dot(x_high, c_low, product, input_precision="tf32")
        product = tl.dot(x_high, c_high, product, input_precision="tf32")
        score = tl.load(halves + start + lane)[None, :] - product
        better = score < best
        best = tl.where(better, score, best)
        start_of_best = tl.where(better, start, start_of_best)
    least = tl.min(best, 1)
    candidates = tl.where(best == least[:, None], start_of_best + lane[None, :], 2147483647)
    tl.store(found + places, tl.min(candidates, 1).to(tl.int64), mask=places < num_rows)


def code_sums(
    rows: Float32[Tensor, "N D"], codes: Int64[Tensor, " N"], num_codes: int
) -> tuple[Float32[Tensor, " K"], Float32[Tensor, "K D"]]:
    """How many rows chose each code, and their sum, added in a fixed order."""
    width = rows.shape[1]
    narrow = codes.to(torch.int16 if num_codes < 2**15 else torch.int32)  # fewer passes to sort
    ordered, order = torch.sort(narrow, stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(num_codes + 1, dtype=narrow.dtype, device=rows.device))
    sums = rows.new_empty((num_codes, width))
    with torch.cuda.device_of(rows):
        _segment_sums[(num_codes,)](
            rows.contiguous(), order, bounds, sums, WIDTH=width, DEPTH=triton.next_power_of_2(width), ROWS=64
        )
    return bounds.diff().to(rows.dtype), sums


@no_type_check
@triton.jit
def _segment_sums(rows, order, bounds, sums, WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr):
    code = tl.program_id(0).to(tl.int64)
    depth = tl.arange(0, DEPTH)
    end = tl.load(bounds + code + 1)
    total = tl.zeros((ROWS, DEPTH), dtype=tl.float32)
    for start in range(tl.load(bounds + code), end, ROWS):
        places = start + tl.arange(0, ROWS)
        row = tl.load(order + places, mask=places < end, other=0)
        keep = (places < end)[:, None] & (depth < WIDTH)[None, :]
        total += tl.load(rows + row[:, None] * WIDTH + depth[None, :], mask=keep, other=0.0)
    tl.store(sums + code * WIDTH + depth, tl.sum(total, 0), mask=depth < WIDTH)
