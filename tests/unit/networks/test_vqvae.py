"""The sparse VQ-VAE: decoding on wanted voxels, batch laws, memory for time."""

import pytest
import torch

from networks import Decoder, Encoder, SparseVQVAE, SubdivisionHeads, build_quantizer
from networks.losses import TokenizerLoss
from networks.presets import NORMS, make_sizes
from networks.sparse import SparseTensor, ops
from networks.sparse.topology import Level, align_rows
from networks.vqvae import BatchTokens
from tests.vqvae_samples import SIDE, alone, network, two_samples

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


@pytest.mark.parametrize(
    ("changes", "logit", "voxels"),
    [({}, -2.9, 512), ({}, -3.1, 1), ({"features": "sdf"}, 0.1, 512), ({"features": "sdf"}, -0.1, 1)],
)
def test_a_child_is_decoded_that_has_one_chance_in_twenty_and_of_a_shape_one_in_two(generator, changes, logit, voxels):
    net = network(**changes).eval()
    tokens = net.encode(two_samples(generator, channels=1 if changes else 4))
    for head in net.subdivision:
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.constant_(head.bias, logit)
    assert len(net.decode(tokens)) == voxels * len(tokens.codes)


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
    assert hit > 0.99 and len(found) < 1.3 * len(x)


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
    mixed = BatchTokens(tokens.codes[turn], tokens.coords[turn], tokens.latent_shape, 2)
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


def test_graphs_change_nothing_without_a_card(generator):
    x, terms = two_samples(generator), []
    for use_graphs in (False, True):
        net = network(use_graphs=use_graphs).train()
        assert net.encoder.use_graphs == net.decoder.use_graphs == use_graphs
        terms.append(TokenizerLoss()(net(x), x))
        terms[-1]["loss"].backward()
        assert not net.graphs.recorded and not net.graphs.failed
        terms[-1]["slope"] = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(terms[0][name], terms[1][name]) for name in terms[0])
    assert not network(use_graphs=True, use_checkpoint=True).encoder.use_graphs


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
