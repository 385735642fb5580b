"""The specification of the submanifold 3x3x3 convolution in plain torch: any device, any float type, deterministic.

out[p] = bias + sum over k of in[p + offset_k] @ weight[k], sums in float32 (float64 for float64 inputs).
Dense neighbourhoods take output-stationary blocks: for a block of rows, gather the neighbours at all offsets (zeros
where there is none) and multiply. Thin ones take lists of existing (row, neighbour) pairs, offset by offset.
A backend is these three functions with these signatures.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor

from networks.sparse.topology import CENTRE, Level

BLOCK = 2**16  # numbers gathered for an offset; those for all 27 stay in a CPU's cache
CUDA_BLOCK = 2**22  # fewer kernels to start
PAIR_BLOCK = 8192
ROWS_A_SUM = 512  # up to which one thread adds them up
THIN = 12.0  # mean neighbours below which pair lists win (measured on CPU, 9 to 25 neighbours)


def forward(
    feats: Float[Tensor, "N C"], weight: Float[Tensor, "27 C F"], bias: Float[Tensor, " F"] | None, level: Level
) -> Float[Tensor, "N F"]:
    wide = _accumulator(feats.dtype)
    out = _gather_multiply(feats, weight.to(wide), level)
    if bias is not None:
        out += bias.to(wide)
    return out.to(feats.dtype)


def input_grad(grad: Float[Tensor, "N F"], weight: Float[Tensor, "27 C F"], level: Level) -> Float[Tensor, "N C"]:
    """A submanifold neighbourhood is symmetric: the same sum over mirrored offsets with transposed weights."""
    return _gather_multiply(grad, weight.to(_accumulator(grad.dtype)).flip(0).mT, level).to(grad.dtype)


def weight_grad(feats: Float[Tensor, "N C"], grad: Float[Tensor, "N F"], level: Level) -> Float[Tensor, "27 C F"]:
    wide = _accumulator(feats.dtype)
    out = torch.zeros((27, feats.shape[1], grad.shape[1]), dtype=wide, device=feats.device)
    if level.mean_neighbours < THIN:
        out[CENTRE] = _sum_of_products(feats.to(wide), grad.to(wide))
        for k, rows, near in _pairs(feats, level):
            out[k] += _sum_of_products(near.to(wide), grad[rows].to(wide))
    else:
        for rows, near in _neighbourhoods(feats, level):
            out.baddbmm_(near.to(wide).mT, grad[rows].to(wide).expand(27, -1, -1))
    return out


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gather_multiply(
    feats: Float[Tensor, "N C"], weight: Float[Tensor, "27 C F"], level: Level
) -> Float[Tensor, "N F"]:
    wide = weight.dtype
    out = torch.zeros((feats.shape[0], weight.shape[2]), dtype=wide, device=feats.device)
    if level.mean_neighbours < THIN:
        torch.mm(feats.to(wide), weight[CENTRE], out=out)
        for k, rows, near in _pairs(feats, level):  # rows of one offset are distinct: the order of additions is fixed
            out.index_add_(0, rows, near.to(wide) @ weight[k])
    elif feats.device.type == "cpu":
        # 27 x R pixels under a kernel of 27 x 1, channels last in memory: the convolution is the sum over k. oneDNN,
        # which runs it, keeps such sums in registers and takes wider instructions than the matrix product does.
        kernel = rearrange(weight, "k c f -> f c k 1").contiguous(memory_format=torch.channels_last)
        for rows, near in _neighbourhoods(feats, level):
            image = rearrange(near.to(wide)[None], "1 k r c -> 1 c k r")
            out[rows] = rearrange(F.conv2d(image, kernel), "1 f 1 r -> r f")
    else:
        for rows, near in _neighbourhoods(feats, level):
            for k in range(27):
                out[rows].addmm_(near[k].to(wide), weight[k])
    return out


def _sum_of_products(left: Float[Tensor, "P C"], right: Float[Tensor, "P F"]) -> Float[Tensor, "C F"]:
    """left.T @ right, on a CPU in parts of equal length: MKL cuts longer sums by its number of threads."""
    if left.device.type != "cpu" or len(left) <= ROWS_A_SUM:
        return left.mT @ right
    whole = len(left) // ROWS_A_SUM * ROWS_A_SUM
    parts = [rearrange(side[:whole], "(parts p) c -> parts p c", p=ROWS_A_SUM) for side in (left, right)]
    return (parts[0].mT @ parts[1]).sum(0) + left[whole:].mT @ right[whole:]


def _pairs(
    feats: Float[Tensor, "N C"], level: Level
) -> Iterator[tuple[int, Int64[Tensor, " P"], Float[Tensor, "P C"]]]:
    """Offset by offset but for the centre, rows that have a neighbour there and the neighbours' features."""
    size = PAIR_BLOCK if feats.device.type == "cpu" else 27 * CUDA_BLOCK // feats.shape[1]
    for k, (rows, near) in enumerate(level.neighbour_pairs):
        if k != CENTRE:
            for some, others in zip(rows.split(size), near.split(size), strict=True):
                yield k, some, feats.index_select(0, others)


def _neighbourhoods(feats: Float[Tensor, "N C"], level: Level) -> Iterator[tuple[slice, Float[Tensor, "27 R C"]]]:
    """Block by block, rows and the features of their neighbours, which the next block overwrites."""
    num_rows, channels = feats.shape
    padded = torch.cat([feats, feats.new_zeros((1, channels))])
    size = max(1, (BLOCK if feats.device.type == "cpu" else CUDA_BLOCK) // channels)
    buffer = feats.new_empty((27 * min(size, num_rows), channels))  # fresh memory for each block would cost as much
    for start in range(0, num_rows, size):
        rows = slice(start, start + size)
        table = level.neighbours[:, rows].flatten()
        near = torch.index_select(padded, 0, table, out=buffer[: len(table)])
        yield rows, near.view(27, -1, channels)
