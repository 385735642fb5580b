"""Layers: parameters and one call into ops.py. Each takes and gives a SparseTensor."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from networks.sparse import ops, whole_blocks
from networks.sparse.tensor import SparseTensor
from networks.sparse.topology import Coarsening, Live
from networks.sparse.whole_blocks import Block


class RowLinear(nn.Linear):
    """A linear map of rows; in a graph of the `live` ones."""

    def forward(self, rows: Float[Tensor, "N _"], *, live: Live = None) -> Float[Tensor, "N F"]:
        return ops.linear(rows, self.weight, self.bias, live=live)


class Linear(RowLinear):
    """A linear map of every voxel's features."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        return x.replace(super().forward(x.feats, live=x.level.live))


class SiLU(nn.Module):
    def forward(self, x: SparseTensor) -> SparseTensor:
        return x.replace(F.silu(x.feats))


class SubmanifoldConv3d(nn.Module):
    """3x3x3 convolution that keeps the occupied voxels.

    `weight` is (27, in, out) with offset index (dx+1)*9 + (dy+1)*3 + (dz+1): on a full grid it equals
    `torch.nn.functional.conv3d` on (B, C, X, Y, Z) with that kernel and padding 1.
    """

    def __init__(self, in_channels: int, out_channels: int, *, backend: str = "auto"):
        super().__init__()
        self.in_channels, self.out_channels, self.backend = in_channels, out_channels, backend
        # He et al. 2015: keeps the scale through the decoder, which has no norms. torch's default learns slower.
        self.weight = nn.init.normal_(
            nn.Parameter(torch.empty(27, in_channels, out_channels)), std=math.sqrt(2 / (27 * in_channels))
        )
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: SparseTensor) -> SparseTensor:
        return ops.submanifold_conv(x, self.weight, self.bias, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, backend={self.backend}"


class Norm(nn.Module):
    """Normalisation with SiLU after it: one pass over memory instead of two.

    `over` says of what: "voxel", each voxel's own channels, so that a place's features do not depend on the rest of
    the scan; or "sample", groups of channels over all voxels of a sample, as published weights have it. The number of
    groups is the largest up to 32 that divides the channels.
    """

    def __init__(self, channels: int, *, over: str):
        super().__init__()
        self.over, self.num_groups = over, math.gcd(channels, 32)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: SparseTensor) -> SparseTensor:
        if self.over == "voxel":
            return ops.voxel_norm(x, self.weight, self.bias, silu=True)
        return ops.group_norm(x, self.num_groups, self.weight, self.bias, silu=True)


class Downsample(nn.Module):
    """Halves the grid: mean over the children present. Gives the coarse tensor and the plan that `Upsample` takes."""

    def __init__(self, *, pool: str = "mean"):
        super().__init__()
        if pool not in ("mean", "legacy"):
            raise ValueError(f"pool must be mean or legacy, got {pool!r}")
        self.pool = pool

    def forward(self, x: SparseTensor) -> tuple[SparseTensor, Coarsening]:
        return ops.pool(x, legacy=self.pool == "legacy")


class Upsample(nn.Module):
    """Doubles the grid on the voxels that a plan names, copying the parent's features."""

    def forward(self, x: SparseTensor, cells: Coarsening) -> SparseTensor:
        return ops.unpool(x, cells)


class Halving(nn.Module):
    """Halves the grid: eight children side by side through a linear map, so that none loses its place.

    The shortcut beside it (means over groups of children and channels, arXiv:2410.10733) is linear too: it is added to
    the weight, and one product does both. With `occupancy` a channel of ones tells which children are there.
    """

    def __init__(self, in_channels: int, out_channels: int, *, occupancy: bool = False):
        super().__init__()
        self.occupancy = occupancy
        self.linear = RowLinear(8 * (in_channels + occupancy), out_channels)
        means = rearrange(group_means(8 * in_channels, out_channels), "out (c child) -> out child c", child=8)
        means = F.pad(means, (0, int(occupancy)))
        self.register_buffer("shortcut", rearrange(means, "out child c -> out (child c)"), persistent=False)

    def forward(self, x: SparseTensor) -> SparseTensor:
        layer = whole_blocks.Affine(self.linear.weight, self.linear.bias)
        if (halved := whole_blocks.halving(x, layer, self.shortcut, marked=self.occupancy)) is not None:
            return halved
        x = x.replace(F.pad(x.feats, (0, 1), value=1.0)) if self.occupancy else x
        gathered, _ = ops.gather_children(x)
        return gathered.replace(ops.linear(gathered.feats, self.linear.weight + self.shortcut, self.linear.bias))


