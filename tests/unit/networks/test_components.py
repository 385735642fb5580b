"""Laws of the linear part of a tokenizer: principal components of cells, laid before training."""

import pytest
import torch

from networks import make_vqvae
from networks.components import cell_values, lay_components
from networks.presets import preset
from networks.sparse import SparseTensor
from networks.support import support_of
from networks.tiles import decode_whole, encode_whole

SIDE = 32  # 64 cells


@pytest.fixture
def volume(generator):
    coords = (torch.rand(SIDE, SIDE, SIDE, generator=generator) < 0.9).nonzero()
    coords = torch.cat([torch.zeros(len(coords), 1), coords], 1).int()
    feats = 1.6 * torch.rand(len(coords), 4, generator=generator) - 0.8
    return SparseTensor(feats, coords, (SIDE,) * 3, 1)


def laid(volume, *, width=64, weights=None, **changes):
    torch.manual_seed(0)
    network = make_vqvae("tiny", resolution=SIDE, latent_channels=width, pca=True, num_embeddings=16, **changes).eval()
    maps = network.encoder.components, network.decoder.components
    share = lay_components(*maps, cell_values(volume).feats, channel_weights=weights)
    return network, share


def test_as_many_components_as_cells_lose_nothing(volume):
    network, share = laid(volume)
    cells = cell_values(volume)
    back = network.decoder.components(network.encoder.linear_part(volume))
    assert share == pytest.approx(1, abs=1e-5)
    assert (back - cells.feats).abs().max() < 1e-4


def test_components_have_a_mean_square_of_one_and_no_gradient(volume):
    network, _ = laid(volume, width=16)
    assert network.encoder.linear_part(volume).square().mean() == pytest.approx(1, rel=1e-3)
    assert not any("components" in name for name, _ in network.named_parameters())


def test_distances_among_latents_are_those_of_the_weighted_values(volume):
    weights = torch.tensor([1.0, 1.0, 0.25, 0.05])
    network, _ = laid(volume, weights=weights)
    latents, cells = network.encoder.linear_part(volume), cell_values(volume).feats
    weighted = cells * weights.sqrt().repeat(512)
    ratio = torch.pdist(latents) / torch.pdist(weighted)
    assert ratio.std() / ratio.mean() < 1e-3


def test_a_network_that_has_learned_nothing_keeps_a_structure_seen_in_one_cell(volume):
    blob = (volume.coords[:, 1:] - torch.tensor([12, 12, 12])).square().sum(1) <= 2
    flat = volume.replace(torch.where(blob[:, None], 0.5, -0.5).expand(-1, 4).contiguous())
    network, _ = laid(flat, num_blocks=1, codebook="none")
    with torch.no_grad():
        recon = network(flat, quantize=False).recon.feats
    assert recon[blob].mean() - recon[~blob].mean() > 0.8


def test_parts_give_what_the_whole_gives(volume):
    network, _ = laid(volume, quantizer_levels=2)
    tokens, support = network.encode(volume), support_of(volume.level)
    assert torch.equal(encode_whole(network, volume, max_points=5000).codes, tokens.codes)
    whole, parts = (
        network.decode(tokens, support=support),
        decode_whole(network, tokens, support=support, max_points=5000),
    )
    assert (whole.feats - parts.values.feats).abs().max() < 1e-5


def test_sizes_without_components_are_stored_as_older_checkpoints_have_them():
    assert b"pca" not in bytes(preset("base").to_tensor().tolist())
    assert b"pca" in bytes(preset("base").changed(pca=True).to_tensor().tolist())
