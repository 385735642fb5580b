"""The end of the chain on tensors: samples travel as HU and are given their windows on the device."""

from collections.abc import Sequence

from jaxtyping import Float, Num
from torch import Tensor

from transforms.windows import window_bounds


def window_values(hu: Num[Tensor, "..."], names: Sequence[str]) -> Float[Tensor, "... C"]:
    """`windows.window_values`, bit for bit on every device."""
    if not names:
        raise ValueError("windows must name at least one window, got none")
    hu = hu.float()
    values = hu.new_empty((*hu.shape, len(names)))
    for channel, name in enumerate(names):
        low, high = window_bounds(name)
        width = hu.new_full((), high - low)  # by a number CUDA would not divide, but multiply with its inverse
        values[..., channel] = ((hu - low) / width).clamp_(0, 1) * 2 - 1
    return values
