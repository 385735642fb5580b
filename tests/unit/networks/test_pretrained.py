"""Published weights: a file of exactly their structure gives in our network what an independent restatement gives."""

import pytest
import torch

from networks import make_vqvae
from networks.pretrained import autoencoder_in, converted, is_published
from networks.sparse import SparseTensor
from tests import published_autoencoder as published

SIDE = 24  # latents that hold something: three windows, and four once they are shifted
GRID = 64  # latents of the published grid: on a coarser one places are told by larger numbers
ROUNDING = 1e-4  # of the largest value: some forty layers in float32, each summed in another order
SMALL = {"widths": (32, 64, 128), "model_channels": 64, "num_embeddings": 32}


@pytest.fixture(scope="module")
def file():
    """The network of the published sizes and what its file holds."""
    network = published.made()
    return network, published.as_published(network)


@pytest.fixture(scope="module")
def small():
    """The same structure, transformer narrower."""
    network = published.made((32, 64, 128, 64))
    return network, published.as_published(network)


@pytest.fixture(scope="module")
def ours(file):
    with torch.device("meta"):
        network = make_vqvae("direct3d_s2", num_embeddings=32)
    own = converted(file[1], network)
    network = network.to_empty(device="cpu")
    network.load_state_dict(own, strict=False)
    return network.eval()


def scattered(seed, *, cells=(12, 3), voxels=40):
    """Voxels by chance in some cells of an eighth of the resolution, a sample each; in no order."""
    draw = torch.Generator().manual_seed(seed)
    parts = []
    for sample, count in enumerate(cells):
        corners = 8 * torch.randint(0, SIDE, (count, 1, 3), generator=draw)
        corners[1:3] = corners[0] + 8 * torch.eye(3, dtype=torch.long)[:2, None]  # some cells touch
        inside = corners.clamp(max=8 * SIDE - 8) + torch.randint(0, 8, (count, voxels, 3), generator=draw)
        parts.append(torch.nn.functional.pad(inside.flatten(0, 1), (1, 0), value=sample))
    coords = torch.cat(parts).unique(dim=0)
    coords = coords[torch.randperm(len(coords), generator=draw)]
    return torch.rand(len(coords), 1, generator=draw) * 2 - 1, coords


def every_child(_, features):
    shape = tuple(2 * n for n in features.spatial_shape)
    return features.level.subdivide(torch.ones(len(features), 8, dtype=torch.bool), shape)


def in_our_order(rows, coords, side, batch_size):
    return SparseTensor(rows, coords, (side,) * 3, batch_size)


