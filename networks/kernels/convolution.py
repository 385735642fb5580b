"""The submanifold 3x3x3 convolution as masked implicit matrix products in Triton: CUDA, bf16, fp16, fp32.

The three functions of torch_backend.py with float32 sums in a fixed order, so repeats are equal to the bit. Forward and
input gradient: a program owns a tile of rows, and gathers the neighbours of the offsets that are alive in it. Weight
gradient: the rows are split among programs whose partial sums are added up afterwards. float32 runs as three TF32
products (error near 1e-6), or as one where `torch.backends.cuda.matmul.allow_tf32` is set.
"""

import logging
import math
from collections.abc import Callable
from functools import cache, partial
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from networks.kernels.launch import KNOWN_LAUNCHER, ceil_div, power_of_two, processors, quick, shared_memory
from networks.kernels.tiles import Tile, even_parts, fitted, grad_tile, gradient_is_shared, producer_plan, product_tile
from networks.sparse.topology import Level

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PROOF_TOLERANCE = 1e-2  # between two orders of float32 sums, rounded to 16 bits
log = logging.getLogger(__name__)


def forward(
    feats: Float[Tensor, "N C"], weight: Float[Tensor, "27 C F"], bias: Float[Tensor, " F"] | None, level: Level
) -> Float[Tensor, "N F"]:
    return forward_beside(feats, weight, bias, None, level)


def forward_beside(
    feats: Float[Tensor, "N C"],
    weight: Float[Tensor, "27 C F"],
    bias: Float[Tensor, " F"] | None,
    added: Float[Tensor, "N F"] | None,
    level: Level,
) -> Float[Tensor, "N F"]:
    """`forward`, and rows that run beside the convolution are added in the same pass."""
    if product := _with_producers(*weight.shape[1:], feats.dtype, feats.device, level.is_thin, False):
        return product(feats, weight, bias, level, mirrored=False, added=added)
    tile = product_tile(weight.shape[1], weight.shape[2], feats.dtype, thin=level.is_thin)
    tile = fitted(tile, feats.dtype, shared_memory(feats.device))
    return gather_product(feats, weight, bias, level, mirrored=False, tile=tile, added=added)


def input_grad(grad: Float[Tensor, "N F"], weight: Float[Tensor, "27 C F"], level: Level) -> Float[Tensor, "N C"]:
    if product := _with_producers(*weight.shape[:0:-1], grad.dtype, grad.device, level.is_thin, True):
        return product(grad, weight, None, level, mirrored=True)
    tile = product_tile(weight.shape[2], weight.shape[1], grad.dtype, thin=level.is_thin)
    tile = fitted(tile, grad.dtype, shared_memory(grad.device))
    return gather_product(grad, weight.mT, None, level, mirrored=True, tile=tile)


def weight_grad(feats: Float[Tensor, "N C"], grad: Float[Tensor, "N F"], level: Level) -> Float[Tensor, "27 C F"]:
    return weight_grads([(feats, grad)], level)[0]


def weight_grads(
    pairs: list[tuple[Float[Tensor, "N C"], Float[Tensor, "N F"]]], level: Level
) -> list[Float[Tensor, "27 C F"]]:
    """`weight_grad` of several convolutions of equal widths; their partial sums lie side by side, added at once."""
    feats, grad = pairs[0]
    widths = feats.shape[1], grad.shape[1]
    if len(feats) and (products := _gradient_with_producers(*widths, feats.dtype, feats.device, level.is_thin)):
        return products(pairs, level)
    tile = grad_tile(*widths, feats.dtype)
    return row_products(pairs, level, tile=fitted(tile, feats.dtype, shared_memory(feats.device)))


def refusal(feats: Float[Tensor, "N C"], columns: int) -> str | None:
    """Why this backend cannot convolve these features to `columns` channels; None where it can."""
    if feats.dtype not in DTYPES:
        return f"computes in bfloat16, float16 or float32, got {feats.dtype}"
    return None


@cache
def _with_producers(
    channels: int, columns: int, dtype: torch.dtype, device: torch.device, thin: bool, mirrored: bool
) -> Callable[..., Float[Tensor, "N F"]] | None:
    """What does the work of `gather_product` with warps that only gather, on the cards and shapes that it is made for.

    It takes the forward's own weight for the gradient too.
    """
    plan = producer_plan(channels, columns, dtype, shared_memory(device), thin=thin, mirrored=mirrored)
    if plan is None or not _has_producers(device):
        return None
    from networks.kernels import producer_convolution

    return partial(producer_convolution.gather_product, plan=plan)


