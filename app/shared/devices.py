"""Which device a process computes on, and on how many threads."""

import contextlib
import os
from collections.abc import Iterator

import torch


def choose_device(*, one_thread: bool = False) -> torch.device:
    """The GPU of this process, else the CPU.

    On a CPU with `one_thread` PyTorch computes on one, unless OMP_NUM_THREADS says how many: arrays as small as the
    demo's gain nothing by more, and beside other work threads that wait for each other take seven times the CPU time.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    if one_thread and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return torch.device("cpu")


@contextlib.contextmanager
def threads_kept() -> Iterator[None]:
    """However many threads are chosen within, outside there are as many as before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
