"""Codes that decode better than the encoder's own: a few gradient steps on the latents of one volume.

An encoder is trained for all scans and answers each in one pass, which loses accuracy: for a given scan, other latents
decode to fewer errors, and a few steps from the encoder's find them. Weights, decoder and token files stay the same.
The gradient is taken at the codes and moves the latents (straight through); of all codes on the way, the encoder's own
among them, those that decode best are given. Errors are those of all window values, in HU, linear and square, and of
which voxels exist. A volume too large to decode at once goes through the decoder in tiles, with the same gradient.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from networks.sparse import SparseTensor
from networks.sparse.topology import Coarsening, find_rows, morton_keys
from networks.support import support_of
from networks.tiles import StoredSupport, Tile, TilePath, latents_whole, tiles_of
from networks.vqvae import BatchTokens, SparseVQVAE

RATE, LAST_RATE = 0.02, 0.1  # of a latent's spread, the first step; the last step's share of it
BETAS = (0.5, 0.98)  # of Adam: few steps, so what it remembers is short
SQUARE_FROM = 100.0  # HU from which on an error counts more by its square than by itself
EXISTENCE = 1.0  # weight of which voxels exist (nats a child), beside errors of 100 HU


class _Judged(NamedTuple):
    loss: float
    gradient: Float[Tensor, "M D"] | None  # of the latents that the decoder was given


def encode_refined(
    network: SparseVQVAE,
    x: SparseTensor,
    *,
    steps: int,
    units: Sequence[float],
    max_points: int | None = None,
    levels: int | None = None,
) -> BatchTokens:
    """`encode_whole`, and `steps` steps from there, for the first `levels` codes of a cell or for all.

    `units`: HU of a difference of one, of each channel.
    """
    latents = latents_whole(network, x, max_points=max_points)
    best = tokens = network.tokens_of(latents, levels=levels)
    if not steps:
        return best
    judge = _Judge(network, x, latents, units, max_points and max_points // 2)  # a gradient needs what each layer gave
    rows = latents.feats.float().clone()
    spread = float(rows.std())
    optimizer, least = torch.optim.Adam([rows], betas=BETAS), torch.inf
    for step in range(steps + 1):
        judged = judge(network.vq.lookup(tokens.codes), with_gradient=step < steps)
        if judged.loss < least:
            best, least = tokens, judged.loss
        if step < steps:
            optimizer.param_groups[0]["lr"] = RATE * spread * (1 - (1 - LAST_RATE) * step / steps)
            rows.grad = judged.gradient
            optimizer.step()
            tokens = network.tokens_of(latents.replace(rows), levels=levels)
    return best


class _Judge:
    """What latents decode to beside the volume that they stand for, on its own voxels."""

    def __init__(
        self,
        network: SparseVQVAE,
        x: SparseTensor,
        latents: SparseTensor,
        units: Sequence[float],
        max_points: int | None,
    ):
        self.network, self.x, self.latents, self.max_points = network, x, latents, max_points
        self.units = torch.tensor(units, device=latents.feats.device)
        self.stored = StoredSupport(latents.level, [part.to(latents.feats.device) for part in support_of(x.level)])

    def __call__(self, rows: Float[Tensor, "M D"], *, with_gradient: bool) -> _Judged:
        with torch.set_grad_enabled(with_gradient):
            rows = rows.detach().requires_grad_(with_gradient)
            whole = self.network.decoder.at_latents(self.latents.replace(rows))
            inner = whole.feats.detach().requires_grad_(with_gradient)  # tiles meet here: only one stands in memory
            total, gradient = 0.0, torch.zeros_like(inner)
            for tile in tiles_of(whole, self.max_points):
                loss = self._loss_of(tile, whole.replace(inner))
                total += float(loss.detach())
                if with_gradient:
                    gradient += torch.autograd.grad(loss, inner)[0]
            found = torch.autograd.grad(whole.feats, rows, gradient)[0] if with_gradient else None
            return _Judged(total, found)

    def _loss_of(self, tile: Tile, whole: SparseTensor) -> Float[Tensor, ""]:
        """The tile's share of the volume's loss."""
        path = _JudgedPath(self.network, tile, self.stored)
        values = path.decoded(whole)
        own = find_rows(self.x.level.keys, morton_keys(values.coords.to(self.x.feats.device), self.x.level.bits))
        off = (values.feats - self.x.feats[own].to(values.feats)) * self.units
        errors = (off.abs() + off.square() / SQUARE_FROM).sum() / (SQUARE_FROM * self.x.feats.numel())
        return errors + EXISTENCE * torch.stack(path.errors).mean()


class _JudgedPath(TilePath):
    """Also judges what the network believes of which voxels exist, where the tile is the one to say."""

    def __init__(self, network: SparseVQVAE, tile: Tile, stored: StoredSupport):
        super().__init__(network, tile, stored)
        self.errors: list[Float[Tensor, ""]] = []

    def choose(self, i: int, features: SparseTensor) -> Coarsening:
        absolute = self.absolute(i, features)
        own: Bool[Tensor, " N"] = self.tile.rows(absolute[:, 1:], scale=1 << i)
        exists = self.stored.of(i, absolute[own])
        logits = self.network.subdivision[i](features.feats[own].float())
        apart = F.binary_cross_entropy_with_logits(logits, exists.float(), reduction="sum")
        self.errors.append(apart / (8 * len(self.stored.levels[i])))
        return super().choose(i, features)