@cache
def _gradient_with_producers(
    channels: int, columns: int, dtype: torch.dtype, device: torch.device, thin: bool
) -> Callable[..., list[Float[Tensor, "27 C F"]]] | None:
    """What does the work of `row_products` with warps that only gather, on the cards and shapes that it is made for."""
    fits = gradient_is_shared(channels, columns, dtype, shared_memory(device), thin=thin)
    if not fits or not _has_producers(device):
        return None
    from networks.kernels import producer_gradient

    return producer_gradient.row_products


def _has_producers(device: torch.device) -> bool:
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return hopper and KNOWN_LAUNCHER and _defect_of_producers(device) is None


@cache
def _defect_of_producers(device: torch.device) -> str | None:
    """What is wrong with warps that only gather on a device, shown by a small convolution; said once."""
    tile = Tile(128, 128, 64, 8, 3)
    try:
        from networks.kernels import producer_convolution, producer_gradient

        worst = max(
            producer_convolution.largest_error(device, partial(gather_product, tile=tile)),
            producer_gradient.largest_error(device, partial(row_products, tile=tile)),
            key=lambda error: math.inf if math.isnan(error) else error,
        )
        reason = None if worst < PROOF_TOLERANCE else f"relative error {worst:.2g}"
    except Exception as error:  # Gluon is an experimental part of Triton and may raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if reason:
        log.warning("convolutions of many channels run without producer warps: they do not work here (%s)", reason)
    else:
        log.info("convolutions of many channels run with producer warps")
    return reason


