"""What each flat key of a bundle may be, and what other projects call it. preflight.py holds runs to it.

Where a constructor has limits of its own they stand there, and rules ask for them.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

from app.phantoms.sentences import PLACES
from app.training.choices import SCALES
from networks import projector
from networks.losses import LOSS_TYPES, are_weights
from networks.presets import CODEBOOKS, LIMITS, NORMS, POOLS, PRESETS, within
from networks.tokens import REDUCTIONS
from transforms.dictionary import RandAcquisitiond, RandAffined, RandStructuresd, RandTranslated
from transforms.sparse import KEEPS
from transforms.windows import WINDOWS

# Names of the original scripts, and common other names, with ours: the first that a run has is suggested.
OTHER_NAMES = {
    "data_dir": ("dataset_dir", "data"),
    "data_path": ("data", "dataset_dir"),
    "data": ("dataset_dir",),
    "dataset_dir": ("data",),
    "lr": ("learning_rate",),
    "load_dir": (
        "init_from (another stage) or resume (this one)",
        "pretrained_vae_path (another stage) or resume (this one)",
        "resume",
    ),
    "ckpt": ("resume",),
    "num_gpus": ("torchrun --nproc_per_node with bundles/multi_gpu.json",),
    "num_nodes": ("torchrun --nnodes with bundles/multi_gpu.json",),
    "node_rank": ("torchrun --node_rank with bundles/multi_gpu.json",),
    "master_addr": ("torchrun --master_addr with bundles/multi_gpu.json",),
    "master_port": ("torchrun --master_port with bundles/multi_gpu.json",),
    "auto_retry": ("torchrun --max_restarts with bundles/multi_gpu.json",),
    "tryrun": ("max_steps with a small number", "epochs with a small number"),
    "epochs": ("max_steps",),
    "max_epochs": ("max_steps", "epochs"),
    "max_steps": ("epochs",),
    "batch_size": ("batch_size_per_gpu",),
    "batch_size_per_gpu": ("batch_size",),
    "embed_dim": ("latent_channels",),
    "embedding_dim": ("latent_channels",),
    "latent_dim": ("latent_channels",),
    "codebook_size": ("num_embeddings",),
    "fp16_mode": ("amp",),
    "optimizer_lr": ("learning_rate",),
    "finetune_ckpt": ("init_from",),
    "tokenizer": ("vae_ckpt",),
    "align": ("align_dir",),
    "projector_ckpt": ("align_dir", "resume"),
    "model": ("vl_model",),
    "window": ("window_type",),
    "workers": ("num_workers",),
}


@dataclass(frozen=True)
class Rule:
    """What a flat key may be."""

    kind: type | tuple[type, ...]
    says: str
    minimum: float | None = None
    choices: tuple = ()
    optional: bool = False
    holds: Callable[[Any], bool] = lambda value: True  # for values of the right kind

    def allows(self, value: Any) -> bool:
        if not isinstance(value, self.kind) or (isinstance(value, bool) and self.kind is not bool):
            return False
        if self.choices and value not in self.choices:
            return False
        if self.minimum is not None and isinstance(value, int | float) and value < self.minimum:
            return False
        return self.holds(value)


def _number(minimum: float, *, optional: bool = False) -> Rule:
    return Rule((int, float), f"a number of at least {minimum:g}", minimum=minimum, optional=optional)


def _count(minimum: int, *, optional: bool = False) -> Rule:
    return Rule(int, f"a whole number of at least {minimum}", minimum=minimum, optional=optional)


def _choice(*values: str, optional: bool = False) -> Rule:
    return Rule(str, f"one of {', '.join(values)}", choices=values, optional=optional)


def _size(name: str, *, optional: bool = True) -> Rule:
    """One of a preset's sizes."""
    low, high = LIMITS[name]
    kind, says = (int, "a whole number") if isinstance(low, int) else ((int, float), "a number")
    return Rule(kind, f"{says} from {low} to {high}", optional=optional, holds=lambda size: within(size, *LIMITS[name]))


def _taken_by(transform: type, name: str) -> Callable[[Any], bool]:
    """Whether a transform accepts a value."""

    def holds(value: Any) -> bool:
        try:
            transform(**{name: value})
        except ValueError:
            return False
        return True

    return holds


