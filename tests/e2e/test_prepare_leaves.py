"""What lies in or beside OUT and is not ours stays; what a call cannot have meant is refused before any work."""

import json
import os

import numpy as np
import pytest

from app.__main__ import app
from app.dataset import writer
from app.evaluation import evaluate
from app.language import ask
from app.prepare import cohort
from app.tokens import commands
from tests import scans
from tests.cohorts import AFFINE, SMALL, raw_cohort, report, tree


def theirs(out) -> dict[str, bytes]:
    """Hidden files and folders of the user's, wherever `prepare` writes."""
    places = [".gitlab-ci.yml", "tools/.env.production", "tools/.venv/bin/x", "tools/processed/.idea/x"]
    places += ["tools/.123.metadata.csv", "tools/previews/.1.x.png"]  # no dataset of this run
    for dataset in out.iterdir() if out.exists() else ():
        places += [f"{dataset.name}/{name}" for name in (".gitlab-ci.yml", ".env.production", ".venv/bin/x", ".a.b.c")]
        places += [f"{dataset.name}/processed/{name}" for name in (".DS_Store", ".git.d/x", ".x.abcdefgh/y", ".h.old")]
        places += [f"{dataset.name}/previews/{name}" for name in (".DS_Store", ".x.png", ".thumbs/y.png")]
    for place in places:
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        (out / place).write_text("mine")
    return {place: b"mine" for place in places}


def test_hidden_files_that_prepare_never_wrote_stay(tmp_path):
    raw = raw_cohort(tmp_path / "raw", 1)
    report(raw, tmp_path / "out")
    mine = theirs(tmp_path / "out")
    (tmp_path / "out.lock").write_text("mine")
    report(raw, tmp_path / "out", overwrite=True)
    after = tree(tmp_path / "out")
    assert {place: after.get(place) for place in mine} == mine
    assert (tmp_path / "out.lock").read_text() == "mine"


def test_what_a_killed_run_left_is_cleared(tmp_path, monkeypatch):
    """The names are those that a run that is killed leaves: taken from the run itself."""
    raw, seen = raw_cohort(tmp_path / "raw", 1), []
    whole = report(raw, tmp_path / "out", preview=True)
    before = tree(tmp_path / "out")
    (dataset,) = {o.dataset for o in whole.outcomes if o.source.startswith("hospital")}
    folder = tmp_path / "out" / dataset
    case = next(o.case for o in whole.outcomes if o.dataset == dataset)
    monkeypatch.setattr(writer.shutil, "rmtree", lambda path, **_: seen.append(path))
    monkeypatch.setattr(writer, "_write_volume", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.write_case(folder, case, np.zeros((2, 2, 2), np.int16), affine=AFFINE, windows=())
    monkeypatch.undo()
    (half,) = seen
    (half / "case.json").write_text("{")
    half.with_name(f"{half.name}.old").mkdir()
    for name in ("metadata.csv", "failures.csv", "dataset_config.json", "text.jsonl", f"previews/{case}.png"):
        place = folder / name
        place.with_name(f".{os.getpid()}.{place.name}").write_text("half")
    assert tree(tmp_path / "out") != before and half.is_dir()
    report(raw, tmp_path / "out", preview=True)
    assert tree(tmp_path / "out") == before and not half.exists() and not half.with_name(f"{half.name}.old").exists()


def test_an_empty_path_is_refused_by_every_command_that_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scans.nifti_scan(tmp_path / "v.nii")
    for call, name in (
        (lambda: cohort.prepare("v.nii", "", SMALL), "OUT"),
        (lambda: cohort.prepare("", "../out", SMALL), "RAW"),
        (lambda: commands.tokenize("v.nii", ""), "OUT"),
        (lambda: commands.tokenize(" ", "out"), "SOURCE"),
        (lambda: commands.reconstruct("v.nii", ""), "OUT"),
        (lambda: commands.reconstruct("", "out"), "TOKENS"),
        (lambda: ask.ask("v.nii", [], out=""), "OUT"),
        (lambda: ask.ask("", []), "SCAN"),
        (lambda: evaluate.evaluate(None, output_dir=""), "OUT"),
    ):
        with pytest.raises(ValueError, match=f"{name} is empty"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["v.nii"]


def test_the_command_line_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["prepare", ".", "", "--json"])
    assert done.exit_code == 2
    assert json.loads(done.stdout.splitlines()[-1])["error"].startswith("BAD_VALUE: OUT is empty")
    assert not list(tmp_path.iterdir())
