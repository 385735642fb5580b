"""Stage 0 with one setting changed at a time: what is learned, and what carries over to people not trained on.

    python -m tests.benchmarks.bench_stage0 DATA OUT --rows plain grain:grain=15 few:people=8 [--steps 1300]
        [--judged NAME ...] [--beside 2] [--set key=value ...]

DATA is a prepared dataset with train and val. A row is NAME:key=value,key=value: flat keys of vae.json, or `people=N`
(the first N of a fixed order that takes from each dataset in turn), `without=NAME+NAME` (scans left out of training),
`times=DATASET+3` (its scans come three times as often). Each row trains vae.json once; the autoencoder, without codes,
is judged on whole scans of val and on those named by --judged: mean absolute error and root mean square in HU.
"""

import argparse
import csv
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from app.dataset import prepared
from app.measures import hu_errors as measure
from app.tokens.tokenizer import dense_hu
from app.training import checkpoints
from tests.benchmarks.bench_real import DEVICE, ROOT, seen_by_both
from tests.benchmarks.timed_stages import environment_of_runs
from tests.benchmarks.timing import machine


class Row(NamedTuple):
    name: str
    settings: dict[str, str]  # flat keys of vae.json
    people: int | None = None
    without: frozenset[str] = frozenset()
    times: tuple[str, int] | None = None


def parse_row(words: str) -> Row:
    name, _, rest = words.partition(":")
    settings = dict(word.split("=", 1) for word in rest.split(",") if word)
    people, without = settings.pop("people", None), settings.pop("without", "")
    dataset, _, count = settings.pop("times", "").partition("+")
    times = (dataset, int(count)) if dataset else None
    return Row(name, settings, int(people) if people else None, frozenset(filter(None, without.split("+"))), times)


def trained_on(data: Path, row: Row) -> list[str]:
    """Names of the training scans of a row."""
    by_dataset: dict[str, list[str]] = {}
    for case in prepared.find_cases(data, split="train"):
        by_dataset.setdefault(case.dataset, []).append(case.case_id)
    mixed = [sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest()) for names in by_dataset.values()]
    in_turn = [name for name in chain.from_iterable(zip_longest(*mixed)) if name and name not in row.without]
    return in_turn[: row.people]


def write_dataset(data: Path, row: Row, place: Path) -> None:
    """The cases of DATA by reference, with the row's own training scans."""
    names = set(trained_on(data, row))
    for source in sorted({case.path.parent.parent for case in prepared.find_cases(data)}):
        copies = row.times[1] if row.times and row.times[0] == source.name else 1
        for copy in range(copies):
            target = place / (source.name if copy == 0 else f"{source.name}_{copy}")
            target.mkdir(parents=True)
            (target / "processed").mkdir()
            shutil.copy(source / "dataset_config.json", target)
            with (source / "metadata.csv").open() as file:
                lines = list(csv.DictReader(file))
            kept = [line for line in lines if line["case_id"] in names or (line["split"] == "val" and copy == 0)]
            if not kept:
                shutil.rmtree(target)
                continue
            for line in kept:  # a folder that the table does not name would be trained on
                (target / "processed" / line["case_id"]).symlink_to((source / "processed" / line["case_id"]).resolve())
            with (target / "metadata.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, lines[0])
                writer.writeheader()
                writer.writerows(kept)


def train(given: argparse.Namespace, row: Row, place: Path) -> None:
    call = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", str(ROOT / "bundles/vae.json")]
    settings: dict[str, Any] = {"max_steps": given.steps, "i_save": given.steps, "val_interval": given.steps}
    settings |= {"dataset_dir": (place / "data").resolve(), "output_dir": (place / "vae").resolve()}
    settings |= {"preset": given.preset, "max_points": 3_000_000, "learning_rate": 1e-3, "i_sample": given.steps}
    settings |= dict(word.split("=", 1) for word in given.set) | row.settings
    for name, value in settings.items():
        call += [f"--{name}", str(value)]
    with (place / "train.log").open("w") as log:
        subprocess.run(call, env=environment_of_runs(), check=True, stdout=log, stderr=subprocess.STDOUT)


@torch.no_grad()
def judge(given: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    """A row a scan, by the weights of the last step."""
    network = checkpoints.load_tokenizer(sorted((place / "vae/ckpts").glob("vae_step*.pt"))[-1]).to(DEVICE)
    rows = []
    for case in prepared.find_cases(given.data):
        if case.split != "val" and case.case_id not in given.judged:
            continue
        truth, x = seen_by_both(case, network.sizes)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            recon = network(x, quantize=False).recon
        decoded = dense_hu(recon.replace(recon.feats.float()), network.sizes)
        masks = measure.tissue_masks(truth, spacing=network.sizes.spacing)
        errors = measure.errors_in_hu(truth, decoded, masks, windows=network.sizes.windows)
        by_tissue = {name: error for name, error in errors.items() if name != "air"}
        fat = masks["fat"]
        bias = float((decoded - truth)[fat].mean()) if fat.any() else None
        rows.append({"case": case.case_id, "dataset": case.dataset, "split": case.split, "fat bias": bias, **by_tissue})
    return rows


def run_row(given: argparse.Namespace, words: str) -> tuple[Row, list[dict[str, Any]]]:
    row = parse_row(words)
    place = given.out / row.name
    if (place / "rows.json").is_file():
        return row, json.loads((place / "rows.json").read_text())
    shutil.rmtree(place, ignore_errors=True)
    write_dataset(given.data, row, place / "data")
    train(given, row, place)
    judged = judge(given, place)
    (place / "rows.json").write_text(json.dumps(judged))
    print(row.name, *summary(judged).items(), flush=True)
    return row, judged


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    """MAE / RMSE over the body, mean over the scans of each dataset and split."""
    groups: dict[str, list] = {}
    for row in rows:
        groups.setdefault(f"{row['dataset']} {row['split']}", []).append(row["foreground"])
    means = {
        name: [np.mean([error[key] for error in group]) for key in ("mae", "rmse")] for name, group in groups.items()
    }
    return {name: f"{mae:.1f} / {rmse:.1f}" for name, (mae, rmse) in sorted(means.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", nargs="+", required=True, help="NAME:key=value,key=value")
    parser.add_argument("--judged", nargs="*", default=(), help="training scans that are judged as well")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--beside", type=int, default=1, help="rows trained at the same time")
    parser.add_argument("--set", nargs="*", default=(), help="flat keys as name=value, for all")
    given = parser.parse_args()
    with ThreadPoolExecutor(given.beside) as pool:
        done = list(pool.map(partial(run_row, given), given.rows))
    groups = sorted({group for _, judged in done for group in summary(judged)})
    print(f"| row | people | {' | '.join(groups)} |\n|---|---|{'---|' * len(groups)}")
    for row, judged in done:
        cells = [summary(judged).get(group, "") for group in groups]
        print(f"| {row.name} | {len(trained_on(given.data, row))} | {' | '.join(cells)} |")
    found = {row.name: judged for row, judged in done}
    print(json.dumps({"benchmark": "stage0", **machine(DEVICE.type), "steps": given.steps, "rows": found}))


if __name__ == "__main__":
    main()
