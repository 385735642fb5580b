"""`tokenize` and `reconstruct` where something is wrong: one line with its code, and nothing is overwritten."""

import errno
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from app.__main__ import app
from app.dataset import prepared
from app.prepare import Refused
from app.tokens import commands
from app.tokens.commands import lines, reconstruct, tokenize
from app.tokens.token_files import read_tokens, write_tokens
from app.training import checkpoints
from networks import make_vqvae
from tests.access import unreadable
from tests.tiny_tokenizer import AFFINE, hu_volume, make_network, save

ROOT = Path(__file__).resolve().parents[3]


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
    assert "ends in .nii, .nii.gz" in one_line(caught, "NO_OUTPUT") and not (tmp_path / "a.npy").exists()
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
