"""Laws of the quantisers and their options, and one tiny training of each."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from networks import FiniteScalarQuantizer, ResidualQuantizer, VectorQuantizer, make_vqvae
from networks.fsq import levels_for
from networks.losses import TokenizerLoss
from networks.presets import PRESETS, Preset
from networks.quantizer import rotated
from networks.residual import build_quantizer
from networks.sparse import SparseTensor

OPTIONS = {
    "ema": {},
    "gradient": {"codebook": "gradient"},
    "fsq": {"codebook": "fsq"},
    "rotation": {"rotation_trick": True},
    "normalized": {"normalize_codes": True},
    "normalized_gradient": {"normalize_codes": True, "codebook": "gradient"},
    "residual": {"quantizer_levels": 3},
    "all": {"rotation_trick": True, "normalize_codes": True, "quantizer_levels": 2},
}


def clustered(generator, num_rows=2000, width=6):
    centres = 3 * torch.randn(40, width, generator=generator)
    picks = torch.randint(40, (num_rows,), generator=generator)
    return centres[picks] + 0.3 * torch.randn(num_rows, width, generator=generator)


def started(option, rows, num_embeddings=64):
    sizes = PRESETS["tiny"].changed(num_embeddings=num_embeddings, latent_channels=rows.shape[1], **OPTIONS[option])
    torch.manual_seed(0)
    vq = build_quantizer(sizes)
    vq.start_from(rows, generator=torch.Generator().manual_seed(0))
    return vq


@pytest.mark.parametrize("option", OPTIONS)
def test_codes_decode_to_the_values_of_the_forward_pass(option, generator, assert_close):
    rows = clustered(generator)
    vq = started(option, rows).eval()
    out = vq(rows)
    assert_close(vq.lookup(out.codes), out.values)
    assert out.codes.min() >= 0 and out.codes.max() < 64
    again = vq(rows.flip(0))
    assert torch.equal(again.codes.flip(0), out.codes)
    with pytest.raises(ValueError, match=r"codes must lie in 0\.\.63, got"):
        vq.lookup(torch.full_like(out.codes, 64))


@pytest.mark.parametrize("option", OPTIONS)
def test_start_explains_most_of_the_rows(option, generator):
    rows = clustered(generator)
    out = started(option, rows).eval()(rows)
    left = (rows - out.values).square().sum() / (rows - rows.mean(0)).square().sum()
    # FSQ of 64 codes sees two of six axes; on a sphere the lengths are lost
    assert left < {"fsq": 0.6, "normalized": 0.2, "normalized_gradient": 0.2, "all": 0.2}.get(option, 0.05)


@pytest.mark.parametrize("option", ["ema", "gradient", "normalized", "residual"])
def test_straight_through_copies_the_gradient(option, generator, assert_close):
    vq = started(option, clustered(generator)).eval()
    rows = clustered(generator, 50).requires_grad_()
    weight = torch.randn(50, 6, generator=generator)
    (vq(rows).values * weight).sum().backward()
    assert_close(rows.grad, weight)


def test_rotation_turns_the_gradient_with_the_row(generator, assert_close):
    rows = torch.randn(40, 5, generator=generator, dtype=torch.float64).requires_grad_()
    values = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    out = rotated(rows, values)
    assert_close(out.detach(), values)
    weight = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    (out * weight).sum().backward()
    # angle between gradient and row is that between upstream gradient and value, lengths scale by |value| / |row|
    before = F.cosine_similarity(weight, values)
    after = F.cosine_similarity(rows.grad, rows.detach())
    assert_close(after, before)
    assert_close(rows.grad.norm(dim=1), weight.norm(dim=1) * values.norm(dim=1) / rows.detach().norm(dim=1))


def test_rotation_survives_zero_and_opposite_rows(assert_close):
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]).requires_grad_()
    values = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    out = rotated(rows, values)
    assert_close(out.detach(), values)
    out.sum().backward()
    assert_close(rows.grad, torch.ones(3, 2))


@pytest.mark.parametrize("option", ["normalized", "normalized_gradient", "all"])
def test_normalized_codes_lie_on_a_sphere_and_lengths_do_not_choose(option, generator, assert_close):
    rows = clustered(generator)
    vq = started(option, rows)
    first = vq if isinstance(vq, VectorQuantizer) else vq.levels[0]
    assert_close(first.codebook.norm(dim=1), torch.full((64,), float(rows.norm(dim=1).mean())))
    assert torch.equal(first(rows).codes, first(0.1 * rows).codes)
    vq.train()
    vq(rows)
    vq.update(generator=generator)
    assert_close(first.codebook.norm(dim=1), torch.full((64,), float(rows.norm(dim=1).mean())))


def test_residual_error_falls_with_every_level(generator):
    rows = torch.randn(4000, 6, generator=generator)
    errors = []
    for levels in (1, 2, 3, 4):
        sizes = PRESETS["tiny"].changed(num_embeddings=32, latent_channels=6, quantizer_levels=levels)
        vq = build_quantizer(sizes)
        vq.start_from(rows, generator=torch.Generator().manual_seed(0))
        out = vq.eval()(rows)
        errors.append(float((rows - out.values).square().mean()))
        assert out.codes.shape == ((4000,) if levels == 1 else (4000, levels))
    assert all(after < 0.75 * before for before, after in itertools.pairwise(errors))


def test_first_residual_level_is_the_plain_quantiser(generator):
    rows = clustered(generator)
    assert torch.equal(started("residual", rows).eval()(rows).codes[:, 0], started("ema", rows).eval()(rows).codes)


@pytest.mark.parametrize("option", ["ema", "rotation", "normalized", "residual", "all"])
def test_moving_averages_follow_the_rows(option, generator):
    vq = started(option, clustered(generator)).train()
    moved = clustered(generator) + torch.tensor([2.0, -1.0, 0.0, 1.0, 0.0, -2.0])
    before = [level.codebook.clone() for level in getattr(vq, "levels", [vq])]
    errors = []
    for _ in range(30):
        errors.append(float((vq(moved).values - moved).square().mean()))
        vq.update(generator=generator)
    assert errors[-1] < 0.8 * errors[0]
    for old, level in zip(before, getattr(vq, "levels", [vq]), strict=True):
        assert not torch.equal(old, level.codebook)


@pytest.mark.parametrize("option", ["ema", "gradient", "rotation", "normalized", "residual", "all"])
def test_a_codebook_that_is_not_to_learn_stays_and_no_code_is_revived(option, generator):
    vq = started(option, clustered(generator)).train()
    far = clustered(generator) + 50.0  # most codes go unused: all of them would be revived
    before = {name: value.clone() for name, value in vq.state_dict().items()}
    vq.requires_grad_(False)
    for _ in range(30):
        vq(far)
        assert int(vq.update(generator=generator)) == 0
    assert not any(level._pending for level in getattr(vq, "levels", [vq]))
    assert all(torch.equal(value, before[name]) for name, value in vq.state_dict().items())
    assert not any(parameter.requires_grad for parameter in vq.parameters())


def test_fsq_levels_keep_the_number_of_codes():
    assert levels_for(8192) == (8, 8, 8, 16)
    assert levels_for(256) == (4, 8, 8)
    with pytest.raises(ValueError, match="power of two of at least 4, got 1000"):
        levels_for(1000)


def test_fsq_numbers_every_combination_once():
    vq = FiniteScalarQuantizer(64, 2)
    with torch.no_grad():  # nothing in the way: rows are logits of the steps, values their centres
        for way in (vq.project_in, vq.project_out):
            way.weight.copy_(torch.eye(2))
            way.bias.zero_()
        rows = torch.logit((vq.codebook + 1) / 2)
        assert torch.equal(vq(rows).codes, torch.arange(64))
    assert torch.unique(vq.codebook.detach(), dim=0).shape == (64, 2)
    assert float(vq.codebook.min()) == -0.875 and float(vq.codebook.max()) == 0.875


def test_fsq_gradient_passes_the_rounding(generator):
    rows = clustered(generator)
    vq = started("fsq", rows)
    rows.requires_grad_()
    vq(rows).values.sum().backward()
    assert rows.grad.abs().sum() > 0
    assert vq.project_in.weight.grad.abs().sum() > 0 and vq.project_out.weight.grad.abs().sum() > 0


def test_fsq_start_uses_nearly_all_codes_of_normal_rows(generator):
    rows = torch.randn(8000, 6, generator=generator) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2, 0.1])
    codes = started("fsq", rows, num_embeddings=256)(rows).codes
    counts = torch.bincount(codes, minlength=256)
    assert (counts > 0).sum() > 250


def test_options_that_exclude_each_other_are_refused():
    with pytest.raises(ValueError, match="quantizer_levels need a codebook of vectors, got codebook fsq"):
        make_vqvae("tiny", codebook="fsq", quantizer_levels=2)
    with pytest.raises(ValueError, match="at least 2 levels, got 1"):
        ResidualQuantizer([VectorQuantizer(4, 2)])
    with pytest.raises(ValueError, match="needs latent_channels of at least as many, got 2"):
        FiniteScalarQuantizer(8192, 2)


def test_options_travel_with_the_weights():
    sizes = PRESETS["tiny"].changed(normalize_codes=True, quantizer_levels=2)
    assert Preset.from_tensor(sizes.to_tensor()) == sizes


@pytest.mark.parametrize("option", OPTIONS)
def test_a_tiny_network_learns_with_it(option, generator):
    torch.manual_seed(0)
    network = make_vqvae(
        "tiny",
        resolution=16,
        widths=(8, 8, 8),
        model_channels=16,
        num_embeddings=4,
        num_blocks=1,
        windows=["lung"],
        **OPTIONS[option],
    )
    grid = torch.stack(torch.meshgrid(*[torch.arange(16)] * 3, indexing="ij"), -1).reshape(-1, 3)
    coords = F.pad(grid, (1, 0))
    value = torch.where(grid[:, 0] < 8, -0.6, 0.7)[:, None]
    x = SparseTensor(value.float(), coords, (16, 16, 16), 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    loss_function, losses = TokenizerLoss(loss_type="l1"), []
    network.train()
    for step in range(25):
        terms = loss_function(network(x), x)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        network.vq.update(generator=torch.Generator().manual_seed(step))
        losses.append(float(terms["recon"].detach()))
    assert min(losses[-5:]) < 0.6 * losses[0], losses
    tokens = network.eval().encode(x)
    assert tokens.codes.shape[0] == 8
    with torch.no_grad():
        assert float((network.decode(tokens).feats.mean() - x.feats.mean()).abs()) < 1.0
