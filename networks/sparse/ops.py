"""Functions on sparse tensors, and the choice of the convolution backend.

A backend is a module with `forward`, `input_grad` and `weight_grad` as in torch_backend.py. "auto" takes the fastest
that works where the features are; an explicit choice is never replaced by another.
"""

import importlib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import ModuleType

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from networks.sparse import torch_backend
from networks.sparse.tensor import SparseTensor
from networks.sparse.topology import Coarsening, Level, Live

BACKENDS = {  # in the order that "auto" tries
    "triton": "networks.kernels.convolution",
    "spconv": "networks.sparse.spconv_backend",
    "torch": "networks.sparse.torch_backend",
}
PROOF_TOLERANCE = 1e-2  # float16 in, float32 or float16 sums of 27 * 16 products
MANY_NUMBERS = 2**24  # above it two kernels of ours replace torch's one: the pass, not the launch, is what costs
log = logging.getLogger(__name__)


def choose_backend(name: str, feats: Float[Tensor, "N C"], columns: int) -> ModuleType:
    """The module that convolves these features to `columns` channels."""
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {name!r}")
        reason = _reason_against(name, feats, columns)
        if reason:
            raise ValueError(f"backend {name} {reason}; choose another backend or auto")
        return backend_module(name)
    if feats.device.type != "cuda":
        return torch_backend
    reasons = []
    for candidate in BACKENDS:
        reason = _reason_against(candidate, feats, columns)
        if reason is None:
            _announce(candidate, feats.dtype, tuple(reasons))
            return backend_module(candidate)
        reasons.append(f"{candidate} {reason}")
    raise AssertionError("backend torch refuses nothing")


@cache
def backend_module(name: str) -> ModuleType:
    return importlib.import_module(BACKENDS[name])


def _reason_against(name: str, feats: Float[Tensor, "N C"], columns: int) -> str | None:
    """Why a backend cannot take these features: not working here, or its own rule."""
    if name == "torch":
        return None
    if feats.device.type != "cuda":
        return f"needs CUDA, got features on {feats.device}"
    return defect(name, feats.device.index) or backend_module(name).refusal(feats, columns)


@cache
def defect(name: str, device_index: int) -> str | None:
    """What is wrong with a backend on a CUDA device, shown by a small convolution and its gradients; or None."""
    try:
        module = backend_module(name)
    except Exception as error:  # a broken optional library may raise anything at import
        return f"cannot be imported ({type(error).__name__}: {error})"
    device = torch.device("cuda", device_index)
    coords = torch.nn.functional.pad(torch.ones(5, 4, 6, device=device).nonzero(), (1, 0))
    level, _ = Level.from_coords(coords, (5, 4, 6), 1)
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    feats, grad, weight = draw(120, 16), draw(120, 32), draw(27, 16, 32)
    try:
        got = _all_three(module, feats.half(), weight.half(), grad.half(), level)
    except Exception as error:
        return f"does not run here ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    truth = _all_three(torch_backend, feats, weight, grad, level)
    errors = [float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(got, truth, strict=True)]
    if max(errors) > PROOF_TOLERANCE:
        return f"gives wrong results here (relative error {max(errors):.2g})"
    return None


def _all_three(module: ModuleType, feats: Tensor, weight: Tensor, grad: Tensor, level: Level) -> tuple[Tensor, ...]:
    return (
        module.forward(feats, weight, None, level),
        module.input_grad(grad, weight, level),
        module.weight_grad(feats, grad, level),
    )


@cache
def _announce(name: str, dtype: torch.dtype, reasons: tuple[str, ...]) -> None:
    """Says once which backend auto takes, and what spoke against those before it."""
    note = f" ({'; '.join(reasons)})" if reasons else ""
    log.log(logging.WARNING if name == "torch" else logging.INFO, "sparse backend for %s: %s%s", dtype, name, note)


