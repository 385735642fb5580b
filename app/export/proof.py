"""An exported bundle at work, as its new owner has it: in a process of its own, elsewhere, without the project.

Run by `export` from another directory. Modules of the project under their own names cannot be imported here, so what
works here works from the bundle alone.
"""

import importlib
import json
import sys
import time
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import numpy as np


class _Blocked(MetaPathFinder):
    """Nothing of a checkout or an installed project is to be had."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.split(".")[0] in ("app", "networks", "transforms"):
            raise ModuleNotFoundError(f"{fullname} is the project's: the bundle must not need it", name=fullname)


def main(root: str, package: str, scan: str, out: str) -> None:
    """Writes tokens and reconstruction of a NIfTI, or of a file of signed distance, to `out`, made in each way that a
    bundle is used.
    """
    sys.meta_path.insert(0, _Blocked())
    started = time.perf_counter()
    from monai.bundle import load, run

    result: dict[str, Any] = {}
    loaded = load(Path(root).name, bundle_dir=Path(root).parent, device="cpu")  # puts the bundle on the path itself
    tokenizer = importlib.import_module(f"{package}.app.tokens.tokenizer")
    shapes = importlib.import_module(f"{package}.app.tokens.shape_tokens")

    def encode(ct: Any) -> Any:
        if ct.sizes.features != "sdf":
            return ct.encode(Path(scan))
        return shapes.encode_shape(ct, shapes.open_shape(Path(scan), ct.sizes.resolution))

    result |= _tokens("loaded", encode(tokenizer.CTTokenizer(loaded, digest="")))
    read = tokenizer.CTTokenizer.from_pretrained(root)
    result |= _tokens("read", encode(read))
    other = "cuda" if str(read.device) == "cpu" else "cpu"
    result["device"] = np.array(str(read.device.type))
    if other == "cpu":
        result |= _tokens("cpu", encode(tokenizer.CTTokenizer.from_pretrained(root, device="cpu")))
    folder = Path(out).parent / "reconstructed"
    given = {"shape" if read.sizes.features == "sdf" else "scan": scan}
    run(config_file=str(Path(root, "configs", "inference.json")), **given, output_dir=str(folder))
    result |= _mesh_in(folder, package) if "shape" in given else _volume_in(folder)
    result["same_tensors"] = np.array(_same_tensors(Path(root, "models")))
    result["seconds"] = np.array(time.perf_counter() - started)
    np.savez(out, **result)


def _tokens(name: str, tokens: Any) -> dict[str, np.ndarray]:
    return {f"{name}_codes": tokens.codes, f"{name}_coords": tokens.coords}


def _volume_in(folder: Path) -> dict[str, np.ndarray]:
    import nibabel

    (image,) = folder.glob("*.nii.gz")
    volume = nibabel.load(image)
    return {"hu": np.asarray(volume.dataobj), "affine": volume.affine}


def _mesh_in(folder: Path, package: str) -> dict[str, np.ndarray]:
    files = importlib.import_module(f"{package}.app.shapes.mesh_files")
    (file,) = folder.glob("*.ply")
    mesh = files.read_mesh(file)
    return {"vertices": mesh.vertices, "faces": mesh.faces}


def _same_tensors(models: Path) -> bool:
    """Whether both files of weights hold the same."""
    import torch
    from safetensors.torch import load_file

    flat = torch.load(models / "model.pt", weights_only=True)
    safe = load_file(models / "model.safetensors")
    return flat.keys() == safe.keys() and all(torch.equal(flat[name], safe[name]) for name in flat)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
