"""Memory and time of one training step of preset `base` on a whole 256^3 body phantom, by backend, type, checkpointing.

    python -m tests.benchmarks.bench_memory [--side 256] [--preset base]

Every row is one step as training runs it: maps made anew, forward, backward, AdamW, codebook update. The peak is all
that is allocated, weights and optimizer too. The torch backend is the reference line. A row counts only if its loss is
that of the first.
"""

import argparse
import warnings
from collections.abc import Callable

import torch

from networks.losses import TokenizerLoss
from networks.sparse import SparseTensor
from networks.vqvae import make_vqvae
from tests.benchmarks.bench_step import features
from tests.benchmarks.shapes import body
from tests.benchmarks.timing import finish, once

TYPES = {"bf16": torch.bfloat16, "float32": None}
TOLERANCE = {"bf16": 0.05, "float32": 2e-3}  # of the loss: rounding, and codes that rounding changes


def step_of(
    coords: torch.Tensor, *, side: int, preset: str, backend: str, dtype: str, use_checkpoint: bool
) -> Callable:
    """A step that gives its loss."""
    torch.manual_seed(0)
    device = coords.device
    network = make_vqvae(preset, backend=backend, use_checkpoint=use_checkpoint).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=device.type == "cuda")
    loss_function, generator = TokenizerLoss(), torch.Generator().manual_seed(0)
    feats = features(coords)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        x = SparseTensor(feats, coords, (side, side, side), 1)
        with torch.autocast(device.type, TYPES[dtype], enabled=TYPES[dtype] is not None):
            loss = loss_function(network(x), x)["loss"]
        loss.backward()
        optimizer.step()
        network.vq.update(generator=generator)
        return loss.detach()

    return step


def measured(step: Callable, device: torch.device) -> tuple[float, float, float]:
    """Loss of the first step, GiB at the peak of the third, milliseconds of the fourth and fifth."""
    loss = float(step())
    step()
    peak = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    return loss, peak / 2**30, once(step, device.type, calls=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--preset", default="base")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    coords = body(given.side).to(device).int()
    backends = ("torch", "triton") if device.type == "cuda" else ("torch",)
    rows, failed, reference = [], {}, None
    for backend in backends:
        for dtype in ("float32", "bf16"):
            for use_checkpoint in (False, True):
                shared = {"backend": backend, "dtype": dtype, "use_checkpoint": use_checkpoint}
                try:
                    step = step_of(coords, side=given.side, preset=given.preset, **shared)
                    loss, peak, ms = measured(step, device)
                except torch.OutOfMemoryError as error:  # a way that does not fit is a result
                    failed[" ".join(map(str, shared.values()))] = str(error).splitlines()[0]
                    rows.append({**shared, "loss": None, "peak GiB": None, "ms": None})
                    continue
                finally:
                    step = None
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                reference = loss if reference is None else reference
                assert abs(loss - reference) <= TOLERANCE[dtype] * abs(reference), (shared, loss, reference)
                rows.append({**shared, "loss": loss, "peak GiB": peak, "ms": ms})
    finish("memory", rows, device=device.type, side=given.side, preset=given.preset, voxels=len(coords), failed=failed)


if __name__ == "__main__":
    main()
