"""SIGKILL at random instants, then the same command again: what is left must be that of a run nobody killed.

    python -m tests.benchmarks.attack_kills FOLDER [prepare,vq_stage1,align] [kills] [seed]

Each run is a process of its own, forked from this one, which has imported everything already: the instants fall into
the work, not into the start-up. One killed run in three is killed once more while it resumes. FOLDER holds the runs of
which the results differ; the others are removed.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from app.prepare import cohort
from tests.alignments import align, make_home
from tests.cohorts import raw_cohort, tree
from tests.runs import make_cohort, make_place, run_in, timeless

STEPS = {"warmup_steps": 8, "max_steps": 40, "i_save": 3, "val_interval": 8, "i_sample": 20, "keep_last": 3}
AGAIN_SHARE = 1 / 3


class Attack(NamedTuple):
    """A run in a folder, and what it leaves there, as values that compare."""

    begin: Callable[[Path], None]
    resume: Callable[[Path], None]
    result: Callable[[Path], dict]


def prepare_attack(folder: Path) -> Attack:
    raw, key = raw_cohort(folder / "raw", 6), folder / "key"
    key.write_text("k")
    settings = cohort.PrepareSettings(size=64, spacing=3.0)

    def run(place: Path) -> None:
        request = cohort.Request(key_file=str(key), workers=1 + int(place.name) % 2, preview=True)
        report = cohort.prepare(raw, place / "out", settings, request)
        assert report.count("ok") == 7 and report.exit_status == 0

    return Attack(run, run, lambda place: tree(place / "out"))


def stage1_attack(folder: Path) -> Attack:
    data = make_cohort(folder / "data")

    def run(place: Path, **more) -> None:
        if not (place / "bundles").exists():
            make_place(place)
        end = run_in(place, dataset_dir=data, output_dir="out", num_workers=int(place.name) % 2, **STEPS, **more)
        assert end.status == 0, end.err

    return Attack(run, lambda place: run(place, resume="latest"), lambda place: results_of_training(place / "out"))


def align_attack(folder: Path) -> Attack:
    home = folder / "home"
    home.mkdir()
    make_home(home)
    torch.set_num_threads(1)

    def run(place: Path, **more) -> None:
        align(home, place / "out", **more)

    return Attack(run, lambda place: run(place, resume="latest"), lambda place: results_of_training(place / "out"))


def results_of_training(out: Path) -> dict:
    """Rows without their seconds, every tensor that was written, and what else says how it went."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    results = {"metrics.jsonl": timeless(rows)}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.suffix in (".pt", ".part") and "aside" not in path.parts:
            results[name] = values_of(torch.load(path, weights_only=True))
        elif path.suffix in (".safetensors", ".png", ".csv") or path.name in ("best.json", "train_args.json"):
            results[name] = path.read_bytes()
        elif path.name.endswith("_model_summary.txt"):
            results[name] = path.read_text()
    return results


def values_of(stored: object) -> object:
    """Nested dicts and lists with their tensors as bytes, which compare."""
    if isinstance(stored, torch.Tensor):
        return str(stored.dtype), tuple(stored.shape), stored.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(stored, dict):
        return {name: values_of(value) for name, value in stored.items()}
    if isinstance(stored, list | tuple):
        return [values_of(value) for value in stored]
    return stored


ATTACKS = {"prepare": prepare_attack, "vq_stage1": stage1_attack, "align": align_attack}


def in_process(work: Callable[[Path], None], place: Path) -> multiprocessing.Process:
    """Starts it in a process group of its own, silent; its complaints lie beside."""

    def alone() -> None:
        os.setsid()
        said = os.open(place / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        work(place)

    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    return process


def finish(process: multiprocessing.Process, place: Path) -> None:
    process.join(timeout=300)
    assert process.exitcode == 0, f"ended with {process.exitcode}: {(place / 'said.txt').read_text()[-3000:]}"


def kill(process: multiprocessing.Process, seconds: float) -> bool:
    """Kills it and its workers after that time; whether it was still running."""
    process.join(timeout=seconds)
    running = process.exitcode is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return running


def attack(name: str, folder: Path, kills: int, seed: int) -> dict:
    folder.mkdir(parents=True)
    it, rng = ATTACKS[name](folder), np.random.default_rng(seed)
    whole, seconds = [], []
    for number in (0, 1):  # the second one on two workers, and to see that two whole runs agree
        place = folder / f"{number}"
        place.mkdir()
        start = time.perf_counter()
        finish(in_process(it.begin, place), place)
        seconds.append(time.perf_counter() - start)
        whole.append(it.result(place))
    assert not different(*whole), f"two whole runs of {name} differ in {different(*whole)}"
    done, late, wrong, number = 0, 0, [], 2
    while done < kills:
        place = folder / f"{number}"
        place.mkdir()
        met = kill(in_process(it.begin, place), rng.uniform(0.02, 1.0) * seconds[number % 2])
        again = rng.random() < AGAIN_SHARE
        met += again and kill(in_process(it.resume, place), rng.uniform(0.02, 1.0) * seconds[number % 2])
        try:
            finish(in_process(it.resume, place), place)
            files = different(whole[0], it.result(place))
        except AssertionError as error:
            files = [str(error)]
        if files:
            wrong.append((place.name, files))
            print(f"{name} {place.name}: {files} differ", flush=True)
        else:
            shutil.rmtree(place)
        done, late, number = done + met, late + (not met), number + 1
    told = {"run": name, "kills": done, "ended_before": late, "differences": len(wrong), "seconds": max(seconds)}
    print(json.dumps(told), flush=True)
    return told


def different(one: dict, other: dict) -> list[str]:
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]


def main() -> None:
    folder = Path(sys.argv[1])
    chosen = sys.argv[2].split(",") if len(sys.argv) > 2 else list(ATTACKS)
    kills = int(sys.argv[3]) if len(sys.argv) > 3 else 50
    seed = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    torch.set_num_threads(1)
    told = [attack(name, folder / name, kills, seed) for name in chosen]
    print(json.dumps({"benchmark": "kills", "of": told}))
    sys.exit(any(row["differences"] for row in told))


if __name__ == "__main__":
    main()
