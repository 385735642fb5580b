"""What is small and rare stays: nodules of phantoms in a tokenizer of the demo's sizes, by the benchmark's measure."""

import numpy as np
import pytest
import torch

from app.phantoms.phantoms import make_phantom
from networks import make_vqvae
from networks.components import lay_components
from networks.sparse import SparseTensor
from tests.benchmarks.bench_findings import contrasts, share_kept
from transforms.sparse import keep_mask, sparsify
from transforms.windows import DEFAULT_WINDOWS, hu_from_windows, window_bounds, window_values


@pytest.fixture(scope="module")
def phantoms():
    """Those of the first ten that have nodules, on the demo's grid."""
    sizes = make_vqvae("tiny", codebook="none").sizes
    made = [make_phantom(number, size=sizes.resolution, spacing=sizes.spacing) for number in range(10)]
    return [phantom for phantom in made if any(row["finding"] == "nodule" for row in phantom.findings)]


def seen(phantom):
    coords, values = sparsify(phantom.hu, keep_mask(phantom.hu, spacing=phantom.spacing[0]))
    coords = torch.nn.functional.pad(torch.from_numpy(coords).int(), (1, 0))
    feats = torch.from_numpy(window_values(values, DEFAULT_WINDOWS)).float()
    return SparseTensor(feats, coords, phantom.hu.shape, 1)


def nodules_kept(phantoms, decode):
    rows = []
    for phantom in phantoms:
        x = seen(phantom)
        made = np.full(phantom.hu.shape, -1024, np.float32)
        made[tuple(x.coords[:, 1:].long().T.numpy())] = hu_from_windows(decode(x).numpy(), DEFAULT_WINDOWS)
        rows += contrasts(phantom, phantom.hu.astype(np.float32), made, phantom.affine)
    rows = [row for row in rows if row.finding == "nodule"]
    assert len(rows) >= 5
    return share_kept(rows)


def test_nodules_keep_four_fifths_of_their_contrast_before_anything_was_learned(phantoms):
    torch.manual_seed(0)
    network = make_vqvae("tiny", codebook="none", pca=True).eval()
    for part in (network.encoder, network.decoder):
        part.hu.lay([window_bounds(name) for name in DEFAULT_WINDOWS])
    cells = torch.cat([network.encoder.cells(seen(phantom)).feats for phantom in phantoms])
    lay_components(network.encoder.components, network.decoder.components, cells)
    with torch.no_grad():
        kept = nodules_kept(phantoms, lambda x: network(x, quantize=False).recon.feats)
    assert kept > 0.8
