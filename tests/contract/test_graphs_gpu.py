"""CUDA graphs of a network's parts against the same kernels started one by one, on a card."""

import pytest
import torch

from networks.losses import TokenizerLoss
from networks.sparse import SparseTensor, graphs, whole_blocks
from networks.vqvae import make_vqvae
from tests.benchmarks.shapes import body
from tests.started_again import StartedAgain

pytestmark = pytest.mark.gpu


def trained(steps, *, use_graphs=True):
    """Losses and the network after some steps on bodies of several sizes."""
    torch.manual_seed(0)
    network = make_vqvae("base", num_embeddings=256, use_graphs=use_graphs).cuda().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        side = (48, 64, 56, 40)[step % 4]
        coords = body(side).cuda()
        x = SparseTensor(torch.sin(coords.float() * 0.3), coords, (64, 64, 64), 1)
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = TokenizerLoss()(network(x, seeds=[step]), x)["loss"]
        loss.backward()
        optimizer.step()
        network.vq.update(generator=torch.Generator().manual_seed(step))
        losses.append(loss.item())
    return losses, network


def test_training_equals_the_same_kernels_started_one_by_one_to_the_bit(monkeypatch):
    losses, network = trained(8)
    assert network.graphs.recorded.keys() == {"encoder", "decoder"}
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "CudaGraph", StartedAgain)
        eager, other = trained(8)
    plain, one_by_one = trained(8, use_graphs=False)
    assert losses == eager == plain
    for again in (other, one_by_one):
        assert all(torch.equal(one, two) for one, two in zip(network.parameters(), again.parameters(), strict=True))


def test_a_step_takes_at_most_a_tenth_more_memory():
    coords = body(128).cuda()
    feats, taken = torch.sin(coords.float() * 0.3), {}
    for use_graphs in (False, True):
        torch.manual_seed(0)
        network = make_vqvae("base", use_graphs=use_graphs).cuda().train()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # and not reserved: that keeps what only the first step asked for
        for _ in range(3):
            network.zero_grad()
            x = SparseTensor(feats, coords, (128, 128, 128), 1)
            with torch.autocast("cuda", torch.bfloat16):
                loss = TokenizerLoss()(network(x, seeds=[1]), x)["loss"]
            loss.backward()
        taken[use_graphs] = torch.cuda.max_memory_allocated() - before
        del network, x, loss
    print(f"GiB taken without and with graphs: {[value / 2**30 for value in taken.values()]}")
    assert taken[True] < 1.1 * taken[False]


def test_what_cannot_be_recorded_runs_one_by_one(monkeypatch, caplog):
    forward = whole_blocks.transformer_forward

    def waits(*args):
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()  # which no graph allows
        return forward(*args)

    monkeypatch.setattr(whole_blocks, "transformer_forward", waits)
    losses, network = trained(3)
    assert network.graphs.failed and sum("started one by one" in line for line in caplog.messages) == 1
    monkeypatch.undo()
    assert losses == trained(3, use_graphs=False)[0]
