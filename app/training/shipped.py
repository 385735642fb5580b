"""Tokenizers that ship: bundles/pretrained/NAME, known by their names wherever weights are asked for.

A folder holds float16 safetensors and a record of what they are; the file is read only if it is the one that the record
describes. Made by `python -m app.export.pretrained`.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

from app.shared.hashes import hash_path
from app.shared.json_files import read_object
from app.shared.places import pretrained_folder
from app.shared.refusals import Refused

DEFAULT = "ct_base"
WEIGHTS, RECORD = "model.safetensors", "pretrained.json"
SUMS, COUNTS, CODES = "mean_sum", "mean_count", "embeddings.weight"  # of a codebook that learns by averages


def names() -> list[str]:
    """Those that are here."""
    folder = pretrained_folder()
    return sorted(file.parent.name for file in folder.glob(f"*/{WEIGHTS}")) if folder.is_dir() else []


def names_in_words() -> str:
    return f"one that ships ({', '.join(names())})" if names() else "none ships with this installation"


def weights_of(path: str | Path) -> Path:
    """The weights of a name, or of a folder like those that ship; any other path as it is. What exists goes first."""
    path = Path(path)
    place = path if path.exists() else pretrained_folder() / path if str(path) in names() else path
    return place / WEIGHTS if (place / RECORD).is_file() and (place / WEIGHTS).is_file() else place


def is_shipped(file: Path) -> bool:
    """Whether these weights belong to the installation."""
    return file.resolve().is_relative_to(pretrained_folder().resolve())


def name_of(digest: str) -> str | None:
    """The name of what ships with this hash of its weights; None where nothing does."""
    for name in names():
        if (read_object(pretrained_folder() / name / RECORD) or {}).get("tokenizer_sha256") == digest:
            return name
    return None


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, halves as float32. One that its record does not know is refused."""
    record = file.with_name(RECORD)
    if file.name == WEIGHTS and record.is_file():
        recorded = (read_object(record) or {}).get("file_sha256")
        if recorded is None:
            what = f"{record} does not tell of the weights beside it"
            raise Refused("BAD_CHECKPOINT", what, "install or copy it again")
        if hash_path(file) != recorded:
            what = f"{file} is not the file that {RECORD} beside it tells of"
            raise Refused("BAD_CHECKPOINT", what, "install or copy the folder again, whole")
    state = load_file(file)
    return with_sums({name: value.float() if value.dtype == torch.float16 else value for name, value in state.items()})


def with_sums(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the sums behind each codebook's means, which are twice as large as the codes and follow from them."""
    sums = {}
    for name, counts in state.items():
        if name.endswith(COUNTS):
            codebook = name.removesuffix(COUNTS)
            sums[codebook + SUMS] = state[codebook + CODES] * counts[:, None]
    return state | sums
