"""Maps of sparse voxels fused in Triton: keys, coordinates, neighbours, offsets alive in a tile, lists of pairs. CUDA.

The same numbers as torch_maps.py computes, by the same functions, in one pass over the rows each.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int, Int32, Int64, Shaped
from torch import Tensor

from networks.kernels.launch import ceil_div, power_of_two, quick

ROWS_PER_PROGRAM = 512
ROWS_PER_COUNT = 4096  # of a program that counts cells: few additions to the same numbers
NUMBERS_PER_PROGRAM = 4096  # taken by take_rows
MOST_NARROW_CHUNKS = 64  # whose numbers fit 32 bits beside 26 of a row's neighbours
WORDS_PER_PROGRAM = 1024  # laid into tables
FEW_PARTS = 64  # laid at once by one compiled kernel, however many they are


def morton_keys(coords: Int[Tensor, "N 4"], bits: int) -> Int64[Tensor, " N"]:
    keys = torch.empty(coords.shape[0], dtype=torch.int64, device=coords.device)
    if keys.numel():
        _encode[(ceil_div(len(keys), ROWS_PER_PROGRAM),)](coords.contiguous(), keys, len(keys), bits, ROWS_PER_PROGRAM)
    return keys


@no_type_check
@triton.jit
def _spread(axis):
    """Two zero bits between the lowest 21 bits."""
    axis = (axis | (axis << 32)) & 0x1F00000000FFFF
    axis = (axis | (axis << 16)) & 0x1F0000FF0000FF
    axis = (axis | (axis << 8)) & 0x100F00F00F00F00F
    axis = (axis | (axis << 4)) & 0x10C30C30C30C30C3
    return (axis | (axis << 2)) & 0x1249249249249249


@no_type_check
@triton.jit
def _gather_bits(key):
    """Undoes `_spread`."""
    key = key & 0x1249249249249249
    key = (key | (key >> 2)) & 0x10C30C30C30C30C3
    key = (key | (key >> 4)) & 0x100F00F00F00F00F
    key = (key | (key >> 8)) & 0x1F0000FF0000FF
    key = (key | (key >> 16)) & 0x1F00000000FFFF
    return (key | (key >> 32)) & 0x1FFFFF


@no_type_check
@triton.jit
def _key_of(b, x, y, z, BITS: tl.constexpr):
    return (b << (3 * BITS)) | (_spread(x) << 2) | (_spread(y) << 1) | _spread(z)


@no_type_check
@triton.jit
def _axes(coords, rows, inside):
    """Sample, x, y and z of some rows."""
    b = tl.load(coords + rows * 4, mask=inside, other=0).to(tl.int64)  # (TILE,) of (N, 4)
    x = tl.load(coords + rows * 4 + 1, mask=inside, other=0).to(tl.int64)
    y = tl.load(coords + rows * 4 + 2, mask=inside, other=0).to(tl.int64)
    return b, x, y, tl.load(coords + rows * 4 + 3, mask=inside, other=0).to(tl.int64)


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows"])
def _encode(coords, keys, num_rows, BITS: tl.constexpr, TILE: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = rows < num_rows
    b, x, y, z = _axes(coords, rows, inside)  # (TILE,) each
    tl.store(keys + rows, _key_of(b, x, y, z, BITS), mask=inside)


def checked_keys(
    coords: Int[Tensor, "N 4"], bits: int, limits: tuple[int, int, int, int]
) -> tuple[Int64[Tensor, " N"], bool, bool]:
    """Keys, whether any coordinate lies outside 0..limits, and whether the keys are not in rising order."""
    keys = torch.empty(coords.shape[0], dtype=torch.int64, device=coords.device)
    if not keys.numel():
        return keys, False, False
    grid = (ceil_div(len(keys), ROWS_PER_PROGRAM),)
    faults = torch.empty((2, *grid), dtype=torch.int32, device=coords.device)
    _encode_checked[grid](coords.contiguous(), keys, faults, len(keys), *limits, grid[0], bits, ROWS_PER_PROGRAM)
    outside, mixed = faults.amax(1).tolist()
    return keys, outside > 0, mixed > 0


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows", "size_b", "size_x", "size_y", "size_z", "num_blocks"])
def _encode_checked(  # noqa: PLR0913
    coords,
    keys,
    faults,
    num_rows,
    size_b,
    size_x,
    size_y,
    size_z,
    num_blocks,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = rows < num_rows
    b, x, y, z = _axes(coords, rows, inside)  # (TILE,) each
    key = _key_of(b, x, y, z, BITS)
    tl.store(keys + rows, key, mask=inside)
    outside = (b < 0) | (b >= size_b) | (x < 0) | (x >= size_x) | (y < 0) | (y >= size_y) | (z < 0) | (z >= size_z)
    tl.store(faults + tl.program_id(0), tl.max((outside & inside).to(tl.int32), 0))
    later = inside & (rows > 0)
    b, x, y, z = _axes(coords, rows - 1, later)
    falls = later & (key <= _key_of(b, x, y, z, BITS))
    tl.store(faults + num_blocks + tl.program_id(0), tl.max(falls.to(tl.int32), 0))


def morton_coords(keys: Int64[Tensor, " N"], bits: int) -> Int32[Tensor, "N 4"]:
    coords = torch.empty((len(keys), 4), dtype=torch.int32, device=keys.device)
    if keys.numel():
        _decode[(ceil_div(len(keys), ROWS_PER_PROGRAM),)](keys.contiguous(), coords, len(keys), bits, ROWS_PER_PROGRAM)
    return coords


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows"])
def _decode(keys, coords, num_rows, BITS: tl.constexpr, TILE: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = rows < num_rows
    key = tl.load(keys + rows, mask=inside, other=0)  # (TILE,)
    tl.store(coords + rows * 4, (key >> (3 * BITS)).to(tl.int32), mask=inside)
    key = key & ((1 << (3 * BITS)) - 1)
    tl.store(coords + rows * 4 + 1, _gather_bits(key >> 2).to(tl.int32), mask=inside)
    tl.store(coords + rows * 4 + 2, _gather_bits(key >> 1).to(tl.int32), mask=inside)
    tl.store(coords + rows * 4 + 3, _gather_bits(key).to(tl.int32), mask=inside)


def neighbours(
    keys: Int64[Tensor, " N"], bits: int, spatial_shape: tuple[int, int, int], batch_size: int
) -> tuple[Int32[Tensor, "27 N"], Int32[Tensor, " N"], Int32[Tensor, " P"]]:
    """Rows of the 27 neighbours by a look-up table, a bit for each that exists, and how many exist, in parts."""
    num_rows, device = len(keys), keys.device
    size_x, size_y, size_z = (n + 2 for n in spatial_shape)
    table = torch.full((batch_size * size_x * size_y * size_z,), num_rows, dtype=torch.int32, device=device)
    found = torch.empty((27, num_rows), dtype=torch.int32, device=device)
    alive = torch.empty(num_rows, dtype=torch.int32, device=device)
    grid = (ceil_div(num_rows, ROWS_PER_PROGRAM),)
    counts = torch.empty(grid, dtype=torch.int32, device=device)
    if num_rows:
        _fill[grid](keys, table, num_rows, size_x, size_y, size_z, bits, ROWS_PER_PROGRAM)
        _look_up[grid](keys, table, found, alive, counts, num_rows, size_x, size_y, size_z, bits, ROWS_PER_PROGRAM)
    return found, alive, counts


@no_type_check
@triton.jit
def _cells(keys, rows, inside, size_x, size_y, size_z, BITS: tl.constexpr):
    key = tl.load(keys + rows, mask=inside, other=0)  # (TILE,)
    b, xyz = key >> (3 * BITS), key & ((1 << (3 * BITS)) - 1)
    x, y, z = _gather_bits(xyz >> 2), _gather_bits(xyz >> 1), _gather_bits(xyz)
    return ((b * size_x + x + 1) * size_y + y + 1) * size_z + z + 1


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows", "size_x", "size_y", "size_z"])
def _fill(keys, table, num_rows, size_x, size_y, size_z, BITS: tl.constexpr, TILE: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = rows < num_rows
    tl.store(table + _cells(keys, rows, inside, size_x, size_y, size_z, BITS), rows.to(tl.int32), mask=inside)


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows", "size_x", "size_y", "size_z"])
def _look_up(  # noqa: PLR0913
    keys,
    table,
    found,
    alive,
    counts,
    num_rows,
    size_x,
    size_y,
    size_z,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = rows < num_rows
    cells = _cells(keys, rows, inside, size_x, size_y, size_z, BITS)
    bits = tl.zeros((TILE,), dtype=tl.int32)
    count = tl.zeros((TILE,), dtype=tl.int32)
    for k in tl.static_range(27):
        step = ((k // 9 - 1) * size_y + (k // 3 % 3 - 1)) * size_z + (k % 3 - 1)
        near = tl.load(table + cells + step, mask=inside, other=num_rows)  # (TILE,) of the table, a number a cell
        tl.store(found + k * num_rows.to(tl.int64) + rows, near, mask=inside)
        there = (near < num_rows).to(tl.int32)
        bits |= there << k
        count += there
    tl.store(alive + rows, bits, mask=inside)
    tl.store(counts + tl.program_id(0), tl.sum(count))


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
    keys: Int64[Tensor, " N"], sizes: Sequence[int]
) -> list[tuple[Int64[Tensor, " _"], Int64[Tensor, " _"], Int64[Tensor, "8 _"]]]:
    """Sorted keys grouped by cells, these again, ..., up to three times; `sizes` says into how many cells.

    Of each grouping the cells' keys, each row's cell, and each cell's rows by octant (as many as there are rows: none).
    """
    num_rows, device, all_sizes = len(keys), keys.device, (len(keys), *sizes)
    grouped = []
    for below, size in pairwise(all_sizes):
        made = torch.empty(size, dtype=torch.int64, device=device), torch.empty(below, dtype=torch.int64, device=device)
        grouped.append((*made, torch.empty((8, size), dtype=torch.int64, device=device)))
    if num_rows:
        grid, absent = (ceil_div(num_rows, ROWS_PER_PROGRAM),), 3 - len(sizes)
        firsts = torch.empty((len(sizes), *grid), dtype=torch.int32, device=device)
        _count_firsts[grid](keys, firsts, num_rows, *grid, len(sizes), ROWS_PER_PROGRAM)
        ends = firsts.cumsum(1, dtype=torch.int32)
        outputs = (*(part for one in grouped for part in one), *(None,) * 3 * absent)
        _group[grid](keys, ends, *outputs, *all_sizes, *(0,) * absent, *grid, len(sizes), ROWS_PER_PROGRAM)
    return grouped


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _count_firsts(keys, firsts, num_rows, num_blocks, LEVELS: tl.constexpr, TILE: tl.constexpr):
    """Rows of a program that are the first of their cell, for each time that keys are grouped."""
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = rows < num_rows
    key = tl.load(keys + rows, mask=inside, other=0)  # (TILE,)
    before = tl.load(keys + rows - 1, mask=inside & (rows > 0), other=-1)  # (TILE,)
    for level in tl.static_range(LEVELS):
        first = inside & ((key >> (3 * level + 3)) != (before >> (3 * level + 3)))
        tl.store(firsts + level * num_blocks + tl.program_id(0), tl.sum(first.to(tl.int32)))


@no_type_check
@triton.jit
def _group_once(  # noqa: PLR0913
    key, before, after, own, inside, ends, cells, parent, children, num_rows, num_cells
):
    """Cells of rows that stand for `own` rows of the level below, whose keys these are; gives the cell of each."""
    cell, octant = key >> 3, key & 7
    first = inside & (cell != before >> 3)
    before_program = tl.load(ends + tl.program_id(0) - 1, mask=tl.program_id(0) > 0, other=0).to(tl.int64)  # ()
    number = before_program - 1 + tl.cumsum(first.to(tl.int32), 0)
    stands = inside & (key != before)
    tl.store(cells + number, cell, mask=first)
    tl.store(parent + own, number, mask=stands)
    above = tl.where(first, -1, before & 7)  # the octant of the row before, in this cell
    last = inside & (cell != after >> 3)
    for k in tl.static_range(8):
        gap = (stands & (k > above) & (k < octant)) | (last & (k > octant))
        row = tl.where(k == octant, own, num_rows.to(tl.int64))
        tl.store(children + k * num_cells.to(tl.int64) + number, row, mask=gap | (stands & (k == octant)))
    return number


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows", "num_cells", "num_second", "num_third", "num_blocks"])
def _group(  # noqa: PLR0913
    keys,
    ends,
    cells,
    parent,
    children,
    cells_second,
    parent_second,
    children_second,
    cells_third,
    parent_third,
    children_third,
    num_rows,
    num_cells,
    num_second,
    num_third,
    num_blocks,
    LEVELS: tl.constexpr,
    TILE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = rows < num_rows
    key = tl.load(keys + rows, mask=inside, other=0)  # (TILE,)
    before = tl.load(keys + rows - 1, mask=inside & (rows > 0), other=-1)  # (TILE,)
    after = tl.load(keys + rows + 1, mask=rows + 1 < num_rows, other=-1)  # (TILE,)
    own = _group_once(key, before, after, rows, inside, ends, cells, parent, children, num_rows, num_cells)
    if LEVELS > 1:
        own = _group_once(
            key >> 3,
            before >> 3,
            after >> 3,
            own,
            inside,
            ends + num_blocks,
            cells_second,
            parent_second,
            children_second,
            num_cells,
            num_second,
        )
    if LEVELS > 2:
        _group_once(
            key >> 6,
            before >> 6,
            after >> 6,
            own,
            inside,
            ends + 2 * num_blocks,
            cells_third,
            parent_third,
            children_third,
            num_second,
            num_third,
        )


def by_neighbourhood(
    found: Int32[Tensor, "27 N"], alive: Int32[Tensor, " N"], chunk: int
) -> tuple[Int32[Tensor, " N"], Int32[Tensor, "27 N"], Int32[Tensor, " N"]]:
    """Rows sorted by their bits inside runs of `chunk` rows; their neighbours and bits in that order.

    Every row is its own neighbour, so 26 bits tell rows apart, and a million rows are sorted by 32 bits instead of 64.
    """
    num_rows = len(alive)
    narrow = ceil_div(num_rows, chunk) <= MOST_NARROW_CHUNKS
    keys = torch.empty(num_rows, dtype=torch.int32 if narrow else torch.int64, device=alive.device)
    rows, bits, table = torch.empty_like(alive), torch.empty_like(alive), torch.empty_like(found)
    if num_rows:
        grid = (ceil_div(num_rows, ROWS_PER_PROGRAM),)
        _sorting_keys[grid](alive, keys, num_rows, chunk, ROWS_PER_PROGRAM)
        order = torch.argsort(keys, stable=True)
        _take_columns[grid](found, alive, order, rows, bits, table, num_rows, ROWS_PER_PROGRAM)
    return rows, table, bits


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows"])
def _sorting_keys(alive, keys, num_rows, CHUNK: tl.constexpr, TILE: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    bits = tl.load(alive + rows, mask=rows < num_rows, other=0)  # (TILE,)
    bits = (bits & 0x1FFF) | ((bits >> 14) << 13)  # all but the row itself
    key = ((rows // CHUNK) << 26 | bits) - 2**31  # from the least number of 32 bits on
    tl.store(keys + rows, key.to(keys.dtype.element_ty), mask=rows < num_rows)


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows"])
def _take_columns(found, alive, order, rows_out, bits_out, out, num_rows, TILE: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = places < num_rows
    row = tl.load(order + places, mask=inside, other=0)  # (TILE,)
    tl.store(rows_out + places, row.to(tl.int32), mask=inside)
    tl.store(bits_out + places, tl.load(alive + row, mask=inside, other=0), mask=inside)  # (TILE,)
    for k in tl.static_range(27):
        line = k * num_rows.to(tl.int64)
        near = tl.load(found + line + row, mask=inside, other=0)  # (TILE,) of line k of (27, N)
        tl.store(out + line + places, near, mask=inside)


def tile_offsets(alive: Int32[Tensor, " N"], size: int) -> tuple[Int32[Tensor, "T 27"], Int32[Tensor, " T"]]:
    """For each run of `size` rows the offsets that any of them has, those first, and how many."""
    tiles = ceil_div(len(alive), size)
    offsets = torch.empty((tiles, 27), dtype=torch.int32, device=alive.device)
    counts = torch.empty(tiles, dtype=torch.int32, device=alive.device)
    if tiles:
        _list_offsets[(tiles,)](alive, offsets, counts, len(alive), size)
    return offsets, counts


@no_type_check
@triton.jit
def _either(a, b):
    return a | b


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows"])
def _list_offsets(alive, offsets, counts, num_rows, TILE: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    bits = tl.reduce(tl.load(alive + rows, mask=rows < num_rows, other=0), 0, _either)  # () from (TILE,)
    k = tl.arange(0, 32)
    there = tl.where(k < 27, (bits >> k) & 1, 0)
    before = tl.cumsum(there, 0) - there
    count = tl.sum(there)
    place = tl.where(there == 1, before, count + k - before)
    tl.store(offsets + tl.program_id(0).to(tl.int64) * 27 + place, k, mask=k < 27)
    tl.store(counts + tl.program_id(0), count)


def neighbour_lists(
    found: Int32[Tensor, "27 N"],
) -> tuple[Int32[Tensor, "27 N"], Int32[Tensor, "27 N"], Int32[Tensor, " 27"]]:
    """Rows that have each neighbour, that neighbour's row, both packed to the front, and how many."""
    num_rows = found.shape[1]
    rows, near = torch.empty_like(found), torch.empty_like(found)
    blocks = torch.empty((27, ceil_div(num_rows, ROWS_PER_PROGRAM)), dtype=torch.int32, device=found.device)
    counts = torch.empty(27, dtype=torch.int32, device=found.device)
    if num_rows == 0:
        counts.zero_()
    else:
        grid = (blocks.shape[1], 27)
        _count_pairs[grid](found, blocks, num_rows, blocks.shape[1], ROWS_PER_PROGRAM)
        ends = blocks.cumsum(1, dtype=torch.int32)
        _list_pairs[grid](found, ends, rows, near, counts, num_rows, blocks.shape[1], ROWS_PER_PROGRAM)
    return rows, near, counts


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _count_pairs(found, blocks, num_rows, num_blocks, TILE: tl.constexpr):
    places = tl.program_id(0) * TILE + tl.arange(0, TILE)
    start = found + tl.program_id(1).to(tl.int64) * num_rows
    near = tl.load(start + places, mask=places < num_rows, other=num_rows)  # (TILE,) of line k of (27, N)
    tl.store(blocks + tl.program_id(1) * num_blocks + tl.program_id(0), tl.sum((near < num_rows).to(tl.int32)))


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _list_pairs(found, ends, rows_out, near_out, counts, num_rows, num_blocks, TILE: tl.constexpr):
    places = tl.program_id(0) * TILE + tl.arange(0, TILE)
    line = tl.program_id(1).to(tl.int64) * num_rows
    near = tl.load(found + line + places, mask=places < num_rows, other=num_rows)  # (TILE,) of line k of (27, N)
    there = (near < num_rows).to(tl.int32)
    end = tl.load(ends + tl.program_id(1) * num_blocks + tl.program_id(0))  # () of (27, blocks)
    at = line + end - tl.sum(there) + tl.cumsum(there, 0) - there
    tl.store(rows_out + at, places, mask=there == 1)
    tl.store(near_out + at, near, mask=there == 1)
    if tl.program_id(0) == num_blocks - 1:
        tl.store(counts + tl.program_id(1), end)


