"""Cells of unlike numbers of codes: bits go where they take error away, files hold them, hostile ones are refused."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from app.__main__ import app
from app.shared.refusals import Refused
from app.tokens import packing
from app.tokens.allocation import spread_levels, squared_errors
from app.tokens.code_tables import CodeTables, level_table, put_codes, take_codes
from app.tokens.commands import reconstruct, tokenize
from app.tokens.entropy import Reader, Writer
from app.tokens.open_scan import Volume
from app.tokens.token_files import is_packed, rate_of, read_tokens, write_tokens
from app.tokens.tokenizer import CTTokenizer
from networks import VectorQuantizer
from networks.residual import NO_CODE, ResidualQuantizer
from tests.tiny_tokenizer import AFFINE, hu_volume, make_network, save
from tests.unit.tokens.test_token_files import same

UNIFORM = CodeTables("ab" * 32, 256, (None,) * 4)
# Of codes 0 to 26 on a full grid of three, every third with a second.
STREAM = "00643a040062a6c0e9436a54d203978f98c5175544546b46f4df5a4898"


@pytest.fixture(scope="module")
def network():
    return make_network(quantizer_levels=4)


@pytest.fixture(scope="module")
def tokenizer(network):
    return CTTokenizer(network, digest="0" * 64)


@pytest.fixture
def unlike(tokens, rng):
    """Tokens of one to three codes a cell."""
    codes = rng.integers(0, 256, (len(tokens.codes), 3)).astype(np.int32)
    return replace(tokens, codes=codes).with_levels(np.arange(len(codes)) % 3 + 1)


def best(errors, number):
    """The least error of so many levels in all, of all ways to spread them."""
    ways = itertools.product(range(1, errors.shape[1] + 1), repeat=len(errors))
    return min(sum(row[n - 1] for row, n in zip(errors, way, strict=True)) for way in ways if sum(way) <= number)


def test_levels_go_where_they_take_most_error_away(rng):
    gains = np.sort(rng.uniform(0, 10, (6, 3)))[:, ::-1]  # which fall from level to level
    errors = 40 - np.cumsum(np.pad(gains, ((0, 0), (1, 0))), 1)
    for number in range(6, 25):
        levels = spread_levels(errors, number / 6)
        assert levels.sum() == number and levels.min() >= 1
        assert errors[np.arange(6), levels - 1].sum() == pytest.approx(best(errors, number))


def test_a_level_that_helps_only_with_the_next_is_taken_with_it_or_not_at_all():
    errors = np.array([[10.0, 10.0, 2.0], [10.0, 9.0, 8.5], [5.0, 6.0, 7.0]])
    assert spread_levels(errors, 4 / 3).tolist() == [1, 1, 1]
    assert spread_levels(errors, 5 / 3).tolist() == [3, 1, 1]
    assert spread_levels(errors, 2.0).tolist() == [3, 2, 1]
    assert spread_levels(errors, 3.0).tolist() == [3, 3, 1]


def test_errors_of_a_cell_are_those_of_its_voxels_squared():
    coords = np.array([[0, 0, 0], [0, 0, 1], [8, 0, 0]])
    decoded = np.zeros((16, 8, 8), np.float32)
    decoded[0, 0, 1], decoded[8, 0, 0] = 3, -1
    assert squared_errors(np.ones(3), decoded, coords, np.array([0, 0, 1])).tolist() == [5.0, 4.0]


def test_a_code_that_is_not_there_adds_nothing_but_the_first_always_is(generator):
    torch.manual_seed(0)
    quantizer = ResidualQuantizer([VectorQuantizer(8, 4) for _ in range(3)])
    quantizer.start_from(torch.randn(400, 4, generator=generator), generator=generator)
    codes = torch.randint(0, 8, (30, 3), generator=generator)
    for n in (1, 2, 3):
        fewer = torch.where(torch.arange(3) < n, codes, NO_CODE)
        assert torch.equal(quantizer.lookup(fewer), quantizer.lookup(codes[:, :n]))
    for wrong in (torch.full((1, 3), NO_CODE), torch.tensor([[0, -2, 0]])):
        with pytest.raises(ValueError, match=r"codes must lie in 0\.\.7"):
            quantizer.lookup(wrong)


@pytest.mark.parametrize("mean", [1.25, 1.5])
def test_cells_keep_the_codes_that_pay_so_many_on_average(tokenizer, mean):
    scan = Volume(hu_volume(), AFFINE)
    tokens, whole = tokenizer.encode(scan, levels=mean), tokenizer.encode(scan)
    volumes = [tokenizer.decode(whole, levels=n).hu for n in (1, 2, 3, 4)]
    levels = spread_levels(tokenizer.errors_by_level(tokenizer.on_device(tokenizer.rows_of(scan)), volumes), mean)
    assert mean - 4 / len(levels) < tokens.mean_levels <= mean
    assert np.array_equal((tokens.codes != NO_CODE).sum(1), levels) and len(set(levels)) > 1
    there = np.arange(levels.max()) < levels[:, None]
    assert np.array_equal(tokens.codes, np.where(there, whole.codes[:, : levels.max()], NO_CODE))
    assert np.array_equal(tokens.codes, tokenizer.encode(scan, levels=mean).codes)
    assert np.array_equal(tokens.first_levels(1), whole.first_levels(1))


def test_where_more_codes_do_not_help_they_are_not_kept(tokenizer):
    tokens = tokenizer.encode(Volume(hu_volume(), AFFINE), levels=3.9)
    assert tokens.mean_levels < 2.5  # an untrained network gains nothing from most of them


def test_a_prefix_of_unlike_cells_is_that_of_each(tokenizer):
    scan = Volume(hu_volume(), AFFINE)
    tokens = tokenizer.encode(scan, levels=2.5)
    one = tokenizer.encode(scan, levels=1)
    assert np.array_equal(tokenizer.decode(tokens, levels=1).hu, tokenizer.decode(one).hu)
    two = tokens.first_levels(2)
    assert two.shape[1] == 2 and np.array_equal(two, tokens.codes[:, :2])
    assert not np.array_equal(tokenizer.decode(tokens, levels=2).hu, tokenizer.decode(one).hu)


@pytest.mark.parametrize("wrong", [0.5, 4.5, float("nan"), float("inf"), -1.5])
def test_means_that_cannot_be_are_named(tokenizer, wrong):
    with pytest.raises(ValueError, match=r"levels must lie in 1\.\.4, the levels of this tokenizer, got"):
        tokenizer.encode(Volume(hu_volume(), AFFINE), levels=wrong)


def test_a_mean_needs_the_scan(tokenizer, tmp_path):
    tokens = tokenizer.encode(Volume(hu_volume(), AFFINE))
    write_tokens(tmp_path / "a.npz", tokens)
    with pytest.raises(Refused, match=r"^BAD_VALUE: levels must be a whole number for tokens, got 1\.5"):
        tokenizer.encode(tmp_path / "a.npz", levels=1.5)


# ---- files


@pytest.mark.parametrize("pack", [False, True])
def test_files_hold_how_many_codes_each_cell_has(unlike, tmp_path, pack):
    write_tokens(tmp_path / "a.npz", unlike, tables=UNIFORM, pack=pack)
    assert is_packed(tmp_path / "a.npz") == pack
    same(read_tokens(tmp_path / "a.npz", tables=UNIFORM), unlike)
    first = (tmp_path / "a.npz").read_bytes()
    write_tokens(tmp_path / "a.npz", unlike, tables=UNIFORM, pack=pack)
    assert (tmp_path / "a.npz").read_bytes() == first


def test_older_software_refuses_unlike_cells_and_reads_alike_ones(unlike, tokens, tmp_path):
    write_tokens(tmp_path / "a.npz", unlike)
    with np.load(tmp_path / "a.npz") as stored:
        assert int(stored["version"]) == 3 and stored["codes"].dtype == stored["levels"].dtype == np.uint8
        assert stored["levels"].tolist() == [i % 3 + 1 for i in range(len(unlike.codes))]
        assert not stored["codes"][stored["levels"] == 1, 1:].any()
    write_tokens(tmp_path / "b.npz", tokens)
    with np.load(tmp_path / "b.npz") as stored:
        assert int(stored["version"]) == 2 and "levels" not in stored.files


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a | {"levels": a["levels"][:-1]}, r"levels must be unsigned integers \(\d+,\), got uint8 \(\d+,\)"),
        (lambda a: a | {"levels": a["levels"].astype(np.int8)}, r"levels must be unsigned integers .*, got int8"),
        (lambda a: a | {"levels": a["levels"] + np.uint8(1)}, r"contradict each other: 2 to 4 codes a cell, and codes"),
        (lambda a: a | {"levels": a["levels"] - np.uint8(1)}, r"contradict each other: 0 to 2 codes a cell, and codes"),
        (
            lambda a: a | {"levels": np.minimum(a["levels"], 2)},
            r"contradict each other: 1 to 2 codes a cell",
        ),
        (lambda a: a | {"codes": a["codes"] + np.uint8(1)}, r"contradict each other: \d+ codes too many"),
        (lambda a: a | {"codes": a["codes"][:, 0]}, r"contradict each other: 1 to 3 codes a cell, and codes \(\d+,\)"),
    ],
)
def test_levels_that_contradict_codes_are_one_line(unlike, tmp_path, change, said):
    write_tokens(tmp_path / "a.npz", unlike)
    with np.load(tmp_path / "a.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    np.savez(tmp_path / "a.npz", **change(arrays))
    with pytest.raises(Refused, match=rf"^DAMAGED_TOKENS: a\.npz is damaged or no token file: .*{said}") as end:
        read_tokens(tmp_path / "a.npz")
    assert "\n" not in str(end.value)


def packed_parts(tokens, tmp_path):
    write_tokens(tmp_path / "a.npz", tokens, tables=UNIFORM, pack=True)
    with np.load(tmp_path / "a.npz") as stored:
        return packing._split(stored["packed"].tobytes())


@pytest.mark.parametrize("kind", ["no such cells", "unlike claimed", "alike claimed", "one level", "cut"])
def test_hostile_packed_levels_are_one_line(unlike, tokens, tmp_path, kind):
    parts = packed_parts(unlike, tmp_path)
    if kind == "no such cells":  # a third level is told of, and no cell has it
        columns = np.pad(unlike.first_levels(2), ((0, 0), (0, 1)), constant_values=NO_CODE)
        parts = packed_parts(replace(unlike, codes=columns), tmp_path)
    elif kind == "unlike claimed":
        parts = packed_parts(replace(unlike, codes=np.maximum(unlike.codes, 0)), tmp_path)._replace(magic=b"VXT2")
    elif kind == "alike claimed":
        parts = parts._replace(magic=b"VXT1")
    elif kind == "one level":
        parts = packed_parts(tokens, tmp_path)._replace(magic=b"VXT2")
    else:
        parts = parts._replace(codes=parts.codes[:-6])
    np.savez(tmp_path / "a.npz", packed=np.frombuffer(parts.joined(), np.uint8))
    with pytest.raises(Refused, match=r"^DAMAGED_TOKENS: a\.npz is damaged or no token file: ") as end:
        read_tokens(tmp_path / "a.npz", tables=UNIFORM)
    assert "\n" not in str(end.value)


def grid_of_three():
    cells = np.array(sorted(itertools.product(range(3), repeat=3), key=lambda cell: morton(*cell)))
    codes = np.stack([np.arange(27), np.where(np.arange(27) % 3 == 0, 26 - np.arange(27), NO_CODE)], 1)
    table = level_table(np.stack([np.arange(27) * 3, np.full(27, 7)], 1), np.ones(27, np.int64))
    return cells, codes, CodeTables("ab" * 32, 27, (table, table))


def morton(x, y, z):
    return sum((x >> i & 1) << 3 * i + 2 | (y >> i & 1) << 3 * i + 1 | (z >> i & 1) << 3 * i for i in range(2))


def test_unlike_cells_have_these_bytes_on_every_machine():
    cells, codes, tables = grid_of_three()
    writer = Writer()
    put_codes(writer, codes, cells, (3, 3, 3), tables)
    assert writer.finish().hex() == STREAM
    reader = Reader(bytes.fromhex(STREAM))
    assert np.array_equal(take_codes(reader, 2, cells, (3, 3, 3), tables, unlike=True), codes)
    reader.finish()


def test_levels_that_follow_the_first_codes_or_the_neighbours_cost_little(rng):
    cells = np.argwhere(np.ones((16, 16, 16), bool))
    order = np.argsort([morton4(*cell) for cell in cells])
    cells = cells[order]
    table = level_table(np.stack([np.arange(64) * 3, np.full(64, 7)], 1), np.ones(64, np.int64))
    tables = CodeTables("ab" * 32, 64, (table, table))
    first = rng.integers(0, 64, len(cells))

    def bits_a_cell(goes_on):
        codes = np.stack([first, np.where(goes_on, 5, NO_CODE)], 1)
        sizes = []
        for some in (codes, codes[:, :1]):
            writer = Writer()
            put_codes(writer, some, cells, (16, 16, 16), tables)
            sizes.append(len(writer.finish()))
        alike = Writer()
        put_codes(alike, np.full((int(goes_on.sum()), 1), 5), cells[goes_on], (16, 16, 16), tables)
        return 8 * (sizes[0] - sizes[1] - len(alike.finish())) / len(cells)

    assert bits_a_cell(first < 32) < 0.2
    assert bits_a_cell(cells[:, 0] < 8) < 0.25
    assert 0.9 < bits_a_cell(rng.random(len(cells)) < 0.5) < 1.3


def morton4(x, y, z):
    return sum((x >> i & 1) << 3 * i + 2 | (y >> i & 1) << 3 * i + 1 | (z >> i & 1) << 3 * i for i in range(4))


def test_bits_count_the_codes_that_are_there_and_how_many_each_cell_has(unlike):
    counted = rate_of(replace(unlike, support=None), UNIFORM)
    cells, number = len(unlike.codes), int((unlike.codes != NO_CODE).sum())
    assert counted.plain.codes == np.ceil(8 * number + np.log2(3) * cells)
    assert 8 * number <= counted.packed.codes < 8 * number + 2.2 * cells + 64


def test_the_commands_take_a_mean_of_levels(network, dataset, tmp_path):
    run = save(network, tmp_path / "run")
    case, file = dataset / "processed" / "case_a", tmp_path / "a.npz"
    called = CliRunner().invoke(
        app, ["tokenize", str(case), str(file), "--tokenizer", str(run), "--levels", "1.5", "--pack"]
    )
    assert called.exit_code == 0, called.output
    tokenizer = CTTokenizer.from_pretrained(run)
    tokens = tokenizer.read(file)
    assert 1.4 < tokens.mean_levels <= 1.5 and tokens.levels > 1
    assert tokenize(case, file, tokenizer=run, levels=1.5, pack=True)["cases"][0]["message"] == "there already"
    assert tokenize(case, file, tokenizer=run, levels=2.0, pack=True)["cases"][0]["message"] == ""
    assert tokenizer.read(file).codes.shape[1] == 2
    assert tokenize(case, file, tokenizer=run, levels=1.5)["cases"][0]["message"] == ""
    same(tokenizer.read(file), tokens)
    for levels in (None, 1, 2):
        out = tmp_path / f"{levels}.nii.gz"
        assert reconstruct(file, out, tokenizer=run, levels=levels)["ok"] == 1
    with pytest.raises(Refused, match=r"^BAD_VALUE: levels must lie in 1..4, the levels of this tokenizer, got 4.5"):
        tokenize(case, file, tokenizer=run, levels=4.5)
    one = save(make_network(), tmp_path / "one")
    with pytest.raises(Refused, match=r"^BAD_VALUE: levels must lie in 1..1, the levels of this tokenizer, got 1.5"):
        tokenize(case, file, tokenizer=one, levels=1.5)
