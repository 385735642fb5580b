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

from transforms.runs import Runs


def places_of(parts: Sequence[Runs]) -> dict[str, Tensor]:
    """The `runs` (R, 5) of all samples, or their `coords` (N, 4) where those are fewer numbers.

    A run is its sample, where it begins (x, y, z), and how many voxels it has.
    """
    if 5 * sum(len(part.lengths) for part in parts) > 4 * sum(map(len, parts)):
        return {"coords": _numbered(parts)}
    numbers = np.repeat(np.arange(len(parts), dtype=np.int16), [len(part.lengths) for part in parts])
    begins, lengths = (np.concatenate([getattr(part, name).T for part in parts], -1) for name in ("begins", "lengths"))
    return {"runs": torch.from_numpy(np.vstack([numbers, begins, lengths], dtype=np.int16, casting="unsafe").T)}


def _numbered(parts: Sequence[Runs]) -> Int16[Tensor, "N 4"]:
    """Coordinates of all samples behind their sample's number; each of the four columns lies in one piece."""
    columns = np.empty((4, sum(map(len, parts))), np.int16)
    start = 0
    for number, part in enumerate(parts):
        block = columns[:, start : start + len(part)]
        block[0] = number
        block[1:] = np.asarray(part).T
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
