"""Names, ids, dates and free text planted in scans and their manifest: none of them is in anything that commands write.

`prepare` promises it of OUT and of every line it says; what is made from its output can then hold none either. A raw
scan given to `tokenize`, `reconstruct` or `ask` keeps its file's name where it is named, and nothing of its header.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.__main__ import app
from app.dataset import prepared
from tests import runs
from tests.markers import Markers, leaks, manifest_of, plant_labels, plant_refused, plant_scans

GRID = ("--size", "24", "--spacing", "6")
SETTINGS = {"spacing": 6.0, "min_points": 10, "max_steps": 4, "i_save": 2, "val_interval": 2, "i_sample": 2}
CODES = {**SETTINGS, "num_embeddings": 4}


def said_by(*words) -> bytes:
    """All that a command says, in this process."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code in (0, 3), done.output
    return done.output.encode()


def planted(tmp_path: Path, *, per_format: int, series: int) -> tuple[Path, Path, Markers]:
    raw, markers = tmp_path / "raw", Markers()
    plant_scans(raw, markers, per_format=per_format, series=series)
    plant_refused(raw, markers)
    plant_labels(raw, markers)
    return raw, manifest_of(raw, tmp_path / "reports.csv", markers), markers


def test_no_marker_reaches_a_prepared_dataset_its_tokens_or_what_is_said(tmp_path, home):
    raw, manifest, markers = planted(tmp_path, per_format=2, series=1)
    out, said = tmp_path / "out", {}
    said["prepare"] = said_by("prepare", raw, out, "--text", manifest, "--workers", 1, *GRID)
    assert len(prepared.find_cases(out)) >= 7 and len(markers.where) > 2000
    assert sum(len((d / "text.jsonl").read_text().splitlines()) for d in out.iterdir() if (d / "text.jsonl").exists())
    said["check"] = said_by("check", out, "--preset", "tiny")
    where = ("--tokenizer", home / "tokenizer.pt")
    said["tokenize"] = said_by("tokenize", out, tmp_path / "made/tokens", *where)
    said["reconstruct"] = said_by("reconstruct", tmp_path / "made/tokens", tmp_path / "made/images", *where)
    assert not leaks(markers, out, said) + leaks(markers, tmp_path / "made", {})
    assert len(leaks(markers, raw, {"way back": (tmp_path / "out.sources.csv").read_bytes()})) > 2000, "it can see them"


def test_of_a_raw_scan_only_its_name_is_kept(tmp_path, home, aligned):
    raw, markers = tmp_path / "raw", Markers()
    plant_scans(raw, markers, per_format=1, series=1)
    names = {marker for marker, where in markers.where.items() if "file" in where or "folder" in where}
    tool, said = ("--tokenizer", home / "tokenizer.pt"), {}
    said["tokenize"] = said_by("tokenize", raw, tmp_path / "made/tokens", *tool)
    said["reconstruct"] = said_by("reconstruct", tmp_path / "made/tokens", tmp_path / "made/images", *tool)
    where = ("--align", aligned, "--max-new-tokens", 2)
    said["ask"] = said_by("ask", raw, "Side?", *where, "--out", tmp_path / "made/a.jsonl")
    tokens = sorted((tmp_path / "made/tokens").rglob("*.npz"))
    assert len(tokens) == 4
    for marker in names:
        del markers.where[marker]
    assert not leaks(markers, tmp_path / "made", said)


@pytest.mark.slow
def test_no_marker_out_of_two_thousand_reaches_anything_made_from_a_prepared_dataset(tmp_path, home):
    raw, manifest, markers = planted(tmp_path, per_format=4, series=1)
    assert len(markers.where) >= 2000
    said = {}

    def run(name: str, *words) -> None:
        call = [sys.executable, "-m", "app", *map(str, words)]
        environment = {**os.environ, "PYTHONPATH": str(runs.ROOT)}
        done = subprocess.run(call, cwd=place, env=environment, capture_output=True, check=False)
        assert done.returncode in (0, 3), done.stderr[-2000:]
        said[name] = done.stdout + done.stderr

    def train(name: str, config: str, **settings) -> None:
        end = runs.run_in(place, config, **settings)
        assert end.status == 0, end.err
        said[name] = (end.out + end.err).encode()

    place = tmp_path / "place"
    place.mkdir()
    runs.make_place(place)
    run("prepare", "prepare", raw, "data", "--text", manifest, "--preview", "--workers", 2, *GRID)
    split_by_halves(place / "data")
    run("check", "check", "data")
    train("vae", "bundles/vae.json", dataset_dir="data", output_dir="vae", num_embeddings=None, **SETTINGS)
    train("stage 1", runs.STAGE1, dataset_dir="data", output_dir="vq", pretrained_vae_path="vae", **CODES)
    train("stage 2", "bundles/vq_stage2.json", dataset_dir="data", output_dir="vq2", init_from="vq", **CODES)
    run("tokenize", "tokenize", "data", "tokens", "--tokenizer", "vq", "--support")
    run("reconstruct", "reconstruct", "tokens", "images", "--tokenizer", "vq")
    language = {"data": "data", "vl_model": home / "qwen", "vae_ckpt": "vq", "output_dir": "align", "epochs": 1}
    train("align", "bundles/align.json", **language, use_lora=True, max_3d_tokens=40, **dict.fromkeys(runs.TINY))
    case = prepared.find_cases(place / "data")[0].path
    run("ask", "ask", case, "On which side?", "--align", "align", "--max-new-tokens", 4, "--out", "asked/a.jsonl")
    run("evaluate", "evaluate", "data", "--align", "align", "--max-new-tokens", 4, "--out", "evaluated")
    judged = {"dataset_dir": "data", "tokenizer": "vq", "output_dir": "card"}
    end = runs.run_in(place, "bundles/evaluate_tokenizer.json", run_id="run", **judged, **dict.fromkeys(runs.TINY))
    assert end.status == 0, end.err
    said["card"] = (end.out + end.err).encode()
    run("export", "export", "bundle", "--tokenizer", "vq", "--align", "align", "--zip")
    for beside in place.glob("data.*"):  # the way back, for its owner alone
        shutil.move(beside, tmp_path)
    (place / "bundles").unlink()
    print(json.dumps({"markers": len(markers.where), "files": sum(p.is_file() for p in place.rglob("*"))}))
    assert not leaks(markers, place, said)


def split_by_halves(data: Path) -> None:
    """Every second case to the other side, so that each stage has something to judge by."""
    for table in data.glob("*/metadata.csv"):
        lines = table.read_text().splitlines()
        at = lines[0].split(",").index("split")
        rows = [line.split(",") for line in lines[1:]]
        for number, row in enumerate(rows):
            row[at] = ("train", "val")[number % 2]
        table.write_text("\n".join([lines[0], *(",".join(row) for row in rows)]) + "\n")
