"""The averaged model: the formula it follows, and what it copies. What validation leaves in memory."""

from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine
from torch import nn

from app.stage_handlers import StageHandlers
from app.training import average


def test_the_average_follows_its_formula_and_copies_buffers():
    network = nn.BatchNorm1d(2)  # two parameters and three buffers
    network.weight.data = torch.tensor([1.0, 10.0])
    averaged, rate = average(network, ema_rate=0.7), 0.7
    expected = network.weight.detach().clone()
    for step in range(25):
        network.weight.data += 1.0
        network.running_mean += 2.0
        averaged.update_parameters(network)
        decay = min(rate, (1 + step) / (10 + step))
        taken = network.weight.detach()
        expected = taken.clone() if step == 0 else decay * expected + (1 - decay) * taken
        assert averaged.module.weight.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert averaged.module.running_mean.tolist() == [50.0, 50.0]
    assert (averaged.module.weight != network.weight).all() and int(averaged.n_averaged) == 25


def test_validation_keeps_no_case_on_the_device():
    class Validation(Engine):
        def run(self):
            return super().run([1, 2])

    evaluator = Validation(lambda _, batch: torch.zeros(batch))
    folder = SimpleNamespace(record_validation=lambda step, metrics: None)
    parts = dict.fromkeys(("averaged", "optimizer", "schedule", "every"))
    handlers = StageHandlers(folder=folder, network=nn.Linear(1, 1), evaluator=evaluator, **parts)
    handlers._validate(SimpleNamespace(state=SimpleNamespace(iteration=7)))
    assert handlers.validated_step == 7 and evaluator.state.iteration == 2
    assert evaluator.state.output is None and evaluator.state.batch is None
