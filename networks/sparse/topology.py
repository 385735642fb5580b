"""The coordinates of sparse voxels: levels of occupied voxels, neighbours, parents, children, windows, alignment.

A `Level` is the set of occupied voxels of a batch at one resolution. Its rows are sorted by key: the Morton code of
(x, y, z) with x highest, the sample above it, so that `parent key = key >> 3` and `octant = key & 7`, and children of
sorted parents are sorted. Maps are built when first asked for and kept with the level, for every layer and backward.
A row number equal to the number of rows means "no such voxel". Knows coordinates only, never features; what is done
row by row is one of two modules with the same functions, which `maps_for` chooses.

Letters: B batch, N voxels, M coarse voxels or latents, W windows.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int, Int32, Int64
from torch import Tensor

from networks.sparse.maps import maps_for

HALVINGS = 3  # of a network: so many levels below one are counted with it
MIN_BITS = 8  # bits an axis at least, so that small grids can be halved often without losing the sample number
MAX_TABLE_CELLS = 2**29  # 2 GiB of int32
THIN_NEIGHBOURS = 20.0  # mean below which sorting rows by neighbourhood pays on a GPU (shells have 9 to 18)
ORDER_CHUNK_ROWS = 16384  # sorted among themselves: longer sorts better, shorter keeps gathers in the cache
CENTRE = 13  # index of offset (0, 0, 0) among the 27; the mirror of offset k is 26 - k


def neighbour_offsets(device: torch.device | str = "cpu") -> Int64[Tensor, "27 3"]:
    """Offset k = (dx+1)*9 + (dy+1)*3 + (dz+1)."""
    steps = torch.arange(-1, 2, device=device)
    return torch.cartesian_prod(steps, steps, steps)


def morton_keys(coords: Int[Tensor, "N 4"], bits: int) -> Int64[Tensor, " N"]:
    """Sorting key of (batch, x, y, z) rows for axes of `bits` bits."""
    return maps_for(coords.device).morton_keys(coords, bits)


def morton_coords(keys: Int64[Tensor, " N"], bits: int) -> Int32[Tensor, "N 4"]:
    """Undoes `morton_keys`."""
    return maps_for(keys.device).morton_coords(keys, bits)


def find_rows(sorted_keys: Int64[Tensor, " N"], wanted: Int64[Tensor, " M"]) -> Int64[Tensor, " M"]:
    """Row of each wanted key among sorted keys; N where there is none."""
    num_rows = sorted_keys.shape[0]
    if num_rows == 0:
        return torch.zeros_like(wanted)
    rows = torch.searchsorted(sorted_keys, wanted)
    found = sorted_keys[rows.clamp(max=num_rows - 1)] == wanted
    return torch.where(found, rows, num_rows)


def bits_for(spatial_shape: tuple[int, int, int]) -> int:
    return max(MIN_BITS, math.ceil(math.log2(max(spatial_shape))))


class Coarsening(NamedTuple):
    """A fine level grouped by 2x2x2 cells: what down-sampling did and up-sampling takes back."""

    fine: "Level"
    coarse: "Level"
    parent: Int64[Tensor, " N"]  # coarse row of each fine row
    children: Int64[Tensor, "8 M"]  # fine row of each child 4(x&1) + 2(y&1) + (z&1), N where it is empty

    @property
    def occupied(self) -> Bool[Tensor, "M 8"]:
        return (self.children < self.parent.shape[0]).T

    @property
    def slots(self) -> Int64[Tensor, " M8"]:
        """Fine row in each of the eight places of every cell, cell after cell, N where it is empty."""
        return self.children.T.flatten()

    @property
    def places(self) -> Int64[Tensor, " N"]:
        """Where each fine row lies among the slots."""
        return 8 * self.parent + (self.fine.keys & 7)


class Windows(NamedTuple):
    """Rows grouped by cubic window, one window of the grid after another; many have no rows."""

    order: Int64[Tensor, " N"]  # rows, window by window
    bounds: Int32[Tensor, " W1"]  # where each window starts among them, and the end
    most: int  # rows that a window can hold

    def padded(self) -> tuple[Int64[Tensor, "W L"], Int64[Tensor, " N"]]:
        """Row in each slot of windows as long as the fullest, N where it is empty; and each row's slot."""
        counts, num_rows, device = self.bounds.diff(), self.order.shape[0], self.order.device
        lengths = [length for length in counts.tolist() if length]
        longest = max(lengths, default=0)
        window = torch.repeat_interleave(torch.arange(len(counts), device=device), counts, output_size=num_rows)
        number = (counts > 0).cumsum(0) - 1  # of the windows that hold rows
        slot_sorted = number[window] * longest + torch.arange(num_rows, device=device) - self.bounds[window]
        rows = torch.full((len(lengths) * longest,), num_rows, dtype=torch.int64, device=device)
        rows[slot_sorted] = self.order
        slot = torch.empty_like(slot_sorted)
        slot[self.order] = slot_sorted
        return rows.view(len(lengths), longest), slot


