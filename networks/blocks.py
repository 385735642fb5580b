"""Blocks that halve and double: those of `pool children`, and those with the published layers of Direct3D-S2."""

from torch import nn

from networks.sparse.modules import (
    Doubling,
    Downsample,
    Halving,
    Linear,
    Norm,
    ResidualBlock,
    SiLU,
    SubmanifoldConv3d,
    Upsample,
)
from networks.sparse.tensor import SparseTensor
from networks.sparse.topology import Coarsening


class HalvingBlock(nn.Module):
    """Halve, then residual pairs of convolutions."""

    def __init__(
        self, in_channels: int, out_channels: int, *, norm: str, num_residual: int, occupancy: bool, backend: str
    ):
        super().__init__()
        self.down = Halving(in_channels, out_channels, occupancy=occupancy)
        self.residual = nn.Sequential(
            *(ResidualBlock(out_channels, norm=norm, backend=backend) for _ in range(num_residual))
        )

    def forward(self, x: SparseTensor) -> SparseTensor:
        return self.residual(self.down(x))


class DoublingBlock(nn.Module):
    """Residual pairs of convolutions, then double. Norms are over each voxel: tiles decode as the whole does."""

    def __init__(self, in_channels: int, out_channels: int, *, num_residual: int, backend: str):
        super().__init__()
        self.residual = nn.Sequential(
            *(ResidualBlock(in_channels, norm="voxel", backend=backend) for _ in range(num_residual))
        )
        self.up = Doubling(in_channels, out_channels)

    def forward(self, x: SparseTensor, cells: Coarsening) -> SparseTensor:
        return self.up(self.residual(x), cells)


class DownBlock(nn.Module):
    """Norm, mean over children, then two convolutions beside a linear skip."""

    def __init__(self, in_channels: int, out_channels: int, *, norm: str, pool: str, backend: str):
        super().__init__()
        self.act_layers = nn.Sequential(Norm(in_channels, over=norm))
        self.down = Downsample(pool=pool)
        self.out_layers = nn.Sequential(
            SubmanifoldConv3d(in_channels, out_channels, backend=backend),
            Norm(out_channels, over=norm),
            nn.Identity(),  # the activation's place: published names count layers
            SubmanifoldConv3d(out_channels, out_channels, backend=backend),
        )
        self.skip_connection = Linear(in_channels, out_channels)

    def forward(self, x: SparseTensor) -> SparseTensor:
        inner, _ = self.down(self.act_layers(x))
        outer, _ = self.down(x)
        return self.mix(inner, outer)

    def mix(self, inner: SparseTensor, outer: SparseTensor) -> SparseTensor:
        """The part after halving: activated and plain features."""
        return inner.replace(self.out_layers(inner).feats + self.skip_connection(outer).feats)


class UpBlock(nn.Module):
    """Convolve, copy to the wanted children, convolve."""

    def __init__(self, in_channels: int, out_channels: int, *, backend: str):
        super().__init__()
        self.act_layers = nn.Sequential(SubmanifoldConv3d(in_channels, out_channels, backend=backend), SiLU())
        self.up = Upsample()
        self.out_layers = nn.Sequential(SubmanifoldConv3d(out_channels, out_channels, backend=backend), SiLU())

    def forward(self, x: SparseTensor, cells: Coarsening) -> SparseTensor:
        return self.out_layers(self.up(self.act_layers(x), cells))
