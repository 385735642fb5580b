"""Losses: means of samples, independence of how a batch is split, voxels matched by key."""

import pytest
import torch

from networks.losses import TokenizerLoss, kl_divergence, mean_of_samples, reconstruction, subdivision
from networks.sparse import SparseTensor
from networks.vqvae import Reconstruction

SHAPE = (6, 6, 6)


def cells(count, generator, sample=0):
    rows = torch.randperm(216, generator=generator)[:count]
    return torch.stack([torch.full_like(rows, sample), rows // 36, rows // 6 % 6, rows % 6], 1)


def batch(sizes, generator, channels=2):
    coords = torch.cat([cells(n, generator, b) for b, n in enumerate(sizes)])
    return SparseTensor(torch.randn(len(coords), channels, generator=generator), coords, SHAPE, len(sizes))


def test_a_sample_counts_once_whatever_its_size(generator):
    x = batch((3, 100, 0, 17), generator)
    values = torch.rand(120, generator=generator)
    parts = values.split(x.level.sample_sizes)
    expected = sum(part.mean() for part in parts if len(part)) / 3
    assert mean_of_samples(values, x.level) == pytest.approx(expected.item())


def test_nothing_at_all_gives_zero(generator):
    x = batch((0, 0), generator)
    assert mean_of_samples(torch.zeros(0), x.level) == 0


@pytest.mark.parametrize(
    ("loss_type", "formula"),
    [
        ("l1", lambda d: d.abs()),
        ("l2", lambda d: d**2),
        ("mse", lambda d: d**2),
        ("l1_l2", lambda d: 0.5 * d.abs() + 0.5 * d**2),
    ],
)
def test_reconstruction_follows_its_formula(loss_type, formula, generator):
    x = batch((40, 9), generator)
    recon = x.replace(torch.randn(49, 2, generator=generator))
    per_voxel = formula(recon.feats - x.feats).mean(1)
    expected = (per_voxel[x.coords[:, 0] == 0].mean() + per_voxel[x.coords[:, 0] == 1].mean()) / 2
    assert reconstruction(recon, x, loss_type=loss_type) == pytest.approx(expected.item(), rel=1e-6)


def test_voxels_are_matched_by_key_not_by_row(generator):
    x = batch((40, 9), generator)
    extra = torch.cat([x.coords, torch.tensor([[0, 5, 5, 5], [1, 0, 0, 0]])]).unique(dim=0)
    values = torch.full((len(extra), 2), 99.0)
    grown = SparseTensor(values, extra, SHAPE, 2)
    row_of = {tuple(c): i for i, c in enumerate(grown.coords.tolist())}
    for row, coord in zip(x.feats, x.coords.tolist(), strict=True):
        grown.feats[row_of[tuple(coord)]] = row + 0.5
    assert reconstruction(grown, x) == pytest.approx(0.5, rel=1e-5)  # what was decoded beyond is not judged
    with pytest.raises(ValueError, match=r"\d+ of \d+ target voxels were not decoded"):
        reconstruction(x, grown)


def test_unknown_kinds_are_refused(generator):
    x = batch((5,), generator)
    with pytest.raises(ValueError, match="loss_type must be one of l1, l2, mse, l1_l2, got 'huber'"):
        reconstruction(x, x, loss_type="huber")
    with pytest.raises(ValueError, match="loss_type must be one of"):
        TokenizerLoss(loss_type="huber")


def test_kl_is_zero_for_a_unit_normal_and_its_formula_else(generator):
    x = batch((12,), generator)
    mean, log_var = torch.randn(2, 12, 4, generator=generator)
    normal = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    truth = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    assert kl_divergence(mean, log_var, x.level) == pytest.approx(truth.item(), rel=1e-5)
    assert kl_divergence(torch.zeros(12, 4), torch.zeros(12, 4), x.level) == 0


def test_subdivision_is_cross_entropy_over_eight_children(generator):
    x = batch((10, 4), generator)
    logits, occupied = torch.randn(14, 8, generator=generator), torch.rand(14, 8, generator=generator) > 0.5
    p = logits.sigmoid()
    cost = -(occupied * p.log() + ~occupied * (1 - p).log()).mean(1)
    expected = (cost[x.coords[:, 0] == 0].mean() + cost[x.coords[:, 0] == 1].mean()) / 2
    assert subdivision(logits, occupied, x.level) == pytest.approx(expected.item(), rel=1e-5)


def outcome(x, generator):
    zero = torch.zeros(())
    recon = x.replace(torch.randn(len(x), 2, generator=generator).requires_grad_())
    vq, commitment = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    return Reconstruction(recon, None, x, vq, commitment, zero, torch.tensor(5.0, requires_grad=True))


def test_the_sum_weighs_what_has_a_gradient(generator):
    x = batch((20,), generator)
    loss = TokenizerLoss(lambda_vq=1.0, lambda_commitment=0.25, lambda_kl=7.0, lambda_subdivision=0.1)
    terms = loss(outcome(x, generator), x)
    assert terms["loss"].item() == pytest.approx(terms["recon"].item() + 2.0 + 0.75 + 0.5, rel=1e-6)
    terms["loss"].backward()
    frozen = outcome(x, generator)._replace(vq=torch.tensor(2.0), commitment=torch.tensor(3.0))
    terms = loss(frozen, x)
    assert terms["loss"].item() == pytest.approx(terms["recon"].item() + 0.5, rel=1e-6)
    assert terms["vq"] == 2.0  # reported all the same


@pytest.mark.parametrize("loss_type", ["l1", "l1_l2"])
def test_squares_are_added_as_often_as_said(loss_type, generator):
    x = batch((20,), generator)
    made = x.replace(torch.randn(20, 2, generator=generator))
    plain, squares = (reconstruction(made, x, loss_type=name).item() for name in (loss_type, "l2"))
    for times in (0.0, 8.0):
        loss = TokenizerLoss(loss_type=loss_type, lambda_l2=times)
        assert loss.reconstruction(made, x).item() == pytest.approx(plain + times * squares, rel=1e-5)


@pytest.mark.parametrize("split", [(1, 3), (2, 2), (1, 1, 1, 1), (3, 1)])
def test_the_loss_of_a_batch_is_that_of_any_split(split, generator, assert_close):
    x = batch((50, 3, 90, 17), generator)
    recon = torch.randn(160, 2, generator=generator)
    whole = reconstruction(x.replace(recon), x, loss_type="l1_l2")
    total, first = 0.0, 0
    for count in split:
        rows = (x.coords[:, 0] >= first) & (x.coords[:, 0] < first + count)
        coords = x.coords[rows].clone()
        coords[:, 0] -= first
        part = SparseTensor(x.feats[rows], coords, SHAPE, count)
        total = total + reconstruction(part.replace(recon[rows]), part, loss_type="l1_l2") * count / 4
        first += count
    assert_close(total, whole)
