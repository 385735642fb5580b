"""One training run in this process: what `voxelingo train STAGE` does, and how Python trains.

As `python -m monai.bundle run training --config_file bundles/STAGE.json`, with the same output and the same files. What
such a run lays into a process (exception hook, signal handlers, logging) does not stay behind; a refusal is raised.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from monai.bundle import ConfigWorkflow

from app.shared.devices import threads_kept
from app.shared.places import bundles_folder
from app.shared.refusals import Refused
from app.training import checkpoints, preflight, run_errors

OVERLAY_OF_RANKS = "multi_gpu.json"
TARGETS_WITH_CALL = ("app.training.preflight.check_run", "app.training.run_folder.RunFolder")
LOGGERS = ("", "ignite")  # that bundles/logging.conf sets


class Trained(NamedTuple):
    """How a run ended: its last complete step and the one that is taken downstream."""

    stage: str
    output_dir: str
    step: int | None
    best_step: int | None
    seconds: float


def train(stage: str, **settings: Any) -> Trained:
    """Trains a stage (vae, vq_stage1, vq_stage2, align, or a config file) with flat keys: `max_steps=10`.

    `config_file` names overlays, laid over the stage's own file in their order.
    """
    given = {name: "$None" if value is None else value for name, value in settings.items()}
    return _train(stage, {name: str(value) for name, value in given.items()}, given)


def train_words(words: Sequence[str]) -> Trained:
    """The same, as it is typed: STAGE --key value …"""
    stage, raw = _parts_of(words)
    return _train(stage, raw, preflight.values_of(raw))


def _train(stage: str, raw: dict[str, str], given: dict[str, Any]) -> Trained:
    overlays = given.pop("config_file", [])
    files = [str(_file_of(stage)), *([overlays] if isinstance(overlays, str) else overlays)]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not any(Path(file).name == OVERLAY_OF_RANKS for file in files):
        files.append(str(bundles_folder() / OVERLAY_OF_RANKS))
    options = {name: given.pop(name) for name in ("meta_file", "logging_file", "tracking") if name in given}
    words = ("voxelingo", "train", stage, *(word for name, text in raw.items() for word in (f"--{name}", text)))
    config, typed = preflight.load_config(files), {name: raw[name] for name in given}
    call = preflight.CommandLine("training", config, given, typed, words)
    begun = time.perf_counter()
    preflight.check_call(call)  # before MONAI says a word
    with _left_as_it_was(), threads_kept():
        try:
            workflow = ConfigWorkflow(
                config_file=files, run_id=call.run_id, **options, **given, **_call_arguments(config, call)
            )
            workflow.initialize()
            workflow.run()
            workflow.finalize()
        except Exception as error:
            refused = run_errors.refusal_of_run(error)
            if refused is None:
                raise
            raise refused from refused.__cause__
    output_dir = workflow.parser.get_parsed_content("output_dir")
    steps = checkpoints.complete_steps(output_dir)
    best = checkpoints.read_best(Path(output_dir))
    return Trained(stage, str(output_dir), steps[-1] if steps else None, best, round(time.perf_counter() - begun, 1))


def stages() -> list[str]:
    """The bundles that train."""
    return [file.stem for file in sorted(bundles_folder().glob("*.json")) if "training" in json.loads(file.read_text())]


def _parts_of(words: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The stage, and what is given behind it."""
    stage, *rest = words or [""]
    raw, strays = preflight.read_words(rest)
    if not stage or stage.startswith("--"):
        raise Refused("NO_STAGE", "no stage is named", f"give one of {', '.join(stages())} behind train")
    if strays:
        raise Refused("BAD_CALL", f"{strays[0]} belongs to no key", "give settings as --key value")
    return stage, raw


def _file_of(stage: str) -> Path:
    if Path(stage).suffix in (".json", ".yaml", ".yml"):
        return Path(stage)
    if stage not in stages():
        hint = preflight.suggestion(stage, stages(), otherwise=f"it is one of {', '.join(stages())}")
        raise Refused("UNKNOWN_STAGE", f"there is no stage {stage}", hint)
    return bundles_folder() / f"{stage}.json"


def _call_arguments(config: dict[str, Any], call: preflight.CommandLine) -> dict[str, preflight.CommandLine]:
    """The call as an argument of the components that read MONAI's command line where they are given none."""
    targets = ((path.rpartition("#")[0], value) for path, key, value in preflight.walk(config) if key == "_target_")
    return {f"{path}#call": call for path, target in targets if target in TARGETS_WITH_CALL}


@contextmanager
def _left_as_it_was() -> Iterator[None]:
    """Hooks of this process as they were before."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    logged = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    handled = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook, path = sys.excepthook, list(sys.path)
    run_errors.quiet_engines()
    try:
        yield
    finally:
        run_errors.quiet_engines(end=True)
        sys.excepthook, sys.path[:] = hook, path
        for number, handler in handled.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        for logger, level, handlers in logged:
            for own in set(logger.handlers) - set(handlers):
                own.close()
            logger.setLevel(level)
            logger.handlers[:] = handlers
