"""Samples: the same for (seed, step, case) whatever the workers, the start or the cache; whole when validated."""

import json
import logging
import pickle

import numpy as np
import pytest
import torch

from app.dataset import prepared, writer
from app.shared.places import bundles_folder
from app.shared.refusals import Refused
from app.training.data import CTDataset, make_dataset, preprocessing
from app.training.loaders import StepSampler, collate, make_train_loader, make_val_loader
from app.training.step import SparseBatch
from app.training.voxel_runs import coords_of, num_voxels
from tests.sample_data import NAMES, SETTINGS, blob, drawn, make, same
from transforms import RandAffined, RandJitterd, Resampled, Sparsifyd, Windowsd, grid
from transforms.body import body_mask
from transforms.runs import Runs
from transforms.sparse import sparsify
from transforms.windows import WINDOWS, window, window_file_name, window_values


def on_device(batch: dict, windows=NAMES):
    return SparseBatch(Windowsd(windows=windows))(batch, torch.device("cpu"))


def test_a_sample_is_resampling_and_sparsification_of_the_case_in_hu(dataset_dir):
    item = make(dataset_dir, split="val")[1]
    case = prepared.open_case(dataset_dir / "processed" / "case6")
    volume = grid.resample(case.hu(), case.affine, grid.centred_grid(case.shape, case.affine, 16, 8.0))
    hu = volume.array
    coords, values = sparsify(hu, body_mask(hu, spacing=8.0))
    assert np.array_equal(item["coords"], coords) and item["coords"].dtype == np.int16
    assert (
        np.array_equal(item["values"], values) and item["values"].dtype == torch.int16
    )  # without jitter they are whole
    assert np.array_equal(item["affine"], volume.affine)
    assert item["case_id"] == "case6" and item["spatial_shape"] == (16, 16, 16)


def test_a_batch_is_what_the_network_takes(dataset_dir):
    dataset = make(dataset_dir)
    items = [dataset[(0, n)] for n in range(3)]
    batch = collate(items)
    coords = coords_of(batch)
    assert batch["values"].dtype == torch.int16 and coords.dtype == torch.int16
    assert batch["batch_size"] == 3 and batch["spatial_shape"] == (16, 16, 16)
    assert batch["case_id"] == ["case0", "case1", "case2"]
    for number, item in enumerate(items):
        rows = coords[:, 0] == number
        assert np.array_equal(coords[rows, 1:], item["coords"])
        assert torch.equal(batch["values"][rows], item["values"])
    x = on_device(batch)
    order = [tuple(row) for row in coords.tolist()]
    place = [order.index(tuple(row)) for row in x.coords.tolist()]
    assert x.coords.dtype == torch.int32 and x.batch_size == 3 and x.spatial_shape == (16, 16, 16)
    assert np.array_equal(x.feats, window_values(batch["values"].numpy(), NAMES)[place])


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_voxel_of_a_scan_travels_in_few_bytes(dataset_dir, split):
    """Workers are held up by memory, so what only repeats HU stays out of a batch."""
    batch = collate([make(dataset_dir, split=split)[n] for n in range(2)])
    total = sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor))
    assert (total - batch["affine"].nbytes) / num_voxels(
        batch
    ) <= 5.5  # cells of 16 a side have short runs; a body takes 2.3


def test_drawn_hu_are_whole_and_never_wrap(dataset_dir):
    metal = make_dataset(dataset_dir, split="train", preprocessing=preprocessing(**SETTINGS), sampling=[_as_metal])
    assert metal[(0, 0)]["values"].dtype == torch.int16 and int(metal[(0, 0)]["values"].max()) == 32_767
    jittered = make_dataset(
        dataset_dir, split="train", preprocessing=preprocessing(**SETTINGS), sampling=[RandJitterd()]
    )
    plain = make_dataset(dataset_dir, split="train", preprocessing=preprocessing(**SETTINGS))
    off = (jittered[(3, 1)]["values"].float() - plain[(3, 1)]["values"].float()).abs()
    assert jittered[(3, 1)]["values"].dtype == torch.int16 and 0 < off.mean() < 60


