"""Each dictionary transform gives what its array twin gives, and the random ones give it again for the same seed."""

import json
import math

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose

import transforms
from transforms import RandCropToBudgetd, RandJitterd, RandTranslated, Resampled, Sparsifyd, Windowsd, grid, tensor
from transforms.acquisition import acquire
from transforms.crops import crop_to_budget, translate
from transforms.pose import repose
from transforms.sparse import KEEPS, keep_mask, sparsify, sparsify_masks
from transforms.structures import add_structures
from transforms.windows import WINDOWS, window_bounds, window_values


@pytest.fixture
def item(rng) -> dict:
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    hu = np.full((24, 24, 24), -1000, np.int16)
    hu[4:20, 4:20, 4:20] = rng.integers(-200, 400, (16, 16, 16))
    return {"image": hu, "affine": affine}


@pytest.fixture
def kept(item) -> dict:
    return Sparsifyd("image")(item)


def test_resampled(item):
    out = Resampled("image", spacing=6.0, grid=16)(item)
    onto = grid.centred_grid((24, 24, 24), item["affine"], 16, 6.0)
    twin = grid.resample(item["image"], item["affine"], onto)
    assert np.array_equal(out["image"], twin.array) and out["image"].dtype == np.int16
    assert np.array_equal(out["affine"], twin.affine) and out["beyond"] == 0
    assert item["image"].shape == (24, 24, 24)  # the input is left alone
    cut = Resampled("image", spacing=2.0, grid=16)(item)
    onto = grid.centred_grid((24, 24, 24), item["affine"], 16, 2.0)
    assert cut["beyond"] == grid.share_beyond(item["image"], item["affine"], onto) > 0.5


def test_resampled_without_geometry_fills_the_grid(item):
    out = Resampled("image", spacing=6.0, grid=12)({"image": item["image"], "affine": None})
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    twin = grid.resample(item["image"], affine, grid.centred_grid((24, 24, 24), affine, 12, 6.0))
    assert np.array_equal(out["image"], twin.array)


def test_resampled_keeps_shares_of_masks(item):
    masks = np.stack([item["image"] > 0, item["image"] > -900], -1)
    out = Resampled("image", spacing=6.0, grid=16)({**item, "image": masks})
    onto = grid.centred_grid((24, 24, 24), item["affine"], 16, 6.0)
    for channel in range(2):
        share = masks[..., channel].astype(np.float32)
        twin = grid.resample(share, item["affine"], onto, outside=0, dtype=np.float32)
        assert np.array_equal(out["image"][..., channel], twin.array)
    assert ((out["image"] > 0.1) & (out["image"] < 0.9)).mean() > 0.01


@pytest.mark.parametrize("keep", KEEPS)
def test_sparsifyd(item, keep):
    out = Sparsifyd("image", keep=keep, windows=["soft_tissue"])(item)
    mask = keep_mask(item["image"], keep, windows=["soft_tissue"], spacing=4.0)
    coords, values = sparsify(item["image"], mask)
    assert np.array_equal(out["coords"], coords) and np.array_equal(out["values"], values)
    assert out["spatial_shape"] == (24, 24, 24) and "image" not in out


def test_sparsifyd_turns_masks_into_bands(item):
    masks = np.stack([item["image"] > 0, item["image"] > -900], -1)
    out = Sparsifyd("image")({**item, "image": masks})
    coords, values = sparsify_masks(masks)
    assert np.array_equal(out["coords"], coords) and np.array_equal(out["values"], values)
    assert values.shape[1] == 2


CHANGES = {"sharper": {"sharpness": 0.8}, "thicker slices": {"slice_blur": 0.6}, "grain": {"grain": 30.0}}


@pytest.mark.parametrize("name", CHANGES)
def test_acquisition_draws_from_its_seed_what_its_twin_does(kept, name):
    change = transforms.RandAcquisitiond(**CHANGES[name])
    first, second = (change.set_random_state(seed=3)(kept)["values"] for _ in range(2))
    other = change.set_random_state(seed=4)(kept)["values"]
    assert np.array_equal(first, second) and not np.array_equal(first, other)
    draw = np.random.RandomState(3)
    draw.rand()  # whether to do it at all
    drawn = {
        "sharpness": draw.uniform(-change.sharpness, change.sharpness),
        "slice_blur": draw.uniform(0, change.slice_blur),
        "grain": draw.uniform(0, change.grain),
    }
    twin = acquire(
        kept["values"], kept["coords"], **drawn, generator=np.random.default_rng(draw.randint(2**32, dtype=np.uint32))
    )
    assert np.array_equal(first, twin)


