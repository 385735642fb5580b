"""Which device a process computes on."""

import os

import torch


def choose_device() -> torch.device:
    """The GPU of this process, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device
