"""Halving and doubling at the levels of `base`: the kernels of children against rows laid out in memory, on a card.

    python -m tests.benchmarks.bench_children [--side 256]

Both are timed from features to features, forward alone and with their gradients, on the voxels of a body phantom.
"""

import argparse
from collections.abc import Callable
from itertools import pairwise
from unittest import mock

import torch

from networks.sparse import SparseTensor, modules, whole_blocks
from tests.benchmarks.shapes import body, level_of
from tests.benchmarks.timing import finish, interleaved, peak_gib

WIDTHS = (4, 64, 128, 256)  # of `base`, at full, half, quarter and an eighth of the resolution


def work_of(layer: torch.nn.Module, x: SparseTensor, more: tuple, *, plain: bool, backward: bool) -> Callable[[], None]:
    name = "halving" if isinstance(layer, modules.Halving) else "doubling"

    def work() -> torch.Tensor:
        given = x.replace(x.feats.detach().requires_grad_(backward and x.feats.dtype != torch.float32))
        whole = (lambda *_, **__: None) if plain else getattr(whole_blocks, name)
        served = mock.patch.object(whole_blocks, name, whole)
        with served, torch.set_grad_enabled(backward), torch.autocast("cuda", torch.bfloat16):
            out = layer(given, *more).feats
        if backward:
            layer.zero_grad(set_to_none=True)
            out.backward(torch.ones_like(out))
        return out.detach()

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=256)
    given = parser.parse_args()
    level, rows = level_of(body(given.side), given.side, "cuda"), []
    for i, (width, wider) in enumerate(pairwise(WIDTHS)):
        cells = level.coarsening
        fine = torch.randn(len(level), width, device="cuda")
        fine = SparseTensor.on(level, fine if i == 0 else fine.bfloat16())
        coarse = SparseTensor.on(cells.coarse, torch.randn(len(cells.coarse), wider, device="cuda").bfloat16())
        halving = modules.Halving(width, wider, occupancy=i == 0).cuda()
        doubling = modules.Doubling(wider, width).cuda()
        for layer, x, more in ((halving, fine, ()), (doubling, coarse, (cells,))):
            one, other = (work_of(layer, x, more, plain=plain, backward=False)() for plain in (False, True))
            worst = float((one.float() - other.float()).abs().max() / other.float().abs().max())
            assert worst < 3e-2, (type(layer).__name__, width, worst)
            row = {"layer": type(layer).__name__, "rows": len(level), "channels": f"{width}, {wider}", "error": worst}
            for backward in (False, True):
                works = {
                    kind: work_of(layer, x, more, plain=kind == "plain", backward=backward)
                    for kind in ("kernels", "plain")
                }
                times = interleaved(works, device="cuda")
                label = "fwd+bwd" if backward else "fwd"
                row |= {f"{label} ms": times["kernels"], f"{label} plain ms": times["plain"]}
                row |= {f"{label} faster by": times["plain"] / times["kernels"]}
            row |= {f"{kind} GiB": peak_gib(work) for kind, work in works.items()}
            rows.append(row)
        level = cells.coarse
    finish("children", rows, device="cuda", side=given.side)


if __name__ == "__main__":
    main()
