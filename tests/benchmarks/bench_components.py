"""What linear components of cells in HU keep of scans not trained on, nothing learned: by width, and by air mixed in.

    python -m tests.benchmarks.bench_components DATA [--dataset torso] [--widths 64 128 256] [--air 0 0.3 1]
        [--codes 8192 --levels 4] [--cells 900]

DATA is a prepared dataset with train and val. Components are fitted to some cells of every training scan, as `pca` lays
them; errors are over the body of whole val scans, MAE / RMSE in HU, means over scans. With --levels also of the first
1, 2, ... codes of the first width, laid by residual k-means over those cells and decoded linearly.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from app.dataset import prepared
from networks import components
from networks.components import VOXELS_PER_LATENT, FixedLinear, HounsfieldUnits, cell_rows, lay_components
from networks.presets import preset
from networks.quantizer import VectorQuantizer
from networks.residual import ResidualQuantizer
from tests.benchmarks.bench_real import seen_by_both
from tests.benchmarks.timing import machine
from transforms.windows import window_bounds

Cells = tuple[Float[Tensor, "M V"], Float[Tensor, "M V"]]  # HU, and which voxels are there


def cells_of(case: prepared.PreparedCase) -> Cells:
    sizes = preset("base")
    units = HounsfieldUnits(sizes.in_channels)
    units.lay([window_bounds(name) for name in sizes.windows])
    _, x = seen_by_both(case, sizes)
    x = x.to("cpu")
    with mock.patch.object(components, "AIR_IN_ABSENT", 0.0):
        rows = cell_rows(x.replace(units(x.feats))).feats
    with mock.patch.multiple(components, AIR=1.0, AIR_IN_ABSENT=1.0):
        present = 1 - cell_rows(x.replace(torch.zeros(len(x), 1))).feats
    return rows, present


def with_air(cells: Cells, share: float) -> Float[Tensor, "M V"]:
    rows, present = cells
    return torch.where(present > 0, rows, torch.lerp(rows, torch.full_like(rows, components.AIR), share))


def errors(recon: Float[Tensor, "M V"], cells: Cells) -> tuple[float, float]:
    difference = (recon - cells[0])[cells[1] > 0].double()
    return float(difference.abs().mean()), float(difference.square().mean().sqrt())


def tables(given: argparse.Namespace, fitted: Cells, judged: list[Cells]) -> Iterator[dict[str, object]]:
    for share in given.air:
        rows = with_air(fitted, share)
        for number, width in enumerate(given.widths):
            maps = FixedLinear(VOXELS_PER_LATENT, width), FixedLinear(width, VOXELS_PER_LATENT)
            lay_components(*maps, rows)
            latents = [maps[0](with_air(cells, share)) for cells in judged]
            found = [errors(maps[1](part), cells) for part, cells in zip(latents, judged, strict=True)]
            yield {"air": share, "width": width, "codes": None, **means(found)}
            if number or not given.levels:
                continue
            books = ResidualQuantizer([VectorQuantizer(given.codes, width) for _ in range(given.levels)])
            books.start_from(maps[0](rows), generator=torch.Generator().manual_seed(0))
            codes = [books.eval()(part).codes for part in latents]
            for level in range(1, given.levels + 1):
                decoded = [maps[1](books.lookup(part[:, :level])) for part in codes]
                found = [errors(part, cells) for part, cells in zip(decoded, judged, strict=True)]
                yield {"air": share, "width": width, "codes": level, **means(found)}


def means(found: list[tuple[float, float]]) -> dict[str, float]:
    return dict(zip(("mae", "rmse"), np.mean(found, 0).round(2).tolist(), strict=True))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--dataset", help="of val scans: those of this dataset alone")
    parser.add_argument("--widths", nargs="+", type=int, default=(64, 128, 256))
    parser.add_argument("--air", nargs="+", type=float, default=(0.0, components.AIR_IN_ABSENT, 1.0))
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--levels", type=int, default=0)
    parser.add_argument("--cells", type=int, default=900, help="of each training scan")
    given = parser.parse_args()
    some = []
    for case in prepared.find_cases(given.data, split="train"):
        rows, present = cells_of(case)
        step = max(1, len(rows) // given.cells)
        some.append((rows[::step][: given.cells], present[::step][: given.cells]))
    fitted = tuple(torch.cat(part) for part in zip(*some, strict=True))
    val = [case for case in prepared.find_cases(given.data, split="val") if given.dataset in (None, case.dataset)]
    judged = [cells_of(case) for case in val]
    assert errors(judged[0][0], judged[0]) == (0, 0)
    done = []
    print("| air in absent voxels | numbers a cell | codes | MAE / RMSE, HU |\n|---|---|---|---|")
    for row in tables(given, fitted, judged):
        done.append(row)
        error = f"{row['mae']:.1f} / {row['rmse']:.1f}"
        print(f"| {row['air']:g} | {row['width']} | {row['codes'] or 'none'} | {error} |", flush=True)
    print(json.dumps({"benchmark": "components", **machine("cpu"), "scans": len(judged), "rows": done}))


if __name__ == "__main__":
    main()
