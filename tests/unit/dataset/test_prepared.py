"""The prepared layout: names and columns of the contract, whole cases only, older trees."""

import csv
import json

import numpy as np
import pytest

from app.dataset import prepared, writer
from app.shared.refusals import Refused
from transforms.windows import DEFAULT_WINDOWS, WINDOWS, window, window_values


@pytest.fixture
def hu(rng) -> np.ndarray:
    return rng.integers(-1024, 1500, (12, 12, 12)).astype(np.int16)


@pytest.fixture
def affine() -> np.ndarray:
    matrix = np.diag([2.0, 2.0, 2.0, 1.0])
    matrix[:3, 3] = [-11, -11, 30]
    return matrix


def test_a_case_is_written_as_the_contract_names_it(tmp_path, hu, affine):
    organs = {"liver": hu > 0}
    source = {"codes": ["TILT_CORRECTED"], "source_hash": "abc", "source_shape": [9, 9, 3]}
    case = writer.write_case(
        tmp_path / "set", "c1", hu, affine=affine, windows=DEFAULT_WINDOWS, sidecar=source, organs=organs
    )
    files = sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file())
    assert files == [
        "set/processed/c1/case.json",
        "set/processed/c1/ct_normalized_12.npy",
        "set/processed/c1/organs/liver.npz",
        "set/processed/c1/windows/bone_w1500_l300.npy",
        "set/processed/c1/windows/brain_w80_l35.npy",
        "set/processed/c1/windows/lung_w1500_l-600.npy",
        "set/processed/c1/windows/soft_tissue_w400_l50.npy",
    ]
    sidecar = json.loads((case.path / "case.json").read_text())
    assert set(sidecar) == {
        *("case_id", "codes", "source_hash", "source_shape", "source_spacing", "source_affine"),
        *("shape", "spacing", "affine", "hu_range", "steps", "versions", "files"),
    }
    assert {name: (case.path / name).stat().st_size for name in sidecar["files"]} == sidecar["files"]
    assert [f"set/processed/c1/{name}" for name in sidecar["files"]] == files[1:]
    assert sidecar["codes"] == ["TILT_CORRECTED"] and sidecar["spacing"] == [2.0, 2.0, 2.0]
    assert sidecar["hu_range"] == [int(hu.min()), int(hu.max())]


def test_what_is_written_is_read_back(tmp_path, hu, affine):
    writer.write_case(tmp_path, "c1", hu, affine=affine, windows=["lung"], organs={"liver": hu > 0})
    case = prepared.open_case(tmp_path / "processed" / "c1")
    assert np.array_equal(case.hu(), hu) and isinstance(case.hu(), np.memmap)
    assert np.array_equal(case.affine, affine) and case.shape == (12, 12, 12) and case.spacing == (2.0, 2.0, 2.0)
    assert np.array_equal(case.organ("liver"), hu > 0)
    lung = case.window("lung")
    assert lung.dtype == np.uint8 and np.abs(lung / 255 - window(hu, *WINDOWS["lung"])).max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(case.window("liver"), prepared.window_bytes(hu, "liver"))  # made from the HU


def test_rows_have_the_columns_of_the_contract(tmp_path, hu, affine):
    case = writer.write_case(tmp_path, "c1", hu, affine=affine, windows=["lung", "bone"])
    row = writer.metadata_row(case, windows=["lung", "bone"])
    writer.write_metadata(tmp_path, [{**row, "patient": "p,1", "split": "val"}])
    writer.write_failures(tmp_path, [])
    header, line = csv.reader((tmp_path / "metadata.csv").open())
    assert ",".join(header) == "case_id,patient,split,source_hash,shape,spacing,hu_range,windows,codes,status"
    assert line[1:3] == ["p,1", "val"] and line[4:6] == ["12 12 12", "2 2 2"] and line[7:] == ["lung bone", "OK", "ok"]
    assert (tmp_path / "failures.csv").read_text() == "source,status,codes,message,remedy\n"
    (found,) = prepared.find_cases(tmp_path)
    assert (found.patient, found.split, found.case_id) == ("p,1", "val", "c1")


