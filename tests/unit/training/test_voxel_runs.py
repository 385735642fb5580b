"""Coordinates come back from runs row by row, whatever the voxels; the host waits for nothing and sends little."""

import numpy as np
import pytest
import torch

from app.training.step import SparseBatch
from app.training.voxel_runs import coords_of, num_voxels, places_of
from tests.waits import Waits
from transforms import Windowsd
from transforms.runs import Runs
from transforms.sparse import sparsify


def rows(mask):
    coords, _ = sparsify(np.zeros(mask.shape, np.int16), mask)
    return torch.from_numpy(coords)


def batch_of(parts):
    return {
        **places_of([Runs.of(part.numpy()) for part in parts]),
        "values": torch.zeros(sum(map(len, parts)), dtype=torch.int16),
    }


def numbered(parts):
    return torch.cat([torch.nn.functional.pad(part, (1, 0), value=number) for number, part in enumerate(parts)])


def solid(rng, holes):
    mask = np.zeros((24, 20, 40), bool)
    mask[3:20, 2:19, 5:36] = rng.random((17, 17, 31)) >= holes
    return mask


@pytest.mark.parametrize("holes", [0, 0.02, 0.3, 0.9])
@pytest.mark.parametrize("samples", [1, 3])
def test_coordinates_come_back_in_their_order(rng, holes, samples):
    parts = [rows(solid(rng, holes)) for _ in range(samples)]
    batch = batch_of(parts)
    assert ("runs" in batch) == (holes < 0.5)  # else coordinates are fewer numbers
    assert num_voxels(batch) == sum(map(len, parts))
    assert torch.equal(coords_of(batch), numbered(parts)) and coords_of(batch).dtype == torch.int16


def test_runs_end_with_their_line_and_their_sample():
    line = torch.tensor([[0, 0, 6], [0, 0, 7], [0, 1, 0], [0, 1, 1], [1, 1, 2]], dtype=torch.int16)
    line = torch.cat([line, torch.tensor([[1, 1, z] for z in range(3, 30)], dtype=torch.int16)])
    other = line[-27:]  # goes on at the very place where the first sample ended, one voxel before
    batch = batch_of([line, other])
    assert batch["runs"].tolist() == [[0, 0, 0, 6, 2], [0, 0, 1, 0, 2], [0, 1, 1, 2, 28], [1, 1, 1, 3, 27]]
    assert torch.equal(coords_of(batch), numbered([line, other]))


def test_whatever_a_transform_made_of_them_coordinates_travel_as_int16(rng):
    part = rows(solid(rng, 0))
    assert batch_of([part.long()])["runs"].dtype == torch.int16
    assert torch.equal(coords_of(batch_of([part.long()])), numbered([part]))


def test_a_sample_without_voxels_and_voxels_in_any_order(rng):
    part = rows(solid(rng, 0))
    assert torch.equal(coords_of(batch_of([part[:0], part])), numbered([part[:0], part]))
    mixed = part[torch.randperm(len(part))]
    assert "coords" in batch_of([mixed]) and torch.equal(coords_of(batch_of([mixed])), numbered([mixed]))
    assert coords_of(batch_of([part[:0]])).shape == (0, 4)


def test_the_host_waits_for_nothing_and_the_network_sees_the_same(rng):
    parts = [rows(solid(rng, 0.02)) for _ in range(2)]
    batch = batch_of(parts) | {"spatial_shape": (24, 20, 40), "batch_size": 2}
    with Waits() as waits:
        coords = coords_of(batch)
    assert waits.total == 0
    take = SparseBatch(Windowsd("values", windows=["lung"]))
    plain = {key: value for key, value in batch.items() if key != "runs"} | {"coords": coords}
    assert torch.equal(take(batch, torch.device("cpu")).coords, take(plain, torch.device("cpu")).coords)


def test_a_body_travels_in_a_tenth_of_its_coordinates():
    side = np.linalg.norm(np.indices((96, 96, 96)) - 48, axis=0) < 44
    batch = batch_of([rows(side)])
    assert batch["runs"].nbytes < 0.1 * coords_of(batch).nbytes


@pytest.mark.gpu
def test_on_a_card_coordinates_are_those_of_the_host(rng):
    batch = batch_of([rows(solid(rng, 0.02)) for _ in range(3)])
    there = coords_of(batch, "cuda")
    assert there.is_cuda and torch.equal(there.cpu(), coords_of(batch))
