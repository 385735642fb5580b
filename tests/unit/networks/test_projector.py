"""The projector: plain `proj.*` weights, any depth, a fixed place for each token."""

import pytest
import torch
from torch import nn

from networks.projector import Projector, encode_positions


def test_one_layer_is_a_plain_linear():
    projector = Projector(8, 12)
    assert sorted(projector.state_dict()) == ["proj.bias", "proj.weight"]
    feats = torch.randn(5, 8)
    expected = feats @ projector.state_dict()["proj.weight"].T + projector.state_dict()["proj.bias"]
    torch.testing.assert_close(projector(feats), expected)


def test_three_layers_load_plain_sequential_weights():
    other = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 12))
    projector = Projector(8, 12, num_layers=3)
    projector.load_state_dict({f"proj.{name}": value for name, value in other.state_dict().items()})
    feats = torch.randn(5, 8)
    torch.testing.assert_close(projector(feats), other(feats))


def nearest(code: torch.Tensor) -> float:
    """Distance of the two places that are most alike."""
    return float(torch.cdist(code, code).fill_diagonal_(torch.inf).min())


def test_position_encoding_uses_the_grid_it_is_for():
    """On a small grid slow waves would say nothing: nearly the same everywhere."""
    axes = torch.arange(6)
    coords = torch.cartesian_prod(axes, axes, axes).int()
    fitted, slow = (encode_positions(coords, 64, grid=grid) for grid in (6, 128))
    silent = [int((code.std(0)[:60] < 0.1).sum()) for code in (fitted, slow)]
    assert silent == [3, 21]  # three are the sine of the fastest wave, whose zeros are the cells
    assert nearest(fitted) > 1.4 * nearest(slow)


def test_position_encoding_tells_all_cells_apart_and_adds_no_weights():
    axes = torch.arange(0, 64, 9)
    coords = torch.cartesian_prod(axes, axes, axes).int()
    code = encode_positions(coords, 64)
    assert nearest(code) > 0.5
    projector = Projector(4, 64, use_3d_pos=True, position_scale=0.1)
    assert sorted(projector.state_dict()) == ["proj.bias", "proj.weight"]
    feats = torch.randn(len(coords), 4)
    torch.testing.assert_close(projector(feats, coords), projector.proj(feats) + 0.1 * code)


def test_scale_is_matched_to_the_embeddings():
    projector = Projector(8, 32, num_layers=2)
    feats = torch.randn(500, 8) * 7 + 3
    projector.match_scale(feats, 0.02)
    embeds = projector(feats)
    assert embeds.std().item() == pytest.approx(0.02, rel=0.01)
    assert embeds.mean(0).abs().max() < 1e-5


def test_wrong_calls_are_named():
    with pytest.raises(ValueError, match="reads features of width 8, got 16"):
        Projector(8, 12)(torch.zeros(2, 16))
    with pytest.raises(ValueError, match="needs the coordinates"):
        Projector(8, 12, use_3d_pos=True)(torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"lie in 1\.\.64, got 0"):
        Projector(8, 12, num_layers=0)
