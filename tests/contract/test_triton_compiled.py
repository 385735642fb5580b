"""The Triton kernels compiled without a GPU: Hopper's matrix instructions are in them, and they fit each card."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
from networks.kernels import attention, children, code_search, convolution, errors, launch, linear, maps, norm, tiles  # noqa: E402
from networks.kernels import rows as row_kernels  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROOM = {90: 232448, 80: 166912, 89: 101376}  # bytes of shared memory on an H200, an A100, an RTX 4090
FLOATS = ["scale", "parts", "sums", "dots", "bias", "halves"]
LONGS = ["children", "parent", "order", "bounds", "keys"]
COUNTS = ["num_rows", "num_tiles", "pitch", "num_fine", "num_coarse", "num_codes", "num_blocks", "num_cells", "length"]
INTEGERS = [*COUNTS, "part_size", "weight_k", "weight_c", "weight_f", "size_x", "size_y", "size_z"]


def compiled(kernel, dtype="bf16", *, card=90, warps=4, stages=3, types=None, source=None, live=False, **constants):
    """Arguments are aligned as torch's allocator aligns them; `types` overrides what their names suggest."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernel.kernel
    counts = [name for name in kernel.arg_names if name.startswith("live")]  # of rows, which graphs leave to the device
    types = dict.fromkeys(counts, "*i32" if live else "constexpr") | (types or {})
    constants |= {} if live else dict.fromkeys(counts)
    named = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(LONGS, "*i64") | dict.fromkeys(INTEGERS, "i32")
    named |= dict.fromkeys(constants, "constexpr") | types
    signature = {name: named.get(name, f"*{dtype}") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    fixed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = (source or ASTSource)(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    target, options = GPUTarget("cuda", card, 32), {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=target, options=options)


MAPS = dict.fromkeys(("neighbours", "order", "offsets", "counts", "list_rows", "list_counts"), "*i32")


def forward(channels, columns, dtype, *, card=90, thin=False, live=False):
    tile = tiles.product_tile(channels, columns, DTYPES[dtype], thin=thin)
    tile = tiles.fitted(tile, DTYPES[dtype], ROOM[card])
    return compiled(
        convolution._gather_product,
        dtype,
        card=card,
        warps=tile.warps,
        stages=tile.stages,
        types=MAPS | {"bias": f"*{dtype}"} | ({} if thin else {"order": "constexpr"}),
        live=live,
        CHANNELS=channels,
        COLUMNS=columns,
        HAS_BIAS=True,
        ADDED=True,
        ORDERED=thin,
        MIRRORED=False,
        PRECISION="tf32x3" if dtype == "fp32" else "ieee",
        TILE_ROWS=tile.rows,
        TILE_COLUMNS=tile.columns,
        DEPTH=tile.depth,
        weight_f=1,
        **({} if thin else {"order": None}),
    )


def weight_gradient(channels, columns, dtype, *, card=90, thin=False, live=False):
    tile = tiles.grad_tile(channels, columns, DTYPES[dtype])
    tile = tiles.fitted(tile, DTYPES[dtype], ROOM[card])
    block, offsets, _ = convolution._parts(channels, columns, tile, thin)
    return compiled(
        convolution._row_product,
        dtype,
        card=card,
        warps=tile.warps,
        stages=tile.stages,
        types=MAPS | {"out": "*fp32"} | ({} if thin else {"list_rows": "constexpr", "list_counts": "constexpr"}),
        live=live,
        CHANNELS=channels,
        COLUMNS=columns,
        LISTED=thin,
        PRECISION="tf32x3" if dtype == "fp32" else "ieee",
        OFFSETS=offsets,
        BLOCK=block,
        TILE_COLUMNS=tile.columns,
        DEPTH=tile.depth,
        ALIGNED=8,
        **({} if thin else {"list_rows": None, "list_counts": None}),
    )


@pytest.mark.parametrize(
    ("channels", "dtype", "thin"),
    [(64, "bf16", False), (256, "bf16", False), (256, "fp16", True), (64, "fp32", False)],
)
def test_forward_has_wgmma_and_wide_copies(channels, dtype, thin):
    ptx = forward(channels, channels, dtype, thin=thin).asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.cg.shared.global" in ptx  # 16-byte gathers that run ahead of the products


@pytest.mark.parametrize(
    ("channels", "dtype", "thin"),
    [(32, "bf16", False), (32, "bf16", True), (64, "bf16", True), (256, "fp16", False)],
)
def test_weight_gradient_has_wgmma_and_wide_copies(channels, dtype, thin):
    ptx = weight_gradient(channels, channels, dtype, thin=thin).asm["ptx"]
    # 32 rows of sums (thin lists of 32 channels) are below the 64 of a wgmma
    assert ("wgmma.mma_async" in ptx) == (not thin or channels > 32)
    assert "cp.async.cg.shared.global" in ptx


@pytest.mark.parametrize("card", [80, 89])
@pytest.mark.parametrize("make", [forward, weight_gradient])
@pytest.mark.parametrize(
    ("channels", "dtype", "live"), [(256, "bf16", False), (256, "bf16", True), (256, "fp32", False)]
)
def test_convolution_fits_the_card(make, channels, dtype, live, card):
    assert make(channels, channels, dtype, card=card, live=live).metadata.shared <= ROOM[card]


@pytest.mark.skipif(not launch.KNOWN_LAUNCHER, reason="Gluon's names are those of Triton 3.6")
@pytest.mark.parametrize(
    ("channels", "columns", "mirrored", "thin"),
    [(128, 128, False, False), (192, 384, False, False), (256, 256, False, False), (128, 256, True, True)],
)
def test_producer_warps_gather_beside_products_and_fit(channels, columns, mirrored, thin):
    from triton.experimental.gluon._runtime import GluonASTSource

    from networks.kernels import producer_convolution

    plan = tiles.producer_plan(channels, columns, torch.bfloat16, ROOM[90], thin=thin, mirrored=mirrored)
    lines = plan.columns if mirrored else tiles.PRODUCER_DEPTH
    block = f"{lines}, {plan.columns * tiles.PRODUCER_DEPTH // lines}"
    made = compiled(
        producer_convolution._gather_product,
        source=GluonASTSource,
        warps=4,
        types=MAPS | {"weight": f"tensordesc<bf16[{block}],{producer_convolution.SWIZZLED!r}>"},
        CHANNELS=channels,
        COLUMNS=columns,
        HAS_BIAS=not mirrored,
        ADDED=True,
        ORDERED=thin,
        MIRRORED=mirrored,
        ROWS=plan.rows,
        TILE_COLUMNS=plan.columns,
        STAGES=plan.stages,
        PRODUCERS=plan.producers,
        GROUPS=tiles.PRODUCER_GROUPS,
        num_warps=4,
        live=thin,
    )
    ptx = made.asm["ptx"]
    assert made.metadata.shared <= ROOM[90] and 32 * made.metadata.num_warps <= 512
    assert "wgmma.mma_async" in ptx and "cp.async.cg.shared.global" in ptx and "cp.async.bulk.tensor.2d" in ptx
    assert "setmaxnreg" in ptx


@pytest.mark.skipif(not launch.KNOWN_LAUNCHER, reason="Gluon's names are those of Triton 3.6")
@pytest.mark.parametrize(("channels", "columns", "live"), [(128, 128, False), (256, 128, True), (128, 384, False)])
def test_producer_warps_gather_beside_sums_of_weights_and_fit(channels, columns, live):
    from triton.experimental.gluon._runtime import GluonASTSource

    from networks.kernels import producer_gradient

    assert tiles.gradient_is_shared(channels, columns, torch.bfloat16, ROOM[90], thin=False)
    made = compiled(
        producer_gradient._row_product,
        source=GluonASTSource,
        warps=4,
        types=MAPS | {"out": "*fp32"},
        CHANNELS=channels,
        COLUMNS=columns,
        BLOCK=tiles.GRADIENT_BLOCK,
        ROWS=tiles.GRADIENT_ROWS,
        STAGES=tiles.GRADIENT_STAGES,
        PRODUCERS=tiles.GRADIENT_PRODUCERS,
        GROUPS=tiles.GRADIENT_GROUPS,
        LAYOUT=producer_gradient.SWIZZLED,
        num_warps=4,
        live=live,
    )
    ptx = made.asm["ptx"]
    assert made.metadata.shared <= ROOM[90] and 32 * made.metadata.num_warps <= 512
    assert "wgmma.mma_async" in ptx and "cp.async.cg.shared.global" in ptx and "setmaxnreg" in ptx


def rows_counted(live):
    """How many rows: a number, or where it stands on the device."""
    return {"LIVE": live, "types": {"num_rows": "*i32"} if live else {}}


def linear_map(channels, columns, card, *, ending=linear.PLAIN, live=False):
    tile = tiles.fitted(tiles.product_tile(channels, columns, torch.bfloat16, thin=False), torch.bfloat16, ROOM[card])
    sizes = {"CHANNELS": channels, "COLUMNS": columns, "TILE_ROWS": tile.rows, "TILE_COLUMNS": tile.columns}
    run = {"card": card, "warps": tile.warps, "stages": tile.stages}
    kind = {"ADDED": ending == linear.PLAIN, "ENDING": ending, **rows_counted(live)}
    return compiled(linear._rows_product, HAS_BIAS=True, DEPTH=tile.depth, weight_c=1, **kind, **sizes, **run)


def linear_gradient(channels, columns, card, *, live=False):
    tile, lines, _ = linear._parts(channels, columns, torch.bfloat16, ROOM[card])
    sizes = {"CHANNELS": channels, "COLUMNS": columns, "TILE_LINES": lines, "TILE_CHANNELS": tile.columns}
    run = {"card": card, "warps": tile.warps, "stages": tile.stages}
    return compiled(linear._parameter_grads, DEPTH=tile.depth, **rows_counted(live), **sizes, **run)


@pytest.mark.parametrize("card", ROOM)
@pytest.mark.parametrize("make", [linear_map, linear_gradient])
@pytest.mark.parametrize(
    ("channels", "columns", "live"),
    [(256, 1024, False), (256, 1024, True), (64, 128, False), (4, 32, False), (128, 8, False)],
)
def test_linear_map_fits_the_card_and_copies_ahead(make, channels, columns, live, card):
    made = make(channels, columns, card, live=live)
    assert made.metadata.shared <= ROOM[card]
    ptx = made.asm["ptx"]
    if min(channels, columns) >= 64:
        assert ("wgmma.mma_async" in ptx) == (card == 90)
    if channels == 256:  # fewer are one step: there is nothing to run ahead of
        assert "cp.async.cg.shared.global" in ptx


@pytest.mark.parametrize("card", ROOM)
@pytest.mark.parametrize("ending", [linear.GELU, linear.GELU_GRAD])
def test_products_that_end_in_gelu_fit_the_card(ending, card):
    assert linear_map(256, 1024, card, ending=ending).metadata.shared <= ROOM[card]


def of_children(kernel, depth, columns, card, **sizes):
    tile = tiles.fitted(tiles.product_tile(depth, columns, torch.bfloat16, thin=False), torch.bfloat16, ROOM[card])
    tiling = {"TILE_ROWS": tile.rows, "TILE_COLUMNS": tile.columns, "DEPTH": tile.depth, "HAS_BIAS": True}
    run = {"card": card, "warps": tile.warps, "stages": tile.stages}
    return compiled(kernel, weight_c=1, **tiling, **run, **sizes)


@pytest.mark.parametrize("card", ROOM)
@pytest.mark.parametrize(("channels", "columns", "live"), [(4, 64, False), (64, 128, True), (128, 256, False)])
def test_maps_of_children_fit_the_card(channels, columns, live, card):
    marked = channels == 4
    width = channels + marked
    gathered = {"CHANNELS": channels, "WIDTH": width, "COLUMNS": columns, "live": live}
    scattered = {"CHANNELS": channels, "WIDTH": channels, "DEPTHS": columns, "live": live}
    made = [
        of_children(children._gather_product, 8 * width, columns, card, **gathered),
        of_children(children._scatter_product, columns, 8 * channels, card, **scattered),
    ]
    for gathered_lines in (False, True):
        sides = (columns, 8 * channels) if gathered_lines else (8 * width, columns)
        tile, lines, _ = children._parts(*sides, torch.bfloat16, ROOM[card])
        sizes = {"CHANNELS": channels, "WIDTH": channels if gathered_lines else width, "COLUMNS": columns}
        tiling = {"TILE_LINES": lines, "TILE_PLACES": tile.columns, "DEPTH": tile.depth}
        run = {"card": card, "warps": tile.warps, "stages": tile.stages, "GATHERED_LINES": gathered_lines, "live": live}
        made.append(compiled(children._gathered_grads, **run, **tiling, **sizes))
    for one in made:
        assert one.metadata.shared <= ROOM[card]
    if channels >= 64:
        assert all(("wgmma.mma_async" in one.asm["ptx"]) == (card == 90) for one in made)
        assert all("cp.async.cg.shared.global" in one.asm["ptx"] for one in made)


@pytest.mark.parametrize(("few", "width"), [(True, 32), (False, 16), (False, 64), (False, 128)])
@pytest.mark.parametrize("card", ROOM)
def test_code_search_has_wgmma_and_fits_the_card(few, width, card, monkeypatch):
    monkeypatch.setattr(code_search, "shared_memory", lambda device: ROOM[card])
    code_search.tile_for.cache_clear()
    tile = code_search.tile_for(width, torch.device("cuda", 0), few=few)
    if tile.stages == 0:
        assert (card, width) == (89, 128)  # searched in plain torch there
        return
    made = compiled(
        code_search._search,
        "fp32",
        card=card,
        warps=tile.warps,
        stages=tile.stages,
        types={"found": "*i64"},
        WIDTH=width,
        DEPTH=width,
        READ=True,
        ROWS=tile.rows,
        CODES=tile.columns,
    )
    assert made.metadata.shared <= ROOM[card]
    assert ("wgmma.mma_async" in made.asm["ptx"]) == (card == 90)


@pytest.mark.parametrize(("width", "dtype"), [(32, "bf16"), (128, "bf16"), (128, "fp32")])
@pytest.mark.parametrize("kernel", ["_attend", "_grad_queries", "_grad_keys"])
def test_attention_fits_the_smallest_card(kernel, width, dtype):
    shape = attention._shape(torch.empty(1, 3, 4, width, dtype=DTYPES[dtype]))
    made = compiled(getattr(attention, kernel), dtype, card=89, types={"bounds": "*i32"}, **shape)
    assert made.metadata.shared <= ROOM[89]


def test_row_operations_and_maps_compile():
    rows = {"CHANNELS": 32, "WIDTH": 32, "TILE": 128}
    compiled(row_kernels._sum_children, SCALED=True, **rows)
    compiled(row_kernels._spread, SCALED=True, **rows)
    compiled(row_kernels._column_sums, **rows)
    for kernel in (norm._normalize, norm._grads):
        for width, card in ((32, 90), (128, 80), (512, 89)):
            shape = {"CHANNELS": width, "WIDTH": width, "TILE": max(4096 // width, 1)}
            types = {"weight": "*fp32", "eps": "fp32"}
            around = {} if kernel is norm._normalize else {"AROUND": True, "BESIDE": True}
            compiled(kernel, types=types, card=card, AFFINE=True, SILU=True, LIVE=False, **around, **shape)
            bare = {"weight": None, "bias": None, "AFFINE": False, "SILU": False, "LIVE": True}
            compiled(kernel, types=types | {"num_rows": "*i32"}, card=card, **bare, **around, **shape)
    compiled(maps._encode_checked, "i32", types={"size_b": "i32"}, BITS=8, TILE=512)
    for kernel in (maps._encode, maps._decode):
        compiled(kernel, "i32", BITS=8, TILE=512)
    for kernel in (maps._fill, maps._look_up):
        compiled(kernel, "i32", BITS=8, TILE=512)
    for kernel in (maps._count_pairs, maps._list_offsets):
        compiled(kernel, "i32", TILE=512)
    compiled(maps._count_cells, "i32", types={"size_b": "i32"}, BITS=8, LEVELS=4, TILE=4096)
    compiled(maps._lay_parts, types={"told": "*i64", "num_parts": "i32"}, PARTS=32, TILE=1024)
    compiled(maps._count_firsts, "i32", LEVELS=3, TILE=512)
    groups = {name: "*i64" for name in maps._group.kernel.arg_names if name.startswith(("cells", "parent", "children"))}
    sizes = dict.fromkeys(("num_second", "num_third"), "i32")
    compiled(maps._group, "i32", types=groups | sizes, LEVELS=3, TILE=512)
    absent = dict.fromkeys(name for name in groups if name.endswith(("second", "third")))
    compiled(
        maps._group, "i32", types=groups | sizes | dict.fromkeys(absent, "constexpr"), LEVELS=1, TILE=512, **absent
    )
    for keys in ("*i32", "*i64"):
        compiled(maps._sorting_keys, "i32", types={"keys": keys}, CHUNK=16384, TILE=512)
    compiled(maps._take_columns, "i32", TILE=512)
    compiled(maps._list_pairs, "i32", TILE=512)
    compiled(maps._take_rows, "fp32", types={"rows": "*i64"}, CHANNELS=4, TILE=1024, WIDTH=4)
    shape = {"CHANNELS": 4, "WIDTH": 4, "TILE": 2048, "LINEAR": 0.5, "SQUARE": 0.5}
    compiled(errors._row_error, "fp32", **shape)
    compiled(errors._row_error_grad, types={"target": "*fp32", "upstream": "*fp32"}, **shape)
    bytes_of = {"exists": "*u8", "shares": "constexpr", "stride_cell": "i32", "stride_octant": "i32"}
    compiled(errors._children_error, types=bytes_of, TILE=1024, shares=None)
    compiled(errors._children_error_grad, types=bytes_of | {"upstream": "*fp32"}, TILE=1024, shares=None)
    codes = {"ordered": "*i16", "halvings": "i32", "share": "fp32", "rate": "fp32", "least": "fp32", "unused": "*i1"}
    compiled(code_search._segment_sums, "fp32", types=codes, WIDTH=32, DEPTH=32, ROWS=64)
    compiled(code_search._advance, "fp32", types=codes, WIDTH=32, DEPTH=32, TILE=32)
    revived = codes | {"places": "*i64", "picks": "*i64"}
    compiled(code_search._revive, "fp32", types=revived, WIDTH=32, DEPTH=32, TILE=32)
    compiled(code_search._split_table, "fp32", types={"padded": "i32"}, WIDTH=20, DEPTH=32, CODES=128)
