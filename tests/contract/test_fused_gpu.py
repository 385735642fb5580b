"""Fused CUDA maps, row operations and blocks give what plain torch gives on the CPU, and layers one by one."""

import pytest
import torch

from networks.quantizer import VectorQuantizer
from networks.sparse import SparseTensor, modules, ops, torch_maps, whole_blocks
from networks.sparse.maps import maps_for
from networks.sparse.topology import Level, morton_keys

pytestmark = pytest.mark.gpu


def levels(seed, *, side=21, filling=0.5, batch_size=3):
    """The same level on both devices; the middle sample is empty."""
    made = torch.Generator().manual_seed(seed)
    grid = torch.rand(batch_size, side, side + 3, side - 2, generator=made) < filling
    grid[1] = False
    coords = grid.nonzero()[torch.randperm(int(grid.sum()), generator=made)]
    shape = (side, side + 3, side - 2)
    return [Level.from_coords(coords.to(device), shape, batch_size)[0] for device in ("cpu", "cuda")]


def test_the_fused_maps_are_in_use():
    assert maps_for(torch.device("cuda", 0)) is not torch_maps


@pytest.mark.parametrize("filling", [0.02, 0.5, 1.0])
def test_maps_equal_those_of_the_cpu(filling):
    here, there = levels(0, filling=filling)
    for name in ("keys", "coords", "neighbours", "_alive"):
        assert torch.equal(getattr(here, name), getattr(there, name).cpu()), name
    assert here.mean_neighbours == there.mean_neighbours and here.sample_sizes == there.sample_sizes
    for mine, plain in zip(there.tiles(64), here.tiles(64), strict=True):
        assert (mine is None and plain is None) or torch.equal(mine.cpu(), plain)
    for mine, plain in zip(there.coarsening[2:], here.coarsening[2:], strict=True):
        assert torch.equal(mine.cpu(), plain)
    for mine, plain in zip(there.windows(8, 4)[:2], here.windows(8, 4)[:2], strict=True):
        assert torch.equal(mine.cpu(), plain)
    for _ in range(3):
        here, there = here.coarsening.coarse, there.coarsening.coarse
        assert here.sample_sizes == there.sample_sizes and torch.equal(here.keys, there.keys.cpu())
    far = torch.tensor([[0, 0, 0, 0], [63, 2**19, 5, 2**20 - 1]])
    assert torch.equal(morton_keys(far, 20), morton_keys(far.cuda(), 20).cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", ["pool", "legacy pool", "unpool", "norm", "norm silu", "voxel norm", "attention"])
def test_operations_and_gradients_equal_those_of_the_cpu(operation, dtype, assert_close):
    here, there = levels(1)
    channels = 96 if operation == "attention" else 32
    made = torch.Generator().manual_seed(2)
    rows = len(here.coarsening.coarse) if operation == "unpool" else len(here)
    feats = (3 + torch.randn(rows, channels, generator=made)).to(dtype)
    weight, bias = torch.randn(2, channels, generator=made)

    def run(level):
        inputs = [t.detach().to(level.device).requires_grad_() for t in (feats, weight, bias)]
        if operation == "unpool":
            out = ops.unpool(SparseTensor.on(level.coarsening.coarse, inputs[0]), level.coarsening).feats
        elif operation.endswith("pool"):
            out = ops.pool(SparseTensor.on(level, inputs[0]), legacy="legacy" in operation)[0].feats
        elif operation == "attention":
            out = ops.window_attention(inputs[0].view(-1, 3, 4, 8), level, window=4, shift=2).flatten(1)
        elif operation == "voxel norm":
            out = ops.voxel_norm(SparseTensor.on(level, inputs[0]), *inputs[1:], silu=True).feats
        else:
            silu = operation == "norm silu"
            out = ops.group_norm(SparseTensor.on(level, inputs[0]), 8, *inputs[1:], silu=silu).feats
        (out.float() * torch.arange(1, out.shape[1] + 1, device=out.device)).square().sum().backward()
        return [out, *(t.grad for t in inputs if t.grad is not None)]

    for mine, plain in zip(run(there), run(here), strict=True):
        assert_close(mine, plain, dtype=dtype if dtype == torch.bfloat16 else None)


def test_bias_gradient_equals_a_plain_sum(assert_close):
    grad = torch.randn(100_003, 48, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    assert_close(ops._column_sums(grad), grad.double().sum(0))
    assert torch.equal(ops._column_sums(grad), ops._column_sums(grad))


def test_training_steps_repeat_to_the_bit():
    from networks.losses import TokenizerLoss
    from networks.vqvae import make_vqvae
    from tests.benchmarks.shapes import body

    coords = body(48).cuda()
    feats = torch.sin(coords.float() * 0.3)

    def train():
        torch.manual_seed(0)
        network = make_vqvae("base", num_embeddings=256).cuda().train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            optimizer.zero_grad()
            x = SparseTensor(feats, coords, (48, 48, 48), 1)
            with torch.autocast("cuda", torch.bfloat16):
                loss = TokenizerLoss()(network(x), x)["loss"]
            loss.backward()
            optimizer.step()
            network.vq.update(generator=generator)
        return loss.detach(), network.state_dict()

    (loss, once), (again, twice) = train(), train()
    assert torch.equal(loss, again) and torch.isfinite(loss)
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_step_waits_for_nothing_behind_its_maps():
    from networks.losses import TokenizerLoss
    from networks.vqvae import make_vqvae
    from tests.benchmarks.shapes import body

    network = make_vqvae("base", num_embeddings=256, quantizer_levels=2).cuda().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    loss_of, coords = TokenizerLoss(window_weights=[1.0, 2.0, 1.0, 1.0]), body(48).cuda()
    feats = torch.sin(coords.float() * 0.3)
    for turn in range(2):  # the first compiles the kernels, and proves them
        x = SparseTensor(feats, coords, (48, 48, 48), 1)
        x.level.prepare(*network.sizes.convolved)
        try:
            torch.cuda.set_sync_debug_mode("error" if turn else "default")
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = loss_of(network(x, seeds=[turn], level_dropout=0.5), x)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            network.vq.update(generator=torch.Generator().manual_seed(turn))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_mixed_layers_get_float32_gradients(dtype, assert_close):
    """Products of 16-bit numbers are exact in float32: only the order of sums may differ from float64."""
    here, there = levels(3)
    made = torch.Generator().manual_seed(4)
    feats = torch.randn(len(here), 24, generator=made).to(dtype)
    for layer in (modules.Linear(24, 40), modules.SubmanifoldConv3d(24, 40)):
        layer.cuda()
        x = SparseTensor.on(there, feats.cuda().requires_grad_())
        with torch.autocast("cuda", dtype):
            out = layer(x).feats
        assert out.dtype == dtype
        grad = torch.randn(out.shape, generator=made).to(dtype)
        out.backward(grad.cuda())
        exact = type(layer)(24, 40).double()
        exact.load_state_dict({name: value.to(dtype).double().cpu() for name, value in layer.state_dict().items()})
        exact(SparseTensor.on(here, feats.double())).feats.backward(grad.double())
        for mine, plain in zip(layer.parameters(), exact.parameters(), strict=True):
            assert mine.grad.dtype == torch.float32
            assert_close(mine.grad, plain.grad, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "columns"), [(4, 32), (32, 4), (64, 128), (256, 768), (256, 1024), (1024, 256)])
@pytest.mark.parametrize("count", [1, 1000, 70001])
def test_the_linear_map_of_rows_equals_float64(count, channels, columns, dtype, assert_close):
    linear = pytest.importorskip("networks.kernels.linear")
    made = torch.Generator().manual_seed(count)
    rows, grad = (torch.randn(count, width, generator=made).to(dtype) for width in (channels, columns))
    weight = (torch.randn(columns, channels, generator=made) / 8).to(dtype)
    bias = torch.randn(columns, generator=made)
    x, w, upstream = (value.cuda().double() for value in (rows, weight, grad))
    rows, grad, weight, bias = (value.cuda() for value in (rows, grad, weight, bias))
    assert_close(linear.rows_product(rows, weight, bias), x @ w.T + bias.double(), dtype=dtype)
    assert_close(linear.rows_product(grad, weight.T, None), upstream @ w, dtype=dtype)
    for_weight, for_bias = linear.parameter_grads(rows, grad)
    assert_close(for_weight, upstream.T @ x, dtype=torch.float32)
    assert_close(for_bias, upstream.sum(0), dtype=torch.float32)


def test_a_second_derivative_is_refused():
    _, there = levels(3)
    layer = modules.SubmanifoldConv3d(8, 8).cuda()
    feats = torch.randn(len(there), 8, device="cuda", requires_grad=True)
    total = layer(SparseTensor.on(there, feats)).feats.square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, feats, create_graph=True)


