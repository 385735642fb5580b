"""Packed token files: every field to the bit, in few bytes that never change; hostile ones end in one line."""

import hashlib
import json
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from app.shared.refusals import Refused
from app.tokens import packing
from app.tokens.code_tables import CodeTables, level_table, put_codes, tables_of, take_codes
from app.tokens.commands import reconstruct, tokenize
from app.tokens.entropy import TOTAL, Reader, Writer
from app.tokens.occupancy import octree_bytes, put_cells, put_support, take_cells, take_support
from app.tokens.open_scan import Volume
from app.tokens.token_files import is_packed, rate_of, read_tokens, write_tokens
from app.tokens.tokenizer import CTTokenizer
from networks import make_vqvae
from networks.sparse.topology import Level
from networks.support import support_of
from tests.tiny_tokenizer import AFFINE, hu_volume, make_network
from tests.unit.tokens.test_token_files import same

UNIFORM = CodeTables("ab" * 32, 256, (None,) * 4)
CELLS = "0000cd00ff9abbf3558b55"  # of the eight corners and the middle of a grid of five


CODES = "009234a1840669e08680d675d2750b7ddf9eb2a7105055"  # 0 to 26 on a full grid of three


def line(kinds, counts):
    """The table of codes that lie on a line, their neighbours beside them."""
    return level_table(np.stack([np.arange(kinds) * 3, np.full(kinds, 7)], 1), np.asarray(counts))


def ball(side, radius):
    """A solid ball off the centre: its voxels' cells three halvings up, with the support below them."""
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1)
    voxels = np.argwhere(np.linalg.norm(grid - side * np.array([0.45, 0.5, 0.55]), axis=-1) < radius)
    rows = torch.nn.functional.pad(torch.from_numpy(voxels), (1, 0))
    level, _ = Level.from_coords(rows, (side,) * 3, 1)
    coarse = level.coarsening.coarse.coarsening.coarse.coarsening.coarse
    return coarse.coords[:, 1:].numpy(), tuple(part.numpy() for part in support_of(level)), len(voxels)


@pytest.mark.parametrize("kind", ["plain", "levels", "no_support", "one_cell", "older", "skewed"])
def test_packed_files_give_back_every_field(tokens, tmp_path, rng, kind):
    tables = UNIFORM
    if kind == "levels":
        tokens = replace(tokens, codes=rng.integers(0, 256, (len(tokens.codes), 3)).astype(np.int32))
    if kind == "no_support":
        tokens = replace(tokens, support=None)
    if kind == "one_cell":
        tokens = replace(tokens, codes=tokens.codes[:1], coords=tokens.coords[4:5], support=None)
    if kind == "older":
        tokens = replace(tokens, findings=None, voxels=None)
    if kind == "skewed":
        tables = UNIFORM._replace(levels=(line(256, np.bincount(tokens.codes, minlength=256)),))
    write_tokens(tmp_path / "case.npz", tokens, tables=tables, pack=True)
    assert is_packed(tmp_path / "case.npz")
    same(read_tokens(tmp_path / "case.npz", tables=tables), tokens)


def test_same_tokens_same_packed_bytes(tokens, tmp_path):
    for name in ("one", "two"):
        write_tokens(tmp_path / f"{name}.npz", tokens, tables=UNIFORM, pack=True)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_the_octree_has_these_bytes_on_every_machine():
    corners = np.array([[x, y, z] for x in (0, 4) for y in (0, 4) for z in (0, 4)])
    cells = np.concatenate([corners[:1], [[2, 2, 2]], corners[1:]])
    writer = Writer()
    put_cells(writer, cells, (5, 5, 5))
    assert writer.finish().hex() == CELLS
    found, _ = take_cells(Reader(bytes.fromhex(CELLS)), 9, (5, 5, 5))
    assert np.array_equal(found, cells)


def test_the_octree_of_a_solid_is_a_small_part_of_its_bytes():
    cells, support, voxels = ball(96, 40)
    writer, below = Writer(), Writer()
    model = put_cells(writer, cells, (12, 12, 12))
    put_support(below, model, cells, (12, 12, 12), support)
    coded, coded_below = writer.finish(), below.finish()
    assert len(coded) < 0.8 * octree_bytes(cells, (12, 12, 12)) and len(coded_below) < 0.05 * sum(map(len, support))
    assert 8 * len(coded_below) / voxels < 0.06
    reader = Reader(coded)
    found, model = take_cells(reader, len(cells), (12, 12, 12))
    reader.finish()
    assert np.array_equal(found, cells)
    reader = Reader(coded_below)
    parts = take_support(reader, model, cells, (12, 12, 12), 3)
    reader.finish()
    assert all(np.array_equal(one, other) for one, other in zip(parts, support, strict=True))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 2), (5, 8, 7), (16, 2, 9)])
