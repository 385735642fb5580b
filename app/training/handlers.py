"""What hangs on a trainer of the tokenizer's stages, each an entry of its own in a stage file, in the order they run.

Nothing here saves the engine: a resumed run sets the trainer's iteration and the sampler's start (see checkpoints.py).
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import CallableEventWithFilter, Engine, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel

from app.measures.tokenizer_metrics import count_codes, is_collapsed, perplexity
from app.training import checkpoints
from app.training.checkpoints import unwrapped
from app.training.forecast import advice_for, seconds_a_step
from app.training.run_folder import SHOWN, duration
from app.training.step import resume_optimizer, stop_if_not_finite
from app.training.training_state import read_state

log = logging.getLogger(__name__)

NEXT = {  # by the name of a stage's files: what to run on what it left
    "vae": "Next: bundles/vq_stage1.json with --pretrained_vae_path this folder",
    "vqvae": "Next: bundles/evaluate_tokenizer.json; after stage 1 bundles/vq_stage2.json with --init_from this folder",
}


class Due:
    """Event filter: every so many steps and at the last one, with `first` at the first too."""

    def __init__(self, every: int, *, first: bool = False):
        self.every, self.first = every, first

    def __call__(self, engine: Engine, step: int) -> bool:
        return step % self.every == 0 or step == engine.state.epoch_length or (self.first and step == 1)


class BeginOrResume:
    """Before the first step: a first validation, or the weights, optimizer and step of the run that is resumed."""

    def __init__(
        self,
        *,
        folder,
        network: nn.Module,
        averaged: AveragedModel,
        optimizer: Optimizer,
        schedule: lr_scheduler.LRScheduler,
        evaluator: SupervisedEvaluator,
        save: Callable[[Engine], None],
    ):
        self.folder, self.network, self.averaged = folder, unwrapped(network), averaged
        self.optimizer, self.schedule, self.evaluator, self.save = optimizer, schedule, evaluator, save

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._start)

    def _start(self, engine: SupervisedTrainer) -> None:
        step = engine.last_saved_step = self.folder.start_step
        self.folder.step = step or 0
        if step is None:
            self.averaged.module.load_state_dict(self.network.state_dict())
            self.folder.begin(self.network)
            self.evaluator.run()
            if self.folder.warmed_up:
                self.save(engine)
            return
        weights = {name: checkpoints.step_file(self.folder.path, name, step) for name in self.folder.names}
        live, mean = (checkpoints.read_tensors(path) for path in weights.values())
        file = checkpoints.step_file(self.folder.path, "misc", step)
        misc = read_state(file, step=step, optimizer=self.optimizer, counts=("num_averaged",))
        for name, stored in zip(weights, (live, mean), strict=True):
            sizes = checkpoints.check_weights(stored, weights[name])
            checkpoints.check_resampler(sizes, source=self.folder.path)
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
        checkpoints.load_weights(self.network, live, weights[self.folder.names[0]])
        checkpoints.load_weights(self.averaged.module, mean, weights[self.folder.names[1]])
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


class StopAtNonFiniteLoss:
    """Ends a run whose loss is no number, before anything of that step is averaged or saved."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._look)

    def _look(self, engine: Engine) -> None:
        batch = engine.state.batch
        parts = batch if isinstance(batch, list) else [batch]
        stop_if_not_finite(engine, engine.state.output, [case for part in parts for case in part["case_id"]])


class Average:
    """The averaged model follows the network after each step."""

    def __init__(self, *, averaged: AveragedModel, network: nn.Module):
        self.averaged, self.network = averaged, unwrapped(network)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._follow)

    def _follow(self, _engine: Engine) -> None:
        self.averaged.update_parameters(self.network)


class Console:
    """A line a step where due, with the time left; a warning where that is long. The first step makes the run's folder
    its own.
    """

    def __init__(self, *, folder, on: CallableEventWithFilter, phase: str = "train"):
        self.folder, self.on, self.phase = folder, on, phase
        self.begun: tuple[float, int] | None = None  # when the first step began, and how many were done before
        self.steps, self.forecast = 0, False

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_STARTED, self._forecast)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.folder.take_place)
        engine.add_event_handler(self.on, self._show)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._judge)

    def _forecast(self, engine: Engine) -> None:
        """Before the first step: on a CPU even one can take longer than anybody waits."""
        quantize = getattr(engine._process_function, "quantize", None)  # an alignment has no points
        if self.forecast or quantize is None or torch.cuda.is_available():
            return
        self.forecast = True
        each = seconds_a_step(unwrapped(engine.network), engine.state.batch, quantize=quantize)
        if each is not None:
            left = engine.state.epoch_length - engine.state.iteration + 1
            self._advise(each * left, f"before the first step: about {duration(each)} each")

    def _judge(self, engine: Engine) -> None:
        """At the first step, by what it took without drawing samples; on a GPU at the second, as the first compiled."""
        self.steps += 1
        on_gpu = torch.cuda.is_available()
        if self.steps == 1 + on_gpu:
            each = engine.state.output["seconds"]
            self._advise(each * (engine.state.epoch_length - engine.state.iteration), f"{duration(each)} a step")

    @staticmethod
    def _advise(seconds: float, pace: str) -> None:
        advice = advice_for(seconds, on_gpu=torch.cuda.is_available())
        if advice is not None and idist.get_rank() == 0:
            log.warning("%s (%s)", advice, pace)

    def _begin(self, engine: Engine) -> None:
        if self.begun is None:
            self.begun = (time.perf_counter(), engine.state.iteration - 1)
            log.info("drawing the samples of the first step and compiling what has to be; then a line at that step")

    def _show(self, engine: Engine) -> None:
        output, last = engine.state.output, engine.state.epoch_length
        (start, before), step = self.begun, engine.state.iteration
        each = (time.perf_counter() - start) / (step - before)
        shown = " ".join(f"{name}={output[name]:.4g}" for name in SHOWN if name in output)
        named = "Step" if self.phase == "train" else "Warm-up step"
        what = "%s %d: %s (%s a step, about %s left of %d steps)"
        log.info(what, named, step, shown, duration(each), duration(each * (last - step)), last)


