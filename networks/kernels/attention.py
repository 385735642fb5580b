"""Self-attention inside windows of unequal size, fused in Triton: no padding, no atomics, equal to the bit. CUDA.

Rows of a window are found through `order` and `bounds`; a program owns a block of its queries (or, for the gradients of
keys and values, of its keys) and walks over the others with a running softmax (arXiv:2205.14135). Sums in float32.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

from networks.kernels.launch import ceil_div, power_of_two, quick

ROWS_PER_STEP = 64  # queries, and keys; fewer where heads are wide
BYTES_PER_STEP = 8192  # of a block of queries: four such and two of scores fit the shared memory of any card
MAX_HEAD_WIDTH = 128


def attend(
    qkv: Float[Tensor, "N 3 H D"], order: Int64[Tensor, " N"], bounds: Int32[Tensor, " W1"], most: int
) -> tuple[Float[Tensor, "N H D"], Float32[Tensor, "N H"]]:
    """Values, and the logarithm (base 2) of each softmax's sum."""
    num_rows, _, heads, width = qkv.shape
    out = qkv.new_empty((num_rows, heads, width))
    sums = qkv.new_empty((num_rows, heads), dtype=torch.float32)
    if num_rows:
        shape = _shape(qkv)
        _attend[_grid(bounds, most, shape)](qkv, order, bounds, out, sums, **shape)
    return out, sums


def attend_grad(
    grad: Float[Tensor, "N H D"],
    qkv: Float[Tensor, "N 3 H D"],
    out: Float[Tensor, "N H D"],
    sums: Float32[Tensor, "N H"],
    order: Int64[Tensor, " N"],
    bounds: Int32[Tensor, " W1"],
    most: int,
) -> Float[Tensor, "N 3 H D"]:
    grads, dots = torch.empty_like(qkv), torch.empty_like(sums)
    if len(qkv):
        shape = _shape(qkv)
        grid = _grid(bounds, most, shape)
        _grad_queries[grid](grad, qkv, out, sums, dots, order, bounds, grads, **shape)
        _grad_keys[grid](grad, qkv, sums, dots, order, bounds, grads, **shape)
    return grads


def _grid(bounds: Int32[Tensor, " W1"], most: int, shape: dict[str, object]) -> tuple[int, int, int]:
    return len(bounds) - 1, ceil_div(most, shape["BLOCK"]), shape["HEADS"]