def test_any_cells_of_any_grid_come_back(rng, shape):
    every = np.argwhere(np.ones(shape, bool))
    for share in (0.05, 0.5, 1.0):
        some = every[rng.random(len(every)) < share] if share < 1 else every
        some = some if len(some) else every[:1]
        level, _order = Level.from_coords(torch.nn.functional.pad(torch.from_numpy(some), (1, 0)), shape, 1)
        cells = level.coords[:, 1:].numpy()
        writer = Writer()
        put_cells(writer, cells, shape)
        found, _ = take_cells(Reader(writer.finish()), len(cells), shape)
        assert np.array_equal(found, cells)


def test_tables_follow_the_codebook_and_its_counts():
    sizes = {"widths": (8, 8, 8), "model_channels": 16, "num_blocks": 1, "num_embeddings": 64}
    network = make_vqvae("tiny", **sizes, quantizer_levels=2)
    first, second = (tables_of(network, "0" * 64).levels[i] for i in (0, 1))
    assert first.sides.shape == (64, 4) and sorted(first.code_at.tolist()) == list(range(64))
    assert not np.array_equal(first.code_at, second.code_at)
    network.vq.levels[0].mean_count[5] = 1000.0
    again = tables_of(network, "0" * 64).levels[0]
    leaf = np.searchsorted(again.firsts, again.place_of[5], side="right") - 1
    assert again.firsts[leaf + 1] - again.firsts[leaf] < 8, "half of the use lies on each side"
    assert all(tables_of(make_network(codebook=kind), "").levels[0] is not None for kind in ("ema", "gradient"))
    assert tables_of(make_network(codebook="fsq"), "").levels == (None,)
    assert np.array_equal(first.place_of[first.code_at], np.arange(64)) and first.firsts[-1] == 64
    assert np.all(first.priors[:15] > 0) and np.all(first.priors[:15] < TOTAL)


def test_codes_have_these_bytes_on_every_machine():
    coords = np.argwhere(np.ones((3, 3, 3), bool))
    tables = CodeTables("", 64, (line(64, np.arange(64)),))
    writer = Writer()
    put_codes(writer, np.arange(27)[:, None], coords, (3, 3, 3), tables)
    assert writer.finish().hex() == CODES
    found = take_codes(Reader(bytes.fromhex(CODES)), 1, coords, (3, 3, 3), tables)
    assert found[:, 0].tolist() == list(range(27))