def test_acquisition_left_at_zero_leaves_values_alone(kept):
    assert transforms.RandAcquisitiond()(kept)["values"] is kept["values"]
    with pytest.raises(ValueError, match=r"sharpness and slice_blur must lie in 0..1 .*, got 1.5, 0.0 and 0.0"):
        transforms.RandAcquisitiond(sharpness=1.5)


def test_a_pose_draws_from_its_seed_what_its_twin_does(kept):
    change = transforms.RandAffined(max_rotation=10, max_scale=0.1)
    first, second = (change.set_random_state(seed=3)(kept) for _ in range(2))
    other = change.set_random_state(seed=4)(kept)
    draw = np.random.RandomState(3)
    draw.rand()  # whether to do it at all
    drawn = {"angles": draw.uniform(-10, 10, 3).tolist(), "scale": 1 + draw.uniform(-0.1, 0.1)}
    values, coords = repose(kept["values"], kept["coords"], **drawn, shape=kept["spatial_shape"])
    for item in (first, second):
        assert np.array_equal(item["values"], values) and np.array_equal(item["coords"], coords)
    assert len(other["values"]) == len(other["coords"]) and not np.array_equal(other["values"], values)


def test_a_pose_left_at_zero_and_bands_stay_as_they_are(kept):
    assert transforms.RandAffined()(kept)["coords"] is kept["coords"]
    bands = {**kept, "values": np.zeros((len(kept["coords"]), 2), np.float32)}
    assert transforms.RandAffined(max_rotation=10)(bands)["coords"] is kept["coords"]
    with pytest.raises(ValueError, match=r"max_rotation must lie in 0..45 degrees and max_scale in 0..0.5, got 50 and"):
        transforms.RandAffined(max_rotation=50)


def test_structures_draw_from_their_seed_what_their_twin_does(kept):
    change = transforms.RandStructuresd(number=20, spacing=2.0)
    first, second = (change.set_random_state(seed=3)(kept)["values"] for _ in range(2))
    other = change.set_random_state(seed=4)(kept)["values"]
    assert np.array_equal(first, second) and not np.array_equal(first, other)
    draw = np.random.RandomState(3)
    draw.rand()  # whether to do it at all
    generator = np.random.default_rng(draw.randint(2**32, dtype=np.uint32))
    twin = add_structures(kept["values"], kept["coords"], number=20, spacing=2.0, generator=generator)
    assert np.array_equal(first, twin) and not np.array_equal(first, kept["values"])


def test_structures_left_at_zero_leave_values_alone(kept):
    assert transforms.RandStructuresd()(kept)["values"] is kept["values"]
    with pytest.raises(ValueError, match="structures must be a whole number from 0 on, got -1"):
        transforms.RandStructuresd(number=-1)


