"""Gradients of several ranks: few long vectors are the same memory, one message brings means into each."""

import ignite.distributed as idist
import pytest
import torch
import torch.distributed as dist

from app.training import ranks


def test_what_lies_behind_one_another_becomes_one_vector_in_the_same_memory():
    memory, apart = torch.arange(10.0), torch.arange(3.0)
    tensors = [memory[:4].view(2, 2), memory[4:5], apart, memory[6:8], memory[8:].view(1, 2)]
    rows = ranks.in_few(tensors)
    assert [row.tolist() for row in rows] == [[0, 1, 2, 3, 4], [0, 1, 2], [6, 7, 8, 9]]
    for row in rows:
        row.add_(100)
    assert memory.tolist() == [100, 101, 102, 103, 104, 5, 106, 107, 108, 109] and apart.tolist() == [100, 101, 102]


@pytest.fixture
def two_ranks(monkeypatch):
    """As if a second rank sent what lies in `other`."""
    other: list[torch.Tensor] = []
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda message: message.add_(other.pop(0)))
    return other


def test_gradients_become_means_of_ranks_wherever_they_lie(two_ranks):
    memory = torch.arange(6.0)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (2,), (3,), (2, 3))]
    parameters[0].grad, parameters[1].grad = memory[:4].view(2, 2), memory[4:]
    parameters[3].grad = torch.arange(6.0).view(3, 2).T  # not contiguous, and the one before has none
    two_ranks.append(torch.full((15,), 8.0))
    ranks.average_gradients(parameters)
    means = [(parameter.grad * 2 - 8).tolist() for parameter in parameters]
    assert means == [[[0, 1], [2, 3]], [4, 5], [0, 0, 0], [[0, 2, 4], [1, 3, 5]]]
    assert memory.tolist() == [4, 4.5, 5, 5.5, 6, 6.5]  # in place


def test_types_travel_apart(two_ranks):
    parameters = [torch.nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float32, torch.float16)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    two_ranks.extend([torch.full((2,), 3.0), torch.full((2,), 5.0, dtype=torch.float16)])
    ranks.average_gradients(parameters)
    assert [parameter.grad.tolist() for parameter in parameters] == [[2, 2], [3, 3]]
    assert not two_ranks
