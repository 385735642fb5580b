"""Functions on sparse tensors, and the choice of the convolution backend.

A backend is a module with `forward`, `input_grad` and `weight_grad` as in torch_backend.py. "auto" takes the fastest
that works where the features are; an explicit choice is never replaced by another.
"""

import importlib
import math
from types import ModuleType

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from networks.sparse import torch_backend
from networks.sparse.tensor import SparseTensor
from networks.sparse.topology import Coarsening, Level

BACKENDS = ("torch",)


def choose_backend(name: str, device: torch.device) -> ModuleType:
    if name == "auto":
        name = "torch"
    if name not in BACKENDS:
        raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "torch":
        return torch_backend
    return importlib.import_module(f"networks.sparse.{name}_backend")


class _SubmanifoldConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, feats, weight, bias, level, backend):
        ctx.save_for_backward(feats, weight)
        ctx.level, ctx.backend, ctx.bias_dtype = level, backend, None if bias is None else bias.dtype
        return backend.forward(feats, weight, bias, level)

    @staticmethod
    def backward(ctx, grad):
        feats, weight = ctx.saved_tensors
        grad = grad.contiguous()
        need_feats, need_weight, need_bias, *_ = ctx.needs_input_grad
        return (
            ctx.backend.input_grad(grad, weight, ctx.level) if need_feats else None,
            ctx.backend.weight_grad(feats, grad, ctx.level).to(weight.dtype) if need_weight else None,
            grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.bias_dtype) if need_bias else None,
            None,
            None,
        )


def submanifold_conv(
    x: SparseTensor, weight: Float[Tensor, "27 C F"], bias: Float[Tensor, " F"] | None = None, *, backend: str = "auto"
) -> SparseTensor:
    """3x3x3 convolution that keeps the occupied voxels."""
    feats, chosen = x.feats, choose_backend(backend, x.feats.device)
    if feats.shape[1] != weight.shape[1]:
        raise ValueError(f"weight {tuple(weight.shape)} needs features of {weight.shape[1]}, got {feats.shape[1]}")
    if torch.is_autocast_enabled(feats.device.type):
        dtype = torch.get_autocast_dtype(feats.device.type)
        feats, weight = feats.to(dtype), weight.to(dtype)
    if feats.dtype != weight.dtype or feats.device != weight.device:
        raise ValueError(
            f"features and weight must share dtype and device, got {feats.dtype} on {feats.device} "
            f"and {weight.dtype} on {weight.device}"
        )
    with torch.autocast(feats.device.type, enabled=False):  # a backend sums in float32, whatever the inputs are
        return x.replace(_SubmanifoldConv.apply(feats, weight, bias, x.level, chosen))


class _SpreadToChildren(torch.autograd.Function):
    """Copies each coarse row to its children; backward adds the children up. No atomics, so the order is fixed."""

    @staticmethod
    def forward(ctx, coarse, cells):
        ctx.cells = cells
        return coarse.index_select(0, cells.parent)

    @staticmethod
    def backward(ctx, grad):
        return _SumChildren.apply(grad, ctx.cells), None


class _SumChildren(torch.autograd.Function):
    """Adds up the children of each coarse row; backward copies to them."""

    @staticmethod
    def forward(ctx, fine, cells):
        ctx.cells = cells
        wide = torch.promote_types(fine.dtype, torch.float32)
        padded = torch.cat([fine, fine.new_zeros((1, fine.shape[1]))])
        total = torch.zeros((len(cells.coarse), fine.shape[1]), dtype=wide, device=fine.device)
        for rows in cells.children:
            total += padded.index_select(0, rows)
        return total.to(fine.dtype)

    @staticmethod
    def backward(ctx, grad):
        return _SpreadToChildren.apply(grad, ctx.cells), None


def pool(x: SparseTensor, *, legacy: bool = False) -> tuple[SparseTensor, Coarsening]:
    """Mean over the children of each 2x2x2 cell; `legacy` divides by one more, as published weights expect."""
    cells = x.level.coarsening
    counts = cells.occupied.sum(1, keepdim=True) + int(legacy)
    return SparseTensor.on(cells.coarse, _SumChildren.apply(x.feats, cells) / counts.to(x.feats.dtype)), cells


def unpool(x: SparseTensor, cells: Coarsening) -> SparseTensor:
    """Copies each voxel to the children that `cells` names; undoes the grouping of `pool`."""
    if not x.level.same_as(cells.coarse):
        raise ValueError(f"up-sampling needs the coarse level of its plan ({len(cells.coarse)} voxels), got {len(x)}")
    return SparseTensor.on(cells.fine, _SpreadToChildren.apply(x.feats, cells))


def group_norm(
    x: SparseTensor, num_groups: int, weight: Float[Tensor, " C"], bias: Float[Tensor, " C"], *, eps: float = 1e-5
) -> SparseTensor:
    """Group normalisation over each sample's own voxels, in float32."""
    wide = torch.promote_types(x.feats.dtype, torch.float32)
    with torch.autocast(x.feats.device.type, enabled=False):
        parts = [
            rearrange(
                F.group_norm(rearrange(rows.to(wide), "n c -> 1 c n"), num_groups, weight.to(wide), bias.to(wide), eps),
                "1 c n -> n c",
            )
            for rows in x.feats.split(x.level.sample_sizes)
            if rows.shape[0]
        ]
    return x.replace(torch.cat(parts).to(x.feats.dtype)) if parts else x


def window_attention(
    qkv: Float[Tensor, "N three H D"], level: Level, *, window: int, shift: int
) -> Float[Tensor, "N H D"]:
    """Self-attention among the voxels of each cubic window of the absolute grid."""
    plan = level.windows(window, shift)
    padded = torch.cat([qkv, qkv.new_zeros((1, *qkv.shape[1:]))])[plan.rows]
    q, k, v = rearrange(padded, "w l three h d -> three w h l d", three=3)
    empty = rearrange(plan.rows == len(level), "w l -> w 1 1 l")
    mask = torch.zeros(empty.shape, dtype=q.dtype, device=q.device).masked_fill_(empty, -math.inf)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(out, "w h l d -> (w l) h d")[plan.slot]
