"""Nearest code of N rows among 8192 and the sums of a codebook update, beside vector-quantize-pytorch, on a CUDA card.

    python -m tests.benchmarks.bench_search

Ours: a training forward of `VectorQuantizer` and its `update`. The peer: one training forward with its EMA codebook.
Where the peer does not fit the card, its columns are empty. Correct means that no row's code is farther than the
nearest by more than float32 rounding, judged in float64.
"""

import math
import warnings

import torch

from networks.quantizer import VectorQuantizer, code_sums, nearest_codes
from tests.benchmarks.timing import finish, interleaved, peak_gib

CODES = 8192


def regret(rows: torch.Tensor, codebook: torch.Tensor, codes: torch.Tensor) -> float:
    """Largest excess of a chosen squared distance over the least, relative to |x||c|, on a part of the rows."""
    some = torch.arange(0, len(rows), max(1, len(rows) // 4000), device=rows.device)
    x, c = rows[some].double(), codebook.double()
    distances = (x[:, None, :] - c[codes[some]][:, None, :]).square().sum(2)[:, 0]
    least = torch.cat([torch.cdist(part, c).min(1).values.square() for part in x.split(500)])
    return float((distances - least).max() / (x.norm(dim=1).max() * c.norm(dim=1).max()))


def plain(rows: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Chunked addmm and argmin."""
    halves = codebook.square().sum(1) / 2
    return torch.cat([torch.addmm(halves, part, codebook.T, alpha=-1).argmin(1) for part in rows.split(16384)])


def measure(num_rows: int, width: int) -> dict[str, object]:
    from vector_quantize_pytorch import VectorQuantize

    torch.manual_seed(0)
    rows = torch.randn(num_rows, width, device="cuda")
    ours = VectorQuantizer(CODES, width).cuda().train()
    codebook = ours.codebook.clone()
    codes = nearest_codes(rows, codebook)
    excess = regret(rows, codebook, codes)
    assert excess < 1e-6, f"{num_rows} rows of {width}: a code is too far by {excess}"
    counts, sums = code_sums(rows, codes, CODES)
    exact = torch.zeros(CODES, width, dtype=torch.float64, device="cuda").index_add_(0, codes, rows.double())
    assert (sums - exact).abs().max() < 1e-4 * exact.abs().max() and int(counts.sum()) == num_rows
    peer = VectorQuantize(dim=width, codebook_size=CODES, decay=0.99, rotation_trick=False).cuda().train()
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        ours(rows)
        ours.update(generator=generator)

    works = {
        "ours": step,
        "search": lambda: nearest_codes(rows, codebook),
        "sums": lambda: code_sums(rows, codes, CODES),
        "addmm + argmin": lambda: plain(rows, codebook),
        "vector-quantize-pytorch": lambda: peer(rows[None]),
    }
    memory = {name: peak_gib(works[name]) for name in ("ours", "search")}
    try:
        memory["vector-quantize-pytorch"] = peak_gib(works["vector-quantize-pytorch"])
    except torch.OutOfMemoryError:  # a million rows take 122 GiB there
        del works["vector-quantize-pytorch"]
        torch.cuda.empty_cache()
    times = interleaved(works, device="cuda", rounds=7)
    return {
        "rows": num_rows,
        "D": width,
        **{f"{name} ms": value for name, value in times.items()},
        **{f"{name} GiB": value for name, value in memory.items()},
        "ratio": times.get("vector-quantize-pytorch", math.nan) / times["ours"],
        "regret": excess,
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    rows = [measure(n, 32) for n in (20_000, 100_000, 1_000_000)] + [measure(100_000, width) for width in (16, 64)]
    finish("search", rows, device="cuda", codes=CODES)


if __name__ == "__main__":
    main()
