"""Prepared cases as samples: the dataset with its cache, the sampler that hands out (step, index), the one collate.

What a case becomes before chance enters (`preprocessing`) is computed once and cached; what is drawn anew (`sampling`)
is a function of (seed, step, case), so a resumed run sees the samples of the run it resumes. Batches are dicts of plain
tensors: `feats` (N, C), `coords` (N, 4), `hu` (N,) where HU are known, `spatial_shape`, `batch_size`, `case_id`.
"""

import contextlib
import hashlib
import json
import logging
import os
import pickle
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import numpy as np
import torch
from monai.transforms import Compose
from torch import distributed
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from app.prepared import PreparedCase, find_cases, windows_are_masks, windows_as_hu
from transforms import RandCropToBudgetd, RandJitterd, RandTranslated, Resampled, Sparsifyd, Windowsd
from transforms.array import DEFAULT_WINDOWS

log = logging.getLogger(__name__)
CACHE_FORMAT = 1  # raised when a cached item changes its meaning
Transform = Callable[[dict[str, Any]], dict[str, Any]]


def preprocessing(
    *, resolution: int, spacing: int | float, keep: str = "body", windows: Sequence[str] = DEFAULT_WINDOWS
) -> list[Transform]:
    """From a dense volume to kept voxels; the same every time, so it is cached."""
    return [Resampled("image", spacing=spacing, grid=resolution), Sparsifyd("image", keep=keep, windows=windows)]


def sampling(
    *,
    windows: Sequence[str] = DEFAULT_WINDOWS,
    augment: bool = False,
    max_points: int | None = None,
    crop: int | None = None,
) -> list[Transform]:
    """From kept voxels to features; moved before cropped, so that crops start at multiples of eight."""
    chain: list[Transform] = [RandTranslated()] if augment else []
    if max_points is not None or crop is not None:
        chain.append(RandCropToBudgetd(max_points=max_points, max_side=crop))
    if augment:
        chain.append(RandJitterd())  # after the crop: noise for voxels that are cut off is time lost
    return [*chain, Windowsd("values", windows=windows)]