def test_cases_are_found_in_one_dataset_and_in_several(tmp_path, hu, affine):
    for dataset in ("b", "a"):
        for case in ("2", "1"):
            writer.write_case(tmp_path / dataset, case, hu, affine=affine, windows=[])
    (tmp_path / "a" / "processed" / ".1.half").mkdir()
    (tmp_path / ".cache").mkdir()
    assert [(c.dataset, c.case_id) for c in prepared.find_cases(tmp_path)] == [
        ("a", "1"),
        ("a", "2"),
        ("b", "1"),
        ("b", "2"),
    ]
    assert [c.case_id for c in prepared.find_cases(tmp_path / "b")] == ["1", "2"]


def test_the_grid_that_cases_share(tmp_path, hu, affine):
    assert prepared.common_grid([]) is None
    for name, part in (("a", hu), ("b", hu), ("small", hu[:8, :8, :8]), ("flat", hu[:, :, :5])):
        writer.write_case(tmp_path / "set", name, part, affine=affine, windows=("lung",), sidecar={})
    cases = {case.case_id: case for case in prepared.find_cases(tmp_path)}
    assert prepared.common_grid([cases["a"], cases["b"]]) == (12, 2.0)
    assert prepared.common_grid(list(cases.values())) is None
    assert prepared.common_grid([cases["flat"]]) is None
    fine = np.diag([500 / 512, 500 / 512, 500 / 512, 1])  # 0.9765625 mm, of which "spacing" keeps six decimals
    case = writer.write_case(tmp_path / "set", "fine", hu, affine=fine, windows=("lung",), sidecar={})
    assert prepared.common_grid([case]) == (12, 500 / 512)
    for name, steps in (("uneven", [2.0, 2.0, 12.0, 1]), ("mirrored", [-2.0, -2.0, -2.0, 1])):
        case = writer.write_case(tmp_path / "set", name, hu, affine=np.diag(steps), windows=("lung",))
        assert prepared.common_grid([case]) is None
    (tmp_path / "set" / "processed" / "a" / "case.json").unlink()
    assert prepared.common_grid([prepared.open_case(tmp_path / "set" / "processed" / "a")]) is None


def test_datasets_that_lie_deeper_are_found(tmp_path, hu, affine):
    writer.write_case(tmp_path / "archive" / "2021" / "chest", "c1", hu, affine=affine, windows=[])
    writer.write_case(tmp_path / ".trash", "c2", hu, affine=affine, windows=[])
    assert [(c.dataset, c.case_id) for c in prepared.find_cases(tmp_path)] == [("chest", "c1")]


def test_a_case_that_the_table_does_not_name_is_told_of(tmp_path, hu, affine, caplog):
    """To strike a row out of metadata.csv leaves nobody out, and a person of val could be trained on."""
    cases = [writer.write_case(tmp_path / "set", f"c{n}", hu, affine=affine, windows=DEFAULT_WINDOWS) for n in range(5)]
    rows = [writer.metadata_row(case, windows=DEFAULT_WINDOWS) for case in cases]
    writer.write_metadata(tmp_path / "set", rows)
    assert len(prepared.find_cases(tmp_path)) == 5 and not caplog.messages
    writer.write_metadata(tmp_path / "set", rows[:1])
    assert len(prepared.find_cases(tmp_path)) == 5
    says = "set/metadata.csv does not name 4 of 5 cases (c1, c2, c3, …): they are taken too, split by their names"
    assert caplog.messages == [f"{says}; to leave one out, move its folder away"]
    (tmp_path / "set/metadata.csv").unlink()  # older trees have none
    caplog.clear()
    assert len(prepared.find_cases(tmp_path)) == 5 and not caplog.messages


def test_a_missing_or_empty_folder_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"is no folder\. Give the OUT of"):
        prepared.find_cases(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"holds no prepared case\. Run"):
        prepared.find_cases(tmp_path)
    with pytest.raises(ValueError, match="split must be train or val"):
        prepared.find_cases(tmp_path, split="test")


def test_a_case_cut_short_is_never_visible(tmp_path, hu, affine, monkeypatch):
    writer.write_case(tmp_path, "c1", hu, affine=affine, windows=["lung"])

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_sidecar", full_disk)
    for name in ("c1", "c2"):  # one that replaces and one that is new
        with pytest.raises(OSError, match="No space left"):
            writer.write_case(tmp_path, name, hu * 0, affine=affine, windows=["lung"])
    assert [p.name for p in (tmp_path / "processed").iterdir()] == ["c1"]
    assert np.array_equal(prepared.find_cases(tmp_path)[0].hu(), hu)


