"""The averaged model: the formula it follows, and what it copies. What validation leaves in memory.

Schedules by name, and going on with them. What is said of a loss that is no number.
"""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import ValidationHandler
from torch import nn
from torch.utils.data import DataLoader

from app.language.align_training import AnswerStep
from app.shared.refusals import Refused
from app.training import checkpoints, handlers, initial_weights, run_folder
from app.training.state import TrainingState
from app.training.step import SparseBatch, TokenizerStep, average, make_scheduler, resume_optimizer
from networks import make_vqvae
from networks.losses import TokenizerLoss
from networks.sparse import SparseTensor
from transforms import Windowsd

ROOT = Path(__file__).resolve().parents[3]


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


def evaluator_of(network, monkeypatch, folder):
    monkeypatch.setattr(handlers.pictures, "sample_of", lambda output: float(output.sum()))
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[1, 2],
        network=network,
        iteration_update=lambda engine, batch: torch.ones(batch),
        decollate=False,
    )
    folder.attach(evaluator)
    return evaluator


def folder_of(records):
    """A run's folder that writes nothing."""
    folder = object.__new__(run_folder.RunFolder)
    folder.step, folder.phase, folder.validated = 0, "train", None

    def record_validation(step, metrics):
        folder.validated = (step, 0.0)
        records.append(f"validation {step}")

    folder.record_validation = record_validation
    return folder


def test_validation_keeps_no_case_on_the_device(monkeypatch):
    records = []
    folder = folder_of(records)
    folder.step = 7
    evaluator = evaluator_of(nn.Linear(1, 1), monkeypatch, folder)
    shown = handlers.Pictures(folder=folder, evaluator=evaluator, on=Events.EPOCH_COMPLETED)
    shown.attach(Engine(lambda engine, batch: None))
    evaluator.run()
    assert shown.samples == [1.0, 2.0] and records == ["validation 7"]
    assert evaluator.state.output is None and evaluator.state.batch is None


@pytest.mark.parametrize(("interval", "steps"), [(4, [4, 6]), (3, [3, 6]), (10, [6])])
def test_the_last_step_is_validated_once_wherever_the_interval_ends(interval, steps, monkeypatch):
    records = []
    folder = folder_of(records)
    evaluator = evaluator_of(nn.Linear(1, 1), monkeypatch, folder)
    trainer = Engine(lambda engine, batch: {"loss": 1.0})

    @trainer.on(Events.ITERATION_COMPLETED)
    def count(engine):
        folder.step = engine.state.iteration

    ValidationHandler(interval, evaluator, epoch_level=False).attach(trainer)
    handlers.LastValidation(folder=folder, evaluator=evaluator).attach(trainer)
    trainer.run(range(6), max_epochs=1)
    assert records == [f"validation {step}" for step in steps]


def test_what_is_due_is_due_at_the_last_step_too_and_where_asked_at_the_first():
    engine = Engine(lambda engine, batch: None)
    found = {False: [], True: []}
    for first, steps in found.items():
        on = Events.ITERATION_COMPLETED(event_filter=handlers.Due(3, first=first))
        engine.add_event_handler(on, lambda engine, steps=steps: steps.append(engine.state.iteration))
    engine.run(range(7), max_epochs=1)
    assert found == {False: [3, 6, 7], True: [1, 3, 6, 7]}
    engine.state.epoch_length = 9
    assert [step for step in range(1, 10) if handlers.Due([3, 4])(engine, step)] == [3, 4, 6, 8, 9]