def assert_same(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= ROUNDING * expected.abs().max()
    assert expected.std() > 0.3, "weights and inputs make a difference"


# ---- structure


def test_the_restatement_has_the_published_structure(file):
    network, state = file
    assert len(state) == 116 and sum(part.numel() for part in network.parameters()) == 37_874_113
    assert round(sum(part.numel() for part in network.decoder.parameters()) / 1e6, 2) == 15.24
    shapes = {name: tuple(part.shape) for name, part in state.items()}
    assert shapes["encoder.input_layer1.weight"] == (32, 1)
    assert shapes["encoder.downsample.2.out_layers.0.conv.kernel"] == (27, 128, 512)
    assert shapes["encoder.downsample.0.skip_connection.conv.kernel"] == (32, 64)
    assert shapes["encoder.blocks.3.attn.to_qkv.weight"] == (1536, 512)
    assert shapes["encoder.blocks.0.mlp.mlp.0.weight"] == (2048, 512)
    assert shapes["encoder.out_layer.weight"] == (32, 512)
    assert shapes["decoder.upsample.0.act_layers.0.conv.kernel"] == (27, 512, 128)
    assert shapes["decoder.upsample.2.out_layers.0.conv.bias"] == (32,)
    norms = {name for name, part in state.items() if part.dtype == torch.float32}
    assert len(norms) == 12 and all("downsample" in name for name in norms)
    assert {part.dtype for name, part in state.items() if name not in norms} == {torch.float16}


def test_each_of_the_116_tensors_has_one_place(file):
    with torch.device("meta"):
        network = make_vqvae("direct3d_s2")
    own = converted(file[1], network)
    shapes = {name: part.shape for name, part in network.state_dict().items() if name.startswith(("enc", "dec"))}
    assert {name: part.shape for name, part in own.items()} == shapes and len(own) == 116
    assert {part.dtype for part in own.values()} == {torch.float32}


# ---- forward


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_the_encoder_gives_what_the_published_one_gives(file, ours, seed):
    feats, coords = scattered(seed, cells=((12, 3), (5, 9), (20,))[seed])
    rows, cells = file[0].encoder(feats, coords)
    batch_size = int(coords[:, 0].max()) + 1
    expected = in_our_order(rows, cells, GRID, batch_size)
    mean, log_var = ours.encoder(in_our_order(feats, coords, 8 * GRID, batch_size))
    assert torch.equal(mean.coords, expected.coords)
    assert_same(mean.feats, expected.feats[:, :16])
    assert_same(log_var, expected.feats[:, 16:].clamp(-30, 20))


@torch.no_grad()
def test_the_decoder_gives_what_the_published_one_gives(file, ours):
    draw = torch.Generator().manual_seed(4)
    cells = scattered(4)[1] // torch.tensor([1, 8, 8, 8])
    cells = cells.unique(dim=0)
    latents = torch.randn(len(cells), 16, generator=draw)
    rows, voxels = file[0].decoder(latents, cells)
    expected = in_our_order(rows, voxels, 8 * GRID, 2)
    values = ours.decoder(in_our_order(latents, cells, GRID, 2), every_child)
    assert len(values) == 512 * len(cells) and torch.equal(values.coords, expected.coords)
    assert_same(values.feats, expected.feats)


@torch.no_grad()
def test_a_whole_pass_with_other_sizes_gives_the_same(small):
    network, state = small
    own = make_vqvae("direct3d_s2", **SMALL).eval()
    own.load_state_dict(converted(state, own), strict=False)
    feats, coords = scattered(7)
    rows, cells = network.encoder(feats, coords)
    expected = in_our_order(*network.decoder(rows[:, :16], cells), 8 * GRID, 2)
    latents, _ = own.encoder(in_our_order(feats, coords, 8 * GRID, 2))
    assert_same(own.decoder(latents, every_child).feats, expected.feats)


# ---- what does not fit


def misfit(state, **sizes):
    with torch.device("meta"):
        network = make_vqvae("direct3d_s2", **{**SMALL, **sizes})
    with pytest.raises(ValueError) as end:
        converted(state, network)
    return str(end.value)


def test_blocks_that_would_stay_random_are_refused(small):
    line = misfit(small[1], num_blocks=8)
    assert line.startswith("missing: encoder.blocks.4.attn.to_qkv.weight, encoder.blocks.4.attn.to_qkv.bias, ")
    assert line.endswith(" and 56 more") and "left over" not in line


def test_codes_of_another_width_are_refused(small):
    assert misfit(small[1], latent_channels=32) == (
        "of another shape: encoder.out_layer.weight (32, 64) instead of (64, 64), encoder.out_layer.bias (32,) instead "
        "of (64,), decoder.input_layer.weight (64, 16) instead of (64, 32)"
    )


def test_whatever_is_missing_left_over_twice_or_misshaped_is_listed(small):
    state = dict(small[1])
    del state["decoder.out_layer.bias"]
    state["encoder.pos_embedder.freqs"] = torch.zeros(3)
    state["Encoder.input_layer.bias"] = state["encoder.input_layer.bias"]
    name = "decoder.upsample.1.out_layers.0.conv.kernel"
    state[name] = state[name][:26]
    assert misfit(state) == (
        "missing: decoder.out_layer.bias; left over: encoder.pos_embedder.freqs; there twice: "
        "encoder.input_layer.bias; of another shape: decoder.upsample.1.out_layers.0.weight (26, 64, 64) instead of "
        "(27, 64, 64)"
    )


def test_kernels_of_another_library_are_no_silent_gap(small):
    """spconv keeps (out, x, y, z, in) under `weight`, which a lenient load passes over."""
    state = {name.replace(".conv.kernel", ".conv.weight"): part for name, part in small[1].items()}
    line = misfit(state)
    assert "missing: encoder.downsample.0.out_layers.0.weight" in line
    assert "left over: encoder.downsample.0.out_layers.0.conv.weight" in line


# ---- files


def test_the_state_dict_is_found_in_every_kind_of_file(small):
    state = small[1]
    for stored in ({"vae": state, "dit": {"a": 1}}, {"vae": state, "config": {}}, {"state_dict": state}, state):
        assert autoencoder_in(stored) is state
    assert is_published(state) and not is_published({"a": state}) and not is_published([1])
    assert not is_published(make_vqvae("direct3d_s2", **SMALL).state_dict()), "ours say their sizes"


def test_names_of_a_fork_are_the_same_weights(small):
    with torch.device("meta"):
        network = make_vqvae("direct3d_s2", **SMALL)
    state = {name.replace("encoder.", "Encoder.").replace("decoder.", "Decoder."): w for name, w in small[1].items()}
    state["vq.embeddings.weight"] = torch.zeros(8192, 16)
    assert is_published(state)
    own, same = converted(state, network), converted(small[1], network)
    assert own.keys() == same.keys() and all(torch.equal(own[name], same[name]) for name in own)
