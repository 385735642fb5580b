"""The averaged model: the formula it follows, and what it copies."""

import pytest
import torch
from torch import nn

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
