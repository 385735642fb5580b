"""What this machine can do: versions, GPU, sparse backends (each proven by a small convolution and its gradients),
decoders for compressed DICOM, free memory and disk, and one line of advice for each thing missing.

Looks only; installs and changes nothing.
"""

import importlib.metadata
import io
import os
import platform
import shutil
import sys
from functools import partial
from typing import Any

import torch

from app.prepare.pixels import can_decode
from app.shared.workers import free_memory

SHOWN_VERSIONS = (
    *("torch", "triton", "spconv-cu126", "numpy", "monai"),
    *("pytorch-ignite", "nibabel", "pydicom", "transformers", "peft"),
)
SYNTAXES = {
    "JPEG": "1.2.840.10008.1.2.4.50",
    "JPEG lossless": "1.2.840.10008.1.2.4.70",
    "JPEG-LS": "1.2.840.10008.1.2.4.80",
    "JPEG 2000": "1.2.840.10008.1.2.4.90",
    "RLE": "1.2.840.10008.1.2.5",
}
GIB = 2**30


def report(*, file: io.TextIOBase | None = None) -> dict[str, Any]:
    """Looks at the machine, prints what it found (to standard output unless told otherwise) and returns it."""
    found = examine()
    write = partial(print, file=file or sys.stdout)
    write(f"{found['system']}, Python {found['python']}, {found['cores']} cores")
    write("packages   " + ", ".join(f"{name} {version or 'absent'}" for name, version in found["versions"].items()))
    for gpu in found["gpus"]:
        write(f"GPU        {gpu['name']}, {gpu['free_gib']:.1f} of {gpu['total_gib']:.1f} GiB free")
    for name, reason in found["backends"].items():
        write(f"backend    {name}: {'works' if reason is None else reason}")
    for name, there in found["decoders"].items():
        write(f"DICOM      {name}: {'can be read' if there else 'no decoder'}")
    memory = "unknown" if found["memory_gib"] is None else f"{found['memory_gib']:.1f} GiB"
    write(f"free       memory {memory}, disk {found['disk_gib']:.1f} GiB")
    for line in found["advice"]:
        write(f"advice     {line}")
    return found


def examine() -> dict[str, Any]:
    """Everything `report` prints, as plain values. A backend or decoder maps to None or True where it works."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": {name: _version(name) for name in SHOWN_VERSIONS},
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "backends": backends(),
        "decoders": {name: can_decode(uid) for name, uid in SYNTAXES.items()},
        "memory_gib": _free_memory(),
        "disk_gib": shutil.disk_usage(".").free / GIB,
    }
    found["advice"] = _advice(found)
    return found


def backends() -> dict[str, str | None]:
    """Each sparse backend with the reason why it does not work here, None where its proof passed."""
    from networks.sparse import ops

    if not torch.cuda.is_available():
        off = "needs a CUDA device"
        return {name: _torch_defect("cpu") if name == "torch" else off for name in ops.BACKENDS}
    return {
        name: _torch_defect("cuda") if name == "torch" else ops.defect(name, torch.cuda.current_device())
        for name in ops.BACKENDS
    }


def _torch_defect(device: str) -> str | None:
    """A small full grid against torch's own dense convolution, values and gradients."""
    from networks.sparse import SparseTensor, SubmanifoldConv3d

    generator = torch.Generator().manual_seed(0)
    grid = torch.randn(1, 4, 3, 4, 5, generator=generator).to(device)
    conv = SubmanifoldConv3d(4, 6, backend="torch").to(device)
    sparse = grid.movedim(1, -1).reshape(-1, 4).clone().requires_grad_()
    coords = torch.ones(1, 3, 4, 5, device=device).nonzero()
    out = conv(SparseTensor(sparse, coords, (3, 4, 5), 1)).dense()
    dense, weight = grid.clone().requires_grad_(), conv.weight.detach().clone().requires_grad_()
    kernel = weight.view(3, 3, 3, 4, 6).permute(4, 3, 0, 1, 2)
    truth = torch.nn.functional.conv3d(dense, kernel, conv.bias.detach(), padding=1)
    out.square().sum().backward()
    truth.square().sum().backward()
    pairs = (
        (out, truth),
        (sparse.grad, dense.grad.movedim(1, -1).reshape(-1, 4)),
        (conv.weight.grad, weight.grad),
    )
    error = max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs)
    return None if error < 1e-3 else f"gives wrong results here (relative error {error:.2g})"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    name = torch.cuda.get_device_name(index)
    return {"name": name, "capability": f"{major}.{minor}", "free_gib": free / GIB, "total_gib": total / GIB}


def _free_memory() -> float | None:
    try:
        return free_memory() / GIB
    except (OSError, AttributeError):  # a system that does not say
        return None


def _advice(found: dict[str, Any]) -> list[str]:
    advice = []
    if not found["system"].startswith("Linux"):
        advice.append(f"{found['system']} has no triton and no spconv: the torch backend runs; Linux is supported")
    if not found["gpus"]:
        advice.append("no CUDA device: everything runs on the CPU; presets base and large need a GPU")
    else:
        if found["backends"]["triton"] is not None:
            advice.append("the triton backend does not work: install the triton that belongs to this torch")
        if found["backends"]["spconv"] is not None:
            advice.append("spconv is optional and slower than triton: pip install 'voxelingo[cuda]' to compare with it")
    missing = [name for name, there in found["decoders"].items() if not there]
    if missing:
        advice.append(f"no decoder for DICOM in {', '.join(missing)}: pip install python-gdcm")
    if found["memory_gib"] is not None and found["memory_gib"] < 4:
        advice.append(f"{found['memory_gib']:.1f} GiB of memory are free: prepare with --workers 1")
    if found["disk_gib"] < 10:
        advice.append(f"{found['disk_gib']:.1f} GiB of disk are free here: a prepared case of 512 cubed takes 0.8 GiB")
    return advice
