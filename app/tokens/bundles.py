"""What an exported bundle says of its tokenizer, and that it says so of the weights that lie in it.

Reads `configs/metadata.json` and tensors. Another's configs are code; nothing here evaluates them.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from app.shared.json_files import read_object
from app.shared.refusals import Refused
from networks.presets import Preset
from transforms.windows import windows_range

ORIENTATION = "RAS"
STATED = ("resolution", "spacing", "prepared", "features", "windows", "keep", "num_embeddings", "quantizer_levels")


def description(sizes: Preset, digest: str) -> dict[str, Any]:
    """What a bundle's metadata hold under `tokenizer`: geometry, HU range, windows, sparsification, codes, weights."""
    stated = {name: value for name, value in dataclasses.asdict(sizes).items() if name in STATED}
    return {
        "sha256": digest,
        "orientation": ORIENTATION,
        **json.loads(json.dumps(stated)),
        "hu_range": list(windows_range(sizes.windows)) if sizes.windows else None,
    }


def metadata_beside(weights: Path) -> Path | None:
    """The metadata of the bundle that a models/model.pt lies in; None for a checkpoint outside any."""
    file = weights.parent.parent / "configs" / "metadata.json"
    return file if weights.parent.name == "models" and file.is_file() else None


def check_description(weights: Path, sizes: Preset, digest: str) -> None:
    """Ends where a bundle's metadata describe another tokenizer than its weights: who trusted them would be misled."""
    file = metadata_beside(weights)
    if file is None:
        return
    remedy = "export it again, or copy it again whole"
    stated = (read_object(file) or {}).get("tokenizer")
    if not isinstance(stated, dict):
        raise Refused("BAD_BUNDLE", f"{file} does not describe a tokenizer", remedy)
    for name, value in description(sizes, digest).items():
        if stated.get(name) != value:
            what = f"{file} says {name} {stated.get(name)}, the weights beside it have {value}"
            raise Refused("BAD_BUNDLE", what, remedy)
