"""The cache of samples: it gives what was made, and nothing that a changed case or setting would make otherwise."""

import logging

import numpy as np
import pytest
import torch

from app.dataset import writer
from app.training.data import CTDataset, make_dataset, preprocessing
from app.training.loaders import make_train_loader, make_val_loader
from tests.sample_data import blob, make, same
from transforms import Resampled, Sparsifyd

# ---- the cache


def cache_files(root) -> list[str]:
    return sorted(f.name for f in (root / ".cache").glob("*.pt"))


def test_the_cache_survives_and_gives_the_same_sample(dataset_dir, monkeypatch):
    first = make(dataset_dir)[(0, 1)]
    monkeypatch.setattr(CTDataset, "_prepare", lambda self, case: pytest.fail("prepared again"))
    assert same(first, make(dataset_dir)[(0, 1)])


@pytest.mark.parametrize(
    "changed",
    [
        [Resampled(spacing=8.0, grid=24), Sparsifyd()],
        [Resampled(spacing=6.0, grid=16), Sparsifyd()],
        [Resampled(spacing=8.0, grid=16), Sparsifyd(keep="band")],
        [Resampled(spacing=8.0, grid=16), Sparsifyd(keep="informative", windows=["brain"])],
    ],
)
def test_a_changed_setting_never_reuses_what_was_cached(dataset_dir, changed):
    plain = make(dataset_dir)[(0, 1)]
    dataset = make_dataset(dataset_dir, split="train", preprocessing=changed)
    assert not np.array_equal(dataset[(0, 1)]["coords"], plain["coords"])
    assert len(cache_files(dataset_dir)) == 2


def test_windows_of_the_features_alone_do_not_spoil_the_cache(dataset_dir, monkeypatch):
    make(dataset_dir)[1]
    monkeypatch.setattr(CTDataset, "_prepare", lambda self, case: pytest.fail("prepared again"))
    assert make(dataset_dir, windows=["lung"]).windows == ("lung",)
    assert len(make(dataset_dir, windows=["lung"])[1]["coords"]) > 100


def test_a_case_that_changed_is_not_read_from_the_cache(dataset_dir, rng):
    before = make(dataset_dir)[1]
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    writer.write_case(dataset_dir, "case1", blob(rng, 9), affine=affine, windows=["lung"])
    assert len(make(dataset_dir)[1]["coords"]) > len(before["coords"])


def test_a_scan_prepared_onto_another_grid_is_not_read_from_the_cache(dataset_dir, rng):
    hu, scan, counts = blob(rng, 6), {"source_hash": "of one scan"}, []
    for step in (4.0, 6.0):  # the second in the place of the first
        affine = np.diag([step, step, step, 1.0])
        writer.write_case(dataset_dir, "case1", hu, affine=affine, windows=["lung"], sidecar=scan)
        counts.append(len(make(dataset_dir)[1]["coords"]))
    assert counts[1] > 2 * counts[0]


def test_a_file_once_read_is_mapped_and_the_samples_are_the_same(dataset_dir, monkeypatch):
    dataset, ways, load = make(dataset_dir), [], torch.load
    monkeypatch.setattr(torch, "load", lambda file, **how: ways.append(how["mmap"]) or load(file, **how))
    made, read, mapped = (dataset[(1, 2)] for _ in range(3))
    other = make(dataset_dir)[(1, 2)]
    assert ways == [True, True, False]  # what this process wrote needs no check, what it finds there does
    assert same(made, read) and same(made, mapped) and same(made, other) and not dataset._memory


def test_without_room_in_memory_the_samples_are_the_same(dataset_dir):
    whole = make(dataset_dir)
    tight = make(dataset_dir)
    whole.cache_dir = tight.cache_dir = None
    tight._memory_left = len(whole.kept_voxels(0)["coords"]) * 8 + 200  # room for the smallest case alone
    assert all(same(whole[(1, n)], tight[(1, n)]) for n in range(5))
    assert list(tight._memory) == [0]


def test_loaders_leave_the_generator_of_the_run_alone(dataset_dir):
    before = torch.get_rng_state()
    list(make_train_loader(make(dataset_dir), batch_size=2, max_steps=2))
    list(make_val_loader(make(dataset_dir, split="val")))
    assert torch.equal(before, torch.get_rng_state())


def test_a_case_larger_than_the_grid_is_told_once(dataset_dir, caplog):
    """Balls of 28 to 40 voxels of 4 mm on a grid of 64 mm; the second pass reads the cache."""
    for _ in range(2):
        caplog.clear()
        small = make_dataset(dataset_dir, split="train", preprocessing=preprocessing(resolution=16, spacing=2.0))
        for number in range(len(small)):
            small[number]
        assert caplog.text.count("FOV_CROPPED") == 1 and "% of what is denser than air in case0" in caplog.text
    caplog.clear()
    whole = make(dataset_dir)
    for number in range(len(whole)):
        whole[number]
    assert "FOV_CROPPED" not in caplog.text


def test_a_damaged_cache_file_is_made_again(dataset_dir, caplog):
    first = make(dataset_dir)[1]
    (file,) = (dataset_dir / ".cache").glob("*.pt")
    whole = file.read_bytes()
    for damage in (whole[:100], b"", b"not a checkpoint"):
        file.write_bytes(damage)
        with caplog.at_level(logging.WARNING):
            assert same(first, make(dataset_dir)[1])
        assert "damaged" in caplog.text
        assert torch.load(file, weights_only=True)["begins"].dtype == torch.int16


def test_a_cache_that_cannot_be_written_is_done_without(dataset_dir, monkeypatch, caplog):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with caplog.at_level(logging.WARNING):
        assert len(make(dataset_dir)[1]["coords"]) > 100
    assert "going on without it" in caplog.text and cache_files(dataset_dir) == []


def test_a_transform_that_cannot_say_its_settings_is_refused(dataset_dir):
    with pytest.raises(ValueError, match="has no `settings`"):
        make_dataset(dataset_dir, split="train", preprocessing=[lambda item: item])
