"""Losses are on their way to the host before the last backward; waiting for them is not waiting for what follows."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from monai.engines import SupervisedTrainer

from app.training import step as steps
from app.training.host_copy import HostCopy
from app.training.step import SparseBatch, TokenizerStep
from networks import make_vqvae
from networks.losses import TokenizerLoss
from tests.waits import Waits

SHAPE = (16, 16, 16)


def engine_of(network):
    engine = Mock(spec=SupervisedTrainer)
    engine.network, engine.loss_function = network, TokenizerLoss()
    engine.optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)  # AdamW counts steps on the CPU, and reads them
    engine.prepare_batch = SparseBatch(lambda batch: batch)
    engine.state = SimpleNamespace(iteration=1, device=torch.device("cpu"), output=None)
    return engine


def part_of(seed):
    made = torch.Generator().manual_seed(seed)
    coords = (torch.rand(1, *SHAPE, generator=made) < 0.5).nonzero()
    feats = torch.randn(len(coords), 4, generator=made)
    return {"coords": coords, "feats": feats, "case_id": [f"case{seed}"], "spatial_shape": SHAPE, "batch_size": 1}


def test_a_step_begins_the_copy_before_its_last_backward_and_reads_it_after(monkeypatch):
    order = []

    class Noted(HostCopy):
        def __init__(self, values, **how):
            order.append("copy")
            super().__init__(values, **how)

        def tolist(self):
            order.append("read")
            return super().tolist()

    backward = torch.Tensor.backward
    monkeypatch.setattr(steps, "HostCopy", Noted)
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: (order.append("backward"), backward(*a, **k))[1])
    engine = engine_of(make_vqvae("tiny"))
    totals = TokenizerStep(quantize=True)(engine, [part_of(1), part_of(2)])
    assert order == ["backward", "copy", "backward", "read"]
    assert totals["loss"] == engine.state.output["loss"] > 0


def test_a_step_waits_once_beside_its_maps():
    """Not counted are plain attention and plain sums by code, whose kernels do not wait; see test_waits.py."""
    engine, step, part = engine_of(make_vqvae("tiny")), TokenizerStep(quantize=True), part_of(1)
    with Waits() as waits:
        step(engine, part)
    assert waits.total - waits.counts["bincount"] - 2 <= 3 + 1, waits.counts


@pytest.mark.gpu
def test_reading_waits_for_the_copy_alone():
    values = torch.arange(5, device="cuda", dtype=torch.float64)
    copy = HostCopy(values)
    torch.cuda._sleep(2_000_000_000)  # about a second
    done = torch.cuda.Event()
    done.record()
    assert copy.tolist() == [0, 1, 2, 3, 4]
    assert not done.query()
    torch.cuda.synchronize()
