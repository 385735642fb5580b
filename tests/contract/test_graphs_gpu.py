"""CUDA graphs of transformer blocks against the same kernels started one by one, on a card."""

import pytest
import torch

from networks.losses import TokenizerLoss
from networks.sparse import SparseTensor, graphs, modules, whole_blocks
from networks.sparse.topology import Level
from networks.vqvae import make_vqvae
from tests.benchmarks.shapes import body
from tests.started_again import StartedAgain

pytestmark = pytest.mark.gpu


def rows_of(count, made):
    cells = torch.randperm(30**3, generator=made)[:count]
    coords = torch.stack([torch.zeros_like(cells), cells // 900, cells // 30 % 30, cells % 30], 1)
    return Level.from_coords(coords.cuda(), (30, 30, 30), 1)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_of_any_number_of_rows_equal_blocks_one_by_one(dtype):
    torch.manual_seed(0)
    blocks = [modules.TransformerBlock(128, num_heads=4, window=8, shift=4 * (i % 2)).cuda() for i in range(3)]
    made, both = torch.Generator().manual_seed(0), graphs.BlockGraphs()

    def run(level, feats, *, graphed):
        for block in blocks:
            block.zero_grad()
        feats = feats.clone().requires_grad_()
        x = SparseTensor.on(level, feats)
        with torch.autocast("cuda", dtype):
            if graphed:
                x = both.run([block.parts() for block in blocks], x)
            else:
                for block in blocks:
                    x = block(x)
        out = x.feats.clone()
        out.backward(torch.cos(torch.arange(out.numel(), device="cuda").view(out.shape) * 0.37).to(dtype))
        return [out.detach(), feats.grad, *(parameter.grad for block in blocks for parameter in block.parameters())]

    for count in (5000, 4999, 1, 127, 20000, 5000, 27000):
        level = rows_of(count, made)
        feats = torch.randn(count, 128, generator=made).to("cuda", dtype)
        got, again, plain = (run(level, feats, graphed=graphed) for graphed in (True, True, False))
        assert not both.failed
        assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))
        assert all(torch.equal(mine, other) for mine, other in zip(got, plain, strict=True))


def trained(steps, *, use_graphs=True):
    """Losses and weights after some steps on bodies of several sizes; both seen for the blocks' graphs."""
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
    assert network.encoder.graphs.recorded and network.decoder.graphs.recorded
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
    assert network.encoder.graphs.failed and network.decoder.graphs.failed
    assert sum("run one by one" in line for line in caplog.messages) == 2
    monkeypatch.undo()
    assert losses == trained(3, use_graphs=False)[0]
