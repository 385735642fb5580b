"""The plain quantiser against brute force and its formula: search, moving averages, k-means start, revival."""

import pytest
import torch

from networks import VectorQuantizer, quantizer
from networks.quantizer import code_sums, kmeans, nearest_codes
from tests import oracle


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(500, 37, 6), (1, 1, 3), (64, 8192, 16), (0, 5, 4)])
def test_the_nearest_code_is_that_of_brute_force(shape, generator):
    num_rows, num_codes, width = shape
    rows = torch.randn(num_rows, width, generator=generator)
    codebook = torch.randn(num_codes, width, generator=generator)
    distances = oracle.nearest_codes(rows.double(), codebook.double())
    codes = nearest_codes(rows, codebook)
    assert codes.shape == (num_rows,) and codes.dtype == torch.int64
    if num_rows:
        chosen = distances.gather(1, codes[:, None]).squeeze(1)
        assert torch.allclose(chosen, distances.min(1).values, atol=1e-5)
        assert (codes == distances.argmin(1)).float().mean() > 0.99  # the rest are ties within rounding


def test_the_lowest_code_wins_a_tie(generator):
    codebook = torch.randn(9, 4, generator=generator)
    codebook[[3, 7]] = codebook[1].clone()
    rows = codebook.repeat(5, 1)
    expected = torch.tensor([0, 1, 2, 1, 4, 5, 6, 1, 8]).repeat(5)
    assert torch.equal(nearest_codes(rows, codebook), expected)
    whole = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert nearest_codes(torch.zeros(3, 2), whole).tolist() == [0, 0, 0]


def test_search_holds_a_bounded_number_of_distances(generator, monkeypatch):
    rows, codebook = torch.randn(1000, 4, generator=generator), torch.randn(50, 4, generator=generator)
    whole = nearest_codes(rows, codebook)
    held = []
    real = torch.addmm

    def watched(*args, **options):
        result = real(*args, **options)
        held.append(result.numel())
        return result

    monkeypatch.setattr(quantizer, "SEARCH_CELLS", 5000)
    monkeypatch.setattr(torch, "addmm", watched)
    assert torch.equal(nearest_codes(rows, codebook), whole)
    assert len(held) == 10 and max(held) <= 5000


def test_search_stays_in_float32_under_autocast(generator):
    vq = VectorQuantizer(64, 8)
    rows = vq.codebook[torch.randint(64, (200,), generator=generator)] + 1e-3
    exact = vq.eval()(rows).codes
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vq(rows).codes, exact)


def test_sums_by_code_are_those_of_a_loop(generator, assert_close):
    rows, codes = torch.randn(300, 5, generator=generator), torch.randint(7, (300,), generator=generator)
    codes[codes == 4] = 2
    counts, sums = code_sums(rows, codes, 7)
    assert counts.tolist() == [int((codes == k).sum()) for k in range(7)] and counts[4] == 0
    assert_close(sums, torch.stack([rows[codes == k].sum(0) for k in range(7)]))


def test_losses_are_squared_distances_per_row(generator, assert_close):
    vq = VectorQuantizer(16, 4, codebook="gradient")
    rows = torch.randn(50, 4, generator=generator)
    out = vq(rows)
    truth = (rows - vq.codebook[out.codes]).square().mean(1)
    assert_close(out.vq, truth)
    assert_close(out.commitment, truth)
    assert torch.equal(out.values, rows + (vq.codebook[out.codes] - rows))


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_each_loss_pulls_its_own_side(codebook, generator):
    vq = VectorQuantizer(16, 4, codebook=codebook)
    rows = torch.randn(50, 4, generator=generator).requires_grad_()
    out = vq(rows)
    out.commitment.sum().backward(retain_graph=True)
    codes = vq.codebook[out.codes].detach()
    assert torch.allclose(rows.grad, (rows - codes).detach() / 2)  # of a mean over four channels
    rows.grad = None
    (out.values * 3).sum().backward(retain_graph=True)
    assert torch.equal(rows.grad, torch.full_like(rows, 3.0))
    assert out.vq.requires_grad == (codebook == "gradient")
    if codebook == "gradient":
        assert vq.embeddings.weight.grad is None
        out.vq.sum().backward()
        unused = torch.ones(16, dtype=torch.bool).index_fill(0, out.codes, False)
        assert vq.embeddings.weight.grad[unused].abs().sum() == 0 and vq.embeddings.weight.grad.abs().sum() > 0
        assert [name for name, _ in vq.named_parameters()] == ["embeddings.weight"]
    else:
        assert not list(vq.parameters()) and "embeddings.weight" in dict(vq.named_buffers())


def test_a_gradient_codebook_goes_to_the_mean_of_its_rows(generator, assert_close):
    vq = VectorQuantizer(8, 2, codebook="gradient")
    rows = 3 * torch.randn(8, 2, generator=generator).repeat_interleave(32, 0)
    vq.start_from(rows + 0.3 * torch.randn(256, 2, generator=generator), generator=drawn())
    optimizer = torch.optim.SGD(vq.parameters(), lr=2.0)
    for _ in range(60):
        optimizer.zero_grad()
        vq(rows).vq.mean().backward()
        optimizer.step()
        assert vq.update(generator=drawn()) == 0
    codes = vq(rows).codes
    for k in codes.unique():
        assert_close(vq.codebook[k].detach(), rows[codes == k].mean(0), dtype=torch.bfloat16)


