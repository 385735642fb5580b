"""What end-to-end tests share: the tiny cohort, a folder to run in, runs in it (see tests/runs.py)."""

import shutil
from functools import partial
from pathlib import Path

import pytest

from tests import alignments, runs


@pytest.fixture(scope="session")
def cohort(tmp_path_factory) -> Path:
    return runs.make_cohort(tmp_path_factory.mktemp("cohort") / "data")


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A tokenizer, a Qwen3-VL on disk, and a manifest of token files with questions and reports."""
    return alignments.make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def aligned(home) -> Path:
    """A model aligned on it; whoever changes it takes a copy."""
    alignments.align(home, home / "aligned")
    return home / "aligned"


@pytest.fixture
def place(tmp_path) -> Path:
    """The folder a run starts in."""
    return runs.make_place(tmp_path)


@pytest.fixture
def run_bundle(place):
    return partial(runs.run_in, place)


@pytest.fixture
def start_process(place):
    """Starts real runs; whatever still runs at the end is killed."""
    started = []

    def start(*config, **settings):
        started.append(runs.start_in(place, *config, **settings))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def straight(cohort, tmp_path_factory) -> tuple[Path, runs.Ended]:
    """Twenty steps in one go, answering to MONAI's default name."""
    place = runs.make_place(tmp_path_factory.mktemp("straight"))
    end = runs.run_in(place, run_id="run", dataset_dir=cohort, output_dir="out", **runs.STEPS)
    assert end.status == 0, end.err
    return place / "out", end


@pytest.fixture
def earlier(straight, place) -> Path:
    """A copy of that run, to go on with or to spoil."""
    shutil.copytree(straight[0], place / "out")
    return place / "out"
