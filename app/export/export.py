"""`export`: a self-contained MONAI bundle of a tokenizer, and of the language model aligned to it.

Written beside, proven in a process of its own, then given its name: there is a whole bundle or none.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from app.evaluation.card import NAME as CARD
from app.evaluation.shape_evaluation import WAYS
from app.export import code, configs
from app.export.metadata import SCHEMA, make_metadata, requirements
from app.export.model_card import measured, model_card
from app.language.assistant import aligned_files, aligned_folder, read_settings, tokenizer_of
from app.measures.surfaces import compare
from app.phantoms.phantoms import make_phantom
from app.shapes.bands import BAND
from app.shapes.sdf import Settings, make_shapes
from app.shapes.sources import SurfaceChoice
from app.shared.array_files import ZIP_TIME
from app.shared.json_files import write_object
from app.shared.notice import NOTICE
from app.shared.output_folder import check_folder
from app.shared.places import bundles_folder, root_folder
from app.shared.refusals import Refused, check_path
from app.shared.version import VERSION
from app.tokens.open_scan import Volume
from app.tokens.shape_tokens import encode_shape, mesh_of, open_shape
from app.tokens.token_files import CTTokens
from app.tokens.tokenizer import CTTokenizer
from app.tokens.volumes import onto_grid, write_nifti
from app.training.shipped import RECORD

PROOF_SIDE, PROOF_MM = 64, 6.0  # the scan that a bundle is proven on: a phantom's whole trunk
CREDIT = "CREDIT.md"  # of a bundle's docs
PROOF_LEVEL = 200.0  # HU: what of it is bone, for a tokenizer of shapes
CODES_ALONE = WAYS[2]  # of a card of shapes
PRIVATE = ("data", "vl_model", "tokenizer_path")  # of an alignment's record: places on its maker's machine
Json = dict[str, Any]


def export(
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    align: str | Path | None = None,
    name: str | None = None,
    zipped: bool = False,
) -> Json:
    """Writes the bundle and gives what was proven of it."""
    check_path(out)
    out = Path(out)
    name = _good_name(name or out.resolve().name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused("EXISTS", f"{out} is there already", "give another OUT, or remove it first", status=2)
    archive = out.with_name(out.name + ".zip")
    if zipped and archive.exists():
        raise Refused("EXISTS", f"{archive} is there already", "give another OUT, or remove it first", status=2)
    check_folder(out.resolve().parent)
    if not bundles_folder().is_dir():
        raise Refused("NO_TEMPLATES", "a bundle's own code exports no bundle")
    folder = None if align is None else aligned_folder(align)
    settings = None if folder is None else read_settings(folder)
    if tokenizer is None and settings is not None:
        tokenizer = tokenizer_of(folder, settings)
    ct = CTTokenizer.from_pretrained(tokenizer)
    if settings is not None and settings["tokenizer"] != ct.digest:
        what = f"{align} was aligned to tokenizer {settings['tokenizer'][:12]}, this one is {ct.digest[:12]}"
        raise Refused("OTHER_TOKENIZER", what, "give that tokenizer, or align again", status=2)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
        bundle = Path(beside, out.name)
        written = write_bundle(bundle, ct, name=name, align=folder, settings=settings)
        proof = prove(bundle, ct, package=written["code"]["package"])
        size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
        if zipped:
            write_zip(bundle, Path(beside, archive.name))
        if out.is_dir():
            out.rmdir()
        os.replace(bundle, out)
        if zipped:
            os.replace(Path(beside, archive.name), archive)
    packed = {"zip": str(archive), "zip_bytes": archive.stat().st_size} if zipped else {}
    about = {"bundle": str(out), "name": name, "version": VERSION, "package": written["code"]["package"], "bytes": size}
    return {**about, **packed, "tokenizer": ct.digest, "aligned": align is not None, "proof": proof, "notice": NOTICE}


def _good_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", name, re.ASCII):
        what = f"name must be letters, digits, . _ - (at most 64), got {name!r}"
        raise Refused("BAD_VALUE", what, "pass another --name")
    return name


# ---- what is written


def write_bundle(bundle: Path, ct: CTTokenizer, *, name: str, align: Path | None, settings: Json | None) -> Json:
    """All files of the bundle; gives its metadata."""
    record = None if settings is None else _without_places(settings)
    sources = code.read_sources()
    package = code.package_name(name, VERSION, sources)
    code.write_package(bundle, sources, name=package, version=VERSION)
    templates = bundles_folder()
    base = _read_json(templates / "metadata.json")
    written = make_metadata(base, ct.sizes, name=name, package=package, digest=ct.digest)
    card = _card_beside(ct)
    if card is not None:
        written["eval_metrics"] = _eval_metrics(card)
    bundled = configs.make_configs(templates, ct.sizes, package=package, aligned=align is not None)
    for file, config in {**bundled, "metadata.json": written}.items():
        write_object(bundle / "configs" / file, config, indent=2)
    for file in (SCHEMA, "logging.conf"):
        shutil.copyfile(templates / file, bundle / "configs" / file)
    _write_weights(bundle / "models", ct)
    if record is not None:
        _copy_aligned(align, bundle / "models" / "align", record)
    base_model = None if record is None else record["base_model"]
    docs, credit = bundle / "docs", _credit_beside(ct)
    docs.mkdir()
    text = model_card(written, card=card, base_model=base_model, credit=None if credit is None else CREDIT)
    (docs / "README.md").write_text(text, encoding="utf-8")
    if credit is not None:
        shutil.copyfile(credit, docs / CREDIT)
    (bundle / "LICENSE").write_text(_licence(), encoding="utf-8")
    (bundle / "requirements.txt").write_text("\n".join(requirements()) + "\n")
    return written


def _eval_metrics(card: Json) -> Json:
    if "ways" in card:
        return {"surface_distance_mm": card["ways"][CODES_ALONE]["distance"]}
    return {"mae_hu": card["errors"]["codes alone"]["tissues"]["foreground"]["mae"]["mean"]}


def _write_weights(models: Path, ct: CTTokenizer) -> None:
    """The flat state dict, as a checkpoint that loads with weights_only and as safetensors."""
    models.mkdir()
    state = {name: value.detach().cpu().contiguous().clone() for name, value in ct.network.state_dict().items()}
    torch.save(state, models / "model.pt")
    (models / "model.safetensors").write_bytes(save(state))  # save_file writes what only its owner can read


def _without_places(settings: Json) -> Json:
    """An alignment's record without the folders of its maker; a base model from a folder keeps that folder's name."""
    base = dict(settings["base_model"])
    if base["name"] is not None and Path(base["name"]).is_absolute():
        base["name"] = Path(base["name"]).name
    kept = {key: value for key, value in settings.items() if key not in PRIVATE}
    return {**kept, "base_model": base, "tokenizer_path": "../model.pt"}


def _copy_aligned(align: Path, out: Path, record: Json) -> None:
    """Projector, adapter and record; the base model only where nobody else has it."""
    projector, adapter, language = aligned_files(align, record)
    out.mkdir()
    shutil.copyfile(projector, out / "projector_final.pt")
    if adapter is not None:
        shutil.copytree(adapter, out / "lora_final", ignore=shutil.ignore_patterns("README.md"))
    if language is not None:
        shutil.copytree(language, out / "language_final")
    elif record["base_model"]["name"] is None:
        raise Refused("NOT_FINISHED", f"the alignment in {align} did not reach its end")
    for config in out.glob("lora_final/adapter_config.json"):
        named = {**_read_json(config), "base_model_name_or_path": record["base_model"]["name"]}
        write_object(config, named, indent=2)
    write_object(out / "train_args.json", record, indent=2)


def _card_beside(ct: CTTokenizer) -> Json | None:
    """The tokenizer's own evaluation; None where there is none of these very weights."""
    folder = Path(ct.source).parent
    folder = folder.parent if folder.name in ("ckpts", "models") else folder
    file = folder / f"{CARD}.json"
    if not file.is_file():
        return None
    try:
        card = _read_json(file)
        if card["tokenizer"]["sha256"] != ct.digest:
            return None
        measured(card), _eval_metrics(card)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Refused("BAD_CARD", f"{file} is no card of a tokenizer", status=2) from None
    return card


