"""The submanifold 3x3x3 convolution by spconv 2.3 (MaskImplicitGemm): CUDA, float16 and float32. No bfloat16.

Same three functions and weights as torch_backend.py. spconv is frozen and fails silently in places, so this file gives
it contiguous int32 coordinates, always its training path (the other drops gradients), and no tensor of 2^31 bytes or
more. It sums float16 in float16 where its tuner finds that faster, its results vary between runs, and its backward
cannot compute one gradient alone: prefer triton.
"""

from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from networks.sparse.topology import Level

DTYPES = (torch.float16, torch.float32)
MAX_BYTES = 2**31  # of features and of outputs: spconv's offsets are 32-bit


class Pairs(NamedTuple):
    """What spconv needs to know of a level, by its own names."""

    forward: Tensor
    backward: Tensor
    masks_forward: list[Tensor]
    masks_backward: list[Tensor]
    orders_forward: list[Tensor]
    orders_backward: list[Tensor]
    masks: list[Any]
    tiles: dict[tuple[torch.dtype, int, int], tuple[Tensor, int]]  # masks of the forward's tiles and their height


def refusal(feats: Float[Tensor, "N C"], columns: int) -> str | None:
    """Why this backend cannot convolve these features to `columns` channels; None where it can."""
    if feats.device.type != "cuda":
        return "runs on CUDA only (its CPU kernels race and give wrong rows)"
    if feats.dtype not in DTYPES:
        return f"computes in float16 or float32, got {feats.dtype}"
    size = feats.shape[0] * max(feats.shape[1], columns) * feats.element_size()
    if size >= MAX_BYTES:
        return f"holds less than 2^31 bytes of features or output, got {size}: use a smaller batch"
    return None


def forward(
    feats: Float[Tensor, "N C"], weight: Float[Tensor, "27 C F"], bias: Float[Tensor, " F"] | None, level: Level
) -> Float[Tensor, "N F"]:
    if feats.shape[0] == 0:
        return feats.new_zeros((0, weight.shape[2]))
    out = _product(feats, weight, level)
    return out if bias is None else out + bias.to(out.dtype)


def input_grad(grad: Float[Tensor, "N F"], weight: Float[Tensor, "27 C F"], level: Level) -> Float[Tensor, "N C"]:
    """A submanifold neighbourhood is symmetric: a forward product with mirrored offsets and transposed weights."""
    return forward(grad, weight.flip(0).mT, None, level)


def weight_grad(feats: Float[Tensor, "N C"], grad: Float[Tensor, "N F"], level: Level) -> Float[Tensor, "27 C F"]:
    from spconv.pytorch import ops

    channels, columns = feats.shape[1], grad.shape[1]
    if feats.shape[0] == 0:
        return feats.new_zeros((27, channels, columns), dtype=torch.float32)
    pairs, shape = _pairs(level), (feats.dtype, channels, columns)
    weight = feats.new_zeros((27, channels, columns))
    if shape not in pairs.tiles:
        _product(feats, weight, level)
    tile_masks, height = pairs.tiles[shape]
    _allow_tf32()
    _, out = ops.implicit_gemm_backward(
        feats.contiguous(),
        to_spconv(weight),
        grad.contiguous(),
        pairs.forward,
        pairs.backward,
        pairs.masks_forward,
        pairs.masks_backward,
        pairs.orders_forward,
        pairs.orders_backward,
        tile_masks,
        pairs.masks,
        height,
        True,
    )
    return from_spconv(out).float()


def to_spconv(weight: Float[Tensor, "27 C F"]) -> Float[Tensor, "F 3 3 3 C"]:
    """Our weight in spconv's layout."""
    return rearrange(weight, "(x y z) c f -> f x y z c", x=3, y=3, z=3).contiguous()


def from_spconv(weight: Float[Tensor, "F 3 3 3 C"]) -> Float[Tensor, "27 C F"]:
    """Undoes `to_spconv`. Only for 3x3x3: spconv stores 1x1x1 weights transposed."""
    return rearrange(weight, "f x y z c -> (x y z) c f").contiguous()


def _product(feats: Float[Tensor, "N C"], weight: Float[Tensor, "27 C F"], level: Level) -> Float[Tensor, "N F"]:
    from spconv.pytorch import ops

    pairs = _pairs(level)
    _allow_tf32()
    out, tile_masks, height = ops.implicit_gemm(
        feats.contiguous(),
        to_spconv(weight),
        pairs.forward,
        pairs.masks_forward,
        pairs.orders_forward,
        len(level),
        pairs.masks,
        True,
        True,
    )
    pairs.tiles[feats.dtype, weight.shape[1], weight.shape[2]] = (tile_masks, height)
    return out


def _pairs(level: Level) -> Pairs:
    return level.cached("spconv", lambda: _build_pairs(level))


def _build_pairs(level: Level) -> Pairs:
    from spconv.core import ConvAlgo
    from spconv.pytorch import ops

    found = ops.get_indice_pairs_implicit_gemm(
        level.coords.contiguous(),
        level.batch_size,
        list(level.spatial_shape),
        ConvAlgo.MaskImplicitGemm,
        ksize=[3] * 3,
        stride=[1] * 3,
        padding=[1] * 3,
        dilation=[1] * 3,
        out_padding=[0] * 3,
        subm=True,
        is_train=True,
    )
    return Pairs(*found[2:9], {})


def _allow_tf32() -> None:
    """spconv has a switch of its own; it follows torch's."""
    import spconv.constants

    spconv.constants.SPCONV_ALLOW_TF32 = torch.backends.cuda.matmul.allow_tf32
