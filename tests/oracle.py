"""The maths restated densely or in scalars, in float64. Imports nothing of the project, on purpose."""

import itertools

import numpy as np
import torch
import torch.nn.functional as F


def dense_of(feats, coords, shape, batch_size):
    grid = torch.zeros(batch_size, feats.shape[1], *shape, dtype=feats.dtype)
    for row, (b, x, y, z) in zip(feats, coords.tolist(), strict=True):
        grid[b, :, x, y, z] = row
    return grid


def rows_of(grid, coords):
    b, x, y, z = coords.long().unbind(1)
    return grid[b, :, x, y, z]


def dense_kernel(weight):
    """(27, in, out) with offset (dx+1)*9 + (dy+1)*3 + (dz+1) as conv3d's (out, in, 3, 3, 3)."""
    kernel = torch.empty(weight.shape[2], weight.shape[1], 3, 3, 3, dtype=weight.dtype)
    for k, (dx, dy, dz) in enumerate(itertools.product(range(3), repeat=3)):
        kernel[:, :, dx, dy, dz] = weight[k].T
    return kernel


def submanifold_conv(feats, coords, shape, batch_size, weight, bias):
    """Values on the occupied voxels of a dense convolution of the grid with empty voxels zero."""
    grid = dense_of(feats, coords, shape, batch_size)
    return rows_of(F.conv3d(grid, dense_kernel(weight), bias, padding=1), coords)


def neighbours(coords, shape):
    """Row of each neighbour by dictionary, len(coords) where there is none."""
    row_of = {tuple(c): i for i, c in enumerate(coords.tolist())}
    table = []
    for dx, dy, dz in itertools.product((-1, 0, 1), repeat=3):
        table.append([row_of.get((b, x + dx, y + dy, z + dz), len(coords)) for b, x, y, z in coords.tolist()])
    return torch.tensor(table, dtype=torch.int32).view(27, len(coords))


def morton(b, x, y, z, bits):
    """Bit by bit: x highest in each triple, the sample above all."""
    key = b
    for i in reversed(range(bits)):
        key = (key << 3) | (((x >> i) & 1) << 2) | (((y >> i) & 1) << 1) | ((z >> i) & 1)
    return key


def pooled(feats, coords, *, legacy=False):
    """Mean of the children of each cell, as a dictionary from cell to features."""
    cells = {}
    for row, (b, x, y, z) in zip(feats, coords.tolist(), strict=True):
        cells.setdefault((b, x // 2, y // 2, z // 2), []).append(row)
    return {cell: sum(rows) / (len(rows) + legacy) for cell, rows in cells.items()}


def children_of_cells(grid):
    """(B, C, X, Y, Z) with even sides as (B, C, 8, X/2, Y/2, Z/2), child 4(x&1) + 2(y&1) + (z&1)."""
    parts = [grid[:, :, dx::2, dy::2, dz::2] for dx, dy, dz in itertools.product(range(2), repeat=3)]
    return torch.stack(parts, 2)


def group_means(values, outputs):
    """Means of equal groups of neighbouring channels (B, I, ...), or each channel repeated where outputs are more."""
    inputs = values.shape[1]
    if inputs >= outputs:
        return values.unflatten(1, (outputs, inputs // outputs)).mean(2)
    return values.repeat_interleave(outputs // inputs, 1)


def halved(grid, there, weight, bias):
    """Dense space to channels: weight (out, 8 (C + 1)), child slowest, its last channel the occupancy."""
    with_bits = torch.cat([grid, there], 1)
    stacked = children_of_cells(with_bits).transpose(1, 2).flatten(1, 2)
    plain = children_of_cells(grid).flatten(1, 2)  # channel slowest
    mapped = torch.einsum("oi,bixyz->boxyz", weight, stacked) + bias[:, None, None, None]
    return mapped + group_means(plain, weight.shape[0])


def doubled(grid, weight, bias):
    """Dense channels to space: weight (8 F, C), child slowest."""
    count = weight.shape[0] // 8
    parts = torch.einsum("oi,bixyz->boxyz", weight, grid) + bias[:, None, None, None]
    parts = parts.unflatten(1, (8, count)) + group_means(grid, 8 * count).unflatten(1, (count, 8)).transpose(1, 2)
    fine = parts.new_zeros(parts.shape[0], count, *(2 * n for n in grid.shape[2:]))
    for child, (dx, dy, dz) in enumerate(itertools.product(range(2), repeat=3)):
        fine[:, :, dx::2, dy::2, dz::2] = parts[:, child]
    return fine


def group_norm(feats, coords, groups, weight, bias, eps=1e-5):
    out = torch.empty_like(feats)
    for b in set(coords[:, 0].tolist()):
        rows = coords[:, 0] == b
        part = feats[rows].view(int(rows.sum()), groups, -1)
        mean, var = part.mean((0, 2), keepdim=True), part.var((0, 2), unbiased=False, keepdim=True)
        out[rows] = ((part - mean) / (var + eps).sqrt()).view(int(rows.sum()), -1) * weight + bias
    return out


def window_attention(qkv, coords, window, shift):
    """Row by row: softmax over the rows of the same sample and window."""
    cell = [(b, (x + shift) // window, (y + shift) // window, (z + shift) // window) for b, x, y, z in coords.tolist()]
    out = torch.empty_like(qkv[:, 0])
    for i in range(len(coords)):
        mates = [j for j in range(len(coords)) if cell[j] == cell[i]]
        for h in range(qkv.shape[2]):
            scores = torch.stack([qkv[i, 0, h] @ qkv[j, 1, h] for j in mates]) / qkv.shape[3] ** 0.5
            out[i, h] = sum(p * qkv[j, 2, h] for p, j in zip(scores.softmax(0), mates, strict=True))
    return out


def nearest_codes(rows, codebook):
    return ((rows[:, None] - codebook[None]) ** 2).sum(2)


def window_value(hu, width, level):
    return min(max((hu - (level - width / 2)) / width, 0.0), 1.0)


def triangle_distance(point, triangle):
    """From a point to a triangle: to its plane where the foot lies inside, else to the nearest edge."""
    p, (a, b, c) = np.asarray(point, float), np.asarray(triangle, float)
    ends = ((a, b), (b, c), (c, a))
    best = min(segment_distance(p, *pair) for pair in ends)
    normal = np.cross(b - a, c - a)
    if (size := np.linalg.norm(normal)) <= 1e-12:
        return best
    height = np.dot(p - a, normal) / size
    foot = p - height * normal / size
    if all(np.dot(np.cross(two - one, foot - one), normal) >= 0 for one, two in ends):
        return abs(height)
    return best


def segment_distance(p, a, b):
    along = b - a
    share = np.clip(np.dot(p - a, along) / max(np.dot(along, along), 1e-300), 0, 1)
    return float(np.linalg.norm(p - a - share * along))


def solid_angle_winding(point, triangles):
    """How many times oriented triangles wind about a point: the sum of their solid angles over 4 pi (van Oosterom)."""
    a, b, c = (np.asarray(triangles, float)[:, i] - np.asarray(point, float) for i in range(3))
    la, lb, lc = (np.linalg.norm(v, axis=1) for v in (a, b, c))
    top = np.einsum("ti,ti->t", a, np.cross(b, c))
    bottom = la * lb * lc + (a * b).sum(1) * lc + (b * c).sum(1) * la + (c * a).sum(1) * lb
    return float(np.arctan2(top, bottom).sum() / (2 * np.pi))
