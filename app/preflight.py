"""Everything checked before anything is trained, and the one way to end a run over a user's mistake.

MONAI accepts a mistyped flag, drops `--x None` and skips a plain-text step, all in silence. `check`, the first step of
every bundle, reads the command line again and refuses these in one line each. `fail` writes that line and leaves; any
other exception would reach the user as MONAI's forty-line chain.
"""

import difflib
import errno
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser

from app.language.phantom_text import PLACES
from networks.presets import PRESETS
from transforms.array import WINDOWS

log = logging.getLogger(__name__)

RUN_ARGUMENTS = {
    "run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "tracking", "args_file",
}  # fmt: skip
STEP_LISTS = ("initialize", "run", "training", "finalize")

# Names of the original scripts, and common other names, with ours: the first that a run has is told.
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
    holds: Callable[[Any], bool] = lambda value: True  # for values of the right kind

    def allows(self, value: Any) -> bool:
        if not isinstance(value, self.kind) or (isinstance(value, bool) and self.kind is not bool):
            return False
        if self.choices and value not in self.choices:
            return False
        if self.minimum is not None and isinstance(value, int | float) and value < self.minimum:
            return False
        return self.holds(value)


def _number(minimum: float) -> Rule:
    return Rule((int, float), f"a number of at least {minimum:g}", minimum=minimum)


def _count(minimum: int) -> Rule:
    return Rule(int, f"a whole number of at least {minimum}", minimum=minimum)


def _choice(*values: str) -> Rule:
    return Rule(str, f"one of {', '.join(values)}", choices=values)


def _switch() -> Rule:
    return Rule(bool, "True or False")


def _is_scheduler(name: str) -> bool:
    from torch.optim import lr_scheduler

    kind = getattr(lr_scheduler, name, None)
    known = isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler)
    return name in ("cosine", "one_cycle", "constant") or (known and kind is not lr_scheduler.ReduceLROnPlateau)


def _are_windows(names: list) -> bool:
    return bool(names) and all(name in WINDOWS for name in names)


def _are_sizes(sizes: dict) -> bool:
    counts = all(type(count) is int and count > 0 for count in sizes.values())
    return counts and set(sizes) <= {"width", "num_layers"} and sizes.get("width", 32) % 32 == 0


def _are_findings(names: list) -> bool:
    return bool(names) and all(name in PLACES for name in names)


RULES = {
    "dataset_dir": Rule(str, "a folder"),
    "output_dir": Rule(str, "a folder"),
    "resume": Rule((str, int), "latest or a step", minimum=0, holds=lambda v: v == "latest" or isinstance(v, int)),
    "seed": _count(0),
    "scale": _choice("auto", "demo", "full"),
    "preset": _choice(*PRESETS),
    "windows": Rule(list, f"a list like ['lung','bone'] of {', '.join(WINDOWS)}", holds=_are_windows),
    "window_type": _choice(*WINDOWS),
    "training_stage": Rule(int, "0, 1 or 2, as the file has it", choices=(0, 1, 2)),
    "features": _choice("window"),
    "keep": _choice("body", "nonzero", "band", "informative"),
    "min_points": _count(1),
    "max_points": _count(1),
    "num_workers": _count(0),
    "resolution": Rule(int, "a multiple of 8", minimum=8, holds=lambda side: side % 8 == 0),
    "spacing": _number(0.01),
    "model_channels": _count(1),
    "latent_channels": _count(1),
    "num_embeddings": _count(2),
    "num_blocks": _count(0),
    "pretrained_vae_path": Rule(str, "auto, null or a path"),
    "init_from": Rule(str, "a path"),
    "tokenizer": Rule(str, "a checkpoint, an output folder or a bundle"),
    "split": Rule(str, "the name of a split"),
    "max_cases": _count(1),
    "warmup_steps": _count(1),
    "decoder_steps": _count(0),
    "codebook": _choice("ema", "gradient", "fsq"),
    "rotation_trick": _switch(),
    "normalize_codes": _switch(),
    "quantizer_levels": _count(1),
    "max_steps": _count(1),
    "batch_size_per_gpu": _count(1),
    "batch_split": _count(1),
    "use_checkpoint": _switch(),
    "sparse_backend": Rule(str, "auto, torch, triton or spconv"),
    "amp": _choice("off", "bf16", "fp16"),
    "learning_rate": _number(0),
    "lr_scheduler": Rule(str, "cosine, one_cycle, constant or a torch scheduler", holds=_is_scheduler),
    "warmup_lr_steps": _count(0),
    "grad_clip": _number(0),
    "loss_type": _choice("l1", "l2", "mse", "l1_l2"),
    "lambda_vq": _number(0),
    "lambda_commitment": _number(0),
    "lambda_kl": _number(0),
    "lambda_subdivision": _number(0),
    "ema_rate": Rule((int, float), "a number from 0 to 1", minimum=0, holds=lambda rate: rate <= 1),
    "i_print": _count(1),
    "i_log": _count(1),
    "i_sample": _count(1),
    "i_save": _count(1),
    "val_interval": _count(1),
    "keep_last": _count(1),
    # alignment and its evaluation
    "data": Rule(str, "a manifest, a prepared dataset with text, or a folder"),
    "dataset": Rule(str, "the dotted path of a torch Dataset", holds=lambda name: "." in name),
    "image_root": Rule(str, "a folder"),
    "align_dir": Rule(str, "the output folder of an alignment run"),
    "vl_model": Rule(str, "a Qwen2-VL or Qwen3-VL by hub name or path"),
    "vae_ckpt": Rule(str, "a tokenizer: a checkpoint, an output folder or a bundle"),
    "vae_config": Rule((str, dict), "a path"),
    "dummy_data": _switch(),
    "dummy_samples": _count(1),
    "skip_bad": _switch(),
    "max_3d_tokens": _count(1),
    "max_text_tokens": _count(1),
    "max_new_tokens": _count(1),
    "token_reduction": _choice("pool", "merge", "fps", "truncate"),
    "use_3d_pos": _switch(),
    "position": _choice("1d", "mrope3d"),
    "fusion": _choice("placeholder", "prefix"),
    "projector_layers": _count(1),
    "with_volumes": _switch(),
    "train_language": _switch(),
    "use_lora": _switch(),
    "lora_r": _count(1),
    "lora_alpha": _count(1),
    "num_phantoms": _count(2),
    "about": Rule(list, f"a list like ['nodule'] of {', '.join(PLACES)}", holds=_are_findings),
    "tiny": Rule(dict, "like {'width': 64, 'num_layers': 2}, width a multiple of 32", holds=_are_sizes),
    "epochs": _count(1),
    "batch_size": _count(1),
    "weight_decay": _number(0),
}