def _shape(qkv: Float[Tensor, "N 3 H D"]) -> dict[str, object]:
    heads, width = qkv.shape[2:]
    depth = max(power_of_two(width), 16)
    return {
        "HEADS": heads,
        "WIDTH": width,
        "DEPTH": depth,
        "SCALE": width**-0.5,
        "PRECISION": "tf32x3" if qkv.dtype == torch.float32 else "ieee",
        "BLOCK": max(16, min(ROWS_PER_STEP, BYTES_PER_STEP // (depth * qkv.element_size()))),
    }


@no_type_check
@triton.jit
def _rows_of(order, start, end, BLOCK: tl.constexpr):
    places = start + tl.arange(0, BLOCK)
    return tl.load(order + places, mask=places < end, other=0), places < end  # (BLOCK,) of (N,), twice


@no_type_check
@triton.jit
def _load(
    table, rows, inside, part, PARTS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr
):
    """This head's part (queries 0, keys 1, values 2; 0 of 1 elsewhere) of some rows, zeros outside."""
    depth = tl.arange(0, DEPTH)
    at = ((rows * PARTS + part) * HEADS + tl.program_id(2))[:, None] * WIDTH + depth[None, :]
    # (BLOCK, DEPTH) of (N, PARTS, H, D)
    return tl.load(table + at, mask=inside[:, None] & (depth < WIDTH)[None, :], other=0.0)


@no_type_check
@triton.jit
def _store(  # noqa: PLR0913
    table,
    values,
    rows,
    inside,
    part,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    depth = tl.arange(0, DEPTH)
    at = ((rows * PARTS + part) * HEADS + tl.program_id(2))[:, None] * WIDTH + depth[None, :]
    tl.store(table + at, values.to(table.dtype.element_ty), mask=inside[:, None] & (depth < WIDTH)[None, :])


@no_type_check
@quick
@triton.jit
def _attend(  # noqa: PLR0913
    qkv,
    order,
    bounds,
    out,
    sums,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, end = tl.load(bounds + tl.program_id(0)), tl.load(bounds + tl.program_id(0) + 1)  # () of (W + 1,)
    start = first + tl.program_id(1) * BLOCK
    if start < end:
        rows, inside = _rows_of(order, start, end, BLOCK)
        q = _load(qkv, rows, inside, 0, 3, HEADS, WIDTH, DEPTH)  # (BLOCK, DEPTH)
        top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        values = tl.zeros((BLOCK, DEPTH), dtype=tl.float32)
        for other in range(first, end, BLOCK):
            near, there = _rows_of(order, other, end, BLOCK)
            k = _load(qkv, near, there, 1, 3, HEADS, WIDTH, DEPTH)  # (BLOCK, DEPTH)
            v = _load(qkv, near, there, 2, 3, HEADS, WIDTH, DEPTH)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (SCALE * 1.4426950408889634)  # to base 2
            scores = tl.where(there[None, :], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            shares = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(shares, 1)
            values = tl.dot(shares.to(v.dtype), v, values * shrink[:, None], input_precision=PRECISION)
            top = higher
        _store(out, values / total[:, None], rows, inside, 0, 1, HEADS, WIDTH, DEPTH)
        tl.store(sums + rows * HEADS + tl.program_id(2), top + tl.log2(total), mask=inside)


@no_type_check
@quick
@triton.jit
def _grad_queries(  # noqa: PLR0913
    grad,
    qkv,
    out,
    sums,
    dots,
    order,
    bounds,
    grads,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, end = tl.load(bounds + tl.program_id(0)), tl.load(bounds + tl.program_id(0) + 1)  # () of (W + 1,)
    start = first + tl.program_id(1) * BLOCK
    if start < end:
        rows, inside = _rows_of(order, start, end, BLOCK)
        q = _load(qkv, rows, inside, 0, 3, HEADS, WIDTH, DEPTH)  # (BLOCK, DEPTH)
        upstream = _load(grad, rows, inside, 0, 1, HEADS, WIDTH, DEPTH)  # (BLOCK, DEPTH)
        value = _load(out, rows, inside, 0, 1, HEADS, WIDTH, DEPTH)
        dot = tl.sum(upstream.to(tl.float32) * value.to(tl.float32), 1)
        tl.store(dots + rows * HEADS + tl.program_id(2), dot, mask=inside)
        total = tl.load(sums + rows * HEADS + tl.program_id(2), mask=inside, other=float("inf"))  # (BLOCK,) of (N, H)
        slope = tl.zeros((BLOCK, DEPTH), dtype=tl.float32)
        for other in range(first, end, BLOCK):
            near, there = _rows_of(order, other, end, BLOCK)
            k = _load(qkv, near, there, 1, 3, HEADS, WIDTH, DEPTH)  # (BLOCK, DEPTH)
            v = _load(qkv, near, there, 2, 3, HEADS, WIDTH, DEPTH)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (SCALE * 1.4426950408889634)  # to base 2
            shares = tl.where(there[None, :], tl.exp2(scores - total[:, None]), 0.0)
            steep = shares * (tl.dot(upstream, tl.trans(v), input_precision=PRECISION) - dot[:, None])
            slope = tl.dot(steep.to(k.dtype), k, slope, input_precision=PRECISION)
        _store(grads, slope * SCALE, rows, inside, 0, 3, HEADS, WIDTH, DEPTH)


@no_type_check
@quick
@triton.jit
def _grad_keys(  # noqa: PLR0913
    grad,
    qkv,
    sums,
    dots,
    order,
    bounds,
    grads,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, end = tl.load(bounds + tl.program_id(0)), tl.load(bounds + tl.program_id(0) + 1)  # () of (W + 1,)
    start = first + tl.program_id(1) * BLOCK
    if start < end:
        rows, inside = _rows_of(order, start, end, BLOCK)
        k = _load(qkv, rows, inside, 1, 3, HEADS, WIDTH, DEPTH)  # (BLOCK, DEPTH)
        v = _load(qkv, rows, inside, 2, 3, HEADS, WIDTH, DEPTH)
        slope_k = tl.zeros((BLOCK, DEPTH), dtype=tl.float32)
        slope_v = tl.zeros((BLOCK, DEPTH), dtype=tl.float32)
        for other in range(first, end, BLOCK):
            far, there = _rows_of(order, other, end, BLOCK)
            q = _load(qkv, far, there, 0, 3, HEADS, WIDTH, DEPTH)  # (BLOCK, DEPTH)
            upstream = _load(grad, far, there, 0, 1, HEADS, WIDTH, DEPTH)
            total = tl.load(sums + far * HEADS + tl.program_id(2), mask=there, other=float("inf"))  # (BLOCK,)
            dot = tl.load(dots + far * HEADS + tl.program_id(2), mask=there, other=0.0)  # (BLOCK,) of (N, H)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (SCALE * 1.4426950408889634)  # to base 2
            shares = tl.exp2(scores - total[None, :])
            slope_v = tl.dot(shares.to(upstream.dtype), upstream, slope_v, input_precision=PRECISION)
            steep = shares * (tl.dot(v, tl.trans(upstream), input_precision=PRECISION) - dot[None, :])
            slope_k = tl.dot(steep.to(q.dtype), q, slope_k, input_precision=PRECISION)
        _store(grads, slope_k * SCALE, rows, inside, 1, 3, HEADS, WIDTH, DEPTH)
        _store(grads, slope_v, rows, inside, 2, 3, HEADS, WIDTH, DEPTH)
