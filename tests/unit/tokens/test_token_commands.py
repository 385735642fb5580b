"""`tokenize` and `reconstruct`: files of one scan or a folder; what cannot be used is one line and the rest is done."""

import errno
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch

from app.dataset import prepared, writer
from app.prepare import Refused, cohort, read_scan, volume
from app.tokens import commands, open_scan
from app.tokens.commands import lines, reconstruct, tokenize
from app.tokens.open_scan import Volume
from app.tokens.token_files import read_tokens, write_tokens
from app.tokens.tokenizer import CTTokenizer
from app.tokens.volumes import onto_grid
from tests.access import unreadable
from tests.tiny_tokenizer import AFFINE, SHAPE, hu_volume, make_network, save

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("changes", [{"codebook": "fsq"}, {"normalize_codes": True}, {"quantizer_levels": 2}], ids=str)
def test_any_quantiser_goes_through_files(tmp_path, dataset, changes):
    folder = save(make_network(**changes), tmp_path / "run")
    tokenize(dataset / "processed" / "case_a", tmp_path / "a.npz", tokenizer=folder)
    assert reconstruct(tmp_path / "a.npz", tmp_path / "a.nii.gz", tokenizer=folder)["ok"] == 1
    assert read_tokens(tmp_path / "a.npz").codes.ndim == 1 + ("quantizer_levels" in changes)


def test_commands_round_trip_through_files(output_dir, dataset, tmp_path):
    made = tokenize(dataset, tmp_path / "tokens", tokenizer=output_dir, support=True)
    assert made["ok"] == 2 and made["refused"] == 0
    assert sorted(p.name for p in (tmp_path / "tokens").iterdir()) == ["case_a.npz", "case_b.npz"]
    images = reconstruct(tmp_path / "tokens", tmp_path / "images", tokenizer=output_dir)
    assert [entry["status"] for entry in images["cases"]] == ["ok", "ok"]
    image = nibabel.load(tmp_path / "images" / "case_a.nii.gz")
    assert image.shape == (48, 48, 48) and image.get_data_dtype() == np.int16
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S") and np.allclose(image.header.get_zooms(), 8)
    inside = np.argwhere(np.asarray(image.dataobj) > -1024)
    centre = (image.affine @ np.append(inside.mean(0), 1))[:3]
    assert np.abs(centre - (AFFINE @ [22, 20, 14, 1])[:3]).max() < 4
    assert made["tokenizer"]["file"].endswith("ckpts/vqvae_ema0.9999_step0000005.pt")
    assert list(lines(made))[-1].startswith("2 ok, 0 refused, by tokenizer ")
    again = tokenize(dataset, tmp_path / "tokens", tokenizer=output_dir)
    assert {(entry["message"], *entry["codes"]) for entry in again["cases"]} == {("there already", "OK")}


def test_what_the_tokenizers_own_grid_cuts_off_is_told(dataset, tmp_path, caplog):
    """A grid of 192 mm, a body of 204: before, such tokens were called OK."""
    run = save(make_network(resolution=24, num_embeddings=4), tmp_path / "run")
    case = dataset / "processed" / "case_a"
    told = tokenize(case, tmp_path / "a.npz", tokenizer=run)
    assert told["cases"][0]["codes"] == ["FOV_CROPPED"] and "FOV_CROPPED" in next(lines(told))
    assert "beyond the 192 mm grid" in caplog.text
    assert read_tokens(tmp_path / "a.npz").findings == ("FOV_CROPPED",)
    again = tokenize(case, tmp_path / "a.npz", tokenizer=run)["cases"][0]
    assert (again["message"], again["codes"]) == ("there already", ["FOV_CROPPED"])
    assert reconstruct(tmp_path / "a.npz", tmp_path / "a.nii", tokenizer=run)["cases"][0]["codes"] == ["FOV_CROPPED"]


def test_token_files_of_older_software_do_not_say_what_was_found(output_dir, dataset, tmp_path):
    case = dataset / "processed" / "case_a"
    tokenize(case, tmp_path / "a.npz", tokenizer=output_dir)
    write_tokens(tmp_path / "a.npz", replace(read_tokens(tmp_path / "a.npz"), findings=None))
    told = tokenize(case, tmp_path / "a.npz", tokenizer=output_dir)
    assert told["cases"][0]["codes"] == ["EXISTS"] and next(lines(told)).endswith("EXISTS: there already")


