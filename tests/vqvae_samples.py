"""A small sparse VQ-VAE, and bodies of voxels for it."""

import torch

from networks import make_vqvae
from networks.sparse import SparseTensor

SIDE = 16
SMALL = {
    "resolution": SIDE,
    "model_channels": 16,
    "latent_channels": 16,
    "num_blocks": 2,
    "num_embeddings": 32,
    "window": 2,
}


def network(**changes):
    torch.manual_seed(0)
    return make_vqvae("tiny", **{**SMALL, **changes})


def ball(radius, centre, sample=0):
    """A voxel body, so that every level has inner and border cells."""
    grid = torch.ones(SIDE, SIDE, SIDE).nonzero()
    kept = grid[(grid - torch.tensor(centre)).square().sum(1) < radius**2]
    return torch.nn.functional.pad(kept, (1, 0), value=sample)


def two_samples(generator, channels=4):
    coords = torch.cat([ball(6.3, (7, 8, 7)), ball(3.2, (10, 5, 11), sample=1)])
    return SparseTensor(torch.rand(len(coords), channels, generator=generator) * 2 - 1, coords, (SIDE,) * 3, 2)


def alone(x, sample):
    rows = x.coords[:, 0] == sample
    coords = x.coords[rows].clone()
    coords[:, 0] = 0
    return SparseTensor(x.feats[rows], coords, x.spatial_shape, 1), rows
