"""Cells of 2x2x2 voxels, counted and grouped from sorted keys, fused in Triton. CUDA.

The same numbers as torch_maps.py computes. Counting reads the keys once for all levels, and only its result is waited
for: grouping is told how many cells there are.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int32, Int64
from torch import Tensor

from networks.kernels.launch import ceil_div, quick

ROWS_PER_COUNT = 4096  # of a program that counts: few additions to the same numbers
ROWS_PER_PROGRAM = 512


def count_cells(keys: Int64[Tensor, " N"], bits: int, batch_size: int, halvings: int) -> Int32[Tensor, "L B"]:
    """Occupied cells of each sample: distinct ones of sorted keys, then after 1, 2, ... up to `halvings`."""
    counts = torch.zeros((halvings + 1, batch_size), dtype=torch.int32, device=keys.device)
    if len(keys):
        grid = (ceil_div(len(keys), ROWS_PER_COUNT),)
        _count_cells[grid](keys, counts, len(keys), batch_size, bits, halvings + 1, ROWS_PER_COUNT)
    return counts


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows", "size_b"])
def _count_cells(keys, counts, num_rows, size_b, BITS: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = rows < num_rows
    key = tl.load(keys + rows, mask=inside, other=0)  # (TILE,)
    before = tl.load(keys + rows - 1, mask=inside & (rows > 0), other=-1)  # (TILE,)
    sample = (key >> (3 * BITS)).to(tl.int32)
    first, last = tl.min(tl.where(inside, sample, size_b), 0), tl.max(tl.where(inside, sample, 0), 0)
    for one in range(first, last + 1):
        for level in tl.static_range(LEVELS):
            new = inside & (sample == one) & ((key >> (3 * level)) != (before >> (3 * level)))
            tl.atomic_add(counts + level * size_b + one, tl.sum(new.to(tl.int32)))  # of (L, B); integers: in any order


def group_cells(
    keys: Int64[Tensor, " N"], num_cells: int
) -> tuple[Int64[Tensor, " M"], Int64[Tensor, " N"], Int64[Tensor, "8 M"]]:
    """Keys of the cells that sorted keys lie in, each row's cell, and each cell's rows by octant (N: none)."""
    num_rows, device = len(keys), keys.device
    firsts = torch.empty(num_rows, dtype=torch.int32, device=device)
    parent = torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows == 0:
        return keys.clone(), parent, keys.new_empty((8, 0))
    grid = (ceil_div(num_rows, ROWS_PER_PROGRAM),)
    _mark_firsts[grid](keys, firsts, num_rows, ROWS_PER_PROGRAM)
    numbers = firsts.cumsum(0, dtype=torch.int32)
    cells = torch.empty(num_cells, dtype=torch.int64, device=device)
    children = torch.full((8, num_cells), num_rows, dtype=torch.int64, device=device)
    _group[grid](keys, numbers, cells, parent, children, num_rows, num_cells, ROWS_PER_PROGRAM)
    return cells, parent, children


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows"])
def _mark_firsts(keys, firsts, num_rows, TILE: tl.constexpr):
    """1 where a row is the first of its cell."""
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = rows < num_rows
    cell = tl.load(keys + rows, mask=inside, other=0) >> 3  # (TILE,)
    before = tl.load(keys + rows - 1, mask=inside & (rows > 0), other=-1) >> 3  # (TILE,)
    tl.store(firsts + rows, (cell != before).to(tl.int32), mask=inside)


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows", "num_cells"])
def _group(keys, numbers, cells, parent, children, num_rows, num_cells, TILE: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = rows < num_rows
    key = tl.load(keys + rows, mask=inside, other=0)  # (TILE,)
    cell = tl.load(numbers + rows, mask=inside, other=1).to(tl.int64) - 1  # (TILE,)
    tl.store(parent + rows, cell, mask=inside)
    tl.store(cells + cell, key >> 3, mask=inside)  # all rows of a cell write the same number
    tl.store(children + (key & 7) * num_cells.to(tl.int64) + cell, rows, mask=inside)
