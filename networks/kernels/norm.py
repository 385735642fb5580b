"""Normalisation of each voxel's own channels with its activation, and its gradients, fused in Triton. CUDA.

A row is read once, forward and backward: nothing of it but the input is kept. What ops.py does in plain torch. With
`live`, a number on the device, the rows from there on are neither read nor written; see linear.py.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from networks.kernels.launch import ceil_div, power_of_two, quick

NUMBERS_PER_STEP = 4096
PROGRAMS_PER_BATCH = 1024  # about, in gradients just that many: eight for each processor of a large card


def voxel_norm(
    x: Float[Tensor, "N C"],
    weight: Float[Tensor, " C"] | None,
    bias: Float[Tensor, " C"] | None,
    *,
    eps: float,
    silu: bool,
    live: Int32[Tensor, "1"] | None = None,
) -> Float[Tensor, "N C"]:
    """Without weight and bias they are ones and zeros."""
    out = torch.empty_like(x)
    if len(x):
        step = _step(x)
        grid = (min(ceil_div(len(x), step["TILE"]), PROGRAMS_PER_BATCH),)
        mode = {"AFFINE": weight is not None, "SILU": silu, "LIVE": live is not None}
        _normalize[grid](x, weight, bias, out, len(x) if live is None else live, eps, **mode, **step)
    return out


def voxel_norm_grads(
    x: Float[Tensor, "N C"],
    grad: Float[Tensor, "N C"],
    weight: Float[Tensor, " C"],
    bias: Float[Tensor, " C"],
    *,
    eps: float,
    silu: bool,
) -> tuple[Float[Tensor, "N C"], Float32[Tensor, " C"], Float32[Tensor, " C"]]:
    """Gradients of input, weight and bias. With z the normalised row, and means over its channels,
    d input = rstd * (w g - mean(w g) - z * mean(w g z)).
    """
    out = torch.empty_like(x)
    sums = x.new_empty((PROGRAMS_PER_BATCH, 2, x.shape[1]), dtype=torch.float32)
    mode = {"AFFINE": True, "AROUND": False, "BESIDE": False, "SILU": silu, "LIVE": False}
    _grads[(PROGRAMS_PER_BATCH,)](x, grad, weight, bias, None, out, sums, x.shape[0], eps, **mode, **_step(x))
    of_bias, of_weight = sums.sum(0)
    return out, of_weight, of_bias


class BlockGrads(NamedTuple):
    """Of a norm inside a block: of its input, its parameters, and the bias of the layer beside it."""

    input: Float[Tensor, "N C"]
    weight: Float32[Tensor, " C"] | None
    bias: Float32[Tensor, " C"] | None
    beside: Float32[Tensor, " C"] | None


def voxel_norm_grads_in_block(
    x: Float[Tensor, "N C"],
    grad: Float[Tensor, "N C"],
    parameters: tuple[Float[Tensor, " C"], Float[Tensor, " C"]] | None,
    *,
    eps: float,
    silu: bool,
    around: Float[Tensor, "N C"] | None = None,
    live: Int32[Tensor, "1"] | None = None,
) -> BlockGrads:
    """Gradients where features run `around` the norm: their gradient is added to the input's.

    `beside` is the sum of the rows of `around`, or of the input's gradient where nothing runs around: what the bias of
    the layer after the block, or before the norm, learns by.
    """
    out = torch.empty_like(x)
    affine = parameters is not None
    if not len(x):
        nothing = x.new_zeros((3, x.shape[1]), dtype=torch.float32) if affine else (None,) * 3
        return BlockGrads(out, *nothing)
    programs = PROGRAMS_PER_BATCH  # the same for any number of rows, and so are their sums
    sums = x.new_empty((programs, 3, x.shape[1]), dtype=torch.float32) if affine else None
    weight, bias = parameters or (None, None)
    mode = {"AFFINE": affine, "AROUND": around is not None, "BESIDE": True, "SILU": silu, "LIVE": live is not None}
    given = x, grad, weight, bias, around, out, sums, len(x) if live is None else live
    _grads[(programs,)](*given, eps, **mode, **_step(x))
    if not affine:
        return BlockGrads(out, None, None, None)
    of_bias, of_weight, beside = sums.sum(0)
    return BlockGrads(out, of_weight, of_bias, beside)


def _step(x: Float[Tensor, "N C"]) -> dict[str, int]:
    """The sizes of a step."""
    width = power_of_two(x.shape[1])
    return {"CHANNELS": x.shape[1], "TILE": max(1, NUMBERS_PER_STEP // width), "WIDTH": width}


@no_type_check
@triton.jit
def _steps(num_rows, TILE: tl.constexpr):
    """The first of a program's steps, and the one behind its last: a run of whole steps for each program."""
    steps = tl.cdiv(num_rows, TILE)
    many = tl.cdiv(steps, tl.num_programs(0))
    return tl.program_id(0) * many, tl.minimum((tl.program_id(0) + 1) * many, steps)


