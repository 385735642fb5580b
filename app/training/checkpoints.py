"""What a run keeps on disk: complete sets of files per step, the best step, and finding and loading them again.

A set is `{name}_step….pt`, `{name}_ema{rate}_step….pt` and `misc_step….pt`. Files are written beside and renamed, misc
last: a step with a misc file is whole, any other is ignored. Weights are flat state dicts that load without running
code and carry the sizes of their network (`networks.presets.Preset`).
"""

import dataclasses
import json
import logging
import math
import os
import re
import zipfile
from pathlib import Path

import torch
from torch import nn

from app.shared.json_files import read_object, write_object
from app.shared.refusals import Refused
from app.training import shipped
from app.training.key_rules import RULES
from app.training.seals import content_hash, sealed, tensors_hash
from networks import pretrained
from networks.presets import CHECKSUM, GoneSizes, Preset
from networks.vqvae import SparseVQVAE, build_vqvae
from transforms.grid import RESAMPLER

log = logging.getLogger(__name__)
NEWEST_TOKENIZERS = ("outputs/vq_stage2", "outputs/vq_stage1")
SET_FILE = re.compile(
    r"(?:misc|(?:vae|vqvae|align)(?:_ema[\d.e+-]+)?)_step(\d{7,})\.pt(\.part)?"
)  # no other name is removed
CODEBOOK_FIELDS = {"codebook", "num_embeddings", "rotation_trick", "normalize_codes", "quantizer_levels"}
NO_SIZES = {"max_points", "prepared", "resampler"}  # of a preset, what no tensor's shape depends on
DATA_FIELDS = ("resolution", "spacing", "windows", "features", "keep")


def step_file(output_dir: Path, name: str, step: int) -> Path:
    return Path(output_dir) / "ckpts" / f"{name}_step{step:07d}.pt"


def complete_steps(output_dir: str | Path) -> list[int]:
    """Steps whose set is whole, oldest first."""
    return sorted(_files_of(output_dir, "misc"))


def step_to_resume(output_dir: str | Path, resume: str | int | None) -> int | None:
    """The step that `resume` (null, latest or a number) names; None starts fresh."""
    if resume is None:
        return None
    steps = complete_steps(output_dir)
    if resume == "latest":
        return steps[-1] if steps else None
    if not isinstance(resume, int) or isinstance(resume, bool):
        raise Refused("BAD_RESUME", f"resume must be latest or a step, got {resume!r}")
    if resume not in steps:
        kept = ", ".join(map(str, steps)) or "none"
        remedy = "pass one of these" if steps else "train without --resume"
        raise Refused("NO_CHECKPOINT", f"{output_dir} has no complete step {resume}; it has {kept}", remedy)
    return resume


def warm_up_step(output_dir: str | Path, resume: str | int | None) -> int | None:
    """The step of a warm-up that `resume: latest` goes on with: one that no complete set has followed."""
    if resume != "latest" or complete_steps(output_dir):
        return None
    return max(_files_of(output_dir, "warmup"), default=None)


def save_warm_up(output_dir: Path, step: int, content: dict) -> None:
    """One file, whole or not there; it replaces earlier ones."""
    write_atomically({**content, CHECKSUM: content_hash(content)}, step_file(output_dir, "warmup", step))
    drop_warm_ups(output_dir, keep=step)


def drop_warm_ups(output_dir: Path, *, keep: int | None = None) -> None:
    for step, path in _files_of(output_dir, "warmup").items():
        if step != keep:
            path.unlink()


def _files_of(output_dir: str | Path, name: str) -> dict[int, Path]:
    """The files of one name by their step."""
    paths = list(Path(output_dir, "ckpts").glob(f"{name}_step*.pt"))
    return {int(match[1]): path for path in paths if (match := re.fullmatch(rf"{name}_step(\d{{7,}})\.pt", path.name))}


