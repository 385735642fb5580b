"""The volumes that the benchmarks run on: a body with two lungs cut out, and the thin shell of a sphere."""

import torch
from jaxtyping import Int
from torch import Tensor

from networks.sparse.topology import Level


def body(side: int) -> Int[Tensor, "N 4"]:
    """About 37 % of the cube: an elliptic cylinder, rounded at its ends, without its two lungs."""
    x, y, z = torch.meshgrid(*[(torch.arange(side) + 0.5) / side - 0.5] * 3, indexing="ij")
    inside = (x / 0.446) ** 2 + (y / 0.35) ** 2 + (z / 0.56) ** 6 <= 1
    for centre in (-0.2, 0.2):
        inside &= ((x - centre) / 0.12) ** 2 + (y / 0.2) ** 2 + (z / 0.4) ** 2 > 1
    return torch.nn.functional.pad(inside.nonzero(), (1, 0))


def shell(side: int) -> Int[Tensor, "N 4"]:
    """A sphere's surface a voxel and a half thick, as a signed distance band or an organ boundary leaves it."""
    axis = torch.arange(side) - (side - 1) / 2
    rows = []
    for i, x in enumerate(axis):  # one plane at a time, so that 512 cubed needs no gigabytes
        radius = (x**2 + axis[:, None] ** 2 + axis[None, :] ** 2).sqrt()
        plane = ((radius - 0.348 * side).abs() < 0.75).nonzero()
        rows.append(torch.nn.functional.pad(plane, (1, 0), value=i))
    return torch.nn.functional.pad(torch.cat(rows), (1, 0))


def level_of(coords: Int[Tensor, "N 4"], side: int, device: torch.device | str) -> Level:
    return Level.from_coords(coords.to(device), (side, side, side), 1)[0]
