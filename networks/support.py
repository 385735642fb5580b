"""Which voxels a decoder computes: the halvings of a level, the same as bytes of children, and the heads that tell."""

from types import MappingProxyType

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor, nn

from networks.presets import Preset
from networks.sparse.modules import RowLinear
from networks.sparse.tensor import SparseTensor
from networks.sparse.topology import Coarsening, Level

# From which logit on a child is decoded. Where a voxel of a body lacks, air stands for it, 1000 HU off; one too many
# shows what lies beside the body. So one chance in twenty is enough. Components show tissue there, so one in eight; the
# band of a distance stays thin.
LEAST_LOGIT = MappingProxyType({"window": -3.0, "pca": -2.0, "sdf": 0.0})

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


class SubdivisionHeads(nn.ModuleList):
    """Per level eight logits a voxel: which of its children exist."""

    def __init__(self, sizes: Preset):
        channels = (sizes.model_channels, *sizes.widths[:0:-1])
        super().__init__(RowLinear(width, 8) for width in channels)
        self.sizes = sizes

    def choose(
        self, i: int, x: SparseTensor, *, fine_shape: tuple[int, int, int]
    ) -> tuple[Coarsening, Bool[Tensor, " M"]]:
        """Children inside the grid that are likely enough, else the likeliest one; also where that was needed."""
        logits = self[i](x.feats.float())
        octants = torch.arange(8, device=logits.device)
        children = 2 * x.coords[:, None, 1:] + torch.stack([octants >> 2, (octants >> 1) & 1, octants & 1], 1)
        inside = (children < torch.tensor(fine_shape, device=logits.device)).all(2)
        logits = logits.masked_fill(~inside, -torch.inf)
        occupied = logits > LEAST_LOGIT["pca" if self.sizes.pca else self.sizes.features]
        barren = ~occupied.any(1)
        occupied[barren, logits[barren].argmax(1)] = True
        return x.level.subdivide(occupied, fine_shape), barren