@pytest.mark.parametrize("num_codes", [7, 300])
def test_the_fused_quantiser_learns_as_the_plain_one(num_codes, assert_close):
    torch.manual_seed(3)
    made = torch.Generator().manual_seed(5)
    plain = VectorQuantizer(num_codes, 12, revive_below=0.9907).train()  # no mean count comes near
    fused = VectorQuantizer(num_codes, 12, revive_below=0.9907).cuda().train()
    fused.load_state_dict(plain.state_dict())
    for step in range(3):
        rows = torch.randn(1000, 12, generator=made)
        grad = torch.randn(1000, 12, generator=made)
        sides = []
        for vq in (fused, plain):
            given = rows.to(vq.codebook.device).requires_grad_()
            out = vq(given)
            ((out.values * grad.to(given.device)).sum() + 3 * out.commitment.sum()).backward()
            assert not out.vq.requires_grad
            revived = vq.update(generator=torch.Generator().manual_seed(step))
            assert revived > 0 or num_codes == 7
            sides.append([out.codes, out.values, out.vq, out.commitment, given.grad, vq.mean_count, vq.codebook])
        assert torch.equal(sides[0][0].cpu(), sides[1][0])
        for mine, other in zip(sides[0][1:], sides[1][1:], strict=True):
            assert_close(mine, other)


