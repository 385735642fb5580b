"""One training step of preset `base` on a whole 256^3 body phantom, in volumes a second, on a CUDA card.

    python -m tests.benchmarks.bench_step [--profile] [--beside 0 14] [--graphs]

Beside it: MONAI's dense VQVAE (equal parameters, equal compression, and its 64/128/256 widths), and the original
design: 100k voxels thinned at random, every latent expanded to 512 voxels, rows matched through a dictionary
(extrapolated from a tenth) or through sorted keys. Every step makes its maps anew, and steps follow one another, as in
training. Of ours also: what the host starts and waits for, and how long the card works; `--beside` times all again
with so many busy processes on the host.
"""

import argparse
import time
import warnings
from collections.abc import Callable

import torch

from app.training.side_stream import SideStream
from networks.losses import TokenizerLoss
from networks.sparse import SparseTensor
from networks.sparse.topology import align_rows
from networks.vqvae import SparseVQVAE, make_vqvae
from tests.benchmarks.shapes import body
from tests.benchmarks.timing import busy_host, finish, interleaved, peak_gib, step_cost

THINNED = 100_000


def features(coords: torch.Tensor) -> torch.Tensor:
    """Four channels in [-1, 1] that vary smoothly over the body."""
    scale = torch.tensor([0.02, 0.05, 0.03, 0.07], device=coords.device)
    return torch.sin(coords[:, 1:].float().sum(1, keepdim=True) * scale) * 0.9


def sparse_step(
    side: int, *, backend: str, preset: str, dtype: torch.dtype, use_graphs: bool = False
) -> tuple[Callable[[], None], SparseVQVAE]:
    torch.manual_seed(0)
    network = make_vqvae(preset, backend=backend, use_graphs=use_graphs).cuda().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    loss_function, generator = TokenizerLoss(), torch.Generator().manual_seed(0)
    coords, beside = body(side).cuda().int(), SideStream()
    feats = features(coords)
    torch.cuda.synchronize()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with beside(coords.device):
            x = SparseTensor(feats, coords, (side, side, side), 1)
            network.prepare(x.level)
        with torch.autocast("cuda", dtype):
            loss = loss_function(network(x), x)["loss"]
        loss.backward()
        beside.hold(x, coords.device)
        optimizer.step()
        network.vq.update(generator=generator)

    return step, network


def dense_step(side: int, widths: tuple[int, int, int]) -> tuple[Callable[[], None], torch.nn.Module]:
    from monai.networks.nets import VQVAE

    torch.manual_seed(0)
    network = VQVAE(
        spatial_dims=3,
        in_channels=4,
        out_channels=4,
        channels=widths,
        num_res_channels=widths,
        num_res_layers=2,
        downsample_parameters=((2, 4, 1, 1),) * 3,
        upsample_parameters=((2, 4, 1, 1, 0),) * 3,
        num_embeddings=8192,
        embedding_dim=16,
    )
    network = network.cuda().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    coords = body(side).cuda()
    volume = torch.full((1, 4, side, side, side), -1.0, device="cuda")
    volume[0, :, coords[:, 1], coords[:, 2], coords[:, 3]] = features(coords).T

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            recon, quantization = network(volume)
            loss = (recon - volume).abs().mean() + quantization
        loss.backward()
        optimizer.step()

    return step, network