def _as_metal(item):
    every_other = np.arange(len(item["values"])) % 2 == 0
    return item | {"values": np.where(every_other, np.float32(40_000.4), item["values"]).astype(np.float32)}


def test_features_of_ones_own_reach_the_network_as_they_are():
    feats, coords = torch.rand(3, 2), torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0], [1, 7, 7, 7]])
    batch = {"values": feats, "coords": coords, "spatial_shape": (8, 8, 8), "batch_size": 2}
    x = on_device(batch)
    assert torch.equal(x.feats, feats) and torch.equal(x.coords, coords.int())


@pytest.mark.parametrize(("size", "split", "parts"), [(4, 2, [2, 2]), (3, 2, [2, 1]), (2, 4, [1, 1])])
def test_micro_batches_are_split_by_sample(dataset_dir, size, split, parts):
    dataset = make(dataset_dir)
    items = [dataset[(0, n)] for n in range(size)]
    micro = collate(items, batch_split=split)
    assert [part["batch_size"] for part in micro] == parts
    assert [name for part in micro for name in part["case_id"]] == collate(items)["case_id"]
    assert torch.equal(torch.cat([part["values"] for part in micro]), collate(items)["values"])
    assert all(coords_of(part)[:, 0].min() == 0 for part in micro)


def test_samples_of_a_batch_share_a_grid(dataset_dir):
    dataset = make(dataset_dir)
    other = {**dataset[0], "spatial_shape": (8, 8, 8)}
    with pytest.raises(ValueError, match="must share a grid"):
        collate([dataset[0], other])


# ---- randomness is a function of (seed, step, case)


def test_a_sample_depends_on_seed_step_and_case_and_on_nothing_else(dataset_dir):
    dataset = make(dataset_dir)
    first = dataset[(3, 1)]
    dataset[(9, 2)]  # what was drawn before leaves no trace
    torch.manual_seed(1)
    assert same(first, dataset[(3, 1)])
    assert same(first, make(dataset_dir)[(3, 1)])
    assert not same(first, dataset[(4, 1)])
    assert not same(first, make(dataset_dir, seed=1)[(3, 1)])


def batches(root, *, workers: int, start: int = 0) -> list[dict]:
    return list(make_train_loader(make(root), batch_size=2, max_steps=7, start=start, num_workers=workers))


def test_a_spawned_worker_gets_a_dataset_that_gives_the_same_samples(dataset_dir):
    """What spawn does to a dataset: it is pickled. (The forked twin runs below.)"""
    dataset = make(dataset_dir, max_points=600)
    first = dataset[(2, 3)]
    assert same(first, pickle.loads(pickle.dumps(dataset))[(2, 3)])