class Linear(nn.Module):
    """Stands for a tokenizer and for a language model: its loss is that of both."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.vq, self.sizes = None, SimpleNamespace(quantizer_levels=1)

    def forward(self, x, **_):
        value = x["x"] if isinstance(x, dict) else x.feats.sum()
        return SimpleNamespace(loss=self.weight * value, correct=value, codes=None)


def voxel_of(part, _device):
    return SparseTensor(torch.tensor([[part["x"]]]), torch.zeros(1, 4, dtype=torch.int32), (8, 8, 8), 1)


def text_of(part, _device):
    return {"x": torch.tensor(part["x"])}


@pytest.mark.parametrize(
    ("step", "prepare_batch"),
    [(TokenizerStep(quantize=True, grad_clip=None), voxel_of), (AnswerStep(grad_clip=None), text_of)],
)
def test_a_step_whose_loss_is_no_number_ends_the_run_before_the_optimizer_moves_anything(step, prepare_batch):
    network, done, parts = Linear(), [], {"values": [0], "attention_mask": torch.ones(1)}
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[
            {"x": 1.0, "case_id": ["a"], **parts},
            [{"x": 2.0, "case_id": ["b"], **parts}, {"x": float("nan"), "case_id": ["c"], **parts}],
        ],
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.25),
        loss_function=lambda output, x: {"loss": output.loss},
        prepare_batch=prepare_batch,
        iteration_update=step,
        train_handlers=[handlers.StopAtNonFiniteLoss()],
        decollate=False,
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: done.append(engine.state.output))
    with pytest.raises(Refused, match="NOT_FINITE: loss is nan at step 2 on cases b, c; no checkpoint exists yet"):
        trainer.run()
    assert network.weight.item() == 0.75, "the first step has moved it, the second has not"
    assert [output["loss"] for output in done] == [1.0]


ORDER = [  # as they stand in the files; what is of some of them alone is named below
    "AlignRecord", "BeginOrResume", "StopAtNonFiniteLoss", "LrScheduleHandler", "Average", "Console", "MetricsRows",
    "CodebookWatch", "ValidationHandler", "LastValidation", "Pictures", "SampleAnswers", "Checkpoints", "WriteAligned",
    "EndOfRun", "StopWhenAsked",
]  # fmt: skip
OF_ALIGNMENT = {"AlignRecord", "SampleAnswers", "WriteAligned"}
OF_TOKENIZERS = {"Average", "CodebookWatch", "Pictures"}


@pytest.mark.parametrize(
    ("stage", "lacks"),
    [
        ("vae", OF_ALIGNMENT | {"CodebookWatch"}),
        ("vq_stage1", OF_ALIGNMENT),
        ("vq_stage2", OF_ALIGNMENT),
        ("align", OF_TOKENIZERS),
    ],
)
def test_handlers_stand_in_the_order_in_which_they_have_to_run(stage, lacks):
    """A run is held to its record before it begins. No number: nothing of the step is kept. Schedule and average, then
    what looks at them; pictures and answers need a validation, checkpoints its score, and what is exported at the end
    the checkpoints; asked to stop, a run has done all else."""
    config = json.loads((ROOT / "bundles" / f"{stage}.json").read_text())
    entries = [config["train"]["checkpoints"] if e == "@train#checkpoints" else e for e in config["train"]["handlers"]]
    names = [entry["_target_"].rpartition(".")[2] for entry in entries]
    assert names == [name for name in ORDER if name not in lacks]


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


def test_every_rank_knows_the_last_saved_step(monkeypatch):
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    engine = Mock(SupervisedTrainer, state=SimpleNamespace(iteration=20))
    on = Events.ITERATION_COMPLETED(event_filter=handlers.Due(1))
    handlers.Checkpoints(state=Mock(TrainingState), keep_last=1, on=on)(engine)
    assert engine.last_saved_step == 20


@pytest.mark.parametrize(("last", "says"), [(None, "no checkpoint exists yet. Start again"), (20, "step 20. Resume")])
def test_a_loss_that_is_no_number_says_where_to_go_on(last, says):
    engine = Engine(lambda engine, batch: None)
    engine.last_saved_step = last
    engine.state.output, engine.state.batch = {"loss": float("nan")}, {"case_id": ["case_a"]}
    with pytest.raises(Refused, match=says) as end:
        handlers.StopAtNonFiniteLoss()(engine)
    assert end.value.status == 1


@pytest.mark.parametrize("name", ["vqvae", "align"])
def test_the_best_step_is_that_of_the_lowest_score_and_its_file_says_which_score(name, tmp_path):
    score = {"vqvae": "val_recon", "align": "val_loss"}[name]
    folder = object.__new__(run_folder.RunFolder)
    folder.path, folder.score, folder.phase = tmp_path, score, "train"
    folder._write = lambda row, prefix: None
    (tmp_path / "ckpts").mkdir()
    for step, value in ((4, 0.5), (8, 0.25), (12, 0.75)):
        folder.record_validation(step, {"val_loss": value, "val_recon": value})
        folder.record_best(step)
    assert json.loads((tmp_path / "ckpts/best.json").read_text()) == {"step": 8, score: 0.25}
    assert checkpoints.read_best(tmp_path) == 8


def test_the_warm_up_of_stage_1_is_what_vae_json_declares(tmp_path, monkeypatch):
    """Another optimizer and other parts to learn there are those of the warm-up, on the run's own network and keys."""
    stage0 = json.loads((ROOT / "bundles/vae.json").read_text())
    stage0["optimizer"] |= {"_target_": "torch.optim.RAdam", "weight_decay": 0.25}
    del stage0["optimizer"]["fused"]
    stage0["learns"] = ["decoder"]
    (tmp_path / "vae.json").write_text(json.dumps(stage0))
    monkeypatch.setattr(initial_weights, "bundles_folder", lambda: tmp_path)
    network, loss_function = make_vqvae("tiny", num_blocks=1), TokenizerLoss()
    flat = {"learning_rate": 0.5, "max_steps": 7, "seed": 3, "amp": "off", "grad_clip": 0.125, "i_print": 2, "i_log": 2}
    loader = DataLoader([1, 2])
    start = initial_weights.CodebookStart(
        network=network,
        folder=Mock(),
        pretrained_vae_path=None,
        loader=loader,
        learns=["vq", "subdivision"],
        prepare_batch=SparseBatch(Windowsd()),
        loss_function=loss_function,
        warmup={**flat, "lr_scheduler": "StepLR", "lr_scheduler_options": {"step_size": 2}},
    )
    declared = start._stage0(loader)
    trainer, schedule = (declared.get_parsed_content(name) for name in ("train#trainer", "schedule"))
    group = trainer.optimizer.param_groups[0]
    assert type(trainer.optimizer) is torch.optim.RAdam and (group["lr"], group["weight_decay"]) == (0.5, 0.25)
    assert {id(p) for p in group["params"]} == {id(p) for p in network.decoder.parameters()}
    assert type(schedule) is torch.optim.lr_scheduler.StepLR and schedule.step_size == 2
    assert trainer.network is network and trainer.loss_function is loss_function and trainer.state.epoch_length == 7
    step = trainer._process_function
    assert (step.quantize, step.seed, step.grad_clip) == (False, 3, 0.125)
    hung = [entry["_target_"].rpartition(".")[2] for entry in declared.config["train"]["handlers"]]
    assert hung == ["StopAtNonFiniteLoss", "LrScheduleHandler", "Console", "MetricsRows"]
