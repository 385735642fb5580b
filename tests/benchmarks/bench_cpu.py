"""The torch backend on one and two CPU threads beside spconv's CPU forward on one (it gives wrong rows on more).

    python -m tests.benchmarks.bench_cpu [--cases body-66k body-197k shell-58k] [--channels 32 64 128] [--forward-only]

First sampled rows are compared with float64 sums, and the gradients by the law that a linear map and its transpose
give equal inner products. spconv's columns need the package `spconv`; its backward raises on a CPU. "CPU ms" is
processor time, which a neighbour on a shared machine disturbs less than the clock on the wall. "cores" is how much
faster a plain matrix product is on two threads in the same turns: what the second core was worth meanwhile.
"""

import argparse
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from networks.sparse import torch_backend
from networks.sparse.topology import Level
from tests.benchmarks.shapes import body, level_of, shell
from tests.benchmarks.timing import Work, finish, interleaved

CASES = {"body-66k": (body, 56), "body-197k": (body, 81), "shell-58k": (shell, 160)}


def peer(level: Level, feats: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    import spconv.pytorch as spconv

    from networks.sparse.spconv_backend import to_spconv

    channels = feats.shape[1]
    conv = spconv.SubMConv3d(channels, channels, 3, bias=False, indice_key="k").train()
    conv.weight.data.copy_(to_spconv(weight))
    x = spconv.SparseConvTensor(feats, level.coords.contiguous(), list(level.spatial_shape), 1)
    x = conv(x).replace_feature(feats)  # keeps the index pairs
    return lambda: conv(x).features


def check_rows(out: Float[Tensor, "N F"], feats: Float[Tensor, "N C"], weight: Float[Tensor, "27 C F"], level: Level):
    rows = torch.linspace(0, len(level) - 1, 2000).long()
    padded = torch.nn.functional.pad(feats, (0, 0, 0, 1))
    exact = torch.einsum("krc,kcf->rf", padded[level.neighbours[:, rows].long()].double(), weight.double())
    assert (out[rows] - exact).abs().max() < 2e-5 * exact.abs().max()


def inner(a: Tensor, b: Tensor) -> float:
    return (a.double() * b.double()).sum().item()


def on(threads: int, work: Work, cpu_ms: list[float]) -> Work:
    def timed() -> None:
        torch.set_num_threads(threads)
        start = time.process_time()
        work()
        cpu_ms.append(1e3 * (time.process_time() - start))

    return timed


def measure(level: Level, channels: int, *, gradients: bool) -> dict[str, float]:
    made = torch.Generator().manual_seed(0)
    feats, upstream = torch.randn(2, len(level), channels, generator=made)
    weight = torch.randn(27, channels, channels, generator=made) / 30

    def forward() -> Tensor:
        return torch_backend.forward(feats, weight, None, level)

    def all_three() -> tuple[Tensor, Tensor, Tensor]:
        feats_grad = torch_backend.input_grad(upstream, weight, level)
        return forward(), feats_grad, torch_backend.weight_grad(feats, upstream, level)

    out, feats_grad, weight_grad = all_three()
    check_rows(out, feats, weight, level)
    there = inner(out, upstream)
    limit = 1e-5 * (out.double().norm() * upstream.double().norm()).item()
    assert abs(inner(feats, feats_grad) - there) < limit and abs(inner(weight, weight_grad) - there) < limit

    square = torch.randn(1024, 1024, generator=made)
    plans = {"mm 1": (1, lambda: square @ square), "mm 2": (2, lambda: square @ square)}
    plans |= {"fwd 1": (1, forward), "fwd 2": (2, forward)}
    if gradients:
        plans |= {"fwd+grads 1": (1, all_three), "fwd+grads 2": (2, all_three)}
    if importlib.util.find_spec("spconv"):
        torch.set_num_threads(1)
        plans["spconv fwd 1"] = (1, peer(level, feats, weight))
        check_rows(plans["spconv fwd 1"][1](), feats, weight, level)
    cpu_ms = {name: [] for name in plans}
    works = {name: on(threads, work, cpu_ms[name]) for name, (threads, work) in plans.items()}
    wall = interleaved(works, device="cpu", rounds=5, budget_ms=1500)
    found = {"cores": wall.pop("mm 1") / wall.pop("mm 2")} | {f"{name} ms": ms for name, ms in wall.items()}
    for name in wall:
        if name.endswith("1"):
            found[f"{name} CPU ms"] = statistics.median(cpu_ms[name][1:])
    if "spconv fwd 1" in plans:
        found["ratio 1:1"] = wall["spconv fwd 1"] / wall["fwd 1"]
        found["ratio 1:1 CPU"] = found["spconv fwd 1 CPU ms"] / found["fwd 1 CPU ms"]
        found["ratio 2:1"] = wall["spconv fwd 1"] / wall["fwd 2"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--channels", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--forward-only", action="store_true")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = []
    for case in asked.cases:
        make, side = CASES[case]
        level = level_of(make(side), side, "cpu")
        for channels in asked.channels:
            row = {"case": case, "N": len(level), "neighbours": level.mean_neighbours, "C": channels}
            with torch.no_grad():
                rows.append(row | measure(level, channels, gradients=not asked.forward_only))
    finish("cpu", rows, device="cpu")


if __name__ == "__main__":
    main()
