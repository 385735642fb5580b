"""A bundle's metadata.json: what MONAI's schema asks for, and what a scan has to be for the tokenizer."""

import re
from importlib import metadata
from typing import Any

import monai
import numpy as np
import torch

from app.export.code import PACKAGES
from app.shared.notice import NOTICE
from app.shared.version import VERSION
from app.tokens.bundles import description
from networks.presets import Preset
from transforms.windows import windows_range

SCHEMA = "meta_schema_20240725.json"
STATED_APART = ("torch", "monai", "numpy")  # the schema has a field for each
OF_SHAPES = {
    "task": "shape tokenizer",
    "description": "Sparse VQ-VAE that turns a surface, as sparse signed distance, into discrete 3D tokens and back.",
}


def requirements() -> list[str]:
    """What the project's own package declares, without extras."""
    return sorted(need for need in metadata.requires("voxelingo") or [] if "extra ==" not in need)


def _versions() -> dict[str, str]:
    names = [re.match(r"[\w.-]+", need)[0] for need in requirements()]
    return {name: metadata.version(name) for name in names if name not in STATED_APART}


def _image(sizes: Preset) -> tuple[dict[str, Any], dict[str, Any]]:
    """A dense scan, in and out."""
    low, high = windows_range(sizes.windows)
    image = {
        "type": "image",
        "format": "hounsfield",
        "modality": "CT",
        "num_channels": 1,
        "spatial_shape": ["*", "*", "*"],
        "dtype": "float32",
        "value_range": [low, high],
        "is_patch_data": False,
    }
    return {"image": {**image, "channel_def": {"0": "image"}}}, {**image, "channel_def": {"0": "reconstruction"}}


def _shape(_sizes: Preset) -> tuple[dict[str, Any], dict[str, Any]]:
    """Voxels beside a surface, in and out: distance over the band, negative inside."""
    band = {"type": "tuples", "format": "signed distance", "num_channels": 1, "spatial_shape": ["*"]}
    band |= {"dtype": "float32", "value_range": [-1, 1], "is_patch_data": False, "channel_def": {"0": "distance"}}
    return {"shape": band}, band


def make_metadata(base: dict[str, Any], sizes: Preset, *, name: str, package: str, digest: str) -> dict[str, Any]:
    """`base` is the project's own; versions are those that the bundle was proven with."""
    codes = {"type": "tuples", "format": "indices", "spatial_shape": ["*"], "dtype": "int32"}
    codes |= {"num_channels": sizes.quantizer_levels, "value_range": [0, sizes.num_embeddings - 1]}
    cells = {"type": "tuples", "format": "points", "num_channels": 3, "spatial_shape": ["*"], "dtype": "int32"}
    cells["value_range"] = [0, sizes.resolution // 8 - 1]
    source, back = (_shape if sizes.features == "sdf" else _image)(sizes)
    return {
        **base,
        **(OF_SHAPES if sizes.features == "sdf" else {}),
        "name": name,
        "version": VERSION,
        "changelog": {VERSION: "exported by Voxelingo"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": _versions(),
        "intended_use": NOTICE,
        "network_data_format": {"inputs": source, "outputs": {"pred": back}},
        "tokens_data_format": {"inputs": source, "outputs": {"codes": codes, "coords": cells}},
        "tokenizer": description(sizes, digest),
        "code": {"package": package, "packages": list(PACKAGES)},
    }
