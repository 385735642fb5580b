"""How likely each code is where it stands: what packed token files code their codes by.

All of it follows from the weights, so whoever can decode the tokens has it, and in whole numbers, so that it is the
same on every machine. A codebook is halved again and again, across the coordinate in which it is widest and where half
of the use lies; a code is the sides it lies on, then its place in what is left. Each side is told by how many of the
neighbours known so far lie on either, begun at how often training chose it, and learned as the file goes. Cells go from
a coarse grid of every eighth to all, so that most have neighbours on both sides.

A code without a codebook of vectors (fsq), or of one larger than a table holds, counts as any other.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int64, Integer

from app.tokens.cell_levels import NUM_KINDS, code_levels
from app.tokens.entropy import TOTAL, AdaptiveBits, Reader, Writer, uniform_table
from app.tokens.occupancy import CodeBits, Shape, reading, row_map, writing
from networks.residual import NO_CODE, ResidualQuantizer
from networks.vqvae import SparseVQVAE

COUNT_UNIT = 1 << 8  # of a mean count
MAX_COUNT = 1 << 32
MAX_POINT = 2047  # the largest coordinate of a codebook, as a whole number
MAX_SPLITS = 9
PRIOR_BITS = 16  # what is believed of a context at first counts as much as so many bits
PRIOR_UNIT = 16  # of a bit
STEPS = (8, 4, 2, 1)  # cells between known neighbours
VOTES = 4  # of neighbours on a side: none to three or more
DIGIT = 1 << 12  # of codes beyond what one table holds


class LevelTable(NamedTuple):
    """One codebook, halved. Places are those of codes in the order of the leaves they end in."""

    sides: Bool[np.ndarray, "K S"]  # of each split on its way, whether a code lies on the second side
    nodes: Int64[np.ndarray, "S K"]  # the splits that each code meets
    priors: Int64[np.ndarray, " N"]  # share of the second side at each split, of TOTAL
    code_at: Int64[np.ndarray, " K"]  # by place
    place_of: Int64[np.ndarray, " K"]
    firsts: Int64[np.ndarray, " L1"]  # place of the first code of each leaf, and one beyond
    weights: Int64[np.ndarray, " K1"]  # of all codes before a place


class CodeTables(NamedTuple):
    """Of each quantiser level of a tokenizer; None where every code counts the same."""

    tokenizer: str  # sha256 of the weights
    num_codes: int
    levels: tuple[LevelTable | None, ...]


def tables_of(network: SparseVQVAE, digest: str) -> CodeTables:
    """The tables of a tokenizer."""
    parts = network.vq.levels if isinstance(network.vq, ResidualQuantizer) else [network.vq]
    return CodeTables(digest, network.sizes.num_embeddings, tuple(map(_table, parts)))


def _table(quantizer: object) -> LevelTable | None:
    embeddings = getattr(quantizer, "embeddings", None)
    if embeddings is None or len(embeddings.weight) > TOTAL // 2:
        return None
    rows = embeddings.weight.detach().cpu().numpy().astype(np.float64)
    points = np.rint(rows / max(np.abs(rows).max(), 1e-30) * MAX_POINT).astype(np.int64)
    counts = getattr(quantizer, "mean_count", None)
    if counts is None:
        return level_table(points, np.zeros(len(points), np.int64))
    scaled = np.floor(counts.detach().cpu().numpy().astype(np.float64) * COUNT_UNIT)
    return level_table(points, np.clip(scaled, 0, MAX_COUNT).astype(np.int64))


def level_table(points: Int64[np.ndarray, "K D"], counts: Int64[np.ndarray, " K"]) -> LevelTable:
    """Of codes at whole coordinates, chosen so often."""
    use = 1 + counts * TOTAL // max(int(counts.sum()), 1)
    splits = min(max(len(points).bit_length() - 3, 0), MAX_SPLITS)
    sides, leaves = np.zeros((len(points), splits), bool), [np.arange(len(points))]
    for depth in range(splits):
        halves = [half for rows in leaves for half in _halves(rows, points, use)]
        for rows in halves[1::2]:
            sides[rows, depth] = True
        leaves = halves
    ways = [sides[:, :depth] @ (1 << np.arange(depth)[::-1]) for depth in range(splits)]
    nodes = np.array([(1 << depth) - 1 + way for depth, way in enumerate(ways)], np.int64).reshape(splits, len(points))
    whole, second = np.zeros(1 << splits, np.int64), np.zeros(1 << splits, np.int64)
    for depth in range(splits):
        np.add.at(whole, nodes[depth], use)
        np.add.at(second, nodes[depth][sides[:, depth]], use[sides[:, depth]])
    code_at = np.concatenate(leaves)
    return LevelTable(
        sides=sides,
        nodes=nodes,
        priors=second * TOTAL // np.maximum(whole, 1),
        code_at=code_at,
        place_of=np.argsort(code_at),
        firsts=np.concatenate([[0], np.cumsum([len(rows) for rows in leaves])]),
        weights=np.concatenate([[0], np.cumsum(use[code_at])]),
    )


def _halves(rows: np.ndarray, points: np.ndarray, use: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Across the widest coordinate, where half of the use lies."""
    if len(rows) < 2:
        return rows, rows[:0]
    mine, weight = points[rows], use[rows]
    spread = (mine - (mine * weight[:, None]).sum(0) // weight.sum()) ** 2 * weight[:, None]
    order = np.argsort(mine[:, int(spread.sum(0).argmax())], kind="stable")
    reached = np.cumsum(weight[order])
    cut = min(max(int(np.searchsorted(reached, reached[-1] // 2)), 1), len(rows) - 1)
    return rows[order[:cut]], rows[order[cut:]]


# ---- codes in and out


class _Coding(NamedTuple):
    """How bits and places are coded: a writer is given them, a reader finds them."""

    bits: CodeBits
    places: Callable[[LevelTable, np.ndarray, np.ndarray | None], np.ndarray]


def put_codes(
    writer: Writer,
    codes: Integer[np.ndarray, "M L"],
    coords: Int[np.ndarray, "M 3"],
    shape: Shape,
    tables: CodeTables,
) -> None:
    """Level by level; after the first, where some cells have fewer codes than others, how many each has."""

    def put_places(level: LevelTable, leaves: np.ndarray, places: np.ndarray) -> np.ndarray:
        writer.put_ranges(_reached(level, leaves, places), _reached(level, leaves, places + 1))
        return places

    codes, passes = codes.astype(np.int64), list(_passes(coords, shape))
    for number, level in enumerate(tables.levels[: codes.shape[1]]):
        has_code = codes[:, number] != NO_CODE
        if number == 1 and (codes == NO_CODE).any():
            kinds = _kinds(tables.levels[0], codes[:, 0])
            code_levels(writing(writer), passes, kinds, codes.shape[1], (codes != NO_CODE).sum(1))
        column = codes[has_code, number]
        if level is None:
            _put_digits(writer, column, tables.num_codes)
        else:
            near = passes if has_code.all() else list(_passes(coords[has_code], shape))
            _coded(_Coding(writing(writer), put_places), level, near, len(column), column)


def take_codes(
    reader: Reader,
    levels: int,
    coords: Int[np.ndarray, "M 3"],
    shape: Shape,
    tables: CodeTables,
    *,
    unlike: bool = False,
) -> Int64[np.ndarray, "M L"]:
    """Codes of so many levels; of `unlike` cells some have fewer, with NO_CODE beyond."""

    def take_places(level: LevelTable, leaves: np.ndarray, _: None) -> np.ndarray:
        if (level.firsts[leaves] == level.firsts[leaves + 1]).any():
            raise ValueError("it names codes that its tokenizer does not have")
        return reader.take_with(len(leaves), lambda slots, rows: _place_at(level, leaves[rows], slots))

    coding = _Coding(reading(reader), take_places)
    passes, codes = list(_passes(coords, shape)), np.full((len(coords), levels), NO_CODE)
    have = np.full(len(coords), levels)
    for number, level in enumerate(tables.levels[:levels]):
        if number == 1 and unlike:
            have = code_levels(reading(reader), passes, _kinds(tables.levels[0], codes[:, 0]), levels)
        has_code = have > number
        if level is None:
            codes[has_code, number] = _take_digits(reader, int(has_code.sum()), tables.num_codes)
        else:
            near = passes if has_code.all() else list(_passes(coords[has_code], shape))
            codes[has_code, number] = _coded(coding, level, near, int(has_code.sum()), None)
    return codes


def _kinds(level: LevelTable | None, codes: Int64[np.ndarray, " M"]) -> Int64[np.ndarray, " M"]:
    """Which part of its codebook each code lies in, after the first few splits."""
    if level is None:
        return np.zeros(len(codes), np.int64)
    splits = min(level.sides.shape[1], NUM_KINDS.bit_length() - 1)
    return level.sides[codes, :splits] @ (1 << np.arange(splits))


def _coded(
    coding: _Coding,
    level: LevelTable,
    passes: list[tuple[np.ndarray, np.ndarray]],
    count: int,
    truth: Int64[np.ndarray, " M"] | None,
) -> Int64[np.ndarray, " M"]:
    """The codes of one level: sides by what the neighbours chose, then the place in the leaf."""
    model, codes = _model(level), np.full(count + 1, -1)  # the last stands for a neighbour that does not exist
    for rows, near in passes:
        around, way = codes[near], np.zeros(len(rows), np.int64)
        mine = None if truth is None else truth[rows]
        for depth, nodes in enumerate(level.nodes):
            node = (1 << depth) - 1 + way
            beside = (around >= 0) & (nodes[around] == node[:, None])
            second = level.sides[around, depth]
            votes = [np.minimum((beside & side).sum(1), VOTES - 1) for side in (~second, second)]
            contexts = (node * VOTES + votes[0]) * VOTES + votes[1]
            way = 2 * way + coding.bits(model, contexts, None if mine is None else level.sides[mine, depth])
        codes[rows] = level.code_at[coding.places(level, way, None if mine is None else level.place_of[mine])]
    return codes[:-1]


def _model(level: LevelTable) -> AdaptiveBits:
    """Begun at the share of each split's second side, drawn to the side that neighbours lie on."""
    votes = np.arange(VOTES * VOTES)
    ours, all_ = votes % VOTES, votes // VOTES + votes % VOTES
    whole = 2 * PRIOR_BITS * PRIOR_UNIT
    ones = whole * (2 * level.priors[:, None] + ours * TOTAL) // ((2 + all_) * TOTAL)
    return AdaptiveBits(ones.size, ones=np.clip(ones.ravel(), 1, whole - 1), whole=whole, step=2 * PRIOR_UNIT)


def _passes(coords: Int[np.ndarray, "M 3"], shape: Shape) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of one pass after another, each with the rows of its six neighbours; those known go before."""
    border = STEPS[0]
    row_of = row_map(coords, shape, border=border)
    left = np.ones(len(coords), bool)
    for step in STEPS:
        on_grid = (coords % step == 0).all(1)
        parity = (coords // step % 2) @ np.array([4, 2, 1])
        for octant in range(8):
            rows = np.flatnonzero(left & on_grid & (parity == octant))
            if len(rows):
                around = [
                    coords[rows] + border + step * side * axis for axis in np.eye(3, dtype=int) for side in (-1, 1)
                ]
                yield rows, np.stack([row_of[tuple(place.T)] for place in around], 1)
                left[rows] = False


def _reached(level: LevelTable, leaves: np.ndarray, places: np.ndarray) -> Int64[np.ndarray, " N"]:
    """Cumulative frequency before a place, within its leaf; TOTAL at the leaf's end."""
    first, stop = level.firsts[leaves], level.firsts[leaves + 1]
    before, whole = (level.weights[place] - level.weights[first] for place in (places, stop))
    return before * (TOTAL - (stop - first)) // whole + (places - first)


def _place_at(level: LevelTable, leaves: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The place whose range holds each slot, by bisection, and that range."""
    low, high = level.firsts[leaves], level.firsts[leaves + 1]
    while (high - low > 1).any():
        middle = (low + high) // 2
        reached = _reached(level, leaves, middle) <= slots
        low, high = np.where(reached, middle, low), np.where(reached, high, np.maximum(middle, low + 1))
    return low, _reached(level, leaves, low), _reached(level, leaves, low + 1)


def _put_digits(writer: Writer, codes: Int64[np.ndarray, " M"], number: int) -> None:
    while number > TOTAL:
        writer.put(codes % DIGIT, uniform_table(DIGIT))
        codes, number = codes // DIGIT, -(-number // DIGIT)
    writer.put(codes, uniform_table(number))


def _take_digits(reader: Reader, count: int, number: int) -> Int64[np.ndarray, " M"]:
    codes, unit = np.zeros(count, np.int64), 1
    while number > TOTAL:
        codes += unit * reader.take(count, uniform_table(DIGIT))
        unit, number = unit * DIGIT, -(-number // DIGIT)
    return codes + unit * reader.take(count, uniform_table(number))
