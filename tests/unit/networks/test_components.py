"""Laws of the linear part of a tokenizer: principal components of cells, laid before training."""

import json

import pytest
import torch

from networks import make_vqvae
from networks.components import HounsfieldUnits, cell_rows, lay_components
from networks.presets import GoneSizes, Preset, preset
from networks.sparse import SparseTensor
from networks.support import support_of
from networks.tiles import decode_whole, encode_whole
from transforms.windows import DEFAULT_WINDOWS, window_bounds, window_values

SIDE = 32  # 64 cells
BOUNDS = [window_bounds(name) for name in DEFAULT_WINDOWS]


def of_hu(hu, coords):
    return SparseTensor(torch.from_numpy(window_values(hu.numpy(), DEFAULT_WINDOWS)), coords, (SIDE,) * 3, 1)


@pytest.fixture
def volume(generator):
    coords = (torch.rand(SIDE, SIDE, SIDE, generator=generator) < 0.9).nonzero()
    coords = torch.cat([torch.zeros(len(coords), 1), coords], 1).int()
    return of_hu(1400 * torch.rand(len(coords), generator=generator) - 900, coords)


def laid(volume, *, width=64, **changes):
    torch.manual_seed(0)
    network = make_vqvae("tiny", resolution=SIDE, latent_channels=width, pca=True, num_embeddings=16, **changes).eval()
    for part in (network.encoder, network.decoder):
        part.hu.lay(BOUNDS)
    share = lay_components(network.encoder.components, network.decoder.components, network.encoder.cells(volume).feats)
    return network, share


def test_hu_of_windows_are_those_that_went_in_cut_at_their_common_range():
    units = HounsfieldUnits(4)
    units.lay(BOUNDS)
    hu = torch.linspace(-1500, 1500, 501)[:, None]
    values = torch.from_numpy(window_values(hu[:, 0].numpy(), DEFAULT_WINDOWS))
    assert (units(values) - hu.clamp(-1350, 1050)).abs().max() < 1e-3
    assert (units.windows(hu) - values).abs().max() < 1e-5


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_windows_in_any_order_and_one_inside_another(order):
    units = HounsfieldUnits(2)
    units.lay([[(-1000.0, 1000.0), (-5.0, 75.0)][number] for number in order])
    hu = torch.tensor([[-900.0], [-5.0], [30.0], [400.0]])
    assert (units(units.windows(hu)) - hu).abs().max() < 1e-3


def test_windows_with_a_gap_between_them_are_refused():
    with pytest.raises(ValueError, match="windows without a gap, none shows 150 to 300 HU"):
        HounsfieldUnits(2).lay([(300.0, 900.0), (-1350.0, 150.0)])


def test_an_absent_voxel_counts_as_the_mean_of_its_cell_with_a_part_of_air():
    coords = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 9, 9, 9]]).int()
    rows = cell_rows(SparseTensor(torch.tensor([[10.0], [30.0], [-7.0]]), coords, (SIDE,) * 3, 1)).feats
    mixed = 0.7 * 20 - 0.3 * 1000
    assert sorted(rows[0].tolist()) == pytest.approx([mixed] * 510 + [10, 30])
    assert sorted(rows[1].tolist()) == pytest.approx([-0.7 * 7 - 300] * 511 + [-7])


def test_as_many_components_as_cells_lose_nothing(volume):
    network, share = laid(volume)
    back = network.decoder.components(network.encoder.linear_part(volume))
    assert share == pytest.approx(1, abs=1e-5)
    assert (back - network.encoder.cells(volume).feats).abs().max() < 0.1  # HU


def test_components_have_a_mean_square_of_one_and_no_gradient(volume):
    network, _ = laid(volume, width=16)
    assert network.encoder.linear_part(volume).square().mean() == pytest.approx(1, rel=1e-3)
    assert not any("components" in name or ".hu." in name for name, _ in network.named_parameters())


def test_distances_among_latents_are_those_of_hu(volume):
    network, _ = laid(volume)
    ratio = torch.pdist(network.encoder.linear_part(volume)) / torch.pdist(network.encoder.cells(volume).feats)
    assert ratio.std() / ratio.mean() < 1e-3


def test_a_network_that_has_learned_nothing_keeps_a_structure_seen_in_one_cell(volume):
    blob = (volume.coords[:, 1:] - torch.tensor([12, 12, 12])).square().sum(1) <= 2
    flat = of_hu(torch.where(blob, 45.0, -850.0), volume.coords)
    network, _ = laid(flat, num_blocks=1, codebook="none")
    with torch.no_grad():
        recon = network(flat, quantize=False).recon.feats
    hu = network.encoder.hu(recon)
    assert hu[blob].mean() - hu[~blob].mean() > 800


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


def test_components_of_window_values_as_older_weights_have_them_are_refused():
    stored = preset("base").changed(pca=True).to_tensor()
    assert Preset.from_tensor(stored).pca
    values = json.loads(bytes(stored.tolist())) | {"pca": True}
    with pytest.raises(GoneSizes, match="components are of window values, which are gone"):
        Preset.from_tensor(torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8))


def test_components_are_of_ct_windows():
    with pytest.raises(ValueError, match="pca needs CT windows, got features sdf"):
        preset("direct3d_s2").changed(pca=True)


def test_components_keep_hu_under_16_bits(volume):
    """A cell's mean may be 1000 HU away from that of all cells: of bfloat16 that is off by 2 HU and more."""
    network, _ = laid(volume, num_blocks=0, codebook="none")
    with torch.no_grad():
        network.decoder.upsample[2].up.linear.weight.zero_()  # what is left are the components
        network.decoder.upsample[2].up.linear.bias.zero_()
        network.encoder.out_layer.weight.zero_()
        network.encoder.out_layer.bias.zero_()
        with torch.autocast("cpu", torch.bfloat16):
            recon = network(volume, quantize=False).recon.feats
    lung = volume.feats[:, 0]
    shown = lung.abs() < 0.95  # nearer to its ends a window is drawn by the network alone
    assert shown.sum() > 1000 and (recon[:, 0] - lung)[shown].abs().max() * 750 < 0.5
