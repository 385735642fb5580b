"""Starts Triton kernels with less work on the host: the compiled kernel is found by one key, not by Triton's binder.

A training step starts about 150 kernels, and the host, not the card, sets its pace. `@quick` above `@triton.jit` keeps
`kernel[grid](...)` as it is. Arguments by name must be constants, behind all others, in the kernel's own order or not.
A kernel is started on the device of its first argument, a tensor. Also says what a card has: shared memory, which
tiles have to fit, and processors, among which rows are split.
"""

from functools import cache, partial

import torch
import triton


def quick(kernel):
    """The kernel with a quicker start; as it is where Triton's interpreter runs it."""
    return QuickKernel(kernel) if isinstance(kernel, triton.JITFunction) else kernel


class QuickKernel:
    def __init__(self, kernel: triton.JITFunction):
        self.kernel = kernel
        self.constant = [param.is_constexpr for param in kernel.params]
        self.started: dict[tuple, tuple] = {}

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
        kinds = [arg if fixed else _kind(arg) for arg, fixed in zip(args, self.constant, strict=False)]
        key = (device, *kinds, *constants.items())
        if found := self.started.get(key):
            compiled, rest = found
            compiled[(*grid, 1, 1)[:3]](*args, *rest)
            return
        compiled = self.kernel[grid](*args, **constants)
        self.started[key] = compiled, [constants[name] for name in self.kernel.arg_names[len(args) :]]


def _kind(value: object) -> object:
    """All that Triton tells apart when it compiles for an argument."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
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
