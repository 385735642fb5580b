"""The convolution's forward and input gradient with warps of their own for gathering: Hopper, bf16 and fp16, C >= 128.

What `convolution.gather_product` computes, in Gluon, which the Triton wheel carries: a program stays on its processor
and takes one tile of rows after another. One group of warps gathers neighbours, and has the weights copied, into a ring
of buffers; two others multiply what is there, each its own half of the tile's rows, and so loading and products run
beside each other. Sums are float32 in a fixed order. Gluon's names change from one Triton to the next: it is used with
the version that it was written for, and `convolution.py` serves everywhere else.
"""

from collections.abc import Callable
from functools import partial
from typing import no_type_check

import torch
from jaxtyping import Float
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from networks.kernels.launch import ceil_div, processors, quick, shared_memory
from networks.kernels.tiles import PRODUCER_DEPTH, PRODUCER_GROUPS, ProducerPlan, producer_plan
from networks.sparse.topology import Level

SWIZZLED = gl.NVMMASharedLayout(128, 16, 2)


def gather_product(
    feats: Float[Tensor, "N C"],
    weight: Float[Tensor, "27 _ _"],
    bias: Float[Tensor, " F"] | None,
    level: Level,
    *,
    mirrored: bool,
    plan: ProducerPlan,
    added: Float[Tensor, "N F"] | None = None,
) -> Float[Tensor, "N F"]:
    """As in convolution.py; `weight` is (27, C, F), or the forward's own, (27, F, C), where `mirrored`."""
    num_rows, channels = feats.shape
    columns = weight.shape[1 if mirrored else 2]
    out = feats.new_empty((num_rows, columns))
    if num_rows == 0:
        return out
    tiles = level.tiles(PRODUCER_GROUPS * plan.rows)
    count = tiles.offsets.shape[0] * ceil_div(columns, plan.columns)
    _gather_product[(min(count, processors(feats.device)),)](
        aligned(feats),
        _copied_by_the_card(weight, (plan.columns, PRODUCER_DEPTH) if mirrored else (PRODUCER_DEPTH, plan.columns)),
        out if bias is None else bias,
        out if added is None else aligned(added),
        tiles.neighbours,
        tiles.counts if tiles.rows is None else tiles.rows,
        tiles.offsets,
        tiles.counts,
        out,
        num_rows,
        level.live,
        count,
        CHANNELS=channels,
        COLUMNS=columns,
        HAS_BIAS=bias is not None,
        ADDED=added is not None,
        ORDERED=tiles.rows is not None,
        MIRRORED=mirrored,
        ROWS=plan.rows,
        TILE_COLUMNS=plan.columns,
        STAGES=plan.stages,
        PRODUCERS=plan.producers,
        GROUPS=PRODUCER_GROUPS,
        num_warps=4,
    )
    return out


def largest_error(device: torch.device, plain: Callable[..., Float[Tensor, "N F"]]) -> float:
    """Beside `convolution.gather_product` on a small level, relative to the largest value."""
    coords = torch.nn.functional.pad(torch.ones(5, 8, 10, device=device).nonzero(), (1, 0))
    level, _ = Level.from_coords(coords, (5, 8, 10), 1)
    draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    room, errors = shared_memory(device), []
    for columns, mirrored in ((128, False), (256, False), (256, True)):
        feats, added, bias = draw(400, 128).half(), draw(400, columns).half(), draw(columns)
        weight = draw(27, columns, 128).half() if mirrored else draw(27, 128, columns).half()
        plan = producer_plan(128, columns, feats.dtype, room, thin=False, mirrored=mirrored)
        mine = gather_product(feats, weight, bias, level, mirrored=mirrored, plan=plan, added=added)
        turned = weight.mT if mirrored else weight
        other = plain(feats, turned, bias, level, mirrored=mirrored, added=added).float()
        errors.append(float((mine.float() - other).abs().max() / other.abs().max()))
    return float(torch.tensor(errors).max())  # NaN wins, as it does not in max()


