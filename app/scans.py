"""One raw scan as a RAS volume in HU on a tokenizer's own grid, through the gate and the geometry of `prepare`."""

from pathlib import Path

import numpy as np
from jaxtyping import Float, Num

from app.prepare.geometry import normalise
from app.prepare.volume import Volume, read_scan
from networks.presets import Preset


def read_volume(path: str | Path) -> Volume:
    """The one good scan at a path; several are not chosen among."""
    volumes = read_scan(path)
    if len(volumes) > 1:
        raise ValueError(f"{Path(path).name} holds {len(volumes)} scans: give one of them, or prepare the folder first")
    return volumes[0]


def on_grid(volume: Volume, sizes: Preset) -> tuple[Num[np.ndarray, "X Y Z"], Float[np.ndarray, "4 4"]]:
    """The scan on the grid that the tokenizer was trained on."""
    placed = normalise(volume, sizes.resolution, sizes.spacing)
    return placed.hu, placed.affine


def read_one(path: str | Path, *, sizes: Preset) -> tuple[Num[np.ndarray, "X Y Z"], Float[np.ndarray, "4 4"]]:
    return on_grid(read_volume(path), sizes)