class Tiles(NamedTuple):
    """Rows cut into tiles of equal size, and the offsets that have a neighbour anywhere in each tile."""

    rows: Int32[Tensor, " N"] | None  # row at each place, None where places are rows
    neighbours: Int32[Tensor, "27 N"]  # of the row at each place
    offsets: Int32[Tensor, "T 27"]  # those alive come first
    counts: Int32[Tensor, " T"]


class NeighbourLists(NamedTuple):
    """Existing (row, neighbour) pairs of each offset, packed to the front."""

    rows: Int32[Tensor, "27 N"]
    near: Int32[Tensor, "27 N"]
    counts: Int32[Tensor, " 27"]


Live = Int32[Tensor, "1"] | None  # how many rows count, where a device knows it alone; see graphs.py


class Level:
    """Occupied voxels of a batch at one resolution, sorted by key. Build with `Level.from_coords`."""

    live: Live = None

    def __init__(
        self,
        keys: Int64[Tensor, " N"],
        *,
        spatial_shape: tuple[int, int, int],
        batch_size: int,
        bits: int,
        counts: Sequence[list[int]] = (),
    ):
        """`counts` are what is known of `count_cells` of these keys."""
        self.keys, self.spatial_shape, self.batch_size, self.bits = keys, tuple(spatial_shape), batch_size, bits
        self._counts = counts
        self._kept: dict[Hashable, Any] = {}

    @classmethod
    def from_coords(
        cls, coords: Int[Tensor, "N 4"], spatial_shape: tuple[int, int, int], batch_size: int
    ) -> tuple["Level", Int64[Tensor, " N"] | None]:
        """Checks and sorts; returns the level and the sorting order (None when the rows were sorted already)."""
        shape = tuple(int(n) for n in spatial_shape)
        if coords.dtype.is_floating_point or coords.dtype == torch.bool or coords.ndim != 2 or coords.shape[1] != 4:
            kind = str(coords.dtype).removeprefix("torch.")
            raise ValueError(f"coords must be integer (N, 4), got {kind} {tuple(coords.shape)}")
        if len(shape) != 3 or min(shape) < 1 or batch_size < 0:
            raise ValueError(f"a grid needs three positive sides and a batch size, got {shape} and {batch_size}")
        bits = bits_for(shape)
        if bits > 20 or 3 * bits + max(batch_size, 1).bit_length() > 63:
            raise ValueError(f"keys of 63 bits cannot hold {batch_size} samples of {shape} voxels")
        limits = (batch_size, *shape)
        keys, outside, mixed = maps_for(coords.device).checked_keys(coords, bits, limits)
        if outside:
            low, high = coords.amin(0).tolist(), coords.amax(0).tolist()
            raise ValueError(f"coords (batch, x, y, z) must lie in 0..{limits} exclusive, got {low}..{high}")
        keys, order = _sorted(keys, 3 * bits + (batch_size - 1).bit_length()) if mixed else (keys, None)
        level = cls(keys, spatial_shape=shape, batch_size=batch_size, bits=bits)
        if mixed and (count := len(level) - sum(level._count(0))):  # distinct ones are counted
            raise ValueError(f"coords must be unique, got {count} duplicates of {coords.shape[0]} rows")
        return level, order

    def __len__(self) -> int:
        return self.keys.shape[0]

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def to(self, device: torch.device | str) -> "Level":
        if torch.empty(0, device=device).device == self.device:
            return self
        sizes = {"batch_size": self.batch_size, "bits": self.bits, "counts": self._counts}
        return Level(self.keys.to(device), spatial_shape=self.spatial_shape, **sizes)

    def cached(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gave when this key was first asked for: maps live as long as their level."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def same_as(self, other: "Level") -> bool:
        return self is other or (
            self.spatial_shape == other.spatial_shape
            and self.batch_size == other.batch_size
            and torch.equal(self.keys, other.keys)
        )

    @cached_property
    def coords(self) -> Int32[Tensor, "N 4"]:
        return morton_coords(self.keys, self.bits)

    @property
    def sample_sizes(self) -> list[int]:
        """Voxels of each sample. Rows of a sample are consecutive."""
        return [len(self)] if self.batch_size == 1 else self._count(0)

    def _count(self, halvings: int) -> list[int]:
        """Distinct cells of each sample after so many halvings; the device is waited for once for all of them."""
        if len(self._counts) <= halvings:
            levels = min(HALVINGS, self.bits - 1)
            self._counts = maps_for(self.device).count_cells(self.keys, self.bits, self.batch_size, levels).tolist()
        return self._counts[halvings]

    @property
    def neighbours(self) -> Int32[Tensor, "27 N"]:
        """Row of each of the 27 neighbours of each voxel, N where there is none."""
        return self._neighbourhood[0]

    @property
    def mean_neighbours(self) -> float:
        """Occupied cells among the 27, averaged: about 25 in volumes, 10 to 15 in shells."""
        self._read_neighbours([self])
        return self._kept["mean neighbours"]

    @staticmethod
    def _read_neighbours(levels: Sequence["Level"]) -> None:
        """Mean neighbours of several levels, where they are not known; the device is waited for once."""
        unknown = [level for level in levels if "mean neighbours" not in level._kept]
        parts = [level._neighbourhood[2] for level in unknown]
        numbers = iter(torch.cat(parts).tolist() if parts else [])
        for level, part in zip(unknown, parts, strict=True):
            level._kept["mean neighbours"] = sum(itertools.islice(numbers, len(part))) / max(len(level), 1)

    @cached_property
    def _neighbourhood(self) -> tuple[Int32[Tensor, "27 N"], Int32[Tensor, " N"] | None, Int[Tensor, " P"]]:
        """Neighbours, the bits of `_alive` where they came along, and the number of neighbours, in parts."""
        cells = self.batch_size * math.prod(n + 2 for n in self.spatial_shape)
        if cells <= min(MAX_TABLE_CELLS, 256 * len(self) + 2**20):
            return maps_for(self.device).neighbours(self.keys, self.bits, self.spatial_shape, self.batch_size)
        table = self._neighbours_by_search()
        return table, None, (table < len(self)).sum()[None]

    @cached_property
    def _alive(self) -> Int32[Tensor, " N"]:
        """Bit k of each row is set where it has a neighbour at offset k."""
        if self._neighbourhood[1] is not None:
            return self._neighbourhood[1]
        bits = torch.zeros(len(self), dtype=torch.int32, device=self.device)
        for k, row_of in enumerate(self.neighbours):
            bits |= (row_of < len(self)).int() << k
        return bits

    def _neighbours_by_search(self) -> Int32[Tensor, "27 N"]:
        """Half of the offsets searched among the keys; the other half is the mirror image."""
        num_rows = len(self)
        rows = torch.arange(num_rows, device=self.device, dtype=torch.int32)
        neighbours = torch.full((27, num_rows + 1), num_rows, dtype=torch.int32, device=self.device)
        neighbours[CENTRE, :num_rows] = rows
        limits = torch.tensor(self.spatial_shape, device=self.device)
        for k, offset in enumerate(neighbour_offsets(self.device)[:CENTRE]):
            near = self.coords[:, 1:] + offset
            inside = ((near >= 0) & (near < limits)).all(1)
            keys = morton_keys(torch.cat([self.coords[:, :1], near.clamp(min=0)], 1), self.bits)
            found = torch.where(inside, find_rows(self.keys, keys), num_rows)
            neighbours[k, :num_rows] = found.int()
            neighbours[26 - k].scatter_(0, found, rows)  # the extra last column takes the misses
        return neighbours[:, :num_rows].contiguous()

    @cached_property
    def is_thin(self) -> bool:
        """Whether many of the 27 neighbours are missing, so that work must be chosen row by row."""
        return self.mean_neighbours < THIN_NEIGHBOURS

    @cached_property
    def _by_neighbourhood(self) -> tuple[Int32[Tensor, " N"], Int32[Tensor, "27 N"], Int32[Tensor, " N"]]:
        """Rows sorted by which neighbours they have, inside chunks of the key order; their neighbours and bits."""
        return maps_for(self.device).by_neighbourhood(self.neighbours, self._alive, ORDER_CHUNK_ROWS)

    def tiles(self, size: int) -> Tiles:
        """Tiles of `size` rows; rows with like neighbourhoods together where neighbours are few."""
        return self.cached(("tiles", size), lambda: self._cut_tiles(size))

    def _cut_tiles(self, size: int) -> Tiles:
        order, table, alive = None, self.neighbours, self._alive
        if self.is_thin:
            order, table, alive = self._by_neighbourhood
        return Tiles(order, table, *maps_for(self.device).tile_offsets(alive, size))

    @cached_property
    def neighbour_lists(self) -> NeighbourLists:
        """The pairs of `neighbour_pairs` in tables of fixed shape, so that nothing waits for their lengths."""
        return NeighbourLists(*maps_for(self.device).neighbour_lists(self.neighbours))

    @cached_property
    def neighbour_pairs(self) -> list[tuple[Int64[Tensor, " P"], Int64[Tensor, " P"]]]:
        """Per offset the rows that have that neighbour, and the neighbour's row."""
        pairs = []
        for row_of in self.neighbours:
            rows = (row_of < len(self)).nonzero().squeeze(1)
            pairs.append((rows, row_of[rows].long()))
        return pairs

    @property
    def coarsening(self) -> Coarsening:
        """This level grouped by 2x2x2 cells."""
        return Coarsening(self, *self._cells)

    @cached_property
    def _cells(self) -> tuple["Level", Int64[Tensor, " N"], Int64[Tensor, "8 M"]]:
        """The coarse level, parents and children, and of those below whose sizes are known: few kernels for all.

        Knows not this level, or neither would be freed by counting.
        """
        if self.bits == 1:
            raise ValueError(f"a level of {self.spatial_shape} voxels cannot be halved again")
        self._count(1)
        grouped = maps_for(self.device).group_cells(self.keys, [sum(counts) for counts in self._counts[1:]])
        shape, chain = self.spatial_shape, []
        for number, (keys, parent, children) in enumerate(grouped, 1):
            shape = tuple((n + 1) // 2 for n in shape)
            sizes = {"batch_size": self.batch_size, "bits": self.bits - number, "counts": self._counts[number:]}
            chain.append((Level(keys, spatial_shape=shape, **sizes), parent, children))
        for (coarse, *_), cells in itertools.pairwise(chain):
            coarse.__dict__["_cells"] = cells
        return chain[0]

    def prepare(self, *convolved: bool) -> "Level":
        """Builds what must wait for the device, for this level and those below it, and gives the coarsest.

        `convolved` says of each level, this one first, whether convolutions run there: the neighbours of a level
        without any are the largest map of all, and nobody's. Called before the first layer, it lets the host run ahead
        of the device through all of them: it waits twice, for the sizes of all levels and for their neighbours' number.
        """
        levels = [self]
        for _ in convolved[1:]:
            levels.append(levels[-1].coarsening.coarse)
        self._read_neighbours([level for level, asked in zip(levels, convolved, strict=True) if asked])
        return levels[-1]

    def subdivide(self, occupied: Bool[Tensor, "M 8"], fine_shape: tuple[int, int, int]) -> Coarsening:
        """The finer level in which exactly the marked children exist; the inverse of `coarsening`."""
        parent, octant = occupied.nonzero().unbind(1)
        keys = (self.keys[parent] << 3) | octant
        fine = Level(keys, spatial_shape=fine_shape, batch_size=self.batch_size, bits=self.bits + 1)
        children = torch.full((8, len(self)), len(fine), dtype=torch.int64, device=self.device)
        children[octant, parent] = torch.arange(len(fine), device=self.device)
        return Coarsening(fine, self, parent, children)

    def windows(self, size: int, shift: int) -> Windows:
        """Rows grouped by cubic windows of `size` voxels on the absolute grid, moved by `shift`."""
        self.prepare_windows(size, [shift])
        return self._kept["windows", size, shift]

    def prepare_windows(self, size: int, shifts: Sequence[int]) -> None:
        """Windows moved by each of some shifts, from one sort: the host takes as long to start a small one."""
        shifts = [shift for shift in shifts if ("windows", size, shift) not in self._kept]
        if shifts:
            grouped = zip(shifts, self._group_windows(size, shifts), strict=True)
            self._kept.update({("windows", size, shift): windows for shift, windows in grouped})

    def _group_windows(self, size: int, shifts: Sequence[int]) -> list[Windows]:
        along = [[(n - 1 + shift) // size + 1 for n in self.spatial_shape] for shift in shifts]
        ends = list(itertools.accumulate(self.batch_size * math.prod(counts) for counts in along))
        narrow = torch.int16 if ends[-1] < 2**15 else torch.int32  # fewer passes to sort
        keys = torch.empty((len(shifts), len(self)), dtype=narrow, device=self.device)
        for row, shift, counts, first in zip(keys, shifts, along, [0, *ends[:-1]], strict=True):
            maps_for(self.device).window_keys(self.coords, row, size=size, shift=shift, counts=counts, first=first)
        keys, order = torch.sort(keys.view(-1), stable=True)
        bounds = torch.searchsorted(keys, torch.arange(ends[-1] + 1, dtype=narrow, device=self.device), out_int32=True)
        most, grouped = min(size**3, len(self)), []
        for number, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            before = number * len(self)  # rows, of other shifts
            parts = order[before : before + len(self)], bounds[begin : end + 1]
            grouped.append(Windows(*(part - before if before else part for part in parts), most))
        return grouped


def _sorted(keys: Int64[Tensor, " N"], bits: int) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " N"]]:
    """Keys of so many bits in order, and that order; narrow ones take a device fewer passes."""
    values, order = torch.sort(keys.int() if bits < 32 else keys)
    return values.long(), order


def align_rows(source: Level, target: Level) -> Int64[Tensor, " M"]:
    """For each voxel of `target` its row in `source`, len(source) where it is absent."""
    if source.spatial_shape != target.spatial_shape:
        raise ValueError(f"cannot align a grid of {source.spatial_shape} with one of {target.spatial_shape}")
    if source.same_as(target):
        return torch.arange(len(target), device=target.device)
    return find_rows(source.keys, target.keys)
