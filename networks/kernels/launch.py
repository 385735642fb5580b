"""Starts Triton kernels with less work on the host: the compiled kernel is found by one key, not by Triton's binder.

A training step starts some 300 kernels, and the host, not the card, sets its pace. `@quick` above `@triton.jit` keeps
`kernel[grid](...)` as it is. Arguments by name must be constants, behind all others, in the kernel's own order or not.
A kernel is started on the device of its first argument, a tensor. With the Triton whose launcher is known here a kernel
that was started before gets addresses instead of tensors, and Triton's launch hooks do not see it; with any other
Triton it goes through the compiled kernel as Triton offers it. Also says what a card has: shared memory, which tiles
have to fit, and processors, among which rows are split.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import triton
from torch import Tensor

KNOWN_LAUNCHER = triton.__version__.startswith("3.6.")
raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # absent from builds for CPUs


def quick(kernel):
    """The kernel with a quicker start; as it is where Triton's interpreter runs it."""
    return QuickKernel(kernel) if isinstance(kernel, triton.JITFunction) else kernel


class QuickKernel:
    def __init__(self, kernel: triton.JITFunction):
        self.kernel = kernel
        self.constant = [param.is_constexpr for param in kernel.params]
        self.started: dict[tuple, Callable[[tuple[int, ...], list], None]] = {}

    def __getitem__(self, grid: tuple[int, ...]):
        return partial(self.start, grid)

    def start(self, grid: tuple[int, ...], *args: object, **constants: object) -> None:
        """Where the first argument is."""
        device = args[0].get_device()
        if device == torch.cuda.current_device():
            self._start(device, grid, args, constants)
        else:
            with torch.cuda.device(device):
                self._start(device, grid, args, constants)

    def _start(self, device: int, grid: tuple[int, ...], args: tuple, constants: dict[str, object]) -> None:
        kinds, passed = [], []
        for arg, fixed in zip(args, self.constant, strict=False):
            kind = arg
            if not fixed:
                if isinstance(arg, Tensor):
                    address = arg.data_ptr()
                    kind = arg.dtype, address % 16 == 0, arg.is_cuda
                    arg = address if KNOWN_LAUNCHER else arg
                else:
                    kind = _kind(arg)
            kinds.append(kind)
            passed.append(arg)
        key = (device, *kinds, *constants.items())
        if found := self.started.get(key):
            found(grid, passed)
            return
        compiled = self.kernel[grid](*args, **constants)
        rest = [constants[name] for name in self.kernel.arg_names[len(args) :]]
        self.started[key] = _launch_of(compiled, device, rest)


def _launch_of(compiled: object, device: int, rest: list) -> Callable[[tuple[int, ...], list], None]:
    """Starts a compiled kernel on a device, given a grid and all arguments but the `rest`."""
    run = compiled.run if KNOWN_LAUNCHER else None
    if run is None or run.global_scratch_size or run.profile_scratch_size:  # memory that only Triton's own way gives
        return lambda grid, passed: compiled[(*grid, 1, 1)[:3]](*passed, *rest)
    launch, function = run.launch, compiled.function
    how = run.launch_cooperative_grid, run.launch_pdl, None, None, compiled.packed_metadata, None, None, None

    def start(grid: tuple[int, ...], passed: list) -> None:
        launch(*(*grid, 1, 1)[:3], raw_stream(device), function, *how, *passed, *rest)

    return start


def _kind(value: object) -> object:
    """All that Triton tells apart when it compiles for an argument that is no tensor."""
    if isinstance(value, int):
        return type(value), value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    return type(value)


def ceil_div(count: int, size: int) -> int:
    """Triton's own of this and the next are made for kernels: on the host each call takes longer than a launch may."""
    return -(-count // size)


def power_of_two(count: int) -> int:
    """The first that is not below `count`."""
    return 1 << max(count - 1, 0).bit_length()


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes a program may use: 227 KiB on an H100 or H200, 99 on an RTX 4090, 163 on an A100."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 2**17


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
