"""What hangs on a trainer, of a tokenizer or of an alignment: each an entry of its own in its file, in running order.

Nothing here saves the engine: a resumed run sets the trainer's iteration and the sampler's start.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import ignite.distributed as idist
import torch
from ignite.engine import CallableEventWithFilter, Engine, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from app.measures.tokenizer_metrics import count_codes, is_collapsed, perplexity
from app.shared.refusals import Refused
from app.training import checkpoints, pictures
from app.training.forecast import advice_for, seconds_a_step
from app.training.run_folder import SHOWN, duration
from app.training.state import TrainingState

log = logging.getLogger(__name__)

NEXT = {  # by the name of a stage's files: what to run on what it left
    "vae": "Next: bundles/vq_stage1.json with --pretrained_vae_path this folder",
    "vqvae": "Next: bundles/evaluate_tokenizer.json; after stage 1 bundles/vq_stage2.json with --init_from this folder",
    "align": "Next: python -m app evaluate, or ask, with this folder",
}
MAX_PICTURED = 6


class OnEvent:
    """A handler that is called on one event of the trainer."""

    on: CallableEventWithFilter | Events = Events.ITERATION_COMPLETED

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(self.on, self)


class Due:
    """Event filter: every so many steps (or numbers of steps) and at the last; with `first` at the first too."""

    def __init__(self, every: int | Sequence[int], *, first: bool = False):
        self.every, self.first = [every] if isinstance(every, int) else every, first

    def __call__(self, engine: Engine, step: int) -> bool:
        return any(step % n == 0 for n in self.every) or step == engine.state.epoch_length or (self.first and step == 1)


class BeginOrResume(OnEvent):
    """Before the first step: a first validation, or the weights, optimizer and step of the run that is resumed."""

    on = Events.STARTED

    def __init__(self, *, state: TrainingState, evaluator: SupervisedEvaluator, save: Callable[[Engine], None]):
        self.state, self.folder, self.evaluator, self.save = state, state.folder, evaluator, save

    def __call__(self, engine: SupervisedTrainer) -> None:
        step = engine.last_saved_step = self.folder.start_step
        self.folder.step = step or 0
        if step is None:
            self.state.begin()
            self.folder.begin(self.state.network)
            self.evaluator.run()
            if self.folder.warmed_up:
                self.save(engine)
            return
        self.state.load(engine, step)
        if step >= engine.state.epoch_length:
            log.info("nothing left to train: step %d of %d (a longer run goes on)", step, engine.state.epoch_length)
            engine.terminate()
            return
        engine.state.iteration = step
        engine.data_loader.sampler.start = step
        self.folder.begin(self.state.network)
        log.info("resumed at step %d", step)


class StopAtNonFiniteLoss(OnEvent):
    """Ends a run whose loss is no number, before anything of that step changes weights."""

    on = IterationEvents.BACKWARD_COMPLETED

    def __call__(self, engine: Engine) -> None:
        loss = engine.state.output["loss"]
        if math.isfinite(loss):
            return
        parts = engine.state.batch if isinstance(engine.state.batch, list) else [engine.state.batch]
        cases = ", ".join(case for part in parts for case in part["case_id"])
        last = getattr(engine, "last_saved_step", None)
        saved = f"the last checkpoint is step {last}" if last is not None else "no checkpoint exists yet"
        remedy = "start again with a lower learning_rate"
        if last is not None:
            remedy = "resume from it with a lower learning_rate (from an earlier step, if this comes again)"
        what = f"loss is {loss} at step {engine.state.iteration} on cases {cases}; {saved}"
        raise Refused("NOT_FINITE", what, f"{remedy}, or check these cases with `python -m app check`", status=1)


class Average(OnEvent):
    """The averaged model follows the network after each step."""

    def __init__(self, *, averaged: AveragedModel, network: nn.Module):
        self.averaged, self.network = averaged, network

    def __call__(self, _engine: Engine) -> None:
        self.averaged.update_parameters(self.network)


class Console:
    """A line a step where due, with the time left; a warning where that is long. The first step makes the run's folder
    its own.
    """

    def __init__(self, *, folder, on: CallableEventWithFilter):
        self.folder, self.on = folder, on
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
        how = {"prepare_batch": engine.prepare_batch, "quantize": quantize}
        each = seconds_a_step(engine.network, engine.state.batch, **how)
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
        what = "%s %d: %s (%s a step, about %s left of %d steps)"
        log.info(
            what, self.folder.step_name.capitalize(), step, shown, duration(each), duration(each * (last - step)), last
        )


class MetricsRows(OnEvent):
    """A row of metrics.jsonl, and the same for TensorBoard, where due.

    Not MONAI's TensorBoardStatsHandler, which sees neither the rate nor the memory nor which phase it is.
    """

    def __init__(self, *, folder, optimizer: Optimizer, on: CallableEventWithFilter):
        self.folder, self.optimizer, self.on = folder, optimizer, on

    def __call__(self, engine: Engine) -> None:
        rate = self.optimizer.param_groups[0]["lr"]
        self.folder.record_step({"step": engine.state.iteration, **engine.state.output, "lr": rate})


class CodebookWatch(OnEvent):
    """Says when the codes of a step come to be nearly all the same, and when they no longer are."""

    def __init__(self, *, network: nn.Module, optimizer: Optimizer, on: CallableEventWithFilter):
        self.network, self.optimizer, self.on = network, optimizer, on
        self.collapsed = False

    def __call__(self, engine: SupervisedTrainer) -> None:
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


class LastValidation(OnEvent):
    """Validates at the last step too, wherever a ValidationHandler's interval ends."""

    def __init__(self, *, folder, evaluator: SupervisedEvaluator):
        self.folder, self.evaluator = folder, evaluator

    def __call__(self, engine: Engine) -> None:
        if engine.state.iteration == engine.state.epoch_length and not self.folder.is_validated:
            self.evaluator.run()