def _credit_beside(ct: CTTokenizer) -> Path | None:
    """What has to go along with weights that were made from others' scans: of one that ships, or of a bundle of it."""
    folder = Path(ct.source).parent
    file = folder / "README.md" if (folder / RECORD).is_file() else folder.parent / "docs" / CREDIT
    return file if file.is_file() else None


def _licence() -> str:
    """Of a checkout, else of the installed package."""
    file = root_folder() / "LICENSE"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    files = [path for path in metadata.files("voxelingo") or [] if path.name == "LICENSE"]
    return files[0].read_text(encoding="utf-8")


def _read_json(file: Path) -> Json:
    return json.loads(file.read_text(encoding="utf-8"))


def write_zip(bundle: Path, archive: Path) -> None:
    """The folder under its name; the same content gives the same bytes."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in sorted(path for path in bundle.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(f"{bundle.name}/{file.relative_to(bundle).as_posix()}", ZIP_TIME)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            packed.writestr(entry, file.read_bytes())


# ---- the proof


def prove(bundle: Path, ct: CTTokenizer, *, package: str) -> Json:
    """Tokens and reconstruction of a phantom, or of its bones, by the bundle in a new process elsewhere, against those
    made here.
    """
    phantom, of_shapes = make_phantom(0, size=PROOF_SIDE, spacing=PROOF_MM), ct.sizes.features == "sdf"
    with tempfile.TemporaryDirectory() as elsewhere:
        scan, out = Path(elsewhere, "scan.nii.gz"), Path(elsewhere, "proof.npz")
        write_nifti(scan, Volume(phantom.hu, phantom.affine))
        if of_shapes:
            scan = _bones_of(scan, ct.sizes.resolution)
        tokens = encode_shape(ct, open_shape(scan, ct.sizes.resolution)) if of_shapes else ct.encode(scan)
        _run_elsewhere(bundle, package, scan, out)
        with np.load(out) as stored:
            proof = {name: stored[name] for name in stored.files}
    ways = ("read", "loaded") if proof["device"] == ct.device.type == "cpu" else ("read",)
    for way in ways:
        _demand(_equal_share(tokens, proof, way) == 1.0, f"tokens after it was {way} differ from those made here")
    _demand(bool(proof["same_tensors"]), "model.pt and model.safetensors differ")
    near = (_is_near_mesh if of_shapes else _is_near_volume)(ct, tokens, proof)
    _demand(near, "its inference.json gives another reconstruction than is made here")
    elsewhere_share = {"cpu": _equal_share(tokens, proof, "cpu")} if "cpu_codes" in proof else {}
    return {
        "tokens": len(tokens.codes),
        "equal": {way: _equal_share(tokens, proof, way) for way in ("read", "loaded")} | elsewhere_share,
        "device": str(proof["device"]),
        "seconds": round(float(proof["seconds"]), 1),
    }


def _bones_of(scan: Path, resolution: int) -> Path:
    """Their signed distance, on the largest grid up to 64 that the tokenizer takes: any larger proves no more."""
    side = max(side for side in range(8, PROOF_SIDE + 1, 8) if resolution % side == 0)
    settings = Settings((side,), min(BAND, side / 2), wanted=SurfaceChoice(hu=PROOF_LEVEL))
    make_shapes(scan, scan.parent / "shapes", settings, workers=1)
    (file,) = (scan.parent / "shapes").glob("*.npz")
    return file


def _is_near_volume(ct: CTTokenizer, tokens: CTTokens, proof: Json) -> bool:
    """Within 1 HU, in the same place."""
    back = onto_grid(ct.decode(tokens), tokens.source_shape, tokens.source_affine)
    is_placed = np.allclose(proof["affine"], tokens.source_affine, atol=1e-3)
    return bool(np.abs(np.rint(back.hu) - proof["hu"]).max() <= 1 and is_placed)


def _is_near_mesh(ct: CTTokenizer, tokens: CTTokens, proof: Json) -> bool:
    """Within a tenth of a voxel, nearly everywhere."""
    here = mesh_of(ct.decode_sparse(tokens), tokens)
    return compare(here, (proof["vertices"], proof["faces"]))["distance_95"] <= 0.1 * tokens.spacing


def _equal_share(tokens: Any, proof: Json, way: str) -> float:
    """Share of equal codes; nothing is equal where they do not lie in the same cells."""
    codes, coords = proof[f"{way}_codes"], proof[f"{way}_coords"]
    if not np.array_equal(coords, tokens.coords) or codes.shape != tokens.codes.shape:
        return 0.0
    return float((codes == tokens.codes).mean())


def _run_elsewhere(bundle: Path, package: str, scan: Path, out: Path) -> None:
    call = json.dumps([str(bundle.resolve()), package, str(scan), str(out)])
    command = [sys.executable, "-I", "-B", str(bundle.resolve() / package / "app" / "export" / "proof.py"), call]
    ended = subprocess.run(command, cwd=scan.parent, capture_output=True, text=True)
    if ended.returncode:
        last = next((line for line in reversed(ended.stderr.splitlines()) if line.strip()), "it said nothing")
        _demand(False, f"it does not run by itself: {last.strip()}")


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise Refused("NOT_PROVEN", f"the bundle was not written: {what}", "report it with this line", status=1)


def lines(done: Json) -> list[str]:
    """For people."""
    proof = done["proof"]
    equal = ", ".join(f"{way} {share:.2%}" for way, share in proof["equal"].items())
    packed = [f"{done['zip']}  {done['zip_bytes'] / 1e6:.1f} MB"] if "zip" in done else []
    return [
        f"{done['bundle']}  {done['bytes'] / 1e6:.1f} MB, {done['name']} {done['version']}, code in {done['package']}",
        *packed,
        f"proven in {proof['seconds']} s in a process without this project: {proof['tokens']} tokens, equal: {equal}",
        f"next: its docs/README.md has the commands. {done['notice']}",
    ]
