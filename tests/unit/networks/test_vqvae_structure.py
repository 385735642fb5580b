"""The sparse VQ-VAE: published structure, sizes that travel with the weights, what reaches a code."""

import dataclasses
import gc
import json
import math
import weakref

import pytest
import torch

from networks import make_vqvae
from networks.losses import TokenizerLoss
from networks.presets import PRESETS, Preset, is_grid, preset
from networks.sparse import SparseTensor
from tests.vqvae_samples import SIDE, ball, network

# ---- structure


def test_a_step_leaves_no_maps_behind():
    """Maps are most of a step's memory: they go with the tensor, not when the garbage collector comes round."""
    network = make_vqvae("tiny").train()
    coords = torch.nn.functional.pad(torch.ones(16, 16, 16).nonzero(), (1, 0))
    gc.collect()
    gc.disable()
    try:
        x = SparseTensor(torch.rand(4096, 4), coords, (16, 16, 16), 1)
        levels = [weakref.ref(level) for level in (x.level, x.level.coarsening.coarse, x.level.prepare(*(True,) * 4))]
        TokenizerLoss()(network(x), x)["loss"].backward()
        del x
        assert [level() for level in levels] == [None, None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("pool", ["children", "mean", "legacy"])
def test_neighbours_are_looked_up_exactly_where_convolutions_are_said_to_run(pool):
    network = make_vqvae("tiny", pool=pool)
    coords = torch.nn.functional.pad(torch.ones(16, 16, 16).nonzero(), (1, 0))
    x = SparseTensor(torch.rand(4096, 4), coords, (16, 16, 16), 1)
    network(x)
    levels = [x.level]
    for _ in range(3):
        levels.append(levels[-1].coarsening.coarse)
    assert tuple("_neighbourhood" in level.__dict__ for level in levels) == network.sizes.convolved


def test_the_published_structure_is_pinned():
    with torch.device("meta"):
        net = make_vqvae("direct3d_s2")
    published = [p for part in (net.encoder, net.decoder) for p in part.parameters()]
    assert len(published) == 116
    assert sum(p.numel() for p in published) == 37_874_113
    assert not list(net.encoder.buffers()) and not list(net.decoder.buffers())
    names = {name.split(".")[0] for name in net.state_dict()}
    assert names == {"encoder", "decoder", "vq", "subdivision", "_extra_state"}
    assert net.sizes.in_channels == 1 and net.encoder.downsample[0].down.pool == "legacy"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_travel_as_tensors(name):
    sizes = preset(name)
    stored = sizes.to_tensor()
    assert stored.dtype == torch.uint8 and Preset.from_tensor(stored) == sizes
    changed = sizes.changed(windows=["bone"], num_embeddings=99, spacing=None)
    assert Preset.from_tensor(changed.to_tensor()) == changed
    assert (changed.windows, changed.num_embeddings, changed.spacing) == (("bone",), 99, sizes.spacing)


def test_presets_are_those_of_the_contract():
    rows = {n: (p.resolution, p.model_channels, p.latent_channels, p.num_embeddings) for n, p in PRESETS.items()}
    assert rows["base"] == (256, 256, 64, 8192) and rows["large"] == (512, 512, 32, 8192)
    assert rows["direct3d_s2"] == (512, 512, 16, 8192) and rows["tiny"][3] == 256
    assert PRESETS["tiny"].max_points is None and PRESETS["base"].spacing == 1.5


def test_weights_older_than_the_choice_of_norms_keep_theirs():
    assert {name: sizes.norm for name, sizes in PRESETS.items()} == {
        "tiny": "voxel",
        "base": "voxel",
        "large": "voxel",
        "direct3d_s2": "sample",
    }
    newer = ("norm", "prepared", "resampler", "pca")
    older = [field.name for field in dataclasses.fields(Preset) if field.name not in newer]
    for sizes in (preset("tiny").changed(norm="sample"), preset("direct3d_s2")):
        stored = sizes.to_tensor()
        assert list(json.loads(bytes(stored.tolist()))) == older, "the hash of a tokenizer is over these bytes too"
        assert Preset.from_tensor(stored).norm == "sample"
    assert Preset.from_tensor(preset("base").to_tensor()).norm == "voxel"


def test_the_grid_of_the_training_data_is_kept_and_stands_in_nobodys_way():
    known, unknown = network(prepared=(64, 6.0)), network()
    assert Preset.from_tensor(known.state_dict()["_extra_state"]).prepared == (64, 6.0)
    known.load_state_dict(unknown.state_dict())
    unknown.load_state_dict(known.state_dict())
    assert (known.sizes.prepared, unknown.sizes.prepared) == ((64, 6.0), None)


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="resolution must be a multiple of 8"):
        preset("tiny").changed(resolution=20)
    with pytest.raises(ValueError, match="model_channels must be a multiple of num_heads = 4, got 18"):
        preset("tiny").changed(model_channels=18)
    with pytest.raises(ValueError, match="a preset has no resolutoin; it has "):
        preset("tiny").changed(resolutoin=16)
    with pytest.raises(ValueError, match="norm must be one of voxel, sample, got 'batch'"):
        preset("tiny").changed(norm="batch")
    with pytest.raises(ValueError, match="preset must be one of tiny, base"):
        preset("huge")


