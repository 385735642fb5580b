"""Training on two cards against one: the same losses, then samples a second with the same batch a card.

    python -m tests.benchmarks.bench_ranks DATA OUT [--steps 200] [--preset base] [--set use_graphs=True]

Runs stage 0 as a user does, `bundles/multi_gpu.json` over it under torchrun, on the first two cards of
CUDA_VISIBLE_DEVICES; without cards it runs on the CPU. First two ranks with a sample each and one with both have to
tell the same losses, in float32. Then rates, by the second half of a run: before, kernels compile and loaders fill.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.timed_stages import environment_of_runs, logged_steps
from tests.benchmarks.timing import finish

ROOT = Path(__file__).resolve().parents[2]
SAME_STEPS = 12
TOLERANCE = 2e-3  # of a loss: sums in another order, through a dozen steps of Adam


def launched(place: Path, name: str, *, ranks: int, cards: list[str], settings: dict[str, Any], limit: float) -> Path:
    """The output folder of a run; ends with its last lines where it fails."""
    out = place / name
    shutil.rmtree(out, ignore_errors=True)
    files = [str(ROOT / "bundles" / f"{stage}.json") for stage in ("vae", *(["multi_gpu"] if ranks > 1 else []))]
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    call = [sys.executable]
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        call += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}"]
    call += ["-m", "monai.bundle", "run", "training", "--config_file", str(files) if ranks > 1 else files[0]]
    environment = environment_of_runs()
    if cards:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(cards[:ranks])
    started, log = time.perf_counter(), place / f"{name}.log"
    with open(log, "w") as said:
        process = subprocess.Popen(
            [*call, *words, "--output_dir", name], cwd=place, env=environment, stdout=said, stderr=subprocess.STDOUT
        )
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks
            status = process.wait(timeout=30)
    print(f"{name}: {time.perf_counter() - started:.0f} s, status {status}", file=sys.stderr, flush=True)
    if status:
        sys.exit(log.read_text()[-3000:])
    return out


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def rate(out: Path) -> float:
    steps, times = logged_steps(out / "log.txt")
    half = len(steps) // 2
    return (steps[-1] - steps[half]) / (times[-1] - times[half])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2, help="a card")
    parser.add_argument("--max-points", type=int, default=3_000_000)
    parser.add_argument("--workers", type=int, default=max(min(14, (os.cpu_count() or 2) // 2 - 2), 0), help="a card")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the stage, in all runs")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    cards = []
    if torch.cuda.device_count() >= 2:
        cards = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1").split(",")
    shared = {
        "dataset_dir": given.data.resolve(),
        "preset": given.preset,
        "max_points": given.max_points,
        "num_workers": given.workers,
        "learning_rate": 3e-4,
        **dict(pair.split("=", 1) for pair in given.set),
    }

    quiet = {"i_save": 10**6, "i_sample": 10**6, "val_interval": 10**6}
    exact = {**shared, **quiet, "max_steps": SAME_STEPS, "i_log": 1, "amp": "off"}
    told = {
        ranks: losses(
            launched(
                given.out,
                f"same{ranks}",
                ranks=ranks,
                cards=cards,
                settings={**exact, "batch_size_per_gpu": 2 // ranks},
                limit=300,
            )
        )
        for ranks in (1, 2)
    }
    worst = max(abs(a - b) / abs(a) for a, b in zip(told[1], told[2], strict=True))
    assert len(told[1]) == SAME_STEPS and worst < TOLERANCE, (worst, told)

    rows = []
    for ranks in (1, 2):
        settings = {**shared, **quiet, "max_steps": given.steps, "i_print": 10, "batch_size_per_gpu": given.batch}
        out = launched(given.out, f"rate{ranks}", ranks=ranks, cards=cards, settings=settings, limit=300)
        per_second = rate(out)
        rows.append({"cards": ranks, "batch a card": given.batch, "steps/s": per_second})
        rows[-1] |= {"samples/s": per_second * given.batch * ranks, "times one": None}
    for row in rows:
        row["times one"] = row["samples/s"] / rows[0]["samples/s"]
    device = "cuda" if cards else "cpu"
    finish(
        "ranks",
        rows,
        device=device,
        preset=given.preset,
        worst_loss_difference=worst,
        workers=given.workers,
        set=given.set,
    )


if __name__ == "__main__":
    main()
