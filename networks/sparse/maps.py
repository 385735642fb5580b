"""The choice of the module that builds maps: torch_maps.py, or its twin in `networks.kernels` where that works."""

import importlib
import logging
from functools import cache
from types import ModuleType

import torch

from networks.sparse import torch_maps

log = logging.getLogger(__name__)


def maps_for(device: torch.device) -> ModuleType:
    """`torch_maps`, or `networks.kernels.maps` with the same functions for a CUDA device on which it is right."""
    return _proven_maps(device.index) if device.type == "cuda" else torch_maps


@cache
def _proven_maps(index: int) -> ModuleType:
    try:
        kernels = importlib.import_module("networks.kernels.maps")
        corner = torch.tensor([[2, 5, 6, 7]], dtype=torch.int32, device=torch.device("cuda", index))
        if torch.equal(kernels.morton_coords(kernels.morton_keys(corner, 8), 8), corner):
            return kernels
        reason = "wrong results"
    except Exception as error:  # a Triton that is absent, or that cannot compile here, may raise anything
        reason = f"{type(error).__name__}: {error}"
    log.warning("maps are built in plain torch: the triton kernels do not work here (%s)", reason.splitlines()[0])
    return torch_maps