class Doubling(nn.Module):
    """Doubles the grid on the voxels that a plan names: a linear map to eight parts, of which each child takes its own.

    The shortcut is the parent's copy, its channels dealt out in turn as `Halving` gathers them.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.linear = RowLinear(in_channels, 8 * out_channels)
        copies = rearrange(group_means(in_channels, 8 * out_channels), "(c child) i -> (child c) i", child=8)
        self.register_buffer("shortcut", copies.contiguous(), persistent=False)

    def forward(self, x: SparseTensor, cells: Coarsening) -> SparseTensor:
        layer = whole_blocks.Affine(self.linear.weight, self.linear.bias)
        if (doubled := whole_blocks.doubling(x, cells, layer, self.shortcut)) is not None:
            return doubled
        parts = x.replace(ops.linear(x.feats, self.linear.weight + self.shortcut, self.linear.bias))
        return ops.scatter_children(parts, cells)


def group_means(inputs: int, outputs: int) -> Float[Tensor, "outputs inputs"]:
    """The linear map to means over equal groups of neighbouring inputs; to copies, where outputs are more."""
    return F.adaptive_avg_pool1d(torch.eye(inputs), outputs).T.contiguous()


class ResidualBlock(nn.Module):
    """Two convolutions, each after its norm and activation, beside the features as they came."""

    def __init__(self, channels: int, *, norm: str, backend: str):
        super().__init__()
        self.layers = nn.Sequential(
            Norm(channels, over=norm),
            SubmanifoldConv3d(channels, channels, backend=backend),
            Norm(channels, over=norm),
            SubmanifoldConv3d(channels, channels, backend=backend),
        )
        with torch.no_grad():  # a sum of several blocks starts near its first term
            self.layers[3].weight.mul_(0.3)

    def forward(self, x: SparseTensor) -> SparseTensor:
        if self.layers[0].over == "voxel":
            layers = tuple(whole_blocks.Affine(layer.weight, layer.bias) for layer in self.layers)
            if (out := whole_blocks.residual_block(x, layers, backend=self.layers[1].backend)) is not None:
                return out
        return x.replace(x.feats + self.layers(x).feats)


def position_encoding(coords: Int[Tensor, "N 3"], channels: int) -> Float[Tensor, "N C"]:
    """Fixed sinusoids of absolute coordinates: (sin, cos) of channels // 6 frequencies for x, y, z, then zeros."""
    num_freqs = channels // 6
    steps = torch.arange(num_freqs, dtype=torch.float32, device=coords.device)
    angles = coords[:, :, None].float() * 10000.0 ** -(steps / max(num_freqs, 1))
    waves = rearrange(torch.cat([angles.sin(), angles.cos()], 2), "n xyz f -> n (xyz f)")
    return F.pad(waves, (0, channels - waves.shape[1]))


class Attention(nn.Module):
    """Multi-head self-attention inside cubic windows."""

    def __init__(self, channels: int, *, num_heads: int, window: int, shift: int):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"channels must be a multiple of num_heads = {num_heads}, got {channels}")
        self.num_heads, self.window, self.shift = num_heads, window, shift
        self.to_qkv = RowLinear(channels, 3 * channels)
        self.to_out = RowLinear(channels, channels)

    def forward(self, x: SparseTensor) -> SparseTensor:
        qkv = rearrange(self.to_qkv(x.feats), "n (three h d) -> n three h d", three=3, h=self.num_heads)
        out = ops.window_attention(qkv, x.level, window=self.window, shift=self.shift)
        return x.replace(self.to_out(rearrange(out, "n h d -> n (h d)")))


class Mlp(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.mlp = nn.Sequential(
            RowLinear(channels, 4 * channels), nn.GELU(approximate="tanh"), RowLinear(4 * channels, channels)
        )

    def forward(self, x: SparseTensor) -> SparseTensor:
        return x.replace(self.mlp(x.feats))


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP; norms carry no parameters and run in float32."""

    def __init__(self, channels: int, *, num_heads: int, window: int, shift: int):
        super().__init__()
        self.attn = Attention(channels, num_heads=num_heads, window=window, shift=shift)
        self.mlp = Mlp(channels)

    def parts(self) -> Block:
        """Parameters and sizes."""
        attn, (widen, _, narrow) = self.attn, self.mlp.mlp
        layers = tuple(whole_blocks.Affine(one.weight, one.bias) for one in (attn.to_qkv, attn.to_out, widen, narrow))
        return Block(layers, attn.num_heads, attn.window, attn.shift)

    def forward(self, x: SparseTensor) -> SparseTensor:
        if (out := whole_blocks.transformer_block(x, self.parts())) is not None:
            return out
        x = x.replace(x.feats + self.attn(layer_norm(x)).feats)
        return x.replace(x.feats + self.mlp(layer_norm(x)).feats)


def layer_norm(x: SparseTensor, *, eps: float = 1e-6) -> SparseTensor:
    """Normalises each voxel's features without parameters; 16-bit inputs are summed in float32 and rounded once."""
    with ops.without_autocast(x.feats.device.type):
        return x.replace(F.layer_norm(x.feats, x.feats.shape[1:], eps=eps))
