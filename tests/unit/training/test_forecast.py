"""How long a run takes is told early: on a CPU before its first step, at its pace, with what to do instead."""

import logging
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events

from app.training import forecast, handlers
from app.training.forecast import advice_for, seconds_a_step
from app.training.handlers import Console
from app.training.step import SparseBatch
from networks import make_vqvae
from transforms import Windowsd


def test_a_run_that_nobody_waits_for_says_what_to_take_instead():
    assert advice_for(1.9 * 3600, on_gpu=False) is None and advice_for(47 * 3600, on_gpu=True) is None
    said = advice_for(400 * 3600, on_gpu=False)
    assert said == "about 400 h at this rate on this CPU: --preset tiny, or a GPU, or fewer steps (--max_steps)"
    assert "several GPUs under torchrun" in advice_for(400 * 3600, on_gpu=True)


def batch_of(side: int) -> dict:
    coords = torch.cartesian_prod(torch.zeros(1, dtype=torch.int32), *[torch.arange(side, dtype=torch.int32)] * 3)
    feats = torch.randn(len(coords), 4, generator=torch.Generator().manual_seed(0))
    return {"coords": coords, "values": feats, "spatial_shape": (side,) * 3, "batch_size": 1, "case_id": ["a"]}


def test_a_forecast_is_near_what_a_step_takes_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(forecast, "PROBE_POINTS", 1 << 10)
    torch.manual_seed(0)
    network = make_vqvae("tiny", resolution=24, num_blocks=1, model_channels=16).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    drawn = torch.get_rng_state()
    batch, how = batch_of(24), {"prepare_batch": SparseBatch(Windowsd()), "quantize": False}
    first = seconds_a_step(network, [batch], **how)
    assert 0 < first < 60 and network.training and torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    monkeypatch.setattr(forecast, "PROBE_POINTS", 24**3)
    assert seconds_a_step(network, batch, **how) is None, "it would take as long as the step"


@pytest.mark.parametrize("each", [0.1, 100.0])
def test_a_cpu_is_warned_before_its_first_step_and_after_it(each, monkeypatch, caplog):
    monkeypatch.setattr(handlers, "seconds_a_step", lambda *_, **__: 4 * each)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    console = Console(folder=None, on=Events.ITERATION_COMPLETED(every=1))
    engine = Engine(lambda engine, batch: None)
    engine._process_function = SimpleNamespace(quantize=True)
    engine.network, engine.prepare_batch = torch.nn.Linear(1, 1), None
    engine.state.iteration, engine.state.epoch_length = 1, 1001
    engine.state.batch, engine.state.output = {}, {"seconds": each}
    with caplog.at_level(logging.WARNING):
        console._forecast(engine)
        console._forecast(engine)
        console._judge(engine)
        console._judge(engine)
    said = [record.getMessage() for record in caplog.records]
    if each < 1:
        assert said == []
    else:
        assert (
            said[0].startswith("about 111 h at this rate on this CPU: --preset tiny, or a GPU")
            and "first step" in said[0]
        )
        assert said[1].startswith("about 28 h") and len(said) == 2
