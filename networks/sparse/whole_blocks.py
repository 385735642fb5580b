"""Blocks of layers as one step of autograd each, for the kernels of a card: fewer starts, fewer passes over memory.

Forward and backward are written out, so that sums with what runs around a block, activations and the biases' gradients
join the kernels beside them, and a block's weights are rounded to 16 bits in one go. Every function here gives None
where the kernels cannot serve; modules.py then takes its layers one by one, and that is the truth of what they compute.
Rows beyond the live ones of a level (graphs.py) are neither read nor written by a kernel.
"""

import logging
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from networks.sparse import ops
from networks.sparse.tensor import SparseTensor
from networks.sparse.topology import Coarsening, Level, Live, Windows

log = logging.getLogger(__name__)
NORM_EPS, LAYER_NORM_EPS = 1e-5, 1e-6


class Affine(NamedTuple):
    """Parameters of a linear map, a convolution or a norm."""

    weight: Float[Tensor, "..."]
    bias: Float[Tensor, " F"]


def serve(feats: Float[Tensor, "N C"], backend: str) -> bool:
    """Whether kernels compute all blocks here on features like these."""
    dtype, children = ops.autocast_dtype(feats), ops.fused("children", feats)
    if not dtype or dtype.itemsize != 2 or not children or _defect_of_children(children, feats.device):
        return False
    return ops.choose_backend(backend, feats.new_empty((0, 1), dtype=dtype), 1) is ops.backend_module("triton")


def residual_block(
    x: SparseTensor, layers: tuple[Affine, Affine, Affine, Affine], *, backend: str
) -> SparseTensor | None:
    """x + conv(norm(conv(norm(x)))), norms over each voxel's own channels and SiLU after them."""
    norm, weight, dtype = ops.fused("norm", x.feats), layers[1].weight, ops.autocast_dtype(x.feats)
    if not norm or not len(x) or x.feats.dtype != dtype or weight.dtype != torch.float32:
        return _declined(x.level)
    conv = ops.choose_backend(backend, x.feats, weight.shape[2])
    if conv is not ops.backend_module("triton"):
        return _declined(x.level)
    with ops.without_autocast(x.feats.device.type):
        parameters = [value for layer in layers for value in layer]
        return x.replace(_ResidualBlock.apply(x.feats, x.level, conv, norm, *parameters))


def _declined(level: Level) -> None:
    """What the functions here give where layers have to run one by one, which tables of a graph do not allow."""
    if level.live is not None:
        raise RuntimeError("the kernels that graphs need do not serve here")


class _ResidualBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, feats, level, conv, norm, *parameters):
        gain1, lift1, weight1, bias1, gain2, lift2, weight2, bias2 = parameters
        feats, act = feats.contiguous(), {"eps": NORM_EPS, "silu": True, "live": level.live}
        weight1, weight2 = _rounded([weight1, weight2], feats.dtype)
        inner1 = norm.voxel_norm(feats, gain1, lift1, **act)
        middle = conv.forward(inner1, weight1, bias1, level)
        inner2 = norm.voxel_norm(middle, gain2, lift2, **act)
        ctx.save_for_backward(feats, inner1, middle, inner2, weight1, weight2, gain1, lift1, gain2, lift2)
        ctx.level, ctx.conv, ctx.norm = level, conv, norm
        return conv.forward_beside(inner2, weight2, bias2, feats, level)

    @staticmethod
    def backward(ctx, grad):
        ops.refuse_second_derivative()
        feats, inner1, middle, inner2, weight1, weight2, gain1, lift1, gain2, lift2 = ctx.saved_tensors
        conv, norm, level, grad = ctx.conv, ctx.norm, ctx.level, grad.contiguous()
        act = {"eps": NORM_EPS, "silu": True, "live": level.live}
        second = norm.voxel_norm_grads_in_block(middle, conv.input_grad(grad, weight2, level), (gain2, lift2), **act)
        of_inner1 = conv.input_grad(second.input, weight1, level)
        first = norm.voxel_norm_grads_in_block(feats, of_inner1, (gain1, lift1), around=grad, **act)
        of_weight1 = of_weight2 = None
        if any(ctx.needs_input_grad[4:]):
            of_weight1, of_weight2 = conv.weight_grads([(inner1, second.input), (inner2, grad)], level)
        of_conv1, of_conv2 = (of_weight1, second.beside), (of_weight2, first.beside)
        return first.input, *(None,) * 3, first.weight, first.bias, *of_conv1, second.weight, second.bias, *of_conv2


