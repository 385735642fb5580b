"""`tokenize` end to end: scans a second of a folder on a card, or one scan on a CPU beside MONAI's dense VQVAE encoder.

    python -m tests.benchmarks.bench_tokenize [--card] [--scans 20] [--side 256] [--threads 1]

The scans are body phantoms with noise, written as a prepared dataset of 1.5 mm; the tokenizer is the one that ships.
On a card the same folder is also taken one scan after another, nothing read ahead: codes are compared.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from app.dataset.writer import metadata_row, write_case, write_dataset_config, write_metadata
from app.tokens import commands
from app.tokens.token_files import read_tokens
from app.tokens.tokenizer import CTTokenizer
from networks.presets import WINDOW_NAMES
from networks.sparse import SparseTensor
from networks.tiles import encode_whole
from tests.benchmarks.dense_peer import dense_vqvae
from tests.benchmarks.shapes import body
from tests.benchmarks.timing import finish

SPACING = 1.5


def write_scans(place: Path, count: int, side: int) -> None:
    """Bodies of soft tissue that differ by noise, air around."""
    x, y, z = body(side)[:, 1:].T.numpy()
    rows, affine = [], np.diag([SPACING] * 3 + [1.0])
    for number in range(count):
        hu = np.full((side,) * 3, -1024, np.int16)
        rng = np.random.default_rng(number)
        hu[x, y, z] = 40 + 60 * np.sin(x / 9) * np.cos(z / 7) + rng.normal(0, 20, len(x))
        case = write_case(place, f"scan{number:03d}", hu, affine=affine, windows=WINDOW_NAMES)
        rows.append(metadata_row(case, windows=WINDOW_NAMES))
    write_metadata(place, rows)
    write_dataset_config(place, {"windows": list(WINDOW_NAMES)})


@contextmanager
def one_by_one() -> Iterator[None]:
    def in_turn(sources, look, device):
        return (partial(look, source) for source in sources)

    with mock.patch.object(commands, "_ahead", in_turn):
        yield


def network_seconds(side: int, repeats: int = 5) -> float:
    """Of encoding one scan that is on the card already."""
    made = CTTokenizer.from_pretrained("ct_base")
    coords = body(side).cuda().int()
    feats = torch.rand(len(coords), made.sizes.in_channels, device="cuda")
    for turn in range(repeats + 2):
        if turn == 2:
            torch.cuda.synchronize()
            start = time.perf_counter()
        with torch.inference_mode():
            x = SparseTensor(feats, coords, (side,) * 3, 1)
            encode_whole(made.network, x, max_points=made.max_points)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def on_a_card(place: Path, given: argparse.Namespace) -> list[dict]:
    rows, codes = [], {}
    ways = {"ahead": nullcontext, "in turn": one_by_one}
    network = network_seconds(given.side)
    for way, context in ways.items():
        with context():
            commands.tokenize(place / "warm", place / "out" / f"warm {way}", tokenizer="ct_base")
            start = time.perf_counter()
            done = commands.tokenize(place / "scans", place / "out" / way, tokenizer="ct_base")
            seconds = time.perf_counter() - start
        assert done["ok"] == given.scans, done
        files = sorted((place / "out" / way).glob("*.npz"))
        codes[way] = np.concatenate([read_tokens(file).codes.ravel() for file in files])
        rows.append({"way": way, "scans/s": given.scans / seconds, "s a scan": seconds / given.scans})
        rows[-1] |= {"GiB": torch.cuda.max_memory_allocated() / 2**30}
    rows[0] |= {"network s a scan": network, "its share": network / rows[0]["s a scan"]}
    rows[0]["equal codes"] = float((codes["ahead"] == codes["in turn"]).mean())
    return rows


def on_a_cpu(place: Path, given: argparse.Namespace) -> list[dict]:
    torch.set_num_threads(given.threads)
    start, busy = time.perf_counter(), time.process_time()
    done = commands.tokenize(place / "scans", place / "out", tokenizer="ct_base")
    ours, ours_cpu = time.perf_counter() - start, time.process_time() - busy
    assert done["ok"] == 1, done
    peer = dense_vqvae((44, 88, 176), in_channels=4, num_codes=8192, code_width=64).eval()
    volume = torch.rand(1, 4, *(given.side,) * 3) * 2 - 1
    with torch.inference_mode():
        start, busy = time.perf_counter(), time.process_time()
        peer.encode(volume)
        dense, dense_cpu = time.perf_counter() - start, time.process_time() - busy
    return [
        {"what": "tokenize, reading and writing included", "s": ours, "CPU s": ours_cpu, "times MONAI's": ours / dense},
        {"what": "MONAI's dense encoder alone", "s": dense, "CPU s": dense_cpu, "times MONAI's": 1.0},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", action="store_true")
    parser.add_argument("--scans", type=int, default=20, help="in the folder, on a card")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_scans(place / "scans", given.scans if given.card else 1, given.side)
        if given.card:
            write_scans(place / "warm", 2, given.side)
        rows = (on_a_card if given.card else on_a_cpu)(place, given)
    finish("tokenize", rows, device="cuda" if given.card else "cpu", side=given.side, threads=given.threads)


if __name__ == "__main__":
    main()
