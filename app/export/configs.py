"""Configs of a bundle: those of bundles/ with the code's new name, the tokenizer's own sizes, and the bundle's files.

MONAI puts a bundle on the path only after `initialize`, and no caller tells a config where it lies: so `bundle_root`
finds the workflow that reads it, and the first thing `initialize` does is to put that folder on the path.
"""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

from app.export.code import renamed_target
from networks.presets import Preset

SOURCES = {  # the bundle's config, and the one it is made of
    "train.json": "vq_stage2.json",
    "inference.json": "inference.json",
    "evaluate.json": "evaluate_tokenizer.json",
    "multi_gpu_train.json": "multi_gpu.json",
    "ask.json": "ask.json",
}
SOURCES_OF_SHAPES = {**SOURCES, "train.json": "sdf_vqvae.json", "inference.json": "inference_shapes.json"}
OVER_TRAIN_OF_SHAPES = "sdf_stage2.json"
BUNDLE_ROOT = (
    "$str(next(f.frame.f_locals['self'].config_root_path for f in __import__('inspect').stack(0)"
    " if 'config_root_path' in getattr(f.frame.f_locals.get('self'), '__dict__', ())).resolve().parent)"
)
SEARCH_PATH = "$__import__('sys').path"  # a key of its own: MONAI reads what holds "import" before it resolves an @
ON_PATH = "$@search_path.insert(0, @bundle_root)"
WEIGHTS = "$@bundle_root + '/models/model.pt'"
LEFT_OPEN = {"max_points", "prepared"}  # how much fits differs by machine; the grid is the network's alone


def make_configs(templates: Path, sizes: Preset, *, package: str, aligned: bool) -> dict[str, dict[str, Any]]:
    """Each config of the bundle by its file name."""
    bundled = {}
    of_shapes = sizes.features == "sdf"
    for name, source in (SOURCES_OF_SHAPES if of_shapes else SOURCES).items():
        if name == "ask.json" and not aligned:
            continue
        config = json.loads((templates / source).read_text(encoding="utf-8"))
        if name == "train.json" and of_shapes:
            config |= json.loads((templates / OVER_TRAIN_OF_SHAPES).read_text(encoding="utf-8"))
            config = {key: value for key, value in config.items() if key not in ("pretrained_vae_path", "warmup_steps")}
        if name != "multi_gpu_train.json":
            config = _with_bundle_root(config)
        bundled[name] = _renamed(_CHANGES.get(name, lambda config, sizes: config)(config, sizes), package)
    return bundled


def network_of(sizes: Preset) -> dict[str, Any]:
    """A network of these very sizes, as a config makes it."""
    fields = {name: value for name, value in dataclasses.asdict(sizes).items() if value is not None}
    return {"_target_": "networks.make_vqvae", "preset_name": "tiny", **json.loads(json.dumps(fields))}


def _with_bundle_root(config: dict[str, Any]) -> dict[str, Any]:
    """With the bundle's folder, which is put on the import path before any `_target_` is looked up."""
    head = {"_desc_": config["_desc_"], "bundle_root": BUNDLE_ROOT, "search_path": SEARCH_PATH}
    return {**head, **config, "initialize": [ON_PATH, *config.get("initialize", [])]}


def _train(config: dict[str, Any], sizes: Preset) -> dict[str, Any]:
    """Training goes on from this bundle's weights; how data become features is as the weights record it."""
    own = {name: value for name, value in dataclasses.asdict(sizes).items() if name not in LEFT_OPEN}
    for name in config.keys() & own.keys():
        config[name] = json.loads(json.dumps(own[name]))
    config["network_def"] = {**network_of(sizes), "use_checkpoint": "@use_checkpoint", "backend": "@backend"}
    return {**config, "init_from": WEIGHTS, "output_dir": "outputs/continued"}


def _inference(config: dict[str, Any], sizes: Preset) -> dict[str, Any]:
    config = {name: value for name, value in config.items() if name != "tokenizer"}
    return {**config, "weights": WEIGHTS, "network_def": network_of(sizes)}


def _evaluate(config: dict[str, Any], sizes: Preset) -> dict[str, Any]:
    return {**config, "tokenizer": "$@bundle_root", "output_dir": "outputs/evaluation"}


def _ask(config: dict[str, Any], sizes: Preset) -> dict[str, Any]:
    return {**config, "align_dir": "$@bundle_root", "tokenizer": "$@bundle_root"}


_CHANGES = {"train.json": _train, "inference.json": _inference, "evaluate.json": _evaluate, "ask.json": _ask}


def _renamed(node: Any, package: str) -> Any:
    """Every module of ours below the package's name, in `_target_`s and in expressions."""
    if isinstance(node, dict):
        return {
            key: renamed_target(value, package) if key == "_target_" else _renamed(value, package)
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [_renamed(value, package) for value in node]
    return renamed_target(node, package) if isinstance(node, str) and node.startswith("$") else copy.copy(node)
