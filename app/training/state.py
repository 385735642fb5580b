"""What steps change, as one: weights, their average, optimizer, schedule, scaler; saved as a set and brought back.

The engine itself is not saved: a resumed run sets the trainer's iteration and the sampler's start (see handlers.py).
"""

import logging
from typing import Any

import ignite.distributed as idist
import torch
from monai.engines import SupervisedTrainer
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel

from app.training import checkpoints
from app.training.step import resume_optimizer
from app.training.training_state import read_state
from networks.presets import Preset

log = logging.getLogger(__name__)


class TrainingState:
    """Of a tokenizer's stage: its network whole, live and averaged."""

    def __init__(
        self,
        *,
        folder,
        network: nn.Module,
        optimizer: Optimizer,
        schedule: lr_scheduler.LRScheduler,
        averaged: AveragedModel | None = None,
    ):
        self.folder, self.network, self.averaged = folder, network, averaged
        self.optimizer, self.schedule = optimizer, schedule

    def begin(self) -> None:
        """At the start of a run that resumes none."""
        if self.averaged is not None:
            self.averaged.module.load_state_dict(self.network.state_dict())

    def save(self, engine: SupervisedTrainer) -> None:
        checkpoints.save_set(self.folder.path, engine.state.iteration, self.weights(), self.misc(engine))

    def load(self, engine: SupervisedTrainer, step: int) -> None:
        place, counts = self.folder.path, () if self.averaged is None else ("num_averaged",)
        stored = {name: checkpoints.read_tensors(checkpoints.step_file(place, name, step)) for name in self.weights()}
        self.check_stored(stored, step)
        misc_file = checkpoints.step_file(place, "misc", step)
        misc = read_state(misc_file, step=step, optimizer=self.optimizer, counts=counts)
        self.load_weights(stored, step)
        if self.averaged is not None:
            self.averaged.n_averaged.fill_(misc["num_averaged"])
        self.load_misc(engine, misc, step)

    def weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """What each file of a set holds, by its name."""
        live, mean = self.folder.names
        return {live: self.network.state_dict(), mean: self.averaged.module.state_dict()}

    def check_stored(self, stored: dict[str, dict], step: int) -> None:
        """Refuses weights that are no network's of these sizes; first, for all else of another network differs too."""
        for name, state in stored.items():
            self.check_sizes(checkpoints.check_weights(state, checkpoints.step_file(self.folder.path, name, step)))

    def load_weights(self, stored: dict[str, dict], step: int) -> None:
        files = {name: checkpoints.step_file(self.folder.path, name, step) for name in stored}
        sizes = [Preset.from_tensor(state["_extra_state"]) for state in stored.values()][-1]
        now = self.network.sizes.prepared
        for network, name in zip((self.network, self.averaged.module), stored, strict=True):
            checkpoints.load_weights(network, stored[name], files[name])
        if sizes.prepared != now and idist.get_rank() == 0:
            what = "the training data lie on another grid than at step %d, which raw scans will be put on: %s (was %s)"
            log.warning(what, step, _grid(now), _grid(sizes.prepared))

    def check_sizes(self, sizes: Any) -> None:
        own, otherwise = self.network.sizes, "begin in another --output_dir"
        checkpoints.check_resampler(sizes, source=self.folder.path)
        checkpoints.check_same(sizes, own, source=self.folder.path, skip=set(), otherwise=otherwise)

    def misc(self, engine: SupervisedTrainer) -> dict[str, Any]:
        """What resuming needs besides weights."""
        scaler = getattr(engine._process_function, "scaler", None)
        return {
            "step": engine.state.iteration,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),  # a record: see resume_optimizer
            "scaler": scaler.state_dict() if scaler is not None else {},
            **({} if self.averaged is None else {"num_averaged": int(self.averaged.n_averaged)}),
        }

    def load_misc(self, engine: SupervisedTrainer, misc: dict[str, Any], step: int) -> None:
        resume_optimizer(self.optimizer, self.schedule, misc["optimizer"], step=step)
        scaler = getattr(engine._process_function, "scaler", None)
        if scaler is not None and misc["scaler"]:
            scaler.load_state_dict(misc["scaler"])


def _grid(prepared: tuple[int, float] | None) -> str:
    return "no single one that is known" if prepared is None else f"{prepared[0]} voxels of {prepared[1]:g} mm"
