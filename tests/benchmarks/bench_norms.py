"""Stage 0 with each norm and shift, on scans of its own patients and of others: what is learned, and what carries over.

    python -m tests.benchmarks.bench_norms DATA OUT [--steps 1700] [--pairs norm,shift ...] [--set key=value ...]

DATA is a prepared dataset with train and val. Trains vae.json once for each pair, one after the other, and judges the
autoencoder, without codes, on whole scans: mean absolute error in HU over the body, and how much too bright fat is.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from app.dataset import prepared
from app.measures import hu_errors as measure
from app.tokens.tokenizer import dense_hu
from app.training import checkpoints
from tests.benchmarks.bench_real import DEVICE, ROOT, seen_by_both
from tests.benchmarks.timed_stages import environment_of_runs
from tests.benchmarks.timing import machine

PAIRS = ("sample,0.0157", "sample,0.25", "voxel,0.0157", "voxel,0.25")  # 4 voxels of 256, a quarter


def train(given: argparse.Namespace, norm: str, shift: str, place: Path) -> None:
    call = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", str(ROOT / "bundles/vae.json")]
    settings = {"norm": norm, "max_shift": shift, "max_steps": given.steps, "i_save": given.steps}
    settings |= {"dataset_dir": given.data.resolve(), "output_dir": place.resolve(), "preset": given.preset}
    settings |= {"max_points": 3_000_000, "learning_rate": 1e-3, "loss_type": "l1", "val_interval": given.steps}
    for name, value in [*settings.items(), *(word.split("=") for word in given.set)]:
        call += [f"--{name}", str(value)]
    subprocess.run(call, env=environment_of_runs(), check=True)


@torch.no_grad()
def judge(given: argparse.Namespace, place: Path) -> list[dict[str, object]]:
    """A row a scan, by the weights of the last step."""
    network = checkpoints.load_tokenizer(sorted((place / "ckpts").glob("vae_step*.pt"))[-1]).to(DEVICE)
    rows = []
    for split in prepared.SPLITS:
        for case in prepared.find_cases(given.data, split=split):
            truth, x = seen_by_both(case, network.sizes)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
                recon = network(x, quantize=False).recon
            made = dense_hu(recon.replace(recon.feats.float()), network.sizes)
            masks = measure.tissue_masks(truth, spacing=network.sizes.spacing)
            errors = measure.errors_in_hu(truth, made, masks, windows=network.sizes.windows)
            bias = float((made - truth)[masks["fat"]].mean())
            rows.append({"split": split, "case": case.case_id, "body": errors["foreground"]["mae"], "fat bias": bias})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--pairs", nargs="+", default=PAIRS, help="norm,shift")
    parser.add_argument("--set", nargs="*", default=(), help="flat keys as name=value, for all")
    given = parser.parse_args()
    found = {}
    for pair in given.pairs:
        place = given.out / pair.replace(",", "_")
        train(given, *pair.split(","), place)
        found[pair] = judge(given, place)
    print("| norm, max_shift | training scans | others | fat too bright by |\n|---|---|---|---|")
    for pair, rows in found.items():
        own = np.mean([row["body"] for row in rows if row["split"] == "train"])
        others = [row for row in rows if row["split"] == "val"]
        body, fat = ([f"{row[name]:.1f}" for row in others] for name in ("body", "fat bias"))
        print(f"| {pair} | {own:.1f} | {', '.join(body)} | {', '.join(fat)} |")
    print(json.dumps({"benchmark": "norms", **machine(DEVICE.type), "steps": given.steps, "rows": found}))


if __name__ == "__main__":
    main()