def test_a_case_written_again_is_replaced(tmp_path, hu, affine):
    writer.write_case(tmp_path, "c1", hu, affine=affine, windows=["lung"])
    writer.write_case(tmp_path, "c1", hu + 1, affine=affine, windows=["bone"])
    (case,) = prepared.find_cases(tmp_path)
    assert np.array_equal(case.hu(), hu + 1)
    assert [p.name for p in (tmp_path / "processed").iterdir()] == ["c1"]
    assert [p.name for p in (case.path / "windows").iterdir()] == ["bone_w1500_l300.npy"]


def test_the_same_case_is_the_same_bytes(tmp_path, hu, affine):
    organs = {"liver": hu > 0}
    cases = [
        writer.write_case(tmp_path / d, "c", hu, affine=affine, windows=["lung"], organs=organs) for d in ("a", "b")
    ]
    files = [{f.name: f.read_bytes() for f in case.path.rglob("*") if f.is_file()} for case in cases]
    assert files[0] == files[1] and len(files[0]) == 4


def test_a_damaged_file_is_one_clear_line(tmp_path, hu, affine):
    case = writer.write_case(tmp_path, "c1", hu, affine=affine, windows=["lung"])
    (case.path / "ct_normalized_12.npy").write_bytes(b"\x93NUMPY\x01\x00garbage")
    with pytest.raises(ValueError, match=r"c1/ct_normalized_12.npy cannot be read .*\. Prepare the case again"):
        case.hu()
    (case.path / "case.json").write_text("{")
    with pytest.raises(ValueError, match=r"c1/case.json cannot be read .*\. Prepare the case again"):
        prepared.find_cases(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("shape", value) for value in (None, 5, "abc", [12, 12], [12, 12, 0], [12, 12, 12.5], [True] * 3)),
        *(("affine", None), ("source_affine", None), ("source_shape", None), ("spacing", [2]), ("spacing", ["a"] * 3)),
        *(("codes", 5), ("codes", [1]), ("source_hash", 5), ("source_hash", None)),
    ],
)
def test_a_sidecar_that_says_what_cannot_be_is_one_clear_line(tmp_path, hu, affine, field, value):
    case = writer.write_case(tmp_path, "c1", hu, affine=affine, windows=["lung"])
    (case.path / "case.json").write_text(json.dumps({**case.sidecar, field: value}))
    with pytest.raises(
        ValueError, match=rf"^DAMAGED_CASE: c1/case.json must have .* as its {field}, it has .*\. Prepare .* again"
    ):
        prepared.open_case(case.path)


def test_a_sidecar_that_says_less_is_read(tmp_path, hu, affine):
    case = writer.write_case(tmp_path, "c1", hu, affine=affine, windows=["lung"])
    (case.path / "case.json").write_text(json.dumps({"affine": affine.tolist()}))
    case = prepared.open_case(case.path)
    assert case.is_hu and case.shape == (12, 12, 12) and case.codes == [] and case.spacing is None


def test_damaged_cases_are_listed_beside_the_good(tmp_path, hu, affine):
    for name in ("c1", "c2"):
        writer.write_case(tmp_path, name, hu, affine=affine, windows=["lung"])
    (tmp_path / "processed" / "c1" / "case.json").write_text("{")
    bad, good = prepared.list_cases(tmp_path)
    assert (bad.dataset, bad.case_id) == (tmp_path.name, "c1") and "c1/case.json cannot be read" in str(bad.error)
    assert np.array_equal(good.hu(), hu)


def test_a_volume_that_is_gone_is_not_made_up_from_windows(tmp_path, hu, affine):
    case = writer.write_case(tmp_path, "c1", hu, affine=affine, windows=DEFAULT_WINDOWS)
    (case.path / "ct_normalized_12.npy").unlink()
    assert case.is_hu
    with pytest.raises(ValueError, match=r"^DAMAGED_CASE: c1/ct_normalized_12.npy is missing\. Prepare .* again"):
        case.hu()


