"""How often building the maps and a training step would wait for a card, counted on the CPU by operations."""

import pytest
import torch

from networks import make_vqvae
from networks.losses import TokenizerLoss
from networks.sparse import SparseTensor
from tests.waits import Waits

SHAPE = (20, 24, 18)
CONVOLVED = (False, True, True, True)


def batch(generator, *, samples, shuffled=True):
    grid = torch.rand(samples, *SHAPE, generator=generator) < 0.6
    coords = grid.nonzero()
    coords = coords[torch.randperm(len(coords), generator=generator)] if shuffled else coords
    return torch.randn(len(coords), 4, generator=generator), coords


def test_the_counter_counts_what_a_host_must_see():
    values = torch.arange(6)
    with Waits() as waits:
        values.add(1).cumsum(0)[torch.tensor([0, 2])]
        torch.repeat_interleave(values, values, output_size=15)
    assert waits.total == 0
    with Waits() as waits:
        seen = bool(values[1]), int(values[2]), values[3].item(), values.tolist()
        found = values.nonzero(), values[values > 2], values.unique(), torch.repeat_interleave(values, values)
        del seen, found
    assert waits.counts == {
        **{"_local_scalar_dense": 3, "tolist": 1, "nonzero": 1},
        **{"index": 1, "_unique2": 1, "repeat_interleave": 1},
    }


@pytest.mark.parametrize("samples", [1, 3])
def test_the_maps_of_a_batch_wait_three_times(samples, generator):
    """For what is wrong with coordinates, for the sizes of all levels, and for the number of their neighbours."""
    feats, coords = batch(generator, samples=samples)
    with Waits() as waits:
        x = SparseTensor(feats, coords, SHAPE, samples)
        coarsest = x.level.prepare(*CONVOLVED)
        for shift in (0, 2):
            coarsest.windows(4, shift)
        used = [x.level.sample_sizes, coarsest.sample_sizes, x.level.coarsening.coarse.is_thin, coarsest.is_thin]
        del used
    assert waits.total <= 3, waits.counts
    with Waits() as waits:
        x.level.prepare(*CONVOLVED)
    assert waits.total == 0, waits.counts


def test_a_training_step_waits_for_nothing_but_its_maps(generator):
    """Beside them only for what the kernels of a card do otherwise: plain attention pads windows to the longest, of
    each of the two shifts, and plain sums by code count rows.
    """
    network = make_vqvae("tiny").train()
    network.vq.revive_below = 0.995  # most codes are revived at once
    feats, coords = batch(generator, samples=2)
    with Waits() as waits:
        x = SparseTensor(feats, coords, SHAPE, 2)
        loss = TokenizerLoss()(network(x, seeds=[1, 2]), x)["loss"]
    assert waits.total - waits.counts["bincount"] <= 3 + 2, waits.counts
    with Waits() as waits:
        loss.backward()
        network.vq.update(generator=torch.Generator().manual_seed(0))
    assert waits.total == 0, waits.counts
