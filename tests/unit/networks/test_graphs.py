"""Tables that CUDA graphs read: the maps of a batch in them, and how long they are; no kernel runs here."""

import pytest
import torch

from networks.sparse import SparseTensor
from networks.sparse.graphs import NetworkGraphs

SHAPE = (16, 16, 16)


def levels_of(coords, shape=SHAPE):
    coords = torch.nn.functional.pad(coords, (1, 0))
    level = SparseTensor(torch.zeros(len(coords), 1), coords, shape, 1).level
    chain = [level]
    for _ in range(3):
        chain.append(chain[-1].coarsening.coarse)
    return chain


def block(side):
    return torch.ones(side, side, side).nonzero()


def spread(count, generator):
    return torch.ones(4, 4, 4).nonzero()[torch.randperm(64, generator=generator)[:count]] * 4


def read_maps(table):
    return [*table.tiles(16)[1:], table.coarsening.children, table.coords]


def test_tables_hold_the_maps_of_each_batch_and_how_many_rows_count(generator, monkeypatch):
    monkeypatch.setattr("networks.sparse.graphs.SHORTEST", 8)
    graphs = NetworkGraphs()
    for coords in (block(6), block(3), spread(50, generator)):
        levels = levels_of(coords)
        assert graphs._lay(levels)
        for table, level in zip(graphs.tables[:3], levels, strict=False):
            assert table.live.tolist() == [len(level)] and table.count == len(level) <= len(table)
            tiles, children = level.tiles(16), level.coarsening.children
            for laid, part in zip(read_maps(table), [*tiles[1:], children, level.coords], strict=True):
                assert torch.equal(laid[tuple(map(slice, part.shape))], part)
        order, bounds, _ = graphs.tables[3].windows(1, 0)
        plan = levels[3].windows(1, 0)
        assert torch.equal(order[: len(levels[3])], plan.order) and torch.equal(bounds[: len(plan.bounds)], plan.bounds)
        assert (bounds[len(plan.bounds) :] == len(levels[3])).all()


def test_tables_never_become_shorter(generator, monkeypatch):
    """A batch of many voxels in few cells and one of few voxels in many cells fit the same tables in the end."""
    monkeypatch.setattr("networks.sparse.graphs.SHORTEST", 8)
    graphs, batches = NetworkGraphs(), [levels_of(block(6)), levels_of(spread(50, generator)), levels_of(block(6))]
    laid = []
    for levels in batches:
        graphs._lay(levels)
        for table in graphs.tables[:3]:
            read_maps(table)
        graphs.tables[3].windows(1, 0)
        laid.append((graphs.tables, [len(table) for table in graphs.tables]))
    assert laid[1][0] is not laid[0][0] and laid[2][0] is laid[1][0]
    assert all(now >= then for then, now in zip(laid[0][1], laid[1][1], strict=True))


def test_what_no_kernel_may_ask_is_refused(generator):
    graphs = NetworkGraphs()
    graphs._lay(levels_of(block(4)))
    with pytest.raises(RuntimeError, match="how many voxels a sample has"):
        _ = graphs.tables[0].sample_sizes
    with pytest.raises(AttributeError):
        _ = graphs.tables[0].keys
