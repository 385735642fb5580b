"""AdamW over kept lists gives what torch's gives, to the bit, and its checkpoints are torch's."""

import copy
import io
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from app.training import kept_adamw
from app.training.kept_adamw import KeptAdamW
from app.training.seals import content_hash
from app.training.step import average, make_scheduler, resume_optimizer, step_optimizer
from networks import make_vqvae

SHAPES = [(5, 3), (3,), (), (17,), (33, 9), (1,), (0,), (2, 3, 4)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def laid(kind, *, seed=0, device="cpu", **options):
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]
    return kind(parameters, **{"lr": 1e-2, "weight_decay": 0.01, "fused": True, **options})


def idle(step: int, number: int) -> bool:
    """Some wait for the first steps, one learns never, one now and then."""
    return (step < 4 and number < 3) or number == 5 or (number == 6 and step % 7 == 3)


def train(optimizer, steps, *, clip=1.0, scaler=None, overflow=()):
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in steps:
        optimizer.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(1000 + step)
        for number, parameter in enumerate(parameters):
            grad = torch.randn(parameter.shape, generator=generator) * (10.0 if step % 2 else 0.01)
            if not idle(step, number):
                parameter.grad = scaler.scale(grad.to(parameter.device)) if scaler.is_enabled() else grad.to(parameter)
        if step in overflow:
            parameters[3].grad.fill_(float("inf"))
        step_optimizer(optimizer, scaler=scaler, grad_clip=clip)
    return optimizer


def same(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first["state"].keys() == second["state"].keys() and first["param_groups"] == second["param_groups"]
    for number, state in first["state"].items():
        assert list(state) == list(second["state"][number])
        for name, value in state.items():
            twin = second["state"][number][name]
            assert (value.dtype, value.shape, value.device) == (twin.dtype, twin.shape, twin.device)
            assert torch.equal(value, twin), (number, name)
    for mine, theirs in zip(one.param_groups, other.param_groups, strict=True):
        for number, pair in enumerate(zip(mine["params"], theirs["params"], strict=True)):
            assert torch.equal(*pair), number
    assert content_hash(first) == content_hash(second)


def on_disk(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


@pytest.fixture
def fast(monkeypatch):
    """How often the short way is taken."""
    calls = Mock(wraps=torch._fused_adamw_)
    monkeypatch.setattr(kept_adamw, "torch", SimpleNamespace(**{**vars(torch), "_fused_adamw_": calls}))
    return calls


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0, "maximize": True}, {"amsgrad": True}, {"fused": False}])
def test_weights_and_state_are_those_of_torch(device, clip, options, fast):
    kept, plain = (train(laid(kind, device=device, **options), range(30), clip=clip) for kind in (KeptAdamW, AdamW))
    same(kept, plain)
    assert (fast.call_count > 15) == (not {"amsgrad", "fused"} & options.keys())


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_overflows_is_left_out_as_torch_leaves_it_out(device, fast):
    both = []
    for kind in (KeptAdamW, AdamW):
        scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=5)
        both.append(train(laid(kind, device=device), range(30), scaler=scaler, overflow=(0, 6, 7, 20)))
    same(*both)
    assert fast.call_count > 15


def test_rates_of_a_schedule_are_followed():
    both = []
    for kind in (KeptAdamW, AdamW):
        optimizer = laid(kind)
        schedule = make_scheduler(optimizer, name="cosine", max_steps=20)
        for step in range(20):
            train(optimizer, [step])
            schedule.step()
        both.append(optimizer)
    same(*both)


@pytest.mark.parametrize("before", [KeptAdamW, AdamW])
@pytest.mark.parametrize("after", [KeptAdamW, AdamW])
@pytest.mark.parametrize("at", [2, 12])
def test_a_checkpoint_of_either_is_gone_on_with_by_either(before, after, at):
    first = train(laid(before), range(at))
    stored = on_disk({"optimizer": first.state_dict(), "weights": first.param_groups[0]["params"]})
    begun = train(laid(after, seed=1), range(at - 2, at))  # lists of what will be no more
    with torch.no_grad():
        for parameter, value in zip(begun.param_groups[0]["params"], stored["weights"], strict=True):
            parameter.copy_(value)
    resume_optimizer(begun, make_scheduler(begun, name="constant", max_steps=9), stored["optimizer"], step=0)
    begun.param_groups[0].update(lr=1e-2)
    stored_again = on_disk(begun.state_dict())["state"]
    assert content_hash(stored_again) == content_hash(stored["optimizer"]["state"])
    train(begun, range(at, 30)).param_groups[0].pop("initial_lr")
    same(begun, train(laid(AdamW), range(30)))


def test_a_loaded_state_is_not_shared_with_the_optimizer_that_gave_its_counts():
    one, other = train(laid(KeptAdamW), range(8)), laid(KeptAdamW)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    train(other, range(8, 12))
    same(one, train(laid(AdamW), range(8)))


def test_a_copy_goes_on_by_itself():
    kept = train(laid(KeptAdamW), range(8))
    twin = copy.deepcopy(kept)
    train(twin, range(8, 14))
    same(kept, train(laid(AdamW), range(8)))
    same(twin, train(laid(AdamW), range(14)))


def test_several_groups_and_settings_that_change_take_the_way_of_torch(fast):
    both = []
    for kind in (KeptAdamW, AdamW):
        optimizer = train(laid(kind), range(8))
        calls = fast.call_count
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 1e-3})
        train(optimizer, range(8, 12))
        assert fast.call_count == calls
        both.append(optimizer)
    same(*both)
    both = []
    for kind in (KeptAdamW, AdamW):
        optimizer = train(laid(kind), range(8))
        optimizer.param_groups[0].update(lr=torch.tensor(1e-3))
        train(optimizer, range(8, 10))
        optimizer.param_groups[0].update(lr=1e-3, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1)
        train(optimizer, range(11, 17))
        optimizer.param_groups[0]["params"].reverse()
        both.append(train(optimizer, range(18, 24)))
    same(*both)


def test_hooks_and_closures_run_once():
    laid(AdamW)  # torch has put its hooks around AdamW's own step
    kept, seen = laid(KeptAdamW), []
    kept.register_step_pre_hook(lambda *_: seen.append("before"))
    kept.register_step_post_hook(lambda *_: seen.append("after"))
    train(kept, range(4, 7))
    assert seen == ["before", "after"] * 3
    assert kept.step(lambda: 7.0) == 7.0


def test_the_average_follows_tensors_that_a_module_puts_in_anothers_place():
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.BatchNorm1d(2))
    averaged = average(network, ema_rate=0.9)
    averaged.update_parameters(network)
    network[2].running_mean = torch.tensor([5.0, 6.0])
    network[0].weight = nn.Parameter(torch.full((2, 2), 3.0))
    expected = averaged.module[0].weight.detach().lerp(network[0].weight.detach(), 1 - 2 / 11)
    averaged.update_parameters(network)
    assert averaged.module[2].running_mean.tolist() == [5.0, 6.0]
    assert torch.equal(averaged.module[0].weight, expected)


def test_all_parameters_of_a_tokenizer_keep_their_memory():
    """CUDA graphs read them by address."""
    network = make_vqvae("tiny")
    optimizer = KeptAdamW(network.parameters(), lr=1e-3, fused=True)
    places = [parameter.data_ptr() for parameter in network.parameters()]
    for _ in range(3):
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        step_optimizer(optimizer, scaler=torch.amp.GradScaler("cpu", enabled=False), grad_clip=1.0)
    assert places == [parameter.data_ptr() for parameter in network.parameters()]
