"""The transforms of arrays on dictionaries, for MONAI's Compose and for a reader of a bundle's JSON.

Each class loops over keys and calls its array twin. An item starts as `image` (HU int16 (X, Y, Z), or 0/1 masks
(X, Y, Z, C)) with `affine`, becomes `coords`, `values`, `spatial_shape`, and ends with `feats` float32 (N, C).
`coords` may be `Runs` instead of an array, and are after a move or a crop; `numpy.asarray` gives the array.
`settings` is what a cache has to know about a deterministic transform.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.transforms import MapTransform, RandomizableTransform
from torch import Tensor

from transforms import tensor
from transforms.acquisition import acquire, jitter
from transforms.crops import crop_to_budget, pick_rows, translate
from transforms.grid import RESAMPLER, centred_grid, resample, share_beyond
from transforms.pose import repose
from transforms.sparse import KEEPS, keep_mask, sparsify, sparsify_masks
from transforms.structures import add_structures
from transforms.windows import DEFAULT_WINDOWS, Number, window_bounds, window_values


class Resampled(MapTransform):
    """`resample` onto a cube of `grid` voxels of `spacing` mm. Without an affine the field fills the cube.

    `beyond` is the share of all that is denser than air, of a volume in HU, that the cube cuts off.
    """

    def __init__(self, keys: str | Sequence[str] = "image", *, spacing: Number, grid: int) -> None:
        super().__init__(keys)
        self.spacing, self.grid = float(spacing), int(grid)
        self.settings = {"resample": [RESAMPLER, self.spacing, self.grid]}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.key_iterator(item):
            volume, affine = item[key], item.get("affine")
            if affine is None:
                step = self.spacing * self.grid / max(volume.shape[:3])
                affine = np.diag([step, step, step, 1.0])
            affine = np.asarray(affine, np.float64)
            onto = centred_grid(volume.shape[:3], affine, self.grid, self.spacing)
            if volume.ndim == 4:  # masks
                channels = np.moveaxis(volume.astype(np.float32), -1, 0)
                parts = [resample(channel, affine, onto, outside=0, dtype=np.float32) for channel in channels]
                item[key] = np.stack([part.array for part in parts], -1)
            else:
                item["beyond"] = share_beyond(volume, affine, onto)
                item[key] = resample(volume, affine, onto).array
            item["affine"] = onto.affine
        return item


class Sparsifyd(MapTransform):
    """`keep_mask` and `sparsify`: the dense key goes, `coords`, `values` and `spatial_shape` come."""

    def __init__(
        self,
        keys: str | Sequence[str] = "image",
        *,
        keep: str = "body",
        windows: Sequence[str] = DEFAULT_WINDOWS,
    ) -> None:
        super().__init__(keys)
        if keep not in KEEPS:
            raise ValueError(f"keep must be one of {', '.join(KEEPS)}, got {keep!r}")
        self.keep, self.windows = keep, tuple(windows)
        self.settings = {"keep": keep, "keep_windows": list(self.windows) if KEEPS[keep].by_window else None}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.key_iterator(item):
            volume = item.pop(key)
            if volume.ndim == 4:  # masks
                sparse = sparsify_masks(volume)
            else:
                spacing = float(np.linalg.norm(item["affine"][:3, 0]))
                mask = keep_mask(volume, self.keep, windows=self.windows, spacing=spacing)
                sparse = sparsify(volume, mask)
            item["coords"], item["values"] = sparse
            item["spatial_shape"] = tuple(int(n) for n in volume.shape[:3])
        return item


class Windowsd(MapTransform):
    """`window_values`: HU rows become `feats`. Rows that are features already (bands, distances) pass through.

    Of a tensor it is `tensor.window_values`, on the device where that lies.
    """

    def __init__(self, keys: str | Sequence[str] = "values", *, windows: Sequence[str] = DEFAULT_WINDOWS) -> None:
        super().__init__(keys)
        for name in windows:
            window_bounds(name)
        self.windows = tuple(windows)
        self.settings = {"windows": list(self.windows)}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.key_iterator(item):
            values = item[key]
            if isinstance(values, Tensor):
                item["feats"] = tensor.window_values(values, self.windows) if values.ndim == 1 else values.float()
            else:
                feats = window_values(values, self.windows) if values.ndim == 1 else values
                item["feats"] = feats.astype(np.float32, copy=False)
        return item


class RandCropToBudgetd(RandomizableTransform, MapTransform):
    """`crop_to_budget` around a kept voxel drawn by chance; the rows of `keys` follow the coordinates."""

    def __init__(self, keys: str | Sequence[str] = ("coords", "values"), *, max_points: int | None = None) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob=1.0)
        self.max_points = max_points

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        coords = item["coords"]
        if len(coords) == 0:
            return item
        center = coords[self.R.randint(len(coords))]
        runs, rows = crop_to_budget(coords, self.max_points, center=center)
        if len(rows) < len(coords):
            for key in self.key_iterator(item):
                item[key] = runs if key == "coords" else pick_rows(item[key], rows)
        return item


class RandTranslated(RandomizableTransform, MapTransform):
    """`translate` by up to `max_shift` of the grid's side along each axis.

    Left stays left: there is no flip in this project.
    """

    def __init__(self, keys: str | Sequence[str] = "coords", *, max_shift: Number = 0.25, prob: Number = 1.0) -> None:
        if not isinstance(max_shift, int | float) or not 0 <= max_shift < 1:
            raise ValueError(f"max_shift must be a share of the grid's side, from 0 to below 1, got {max_shift!r}")
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.max_shift = max_shift

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        self.randomize(None)
        reach = int(self.max_shift * max(item["spatial_shape"]))
        shift = self.R.randint(-reach, reach + 1, 3)
        if self._do_transform:
            for key in self.key_iterator(item):
                if len(item[key]):
                    item[key] = translate(item[key], shift, item["spatial_shape"])
        return item


class RandAffined(RandomizableTransform, MapTransform):
    """`repose`: turned by up to `max_rotation` degrees about each axis, larger or smaller by up to `max_scale`.

    Whoever leaves both at 0 gets voxels as they are, and so do items of bands. Left stays left.
    """

    def __init__(
        self,
        keys: str | Sequence[str] = "values",
        *,
        max_rotation: Number = 0.0,
        max_scale: Number = 0.0,
        prob: Number = 1.0,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        if not (0 <= max_rotation <= 45 and 0 <= max_scale <= 0.5):
            raise ValueError(
                f"max_rotation must lie in 0..45 degrees and max_scale in 0..0.5, got {max_rotation} and {max_scale}"
            )
        self.max_rotation, self.max_scale = max_rotation, max_scale

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        if not (self.max_rotation or self.max_scale) or len(item["coords"]) == 0:
            return item
        self.randomize(None)
        angles = self.R.uniform(-self.max_rotation, self.max_rotation, 3)
        how = {"angles": angles.tolist(), "scale": 1 + self.R.uniform(-self.max_scale, self.max_scale)}
        if self._do_transform:
            for key in self.key_iterator(item):
                if item[key].ndim == 1:  # HU; bands and distances are geometry
                    coords = np.asarray(item["coords"])
                    item[key], item["coords"] = repose(item[key], coords, **how, shape=item["spatial_shape"])
        return item


class RandJitterd(RandomizableTransform, MapTransform):
    """`jitter`: HU stretched by up to `scale`, shifted by up to `offset` HU, with noise of up to `noise` HU."""

    def __init__(
        self,
        keys: str | Sequence[str] = "values",
        *,
        scale: Number = 0.02,
        offset: Number = 10.0,
        noise: Number = 10.0,
        prob: Number = 1.0,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.scale, self.offset, self.noise = scale, offset, noise

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        self.randomize(None)
        scale = 1 + self.R.uniform(-self.scale, self.scale)
        offset = self.R.uniform(-self.offset, self.offset)
        level = self.R.uniform(0, self.noise)
        generator = np.random.default_rng(self.R.randint(2**32, dtype=np.uint32))
        if self._do_transform:
            for key in self.key_iterator(item):
                if item[key].ndim == 1:  # HU; bands and distances are geometry
                    item[key] = jitter(item[key], scale=scale, offset=offset, noise=level, generator=generator)
        return item


class RandStructuresd(RandomizableTransform, MapTransform):
    """`add_structures`: up to `number` balls and tubes of a few millimetres in each sample; none with 0."""

    def __init__(
        self, keys: str | Sequence[str] = "values", *, number: int = 0, spacing: Number = 1.5, prob: Number = 1.0
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"structures must be a whole number from 0 on, got {number!r}")
        self.number, self.spacing = number, spacing

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        if not self.number or len(item["coords"]) == 0:
            return item
        self.randomize(None)
        generator = np.random.default_rng(self.R.randint(2**32, dtype=np.uint32))
        if self._do_transform:
            for key in self.key_iterator(item):
                if item[key].ndim == 1:  # HU; bands and distances are geometry
                    coords = np.asarray(item["coords"])
                    item[key] = add_structures(
                        item[key], coords, number=self.number, spacing=self.spacing, generator=generator
                    )
        return item


class RandAcquisitiond(RandomizableTransform, MapTransform):
    """`acquire`: kernels sharper or softer by up to `sharpness`, slices mixed by up to `slice_blur`, noise of up
    to `grain` HU. Whoever leaves all three at 0 gets the values as they are.
    """

    def __init__(
        self,
        keys: str | Sequence[str] = "values",
        *,
        sharpness: Number = 0.0,
        slice_blur: Number = 0.0,
        grain: Number = 0.0,
        prob: Number = 1.0,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        if not (0 <= sharpness <= 1 and 0 <= slice_blur <= 1 and grain >= 0):
            raise ValueError(
                f"sharpness and slice_blur must lie in 0..1 and grain be at least 0 HU, got {sharpness}, {slice_blur} "
                f"and {grain}"
            )
        self.sharpness, self.slice_blur, self.grain = sharpness, slice_blur, grain

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        if not (self.sharpness or self.slice_blur or self.grain) or len(item["coords"]) == 0:
            return item
        self.randomize(None)
        drawn = {
            "sharpness": self.R.uniform(-self.sharpness, self.sharpness),
            "slice_blur": self.R.uniform(0, self.slice_blur),
            "grain": self.R.uniform(0, self.grain),
        }
        generator = np.random.default_rng(self.R.randint(2**32, dtype=np.uint32))
        if self._do_transform:
            for key in self.key_iterator(item):
                if item[key].ndim == 1:  # HU; bands and distances are geometry
                    item[key] = acquire(item[key], np.asarray(item["coords"]), **drawn, generator=generator)
        return item
