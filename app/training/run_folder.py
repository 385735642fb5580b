"""The output folder of a training run: its log, its metrics, its pictures, its description. Only rank 0 writes.

Layout: ckpts/ (see checkpoints.py), tb_logs/, samples/, {name}_model_summary.txt, config.json, command.txt, log.txt,
metrics.jsonl. Where an earlier run stands, a new one begins in STARTING inside, and takes its place after a first step.
"""

import errno
import json
import logging
import os
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from app.shared.atomic_files import write_text
from app.shared.json_files import read_object
from app.shared.refusals import Refused
from app.training import checkpoints, preflight

log = logging.getLogger(__name__)

STARTING = ".starting_run"
MAX_LETTERS = 60  # of a setting in the log
MAX_PARTS = 5  # of a config that are named one by one where a resumed run has them otherwise
FREE_TO_CHANGE = {"resume", "output_dir", "i_print", "i_log", "i_sample", "i_save", "keep_last", "_desc_"}
SHOWN = ("loss", "recon", "vq", "commitment", "correct")  # on the console line, where a step has them


class RunFolder:
    """Where one run writes, and at which step it starts.

    Args:
        path: the folder. An earlier run in it is moved aside by the first step of this one, unless this one resumes it.
        name: of the checkpoint files, vae, vqvae or align.
        ema_rate: part of the averaged files' name.
        resume: null, "latest" or a step.
        call: what this run was called with; None reads MONAI's command line.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str,
        ema_rate: float = 0.9999,
        resume: str | int | None = None,
        call: preflight.CommandLine | None = None,
    ):
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0  # by torchrun, after a failure
        if resume is None and restarted and not Path(path, STARTING).exists():  # what stands there is this run's own
            resume = "latest"
        self.output_dir = self.path = Path(path)  # path: where it writes, until its first step another place
        self.name = name
        self.call = call or preflight.read_command_line(sys.argv)
        self.names = (name, f"{name}_ema{ema_rate:g}")
        self.start_step = checkpoints.step_to_resume(path, resume)
        self.warm_up_step = checkpoints.warm_up_step(path, resume)
        self.warmed_up = False
        self.phase = "train"  # or warmup
        self.begun = time.perf_counter()
        self.step = 0  # the last that was taken
        self.score = "val_loss" if name == "align" else "val_recon"  # of a validation, that says which step is best
        self.validated: tuple[int, float] | None = None  # step and score
        self.writer: SummaryWriter | None = None
        idist.barrier()  # every rank has looked before anything changes
        if idist.get_rank() == 0:
            self._open(resume)
        idist.barrier()

    def _open(self, resume: str | int | None) -> None:
        try:
            _lock(self.output_dir)
            shutil.rmtree(self.output_dir / STARTING, ignore_errors=True)  # of a run that ended before its first step
            if not self.resumes:
                if resume is not None:
                    log.info("nothing to resume in %s: starting fresh", self.path)
                self._begin_beside()
            for name in ("ckpts", "samples", "tb_logs"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"cannot write to {self.path} ({error.strerror})"
            raise Refused("NO_OUTPUT", what, "pass another --output_dir") from error
        file = logging.FileHandler(self.path / "log.txt")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        file.handleError = lambda record: None  # a full disk is said once, by what fails to be saved
        logging.getLogger().addHandler(file)
        if not self.resumes:
            self._describe()
        purged = (self.start_step or self.warm_up_step or 0) + 1 if self.resumes else None
        self.writer = SummaryWriter(str(self.path / "tb_logs"), purge_step=purged)

    @property
    def resumes(self) -> bool:
        return self.start_step is not None or self.warm_up_step is not None

    def _describe(self) -> None:
        (self.path / "command.txt").write_text(shlex.join(self.call.words if self.call else sys.argv) + "\n")
        (self.path / "config.json").write_text(json.dumps(preflight.resolved_config(self.call), indent=2) + "\n")

    def _say_what_changed(self) -> None:
        """Warns of settings that differ from those that the run began with, or that its software did not have."""
        now = json.loads(json.dumps(preflight.resolved_config(self.call)))
        file = self.path / "config.json"
        before = read_object(file)
        if before is None:
            log.warning("%s cannot be read: what changed since the run began is not known", file)
        elif before and now:
            settings, parts = [], []
            for name, old, new in differences(before, now):
                is_part = "#" in name or str(old)[:2] in ("{'", "[{") or str(new)[:2] in ("{'", "[{")
                (parts if is_part else settings).append(f"{name} {_short(new)} (was {_short(old)})")
            if len(parts) > MAX_PARTS:  # another file, of other software: its parts mean nothing to the user
                parts = [f"{len(parts)} parts of a bundle that other software wrote"]
            if settings or parts:
                log.warning("goes on with other settings than the run began with: %s", ", ".join(settings + parts))

    def _begin_beside(self) -> None:
        """An earlier run keeps its place until this one has taken a step; whether it can be moved then is seen now."""
        if not (self.output_dir / "metrics.jsonl").exists() and not checkpoints.complete_steps(self.output_dir):
            return
        place = self.output_dir.resolve()
        if place.is_mount() or not os.access(place.parent, os.W_OK):
            what = f"{self.output_dir} holds an earlier run, which cannot be moved aside from there"
            raise Refused("NO_OUTPUT", what, "pass another --output_dir, or --resume latest to go on with it")
        self.path = self.output_dir / STARTING
        _lock(self.path)  # it stays locked under its later name

    def take_place(self, engine: Engine) -> None:
        """After each step; the first moves an earlier run aside and this one to where it was."""
        self.step = engine.state.iteration
        if self.path == self.output_dir:
            return
        place, number = self.output_dir.resolve(), 1
        while (aside := place.with_name(f"{place.name}.{number}")).exists():
            number += 1
        self.writer.close()
        os.replace(place, aside)
        os.replace(aside / STARTING, place)
        self.path = self.output_dir
        self.writer = SummaryWriter(str(self.path / "tb_logs"))
        aside = self.output_dir.parent / aside.name if self.output_dir.name == place.name else aside
        what = "%s held an earlier run, now in %s (to go on with it: --resume latest --output_dir %s)"
        log.info(what, self.output_dir, aside, aside)

    def _cut_after_start(self) -> None:
        """What came after the step that is resumed never happened; sets of it are put aside."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [_row_of(line, path) for line in lines if line.endswith("}")]  # the last may be cut short
        kept = [row for row in rows if self._happened(row)]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        if self.start_step is None:
            return
        checkpoints.put_aside(self.path, after=self.start_step)
        best = checkpoints.read_best(self.path)
        if best is not None and best > self.start_step:
            saved = set(checkpoints.complete_steps(self.path)) - {0}
            scores = {row["step"]: row[self.score] for row in kept if row.get(self.score) and row["step"] in saved}
            checkpoints.write_best(self.path, scores, name=self.score)

    def _happened(self, row: dict) -> bool:
        if self.start_step is None:
            return row["phase"] == "warmup" and row["step"] <= self.warm_up_step
        return row["phase"] == "warmup" or row["step"] <= self.start_step

    def go_on(self) -> None:
        """Continues a resumed run: reports what changed, describes it anew, cuts what came after its step."""
        if idist.get_rank() == 0:
            self._say_what_changed()
            self._describe()
            self._cut_after_start()

    def begin(self, network: nn.Module) -> None:
        """Before the first step: continues a resumed run; writes what is trained, so freezing has to come before."""
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        total = sum(p.numel() for p in network.parameters())
        if self.start_step is not None:
            self.go_on()
        if idist.get_rank() == 0:
            (self.path / f"{self.name}_model_summary.txt").write_text(summary(network))
        log.info("=== %s: %s parameters, %s trainable ===", self.output_dir.name, f"{total:,}", f"{trained:,}")

    @property
    def is_validated(self) -> bool:
        """Whether a validation of the present step is recorded."""
        return self.validated is not None and self.validated[0] == self.step

    @property
    def step_name(self) -> str:
        return "step" if self.phase == "train" else "warm-up step"

    def record_step(self, row: dict) -> None:
        self._write({"phase": self.phase, **row, "memory_gib": peak_memory()}, prefix=self.phase)

    def record_validation(self, step: int, metrics: dict) -> None:
        values = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        log.info("Validation at step %d: %s", step, " ".join(f"{name}={value:.4g}" for name, value in values.items()))
        self._write({"phase": self.phase, "step": step, **values}, prefix="validation")
        self.validated = (step, values[self.score])

    def record_best(self, step: int) -> None:
        """Of a set just saved: whether it is the best one to take downstream."""
        if self.validated is not None and self.validated[0] == step > 0:
            scores = {**checkpoints.best_score(self.path), step: self.validated[1]}
            checkpoints.write_best(self.path, scores, name=self.score)

    def attach(self, evaluator: Engine) -> None:
        """As a handler of an evaluator: records what it measures."""

        def record(engine: Engine) -> None:
            engine.state.output = engine.state.batch = None  # a whole case with its maps, on the device
            self.record_validation(self.step, engine.state.metrics)

        evaluator.add_event_handler(Events.COMPLETED, record)

    def record_end(self, *, then: str) -> None:
        """The last line of a run that came to its end."""
        best = checkpoints.read_best(self.output_dir)
        taken = (
            f"best step {best}" if best is not None else f"last step {checkpoints.complete_steps(self.output_dir)[-1]}"
        )
        log.info("done in %s: %s, in %s. %s", duration(time.perf_counter() - self.begun), taken, self.output_dir, then)

    def record_picture(self, draw: Callable[..., np.ndarray]) -> None:
        """Of this step: `draw` writes it and gives its pixels."""
        path = self.path / "samples" / f"step{self.step:07d}.png"
        pixels = draw(path, title=f"{self.output_dir.name}, step {self.step}")
        self.writer.add_image("samples", pixels, self.step, dataformats="HWC")
        self.writer.flush()

    def record_text(self, text: str) -> None:
        """Of this step, as a picture is."""
        write_text(self.path / "samples" / f"step{self.step:07d}.txt", text)
        self.writer.add_text("samples", text, self.step)
        self.writer.flush()

    def _write(self, row: dict, *, prefix: str) -> None:
        if idist.get_rank() != 0:
            return
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({key: _plain(value) for key, value in row.items()}) + "\n")
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self.writer.add_scalar(f"{prefix}/{name}", value, row["step"])
        self.writer.flush()


