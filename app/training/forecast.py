"""How long a run will take on this machine: said before its first step where a CPU is slow, and again at its pace.

Before the first step a forward pass over some of its points is timed; a training step takes about three such passes.
"""

import time
from collections.abc import Callable

import torch
from torch import nn

from app.training.voxel_runs import num_voxels
from networks.sparse import SparseTensor

LONG_ON_CPU_SECONDS = 2 * 3600
LONG_ON_GPU_SECONDS = 48 * 3600
PROBE_POINTS = 1 << 14
PASSES_A_STEP = 3  # forward, and twice as much for the gradients


def advice_for(seconds: float, *, on_gpu: bool) -> str | None:
    """A line where a run will take longer than anybody waits for on such a machine."""
    if seconds < (LONG_ON_GPU_SECONDS if on_gpu else LONG_ON_CPU_SECONDS):
        return None
    machine, instead = ("GPU", "several GPUs under torchrun") if on_gpu else ("CPU", "--preset tiny, or a GPU")
    return f"about {seconds / 3600:.0f} h at this rate on this {machine}: {instead}, or fewer steps (--max_steps)"


def seconds_a_step(
    network: nn.Module, batch: dict | list[dict], *, prepare_batch: Callable[..., SparseTensor], quantize: bool
) -> float | None:
    """A training step of this batch on a CPU; None where finding out would take a share of the step itself.

    No random number is drawn and nothing is learned: the run that follows is the same.
    """
    parts = batch if isinstance(batch, list) else [batch]
    points = sum(num_voxels(part) for part in parts)
    if points < 4 * PASSES_A_STEP * PROBE_POINTS:
        return None
    x = prepare_batch(parts[0], torch.device("cpu"))
    some = SparseTensor(x.feats[:PROBE_POINTS], x.coords[:PROBE_POINTS], x.spatial_shape, x.batch_size)
    was_training = network.training
    network.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            begun = time.perf_counter()
            network(some, quantize=quantize)
            taken = time.perf_counter() - begun
    finally:
        network.train(was_training)
    return PASSES_A_STEP * taken * points / PROBE_POINTS
