"""How products of rows are cut into programs: tiles by width and type, made to fit the card; rows among programs."""

import itertools
import math
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from networks.kernels.launch import power_of_two

SPARE_BYTES = 4096  # of shared memory for what is no tile
PRODUCER_GROUPS = 2  # of warps that multiply, where others gather
PRODUCER_DEPTH = 64  # channels a step: rows of 128 bytes, which tensor cores read without bank conflicts
GRADIENT_BLOCK = 128  # input channels and columns of weights that a group of warps sums up
GRADIENT_GROUPS = 3  # of warps that multiply, each for its own offset, where others gather
GRADIENT_PRODUCERS = 4  # warps that gather
GRADIENT_ROWS, GRADIENT_STAGES = 64, 3  # of a step, and steps that lie ready


class Tile(NamedTuple):
    """Rows x columns of a program's sums, products a step, and how Triton runs it."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@cache
def product_tile(channels: int, columns: int, dtype: torch.dtype, *, thin: bool) -> Tile:
    """Tile of the forward product and the input gradient; the fastest of a dozen on an H200 (bench_conv.py)."""
    width = max(power_of_two(columns), 16)
    depth = max(power_of_two(channels), 16)
    if dtype == torch.float32:
        return Tile(64, min(width, 128), min(depth, 32), 4, 3)
    if width <= 32:
        return Tile(256, width, min(depth, 64), 4, 3)
    if width >= 256 and not thin:
        return Tile(128, 256, min(depth, 64), 8, 3)
    return Tile(128, min(width, 128), min(depth, 64), 8, 3) if width <= 128 else Tile(128, 128, min(depth, 64), 4, 3)


@cache
def grad_tile(channels: int, columns: int, dtype: torch.dtype) -> Tile:
    """Tile of the weight gradient: its rows are input channels, of several offsets where they are few."""
    width = min(max(power_of_two(columns), 16), 128)
    if dtype == torch.float32:
        return Tile(64, width, 32, 4, 3)
    if max(channels, columns) <= 32:
        return Tile(128, width, 32, 4, 3)
    return Tile(128, width, 64, 8, 3) if max(channels, columns) > 64 else Tile(64, width, 128, 4, 2)


@cache
def fitted(tile: Tile, dtype: torch.dtype, room: int) -> Tile:
    """The tile made to fit a smaller card: fewer steps read ahead, then fewer columns, then fewer rows."""
    while tile.stages * (tile.rows + tile.columns) * tile.depth * dtype.itemsize > room - SPARE_BYTES:
        if tile.stages > 2:
            tile = tile._replace(stages=tile.stages - 1)
        elif tile.columns > 64:
            tile = tile._replace(columns=tile.columns // 2)
        else:
            tile = tile._replace(rows=tile.rows // 2)
    return tile


class ProducerPlan(NamedTuple):
    """Rows of each multiplying group x columns of a tile, steps that lie ready, and warps that gather."""

    rows: int
    columns: int
    stages: int
    producers: int


@cache
def producer_plan(
    channels: int, columns: int, dtype: torch.dtype, room: int, *, thin: bool, mirrored: bool
) -> ProducerPlan | None:
    """None for what producer_convolution.py does not serve or does no faster, or what does not fit the card."""
    if dtype.itemsize != 2 or channels < 128 or channels % PRODUCER_DEPTH or columns < 128 or columns % 128:
        return None
    if columns % 256 and (thin or mirrored):
        return None
    plan = ProducerPlan(64, 256, 3, 4) if columns % 256 == 0 else ProducerPlan(128, 128, 3, 8)
    rows = PRODUCER_GROUPS * plan.rows
    held = plan.stages * (rows + plan.columns) * PRODUCER_DEPTH + rows * plan.columns
    return plan if held * dtype.itemsize <= room - SPARE_BYTES else None


@cache
def gradient_is_shared(channels: int, columns: int, dtype: torch.dtype, room: int, *, thin: bool) -> bool:
    """Whether producer_gradient.py serves a weight gradient: not where lists of pairs spare many products."""
    held = GRADIENT_STAGES * (GRADIENT_GROUPS + 1) * GRADIENT_ROWS * GRADIENT_BLOCK * dtype.itemsize
    blocks = channels > 0 and columns > 0 and channels % GRADIENT_BLOCK == columns % GRADIENT_BLOCK == 0
    return blocks and dtype.itemsize == 2 and not thin and held <= room - SPARE_BYTES


def few_parts(programs: int, num_processors: int) -> int:
    """The fewest parts that keep nine tenths of the card busy, where each part is so many programs, one a processor."""

    def waves(parts: int) -> float:
        return parts * programs / num_processors

    return next(parts for parts in itertools.count(1) if waves(parts) >= 0.9 * math.ceil(waves(parts)))


@lru_cache(maxsize=1024)
def even_parts(programs: int, num_processors: int) -> int:
    """How many parts make several even waves of programs over the card, where each part is so many programs."""
    least, most = (-(-waves * num_processors // programs) for waves in (4, 10))
    waves = {s: s * programs / num_processors for s in range(least, most + 1)}
    return max(waves, key=lambda s: waves[s] / math.ceil(waves[s]))