BLOCKS = {  # name -> how it is made, channels in; the function of `whole_blocks` that serves it
    "residual": (lambda: modules.ResidualBlock(64, norm="voxel", backend="auto"), 64, "residual_block"),
    "transformer": (lambda: modules.TransformerBlock(128, num_heads=4, window=8, shift=4), 128, "transformer_block"),
    "halving": (lambda: modules.Halving(64, 128), 64, "halving"),
    "halving marked": (lambda: modules.Halving(4, 64, occupancy=True), 4, "halving"),
    "doubling": (lambda: modules.Doubling(64, 4), 64, "doubling"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_equals_its_layers_one_by_one(kind, dtype, assert_close, monkeypatch):
    make, channels, served_by = BLOCKS[kind]
    torch.manual_seed(0)
    block, level = make().cuda(), levels(6, side=40)[1]
    at = level.coarsening.coarse if kind == "doubling" else level
    more = (level.coarsening,) if kind == "doubling" else ()
    given = torch.randn(len(at), channels, device="cuda")
    given = given if kind == "halving marked" else given.to(dtype)
    served = []

    def run(plain):
        with monkeypatch.context() as patch:
            whole = getattr(whole_blocks, served_by)
            answer = (lambda *_, **__: None) if plain else lambda *a, **k: served.append(whole(*a, **k)) or served[-1]
            patch.setattr(whole_blocks, served_by, answer)
            block.zero_grad()
            feats = given.clone().requires_grad_()
            with torch.autocast("cuda", dtype):
                out = block(SparseTensor.on(at, feats), *more).feats
            out.backward(torch.cos(torch.arange(out.numel(), device="cuda").view(out.shape) * 0.37).to(out.dtype))
        return [out, feats.grad, *(parameter.grad for parameter in block.parameters())]

    got, again, layers = run(False), run(False), run(True)
    assert len(served) == 2 and all(one is not None for one in served)
    assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))
    for mine, other in zip(got, layers, strict=True):  # each rounds to 16 bits several times, at other places
        assert mine.dtype == other.dtype
        assert_close(mine, other, dtype=torch.bfloat16)


def test_a_network_of_blocks_learns_as_its_layers_do(monkeypatch):
    """In bf16 the losses lie within each other's rounding, and gradients are as near float32's as the layers' are."""
    from networks.losses import TokenizerLoss
    from networks.vqvae import make_vqvae
    from tests.benchmarks.shapes import body

    coords = body(64).cuda()
    feats = torch.sin(coords.float() * 0.3)
    torch.manual_seed(0)
    network = make_vqvae("base", num_embeddings=256).cuda().train()

    def run(*, plain, dtype=torch.bfloat16):
        with monkeypatch.context() as patch:
            if plain:
                for _, _, name in BLOCKS.values():
                    patch.setattr(whole_blocks, name, lambda *_, **__: None)
            network.zero_grad()
            x = SparseTensor(feats, coords, (64, 64, 64), 1)
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                terms = TokenizerLoss()(network(x, quantize=False, seeds=[1]), x)
            terms["loss"].backward()
        grads = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        return terms["loss"].item(), grads

    (whole, grads), (layers, plain_grads) = run(plain=False), run(plain=True)
    exact, exact_grads = run(plain=True, dtype=torch.float32)
    assert abs(whole - layers) < 1e-2 * layers
    ours, theirs = (float((one - exact_grads).norm() / exact_grads.norm()) for one in (grads, plain_grads))
    print(f"loss {whole:.6f} in blocks, {layers:.6f} in layers, {exact:.6f} in float32")
    print(f"gradients off by {ours:.3g} and {theirs:.3g}")
    assert ours < max(2 * theirs, 1e-2)
