"""What weights and training states are known by: hashes over their tensors, and the seal of a file.

Neither the sizes of a network nor its identity know of the seal.
"""

import hashlib
import json

import torch

from networks.presets import CHECKSUM


def sealed(state: dict) -> dict:
    """A state dict that carries the hash of its tensors beside its sizes, where it has any. Neither sizes nor identity
    (`weights_hash` of the network's own state) know of it.
    """
    if "_extra_state" not in state:
        return state
    sizes = json.loads(bytes(state["_extra_state"].tolist())) | {CHECKSUM: tensors_hash(state)}
    return {**state, "_extra_state": _as_bytes(sizes)}


def unsealed(stored: torch.Tensor) -> torch.Tensor:
    sizes = json.loads(bytes(stored.tolist()))
    without = {name: value for name, value in sizes.items() if name != CHECKSUM}
    return _as_bytes(without) if CHECKSUM in sizes else stored


def _as_bytes(sizes: dict) -> torch.Tensor:
    return torch.tensor(list(json.dumps(sizes).encode()), dtype=torch.uint8)


def tensors_hash(state: dict) -> str:
    return weights_hash({name: tensor for name, tensor in state.items() if name != "_extra_state"})


def weights_hash(state: dict) -> str:
    """sha256 over names and values, so the same for the same weights saved again elsewhere, sealed or not."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name] if name != "_extra_state" else unsealed(state[name])
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def content_hash(content: dict) -> str:
    """sha256 over named values, lists and tensors in their order, without the hash that a dict holds of itself."""
    digest = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(weights_hash({"": value}).encode())
        elif isinstance(value, dict | list | tuple):
            parts = value.items() if isinstance(value, dict) else value
            digest.update(f"{type(value).__name__} {len(value)}\n".encode())
            for part in parts:
                add(part)
        else:
            digest.update(f"{value!r}\n".encode())

    add({name: value for name, value in content.items() if name != CHECKSUM})
    return digest.hexdigest()
