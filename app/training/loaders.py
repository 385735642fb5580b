"""Samples as batches: the sampler that hands out (step, index), the one collate, loaders for training and validation.

Batches are dicts of plain tensors: where voxels lie (voxel_runs.py), `values` in HU (N,) or as features (N, C),
`spatial_shape`, `batch_size`, `case_id`; `step.SparseBatch` reads them. Which sample comes when is a function of
(seed, step), never of a process's state.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from app.training.data import CTDataset, Refusal, or_refusal
from app.training.stopping import serve_to_the_end
from app.training.voxel_runs import places_of
from transforms import Windowsd

log = logging.getLogger(__name__)


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
        self.rank = idist.get_rank() if rank is None else rank
        self.world = idist.get_world_size() if world is None else world
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


def collate(items: Sequence[Any], *, batch_split: int = 1, windowing: Windowsd | None = None) -> Any:
    """Samples to one batch, or with `batch_split` > 1 to a list of micro-batches, split by sample.

    Where some samples are in HU and others are features, HU are windowed here, as they could not share a batch.
    """
    for item in items:
        if isinstance(item, Refusal):
            return item
    if batch_split > 1:
        parts = np.array_split(np.arange(len(items)), min(batch_split, len(items)))
        return [collate([items[i] for i in part], windowing=windowing) for part in parts]
    shapes = {item["spatial_shape"] for item in items}
    if len(shapes) != 1:
        raise ValueError(f"samples of a batch must share a grid, got {sorted(shapes)}")
    values = [item["values"] for item in items]
    if len({part.ndim for part in values}) > 1:
        values = [(windowing or Windowsd())({"values": part})["feats"] for part in values]
    weighted = {"weights": _joined([item["weights"] for item in items])} if "weights" in items[0] else {}
    return {
        **weighted,
        **places_of([item["coords"] for item in items]),
        "values": _joined(values),
        "spatial_shape": items[0]["spatial_shape"],
        "batch_size": len(items),
        "case_id": [item["case_id"] for item in items],
        "affine": torch.stack([item["affine"] for item in items]),
        "skipped": sum(item["skipped"] for item in items),
    }


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows one after another. By NumPy, as it asks for huge pages: torch's memory takes longer to get than to fill."""
    return torch.from_numpy(np.concatenate([part.numpy() for part in parts]))


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
    world = idist.get_world_size()
    share = range(idist.get_rank(), len(dataset), world)
    counts = _count_points(dataset, share, num_workers=num_workers)
    numbers = [number for number, count in zip(share, counts, strict=True) if count >= dataset.min_points]
    if len(numbers) < len(share):
        left_out = len(share) - len(numbers)
        log.warning("Validation skips %d of %d cases: under min_points %d", left_out, len(share), dataset.min_points)
    if idist.all_reduce(len(numbers), op="MIN") == 0:  # a rank without any would leave the others waiting
        raise ValueError(
            f"the val split must give each of {world} processes a case of at least min_points={dataset.min_points} "
            f"voxels, its cases are {len(dataset)}; give more val cases, lower min_points or start fewer processes"
        )
    return _loader(dataset, numbers, batch_size=batch_size, batch_split=1, num_workers=num_workers)


class _Points(Dataset):
    """How many voxels each case keeps; counting them fills the cache."""

    def __init__(self, dataset: CTDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, number: int) -> Any:
        return or_refusal(lambda: len(self.dataset.kept_voxels(number)["coords"]))


def _count_points(dataset: CTDataset, numbers: Sequence[int], *, num_workers: int) -> list[int]:
    options = {"num_workers": num_workers, "generator": torch.Generator()}
    return [int(count) for count in CaseLoader(_Points(dataset), batch_size=None, sampler=numbers, **options)]


class CaseLoader(DataLoader):
    """A DataLoader that raises a worker's refusal as what it is. Signals that end the run do not end its workers."""

    def __init__(self, dataset: Dataset, **options: Any) -> None:
        super().__init__(dataset, worker_init_fn=serve_to_the_end, **options)

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if isinstance(batch, Refusal):
                raise batch.error
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
        collate_fn=partial(collate, batch_split=batch_split, windowing=dataset.windowing),
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else every new iterator draws from the run's own
    )