def test_files_without_the_support_asked_for_are_made_again(output_dir, dataset, tmp_path):
    tokenize(dataset, tmp_path, tokenizer=output_dir)
    again = tokenize(dataset, tmp_path, tokenizer=output_dir, support=True)
    assert again["ok"] == 2 and not any(entry["message"] for entry in again["cases"])
    assert all(read_tokens(file).support is not None for file in tmp_path.iterdir())


@pytest.mark.parametrize("pack", [False, True])
def test_codes_are_refined_as_asked_and_files_of_other_steps_made_again(output_dir, dataset, tmp_path, pack):
    case, file = dataset / "processed" / "case_a", tmp_path / "a.npz"
    ct = CTTokenizer.from_pretrained(output_dir)
    made = []
    for steps in (0, 3, 3):
        entry = tokenize(case, file, tokenizer=output_dir, refine=steps, pack=pack)["cases"][0]
        made.append((entry["message"], read_tokens(file, tables=ct.tables).refined))
    assert made == [("", None), ("", 3), ("there already", 3)]
    assert np.array_equal(read_tokens(file, tables=ct.tables).codes, ct.encode(case, refine=3).codes)
    with pytest.raises(Refused, match="refine must be 0 for tokens, got 3"):
        ct.encode(file, refine=3)
    with pytest.raises(ValueError, match="refine must be a number of steps from 0, got -1"):
        ct.encode(case, refine=-1)


def test_one_file_is_not_taken_for_another_scan(output_dir, dataset, tmp_path):
    tokenize(dataset / "processed" / "case_a", tmp_path / "one.npz", tokenizer=output_dir)
    before = (tmp_path / "one.npz").read_bytes()
    made = tokenize(dataset / "processed" / "case_b", tmp_path / "one.npz", tokenizer=output_dir)
    assert made["refused"] == 1 and made["cases"][0]["codes"] == ["EXISTS"]
    assert (tmp_path / "one.npz").read_bytes() == before
    again = tokenize(dataset / "processed" / "case_a", tmp_path / "one.npz", tokenizer=output_dir)
    assert again["cases"][0]["message"] == "there already"


def test_cases_of_one_name_are_told_apart_by_their_scan(output_dir, dataset, tmp_path):
    writer.write_case(tmp_path / "other", "case_a", hu_volume() + 5, affine=AFFINE, windows=["lung"])
    tokenize(dataset, tmp_path / "tokens", tokenizer=output_dir)
    (case,) = tokenize(tmp_path / "other", tmp_path / "tokens", tokenizer=output_dir)["cases"]
    assert case["status"] == "refused" and "of another scan" in case["message"]
    stored = prepared.open_case(dataset / "processed" / "case_a")
    assert read_tokens(tmp_path / "tokens" / "case_a.npz").source_hash == stored.source_hash


def test_one_case_to_one_file(output_dir, dataset, tmp_path):
    tokenize(dataset / "processed" / "case_b", tmp_path / "b.npz", tokenizer=output_dir)
    reconstruct(tmp_path / "b.npz", tmp_path / "b.nii", tokenizer=output_dir)
    assert read_tokens(tmp_path / "b.npz").support is None and (tmp_path / "b.nii").is_file()


def test_like_puts_it_on_that_scans_own_grid(output_dir, dataset, tmp_path):
    flipped = AFFINE @ np.array([[-1.0, 0, 0, 49], [0, -1, 0, 43], [0, 0, 1, 0], [0, 0, 0, 1]])  # L P S
    nibabel.save(nibabel.Nifti1Image(hu_volume()[::-1, ::-1], flipped), tmp_path / "scan.nii.gz")
    tokenize(dataset / "processed" / "case_a", tmp_path / "a.npz", tokenizer=output_dir, support=True)
    reconstruct(tmp_path / "a.npz", tmp_path / "a.nii.gz", tokenizer=output_dir, like=tmp_path / "scan.nii.gz")
    image = nibabel.load(tmp_path / "a.nii.gz")
    assert image.shape == SHAPE and np.allclose(image.affine, flipped)
    metres = nibabel.Nifti1Image(hu_volume()[::-1, ::-1], np.diag([0.001, 0.001, 0.001, 1]) @ flipped)
    metres.header.set_xyzt_units("meter")
    nibabel.save(metres, tmp_path / "metres.nii.gz")
    assert np.allclose(open_scan.grid_of(tmp_path / "metres.nii.gz")[1], flipped)
    found, true = np.asarray(image.dataobj) > -900, hu_volume()[::-1, ::-1] > -900
    assert 2 * (found & true).sum() / (found.sum() + true.sum()) > 0.85  # the body lies on the body


