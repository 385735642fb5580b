"""Refined codes decode to fewer errors than the encoder's own; their gradient is the true one, in tiles too."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from app.tokens.open_scan import Volume
from app.tokens.tokenizer import CTTokenizer, dense_hu
from networks import refinement
from networks.refinement import _Judge, encode_refined
from networks.support import plan_of
from networks.tiles import encode_whole
from tests.tiny_tokenizer import AFFINE, hu_volume, make_network
from transforms.windows import window_bounds

TILE = 512 * 20
UNITS = [(high - low) / 2 for low, high in map(window_bounds, ("lung", "bone", "soft_tissue", "brain"))]


@pytest.fixture(scope="module")
def network():
    network = make_network(quantizer_levels=2)
    with torch.no_grad():
        for parameter in network.decoder.parameters():  # untrained convolutions hardly carry from voxel to voxel
            if parameter.ndim > 1:
                parameter.mul_(1.5)
    return network


@pytest.fixture(scope="module")
def x(network):
    made = CTTokenizer(network, digest="")
    return made.on_device(made.rows_of(Volume(hu_volume(), AFFINE)))


def loss_at_once(network, x, latents, rows):
    """The same loss by the network's own decoding, without tiles."""
    plan, existence = plan_of(x.level), []

    def choose(i, features):
        logits = network.subdivision[i](features.feats.float())
        existence.append(F.binary_cross_entropy_with_logits(logits, plan[i].occupied.float()))
        return plan[i]

    values = network.decoder(latents.replace(rows), choose).feats
    off = (values - x.feats) * torch.tensor(UNITS)
    return (off.abs() / 100 + off.square() / 100**2).mean() + torch.stack(existence).mean()


@pytest.mark.parametrize("max_points", [None, TILE])
def test_the_gradient_is_that_of_decoding_at_once(network, x, max_points):
    latents = network.encoder(x)[0]
    rows = latents.feats.detach().clone().requires_grad_()
    loss = loss_at_once(network, x, latents, rows)
    truth = torch.autograd.grad(loss, rows)[0]
    judge = _Judge(network, x, latents, UNITS, max_points)
    judged = judge(rows, with_gradient=True)
    assert judged.loss == pytest.approx(float(loss), rel=1e-5)
    assert float((judged.gradient - truth).norm() / truth.norm()) < 1e-4
    assert judge(rows, with_gradient=False) == (pytest.approx(judged.loss, rel=1e-6), None)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.decoder.parameters())


def test_tiles_are_several(network, x):
    assert len(refinement.tiles_of(network.encoder(x)[0], TILE)) > 1


@pytest.mark.parametrize("levels", [1, None])
def test_codes_that_decode_better_are_found_and_the_same_again(network, x, levels):
    plain = encode_whole(network, x, levels=levels)
    better = encode_refined(network, x, steps=6, units=UNITS, levels=levels)
    assert better.codes.shape == plain.codes.shape and not torch.equal(better.codes, plain.codes)
    judge = _Judge(network, x, network.latents_of(plain), UNITS, None)
    losses = [judge(network.vq.lookup(tokens.codes), with_gradient=False).loss for tokens in (plain, better)]
    assert losses[1] < losses[0]
    assert torch.equal(encode_refined(network, x, steps=6, units=UNITS, levels=levels).codes, better.codes)
    assert torch.equal(encode_refined(network, x, steps=0, units=UNITS, levels=levels).codes, plain.codes)


def test_where_no_step_helps_the_encoders_codes_stay(network, x, monkeypatch):
    judged, losses = _Judge.__call__, iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(_Judge, "__call__", lambda *rest, **how: judged(*rest, **how)._replace(loss=next(losses)))
    assert torch.equal(encode_refined(network, x, steps=2, units=UNITS).codes, encode_whole(network, x).codes)
    assert next(losses, None) is None


def test_a_tokenizer_that_ships_gains_from_a_few_steps():
    ct, hu = CTTokenizer.from_pretrained("ct_base", device="cpu"), hu_volume()
    scan = Volume(hu + np.random.default_rng(0).normal(0, 20, hu.shape).astype(np.int16), np.diag([1.5, 1.5, 1.5, 1]))
    rows = ct.rows_of(scan)
    truth, there = dense_hu(ct.on_device(rows), ct.sizes), tuple(rows.coords[:, 1:].T.numpy())
    for levels, gain in ((1, 0.985), (4, 0.9)):
        errors = []
        for steps in (0, 5):
            tokens = ct.encode(scan, support=True, levels=levels, refine=steps)
            assert tokens.refined == (steps or None)
            errors.append(np.abs(ct.decode(tokens).hu - truth)[there].mean())
        assert errors[1] < gain * errors[0], (levels, errors)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_on_a_card_gradient_and_gain_are_those_of_the_host(network, x, where):
    latents = network.encoder(x)[0]
    expected = _Judge(network, x, latents, UNITS, TILE)(latents.feats, with_gradient=True)
    on_card = copy.deepcopy(network).to("cuda")
    x = x.to(where)  # as large as a volume: it may stay in the host's memory
    judge = _Judge(on_card, x, latents.to("cuda"), UNITS, TILE)
    judged = judge(latents.feats.cuda(), with_gradient=True)
    assert judged.loss == pytest.approx(expected.loss, rel=1e-3)
    off = judged.gradient.cpu() - expected.gradient
    assert float(off.norm() / expected.gradient.norm()) < 1e-2
    parts = len(x) // 2 if where == "cpu" else len(x)  # what lies on the host goes to the card part by part
    codes = [encode_refined(on_card, x, steps=steps, units=UNITS, max_points=parts).codes for steps in (0, 6)]
    plain, better = (judge(on_card.vq.lookup(one), with_gradient=False).loss for one in codes)
    assert better < plain