def _is_scheduler(name: str) -> bool:
    from torch.optim import lr_scheduler

    kind = getattr(lr_scheduler, name, None)
    known = isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler)
    unfit = (lr_scheduler.LRScheduler, lr_scheduler.ReduceLROnPlateau)
    return name in ("cosine", "one_cycle", "constant") or (known and kind not in unfit)


def _is_device(name: str) -> bool:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        return False
    return device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count())


def _are_of(table: Container[str]) -> Callable[[list | dict], bool]:
    """Whether some names are given, all of them the table's."""
    return lambda names: bool(names) and all(name in table for name in names)


def _are_sizes(sizes: dict) -> bool:
    counts = all(type(count) is int and count > 0 for count in sizes.values())
    return counts and set(sizes) <= {"width", "num_layers"} and sizes.get("width", 32) % 32 == 0


SHARE = Rule((int, float), "a number from 0 to 1", minimum=0, holds=lambda share: share <= 1)
SWITCH = Rule(bool, "True or False")
RULES = {
    "dataset_dir": Rule(str, "a folder", optional=True),
    "output_dir": Rule(str, "a folder", holds=bool),
    "resume": Rule(
        (str, int), "latest or a step", minimum=0, optional=True, holds=lambda v: v == "latest" or isinstance(v, int)
    ),
    "seed": _count(0),
    "scale": _choice(*SCALES),
    "preset": _choice(*PRESETS),
    "windows": Rule((list, dict), f"a list like ['lung','bone'] of {', '.join(WINDOWS)}", holds=_are_of(WINDOWS)),
    "window_type": _choice(*WINDOWS, optional=True),
    "training_stage": Rule(int, "0, 1 or 2, as the file has it", choices=(0, 1, 2)),
    "features": _choice("window", "sdf"),
    "factors": Rule(
        list,
        "a list like [1,2] of whole numbers, 1 first",
        holds=lambda v: v[:1] == [1] and all(type(n) is int for n in v),
    ),
    "sharp_weight": _number(0),
    "keep": _choice(*KEEPS),
    "min_points": _count(1),
    "max_points": _count(1, optional=True),
    "max_shift": Rule(
        (int, float), "a share of the grid's side, from 0 to below 1", holds=_taken_by(RandTranslated, "max_shift")
    ),
    "max_rotation": Rule((int, float), "degrees from 0 to 45", holds=_taken_by(RandAffined, "max_rotation")),
    "max_scale": Rule((int, float), "a number from 0 to 0.5", holds=_taken_by(RandAffined, "max_scale")),
    "structures": Rule(int, "a whole number of at least 0", holds=_taken_by(RandStructuresd, "number")),
    "sharpness": Rule((int, float), "a number from 0 to 1", holds=_taken_by(RandAcquisitiond, "sharpness")),
    "slice_blur": Rule((int, float), "a number from 0 to 1", holds=_taken_by(RandAcquisitiond, "slice_blur")),
    "grain": Rule((int, float), "a number of at least 0", holds=_taken_by(RandAcquisitiond, "grain")),
    "num_workers": _count(0),
    "resolution": Rule(
        int,
        f"a multiple of 8 up to {LIMITS['resolution'][1]}, or null as the preset has it",
        optional=True,
        holds=lambda side: side % 8 == 0 and within(side, *LIMITS["resolution"]),
    ),
    "spacing": _size("spacing"),
    "model_channels": _size("model_channels"),
    "latent_channels": _size("latent_channels"),
    "num_embeddings": _size("num_embeddings"),
    "num_blocks": _size("num_blocks"),
    "norm": _choice(*NORMS, optional=True),
    "pool": _choice(*POOLS, optional=True),
    "pca": Rule(bool, "True or False", optional=True),
    "pretrained_vae_path": Rule(str, "auto, null or a path", optional=True),
    "init_from": Rule(str, "a path"),
    "device": Rule(str, "cpu, or a CUDA device of this machine such as cuda:0", holds=_is_device),
    "tokenizer": Rule(str, "a checkpoint, an output folder, a bundle or a name that ships", optional=True),
    "scan": Rule(str, "a scan", optional=True),
    "shape": Rule(str, "a mesh, a file of signed distance, or a folder of them", optional=True),
    "support": SWITCH,
    "question": Rule(str, "text", optional=True),
    "language_model": Rule(str, "a hub name or a folder", optional=True),
    "split": Rule(str, "the name of a split such as train or val", optional=True),
    "refine": _count(0),
    "levels": _count(1, optional=True),
    "max_cases": _count(1, optional=True),
    "warmup_steps": _count(1),
    "decoder_steps": _count(0),
    "codebook": _choice(*(name for name in CODEBOOKS if name != "none")),
    "rotation_trick": SWITCH,
    "normalize_codes": SWITCH,
    "quantizer_levels": _size("quantizer_levels", optional=False),
    "level_dropout": SHARE,
    "max_steps": _count(1),
    "batch_size_per_gpu": _count(1),
    "batch_split": _count(1),
    "use_checkpoint": SWITCH,
    "use_graphs": SWITCH,
    "sparse_backend": Rule(str, "auto, torch, triton or spconv", optional=True),
    "amp": _choice("off", "bf16", "fp16"),
    "learning_rate": _number(0),
    "lr_scheduler": Rule(str, "cosine, one_cycle, constant or a torch scheduler", holds=_is_scheduler),
    "warmup_lr_steps": _count(0, optional=True),
    "grad_clip": Rule((int, float), "a number above 0, or null not to clip", optional=True, holds=lambda v: v > 0),
    "loss_type": _choice(*LOSS_TYPES),
    "window_weights": Rule(
        list, "null, or a list of numbers from 0, one a window, not all 0", optional=True, holds=are_weights
    ),
    "lambda_vq": _number(0),
    "lambda_commitment": _number(0),
    "lambda_kl": _number(0),
    "lambda_subdivision": _number(0),
    "lambda_l2": _number(0),
    "ema_rate": SHARE,
    "i_print": _count(1),
    "i_log": _count(1),
    "i_sample": _count(1),
    "i_save": _count(1),
    "val_interval": _count(1),
    "keep_last": _count(1),
    # alignment and its evaluation
    "data": Rule(str, "a manifest, a prepared dataset with text, or a folder", optional=True),
    "dataset": Rule(str, "the dotted path of a torch Dataset", optional=True, holds=lambda name: "." in name),
    "image_root": Rule(str, "a folder", optional=True),
    "align_dir": Rule(str, "the output folder of an alignment run"),
    "vl_model": Rule(str, "a Qwen2-VL or Qwen3-VL by hub name or path"),
    "vae_ckpt": Rule(str, "a tokenizer: a checkpoint, an output folder, a bundle or a name that ships", optional=True),
    "vae_config": Rule((str, dict), "a path", optional=True),
    "dummy_data": SWITCH,
    "dummy_samples": _count(1),
    "skip_bad": SWITCH,
    "max_3d_tokens": _count(1),
    "max_text_tokens": _count(1),
    "max_new_tokens": _count(1),
    "num_shuffles": _count(1),
    "token_reduction": _choice(*REDUCTIONS),
    "use_3d_pos": SWITCH,
    "position": _choice("1d", "mrope3d"),
    "fusion": _choice("placeholder", "prefix"),
    "projector_layers": Rule(
        int,
        f"a whole number from 1 to {projector.MAX_LAYERS}",
        holds=lambda layers: 1 <= layers <= projector.MAX_LAYERS,
    ),
    "with_volumes": SWITCH,
    "train_language": SWITCH,
    "use_lora": SWITCH,
    "compile_layers": SWITCH,
    "lora_r": _count(1),
    "lora_alpha": _count(1),
    "lora_dropout": Rule((int, float), "a number from 0 to below 1", minimum=0, holds=lambda v: v < 1),
    "num_phantoms": _count(2),
    "report_share": Rule((int, float), "a number from 0 to 1", minimum=0, holds=lambda share: share <= 1),
    "detector_phantoms": _count(0),
    "val_phantoms": _count(2),
    "val_rows": _count(1),
    "about": Rule(list, f"a list like ['nodule'] of {', '.join(PLACES)}", optional=True, holds=_are_of(PLACES)),
    "tiny": Rule(dict, "like {'width': 64, 'num_layers': 2}, width a multiple of 32", optional=True, holds=_are_sizes),
    "epochs": _count(1),
    "batch_size": _count(1),
    "weight_decay": _number(0),
}