@pytest.mark.parametrize("kinds", [1, 2, 7, 8, 33, 1000, 8192])
def test_any_codes_of_any_codebook_come_back(rng, kinds):
    coords = np.argwhere(rng.random((9, 20, 5)) < 0.4)
    points = rng.integers(-2047, 2048, (kinds, 3))
    points[: kinds // 2] = points[0]  # codes that lie on each other
    tables = CodeTables("", kinds, (level_table(points, rng.integers(0, 50, kinds)), None))
    codes = rng.integers(0, kinds, (len(coords), 2))
    writer = Writer()
    put_codes(writer, codes, coords, (9, 20, 5), tables)
    reader = Reader(writer.finish())
    assert np.array_equal(take_codes(reader, 2, coords, (9, 20, 5), tables), codes)
    reader.finish()


def test_codes_like_their_neighbours_take_fewer_bits():
    """A slope of 512 codes over a full grid, and the same codes anywhere: before, both took nine bits a code."""
    coords = np.argwhere(np.ones((16, 16, 16), bool))
    codes = (coords.sum(1) * 11)[:, None]
    tables = CodeTables("", 512, (line(512, np.zeros(512, int)),))
    sizes = []
    for given in (codes, np.random.default_rng(0).permutation(codes)):
        writer = Writer()
        put_codes(writer, given, coords, (16, 16, 16), tables)
        sizes.append(8 * len(writer.finish()) / len(coords))
    assert sizes[0] < 5.5 < 7 < sizes[1] < 9


def test_codes_of_a_codebook_larger_than_a_table_come_back(rng, tokens, tmp_path):
    codes = rng.integers(0, 1 << 24, (len(tokens.codes), 2)).astype(np.int32)
    tables = CodeTables("ab" * 32, 1 << 24, (None, None))
    write_tokens(tmp_path / "case.npz", replace(tokens, codes=codes), tables=tables, pack=True)
    assert np.array_equal(read_tokens(tmp_path / "case.npz", tables=tables).codes, codes)


def test_all_bits_are_those_of_the_packed_file(tokens, tmp_path):
    for kept in (tokens, replace(tokens, support=None)):
        told = write_tokens(tmp_path / "case.npz", kept, tables=UNIFORM, pack=True)
        assert told == rate_of(kept, UNIFORM)
        assert told.packed.total == 8 * (tmp_path / "case.npz").stat().st_size
        assert (told.packed.support > 0) == (kept.support is not None)
        assert told.plain.codes == 8 * len(tokens.codes) <= told.packed.codes < 8 * len(tokens.codes) + 48
    assert told.packed.header < 8 * 800
    write_tokens(tmp_path / "plain.npz", tokens, tables=UNIFORM)
    with np.load(tmp_path / "plain.npz") as stored:
        assert np.array_equal(stored["bits"], rate_of(tokens, UNIFORM).as_array())
    as_json = rate_of(tokens, UNIFORM).as_json(tokens=len(tokens.codes), voxels=tokens.voxels)
    assert as_json["per_voxel"] == as_json["total"] / tokens.voxels
    assert as_json["per_token"] == as_json["total"] / len(tokens.codes)
    same(read_tokens(tmp_path / "plain.npz"), tokens)


def test_codes_that_are_seldom_cost_more_than_those_that_are_often(tokens):
    often, seldom = (replace(tokens, codes=np.full_like(tokens.codes, code)) for code in (0, 1))
    tables = UNIFORM._replace(levels=(line(256, [10_000, *[1] * 255]),))
    assert 2 * rate_of(often, tables).packed.codes < rate_of(seldom, tables).packed.codes


# ---- who may read it


def test_only_their_tokenizer_unpacks_them(tokens, tmp_path):
    write_tokens(tmp_path / "case.npz", tokens, tables=UNIFORM, pack=True)
    with pytest.raises(
        Refused, match=r"^OTHER_TOKENIZER: the tokens are packed, only their tokenizer abababababab can"
    ):
        read_tokens(tmp_path / "case.npz")
    with pytest.raises(
        Refused, match=r"^OTHER_TOKENIZER: the tokens were made by tokenizer abababababab, this one is 000"
    ):
        read_tokens(tmp_path / "case.npz", tables=UNIFORM._replace(tokenizer="0" * 64))


def test_every_command_reads_packed_files(output_dir, dataset, tmp_path):
    case = dataset / "processed" / "case_a"
    plain, packed_ = tmp_path / "plain.npz", tmp_path / "packed.npz"
    told = tokenize(case, plain, tokenizer=output_dir, support=True)["cases"][0]
    again = tokenize(case, packed_, tokenizer=output_dir, support=True, pack=True)["cases"][0]
    assert again["bits"] == told["bits"] and 8 * packed_.stat().st_size == told["bits"]["total"]
    assert packed_.stat().st_size < 0.5 * plain.stat().st_size
    assert tokenize(case, packed_, tokenizer=output_dir, support=True, pack=True)["cases"][0]["message"]
    made = CTTokenizer.from_pretrained(output_dir)
    same(made.read(packed_), made.read(plain))
    assert np.array_equal(made.decode(packed_).hu, made.decode(plain).hu)
    assert reconstruct(packed_, tmp_path / "a.nii", tokenizer=output_dir)["ok"] == 1
    assert not tokenize(case, packed_, tokenizer=output_dir, support=True)["cases"][0]["message"]
    assert not is_packed(packed_)


def test_packed_files_of_another_tokenizer_are_neither_read_nor_overwritten(output_dir, dataset, tmp_path):
    other = CTTokenizer(make_network(num_embeddings=4), digest="c" * 64)
    write_tokens(tmp_path / "a.npz", other.encode(Volume(hu_volume(), AFFINE)), tables=other.tables, pack=True)
    before = (tmp_path / "a.npz").read_bytes()
    refused = tokenize(dataset / "processed" / "case_a", tmp_path / "a.npz", tokenizer=output_dir)["cases"][0]
    assert refused["codes"] == ["EXISTS"] and (tmp_path / "a.npz").read_bytes() == before
    refused = reconstruct(tmp_path / "a.npz", tmp_path / "a.nii", tokenizer=output_dir)["cases"][0]
    assert refused["codes"] == ["OTHER_TOKENIZER"] and "cccccccccccc" in refused["message"]


# ---- damage


def content_of(tokens, tables=UNIFORM):
    from app.tokens.token_files import _arrays_of

    return packing.packed(_arrays_of(tokens), tables)


def stored(path, content):
    np.savez(path, packed=np.frombuffer(content, np.uint8))
    return path


def with_header(parts, **changes):
    told = json.loads(zlib.decompress(parts.header)) | changes
    told = {name: value for name, value in told.items() if value is not ...}
    return parts._replace(header=zlib.compress(json.dumps(told).encode())).joined()


HOSTILE = {
    "more tokens than cells": {"count": 28},
    "tokens without end": {"count": 10**15},
    "fewer tokens": {"count": 20},
    "no tokens": {"count": 0},
    "tokens in halves": {"count": 1.5},
    "levels without end": {"levels": 10**9},
    "no levels": {"levels": 0},
    "a grid without end": {"latent_shape": [1 << 17] * 3, "count": 1 << 23},
    "a grid of words": {"latent_shape": ["a", "b", "c"]},
    "a flat grid": {"latent_shape": [3, 3]},
    "a smaller grid": {"latent_shape": [3, 3, 2]},
    "an affine of no volume": {"affine": np.zeros((4, 4)).tolist()},
    "no affine": {"affine": ...},
    "a spacing of another grid": {"spacing": 3.0},
    "windows as numbers": {"windows": [[1]]},
    "no tokenizer": {"tokenizer": ...},
    "voxels below none": {"voxels": -3},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_packed_header_that_lies_is_one_line(tokens, tmp_path, kind):
    path = stored(tmp_path / "case.npz", with_header(content_of(tokens), **HOSTILE[kind]))
    with pytest.raises(Refused, match=r"^DAMAGED_TOKENS: case\.npz is damaged or no token file: ") as end:
        read_tokens(path, tables=UNIFORM)
    assert "\n" not in str(end.value)


def test_packed_parts_that_do_not_fit_their_lengths_are_one_line(tokens, tmp_path):
    whole = content_of(tokens).joined()
    hostile = [whole[:n] for n in (0, 3, 19, 100, len(whole) - 1)] + [whole + b"\0"]
    hostile.append(packing.HEAD.pack(packing.MAGIC, 2**32 - 1, 0, 0, 0) + whole[20:])
    bomb = zlib.compress(b" " * 50_000_000)
    hostile.append(packing.HEAD.pack(packing.MAGIC, len(bomb), 0, 0, 0) + bomb)
    hostile.append(packing.HEAD.pack(packing.MAGIC, 4, 0, 0, 0) + zlib.compress(b"[")[:4])
    for content in hostile:
        with pytest.raises(Refused, match=r"^DAMAGED_TOKENS: "):
            read_tokens(stored(tmp_path / "case.npz", content), tables=UNIFORM)
    np.savez(tmp_path / "case.npz", packed=np.frombuffer(whole, np.int32 if len(whole) % 4 == 0 else np.int8))
    with pytest.raises(Refused, match="its packed part must be bytes, and all there is"):
        read_tokens(tmp_path / "case.npz", tables=UNIFORM)


def test_any_flipped_bit_of_a_packed_part_is_refused_or_changes_no_length(tokens, tmp_path, rng):
    """The archive's own checksum is made anew each time, so that it does not help."""
    whole, refused = content_of(tokens).joined(), 0
    for place in rng.integers(0, len(whole), 150):
        other = bytearray(whole)
        other[place] ^= 1 << int(rng.integers(8))
        try:
            read = read_tokens(stored(tmp_path / "case.npz", bytes(other)), tables=UNIFORM)
            assert len(read.codes) == len(read.coords) and read.codes.max() < 256
        except Refused:
            refused += 1
    assert refused > 140


def test_codes_of_cells_beyond_the_table_cannot_be_written(tokens):
    for level in (None, line(16, np.zeros(16, int))):
        with pytest.raises((ValueError, IndexError)):
            content_of(tokens, CodeTables("ab" * 32, 16, (level,)))


def test_any_flipped_bit_of_codes_by_their_neighbours_is_refused_or_harmless(tokens, tmp_path, rng):
    tables = UNIFORM._replace(levels=(line(256, np.bincount(tokens.codes, minlength=256)),))
    parts = content_of(tokens, tables)
    for place in rng.integers(0, len(parts.codes), 60):
        other = bytearray(parts.codes)
        other[place] ^= 1 << int(rng.integers(8))
        try:
            content = parts._replace(codes=bytes(other)).joined()
            assert read_tokens(stored(tmp_path / "case.npz", content), tables=tables).codes.max() < 256
        except Refused as refused:
            assert refused.code == "DAMAGED_TOKENS"


def test_a_few_bytes_that_claim_a_full_grid_take_no_time(tokens, tmp_path):
    """Cells that are certain take no bits: their number is bounded by the bytes all the same."""
    told = {"latent_shape": [256, 256, 256], "count": 256**3}
    parts = content_of(tokens)._replace(cells=bytes([0]) + struct.pack("<I", 1 << 31) + b"\xff\xff" * 40)
    with pytest.raises(Refused, match=r"^DAMAGED_TOKENS: "):
        read_tokens(stored(tmp_path / "case.npz", with_header(parts, **told)), tables=UNIFORM)
    assert hashlib.sha256((tmp_path / "case.npz").read_bytes()).digest()
