"""The end of the chain on tensors: samples travel as HU and are given their windows on the device."""

from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float, Num
from torch import Tensor

from transforms.windows import window_bounds


def window_values(hu: Num[Tensor, "..."], names: Sequence[str]) -> Float[Tensor, "... C"]:
    """`windows.window_values`, bit for bit on every device."""
    if not names:
        raise ValueError("windows must name at least one window, got none")
    low, width = _bounds(tuple(names), hu.device)
    values = hu.float()[..., None] - low
    return values.div_(width).clamp_(0, 1).mul_(2).sub_(1)  # in place: each pass is over the largest array of a batch


@cache
def _bounds(names: tuple[str, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Lower ends and widths. As tensors: by a number CUDA would not divide, but multiply with its inverse."""
    ends = torch.tensor([window_bounds(name) for name in names], device=device)
    return ends[:, 0].contiguous(), ends.diff(dim=1)[:, 0].contiguous()