def test_a_pickle_is_not_run(tmp_path, hu, affine):
    case = writer.write_case(tmp_path, "c1", hu, affine=affine, windows=[])
    np.save(case.path / "ct_normalized_12.npy", np.array([print], object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read"):
        case.hu()


# ---- older trees


def older_case(root, name: str, arrays: dict[str, np.ndarray]) -> prepared.PreparedCase:
    folder = root / "processed" / name
    (folder / "windows").mkdir(parents=True)
    np.save(folder / "ct_normalized_12.npy", np.zeros((12, 12, 12), np.float32))
    for file, values in arrays.items():
        np.save(folder / "windows" / file, values)
    return prepared.open_case(folder)


def test_a_volume_without_sidecar_is_never_taken_for_hu(tmp_path):
    case = older_case(tmp_path, "old", {"lung_w1500_l-600.npy": np.zeros((12, 12, 12), np.float32)})
    assert not case.is_hu and case.affine is None and case.shape == (12, 12, 12)
    with pytest.raises(ValueError, match="cannot be taken for HU"):
        case.hu()


def test_a_missing_window_says_which_there_are(tmp_path):
    case = older_case(tmp_path, "old", {"lung_w1500_l-600.npy": np.zeros((12, 12, 12), np.float32)})
    with pytest.raises(ValueError, match=r"case old lacks window 'bone', it has lung\. Choose among those"):
        case.window("bone")


def test_a_window_of_another_width_is_not_ours(tmp_path):
    case = older_case(tmp_path, "old", {"lung_w1600_l-600.npy": np.zeros((12, 12, 12), np.float32)})
    assert case.window_names() == ()


@pytest.mark.parametrize("stored", ["float", "bytes"])
def test_graded_windows_give_back_their_own_features(tmp_path, hu, stored):
    names = ["lung", "soft_tissue"]
    parts = {name: window(hu, *WINDOWS[name]) for name in names}
    if stored == "bytes":
        parts = {name: np.rint(part * 255).astype(np.uint8) for name, part in parts.items()}
    files = {"lung_w1500_l-600.npy": parts["lung"], "soft_tissue_w400_l50.npy": parts["soft_tissue"]}
    case = older_case(tmp_path, "old", files)
    assert not prepared.windows_are_masks(case, names)
    values = window_values(prepared.windows_as_hu(case, names), names)
    limit = 1e-4 if stored == "float" else 2 * 1.6 / 255
    assert np.abs(values - window_values(hu, names)).max() < limit


def test_air_of_a_narrow_window_is_air_again(tmp_path):
    part = np.zeros((12, 12, 12), np.float32)
    part[4:8, 4:8, 4:8] = 0.5
    case = older_case(tmp_path, "old", {"soft_tissue_w400_l50.npy": part})
    hu = prepared.windows_as_hu(case, ["soft_tissue"])
    assert hu[0, 0, 0] == -1000 and hu[5, 5, 5] == 50


@pytest.mark.parametrize("values", [np.uint8([0, 1]), np.uint8([0, 255]), np.float32([0, 1]), np.array([False, True])])
def test_windows_of_zero_and_one_are_masks(tmp_path, values):
    case = older_case(tmp_path, "old", {"bone_w1500_l300.npy": np.resize(values, (12, 12, 12))})
    assert prepared.windows_are_masks(case, ["bone"])


def test_split_is_by_patient_and_about_one_in_ten():
    splits = [prepared.split_of(f"patient{n}") for n in range(2000)]
    assert 0.07 < splits.count("val") / 2000 < 0.13
    assert prepared.split_of("x") == prepared.split_of("x")


def test_cases_by_two_versions_of_the_resampler_are_not_read_as_one_dataset(tmp_path, hu, affine):
    for name, said in (("c1", {}), ("c2", {"resampler": "triangle 1"})):  # older cases do not say
        writer.write_case(tmp_path, name, hu, affine=affine, windows=["lung"], sidecar=said)
    assert len(prepared.find_cases(tmp_path)) == 2
    writer.write_case(tmp_path, "c3", hu, affine=affine, windows=["lung"], sidecar={"resampler": "triangle 2"})
    with pytest.raises(
        Refused, match=r"OTHER_RESAMPLER: c2 was resampled by triangle 1, c3 by triangle 2. .*overwrite"
    ):
        prepared.find_cases(tmp_path)
