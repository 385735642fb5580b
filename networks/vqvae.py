"""The sparse VQ-VAE: encoder /8, vector quantiser, decoder x8 on the wanted voxels only.

In training the decoder computes the target's own voxels; when only tokens are given, those of a learned 8-way
subdivision head per level. Encoder and decoder with their layers are in coders.py.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn

from networks import losses
from networks.coders import Decoder, Encoder
from networks.fsq import FiniteScalarQuantizer
from networks.presets import Preset, preset
from networks.quantizer import Quantized, VectorQuantizer
from networks.residual import ResidualQuantizer, build_quantizer, drawn_levels
from networks.sparse import ops, whole_blocks
from networks.sparse.graphs import NetworkGraphs, Work
from networks.sparse.tensor import SparseTensor
from networks.sparse.topology import Coarsening, Level
from networks.support import SubdivisionHeads, Support, children_of, plan_of


class BatchTokens(NamedTuple):
    """What a batch became: a code for each occupied latent, or one a quantiser level (M, levels), in Morton order."""

    codes: Int[Tensor, "M ..."]
    coords: Int32[Tensor, "M 4"]
    latent_shape: tuple[int, int, int]
    batch_size: int


class Reconstruction(NamedTuple):
    """A forward pass. `vq` and `commitment` are zero when nothing was quantised, `kl` when something was."""

    recon: SparseTensor
    codes: Int[Tensor, "M ..."] | None
    latents: SparseTensor
    vq: Float[Tensor, ""]
    commitment: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    subdivision: Float[Tensor, ""]


class SparseVQVAE(nn.Module):
    """Encoder, quantiser (None for the continuous autoencoder), decoder and subdivision heads.

    `sizes`, which all of them were made with, are what a checkpoint records; parts of other sizes are refused.
    """

    def __init__(
        self,
        sizes: Preset,
        *,
        encoder: Encoder,
        vq: VectorQuantizer | FiniteScalarQuantizer | ResidualQuantizer | None,
        decoder: Decoder,
        subdivision: SubdivisionHeads,
    ):
        super().__init__()
        for name, part in {"encoder": encoder, "decoder": decoder, "subdivision": subdivision}.items():
            if part.sizes != sizes:
                other = [
                    f.name for f in dataclasses.fields(sizes) if getattr(part.sizes, f.name) != getattr(sizes, f.name)
                ]
                raise ValueError(
                    f"{name} was made with another {', '.join(other)} than the network: give both the same sizes"
                )
        _check_codes(vq, sizes)
        self.sizes = sizes
        self.encoder, self.vq, self.decoder, self.subdivision = encoder, vq, decoder, subdivision
        self.graphs = NetworkGraphs()

    def forward(
        self,
        x: SparseTensor,
        *,
        quantize: bool = True,
        seeds: list[int] | None = None,
        level_dropout: float = 0.0,
    ) -> Reconstruction:
        """Encodes and decodes on the input's own voxels. Without quantising, training samples around the mean.

        `seeds`, one a sample, make a sample's noise its own, however the batch is split over micro-batches or ranks.
        `level_dropout`: share of samples that are decoded from fewer quantiser levels than there are, by their seeds.
        """
        self.prepare(x.level)
        rows = self._start(self.encoder, lambda x, _: [self.encoder.rows(x)], x, x.level)[0]
        latents, log_var = self.encoder.latents(rows, self.encoder.linear_part(x))
        zero = latents.feats.new_zeros(())
        codes, vq, commitment, kl = None, zero, zero, zero
        if quantize and self.vq is not None:
            quantized = self._quantized(latents, seeds, level_dropout)
            codes, values = quantized.codes, quantized.values
            vq = losses.mean_of_samples(quantized.vq, latents.level)
            commitment = losses.mean_of_samples(quantized.commitment, latents.level)
        else:
            kl = losses.kl_divergence(latents.feats, log_var, latents.level)
            values = latents.feats
            if self.training:
                values = values + (0.5 * log_var).exp() * noise_like(log_var, latents.level, seeds)
        recon, subdivision = self.decode_on(latents.replace(values), x.level)
        return Reconstruction(recon, codes, latents, vq, commitment, kl, subdivision)

    def prepare(self, level: Level) -> None:
        """Builds those maps of a batch for which the host has to wait, and the windows."""
        coarsest = level.prepare(*self.sizes.convolved)
        shifts: dict[int, set[int]] = {}
        for block in self.encoder.blocks:
            shifts.setdefault(block.attn.window, set()).add(block.attn.shift)
        for size, moved in shifts.items():
            coarsest.prepare_windows(size, sorted(moved))

    def _quantized(self, latents: SparseTensor, seeds: list[int] | None, dropout: float) -> Quantized:
        if not dropout or not isinstance(self.vq, ResidualQuantizer):
            return self.vq(latents.feats)
        kept = drawn_levels(len(self.vq.levels), seeds, latents.level.sample_sizes, dropout=dropout)
        return self.vq(latents.feats, ops.send(kept, latents.feats.device))

    def decode_on(self, latents: SparseTensor, level: Level) -> tuple[SparseTensor, Float[Tensor, ""]]:
        """Decodes the voxels of a known level; also the loss of predicting that level from the latents."""
        rows, *logits = self._start(self.decoder, self._rows_and_logits, latents, level)
        plan = plan_of(level)
        recon = self.decoder.values(rows, self.decoder.linear_part(latents, plan))
        both = zip(logits, plan, strict=True)
        errors = [losses.subdivision(x.feats, cells.occupied, x.level) for x, cells in both]
        return recon, torch.stack(errors).mean()

    def _rows_and_logits(self, latents: SparseTensor, level: Level) -> list[SparseTensor]:
        """The decoder's rows on a known level, and per level the logits of which children exist."""
        plan, logits = plan_of(level), []

        def choose(i: int, x: SparseTensor) -> Coarsening:
            logits.append(x.replace(self.subdivision[i](x.feats, live=x.level.live)))
            return plan[i]

        return [self.decoder.rows(latents, choose), *logits]

    def _start(self, part: Encoder | Decoder, work: Work, x: SparseTensor, level: Level) -> Sequence[SparseTensor]:
        """What `work` gives, through CUDA graphs where they serve; `level` is the batch's finest."""
        if part.use_graphs and whole_blocks.serve(x.feats, part.backend):
            levels = [level, *(cells.coarse for cells in reversed(plan_of(level)))]
            name, modules = ("decoder", [part, self.subdivision]) if part is self.decoder else ("encoder", [part])
            if (results := self.graphs.run(name, work, x, levels, modules)) is not None:
                return results
        return work(x, level)

    @torch.no_grad()
    def encode(self, x: SparseTensor, *, levels: int | None = None) -> BatchTokens:
        """Codes of the first `levels` of the quantiser's levels, or of all; (M,) where that is one."""
        return self.tokens_of(self.encoder(x)[0], levels=levels)

    @torch.no_grad()
    def tokens_of(self, latents: SparseTensor, *, levels: int | None = None) -> BatchTokens:
        """Codes of what the encoder gave."""
        if self.vq is None:
            raise ValueError("a continuous autoencoder has no codes: train stage 1 on it first")
        levels = self.check_levels(levels)
        codes = self.vq(latents.feats).codes
        if codes.ndim == 2:
            codes = codes[:, 0] if levels == 1 else codes[:, :levels]
        return BatchTokens(codes.int(), latents.coords, latents.spatial_shape, latents.batch_size)

    def check_levels(self, levels: float | None) -> int:
        """How many levels are meant; None means all there are."""
        most = self.sizes.quantizer_levels
        if levels is not None and not 1 <= levels <= most:
            raise ValueError(f"levels must lie in 1..{most}, the levels of this tokenizer, got {levels}")
        if levels is not None and levels != int(levels):
            raise ValueError(f"levels must be a whole number here, got {levels}")
        return most if levels is None else int(levels)

    def latents_of(self, tokens: BatchTokens) -> SparseTensor:
        """Codebook rows on the latent grid."""
        values = self.vq.lookup(tokens.codes)
        return SparseTensor(values, tokens.coords, tokens.latent_shape, tokens.batch_size)

    @torch.no_grad()
    def decode(self, tokens: BatchTokens, *, support: Support | None = None) -> SparseTensor:
        """Values on stored support (`support_of`) or on predicted voxels."""

        def choose(i: int, features: SparseTensor) -> Coarsening:
            fine_shape = tuple(2 * n for n in features.spatial_shape)
            if support is None:
                return self.subdivision.choose(i, features, fine_shape=fine_shape)[0]
            return features.level.subdivide(children_of(support[i]), fine_shape)

        return self.decoder(self.latents_of(tokens), choose)

    def get_extra_state(self) -> Tensor:
        return self.sizes.to_tensor()

    def set_extra_state(self, state: Tensor) -> None:
        stored = Preset.from_tensor(state)
        data = {"prepared": self.sizes.prepared, "resampler": self.sizes.resampler}  # a record, not a size
        if dataclasses.replace(stored, **data) != self.sizes:
            raise ValueError(f"the checkpoint was made for {stored}, this network is {self.sizes}")


