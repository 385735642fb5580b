"""Which voxels a decoder computes: the halvings of a level, and the same as one byte of children a cell."""

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from networks.sparse.topology import Coarsening, Level

Support = list[UInt8[Tensor, " _"]]


def support_of(level: Level) -> Support:
    """Which voxels a decoder is to compute: per level of a tokenizer, coarsest first, one byte of children a cell."""
    octants = torch.arange(8, device=level.device)
    return [(part.occupied.int() << octants).sum(1).to(torch.uint8) for part in plan_of(level)]


def plan_of(level: Level) -> list[Coarsening]:
    """The three halvings of a level, coarsest first, as a decoder takes them back."""
    plan = [level.coarsening]
    for _ in range(2):
        plan.insert(0, plan[0].coarse.coarsening)
    return plan


def children_of(support: UInt8[Tensor, " M"]) -> Bool[Tensor, "M 8"]:
    """The bits of `support_of`."""
    return ((support[:, None].int() >> torch.arange(8, device=support.device)) & 1).bool()