class _SubmanifoldConv(torch.autograd.Function):
    """Casts its weight itself, so that the weight's gradient is never rounded to the features' type on its way."""

    @staticmethod
    def forward(ctx, feats, weight, bias, level, backend):
        cast = weight.to(feats.dtype)
        ctx.save_for_backward(feats, cast)
        ctx.level, ctx.backend, ctx.dtypes = level, backend, (weight.dtype, None if bias is None else bias.dtype)
        return backend.forward(feats, cast, bias, level)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative()
        feats, weight = ctx.saved_tensors
        grad = grad.contiguous()
        need_feats, need_weight, need_bias, *_ = ctx.needs_input_grad
        return (
            ctx.backend.input_grad(grad, weight, ctx.level) if need_feats else None,
            ctx.backend.weight_grad(feats, grad, ctx.level).to(ctx.dtypes[0]) if need_weight else None,
            _column_sums(grad).to(ctx.dtypes[1]) if need_bias else None,
            None,
            None,
        )


def refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # as `once_differentiable` would, without its cost on every layer of every step
        raise RuntimeError("this layer has no second derivative: call backward without create_graph")


def _column_sums(grad: Float[Tensor, "N F"]) -> Float[Tensor, " F"]:
    kernels = fused("rows", grad) if grad.numel() > MANY_NUMBERS else None
    return kernels.column_sums(grad) if kernels else grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))


def submanifold_conv(
    x: SparseTensor, weight: Float[Tensor, "27 C F"], bias: Float[Tensor, " F"] | None = None, *, backend: str = "auto"
) -> SparseTensor:
    """3x3x3 convolution that keeps the occupied voxels."""
    feats = x.feats
    if feats.shape[1] != weight.shape[1]:
        raise ValueError(f"weight {tuple(weight.shape)} needs features of {weight.shape[1]}, got {feats.shape[1]}")
    dtype = autocast_dtype(feats)
    if dtype:
        feats = feats.to(dtype)
    if (feats.dtype != weight.dtype and not dtype) or feats.device != weight.device:
        raise ValueError(
            f"features and weight must share dtype and device, got {feats.dtype} on {feats.device} "
            f"and {weight.dtype} on {weight.device}"
        )
    with without_autocast(feats.device.type):  # a backend sums in float32, whatever the inputs are
        chosen = choose_backend(backend, feats, weight.shape[2])
        return x.replace(_SubmanifoldConv.apply(feats, weight, bias, x.level, chosen))


@contextmanager
def without_autocast(kind: str) -> Iterator[None]:
    """What `torch.autocast(kind, enabled=False)` does; that one asks the driver for its devices each time."""
    enabled = torch.is_autocast_enabled(kind)
    torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(kind, enabled)


def autocast_dtype(feats: Float[Tensor, "N C"]) -> torch.dtype | None:
    kind = feats.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class _MixedLinear(torch.autograd.Function):
    """A linear map of 16-bit rows whose parameters' gradients are summed and kept in float32: no casts between."""

    @staticmethod
    def forward(ctx, feats, weight, bias, live, kernels):
        cast = weight.to(feats.dtype)
        ctx.save_for_backward(feats, cast)
        ctx.kernels, ctx.live = kernels, live
        return kernels.rows_product(feats, cast, bias.contiguous(), live=live)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative()
        feats, weight = ctx.saved_tensors
        grad = grad.contiguous()
        need_feats, *need_parameters = ctx.needs_input_grad[:3]
        grads = ctx.kernels.parameter_grads(feats, grad, live=ctx.live) if any(need_parameters) else (None, None)
        return ctx.kernels.rows_product(grad, weight.T, None, live=ctx.live) if need_feats else None, *grads, None, None


def linear(
    feats: Float[Tensor, "N _"], weight: Float[Tensor, "F C"], bias: Float[Tensor, " F"], *, live: Live = None
) -> Float[Tensor, "N F"]:
    """A linear map of every row; in a graph of the `live` ones."""
    if feats.shape[1] != weight.shape[1]:  # a kernel would read past the end of the weight's rows
        raise ValueError(f"weight {tuple(weight.shape)} needs features of {weight.shape[1]}, got {feats.shape[1]}")
    dtype = autocast_dtype(feats)
    kernels = fused("linear", feats) if dtype and weight.dtype == torch.float32 else None
    if live is not None and not kernels:
        raise RuntimeError("the kernels that graphs need do not serve here")
    return (
        _MixedLinear.apply(feats.to(dtype), weight, bias, live, kernels) if kernels else F.linear(feats, weight, bias)
    )


