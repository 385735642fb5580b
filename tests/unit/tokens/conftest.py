"""Tokens of a scattered volume, with support, as the tests of token files take them."""

import numpy as np
import pytest
import torch

from app.tokens.token_files import CTTokens, latent_to_voxel
from networks.sparse.topology import Level
from networks.support import support_of


@pytest.fixture
def tokens(rng):
    voxels = np.unique(rng.integers(0, 24, (300, 3)), axis=0)
    rows = torch.nn.functional.pad(torch.from_numpy(voxels), (1, 0))
    level, _ = Level.from_coords(rows, (24, 24, 24), 1)
    coarse = level.coarsening.coarse.coarsening.coarse.coarsening.coarse
    return CTTokens(
        codes=rng.integers(0, 256, len(coarse)).astype(np.int32),
        coords=coarse.coords[:, 1:].numpy(),
        latent_shape=(3, 3, 3),
        affine=np.diag([1.5, 1.5, 1.5, 1.0]) @ latent_to_voxel(),
        source_shape=(100, 90, 80),
        source_affine=np.diag([-0.7, -0.7, 2.5, 1.0]),
        features="window",
        windows=("lung", "bone"),
        spacing=1.5,
        keep="body",
        tokenizer="ab" * 32,
        findings=("FOV_CROPPED", "OVERLAPPING_SLICES"),
        support=tuple(part.numpy() for part in support_of(level)),
        voxels=len(voxels),
    )
