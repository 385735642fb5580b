"""Several ranks end at the same step, and none waits at a step's end for what it asked the others as it began."""

from types import SimpleNamespace

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine, Events

from app.shared.refusals import Refused
from app.training.stopping import StopWhenAsked


@pytest.mark.parametrize("told", ["this rank", "another"])
def test_ranks_ask_as_a_step_begins_and_end_after_the_next(monkeypatch, tmp_path, told):
    happened, elsewhere, saved = [], [0], []

    def all_reduce(values, op):
        happened.append("asked")
        return torch.maximum(values, torch.tensor(elsewhere)) if op == "MAX" else values

    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    monkeypatch.setattr(idist, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(idist, "all_reduce", all_reduce)

    def step(engine, _batch):
        happened.append("step")
        if engine.state.iteration == 3:  # while a step is under way
            if told == "another":
                elsewhere[0] = 15
            else:
                stop.received = 15

    engine = Engine(step)
    engine.last_saved_step = 0
    folder = SimpleNamespace(step_name="step", output_dir=tmp_path)
    stop = StopWhenAsked(save=lambda engine: saved.append(engine.state.iteration), folder=folder)
    stop.attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda _: happened.append("end"))
    with pytest.raises(Refused, match="ended by SIGTERM at step 4"):
        engine.run([0] * 8)
    stop._let_go(engine)
    assert saved == [4]
    assert happened == ["asked", "step", "end"] * 3 + ["asked", "step"]
