"""The demo's tokenizer on phantoms it has never seen, beside 8x average pooling with trilinear enlargement.

    python tests/benchmarks/bench_demo.py outputs/vq_stage1 [--cases 24]

Both see the same voxels and are judged in the same windows: mean absolute error in HU, the truth clipped to the window.
The peer keeps a float a window for each 8x8x8 cell, the tokenizer 24 codes of 8 bits for all windows together. It
is run twice, on HU and on each window by itself; the better of the two is the one to beat.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from app.measures.tokenizer_metrics import perplexity
from app.phantoms.phantoms import make_phantom
from app.training.checkpoints import load_tokenizer
from app.training.step import shuffled_rows
from networks.sparse import SparseTensor
from transforms import Resampled, Sparsifyd, Windowsd
from transforms.windows import WINDOWS, window_values

FIRST_SEED = 1_000_000  # far from any seed of the cohort


def pooled(grid: torch.Tensor) -> torch.Tensor:
    """(C, X, Y, Z) by an eighth and back."""
    small = F.avg_pool3d(grid[None], 8)
    return F.interpolate(small, scale_factor=8, mode="trilinear", align_corners=False)[0]


def judge(case: dict, network) -> tuple[dict[str, np.ndarray], torch.Tensor]:
    """Per method the mean absolute error of each window on one case, in features of -1..1."""
    names = network.sizes.windows
    at = torch.from_numpy(case["coords"]).long()
    truth, hu = torch.from_numpy(case["feats"]), torch.from_numpy(case["values"]).float()
    x, y, z = at.unbind(1)

    dense_hu = torch.full((1, *case["spatial_shape"]), -1000.0)
    dense_hu[0, x, y, z] = hu
    from_hu = torch.from_numpy(window_values(pooled(dense_hu)[0, x, y, z].numpy(), names))
    dense_windows = torch.full((len(names), *case["spatial_shape"]), -1.0)
    dense_windows[:, x, y, z] = truth.T
    from_windows = pooled(dense_windows)[:, x, y, z].T

    coords = torch.cat([torch.zeros_like(at[:, :1]), at], 1)
    tensor = SparseTensor(truth, coords, case["spatial_shape"], 1)
    output = network(tensor)
    values = network.vq.lookup(output.codes)
    mixed, _ = network.decode_on(output.latents.replace(shuffled_rows(values, output.latents)), tensor.level)
    errors = {
        "pooled HU": (from_hu - truth).abs().mean(0),
        "pooled windows": (from_windows - truth).abs().mean(0),
        "tokenizer": (output.recon.feats - tensor.feats).abs().mean(0),
        "codes shuffled": (mixed.feats - tensor.feats).abs().mean(0),
    }
    return {name: error.numpy() for name, error in errors.items()}, output.codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", help="checkpoint or output folder")
    parser.add_argument("--cases", type=int, default=24)
    options = parser.parse_args()
    network = load_tokenizer(options.tokenizer)
    sizes = network.sizes
    chain = [
        Resampled("image", spacing=sizes.spacing, grid=sizes.resolution),
        Sparsifyd("image", keep=sizes.keep, windows=sizes.windows),
        Windowsd("values", windows=sizes.windows),
    ]
    totals: dict[str, np.ndarray] = {}
    counts = torch.zeros(sizes.num_embeddings)
    tokens = voxels = 0
    with torch.no_grad():
        for seed in range(FIRST_SEED, FIRST_SEED + options.cases):
            phantom = make_phantom(seed)
            case = {"image": phantom.hu, "affine": phantom.affine}
            for transform in chain:
                case = transform(case)
            errors, codes = judge(case, network)
            totals = {name: totals.get(name, 0) + error for name, error in errors.items()}
            counts += torch.bincount(codes.flatten(), minlength=len(counts))
            tokens, voxels = tokens + len(codes), voxels + len(case["coords"])

    half_widths = np.array([WINDOWS[name][0] / 2 for name in sizes.windows])
    mae = {name: total / options.cases * half_widths for name, total in totals.items()}
    assert all(np.isfinite(values).all() for values in mae.values())
    print(f"{'MAE in HU':16}" + "".join(f"{name:>14}" for name in sizes.windows))
    for name, values in mae.items():
        print(f"{name:16}" + "".join(f"{value:14.1f}" for value in values))
    best = np.minimum(mae["pooled HU"], mae["pooled windows"])
    result = {
        "benchmark": "demo",
        "cases": options.cases,
        "mae_hu": {name: [round(float(v), 2) for v in values] for name, values in mae.items()},
        "ratio_to_pooling": [round(float(v), 3) for v in mae["tokenizer"] / best],
        "shuffled_over_true": round(float(totals["codes shuffled"].mean() / totals["tokenizer"].mean()), 3),
        "perplexity": round(perplexity(counts), 1),
        "tokens_per_case": round(tokens / options.cases, 1),
        "voxels_per_case": round(voxels / options.cases, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