@pytest.mark.parametrize(
    ("grid", "codes"), [(None, ["OK"]), ((64, 6.0), ["OK"]), ((32, 6.0), ["FOV_CROPPED"])], ids=str
)
def test_a_raw_scan_gives_the_tokens_of_its_prepared_case(grid, codes, tmp_path, monkeypatch):
    small = cohort.PrepareSettings(*(grid or (64, 6.0)))
    if grid is None:  # a tokenizer that does not know: the default, which is large for a test
        monkeypatch.setattr(cohort, "PrepareSettings", lambda: small)
    output_dir = save(make_network(prepared=grid), tmp_path / "run")
    flipped = np.diag([-6.0, -6.0, 8.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(hu_volume(), flipped), tmp_path / "scan.nii.gz")
    cohort.prepare(tmp_path / "scan.nii.gz", tmp_path / "prepared", small, cohort.Request(workers=1))
    tokenize(tmp_path / "prepared", tmp_path / "from_prepared", tokenizer=output_dir)
    made = tokenize(tmp_path / "scan.nii.gz", tmp_path / "raw.npz", tokenizer=output_dir)
    (prepared_file,) = (tmp_path / "from_prepared").rglob("*.npz")
    raw, case = read_tokens(tmp_path / "raw.npz"), read_tokens(prepared_file)
    assert np.array_equal(raw.codes, case.codes) and np.array_equal(raw.coords, case.coords)
    assert np.allclose(raw.affine, case.affine)
    assert raw.source_shape == case.source_shape == SHAPE and np.allclose(raw.source_affine, flipped)
    (volume,) = read_scan(tmp_path / "scan.nii.gz")
    assert np.array_equal(CTTokenizer.from_pretrained(output_dir).encode(volume).codes, case.codes)
    assert made["cases"][0]["codes"] == codes
    if grid is not None:  # the same values in memory, on R A S axes
        shifted = flipped @ np.array([[-1.0, 0, 0, 49], [0, -1, 0, 43], [0, 0, 1, 0], [0, 0, 0, 1]])
        array = CTTokenizer.from_pretrained(output_dir).encode(Volume(hu_volume()[::-1, ::-1], shifted))
        assert np.array_equal(array.codes, case.codes) and array.findings == case.findings
    (again,) = tokenize(tmp_path / "prepared", tmp_path / "again", tokenizer=output_dir)["cases"]
    assert again["codes"] == codes
    assert "scan" not in made["cases"][0]["case"]  # a file's name may tell who was scanned


def test_a_refused_raw_scan(output_dir, tmp_path):
    nibabel.save(nibabel.Nifti1Image((hu_volume() > 0).astype(np.uint8), AFFINE), tmp_path / "mask.nii.gz")
    with pytest.raises(Refused, match="NO_CASES"):
        tokenize(tmp_path / "mask.nii.gz", tmp_path / "a.npz", tokenizer=output_dir)


def test_what_is_refused_beside_a_good_raw_scan_is_listed(output_dir, tmp_path, monkeypatch, rng):
    monkeypatch.setattr(cohort, "PrepareSettings", lambda: SimpleNamespace(size=64, spacing=6.0))
    (tmp_path / "raw").mkdir()
    nibabel.save(nibabel.Nifti1Image(hu_volume(), AFFINE), tmp_path / "raw" / "ct.nii.gz")
    mr = np.abs(rng.normal(300, 200, (20, 20, 20))).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(mr, AFFINE), tmp_path / "raw" / "mr.nii.gz")
    (tmp_path / "raw" / "notes.txt").write_text("no scan at all")
    for out in ("tokens", "one.npz"):
        made = tokenize(tmp_path / "raw", tmp_path / out, tokenizer=output_dir)
        assert sorted((entry["status"], *entry["codes"]) for entry in made["cases"]) == [
            ("ok", "OK"),
            ("refused", "NOT_HU"),
        ]
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    tokens = CTTokenizer.from_pretrained(output_dir).encode(tmp_path / "raw")  # the good one alone
    assert np.array_equal(tokens.codes, read_tokens(tmp_path / "one.npz").codes)


def test_scans_looked_at_ahead_come_in_order_each_with_its_own_refusal():
    begun = []

    def look(number):
        begun.append(number)
        if number == 3:
            raise ValueError("damaged")
        return 10 * number

    calls, most = commands._ahead(list(range(12)), look, torch.device("cuda")), commands.READING_THREADS + 1
    for number, call in enumerate(calls):
        assert max(begun) <= number + most
        if number == 3:
            with pytest.raises(ValueError, match="damaged"):
                call()
        else:
            assert call() == 10 * number
    assert sorted(begun) == list(range(12))
    begun.clear()
    in_turn = commands._ahead(list(range(2)), look, torch.device("cpu"))
    assert next(in_turn)() == 0 and begun == [0]