def test_moving_averages_follow_their_formula(generator, assert_close):
    vq = VectorQuantizer(6, 3, decay=0.9, revive_below=0.0).train()
    count, total = torch.ones(6, dtype=torch.float64), vq.codebook.double().clone()
    for _ in range(4):
        rows = torch.randn(40, 3, generator=generator)
        codes = vq(rows).codes
        share = 40 / 6
        for k in range(6):
            mine = rows[codes == k].double()
            count[k] = 0.9 * count[k] + 0.1 * len(mine) / share
            total[k] = 0.9 * total[k] + 0.1 * mine.sum(0) / share
        vq.update(generator=drawn())
        assert_close(vq.codebook, total / count[:, None], dtype=torch.float32)
        assert_close(vq.mean_count, count, dtype=torch.float32)


def test_one_update_takes_all_micro_batches(generator, assert_close):
    rows = torch.randn(60, 3, generator=generator)
    torch.manual_seed(1)
    whole = VectorQuantizer(5, 3).train()
    torch.manual_seed(1)
    parts = VectorQuantizer(5, 3).train()
    whole(rows)
    for part in rows.split([10, 31, 19]):
        parts(part)
    for vq in (whole, parts):
        vq.update(generator=drawn())
    assert_close(parts.codebook, whole.codebook)
    assert_close(parts.mean_sum, whole.mean_sum)


def test_the_codebook_moves_only_by_update_and_only_in_training(generator):
    vq = VectorQuantizer(5, 3)
    before = {name: tensor.clone() for name, tensor in vq.state_dict().items()}
    vq.train()(torch.randn(20, 3, generator=generator))
    assert all(torch.equal(before[name], tensor) for name, tensor in vq.state_dict().items())
    vq.update(generator=drawn())
    moved = vq.codebook.clone()
    assert not torch.equal(moved, before["embeddings.weight"])
    assert vq.update(generator=drawn()) == 0 and torch.equal(vq.codebook, moved)  # nothing seen since
    vq.eval()(torch.randn(20, 3, generator=generator))
    vq.train()
    with torch.no_grad():
        vq(torch.randn(20, 3, generator=generator))  # a look, no step
    assert vq.update(generator=drawn()) == 0 and torch.equal(vq.codebook, moved)


def test_codes_decode_to_values(generator):
    vq = VectorQuantizer(32, 4).eval()
    out = vq(torch.randn(100, 4, generator=generator))
    assert torch.allclose(vq.lookup(out.codes), out.values, atol=1e-6)
    assert torch.equal(vq.lookup(out.codes.int()), vq.codebook[out.codes])
    for wrong in (-1, 32):
        with pytest.raises(ValueError, match=r"codes must lie in 0\.\.31"):
            vq.lookup(torch.tensor([0, wrong]))


def test_kmeans_finds_separated_clusters(generator):
    centres = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0], [20.0, 20.0]])
    rows = (centres[:, None] + torch.randn(4, 50, 2, generator=generator)).reshape(-1, 2)
    best = min(_error(kmeans(rows, 4, generator=drawn(seed)), rows) for seed in range(5))
    assert best < 2.5  # the noise alone gives 2
    first, again = (kmeans(rows, 4, generator=drawn(3)) for _ in range(2))
    assert torch.equal(first, again)


def _error(centres, rows):
    return oracle.nearest_codes(rows, centres).min(1).values.mean().item()


def test_kmeans_is_refused_below_four_rows_a_code():
    with pytest.raises(ValueError, match="10 codes needs at least 40 encoder outputs, got 39"):
        kmeans(torch.zeros(39, 2), 10, generator=drawn())
    assert kmeans(torch.randn(40, 2, generator=drawn()), 10, generator=drawn()).shape == (10, 2)


def test_starting_lays_the_codebook_and_its_averages(generator, assert_close):
    rows = torch.randn(400, 3, generator=generator)
    vq = VectorQuantizer(20, 3)
    vq.start_from(rows, generator=drawn())
    assert _error(vq.codebook, rows) < 0.5 * _error(rows[:20], rows) + 0.2
    assert_close(vq.mean_sum / vq.mean_count[:, None], vq.codebook)
    assert vq.mean_count.mean() == pytest.approx(1.0)


def test_dead_codes_come_back_at_current_rows(generator):
    vq = VectorQuantizer(8, 2, decay=0.5, revive_below=0.05).train()
    vq.embeddings.weight[4:] = 1000.0  # nobody is near
    vq.mean_sum.copy_(vq.codebook)
    revived = 0
    for _ in range(6):
        rows = torch.randn(64, 2, generator=generator)
        vq(rows)
        revived += vq.update(generator=drawn())
    assert revived >= 4
    assert vq.codebook.abs().max() < 10
    vq.eval()
    assert len(vq(torch.randn(2000, 2, generator=generator)).codes.unique()) == 8


def test_a_revived_code_is_one_of_the_rows(generator):
    vq = VectorQuantizer(4, 2, decay=0.0).train()
    vq.embeddings.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [900.0, 0.0], [0.0, 900.0]]))
    rows = torch.rand(32, 2, generator=generator)
    vq(rows)
    assert vq.update(generator=drawn()) == 2
    for k in (2, 3):
        assert (rows == vq.codebook[k]).all(1).any()


def test_an_unknown_codebook_is_refused():
    with pytest.raises(ValueError, match="codebook must be ema or gradient, got 'sgd'"):
        VectorQuantizer(4, 2, codebook="sgd")
