"""The convolution's weight gradient with warps of their own for gathering: Hopper, bf16 and fp16, C and F of 128s.

What `convolution.row_products` computes, in Gluon as in `producer_convolution.py`. A program sums up 128 x 128 weights
of three neighbouring offsets over a run of rows: one group of warps gathers the rows' neighbours and copies the
gradient's rows, which the three offsets share, into a ring of buffers; three others multiply, each for its own offset.
Sums are float32 in a fixed order.
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
    warpgroup_mma,
    warpgroup_mma_wait,
)

from networks.kernels.launch import processors, quick
from networks.kernels.producer_convolution import SWIZZLED, aligned
from networks.kernels.tiles import (
    GRADIENT_BLOCK,
    GRADIENT_GROUPS,
    GRADIENT_PRODUCERS,
    GRADIENT_ROWS,
    GRADIENT_STAGES,
    few_parts,
)
from networks.sparse.topology import Level


def row_products(
    pairs: list[tuple[Float[Tensor, "N C"], Float[Tensor, "N F"]]], level: Level
) -> list[Float[Tensor, "27 C F"]]:
    """As in convolution.py, of at least one row."""
    num_rows, channels = pairs[0][0].shape
    columns, device = pairs[0][1].shape[1], pairs[0][0].device
    programs = 27 // GRADIENT_GROUPS * (channels // GRADIENT_BLOCK) * (columns // GRADIENT_BLOCK)
    splits = few_parts(programs, processors(device))  # the same for any number of rows
    parts = torch.empty((splits, len(pairs), 27, channels, columns), dtype=torch.float32, device=device)
    for number, (feats, grad) in enumerate(pairs):
        _row_product[(programs, splits)](
            aligned(feats),
            aligned(grad),
            level.neighbours,
            parts[:, number],
            num_rows,
            level.live,
            parts.stride(0),
            CHANNELS=channels,
            COLUMNS=columns,
            BLOCK=GRADIENT_BLOCK,
            ROWS=GRADIENT_ROWS,
            STAGES=GRADIENT_STAGES,
            PRODUCERS=GRADIENT_PRODUCERS,
            GROUPS=GRADIENT_GROUPS,
            LAYOUT=SWIZZLED,
            num_warps=4,
        )
    return list(parts.sum(0).unbind(0))


def largest_error(device: torch.device, plain: Callable[..., list[Float[Tensor, "27 C F"]]]) -> float:
    """Beside `convolution.row_products` on a small level, relative to the largest value."""
    coords = torch.nn.functional.pad(torch.ones(5, 8, 10, device=device).nonzero(), (1, 0))
    level, _ = Level.from_coords(coords, (5, 8, 10), 1)
    draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    pairs = [(draw(400, 128).half(), draw(400, 256).half()) for _ in range(2)]
    both = zip(row_products(pairs, level), plain(pairs, level), strict=True)
    errors = [float((mine - other).abs().max() / other.abs().max()) for mine, other in both]
    return float(torch.tensor(errors).max())  # NaN wins, as it does not in max()


@no_type_check
@gluon.jit
def _copy(  # noqa: PLR0913
    rows, row_of, there, column, ring, place, WIDTH: gl.constexpr, BLOCK: gl.constexpr, LAYOUT: gl.constexpr
):
    """Columns `column` to `column + BLOCK` of some rows into a buffer of the ring; zeros for those not there."""
    lane = gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))
    pointers = rows + (row_of.to(gl.int64) * WIDTH + column)[:, None] + lane[None, :]
    for part in gl.static_range(BLOCK // 64):
        buffer = ring.index(place).slice(part * 64, 64, dim=1)
        async_copy.async_copy_global_to_shared(buffer, pointers + part * 64, mask=there[:, None])  # (ROWS, 64)


@no_type_check
@gluon.jit
def _produce(  # noqa: PLR0913
    feats,
    grad,
    neighbours,
    feats_ring,
    grad_ring,
    ready,
    empty,
    pitch,
    num_rows,
    start,
    end,
    channel,
    column,
    CHANNELS: gl.constexpr,
    COLUMNS: gl.constexpr,
    BLOCK: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
):
    """Fills the ring; neighbours are read one gather ahead. `neighbours` begins at the first of the offsets."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])  # 16 bytes a thread
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    near = gl.load(neighbours + start + row, mask=start + row < end, other=num_rows)  # (ROWS,) of line 0 of (27, N)
    for step in range((end - start + ROWS - 1) // ROWS):
        stage = step % STAGES
        places = start + step * ROWS + row
        for group in gl.static_range(GROUPS):
            row_of = near
            if group + 1 < GROUPS:  # (ROWS,) of the next line of (27, N)
                line = pitch.to(gl.int64) * (group + 1)
                near = gl.load(neighbours + line + places, mask=places < end, other=num_rows)
            else:  # (ROWS,) of line 0, of the next rows
                near = gl.load(neighbours + places + ROWS, mask=places + ROWS < end, other=num_rows)
            if group == 0:
                mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
                _copy(grad, places, places < end, column, grad_ring, stage, COLUMNS, BLOCK, layout)
            there = row_of < num_rows
            _copy(feats, row_of, there, channel, feats_ring, stage * GROUPS + group, CHANNELS, BLOCK, layout)
        async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)


