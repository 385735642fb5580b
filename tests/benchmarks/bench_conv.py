"""Submanifold 3x3x3 convolution: triton (bf16) beside spconv (fp16, TF32) and the torch backend, on a CUDA card.

    python -m tests.benchmarks.bench_conv

Bodies of 98k and 786k voxels and a shell of 598k, C -> C channels, maps warm. Useful work is 2 N n C^2 a pass, n the
mean number of neighbours. First each result is compared with the torch backend in float32. Gradients run on the calling
thread: a network wakes autograd's own thread once for all its layers, a single layer would pay it at each call.
"""

import argparse
import math
import warnings

import torch

from networks.sparse import SparseTensor, SubmanifoldConv3d
from networks.sparse.topology import Level
from tests.benchmarks.shapes import body, level_of, shell
from tests.benchmarks.timing import Work, dense_rate, device_ms, finish, interleaved

VOLUMES = {"body 98k": (body, 64), "body 786k": (body, 128), "shell 598k": (shell, 512)}
CHANNELS = (32, 64, 128, 256, 512)
GOAL = {"body": 2.0, "shell": 1.7}
L2_BYTES, HBM_BYTES = 5.5e12, 4.3e12  # a second: assumed for gathers, measured by a copy


def ours(level: Level, channels: int, backend: str, dtype: torch.dtype) -> tuple[Work, Work, torch.Tensor]:
    """Forward, forward with backward, and the output for comparison."""
    torch.manual_seed(0)
    conv = SubmanifoldConv3d(channels, channels, backend=backend).cuda().to(dtype)
    feats = torch.randn(len(level), channels, device="cuda").to(dtype).requires_grad_()
    grad = feats.detach()
    x = SparseTensor.on(level, feats)

    def both() -> None:
        feats.grad = conv.weight.grad = conv.bias.grad = None
        conv(x).feats.backward(grad)

    return lambda: conv(x), both, conv(x).feats.detach()


def peer(level: Level, channels: int, dtype: torch.dtype, *, tf32: bool) -> tuple[Work, Work, torch.Tensor]:
    """spconv's own layer with the same weights, its index pairs built once."""
    import spconv.pytorch as spconv
    from spconv import constants
    from spconv.core import ConvAlgo

    from networks.sparse.spconv_backend import to_spconv

    torch.manual_seed(0)
    twin = SubmanifoldConv3d(channels, channels).cuda()
    conv = spconv.SubMConv3d(channels, channels, 3, indice_key="k", algo=ConvAlgo.MaskImplicitGemm).cuda().to(dtype)
    conv.weight.data.copy_(to_spconv(twin.weight.data))
    conv.bias.data.copy_(twin.bias.data)
    feats = torch.randn(len(level), channels, device="cuda").to(dtype).requires_grad_()
    grad = feats.detach()
    x = spconv.SparseConvTensor(feats, level.coords.contiguous(), list(level.spatial_shape), level.batch_size)
    x = conv(x).replace_feature(feats)  # keeps the index pairs

    def run() -> torch.Tensor:
        constants.SPCONV_ALLOW_TF32 = tf32
        return conv(x).features

    def both() -> None:
        feats.grad = conv.weight.grad = conv.bias.grad = None
        run().backward(grad)

    return run, both, run().detach()


def bounds(level: Level, channels: int, rate: float) -> dict[str, float]:
    """Milliseconds a forward cannot undercut: tensor cores, device memory, gathers from L2."""
    voxels, near = len(level), level.mean_neighbours
    flops = 2 * voxels * near * channels**2
    moved = 2 * voxels * 2 * channels + 108 * voxels + 54 * channels**2
    gathered = 2 * voxels * near * channels * math.ceil(channels / 256)
    return {"cores": flops / rate / 1e9, "memory": 1e3 * moved / HBM_BYTES, "L2": 1e3 * gathered / L2_BYTES}


def measure(name: str, level: Level, channels: int, rate: float) -> dict[str, object]:
    works = {
        "triton": ours(level, channels, "triton", torch.bfloat16),
        "torch": ours(level, channels, "torch", torch.bfloat16),
        "spconv": peer(level, channels, torch.float16, tf32=False),
        "spconv tf32": peer(level, channels, torch.float32, tf32=True),
    }
    truth = ours(level, channels, "torch", torch.float32)[2]
    scale = truth.abs().max()
    errors = {key: float((work[2].float() - truth).abs().max() / scale) for key, work in works.items()}
    assert errors["triton"] < 1e-2 and errors["torch"] < 1e-2, f"{name} C {channels}: wrong values {errors}"
    forward = interleaved({key: work[0] for key, work in works.items()}, device="cuda")
    both = interleaved({key: work[1] for key, work in works.items()}, device="cuda")
    device = {key: device_ms(works[key][1]) for key in ("triton", "spconv")}
    flops = 2 * len(level) * level.mean_neighbours * channels**2 / 1e9
    limits = bounds(level, channels, rate)
    return {
        "case": name,
        "C": channels,
        **{f"{key} fwd": value for key, value in forward.items()},
        **{f"{key} f+b": value for key, value in both.items()},
        "TF/s fwd": flops / forward["triton"],
        "TF/s f+b": 3 * flops / both["triton"],
        "share of dense": flops / forward["triton"] / rate,
        "share of bound": max(limits.values()) / forward["triton"],
        "bound by": max(limits, key=limits.get),
        "ratio fwd": forward["spconv"] / forward["triton"],
        "ratio f+b": both["spconv"] / both["triton"],
        "ratio f+b on the card": device["spconv"] / device["triton"],
        "triton f+b on the card": device["triton"],
        "spconv error": errors["spconv"],
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--channels", type=int, nargs="*", default=CHANNELS)
    channels = arguments.parse_args().channels
    warnings.filterwarnings("ignore")
    torch.autograd.set_multithreading_enabled(False)
    rate, rows = dense_rate(), []
    for name, (make, side) in VOLUMES.items():
        level = level_of(make(side), side, "cuda")
        rows += [measure(name, level, width, rate) for width in channels]
        torch.cuda.empty_cache()
    nine = [row for row in rows if row["C"] in (64, 128, 256)]
    mean, mean_on_card = (
        math.exp(sum(math.log(row[key]) for row in nine) / max(len(nine), 1))
        for key in ("ratio f+b", "ratio f+b on the card")
    )
    missed = [f"{r['case']} C {r['C']}" for r in nine if r["ratio f+b"] < GOAL[r["case"].split()[0]]]
    means = {"geometric_mean": mean, "geometric_mean_on_card": mean_on_card}
    finish("conv", rows, device="cuda", dense_tflops=rate, below_goal=missed, **means)


if __name__ == "__main__":
    main()
