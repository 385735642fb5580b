"""The averaged model: the formula it follows, and what it copies. What validation leaves in memory.

Schedules by name, and going on with them. What is said of a loss that is no number.
"""

import copy
from types import SimpleNamespace
from unittest.mock import Mock

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from torch import nn

from app.language.align_training import AlignHandlers
from app.shared.refusals import Refused
from app.training.handlers import StageHandlers
from app.training.step import average, make_scheduler, resume_optimizer, stop_if_not_finite


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
    network = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[1, 2],
        network=network,
        iteration_update=lambda engine, batch: torch.zeros(batch),
        decollate=False,
    )
    handlers = StageHandlers(
        folder=SimpleNamespace(record_validation=lambda step, metrics: None),
        network=network,
        averaged=average(network, ema_rate=0.9),
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        evaluator=evaluator,
        every={},
    )
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[1],
        network=network,
        optimizer=optimizer,
        loss_function=nn.L1Loss(),
        decollate=False,
    )
    trainer.state.iteration = 7
    handlers._validate(trainer)
    assert handlers.validated_step == 7 and evaluator.state.iteration == 2
    assert evaluator.state.output is None and evaluator.state.batch is None


def rates(name, options, *, steps=6):
    optimizer = torch.optim.AdamW(nn.Linear(1, 1).parameters(), lr=0.1)
    schedule = make_scheduler(optimizer, name=name, max_steps=steps, options=options)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("StepLR", None, "step_size"),
        ("StepLR", {"step_size": 0}, "zero"),  # torch would say so at the first step
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 5}, "total"),  # and this at the sixth
        ("LRScheduler", None, "NotImplementedError"),
        ("one_cycle", {"pct_start": 2}, "pct_start"),
        ("one_cycle", {"foo": 1}, "foo"),
        ("cosine", {"eta_min": 0.1}, "takes no lr_scheduler_options"),
    ],
)
def test_options_that_a_schedule_cannot_use_are_refused_before_the_first_step(name, options, says):
    with pytest.raises(ValueError, match=f"lr_scheduler {name} .*{says}"):
        rates(name, options)


def test_trying_a_schedule_leaves_it_as_it_was():
    assert rates("StepLR", {"step_size": 2, "gamma": 0.5}) == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025, 0.025])
    assert rates("OneCycleLR", {"max_lr": 0.1, "total_steps": 7}) == rates("one_cycle", None)


def steps(network, optimizer, schedule, some):
    """Trains them, and gives what the optimizer had at each."""
    found = []
    for step in some:
        optimizer.zero_grad()
        network(torch.full((2, 1), 0.1 * step)).square().sum().backward()
        optimizer.step()
        schedule.step()
        found.append({name: value for name, value in optimizer.param_groups[0].items() if name != "params"})
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cosine", None),
        ("constant", None),
        ("one_cycle", None),
        ("ExponentialLR", {"gamma": 0.93}),
        ("StepLR", {"step_size": 3}),
        ("MultiStepLR", {"milestones": [2, 5, 9]}),
        ("CosineAnnealingLR", {"T_max": 7}),
        ("CosineAnnealingWarmRestarts", {"T_0": 3}),
        ("CyclicLR", {"base_lr": 1e-5, "max_lr": 1e-2, "step_size_up": 3}),  # moves the optimizer's betas too
        ("LinearLR", {}),
        ("ConstantLR", {}),
        ("PolynomialLR", {"total_iters": 9, "power": 1.7}),
    ],
)
def test_every_schedule_is_brought_to_its_step_to_the_bit(name, options):
    def make(rate):
        network = nn.Linear(1, 1)
        network.weight.data.fill_(0.5)
        network.bias.data.fill_(0.1)
        optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.1)
        return network, optimizer, make_scheduler(optimizer, name=name, max_steps=12, options=options)

    straight, resumed, lower = make(0.01), make(0.01), make(0.001)
    steps(*straight, range(7))
    weights, stored = copy.deepcopy((straight[0].state_dict(), straight[1].state_dict()))
    expected = steps(*straight, range(7, 12))
    resumed[0].load_state_dict(weights)
    resume_optimizer(*resumed[1:], stored, step=7)
    assert steps(*resumed, range(7, 12)) == expected
    assert torch.equal(resumed[0].weight, straight[0].weight)
    resume_optimizer(*lower[1:], stored, step=7)
    all_along = make(0.001)
    steps(*all_along, range(7))
    assert steps(*lower, range(7, 12)) == steps(*all_along, range(7, 12))


@pytest.mark.parametrize("handlers", [StageHandlers, AlignHandlers])
def test_every_rank_knows_the_last_saved_step(handlers, monkeypatch):
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    engine = Mock(SupervisedTrainer, state=SimpleNamespace(iteration=20))
    handlers._save(Mock(handlers), engine)
    assert engine.last_saved_step == 20


@pytest.mark.parametrize(("last", "says"), [(None, "no checkpoint exists yet. Start again"), (20, "step 20. Resume")])
def test_a_loss_that_is_no_number_says_where_to_go_on(last, says):
    engine = Engine(lambda engine, batch: None)
    engine.last_saved_step = last
    with pytest.raises(Refused, match=says) as end:
        stop_if_not_finite(engine, {"loss": float("nan")}, ["case_a"])
    assert end.value.status == 1
