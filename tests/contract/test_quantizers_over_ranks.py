"""Quantisers of every kind over two processes: both hold the codebook that one process makes of all rows."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from networks.presets import PRESETS
from networks.residual import build_quantizer

KINDS = (
    {"codebook": "fsq"},
    {"quantizer_levels": 2},
    {"codebook": "gradient", "normalize_codes": True},
    {"quantizer_levels": 2, "normalize_codes": True, "rotation_trick": True},
)


def rows_of(rank):
    return torch.randn(200 + 40 * rank, 6, generator=torch.Generator().manual_seed(rank))


def learned(kind, rows, *, seed):
    """The state after a start and one update, from another random start on every rank."""
    torch.manual_seed(seed)
    vq = build_quantizer(PRESETS["tiny"].changed(num_embeddings=16, latent_channels=6, **kind))
    vq.start_from(rows, generator=torch.Generator().manual_seed(0))
    vq.train()(rows + 0.1)
    vq.update(generator=torch.Generator().manual_seed(1))
    return torch.cat([tensor.flatten() for tensor in vq.state_dict().values()])


def work(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save([learned(kind, rows_of(rank), seed=rank) for kind in KINDS], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(port, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("number", range(len(KINDS)), ids=[str(kind) for kind in KINDS])
def test_ranks_agree_with_each_other_and_with_one_process(states, number, assert_close):
    assert torch.equal(states[0][number], states[1][number])
    alone = learned(KINDS[number], torch.cat([rows_of(0), rows_of(1)]), seed=5)
    assert_close(states[0][number], alone)
