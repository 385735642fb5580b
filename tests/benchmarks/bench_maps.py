"""Building the maps of a fresh batch of about a million voxels: ours for all levels, beside spconv's for the finest.

    python -m tests.benchmarks.bench_maps

Ours: keys, sort, neighbours, tiles, parents, children of four levels. spconv: index pairs of one submanifold layer
and of the strided layers between levels, where it is installed. First our neighbours are compared with a search
among the keys. Launches are ours a level: kernels, copies and fills that the host starts.
"""

import importlib.util
import warnings

import torch

from networks.sparse.topology import Level
from tests.benchmarks.shapes import body, shell
from tests.benchmarks.timing import finish, interleaved, step_cost

VOLUMES = {"body 786k": (body, 128), "shell 598k": (shell, 512), "body 6.3M": (body, 256)}


def build(coords: torch.Tensor, side: int) -> Level:
    """All maps that an encoder and a decoder of three halvings use."""
    level, _ = Level.from_coords(coords, (side, side, side), 1)
    finest = level
    level.prepare(True, True, True, True)
    for depth in range(4):
        maps = [level.tiles(128), level.neighbour_lists if level.is_thin else None]
        del maps  # kept by the level
        if depth < 3:
            level = level.coarsening.coarse
    return finest


def spconv_maps(coords: torch.Tensor, side: int) -> None:
    from spconv.core import ConvAlgo
    from spconv.pytorch import ops

    common = {"out_padding": [0] * 3, "dilation": [1] * 3, "is_train": True}
    for depth in range(4):
        ops.get_indice_pairs_implicit_gemm(
            coords, 1, [side] * 3, ConvAlgo.MaskImplicitGemm, [3] * 3, [1] * 3, [1] * 3, subm=True, **common
        )
        if depth < 3:
            coords = ops.get_indice_pairs_implicit_gemm(
                coords, 1, [side] * 3, ConvAlgo.MaskImplicitGemm, [2] * 3, [2] * 3, [0] * 3, subm=False, **common
            )[0]
            side //= 2


def main() -> None:
    warnings.filterwarnings("ignore")
    rows = []
    for name, (make, side) in VOLUMES.items():
        coords = make(side).cuda().int()
        finest = build(coords, side)
        assert torch.equal(finest.neighbours, finest._neighbours_by_search()), f"{name}: wrong neighbours"
        del finest
        works = {"ours": lambda c=coords, s=side: build(c, s)}
        if importlib.util.find_spec("spconv"):
            works["spconv"] = lambda c=coords, s=side: spconv_maps(c, s)
        times, cost = interleaved(works, device="cuda"), step_cost(works["ours"])
        rows.append({"case": name, "ms": times["ours"], "spconv ms": times.get("spconv")})
        rows[-1]["ratio"] = times["spconv"] / times["ours"] if "spconv" in times else None
        rows[-1] |= {"launches a level": cost.launches / 4, "waits": cost.waits, "card ms": cost.card_ms}
        torch.cuda.empty_cache()
    finish("maps", rows, device="cuda")


if __name__ == "__main__":
    main()
