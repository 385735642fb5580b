"""Ctrl-C and SIGTERM: a step that is under way is finished and saved before the process ends; outside of steps at once.

With several ranks it is the step after, so that all end at the same.

SLURM sends SIGTERM to every process of a job, a terminal sends Ctrl-C to all in front: loader workers get them too.
"""

import os
import signal
import threading
from collections.abc import Callable

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events

from app.shared.refusals import Refused
from app.training.host_copy import HostCopy
from app.training.ranks import largest_of_ranks

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StopWhenAsked:
    """Ends a run after the step in which any of its processes was told to end. Attach it behind all other handlers.

    Args:
        save: writes all that resuming needs; called on every rank, at the same step.
        folder: the run's, which knows what its steps are called and where they are saved.
    """

    def __init__(self, *, save: Callable[[Engine], None], folder):
        self.save, self.folder = save, folder
        self.received = 0
        self.answer: HostCopy | None = None  # what any rank had received as this step began
        self.before: dict[int, object] = {}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._watch)
        engine.add_event_handler(Events.ITERATION_STARTED, self._ask)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._stop)
        engine.add_event_handler(Events.COMPLETED, self._let_go)

    def _watch(self, _engine: Engine) -> None:
        self.before = {number: signal.signal(number, self._receive) for number in NAMES}

    def _let_go(self, _engine: Engine) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: object) -> None:
        if self.received and number == signal.SIGINT and "RANK" not in os.environ:  # torchrun passes one on twice
            raise KeyboardInterrupt
        if not self.received:  # not by logging: it may be what was interrupted
            os.write(1, f"{NAMES[number]}: this {self.folder.step_name} is finished and saved first\n".encode())
        self.received = number

    def _ask(self, _engine: Engine) -> None:
        """At a step's beginning: an answer that is asked for at its end would come after all the device has to do."""
        if idist.get_world_size() > 1:
            self.answer = HostCopy(torch.full((1,), self.received, device=idist.device()), first=largest_of_ranks)

    def _stop(self, engine: Engine) -> None:
        received = self.received if self.answer is None else self.answer.tolist()[0]
        if not received:
            return
        if engine.last_saved_step != engine.state.iteration:
            self.save(engine)
        if dist.is_initialized():
            dist.barrier()  # a rank that is gone would end the one that still writes
        where = f"{self.folder.step_name} {engine.state.iteration}, saved whole in {self.folder.output_dir}"
        what = f"ended by {NAMES[received]} at {where}"
        raise Refused("STOPPED", what, "to go on, run the same command with --resume latest", status=128 + received)


def serve_to_the_end(_worker: int) -> None:
    """In a loader's worker: it ends on its loader's word alone, which needs its batches to finish a step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for, args=(os.getppid(),), daemon=True).start()


def _end_for(loader: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != loader:
        pass
    os._exit(0)
