"""Finding 100k voxels among 5M: a dictionary of tuples (extrapolated from a twentieth) beside sorted keys.

python -m tests.benchmarks.bench_align
"""

import time

import torch

from networks.sparse.topology import Level, align_rows
from tests.benchmarks.timing import finish, interleaved

SIDE, SOURCE, TARGET = 256, 5_000_000, 100_000


def cells(count: int) -> torch.Tensor:
    index = torch.randperm(SIDE**3, generator=torch.Generator().manual_seed(count))[:count]
    x, rest = index // SIDE**2, index % SIDE**2
    return torch.stack([torch.zeros_like(x), x, rest // SIDE, rest % SIDE], 1).int()


def dictionary(source: torch.Tensor, target: torch.Tensor) -> tuple[list[int], float]:
    start = time.perf_counter()
    row_of = {tuple(coord): i for i, coord in enumerate(source.tolist())}
    rows = [row_of.get(tuple(coord), -1) for coord in target.tolist()]
    return rows, 1e3 * (time.perf_counter() - start)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source, target = cells(SOURCE), cells(TARGET)
    part, few = source[: SOURCE // 20], target[: TARGET // 20]
    shape = (SIDE, SIDE, SIDE)
    small = [Level.from_coords(coords.to(device), shape, 1)[0] for coords in (part, few)]
    rows, taken = dictionary(small[0].coords.cpu(), small[1].coords.cpu())
    found = align_rows(*small).cpu()
    assert torch.where(found == len(part), -1, found).tolist() == rows
    raw = [coords.to(device) for coords in (source, target)]
    levels = [Level.from_coords(coords, shape, 1)[0] for coords in raw]
    works = {
        "keys kept": lambda: align_rows(*levels),
        "from coordinates": lambda: align_rows(*[Level.from_coords(coords, shape, 1)[0] for coords in raw]),
    }
    times = interleaved(works, device=device, rounds=5) | {"dictionary (extrapolated)": taken * 20}
    table = [{"way": name, "ms": ms, "ratio": taken * 20 / ms} for name, ms in times.items()]
    finish("align", table, device=device, source=SOURCE, target=TARGET)


if __name__ == "__main__":
    main()