class Block(NamedTuple):
    """A transformer block: the layers qkv, out and the two of the MLP, and its sizes."""

    layers: tuple[Affine, Affine, Affine, Affine]
    num_heads: int
    window: int
    shift: int


class Transformer(NamedTuple):
    """What a transformer block computes with, beside its parameters."""

    linear: ModuleType
    norm: ModuleType
    attention: ModuleType
    num_heads: int
    plan: Windows
    live: Live


def transformer_for(x: SparseTensor, block: Block) -> Transformer | None:
    """The kernels for a block on these features, and their windows; None where kernels cannot serve."""
    linear, dtype = ops.fused("linear", x.feats), ops.autocast_dtype(x.feats)
    if not linear or x.feats.dtype != dtype or block.layers[0].weight.dtype != torch.float32:
        return _declined(x.level)
    norm, attention = ops.fused("norm", x.feats), ops.fused("attention", x.feats)
    if x.feats.shape[1] // block.num_heads > attention.MAX_HEAD_WIDTH:
        return _declined(x.level)
    windows = x.level.windows(block.window, block.shift)
    return Transformer(linear, norm, attention, block.num_heads, windows, x.level.live)


def transformer_block(x: SparseTensor, block: Block) -> SparseTensor | None:
    """x + out(attention(qkv(norm(x)))), then + mlp(norm()) of that."""
    if (how := transformer_for(x, block)) is None:
        return None
    return x.replace(_TransformerBlock.apply(x.feats, how, *(value for layer in block.layers for value in layer)))


class _TransformerBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, how, *parameters):
        out, saved = transformer_forward(x.contiguous(), how, parameters)
        ctx.save_for_backward(*saved)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx, grad):
        ops.refuse_second_derivative()
        needs = {"feats": ctx.needs_input_grad[0], "parameters": any(ctx.needs_input_grad[2:])}
        of_x, of_parameters = transformer_backward(grad.contiguous(), ctx.how, ctx.saved_tensors, **needs)
        return of_x, None, *of_parameters


def transformer_forward(
    x: Float[Tensor, "N C"], how: Transformer, parameters: Sequence[Tensor]
) -> tuple[Float[Tensor, "N C"], tuple[Tensor, ...]]:
    """The block's result, and what its backward needs."""
    linear, live = how.linear, {"live": how.live}
    bare = {"eps": LAYER_NORM_EPS, "silu": False, **live}
    to_qkv, to_out, widen, narrow = _rounded(parameters[::2], x.dtype)
    bias_qkv, bias_out, bias_widen, bias_narrow = parameters[1::2]
    before = how.norm.voxel_norm(x, None, None, **bare)
    qkv = linear.rows_product(before, to_qkv, bias_qkv, **live).view(len(x), 3, how.num_heads, -1)
    seen, sums = how.attention.attend(qkv, *how.plan)
    middle = linear.rows_product(seen.view(len(x), -1), to_out, bias_out, added=x, **live)
    between = how.norm.voxel_norm(middle, None, None, **bare)
    wide, bent = linear.rows_product_gelu(between, widen, bias_widen, **live)
    out = linear.rows_product(bent, narrow, bias_narrow, added=middle, **live)
    return out, (x, before, qkv, seen, sums, middle, between, wide, bent, to_qkv, to_out, widen, narrow)


