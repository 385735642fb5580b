"""`tokenize` and `reconstruct`: files of one scan or a folder; what cannot be used is one line and the rest is done."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from app.__main__ import app
from app.dataset import prepared, writer
from app.prepare import Refused, cohort, read_scan, volume
from app.tokens import commands, open_scan
from app.tokens.commands import lines, onto_grid, reconstruct, tokenize
from app.tokens.open_scan import Volume
from app.tokens.token_files import read_tokens, write_tokens
from app.tokens.tokenizer import CTTokenizer
from app.training import checkpoints
from networks import make_vqvae
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
    ("grid", "codes"), [(None, ["OK"]), ((64, 6.0), ["OK"]), ((32, 500 / 64), ["FOV_CROPPED"])], ids=str
)
def test_a_raw_scan_gives_the_tokens_of_its_prepared_case(grid, codes, tmp_path, monkeypatch):
    small = cohort.Settings(*(grid or (64, 6.0)))
    if grid is None:  # a tokenizer that does not know: the default, which is large for a test
        monkeypatch.setattr(cohort, "Settings", lambda: small)
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
    monkeypatch.setattr(cohort, "Settings", lambda: SimpleNamespace(size=64, spacing=6.0))
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


def unreadable(*paths):
    """How a command is called that may not read these, nor may root."""
    for path in paths:
        path.chmod(0)
    allowed = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if allowed and shutil.which("setpriv") is None:
        pytest.skip("root may read everything here")
    return [*allowed, sys.executable, "-m", "app"]


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


def one_line(caught, code):
    line = str(caught.value)
    assert line.startswith(code + ": ") and "\n" not in line, line
    return line


def test_tokens_of_another_tokenizer(output_dir, dataset, tmp_path):
    other = save(make_network(num_blocks=0), tmp_path / "other")
    tokenize(dataset / "processed" / "case_a", tmp_path / "a.npz", tokenizer=other)
    result = reconstruct(tmp_path / "a.npz", tmp_path / "a.nii.gz", tokenizer=output_dir)
    assert result["refused"] == 1 and not (tmp_path / "a.nii.gz").exists()
    assert "made by tokenizer" in result["cases"][0]["message"]
    assert result["cases"][0]["codes"] == ["OTHER_TOKENIZER"]
    assert next(lines(result)).startswith("refused  a  OTHER_TOKENIZER: the tokens were made by")


def test_what_is_there_is_neither_mixed_up_nor_overwritten(output_dir, dataset, tmp_path):
    other = save(make_network(num_blocks=0), tmp_path / "other")
    case, out = dataset / "processed" / "case_a", tmp_path / "tokens"
    tokenize(case, out, tokenizer=other)
    before = (out / "case_a.npz").read_bytes()
    result = tokenize(case, out, tokenizer=output_dir)
    assert result["refused"] == 1 and "is there already, by tokenizer" in result["cases"][0]["message"]
    assert (out / "case_a.npz").read_bytes() == before
    assert tokenize(case, out, tokenizer=output_dir, overwrite=True)["ok"] == 1
    (tmp_path / "scan.nii.gz").write_bytes(b"mine")
    result = reconstruct(out / "case_a.npz", tmp_path / "scan.nii.gz", tokenizer=output_dir)
    assert result["refused"] == 1 and (tmp_path / "scan.nii.gz").read_bytes() == b"mine"


def test_several_scans_into_one_file(output_dir, dataset, tmp_path):
    with pytest.raises(Refused) as caught:
        tokenize(dataset, tmp_path / "all.npz", tokenizer=output_dir)
    assert "holds more than one scan" in one_line(caught, "MANY_SCANS")
    tokenize(dataset, tmp_path / "tokens", tokenizer=output_dir)
    with pytest.raises(Refused) as caught:
        reconstruct(tmp_path / "tokens", tmp_path / "all.nii.gz", tokenizer=output_dir)
    assert "holds 2 token files" in one_line(caught, "MANY_SCANS")


def test_out_where_a_file_lies(output_dir, dataset, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(Refused) as caught:
        tokenize(dataset, tmp_path / "mine" / "deeper", tokenizer=output_dir)
    assert "mine is a file" in one_line(caught, "NO_OUTPUT")
    assert (tmp_path / "mine").read_text() == "x"


def test_out_that_may_not_be_written_is_said_before_any_work(output_dir, dataset, tmp_path):
    (tmp_path / "closed").mkdir()
    call = unreadable(tmp_path / "closed")
    (tmp_path / "closed").chmod(0o555)
    words = ["tokenize", dataset, tmp_path / "closed" / "new" / "tokens", "--tokenizer", output_dir]
    done = subprocess.run([*call, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"NO_OUTPUT: {tmp_path / 'closed'} may not be written. ")
    assert "Give another OUT, or mend its permissions" in done.stderr


@pytest.mark.parametrize("suffix", ["npz", "nii.gz"])
def test_what_cannot_be_written_is_named_as_it_was_given(output_dir, dataset, tmp_path, monkeypatch, suffix):
    tokenize(dataset / "processed" / "case_a", tmp_path / "a.npz", tokenizer=output_dir)

    def denied(target, *given, **more):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))

    monkeypatch.setattr(np, "savez_compressed", denied)
    monkeypatch.setattr(nibabel, "save", lambda image, target: denied(target))
    command, source = ("tokenize", dataset / "processed" / "case_a") if suffix == "npz" else ("reconstruct", "a.npz")
    words = [command, tmp_path / source, tmp_path / f"b.{suffix}", "--tokenizer", output_dir]
    done = CliRunner().invoke(app, [*map(str, words)])
    told = f"NO_ACCESS: Permission denied: {tmp_path / 'b'}.{suffix}. Check the path and who may use it.\n"
    assert (done.exit_code, done.stderr) == (2, told)


def test_broken_tokens_in_out_say_how_to_make_them_again(output_dir, dataset, tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "case_a.npz").write_bytes(b"no zip")
    result = tokenize(dataset, tmp_path / "tokens", tokenizer=output_dir)
    assert (result["ok"], result["refused"]) == (1, 1)
    assert result["cases"][0]["codes"] == ["DAMAGED_TOKENS"] and "--overwrite" in result["cases"][0]["message"]
    assert tokenize(dataset, tmp_path / "tokens", tokenizer=output_dir, overwrite=True)["ok"] == 2


def test_a_scan_in_another_format_is_not_made(output_dir, dataset, tmp_path):
    tokenize(dataset / "processed" / "case_a", tmp_path / "a.npz", tokenizer=output_dir)
    with pytest.raises(Refused) as caught:
        reconstruct(tmp_path / "a.npz", tmp_path / "a.npy", tokenizer=output_dir)
    assert ".nii or .nii.gz" in one_line(caught, "NO_OUTPUT") and not (tmp_path / "a.npy").exists()
    nibabel.save(nibabel.Nifti1Image(hu_volume(), AFFINE), tmp_path / "scan.nii.gz")
    with pytest.raises(Refused) as caught:
        tokenize(tmp_path / "scan.nii.gz", tmp_path / "a.npy", tokenizer=output_dir)
    assert "ends in .npz" in one_line(caught, "NO_OUTPUT") and not (tmp_path / "a.npy").exists()
    (tmp_path / "volumes.1").mkdir()
    assert reconstruct(tmp_path / "a.npz", tmp_path / "volumes.1", tokenizer=output_dir)["ok"] == 1


def test_like_without_a_scan(output_dir, dataset, tmp_path):
    tokenize(dataset / "processed" / "case_a", tmp_path / "a.npz", tokenizer=output_dir)
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused) as caught:
        reconstruct(tmp_path / "a.npz", tmp_path / "a.nii.gz", tokenizer=output_dir, like=tmp_path / "empty")
    line = one_line(caught, "BAD_LIKE")
    assert "empty: 0 files, none of them a CT volume. Give" in line


def test_damaged_support_is_refused_and_the_rest_done(output_dir, dataset, tmp_path):
    tokenize(dataset, tmp_path / "tokens", tokenizer=output_dir, support=True)
    with np.load(tmp_path / "tokens" / "case_a.npz") as stored:
        arrays = dict(stored)
    np.savez(tmp_path / "tokens" / "case_a.npz", **{**arrays, "support_1": arrays["support_1"][:-3]})
    result = reconstruct(tmp_path / "tokens", tmp_path / "images", tokenizer=output_dir)
    assert (result["ok"], result["refused"]) == (1, 1)
    assert "support_1 must hold" in result["cases"][0]["message"]


def test_codes_beyond_the_codebook(tokenizer, dataset, tmp_path):
    tokens = tokenizer.encode(dataset / "processed" / "case_a")
    write_tokens(tmp_path / "a.npz", tokens.__class__(**{**tokens.__dict__, "codes": tokens.codes + 1000}))
    with pytest.raises(ValueError, match=r"tell codes up to 10\d\d, their tokenizer 7\. Tokenize the scan again"):
        tokenizer.decode(tmp_path / "a.npz")


@pytest.mark.parametrize("change", [{"windows": ("lung",)}, {"keep": "band"}, {"spacing": 1.0}], ids=str)
def test_tokens_that_say_other_things_than_their_tokenizer(tokenizer, dataset, change):
    tokens = tokenizer.encode(dataset / "processed" / "case_a")
    with pytest.raises(ValueError, match=f"the tokens tell {next(iter(change))} .* Tokenize the scan again") as refused:
        tokenizer.decode(replace(tokens, **change))
    assert refused.value.code == "DAMAGED_TOKENS"


def test_case_without_the_windows_of_the_tokenizer(output_dir, tmp_path):
    """An older tree with one graded window and no HU."""
    folder = tmp_path / "old" / "processed" / "case_c" / "windows"
    folder.mkdir(parents=True)
    np.save(folder / "bone_w1500_l300.npy", prepared.window_bytes(hu_volume(), "bone"))
    result = tokenize(tmp_path / "old", tmp_path / "tokens", tokenizer=output_dir)
    assert result["refused"] == 1 and "lacks window 'lung', it has bone" in result["cases"][0]["message"]
    assert result["cases"][0]["codes"] == ["OTHER_WINDOWS"]


def test_case_of_surfaces(output_dir, tmp_path):
    folder = tmp_path / "old" / "processed" / "case_c" / "windows"
    folder.mkdir(parents=True)
    for name in ("lung", "bone", "soft_tissue", "brain"):
        np.save(folder / f"{name}.npy", hu_volume() > 0)
    result = tokenize(tmp_path / "old", tmp_path / "tokens", tokenizer=output_dir)
    assert "holds 0/1 windows, surfaces and not HU" in result["cases"][0]["message"]


def test_continuous_autoencoder_is_no_tokenizer(tmp_path, dataset):
    torch.manual_seed(0)
    network = make_vqvae("tiny", widths=(8, 8, 8), model_channels=16, codebook="none")
    with pytest.raises(Refused) as caught:
        tokenize(dataset, tmp_path / "tokens", tokenizer=save(network, tmp_path / "vae"))
    assert caught.value.status == 2
    assert "makes no tokens" in one_line(caught, "NO_CODEBOOK")


def test_no_tokenizer_anywhere(tmp_path, dataset, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("app.training.shipped.pretrained_folder", lambda: tmp_path / "none ships")
    with pytest.raises(Refused) as caught:
        tokenize(dataset, tmp_path / "tokens")
    assert "vq_stage1.json" in one_line(caught, "NO_TOKENIZER")
    with pytest.raises(Refused) as caught:
        tokenize(dataset, tmp_path / "tokens", tokenizer="nowhere")
    assert "nowhere does not exist" in one_line(caught, "NO_TOKENIZER")


@pytest.mark.parametrize(
    "damage", ["tensor missing", "tensor of another shape", "cut short", "sizes of a later version", "no numbers"]
)
def test_damaged_checkpoints(output_dir, dataset, tmp_path, damage):
    state = dict(checkpoints.read_tensors(checkpoints.averaged_file(output_dir)))
    if damage == "tensor missing":
        del state["encoder.out_layer.weight"]
    if damage == "tensor of another shape":
        state["encoder.out_layer.weight"] = torch.zeros(3, 3)
    if damage == "no numbers":
        state["vq.embeddings.weight"] = state["vq.embeddings.weight"] * torch.nan
    if damage == "sizes of a later version":
        sizes = bytes(state["_extra_state"].tolist()).replace(b"resolution", b"revolution")
        state["_extra_state"] = torch.tensor(list(sizes), dtype=torch.uint8)
    torch.save(state, tmp_path / "model.pt")
    if damage == "cut short":
        (tmp_path / "model.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:-500])
    with pytest.raises(Refused) as caught:
        tokenize(dataset, tmp_path / "tokens", tokenizer=tmp_path / "model.pt")
    assert caught.value.status == 2
    one_line(caught, "BAD_CHECKPOINT")


def test_a_later_stage_may_change_how_gradients_pass_and_nothing_else(output_dir):
    network = make_network(rotation_trick=True)
    checkpoints.start_from(network, output_dir, codebook=True)
    assert torch.equal(network.vq.codebook, make_network().vq.codebook)
    with pytest.raises(Refused) as caught:
        checkpoints.start_from(make_network(quantizer_levels=2), output_dir, codebook=True)
    assert "quantizer_levels" in one_line(caught, "OTHER_TOKENIZER")


def test_missing_inputs(output_dir, tmp_path):
    with pytest.raises(Refused) as caught:
        tokenize(tmp_path / "nothing", tmp_path, tokenizer=output_dir)
    assert caught.value.status == 2
    one_line(caught, "NO_SOURCE")
    with pytest.raises(Refused) as caught:
        reconstruct(tmp_path / "nothing.npz", tmp_path, tokenizer=output_dir)
    one_line(caught, "NO_TOKENS")


def test_command_line_round_trip(output_dir, dataset, tmp_path):
    def call(*words):
        done = CliRunner().invoke(app, [*map(str, words), "--tokenizer", str(output_dir)])
        return done.exit_code, done.stdout

    case, tokens, image = dataset / "processed" / "case_a", tmp_path / "a.npz", tmp_path / "a.nii.gz"
    status, out = call("tokenize", case, tokens, "--support", "--json")
    told = json.loads(out)
    assert status == 0 and told["cases"][0]["count"] == len(read_tokens(tokens).codes)
    assert told["tokenizer"]["sha256"] == read_tokens(tokens).tokenizer
    status, out = call("reconstruct", tokens, image)
    assert status == 0 and out.splitlines()[0] == f"ok  a  {image}"
    tokens.write_bytes(tokens.read_bytes()[:100])
    status, out = call("reconstruct", tokens, tmp_path / "b.nii.gz")
    assert status == 3 and "a.npz is damaged or no token file" in out.splitlines()[0]
    assert call("tokenize", tmp_path / "nowhere", tokens)[0] == 2


@pytest.mark.parametrize("number", [errno.EROFS, errno.EISDIR, errno.ENAMETOOLONG, errno.EACCES])
def test_a_path_that_cannot_be_used_is_a_wrong_call(monkeypatch, number):
    def stop(*args, **kwargs):
        raise OSError(number, os.strerror(number), "/mnt/out")

    monkeypatch.setattr(commands, "tokenize", stop)
    done = CliRunner().invoke(app, ["tokenize", "scan.nii.gz", "/mnt/out"])
    assert done.exit_code == 2 and "/mnt/out" in done.stderr and "mistake" not in done.stderr
