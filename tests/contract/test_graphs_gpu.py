"""CUDA graphs of a network's parts against the same kernels started one by one, on a card."""

from contextlib import nullcontext

import pytest
import torch

from app.training.side_stream import SideStream
from networks.losses import TokenizerLoss
from networks.sparse import SparseTensor, graphs, whole_blocks
from networks.vqvae import make_vqvae
from tests.benchmarks.shapes import body
from tests.started_again import StartedAgain

pytestmark = pytest.mark.gpu


def trained(steps, *, use_graphs=True, beside=None):
    """Losses and the network after some steps on bodies of several sizes; `beside` makes the batches ready."""
    torch.manual_seed(0)
    network = make_vqvae("base", num_embeddings=256, use_graphs=use_graphs).cuda().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    bodies = [body(side).cuda() for side in (48, 64, 56, 40)]
    losses, device = [], bodies[0].device
    torch.cuda.synchronize()
    for step in range(steps):
        with beside(device) if beside else nullcontext():
            coords = bodies[step % 4] + 0
            x = SparseTensor(torch.sin(coords.float() * 0.3), coords, (64, 64, 64), 1)
            network.prepare(x.level)
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = TokenizerLoss()(network(x, seeds=[step]), x)["loss"]
        loss.backward()
        if beside:
            beside.hold(x, device)
        optimizer.step()
        network.vq.update(generator=torch.Generator().manual_seed(step))
        losses.append(loss.detach())
        del x, loss
    return torch.stack(losses).tolist(), network


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


def test_batches_made_ready_beside_the_last_step_are_the_same():
    plain, network = trained(24)
    for _ in range(3):
        losses, other = trained(24, beside=SideStream())
        assert losses == plain
        assert all(torch.equal(one, two) for one, two in zip(network.parameters(), other.parameters(), strict=True))


def test_what_a_training_holds_with_graphs_is_within_half_more():
    """Of memory that torch keeps from others: what lies in a graph's pool counts as free where only tensors count."""
    coords = body(128).cuda()
    feats, held = torch.sin(coords.float() * 0.3), {}
    for use_graphs in (False, True):
        torch.manual_seed(0)
        network = make_vqvae("base", use_graphs=use_graphs).cuda().train()
        for step in range(4):
            if step == 1:  # the first compiles, and records
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            network.zero_grad()
            x = SparseTensor(feats, coords, (128, 128, 128), 1)
            with torch.autocast("cuda", torch.bfloat16):
                loss = TokenizerLoss()(network(x, seeds=[1]), x)["loss"]
            loss.backward()
        held[use_graphs] = torch.cuda.max_memory_reserved()
        del network, x, loss
        torch.cuda.empty_cache()
    print(f"GiB held without and with graphs: {[value / 2**30 for value in held.values()]}")
    assert held[True] < 1.5 * held[False]


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
