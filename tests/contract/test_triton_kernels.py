"""The Triton kernels without a GPU, computed by Triton's interpreter, in float16 and float32: its bfloat16 is garbage.

The interpreter must be chosen before Triton is imported, so its tests run in a process of their own.
"""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from networks.sparse import SparseTensor, graphs, modules, ops, torch_backend, torch_maps
from networks.sparse.topology import Level
from tests import oracle
from tests.started_again import StartedAgain

triton = pytest.importorskip("triton")
from networks import coders, losses, presets, vqvae  # noqa: E402
from networks.kernels import attention, children, code_search, convolution, errors, linear, maps, norm  # noqa: E402
from networks.kernels import rows as row_kernels  # noqa: E402
from networks.quantizer import VectorQuantizer  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the test below starts")
SIZES = [(16, 32), (5, 6), (40, 20), (70, 33)]  # channels in and out: powers of two, odd, above a tile


def _release(package):
    return tuple(map(int, package.__version__.split(".")[:2]))


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_the_interpreted_tests_pass():
    if _release(np) >= (2, 4) and _release(triton) < (3, 9):
        pytest.skip(f"the interpreter of Triton {triton.__version__} needs numpy below 2.4, got {np.__version__}")
    command = [sys.executable, "-m", "pytest", __file__, "-k", "interpreted_", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def scattered(shape, count, generator):
    cells = torch.randperm(shape[0] * shape[1] * shape[2], generator=generator)[:count]
    x, rest = cells // (shape[1] * shape[2]), cells % (shape[1] * shape[2])
    coords = torch.stack([torch.zeros_like(x), x, rest // shape[2], rest % shape[2]], 1)
    return Level.from_coords(coords, shape, 1)[0]


@in_interpreter
@pytest.mark.parametrize("thin", [False, True], ids=["key-order", "mask-order"])
@pytest.mark.parametrize(
    ("count", "dtype"),
    [(0, torch.float32), (1, torch.float16), (127, torch.float32), (129, torch.float16), (200, torch.float32)],
)
def test_interpreted_kernels_equal_the_oracle(count, dtype, thin, generator, assert_close):
    level = scattered((8, 9, 7), count, generator)
    level.__dict__["is_thin"] = thin  # either way must be right whatever the neighbourhoods are
    channels, columns = SIZES[count % len(SIZES)]
    feats = torch.randn(count, channels, generator=generator).to(dtype)
    weight = (torch.randn(27, channels, columns, generator=generator) / 8).to(dtype)
    bias = torch.randn(columns, generator=generator).to(dtype)
    grad = torch.randn(count, columns, generator=generator).to(dtype)
    truth = [t.double().requires_grad_() for t in (feats, weight)]
    expected = oracle.submanifold_conv(truth[0], level.coords, (8, 9, 7), 1, truth[1], bias.double())
    expected.backward(grad.double())
    assert_close(convolution.forward(feats, weight, bias, level), expected, dtype=dtype)
    zeros = [torch.zeros_like(t) if t.grad is None else t.grad for t in truth]
    assert_close(convolution.input_grad(grad, weight, level), zeros[0], dtype=dtype)
    assert_close(convolution.weight_grad(feats, grad, level), zeros[1], dtype=dtype)


@in_interpreter
@pytest.mark.parametrize(("channels", "columns"), [(16, 32), (40, 20)])
def test_interpreted_kernels_take_any_width(channels, columns, generator, assert_close):
    level = scattered((4, 4, 4), 40, generator)
    feats, grad = torch.randn(40, channels, generator=generator), torch.randn(40, columns, generator=generator)
    weight = torch.randn(27, channels, columns, generator=generator)
    assert_close(convolution.forward(feats, weight, None, level), torch_backend.forward(feats, weight, None, level))
    assert_close(convolution.input_grad(grad, weight, level), torch_backend.input_grad(grad, weight, level))
    assert_close(convolution.weight_grad(feats, grad, level), torch_backend.weight_grad(feats, grad, level))


@in_interpreter
@pytest.mark.parametrize("count", [0, 1, 300])
def test_interpreted_counts_of_cells_equal_plain_torch(count, generator, monkeypatch):
    monkeypatch.setattr(maps, "ROWS_PER_COUNT", 128)  # several programs, and samples that end inside one
    coords = torch.randint(6, (count, 4), generator=generator)
    coords[:, 0] *= coords[:, 0] != 2  # that sample is empty
    keys = torch_maps.morton_keys(coords, 8).sort().values
    for halvings in (0, 3):
        samples = [keys[keys >> 24 == one] for one in range(7)]
        expected = [[len(set((one >> 3 * k).tolist())) for one in samples] for k in range(halvings + 1)]
        assert maps.count_cells(keys, 8, 7, halvings).tolist() == expected
        assert torch_maps.count_cells(keys, 8, 7, halvings).tolist() == expected


@in_interpreter
@pytest.mark.parametrize("count", [1, 77, 300])
def test_interpreted_maps_equal_plain_torch(count, generator):
    level = scattered((8, 9, 7), count, generator)
    for bits in (8, 20):
        coords = torch.randint(2**bits, (count, 4), generator=generator, dtype=torch.int32)
        coords[:, 0] %= 5
        keys = torch_maps.morton_keys(coords, bits)
        assert torch.equal(maps.morton_keys(coords, bits), keys)
        assert torch.equal(maps.morton_coords(keys, bits), coords)
        keys, outside, mixed = maps.checked_keys(coords, bits, (5, *[2**bits] * 3))
        assert torch.equal(keys, torch_maps.morton_keys(coords, bits)) and not outside
        assert mixed == bool((keys[1:] <= keys[:-1]).any())
        assert (outside, mixed) == torch_maps.checked_keys(coords, bits, (5, *[2**bits] * 3))[1:]
        for axis in range(4):
            for wrong in (-1, (5, *[2**bits] * 3)[axis]):
                far = coords.clone()
                far[-1, axis] = wrong
                assert maps.checked_keys(far, bits, (5, *[2**bits] * 3))[1]
                assert torch_maps.checked_keys(far, bits, (5, *[2**bits] * 3))[1]
    assert maps.checked_keys(level.coords, level.bits, (1, 8, 9, 7))[1:] == (False, False)
    two = torch.cat([level.coords, level.coords + torch.tensor([1, 0, 0, 0], dtype=torch.int32)])
    level, count = Level.from_coords(two, (8, 9, 7), 2)[0], 2 * count
    found, alive, number = maps.neighbours(level.keys, level.bits, (8, 9, 7), 2)
    assert torch.equal(found, level.neighbours)
    assert torch.equal(alive, level._alive) and int(number.sum()) == int((level.neighbours < count).sum())
    lists = maps.neighbour_lists(found)
    for k, (rows, near) in enumerate(level.neighbour_pairs):
        assert int(lists[2][k]) == len(rows)
        assert torch.equal(lists[0][k, : len(rows)].long(), rows) and torch.equal(lists[1][k, : len(rows)].long(), near)
    for chunk in (64, 2):  # keys of 32 and of 64 bits
        ordered = (module.by_neighbourhood(found, alive, chunk) for module in (maps, torch_maps))
        for mine, plain in zip(*ordered, strict=True):
            assert torch.equal(mine, plain)
    for dtype in (torch.int16, torch.int32):
        mine, plain = torch.empty((2, count), dtype=dtype)
        for module, keys in ((maps, mine), (torch_maps, plain)):
            module.window_keys(level.coords, keys, size=3, shift=1, counts=(3, 4, 3), first=7)
        assert torch.equal(mine, plain)
    order = torch.randperm(count, generator=generator)
    assert torch.equal(maps.take_rows(level.coords, order), level.coords[order])
    for size in (16, 128):
        offsets, counts = maps.tile_offsets(alive, size)
        for mine, plain in zip((offsets, counts), torch_maps.tile_offsets(alive, size), strict=True):
            assert torch.equal(mine, plain)
        for tile, rows in enumerate(level.neighbours.split(size, 1)):
            there = [k for k in range(27) if (rows[k] < count).any()]
            assert offsets[tile, : counts[tile]].tolist() == there


@in_interpreter
@pytest.mark.parametrize("count", [0, 1, 77, 504])
def test_interpreted_maps_of_cells_equal_plain_torch(count, generator, monkeypatch):
    """Of several halvings at once, over several programs."""
    monkeypatch.setattr(maps, "ROWS_PER_PROGRAM", 16)
    level = scattered((8, 9, 7), count, generator)
    two = torch.cat([level.coords, level.coords[::2] + torch.tensor([1, 0, 0, 0], dtype=torch.int32)])
    level = Level.from_coords(two, (8, 9, 7), 2)[0]
    for halvings in (1, 2, 3):
        sizes = [len(set((level.keys >> 3 * k).tolist())) for k in range(1, halvings + 1)]
        mine, plain = maps.group_cells(level.keys, sizes), torch_maps.group_cells(level.keys, sizes)
        for one, other in zip(mine, plain, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@in_interpreter
@pytest.mark.parametrize("words", [4, 1024])
def test_interpreted_maps_are_laid_into_longer_tables_as_in_plain_torch(words, generator, monkeypatch):
    monkeypatch.setattr(maps, "WORDS_PER_PROGRAM", words)

    def drawn(kind, *shape):
        return torch.randint(2**33, shape, generator=generator).to(kind)

    for kind in (torch.int32, torch.int64):
        parts = [
            (drawn(kind, 27, 50), drawn(kind, 27, 70), None),
            (drawn(kind, 27, 50), drawn(kind, 27, 50), None),
            (drawn(kind, 8, 0), drawn(kind, 8, 3), None),
            (drawn(kind, 9, 4)[::2], drawn(kind, 7, 4), None),
            (drawn(kind, 33), drawn(kind, 47), None),
            (drawn(kind, 33), drawn(kind, 47), 33),
            (drawn(kind, 47), drawn(kind, 47), 12),
            (None, drawn(kind, 1), 5),
        ]
        for some in (parts, parts[2:3], parts[:1], []):
            mine, plain = ([(part, table.clone(), rest) for part, table, rest in some] for _ in range(2))
            maps.lay_parts(mine)
            torch_maps.lay_parts(plain)
            for (part, one, rest), (_, other, _) in zip(mine, plain, strict=True):
                assert torch.equal(one, other)
                assert part is None or torch.equal(one[tuple(map(slice, part.shape))], part)
                assert rest is None or (one[0 if part is None else len(part) :] == rest).all()
    with pytest.raises(TypeError, match=r"4 or 8 bytes, got torch\.int16"):
        maps.lay_parts([(None, drawn(torch.int16, 3), 5)])


@in_interpreter
@pytest.mark.parametrize("channels", [1, 6, 32])
def test_interpreted_sums_and_copies_of_children(channels, generator, assert_close):
    cells = scattered((9, 7, 8), 200, generator).coarsening
    fine = torch.randn(200, channels, generator=generator)
    coarse, scale = torch.randn(len(cells.coarse), channels, generator=generator), torch.rand(len(cells.coarse))
    expected = torch.zeros_like(coarse).index_add_(0, cells.parent, fine)
    assert_close(row_kernels.sum_children(fine, cells.children, None), expected)
    assert_close(row_kernels.sum_children(fine, cells.children, scale), expected * scale[:, None])
    assert_close(row_kernels.spread(coarse, cells.parent, None), coarse[cells.parent])
    assert_close(row_kernels.spread(coarse, cells.parent, scale), (coarse * scale[:, None])[cells.parent])


@in_interpreter
@pytest.mark.parametrize(("channels", "columns"), [*SIZES, (4, 32), (32, 4), (150, 260)])
@pytest.mark.parametrize("count", [0, 1, 129, 700])
def test_interpreted_linear_map_and_its_gradients(count, channels, columns, generator, assert_close):
    feats, grad = (torch.randn(count, width, generator=generator).half() for width in (channels, columns))
    weight = (torch.randn(columns, channels, generator=generator) / 8).half()
    bias = torch.randn(columns, generator=generator)
    x, w, upstream = feats.double(), weight.double(), grad.double()
    half = {"dtype": torch.float16}
    assert_close(linear.rows_product(feats, weight, bias), x @ w.T + bias.double(), **half)
    assert_close(linear.rows_product(grad, weight.T, None), upstream @ w, **half)
    for_weight, for_bias = linear.parameter_grads(feats, grad)
    assert for_weight.dtype == for_bias.dtype == torch.float32
    assert_close(for_weight, upstream.T @ x)
    assert_close(for_bias, upstream.sum(0))


@in_interpreter
@pytest.mark.parametrize("learned", [(1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 0, 0), (0, 0, 1)])
@pytest.mark.parametrize("count", [0, 300])
def test_interpreted_mixed_layer_takes_any_strides_and_frozen_parts(count, learned, generator, assert_close):
    values = [torch.randn(size, count or 1, generator=generator).T[:count] for size in (40, 24)]
    feats, upstream = (value.half() for value in values)
    weight, bias = torch.randn(40, 24, generator=generator).T / 8, torch.randn(48, generator=generator)[::2]
    mine = [t.detach().requires_grad_(bool(on)) for t, on in zip((feats, weight, bias), learned, strict=True)]
    truth = [t.detach().double().requires_grad_(t.requires_grad) for t in mine]
    out, expected = ops._MixedLinear.apply(*mine, None, linear), torch.nn.functional.linear(*truth)
    assert_close(out, expected, dtype=torch.float16)
    out.backward(upstream)
    expected.backward(upstream.double())
    for one, other in zip(mine, truth, strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            assert_close(one.grad, other.grad, dtype=one.dtype)


@in_interpreter
@pytest.mark.parametrize("count", [0, 5, 700])
def test_interpreted_column_sums(count, generator, assert_close, monkeypatch):
    monkeypatch.setattr(row_kernels, "NUMBERS_PER_PROGRAM", 64)
    x = torch.randn(count, 6, generator=generator)
    assert_close(row_kernels.column_sums(x), x.double().sum(0))


@in_interpreter
@pytest.mark.parametrize("width", [20])
def test_interpreted_attention_and_its_gradient(width, generator, assert_close, monkeypatch):
    monkeypatch.setattr(attention, "ROWS_PER_STEP", 16)  # windows of several blocks
    level = scattered((9, 8, 7), 150, generator)
    qkv = torch.randn(150, 3, 2, width, generator=generator, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(150, 2, width, generator=generator, dtype=torch.float64)
    expected = oracle.window_attention(qkv, level.coords, 5, 2)
    expected.backward(grad)
    plan = level.windows(5, 2)
    out, sums = attention.attend(qkv.detach().float(), *plan)
    assert_close(out, expected)
    assert_close(attention.attend_grad(grad.float(), qkv.detach().float(), out, sums, *plan), qkv.grad)


@in_interpreter
@pytest.mark.parametrize(("count", "num_codes", "width"), [(0, 4, 3), (1, 1, 16), (150, 300, 8), (130, 37, 20)])
def test_interpreted_code_search_and_sums(count, num_codes, width, generator, assert_close):
    rows, codebook = torch.randn(count, width, generator=generator), torch.randn(num_codes, width, generator=generator)
    codes = code_search.nearest_codes(rows, codebook)
    distances = oracle.nearest_codes(rows.double(), codebook.double())
    if count:
        regret = distances.gather(1, codes[:, None])[:, 0] - distances.min(1).values
        assert regret.max() < 1e-5
    counts, sums = code_search.code_sums(rows, codes, num_codes)
    assert counts.tolist() == torch.bincount(codes, minlength=num_codes).tolist()
    assert_close(sums, torch.zeros(num_codes, width, dtype=torch.float64).index_add_(0, codes, rows.double()))
    found = code_search.nearest(rows, codebook)
    assert torch.equal(found.codes, codes) and torch.equal(found.values, codebook[codes])
    assert_close(found.errors, (rows.double() - codebook[codes].double()).square().mean(1))


@in_interpreter
def test_interpreted_averages_advance_as_in_plain_torch(generator, assert_close):
    fused, plain = (VectorQuantizer(37, 6) for _ in range(2))
    plain.load_state_dict(fused.state_dict())
    counts, sums = torch.rand(37, generator=generator), torch.randn(37, 6, generator=generator)
    counts[::3] = 0
    averages = fused.mean_count, fused.mean_sum, fused.embeddings.weight
    for _ in range(300):
        unused = code_search.advance(averages, counts, sums, share=0.4, rate=0.01, least=0.05)
        assert torch.equal(unused, plain._advance(counts, sums, share=0.4))
    assert unused.tolist() == (counts == 0).tolist()
    for name, values in plain.state_dict().items():
        if name != "embeddings.weight":  # of codes with a count near zero, where rounding counts
            assert_close(fused.state_dict()[name], values)
    assert_close(fused.codebook[~unused], plain.codebook[~unused])
    rows, picks = torch.randn(50, 6, generator=generator), torch.randint(50, (80,), generator=generator)
    plain.load_state_dict(fused.state_dict())
    code_search.revive(averages, unused, unused.cumsum(0) + 3, picks, rows)
    assert plain.revive(unused, rows, picks, torch.tensor(3)) == 3 + unused.sum()
    for name, values in plain.state_dict().items():
        assert torch.equal(fused.state_dict()[name], values), name
    assert torch.equal(plain.codebook[unused], rows[picks[3 : 3 + int(unused.sum())]])


@in_interpreter
def test_interpreted_search_takes_the_lowest_of_equal_codes(generator):
    codebook = torch.randint(-9, 9, (5, 8), generator=generator).float().repeat(60, 1)  # whole numbers: exact products
    assert code_search.nearest_codes(codebook[:5].clone(), codebook).tolist() == [0, 1, 2, 3, 4]


@in_interpreter
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("channels", "programs"), [(6, 512), (6, 2), (32, 3), (40, 1)])
def test_interpreted_voxel_norm_and_its_gradients(channels, programs, silu, generator, assert_close, monkeypatch):
    monkeypatch.setattr(norm, "NUMBERS_PER_STEP", 512)
    monkeypatch.setattr(norm, "PROGRAMS_PER_BATCH", programs)  # one step a program, or several, the last not full
    x = 5 + 3 * torch.randn(107, channels, generator=generator)
    weight, bias = torch.randn(2, channels, generator=generator)
    grad = torch.randn(107, channels, generator=generator)
    truth = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = torch.nn.functional.layer_norm(truth[0], (channels,), *truth[1:])
    expected = torch.nn.functional.silu(expected) if silu else expected
    expected.backward(grad.double())
    assert_close(norm.voxel_norm(x, weight, bias, eps=1e-5, silu=silu), expected)
    grads = norm.voxel_norm_grads(x, grad, weight, bias, eps=1e-5, silu=silu)
    for mine, reference in zip(grads, truth, strict=True):
        assert_close(mine, reference.grad)


@in_interpreter
@pytest.mark.parametrize("count", [0, 1, 200])
def test_interpreted_products_end_in_sums_and_gelu(count, generator, assert_close):
    feats, added = (torch.randn(count, width, generator=generator).half() for width in (24, 40))
    weight, bias = (torch.randn(40, 24, generator=generator) / 4).half(), torch.randn(40, generator=generator)
    plain = feats.double() @ weight.double().T + bias.double()
    half = {"dtype": torch.float16}
    assert_close(linear.rows_product(feats, weight, bias, added=added), plain + added.double(), **half)
    before, out = linear.rows_product_gelu(feats, weight, bias)
    assert_close(before, plain, **half)
    truth = before.double().requires_grad_()
    expected = torch.nn.functional.gelu(truth, approximate="tanh")
    assert_close(out, expected, **half)
    expected.backward(feats.double() @ weight.double().T)
    assert_close(linear.rows_product_gelu_grad(feats, weight, before), truth.grad, **half)


@in_interpreter
@pytest.mark.parametrize(("channels", "columns"), [(4, 32), (6, 10), (16, 20), (64, 40)])
@pytest.mark.parametrize("marked", [False, True])
def test_interpreted_maps_of_children_equal_rows_laid_side_by_side(channels, columns, marked, generator, assert_close):
    cells = scattered((9, 7, 8), 200, generator).coarsening
    width, count, half = channels + marked, len(cells.coarse), {"dtype": torch.float16}
    fine, grad = torch.randn(200, channels, generator=generator).half(), torch.randn(count, columns).half()
    weight = (torch.randn(columns, 8 * width, generator=generator) / 8).half()
    bias = torch.randn(columns, generator=generator)
    rows = torch.cat([fine.double(), torch.ones(200, int(marked))], 1)
    laid = torch.cat([rows, torch.zeros(1, width)])[cells.slots].view(count, 8 * width)
    assert_close(
        children.gather_product(fine, cells.children, weight, bias, marked=marked),
        laid @ weight.double().T + bias.double(),
        **half,
    )
    for_weight, for_bias = children.gathered_grads(fine, cells.children, grad, marked=marked)
    assert_close(for_weight, grad.double().T @ laid, dtype=torch.float32)
    assert_close(for_bias, grad.double().sum(0), dtype=torch.float32)
    back = children.scatter_product(grad, weight.T, None, cells.children, num_fine=200, channels=channels)
    spread = (grad.double() @ weight.double()).view(8 * count, width)[cells.places]
    assert_close(back, spread[:, :channels], **half)
    if not marked:
        for_weight, for_bias = children.scattered_grads(grad, cells.children, fine)
        assert_close(for_weight, laid.T @ grad.double(), dtype=torch.float32)
        assert_close(for_bias, laid.sum(0), dtype=torch.float32)


@in_interpreter
@pytest.mark.parametrize("live", [0, 1, 70, 128])
def test_interpreted_products_and_norms_stop_at_the_live_rows(live, generator, assert_close, monkeypatch):
    """Beyond them tables may hold anything."""
    monkeypatch.setattr(norm, "PROGRAMS_PER_BATCH", 3)
    number = torch.tensor([live], dtype=torch.int32)
    rows, grad = torch.randn(128, 24, generator=generator).half(), torch.randn(128, 40, generator=generator).half()
    rows[live:], grad[live:] = float("nan"), float("nan")
    weight, bias = torch.randn(40, 24, generator=generator).half(), torch.randn(40, generator=generator)
    bare = {"eps": 1e-6, "silu": False}
    both = []
    for count, how in ((128, {"live": number}), (live, {})):
        x, upstream = rows[:count], grad[:count]
        before, bent = linear.rows_product_gelu(x, weight, bias, **how)
        both.append([before, bent, linear.rows_product(x, weight, bias, added=upstream, **how)])
        both[-1].append(linear.rows_product_gelu_grad(upstream, weight.T, x, **how))
        both[-1].append(norm.voxel_norm(x, None, None, **bare, **how))
        both[-1].append(norm.voxel_norm_grads_in_block(x, x, None, **bare, around=x, **how).input)
    for mine, plain in zip(*both, strict=True):
        assert len(mine) == 128 and torch.equal(mine[:live], plain)
    (for_weight, for_bias), (twice, _) = linear.several_parameter_grads([(rows, grad), (rows, rows)], live=number)
    x, upstream = rows[:live].double(), grad[:live].double()
    assert_close(for_weight, upstream.T @ x, dtype=torch.float32)
    assert_close(for_bias, upstream.sum(0), dtype=torch.float32)
    assert_close(twice, x.T @ x, dtype=torch.float32)


@in_interpreter
@pytest.mark.parametrize("live", [0, 1, 300, 1500])
def test_interpreted_gradients_are_summed_alike_whatever_the_tables_length(live, generator):
    rows, grad = (torch.randn(1500, width, generator=generator).half() for width in (24, 40))
    plain = linear.several_parameter_grads([(rows[:live], grad[:live]), (rows[:live], rows[:live])])
    rows[live:], grad[live:] = float("nan"), float("nan")
    number = torch.tensor([live], dtype=torch.int32)
    in_table = linear.several_parameter_grads([(rows, grad), (rows, rows)], live=number)
    for mine, other in zip(in_table, plain, strict=True):
        assert torch.equal(mine[0], other[0]) and torch.equal(mine[1], other[1])


def _as_autocast(monkeypatch):
    """Blocks meet the kernels, and float16 under autocast, on the CPU too."""
    monkeypatch.setattr(norm, "PROGRAMS_PER_BATCH", 3)
    kernels = {"linear": linear, "norm": norm, "attention": attention, "children": children}
    monkeypatch.setattr(ops, "fused", lambda name, feats: kernels.get(name))
    monkeypatch.setattr(ops, "choose_backend", lambda name, feats, columns: convolution)
    monkeypatch.setattr(ops, "autocast_dtype", lambda feats: torch.float16)


BLOCKS = {
    "residual": lambda: modules.ResidualBlock(24, norm="voxel", backend="auto"),
    "transformer": lambda: modules.TransformerBlock(32, num_heads=2, window=4, shift=2),
    "halving": lambda: modules.Halving(24, 40),
    "halving marked": lambda: modules.Halving(24, 16, occupancy=True),
    "doubling": lambda: modules.Doubling(24, 6),
}


@in_interpreter
@pytest.mark.parametrize("learned", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("kind", BLOCKS)
def test_interpreted_blocks_equal_their_layers_one_by_one(kind, learned, generator, assert_close, monkeypatch):
    torch.manual_seed(0)
    level = scattered((6, 7, 5), 90, generator)
    level.__dict__["is_thin"] = False
    fine = level.coarsening
    block, exact = BLOCKS[kind](), BLOCKS[kind]().double()
    for parameter in block.parameters():  # numbers that 16 bits hold, so that roundings of the weights do not count
        parameter.data = (parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)).half().float()
    exact.load_state_dict(block.state_dict())
    for parameter in (*block.parameters(), *exact.parameters()):
        parameter.requires_grad_(learned[1])
    if kind.startswith("halving") or kind == "doubling":
        block.shortcut.copy_(block.shortcut.half())
        exact.shortcut.copy_(block.shortcut)
    at = fine.coarse if kind == "doubling" else level
    feats = torch.randn(len(at), 32 if kind == "transformer" else 24, generator=generator).half()

    def run(block, feats, *, recomputed=False):
        block.zero_grad()
        feats.requires_grad_(learned[0])

        def work(feats):
            x = SparseTensor.on(at, feats)
            return (block(x, fine) if kind == "doubling" else block(x)).feats

        out = checkpoint(work, feats, use_reentrant=False) if recomputed else work(feats)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(torch.float16).to(out.dtype)
        out.backward(grad)
        return [out, feats.grad, *(parameter.grad for parameter in block.parameters())]

    expected = run(exact, feats.double())
    with monkeypatch.context() as patch:
        _as_autocast(patch)
        got = run(block, feats.clone())
        again = run(block, feats.clone(), recomputed=True)
        with torch.inference_mode():
            x = SparseTensor.on(at, feats)
            looked = (block(x, fine) if kind == "doubling" else block(x)).feats
    assert got[0].dtype == torch.float16 and torch.equal(looked, got[0])
    assert all(one is other is None or torch.equal(one, other) for one, other in zip(got, again, strict=True))
    for mine, other in zip(got, expected, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:  # several roundings to float16, one after another
            assert_close(mine, other, dtype=torch.bfloat16)


@in_interpreter
@pytest.mark.parametrize("sizes", [(1,), (700,), (300, 41), (5, 0, 600)])
@pytest.mark.parametrize("loss_type", ["l1", "l2", "l1_l2"])
@pytest.mark.parametrize("weighted", [False, True])
def test_interpreted_errors_of_rows_and_children(sizes, loss_type, weighted, generator, assert_close, monkeypatch):
    monkeypatch.setattr(errors, "NUMBERS_PER_PROGRAM", 512)
    levels = [scattered((9, 10, 11), size, generator).coords for size in sizes]
    coords = torch.cat([at + torch.tensor([i, 0, 0, 0], dtype=torch.int32) for i, at in enumerate(levels)])
    level = Level.from_coords(coords, (9, 10, 11), len(sizes))[0]
    values, truth = torch.randn(2, len(level), 3, generator=generator)
    weights = torch.tensor([1.0, 0.0, 2.5]) if weighted else None
    logits = 4 * torch.randn(len(level.coarsening.coarse), 8, generator=generator)

    def run(values, logits):
        values, logits = values.detach(), logits.detach()
        recon = SparseTensor.on(level, values.requires_grad_())
        given = {"loss_type": loss_type, "lambda_l2": 0.7 * weighted, "channel_weights": weights}
        row = losses.reconstruction(recon, SparseTensor.on(level, truth.to(values)), **given)
        cells = losses.subdivision(logits.requires_grad_(), level.coarsening.occupied, level.coarsening.coarse)
        (3 * row + 5 * cells).backward()
        return [row, cells, values.grad, logits.grad]

    monkeypatch.setattr(ops, "fused", lambda name, feats: errors if feats.dtype == torch.float32 else None)
    got, exact = (run(values.to(kind).clone(), logits.to(kind).clone()) for kind in (torch.float32, torch.float64))
    for mine, other in zip(got, exact, strict=True):
        assert_close(mine, other, dtype=torch.float32)


def _for_graphs(monkeypatch):
    """A small network whose parts run as stand-ins of graphs in float16 on the CPU."""
    _as_autocast(monkeypatch)
    monkeypatch.setattr(ops, "backend_module", lambda name: convolution)
    monkeypatch.setattr(graphs, "CudaGraph", StartedAgain)
    monkeypatch.setattr(graphs, "SHORTEST", 8)
    for module in (presets, coders):
        monkeypatch.setattr(module, "NUM_RESIDUAL", (0, 1, 0))
    torch.manual_seed(0)
    sizes = {"resolution": 16, "widths": (8, 8, 16), "model_channels": 16, "latent_channels": 8, "num_embeddings": 8}
    net = vqvae.make_vqvae(
        "tiny", **sizes, num_blocks=1, num_heads=2, window=2, windows=("lung", "bone"), use_graphs=True
    )
    return net.train()


def _ball(radius, generator):
    grid = torch.ones(16, 16, 16).nonzero()
    coords = grid[(grid - torch.tensor([6, 8, 7])).square().sum(1) <= radius**2]
    feats = torch.rand(len(coords), 2, generator=generator) * 2 - 1
    return SparseTensor(feats, torch.nn.functional.pad(coords, (1, 0)), (16, 16, 16), 1)


def _learned(net, x, *, use_graphs=True):
    """The reconstruction, the loss, and all gradients."""
    net.zero_grad()
    net.encoder.use_graphs = net.decoder.use_graphs = use_graphs
    out = net(x, quantize=False, seeds=list(range(x.batch_size)))
    loss = losses.TokenizerLoss()(out, x)["loss"]
    loss.backward()
    grads = {name: value.grad for name, value in net.named_parameters() if value.grad is not None}
    return {"recon": out.recon.feats, "latents": out.latents.feats, "loss": loss, **grads}


@in_interpreter
@pytest.mark.parametrize(("thin", "radii"), [(False, (2, 0, 3)), (True, (2, 1))])
def test_interpreted_graphs_of_a_network_equal_its_kernels_started_one_by_one(thin, radii, generator, monkeypatch):
    """Tables are longer than rows, of a batch before even: nothing but the live rows counts."""
    monkeypatch.setattr(Level, "is_thin", property(lambda level: thin, lambda level, value: None))
    net, recorded = _for_graphs(monkeypatch), []
    for radius in radii:
        x = _ball(radius, generator)
        got, plain = (_learned(net, x, use_graphs=use_graphs) for use_graphs in (True, False))
        assert got.keys() == plain.keys() and len(got) > 30
        for name, value in plain.items():
            assert got[name].dtype == value.dtype and torch.equal(got[name], value), (radius, name)
        recorded.append(dict(net.graphs.recorded))
    assert not net.graphs.failed and recorded[0].keys() == {"encoder", "decoder"}
    assert recorded[0] == recorded[1] and (thin or recorded[2]["encoder"] is not recorded[0]["encoder"])


@in_interpreter
def test_interpreted_graphs_serve_only_what_learns_and_one_batch_at_a_time(generator, monkeypatch, caplog):
    net, x, other = _for_graphs(monkeypatch), _ball(2, generator), _ball(1, generator)
    with torch.no_grad():
        net(x, quantize=False)
    assert not net.graphs.recorded
    net.encoder.requires_grad_(False)
    _learned(net, x)
    assert net.graphs.recorded.keys() == {"decoder"}
    net.encoder.requires_grad_(True)
    for then in (x, other):  # the same batch again, and another
        first, _ = (net(one, quantize=False).recon.feats.sum() for one in (x, then))
        with pytest.raises(RuntimeError, match="one forward before each backward"):
            first.backward()
    before = dict(net.graphs.recorded)
    net.encoder.input_layer.weight.data = net.encoder.input_layer.weight.data.clone()
    _learned(net, x)
    assert net.graphs.recorded["encoder"] is not before["encoder"]
    assert net.graphs.recorded["decoder"] is before["decoder"]
    assert not copy.deepcopy(net).graphs.recorded
    before, thin = dict(net.graphs.recorded), not x.level.coarsening.coarse.is_thin
    monkeypatch.setattr(Level, "is_thin", property(lambda level: thin, lambda level, value: None))
    _learned(net, other)  # with other kernels than were recorded
    assert net.graphs.recorded == before and net.graphs.tables[0].source() is x.level and not net.graphs.failed


@in_interpreter
def test_interpreted_graphs_that_cannot_be_recorded_change_nothing(generator, monkeypatch, caplog):
    net, x = _for_graphs(monkeypatch), _ball(2, generator)
    plain = _learned(net, x, use_graphs=False)

    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "CudaGraph", refuse)
    for _ in range(2):
        got = _learned(net, x)
        assert all(torch.equal(got[name], value) for name, value in plain.items())
    assert [line for line in caplog.messages if "one by one" in line] == [
        "kernels are started one by one: CUDA graphs cannot be recorded here "
        "(RuntimeError: operation not permitted when stream is capturing)"
    ]
