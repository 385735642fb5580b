"""All that hangs on a trainer of the tokenizer's stages: schedule and average after each step, and what falls due.

Nothing here saves the engine: a resumed run sets the trainer's iteration and the sampler's start (see checkpoints.py).
"""

import logging
from collections.abc import Callable
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel

from app.measures.tokenizer_metrics import count_codes, is_collapsed, perplexity
from app.training import checkpoints
from app.training.checkpoints import unwrapped
from app.training.step import resume_optimizer
from app.training.stopping import StopWhenAsked

log = logging.getLogger(__name__)

NEXT = {  # by the name of a stage's files: what to run on what it left
    "vae": "Next: bundles/vq_stage1.json with --pretrained_vae_path this folder",
    "vqvae": "Next: bundles/evaluate_tokenizer.json; after stage 1 bundles/vq_stage2.json with --init_from this folder",
}


class StageHandlers:
    """All that hangs on the trainer, in the order in which it has to happen.

    After each step: schedule, average, log; where due: validate, picture, save.
    """

    def __init__(
        self,
        *,
        folder,
        network: nn.Module,
        averaged: AveragedModel,
        optimizer: Optimizer,
        schedule: lr_scheduler.LRScheduler,
        evaluator: SupervisedEvaluator,
        every: dict,
    ):
        self.folder, self.network, self.averaged = folder, unwrapped(network), averaged
        self.optimizer, self.schedule, self.evaluator, self.every = optimizer, schedule, evaluator, every
        self.validated_step: int | None = None
        self.collapsed = False

    def attach(self, engine: SupervisedTrainer) -> None:
        last = engine.state.epoch_length

        def due(key: str) -> Callable[[Engine, int], bool]:
            return lambda _, step: step % self.every[key] == 0 or step == last

        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        self.folder.record_steps(engine, optimizer=self.optimizer, phase="train", every=self.every, last=last)
        completed = Events.ITERATION_COMPLETED
        engine.add_event_handler(completed(event_filter=due("i_print")), self._watch_codes)
        engine.add_event_handler(completed(event_filter=due("val_interval")), self._validate)
        engine.add_event_handler(completed(event_filter=due("i_sample")), self._picture)
        engine.add_event_handler(completed(event_filter=due("i_save")), self._save)
        engine.add_event_handler(Events.COMPLETED, self._close)
        StopWhenAsked(save=self._save, output_dir=self.folder.output_dir).attach(engine)

    def _start(self, engine: SupervisedTrainer) -> None:
        step = engine.last_saved_step = self.folder.start_step
        if step is None:
            self.averaged.module.load_state_dict(self.network.state_dict())
            self.folder.begin(self.network)
            self._validate(engine)
            if self.folder.warmed_up:
                self._save(engine)
            return
        weights = {name: checkpoints.step_file(self.folder.path, name, step) for name in self.folder.names}
        live, mean = (checkpoints.read_tensors(path) for path in weights.values())
        misc = checkpoints.read_tensors(checkpoints.step_file(self.folder.path, "misc", step))
        for name, stored in zip(weights, (live, mean), strict=True):
            sizes = checkpoints.check_weights(stored, weights[name])
            checkpoints.check_same(
                sizes,
                self.network.sizes,
                source=self.folder.path,
                skip=set(),
                otherwise="begin in another --output_dir",
            )
        last = engine.state.epoch_length
        if step >= last:
            log.info("nothing left to train: step %d of %d (a larger --max_steps goes on)", step, last)
            engine.terminate()
            return
        self.network.load_state_dict(live)
        self.averaged.module.load_state_dict(mean)
        self.averaged.n_averaged.fill_(misc["num_averaged"])
        resume_optimizer(self.optimizer, self.schedule, misc["optimizer"], step=step)
        scaler = getattr(engine._process_function, "scaler", None)
        if scaler is not None and misc["scaler"]:
            scaler.load_state_dict(misc["scaler"])
        engine.state.iteration = step
        engine.data_loader.sampler.start = step
        self.folder.begin(self.network)
        before, now = sizes.prepared, self.network.sizes.prepared
        if before != now and idist.get_rank() == 0:
            what = "the training data lie on another grid than at step %d, which raw scans will be put on: %s (was %s)"
            log.warning(what, step, _grid(now), _grid(before))
        log.info("resumed at step %d", step)

    def _advance(self, engine: SupervisedTrainer) -> None:
        self.schedule.step()
        self.averaged.update_parameters(self.network)

    def _validate(self, engine: SupervisedTrainer) -> None:
        self.evaluator.run()
        self.evaluator.state.output = self.evaluator.state.batch = None  # a whole case with its maps, on the device
        self.validated_step = engine.state.iteration
        self.folder.record_validation(engine.state.iteration, self.evaluator.state.metrics)

    def _watch_codes(self, engine: SupervisedTrainer) -> None:
        """Says when the codes of a step come to be nearly all the same, and when they no longer are."""
        codes = engine._process_function.codes
        if not codes:
            return
        counts = count_codes(torch.cat(codes), self.network.sizes.num_embeddings)
        if idist.get_world_size() > 1:
            counts = idist.all_reduce(counts.to(idist.device())).cpu()
        level = min(counts, key=perplexity)
        before, self.collapsed = self.collapsed, is_collapsed(level)
        step, rate = engine.state.iteration, self.optimizer.param_groups[0]["lr"]
        if self.collapsed and not before:
            what = "COLLAPSED_CODEBOOK: at step %d %d of %d codes are used, as evenly as %.1f would be: tokens say next"
            what += (
                " to nothing. Stop, and begin again with a lower --learning_rate (it is %.2g) or with --codebook ema"
            )
            what += " from stage 1 on"
            log.warning(what, step, int((level > 0).sum()), len(level), perplexity(level), rate)
        elif before and not self.collapsed:
            log.info("the codebook is in use again at step %d: %d codes", step, int((level > 0).sum()))

    def _picture(self, engine: SupervisedTrainer) -> None:
        if self.validated_step != engine.state.iteration:
            self._validate(engine)
        self.folder.record_samples(engine.state.iteration)

    def _close(self, engine: SupervisedTrainer) -> None:
        engine.data_loader.close()
        self.evaluator.data_loader.close()
        if idist.get_rank() == 0 and engine.last_saved_step == engine.state.iteration:
            self.folder.record_end(then=NEXT[self.folder.name])

    def _save(self, engine: SupervisedTrainer) -> None:
        engine.last_saved_step = step = engine.state.iteration  # every rank has to be able to tell it
        if idist.get_rank() != 0:
            return
        path = Path(self.folder.path)
        live, mean = self.folder.names
        scaler = getattr(engine._process_function, "scaler", None)
        misc = {
            "step": step,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),  # a record: see resume_optimizer
            "scaler": scaler.state_dict() if scaler is not None else {},
            "num_averaged": int(self.averaged.n_averaged),
        }
        weights = {live: self.network.state_dict(), mean: self.averaged.module.state_dict()}
        checkpoints.save_set(path, step, weights, misc)
        checkpoints.drop_warm_ups(path)
        self.folder.record_best(step)
        checkpoints.prune(path, self.every["keep_last"])


def _grid(prepared: tuple[int, float] | None) -> str:
    return "no single one that is known" if prepared is None else f"{prepared[0]} voxels of {prepared[1]:g} mm"
