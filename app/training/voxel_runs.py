"""Where the voxels of a batch lie, told as runs along z: a tenth of what coordinates take on their way to the device.

Memory that a loader's process fills for another one is slow to get, so a batch tells little and the device makes its
coordinates itself. Voxels that follow one another otherwise, as those of shapes may, travel as coordinates.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int16
from torch import Tensor


def places_of(parts: Sequence[Int16[Tensor, "_ 3"]]) -> dict[str, Tensor]:
    """The `runs` (R, 5) of all samples, or their `coords` (N, 4) where those are fewer numbers."""
    runs = [_runs_in(number, part.numpy()) for number, part in enumerate(parts)]
    if sum(run.size for run in runs) > 4 * sum(map(len, parts)):
        return {"coords": _numbered(parts)}
    return {"runs": torch.from_numpy(np.concatenate(runs, 1).T)}


def _runs_in(number: int, coords: Int16[np.ndarray, "N 3"]) -> Int16[np.ndarray, "5 R"]:
    """Of sample `number`: a run is its sample, where it begins (x, y, z), and how many voxels it has."""
    x, y, z = (np.ascontiguousarray(column) for column in coords.T)
    begins = np.ones(len(z), bool)
    begins[1:] = (z[1:] != z[:-1] + np.int16(1)) | (y[1:] != y[:-1]) | (x[1:] != x[:-1])
    first = np.flatnonzero(begins)
    lengths = np.diff(first, append=len(z)).astype(np.int16)
    return np.stack([np.full_like(lengths, number), x[first], y[first], z[first], lengths])


def _numbered(parts: Sequence[Int16[Tensor, "_ 3"]]) -> Int16[Tensor, "N 4"]:
    """Coordinates of all samples behind their sample's number; each of the four columns lies in one piece."""
    columns = np.empty((4, sum(map(len, parts))), np.int16)
    start = 0
    for number, part in enumerate(parts):
        block = columns[:, start : start + len(part)]
        block[0] = number
        block[1:] = part.numpy().T
        start += len(part)
    return torch.from_numpy(columns.T)


def num_voxels(batch: dict[str, Any]) -> int:
    return len(batch["feats" if "feats" in batch else "values"])


def coords_of(
    batch: dict[str, Any], device: torch.device | str = "cpu", *, non_blocking: bool = True
) -> Int[Tensor, "N 4"]:
    """Sample, x, y and z of each voxel of a batch, on the device; the host does not wait for it."""
    if "runs" not in batch:
        return batch["coords"].to(device, non_blocking=non_blocking)
    count = num_voxels(batch)
    runs = batch["runs"].to(device, non_blocking=non_blocking)
    lengths = runs[:, 4].long()
    owner = torch.repeat_interleave(lengths, output_size=count)
    along = torch.arange(count, device=device) - (lengths.cumsum(0) - lengths)[owner]
    columns = runs[:, :4].T.index_select(1, owner)
    columns[3] += along.to(columns.dtype)
    return columns.T
