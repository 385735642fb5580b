"""A bundle as its new owner has it: another directory, no checkout, no installed project, MONAI's own commands."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import verify_metadata

from app.export import code
from app.export import export as exporting
from app.language.assistant import CTAssistant, read_settings
from app.shared.refusals import Refused
from app.tokens.open_scan import Volume
from app.tokens.token_files import read_tokens
from app.tokens.tokenizer import CTTokenizer
from app.tokens.volumes import onto_grid, write_nifti
from app.training import checkpoints
from tests import tiny_tokenizer as tiny
from tests.runs import assert_same_story, rows_of, told_by, torchrun

ALONE = """
import sys, runpy
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("app", "networks", "transforms"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
"""
COMMAND = "sys.argv[0] = 'monai/bundle/__main__.py'\nrunpy.run_module('monai.bundle', run_name='__main__')\n"


def alone(script, place, *words):
    """A process that can reach nothing of the project but what a bundle brings."""
    place.mkdir(exist_ok=True)
    return ended_well([sys.executable, "-I", "-B", "-c", ALONE + script, *map(str, words)], place)


def ended_well(call, place):
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(call, cwd=place, env=kept, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.fixture(scope="session")
def exported(home, aligned, tmp_path_factory):
    """The bundle of an aligned model with its zip, and what the command says of it."""
    out = tmp_path_factory.mktemp("exported") / "ct"
    told = exporting.export(out, tokenizer=home / "tokenizer.pt", align=aligned, zipped=True)
    return out, told


@pytest.fixture(scope="session")
def scan(tmp_path_factory):
    path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    write_nifti(path, Volume(tiny.hu_volume(), tiny.AFFINE))
    return path


def test_an_export_is_whole_and_proven(exported, home):
    out, told = exported
    assert told["proof"]["equal"] == {"read": 1.0, "loaded": 1.0} and told["proof"]["tokens"] > 50
    assert {path.name for path in out.iterdir()} == {
        "LICENSE", "configs", "docs", "models", "requirements.txt", told["package"],
    }  # fmt: skip
    assert not list(out.rglob("__pycache__")) and not [p for p in out.parent.iterdir() if p.name.startswith(".")]
    state = torch.load(out / "models" / "model.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert told["tokenizer"] == CTTokenizer.from_pretrained(home / "tokenizer.pt").digest


def test_its_metadata_pass_monais_own_check_without_a_network(exported):
    configs = exported[0] / "configs"
    verify_metadata(meta_file=str(configs / "metadata.json"), filepath=str(configs / "meta_schema_20240725.json"))


def test_nothing_in_it_names_a_place_of_its_maker(exported, home):
    for path in exported[0].rglob("*"):
        if path.is_file():
            assert str(home).encode() not in path.read_bytes(), path


def test_inference_runs_wherever_the_bundle_is_moved_to_and_gives_the_projects_reconstruction(
    exported, scan, home, tmp_path
):
    moved = Path(shutil.copytree(exported[0], tmp_path / "moved" / "renamed"))
    config = moved / "configs" / "inference.json"
    alone(COMMAND, tmp_path / "else", "run", "--config_file", config, "--scan", scan, "--output_dir", tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.nii.gz")
    assert not list(moved.rglob("__pycache__"))
    ct = CTTokenizer.from_pretrained(home / "tokenizer.pt")
    tokens = ct.encode(scan)
    expected = np.rint(onto_grid(ct.decode(tokens), tokens.source_shape, tokens.source_affine).hu)
    image = nibabel.load(file)
    assert np.allclose(image.affine, tokens.source_affine, atol=1e-3) and image.get_data_dtype() == np.int16
    assert np.abs(np.asarray(image.dataobj) - expected).max() <= 1


def test_the_command_of_its_card_runs_from_elsewhere(exported, scan, tmp_path):
    """As it stands there, with another command of the same code."""
    out, told = exported
    (line,) = re.findall(r"^PYTHONPATH=BUNDLE python -m (\S+) prepare RAW", (out / "docs/README.md").read_text(), re.M)
    call = [sys.executable, "-B", "-m", line, "tokenize", str(scan), "tokens.npz", "--tokenizer", str(out)]
    kept = {**os.environ, "PYTHONPATH": str(out)}
    ended = subprocess.run(call, cwd=tmp_path, env=kept, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert read_tokens(tmp_path / "tokens.npz").tokenizer == told["tokenizer"]


def test_training_goes_on_with_the_owners_data(exported, cohort, tmp_path):
    words = ["--dataset_dir", cohort, "--output_dir", tmp_path / "out", "--max_steps", "2", "--i_save", "2",
             "--val_interval", "2", "--i_log", "1", "--num_workers", "0"]  # fmt: skip
    config = exported[0] / "configs" / "train.json"
    alone(COMMAND, tmp_path / "else", "run", "training", "--config_file", config, *words)
    assert [row["step"] for row in rows_of(tmp_path / "out")][-1] == 2
    went_on = CTTokenizer.from_pretrained(tmp_path / "out")
    assert went_on.sizes.resolution == 32 and went_on.digest != exported[1]["tokenizer"]


@pytest.mark.slow
def test_its_overlay_trains_in_two_processes_as_one_would(exported, cohort, tmp_path):
    """Two ranks (gloo, on CPUs) of the bundle's own code, each with half of what one process takes a step."""
    configs, place = exported[0] / "configs", tmp_path / "else"
    shared = ["--dataset_dir", cohort, "--max_steps", "2", "--i_save", "2", "--val_interval", "2", "--i_log", "1",
              "--num_workers", "0"]  # fmt: skip
    one = ["--batch_size_per_gpu", "2", "--output_dir", tmp_path / "one"]
    alone(COMMAND, place, "run", "training", "--config_file", configs / "train.json", *shared, *one)
    (place / "bundle.py").write_text(ALONE + COMMAND)
    both = f"['{configs / 'train.json'}','{configs / 'multi_gpu_train.json'}']"
    words = ["run", "training", "--config_file", both, *shared, "--batch_size_per_gpu", "1"]
    launcher = [*torchrun(), place / "bundle.py", *words, "--output_dir", tmp_path / "two"]
    ended_well([sys.executable, "-I", "-B", *map(str, launcher)], place)
    assert_same_story(told_by(tmp_path / "two"), told_by(tmp_path / "one"))
    assert checkpoints.complete_steps(tmp_path / "two") == [2]


def test_evaluation_writes_a_card_of_the_owners_data(exported, cohort, tmp_path):
    config = exported[0] / "configs" / "evaluate.json"
    words = ["run", "--config_file", config, "--dataset_dir", cohort, "--output_dir", tmp_path / "card"]
    alone(COMMAND, tmp_path / "else", *words)
    card = json.loads((tmp_path / "card" / "tokenizer_card.json").read_text())
    assert card["tokenizer"]["sha256"] == exported[1]["tokenizer"] and card["data"]["cases"] == 2


def test_an_aligned_bundle_answers_as_the_run_it_is_from(exported, aligned, home, scan, tmp_path):
    config = exported[0] / "configs" / "ask.json"
    asked = ["--scan", scan, "--question", "On which side?", "--max_new_tokens", "8"]
    words = ["run", "--config_file", config, *asked, "--language_model", home / "qwen"]
    said = alone(COMMAND, tmp_path / "else", *words)
    expected = CTAssistant.from_pretrained(aligned).ask(scan, "On which side?", max_new_tokens=8)
    assert f"On which side?\n{expected.answer}\n" in said and expected.notice in said
    here = CTAssistant.from_pretrained(exported[0], language_model=str(home / "qwen"))
    assert here.ask(scan, "On which side?", max_new_tokens=8).answer == expected.answer


def test_two_versions_live_in_one_process(exported, scan, tmp_path, monkeypatch):
    """Other weights, other code, another version: each bundle's tokens are its own."""
    monkeypatch.setattr(exporting, "VERSION", "9.9.9")
    sources = {**code.read_sources(), "networks/later.py": '"""Of a later version."""\n'}
    monkeypatch.setattr(code, "read_sources", lambda: sources)
    other = CTTokenizer(tiny.make_network(), digest="other")
    told = exporting.write_bundle(tmp_path / "two", other, name="ct", align=None, settings=None)
    script = """
import importlib, json
from pathlib import Path
from monai.bundle import load
found = []
for root, package in (sys.argv[1:3], sys.argv[3:5]):
    network = load(Path(root).name, bundle_dir=Path(root).parent, device="cpu")
    made = importlib.import_module(package + ".app.tokens.tokenizer").CTTokenizer(network, digest="")
    found.append([type(network).__module__, made.encode(Path(sys.argv[5])).codes.tolist()])
print(json.dumps(found))
"""
    words = [exported[0], exported[1]["package"], tmp_path / "two", told["code"]["package"], scan]
    first, second = json.loads(alone(script, tmp_path / "else", *words).splitlines()[-1])
    assert first[0] == f"{exported[1]['package']}.networks.vqvae" != second[0]
    assert first[1] == CTTokenizer.from_pretrained(exported[0]).encode(scan).codes.tolist()
    assert second[1] == other.encode(scan).codes.tolist()


def test_the_same_input_packs_to_the_same_bytes(exported, home, aligned, tmp_path):
    made = CTTokenizer.from_pretrained(home / "tokenizer.pt")
    settings = read_settings(aligned)
    exporting.write_bundle(tmp_path / "ct", made, name="ct", align=aligned, settings=settings)
    exporting.write_zip(tmp_path / "ct", tmp_path / "again.zip")
    archive = exported[0].with_name("ct.zip")
    assert archive.read_bytes() == (tmp_path / "again.zip").read_bytes()
    with zipfile.ZipFile(archive) as packed:
        assert len(packed.namelist()) == sum(path.is_file() for path in exported[0].rglob("*"))


def spoil_weights(monkeypatch):
    write = exporting._write_weights

    def spoilt(models, made):
        write(models, made)
        state = torch.load(models / "model.pt", weights_only=True)
        name = next(name for name in state if name.startswith("encoder.") and name.endswith("weight"))
        torch.save({**state, name: -state[name]}, models / "model.pt")

    monkeypatch.setattr(exporting, "_write_weights", spoilt)


def forget_a_file(monkeypatch):
    sources = {path: text for path, text in code.read_sources().items() if path != "networks/fsq.py"}
    monkeypatch.setattr(code, "read_sources", lambda: sources)


def break_off(monkeypatch):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "prove", stop)


@pytest.mark.parametrize("spoil", [spoil_weights, forget_a_file, break_off])
def test_what_does_not_prove_itself_leaves_nothing(spoil, home, tmp_path, monkeypatch):
    spoil(monkeypatch)
    with pytest.raises((Refused, KeyboardInterrupt)):
        exporting.export(tmp_path / "ct", tokenizer=home / "tokenizer.pt", zipped=True)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(home, tmp_path, capsys):
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct" / "mine.txt").write_text("mine")
    with pytest.raises(Refused, match=r"^EXISTS: "):
        exporting.export(tmp_path / "ct", tokenizer=home / "tokenizer.pt")
    assert (tmp_path / "ct" / "mine.txt").read_text() == "mine"
