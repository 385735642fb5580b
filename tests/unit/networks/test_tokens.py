"""Order and reduction of token sequences: the whole field of view survives at any budget."""

import pytest
import torch

from networks.tokens import REDUCTIONS, reduce_tokens


def random_volume(num_tokens: int, grid: int, width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct random cells of a cubic grid, in random row order."""
    generator = torch.Generator().manual_seed(num_tokens)
    cells = torch.randperm(grid**3, generator=generator)[:num_tokens]
    coords = torch.stack([cells // grid**2, cells // grid % grid, cells % grid], 1).int()
    return torch.randn(num_tokens, width, generator=generator), coords


def interleave(x: int, y: int, z: int) -> int:
    """Morton key, x highest, bit by bit."""
    return sum(((x >> b & 1) << 2 | (y >> b & 1) << 1 | (z >> b & 1)) << 3 * b for b in range(8))


def test_short_sequences_are_only_ordered_along_the_morton_curve():
    feats, coords = random_volume(50, 16)
    sequence = reduce_tokens(feats, coords, max_tokens=50)
    keys = [interleave(*row) for row in sequence.coords.tolist()]
    assert keys == sorted(interleave(*row) for row in coords.tolist())
    rows = [coords.tolist().index(row) for row in sequence.coords.tolist()]
    assert torch.equal(sequence.feats, feats[rows])


@pytest.mark.parametrize("method", ["pool", "merge"])
@pytest.mark.parametrize("budget", [1, 7, 64, 512, 999])
def test_averaging_keeps_every_token_and_meets_the_budget(method, budget):
    feats, coords = random_volume(1000, 32)
    sequence = reduce_tokens(feats, coords, max_tokens=budget, method=method)
    assert budget * 0.97 - 7 <= len(sequence.feats) <= budget  # a cell saves at most 7 rows more than asked
    assert sequence.weights.sum() == 1000
    total = (sequence.feats * sequence.weights[:, None]).sum(0)
    torch.testing.assert_close(total, feats.sum(0), atol=1e-3, rtol=1e-4)
    assert len(sequence.coords.unique(dim=0)) == len(sequence.coords)


@pytest.mark.parametrize("method", REDUCTIONS)
def test_row_order_of_the_input_does_not_matter(method):
    feats, coords = random_volume(300, 16)
    shuffle = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    one = reduce_tokens(feats, coords, max_tokens=40, method=method)
    other = reduce_tokens(feats[shuffle], coords[shuffle], max_tokens=40, method=method)
    assert torch.equal(one.coords, other.coords)
    torch.testing.assert_close(one.feats, other.feats)


def region_share(coords: torch.Tensor, kept: torch.Tensor, *, edge: int = 8) -> float:
    """Share of the occupied cubes of `edge` cells in which at least one kept row lies."""
    occupied, reached = ({tuple(cube) for cube in (rows // edge).tolist()} for rows in (coords, kept))
    return len(occupied & reached) / len(occupied)


@pytest.mark.parametrize(("budget", "share"), [(2048, 1.0), (512, 1.0), (64, 0.125)])
def test_ten_thousand_tokens_keep_the_field_of_view(budget, share):
    """512 occupied regions of 8 cells: with a token for each, all are still there; 64 tokens reach 64 of them."""
    feats, coords = random_volume(10_000, 64)
    assert region_share(coords, reduce_tokens(feats, coords, max_tokens=budget).coords) == pytest.approx(share)
    cut = reduce_tokens(feats, coords, max_tokens=budget, method="truncate")
    assert region_share(coords, cut.coords) <= share / 2


def test_no_side_of_a_filled_volume_is_coarser():
    """A full 16-cube to 1000 rows: every eighth of it keeps about an eighth of them."""
    axes = torch.arange(16)
    coords = torch.cartesian_prod(axes, axes, axes).int()
    kept = reduce_tokens(torch.zeros(4096, 2), coords, max_tokens=1000).coords
    per_octant = torch.bincount((kept // 8 * torch.tensor([4, 2, 1])).sum(1), minlength=8)
    assert per_octant.min() >= 120 and per_octant.max() <= 130


def test_merge_keeps_detail_where_features_vary():
    axes = torch.arange(8)
    coords = torch.cartesian_prod(axes, axes, axes).int()
    feats = torch.zeros(512, 1)
    busy = coords[:, 0] < 4
    feats[busy, 0] = torch.randn(256, generator=torch.Generator().manual_seed(0))
    kept = reduce_tokens(feats, coords, max_tokens=300, method="merge")
    assert (kept.coords[:, 0] < 4).sum() >= 250


def test_farthest_points_spread_and_truncation_takes_the_lowest_slices():
    feats, coords = random_volume(2000, 32)
    spread = reduce_tokens(feats, coords, max_tokens=64, method="fps").coords
    distance = torch.cdist(spread.float(), spread.float()).fill_diagonal_(torch.inf).min()
    assert distance > 4
    low = reduce_tokens(feats, coords, max_tokens=64, method="truncate").coords
    assert low[:, 2].max() <= coords[:, 2].sort().values[64]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "mean"}, "token_reduction must be one of pool, merge, fps, truncate, got mean"),
        ({"max_tokens": 0}, "max_3d_tokens must be at least 1, got 0"),
        ({"coords": torch.tensor([[0, 0, -1]] * 3)}, "token coords must lie in"),
    ],
)
def test_wrong_calls_are_named(change, message):
    call = {"feats": torch.zeros(3, 2), "coords": torch.arange(9).view(3, 3)} | change
    with pytest.raises(ValueError, match=message):
        reduce_tokens(**call)
