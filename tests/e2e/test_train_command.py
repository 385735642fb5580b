"""`voxelingo train STAGE`: the same run as MONAI's command line makes, in this process, and what a mistake says."""

import json
import logging
import re
import signal
import sys

import pytest
from typer.testing import CliRunner

from app.__main__ import app
from app.shared.refusals import Refused
from app.training import run_errors
from app.training.train import train
from tests import runs

STEPS = {"warmup_steps": 2, "max_steps": 4, "i_save": 2, "val_interval": 4, "i_sample": 4}
TIMES = r"\d\d:\d\d:\d\d|\d+(\.\d+)?(e-\d+)? (s|min|h)\b"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = runs.make_place(tmp_path_factory.mktemp("train"))
    runs.make_cohort(place / "cohort")
    return place


def settings(out):
    return {**runs.TINY, **STEPS, "dataset_dir": "cohort", "output_dir": out}


def said(text, out):
    """Log lines of a run without times and its folder's name; MONAI's own lines are its own."""
    lines = [re.sub(TIMES, "T", line).replace(out, "OUT") for line in text.splitlines()]
    return [line for line in lines if line.startswith("T ")]


def hooks():
    root = logging.getLogger()
    handled = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    filters = [
        logging.getLogger(f"ignite.engine.engine.{name}").filters
        for name in ("SupervisedTrainer", "SupervisedEvaluator")
    ]
    return sys.excepthook, handled, list(root.handlers), root.level, [list(f) for f in filters], list(sys.path)


def test_both_routes_are_one_run_and_nothing_stays_behind(place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    monkeypatch.setattr("absl.logging.PythonHandler.close", lambda _: None)
    end = runs.run_in(place, **settings("by_monai"))
    assert end.status == 0, end.err
    run_errors.quiet_engines(end=True)  # MONAI's route leaves it to the end of the process
    before = hooks()
    capfd.readouterr()
    with runs.one_thread():  # as `run_in` has it: sums on two are in another order
        done = train("vq_stage1", **settings("by_train"))
    assert hooks() == before
    assert (done.stage, done.output_dir, done.step) == ("vq_stage1", "by_train", 4) and done.best_step in (0, 4)
    first, second = said(end.out, "by_monai"), said(capfd.readouterr().out, "by_train")
    assert len(first) > 6 and first == second
    monai, ours = place / "by_monai", place / "by_train"
    runs.assert_same_weights(runs.weights_of(monai, 4), runs.weights_of(ours, 4))
    assert runs.timeless(runs.rows_of(monai, None)) == runs.timeless(runs.rows_of(ours, None))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (monai, ours)]
    assert configs[0] | {"output_dir": "x"} == configs[1] | {"output_dir": "x"} and configs[1]["max_steps"] == 4
    assert (ours / "command.txt").read_text().startswith("voxelingo train vq_stage1 --scale demo --resolution 24 ")


def test_a_refusal_behind_monai_s_chain_is_raised_as_itself_and_nothing_stays_behind(place, monkeypatch):
    monkeypatch.chdir(place)
    before = hooks()
    with pytest.raises(Refused, match=r"^CORRUPT|^NO_CHECKPOINT: nowhere does not exist\. Train first") as end:
        train("vq_stage1", **settings("refused"), pretrained_vae_path="nowhere")
    assert hooks() == before and end.value.status == 2
    with pytest.raises(Refused, match=r"^NO_DATA: dataset_dir 'gone' is no folder\. Give the OUT of"):
        train("vq_stage1", **{**settings("refused"), "dataset_dir": "gone"})


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], r"NO_STAGE: no stage is named\. Give one of align, sdf_vqvae, vae, vq_stage1, vq_stage2 behind train\."),
        (["--max_steps", "5"], r"NO_STAGE: .*"),
        (["vq_stag1"], r"UNKNOWN_STAGE: there is no stage vq_stag1\. Did you mean vq_stage1\?"),
        (["zzz"], r"UNKNOWN_STAGE: there is no stage zzz\. It is one of align, .*"),
        (["nope/vae.json"], r"NO_CONFIG: config file nope/vae\.json does not exist\. Check the path\."),
        (["vae", "--config_file", "nope.json"], r"NO_CONFIG: config file nope\.json does not exist\. .*"),
        (["vae", "--config", "x.json"], r"UNKNOWN_KEY: this run has no key config\. Did you mean config_file\?"),
        (["vae", "--max_stepz", "5"], r"UNKNOWN_KEY: .* max_stepz\. Did you mean max_steps\?"),
        (["vae", "--max_steps", "-5"], r"BAD_VALUE: max_steps must be .*"),
        (["vae", "--grad_clip", "None"], r"NULL_IGNORED: .*"),
        (["vae", "max_steps", "5"], r"BAD_CALL: max_steps belongs to no key\. Give settings as --key value\."),
    ],
)
def test_a_mistake_on_the_line_is_one_line(words, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sigterm = signal.getsignal(signal.SIGTERM)
    done = CliRunner().invoke(app, ["train", *words])
    signal.signal(signal.SIGTERM, sigterm)
    assert done.exit_code == 2 and done.stdout == "" and re.fullmatch(line + "\n", done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_config_that_is_no_json_is_one_line(tmp_path):
    (tmp_path / "over.json").write_text("{")
    with pytest.raises(Refused, match=r"^BAD_CONFIG: .*over\.json cannot be read \(.*\)\. Correct it"):
        train("vae", config_file=str(tmp_path / "over.json"))


def test_null_is_set_in_python(place, monkeypatch):
    monkeypatch.chdir(place)
    only_stage1 = ("num_embeddings", "warmup_steps")
    given = {key: value for key, value in settings("null").items() if key not in only_stage1}
    train("vae", **given, grad_clip=None)
    assert json.loads((place / "null/config.json").read_text())["grad_clip"] is None


@pytest.mark.slow
def test_under_torchrun_it_is_the_run_that_monai_s_line_makes(place, monkeypatch):
    words = ["-m", "app", "train", "vq_stage1"]
    for launcher, out in ((words, "two_by_train"), (None, "two_by_monai")):
        given = [w for key, value in settings(out).items() for w in (f"--{key}", str(value))]
        both = "['bundles/vq_stage1.json','bundles/multi_gpu.json']"
        call = launcher or ["-m", "monai.bundle", "run", "training", "--config_file", both]
        command = [sys.executable, *runs.torchrun(), *call, *given]
        environment = {**runs.os.environ, "PYTHONPATH": str(runs.ROOT), "OMP_NUM_THREADS": "1"}
        end = runs.subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=500)
        assert end.returncode == 0, end.stderr[-2000:]
    runs.assert_same_weights(runs.weights_of(place / "two_by_train", 4), runs.weights_of(place / "two_by_monai", 4))
