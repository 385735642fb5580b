"""The torch backend on a CPU beside spconv's CPU forward, each on one thread (spconv gives wrong rows on more).

    python -m tests.benchmarks.bench_cpu

First the forward is compared with float64. spconv's row needs the package `spconv`; without it ours stands alone.
"""

import importlib.util
import warnings

import torch

from networks.sparse import torch_backend
from networks.sparse.topology import Level
from tests.benchmarks.shapes import body, level_of, shell
from tests.benchmarks.timing import Work, finish, interleaved

VOLUMES = {"body 52": (body, 52), "shell 160": (shell, 160)}


def peer(level: Level, feats: torch.Tensor, weight: torch.Tensor) -> Work:
    import spconv.pytorch as spconv

    from networks.sparse.spconv_backend import to_spconv

    channels = feats.shape[1]
    conv = spconv.SubMConv3d(channels, channels, 3, bias=False, indice_key="k").train()
    conv.weight.data.copy_(to_spconv(weight))
    x = spconv.SparseConvTensor(feats, level.coords.contiguous(), list(level.spatial_shape), 1)
    x = conv(x).replace_feature(feats)  # keeps the index pairs
    return lambda: conv(x)


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = []
    for name, (make, side) in VOLUMES.items():
        level = level_of(make(side), side, "cpu")
        for channels in (32, 64):
            made = torch.Generator().manual_seed(0)
            feats = torch.randn(len(level), channels, generator=made)
            weight = torch.randn(27, channels, channels, generator=made) / 30
            exact = torch_backend.forward(feats[:].double(), weight.double(), None, level)
            out = torch_backend.forward(feats, weight, None, level)
            assert (out - exact).abs().max() < 2e-5 * exact.abs().max()
            works: dict[str, Work] = {
                "torch": lambda f=feats, w=weight, at=level: torch_backend.forward(f, w, None, at)
            }
            if importlib.util.find_spec("spconv"):
                works["spconv"] = peer(level, feats, weight)
            with torch.no_grad():
                times = interleaved(works, device="cpu", rounds=3)
            row = {"case": name, "N": len(level), "C": channels, **{f"{key} ms": ms for key, ms in times.items()}}
            rows.append(row | ({"ratio": times["spconv"] / times["torch"]} if "spconv" in times else {}))
    finish("cpu", rows, device="cpu", threads=1)


if __name__ == "__main__":
    main()