@no_type_check
@triton.jit
def _centred(x, step, num_rows, eps, CHANNELS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets and mask of a step's rows, the rows without their mean, and their inverse deviations."""
    row = (step * TILE + tl.arange(0, TILE)).to(tl.int64)
    channels = tl.arange(0, WIDTH)
    at = row[:, None] * CHANNELS + channels[None, :]
    keep = (row < num_rows)[:, None] & (channels < CHANNELS)[None, :]
    values = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)  # (TILE, WIDTH) of (N, C)
    away = tl.where(keep, values - (tl.sum(values, 1) / CHANNELS)[:, None], 0.0)
    return at, keep, away, (1.0 / tl.sqrt(tl.sum(away * away, 1) / CHANNELS + eps))[:, None]


@no_type_check
@triton.jit
def _of_channels(table, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    channels = tl.arange(0, WIDTH)
    # (1, WIDTH) of (C,)
    return tl.load(table + channels, mask=channels < CHANNELS, other=0.0).to(tl.float32)[None, :]


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows"])
def _normalize(  # noqa: PLR0913
    x,
    weight,
    bias,
    out,
    num_rows,
    eps,
    AFFINE: tl.constexpr,
    SILU: tl.constexpr,
    LIVE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    if LIVE:
        num_rows = tl.load(num_rows)
    if AFFINE:
        gain, lift = _of_channels(weight, CHANNELS, WIDTH), _of_channels(bias, CHANNELS, WIDTH)
    first, end = _steps(num_rows, TILE)
    for step in range(first, end):
        at, keep, away, rstd = _centred(x, step, num_rows, eps, CHANNELS, TILE, WIDTH)
        values = away * rstd
        if AFFINE:
            values = values * gain + lift
        if SILU:
            values *= tl.sigmoid(values)
        tl.store(out + at, values.to(out.dtype.element_ty), mask=keep)


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows"])
def _grads(  # noqa: PLR0913
    x,
    grad,
    weight,
    bias,
    around,
    out,
    sums,
    num_rows,
    eps,
    AFFINE: tl.constexpr,
    AROUND: tl.constexpr,
    BESIDE: tl.constexpr,
    SILU: tl.constexpr,
    LIVE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    if LIVE:
        num_rows = tl.load(num_rows)
    if AFFINE:
        gain, lift = _of_channels(weight, CHANNELS, WIDTH), _of_channels(bias, CHANNELS, WIDTH)
    total, along = tl.zeros((WIDTH,), dtype=tl.float32), tl.zeros((WIDTH,), dtype=tl.float32)
    beside = tl.zeros((WIDTH,), dtype=tl.float32)
    first, end = _steps(num_rows, TILE)
    for step in range(first, end):
        at, keep, away, rstd = _centred(x, step, num_rows, eps, CHANNELS, TILE, WIDTH)
        # (TILE, WIDTH) of (N, C)
        z, slope = away * rstd, tl.load(grad + at, mask=keep, other=0.0).to(tl.float32)
        if SILU:
            before = z * gain + lift
            gate = tl.sigmoid(before)
            slope *= gate * (1 + before * (1 - gate))
        if AFFINE:
            total += tl.sum(slope, 0)
            along += tl.sum(slope * z, 0)
            slope *= gain
        level, tilt = tl.sum(slope, 1) / CHANNELS, tl.sum(slope * z, 1) / CHANNELS
        values = rstd * (slope - level[:, None] - z * tilt[:, None])
        if AROUND:
            skipped = tl.load(around + at, mask=keep, other=0.0).to(tl.float32)  # (TILE, WIDTH) of (N, C)
            values += skipped
        rounded = values.to(out.dtype.element_ty)
        tl.store(out + at, rounded, mask=keep)
        if BESIDE and AFFINE:
            if AROUND:
                beside += tl.sum(skipped, 0)
            else:  # rows outside are not zero: z is, but not what the means leave
                beside += tl.sum(tl.where(keep, rounded.to(tl.float32), 0.0), 0)
    if AFFINE:
        lines: tl.constexpr = 3 if BESIDE else 2
        channels = tl.arange(0, WIDTH)
        target = sums + tl.program_id(0).to(tl.int64) * lines * CHANNELS + channels
        tl.store(target, total, mask=channels < CHANNELS)
        tl.store(target + CHANNELS, along, mask=channels < CHANNELS)
        if BESIDE:
            tl.store(target + 2 * CHANNELS, beside, mask=channels < CHANNELS)