def transformer_backward(
    grad: Float[Tensor, "N C"],
    how: Transformer,
    saved: Sequence[Tensor],
    *,
    feats: bool = True,
    parameters: bool = True,
) -> tuple[Float[Tensor, "N C"] | None, Sequence[Tensor | None]]:
    """Gradients of the block's features and of its parameters, as far as they are asked for."""
    x, before, qkv, seen, sums, middle, between, wide, bent, to_qkv, to_out, widen, narrow = saved
    linear, norm, live = how.linear, how.norm, {"live": how.live}
    bare = {"parameters": None, "eps": LAYER_NORM_EPS, "silu": False, **live}
    of_wide = linear.rows_product_gelu_grad(grad, narrow.T, wide, **live)
    of_between = linear.rows_product(of_wide, widen.T, None, **live)
    of_middle = norm.voxel_norm_grads_in_block(middle, of_between, around=grad, **bare).input
    of_seen = linear.rows_product(of_middle, to_out.T, None, **live)
    of_qkv = how.attention.attend_grad(of_seen.view_as(seen), qkv, seen, sums, *how.plan).view(len(x), -1)
    of_x, of_parameters = None, (None,) * 8
    if feats:
        of_before = linear.rows_product(of_qkv, to_qkv.T, None, **live)
        of_x = norm.voxel_norm_grads_in_block(x, of_before, around=of_middle, **bare).input
    if parameters:
        rows = seen.view(len(x), -1)
        pairs = [(before, of_qkv), (rows, of_middle), (between, of_wide), (bent, grad)]
        of_parameters = [value for both in linear.several_parameter_grads(pairs, **live) for value in both]
    return of_x, of_parameters


def halving(x: SparseTensor, layer: Affine, shortcut: Float[Tensor, "F _"], *, marked: bool) -> SparseTensor | None:
    """The eight children of each cell side by side, each with a one behind it where `marked`, through a linear map.

    The map is the sum of the layer's weight and of `shortcut`.
    """
    kernels, dtype = _kernels_of_children(x, layer)
    if not kernels:
        return _declined(x.level)
    cells = x.level.coarsening
    given = x.feats, layer.weight, layer.bias, shortcut, cells.children
    feats = _Halving.apply(*given, _live_rows(cells), dtype, marked, kernels)
    return SparseTensor.on(cells.coarse, feats)


class _Halving(torch.autograd.Function):
    @staticmethod
    def forward(ctx, feats, weight, bias, shortcut, children, live, dtype, marked, kernels):  # noqa: PLR0913
        weight = torch.add(weight, shortcut, out=torch.empty_like(weight, dtype=dtype))
        ctx.save_for_backward(feats, weight, children)
        ctx.marked, ctx.kernels, ctx.live = marked, kernels, live
        return kernels.gather_product(feats, children, weight, bias, marked=marked, live=live)

    @staticmethod
    def backward(ctx, grad):
        ops.refuse_second_derivative()
        (feats, weight, children), kernels, grad = ctx.saved_tensors, ctx.kernels, grad.contiguous()
        of_feats, of_parameters, live = None, (None, None), {"live": ctx.live}
        if ctx.needs_input_grad[0]:
            size = {"num_fine": feats.shape[0], "channels": feats.shape[1]}
            of_feats = kernels.scatter_product(grad, weight.T, None, children, **size, **live).to(feats.dtype)
        if any(ctx.needs_input_grad[1:3]):
            of_parameters = kernels.gathered_grads(feats, children, grad, marked=ctx.marked, **live)
        return of_feats, *of_parameters, *(None,) * 6


def doubling(x: SparseTensor, cells: Coarsening, layer: Affine, shortcut: Float[Tensor, "_ C"]) -> SparseTensor | None:
    """A linear map to eight parts, of which each child that `cells` names takes its own; `shortcut` as in `halving`."""
    kernels, dtype = _kernels_of_children(x, layer)
    if not kernels or x.feats.dtype != dtype:
        return _declined(x.level)
    given = x.feats, layer.weight, layer.bias, shortcut, cells.children
    feats = _Doubling.apply(*given, _live_rows(cells), len(cells.fine), kernels)
    return SparseTensor.on(cells.fine, feats)