def aligned(rows: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Contiguous, from a multiple of 16 bytes on: what is copied 16 bytes at a time."""
    rows = rows.contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows


def _copied_by_the_card(rows: Float[Tensor, "..."], block: tuple[int, int]) -> TensorDescriptor:
    """A matrix of which blocks are copied to shared memory by the card itself; zeros beyond its end."""
    flat = aligned(rows).flatten(0, -2)
    return TensorDescriptor(flat, list(flat.shape), [flat.shape[1], 1], list(block), SWIZZLED)


@no_type_check
@gluon.jit
def _near(  # noqa: PLR0913
    neighbours, k, row_tile, group, pitch, num_rows, LAYOUT: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr
):
    """Neighbours at offset k of a group's rows; num_rows where there is none."""
    places = (row_tile * GROUPS + group) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    # (ROWS,) of (27, N)
    return gl.load(neighbours + k.to(gl.int64) * pitch + places, mask=places < num_rows, other=num_rows)


@no_type_check
@gluon.jit
def _offset(offsets, row_tile, step, steps, blocks: gl.constexpr):
    return gl.load(offsets + row_tile * 27 + gl.minimum(step, steps - 1) // blocks)  # () of (T, 27)


@no_type_check
@gluon.jit
def _produce(  # noqa: PLR0913
    feats,
    weight,
    neighbours,
    offsets,
    counts,
    rows_ring,
    weight_ring,
    ready,
    empty,
    pitch,
    num_rows,
    num_tiles,
    CHANNELS: gl.constexpr,
    COLUMNS: gl.constexpr,
    MIRRORED: gl.constexpr,
    ROWS: gl.constexpr,
    TILE_COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
):
    """Fills the ring. Neighbours are read a group ahead of their gather, and offsets two steps."""
    column_tiles: gl.constexpr = (COLUMNS + TILE_COLUMNS - 1) // TILE_COLUMNS
    blocks: gl.constexpr = CHANNELS // 64
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])  # 16 bytes a thread
    channel = gl.arange(0, 64, gl.SliceLayout(0, layout))
    filled = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row_tile = tile // column_tiles
        column = tile % column_tiles * TILE_COLUMNS
        steps = gl.load(counts + row_tile) * blocks  # () of (T,)
        k = _offset(offsets, row_tile, 0, steps, blocks)
        next_k = _offset(offsets, row_tile, 1, steps, blocks)
        near = _near(neighbours, k, row_tile, 0, pitch, num_rows, layout, ROWS, GROUPS)
        for step in range(steps):
            block = step % blocks * 64
            after_k = _offset(offsets, row_tile, step + 2, steps, blocks)
            stage = filled % STAGES
            full = ready.index(stage)
            for group in gl.static_range(GROUPS):
                there = (near < num_rows)[:, None]
                pointers = feats + (near.to(gl.int64) * CHANNELS + block)[:, None] + channel[None, :]
                following = k if group + 1 < GROUPS else next_k
                near = _near(
                    neighbours, following, row_tile, (group + 1) % GROUPS, pitch, num_rows, layout, ROWS, GROUPS
                )
                if group == 0:
                    mbarrier.wait(empty.index(stage), (filled // STAGES & 1) ^ 1)
                    mbarrier.expect(full, 64 * TILE_COLUMNS * 2)
                    if MIRRORED:  # (TILE_COLUMNS, 64) of (27, F, C)
                        corner = [(26 - k) * COLUMNS + column, block]
                    else:  # (64, TILE_COLUMNS) of (27, C, F)
                        corner = [k * CHANNELS + block, column]
                    tma.async_copy_global_to_shared(weight, corner, full, weight_ring.index(stage))
                # (ROWS, 64) of (N, C)
                async_copy.async_copy_global_to_shared(rows_ring.index(stage * GROUPS + group), pointers, mask=there)
            async_copy.mbarrier_arrive(full, increment_count=False)
            filled += 1
            k = next_k
            next_k = after_k


@no_type_check
@gluon.jit
def _places(  # noqa: PLR0913
    order,
    first,
    column,
    num_rows,
    LAYOUT: gl.constexpr,
    COLUMNS: gl.constexpr,
    ORDERED: gl.constexpr,
    ROWS: gl.constexpr,
    TILE_COLUMNS: gl.constexpr,
):
    """Where a group's tile lies among rows of COLUMNS, and which of it is there."""
    places = first + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    rows = places
    if ORDERED:
        rows = gl.load(order + places, mask=places < num_rows, other=0)  # (ROWS,) of (N,)
    columns = column + gl.arange(0, TILE_COLUMNS, gl.SliceLayout(0, LAYOUT))
    keep = (places < num_rows)[:, None] & (columns < COLUMNS)[None, :]
    return (rows.to(gl.int64) * COLUMNS)[:, None] + columns[None, :], keep


@no_type_check
@gluon.jit
def _consume(  # noqa: PLR0913
    GROUP: gl.constexpr,
    bias,
    added,
    order,
    counts,
    out,
    stage_rows,
    rows_ring,
    weight_ring,
    ready,
    empty,
    num_rows,
    num_tiles,
    CHANNELS: gl.constexpr,
    COLUMNS: gl.constexpr,
    MIRRORED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ADDED: gl.constexpr,
    ORDERED: gl.constexpr,
    ROWS: gl.constexpr,
    TILE_COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
):
    """Multiplies what is ready. A buffer is given back one step later, when its product has been waited for.

    Rows come and go through `stage_rows`, 16 bytes a thread: as the products leave them they would be 4.
    """
    column_tiles: gl.constexpr = (COLUMNS + TILE_COLUMNS - 1) // TILE_COLUMNS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, TILE_COLUMNS, 16])
    lanes: gl.constexpr = 32 if TILE_COLUMNS >= 256 else TILE_COLUMNS // 8
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [gl.num_warps(), 1], [1, 0])
    lane = gl.arange(0, TILE_COLUMNS, gl.SliceLayout(0, layout))
    own = stage_rows.index(GROUP)  # (ROWS, TILE_COLUMNS)
    used = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row_tile = tile // column_tiles
        column = tile % column_tiles * TILE_COLUMNS
        first = (row_tile * GROUPS + GROUP) * ROWS
        if ADDED:
            at, keep = _places(order, first, column, num_rows, wide, COLUMNS, ORDERED, ROWS, TILE_COLUMNS)
            async_copy.async_copy_global_to_shared(own, added + at, mask=keep)  # (ROWS, TILE_COLUMNS) of (N, F)
            async_copy.commit_group()
        sums = gl.zeros((ROWS, TILE_COLUMNS), gl.float32, layout)
        for step in range(gl.load(counts + row_tile) * (CHANNELS // 64)):  # () of (T,)
            stage = used % STAGES
            mbarrier.wait(ready.index(stage), used // STAGES & 1)
            fence_async_shared()  # gathers are ordinary writes, products read by a way of their own
            block = weight_ring.index(stage)  # (64, TILE_COLUMNS), or turned
            if MIRRORED:
                block = block.permute((1, 0))
            sums = warpgroup_mma(rows_ring.index(stage * GROUPS + GROUP), block, sums, is_async=True)
            sums = warpgroup_mma_wait(1, deps=(sums,))
            mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES), count=1, pred=step > 0)
            used += 1
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(empty.index((used + STAGES - 1) % STAGES), count=1)
        if HAS_BIAS:
            known = column + lane < COLUMNS
            sums += gl.load(bias + column + lane, mask=known, other=0.0).to(gl.float32)[None, :]  # of (F,)
        if ADDED:
            async_copy.wait_group(0)
            sums += own.load(layout).to(gl.float32)
        own.store(sums.to(out.dtype.element_ty))
        at, keep = _places(order, first, column, num_rows, wide, COLUMNS, ORDERED, ROWS, TILE_COLUMNS)
        gl.store(out + at, own.load(wide), mask=keep)


@no_type_check
@quick
@gluon.jit(do_not_specialize=["pitch", "num_tiles"])
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
    num_tiles,
    CHANNELS: gl.constexpr,
    COLUMNS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ADDED: gl.constexpr,
    ORDERED: gl.constexpr,
    MIRRORED: gl.constexpr,
    ROWS: gl.constexpr,
    TILE_COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    PRODUCERS: gl.constexpr,
    GROUPS: gl.constexpr,
    num_warps: gl.constexpr,
):
    num_rows = pitch
    if live is not None:
        num_rows = gl.load(live)  # () of (1,)
        num_tiles = (num_rows + GROUPS * ROWS - 1) // (GROUPS * ROWS) * ((COLUMNS + TILE_COLUMNS - 1) // TILE_COLUMNS)
    dtype: gl.constexpr = feats.dtype.element_ty
    rows_ring = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, ROWS, 64], weight.layout)
    lines: gl.constexpr = TILE_COLUMNS if MIRRORED else 64
    weight_ring = gl.allocate_shared_memory(dtype, [STAGES, lines, 64 * TILE_COLUMNS // lines], weight.layout)
    stage_rows = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, TILE_COLUMNS], weight.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=32 * PRODUCERS + 1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    fence_async_shared()
    # Constants lose themselves in a tuple that has a name, so each call spells its own out.
    # fmt: off
    gl.warp_specialize([
        (_consume, (0, bias, added, order, counts, out, stage_rows, rows_ring, weight_ring, ready, empty, num_rows,
                    num_tiles, CHANNELS, COLUMNS, MIRRORED, HAS_BIAS, ADDED, ORDERED, ROWS, TILE_COLUMNS, STAGES,
                    GROUPS)),
        (_consume, (1, bias, added, order, counts, out, stage_rows, rows_ring, weight_ring, ready, empty, num_rows,
                    num_tiles, CHANNELS, COLUMNS, MIRRORED, HAS_BIAS, ADDED, ORDERED, ROWS, TILE_COLUMNS, STAGES,
                    GROUPS)),
        (_produce, (feats, weight, neighbours, offsets, counts, rows_ring, weight_ring, ready, empty, pitch, num_rows,
                    num_tiles, CHANNELS, COLUMNS, MIRRORED, ROWS, TILE_COLUMNS, STAGES, GROUPS)),
    ], [num_warps, PRODUCERS], [200, 96] if PRODUCERS == 4 else [184, 64])
    # fmt: on