def send(values: Tensor, device: torch.device) -> Tensor:
    """The host's values on a device, through memory from which they travel while the host goes on."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def fused(name: str, feats: Float[Tensor, "N ..."]) -> ModuleType | None:
    """A module of `networks.kernels` where these features can use it."""
    if feats.device.type != "cuda" or feats.dtype == torch.float64 or defect("triton", feats.device.index):
        return None
    return _kernels(name)


@cache
def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"networks.kernels.{name}")


class _SpreadToChildren(torch.autograd.Function):
    """Copies each coarse row, scaled, to its children; backward adds the children up. The order of sums is fixed."""

    @staticmethod
    def forward(ctx, coarse, cells, scale):
        ctx.cells, ctx.scale = cells, scale
        kernels = fused("rows", coarse)
        if kernels:
            return kernels.spread(coarse, cells.parent, scale)
        return (coarse if scale is None else coarse * scale[:, None].to(coarse.dtype)).index_select(0, cells.parent)

    @staticmethod
    def backward(ctx, grad):
        return _SumChildren.apply(grad, ctx.cells, ctx.scale), None, None


class _SumChildren(torch.autograd.Function):
    """Adds up the children of each coarse row and scales the sum; backward copies to them."""

    @staticmethod
    def forward(ctx, fine, cells, scale):
        ctx.cells, ctx.scale = cells, scale
        kernels = fused("rows", fine)
        if kernels:
            return kernels.sum_children(fine, cells.children, scale)
        wide = torch.promote_types(fine.dtype, torch.float32)
        padded = torch.cat([fine, fine.new_zeros((1, fine.shape[1]))])
        total = torch.zeros((len(cells.coarse), fine.shape[1]), dtype=wide, device=fine.device)
        for rows in cells.children:
            total += padded.index_select(0, rows)
        return (total if scale is None else total * scale[:, None]).to(fine.dtype)

    @staticmethod
    def backward(ctx, grad):
        return _SpreadToChildren.apply(grad, ctx.cells, ctx.scale), None, None


def pool(x: SparseTensor, *, legacy: bool = False) -> tuple[SparseTensor, Coarsening]:
    """Mean over the children of each 2x2x2 cell; `legacy` divides by one more, as published weights expect."""
    cells = x.level.coarsening
    wide = torch.promote_types(x.feats.dtype, torch.float32)
    share = x.level.cached(("share", legacy, wide), lambda: 1 / (cells.occupied.sum(1) + int(legacy)).to(wide))
    return SparseTensor.on(cells.coarse, _SumChildren.apply(x.feats, cells, share)), cells


def unpool(x: SparseTensor, cells: Coarsening) -> SparseTensor:
    """Copies each voxel to the children that `cells` names; undoes the grouping of `pool`."""
    if not x.level.same_as(cells.coarse):
        raise ValueError(f"up-sampling needs the coarse level of its plan ({len(cells.coarse)} voxels), got {len(x)}")
    return SparseTensor.on(cells.fine, _SpreadToChildren.apply(x.feats, cells, None))


class _TakeRows(torch.autograd.Function):
    """Takes rows by number, `back` undoes it, so backward needs no sums; with `gaps` a number one past the end is 0."""

    @staticmethod
    def forward(ctx, values, rows, back, gaps):
        ctx.rows, ctx.back, ctx.gaps = rows, back, gaps
        padded = torch.cat([values, values.new_zeros((1, *values.shape[1:]))]) if gaps else values
        return padded.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad):
        return _TakeRows.apply(grad, ctx.back, ctx.rows, not ctx.gaps), None, None, None


def gather_children(x: SparseTensor) -> tuple[SparseTensor, Coarsening]:
    """The eight children of each 2x2x2 cell side by side, child 4(x&1) + 2(y&1) + (z&1) at its place, absent ones zero.

    Channels of the result are (child, channel), child slowest.
    """
    cells = x.level.coarsening
    slotted = _TakeRows.apply(x.feats, cells.slots, cells.places, True)
    return SparseTensor.on(cells.coarse, rearrange(slotted, "(m child) c -> m (child c)", child=8)), cells


def scatter_children(x: SparseTensor, cells: Coarsening) -> SparseTensor:
    """Each child that `cells` names takes its own eighth of its parent's channels; undoes `gather_children`."""
    if not x.level.same_as(cells.coarse):
        raise ValueError(f"up-sampling needs the coarse level of its plan ({len(cells.coarse)} voxels), got {len(x)}")
    slotted = rearrange(x.feats, "m (child c) -> (m child) c", child=8)
    return SparseTensor.on(cells.fine, _TakeRows.apply(slotted, cells.places, cells.slots, False))


