"""Encoder and decoder of the sparse VQ-VAE: /8 to latents, x8 on the wanted voxels, and the transformer of both.

Halving and doubling keep the place of every child (`pool children`), and no convolution runs at full resolution. With
`pool legacy` layers, widths and names are those of the sparse autoencoder of Direct3D-S2, so that its published weights
fit preset `direct3d_s2`; `mean` is the same without a flaw of its means. Where that decoder expands every latent to 512
voxels, this one gathers the voxels that are wanted.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from networks.blocks import DoublingBlock, DownBlock, HalvingBlock, UpBlock
from networks.components import VOXELS_PER_LATENT, FixedLinear, HounsfieldUnits, before_tanh, cell_rows
from networks.presets import NUM_RESIDUAL, Preset
from networks.sparse import ops
from networks.sparse.modules import Linear, TransformerBlock, layer_norm, position_encoding
from networks.sparse.tensor import SparseTensor
from networks.sparse.topology import Coarsening

# What the decoder asks at each level: the index (0 is the coarsest) and its features there.
ChooseCells = Callable[[int, SparseTensor], Coarsening]


class _Torso(nn.Module):
    """What encoder and decoder share: the transformer on latents, and trading time for memory block by block."""

    def __init__(self, sizes: Preset, backend: str, use_checkpoint: bool, use_graphs: bool):
        super().__init__()
        self.sizes, self.backend = sizes, backend
        self.use_checkpoint = use_checkpoint
        # Graphs record no recomputation, and know no layers but those that keep the place of children.
        self.use_graphs = use_graphs and not use_checkpoint and sizes.pool == "children" and sizes.norm == "voxel"
        self.blocks = nn.ModuleList(
            TransformerBlock(
                sizes.model_channels,
                num_heads=sizes.num_heads,
                window=sizes.window,
                shift=sizes.window // 2 * (i % 2),
            )
            for i in range(sizes.num_blocks)
        )

    def attend(self, x: SparseTensor) -> SparseTensor:
        factor, channels, dtype = self._factor(x), x.feats.shape[1], x.feats.dtype
        position = x.level.cached(  # the same for encoder and decoder
            ("position", factor, channels, dtype),
            lambda: position_encoding(x.coords[:, 1:] * factor, channels).to(dtype),
        )
        x = x.replace(x.feats + position)
        for block in self.blocks:
            x = self.run(block, x)
        return x

    def _factor(self, latents: SparseTensor) -> int:
        """By how much a shape's grid is coarser than the network's own: positions then span the same range."""
        if self.sizes.features == "window":
            return 1
        return max(self.sizes.resolution // (8 * max(latents.spatial_shape)), 1)

    def run(self, block: nn.Module, x: SparseTensor, *cells: Coarsening) -> SparseTensor:
        if not (self.use_checkpoint and torch.is_grad_enabled()):
            return block(x, *cells)
        shapes = []

        def feats_only(feats: Tensor) -> Tensor:
            out = block(x.replace(feats), *cells)
            shapes.append(out.level)
            return out.feats

        feats = checkpoint(feats_only, x.feats, use_reentrant=False)
        return SparseTensor.on(shapes[0], feats)


class Encoder(_Torso):
    def __init__(self, sizes: Preset, *, backend: str = "auto", use_checkpoint: bool = False, use_graphs: bool = False):
        super().__init__(sizes, backend, use_checkpoint, use_graphs)
        widths = (*sizes.widths, sizes.model_channels)
        if sizes.pool == "children":
            widths = (sizes.in_channels, *widths[1:])
            self.input_layer1 = nn.Identity()  # values are gathered as they are: nothing is wide at full resolution
            blocks = [
                HalvingBlock(
                    widths[i],
                    widths[i + 1],
                    norm=sizes.norm,
                    num_residual=NUM_RESIDUAL[i],
                    occupancy=i == 0,
                    backend=backend,
                )
                for i in range(3)
            ]
        else:
            self.input_layer1 = Linear(sizes.in_channels, widths[0])
            blocks = [
                DownBlock(widths[i], widths[i + 1], norm=sizes.norm, pool=sizes.pool, backend=backend) for i in range(3)
            ]
        self.downsample = nn.ModuleList(blocks)
        self.input_layer = Linear(widths[3], widths[3])
        self.out_layer = Linear(widths[3], 2 * sizes.latent_channels)
        if sizes.pca:
            self.hu = HounsfieldUnits(sizes.in_channels)
            self.components = FixedLinear(VOXELS_PER_LATENT, sizes.latent_channels)
            with torch.no_grad():  # the network begins as a small part beside the components, and with little noise
                self.out_layer.weight.mul_(0.1)
                self.out_layer.bias[sizes.latent_channels :] = -6

    def forward(self, x: SparseTensor) -> tuple[SparseTensor, Float[Tensor, "M D"]]:
        """Mean on the latent grid, and the log variance that only the continuous autoencoder uses."""
        return self.latents(self.rows(x), self.linear_part(x))

    def rows(self, x: SparseTensor) -> SparseTensor:
        """Mean and log variance side by side, without components."""
        return self._rest(self.run(self.downsample[0], self.input_layer1(x)))

    def linear_part(self, x: SparseTensor) -> Float[Tensor, "M D"] | None:
        """Of each cell its principal components, where the tokenizer has them."""
        return self.components(self.cells(x).feats) if self.sizes.pca else None

    def cells(self, x: SparseTensor) -> SparseTensor:
        """HU of each cell's voxels, of which components are made."""
        return cell_rows(x.replace(self.hu(x.feats)))

    def from_half(
        self, x: SparseTensor, linear: Float[Tensor, "M D"] | None = None
    ) -> tuple[SparseTensor, Float[Tensor, "M D"]]:
        """The rest, after the first halving; `linear` is that part of the mean."""
        return self.latents(self._rest(x), linear)

    def _rest(self, x: SparseTensor) -> SparseTensor:
        for block in self.downsample[1:]:
            x = self.run(block, x)
        return self.out_layer(layer_norm(self.attend(self.input_layer(x)), eps=1e-5))

    def latents(
        self, rows: SparseTensor, linear: Float[Tensor, "M D"] | None
    ) -> tuple[SparseTensor, Float[Tensor, "M D"]]:
        """Mean and log variance, of what `rows` gave."""
        mean, log_var = rows.feats.float().chunk(2, 1)
        mean = mean if linear is None else mean + linear
        return rows.replace(mean), log_var.clamp(-30, 20)


