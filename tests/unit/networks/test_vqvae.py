"""The sparse VQ-VAE: published structure, decoding on wanted voxels, batch laws, memory for time."""

import dataclasses
import gc
import json
import math
import weakref

import pytest
import torch

from networks import Decoder, Encoder, SparseVQVAE, SubdivisionHeads, build_quantizer, make_vqvae
from networks.losses import TokenizerLoss
from networks.presets import NORMS, PRESETS, Preset, is_grid, make_sizes, preset
from networks.sparse import SparseTensor, ops
from networks.sparse.topology import Level, align_rows
from networks.vqvae import Tokens

SIDE = 16
SMALL = {"resolution": SIDE, "model_channels": 16, "num_blocks": 2, "num_embeddings": 32, "window": 2}


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
    older = [field.name for field in dataclasses.fields(Preset) if field.name not in ("norm", "prepared", "resampler")]
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


# ---- decoding


def test_tokens_alone_give_at_least_a_voxel_each_inside_the_grid(generator):
    net = network().eval()
    tokens = net.encode(two_samples(generator))
    for bias in (0.0, -100.0, 100.0):
        for head in net.subdivision:
            torch.nn.init.constant_(head.bias, bias)
        out = net.decode(tokens)
        assert (out.coords[:, 1:] >= 0).all() and (out.coords[:, 1:] < SIDE).all()
        cell = torch.cat([out.coords[:, :1], out.coords[:, 1:] // 8], 1)
        cells, counts = cell.unique(dim=0, return_counts=True)
        assert {tuple(c) for c in cells.tolist()} == {tuple(c) for c in tokens.coords.tolist()}
        if bias == -100.0:
            assert (counts == 1).all()  # the likeliest child, level by level
        if bias == 100.0:
            assert (counts == 512).all()
        assert out.feats.abs().max() <= 1 and torch.isfinite(out.feats).all()


def test_up_sampling_the_wanted_equals_expanding_all_and_gathering(generator):
    x = two_samples(generator)
    cells = x.level.coarsening
    coarse = SparseTensor.on(cells.coarse, torch.randn(len(cells.coarse), 5, generator=generator))
    whole = ops.unpool(coarse, coarse.level.subdivide(torch.ones(len(coarse), 8, dtype=torch.bool), x.spatial_shape))
    wanted = ops.unpool(coarse, cells)
    rows = align_rows(whole.level, wanted.level)
    assert len(whole) == 8 * len(coarse) and int(rows.max()) < len(whole)
    assert torch.equal(wanted.feats, whole.feats[rows])


def test_target_guided_decoding_of_full_cells_equals_expanding_everything(generator, assert_close):
    net = network().eval()
    coords = torch.nn.functional.pad(torch.ones(SIDE, SIDE, 8).nonzero(), (1, 0))
    x = SparseTensor(torch.rand(len(coords), 4, generator=generator), coords, (SIDE,) * 3, 1)
    latents, _ = net.encoder(x)

    def everything(_, features):
        fine_shape = tuple(2 * n for n in features.spatial_shape)
        return features.level.subdivide(torch.ones(len(features), 8, dtype=torch.bool), fine_shape)

    guided, _ = net.decode_on(latents, x.level)
    expanded = net.decoder(latents, everything)
    assert expanded.level.same_as(x.level)
    assert_close(guided.feats, expanded.feats)


def test_only_wanted_voxels_are_decoded(generator):
    net = network().eval()
    x = two_samples(generator)
    out = net(x)
    assert out.recon.level.same_as(x.level)
    assert len(out.latents) == len({(b, *(v // 8 for v in c)) for b, *c in x.coords.tolist()})


def test_the_subdivision_loss_teaches_the_support(generator):
    net = network()
    x = two_samples(generator)
    latents, _ = net.encoder(x)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        latents, _ = net.encoder(x)
        _, error = net.decode_on(latents, x.level)
        error.backward()
        optimizer.step()
    assert error < 0.2
    net.eval()
    found = net.decoder(net.encoder(x)[0], lambda i, f: net.subdivision.choose(i, f, fine_shape=_doubled(f))[0])
    rows = align_rows(found.level, x.level)
    hit = (rows < len(found)).float().mean()
    assert hit > 0.9 and len(found) < 1.2 * len(x)


def _doubled(x):
    return tuple(2 * n for n in x.spatial_shape)


# ---- laws


def test_tokens_are_in_morton_order_and_decode_to_the_same_codes(generator):
    net = network().eval()
    tokens = net.encode(two_samples(generator))
    assert tokens.codes.dtype == torch.int32 and tokens.latent_shape == (2, 2, 2)
    _, order = Level.from_coords(tokens.coords, tokens.latent_shape, 2)
    assert order is None
    assert torch.equal(net.vq(net.latents_of(tokens).feats).codes.int(), tokens.codes)
    turn = torch.randperm(len(tokens.codes), generator=generator)
    mixed = Tokens(tokens.codes[turn], tokens.coords[turn], tokens.latent_shape, 2)
    assert torch.equal(net.decode(mixed).feats, net.decode(tokens).feats)


def test_order_of_rows_does_not_matter(generator):
    net = network().eval()
    x = two_samples(generator)
    turn = torch.randperm(len(x), generator=generator)
    again = SparseTensor(x.feats[turn], x.coords[turn], x.spatial_shape, 2)
    assert torch.equal(net(again).recon.feats, net(x).recon.feats)


@pytest.mark.parametrize(("quantize", "norm"), [(True, "sample"), (True, "voxel"), (False, "sample")])
def test_a_batch_equals_its_samples_one_by_one(quantize, norm, generator, assert_close):
    net = network(norm=norm).eval()
    x = two_samples(generator)
    both = net(x, quantize=quantize)
    terms = []
    for sample in range(2):
        single, rows = alone(x, sample)
        out = net(single, quantize=quantize)
        assert_close(out.recon.feats, both.recon.feats[rows])
        mine = both.latents.coords[:, 0] == sample
        assert_close(out.latents.feats, both.latents.feats[mine])
        if quantize:
            assert torch.equal(out.codes, both.codes[mine])
        terms.append(torch.stack([out.vq, out.commitment, out.kl, out.subdivision]))
    assert_close(torch.stack([both.vq, both.commitment, both.kl, both.subdivision]), sum(terms) / 2)


def test_an_empty_sample_in_a_batch_changes_nothing(generator, assert_close):
    net = network().eval()
    x = two_samples(generator)
    coords = x.coords.clone()
    coords[:, 0] *= 2
    with_empty = SparseTensor(x.feats, coords, x.spatial_shape, 3)
    out, truth = net(with_empty), net(x)
    assert_close(out.recon.feats, truth.recon.feats)
    assert_close(out.subdivision, truth.subdivision)


@pytest.mark.parametrize("quantize", [True, False])
def test_checkpointing_gives_the_same_gradients(quantize, generator):
    x = two_samples(generator)
    grads = []
    for use_checkpoint in (False, True):
        net = network(use_checkpoint=use_checkpoint).train()
        torch.manual_seed(1)
        TokenizerLoss()(net(x, quantize=quantize), x)["loss"].backward()
        grads.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
        pending = len(net.vq._pending)
        assert pending == int(quantize), "recomputation must not count rows twice"
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 50
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@pytest.mark.parametrize("norm", NORMS)
def test_every_part_learns_in_stage_0(norm, generator):
    net = network(codebook="none", norm=norm).train()
    x = two_samples(generator)
    TokenizerLoss()(net(x, quantize=False), x)["loss"].backward()
    still = [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not still
    with pytest.raises(ValueError, match="no codes: train stage 1"):
        net.encode(x)


@pytest.mark.parametrize("split", [(0, 1), (1, 0)])
def test_noise_does_not_depend_on_the_split(split, generator, assert_close):
    """Stage 0 samples around the mean: a sample's noise is its own, whatever shares its batch."""
    net = network(codebook="none").train()
    x = two_samples(generator)
    both = net(x, quantize=False, seeds=[11, 22])
    for sample in split:
        single, rows = alone(x, sample)
        out = net(single, quantize=False, seeds=[[11, 22][sample]])
        assert_close(out.recon.feats, both.recon.feats[rows])
    other = net(x, quantize=False, seeds=[11, 23])
    second = x.coords[:, 0] == 1
    assert torch.equal(other.recon.feats[~second], both.recon.feats[~second])
    assert not torch.allclose(other.recon.feats[second], both.recon.feats[second], atol=1e-5)


def test_bf16_on_cpu_stays_near_float32(generator):
    net = network().eval()
    x = two_samples(generator)
    truth = net(x, quantize=False).recon.feats
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, quantize=False).recon.feats
    assert out.dtype == torch.float32 and (out - truth).abs().max() < 0.05


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("encoder", {"model_channels": 32}, "encoder was made with another model_channels"),
        ("decoder", {"windows": ["lung"]}, "decoder was made with another windows"),
        ("subdivision", {"widths": (8, 8, 16)}, "subdivision was made with another widths"),
        ("vq", {"num_embeddings": 8}, "vq must have num_embeddings 16 codes of latent_channels 4, got 8 of 4"),
        ("vq", {"latent_channels": 2}, "vq must have num_embeddings 16 codes of latent_channels 4, got 16 of 2"),
        ("vq", {"quantizer_levels": 2}, "vq must have quantizer_levels = 1 levels, got 2"),
        ("vq", {"codebook": "none"}, "vq must be a quantiser unless codebook is none, got codebook ema and none"),
    ],
)
def test_parts_of_other_sizes_are_refused(part, change, says):
    sizes = make_sizes("tiny", num_embeddings=16, latent_channels=4, num_blocks=1)
    other = sizes.changed(**change)
    kinds = {"encoder": Encoder, "vq": build_quantizer, "decoder": Decoder, "subdivision": SubdivisionHeads}
    with pytest.raises(ValueError, match=says):
        SparseVQVAE(sizes, **{name: kind(other if name == part else sizes) for name, kind in kinds.items()})