def fail(code: str, what: str, remedy: str, *, status: int = 2) -> NoReturn:
    """Ends the process with one line on standard error: 2 the call or a config is wrong, 3 an input was refused."""
    sys.stderr.write(f"{code}: {what.rstrip('.')}. {remedy[:1].upper()}{remedy[1:].rstrip('.')}.\n")
    sys.stderr.flush()
    raise SystemExit(status)


@dataclass(frozen=True)
class CommandLine:
    """A `python -m monai.bundle run` call, read again."""

    config: dict[str, Any]  # the config files merged, without overrides
    overrides: dict[str, Any]
    raw: dict[str, str]  # overrides as they were typed


def read_command_line(argv: list[str]) -> CommandLine | None:
    """None when the process is no bundle run."""
    if not (len(argv) > 1 and re.search(r"monai[/\\.]bundle", argv[0]) and argv[1] == "run"):
        return None
    raw: dict[str, str] = {}
    words = iter(enumerate(argv[2:], start=2))
    for i, word in words:
        if not word.startswith("--"):
            continue
        name, equals, value = word[2:].partition("=")
        if not equals:
            following = argv[i + 1] if i + 1 < len(argv) else "--"
            value = "True" if following.startswith("--") else following
            if not following.startswith("--"):
                next(words)
        raw[name.replace("-", "_")] = value
    files = DefaultParseValue(raw.get("config_file", "[]"))
    config = ConfigParser.load_config_files(files)
    overrides = {name: DefaultParseValue(value) for name, value in raw.items() if name not in RUN_ARGUMENTS}
    return CommandLine(config, overrides, {name: raw[name] for name in overrides})


def check() -> None:
    """The first step of every bundle. Says nothing when all is well."""
    one_line_errors()
    call = read_command_line(sys.argv)
    if call is None:
        return
    _check_structure(call.config)
    for name, value in call.overrides.items():
        _check_override(name, value, call)


def _check_override(name: str, value: Any, call: CommandLine) -> None:
    path = re.split(r"::|#", name)
    is_part = isinstance(call.config.get(name), dict) and not (isinstance(value, dict) or str(value)[:1] in "$@%")
    if path[0] not in call.config or is_part:
        known = [ours for ours in OTHER_NAMES.get(path[0], ()) if ours.split()[0] in {*call.config, "torchrun"}]
        if known:
            fail("UNKNOWN_KEY", f"this run has no key {path[0]}", f"here it is {known[0]}")
        if is_part:
            fail(
                "UNKNOWN_KEY",
                f"{name} is a part of this config, not a setting",
                "override it with a dict, or by # keys",
            )
        _unknown(path[0], call.config)
    node: Any = call.config
    for depth, part in enumerate(path):
        if isinstance(node, dict) and part not in node:
            _unknown(part, node, under="#".join(path[:depth]))
        if isinstance(node, dict | list):
            node = node[int(part) if isinstance(node, list) else part]
    if call.raw[name] == "None":
        if node is None:  # what the file has is null already
            return
        fail("NULL_IGNORED", f"MONAI ignores --{name} None and keeps {node!r}", f"write --{name} '$None' to set null")
    if len(path) == 1 and name in RULES:
        _check_value(name, value)


