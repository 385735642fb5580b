"""Bundle runs for end-to-end tests: a tiny cohort, and `python -m monai.bundle run` in this process or as its own.

Inside this process `python -m monai.bundle run` is repeated step by step (command line, fire, exception hook); what is
saved is the start-up of five seconds. Every run starts in a folder of its own, from which only `bundles/` can be seen.
"""

import contextlib
import io
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from app.dataset import writer
from app.phantoms import phantoms
from app.training import checkpoints, seals
from transforms.windows import DEFAULT_WINDOWS

ROOT = Path(__file__).resolve().parents[1]
STAGE1 = "bundles/vq_stage1.json"
SIZE, SPACING = 24, 16.0
TINY = {  # a network and a run that take seconds; any of them can be given otherwise
    "scale": "demo",
    "resolution": SIZE,
    "spacing": SPACING,
    "num_embeddings": 16,
    "model_channels": 16,
    "latent_channels": 16,
    "num_blocks": 1,
    "batch_size_per_gpu": 1,
    "i_print": 1,
    "i_log": 1,
}
STEPS = {"warmup_steps": 10, "max_steps": 20, "i_save": 10, "val_interval": 10, "i_sample": 20, "keep_last": 3}
TOLERANCE = 2e-5  # float32 sums in another order, through ten steps of Adam
NAMES = ("vqvae", "vqvae_ema0.9999", "misc")  # the files of a set


class Ended(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """What standard error holds, less Python's warnings."""
        lines = [line for line in self.err.splitlines() if "Warning" not in line and not line.startswith("  ")]
        return "\n".join(lines).strip()


def make_cohort(out: Path, *, splits=("train",) * 3 + ("val",) * 2, change=lambda hu, index: hu) -> Path:
    """Phantoms on the very grid that the tiny network takes."""
    rows = []
    for index, split in enumerate(splits):
        made = phantoms.make_phantom(index, size=SIZE, spacing=SPACING)
        hu = change(made.hu, index)
        case = writer.write_case(out, f"case_{index}", hu, affine=made.affine, windows=DEFAULT_WINDOWS)
        rows.append({**writer.metadata_row(case, windows=DEFAULT_WINDOWS), "patient": f"p{index}", "split": split})
    writer.write_metadata(out, rows)
    return out


def words(config: str, settings: dict, *, run_id: str = "training") -> list[str]:
    given = {k: v for k, v in {**TINY, **settings}.items() if v is not None}  # None takes one of TINY's away
    return ["run", run_id, "--config_file", config, *(w for k, v in given.items() for w in (f"--{k}", str(v)))]


class _Left(BaseException):
    """What os._exit becomes while a run is inside this process."""


def _leave_unless_forked(exit_now, process: int):
    """Workers of a data loader are forked from here and do have to exit."""

    def leave(status: int):
        if os.getpid() != process:
            exit_now(status)
        raise _Left(status)

    return leave


def run_in(folder: Path, config: str = STAGE1, *, run_id: str = "training", **settings) -> Ended:
    """Runs a bundle as the command line does, and says how it ended."""
    out, err, hook = io.StringIO(), io.StringIO(), sys.excepthook
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["python/monai/bundle/__main__.py", *words(config, settings, run_id=run_id)])
        patch.setattr(os, "_exit", _leave_unless_forked(os._exit, os.getpid()))
        patch.setattr(
            "absl.logging.PythonHandler.close", lambda _: None
        )  # tensorboard's: it would close pytest's stream
        signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with one_thread():
                status = _status_of_run()
        finally:
            sys.excepthook = hook
            for number, handler in signals.items():
                signal.signal(number, handler)
            for worker in multiprocessing.active_children():  # as the end of the process would
                worker.terminate()
                worker.join()
    return Ended(status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def one_thread():
    """Sums in one order: on several threads the same run ends in other last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
        except SystemExit as end:
            return end.code
        return 1
    return 0


def make_place(folder: Path) -> Path:
    (folder / "bundles").symlink_to(ROOT / "bundles")
    return folder


def start_in(folder: Path, config: str = STAGE1, *, run_id: str = "training", launcher=(), **settings):
    """The same as a process of its own, left running; what it says is in a file beside its outputs."""
    command = [sys.executable, *launcher, "-m", "monai.bundle", *words(config, settings, run_id=run_id)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    number = len(list(folder.glob("process_*.out")))
    said, complained = (folder / f"process_{number}.{end}" for end in ("out", "err"))
    with open(said, "w") as out, open(complained, "w") as err:  # a pipe that nobody reads would block the run
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=err,
            start_new_session=True,
            preexec_fn=_heed_ctrl_c,
        )  # a group of its own, so that a signal can be sent to its workers as well
    process.said, process.complained = said, complained
    return process


def _heed_ctrl_c():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has none


def torchrun(*options):
    """Two processes that meet at a port nobody has."""
    return ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}", *options)


def torchrun_of_nodes(count):
    """As many launchers as nodes, each with one process, as a cluster starts them."""
    meeting = ("--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=run")
    return [("-m", "torch.distributed.run", f"--nnodes={count}", "--nproc_per_node=1", *meeting)] * count


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end_of(process: subprocess.Popen, *, seconds: float = 240) -> Ended:
    """Waits for a started run."""
    status = process.wait(timeout=seconds)
    return Ended(status, process.said.read_text(), process.complained.read_text())


# ---- what a run left


def rows_of(folder, phase="train"):
    """Lines of metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if phase in (None, row["phase"])]


def timeless(rows):
    return [{key: value for key, value in row.items() if key not in ("seconds", "memory_gib")} for row in rows]


def told_by(folder):
    """What the metrics say, less time and the points that one rank saw."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "memory_gib", "points")} for row in rows]


def assert_same_story(first, second):
    assert [(row["phase"], row["step"]) for row in first] == [(row["phase"], row["step"]) for row in second]
    for one, two in zip(first, second, strict=True):
        assert one.keys() == two.keys()
        numbers = {key: value for key, value in one.items() if key != "phase"}
        for key, value in numbers.items():
            assert two[key] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), f"{key} at step {one['step']}"


def weights_of(folder, step, name="vqvae"):
    """Without the hash of its tensors, which differs wherever one of them does."""
    state = checkpoints.read_tensors(checkpoints.step_file(folder, name, step))
    return {**state, "_extra_state": seals.unsealed(state["_extra_state"])}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} tensors differ, {different[0]} first"


def snapshot(folder):
    """Every file that tells of the run, with its content; a refused one may add to log.txt and tb_logs."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".pt", ".jsonl", ".json", ".txt", ".png"))
    files = [path for path in files if path.name != "log.txt"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_refused(end, *, code, naming=()):
    assert end.status in (2, 3), f"ended with {end.status}\n{end.out[-1000:]}\n{end.err[-3000:]}"
    assert len(end.error.splitlines()) == 1, end.err
    assert re.match(rf"{code}: .+[.;,] .+", end.error), end.error  # what, then what to do
    assert "Traceback" not in end.out + end.err
    for part in naming:
        assert part in end.error, f"{part!r} is not in {end.error!r}"


def wait_until(there, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not there():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline, "the run did not come that far"
        time.sleep(0.01)


def told_to_end(place, start_process, number, there, **settings):
    """Starts a run, sends all its processes the signal once `there` holds, and gives how it ended."""
    process = start_process(output_dir="out", **settings)
    wait_until(there, process)
    os.killpg(process.pid, number)
    return end_of(process)
