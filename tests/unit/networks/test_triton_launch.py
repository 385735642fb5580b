"""Kernels started by a key of our own: all that Triton compiles apart is told apart."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
from networks.kernels import launch  # noqa: E402
from networks.kernels.launch import QuickKernel, _kind, ceil_div, power_of_two  # noqa: E402


class Recorded(triton.JITFunction):
    """Stands for a kernel of two arguments and three constants; notes what is compiled and what is started."""

    arg_names = ("table", "count", "FIRST", "SECOND", "THIRD")
    params = tuple(SimpleNamespace(is_constexpr=name.isupper()) for name in arg_names)

    def __init__(self):
        self.compiled, self.started, self.ways, self.scratch = [], [], [], 0

    def __getitem__(self, grid):
        def compile_and_start(*args, **constants):
            self.compiled.append((grid, args, constants))
            return Compiled(self)

        return compile_and_start


class Compiled:
    name, function, packed_metadata = "recorded", 1234, (4, 1, 0)

    def __init__(self, kernel):
        self.kernel = kernel
        self.run = SimpleNamespace(global_scratch_size=kernel.scratch, profile_scratch_size=0, launch=self.launch)
        self.run.launch_cooperative_grid = self.run.launch_pdl = False

    def __getitem__(self, grid):
        self.kernel.ways.append("triton")
        return lambda *args: self.kernel.started.append((grid, args))

    def launch(self, x, y, z, stream, function, *args):
        assert (stream, function) == (77, 1234) and args[:8] == (False, False, None, None, (4, 1, 0), None, None, None)
        self.kernel.ways.append("direct")
        self.kernel.started.append(((x, y, z), args[8:]))


@pytest.fixture(params=[False, True], ids=["any Triton", "the Triton whose launcher is known"])
def kernel(monkeypatch, request):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # what tensors on the CPU say
    monkeypatch.setattr(launch, "KNOWN_LAUNCHER", request.param)
    monkeypatch.setattr(launch, "raw_stream", lambda device: 77)
    return Recorded()


def test_the_same_kinds_are_compiled_once_and_started_in_the_kernels_order(kernel):
    quick, table = QuickKernel(kernel), torch.zeros(64)
    quick[(7,)](table, 5, 1, THIRD=3, SECOND=2, num_warps=4)
    quick[(9, 2)](table[16:], 6, 1, THIRD=3, SECOND=2, num_warps=4)
    assert len(kernel.compiled) == 1 and kernel.compiled[0][2] == {"THIRD": 3, "SECOND": 2, "num_warps": 4}
    [(grid, args)] = kernel.started
    place = args[0] if launch.KNOWN_LAUNCHER else args[0].data_ptr()
    assert kernel.ways == ["direct" if launch.KNOWN_LAUNCHER else "triton"]
    assert grid == (9, 2, 1) and place == table[16:].data_ptr() and args[1:] == (6, 1, 2, 3)


@pytest.mark.parametrize("grid", [(3,), (3, 5), (3, 5, 7)])
def test_a_grid_keeps_all_its_sides(kernel, grid):
    quick = QuickKernel(kernel)
    for _ in range(2):
        quick[grid](torch.zeros(64), 5, 1, SECOND=2, THIRD=3)
    assert kernel.started[0][0] == (*grid, 1, 1)[:3]


def test_a_tensor_that_moved_to_another_kind_of_memory_is_left_to_triton(kernel, monkeypatch):
    quick, table = QuickKernel(kernel), torch.zeros(64)
    quick[(1,)](table, 5, 1, SECOND=2, THIRD=3)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    quick[(1,)](table, 5, 1, SECOND=2, THIRD=3)
    assert len(kernel.compiled) == 2 and not kernel.started, "Triton refuses memory that a card cannot reach"


def test_a_kernel_that_wants_memory_of_its_launcher_starts_tritons_own_way(kernel):
    quick = QuickKernel(kernel)
    kernel.scratch = 8
    for _ in range(2):
        quick[(1,)](torch.zeros(64), 5, 1, SECOND=2, THIRD=3)
    assert len(kernel.started) == 1 and kernel.ways == ["triton"]


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
