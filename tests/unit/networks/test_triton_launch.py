"""Kernels started by a key of our own: all that Triton compiles apart is told apart."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
from networks.kernels.launch import QuickKernel, _kind, ceil_div, power_of_two  # noqa: E402


class Recorded(triton.JITFunction):
    """Stands for a kernel of two arguments and three constants; notes what is compiled and what is started."""

    arg_names = ("table", "count", "FIRST", "SECOND", "THIRD")
    params = tuple(SimpleNamespace(is_constexpr=name.isupper()) for name in arg_names)

    def __init__(self):
        self.compiled, self.started = [], []

    def __getitem__(self, grid):
        def compile_and_start(*args, **constants):
            self.compiled.append((grid, args, constants))
            return Compiled(self.started)

        return compile_and_start


class Compiled:
    def __init__(self, started):
        self.started = started

    def __getitem__(self, grid):
        return lambda *args: self.started.append((grid, args))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # what tensors on the CPU say
    return Recorded()


def test_the_same_kinds_are_compiled_once_and_started_in_the_kernels_order(kernel):
    quick, table = QuickKernel(kernel), torch.zeros(64)
    quick[(7,)](table, 5, 1, THIRD=3, SECOND=2, num_warps=4)
    quick[(9, 2)](table[16:], 6, 1, THIRD=3, SECOND=2, num_warps=4)
    assert len(kernel.compiled) == 1 and kernel.compiled[0][2] == {"THIRD": 3, "SECOND": 2, "num_warps": 4}
    [(grid, args)] = kernel.started
    assert grid == (9, 2, 1) and torch.equal(args[0], table[16:]) and args[1:] == (6, 1, 2, 3)


USUAL = {"table": torch.zeros(64), "count": 5, "FIRST": 1, "SECOND": 2, "THIRD": 3, "num_warps": 4}
OTHERS = [
    ("table", torch.zeros(64)[1:]),  # not aligned to 16 bytes
    ("table", torch.zeros(64).half()),
    ("count", None),
    ("count", 1),
    ("count", 16),
    ("count", 2**31),
    ("count", 5.0),
    ("FIRST", 2),
    ("SECOND", 3),
    ("num_warps", 8),
]


@pytest.mark.parametrize(("name", "value"), OTHERS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(OTHERS)])
def test_whatever_triton_tells_apart_is_compiled_anew(kernel, name, value):
    quick = QuickKernel(kernel)
    for table, count, first, *rest in (USUAL.values(), (USUAL | {name: value}).values()):
        quick[(1,)](table, count, first, **dict(zip(("SECOND", "THIRD", "num_warps"), rest, strict=True)))
    assert len(kernel.compiled) == 2 and not kernel.started


def test_a_kernel_starts_where_its_first_argument_is(kernel, monkeypatch):
    quick, entered = QuickKernel(kernel), []
    monkeypatch.setattr(torch.cuda, "device", lambda number: entered.append(number) or nullcontext())
    for device in (-1, 1, 1):
        monkeypatch.setattr(torch.Tensor, "get_device", lambda _, device=device: device)
        quick[(1,)](torch.zeros(4), 5, 1, SECOND=2, THIRD=3)
    assert entered == [1, 1]
    assert len(kernel.compiled) == 2, "devices are told apart"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 96, 128, 129, 1000])
def test_numbers_of_a_grid_are_tritons(count):
    assert power_of_two(count) == triton.next_power_of_2(count)
    assert ceil_div(count, 32) == triton.cdiv(count, 32)


def test_a_number_is_not_a_truth_value():
    assert _kind(True) != _kind(1) and _kind(5) == _kind(7) and _kind(2.5) == _kind(3.5)
