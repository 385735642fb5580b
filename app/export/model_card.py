"""docs/README.md of a bundle: what it does, on what data, how well, with what limits, and the commands to use it."""

from typing import Any

from app.export.metadata import SCHEMA
from app.shared.notice import NOTICE

COMMANDS = """\
```bash
pip install -r {root}/requirements.txt
python -m monai.bundle run --config_file {root}/configs/inference.json --scan SCAN --output_dir OUT  # HU, as NIfTI
python -m monai.bundle run --config_file {root}/configs/evaluate.json --dataset_dir PREPARED  # a card of your data
python -m monai.bundle run training --config_file {root}/configs/train.json --dataset_dir PREPARED  # go on with it
torchrun --nproc_per_node=4 -m monai.bundle run training \\
  --config_file "['{root}/configs/train.json','{root}/configs/multi_gpu_train.json']" --dataset_dir PREPARED
{ask}python -m monai.bundle verify_metadata --meta_file {root}/configs/metadata.json --filepath {root}/configs/{schema}
PYTHONPATH={root} python -m {package}.app prepare RAW PREPARED   # also tokenize, reconstruct, check, doctor: see --help
```"""
COMMANDS_OF_SHAPES = """\
```bash
pip install -r {root}/requirements.txt
python -m monai.bundle run --config_file {root}/configs/inference.json --shape MESH --output_dir OUT  # mesh in mm
PYTHONPATH={root} python -m {package}.app sdf MESHES SHAPES --resolution {resolution}  # also tokenize, reconstruct
python -m monai.bundle run --config_file {root}/configs/evaluate.json --dataset_dir SHAPES  # a card of your shapes
python -m monai.bundle run training --config_file {root}/configs/train.json --dataset_dir SHAPES  # go on with it
torchrun --nproc_per_node=4 -m monai.bundle run training \\
  --config_file "['{root}/configs/train.json','{root}/configs/multi_gpu_train.json']" --dataset_dir SHAPES
python -m monai.bundle verify_metadata --meta_file {root}/configs/metadata.json --filepath {root}/configs/{schema}
```"""
ASK = (
    'python -m monai.bundle run --config_file {root}/configs/ask.json --scan SCAN --question "Is there an effusion?"\n'
)
NOT_MEASURED = "Not measured when it was exported: `configs/evaluate.json` writes a card on your data."


def model_card(
    metadata: dict[str, Any],
    *,
    card: dict[str, Any] | None,
    base_model: dict[str, Any] | None,
    credit: str | None = None,
) -> str:
    """Markdown. `card` is the tokenizer's own evaluation where there is one; `base_model` that of an aligned bundle;
    `credit` the file beside it that has to go along with the weights.
    """
    about = metadata["tokenizer"]
    package, root = metadata["code"]["package"], "BUNDLE"
    ask = "" if base_model is None else ASK.format(root=root)
    of_shapes = about["features"] == "sdf"
    commands = COMMANDS_OF_SHAPES if of_shapes else COMMANDS
    filled = {"root": root, "ask": ask, "package": package, "schema": SCHEMA, "resolution": about["resolution"]}
    sections = [
        f"# {metadata['name']} {metadata['version']}",
        metadata["description"],
        f"**{NOTICE}**",
        "## What goes in",
        _table(*(_shape_in(about) if of_shapes else _scan_in(about)), ("weights, sha256", f"`{about['sha256']}`")),
        "## Use",
        f"`{root}` is this folder; every command works from any directory.",
        commands.format(**filled),
        "Configs are code: run those of a bundle only where you trust who made it. `--tokenizer BUNDLE` of Voxelingo "
        "reads metadata and tensors alone and evaluates none of them.",
        "## How good",
        NOT_MEASURED if card is None else measured(card),
        *([] if base_model is None else ["## Language model", _language(base_model)]),
        "## Limits",
        "Tokens keep what training taught them to keep; small or rare findings can be lost and reconstructions look "
        "plausible where they are wrong. Measure on your own patients before you conclude anything.\n\n"
        "`verify_net_in_out` and `ckpt_export` of MONAI do not apply: the network takes sparse voxels whose number "
        "differs from scan to scan, where the first sends one dense random tensor, and TorchScript, which the second "
        "makes, cannot hold its sparse operations.",
        "## Licence",
        f"Code: Apache-2.0 (LICENSE). Weights: {_weights_licence(credit)} "
        "A base language model has a licence of its own and is not in this bundle.",
    ]
    return "\n\n".join(sections) + "\n"


def _weights_licence(credit: str | None) -> str:
    if credit is None:
        return "what the data they learned from allow; who exported this bundle knows."
    return f"[{credit}]({credit}) names the data they learned from, licences and credit; pass it on with them."


def _scan_in(about: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    prepared = about["prepared"]
    return (
        ("scan", "CT in HU: DICOM series, NIfTI, NRRD, MHA; anything else is refused with a code"),
        ("axes", f"any; brought to {about['orientation']}"),
        (
            "grid",
            f"{about['resolution']} voxels a side, {about['spacing']:g} mm; what lies beyond is cut (FOV_CROPPED)",
        ),
        ("prepared on", f"{prepared[0]} voxels a side, {prepared[1]:g} mm" if prepared else "not recorded"),
        ("windows", ", ".join(about["windows"])),
        ("HU range", f"{about['hu_range'][0]:g} to {about['hu_range'][1]:g}; beyond it is clipped"),
        ("voxels kept", about["keep"]),
        ("codes", f"{about['num_embeddings']}, {about['quantizer_levels']} a token"),
    )


def _shape_in(about: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return (
        ("shape", "a closed mesh in mm (STL, OBJ, PLY, VTP), or a file of signed distance that `sdf` writes"),
        ("grid", f"{about['resolution']} voxels a side of a cube about the shape, or a whole part of that"),
        ("codes", f"{about['num_embeddings']}, {about['quantizer_levels']} a token"),
    )


def _table(*rows: tuple[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def measured(card: dict[str, Any]) -> str:
    """The errors of a tokenizer's own evaluation."""
    data = card["data"]
    if "ways" in card:
        rows = [
            (way, f"{means['distance']:.3g} mm") for way, means in card["ways"].items() if means["distance"] is not None
        ]
        return f"Mean surface distance, {data['cases']} shapes of split {data['split']}:\n\n{_table(*rows)}"
    errors = card["errors"]["codes alone"]["tissues"]
    rows = [(name, f"{part['mae']['mean']:.1f} HU") for name, part in errors.items() if part["mae"]["mean"] is not None]
    head = f"Mean absolute error from codes alone, {data['cases']} cases of {data['dataset']}, split {data['split']}:"
    return f"{head}\n\n{_table(*rows)}"


def _language(base: dict[str, Any]) -> str:
    if base["name"] is None:
        return "A small model of its own, trained whole, lies in `models/align/language_final`."
    revision = base.get("revision") or f"sha256 {base.get('sha256')}"
    return (
        f"`{base['name']}`, {revision}: not in this bundle. It is fetched by name, or give where it lies with "
        "`--language_model FOLDER`; another one is refused."
    )
