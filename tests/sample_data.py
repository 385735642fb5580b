"""A small prepared dataset, and samples of it as the stage files draw them."""

import numpy as np

from app.training.data import CTDataset, make_dataset, preprocessing
from transforms import RandCropToBudgetd, RandJitterd, RandTranslated, Windowsd
from transforms.windows import DEFAULT_WINDOWS

SETTINGS = {"resolution": 16, "spacing": 8.0}
NAMES = DEFAULT_WINDOWS


def blob(rng: np.random.Generator, radius: float) -> np.ndarray:
    """A ball of textured tissue in air."""
    distance = np.linalg.norm(np.indices((24, 24, 24)) - 11.5, axis=0)
    return np.where(distance < radius, rng.integers(-80, 200, (24, 24, 24)), -1000).astype(np.int16)


def make(root, *, split: str = "train", seed: int = 0, min_points: int = 100, windows=NAMES, **crop) -> CTDataset:
    return make_dataset(
        root,
        split=split,
        preprocessing=preprocessing(**SETTINGS),
        sampling=drawn(**crop) if split == "train" else [],
        windowing=Windowsd(windows=windows),
        seed=seed,
        min_points=min_points,
    )


def drawn(*, max_points: int | None = None) -> list:
    """As the stage files draw a sample."""
    return [RandTranslated(max_shift=0.25), RandCropToBudgetd(max_points=max_points), RandJitterd()]


def same(one: dict, other: dict) -> bool:
    names = {"coords", "runs", "values", "affine"} & (one.keys() | other.keys())
    tensors = all(np.array_equal(one[key], other[key]) for key in names)
    return tensors and one["case_id"] == other["case_id"]
