"""Whole volumes in parts and tiles give what they give at once."""

import gc

import pytest
import torch
import torch.nn.functional as F

from networks import make_vqvae
from networks.sparse import SparseTensor
from networks.support import children_of, support_of
from networks.tiles import HALOS, decode_whole, encode_whole

SIDE = 96


def tiny(generator, **changes):
    torch.manual_seed(0)
    sizes = {"widths": (8, 8, 8), "model_channels": 16, "num_embeddings": 32, "num_blocks": 2, "windows": ["lung"]}
    network = make_vqvae("tiny", resolution=SIDE, **{**sizes, **changes}).eval()
    with torch.no_grad():
        latents, _ = network.encoder(volume(generator))
        network.vq.start_from(latents.feats, generator=torch.Generator().manual_seed(0))
        for parameter in network.parameters():  # untrained norms are the identity and would hide themselves
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            else:  # untrained convolutions hardly carry from voxel to voxel
                parameter.mul_(2)
    return network


def volume(generator):
    """An ellipsoid with holes in a grid with empty margins."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(SIDE)] * 3, indexing="ij"), -1).reshape(-1, 3)
    inside = ((grid - torch.tensor([44, 50, 40])) / torch.tensor([30.0, 34.0, 38.0])).square().sum(1) < 1
    kept = grid[inside & ((grid // 5).sum(1) % 4 > 0)]
    feats = torch.randn(len(kept), 1, generator=generator)
    return SparseTensor(feats, F.pad(kept, (1, 0)), (SIDE,) * 3, 1)


@pytest.mark.parametrize(
    ("max_points", "pool", "norm"), [(5000, "mean", "sample"), (40000, "legacy", "sample"), (5000, "mean", "voxel")]
)
def test_encoding_in_parts_gives_the_same_codes(max_points, pool, norm, generator):
    network, x = tiny(generator, pool=pool, norm=norm), volume(generator)
    whole, parts = network.encode(x), encode_whole(network, x, max_points=max_points)
    assert len(x) > max_points
    assert torch.equal(parts.coords, whole.coords)
    equal = float((parts.codes == whole.codes).float().mean())
    assert equal > 0.999, equal  # a row may lie on the border of two codes
    assert len(torch.unique(whole.codes)) > 8


@pytest.mark.parametrize("stored", [True, False])
def test_decoding_in_tiles_gives_the_same_values(stored, generator):
    network, x = tiny(generator), volume(generator)
    tokens = network.encode(x)
    support = support_of(x.level) if stored else None
    whole = network.decode(tokens, support=support)
    tiled = decode_whole(network, tokens, support=support, max_points=512 * 100)
    once = decode_whole(network, tokens, support=support)
    assert tiled.values.level.same_as(whole.level)
    # Other row blocks round otherwise, and seven convolutions without norms carry it on: 0.15 HU in the lung window,
    # a fifth of what one missing halo cell does (next test).
    for values in (tiled.values.feats, once.values.feats):
        assert (values - whole.feats).abs().max() < 2e-4
    assert once.computed == len(whole) < tiled.computed
    assert tiled.forced == once.forced
    if stored:
        assert whole.level.same_as(x.level) and once.forced == 0


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_thinner_halo_would_not_do(level, generator, monkeypatch):
    network, x = tiny(generator), volume(generator)
    tokens, support = network.encode(x), support_of(x.level)
    whole = network.decode(tokens, support=support)
    thinner = tuple(halo - (i == level) for i, halo in enumerate(HALOS))
    monkeypatch.setattr("networks.tiles.HALOS", thinner)
    tiled = decode_whole(network, tokens, support=support, max_points=512 * 100)
    assert (tiled.values.feats - whole.feats).abs().max() > 1e-3


def test_forced_children_are_counted(generator):
    network, x = tiny(generator), volume(generator)
    with torch.no_grad():
        for head in network.subdivision:
            head.bias.fill_(-100.0)
    tokens = network.encode(x)
    decoded = decode_whole(network, tokens)
    assert len(decoded.values) == len(tokens.codes)  # every token yields a voxel
    assert decoded.forced == 3 * len(tokens.codes)


def test_support_says_which_children_exist(generator):
    x = volume(generator)
    support = support_of(x.level)
    assert [len(part) for part in support] == [
        len(torch.unique(x.coords // torch.tensor([1, n, n, n]), dim=0)) for n in (8, 4, 2)
    ]
    assert int(children_of(support[2]).sum()) == len(x)


def test_more_than_one_volume_is_refused(generator):
    network = tiny(generator)
    coords = torch.tensor([[0, 0, 0, 0], [0, 80, 0, 0], [1, 0, 0, 0], [1, 80, 0, 0]])
    pair = SparseTensor(torch.zeros(4, 1), coords, (SIDE,) * 3, 2)
    with pytest.raises(ValueError, match="one volume"):
        decode_whole(network, network.encode(pair))
    with pytest.raises(ValueError, match="got 2 volumes"):
        encode_whole(network, pair, max_points=1)


@pytest.mark.parametrize("pool", ["children", "mean"])
def test_parts_are_gone_before_the_next_layers_run(pool, generator):
    """Beside the joined half they would stand in memory once more, where layers need most."""
    network, x = tiny(generator, pool=pool, norm="voxel"), volume(generator)
    block, seen = network.encoder.downsample[0], []

    def count(_module, given):
        rows = len(given[0])
        tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor) and item.ndim == 2]
        wide = [item for item in tensors if item.shape[1] == given[0].feats.shape[1] and item.is_floating_point()]
        parts = {item.data_ptr(): len(item) for item in wide if rows // 100 < len(item) < rows}
        seen.append(sum(parts.values()) / rows)

    next_layers = block.residual if pool == "children" else block.out_layers
    with next_layers.register_forward_pre_hook(count):
        encode_whole(network, x, max_points=5000)
    assert len(seen) == 1 and seen[0] < 0.1  # the last one at most


@pytest.mark.gpu
@pytest.mark.parametrize("pca", [False, True])
def test_what_is_as_large_as_the_volume_stands_in_the_hosts_memory(pca, generator):
    network, x = tiny(generator, pool="children", norm="voxel", pca=pca), volume(generator)
    expected = network.encode(x)
    whole = network.decode(expected)
    network.to("cuda")
    tokens = encode_whole(network, x, max_points=5000)  # x stays where it is
    assert tokens.codes.is_cuda and float((tokens.codes.cpu() == expected.codes).float().mean()) > 0.99
    on_card = expected._replace(codes=expected.codes.cuda(), coords=expected.coords.cuda())
    tiled = decode_whole(network, on_card, max_points=512 * 100).values
    assert not tiled.feats.is_cuda and not tiled.coords.is_cuda
    assert tiled.level.same_as(whole.level) and (tiled.feats - whole.feats).abs().max() < 2e-2
    assert decode_whole(network, on_card).values.feats.is_cuda  # one tile: nothing is moved
