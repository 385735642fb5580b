"""The key tables of docs/training.md: every flat key of every bundle, its defaults as a run resolves them, a meaning.

    python docs/key_table.py     writes them anew between the marks; a test holds the page to what this gives

Defaults come from MONAI's parser, once as the demo and once as the real thing, so that they are those of a run.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from monai.bundle import ConfigParser

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/training.md"
MARKS = "<!-- keys: python docs/key_table.py -->", "<!-- end of keys -->"
STAGES = ("vae", "vq_stage1", "vq_stage2")
OTHERS = ("sdf_vqvae", "align", "evaluate_tokenizer", "evaluate_language", "inference", "inference_shapes", "ask")
OVERLAYS = ("sdf_stage2", "recipe_ct", "recipe_shapellm", "multi_gpu")
WIRING = {"_desc_", "network", "demo", "sizes"}  # scalars of a file that are no settings of a user

BY_MACHINE = {  # defaults that depend on where it runs
    "amp": "`bf16` on CUDA, else `off`",
    "compile_layers": "`true` on CUDA with a stock model",
    "device": "CUDA where there is one, else `cpu`",
    "num_workers": "`0` / cores a GPU less one, at most `8`",
}
MEANINGS = {
    "scan": "the scan: a file or folder, DICOM, NIfTI, NRRD or MHA",
    "question": "what is asked; null: a report",
    "language_model": "where a base model that was a folder lies now",
    "scale": "`demo`, `full`, or `auto`: the demo while no data are given",
    "dataset_dir": "the prepared dataset; without it the built-in phantoms",
    "output_dir": "where the run writes",
    "resume": "`latest` or a step of `output_dir` to go on from",
    "seed": "seed of everything random",
    "preset": "sizes of the network, grid and spacing, by name",
    "training_stage": "0, 1 or 2; each file has its own",
    "windows": "CT windows, one input channel each; their numbers are those of the table",
    "window_type": "one window alone; short for `windows` with one name",
    "features": "what a voxel carries: its values in the windows (`window`) or its signed distance (`sdf`)",
    "factors": "steps take files of `resolution` divided by one of these: several resolutions in one training",
    "sharp_weight": "how much more voxels near sharp edges count, marked by `sdf --sharp DEGREES`",
    "keep": "which voxels are kept: `body`, `nonzero`, `band` or `informative`",
    "min_points": "a sample with fewer voxels is left out and counted",
    "max_points": "a sample with more voxels is cropped to one box (evaluation: split into tiles); null: never",
    "max_shift": "how far samples are moved in training, as a share of the grid's side",
    "max_rotation": "how far samples are turned in training about each axis, in degrees",
    "max_scale": "how much larger or smaller samples are made in training, as a share",
    "structures": "balls and tubes of 3 to 14 mm put into each sample, around so many voxels drawn by chance",
    "sharpness": "how much sharper or softer another scanner's kernel may be: share of what a 3×3×3 filter takes",
    "slice_blur": "how much thicker another scanner's slices may be: share of a mean over three slices",
    "grain": "correlated noise of another scanner, in HU",
    "resolution": "voxels along each side of the grid, a multiple of 8",
    "spacing": "millimetres between voxels",
    "model_channels": "channels of the transformer at an eighth of the resolution",
    "latent_channels": "numbers in a code",
    "num_embeddings": "codes in a codebook",
    "num_blocks": "transformer blocks in encoder and in decoder",
    "norm": "what the encoder normalises over: each `voxel`, or the whole `sample`",
    "pca": "latents begin as principal components of cells in HU, fitted before the first step",
    "pool": "how eight children become a cell: `children` side by side, `mean`, or `legacy` as published weights",
    "codebook": "how codes are learned: `ema` (moving averages), `gradient`, or `fsq` (a fixed grid)",
    "rotation_trick": "gradients past the codes by rotation instead of straight through",
    "normalize_codes": "codes on a sphere",
    "quantizer_levels": "codes a cell, each of what those before left over",
    "level_dropout": "share of samples decoded from fewer levels, alike in all cells or of each its own",
    "pretrained_vae_path": "weights of encoder and decoder: `auto` takes `outputs/vae`; null trains them first",
    "shape": "a mesh, a file of signed distance, or a folder of them",
    "support": "whether tokens keep which voxels there were",
    "init_from": "output folder, or a tokenizer that ships, whose weights are taken over",
    "warmup_steps": "steps of the autoencoder where stage 1 trains it first (of the rate: `warmup_lr_steps`)",
    "decoder_steps": "first steps in which the decoder alone learns",
    "max_steps": "steps of the optimizer",
    "batch_size_per_gpu": "samples of a step on each GPU",
    "batch_split": "parts that a batch is computed in, one after the other, to save memory; losses stay the same",
    "use_checkpoint": "recompute activations instead of keeping them: less memory, slower",
    "use_graphs": "encoder, decoder as CUDA graphs: a third of a host's work, more memory, not with `use_checkpoint`",
    "sparse_backend": "`auto`, `torch`, `triton` or `spconv`; null: what SPARSE_BACKEND says, else `auto`",
    "amp": "number format of the computation: `off`, `bf16` or `fp16`",
    "num_workers": "loader processes",
    "device": "`cpu`, or a CUDA device such as `cuda:0`",
    "learning_rate": "highest learning rate",
    "lr_scheduler": "`cosine`, `one_cycle`, `constant`, or the name of a torch scheduler",
    "lr_scheduler_options": "arguments of a torch scheduler, as a dict",
    "warmup_lr_steps": "steps over which the learning rate rises; null: 2 % of the run",
    "grad_clip": "largest norm of the gradient; null does not clip",
    "loss_type": "reconstruction error: `l1`, `l2` (`mse`), or `l1_l2`, half of each",
    "lambda_l2": "weight of the squared error that is added to the one of loss_type",
    "window_weights": "how much each window counts in the reconstruction error; null: equally",
    "lambda_vq": "weight of the term that pulls codes to the encoder (`codebook gradient` alone)",
    "lambda_commitment": "weight of the term that pulls the encoder to its codes",
    "lambda_kl": "weight of the divergence from a unit normal (stage 0 and the warm-up alone)",
    "lambda_subdivision": "weight of the heads that say which children of a cell exist",
    "ema_rate": "how slowly the averaged weights follow, 0 to 1",
    "i_print": "steps between console lines",
    "i_log": "steps between rows of metrics.jsonl and TensorBoard",
    "i_sample": "steps between pictures",
    "i_save": "steps between checkpoints",
    "val_interval": "steps between validations",
    "keep_last": "checkpoints kept, besides the best",
    "tokenizer": "path or name; null: newest of your scans in `outputs/`, else `ct_base` (language: its own)",
    "split": "which cases or rows; language, null: test, else val",
    "levels": "codes of each cell, the first so many, a fraction on average; null: all",
    "refine": "steps from the encoder's codes to others that decode better",
    "max_cases": "at most this many cases; null: all",
    "data": "manifest, prepared dataset with text, or folder; null: built-in phantoms",
    "dataset": "dotted path of a torch Dataset of your own",
    "image_root": "folder that a manifest's image names are in",
    "align_dir": "output folder of the alignment run to judge",
    "vl_model": "a Qwen2-VL or Qwen3-VL by hub name or path, or `tiny_qwen2_vl`, `tiny_qwen3_vl`",
    "vae_ckpt": "by path or name; null: newest of your scans in `outputs/`, else `ct_base` (demo: newest of all)",
    "vae_config": "a config of the original scripts beside an old checkpoint; ours carry their sizes",
    "dummy_data": "phantoms instead of data, to try the chain",
    "dummy_samples": "how many of them",
    "skip_bad": "leave out scans that cannot be read, instead of ending the run",
    "max_3d_tokens": "most tokens of a scan that the language model reads",
    "token_reduction": "how more tokens become so many: `pool`, `merge`, `fps` or `truncate`",
    "max_text_tokens": "longest question and answer together; a longer example is cut and counted",
    "max_new_tokens": "longest answer",
    "num_shuffles": "other volumes that each question is asked of",
    "use_3d_pos": "add an encoding of each token's place",
    "position": "how the language model counts tokens: `1d`, or `mrope3d` by their cells",
    "fusion": "where tokens stand: in the user's turn (`placeholder`) or in front (`prefix`)",
    "projector_layers": "linear layers from code to language width",
    "with_volumes": "false: the report of a scan stands in the volume's place, so that a model learns to read",
    "train_language": "whether the whole language model learns",
    "use_lora": "low-rank layers in the language model learn too",
    "lora_r": "rank of those layers",
    "lora_alpha": "scale of those layers",
    "lora_dropout": "dropout before those layers, 0 to below 1",
    "compile_layers": "`torch.compile` for each layer of the language model",
    "num_phantoms": "phantoms made where no data are given",
    "report_share": "share of the reports that is learned where no data are given: they are long and slow",
    "detector_phantoms": "phantoms from which a detector learns where findings lie; 0: there is none",
    "val_phantoms": "other phantoms for validation where no data are given",
    "val_rows": "rows of split val that each epoch is validated on, at most, evenly spread",
    "about": "findings of phantoms that are spoken of; null: all",
    "tiny": "sizes of a language model that is built here",
    "epochs": "passes over the text",
    "batch_size": "examples of a step on each GPU (evaluation: answers written at a time)",
    "weight_decay": "weight decay of AdamW",
}


def config_of(name: str) -> dict[str, Any]:
    return json.loads((ROOT / f"bundles/{name}.json").read_text(encoding="utf-8"))


def flat_keys(name: str) -> list[str]:
    """What a user sets by one flag, in the file's order."""
    config = config_of(name)
    built = {key for key, value in config.items() if isinstance(value, dict) and "_target_" in value} - {"device"}
    flat = {key for key, value in config.items() if key in MEANINGS or not isinstance(value, dict | list)}
    return [key for key in config if key in flat - built - WIRING]


