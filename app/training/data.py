"""Prepared cases as samples: the dataset with its cache. loaders.py hands them out.

What a case becomes before chance enters (`preprocessing`) is computed once and cached; what is drawn anew (`sampling`)
is a function of (seed, step, case), so a resumed run sees the samples of the run it resumes.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import numpy as np
import torch
from monai.transforms import Compose
from torch.utils.data import Dataset, get_worker_info

from app.dataset.prepared import PreparedCase, common_grid, find_cases, windows_are_masks, windows_as_hu
from app.shared.atomic_files import written_whole
from transforms import Resampled, Sparsifyd, Windowsd
from transforms.acquisition import whole_hu
from transforms.grid import CUT_OFF
from transforms.runs import Runs
from transforms.windows import DEFAULT_WINDOWS

log = logging.getLogger(__name__)
CACHE_FORMAT = 4  # raised when a cached item changes its meaning, or how it lies in memory
CACHED = {"begins", "lengths", "values", "spatial_shape", "affine", "beyond"}  # what a file holds of an item
PHANTOMS = "outputs/phantoms"
MAX_INT16_SIDE = 2**15 - 1  # voxels: coordinates travel as int16
Transform = Callable[[dict[str, Any]], dict[str, Any]]


def preprocessing(
    *, resolution: int, spacing: int | float, keep: str = "body", windows: Sequence[str] = DEFAULT_WINDOWS
) -> list[Transform]:
    """From a dense volume to kept voxels; the same every time, so it is cached."""
    return [Resampled("image", spacing=spacing, grid=resolution), Sparsifyd("image", keep=keep, windows=windows)]


class CTDataset(Dataset):
    """Prepared cases as sparse samples: `coords` as `Runs` and `values`, whole HU int16 (N,) or features (N, C).

    `windowing` makes features of HU, later and on the device (see step.SparseBatch). Here it says which windows a case
    must have, and whether what it gives is constant.

    An index is a case's number, or (step, number): the step seeds what is drawn. A case of fewer than `min_points`
    voxels is skipped: the next one stands in for it.
    """

    def __init__(
        self,
        cases: Sequence[Any],  # PreparedCases, or what a subclass reads
        *,
        preprocessing: Sequence[Transform],
        sampling: Sequence[Transform] = (),
        windowing: Windowsd | None = None,
        min_points: int = 100,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        cache_bytes: int = 1 << 29,
    ) -> None:
        if not cases:
            raise ValueError("dataset has no case: give a dataset_dir that `python -m app check` finds in order")
        self.cases = list(cases)
        self.windowing = Windowsd() if windowing is None else windowing
        self.windows = self.windowing.windows
        self.preprocessing, self.sampling = list(preprocessing), Compose(list(sampling))
        self.min_points, self.seed = min_points, seed
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._settings = _settings_of(preprocessing)
        self._skipped: set[str] = set()
        self._has_warned_of_cut = False
        self._memory: dict[Hashable, dict[str, Any]] = {}
        self._memory_left = cache_bytes  # in each process, for what no file keeps: what does not fit is made again
        self._whole: set[int] = set()  # cases whose cache file this process wrote, or read and checked
        for case in self.cases:
            missing = [name for name in self.windows if name not in case.window_names()]
            if missing:
                case.window(missing[0])  # raises, naming what there is

    @property
    def grid(self) -> tuple[int, float] | None:
        """The grid that its cases were prepared on, for raw scans to come; None where they lie on several."""
        return common_grid(self.cases)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int | tuple[int, int]) -> Any:
        return or_refusal(lambda: self._sample(index))

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
        item = self._sampled(dict(self.kept_voxels(number)), case.case_id, step)
        if max(item["spatial_shape"]) > MAX_INT16_SIDE:
            raise ValueError(
                f"sides of a grid must be at most {MAX_INT16_SIDE} voxels, got {tuple(item['spatial_shape'])}"
            )
        rows = item["feats" if "feats" in item else "values"]
        if len(rows) >= self.min_points and self._is_constant(rows):
            raise ValueError(
                f"case {case.case_id} has constant features in windows {list(self.windows)}: nothing can be learned "
                "from them; choose other windows or another keep, and see `python -m app check`"
            )
        return {
            "coords": Runs.of(item["coords"]),
            "values": torch.from_numpy(whole_hu(rows) if rows.ndim == 1 else np.ascontiguousarray(rows, np.float32)),
            "spatial_shape": tuple(item["spatial_shape"]),
            "case_id": case.case_id,
            "affine": torch.from_numpy(item["affine"]),
        }

    def _sampled(self, item: dict[str, Any], case_id: str, step: int) -> dict[str, Any]:
        """With what is drawn for a case at a step."""
        mix = np.random.SeedSequence([self.seed, step, zlib.crc32(case_id.encode())])
        self.sampling.set_random_state(seed=int(mix.generate_state(1)[0]))
        for transform in self.sampling.transforms:  # not Compose's call: it hides a refusal behind a RuntimeError
            item = transform(item)
        return item

    def _is_constant(self, rows: np.ndarray) -> bool:
        """Whether all rows have the same features; the first thousand nearly always differ already."""
        for part in (rows[:1000], rows):
            feats = self.windowing({"values": part})["feats"]
            if not (feats == feats[0]).all():
                return False
        return True

    def kept_voxels(self, number: int) -> dict[str, Any]:
        """The cached part of a case: coords as runs, values int16 HU (N,) or float (N, C), shape and affine."""
        if number in self._memory:
            return self._memory[number]
        case = self.cases[number]
        file = self._cache_file(case)
        item = None if file is None else _read_cache(file, mapped=number in self._whole)
        if item is None:
            item = self._prepare(case)
            if file is not None:
                self._write_cache(file, item)
        self._whole.add(number)
        self._warn_of_cut(case, item)
        if self.cache_dir is None:
            self._remember(number, item)
        return item

    def _remember(self, key: Hashable, item: dict[str, Any]) -> None:
        """Keeps an item in memory as long as `cache_bytes` are not used up."""
        size = item["coords"].nbytes + item["values"].nbytes
        if size <= self._memory_left:
            self._memory[key] = item
            self._memory_left -= size

    def _warn_of_cut(self, case: PreparedCase, item: dict[str, Any]) -> None:
        """Once, for the first case that is larger than the grid: a cohort may have thousands."""
        worker = get_worker_info()
        if self._has_warned_of_cut or item["beyond"] < CUT_OFF or (worker is not None and worker.id > 0):
            return
        self._has_warned_of_cut = True
        log.warning(
            "FOV_CROPPED: %.1f %% of what is denser than air in %s lies beyond the grid and is cut off; where that is "
            "patient and not table, train with a larger spacing or resolution (said of the first such case)",
            100 * item["beyond"],
            case.case_id,
        )

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
            "coords": Runs.of(item["coords"]),
            "values": np.ascontiguousarray(item["values"]),
            "spatial_shape": tuple(item["spatial_shape"]),
            "affine": np.array(item["affine"], np.float64),
            "beyond": float(item.get("beyond", 0.0)),
        }

    # ---- the cache on disk

    def _cache_file(self, case: PreparedCase) -> Path | None:
        if self.cache_dir is None:
            return None
        key = {
            "content": case.content_hash,
            "case": [case.dataset, case.case_id],
            "preprocessing": self._settings,
            "windows": None if case.is_hu else list(self.windows),
            "format": CACHE_FORMAT,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.cache_dir / f"{case.case_id}.{digest[:24]}.pt"

    def _write_cache(self, file: Path, item: dict[str, Any]) -> None:
        try:
            with written_whole(file) as beside:
                torch.save(_as_stored(item), beside)
        except OSError as error:
            log.warning("Cache folder %s cannot be written (%s): going on without it", self.cache_dir, error)
            self.cache_dir = None


def _settings_of(transforms: Sequence[Transform]) -> dict[str, Any]:
    """What the deterministic transforms are set to; only those that can say so may feed a cache."""
    settings: dict[str, Any] = {}
    for transform in transforms:
        if not hasattr(transform, "settings"):
            raise ValueError(f"{type(transform).__name__} has no `settings`: a cached part cannot tell when it changes")
        settings.update(transform.settings)
    return settings


def _as_stored(item: dict[str, Any]) -> dict[str, Any]:
    """Tensors, numbers and tuples alone, which a file may hold."""
    runs, arrays = item["coords"], ("values", "affine")
    told = {"begins": runs.begins, "lengths": runs.lengths, **{name: item[name] for name in arrays}}
    others = {name: item[name] for name in item.keys() - {"coords", *arrays}}
    return {**others, **{name: torch.from_numpy(array) for name, array in told.items()}}


def _as_kept(stored: dict[str, Any]) -> dict[str, Any]:
    item = {key: part.numpy() if isinstance(part, torch.Tensor) else part for key, part in stored.items()}
    return {"coords": Runs(item.pop("begins"), item.pop("lengths")), **item}


def _read_cache(file: Path, *, mapped: bool = False) -> dict[str, Any] | None:
    """The stored item, or None where there is none or it is damaged: it is then made again.

    `mapped`: its pages are the file's own, which all processes share; nothing is copied and nothing checked.
    """
    if not file.is_file():
        return None
    try:
        item = torch.load(file, weights_only=True, mmap=mapped)
        if set(item) >= CACHED:
            return _as_kept(item)
    except Exception as error:  # damaged bytes may lead torch and pickle anywhere
        log.debug("%s: %s", file.name, error)
    log.warning("Cached item %s is damaged and is made again", file.name)
    return None


class Refusal(NamedTuple):
    """A ValueError on its way out of a worker, where torch would bury its line under a trace."""

    error: ValueError


def or_refusal(make: Callable[[], Any]) -> Any:
    if get_worker_info() is None:
        return make()
    try:
        return make()
    except ValueError as error:
        return Refusal(error)


def make_dataset(
    dataset_dir: str | Path | None,
    *,
    split: str,
    preprocessing: Sequence[Transform],
    sampling: Sequence[Transform] = (),
    windowing: Windowsd | None = None,
    min_points: int = 100,
    seed: int = 0,
) -> CTDataset:
    """The cases of one side of a prepared dataset, cached beside it; without one, of the built-in phantoms."""
    if dataset_dir is None:
        from app.phantoms.phantoms import ensure_cohort  # brings all of `prepare`, which data of one's own need not

        dataset_dir = ensure_cohort(PHANTOMS)
    cases = find_cases(dataset_dir, split=split)
    if not cases:
        raise ValueError(
            f"dataset_dir {str(dataset_dir)!r} has no case with split {split!r}: name some in the column split "
            "of its metadata.csv, or prepare it with --split"
        )
    mark = hashlib.sha256(json.dumps([[case.case_id, case.content_hash] for case in cases]).encode()).hexdigest()
    if len(set(idist.all_gather(mark))) > 1:
        raise ValueError(
            f"dataset_dir {str(dataset_dir)!r} does not hold the same cases for every process; give all the same data"
        )
    return CTDataset(
        cases,
        preprocessing=preprocessing,
        sampling=sampling,
        windowing=windowing,
        min_points=min_points,
        seed=seed,
        cache_dir=Path(dataset_dir) / ".cache",
    )
