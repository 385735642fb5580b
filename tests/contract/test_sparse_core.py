"""Every sparse operation against the oracle, and the laws of keys and levels."""

import pytest
import torch

from networks.sparse import SparseTensor, SubmanifoldConv3d, ops, torch_backend, torch_maps
from networks.sparse.modules import Doubling, Halving, layer_norm
from networks.sparse.topology import Level, align_rows, bits_for, morton_coords, morton_keys
from tests import oracle


def random_coords(shape, counts, generator):
    """Distinct voxels of each sample, in random order."""
    rows = []
    for b, count in enumerate(counts):
        cells = torch.randperm(shape[0] * shape[1] * shape[2], generator=generator)[:count]
        x, rest = cells // (shape[1] * shape[2]), cells % (shape[1] * shape[2])
        rows.append(torch.stack([torch.full_like(x, b), x, rest // shape[2], rest % shape[2]], 1))
    coords = torch.cat(rows)
    return coords[torch.randperm(len(coords), generator=generator)]


CASES = {
    "unequal samples": ((5, 7, 4), (60, 9)),
    "full grid": ((4, 3, 5), (60, 60)),
    "thin": ((12, 12, 12), (40, 25)),
    "one voxel": ((3, 3, 3), (1,)),
    "empty sample between": ((6, 6, 6), (50, 0, 20)),
    "nothing": ((4, 4, 4), (0,)),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def problem(request, generator):
    shape, counts = CASES[request.param]
    return shape, len(counts), random_coords(shape, counts, generator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("thin", [False, True], ids=["blocks", "pairs"])
def test_convolution_and_both_gradients_equal_the_dense_oracle(
    problem, dtype, thin, generator, assert_close, monkeypatch
):
    monkeypatch.setattr(torch_backend, "THIN", 28.0 if thin else -1.0)
    shape, batch_size, coords = problem
    feats = torch.randn(len(coords), 5, generator=generator).to(dtype).double()
    weight = torch.randn(27, 5, 6, generator=generator).to(dtype).double()
    bias = torch.randn(6, generator=generator).to(dtype).double()
    upstream = torch.randn(len(coords), 6, generator=generator).to(dtype).double()
    truth = [t.clone().requires_grad_() for t in (feats, weight, bias)]
    expected = oracle.submanifold_conv(truth[0], coords, shape, batch_size, *truth[1:])
    (expected * upstream).sum().backward()

    ours = [t.to(dtype).requires_grad_() for t in (feats, weight, bias)]
    x = SparseTensor(ours[0], coords, shape, batch_size)
    order = align_rows(x.level, x.level) if len(x) == 0 else _sorting(coords, x)
    out = ops.submanifold_conv(x, ours[1], ours[2], backend="torch")
    out.feats.backward(upstream[order].to(dtype))
    assert out.feats.dtype == dtype
    assert_close(out.feats, expected[order], dtype=dtype)
    for mine, reference in zip(ours, truth, strict=True):
        expected_grad = torch.zeros_like(reference) if reference.grad is None else reference.grad  # None: no voxels
        assert_close(mine.grad, expected_grad, dtype=dtype)


def test_many_blocks_of_rows_equal_the_dense_oracle(generator, assert_close, monkeypatch):
    """Blocks large enough to be convolved by oneDNN, which torch passes by for small images; the last is ragged."""
    monkeypatch.setattr(torch_backend, "BLOCK", 175 * 16)
    monkeypatch.setattr(torch_backend, "THIN", -1.0)
    level, _ = Level.from_coords(random_coords((9, 10, 11), (500, 400), generator), (9, 10, 11), 2)
    feats = torch.randn(900, 16, generator=generator)
    weight = torch.randn(27, 16, 24, generator=generator)
    upstream = torch.randn(900, 24, generator=generator)
    truth = [feats.double().requires_grad_(), weight.double().requires_grad_()]
    expected = oracle.submanifold_conv(truth[0], level.coords, level.spatial_shape, 2, truth[1], None)
    (expected * upstream).sum().backward()
    out, feats_grad, weight_grad = ops._all_three(torch_backend, feats, weight, upstream, level)
    assert_close(out, expected)
    assert_close(weight_grad, truth[1].grad)
    assert_close(feats_grad, truth[0].grad)


def _sorting(coords, x):
    """Row of `coords` for each row of x."""
    row_of = {tuple(c): i for i, c in enumerate(coords.tolist())}
    return torch.tensor([row_of[tuple(c)] for c in x.coords.tolist()])


def test_convolution_on_a_full_grid_is_conv3d(generator, assert_close):
    conv = SubmanifoldConv3d(3, 4)
    grid = torch.randn(2, 3, 4, 5, 6, generator=generator)
    coords = torch.ones(2, 4, 5, 6).nonzero()
    out = conv(SparseTensor(grid.movedim(1, -1).reshape(-1, 3), coords, (4, 5, 6), 2)).dense()
    kernel = oracle.dense_kernel(conv.weight.detach())
    assert_close(out, torch.nn.functional.conv3d(grid, kernel, conv.bias, padding=1))


@pytest.mark.parametrize("width", [3, 5])
def test_a_linear_map_refuses_other_channels(width):
    weight = torch.ones(2, 4)
    with pytest.raises(ValueError, match=rf"weight \(2, 4\) needs features of 4, got {width}"):
        ops.linear(torch.ones(6, width), weight, weight[:, 0])


def test_keys_are_morton_with_x_highest_and_invert(generator):
    coords = torch.randint(0, 1024, (200, 4), generator=generator)
    coords[:, 0] %= 7
    keys = morton_keys(coords, 10)
    assert keys.tolist() == [oracle.morton(*c, 10) for c in coords.tolist()]
    assert torch.equal(morton_coords(keys, 10).long(), coords)


def test_parent_key_is_the_key_shifted(generator):
    coords = random_coords((20, 11, 7), (90, 40), generator)
    level, _ = Level.from_coords(coords, (20, 11, 7), 2)
    cells = level.coarsening
    halved = level.coords.clone()
    halved[:, 1:] //= 2
    assert torch.equal(cells.coarse.coords[cells.parent], halved)
    assert cells.coarse.spatial_shape == (10, 6, 4)
    assert torch.equal(cells.coarse.keys, cells.coarse.keys.sort().values)
    low = level.coords[:, 1:] & 1
    octant = (4 * low[:, 0] + 2 * low[:, 1] + low[:, 2]).long()
    assert torch.equal(cells.children[octant, cells.parent], torch.arange(len(level)))
    assert int(cells.occupied.sum()) == len(level)


def test_subdividing_by_occupancy_undoes_coarsening(problem):
    shape, batch_size, coords = problem
    level, _ = Level.from_coords(coords, shape, batch_size)
    cells = level.coarsening
    again = cells.coarse.subdivide(cells.occupied, level.spatial_shape)
    assert again.fine.same_as(level)
    assert torch.equal(again.parent, cells.parent) and torch.equal(again.children, cells.children)


def test_neighbours_by_table_and_by_search_equal_the_dictionary(problem):
    shape, batch_size, coords = problem
    level, _ = Level.from_coords(coords, shape, batch_size)
    expected = oracle.neighbours(level.coords, shape)
    assert torch.equal(
        torch_maps.neighbours(level.keys, level.bits, level.spatial_shape, level.batch_size)[0], expected
    )
    assert torch.equal(level._neighbours_by_search(), expected)


def test_a_grid_of_more_than_two_to_the_31_cells_keeps_its_borders():
    shape = (2048, 2048, 2048)
    corner = 2047
    coords = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [1, corner, corner, corner], [1, corner, corner, corner - 1]])
    level, _ = Level.from_coords(coords, shape, 2)
    assert torch.equal(level.neighbours, oracle.neighbours(level.coords, shape))


def test_order_stride_and_width_of_coordinates_do_not_matter(generator):
    coords = random_coords((6, 6, 6), (40, 30), generator)
    feats = torch.randn(70, 3, generator=generator)
    base = SparseTensor(feats, coords, (6, 6, 6), 2)
    for other in (coords.int(), coords.T.contiguous().T, coords.to(torch.int16)):
        x = SparseTensor(feats, other, (6, 6, 6), 2)
        assert torch.equal(x.feats, base.feats) and torch.equal(x.coords, base.coords)
    turn = torch.randperm(70, generator=generator)
    assert torch.equal(SparseTensor(feats[turn], coords[turn], (6, 6, 6), 2).feats, base.feats)
    assert base.coords.dtype == torch.int32 and base.coords.is_contiguous()


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        ([[0, 0, 0, 0], [0, 0, 0, 0]], "unique, got 1 duplicates of 2 rows"),
        ([[0, -1, 0, 0], [0, 0, 0, 0]], "must lie in"),
        ([[0, 4, 0, 0], [0, 0, 0, 0]], "must lie in"),
        ([[2, 0, 0, 0], [0, 0, 0, 0]], "must lie in"),
        ([[0.0, 0, 0, 0], [0, 0, 0, 1]], r"integer \(N, 4\), got float32"),
    ],
)
def test_wrong_coordinates_raise(coords, message):
    # jaxtyping refuses floats under pytest before the message of the code can; both name the rule
    with pytest.raises(Exception, match=message if "integer" not in message else "coords"):
        SparseTensor(torch.zeros(2, 1), torch.tensor(coords), (4, 4, 4), 2)


def test_pooling_equals_the_oracle_and_its_gradient_the_mean(problem, generator, assert_close):
    shape, batch_size, coords = problem
    feats = torch.randn(len(coords), 3, generator=generator, dtype=torch.float64)
    x = SparseTensor(feats, coords, shape, batch_size)
    for legacy in (False, True):
        coarse, cells = ops.pool(x, legacy=legacy)
        truth = oracle.pooled(feats, coords, legacy=legacy)
        expected = [truth[tuple(c)] for c in coarse.coords.tolist()]
        assert_close(coarse.feats, torch.stack(expected) if expected else coarse.feats)
    if len(x):
        torch.autograd.gradcheck(lambda f: ops.pool(x.replace(f))[0].feats, x.feats.clone().requires_grad_())
        start = coarse.feats.clone().requires_grad_()
        torch.autograd.gradcheck(lambda f: ops.unpool(coarse.replace(f), cells).feats, start)
    spread = ops.unpool(coarse, cells)
    assert torch.equal(spread.feats, coarse.feats[cells.parent]) and spread.level.same_as(x.level)


EVEN = {name: (tuple(n + n % 2 for n in shape), counts) for name, (shape, counts) in CASES.items() if name != "nothing"}


@pytest.fixture(params=EVEN, ids=lambda name: name.replace(" ", "-"))
def even_problem(request, generator):
    shape, counts = EVEN[request.param]
    return shape, len(counts), random_coords(shape, counts, generator)


@pytest.mark.parametrize("outputs", [3, 48], ids=["means", "copies"])
def test_halving_equals_space_to_channels_of_the_dense_grid(even_problem, outputs, generator, assert_close):
    shape, batch_size, coords = even_problem
    layer = Halving(3, outputs, occupancy=True).double()
    feats = torch.randn(len(coords), 3, generator=generator, dtype=torch.float64)
    x = SparseTensor(feats, coords, shape, batch_size)
    ours = x.feats.clone().requires_grad_()
    out = layer(x.replace(ours))
    theirs = x.feats.clone().requires_grad_()
    there = oracle.dense_of(torch.ones(len(coords), 1, dtype=torch.float64), coords, shape, batch_size)
    dense = oracle.halved(
        oracle.dense_of(theirs, x.coords, shape, batch_size), there, layer.linear.weight, layer.linear.bias
    )
    expected = oracle.rows_of(dense, out.coords)
    assert_close(out.feats, expected)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad((out.feats * upstream).sum(), [ours, layer.linear.weight])
    truth = torch.autograd.grad((expected * upstream).sum(), [theirs, layer.linear.weight])
    for mine, reference in zip(grads, truth, strict=True):
        assert_close(mine, reference)


@pytest.mark.parametrize(("inputs", "outputs"), [(6, 3), (32, 2)], ids=["copies", "means"])
def test_doubling_equals_channels_to_space_of_the_dense_grid(even_problem, inputs, outputs, generator, assert_close):
    shape, batch_size, coords = even_problem
    level, _ = Level.from_coords(coords, shape, batch_size)
    layer = Doubling(inputs, outputs).double()
    feats = torch.randn(len(level.coarsening.coarse), inputs, generator=generator, dtype=torch.float64)
    coarse = SparseTensor.on(level.coarsening.coarse, feats)
    ours, theirs = feats.clone().requires_grad_(), feats.clone().requires_grad_()
    out = layer(coarse.replace(ours), level.coarsening)
    grid = oracle.dense_of(theirs, coarse.coords, coarse.spatial_shape, batch_size)
    expected = oracle.rows_of(oracle.doubled(grid, layer.linear.weight, layer.linear.bias), level.coords)
    assert out.level.same_as(level)
    assert_close(out.feats, expected)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad((out.feats * upstream).sum(), [ours, layer.linear.weight])
    truth = torch.autograd.grad((expected * upstream).sum(), [theirs, layer.linear.weight])
    for mine, reference in zip(grads, truth, strict=True):
        assert_close(mine, reference)


def test_children_scattered_are_the_children_gathered(problem, generator):
    shape, batch_size, coords = problem
    x = SparseTensor(torch.randn(len(coords), 3, generator=generator, dtype=torch.float64), coords, shape, batch_size)
    gathered, cells = ops.gather_children(x)
    assert torch.equal(ops.scatter_children(gathered, cells).feats, x.feats)
    expected = torch.zeros(len(cells.coarse), 8, 3, dtype=torch.float64)
    for row, (parent, key) in enumerate(zip(cells.parent.tolist(), x.level.keys.tolist(), strict=True)):
        expected[parent, key % 8] = x.feats[row]
    assert torch.equal(gathered.feats, expected.flatten(1))
    if len(x):
        torch.autograd.gradcheck(lambda f: ops.gather_children(x.replace(f))[0].feats, x.feats.clone().requires_grad_())
        start = gathered.feats.clone().requires_grad_()
        torch.autograd.gradcheck(lambda f: ops.scatter_children(gathered.replace(f), cells).feats, start)
    with pytest.raises(ValueError, match="up-sampling needs the coarse level of its plan"):
        ops.scatter_children(SparseTensor.on(*_one_voxel_more(cells.coarse)), cells)


def _one_voxel_more(level):
    """Another level of the same grid, and features for it."""
    other = Level(torch.arange(len(level) + 1), spatial_shape=(8, 8, 8), batch_size=1, bits=level.bits)
    return other, torch.zeros(len(other), 8)


@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_is_per_sample(silu, generator, assert_close):
    coords = random_coords((6, 6, 6), (50, 0, 20), generator)
    feats = torch.randn(70, 8, generator=generator, dtype=torch.float64) * 3 + 1
    weight, bias = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    x = SparseTensor(feats, coords, (6, 6, 6), 3)
    expected = oracle.group_norm(x.feats, x.coords, 4, weight, bias)
    expected = expected * expected.sigmoid() if silu else expected
    assert_close(ops.group_norm(x, 4, weight, bias, silu=silu).feats, expected)


@pytest.mark.parametrize("silu", [False, True])
def test_voxel_norm_sees_one_row_at_a_time(silu, generator, assert_close):
    feats = torch.randn(70, 8, generator=generator, dtype=torch.float64) * 3 + 1
    weight, bias = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    x = SparseTensor(feats, random_coords((6, 6, 6), (50, 0, 20), generator), (6, 6, 6), 3)
    rows = [(row - row.mean()) / (row.var(unbiased=False) + 1e-5).sqrt() * weight + bias for row in x.feats]
    expected = torch.stack(rows)
    expected = expected * expected.sigmoid() if silu else expected
    assert_close(ops.voxel_norm(x, weight, bias, silu=silu).feats, expected)
    half = x.replace(x.feats.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.voxel_norm(half, weight.float(), bias.float(), silu=silu).feats
    assert out.dtype == torch.bfloat16
    assert_close(out, expected, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_sums_in_float32(dtype, generator, assert_close):
    feats = (100 + torch.randn(30, 64, generator=generator)).to(dtype)
    x = SparseTensor(feats, random_coords((4, 4, 4), (30,), generator), (4, 4, 4), 1)
    exact = x.feats.double()
    exact = (exact - exact.mean(1, keepdim=True)) / (exact.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer_norm(x).feats
    assert out.dtype == dtype
    assert_close(out, exact, dtype=torch.bfloat16 if dtype == torch.bfloat16 else None)


@pytest.mark.parametrize("count", [0, 1, 200])
def test_windows_of_several_shifts_are_those_of_each(count, generator):
    coords = torch.randint(1, 9, (count, 4), generator=generator, dtype=torch.int32)
    coords[:, 0] %= 2
    together, alone = (Level.from_coords(coords.unique(dim=0), (9, 10, 11), 2)[0] for _ in range(2))
    together.prepare_windows(4, [2, 0, 3])
    for shift in (0, 2, 3):
        mine, plain = together.windows(4, shift), alone.windows(4, shift)
        assert torch.equal(mine.order, plain.order) and torch.equal(mine.bounds, plain.bounds)
        assert mine.most == plain.most
        place = (alone.coords[:, 1:] + shift) // 4
        for begin, end in zip(mine.bounds.tolist(), mine.bounds.tolist()[1:], strict=False):
            rows = mine.order[begin:end]
            assert rows.tolist() == sorted(rows.tolist()), "in the order of rows"
            assert len(torch.cat([alone.coords[rows, :1], place[rows]], 1).unique(dim=0)) == (end > begin)
    assert together.windows(4, 2) is together.windows(4, 2)


@pytest.mark.parametrize("shift", [0, 2])
def test_window_attention_equals_the_row_by_row_oracle(shift, generator, assert_close):
    coords = random_coords((9, 8, 7), (40, 0, 13), generator)
    x = SparseTensor(torch.zeros(53, 1), coords, (9, 8, 7), 3)
    qkv = torch.randn(53, 3, 2, 4, generator=generator, dtype=torch.float64)
    out = ops.window_attention(qkv, x.level, window=4, shift=shift)
    assert_close(out, oracle.window_attention(qkv, x.coords, 4, shift))


def test_a_batch_equals_its_samples_one_by_one(generator, assert_close):
    conv = SubmanifoldConv3d(3, 3)
    coords = random_coords((6, 6, 6), (50, 30), generator)
    feats = torch.randn(80, 3, generator=generator)
    both = conv(SparseTensor(feats, coords, (6, 6, 6), 2))
    for b in range(2):
        rows = coords[:, 0] == b
        alone = coords[rows].clone()
        alone[:, 0] = 0
        single = conv(SparseTensor(feats[rows], alone, (6, 6, 6), 1))
        assert_close(both.feats[both.coords[:, 0] == b], single.feats)


def test_convolution_moves_with_its_input(generator):
    conv = SubmanifoldConv3d(2, 3)
    coords = random_coords((5, 5, 5), (60,), generator)
    feats = torch.randn(60, 2, generator=generator)
    here = conv(SparseTensor(feats, coords, (20, 20, 20), 1)).dense()
    moved = conv(SparseTensor(feats, coords + torch.tensor([0, 7, 3, 9]), (20, 20, 20), 1)).dense()
    assert torch.allclose(moved, here.roll((7, 3, 9), (2, 3, 4)), atol=1e-6)


@pytest.mark.parametrize("thin", [False, True], ids=["blocks", "pairs"])
def test_repeats_are_equal_to_the_bit_for_any_number_of_threads(thin, generator, monkeypatch):
    monkeypatch.setattr(torch_backend, "THIN", 28.0 if thin else -1.0)
    level, _ = Level.from_coords(random_coords((24, 24, 24), (6000, 4000), generator), (24, 24, 24), 2)
    feats, upstream = torch.randn(2, 10000, 16, generator=generator)
    weight = torch.randn(27, 16, 16, generator=generator)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            results.append(ops._all_three(torch_backend, feats, weight, upstream, level))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, first) for one, first in zip(other, results[0], strict=True))


def test_alignment_finds_rows_and_misses(generator):
    coords = random_coords((10, 10, 10), (200, 100), generator)
    source, _ = Level.from_coords(coords[:150], (10, 10, 10), 2)
    target, _ = Level.from_coords(coords[100:], (10, 10, 10), 2)
    row_of = {tuple(c): i for i, c in enumerate(source.coords.tolist())}
    expected = [row_of.get(tuple(c), 150) for c in target.coords.tolist()]
    assert align_rows(source, target).tolist() == expected
    assert 0 < sum(r < 150 for r in expected) < len(expected)


@pytest.mark.parametrize("side", [2, 3, 255, 256, 257, 512])
def test_bits_hold_the_grid(side):
    assert 2 ** bits_for((side, 1, 1)) >= side


def test_autocast_runs_in_its_dtype_with_float32_sums(generator, assert_close):
    coords = random_coords((8, 8, 8), (300,), generator)
    x = SparseTensor(torch.randn(300, 8, generator=generator), coords, (8, 8, 8), 1)
    conv = SubmanifoldConv3d(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
        out.feats.float().sum().backward()
    assert out.feats.dtype == torch.bfloat16 and conv.weight.grad.dtype == torch.float32
    assert_close(out.feats.float(), conv(x).feats, dtype=torch.bfloat16)


def test_an_unknown_backend_is_named():
    x = SparseTensor(torch.zeros(1, 2), torch.zeros(1, 4, dtype=torch.int32), (1, 1, 1), 1)
    with pytest.raises(ValueError, match="backend must be auto or one of"):
        ops.submanifold_conv(x, torch.zeros(27, 2, 2), backend="cudnn")