def test_workers_give_the_batches_of_the_main_process(dataset_dir):
    alone, with_workers = batches(dataset_dir, workers=0), batches(dataset_dir, workers=2)
    assert len(alone) == len(with_workers) == 7
    assert all(same(a, b) for a, b in zip(alone, with_workers, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_starts_later_sees_the_rest_of_the_batches(dataset_dir, workers):
    whole, rest = batches(dataset_dir, workers=0), batches(dataset_dir, workers=workers, start=4)
    assert len(rest) == 3
    assert all(same(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_the_start_can_be_set_on_a_loader_that_exists(dataset_dir):
    loader = make_train_loader(make(dataset_dir), batch_size=2, max_steps=7)
    loader.sampler.start = 5
    assert len(loader) == 2
    assert [b["case_id"] for b in loader] == [b["case_id"] for b in batches(dataset_dir, workers=0)[5:]]


def test_every_epoch_hands_out_every_case_once_in_an_order_of_its_own():
    handed = [index for _, index in StepSampler(5, batch_size=2, max_steps=10, seed=3)]
    epochs = [handed[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert handed != [index for _, index in StepSampler(5, batch_size=2, max_steps=10, seed=4)]


def test_steps_are_counted_and_batched():
    steps = [step for step, _ in StepSampler(5, batch_size=3, max_steps=6, start=4)]
    assert steps == [4, 4, 4, 5, 5, 5]
    assert len(StepSampler(5, batch_size=3, max_steps=6, start=4)) == 6
    assert list(StepSampler(5, batch_size=3, max_steps=6, start=9)) == []


def test_ranks_share_an_epoch_and_together_are_the_one_gpu_run():
    alone = list(StepSampler(7, batch_size=4, max_steps=5, seed=1, rank=0, world=1))
    ranks = [list(StepSampler(7, batch_size=2, max_steps=5, seed=1, rank=r, world=2)) for r in (0, 1)]
    together = [pair for step in range(5) for rank in ranks for pair in rank[2 * step : 2 * step + 2]]
    assert together == alone


# ---- validation is whole and without chance


def test_validation_is_whole_in_order_and_always_the_same(dataset_dir):
    first, second = (list(make_val_loader(make(dataset_dir, split="val"))) for _ in range(2))
    assert [b["case_id"] for b in first] == [["case5"], ["case6"]]
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    dataset = make(dataset_dir, split="val")
    assert [num_voxels(b) for b in first] == [len(dataset.kept_voxels(n)["coords"]) for n in range(2)]


def test_training_crops_fit_their_budget_and_validation_does_not_crop(dataset_dir):
    fine = [Resampled(spacing=4.0, grid=24), Sparsifyd()]
    train = make_dataset(dataset_dir, split="train", preprocessing=fine, sampling=drawn(max_points=600))
    sizes = [len(train[(step, 4)]["coords"]) for step in range(6)]
    assert max(sizes) <= 600 < len(train.kept_voxels(4)["coords"]) and min(sizes) >= 100
    val = make_dataset(dataset_dir, split="val", preprocessing=fine)
    assert num_voxels(next(iter(make_val_loader(val)))) == len(val.kept_voxels(0)["coords"]) > 600


def test_turned_samples_fit_their_budget_and_come_again_for_their_seed(dataset_dir):
    fine = [Resampled(spacing=4.0, grid=24), Sparsifyd()]
    posed = [RandAffined(max_rotation=10, max_scale=0.3), *drawn(max_points=600)]
    one, other = (make_dataset(dataset_dir, split="train", preprocessing=fine, sampling=posed) for _ in range(2))
    assert all(same(one[(step, 4)], other[(step, 4)]) for step in range(4))
    assert all(100 < len(one[(step, 4)]["coords"]) <= 600 for step in range(4))


@pytest.mark.parametrize("stage", ["vae", "vq_stage1", "vq_stage2"])
def test_stages_turn_samples_before_they_crop_them(stage):
    """Larger samples have more voxels: a crop after that keeps the budget."""
    chain = json.loads((bundles_folder() / f"{stage}.json").read_text())["augmentation"]
    names = [entry["_target_"].removeprefix("transforms.") for entry in chain]
    assert names.index("RandAffined") < names.index("RandCropToBudgetd")


# ---- bad input


def test_small_cases_are_skipped_counted_and_said_once(dataset_dir, caplog):
    sizes = [len(make(dataset_dir).kept_voxels(number)["coords"]) for number in range(5)]
    dataset = make(dataset_dir, min_points=int(np.median(sizes)))
    with caplog.at_level(logging.WARNING):
        item = [dataset[(0, 0)] for _ in range(3)][-1]
    assert [record.message.split(":")[0] for record in caplog.records] == ["Skipped case0", "Skipped case1"]
    assert item["case_id"] == "case2" and item["skipped"] == 2  # the next that is large enough stands in
    assert collate([item, dataset[(0, 3)]])["skipped"] == 2
    assert len(make_val_loader(dataset)) == 3


def test_nothing_large_enough_is_one_line_saying_what_to_do(dataset_dir):
    with pytest.raises(ValueError, match=r"every case has fewer than min_points=5000 voxels .*; lower min_points"):
        make(dataset_dir, min_points=5000)[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_constant_features_are_refused(tmp_path, workers):
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    hu = np.full((24, 24, 24), -1000, np.int16)
    hu[4:20, 4:20, 4:20] = 3000
    writer.write_case(tmp_path, "steel", hu, affine=affine, windows=[])
    writer.write_metadata(tmp_path, [])
    cases = prepared.find_cases(tmp_path)
    inner = [Resampled(spacing=4.0, grid=24), Sparsifyd()]
    dataset = CTDataset(cases, preprocessing=inner, windowing=Windowsd(windows=["brain"]))
    with pytest.raises(ValueError, match=r"^case steel has constant features in windows \['brain'\].*choose other"):
        next(iter(make_train_loader(dataset, batch_size=1, max_steps=1, num_workers=workers)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_refusal_keeps_its_code_on_the_way_out_of_a_worker(dataset_dir, workers):
    lacking = make_dataset(dataset_dir, split="train", preprocessing=[Refusing()])
    with pytest.raises(Refused, match=r"^OTHER_WINDOWS: no lung here\.") as caught:
        next(iter(make_train_loader(lacking, batch_size=1, max_steps=1, num_workers=workers)))
    assert caught.value.code == "OTHER_WINDOWS"


class Refusing:
    """A transform that cannot use a case."""

    settings: dict = {}  # noqa: RUF012

    def __call__(self, item):
        raise Refused("OTHER_WINDOWS", "no lung here")


def test_a_damaged_case_is_one_line_from_a_worker_too(dataset_dir):
    (dataset_dir / "processed" / "case6" / "ct_normalized_24.npy").write_bytes(b"nothing")
    with pytest.raises(
        ValueError,
        match=r"^DAMAGED_CASE: case6/ct_normalized_24.npy cannot be read .*Prepare the case again with --overwrite\.$",
    ):
        make_val_loader(make(dataset_dir, split="val"), num_workers=2)


def test_an_empty_side_and_an_empty_dataset_say_so(dataset_dir, tmp_path):
    writer.write_metadata(dataset_dir, [{"case_id": f"case{n}", "split": "train"} for n in range(7)])
    with pytest.raises(ValueError, match="has no case with split 'val'"):
        make(dataset_dir, split="val")
    with pytest.raises(ValueError, match="dataset has no case"):
        CTDataset([], preprocessing=[])
    with pytest.raises(ValueError, match="holds no prepared case"):
        make(tmp_path / "set" / "processed" / "case0")


def test_a_grid_that_int16_cannot_number_is_refused(dataset_dir):
    class Long(Refusing):
        def __call__(self, item):
            values = np.arange(200, dtype=np.int16)
            coords = np.stack([np.arange(200) * 200, values, values], 1)
            return {"coords": coords, "values": values, "spatial_shape": (40_000, 200, 200), "affine": item["affine"]}

    dataset = make_dataset(dataset_dir, split="train", preprocessing=[Long()])
    with pytest.raises(ValueError, match=r"sides of a grid must be at most 32767 voxels, got \(40000, 200, 200\)"):
        dataset[0]


def test_a_transform_behind_the_windows_sees_features(dataset_dir):
    def negated(item):
        return {**item, "feats": -item["feats"]}

    plain = make(dataset_dir, split="val")[0]
    draw = [Windowsd(windows=["lung"]), negated]
    item = make_dataset(dataset_dir, split="val", preprocessing=preprocessing(**SETTINGS), sampling=draw)[0]
    assert np.array_equal(item["values"], -window_values(plain["values"].numpy(), ["lung"]))
    assert torch.equal(on_device(collate([item])).feats.sort(0)[0], item["values"].sort(0)[0]), "they stay as they are"


class Halved(Windowsd):
    def __call__(self, item):
        done = super().__call__(item)
        return {**done, "feats": done["feats"] / 2}


def test_windowing_of_ones_own_runs_on_the_device_and_in_a_worker_where_it_is_drawn(dataset_dir):
    plain = make(dataset_dir, split="val")[0]
    halved = window_values(plain["values"].numpy(), ["lung"]) / 2
    settings = {"split": "val", "preprocessing": preprocessing(**SETTINGS)}
    item = make_dataset(dataset_dir, **settings, sampling=[Halved(windows=["lung"])])[0]
    assert np.array_equal(item["values"], halved)
    later = collate([make_dataset(dataset_dir, **settings, windowing=Halved(windows=["lung"]))[0]])
    assert torch.equal(later["values"], plain["values"])
    x = SparseBatch(Halved(windows=["lung"]))(later, torch.device("cpu"))
    assert np.array_equal(x.feats.sort(0)[0], np.sort(halved, 0))


# ---- older trees


def older(root, windows: dict[str, np.ndarray]) -> None:
    folder = root / "processed" / "old" / "windows"
    folder.mkdir(parents=True)
    for name, part in windows.items():
        np.save(folder / window_file_name(name), part)


def test_graded_windows_of_an_older_tree_are_the_features(tmp_path, rng):
    hu = blob(rng, 9)
    names = ["lung", "soft_tissue"]
    older(tmp_path, {name: window(hu, *WINDOWS[name]) for name in names})
    dataset = CTDataset(
        prepared.find_cases(tmp_path),
        preprocessing=[Resampled(spacing=4.0, grid=24), Sparsifyd()],
        windowing=Windowsd(windows=names),
    )
    item = dataset[0]
    told = hu[tuple(np.asarray(item["coords"]).T)]
    assert np.abs(window_values(item["values"].numpy(), names) - window_values(told, names)).max() < 0.01
    assert len(item["coords"]) > 1000


def test_windows_of_zero_and_one_become_signed_bands(tmp_path):
    distance = np.linalg.norm(np.indices((24, 24, 24)) - 11.5, axis=0)
    older(tmp_path, {"bone": (distance < 8).astype(np.uint8)})
    dataset = CTDataset(
        prepared.find_cases(tmp_path),
        preprocessing=[Resampled(spacing=4.0, grid=24), Sparsifyd()],
        windowing=Windowsd(windows=["bone"]),
    )
    item = dataset[0]
    truth = (distance - 8)[tuple(np.asarray(item["coords"]).T)]
    assert item["values"].shape[1:] == (1,)
    assert (np.sign(item["values"][:, 0].numpy()) == np.sign(truth))[np.abs(truth) > 0.8].all()
    assert np.corrcoef(item["values"][:, 0], truth)[0, 1] > 0.98
    scan = {**item, "coords": Runs.of(item["coords"][:2]), "values": torch.tensor([-450, 1050])}
    both = collate([item, scan], windowing=dataset.windowing)  # a case of masks among scans
    assert torch.equal(both["values"], torch.cat([item["values"], torch.tensor([[-1.0], [1.0]])]))


def test_a_window_that_an_older_tree_lacks_is_refused_before_any_training(tmp_path):
    older(tmp_path, {"lung": np.zeros((8, 8, 8), np.float32)})
    cases = prepared.find_cases(tmp_path)
    with pytest.raises(ValueError, match="case old lacks window 'bone', it has lung"):
        CTDataset(cases, preprocessing=[], windowing=Windowsd(windows=["lung", "bone"]))


def test_closed_loaders_leave_no_worker_behind(dataset_dir):
    loader = make_train_loader(make(dataset_dir), batch_size=1, max_steps=8, num_workers=1)
    batches = iter(loader)
    next(batches)
    workers = loader._iterator._workers
    loader.close()
    batches.close()
    assert not any(worker.is_alive() for worker in workers)