def group_norm(
    x: SparseTensor,
    num_groups: int,
    weight: Float[Tensor, " C"],
    bias: Float[Tensor, " C"],
    *,
    eps: float = 1e-5,
    silu: bool = False,
) -> SparseTensor:
    """Group normalisation over each sample's own voxels, in float32, then SiLU where asked for."""
    wide = torch.promote_types(x.feats.dtype, torch.float32)
    with without_autocast(x.feats.device.type):
        parts = [
            rearrange(
                F.group_norm(rearrange(rows.to(wide), "n c -> 1 c n"), num_groups, weight.to(wide), bias.to(wide), eps),
                "1 c n -> n c",
            )
            for rows in x.feats.split(x.level.sample_sizes)
            if rows.shape[0]
        ]
        if not parts:
            return x
        out = torch.cat(parts)
        return x.replace((F.silu(out) if silu else out).to(x.feats.dtype))


class _FusedVoxelNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, feats, weight, bias, eps, silu):
        kernels, feats = fused("norm", feats), feats.contiguous()
        ctx.save_for_backward(feats, weight, bias)
        ctx.kernels, ctx.settings = kernels, {"eps": eps, "silu": silu}
        return kernels.voxel_norm(feats, weight, bias, **ctx.settings)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative()
        feats, weight, bias = ctx.saved_tensors
        grads = ctx.kernels.voxel_norm_grads(feats, grad.contiguous(), weight, bias, **ctx.settings)
        return grads[0], grads[1].to(weight.dtype), grads[2].to(bias.dtype), None, None


def voxel_norm(
    x: SparseTensor, weight: Float[Tensor, " C"], bias: Float[Tensor, " C"], *, eps: float = 1e-5, silu: bool = False
) -> SparseTensor:
    """Normalisation over each voxel's own channels, in float32, then SiLU where asked for."""
    if fused("norm", x.feats) and len(x):
        return x.replace(_FusedVoxelNorm.apply(x.feats, weight, bias, eps, silu))
    wide = torch.promote_types(x.feats.dtype, torch.float32)
    with without_autocast(x.feats.device.type):
        out = F.layer_norm(x.feats.to(wide), x.feats.shape[1:], weight.to(wide), bias.to(wide), eps)
        return x.replace((F.silu(out) if silu else out).to(x.feats.dtype))


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, plan):
        qkv = qkv.contiguous()
        out, sums = fused("attention", qkv).attend(qkv, *plan)
        ctx.save_for_backward(qkv, out, sums)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx, grad):
        return fused("attention", grad).attend_grad(grad.contiguous(), *ctx.saved_tensors, *ctx.plan), None


def window_attention(
    qkv: Float[Tensor, "N three H D"], level: Level, *, window: int, shift: int
) -> Float[Tensor, "N H D"]:
    """Self-attention among the voxels of each cubic window of the absolute grid."""
    plan = level.windows(window, shift)
    kernels = fused("attention", qkv)
    if kernels and qkv.shape[3] <= kernels.MAX_HEAD_WIDTH:
        return _FusedAttention.apply(qkv, plan)
    rows, slot = level.cached(("slots", window, shift), plan.padded)
    slots = _TakeRows.apply(qkv, rows.flatten(), slot, True)
    q, k, v = rearrange(slots, "(w l) three h d -> three w h l d", three=3, w=rows.shape[0])
    empty = rearrange(rows == len(level), "w l -> w 1 1 l")
    mask = torch.zeros(empty.shape, dtype=q.dtype, device=q.device).masked_fill_(empty, -math.inf)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return _TakeRows.apply(rearrange(out, "w h l d -> (w l) h d"), slot, rows.flatten(), False)