def original_step(side: int, *, backend: str, preset: str) -> tuple[Callable[[], None], Callable[[], float]]:
    """The step with sorted keys, and the seconds that a dictionary would add."""
    torch.manual_seed(0)
    network = make_vqvae(preset, backend=backend).cuda().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    coords = body(side)
    coords = coords[torch.randperm(len(coords))[:THINNED]].cuda().int()
    feats = features(coords)
    decoded: list[SparseTensor] = []

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        x = SparseTensor(feats, coords, (side, side, side), 1)
        with torch.autocast("cuda", torch.bfloat16):
            latents, _ = network.encoder(x)
            quantized = network.vq(latents.feats)

            def expand(i: int, at: SparseTensor) -> object:
                every = torch.ones(len(at), 8, dtype=torch.bool, device="cuda")
                return at.level.subdivide(every, tuple(2 * n for n in at.spatial_shape))

            recon = network.decoder(latents.replace(quantized.values), expand)
            rows = align_rows(recon.level, x.level)
            loss = (recon.feats[rows] - x.feats).abs().mean() + 0.25 * quantized.commitment.mean()
        loss.backward()
        optimizer.step()
        decoded[:] = [recon]

    def dictionary() -> float:
        rows = decoded[0].coords.cpu()
        part = rows[: max(1, len(rows) // 10)].tolist()
        start = time.perf_counter()
        row_of = {tuple(coord): i for i, coord in enumerate(part)}
        [row_of.get(tuple(coord), -1) for coord in coords[: THINNED // 10].tolist()]
        return (time.perf_counter() - start) * len(rows) / len(part)

    return step, dictionary


def profile(step: Callable[[], None]) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    with recorded(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize()
    print(record.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=70))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--only", action="store_true", help="the sparse step alone")
    parser.add_argument("--equal", action="store_true", help="that and MONAI's of equal parameters")
    parser.add_argument("--graphs", action="store_true", help="the step with encoder and decoder as CUDA graphs, too")
    parser.add_argument("--beside", type=int, nargs="+", default=[0], help="busy processes on the host")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    works, sizes = {}, {}
    alone = given.only or given.equal
    for backend in ("triton",) if alone else ("triton", "spconv", "torch"):
        dtype = torch.float16 if backend == "spconv" else torch.bfloat16  # spconv has no bfloat16
        works[backend], network = sparse_step(given.side, backend=backend, preset=given.preset, dtype=dtype)
        sizes[backend] = sum(p.numel() for p in network.parameters()) / 1e6
    if given.graphs:
        how = {"backend": "triton", "preset": given.preset, "dtype": torch.bfloat16, "use_graphs": True}
        works["triton, graphs"], _ = sparse_step(given.side, **how)
    dictionary = None
    for name, widths in {"MONAI equal": (44, 88, 176), "MONAI 64/128/256": (64, 128, 256)}.items():
        if not alone or (given.equal and name == "MONAI equal"):
            works[name], network = dense_step(given.side, widths)
            sizes[name] = sum(p.numel() for p in network.parameters()) / 1e6
    if not alone:
        works["original, sorted keys"], dictionary = original_step(given.side, backend="triton", preset=given.preset)
    memory, failed = {}, {}
    for name in list(works):
        try:
            works[name]()
            memory[name] = peak_gib(works[name])
        except Exception as error:  # a peer that cannot run this size is a result
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            del works[name]
        torch.cuda.empty_cache()
    times = interleaved(works, device="cuda", rounds=7, budget_ms=4000, turn_ms=500)
    loaded = {}
    for processes in [count for count in given.beside if count]:
        with busy_host(processes):
            loaded[processes] = interleaved(works, device="cuda", rounds=5, budget_ms=4000, turn_ms=500)
    costs = {name: step_cost(works[name]) for name in ("triton", "triton, graphs") if name in works}
    if dictionary is not None:
        times["original, dictionary"] = times["original, sorted keys"] + 1e3 * dictionary()
    if given.profile:
        profile(works["triton"])
    rows = [
        {
            "step": name,
            "parameters M": sizes.get(name),
            "ms": value,
            "volumes/s": 1e3 / value,
            "peak GiB": memory.get(name),
            "triton is faster by": value / times["triton"],
            **{f"ms beside {count}": found.get(name) for count, found in loaded.items()},
            **({**costs[name]._asdict(), "card busy": costs[name].card_ms / value} if name in costs else {}),
        }
        for name, value in times.items()
    ]
    finish("step", rows, device="cuda", side=given.side, voxels=len(body(given.side)), failed=failed)


if __name__ == "__main__":
    main()