def write_atomically(content: dict, path: Path) -> None:
    """Saves beside and renames, so that a file under its name is always whole."""
    part = path.with_name(path.name + ".part")
    try:
        torch.save(content, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        part.unlink(missing_ok=True)
        kept = complete_steps(path.parent.parent)
        last = f"the last complete step is {kept[-1]}" if kept else "no complete step exists yet"
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if isinstance(error, RuntimeError) and "unexpected pos" in reason:  # a write that came out short
            reason = "No space left on device"
        raise Refused("SAVE_FAILED", f"could not write {path} ({reason}); {last}") from error


def save_set(output_dir: Path, step: int, weights: dict[str, dict], misc: dict) -> None:
    """One complete set; misc last, as the commit mark."""
    for name, state in weights.items():
        write_atomically(sealed(state), step_file(output_dir, name, step))
    write_atomically({**misc, CHECKSUM: content_hash(misc)}, step_file(output_dir, "misc", step))


def prune(output_dir: Path, keep_last: int) -> None:
    """Removes older sets than the last few; the best step stays. The commit mark goes first."""
    best = read_best(output_dir)
    for step in complete_steps(output_dir)[:-keep_last]:
        if step != best:
            step_file(output_dir, "misc", step).unlink(missing_ok=True)
            for path, number, _ in _files_of_sets(output_dir):
                if number == step:
                    path.unlink()


def _files_of_sets(output_dir: Path) -> list[tuple[Path, int, bool]]:
    """Files that runs of ours write to ckpts/, commit marks first: path, step and whether it is half written."""
    paths = sorted(Path(output_dir, "ckpts").glob("*_step*"), key=lambda path: not path.name.startswith("misc"))
    matches = ((path, SET_FILE.fullmatch(path.name)) for path in paths)
    return [(path, int(match[1]), match[2] is not None) for path, match in matches if match]


def put_aside(output_dir: Path, *, after: int) -> None:
    """Moves sets later than a step to ckpts/aside, and removes what a killed run left half done."""
    aside = Path(output_dir, "ckpts", "aside")
    complete = complete_steps(output_dir)
    for path, step, half in _files_of_sets(output_dir):
        if half or step not in complete:
            path.unlink()
        elif step > after:
            aside.mkdir(exist_ok=True)
            os.replace(path, aside / path.name)


def write_best(output_dir: Path, scores: dict[int, float], *, name: str = "val_recon") -> None:
    """Names the step of the lowest score; of equals the first. One that is no number is never the best."""
    path = Path(output_dir, "ckpts", "best.json")
    scores = {step: score for step, score in scores.items() if math.isfinite(score)}
    if not scores:
        path.unlink(missing_ok=True)
        return
    step = min(scores, key=scores.get)
    write_object(path, {"step": step, name: scores[step]}, indent=None)


def best_score(output_dir: str | Path) -> dict[int, float]:
    """The best step so far with its score; empty before the first."""
    path = Path(output_dir, "ckpts", "best.json")
    if not path.exists():
        return {}
    stored = read_object(path) or {}
    step, score = stored.get("step"), stored.get("val_recon", stored.get("val_loss"))
    if type(step) is not int or step < 0 or type(score) not in (int, float) or not math.isfinite(score):
        what = f"{path} does not name a step and its score"
        raise Refused("BAD_RUN", what, "remove it: the newest step is taken then")
    return {step: score}


def read_best(output_dir: str | Path) -> int | None:
    return next(iter(best_score(output_dir)), None)


def read_tensors(path: str | Path) -> object:
    """What a checkpoint file holds, a dict where it is one of ours, read without running code."""
    try:
        if Path(path).suffix == ".safetensors":
            return shipped.read_safetensors(Path(path))
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Refused("NO_CHECKPOINT", f"{path} does not exist") from None
    except Refused:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        if not zipfile.is_zipfile(path):  # what torch says then is about pickles, or a page long
            reason = "it is no checkpoint, or not a whole one"
        raise Refused("BAD_CHECKPOINT", f"{path} cannot be read ({reason})") from error


def averaged_file(path: str | Path) -> Path:
    """The averaged weights of an output folder (its best complete step, else the newest), or of a name that ships; a
    file stays itself.
    """
    path = shipped.weights_of(path)
    if not path.is_dir():
        return path
    steps = complete_steps(path)
    if not steps:
        raise Refused("NO_CHECKPOINT", f"{path} has no complete checkpoint", "train it first, or name another folder")
    best = read_best(path)
    step = best if best in steps else steps[-1]
    averaged = (file for file, number, half in _files_of_sets(path) if number == step and not half)
    file = next((file for file in averaged if "_ema" in file.name), None)
    if file is None:
        what = f"{path} has no averaged weights of step {step}, so it is no tokenizer"
        raise Refused("NO_CHECKPOINT", what, "name the output folder of stage 0, 1 or 2")
    return file


def read_weights(path: str | Path) -> tuple[dict, Preset]:
    """State dict and sizes of one of our checkpoints."""
    path = averaged_file(path)
    state = pretrained.autoencoder_in(read_tensors(path))
    return state, check_weights(state, path)


def check_weights(state: object, path: str | Path) -> Preset:
    """The sizes of a state dict whose values are tensors, finite, and as they were written."""
    if pretrained.is_published(state):
        what = f"{path} holds the published autoencoder, which has no codebook"
        raise Refused(
            "NO_CODEBOOK",
            what,
            "train one on it: bundles/vq_stage1.json with --pretrained_vae_path (docs/pretrained.md)",
        )
    if not isinstance(state, dict) or "_extra_state" not in state:
        raise Refused("FOREIGN_CHECKPOINT", f"{path} does not say what it was made for")
    _check_tensors(state, path)
    try:
        stored = state["_extra_state"]
        sizes = Preset.from_tensor(stored)
        checksum = json.loads(bytes(stored.tolist())).get(CHECKSUM)
    except GoneSizes as error:
        remedy = "train it again (the demo's takes three minutes), or name another"
        raise Refused("BAD_CHECKPOINT", f"{path} is of an earlier version: {error}", remedy) from None
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        remedy = "update this software if a later one made it, else it is damaged: use another step"
        raise Refused("BAD_CHECKPOINT", f"the sizes in {path} cannot be read ({reason})", remedy) from error
    if checksum is not None and checksum != tensors_hash(state):  # older files do not say
        raise Refused("BAD_CHECKPOINT", f"the weights in {path} are not those that were saved")
    return sizes


def _check_tensors(state: dict, path: str | Path) -> None:
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise Refused("BAD_CHECKPOINT", f"{path} holds no plain tensor as {name!r:.60}")
        if not value.isfinite().all():
            raise Refused("BAD_CHECKPOINT", f"{path} holds values that are no numbers, in {name}")


def load_tokenizer(path: str | Path) -> SparseVQVAE:
    """A network as it was saved, in evaluation mode."""
    state, sizes = read_weights(path)
    check_extent(sizes, state, path)
    network = build_vqvae(sizes)
    load_weights(network, state, path)
    return network.eval()


def load_weights(network: nn.Module, state: dict, path: str | Path) -> None:
    """All weights of a network, out of the file that is named where they do not fit."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split("\n\t")[1:2]).strip().rstrip(".")  # of what torch complains about
        raise Refused("BAD_CHECKPOINT", f"{path} does not fit ({first or 'tensors of other sizes'})") from error


def check_extent(sizes: Preset, state: dict, path: str | Path) -> None:
    """Before memory is taken: a network of these sizes has about as many numbers as the file."""
    with torch.device("meta"):
        wanted = sum(tensor.numel() for tensor in build_vqvae(sizes).state_dict().values())
    stored = sum(tensor.numel() for tensor in state.values())
    if wanted > 4 * stored + 1_000_000:
        raise Refused("BAD_CHECKPOINT", f"{path} holds {stored:,} numbers, its sizes say {wanted:,}")


def start_from(network: SparseVQVAE, path: str | Path, *, codebook: bool) -> Path:
    """Weights only, from another stage. Without `codebook` the quantiser stays as it is; then published ones do too."""
    file = averaged_file(path)
    state = pretrained.autoencoder_in(read_tensors(file))
    if not codebook and pretrained.is_published(state):
        _start_from_published(network, state, file)
        return file
    sizes = check_weights(state, file)
    if codebook and sizes.codebook == "none":
        raise Refused("NO_CODEBOOK", f"{file} is a continuous autoencoder without codes")
    skip = {"rotation_trick"} if codebook else CODEBOOK_FIELDS  # how gradients pass is no part of the weights
    check_same(sizes, network.sizes, source=file, skip=skip)
    if is_resampled_otherwise(sizes):
        log.warning("%s learned from data resampled by an older rule, this run's are by %s", file.name, RESAMPLER)
    own = () if codebook else ("vq.",)  # what of the network stays as it is, beside its sizes
    taken = {name: tensor for name, tensor in state.items() if not name.startswith(("_extra_state", *own))}
    kept = {name: part for name, part in network.state_dict().items() if name.startswith(("_extra_state", *own))}
    load_weights(network, taken | kept, file)
    return file


def _start_from_published(network: SparseVQVAE, state: dict, file: Path) -> None:
    """Encoder and decoder; the heads, which published weights have none of, stay as they are."""
    _check_tensors(state, file)
    wanted = "--preset direct3d_s2 and one feature a voxel (--features sdf, or a --window_type)"
    if network.sizes.pool != "legacy":
        what = f"{file} holds the published autoencoder, this run's network has pool {network.sizes.pool}"
        raise Refused("OTHER_TOKENIZER", what, f"pass {wanted}", status=2)
    try:
        own = pretrained.converted(state, network)
    except ValueError as error:
        what = f"{file} is not the published autoencoder of this run's sizes ({error})"
        raise Refused("WEIGHTS_MISFIT", what, f"pass {wanted}") from error
    network.load_state_dict(own, strict=False)  # strict already: what is not among them is heads and codebook
    log.info("published weights: %d tensors; heads and codebook are new", len(own))


def check_same(
    stored: Preset, wanted: Preset, *, source: Path, skip: set[str], otherwise: str = "train the earlier stage again"
) -> None:
    """Refuses a checkpoint of other sizes than the run's: names the first difference and all flags that fit it."""
    names = [field.name for field in dataclasses.fields(Preset) if field.name not in skip | NO_SIZES]
    other = [name for name in names if getattr(stored, name) != getattr(wanted, name)]
    if other:
        name, flags = other[0], dict.fromkeys(_flag(name, getattr(stored, name)) for name in other)
        to_copy = " ".join(flag for flag in flags if flag.startswith("--"))
        to_give = ", ".join(filter(None, (to_copy, *(flag for flag in flags if not flag.startswith("--")))))
        old, new = _plain(getattr(stored, name)), _plain(getattr(wanted, name))
        what = "data made with" if name in DATA_FIELDS else "a network with"
        what = f"{source} is for {what} {name} {old}, this run has {name} {new}"
        raise Refused("OTHER_TOKENIZER", what, f"pass {to_give}, or {otherwise}", status=2)


def is_resampled_otherwise(sizes: Preset) -> bool:
    """Whether a tokenizer's training data came onto its grid by another rule than scans do now."""
    untouched = sizes.prepared is not None and sizes.prepared == (sizes.resolution, sizes.spacing)
    return sizes.features == "window" and sizes.resampler != RESAMPLER and not untouched


def check_resampler(sizes: Preset, *, source: Path) -> None:
    """Ends a resumed run whose earlier steps saw data on their grid by another rule: a run has one."""
    if is_resampled_otherwise(sizes):
        before = sizes.resampler or "the resampler before it was recorded"
        what = f"{source} began on data resampled by {before}, this software resamples by {RESAMPLER}"
        raise Refused(
            "OTHER_RESAMPLER", what, "begin in another --output_dir, from these weights with --init_from", status=2
        )


def _plain(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) and value and isinstance(value[0], str) else str(value)


def _flag(name: str, value: object) -> str:
    if name not in RULES:  # one of the sizes that only a preset sets
        return "the --preset it was made with"
    return f'--{name} "{list(value)}"' if isinstance(value, tuple) else f"--{name} {value}"