def test_what_cannot_be_opened_is_listed_and_the_rest_done(tmp_path):
    raw = tmp_path / "raw"
    for folder in (raw, raw / "closed", raw / "open"):
        folder.mkdir()
        nibabel.save(nibabel.Nifti1Image(hu_volume() + len(folder.name), AFFINE), folder / "scan.nii.gz")
    nibabel.save(nibabel.Nifti1Image(hu_volume() - 1, AFFINE), raw / "large.nii.gz")
    folder = save(make_network(prepared=(48, 8.0)), tmp_path / "run")
    call = unreadable(raw / "large.nii.gz", raw / "closed")
    words = ["tokenize", raw, tmp_path / "tokens", "--tokenizer", folder]
    done = subprocess.run([*call, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False)
    (raw / "closed").chmod(0o755)
    assert done.returncode == 3 and done.stderr == "", done.stderr
    *told, last = done.stdout.splitlines()
    refused = [line for line in told if line.startswith("refused")]
    assert [line.split()[1] for line in refused] == ["closed", "large.nii.gz"]
    assert all("CORRUPT_FILE" in line and "cannot be opened (Permission denied)" in line for line in refused)
    assert len(list((tmp_path / "tokens").iterdir())) == 2 and last.startswith("2 ok, 2 refused")


def test_a_scan_that_stops_to_be_readable_is_listed(output_dir, tmp_path, monkeypatch):
    def fails(*given):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "scan.nii.gz")

    nibabel.save(nibabel.Nifti1Image(hu_volume(), AFFINE), tmp_path / "scan.nii.gz")
    monkeypatch.setattr(volume, "read_item", fails)
    result = tokenize(tmp_path / "scan.nii.gz", tmp_path / "tokens", tokenizer=output_dir)
    assert result["cases"][0]["codes"] == ["CORRUPT_FILE"] and "Input/output error" in result["cases"][0]["message"]


@pytest.mark.parametrize("alone", [False, True])
def test_a_damaged_sidecar_is_listed_and_the_rest_done(output_dir, dataset, tmp_path, alone):
    shutil.copytree(dataset, tmp_path / "set")
    damaged = tmp_path / "set" / "processed" / "case_a"
    (damaged / "case.json").write_text("{")
    result = tokenize(damaged if alone else tmp_path / "set", tmp_path / "tokens", tokenizer=output_dir)
    assert (result["ok"], result["refused"]) == (0 if alone else 1, 1)
    assert result["cases"][0]["case"] == "case_a" and "case_a/case.json cannot" in result["cases"][0]["message"]


def test_a_case_whose_volume_is_gone(output_dir, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "set")
    for file in (tmp_path / "set" / "processed" / "case_a").glob("ct_normalized_*"):
        file.unlink()
    result = tokenize(tmp_path / "set", tmp_path / "tokens", tokenizer=output_dir)
    assert (result["ok"], result["refused"]) == (1, 1)
    assert "case_a/ct_normalized_50.npy is missing" in result["cases"][0]["message"]


def test_a_series_that_is_not_there(output_dir, dataset, tmp_path):
    nibabel.save(nibabel.Nifti1Image(hu_volume(), AFFINE), tmp_path / "ct.nii.gz")
    with pytest.raises(Refused, match="none of them of the series that --series asks for"):
        tokenize(tmp_path / "ct.nii.gz", tmp_path / "out", tokenizer=output_dir, series="1.2.3")
    for source in (dataset, dataset / "processed" / "case_a"):
        with pytest.raises(Refused) as caught:
            tokenize(source, tmp_path / "out", tokenizer=output_dir, series="1.2.3")
        assert "is prepared, so --series names nothing" in str(caught.value)


def test_onto_grid_keeps_world_positions(rng):
    hu = np.zeros((20, 20, 20), np.float32)
    hu[5, 12, 8] = 100
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    turned = np.array([[0, -1.0, 0, 38], [1.0, 0, 0, 0], [0, 0, 2.0, 0], [0, 0, 0, 1]])  # another order, finer
    there = onto_grid(Volume(hu, affine), (40, 40, 20), turned)
    peak = np.array(np.unravel_index(there.hu.argmax(), there.hu.shape))
    assert np.allclose((turned @ np.append(peak, 1))[:3], [10, 24, 16])
