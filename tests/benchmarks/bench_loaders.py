"""What it costs to get batches from loader processes: runs and mapped cache files against coordinates and files read.

    python -m tests.benchmarks.bench_loaders DATA [--workers 1] [--steps 40] [--turns 3]

DATA is a prepared dataset at 1.5 mm. Batches of two samples of at most 3 million voxels, drawn as stage files draw
them; a step takes each batch out of shared memory once, as pinning does. Both ways turn about, after an epoch that
fills the caches: ms a batch, of them the main process's own, and MB.
"""

import argparse
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

from app.training import data, loaders, voxel_runs
from networks.presets import preset
from tests.benchmarks.timing import finish
from transforms import RandCropToBudgetd, RandJitterd, RandTranslated, Windowsd


def dataset_of(place: Path) -> data.CTDataset:
    sizes = preset("base")
    return data.make_dataset(
        place,
        split="train",
        preprocessing=data.preprocessing(resolution=sizes.resolution, spacing=sizes.spacing, windows=sizes.windows),
        sampling=[RandTranslated(), RandCropToBudgetd(max_points=3_000_000), RandJitterd()],
        windowing=Windowsd(windows=sizes.windows),
    )


def as_coordinates(parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"coords": voxel_runs._numbered(parts)}


def turn(given: argparse.Namespace, *, plain: bool) -> dict[str, float]:
    dataset, read = dataset_of(given.data), data._read_cache
    skipped = len(dataset)  # batches of two: every case is read twice before
    with ExitStack() as patches:
        if plain:  # loader processes are forked, and do as this one
            patches.enter_context(mock.patch.object(loaders, "places_of", as_coordinates))
            patches.enter_context(mock.patch.object(data, "_read_cache", lambda file, mapped: read(file)))
        steps = skipped + given.steps
        loader = loaders.make_train_loader(dataset, batch_size=2, max_steps=steps, num_workers=given.workers)
        room, moved = torch.zeros(1 << 27, dtype=torch.uint8), 0
        for number, batch in enumerate(loader):
            if number == skipped:
                began, busy, moved = time.perf_counter(), time.process_time(), 0
            for name in {"coords", "runs", "values"} & batch.keys():
                flat = batch[name].permute(*reversed(range(batch[name].ndim))).reshape(-1)  # as it lies in memory
                room[: flat.nbytes].view(flat.dtype).copy_(flat)
                moved += flat.nbytes
        per_batch = 1e3 / given.steps
        ms, own = (time.perf_counter() - began) * per_batch, (time.process_time() - busy) * per_batch
        loader.close()
    return {"ms": ms, "main process ms": own, "MB": moved / given.steps / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    turns: dict[bool, list] = {True: [], False: []}
    for _ in range(given.turns):
        for plain, found in turns.items():
            found.append(turn(given, plain=plain))
    rows = []
    for plain, found in turns.items():
        medians = {key: statistics.median(one[key] for one in found) for key in found[0]}
        rows.append({"way": "coordinates, files read" if plain else "runs, files mapped", **medians})
    finish("loaders", rows, device="cpu", workers=given.workers)


if __name__ == "__main__":
    main()
