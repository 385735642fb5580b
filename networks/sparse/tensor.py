"""The data type of the sparse networks: features of occupied voxels on a `topology.Level`.

Letters used in shapes throughout the project:
B batch, N voxels, C channels, K codes, D code width, M latents, T tokens, L text length, E language width,
X Y Z axes (never height, width, depth). Coordinates are int32 (batch, x, y, z).
"""

import torch
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor

from networks.sparse.maps import maps_for
from networks.sparse.topology import Level


def _in_order(feats: Float[Tensor, "N C"], order: Int64[Tensor, " N"]) -> Float[Tensor, "N C"]:
    if feats.requires_grad:  # a kernel of its own would have no gradient
        return feats.index_select(0, order)
    return maps_for(feats.device).take_rows(feats, order)


class SparseTensor:
    """Features (N, C) of the occupied voxels of a batch, in key order.

    Accepts coordinates in any row order, stride and integer width; duplicates, negatives and out-of-range raise.
    `.feats` and `.coords` come back in key order; `.level` carries the maps shared by all layers.
    """

    def __init__(
        self,
        feats: Float[Tensor, "N C"],
        coords: Int[Tensor, "N 4"],
        spatial_shape: tuple[int, int, int],
        batch_size: int,
    ):
        if feats.ndim != 2 or feats.shape[0] != coords.shape[0]:
            raise ValueError(f"feats must be (N, C) with N = {coords.shape[0]} coords, got {tuple(feats.shape)}")
        if feats.device != coords.device:
            raise ValueError(f"feats and coords must share a device, got {feats.device} and {coords.device}")
        self.level, order = Level.from_coords(coords, spatial_shape, batch_size)
        self.feats = feats if order is None else _in_order(feats, order)

    @classmethod
    def on(cls, level: Level, feats: Float[Tensor, "N C"]) -> "SparseTensor":
        """Features already in the key order of a level."""
        if feats.shape[0] != len(level):
            raise ValueError(f"feats must have a row for each of the {len(level)} voxels, got {feats.shape[0]}")
        tensor = cls.__new__(cls)
        tensor.level, tensor.feats = level, feats
        return tensor

    def replace(self, feats: Float[Tensor, "N C"]) -> "SparseTensor":
        """Other features on the same voxels; maps are shared."""
        return SparseTensor.on(self.level, feats)

    @property
    def coords(self) -> Int32[Tensor, "N 4"]:
        return self.level.coords

    @property
    def spatial_shape(self) -> tuple[int, int, int]:
        return self.level.spatial_shape

    @property
    def batch_size(self) -> int:
        return self.level.batch_size

    def __len__(self) -> int:
        return len(self.level)

    def to(self, device: torch.device | str) -> "SparseTensor":
        return SparseTensor.on(self.level.to(device), self.feats.to(device))

    def dense(self, *, fill: float = 0.0) -> Float[Tensor, "B C X Y Z"]:
        """The full grid with `fill` on empty voxels."""
        b, x, y, z = self.coords.long().unbind(1)
        grid = self.feats.new_full((self.batch_size, *self.spatial_shape, self.feats.shape[1]), fill)
        grid[b, x, y, z] = self.feats
        return grid.movedim(-1, 1)

    def __repr__(self) -> str:
        size = f"{len(self)} voxels, {self.feats.shape[1]} channels"
        return f"SparseTensor({size}, grid {self.spatial_shape}, batch {self.batch_size})"