class _Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, feats, weight, bias, shortcut, children, live, num_fine, kernels):  # noqa: PLR0913
        weight = torch.add(weight, shortcut, out=torch.empty_like(weight, dtype=feats.dtype))
        ctx.save_for_backward(feats, weight, children)
        ctx.kernels, ctx.live = kernels, live
        size = {"num_fine": num_fine, "channels": weight.shape[0] // 8, "live": live}
        return kernels.scatter_product(feats, weight, bias, children, **size)

    @staticmethod
    def backward(ctx, grad):
        ops.refuse_second_derivative()
        (feats, weight, children), kernels, grad = ctx.saved_tensors, ctx.kernels, grad.contiguous()
        of_feats, of_parameters = None, (None, None)
        if ctx.needs_input_grad[0]:
            of_feats = kernels.gather_product(grad, children, weight.T, None, live=ctx.live)
        if any(ctx.needs_input_grad[1:3]):
            of_parameters = kernels.scattered_grads(feats, children, grad, live=ctx.live)
        return of_feats, *of_parameters, *(None,) * 5


def _live_rows(cells: Coarsening) -> tuple[Live, Live] | None:
    """Of the fine and of the coarse level, where devices know them alone."""
    return None if cells.fine.live is None else (cells.fine.live, cells.coarse.live)


def _kernels_of_children(x: SparseTensor, layer: Affine) -> tuple[ModuleType | None, torch.dtype | None]:
    dtype = ops.autocast_dtype(x.feats)
    if not dtype or layer.weight.dtype != torch.float32 or not len(x):
        return None, dtype
    kernels = ops.fused("children", x.feats)
    return (kernels if kernels and not _defect_of_children(kernels, x.feats.device) else None), dtype


@cache
def _defect_of_children(kernels: ModuleType, device: torch.device) -> str | None:
    """What is wrong with the kernels of children on a device; said once."""
    try:
        with torch.no_grad(), ops.without_autocast(device.type):
            worst = _error_of_children(kernels, device)
        reason = None if worst < ops.PROOF_TOLERANCE else f"relative error {worst:.2g}"
    except Exception as error:  # a Triton that cannot compile here may raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if reason:
        log.warning("cells are halved and doubled in plain torch: the triton kernels do not work here (%s)", reason)
    return reason


def _error_of_children(kernels: ModuleType, device: torch.device) -> float:
    """Relative, of a small map with five children in two cells, and of its gradients."""
    children = torch.tensor([[0, 3], [1, 4], [5, 5], [5, 5], [2, 5], [5, 5], [5, 5], [5, 5]], device=device)
    fine, weight, grad = (
        torch.linspace(-1, 1, rows * width, device=device).view(rows, width).half()
        for rows, width in ((5, 4), (50, 40), (2, 50))
    )
    laid = torch.cat([fine, fine.new_zeros(1, 4)])[children.T].float()
    laid = torch.cat([laid, (children.T < 5)[:, :, None]], 2).flatten(1)
    got = (
        kernels.gather_product(fine, children, weight, None, marked=True),
        kernels.gathered_grads(fine, children, grad, marked=True)[0],
        kernels.scatter_product(grad, weight.T, None, children, num_fine=5, channels=4),
    )
    spread = (grad.float() @ weight.float()).view(2, 8, 5)
    back = torch.stack([spread[cell, octant, :4] for cell, octant in ((0, 0), (0, 1), (0, 4), (1, 0), (1, 1))])
    truth = laid @ weight.float().T, grad.float().T @ laid, back
    return max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(got, truth, strict=True))


def _rounded(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights in the features' type, all in one go."""
    copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    torch._foreach_copy_(copies, list(weights))
    return copies
