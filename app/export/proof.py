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
    """Writes tokens and reconstruction of a NIfTI to `out`, made in each way that a bundle is used."""
    sys.meta_path.insert(0, _Blocked())
    started = time.perf_counter()
    from monai.bundle import load, run

    result: dict[str, Any] = {}
    loaded = load(Path(root).name, bundle_dir=Path(root).parent, device="cpu")  # puts the bundle on the path itself
    tokenizer = importlib.import_module(f"{package}.app.tokens.tokenizer")
    result |= _tokens("loaded", tokenizer.CTTokenizer(loaded, digest="").encode(Path(scan)))
    read = tokenizer.CTTokenizer.from_pretrained(root)
    result |= _tokens("read", read.encode(Path(scan)))
    other = "cuda" if str(read.device) == "cpu" else "cpu"
    result["device"] = np.array(str(read.device.type))
    if other == "cpu":
        elsewhere = tokenizer.CTTokenizer.from_pretrained(root, device="cpu").encode(Path(scan))
        result |= _tokens("cpu", elsewhere)
    folder = Path(out).parent / "reconstructed"
    run(config_file=str(Path(root, "configs", "inference.json")), scan=scan, output_dir=str(folder))
    import nibabel

    (image,) = folder.glob("*.nii.gz")
    volume = nibabel.load(image)
    result |= {"hu": np.asarray(volume.dataobj), "affine": volume.affine}
    result["same_tensors"] = np.array(_same_tensors(Path(root, "models")))
    result["seconds"] = np.array(time.perf_counter() - started)
    np.savez(out, **result)


def _tokens(name: str, tokens: Any) -> dict[str, np.ndarray]:
    return {f"{name}_codes": tokens.codes, f"{name}_coords": tokens.coords}


def _same_tensors(models: Path) -> bool:
    """Whether both files of weights hold the same."""
    import torch
    from safetensors.torch import load_file

    flat = torch.load(models / "model.pt", weights_only=True)
    safe = load_file(models / "model.safetensors")
    return flat.keys() == safe.keys() and all(torch.equal(flat[name], safe[name]) for name in flat)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
