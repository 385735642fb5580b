"""End-to-end runs: a tiny cohort, and bundle runs inside this process or as a real one.

Inside this process `python -m monai.bundle run` is repeated step by step (command line, fire, exception hook); what is
saved is the start-up of five seconds. Runs go in a folder of their own, from which only `bundles/` can be seen.
"""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from app import phantoms, prepared
from transforms.array import DEFAULT_WINDOWS

ROOT = Path(__file__).resolve().parents[2]
SIZE, SPACING = 24, 16.0
TINY = {  # a network and a run that take seconds; any of them can be given otherwise
    "scale": "demo",
    "resolution": SIZE,
    "spacing": SPACING,
    "num_embeddings": 16,
    "model_channels": 16,
    "num_blocks": 1,
    "batch_size_per_gpu": 1,
    "i_print": 1,
}


class Ended(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def last_error(self) -> str:
        lines = self.err.strip().splitlines()
        return lines[-1] if lines else ""


@pytest.fixture(scope="session")
def cohort(tmp_path_factory) -> Path:
    """Three phantoms to train on and two to validate, on the very grid that the tiny network takes."""
    return make_cohort(tmp_path_factory.mktemp("cohort") / "data", splits=("train",) * 3 + ("val",) * 2)


def make_cohort(out: Path, *, splits, change=lambda hu, index: hu) -> Path:
    rows = []
    for index, split in enumerate(splits):
        made = phantoms.make_phantom(index, size=SIZE, spacing=SPACING)
        hu = change(made.hu, index)
        case = prepared.write_case(out, f"case_{index}", hu, affine=made.affine, windows=DEFAULT_WINDOWS)
        rows.append({**prepared.metadata_row(case, windows=DEFAULT_WINDOWS), "patient": f"p{index}", "split": split})
    prepared.write_metadata(out, rows)
    return out


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The folder a run starts in."""
    (tmp_path / "bundles").symlink_to(ROOT / "bundles")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(config: str, settings: dict, *, run_id: str = "training") -> list[str]:
    given = {**TINY, **settings}
    return ["run", run_id, "--config_file", config, *(w for k, v in given.items() for w in (f"--{k}", str(v)))]


class _Left(BaseException):
    """What os._exit becomes while a run is inside this process."""


@pytest.fixture
def run_bundle(place, monkeypatch, capfd):
    """Runs a bundle as the command line does, and says how it ended."""

    def run(config: str = "bundles/vq_stage1.json", *, run_id: str = "training", **settings) -> Ended:
        def leave(status: int):
            raise _Left(status)

        capfd.readouterr()
        hook, argv = sys.excepthook, ["python/monai/bundle/__main__.py", *words(config, settings, run_id=run_id)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", argv)
            patch.setattr(os, "_exit", leave)
            try:
                status = _status_of_run()
            finally:
                sys.excepthook = hook
                torch.set_grad_enabled(True)
        out, err = capfd.readouterr()
        return Ended(status, out, err)

    return run


def _status_of_run() -> int:
    try:
        runpy.run_module("monai.bundle", run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except _Left as left:
            return left.args[0]
        return 1
    return 0


@pytest.fixture
def start_process(place):
    """Starts a real run and leaves it to the test; whatever still runs at the end is killed."""
    started = []

    def start(config: str = "bundles/vq_stage1.json", *, run_id: str = "training", launcher=(), **settings):
        command = [sys.executable, *launcher, "-m", "monai.bundle", *words(config, settings, run_id=run_id)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=place, env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def ended(process: subprocess.Popen, *, timeout: float = 120) -> Ended:
    out, err = process.communicate(timeout=timeout)
    return Ended(process.returncode, out, err)


def copy_of(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to