def defaults(name: str, *, demo: bool) -> dict[str, Any]:
    """Every flat key as a run would see it, as the demo or with data."""
    config = config_of(name)
    given = {"scale": "demo" if demo else "full"} if "scale" in config else {}
    if name in (*STAGES, "sdf_vqvae"):
        given["dataset_dir"] = "DATA"  # in the demo it would be made first
    elif name == "align" and not demo:
        given["dataset"] = "a.Dataset"
    parser = ConfigParser({**config, **given})
    shown = {}
    with mock.patch("networks.qwen.family_of", return_value="qwen2_vl"):  # no look at the hub
        for key in flat_keys(name):
            shown[key] = config[key] if key in given or key in BY_MACHINE else parser.get_parsed_content(key)
    return shown


def as_text(value: Any) -> str:
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def cell(key: str, demo: Any, full: Any) -> str:
    if key in BY_MACHINE:
        return BY_MACHINE[key]
    return as_text(demo) if demo == full else f"{as_text(demo)} / {as_text(full)}"


def columns(name: str) -> dict[str, str]:
    demo, full = (defaults(name, demo=demo) for demo in (True, False))
    return {key: cell(key, demo[key], full[key]) for key in demo}


def table(names: tuple[str, ...]) -> list[str]:
    shown = {name: columns(name) for name in names}
    keys = list(dict.fromkeys(key for name in names for key in shown[name]))
    lines = [f"| key | {' | '.join(names)} | |", "|---" * (len(names) + 2) + "|"]
    for key in keys:
        given = [shown[name].get(key, "") for name in names]
        lines.append(f"| `{key}` | {' | '.join(given)} | {MEANINGS[key]} |")
    return lines


def preset_sizes() -> list[str]:
    from networks.presets import PRESETS

    keys = [key for key in MEANINGS if hasattr(PRESETS["tiny"], key) and key not in ("windows", "features", "keep")]
    lines = [f"| key | {' | '.join(PRESETS)} |", "|---" * (len(PRESETS) + 1) + "|"]
    return lines + [f"| `{key}` | {' | '.join(as_text(getattr(it, key)) for it in PRESETS.values())} |" for key in keys]


def overlay(name: str) -> list[str]:
    lines = ["| key | value |", "|---|---|"]
    return lines + [f"| `{key}` | {as_text(value)} |" for key, value in config_of(name).items() if key != "_desc_"]


def tables() -> str:
    lines = ["### Stage files", "", *table(STAGES), "", "### Sizes of the presets", "", *preset_sizes()]
    for name in OTHERS:
        lines += ["", f"### {name}.json", "", *table((name,))]
    for name in OVERLAYS:
        lines += ["", f"### {name}.json (an overlay)", "", *overlay(name)]
    return "\n".join(lines)


def page_with(text: str, content: str) -> str:
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{content}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    logging.disable()
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