@no_type_check
@gluon.jit
def _consume(  # noqa: PLR0913
    GROUP: gl.constexpr,
    out,
    feats_ring,
    grad_ring,
    ready,
    empty,
    start,
    end,
    CHANNELS: gl.constexpr,
    COLUMNS: gl.constexpr,
    BLOCK: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
):
    """Sums up one offset's block of weights, turned: the gradient's columns are lines. `out` is the block's corner."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    sums = gl.zeros((BLOCK, BLOCK), gl.float32, layout)
    for step in range((end - start + ROWS - 1) // ROWS):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), step // STAGES & 1)
        fence_async_shared()  # gathers are ordinary writes, products read by a way of their own
        turned = grad_ring.index(stage).permute((1, 0))
        sums = warpgroup_mma(turned, feats_ring.index(stage * GROUPS + GROUP), sums, is_async=True)
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(empty.index(stage), count=1)
    lines = gl.arange(0, BLOCK, gl.SliceLayout(1, layout))
    lanes = gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
    # (BLOCK, BLOCK) of (27, C, F), turned
    gl.store(out + GROUP * (CHANNELS * COLUMNS) + lanes[None, :] * COLUMNS + lines[:, None], sums)


@no_type_check
@quick
@gluon.jit(do_not_specialize=["pitch", "part_size"])
def _row_product(  # noqa: PLR0913
    feats,
    grad,
    neighbours,
    out,
    pitch,
    live,
    part_size,
    CHANNELS: gl.constexpr,
    COLUMNS: gl.constexpr,
    BLOCK: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    PRODUCERS: gl.constexpr,
    GROUPS: gl.constexpr,
    LAYOUT: gl.constexpr,
    num_warps: gl.constexpr,
):
    num_rows = pitch
    if live is not None:
        num_rows = gl.load(live)  # () of (1,)
    length = gl.cdiv(num_rows, gl.num_programs(1) * ROWS) * ROWS  # so that parts do not depend on a table's length
    start = gl.program_id(1) * length
    end = gl.minimum(start + length, num_rows)
    blocks: gl.constexpr = CHANNELS // BLOCK
    column_blocks: gl.constexpr = COLUMNS // BLOCK
    channel = gl.program_id(0) % blocks * BLOCK
    column = gl.program_id(0) // blocks % column_blocks * BLOCK
    offset = gl.program_id(0) // (blocks * column_blocks) * GROUPS
    corner = out + gl.program_id(1).to(gl.int64) * part_size + (offset * CHANNELS + channel) * COLUMNS + column
    near = neighbours + offset.to(gl.int64) * pitch
    dtype: gl.constexpr = feats.dtype.element_ty
    feats_ring = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, ROWS, BLOCK], LAYOUT)
    grad_ring = gl.allocate_shared_memory(dtype, [STAGES, ROWS, BLOCK], LAYOUT)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=32 * PRODUCERS)
        mbarrier.init(empty.index(stage), count=GROUPS)
    fence_async_shared()
    # Constants lose themselves in a tuple that has a name, so each call spells its own out.
    # fmt: off
    gl.warp_specialize([
        (_consume, (0, corner, feats_ring, grad_ring, ready, empty, start, end,
                    CHANNELS, COLUMNS, BLOCK, ROWS, STAGES, GROUPS)),
        (_consume, (1, corner, feats_ring, grad_ring, ready, empty, start, end,
                    CHANNELS, COLUMNS, BLOCK, ROWS, STAGES, GROUPS)),
        (_consume, (2, corner, feats_ring, grad_ring, ready, empty, start, end,
                    CHANNELS, COLUMNS, BLOCK, ROWS, STAGES, GROUPS)),
        (_produce, (feats, grad, near, feats_ring, grad_ring, ready, empty, pitch, num_rows, start, end, channel,
                    column, CHANNELS, COLUMNS, BLOCK, ROWS, STAGES, GROUPS)),
    ], [num_warps, num_warps, PRODUCERS], [160, 160, 32])
    # fmt: on
