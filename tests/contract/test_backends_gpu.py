"""Every backend on a CUDA device against dense float64 convolution: many small problems, judged by the worst entry."""

import pytest
import torch

from networks.sparse import SparseTensor, SubmanifoldConv3d, ops, torch_backend
from networks.sparse.topology import Level
from tests import oracle

pytestmark = pytest.mark.gpu
WIDTHS = [(8, 8), (64, 64), (64, 256), (40, 24), (1, 16), (130, 33)]
WIDE = [(128, 128), (192, 256), (256, 128), (128, 384)]  # that producer warps serve on Hopper
DTYPES = {
    "triton": [torch.bfloat16, torch.float16, torch.float32],
    "torch": [torch.float64, torch.float32],
    "spconv": [torch.float16],
}


def problem(seed):
    """A level of 1 to 3 samples, of any filling, on a grid of up to 12 a side."""
    made = torch.Generator().manual_seed(seed)
    shape = tuple(torch.randint(1, 13, (3,), generator=made).tolist())
    batch_size = int(torch.randint(1, 4, (1,), generator=made))
    filling = (0.05, 0.3, 0.7, 1.0)[seed % 4]
    grid = torch.rand(batch_size, *shape, generator=made) < filling
    return Level.from_coords(grid.nonzero().cuda(), shape, batch_size)[0], shape, batch_size


def truth(feats, weight, bias, grad, coords, shape, batch_size):
    """Values and gradients of a dense float64 convolution at the occupied voxels."""
    inputs = [t.double().requires_grad_() for t in (feats, weight)]
    b, x, y, z = coords.long().unbind(1)
    grid = inputs[0].new_zeros(batch_size, *shape, feats.shape[1]).index_put((b, x, y, z), inputs[0])
    kernel = inputs[1].view(3, 3, 3, *weight.shape[1:]).permute(4, 3, 0, 1, 2)
    dense = torch.nn.functional.conv3d(grid.movedim(-1, 1), kernel, bias.double(), padding=1)
    out = dense.movedim(1, -1)[b, x, y, z]
    return out, *torch.autograd.grad(out, inputs, grad.double())