def _check_value(name: str, value: Any) -> None:
    rule = RULES[name]
    if isinstance(value, str) and value[:1] in "$@%":
        return
    if not rule.allows(value):
        fail("BAD_VALUE", f"{name} must be {rule.says}, got {value!r}", f"pass another --{name}")


def _unknown(name: str, known: dict, *, under: str = "") -> NoReturn:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    where = f"{under} has no key {name}" if under else f"this run has no key {name}"
    fail("UNKNOWN_KEY", where, f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(map(str, known)))}")


def _check_structure(config: dict[str, Any]) -> None:
    """Mistakes that MONAI passes over: text as a step, a misspelt _target_, a reference to nothing."""
    for name in STEP_LISTS:
        steps = config.get(name, config.get("+" + name, []))
        for i, step in enumerate(steps if isinstance(steps, list) else [steps]):
            if isinstance(step, str) and step[:1] not in ("$", "@", "%"):
                fail("PLAIN_STEP", f"{name}#{i} is plain text and would do nothing: {step!r}", "begin it with $")
    for path, key, value in _walk(config):
        if isinstance(key, str) and key != "_target_" and re.fullmatch(r"_*target_*", key, re.IGNORECASE):
            fail("BAD_TARGET_KEY", f"{path} holds {key}, which MONAI would pass over", "write _target_")
        if not isinstance(value, str) or value[:1] not in "$@":
            continue
        for reference in re.findall(r"@([A-Za-z_]\w*(?:(?:#|::)\w+)*)", value):
            node: Any = config
            for part in re.split(r"::|#", reference):
                inside = isinstance(node, list) and part.isdigit() and int(part) < len(node)
                if not inside and not (isinstance(node, dict) and part in node):
                    near = difflib.get_close_matches(part, list(node) if isinstance(node, dict) else [], n=1)
                    hint = f"did you mean {near[0]}?" if near else "define it, or remove the reference"
                    fail("MISSING_REFERENCE", f"{path} refers to @{reference}, which does not exist", hint)
                node = node[int(part)] if isinstance(node, list) else node[part]


def _walk(node: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        here = f"{path}#{key}" if path else str(key)
        yield here, key, value
        yield from _walk(value, here)


def resolved_config(settings: object = None) -> dict[str, Any]:
    """The config of this run: files, overrides, and the plan's values where a key reads them from the plan."""
    call = read_command_line(sys.argv)
    if call is None:
        return {}
    config = json.loads(json.dumps(call.config))
    for name, value in call.overrides.items():
        node, *rest = config, *re.split(r"::|#", name)
        for part in rest[:-1]:
            node = node[int(part) if isinstance(node, list) else part]
        node[int(rest[-1]) if isinstance(node, list) else rest[-1]] = value
    for name, value in config.items():
        if settings is not None and isinstance(value, str) and value.startswith("$@plan."):
            found: Any = settings
            for part in value.removeprefix("$@plan.").split("."):
                found = getattr(found, part)
            config[name] = list(found) if isinstance(found, tuple) else found
    return config


def one_line_errors() -> None:
    """From here on a mistake of the user ends the process in one line; the trace goes to the log.

    A ValueError raised in this project's code is such a mistake: that is how it refuses values. Anything else is a
    fault of ours and keeps its trace.
    """
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        said = _refusal(cause)
        if said is not None:
            log.debug("".join(traceback.format_exception(kind, error, trace)))
            _leave(f"BAD_VALUE: {said}\n", 2)
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            _leave(
                f"DISK_FULL: {cause.strerror}: {cause.filename or 'output_dir'}. Free space, then --resume latest.\n", 2
            )
        if type(cause).__name__ == "OutOfMemoryError":
            advice = "lower, in this order: batch_size_per_gpu, max_points, resolution; or set use_checkpoint true"
            _leave(f"OUT_OF_MEMORY: {str(cause).splitlines()[0]} {advice}.\n", 2)
        usual(kind, error, trace)

    sys.excepthook = hook


def _refusal(error: BaseException) -> str | None:
    """What a refusal of ours says; None for any other error. A loader's worker sends its trace as text, cause first."""
    text, refused = str(error).strip(), isinstance(error, ValueError)
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if " in DataLoader worker process " in text:
        cause = re.split(r"\n\n(?:The above exception|During handling)", text)[0]
        files = re.findall(r'^ *File "(.+?)", line', cause, re.MULTILINE)
        _, refused, text = cause.rpartition("\nValueError: ")
    here = Path(__file__).resolve().parent.parent
    ours = bool(files) and any(
        Path(files[-1]).is_relative_to(here / part) for part in ("app", "transforms", "networks")
    )
    return text.splitlines()[0] if refused and ours and text else None


def _leave(line: str, status: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.write(line)
    sys.stderr.flush()
    os._exit(status)  # an exception hook cannot choose the exit status otherwise
