"""The three training bundles of one tokenizer, run as a user runs them, in a given time of wall clock.

How many steps fit is found by a short trial of each stage, whose weights are thrown away. A stage that takes longer
than it may is ended; what it saved last counts.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from app.training import checkpoints

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("vae", "vq_stage1", "vq_stage2")
SHARES = {"vae": 0.25, "vq_stage1": 0.05}  # of the time; stage 2 has the rest
MARGIN = 0.97  # of what a stage's rate promises: validation and saving take their part


def environment_of_runs() -> dict[str, str]:
    """This code first, wherever the run starts; packages that lie elsewhere stay in reach."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}


class Rate(NamedTuple):
    steps_per_second: float
    overhead: float  # seconds of a run that are no steps


class TimedStages:
    """Runs in `place`; `settings` are flat keys by stage, `say` hears how it goes."""

    def __init__(self, place: Path, *, settings: dict[str, dict[str, Any]], say: Callable[[str], None]):
        self.place, self.settings, self.say = place, settings, say
        place.mkdir(parents=True, exist_ok=True)

    def words(self, stage: str, folder: str, steps: int) -> list[str]:
        settings = {
            "output_dir": f"{folder}/{stage}",
            "max_steps": steps,
            "i_print": 10,
            "i_log": 50,
            "i_sample": steps,
            "val_interval": steps,  # nothing is chosen by what the judge will see: the last step counts
            "i_save": max(steps // 8, 1) if folder == "run" else steps,  # saving would count as steps in a trial
            **self.settings[stage],
        }
        if stage == "vq_stage1":
            settings["pretrained_vae_path"] = f"{folder}/vae"
        if stage == "vq_stage2":
            settings["init_from"] = f"{folder}/vq_stage1"
        return [word for name, value in settings.items() for word in (f"--{name}", str(value))]

    def run(self, stage: str, folder: str, steps: int, *, limit: float) -> float:
        """Seconds that it took."""
        config = str(ROOT / "bundles" / f"{stage}.json")
        call = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", config]
        call += self.words(stage, folder, steps)
        log, started = self.place / f"{folder}_{stage}.log", time.perf_counter()
        with open(log, "w") as said:
            process = subprocess.Popen(
                call, cwd=self.place, env=environment_of_runs(), stdout=said, stderr=subprocess.STDOUT
            )
            try:
                status = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                status = _end(process)
        seconds = time.perf_counter() - started
        self.say(f"{folder}/{stage}: {steps} steps in {seconds:.0f} s, status {status}")
        told, _ = logged_steps(self.place / folder / stage / "log.txt")
        if len(told) < 2 or not checkpoints.complete_steps(self.place / folder / stage):
            sys.exit(f"{stage} ended too early to be timed:\n{log.read_text()[-3000:]}")
        return seconds

    def rate(self, stage: str, *, steps: int) -> Rate:
        """By the second half of a short trial: before, kernels compile and the loader has samples in store."""
        whole = self.run(stage, "trial", steps, limit=420)
        at, times = logged_steps(self.place / "trial" / stage / "log.txt")
        half = len(at) // 2
        per_second = (at[-1] - at[half]) / max(times[-1] - times[half], 1e-6)
        return Rate(per_second, max(whole - at[-1] / per_second, 0.0))

    def train(self, seconds: float, *, trial_steps: int) -> tuple[Path, dict[str, Any]]:
        """The averaged weights of stage 2, and how they came about. The trials are not counted."""
        for folder in ("trial", "run"):
            shutil.rmtree(self.place / folder, ignore_errors=True)
        rates = {stage: self.rate(stage, steps=trial_steps) for stage in STAGES}
        warm = min(rates["vae"].overhead, rates["vq_stage2"].overhead)  # the first trial compiled kernels
        rates["vae"] = rates["vae"]._replace(overhead=warm)
        self.say(", ".join(f"{s}: {r.steps_per_second:.2f} steps/s and {r.overhead:.0f} s" for s, r in rates.items()))
        started, told = time.perf_counter(), {}
        for stage, rate in rates.items():
            left = seconds - (time.perf_counter() - started)
            mine = seconds * SHARES[stage] if stage in SHARES else left
            steps = max(int(MARGIN * rate.steps_per_second * (mine - rate.overhead)), 20)
            taken = self.run(stage, "run", steps, limit=max(left, 30) + 30)
            at, times = logged_steps(self.place / "run" / stage / "log.txt")
            found = (at[-1] - at[0]) / max(times[-1] - times[0], 1e-6)
            kept = checkpoints.complete_steps(self.place / "run" / stage)[-1]
            told[stage] = {"steps": kept, "planned": steps, "seconds": taken, "steps_per_second": found}
            if stage == "vae":  # the longest look at how fast this machine is; no stage has cheaper whole steps
                last = rates["vq_stage2"]
                rates["vq_stage2"] = last._replace(steps_per_second=min(last.steps_per_second, found))
            self.say(f"{stage}: {found:.2f} steps/s, step {kept} kept, {left - taken:.0f} s left")
        return checkpoints.averaged_file(self.place / "run" / "vq_stage2"), {
            "minutes": (time.perf_counter() - started) / 60,
            "stages": told,
        }


def _end(process: subprocess.Popen) -> int:
    process.terminate()
    try:
        return process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def logged_steps(log: Path) -> tuple[list[int], list[float]]:
    """Steps and when they were told, in seconds, from a run's log.txt."""
    text = log.read_text() if log.is_file() else ""
    found = re.findall(r"^(\S+ \S+),(\d+) INFO \S+ Step (\d+):", text, re.MULTILINE)
    times = [datetime.fromisoformat(stamp).timestamp() + int(ms) / 1e3 for stamp, ms, _ in found]
    return [int(step) for *_, step in found], times
