"""Memory and time of one training step of preset `base` on a whole 256^3 body phantom, by backend, type, checkpointing.

    python -m tests.benchmarks.bench_memory [--side 256] [--preset base]
    python -m tests.benchmarks.bench_memory --by-preset base,large [--batches 1,2,4]     # which card takes which preset

Every row is one step as training runs it: maps made anew, forward, backward, AdamW, codebook update. The peak is all
that is allocated. The torch backend is the reference line; a row counts only if its loss is that of the first.
`--by-preset`: steps as they are by default on a GPU (bf16, samples of at most `max_points`), and whole volumes to
tokens and back. `card` is the smallest that has room for what the allocator holds and a CUDA context.
"""

import argparse
import warnings
from collections.abc import Callable

import torch

from networks.losses import TokenizerLoss
from networks.presets import PRESETS
from networks.sparse import SparseTensor
from networks.tiles import decode_whole, encode_whole
from networks.vqvae import make_vqvae
from tests.benchmarks.bench_step import features
from tests.benchmarks.shapes import body
from tests.benchmarks.timing import finish, once

TYPES = {"bf16": torch.bfloat16, "float32": None}
TOLERANCE = {"bf16": 0.05, "float32": 2e-3}  # of the loss: rounding, and codes that rounding changes
CARDS_GIB = (8, 16, 24, 48, 80, 141)
CONTEXT_GIB = 0.7  # of CUDA itself and the libraries' workspaces


def step_of(
    coords: torch.Tensor, *, side: int, preset: str, backend: str, dtype: str, use_checkpoint: bool
) -> Callable:
    """A step that gives its loss."""
    torch.manual_seed(0)
    device, batch_size = coords.device, int(coords[:, 0].max()) + 1
    network = make_vqvae(preset, backend=backend, use_checkpoint=use_checkpoint).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=device.type == "cuda")
    loss_function, generator = TokenizerLoss(), torch.Generator().manual_seed(0)
    feats = features(coords)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        x = SparseTensor(feats, coords, (side, side, side), batch_size)
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
    peak = peaks(step, device)[0]
    return loss, peak, once(step, device.type, calls=2)


def peaks(work: Callable, device: torch.device) -> tuple[float, float]:
    """GiB allocated at the peak of a call, and GiB that the allocator then holds; none where there is no card."""
    if device.type != "cuda":
        work()
        return 0.0, 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30


# ---- which card takes which preset


def sample_of(side: int, *, max_points: int | None, batch_size: int) -> torch.Tensor:
    """Equal samples: the body phantom, cut to as many slabs of eight voxels as a training sample may hold."""
    coords = body(side).int()
    counts = torch.bincount(coords[:, 3] // 8).cumsum(0)
    slabs = len(counts) if max_points is None else int((counts <= max_points).sum())
    kept = coords[coords[:, 3] < 8 * slabs]
    return torch.cat([kept + torch.tensor([number, 0, 0, 0]).int() for number in range(batch_size)])


def card_for(gib: float) -> str:
    return next((f"{card} GB" for card in CARDS_GIB if gib + CONTEXT_GIB <= 0.93 * card), "none")  # GB are not GiB


def training_row(preset: str, device: torch.device, *, batch_size: int, use_checkpoint: bool, side: int) -> dict:
    sizes = PRESETS[preset]
    dtype, backend = ("bf16", "triton") if device.type == "cuda" else ("float32", "torch")
    coords = sample_of(side, max_points=sizes.max_points, batch_size=batch_size).to(device)
    row = {"preset": preset, "what": f"step, batch {batch_size}{', use_checkpoint' if use_checkpoint else ''}"}
    row |= {"voxels": len(coords)}
    step = step_of(coords, side=side, preset=preset, backend=backend, dtype=dtype, use_checkpoint=use_checkpoint)
    losses = [float(step()) for _ in range(3)]
    assert all(loss == loss and loss < 1e3 for loss in losses), losses
    allocated, held = peaks(step, device)
    return {**row, "peak GiB": allocated, "held GiB": held, "card": card_for(held), "ms": once(step, device.type)}


def tokenize_row(preset: str, device: torch.device, *, max_points: int, side: int) -> dict:
    """A whole volume to tokens and back, as `tokenize` and `reconstruct` do: float32, in parts."""
    torch.manual_seed(0)
    network = make_vqvae(preset, backend="triton" if device.type == "cuda" else "torch").to(device).eval()
    coords = body(side).int().to(device)
    x = SparseTensor(features(coords), coords, (side,) * 3, 1)
    x = x.to("cpu") if len(coords) > max_points else x  # as CTTokenizer does
    num_voxels = len(coords)
    del coords

    def work() -> None:
        tokens = encode_whole(network, x, max_points=max_points)
        assert len(decode_whole(network, tokens, max_points=max_points).values) > 0

    row = {"preset": preset, "what": f"tokens and back, parts of {max_points:,} voxels", "voxels": num_voxels}
    with torch.no_grad():
        work()
        allocated, held = peaks(work, device)
        return {**row, "peak GiB": allocated, "held GiB": held, "card": card_for(held), "ms": once(work, device.type)}


def by_preset(presets: list[str], batches: list[int], device: torch.device, *, side: int | None = None) -> None:
    rows, failed = [], {}
    for preset in presets:
        grid = side or PRESETS[preset].resolution
        jobs = [
            (training_row, {"batch_size": batch_size, "use_checkpoint": use_checkpoint})
            for batch_size in batches
            for use_checkpoint in (False, True)
        ]
        most = PRESETS[preset].max_points or grid**3
        jobs += [(tokenize_row, {"max_points": points}) for points in (most, most // 8)]
        for measure, given in jobs:
            try:
                rows.append(measure(preset, device, side=grid, **given))
            except torch.OutOfMemoryError as error:  # that it does not fit is a result
                failed[f"{preset} {given}"] = str(error).splitlines()[0]
                rows.append({"preset": preset, "what": f"{measure.__name__} {given}", "card": "none"})
            finally:
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    finish("presets", rows, device=device.type, failed=failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--by-preset", default="", help="presets, comma separated")
    parser.add_argument("--batches", default="1,2,4")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if given.by_preset:
        by_preset(given.by_preset.split(","), [int(part) for part in given.batches.split(",")], device)
        return
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