PROBLEMS = [(name, dtype, WIDTHS[:2] if name == "spconv" else WIDTHS) for name in DTYPES for dtype in DTYPES[name]]
PROBLEMS += [("triton", dtype, WIDE) for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("backend", "dtype", "widths"), PROBLEMS)
def test_a_thousand_random_problems(backend, dtype, widths, assert_close, record_property):
    if backend == "spconv":
        pytest.importorskip("spconv.pytorch")
    module, worst = ops.backend_module(backend), 0.0
    for seed in range(0, 1000, 3 if widths is WIDE else 1):
        level, shape, batch_size = problem(seed)
        channels, columns = widths[seed // 4 % len(widths)]
        if len(level) == 0:
            continue
        made = torch.Generator("cuda").manual_seed(seed)
        feats = torch.randn(len(level), channels, generator=made, device="cuda").to(dtype)
        grad = torch.randn(len(level), columns, generator=made, device="cuda").to(dtype)
        weight = (torch.randn(27, channels, columns, generator=made, device="cuda") / 16).to(dtype)
        bias = torch.randn(columns, generator=made, device="cuda").to(dtype)
        got = (
            module.forward(feats, weight, bias, level),
            module.input_grad(grad, weight, level),
            module.weight_grad(feats, grad, level),
        )
        expected = truth(feats, weight, bias, grad, level.coords, shape, batch_size)
        for mine, reference in zip(got, expected, strict=True):
            if backend != "spconv":  # it may sum in float16: its worst error is recorded and judged at the end
                assert_close(mine, reference, dtype=dtype)
            scale = reference.abs().max().clamp(min=1e-6)
            worst = max(worst, float(((mine.double() - reference).abs().max() / scale).detach()))
    print(f"{backend} {dtype}: worst relative error {worst:.3g}")
    record_property("worst", worst)
    assert worst < 1e-2


def large(channels=64, dtype=torch.bfloat16):
    made = torch.Generator("cuda").manual_seed(0)
    grid = torch.rand(2, 48, 48, 48, generator=made, device="cuda") < 0.6
    level, _ = Level.from_coords(grid.nonzero(), (48, 48, 48), 2)
    feats = torch.randn(len(level), channels, generator=made, device="cuda").to(dtype)
    weight = (torch.randn(27, channels, channels, generator=made, device="cuda") / 16).to(dtype)
    return level, feats, weight


@pytest.mark.parametrize(("backend", "channels"), [("triton", 64), ("triton", 128), ("torch", 64), ("spconv", 64)])
def test_a_hundred_repeats_are_equal_to_the_bit(backend, channels):
    if backend == "spconv":
        pytest.importorskip("spconv.pytorch")
    level, feats, weight = large(channels, dtype=torch.float16)
    module, widest = ops.backend_module(backend), 0.0
    first = None
    for _ in range(100):
        results = (
            module.forward(feats, weight, None, level),
            module.input_grad(feats, weight, level),
            module.weight_grad(feats, feats, level),
        )
        first = first or results
        widest = max(widest, *(float((a.float() - b.float()).abs().max()) for a, b in zip(results, first, strict=True)))
    print(f"{backend}: largest difference between repeats {widest:.3g}")
    if backend != "spconv":  # its sums race; recorded, not judged
        assert widest == 0


@pytest.mark.parametrize("channels", [64, 128])
def test_rows_that_begin_anywhere_are_convolved(channels):
    level, feats, weight = large(channels)
    module = ops.backend_module("triton")
    shifted = torch.cat([feats.new_zeros(1), feats.flatten()])[1:].view_as(feats)
    assert shifted.data_ptr() % 16
    assert torch.equal(module.forward(shifted, weight, None, level), module.forward(feats, weight, None, level))
    assert torch.equal(module.input_grad(shifted, weight, level), module.input_grad(feats, weight, level))


@pytest.mark.parametrize("backend", ["triton", "spconv"])
def test_sums_are_wider_than_float16(backend):
    """Positive numbers, 512 x 27 of them a sum: a float16 accumulator loses bits that one rounding does not."""
    if backend == "spconv":
        pytest.importorskip("spconv.pytorch")
    made = torch.Generator("cuda").manual_seed(0)
    level, _ = Level.from_coords(torch.ones(1, 8, 8, 8, device="cuda").nonzero(), (8, 8, 8), 1)
    feats = (torch.rand(512, 512, generator=made, device="cuda") / 2 + 0.5).half()
    weight = (torch.rand(27, 512, 64, generator=made, device="cuda") / 2 + 0.5).half()
    exact = torch_backend.forward(feats.double(), weight.double(), None, level)
    error = float(
        ((ops.backend_module(backend).forward(feats, weight, None, level).double() - exact) / exact).abs().max()
    )
    print(f"{backend}: relative error of long positive sums {error:.3g}")
    if backend == "triton":
        assert error < 2**-10


def test_autocast_and_recomputation_give_the_same(assert_close):
    level, feats, _ = large(dtype=torch.float32)
    conv = SubmanifoldConv3d(64, 64).cuda()
    results = []
    for recompute in (False, True):
        conv.zero_grad()
        x = SparseTensor.on(level, feats.clone().requires_grad_())
        with torch.autocast("cuda", torch.bfloat16):
            run = (lambda f, x=x: conv(x.replace(f)).feats) if recompute else None
            out = torch.utils.checkpoint.checkpoint(run, x.feats, use_reentrant=False) if recompute else conv(x).feats
        out.float().square().sum().backward()
        assert out.dtype == torch.bfloat16 and conv.weight.grad.dtype == torch.float32
        results.append((out, x.feats.grad, conv.weight.grad.clone()))
    for once, again in zip(*results, strict=True):
        assert torch.equal(once, again)
    assert_close(results[0][0].float(), conv(SparseTensor.on(level, feats)).feats, dtype=torch.bfloat16)


def test_gradients_exist_in_eval_mode():
    level, feats, _ = large()
    conv = SubmanifoldConv3d(64, 64, backend="triton").cuda().bfloat16().eval()
    conv(SparseTensor.on(level, feats)).feats.float().sum().backward()
    assert conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", ["triton", "spconv"])
def test_spconv_and_triton_agree_on_the_axes(backend, generator, assert_close):
    """A kernel with one entry moves features along one axis only."""
    if backend == "spconv":
        pytest.importorskip("spconv.pytorch")
    level, _ = Level.from_coords(torch.ones(1, 5, 6, 7).nonzero().cuda(), (5, 6, 7), 1)
    feats = torch.randn(len(level), 8, generator=generator).cuda()
    for k in (0, 5, 13, 21):
        weight = torch.zeros(27, 8, 8, device="cuda")
        weight[k] = torch.eye(8, device="cuda")
        got = ops.backend_module(backend).forward(feats.half(), weight.half(), None, level)
        dense = oracle.submanifold_conv(
            feats.half().double().cpu(), level.coords.cpu(), (5, 6, 7), 1, weight.double().cpu(), None
        )
        assert_close(got, dense, dtype=torch.float16)