def take_rows(values: Shaped[Tensor, "N C"], rows: Int64[Tensor, " M"]) -> Shaped[Tensor, "M C"]:
    """values[rows]; several times faster than torch's where rows are narrow."""
    out = values.new_empty((len(rows), values.shape[1]))
    width = power_of_two(values.shape[1])
    tile = max(1, NUMBERS_PER_PROGRAM // width)
    if out.numel():
        grid = (ceil_div(len(rows), tile),)
        _take_rows[grid](values.contiguous(), rows, out, len(rows), values.shape[1], tile, width)
    return out


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows"])
def _take_rows(values, rows, out, num_rows, CHANNELS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    channels = tl.arange(0, WIDTH)
    keep = (places < num_rows)[:, None] & (channels < CHANNELS)[None, :]
    row = tl.load(rows + places, mask=places < num_rows, other=0)  # (TILE,)
    taken = tl.load(values + row[:, None] * CHANNELS + channels[None, :], mask=keep)  # (TILE, WIDTH) of (N, C)
    tl.store(out + places[:, None] * CHANNELS + channels[None, :], taken, mask=keep)


def lay_parts(parts: Sequence[tuple[Shaped[Tensor, "..."] | None, Shaped[Tensor, "..."], int | None]]) -> None:
    """Copies each part to the front of its table's sides; with a number, that fills what the part leaves of the table.

    A part that is None leaves all of it. Tables of one side alone are filled. One kernel does all of it, told where
    from and where to in one table of addresses: starting a copy each takes longer than the copies.
    """
    kept, plan, start = [], [], 0
    for part, table, rest in parts:
        if table.element_size() % 4:
            raise TypeError(f"tables are of numbers of 4 or 8 bytes, got {table.dtype}")
        part = part if part is None else part.contiguous()
        lines, columns, pitch = _lines(part, table)
        width = columns if rest is None else pitch
        blocks = ceil_div(width, WORDS_PER_PROGRAM)
        if lines * blocks:
            words, source = table.element_size() // 4, table if part is None else part
            kept.append(source)
            plan += [source.data_ptr(), table.data_ptr(), columns, pitch, width, blocks, words, rest or 0, start]
            start += lines * blocks
    if start:
        device = kept[0].device
        told = torch.tensor(plan, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        _lay_parts[(start,)](told, len(kept), max(power_of_two(len(kept)), FEW_PARTS), WORDS_PER_PROGRAM)


def _lines(part: Shaped[Tensor, "..."] | None, table: Shaped[Tensor, "..."]) -> tuple[int, int, int]:
    """How many lines a part has, their words, and those of the table's; one line where all sides but one are alike."""
    words = table.element_size() // 4  # of 32 bits
    if part is None or part.shape[1:] == table.shape[1:]:
        return 1, 0 if part is None else part.numel() * words, table.numel() * words
    return part.shape[0], part[0].numel() * words, table[0].numel() * words


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_parts"])
def _lay_parts(told, num_parts, PARTS: tl.constexpr, TILE: tl.constexpr):
    """Rows of `told`: addresses from and to, words of both lines, words to write, blocks a line, words a number, rest,
    the first program.
    """
    lane, pid = tl.arange(0, PARTS), tl.program_id(0)
    starts = tl.load(told + lane * 9 + 8, mask=lane < num_parts, other=2**62)  # (PARTS,)
    told += (tl.sum((starts <= pid).to(tl.int32)) - 1) * 9
    source = tl.load(told).to(tl.pointer_type(tl.int32))
    table = tl.load(told + 1).to(tl.pointer_type(tl.int32))
    columns, pitch, width = tl.load(told + 2), tl.load(told + 3), tl.load(told + 4)
    blocks, words, rest = tl.load(told + 5), tl.load(told + 6), tl.load(told + 7)
    line, block = (pid - tl.load(told + 8)) // blocks, (pid - tl.load(told + 8)) % blocks
    column = block * TILE + tl.arange(0, TILE)
    value = tl.load(source + line * columns + column, mask=column < columns, other=0)  # (TILE,)
    low = tl.where(column % words == 0, rest, 0).to(tl.int32)  # of a number of two words the second is its upper half
    tl.store(table + line * pitch + column, tl.where(column < columns, value, low), mask=column < width)


def window_keys(
    coords: Int32[Tensor, "N 4"],
    keys: Int[Tensor, " N"],
    *,
    size: int,
    shift: int,
    counts: Sequence[int],
    first: int,
) -> None:
    """Writes the number of each row's window: `counts` of them along each axis of a sample, counted from `first`."""
    if len(keys):
        grid = (ceil_div(len(keys), ROWS_PER_PROGRAM),)
        _number_windows[grid](coords, keys, len(keys), size, shift, *counts, first, ROWS_PER_PROGRAM)


@no_type_check
@quick
@triton.jit(do_not_specialize=["num_rows", "size", "shift", "count_x", "count_y", "count_z", "first"])
def _number_windows(  # noqa: PLR0913
    coords, keys, num_rows, size, shift, count_x, count_y, count_z, first, TILE: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = rows < num_rows
    b, x, y, z = _axes(coords, rows, inside)  # (TILE,) each
    number = b * count_x + (x + shift) // size
    number = (number * count_y + (y + shift) // size) * count_z + (z + shift) // size
    tl.store(keys + rows, (number + first).to(keys.dtype.element_ty), mask=inside)