class MetricsRows:
    """A row of metrics.jsonl, and the same for TensorBoard, where due.

    Not MONAI's TensorBoardStatsHandler: the folder that its writer holds is moved by a run's first step.
    """

    def __init__(self, *, folder, optimizer: Optimizer, on: CallableEventWithFilter, phase: str = "train"):
        self.folder, self.optimizer, self.on, self.phase = folder, optimizer, on, phase

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(self.on, self._write)

    def _write(self, engine: Engine) -> None:
        row = {"phase": self.phase, "step": engine.state.iteration, **engine.state.output}
        self.folder.record_step({**row, "lr": self.optimizer.param_groups[0]["lr"]})


def record_steps(engine: Engine, folder, *, optimizer: Optimizer, phase: str, every: dict) -> None:
    """Console lines every `i_print` steps and rows every `i_log`; both at the first step and the last."""
    on = {key: Events.ITERATION_COMPLETED(event_filter=Due(every[key], first=True)) for key in ("i_print", "i_log")}
    Console(folder=folder, on=on["i_print"], phase=phase).attach(engine)
    MetricsRows(folder=folder, optimizer=optimizer, on=on["i_log"], phase=phase).attach(engine)


class CodebookWatch:
    """Says when the codes of a step come to be nearly all the same, and when they no longer are."""

    def __init__(self, *, network: nn.Module, optimizer: Optimizer, on: CallableEventWithFilter):
        self.network, self.optimizer, self.on = unwrapped(network), optimizer, on
        self.collapsed = False

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(self.on, self._watch_codes)

    def _watch_codes(self, engine: SupervisedTrainer) -> None:
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


class LastValidation:
    """Validates at the last step too, wherever a ValidationHandler's interval ends."""

    def __init__(self, *, folder, evaluator: SupervisedEvaluator):
        self.folder, self.evaluator = folder, evaluator

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._validate)

    def _validate(self, engine: Engine) -> None:
        if engine.state.iteration == engine.state.epoch_length and not self.folder.is_validated:
            self.evaluator.run()


class Pictures:
    """Validation cases beside their reconstructions."""

    def __init__(self, *, folder, evaluator: SupervisedEvaluator, on: CallableEventWithFilter):
        self.folder, self.evaluator, self.on = folder, evaluator, on

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(self.on, self._draw)

    def _draw(self, engine: Engine) -> None:
        if not self.folder.is_validated:
            self.evaluator.run()
        self.folder.record_samples(engine.state.iteration)


class Checkpoints:
    """A complete set of files where due: live and averaged weights, and what resuming needs."""

    def __init__(
        self,
        *,
        folder,
        network: nn.Module,
        averaged: AveragedModel,
        optimizer: Optimizer,
        schedule: lr_scheduler.LRScheduler,
        keep_last: int,
        on: CallableEventWithFilter,
    ):
        self.folder, self.network, self.averaged = folder, unwrapped(network), averaged
        self.optimizer, self.schedule, self.keep_last, self.on = optimizer, schedule, keep_last, on

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(self.on, self)

    def __call__(self, engine: SupervisedTrainer) -> None:
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
        checkpoints.prune(path, self.keep_last)


class EndOfRun:
    """Lets loader workers go, and says what the run left and what comes next."""

    def __init__(self, *, folder, evaluator: SupervisedEvaluator):
        self.folder, self.evaluator = folder, evaluator

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, self._close)

    def _close(self, engine: SupervisedTrainer) -> None:
        engine.data_loader.close()
        self.evaluator.data_loader.close()
        if idist.get_rank() == 0 and engine.last_saved_step == engine.state.iteration:
            self.folder.record_end(then=NEXT[self.folder.name])


def _grid(prepared: tuple[int, float] | None) -> str:
    return "no single one that is known" if prepared is None else f"{prepared[0]} voxels of {prepared[1]:g} mm"
