"""Shapes as samples: one resolution a step, positions that span the same range, edges that count more."""

import numpy as np
import pytest
import torch

from app.shapes.bands import check_surface, mesh_affine, shape_of
from app.shapes.mesh_files import Mesh
from app.shapes.shape_files import Provenance, write_shape
from app.shared.refusals import Refused
from app.training.loaders import collate
from app.training.shape_data import find_shapes, make_shape_dataset
from app.training.step import SparseBatch, row_weights
from networks import make_vqvae
from networks.losses import TokenizerLoss
from networks.sparse import SparseTensor
from tests.solids import box
from transforms import RandCropToBudgetd, RandTranslated, Windowsd


@pytest.fixture
def folder(tmp_path):
    for name, half in {"a": (3, 2, 1), "b": (2, 2, 2), "c": (1, 3, 2)}.items():
        surface = check_surface(Mesh(*box(half)))
        for side in (32, 16):
            grid = mesh_affine(surface.mesh, side)
            write_shape(
                tmp_path / f"{name}_r{side}.npz",
                shape_of(surface, grid, resolution=side, sharp_degrees=30),
                Provenance(),
            )
    (tmp_path / "metadata.csv").write_text("case_id,patient,split\na,a,train\nb,b,train\nc,c,val\n")
    return tmp_path


def test_all_samples_of_a_step_have_one_resolution_and_it_is_drawn_anew(folder):
    made = make_shape_dataset(folder, split="train", resolution=32, factors=[1, 2])
    sides = [{made[step, number]["spatial_shape"] for number in (0, 1)} for step in range(12)]
    assert all(len(of_step) == 1 for of_step in sides)
    assert {side for of_step in sides for side in of_step} == {(32,) * 3, (16,) * 3}
    again = make_shape_dataset(folder, split="train", resolution=32, factors=[1, 2])
    assert [again[step, 0]["spatial_shape"] for step in range(12)] == [
        made[step, 0]["spatial_shape"] for step in range(12)
    ]
    assert make_shape_dataset(folder, split="val", resolution=32, factors=[1, 2])[3, 0]["spatial_shape"] == (32,) * 3


def test_a_coarser_grid_is_told_apart_by_positions_of_the_same_range():
    torch.manual_seed(0)
    network = make_vqvae("tiny", resolution=64, features="sdf", windows=[], num_blocks=1).eval()
    seen = []
    network.encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].feats))
    for side in (64, 32):
        coords = torch.tensor([[0, side - 1, 0, side // 2]])
        with torch.no_grad():
            network.encoder(SparseTensor(torch.zeros(1, 1), coords, (side,) * 3, 1))
    moved = (seen[0] - seen[1]).abs()  # the last latent of 8 is at 7, that of 4 at 3, counted double: 6
    assert moved.max() > 0.1
    with torch.no_grad():
        network.encoder(SparseTensor(torch.zeros(1, 1), torch.tensor([[0, 55, 0, 32]]), (64,) * 3, 1))
    assert torch.allclose(
        seen[2], seen[1], atol=1e-6
    )  # latent 6 of the fine grid is where latent 3 of the coarse one is


def test_sharp_edges_count_as_much_more_as_is_said(folder):
    sampling = [RandTranslated("coords", max_shift=1 / 16), RandCropToBudgetd(max_points=4000)]
    made = make_shape_dataset(folder, split="train", resolution=32, sampling=sampling, sharp_weight=3.0)
    batch = collate([made[0, 0], made[0, 1]])
    x = SparseBatch(Windowsd())(batch, torch.device("cpu"))
    weights = row_weights(batch, x)
    assert x.feats.shape[1] == 1 and set(weights.tolist()) == {1.0, 4.0}
    plain = make_shape_dataset(folder, split="train", resolution=32, sampling=sampling)
    assert "weights" not in plain[0, 0] and torch.equal(plain[0, 0]["values"], made[0, 0]["values"])
    loss = TokenizerLoss(loss_type="l1")
    wrong = x.replace(x.feats + 0.5)
    flat, heavy = (float(loss.reconstruction(wrong, x, row_weights=w)) for w in (None, weights))
    share = torch.stack([part.mean() for part in weights.split(x.level.sample_sizes)]).mean()
    assert flat == pytest.approx(0.5, abs=1e-6) and heavy == pytest.approx(0.5 * float(share), abs=1e-6)


def test_what_cannot_be_trained_on_is_named(folder):
    with pytest.raises(
        Refused, match=r"no shape with files _r64.npz\. Run `python -m app sdf SOURCE .* --resolution 64`"
    ):
        find_shapes(folder, resolution=64)
    with pytest.raises(ValueError, match=r"resolution / factor must be a multiple of 8, got 32 / 3"):
        make_shape_dataset(folder, split="train", resolution=32, factors=[1, 3])
    surface = check_surface(Mesh(*box((1, 1, 1))), unsigned=True)
    unsigned = shape_of(surface, mesh_affine(surface.mesh, 32), resolution=32)
    write_shape(folder / "a_r32.npz", unsigned, Provenance())
    with pytest.raises(Refused, match=r"a_r32\.npz is unsigned"):
        make_shape_dataset(folder, split="train", resolution=32)[0, 0]
    with pytest.raises(Refused, match=r"b_r32\.npz marks no sharp edges"):
        write_shape(folder / "b_r32.npz", unsigned._replace(sign="parity"), Provenance())
        made = make_shape_dataset(folder, split="train", resolution=32, sharp_weight=1.0)
        made[0, 1]


def test_a_shape_keeps_its_rows_through_the_cache(folder):
    made = make_shape_dataset(folder, split="train", resolution=32)
    first, second = made[0, 0], made[5, 0]
    assert torch.equal(first["values"], second["values"]) and np.array_equal(first["coords"], second["coords"])
