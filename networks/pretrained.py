"""Weights of the published sparse autoencoder (Direct3D-S2) under the names and in the layout of ours.

Its files hold torchsparse kernels: (27, in, out) with dx fastest, (in, out) where the kernel is a single voxel. Works
on state dicts, not on files, and takes a state dict whole or not at all.
"""

from collections import Counter

from einops import rearrange
from torch import Tensor

from networks.vqvae import SparseVQVAE

MOST_NAMED = 8  # of each kind of misfit: more say the same again


def autoencoder_in(stored: object) -> object:
    """The state dict in what a file holds: under "vae" (beside "dit", "config"), under "state_dict", or all of it."""
    for name in ("vae", "state_dict"):
        if isinstance(stored, dict) and isinstance(stored.get(name), dict):
            return stored[name]
    return stored


def is_published(state: object) -> bool:
    """Whether a state dict has the first layer of the published encoder and does not say its sizes, as ours do."""
    names = {_our_name(name) for name in state} if isinstance(state, dict) else set()
    return "encoder.input_layer1.weight" in names and "_extra_state" not in names


def converted(state: dict[str, Tensor], network: SparseVQVAE) -> dict[str, Tensor]:
    """Encoder and decoder of `network` with published weights, in float32; a codebook among them is left out.

    Anything missing, left over or of another shape is a ValueError that lists it.
    """
    parts = {name: part for name, part in network.state_dict().items() if name.startswith(("encoder.", "decoder."))}
    shapes = {name: tuple(part.shape) for name, part in parts.items()}
    given = {_our_name(name): _our_layout(name, part) for name, part in state.items()}
    given = {name: part for name, part in given.items() if not name.startswith("vq.")}
    lists = {
        "missing": [name for name in shapes if name not in given],
        "left over": [name for name in given if name not in shapes],
        "there twice": [name for name, count in Counter(map(_our_name, state)).items() if count > 1],
        "of another shape": [
            f"{name} {tuple(given[name].shape)} instead of {shape}"
            for name, shape in shapes.items()
            if name in given and tuple(given[name].shape) != shape
        ],
    }
    if any(lists.values()):
        raise ValueError("; ".join(f"{kind}: {_listed(names)}" for kind, names in lists.items() if names))
    return {name: given[name].float() for name in shapes}


def _our_name(name: object) -> str:
    """`Encoder.` and `Decoder.` are what a fork calls the parts."""
    name = str(name)
    for part in ("Encoder.", "Decoder."):
        name = part.lower() + name.removeprefix(part) if name.startswith(part) else name
    return name.replace(".conv.kernel", ".weight").replace(".conv.bias", ".bias")


def _our_layout(name: str, part: Tensor) -> Tensor:
    if not name.endswith(".conv.kernel"):
        return part
    if part.ndim == 3 and part.shape[0] == 27:
        return rearrange(part, "(dz dy dx) i o -> (dx dy dz) i o", dx=3, dy=3, dz=3)
    return part.mT if part.ndim == 2 else part


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
