"""Tokens of one volume as an ordered sequence of at most `max_tokens` rows for a language model.

Rows follow the Morton curve, as tokens are stored. Where there are too many, neighbouring octree cells are averaged
until they fit, so every part of the field of view still speaks; the original recipe kept the first rows instead, which
for a CT is the bottom of the body. Knows nothing of text.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor

from networks.sparse.topology import morton_keys

REDUCTIONS = ("pool", "merge", "fps", "truncate")
AXIS_BITS = 20


class TokenSequence(NamedTuple):
    feats: Float[Tensor, "T D"]
    coords: Int32[Tensor, "T 3"]  # latent cell; of an averaged row the rounded centre of its cells
    weights: Int64[Tensor, " T"]  # how many tokens each row stands for


def reduce_tokens(
    feats: Float[Tensor, "M D"], coords: Int[Tensor, "M 3"], *, max_tokens: int = 2048, method: str = "pool"
) -> TokenSequence:
    """Orders the tokens of one volume and brings them down to at most `max_tokens`.

    `pool` averages the fullest cells first, `merge` the most alike; `fps` and `truncate` select rows and drop the rest.
    """
    if method not in REDUCTIONS:
        raise ValueError(f"token_reduction must be one of {', '.join(REDUCTIONS)}, got {method}")
    if max_tokens < 1:
        raise ValueError(f"max_3d_tokens must be at least 1, got {max_tokens}")
    keys = cell_keys(coords)
    order = keys.argsort()
    feats, coords, keys = feats[order], coords[order], keys[order]
    if len(feats) <= max_tokens:
        return TokenSequence(feats, coords.int(), torch.ones_like(keys))
    if method == "fps":
        rows = farthest_points(coords, max_tokens)
    elif method == "truncate":
        x, y, z = coords.long().unbind(1)
        rows = (((z << AXIS_BITS | y) << AXIS_BITS) | x).argsort()[:max_tokens].sort().values
    else:
        owner = group_tokens(keys, max_tokens, feats if method == "merge" else None)
        return average_groups(feats, coords, owner)
    return TokenSequence(feats[rows], coords[rows].int(), torch.ones_like(rows))


def cell_keys(coords: Int[Tensor, "M 3"]) -> Int64[Tensor, " M"]:
    """Morton keys of the cells of one volume."""
    if coords.numel() and (coords.min() < 0 or coords.max() >= 1 << AXIS_BITS):
        raise ValueError(f"token coords must lie in 0..{(1 << AXIS_BITS) - 1}, got {coords.min()}..{coords.max()}")
    return morton_keys(torch.nn.functional.pad(coords, (1, 0)), AXIS_BITS)


def group_tokens(
    keys: Int64[Tensor, " M"], max_groups: int, feats: Float[Tensor, "M D"] | None = None
) -> Int64[Tensor, " M"]:
    """Group of each sorted key, groups in order and at most `max_groups`: a bottom-up octree, never finer than needed.

    Cells of one level merge before the next level is touched. On the last level only as many merge as must: the
    fullest first, or with `feats` those whose features vary least.
    """
    owner = torch.arange(len(keys), device=keys.device)
    level = 0
    while (num_groups := int(owner[-1]) + 1) > max_groups:
        level += 1
        parent = torch.unique_consecutive(keys >> (3 * level), return_inverse=True)[1]
        first = first_rows(owner)
        excess = torch.bincount(parent[first]) - 1  # groups that merging a parent saves
        if feats is None:
            # ties are broken by a golden-ratio scramble, so that no side of the volume is coarser than another
            spread = torch.arange(len(excess), device=keys.device, dtype=torch.float64).mul(0.6180339887498949) % 1
            score = spread - excess
        else:
            score = spread_within(feats, parent)
        ranked = score.argsort()
        saved = excess[ranked].cumsum(0)
        needed = int(torch.searchsorted(saved, num_groups - max_groups)) + 1
        merged = torch.zeros(len(excess), dtype=torch.bool, device=keys.device)
        merged[ranked[:needed]] = True
        start = torch.where(merged[parent], first_rows(parent)[parent], first[owner])
        owner = torch.unique_consecutive(start, return_inverse=True)[1]
    return owner


def first_rows(owner: Int64[Tensor, " M"]) -> Int64[Tensor, " G"]:
    """First row of each group of a sorted grouping."""
    counts = torch.bincount(owner)
    return counts.cumsum(0) - counts


def spread_within(feats: Float[Tensor, "M D"], owner: Int64[Tensor, " M"]) -> Float[Tensor, " G"]:
    """Mean squared distance of rows from the mean of their group."""
    counts = torch.bincount(owner)
    mean = sum_groups(feats, owner) / counts[:, None]
    return sum_groups((feats - mean[owner]).square().sum(1, keepdim=True), owner)[:, 0] / counts


def sum_groups(values: Float[Tensor, "M D"], owner: Int64[Tensor, " M"]) -> Float[Tensor, "G D"]:
    return values.new_zeros(int(owner[-1]) + 1, values.shape[1]).index_add_(0, owner, values)


def average_groups(
    feats: Float[Tensor, "M D"], coords: Int[Tensor, "M 3"], owner: Int64[Tensor, " M"]
) -> TokenSequence:
    counts = torch.bincount(owner)
    centres = sum_groups(coords.double(), owner) / counts[:, None]
    return TokenSequence(sum_groups(feats, owner) / counts[:, None], centres.round().int(), counts)


def farthest_points(coords: Int[Tensor, "M 3"], count: int) -> Int64[Tensor, " T"]:
    """Rows of a farthest-point sample, ascending; starts at the point farthest from the centre."""
    points = coords.float()
    distance = (points - points.mean(0)).square().sum(1)
    rows = []
    nearest = torch.full_like(distance, torch.inf)
    for _ in range(count):
        rows.append(distance.argmax())
        nearest = torch.minimum(nearest, (points - points[rows[-1]]).square().sum(1))
        distance = nearest
    return torch.stack(rows).sort().values
