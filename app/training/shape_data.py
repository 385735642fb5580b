"""Files of signed distance (`python -m app sdf`) as samples for the tokenizer's stages; loaders.py hands them out.

A sample is a file as it is, moved and cropped like any other. With several `factors` each step takes the files of one
resolution, `resolution / factor`, for all samples alike: a function of (seed, step), as all chance is.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from app.dataset.prepared import read_metadata, split_patients
from app.phantoms.phantoms import ensure_cohort
from app.shapes.sdf import Settings, make_shapes
from app.shapes.shape_files import read_shape
from app.shapes.sources import SurfaceChoice
from app.shared.refusals import Refused
from app.training.data import PHANTOMS, CTDataset, Transform
from transforms import Windowsd
from transforms.runs import Runs

log = logging.getLogger(__name__)

DEMO_SHAPES = "outputs/phantom_shapes"
DEMO_LEVEL = 200.0  # HU: bones of the phantoms


class ShapeCase(NamedTuple):
    """One shape at every resolution of a run: a file for each factor."""

    case_id: str
    files: tuple[Path, ...]
    patient: str = ""


class ShapeDataset(CTDataset):
    """Shapes as sparse samples: `coords` as `Runs`, `values` (N, 1) distances over the band, negative inside.

    With `sharp_weight` a sample also carries `weights` (N,), 1 plus that much near sharp edges.
    """

    def __init__(
        self,
        cases: Sequence[ShapeCase],
        *,
        resolution: int,
        factors: Sequence[int] = (1,),
        sampling: Sequence[Transform] = (),
        min_points: int = 100,
        seed: int = 0,
        sharp_weight: float = 0.0,
        cache_bytes: int = 1 << 30,
    ) -> None:
        no_windows = Windowsd(windows=())  # which leaves distances as they are
        options = {"sampling": sampling, "windowing": no_windows, "min_points": min_points, "seed": seed}
        super().__init__(cases, preprocessing=(), **options, cache_bytes=cache_bytes)
        self.resolution, self.factors, self.sharp_weight = resolution, tuple(factors), sharp_weight

    @property
    def grid(self) -> None:
        """Shapes lie on grids of their own."""
        return None

    def factor_at(self, step: int) -> int:
        """Place among the factors of what a step trains on."""
        if len(self.factors) == 1:
            return 0
        return int(np.random.SeedSequence([self.seed, step]).generate_state(1)[0] % len(self.factors))

    def kept_voxels(self, number: int, step: int | None = None) -> dict[str, Any]:
        """A file: coords as runs, values float32 (N, 1 or with weights 2); without a step at the resolution."""
        which = 0 if step is None else self.factor_at(step)
        if (number, which) in self._memory:
            return self._memory[number, which]
        item = self._read(self.cases[number].files[which], self.resolution // self.factors[which])
        self._remember((number, which), item)
        return item

    def _read(self, file: Path, resolution: int) -> dict[str, Any]:
        shape = read_shape(file)
        if shape.resolution != resolution:
            raise Refused("DAMAGED_SHAPE", f"{file.name} has resolution {shape.resolution}, its name says {resolution}")
        if shape.sign == "none":
            what = f"{file.name} is unsigned"
            raise Refused("BAD_VALUE", what, "make it again from a closed mesh, without --unsigned")
        values = shape.values[:, None]
        if self.sharp_weight > 0:
            if shape.sharp is None:
                raise Refused("BAD_VALUE", f"{file.name} marks no sharp edges", "make it again with sdf --sharp 30")
            values = np.concatenate([values, 1 + self.sharp_weight * shape.sharp[:, None].astype(np.float32)], 1)
        return {
            "coords": Runs.of(shape.coords.astype(np.int16)),
            "values": values,
            "spatial_shape": (resolution,) * 3,
            "affine": shape.affine,
        }

    def _draw(self, number: int, step: int) -> dict[str, Any]:
        case = self.cases[number]
        item = self._sampled(dict(self.kept_voxels(number, step)), case.case_id, step)
        values = np.ascontiguousarray(item["values"], np.float32)
        if len(values) >= self.min_points and (values[:, 0] == values[0, 0]).all():
            raise ValueError(f"shape {case.case_id} has the same distance everywhere: nothing can be learned from it")
        sample = {
            "coords": item["coords"],
            "spatial_shape": item["spatial_shape"],
            "case_id": case.case_id,
            "affine": torch.from_numpy(np.asarray(item["affine"], np.float64)),
            "values": torch.from_numpy(values[:, :1].copy()),
        }
        return sample if values.shape[1] == 1 else {**sample, "weights": torch.from_numpy(values[:, 1].copy())}


def find_shapes(folder: str | Path, *, resolution: int, factors: Sequence[int] = (1,)) -> list[ShapeCase]:
    """Shapes below a folder that have a file at each resolution."""
    root = Path(folder)
    sides = [resolution // factor for factor in factors]
    rows = read_metadata(root / "metadata.csv")
    cases, lacking = [], []
    for file in sorted(root.rglob(f"*_r{sides[0]}.npz")):
        name = file.relative_to(root).as_posix().removesuffix(f"_r{sides[0]}.npz")
        files = tuple(root / f"{name}_r{side}.npz" for side in sides)
        if all(one.is_file() for one in files):
            cases.append(ShapeCase(name, files, rows.get(name, {}).get("patient") or name))
        else:
            lacking.append(name)
    if not cases:
        sizes = " and ".join(f"_r{side}.npz" for side in sides)
        what = f"dataset_dir {str(root)!r} has no shape with files {sizes}"
        have = ",".join(str(side) for side in dict.fromkeys(sides))
        raise Refused("NO_DATA", what, f"run `python -m app sdf SOURCE {root} --resolution {have}`", status=2)
    if lacking:
        log.warning("%d shapes lack a resolution and are left out, the first %s", len(lacking), lacking[0])
    return cases


def make_shape_dataset(
    dataset_dir: str | Path | None,
    *,
    split: str,
    resolution: int,
    factors: Sequence[int] = (1,),
    sampling: Sequence[Transform] = (),
    min_points: int = 100,
    seed: int = 0,
    sharp_weight: float = 0.0,
) -> ShapeDataset:
    """One side of a folder of signed distance; without one, of the bones of the built-in phantoms."""
    for factor in factors:
        if resolution % (8 * factor):
            raise ValueError(f"resolution / factor must be a multiple of 8, got {resolution} / {factor}")
    root = Path(DEMO_SHAPES if dataset_dir is None else dataset_dir)
    if dataset_dir is None:
        sides = tuple(dict.fromkeys(resolution // factor for factor in factors))
        settings = Settings(resolutions=sides, wanted=SurfaceChoice(hu=DEMO_LEVEL))
        make_shapes(ensure_cohort(PHANTOMS), root, settings, workers=1)
    cases = find_shapes(root, resolution=resolution, factors=factors)
    rows = read_metadata(root / "metadata.csv")
    given = {case.patient: rows.get(case.case_id, {}).get("split") or "" for case in cases}
    sides = split_patients([case.patient for case in cases], {name: side for name, side in given.items() if side})
    cases = [case for case in cases if sides[case.patient] == split]
    if not cases:
        remedy = "name some in the column split of its metadata.csv"
        raise Refused("NO_DATA", f"dataset_dir {str(root)!r} has no shape with split {split!r}", remedy, status=2)
    options = {"sampling": sampling, "min_points": min_points, "seed": seed, "sharp_weight": sharp_weight}
    factors = factors if split == "train" else factors[:1]
    return ShapeDataset(cases, resolution=resolution, factors=factors, **options)