class CTDataset(Dataset):
    """Prepared cases as sparse samples.

    An index is a case's number, or (step, number): the step seeds what is drawn. A case of fewer than `min_points`
    voxels is skipped: the next one stands in for it.
    """

    def __init__(
        self,
        cases: Sequence[PreparedCase],
        *,
        preprocessing: Sequence[Transform],
        sampling: Sequence[Transform],
        min_points: int = 100,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        cache_bytes: int = 1 << 29,
    ) -> None:
        if not cases:
            raise ValueError("dataset has no case: give a dataset_dir that `python -m app check` finds in order")
        self.cases = list(cases)
        self.preprocessing, self.sampling = list(preprocessing), Compose(list(sampling))
        self.windows = next((t.windows for t in sampling if isinstance(t, Windowsd)), DEFAULT_WINDOWS)
        self.min_points, self.seed = min_points, seed
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._settings = _settings_of(preprocessing)
        self._skipped: set[str] = set()
        self._memory: dict[int, dict[str, Any]] = {}
        self._memory_left = cache_bytes  # in each process: what does not fit is read from the disk again
        for case in self.cases:
            missing = [name for name in self.windows if name not in case.window_names()]
            if missing:
                case.window(missing[0])  # raises, naming what there is

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int | tuple[int, int]) -> Any:
        return _or_refusal(lambda: self._sample(index))

    def _sample(self, index: int | tuple[int, int]) -> dict[str, Any]:
        step, number = (0, index) if isinstance(index, int) else index
        for offset in range(len(self.cases)):
            case = self.cases[(number + offset) % len(self.cases)]
            item = self._draw((number + offset) % len(self.cases), step)
            if len(item["coords"]) >= self.min_points:
                item["skipped"] = offset
                return item
            if case.case_id not in self._skipped:  # said once, not at every step
                self._skipped.add(case.case_id)
                log.warning("Skipped %s: %d points, min_points %d", case.case_id, len(item["coords"]), self.min_points)
        raise ValueError(
            f"every case has fewer than min_points={self.min_points} voxels (the last has {len(item['coords'])}); "
            "lower min_points or check spacing, resolution and keep"
        )

    def _draw(self, number: int, step: int) -> dict[str, Any]:
        case = self.cases[number]
        mix = np.random.SeedSequence([self.seed, step, zlib.crc32(case.case_id.encode())])
        self.sampling.set_random_state(seed=int(mix.generate_state(1)[0]))
        kept = self.kept(number)
        item: dict[str, Any] = {key: v.numpy() if isinstance(v, torch.Tensor) else v for key, v in kept.items()}
        for transform in self.sampling.transforms:  # not Compose's call: it hides a refusal behind a RuntimeError
            item = transform(item)
        feats = item["feats"]
        if len(feats) >= self.min_points and _constant(feats):
            raise ValueError(
                f"case {case.case_id} has constant features in windows {list(self.windows)}: nothing can be learned "
                "from them; choose other windows or another keep, and see `python -m app check`"
            )
        result = {
            "feats": torch.from_numpy(np.ascontiguousarray(feats, np.float32)),
            "coords": torch.from_numpy(np.ascontiguousarray(item["coords"], np.int32)),
            "spatial_shape": tuple(item["spatial_shape"]),
            "case_id": case.case_id,
            "affine": torch.from_numpy(item["affine"]),
        }
        if item["values"].ndim == 1:
            result["hu"] = torch.from_numpy(np.ascontiguousarray(item["values"], np.float32))
        return result

    def kept(self, number: int) -> dict[str, Any]:
        """The cached part of a case: coords int16 (N, 3), values int16 HU (N,) or float (N, C), shape and affine."""
        if number in self._memory:
            return self._memory[number]
        case = self.cases[number]
        file = self._cache_file(case)
        item = None if file is None else _read_cache(file)
        if item is None:
            item = self._prepare(case)
            if file is not None:
                self._write_cache(file, item)
        size = sum(value.nbytes for value in item.values() if isinstance(value, torch.Tensor))
        if size <= self._memory_left:
            self._memory[number] = item
            self._memory_left -= size
        return item

    def _prepare(self, case: PreparedCase) -> dict[str, Any]:
        """Reads a case and runs the deterministic part: tensors, numbers and tuples only, which a cache can hold."""
        if case.is_hu:
            source: dict[str, Any] = {"image": case.hu(), "affine": case.affine}
        elif windows_are_masks(case, self.windows):
            stack = np.stack([np.asarray(case.window(name)) > 0 for name in self.windows], -1)
            source = {"image": stack, "affine": case.affine}
        else:
            source = {"image": windows_as_hu(case, self.windows), "affine": case.affine}
        item = source
        for transform in self.preprocessing:
            item = transform(item)
        return {
            "coords": torch.from_numpy(np.ascontiguousarray(item["coords"])),
            "values": torch.from_numpy(np.ascontiguousarray(item["values"])),
            "spatial_shape": tuple(item["spatial_shape"]),
            "affine": torch.from_numpy(np.array(item["affine"], np.float64)),
        }

    # ---- the cache on disk

    def _cache_file(self, case: PreparedCase) -> Path | None:
        if self.cache_dir is None:
            return None
        key = {
            "source": case.source_hash,
            "case": [case.dataset, case.case_id],
            "preprocessing": self._settings,
            "windows": None if case.is_hu else list(self.windows),
            "format": CACHE_FORMAT,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.cache_dir / f"{case.case_id}.{digest[:24]}.pt"

    def _write_cache(self, file: Path, item: dict[str, Any]) -> None:
        beside = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(item, beside)
            beside.replace(file)
        except OSError as error:
            with contextlib.suppress(OSError):
                beside.unlink()
            log.warning("Cache folder %s cannot be written (%s): going on without it", self.cache_dir, error)
            self.cache_dir = None

    def summary(self, *, num_workers: int = 0) -> dict[str, Any]:
        """Every case once: how many, how many would be skipped, points and the share of the grid dropped."""
        points = _count_points(self, range(len(self)), num_workers=num_workers)
        grid = float(np.prod(self.kept(0)["spatial_shape"]))
        return {
            "cases": len(points),
            "skipped": sum(count < self.min_points for count in points),
            "points_min": min(points),
            "points_median": float(np.median(points)),
            "points_max": max(points),
            "share_dropped": 1 - float(np.mean(points)) / grid,
        }


def _constant(feats: np.ndarray) -> bool:
    """Whether all rows are the same; nearly always the first few tell that they are not."""
    return all(bool((part == feats[0]).all()) for part in (feats[:1000], feats))


def _settings_of(transforms: Sequence[Transform]) -> dict[str, Any]:
    """What the deterministic transforms are set to; only those that can say so may feed a cache."""
    settings: dict[str, Any] = {}
    for transform in transforms:
        if not hasattr(transform, "settings"):
            raise ValueError(f"{type(transform).__name__} has no `settings`: a cached part cannot tell when it changes")
        settings.update(transform.settings)
    return settings


def _read_cache(file: Path) -> dict[str, Any] | None:
    """The stored item, or None where there is none or it is damaged: it is then made again."""
    if not file.is_file():
        return None
    try:
        return torch.load(file, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        log.warning("Cached item %s is damaged and is made again", file.name)
        return None


# ---- order


class StepSampler(Sampler):
    """Hands out (step, index) for the steps `start` to `max_steps` of one rank.

    The cases come in a new order every epoch, a pure function of (seed, epoch); ranks share an epoch without overlap.
    """

    def __init__(
        self,
        num_cases: int,
        *,
        batch_size: int,
        max_steps: int,
        seed: int = 0,
        start: int = 0,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        if num_cases < 1 or batch_size < 1:
            raise ValueError(f"cases and batch_size must be at least 1, got {num_cases} and {batch_size}")
        running = distributed.is_available() and distributed.is_initialized()
        self.rank = rank if rank is not None else (distributed.get_rank() if running else 0)
        self.world = world if world is not None else (distributed.get_world_size() if running else 1)
        self.num_cases, self.batch_size, self.max_steps, self.seed = num_cases, batch_size, max_steps, seed
        self.start = start

    def __len__(self) -> int:
        return max(0, self.max_steps - self.start) * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order, order_epoch = None, -1
        for step in range(self.start, self.max_steps):
            for slot in range(self.batch_size):
                place = (step * self.world + self.rank) * self.batch_size + slot
                epoch, offset = divmod(place, self.num_cases)
                if epoch != order_epoch:
                    order, order_epoch = self.order(epoch), epoch
                yield step, int(order[offset])

    def order(self, epoch: int) -> np.ndarray:
        """The cases of an epoch in the order they are handed out."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_cases)


# ---- batches


def collate(items: Sequence[Any], *, batch_split: int = 1) -> Any:
    """Samples to one batch, or with `batch_split` > 1 to a list of micro-batches, split by sample."""
    for item in items:
        if isinstance(item, Refusal):
            return item
    if batch_split > 1:
        parts = np.array_split(np.arange(len(items)), min(batch_split, len(items)))
        return [collate([items[i] for i in part]) for part in parts]
    shapes = {item["spatial_shape"] for item in items}
    if len(shapes) != 1:
        raise ValueError(f"samples of a batch must share a grid, got {sorted(shapes)}")
    coords = [torch.nn.functional.pad(item["coords"], (1, 0), value=i) for i, item in enumerate(items)]
    batch = {
        "feats": torch.cat([item["feats"] for item in items]),
        "coords": torch.cat(coords),
        "spatial_shape": items[0]["spatial_shape"],
        "batch_size": len(items),
        "case_id": [item["case_id"] for item in items],
        "affine": torch.stack([item["affine"] for item in items]),
        "skipped": sum(item["skipped"] for item in items),
    }
    if all("hu" in item for item in items):
        batch["hu"] = torch.cat([item["hu"] for item in items])
    return batch


def make_train_loader(
    dataset: CTDataset,
    *,
    batch_size: int,
    max_steps: int,
    start: int = 0,
    batch_split: int = 1,
    num_workers: int = 0,
) -> DataLoader:
    """One long epoch of `max_steps` batches; `loader.sampler.start` may be set before it is iterated."""
    sampler = StepSampler(len(dataset), batch_size=batch_size, max_steps=max_steps, seed=dataset.seed, start=start)
    return _loader(dataset, sampler, batch_size=batch_size, batch_split=batch_split, num_workers=num_workers)


def make_val_loader(dataset: CTDataset, *, batch_size: int = 1, num_workers: int = 0) -> DataLoader:
    """Every case once, in order, whole; each rank takes its share."""
    running = distributed.is_available() and distributed.is_initialized()
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if running else (0, 1)
    share = range(rank, len(dataset), world)
    counts = _count_points(dataset, share, num_workers=num_workers)
    numbers = [number for number, count in zip(share, counts, strict=True) if count >= dataset.min_points]
    if len(numbers) < len(share):
        left_out = len(share) - len(numbers)
        log.warning("Validation skips %d of %d cases: under min_points %d", left_out, len(share), dataset.min_points)
    if idist.all_reduce(len(numbers), op="MIN") == 0:  # a rank without any would leave the others waiting
        raise ValueError(
            f"the val split must give each of {world} processes a case of at least min_points={dataset.min_points} "
            f"voxels, it has {len(dataset)} cases; give more val cases, lower min_points or start fewer processes"
        )
    return _loader(dataset, numbers, batch_size=batch_size, batch_split=1, num_workers=num_workers)


class _Points(Dataset):
    """How many voxels each case keeps; counting them fills the cache."""

    def __init__(self, dataset: CTDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, number: int) -> Any:
        return _or_refusal(lambda: len(self.dataset.kept(number)["coords"]))


def _count_points(dataset: CTDataset, numbers: Sequence[int], *, num_workers: int) -> list[int]:
    options = {"num_workers": num_workers, "generator": torch.Generator()}
    return [int(count) for count in CaseLoader(_Points(dataset), batch_size=None, sampler=numbers, **options)]


class Refusal(NamedTuple):
    """A ValueError on its way out of a worker, where torch would bury its line under a trace."""

    text: str


def _or_refusal(make: Callable[[], Any]) -> Any:
    if get_worker_info() is None:
        return make()
    try:
        return make()
    except ValueError as error:
        return Refusal(str(error))


class CaseLoader(DataLoader):
    """A DataLoader that raises a worker's refusal as what it is."""

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if isinstance(batch, Refusal):
                raise ValueError(batch.text)
            yield batch

    def close(self) -> None:
        """Lets the workers go while the interpreter is whole: left to its exit, each can take seconds to give up."""
        self._iterator = None


def _loader(dataset: CTDataset, sampler: Any, *, batch_size: int, batch_split: int, num_workers: int) -> DataLoader:
    return CaseLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=partial(collate, batch_split=batch_split),
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else every new iterator draws from the run's own
    )


def make_dataset(
    dataset_dir: str | Path,
    *,
    split: str,
    preprocessing: Sequence[Transform],
    sampling: Sequence[Transform],
    min_points: int = 100,
    seed: int = 0,
) -> CTDataset:
    """The cases of one side of a prepared dataset, cached beside it."""
    cases = find_cases(dataset_dir, split=split)
    if not cases:
        raise ValueError(
            f"dataset_dir {str(dataset_dir)!r} has no case with split {split!r}: name some in the column split "
            "of its metadata.csv, or prepare it with --split"
        )
    mark = hashlib.sha256(json.dumps([[case.case_id, case.source_hash] for case in cases]).encode()).hexdigest()
    if len(set(idist.all_gather(mark))) > 1:
        raise ValueError(
            f"dataset_dir {str(dataset_dir)!r} does not hold the same cases for every process; give all the same data"
        )
    return CTDataset(
        cases,
        preprocessing=preprocessing,
        sampling=sampling,
        min_points=min_points,
        seed=seed,
        cache_dir=Path(dataset_dir) / ".cache",
    )
