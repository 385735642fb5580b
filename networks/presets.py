"""The sizes of a tokenizer, in one place: what `preset` chooses and what travels inside every checkpoint.

A `Preset` says how a scan is turned into features and how large each part of the network is. Its JSON form is stored
with the weights, so that a checkpoint needs no config beside it and is refused on data made otherwise.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

CODEBOOKS = ("ema", "gradient", "fsq", "none")
NORMS = ("voxel", "sample")
POOLS = ("children", "mean", "legacy")
# Pairs of convolutions at half, quarter and an eighth of the resolution, with `pool children`. At an eighth, where they
# would hold half of all weights, the transformer does their work: without them errors on unseen scans rose by 1 %.
NUM_RESIDUAL = (1, 2, 0)
MAX_SIDE = 4096  # voxels of the grid of a dataset: what is said beyond is damage, and more than memory holds
CHECKSUM = "sha256"  # in the stored sizes, of all other tensors of the file
LIMITS = {  # lowest and highest size, of a flag, in Python, in a stranger's file: beyond is more than memory holds
    "resolution": (8, MAX_SIDE),
    "spacing": (0.01, 100.0),
    "widths": (1, 1 << 14),
    "model_channels": (1, 1 << 14),
    "latent_channels": (1, 1 << 14),
    "num_embeddings": (2, 1 << 24),
    "num_blocks": (0, 256),
    "num_heads": (1, 1 << 10),
    "window": (1, 1 << 10),
    "quantizer_levels": (1, 64),
}
PCA = "hu"  # what a stored `pca` is of
WINDOW_NAMES = ("lung", "bone", "soft_tissue", "brain")


class GoneSizes(ValueError):
    """Stored sizes of a network that this software no longer builds."""


@dataclass(frozen=True)
class Preset:
    resolution: int  # voxels a side of the grid the encoder sees; latents lie on a grid of an eighth
    spacing: float  # mm
    widths: tuple[int, int, int]  # channels at full (unless pool children), half and quarter resolution
    model_channels: int  # channels at an eighth, where the transformer works
    latent_channels: int  # code width D
    num_embeddings: int  # codes K
    num_blocks: int
    num_heads: int
    window: int  # side of an attention window, in latents
    max_points: int | None  # voxels of a training sample, above which it is cropped
    windows: tuple[str, ...] = WINDOW_NAMES  # CT windows, one input channel each
    features: str = "window"
    keep: str = "body"
    codebook: str = "ema"  # ema, gradient, fsq, or none for the continuous autoencoder
    rotation_trick: bool = False
    normalize_codes: bool = False
    quantizer_levels: int = 1  # codes a latent
    pool: str = "mean"  # how cells are halved: children side by side; mean, as older checkpoints; legacy, as published
    prepared: tuple[int, float] | None = None  # side and mm of the grid its training data lay on, if they lay on one
    resampler: str = ""  # name and version of what brought its training data onto the grid; older ones do not say
    pca: bool = False  # whether latents begin as principal components of cells in HU, around which the network learns
    norm: str = "sample"  # over what the encoder normalises: each voxel, or all of a sample, as in older checkpoints

    def __post_init__(self):
        _check_limits(vars(self))
        if self.resolution % 8:
            raise ValueError(f"resolution must be a multiple of 8 (three halvings), got {self.resolution}")
        if self.model_channels % self.num_heads:
            raise ValueError(
                f"model_channels must be a multiple of num_heads = {self.num_heads}, got {self.model_channels}"
            )
        for name, known in (("codebook", CODEBOOKS), ("norm", NORMS), ("pool", POOLS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.prepared is not None and not is_grid(self.prepared):
            raise ValueError(
                f"prepared must be None, or a side of 1 to {MAX_SIDE} voxels and mm above 0, got {self.prepared!r}"
            )
        if self.pca and self.features != "window":
            raise ValueError(f"pca needs CT windows, got features {self.features}")
        if self.codebook == "fsq" and (self.rotation_trick or self.normalize_codes or self.quantizer_levels > 1):
            raise ValueError(
                "rotation_trick, normalize_codes and quantizer_levels need a codebook of vectors, got codebook fsq: "
                "pass codebook ema or gradient, or leave them out"
            )

    @property
    def in_channels(self) -> int:
        return len(self.windows) if self.features == "window" else 1

    @property
    def convolved(self) -> tuple[bool, bool, bool, bool]:
        """Whether convolutions run at full, half, quarter and an eighth of the resolution."""
        return (False, *(pairs > 0 for pairs in NUM_RESIDUAL)) if self.pool == "children" else (True,) * 4

    def changed(self, **changes) -> "Preset":
        """With other values where they are not None. Unknown names are refused."""
        known = {field.name for field in dataclasses.fields(self)}
        if unknown := sorted(set(changes) - known):
            raise ValueError(f"a preset has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        given = {name: tuple(v) if isinstance(v, list) else v for name, v in changes.items() if v is not None}
        return dataclasses.replace(self, **given)

    def to_tensor(self) -> UInt8[Tensor, " bytes"]:
        """JSON as bytes: a state dict holds tensors only and loads without running code.

        Token files and projectors know a tokenizer by a hash over these bytes too: what older weights do not say is
        left out where it is as they have it.
        """
        older = {"norm": "sample", "prepared": None, "resampler": "", "pca": False}
        values = {name: v for name, v in dataclasses.asdict(self).items() if name not in older or v != older[name]}
        values |= {"pca": PCA} if self.pca else {}
        return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, stored: UInt8[Tensor, " bytes"]) -> "Preset":
        values = json.loads(bytes(stored.tolist()))
        if not isinstance(values, dict):
            raise ValueError(f"the stored sizes must be named values, got {type(values).__name__}")
        values.pop(CHECKSUM, None)  # of the file's weights, not one of the sizes
        if (pca := values.get("pca", False)) not in (False, PCA):
            raise GoneSizes("its principal components are of window values, which are gone")
        values |= {"pca": pca == PCA}
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"the stored sizes have {unknown}, which this software does not know: update it")
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        _check_limits(values)  # before any is taken for a number
        return cls(**values)


def _check_limits(values: Mapping[str, object]) -> None:
    for name, (low, high) in LIMITS.items():
        if name in values and not within(values[name], low, high):
            raise ValueError(f"{name} must be within {low} and {high}, got {str(values[name])[:40]}")


def within(value: object, low: int | float, high: int | float) -> bool:
    """Whether a size, or each of several, is a number between two: whole where the lower one is."""
    parts = value if isinstance(value, tuple) else (value,)
    kinds = (int,) if isinstance(low, int) else (int, float)
    return all(type(part) in kinds and low <= part <= high for part in parts)


def is_grid(grid: object) -> bool:
    """Side and mm, as a checkpoint of any origin may tell them."""
    if not isinstance(grid, tuple) or [type(part) for part in grid] not in ([int, int], [int, float]):
        return False
    return 1 <= grid[0] <= MAX_SIDE and 0 < grid[1] < math.inf


BASE = Preset(
    resolution=256,
    spacing=1.5,
    widths=(32, 64, 128),
    model_channels=256,
    latent_channels=64,
    num_embeddings=8192,
    num_blocks=4,
    num_heads=8,
    window=8,
    max_points=8_000_000,
    pool="children",
    norm="voxel",
)
PRESETS = {
    "tiny": dataclasses.replace(
        BASE,
        resolution=80,
        spacing=5.0,
        widths=(16, 16, 32),
        model_channels=64,
        num_embeddings=256,
        num_blocks=2,
        num_heads=4,
        window=4,
        max_points=None,
    ),
    "base": BASE,
    "large": dataclasses.replace(
        BASE, resolution=512, spacing=0.75, model_channels=512, latent_channels=32, max_points=16_000_000
    ),
    "direct3d_s2": dataclasses.replace(
        BASE,
        resolution=512,
        spacing=1.0,
        model_channels=512,
        latent_channels=16,
        max_points=16_000_000,
        features="sdf",
        pool="legacy",
        norm="sample",
    ),
}


def preset(name: str) -> Preset:
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def make_sizes(preset_name: str, **changes) -> Preset:
    """A preset's sizes, with `changes` to any of them where they are not None."""
    return preset(preset_name).changed(**changes)
