"""Alignment as MONAI's SupervisedTrainer runs it: one iteration, and what is written when.

Only what requires a gradient is trained and kept in checkpoints: the projector, LoRA layers, or a tiny language model
of our own. The tokenizer is not in the network at all. Steps, seeds and resuming work as in `training.py`.
"""

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.utils.data import Dataset

from app.language.align_setup import FrozenTokenizer, Language, check_same, write_train_args
from app.training import checkpoints
from app.training.checkpoints import unwrapped
from app.training.handlers import record_steps
from app.training.step import AMP_TYPES, mean_of_ranks, resume_optimizer, seed_step, step_optimizer, stop_if_not_finite
from app.training.stopping import StopWhenAsked
from app.training.training_state import check_parameters, read_state
from networks.qwen import save_language

log = logging.getLogger(__name__)


class AlignStep:
    """`iteration_update`: all micro-batches of a step, then one optimizer step."""

    def __init__(self, *, seed: int = 0, amp: str = "off", grad_clip: float | None = 1.0):
        if amp not in AMP_TYPES:
            raise ValueError(f"amp must be one of {', '.join(AMP_TYPES)}, got {amp!r}")
        self.seed, self.amp, self.grad_clip = seed, AMP_TYPES[amp], grad_clip
        self.scaler = torch.amp.GradScaler(enabled=self.amp == torch.float16)

    def __call__(self, engine: SupervisedTrainer, batch: list[dict]) -> dict:
        started = time.perf_counter()
        samples = sum(len(part["input_ids"]) for part in batch)
        seed_step(self.seed, engine.state.iteration, rank=idist.get_rank())
        engine.network.train()
        engine.optimizer.zero_grad(set_to_none=True)
        totals = {"loss": 0.0, "correct": 0.0}
        tokens = 0
        for part in batch:
            part = to_device(part, engine.state.device)
            with torch.autocast(engine.state.device.type, dtype=self.amp, enabled=self.amp is not None):
                result = engine.network(part)
            share = len(part["input_ids"]) / samples
            self.scaler.scale(result.loss * share).backward()
            totals["loss"] += float(result.loss.detach()) * share
            totals["correct"] += float(result.correct) * share
            tokens += int(part["attention_mask"].sum())
        totals = mean_of_ranks(totals)
        stop_if_not_finite(engine, totals, [case for part in batch for case in part["case_id"]])
        step_optimizer(engine.optimizer, scaler=self.scaler, grad_clip=self.grad_clip)
        return {**totals, "tokens": tokens, "seconds": time.perf_counter() - started}


def to_device(batch: dict, device: torch.device) -> dict:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def steps_per_epoch(dataset: Dataset, *, batch_size: int) -> int:
    """Full batches of all ranks together."""
    return max(1, len(dataset) // (batch_size * idist.get_world_size()))


def trained_state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}


class AlignHandlers:
    """All that hangs on the trainer: schedule, log, save where due, and the files of each epoch and of the end."""

    def __init__(
        self,
        *,
        folder,
        network: nn.Module,
        language: Language,
        tokenizer: FrozenTokenizer,
        optimizer: Optimizer,
        schedule: lr_scheduler.LRScheduler,
        every: dict,
        settings: dict,
    ):
        self.folder, self.network, self.language, self.tokenizer = folder, unwrapped(network), language, tokenizer
        self.optimizer, self.schedule, self.every, self.settings = optimizer, schedule, every, settings

    def attach(self, engine: SupervisedTrainer) -> None:
        last = engine.state.epoch_length

        def due(every: int) -> Callable[[Engine, int], bool]:
            return lambda _, step: step % every == 0 or step == last

        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda _: self.schedule.step())
        record_steps(engine, self.folder, optimizer=self.optimizer, phase="train", every=self.every)
        completed = Events.ITERATION_COMPLETED
        engine.add_event_handler(completed(event_filter=due(self.every["epoch"])), self._save_epoch)
        engine.add_event_handler(completed(event_filter=due(self.every["i_save"])), self._save)
        engine.add_event_handler(Events.COMPLETED, self._save_final)
        StopWhenAsked(save=self._save, output_dir=self.folder.output_dir).attach(engine)

    def _start(self, engine: SupervisedTrainer) -> None:
        step = engine.last_saved_step = self.folder.start_step
        if step is not None:
            check_same(Path(self.folder.path), self._record())
            file = checkpoints.step_file(self.folder.path, self.folder.name, step)
            stored, own = checkpoints.read_tensors(file), trained_state(self.network)
            check_parameters(stored, own, path=file)
            misc_file = checkpoints.step_file(self.folder.path, "misc", step)
            misc = read_state(misc_file, step=step, optimizer=self.optimizer)
            for name, value in stored.items():
                own[name].copy_(value)
            resume_optimizer(self.optimizer, self.schedule, misc["optimizer"], step=step)
            if misc["scaler"]:
                engine._process_function.scaler.load_state_dict(misc["scaler"])
            engine.state.iteration = step
            engine.data_loader.sampler.start = step
            log.info("resumed at step %d", step)
        self.folder.begin(self.network)
        ended = step is not None and step >= engine.state.epoch_length
        if ended:
            log.warning("step %d is the end of this run: nothing is trained, its record stays as it is", step)
        if idist.get_rank() == 0 and not ended:
            write_train_args(Path(self.folder.path), self._record())

    def _record(self) -> dict:
        """Everything that a later load has to check or repeat."""
        return {
            **self.settings,
            "base_model": self.language.identity,
            "trained_language": self.language.trained,
            "use_lora": self.language.adapter is not None,
            "tokenizer_path": str(Path(self.tokenizer.file).resolve()),
            "tokenizer": self.tokenizer.hash,
            "in_features": self.network.projector.in_features,
            "position_scale": self.network.projector.position_scale,
            "position_grid": self.network.projector.position_grid,
        }

    def _save_epoch(self, engine: SupervisedTrainer) -> None:
        number = -(-engine.state.iteration // self.every["epoch"]) - 1
        self._write(f"epoch{number}")

    def _save_final(self, _engine: SupervisedTrainer) -> None:
        self._write("final")
        if self.language.is_own and idist.get_rank() == 0:
            adapter = self.language.adapter  # kept in a folder of its own: taken out of the model that is saved
            model = self.language.model if adapter is None else adapter.unload()
            save_language(model, self.language.tokenizer, Path(self.folder.path) / "language_final")

        if idist.get_rank() == 0:
            self.folder.record_end(then="Next: python -m app evaluate, or ask, with this folder")

    def _write(self, suffix: str) -> None:
        """The projector and, where there is one, the adapter; written beside and renamed."""
        if idist.get_rank() != 0:
            return
        path = Path(self.folder.path)
        checkpoints.write_atomically(self.network.projector.state_dict(), path / f"projector_{suffix}.pt")
        if self.language.adapter is not None:
            part, target = path / f"lora_{suffix}.part", path / f"lora_{suffix}"
            shutil.rmtree(part, ignore_errors=True)
            self.language.adapter.save_pretrained(part)
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)

    def _save(self, engine: SupervisedTrainer) -> None:
        engine.last_saved_step = step = engine.state.iteration  # every rank has to be able to tell it
        if idist.get_rank() != 0:
            return
        misc = {
            "step": step,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),  # a record: see resume_optimizer
            "scaler": engine._process_function.scaler.state_dict(),
        }
        checkpoints.save_set(Path(self.folder.path), step, {self.folder.name: trained_state(self.network)}, misc)
        checkpoints.prune(Path(self.folder.path), self.every["keep_last"])
