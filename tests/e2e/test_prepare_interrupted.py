"""`prepare` when it is killed, stopped, short of workers or spread over a cluster: the same bytes in the end."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from app.dataset import prepared
from app.prepare import cohort
from app.shared import workers
from app.shared.workers import run_jobs, worker_count
from tests.cohorts import SMALL, raw_cohort, report, tree


def _slow_start(raw, out, key):
    command = [sys.executable, "-m", "app", "prepare", str(raw), str(out), "--key-file", str(key)]
    return subprocess.Popen(
        [*command, "--size", "64", "--spacing", "3", "--workers", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill_and_resume(tmp_path, *, kills: int) -> int:
    """Kills a cohort run at random instants, resuming it after most; how many of the kills met a half-done OUT."""
    raw, key = raw_cohort(tmp_path / "raw", 12), tmp_path / "key"
    key.write_text("k")
    settings, request = cohort.PrepareSettings(size=64, spacing=3.0), cohort.Request(key_file=str(key), workers=1)
    cohort.prepare(raw, tmp_path / "whole", settings, request)
    whole, rng, met, out = tree(tmp_path / "whole"), np.random.default_rng(3), 0, tmp_path / "out"
    for _ in range(kills):
        process = _slow_start(raw, out, key)
        start = time.time()
        while not list(out.glob("*/processed/.*")) and process.poll() is None and time.time() - start < 60:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        seen = prepared.find_cases(out) if list(out.glob("*/processed/[!.]*")) else []
        for case in seen:  # whatever is visible is whole
            assert (case.path / "case.json").is_file() and case.hu().shape == (64, 64, 64)
            assert len(list((case.path / "windows").iterdir())) == 4
        met += len(seen) < 13
        if len(seen) == 13 or rng.random() < 0.7:  # else the next kill meets what this one left
            cohort.prepare(raw, out, settings, request)
            assert tree(out) == whole
            shutil.rmtree(out)
    cohort.prepare(raw, out, settings, request)
    assert tree(out) == whole
    return met


def test_killed_runs_end_with_the_same_bytes(tmp_path):
    assert kill_and_resume(tmp_path, kills=2) >= 1


@pytest.mark.slow
def test_fifty_killed_runs_end_with_the_same_bytes(tmp_path):
    assert kill_and_resume(tmp_path, kills=50) >= 25


def test_ctrl_c_ends_a_run_at_once_in_one_line(tmp_path):
    raw, out = raw_cohort(tmp_path / "raw", 12), tmp_path / "out"
    command = [sys.executable, "-m", "app", "prepare", str(raw), str(out), "--size", "256", "--workers", "2"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a job in the background has none
    )
    while not list(out.glob("*/processed/*")) and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 130 and said[-1].startswith("STOPPED") and "Traceback" not in "".join(said)
    assert len(list(out.glob("*/processed/[!.]*"))) < 12


@pytest.mark.parametrize("ended_by", [KeyboardInterrupt, OSError])
def test_no_thread_of_a_pool_outlives_a_run_that_ends_early(ended_by):
    before = set(threading.enumerate())

    def at_the_first_result(_):
        raise ended_by

    with pytest.raises(ended_by):
        workers._in_processes(time.sleep, [0.0, *[0.5] * 9], failed=float, workers=2, step=at_the_first_result)
    assert set(threading.enumerate()) <= before


def _die_on_three(job: int) -> int:
    if job == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return job * job


def test_a_worker_that_dies_takes_no_other_case_with_it():
    results = run_jobs(_die_on_three, list(range(6)), failed=lambda job: -job, workers=2)
    assert sorted(results) == [-3, 0, 1, 4, 16, 25]


def test_what_a_killed_worker_leaves_half_written_is_cleared(tmp_path, monkeypatch):
    def killed_while_writing(work, jobs, **rest):
        outcomes = run_jobs(work, jobs, **rest)
        half = Path(jobs[0].folder) / "processed" / f".{jobs[0].case}.abcd_123.unfinished"
        half.mkdir()
        (half / "case.json").write_text("{")
        return outcomes

    raw, key = raw_cohort(tmp_path / "raw", 1), tmp_path / "key"
    key.write_text("k")
    report(raw, tmp_path / "whole", key_file=str(key))
    monkeypatch.setattr(cohort, "run_jobs", killed_while_writing)
    report(raw, tmp_path / "out", key_file=str(key))
    assert sorted(tree(tmp_path / "out")) == sorted(tree(tmp_path / "whole"))


def test_workers_fit_cores_memory_and_jobs(capsys):
    assert worker_count(8, 1 << 20, 1) == 1
    assert worker_count(8, 1 << 60, 8) == 1
    assert "memory" in capsys.readouterr().err
    assert worker_count(1, 1 << 20, 8) == 1 and capsys.readouterr().err == ""


def test_a_cluster_makes_the_same_bytes_though_a_worker_is_killed(tmp_path):
    distributed = pytest.importorskip("distributed")
    raw, key = raw_cohort(tmp_path / "raw", 6), tmp_path / "key"
    key.write_text("k")
    report(raw, tmp_path / "alone", key_file=str(key))
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as cluster:
        with distributed.Client(cluster) as client:
            pids = client.run(os.getpid)
            victim = sorted(pids.values())[0]
        threading.Timer(0.5, os.kill, (victim, signal.SIGKILL)).start()
        result = cohort.prepare(
            raw, tmp_path / "out", SMALL, cohort.Request(key_file=str(key), cluster=cluster.scheduler_address)
        )
    assert result.count("ok") == 7
    assert tree(tmp_path / "out") == tree(tmp_path / "alone")