class Decoder(_Torso):
    def __init__(self, sizes: Preset, *, backend: str = "auto", use_checkpoint: bool = False, use_graphs: bool = False):
        super().__init__(sizes, backend, use_checkpoint, use_graphs)
        widths = (*sizes.widths, sizes.model_channels)[::-1]
        self.input_layer = Linear(sizes.latent_channels, widths[0])
        if sizes.pool == "children":
            widths = (*widths[:3], sizes.in_channels)
            self.upsample = nn.ModuleList(
                DoublingBlock(widths[i], widths[i + 1], num_residual=NUM_RESIDUAL[2 - i], backend=backend)
                for i in range(3)
            )
            self.out_layer = nn.Identity()  # children take their values from the last doubling
            with torch.no_grad():  # which copies nothing and starts small, away from the flat ends of tanh
                self.upsample[2].up.shortcut.zero_()
                self.upsample[2].up.linear.weight.mul_(0.05 if sizes.pca else 0.3)
        else:
            self.upsample = nn.ModuleList(UpBlock(widths[i], widths[i + 1], backend=backend) for i in range(3))
            self.out_layer = Linear(widths[3], sizes.in_channels)
        if sizes.pca:
            self.components = FixedLinear(sizes.latent_channels, VOXELS_PER_LATENT)
            self.hu = HounsfieldUnits(sizes.in_channels)

    def forward(self, latents: SparseTensor, choose: ChooseCells) -> SparseTensor:
        """Values in [-1, 1] on the voxels that `choose` names level by level."""
        return self.expand(self.at_latents(latents), choose)

    def at_latents(self, latents: SparseTensor) -> SparseTensor:
        """What `expand` takes: features after the transformer, beside them the latents where they are components.

        These stay in float32: 16 bits would be off by several HU.
        """
        x = self.attend(self.input_layer(latents))
        return x.replace(torch.cat([x.feats.float(), latents.feats.float()], 1)) if self.sizes.pca else x

    def expand(
        self, x: SparseTensor, choose: ChooseCells, *, crop: Callable[[int, SparseTensor], SparseTensor] | None = None
    ) -> SparseTensor:
        """The rest, after the transformer: convolutions alone, so local. `crop` may drop voxels before a level."""
        linear = None
        if self.sizes.pca:
            inner, latents = x.feats.split([self.sizes.model_channels, self.sizes.latent_channels], 1)
            inner = inner.to(ops.autocast_dtype(inner) or inner.dtype)
            x, linear = x.replace(inner), x.replace(self.components(latents))
        for i, block in enumerate(self.upsample):
            if crop is not None:
                x, linear = crop(i, x), linear if linear is None else crop(i, linear)
            cells = choose(i, x)
            x, linear = self.run(block, x, cells), linear if linear is None else ops.scatter_children(linear, cells)
        return self.values(x, linear)

    def rows(self, latents: SparseTensor, choose: ChooseCells) -> SparseTensor:
        """What `values` takes, without components."""
        x = self.attend(self.input_layer(latents))
        for i, block in enumerate(self.upsample):
            x = self.run(block, x, choose(i, x))
        return x

    def linear_part(self, latents: SparseTensor, plan: list[Coarsening]) -> SparseTensor | None:
        """HU of each voxel's place in its cell, by the components of the latents, where the tokenizer has them."""
        if not self.sizes.pca:
            return None
        x = latents.replace(self.components(latents.feats.float()))
        for cells in plan:
            x = ops.scatter_children(x, cells)
        return x

    def values(self, x: SparseTensor, linear: SparseTensor | None) -> SparseTensor:
        """In [-1, 1], of the last features."""
        x = self.out_layer(x)
        values = x.feats.float()
        if linear is not None:
            values = values + before_tanh(self.hu.windows(linear.feats))
        return x.replace(torch.tanh(values))