def test_a_grid_that_no_data_can_lie_on_is_refused():
    assert all(is_grid(grid) for grid in ((1, 1.0), (64, 6), (512, 500 / 512), (4096, 0.1)))
    strange = [(100,), "abc", ("a", "b"), (100.5, 4.7), 5, (True, 1.0), {"a": 1}, (100, "1"), (100, 1.0, 1.0)]
    beyond = [(100_000, 1.0), (0, 1.0), (100, 0.0), (100, -1.0), (100, math.nan), (100, math.inf)]
    assert not any(is_grid(grid) for grid in strange + beyond)
    for grid in beyond:
        stored = json.dumps({**dataclasses.asdict(preset("tiny")), "prepared": grid})
        with pytest.raises(
            ValueError, match=r"^prepared must be None, or a side of 1 to 4096 voxels and mm above 0, got"
        ):
            Preset.from_tensor(torch.tensor(list(stored.encode()), dtype=torch.uint8))


def test_weights_know_their_sizes_and_refuse_others():
    net = network()
    assert Preset.from_tensor(net.state_dict()["_extra_state"]) == net.sizes
    with pytest.raises((ValueError, RuntimeError), match="was made for"):
        network(keep="nonzero").load_state_dict(net.state_dict())


def test_no_output_layer_starts_at_zero():
    net = network()
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            assert parameter.abs().max() > 0, name


@pytest.mark.parametrize(("norm", "same"), [("voxel", True), ("sample", False)])
def test_what_lies_elsewhere_in_a_scan_changes_latents_only_through_norms_over_samples(norm, same, generator):
    net = network(norm=norm, num_blocks=0).eval()
    coords = torch.nn.functional.pad(torch.ones(4 * SIDE, 8, 8).nonzero(), (1, 0))
    feats = torch.rand(len(coords), 4, generator=generator) * 2 - 1
    far = coords[:, 1] >= 3 * SIDE
    latents = []
    for part in (feats, torch.where(far[:, None], 1.0, feats)):
        latents.append(net.encoder(SparseTensor(part, coords, (4 * SIDE, 8, 8), 1))[0])
    near = latents[0].coords[:, 1] < 2  # convolutions reach 4, 8 and 16 voxels, so four latents at most
    assert torch.equal(latents[0].feats[near], latents[1].feats[near]) is same
    assert not torch.equal(latents[0].feats, latents[1].feats)


@pytest.mark.parametrize(("pool", "told"), [("children", True), ("mean", False)])
def test_the_order_of_the_children_in_a_cell_reaches_the_code(pool, told, generator):
    """A mean has forgotten which of eight voxels was bright before any weight has seen them."""
    net = network(pool=pool).eval()
    coords = torch.nn.functional.pad(torch.ones(8, 8, 8).nonzero(), (1, 0))
    x = SparseTensor(torch.rand(512, 4, generator=generator) * 2 - 1, coords, (SIDE,) * 3, 1)
    first, second = (x.coords == torch.tensor([[0, 2, 4, 6]])).all(1), (x.coords == torch.tensor([[0, 3, 4, 7]])).all(1)
    feats = x.feats.clone()
    feats[first], feats[second] = x.feats[second], x.feats[first]
    latents, swapped = net.encoder(x)[0].feats, net.encoder(x.replace(feats))[0].feats
    assert (not torch.allclose(latents, swapped, atol=1e-5)) is told
    if told:
        with torch.no_grad():
            net.vq.embeddings.weight[:2] = torch.cat([latents, swapped])
            net.vq.embeddings.weight[2:] = 99.0
        assert [net.encode(x.replace(part)).codes.tolist() for part in (x.feats, feats)] == [[0], [1]]


def test_which_voxels_exist_reaches_the_latents_where_values_do_not_tell(generator):
    net = network().eval()
    coords = torch.nn.functional.pad(torch.ones(8, 8, 8).nonzero(), (1, 0))
    whole = SparseTensor(torch.zeros(512, 4), coords, (SIDE,) * 3, 1)
    holed = SparseTensor(torch.zeros(511, 4), coords[coords.sum(1) > 0], (SIDE,) * 3, 1)
    assert not torch.allclose(net.encoder(whole)[0].feats, net.encoder(holed)[0].feats, atol=1e-6)


def test_nothing_is_wider_than_the_values_at_full_resolution():
    for name in ("tiny", "base", "large"):
        with torch.device("meta"):
            net = make_vqvae(name)
        channels = net.sizes.in_channels
        assert not list(net.encoder.input_layer1.parameters()) and not list(net.decoder.out_layer.parameters())
        assert net.encoder.downsample[0].down.linear.in_features == 8 * (channels + 1)
        assert net.decoder.upsample[2].up.linear.out_features == 8 * channels


@pytest.mark.parametrize("shift", [(8, 0, 0), (0, 8, 16), (16, 8, 8)])
def test_halving_commutes_with_moving_by_a_latent(shift, generator, assert_close):
    net = network().eval()
    near = ball(6.3, (7, 8, 7))
    feats = torch.rand(len(near), 4, generator=generator)
    moved = near + torch.tensor([0, *shift])
    halved = []
    for coords in (near, moved):
        x = SparseTensor(feats, coords, (2 * SIDE,) * 3, 1)
        for block in net.encoder.downsample:
            x = block(x)
        halved.append(x)
    at = {tuple(c): row for c, row in zip(halved[1].coords.tolist(), halved[1].feats, strict=True)}
    there = halved[0].coords + torch.tensor([0, *(n // 8 for n in shift)])
    assert len(at) == len(there) == 8
    assert_close(torch.stack([at[tuple(c)] for c in there.tolist()]), halved[0].feats)