def _precision(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return "ieee"  # 16-bit inputs: exact products
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def gather_product(
    feats: Float[Tensor, "N C"],
    weight: Float[Tensor, "27 C F"],
    bias: Float[Tensor, " F"] | None,
    level: Level,
    *,
    mirrored: bool,
    tile: Tile,
    added: Float[Tensor, "N F"] | None = None,
) -> Float[Tensor, "N F"]:
    """out[p] = added[p] + bias + sum over k of feats[neighbours[k, p]] @ weight[26 - k if mirrored else k]."""
    (num_rows, channels), columns = feats.shape, weight.shape[2]
    out = feats.new_empty((num_rows, columns))
    if num_rows == 0 or columns == 0:
        return out
    plan = level.tiles(tile.rows)
    grid = (plan.offsets.shape[0] * -(-columns // tile.columns),)
    _gather_product[grid](
        feats.contiguous(),
        weight,
        bias,
        added,
        plan.neighbours,
        plan.rows,
        plan.offsets,
        plan.counts,
        out,
        num_rows,
        level.live,
        *weight.stride(),
        CHANNELS=channels,
        COLUMNS=columns,
        HAS_BIAS=bias is not None,
        ADDED=added is not None,
        ORDERED=plan.rows is not None,
        MIRRORED=mirrored,
        PRECISION=_precision(feats.dtype),
        TILE_ROWS=tile.rows,
        TILE_COLUMNS=tile.columns,
        DEPTH=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


@no_type_check  # jaxtyping's import hook would otherwise break compilation
@quick
@triton.jit(do_not_specialize=["pitch"])
def _gather_product(  # noqa: PLR0913
    feats,
    weight,
    bias,
    added,
    neighbours,
    order,
    offsets,
    counts,
    out,
    pitch,
    live,
    weight_k,
    weight_c,
    weight_f,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDED: tl.constexpr,
    ORDERED: tl.constexpr,
    MIRRORED: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    column_tiles: tl.constexpr = (COLUMNS + TILE_COLUMNS - 1) // TILE_COLUMNS
    blocks: tl.constexpr = (CHANNELS + DEPTH - 1) // DEPTH
    tile = tl.program_id(0) // column_tiles
    num_rows = pitch
    if live is not None:
        num_rows = tl.load(live)  # () of (1,)
        if tile * TILE_ROWS >= num_rows:
            return
    places = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    inside = places < num_rows
    columns = (tl.program_id(0) % column_tiles) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    count = tl.load(counts + tile)  # () of (T,)
    sums = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    k = tl.load(offsets + tile * 27)  # () of (T, 27)
    # (TILE_ROWS,) of (27, N)
    near = tl.load(neighbours + k.to(tl.int64) * pitch + places, mask=inside, other=num_rows)
    for step in range(count * blocks):
        channels = (step % blocks) * DEPTH + tl.arange(0, DEPTH)
        there = (near < num_rows)[:, None]
        if CHANNELS % DEPTH != 0:
            there = there & (channels < CHANNELS)[None, :]
        # (TILE_ROWS, DEPTH) of (N, C)
        gathered = tl.load(feats + near.to(tl.int64)[:, None] * CHANNELS + channels[None, :], mask=there, other=0.0)
        index = 26 - k if MIRRORED else k
        pointers = weight + index * weight_k + channels[:, None] * weight_c + columns[None, :] * weight_f
        if CHANNELS % DEPTH != 0 or COLUMNS % TILE_COLUMNS != 0:
            known = (channels < CHANNELS)[:, None] & (columns < COLUMNS)[None, :]
            block = tl.load(pointers, mask=known, other=0.0)  # (DEPTH, TILE_COLUMNS) of (27, C, F)
        else:
            block = tl.load(pointers)  # (DEPTH, TILE_COLUMNS) of (27, C, F)
        # The next step's rows are read a step ahead, or every gather would wait for its addresses.
        k = tl.load(offsets + tile * 27 + tl.minimum((step + 1) // blocks, count - 1))  # ()
        near = tl.load(neighbours + k.to(tl.int64) * pitch + places, mask=inside, other=num_rows)
        sums = tl.dot(gathered, block, sums, input_precision=PRECISION)
    if HAS_BIAS:
        sums += tl.load(bias + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)[None, :]  # of (F,)
    if ORDERED:
        rows = tl.load(order + places, mask=inside, other=0)  # (TILE_ROWS,) of (N,)
    else:
        rows = places
    at = rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    keep = inside[:, None] & (columns < COLUMNS)[None, :]
    if ADDED:
        sums += tl.load(added + at, mask=keep, other=0.0).to(tl.float32)  # (TILE_ROWS, TILE_COLUMNS) of (N, F)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=keep)


def row_products(
    pairs: list[tuple[Float[Tensor, "N C"], Float[Tensor, "N F"]]], level: Level, *, tile: Tile
) -> list[Float[Tensor, "27 C F"]]:
    """Of each pair: out[k] = sum over p of feats[neighbours[k, p]]^T grad[p], in float32."""
    (num_rows, channels), columns, device = pairs[0][0].shape, pairs[0][1].shape[1], pairs[0][0].device
    if num_rows == 0 or channels == 0 or columns == 0:
        return [feats.new_zeros((27, channels, columns), dtype=torch.float32) for feats, _ in pairs]
    listed = level.is_thin
    lists = level.neighbour_lists if listed else None
    block, offsets, programs = _parts(channels, columns, tile, listed)
    splits = even_parts(programs, processors(device))  # the same for any number of rows
    parts = torch.empty((splits, len(pairs), 27, channels, columns), dtype=torch.float32, device=device)
    for number, (feats, grad) in enumerate(pairs):
        feats = feats.contiguous()
        if feats.data_ptr() % 16:  # the kernel copies 16 bytes at a time
            feats = feats.clone()
        _row_product[(programs, splits)](
            feats,
            grad.contiguous(),
            lists.near if listed else level.neighbours,
            lists.rows if listed else None,
            lists.counts if listed else None,
            parts[:, number],
            num_rows,
            level.live,
            parts.stride(0),
            CHANNELS=channels,
            COLUMNS=columns,
            LISTED=listed,
            PRECISION=_precision(feats.dtype),
            OFFSETS=offsets,
            BLOCK=block,
            TILE_COLUMNS=tile.columns,
            DEPTH=tile.depth,
            ALIGNED=math.gcd(channels, 8),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return list(parts.sum(0).unbind(0))


@cache
def _parts(channels: int, columns: int, tile: Tile, listed: bool) -> tuple[int, int, int]:
    """Channels and offsets of a program, and the programs that cover all 27."""
    block = min(max(power_of_two(channels), 16), tile.rows)
    offsets = 1 if listed else tile.rows // block  # with lists each offset has rows of its own
    return block, offsets, ceil_div(27, offsets) * ceil_div(channels, block) * ceil_div(columns, tile.columns)


@no_type_check
@triton.jit
def _pairs(  # noqa: PLR0913
    neighbours,
    list_rows,
    pitch,
    num_rows,
    first,
    start,
    end,
    LISTED: tl.constexpr,
    OFFSETS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Rows of a step, and their neighbours at each of its offsets; num_rows beyond the end."""
    places = start + tl.arange(0, DEPTH)
    if LISTED:
        at = first.to(tl.int64) * pitch + places
        rows = tl.load(list_rows + at, mask=places < end, other=num_rows)  # (DEPTH,) of line k of (27, N)
        near = tl.load(neighbours + at, mask=places < end, other=num_rows)  # (DEPTH,) of line k of (27, N)
    elif OFFSETS == 1:
        rows = tl.where(places < end, places, num_rows)
        # (DEPTH,) of line k of (27, N)
        near = tl.load(neighbours + first.to(tl.int64) * pitch + places, mask=places < end, other=num_rows)
    else:
        rows = tl.where(places < end, places, num_rows)
        offsets = first + tl.arange(0, OFFSETS)
        at = offsets.to(tl.int64)[None, :] * pitch + places[:, None]
        # (DEPTH, OFFSETS) of (27, N), turned
        near = tl.load(neighbours + at, mask=(places < end)[:, None] & (offsets < 27)[None, :], other=num_rows)
    return rows, near


@no_type_check
@quick
@triton.jit(do_not_specialize=["pitch", "part_size"])
def _row_product(  # noqa: PLR0913
    feats,
    grad,
    neighbours,
    list_rows,
    list_counts,
    out,
    pitch,
    live,
    part_size,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LISTED: tl.constexpr,
    PRECISION: tl.constexpr,
    OFFSETS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    column_tiles: tl.constexpr = (COLUMNS + TILE_COLUMNS - 1) // TILE_COLUMNS
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    column_tile = tl.program_id(0) % column_tiles
    block = tl.program_id(0) // column_tiles % blocks
    first = tl.program_id(0) // (column_tiles * blocks) * OFFSETS
    columns = column_tile * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    channels = block * BLOCK + tl.arange(0, BLOCK)
    num_rows = pitch
    if live is not None:
        num_rows = tl.load(live)  # () of (1,)
    length = tl.cdiv(num_rows, tl.num_programs(1) * DEPTH) * DEPTH  # so that parts do not depend on a table's length
    start = tl.program_id(1) * length
    end = tl.minimum(start + length, num_rows)
    if LISTED:
        end = tl.minimum(end, tl.load(list_counts + first))  # () of (27,)
    sums = tl.zeros((OFFSETS * BLOCK, TILE_COLUMNS), dtype=tl.float32)
    rows, near = _pairs(neighbours, list_rows, pitch, num_rows, first, start, end, LISTED, OFFSETS, DEPTH)
    for position in range(start, end, DEPTH):
        if OFFSETS == 1:
            there = (near < num_rows)[:, None] & (channels < CHANNELS)[None, :]
            pointers = feats + (near.to(tl.int64)[:, None] * CHANNELS + channels[None, :])
        else:
            there = (near < num_rows)[:, :, None] & (channels < CHANNELS)[None, None, :]
            there = tl.max_constancy(tl.reshape(there, (DEPTH, OFFSETS * BLOCK)), (1, ALIGNED))
            index = near.to(tl.int64)[:, :, None] * CHANNELS + channels[None, None, :]
            pointers = feats + tl.reshape(index, (DEPTH, OFFSETS * BLOCK))
            size: tl.constexpr = feats.dtype.element_ty.primitive_bitwidth // 8
            pointers = tl.max_contiguous(tl.multiple_of(pointers, (1, ALIGNED * size)), (1, ALIGNED))
        gathered = tl.load(pointers, mask=there, other=0.0)  # (DEPTH, OFFSETS * BLOCK) of (N, C)
        # (DEPTH, TILE_COLUMNS) of (N, F)
        upstream = tl.load(
            grad + rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :],
            mask=(rows < num_rows)[:, None] & (columns < COLUMNS)[None, :],
            other=0.0,
        )
        rows, near = _pairs(
            neighbours, list_rows, pitch, num_rows, first, position + DEPTH, end, LISTED, OFFSETS, DEPTH
        )
        sums = tl.dot(tl.trans(gathered), upstream, sums, input_precision=PRECISION)
    lines = tl.arange(0, OFFSETS * BLOCK)
    k = first + lines // BLOCK
    channel = block * BLOCK + lines % BLOCK
    base = out + tl.program_id(1).to(tl.int64) * part_size
    target = k * CHANNELS + channel
    keep = ((k < 27) & (channel < CHANNELS))[:, None] & (columns < COLUMNS)[None, :]
    tl.store(base + target[:, None] * COLUMNS + columns[None, :], sums, mask=keep)
