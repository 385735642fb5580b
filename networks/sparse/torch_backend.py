"""The specification of the submanifold 3x3x3 convolution in plain torch: any device, any float type, deterministic.

out[p] = bias + sum over k of in[p + offset_k] @ weight[k], sums in float32 (float64 for float64 inputs).
Dense neighbourhoods take output-stationary blocks: for a block of rows and each offset, gather and multiply-add.
Thin ones take lists of existing (row, neighbour) pairs. A backend is these three functions with these signatures.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from networks.sparse.topology import CENTRE, Level

BLOCK = 2048  # rows; their gathered features stay in a CPU's cache
CUDA_BLOCK = 2**18  # rows; fewer kernels to start
PAIR_BLOCK = 8192
THIN = 15.0  # mean neighbours below which pair lists win (measured on CPU, 9 to 25 neighbours)


def forward(
    feats: Float[Tensor, "N C"], weight: Float[Tensor, "27 C F"], bias: Float[Tensor, " F"] | None, level: Level
) -> Float[Tensor, "N F"]:
    wide = _accumulator(feats.dtype)
    out = _gather_multiply(feats, weight.to(wide), level, mirrored=False)
    if bias is not None:
        out += bias.to(wide)
    return out.to(feats.dtype)


def input_grad(grad: Float[Tensor, "N F"], weight: Float[Tensor, "27 C F"], level: Level) -> Float[Tensor, "N C"]:
    """A submanifold neighbourhood is symmetric: the same sum over mirrored offsets with transposed weights."""
    wide = _accumulator(grad.dtype)
    return _gather_multiply(grad, weight.to(wide).mT, level, mirrored=True).to(grad.dtype)


def weight_grad(feats: Float[Tensor, "N C"], grad: Float[Tensor, "N F"], level: Level) -> Float[Tensor, "27 C F"]:
    wide = _accumulator(feats.dtype)
    out = torch.zeros((27, feats.shape[1], grad.shape[1]), dtype=wide, device=feats.device)
    for k, rows, source in _products(feats, level, mirrored=False):
        out[k].addmm_(source.to(wide).mT, (grad[rows]).to(wide))
    return out


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gather_multiply(
    feats: Float[Tensor, "N C"], weight: Float[Tensor, "27 C F"], level: Level, *, mirrored: bool
) -> Float[Tensor, "N F"]:
    out = torch.zeros((feats.shape[0], weight.shape[2]), dtype=weight.dtype, device=feats.device)
    for k, rows, source in _products(feats, level, mirrored=mirrored):
        if isinstance(rows, slice):
            out[rows].addmm_(source.to(weight.dtype), weight[k])
        else:  # rows of one offset are distinct, so the order of additions is fixed
            out.index_add_(0, rows, source.to(weight.dtype) @ weight[k])
    return out


def _products(
    feats: Float[Tensor, "N C"], level: Level, *, mirrored: bool
) -> Iterator[tuple[int, slice | Tensor, Float[Tensor, "R C"]]]:
    """Weight index, output rows, and the neighbours' features for them, block by block."""
    if level.mean_neighbours < THIN:
        for k, (rows, near) in enumerate(level.neighbour_pairs):
            if k == CENTRE:
                yield k, slice(None), feats
                continue
            index = 26 - k if mirrored else k
            size = PAIR_BLOCK if feats.device.type == "cpu" else CUDA_BLOCK
            for start in range(0, rows.shape[0], size):
                block = slice(start, start + size)
                yield index, rows[block], feats.index_select(0, near[block])
        return
    padded = torch.cat([feats, feats.new_zeros((1, feats.shape[1]))])
    size = BLOCK if feats.device.type == "cpu" else CUDA_BLOCK
    for start in range(0, feats.shape[0], size):
        block = slice(start, start + size)
        for k in range(27):
            yield 26 - k if mirrored else k, block, padded.index_select(0, level.neighbours[k, block])