def _row_of(line: str, path: Path) -> dict:
    """A row of metrics.jsonl."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    score = (row.get("val_recon") or row.get("val_loss")) if isinstance(row, dict) else None
    known = isinstance(row, dict) and isinstance(row.get("phase"), str) and type(row.get("step")) is int
    if not known or not (score is None or type(score) in (int, float)):
        raise Refused("BAD_RUN", f"{path} has a line that is no row of a run: {line[:60]}", "remove the line")
    return row


def _lock(folder: Path) -> None:
    """One process at a time writes to a folder; the lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # no such locks here
        return
    held = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # else the disk knows no locks
            what = f"another run is writing to {folder}"
            raise Refused("IN_USE", what, "wait for it, or pass another --output_dir") from error


def differences(before: object, now: object, path: str = "") -> Iterator[tuple[str, object, object]]:
    """Path, earlier value and present one of all that two configs have otherwise, by the parts that both have."""
    alike = isinstance(before, list) and isinstance(now, list) and len(before) == len(now)
    if alike and any(isinstance(part, dict) for part in now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**now, **before}:
            old, new = before.get(name, "not to be chosen"), now.get(name, "left out")
            is_compared = (path and name != "_desc_") or name not in FREE_TO_CHANGE
            # of a new part the key that it refers to is compared
            passed_on = path and name not in before and str(new).startswith("@")
            if is_compared and not passed_on:
                yield from differences(old, new, f"{path}#{name}" if path else name)
    elif before != now:
        yield path, before, now


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= MAX_LETTERS else text[:MAX_LETTERS] + "…"


def duration(seconds: float) -> str:
    """In the one unit that reads best."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"


def summary(network: nn.Module) -> str:
    """Name, shape, type and whether it learns: by gradient (True), by moving averages (EMA) or not at all (False)."""
    rows = [(name, p.shape, p.dtype, str(p.requires_grad)) for name, p in network.named_parameters()]
    kept = network.state_dict().keys()  # buffers that are made anew at each start are no weights
    parts = [(name, part) for name, part in network.named_modules() if getattr(part, "follows_rows", False)]
    averages = {f"{name}.{buffer}" for name, part in parts for buffer, _ in part.named_buffers()}
    buffers = [(name, buffer) for name, buffer in network.named_buffers() if name in kept]
    rows += [(name, b.shape, b.dtype, "EMA" if name in averages else "False") for name, b in buffers]
    lines = [("Name", "Shape", "Type", "Grad")]
    lines += [(n, "x".join(map(str, s)), str(t).removeprefix("torch."), g) for n, s, t, g in sorted(rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return "".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines)


def peak_memory() -> float:
    """GiB at most so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _plain(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.item()
    return round(value, 8) if isinstance(value, float) else value