class Pictures:
    """Validation cases beside their reconstructions."""

    def __init__(self, *, folder, evaluator: SupervisedEvaluator, on: CallableEventWithFilter):
        self.folder, self.evaluator, self.on = folder, evaluator, on
        self.samples: list[pictures.Sample] = []

    def attach(self, engine: Engine) -> None:
        self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(self.on, self._draw)

    def _collect(self, evaluator: Engine) -> None:
        if evaluator.state.iteration == 1:
            self.samples.clear()
        if len(self.samples) < MAX_PICTURED:
            self.samples.append(pictures.sample_of(evaluator.state.output))

    def _draw(self, _engine: Engine) -> None:
        if not self.folder.is_validated:
            self.evaluator.run()
        if idist.get_rank() == 0 and self.samples:
            self.folder.record_picture(partial(pictures.montage, self.samples))


class Checkpoints(OnEvent):
    """A complete set of files where due: weights, and what resuming needs."""

    def __init__(self, *, state: TrainingState, keep_last: int, on: CallableEventWithFilter):
        self.state, self.keep_last, self.on = state, keep_last, on

    def __call__(self, engine: SupervisedTrainer) -> None:
        engine.last_saved_step = step = engine.state.iteration  # every rank may have to name it
        if idist.get_rank() != 0:
            return
        self.state.save(engine)
        checkpoints.drop_warm_ups(self.state.folder.path)
        self.state.folder.record_best(step)
        checkpoints.prune(self.state.folder.path, self.keep_last)


class EndOfRun(OnEvent):
    """Lets loader workers go, and says what the run left and what comes next: `then`, else by the stage's name."""

    on = Events.COMPLETED

    def __init__(self, *, folder, evaluator: SupervisedEvaluator, then: str | None = None):
        self.folder, self.evaluator, self.then = folder, evaluator, then

    def __call__(self, engine: SupervisedTrainer) -> None:
        engine.data_loader.close()
        self.evaluator.data_loader.close()
        if idist.get_rank() == 0 and engine.last_saved_step == engine.state.iteration:
            self.folder.record_end(then=self.then or NEXT[self.folder.name])