def _check_codes(vq: nn.Module | None, sizes: Preset) -> None:
    """That a quantiser is the one that the sizes tell of."""
    if (vq is None) != (sizes.codebook == "none"):
        got = "none" if vq is None else type(vq).__name__
        raise ValueError(f"vq must be a quantiser unless codebook is none, got codebook {sizes.codebook} and {got}")
    parts = [] if vq is None else list(vq.levels) if isinstance(vq, ResidualQuantizer) else [vq]
    if parts and len(parts) != sizes.quantizer_levels:
        raise ValueError(f"vq must have quantizer_levels = {sizes.quantizer_levels} levels, got {len(parts)}")
    for part in parts:
        own = (part.num_embeddings, part.embedding_dim)
        if own != (sizes.num_embeddings, sizes.latent_channels):
            raise ValueError(
                f"vq must have num_embeddings {sizes.num_embeddings} codes of latent_channels {sizes.latent_channels}, "
                f"got {own[0]} of {own[1]}"
            )


def noise_like(values: Float[Tensor, "M D"], level: Level, seeds: list[int] | None) -> Float[Tensor, "M D"]:
    """Normal noise; with seeds each sample draws its rows from its own generator."""
    if seeds is None:
        return torch.randn_like(values)
    generators = [torch.Generator(values.device).manual_seed(seed) for seed in seeds]
    shapes = [(size, values.shape[1]) for size in level.sample_sizes]
    parts = zip(shapes, generators, strict=True)
    return torch.cat([torch.randn(shape, generator=one, device=values.device) for shape, one in parts])


def make_vqvae(
    preset_name: str = "tiny",
    *,
    backend: str = "auto",
    use_checkpoint: bool = False,
    use_graphs: bool = False,
    **changes,
) -> SparseVQVAE:
    """A network of a preset's sizes, with `changes` to any of them (`num_embeddings=512`, `windows=["lung"]`, ...)."""
    sizes, how = preset(preset_name).changed(**changes), {"use_checkpoint": use_checkpoint, "use_graphs": use_graphs}
    return build_vqvae(sizes, backend=backend, **how)


def build_vqvae(sizes: Preset, *, backend: str = "auto", **how: bool) -> SparseVQVAE:
    """`how` is `use_checkpoint` and `use_graphs`, as encoder and decoder take them."""
    return SparseVQVAE(
        sizes,
        encoder=Encoder(sizes, backend=backend, **how),
        vq=build_quantizer(sizes),
        decoder=Decoder(sizes, backend=backend, **how),
        subdivision=SubdivisionHeads(sizes),
    )
