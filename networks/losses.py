"""Training losses on sparse tensors: a mean over each sample's rows, then over samples.

Weighted so, the loss of a batch does not depend on how it is split over micro-batches or ranks.
"""

import math
from collections.abc import Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from networks.sparse import ops
from networks.sparse.tensor import SparseTensor
from networks.sparse.topology import Level, align_rows

LINEAR_AND_SQUARE = MappingProxyType(  # of the types below: how much of |d| and of d^2 they are, for the kernel
    {"l1": (1.0, 0.0), "l2": (0.0, 1.0), "mse": (0.0, 1.0), "l1_l2": (0.5, 0.5)}
)
LOSS_TYPES = MappingProxyType(  # name -> error of each value, of reconstruction minus truth
    {
        "l1": lambda diff: diff.abs(),
        "l2": lambda diff: diff.square(),
        "mse": lambda diff: diff.square(),
        "l1_l2": lambda diff: 0.5 * diff.abs() + 0.5 * diff.square(),
    }
)


def mean_of_samples(values: Float[Tensor, " N"], level: Level) -> Float[Tensor, ""]:
    """Mean within each sample that has rows, then over those samples."""
    parts = [part.mean() for part in values.split(level.sample_sizes) if part.shape[0]]
    if len(parts) == 1:
        return parts[0]
    return torch.stack(parts).mean() if parts else values.sum()


def shares_of_rows(level: Level) -> Float[Tensor, " N"] | None:
    """How much each row counts in `mean_of_samples`; None where all count alike."""
    sizes = [size for size in level.sample_sizes if size]
    if len(sizes) < 2:
        return None

    def make() -> Float[Tensor, " N"]:
        shares = torch.empty(sum(sizes), device=level.device)
        for part in shares.split(sizes):
            part.fill_(1 / (len(part) * len(sizes)))
        return shares

    return level.cached("shares of rows", make)


class _RowError(torch.autograd.Function):
    """`reconstruction` without what it makes in between: two passes over the rows in all."""

    @staticmethod
    def forward(ctx, recon, target, channels, shares, kind, kernels):
        ctx.save_for_backward(recon, target, channels, shares)
        ctx.kind, ctx.kernels = kind, kernels
        return kernels.row_error(recon, target, channels, shares, kind=kind)

    @staticmethod
    def backward(ctx, upstream):
        return ctx.kernels.row_error_grad(upstream, *ctx.saved_tensors, kind=ctx.kind), *(None,) * 5


class _ChildrenError(torch.autograd.Function):
    """`subdivision` in one pass, its gradient in another."""

    @staticmethod
    def forward(ctx, logits, exists, shares, kernels):
        ctx.save_for_backward(logits, exists, shares)
        ctx.kernels = kernels
        return kernels.children_error(logits, exists, shares)

    @staticmethod
    def backward(ctx, upstream):
        return ctx.kernels.children_error_grad(upstream, *ctx.saved_tensors), None, None, None


