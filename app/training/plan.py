"""What a training run will be where the user left it open: `scale: auto` is the demo without data, else the real thing.

One table per scale. The flat keys of a bundle read their defaults from here, so any of them can be overridden by name.
"""

import logging
import os
from dataclasses import dataclass

import torch

from app.shared.refusals import fail
from networks.presets import PRESETS, Preset
from networks.sparse.ops import BACKENDS

log = logging.getLogger(__name__)

STAGES = ("vae", "vq_stage1", "vq_stage2")  # by training_stage

DEMO = {
    "max_steps": {"vae": 800, "vq_stage1": 300, "vq_stage2": 150},
    "warmup_steps": 800,
    "batch_size_per_gpu": 1,
    "learning_rate": {"vae": 3e-3, "vq_stage1": 3e-3, "vq_stage2": 5e-4},
    "lr_scheduler": "one_cycle",
    "loss_type": "l1_l2",
    "max_shift": 4,
    "norm": "sample",  # phantoms are all alike: as good on those it has not seen, and sooner
    "quantizer_levels": 2,  # 256 codes of one level would lose a tenth of what the autoencoder keeps
    "intervals": {"i_print": 25, "i_log": 25, "i_sample": 150, "i_save": 150, "val_interval": 150},
}
FULL = {
    "max_steps": {"vae": 100_000, "vq_stage1": 100_000, "vq_stage2": 200_000},
    "warmup_steps": 20_000,
    "batch_size_per_gpu": 2,
    "learning_rate": {"vae": 1e-4, "vq_stage1": 1e-4, "vq_stage2": 1e-4},
    "lr_scheduler": "cosine",
    "loss_type": None,
    "max_shift": 0.25,  # of the grid's side
    "norm": None,
    "quantizer_levels": None,
    "intervals": {"i_print": 100, "i_log": 100, "i_sample": 5000, "i_save": 5000, "val_interval": 5000},
}


@dataclass(frozen=True)
class Plan:
    """Defaults of one run."""

    scale: str
    dataset_dir: str
    preset: str
    sizes: Preset
    max_steps: int
    warmup_steps: int
    batch_size_per_gpu: int
    learning_rate: float
    lr_scheduler: str
    loss_type: str
    amp: str
    num_workers: int
    max_shift: int | float
    norm: str
    quantizer_levels: int
    windows: list[str]
    sparse_backend: str
    i_print: int
    i_log: int
    i_sample: int
    i_save: int
    val_interval: int


def make_plan(
    training_stage: int,
    *,
    scale: str = "auto",
    dataset_dir: str | None = None,
    preset: str | None = None,
    windows: list[str] | None = None,
    window_type: str | None = None,
    sparse_backend: str | None = None,
) -> Plan:
    """Fills what is open and says what was chosen. Makes the built-in phantoms when there is no data."""
    stage = STAGES[training_stage]
    if scale not in ("auto", "demo", "full"):
        fail("BAD_VALUE", f"scale must be auto, demo or full, got {scale!r}", "leave --scale out for auto")
    if scale == "full" and dataset_dir is None:
        fail("NO_DATA", "scale full needs data", "pass --dataset_dir, or leave --scale out for the demo")
    if windows is not None and window_type is not None:
        fail("BAD_VALUE", "windows and window_type are both given", "give one of them")
    chosen = scale if scale != "auto" else ("demo" if dataset_dir is None else "full")
    table = DEMO if chosen == "demo" else FULL
    preset = preset or ("tiny" if chosen == "demo" else "base")
    if preset not in PRESETS:
        fail("BAD_VALUE", f"preset must be one of {', '.join(PRESETS)}, got {preset!r}", "pass one of these")
    data = dataset_dir or _phantoms()
    loss_type = table["loss_type"] or ("l1_l2" if stage == "vq_stage2" else "l1")
    log.info("scale %s: %s", chosen, f"your data in {data}" if dataset_dir else f"built-in phantoms in {data}")
    log.info("preset %s, stage %s; a default a flag does not override comes from scale %s", preset, stage, chosen)
    return Plan(
        scale=chosen,
        dataset_dir=data,
        preset=preset,
        sizes=PRESETS[preset],
        max_steps=table["max_steps"][stage],
        warmup_steps=table["warmup_steps"],
        batch_size_per_gpu=table["batch_size_per_gpu"],
        learning_rate=table["learning_rate"][stage],
        lr_scheduler=table["lr_scheduler"],
        loss_type=loss_type,
        amp="bf16" if torch.cuda.is_available() else "off",
        num_workers=0 if chosen == "demo" else min(8, max((os.cpu_count() or 2) - 1, 1)),
        max_shift=table["max_shift"],
        norm=table["norm"] or PRESETS[preset].norm,
        quantizer_levels=table["quantizer_levels"] or PRESETS[preset].quantizer_levels,
        sparse_backend=choose_backend(sparse_backend),
        windows=list(windows or ([window_type] if window_type else PRESETS[preset].windows)),
        **table["intervals"],
    )


def _phantoms() -> str:
    from app.phantoms.phantoms import ensure_cohort

    return str(ensure_cohort("outputs/phantoms"))


def choose_backend(wanted: str | None) -> str:
    """The config's choice, else what SPARSE_BACKEND says, else auto. Backends of other projects mean auto."""
    for name in ("ATTN_BACKEND", "SPCONV_ALGO"):
        if os.environ.get(name):
            log.info("%s=%s is not used here: the fastest way is chosen by device", name, os.environ[name])
    named = wanted or os.environ.get("SPARSE_BACKEND") or "auto"
    if named in ("auto", *BACKENDS):
        return named
    if wanted:
        fail(
            "BAD_VALUE",
            f"sparse_backend must be auto or one of {', '.join(BACKENDS)}, got {wanted!r}",
            "pass one of these",
        )
    log.info("SPARSE_BACKEND=%s is not among auto, %s: taking auto", named, ", ".join(BACKENDS))
    return "auto"
