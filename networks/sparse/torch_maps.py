"""The specification of the maps of sparse voxels in plain torch: keys, neighbours, cells, tiles, lists of pairs.

What topology.py asks for, row by row, on any device. Its faster twin has the same functions; see maps.py.
A row number equal to the number of rows means "no such voxel".
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Int, Int32, Int64, Shaped
from torch import Tensor


def _spread(axis: Int64[Tensor, " N"]) -> Int64[Tensor, " N"]:
    """Puts two zero bits between the lowest 21 bits of each number."""
    for shift, mask in (
        (32, 0x1F00000000FFFF),
        (16, 0x1F0000FF0000FF),
        (8, 0x100F00F00F00F00F),
        (4, 0x10C30C30C30C30C3),
        (2, 0x1249249249249249),
    ):
        axis = (axis | (axis << shift)) & mask
    return axis


def _gather_bits(key: Int64[Tensor, " N"]) -> Int64[Tensor, " N"]:
    """Undoes `_spread`."""
    key = key & 0x1249249249249249
    for shift, mask in (
        (2, 0x10C30C30C30C30C3),
        (4, 0x100F00F00F00F00F),
        (8, 0x1F0000FF0000FF),
        (16, 0x1F00000000FFFF),
        (32, 0x1FFFFF),
    ):
        key = (key | (key >> shift)) & mask
    return key


def morton_keys(coords: Int[Tensor, "N 4"], bits: int) -> Int64[Tensor, " N"]:
    """Sorting key of (batch, x, y, z) rows for axes of `bits` bits."""
    b, x, y, z = coords.long().unbind(1)
    return (b << (3 * bits)) | (_spread(x) << 2) | (_spread(y) << 1) | _spread(z)


def checked_keys(
    coords: Int[Tensor, "N 4"], bits: int, limits: tuple[int, int, int, int]
) -> tuple[Int64[Tensor, " N"], bool, bool]:
    """Keys, whether any coordinate lies outside 0..limits, and whether the keys are not in rising order."""
    keys = morton_keys(coords, bits)
    outside = ((coords < 0) | (coords >= torch.tensor(limits, device=coords.device))).any()
    return keys, *torch.stack([outside, (keys[1:] <= keys[:-1]).any()]).tolist()


def morton_coords(keys: Int64[Tensor, " N"], bits: int) -> Int32[Tensor, "N 4"]:
    """Undoes `morton_keys`."""
    b, xyz = keys >> (3 * bits), keys & ((1 << (3 * bits)) - 1)
    axes = [_gather_bits(xyz >> 2), _gather_bits(xyz >> 1), _gather_bits(xyz)]
    return torch.stack([b, *axes], 1).int()


def neighbours(
    keys: Int64[Tensor, " N"], bits: int, spatial_shape: tuple[int, int, int], batch_size: int
) -> tuple[Int32[Tensor, "27 N"], None, Int64[Tensor, "1"]]:
    """Rows of the 27 neighbours, no bits (they would cost as much again, and few ask for them), and how many exist.

    One look-up table over the grid with an empty margin: a neighbour is a constant step away.
    """
    num_rows, device = len(keys), keys.device
    size_x, size_y, size_z = (n + 2 for n in spatial_shape)
    b, x, y, z = morton_coords(keys, bits).long().unbind(1)
    cell = ((b * size_x + x + 1) * size_y + y + 1) * size_z + z + 1
    table = torch.full((batch_size * size_x * size_y * size_z,), num_rows, dtype=torch.int32, device=device)
    table[cell] = torch.arange(num_rows, dtype=torch.int32, device=device)
    found = torch.empty((27, num_rows), dtype=torch.int32, device=device)
    for k in range(27):
        step = ((k // 9 - 1) * size_y + (k // 3 % 3 - 1)) * size_z + (k % 3 - 1)
        torch.index_select(table, 0, cell + step, out=found[k])
    return found, None, (found < num_rows).sum()[None]


def count_cells(keys: Int64[Tensor, " N"], bits: int, batch_size: int, halvings: int) -> Int64[Tensor, "L B"]:
    """Occupied cells of each sample: distinct ones of sorted keys, then after 1, 2, ... up to `halvings`."""
    ends = torch.searchsorted(keys, torch.arange(batch_size + 1, device=keys.device) << (3 * bits))
    changed = F.pad(keys[1:] ^ keys[:-1], (1, 0), value=2**62)  # the first row is the first of its cell at any level
    firsts = [changed >= 1 << (3 * level) for level in range(halvings + 1)]
    return torch.stack([F.pad(first.cumsum(0), (1, 0)).index_select(0, ends).diff() for first in firsts])


def group_cells(
    keys: Int64[Tensor, " N"], sizes: Sequence[int]
) -> list[tuple[Int64[Tensor, " _"], Int64[Tensor, " _"], Int64[Tensor, "8 _"]]]:
    """Sorted keys grouped by cells, these again, ..., up to three times; `sizes` says into how many cells.

    Of each grouping the cells' keys, each row's cell, and each cell's rows by octant (as many as there are rows: none).
    """
    grouped = []
    for size in sizes:
        grouped.append(_group(keys, size))
        keys = grouped[-1][0]
    return grouped


def _group(
    keys: Int64[Tensor, " N"], num_cells: int
) -> tuple[Int64[Tensor, " M"], Int64[Tensor, " N"], Int64[Tensor, "8 M"]]:
    of_row = keys >> 3
    parent = F.pad((of_row[1:] != of_row[:-1]).cumsum(0), (1, 0))[: len(keys)]
    cells = keys.new_empty(num_cells).scatter_(0, parent, of_row)  # all rows of a cell write the same number
    children = torch.full((8, num_cells), len(keys), dtype=torch.int64, device=keys.device)
    children[keys & 7, parent] = torch.arange(len(keys), device=keys.device)
    return cells, parent, children


def by_neighbourhood(
    found: Int32[Tensor, "27 N"], alive: Int32[Tensor, " N"], chunk: int
) -> tuple[Int32[Tensor, " N"], Int32[Tensor, "27 N"], Int32[Tensor, " N"]]:
    """Rows sorted by their bits inside runs of `chunk` rows; their neighbours and bits in that order."""
    run = torch.arange(len(alive), device=alive.device) // chunk
    order = torch.argsort((run << 27) | alive, stable=True)
    return order.int(), found[:, order], alive[order]


def tile_offsets(alive: Int32[Tensor, " N"], size: int) -> tuple[Int32[Tensor, "T 27"], Int32[Tensor, " T"]]:
    """For each run of `size` rows the offsets that any of them has, those first, and how many."""
    bits = F.pad(alive, (0, -len(alive) % size)).view(-1, size)
    dead = torch.stack([((bits >> k) & 1 == 0).all(1) for k in range(27)], 1)
    return torch.argsort(dead.byte(), dim=1, stable=True).int(), (~dead).sum(1, dtype=torch.int32)


def neighbour_lists(
    found: Int32[Tensor, "27 N"],
) -> tuple[Int32[Tensor, "27 N"], Int32[Tensor, "27 N"], Int32[Tensor, " 27"]]:
    """Rows that have each neighbour, that neighbour's row, both packed to the front, and how many."""
    num_rows, device = found.shape[1], found.device
    there = found < num_rows
    place = torch.where(there, there.cumsum(1) - 1, num_rows)
    rows = torch.empty((27, num_rows + 1), dtype=torch.int32, device=device)  # the last column takes the rest
    near = torch.empty_like(rows)
    rows.scatter_(1, place, torch.arange(num_rows, dtype=torch.int32, device=device).expand(27, -1))
    near.scatter_(1, place, found)
    return rows[:, :-1].contiguous(), near[:, :-1].contiguous(), there.sum(1, dtype=torch.int32)


def take_rows(values: Shaped[Tensor, "N C"], rows: Int64[Tensor, " M"]) -> Shaped[Tensor, "M C"]:
    """values[rows]."""
    return values.index_select(0, rows)


def lay_parts(parts: Sequence[tuple[Shaped[Tensor, "..."] | None, Shaped[Tensor, "..."], int | None]]) -> None:
    """Copies each part to the front of its table's sides; with a number, that fills what the part leaves of the table.

    A part that is None leaves all of it. Tables of one side alone are filled.
    """
    for part, table, rest in parts:
        if rest is not None:
            table.fill_(rest)
        if part is not None:
            table[tuple(map(slice, part.shape))].copy_(part)


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
    number, places = coords[:, 0], (coords[:, 1:] + shift) // size
    for count, place in zip(counts, places.unbind(1), strict=True):
        number = torch.add(place, number, alpha=count)
    keys.copy_(number + first)