def reconstruction(
    recon: SparseTensor,
    target: SparseTensor,
    *,
    loss_type: str = "l1",
    lambda_l2: float = 0.0,
    channel_weights: Float[Tensor, " C"] | None = None,
    row_weights: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, ""]:
    """Error on the target's voxels, matched by key. Voxels decoded beyond the target are not judged here.

    Channels and rows count equally, or as their weights say; of those of channels only the ratios matter. To the error
    of `loss_type` that of squares is added, `lambda_l2` times.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
    values = recon.feats
    if not recon.level.same_as(target.level):
        rows = align_rows(recon.level, target.level)
        if missing := int((rows == len(recon)).sum()):
            raise ValueError(f"{missing} of {len(target)} target voxels were not decoded")
        values = values[rows]
    if channel_weights is not None and channel_weights.shape != values.shape[1:]:
        raise ValueError(
            f"channel_weights must be {values.shape[1]} numbers, one a channel, got {len(channel_weights)}"
        )
    kernels = ops.fused("errors", values) if row_weights is None and loss_type in LINEAR_AND_SQUARE else None
    if kernels and len(target):
        weights = None if channel_weights is None else ops.send(channel_weights, values.device)
        weights = None if weights is None else weights / weights.sum()
        linear, square = LINEAR_AND_SQUARE[loss_type]
        kind = (linear, square + lambda_l2)
        return _RowError.apply(values, target.feats, weights, shares_of_rows(target.level), kind, kernels)
    diff = values.float() - target.feats.float()
    per_voxel = LOSS_TYPES[loss_type](diff)
    if lambda_l2:
        per_voxel = per_voxel + lambda_l2 * diff.square()
    if row_weights is not None:
        per_voxel = per_voxel * row_weights[:, None]
    if channel_weights is None:
        return mean_of_samples(per_voxel.mean(1), target.level)
    weights = channel_weights.to(per_voxel)
    return mean_of_samples(per_voxel @ (weights / weights.sum()), target.level)


def kl_divergence(mean: Float[Tensor, "M D"], log_var: Float[Tensor, "M D"], level: Level) -> Float[Tensor, ""]:
    """To a unit normal, averaged over latents and channels."""
    per_latent = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean(1)
    return mean_of_samples(per_latent, level)


def subdivision(logits: Float[Tensor, "M 8"], occupied: Bool[Tensor, "M 8"], level: Level) -> Float[Tensor, ""]:
    """Binary cross-entropy over the eight children of every voxel of a level."""
    if (kernels := ops.fused("errors", logits)) and len(level):
        return _ChildrenError.apply(logits, occupied, shares_of_rows(level), kernels)
    per_cell = F.binary_cross_entropy_with_logits(logits.float(), occupied.float(), reduction="none").mean(1)
    return mean_of_samples(per_cell, level)


def are_weights(values: Sequence[object]) -> bool:
    """Whether windows may count so much each: not all of them nothing."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return numbers and all(0 <= value < math.inf for value in values) and sum(values) > 0


class TokenizerLoss:
    """Weighted sum of what a forward pass of the sparse VQ-VAE gives, and its terms by name.

    `vq` enters only where the codebook learns by gradient, `kl` only where nothing was quantised. `window_weights` says
    how much each window counts in the reconstruction; None: equally. A larger `lambda_l2` asks for edges and small
    bright structures, which a few large errors are, at some cost of flat tissue.
    """

    def __init__(
        self,
        *,
        loss_type: str = "l1",
        lambda_l2: float = 0.0,
        lambda_vq: float = 1.0,
        lambda_commitment: float = 0.25,
        lambda_kl: float = 1e-6,
        lambda_subdivision: float = 0.1,
        window_weights: list[float] | None = None,
    ):
        if loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
        if window_weights is not None and not are_weights(window_weights):
            raise ValueError(f"window_weights must be numbers from 0, not all 0, got {window_weights}")
        self.loss_type, self.lambda_l2 = loss_type, lambda_l2
        self.window_weights = None if window_weights is None else torch.tensor(window_weights, dtype=torch.float32)
        self.weights = {
            "recon": 1.0,
            "vq": lambda_vq,
            "commitment": lambda_commitment,
            "kl": lambda_kl,
            "subdivision": lambda_subdivision,
        }

    def reconstruction(
        self, recon: SparseTensor, target: SparseTensor, row_weights: Float[Tensor, " N"] | None = None
    ) -> Float[Tensor, ""]:
        weights = {"channel_weights": self.window_weights, "row_weights": row_weights}
        return reconstruction(recon, target, loss_type=self.loss_type, lambda_l2=self.lambda_l2, **weights)

    def __call__(
        self, output, target: SparseTensor, *, row_weights: Float[Tensor, " N"] | None = None
    ) -> dict[str, Float[Tensor, ""]]:
        terms = {"recon": self.reconstruction(output.recon, target, row_weights)}
        terms |= {name: getattr(output, name) for name in self.weights if name != "recon"}
        learned = [self.weights[name] * term for name, term in terms.items() if term.requires_grad or name == "recon"]
        return {"loss": torch.stack([part.float() for part in learned]).sum(), **terms}