def test_windowsd(kept):
    out = Windowsd("values", windows=["lung", "brain"])(kept)
    assert np.array_equal(out["feats"], window_values(kept["values"], ["lung", "brain"]))
    bands = {"values": np.array([[0.5, -1.0]])}
    assert Windowsd("values")(bands)["feats"].tolist() == [[0.5, -1.0]]
    on_tensor = Windowsd("values", windows=["lung", "brain"])({"values": torch.from_numpy(kept["values"])})["feats"]
    assert np.array_equal(on_tensor.numpy(), out["feats"]) and on_tensor.dtype == torch.float32
    assert Windowsd("values")({"values": torch.tensor([[0.5, -1.0]])})["feats"].tolist() == [[0.5, -1.0]]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_windows_on_tensors_are_the_same_to_the_last_bit(rng, dtype, device):
    names = list(WINDOWS)
    ends = [bound + step for name in names for bound in window_bounds(name) for step in (-1, 0, 1)]
    hu = np.concatenate([ends, [-32768, -1024, 0, 32767], rng.uniform(-1500, 3500, 20_000)]).astype(dtype)
    for shaped in (hu, hu[: len(hu) // 6 * 6].reshape(2, 3, -1)):
        got = tensor.window_values(torch.from_numpy(shaped).to(device), names)
        assert got.dtype == torch.float32 and got.device.type == device
        assert np.array_equal(got.cpu().numpy().view(np.int32), window_values(shaped, names).view(np.int32))


def test_rand_crop_to_budget(kept):
    transform = RandCropToBudgetd(max_points=1000)
    out = transform.set_random_state(seed=3)(kept)
    center = kept["coords"][np.random.RandomState(3).randint(len(kept["coords"]))]
    _, rows = crop_to_budget(kept["coords"], 1000, center=center)
    assert 0 < len(rows) < len(kept["coords"])
    assert np.array_equal(out["coords"], kept["coords"][rows])
    assert np.array_equal(out["values"], kept["values"][rows])


def test_rand_translated(kept):
    out = RandTranslated(max_shift=0.2).set_random_state(seed=5)(kept)
    shift = out["coords"][0].astype(int) - kept["coords"][0]
    assert shift.any() and np.abs(shift).max() <= 0.2 * max(kept["spatial_shape"])
    assert np.array_equal(out["coords"], translate(kept["coords"], shift, kept["spatial_shape"]))


def test_rand_jitter(kept):
    out = RandJitterd(scale=0.1, offset=0, noise=0).set_random_state(seed=5)(kept)
    stretch = (out["values"] + 1000) / np.maximum(kept["values"].astype(np.float32) + 1000, 1)
    inside = kept["values"] > -900
    assert np.ptp(stretch[inside]) < 1e-3 and 0.9 < stretch[inside][0] < 1.1 and stretch[inside][0] != 1
    noisy = RandJitterd(scale=0, offset=0, noise=10).set_random_state(seed=5)(kept)["values"] - kept["values"]
    assert 0 < noisy.std() < 10 and abs(noisy.mean()) < 1


@pytest.mark.parametrize(("max_shift", "reach"), [(0, 0), (0.084, 4), (0.25, 12), (0.01, 0)])
def test_samples_are_moved_by_a_share_of_the_grid(max_shift, reach):
    item = {"coords": np.full((1, 3), 24, np.int16), "spatial_shape": (48, 48, 48)}
    move = RandTranslated(max_shift=max_shift).set_random_state(seed=0)
    places = np.stack([move(item)["coords"][0] for _ in range(400)]) - 24
    assert (places.min(), places.max()) == (-reach, reach)


def test_samples_are_moved_by_nothing_else():
    for shift in (-2, -0.5, 1, 1.5, 4, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"max_shift must be a share of the grid's side, from 0 to below 1, got"):
            RandTranslated(max_shift=shift)


@pytest.mark.parametrize("transform", [RandCropToBudgetd(max_points=1000), RandTranslated(), RandJitterd()])
def test_the_same_seed_gives_the_same_sample(kept, transform):
    draws = [transform.set_random_state(seed=seed)(kept) for seed in (1, 1, 2)]
    same = [all(np.array_equal(draws[0][key], d[key]) for key in ("coords", "values")) for d in draws]
    assert same == [True, True, False]


def test_there_is_no_flip_and_no_axis_swap():
    assert not [name for name in transforms.__all__ if "flip" in name.lower() or "rot" in name.lower()]


def test_a_json_reader_can_list_them_one_by_one(item, tmp_path):
    config = {
        "windows": ["lung", "bone"],
        "chain": [
            {"_target_": "transforms.Resampled", "keys": "image", "spacing": 8, "grid": 12},
            {"_target_": "transforms.Sparsifyd", "keys": "image", "keep": "body", "windows": "@windows"},
            {"_target_": "transforms.RandTranslated"},
            {"_target_": "transforms.RandJitterd"},
            {"_target_": "transforms.RandCropToBudgetd", "max_points": 1000},
            {"_target_": "transforms.Windowsd", "keys": "values", "windows": "@windows"},
        ],
    }
    parser = ConfigParser(json.loads(json.dumps(config)))
    out = Compose(parser.get_parsed_content("chain"))(item)
    assert out["feats"].shape == (len(out["coords"]), 2) and len(out["coords"]) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sparsifyd("image", keep="all"), "keep must be one of"),
        (lambda: Windowsd("values", windows=["lungs"]), "window must be one of"),
    ],
)
def test_a_wrong_name_is_said_when_it_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()
