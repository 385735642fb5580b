"""A whole volume through a tokenizer in bounded memory: the finest levels in parts, the coarse ones at once.

Exact but for the rounding of sums. At full resolution the encoder has no convolution: its rows go through in parts, and
once before that where they meet a norm over the sample (`pool` mean and legacy), for its statistics. The decoder has no
norm but over single voxels and, after the transformer, nothing but convolutions: tiles with a halo, cut thinner level
by level, give what the whole gives. The transformer sees all latents, an eighth of the resolution, at once.

What is as large as a whole volume at full resolution stands in the host's memory where there are several parts: the
voxels that are encoded may lie there already, those of each tile go there, and there they are joined.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from networks.blocks import HalvingBlock
from networks.components import VOXELS_PER_LATENT
from networks.sparse import SparseTensor
from networks.sparse.modules import Norm
from networks.sparse.topology import Coarsening, Level, find_rows, morton_keys
from networks.support import Support, children_of
from networks.vqvae import BatchTokens, SparseVQVAE

# Cells around a tile that each level of the decoder still needs: at a quarter and half of the resolution convolutions
# reach 4 and 2 cells, so before them 5 and 2 are left, and 3 latents. With `pool` mean and legacy it is 3, 3 and 2.
HALOS = (3, 5, 2)
MIN_SIDE = 4  # latents of a tile: below it there would be little but halo
HOST = "cpu"


class Decoded(NamedTuple):
    values: SparseTensor
    forced: int  # cells, over all levels, whose eight children were all judged empty: one was kept
    computed: int  # voxels computed for it, halos included


@torch.no_grad()
def encode_whole(
    network: SparseVQVAE, x: SparseTensor, *, max_points: int | None = None, levels: int | None = None
) -> BatchTokens:
    """`network.encode` of one volume with at most `max_points` rows of the finest level in work at a time.

    Then `x` may lie in the host's memory: parts go to where the network is.
    """
    return network.tokens_of(latents_whole(network, x, max_points=max_points), levels=levels)


@torch.no_grad()
def latents_whole(network: SparseVQVAE, x: SparseTensor, *, max_points: int | None = None) -> SparseTensor:
    """What the encoder gives for one volume, before codes are chosen, in parts as `encode_whole`."""
    if max_points is None or len(x) <= max_points:
        return network.encoder(x)[0]
    if x.batch_size != 1 or max_points < 8:
        raise ValueError(f"parts need one volume and 8 voxels, got {x.batch_size} volumes and max_points {max_points}")
    return network.encoder.from_half(_first_half(network, x, max_points), _linear_part(network, x, max_points))[0]


def _linear_part(network: SparseVQVAE, x: SparseTensor, max_points: int) -> Float[Tensor, "M D"] | None:
    """`linear_part`, of some latents at a time."""
    if not network.sizes.pca:
        return None
    parts = _parts(network, x, max(max_points, VOXELS_PER_LATENT), halvings=3)
    return torch.cat([network.encoder.linear_part(part) for part in parts])


def _first_half(network: SparseVQVAE, x: SparseTensor, max_points: int) -> SparseTensor:
    """Input layer and first halving, part by part."""
    widen, block = network.encoder.input_layer1, network.encoder.downsample[0]
    if isinstance(block, HalvingBlock):
        return block.residual(_joined([block.down(part) for part in _parts(network, x, max_points)]))
    activate = _first_norm(network, x, max_points)
    inner, outer = [], []
    for part in _parts(network, x, max_points):
        part = widen(part)
        pooled, _ = block.down(activate(part))
        inner.append(pooled)
        outer.append(pooled.replace(block.down(part)[0].feats))
    return block.mix(_joined(inner), _joined(outer))


def _joined(parts: list[SparseTensor]) -> SparseTensor:
    """Consecutive parts as one, which are gone then: beside the whole they would take as much again."""
    first = parts[0].level
    sizes = {"spatial_shape": first.spatial_shape, "batch_size": 1, "bits": first.bits}
    level = Level(torch.cat([part.level.keys for part in parts]), **sizes)
    feats = torch.cat([part.feats for part in parts])
    parts.clear()
    return SparseTensor.on(level, feats)


def _first_norm(network: SparseVQVAE, x: SparseTensor, max_points: int) -> Callable[[SparseTensor], SparseTensor]:
    """The first norm and its activation for some of the rows.

    Over a sample it becomes a scale and a shift per channel, its statistics summed over all rows in float64.
    """
    widen, block = network.encoder.input_layer1, network.encoder.downsample[0]
    norm: Norm = block.act_layers[0]
    if norm.over == "voxel":
        return norm
    total, squares = 0.0, 0.0
    for part in _parts(network, x, max_points):
        part = rearrange(widen(part).feats.double(), "n (g c) -> g n c", g=norm.num_groups)
        total, squares = total + part.sum((1, 2)), squares + part.square().sum((1, 2))
    channels = norm.weight.shape[0] // norm.num_groups
    mean = total / (len(x) * channels)
    spread = (squares / (len(x) * channels) - mean.square() + 1e-5).rsqrt()
    scale = norm.weight.double() * spread.repeat_interleave(channels)
    shift = norm.bias.double() - mean.repeat_interleave(channels) * scale
    return lambda part: part.replace(F.silu(part.feats * scale.float() + shift.float()))


def _parts(network: SparseVQVAE, x: SparseTensor, max_points: int, *, halvings: int = 1) -> Iterator[SparseTensor]:
    """Consecutive rows where the network is, cut only between cells that become one in so many halvings."""
    level, start, bits = x.level, 0, 3 * halvings
    device = next(network.parameters()).device
    while start < len(level):
        stop = min(start + max_points, len(level))
        if stop < len(level):
            stop = int(torch.searchsorted(level.keys, (level.keys[stop] >> bits) << bits))
        sizes = {"spatial_shape": level.spatial_shape, "batch_size": 1, "bits": level.bits}
        yield SparseTensor.on(Level(level.keys[start:stop], **sizes), x.feats[start:stop]).to(device)
        start = stop


@torch.no_grad()
def decode_whole(
    network: SparseVQVAE, tokens: BatchTokens, *, support: Support | None = None, max_points: int | None = None
) -> Decoded:
    """`network.decode` of one volume in tiles that need at most about `max_points` voxels each.

    Values of several tiles lie in the host's memory.
    """
    if tokens.batch_size != 1:
        raise ValueError(f"decoding in tiles needs one volume, got a batch of {tokens.batch_size}")
    latents = network.latents_of(tokens)
    x = network.decoder.at_latents(latents)
    stored = None if support is None else StoredSupport(x.level, support)
    feats, coords, forced, computed = [], [], 0, 0
    tiles = tiles_of(x, max_points)
    place = HOST if len(tiles) > 1 else x.feats.device
    for tile in tiles:
        path = TilePath(network, tile, stored)
        values = path.decoded(x)
        feats.append(values.feats.to(place))
        coords.append(values.coords.to(place))
        forced += path.forced
        computed += path.computed
    fine_shape = tuple(8 * n for n in tokens.latent_shape)
    return Decoded(SparseTensor(torch.cat(feats), torch.cat(coords), fine_shape, 1), forced, computed)


class Tile(NamedTuple):
    """A box of latents, start inclusive, stop exclusive."""

    start: Int[Tensor, "3"]
    stop: Int[Tensor, "3"]

    def rows(self, coords: Int[Tensor, "N 3"], *, scale: int = 1, halo: int = 0) -> Bool[Tensor, " N"]:
        """Which cells, of `scale` a latent, lie in the box widened by `halo` of them."""
        return ((coords >= scale * self.start - halo) & (coords < scale * self.stop + halo)).all(1)


def tiles_of(x: SparseTensor, max_points: int | None) -> list[Tile]:
    """Cubes of latents with something in them; the largest side whose tiles and halos fit, but at least four."""
    sides = torch.tensor(x.spatial_shape, dtype=torch.int32, device=x.coords.device)
    side = max(x.spatial_shape)
    while True:
        starts = torch.unique(x.coords[:, 1:] // side, dim=0) * side
        tiles = [Tile(start, torch.minimum(start + side, sides)) for start in starts]
        if max_points is None or side == MIN_SIDE:
            return tiles
        # of the finest level, which is the largest, a tile sees less than one latent around it
        fullest = max(int(tile.rows(x.coords[:, 1:], halo=int(len(tiles) > 1)).sum()) for tile in tiles)
        if fullest * VOXELS_PER_LATENT <= max_points:
            return tiles
        side = max(side * 4 // 5, MIN_SIDE)


class Voxels(NamedTuple):
    feats: Float[Tensor, "N C"]
    coords: Int[Tensor, "N 4"]


class StoredSupport:
    """Stored children of every cell of every level, found by its coordinates."""

    def __init__(self, coarsest: Level, support: Support):
        self.levels, self.children = [coarsest], [children_of(part) for part in support]
        for part in self.children[:-1]:
            shape = tuple(2 * n for n in self.levels[-1].spatial_shape)
            self.levels.append(self.levels[-1].subdivide(part, shape).fine)

    def of(self, i: int, coords: Int[Tensor, "N 4"]) -> Bool[Tensor, "N 8"]:
        return self.children[i][find_rows(self.levels[i].keys, morton_keys(coords, self.levels[i].bits))]


class TilePath:
    """One tile's way through the decoder's levels, in coordinates relative to `low`."""

    def __init__(self, network: SparseVQVAE, tile: Tile, stored: StoredSupport | None):
        self.network, self.tile, self.stored = network, tile, stored
        self.low = (tile.start - HALOS[0]).clamp(min=0)
        self.forced = self.computed = 0

    def decoded(self, x: SparseTensor) -> Voxels:
        """The values of the tile's own voxels, of what `at_latents` gave for the whole volume."""
        rows = self.tile.rows(x.coords[:, 1:], halo=HALOS[0])
        near = x.coords[rows] - F.pad(self.low, (1, 0))
        shape = tuple((near[:, 1:].amax(0) + 1).tolist())
        values = self.network.decoder.expand(SparseTensor(x.feats[rows], near, shape, 1), self.choose, crop=self.crop)
        self.computed = len(values)
        absolute = values.coords[:, 1:] + 8 * self.low
        core = self.tile.rows(absolute, scale=8)
        return Voxels(values.feats[core], F.pad(absolute[core], (1, 0)))

    def absolute(self, i: int, features: SparseTensor) -> Int[Tensor, "N 4"]:
        return features.coords + F.pad((1 << i) * self.low, (1, 0))

    def crop(self, i: int, features: SparseTensor) -> SparseTensor:
        """Without the voxels that no voxel of the tile depends on any more."""
        kept = self.tile.rows(self.absolute(i, features)[:, 1:], scale=1 << i, halo=HALOS[i])
        level = features.level
        sizes = {"spatial_shape": level.spatial_shape, "batch_size": 1, "bits": level.bits}
        return SparseTensor.on(Level(level.keys[kept], **sizes), features.feats[kept])

    def choose(self, i: int, features: SparseTensor) -> Coarsening:
        absolute = self.absolute(i, features)
        fine_shape = tuple(2 * n for n in features.spatial_shape)
        if self.stored is not None:
            return features.level.subdivide(self.stored.of(i, absolute), fine_shape)
        cells, barren = self.network.subdivision.choose(i, features, fine_shape=fine_shape)
        self.forced += int((barren & self.tile.rows(absolute[:, 1:], scale=1 << i)).sum())
        return cells
